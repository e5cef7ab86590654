"""What the second stage of a cascade learns from: label maps of the first stage.

Where all folds of the first stage are trained, each map is of a network that has not seen its case, as in prediction.
Else some are of a network that learned from the case: they are better than those of new images, which is warned of.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoseg.cases.cache import CacheMark
from autoseg.events import Report, Said, Warned
from autoseg.image.crop import crop
from autoseg.image.formats import read_labels
from autoseg.image.labels import to_indices
from autoseg.image.resample import resample_labels
from autoseg.layout import Layout, ModelLayout, prediction_file
from autoseg.network.distributed import ALONE, Team, share, wait_for_all
from autoseg.records import Case, Configuration, Plan, Run
from autoseg.steps.predict import segment_cases
from autoseg.steps.predicting.models import learned_from, trained_models
from autoseg.steps.predicting.predictor import Predictor
from autoseg.store import load, make_folder, remove_unfinished


def trained(layout: Layout, configuration: str, fold: str) -> list[Run]:
    """The trainings of this fold, of whatever seed, that came to their end."""
    folder = layout.configuration(configuration)
    paths = (*folder.glob(f"fold_{fold}/run.json"), *folder.glob(f"fold_{fold}.seed_*/run.json"))
    return [record for record in (load(path, Run) for path in paths) if record.finished]


def previous_label_maps(
    run: Path, plan: Plan, configuration: Configuration, fold: str, cases: Sequence[Case], device: str | None,
    report: Report, team: Team = ALONE,
) -> dict[str, Path]:  # fmt: skip
    """Label maps of the previous stage for `cases`, by id; those that are missing are predicted now and kept.

    A case that some fold of the first stage validated on has a prediction of a network that never saw it. The others
    are predicted by the first stage's network of the same `fold`, so that validation cases stay unseen in both stages;
    those that it learned from are counted in a warning. A team shares what is missing.

    Raises UserError when the first stage is not trained for this fold.
    """
    layout = Layout(run)
    previous = str(configuration.previous)
    found = {}
    for folder in sorted(layout.configuration(previous).glob("fold_*")):
        for case in cases:
            path = prediction_file(ModelLayout(folder).validation, case.id, plan.file_ending)
            if path.is_file():
                found[case.id] = path
    model = trained_models(layout, previous, [fold])[0]
    without = [case for case in cases if case.id not in found]
    _warn_of_seen(run, model, [case.id for case in without], len(cases), previous, report)
    kept = model.for_next_stage
    found |= {case.id: prediction_file(kept, case.id, plan.file_ending) for case in without}
    missing = [case for case in without if not found[case.id].is_file()]
    if missing:
        report(Said(f"{previous} predicts {len(missing)} training cases for {configuration.name}."))
    if missing and team.is_first:
        make_folder(kept)
        remove_unfinished(kept)
    wait_for_all(team)  # all have looked before the first map is written, so they share the same cases
    if own := share(team, missing):
        predictor = Predictor(run, configuration=previous, folds=[fold], device=device, postprocess=False)
        segment_cases(predictor, own, kept, False, report)
    wait_for_all(team)
    return found


def _warn_of_seen(
    run: Path, model: ModelLayout, without: Sequence[str], cases: int, previous: str, report: Report
) -> None:
    """Say how many cases only have a map of a network that learned from them, and how to avoid that."""
    seen = set(without) & set(learned_from(model))
    if seen:
        words = shlex.join(["autoseg", "train", str(run), "-c", previous, "-f"])
        report(Warned(
            f"{len(seen)} of {cases} label maps are of {previous}, {model.root.name}, which learned from those cases: "
            f"they are better than those of new images. Train all folds of {previous} first ({words} 0, 1, ...)."
        ))  # fmt: skip


def previous_on_grid(path: Path, mark: CacheMark, plan: Plan, configuration: Configuration) -> np.ndarray:
    """A label map of the previous stage as label indices (Z, Y, X) int16 on the grid of the cached case."""
    values_ZYX, _ = read_labels(path)
    cropped = crop(values_ZYX.transpose(configuration.axes), mark.box)
    indices_ZYX = to_indices(cropped, plan.labels, plan.ignore_value, str(path))
    how = configuration.resampling
    target_mm = configuration.spacing_mm
    return resample_labels(indices_ZYX, mark.spacing_mm, target_mm, mark.shape_voxels, 1, how.anisotropy)
