"""What the second stage of a cascade learns from: label maps of the first stage, made for cases it has not seen."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoseg.cases.cache import CacheMark
from autoseg.cases.prepare import to_indices
from autoseg.events import Report, Said
from autoseg.image.crop import crop
from autoseg.image.formats import read_labels
from autoseg.image.resample import resample_labels
from autoseg.layout import Layout, ModelLayout, prediction_file
from autoseg.records import Case, Configuration, Plan, Run
from autoseg.steps.models import trained_models
from autoseg.steps.predict import segment_cases
from autoseg.steps.predictor import Predictor
from autoseg.store import load, remove_unfinished


def trained(layout: Layout, configuration: str, fold: str) -> list[Run]:
    """The trainings of this fold, of whatever seed, that came to their end."""
    folder = layout.configuration(configuration)
    paths = (*folder.glob(f"fold_{fold}/run.json"), *folder.glob(f"fold_{fold}.seed_*/run.json"))
    return [record for record in (load(path, Run) for path in paths) if record.finished]


def previous_label_maps(
    run: Path, plan: Plan, configuration: Configuration, fold: str, cases: Sequence[Case], device: str | None,
    report: Report,
) -> dict[str, Path]:
    """Label maps of the previous stage for `cases`, by id; those that are missing are predicted now and kept.

    A case that some fold of the first stage validated on has a prediction of a network that never saw it. The others
    are predicted by the first stage's network of the same `fold`, so that validation cases stay unseen in both stages.

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
    missing = [case for case in cases if case.id not in found]
    kept = model.for_next_stage
    for case in missing:
        path = prediction_file(kept, case.id, plan.file_ending)
        if path.is_file():
            found[case.id] = path
    missing = [case for case in missing if case.id not in found]
    if missing:
        report(Said(f"{previous} predicts {len(missing)} training cases for {configuration.name}."))
        kept.mkdir(parents=True, exist_ok=True)
        remove_unfinished(kept)
        predictor = Predictor(run, configuration=previous, folds=[fold], device=device, postprocess=False)
        written = segment_cases(predictor, missing, kept, False, report)
        found |= {case.id: path for case, path in zip(missing, written, strict=True)}
    return found


def previous_on_grid(path: Path, mark: CacheMark, plan: Plan, configuration: Configuration) -> np.ndarray:
    """A label map of the previous stage as label indices (Z, Y, X) int16 on the grid of the cached case."""
    values_ZYX, _ = read_labels(path)
    cropped = crop(values_ZYX.transpose(configuration.axes), mark.box)
    indices_ZYX = to_indices(cropped, plan.labels, plan.ignore_value, str(path))
    how = configuration.resampling
    return resample_labels(indices_ZYX, mark.spacing_mm, mark.shape_voxels, 1, how.anisotropy)
