"""`autoseg evaluate`: scores of a folder of predicted label maps against the references.

Axes: Z Y X voxels. The policy for empty cases is `scoring.overlap.POLICY`; it is saved with the scores.
"""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import ndimage

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Started, silent
from autoseg.image.components import bounding_box, components
from autoseg.image.formats import read_geometry, read_labels
from autoseg.image.labels import grid_difference, label_maps, labels_found, some, to_indices
from autoseg.layout import Layout, ModelLayout, scores_csv, scores_file
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import CaseScore, Dataset, Label, Scores
from autoseg.scoring import overlap, surface

LESION_CONNECTIVITY = 3


@dataclass(frozen=True)
class Pair:
    """One case to be scored: the predicted label map and its reference."""

    id: str
    prediction: Path
    reference: Path


@dataclass(frozen=True)
class Scoring:
    """What one worker needs to know besides the pair."""

    labels: tuple[Label, ...]
    ignore_value: int | None
    surface: bool
    tolerance_mm: float


@dataclass(frozen=True)
class _Job:
    pair: Pair
    scoring: Scoring


def evaluate(
    predictions: Path,
    references: Path,
    *,
    labels: tuple[Label, ...] | None = None,
    ignore_value: int | None = None,
    cases: Sequence[str] | None = None,
    output: Path | None = None,
    surface: bool = True,
    tolerance_mm: float = 1.0,
    workers: int | None = None,
    report: Report = silent,
) -> Scores:
    """Score every label map in `predictions` against the one of the same name in `references`.

    Args:
        predictions: folder of label maps; the file name without its ending is the case id.
        references: folder of label maps, or a run folder or its `dataset.json`, whose cases name their label maps.
        labels: the classes, background first; None takes them from a `dataset.json` in or beside `references`, else
            the values found in the references.
        ignore_value: value in the references that nobody annotated; None takes it from the same place as the labels.
        cases: ids to score; None scores all, and then both sides must hold the same cases.
        output: folder for `scores.json` and `scores.csv`; None takes `predictions`.
        surface: also compute HD95, average surface distance (mm) and surface Dice at `tolerance_mm`.
        workers: processes; None uses all allowed cores.

    Raises:
        UserError: cases or grids differ, a file is unreadable, or a value is no label; nothing is written then.
    """
    known = dataset_near(references)
    pairs = pair_up(predictions, references, known, cases)
    check_grids(pairs)
    if labels is None:
        labels = known.labels if known else labels_found([pair.reference for pair in pairs], ignore_value)
    if ignore_value is None and known is not None:
        ignore_value = known.ignore_value
    scored = score_pairs(pairs, Scoring(labels, ignore_value, surface, tolerance_mm), workers, report)
    return save_scores(scored, labels, predictions, references, predictions if output is None else output)


def evaluate_run(
    run: Path,
    configuration: str | None = None,
    *,
    surface: bool = True,
    tolerance_mm: float = 1.0,
    workers: int | None = None,
    report: Report = silent,
) -> Scores:
    """Score the cross-validation of a run: the validation predictions of all its folds together.

    `scores.json` and `scores.csv` go into the configuration's folder. `configuration` None takes the only one trained.

    Raises:
        UserError: as `evaluate`; or nothing is trained yet.
    """
    dataset = store.load(Layout(run).dataset, Dataset)
    name, pairs = validation_pairs(run, dataset, configuration)
    check_grids(pairs)
    scoring = Scoring(dataset.labels, dataset.ignore_value, surface, tolerance_mm)
    folder = Layout(run).configuration(name)
    return save_scores(score_pairs(pairs, scoring, workers, report), dataset.labels, folder, run, folder)


def save_scores(
    scored: tuple[CaseScore, ...], labels: tuple[Label, ...], predictions: Path, references: Path, folder: Path
) -> Scores:
    """Put case scores together and write `scores.csv` and `scores.json` into `folder`."""
    scores = summary(scored, labels, str(predictions), str(references))
    store.write_text(scores_csv(folder), as_csv(scores))
    store.save(scores_file(folder), scores)
    return scores


def score_pairs(
    pairs: Sequence[Pair], scoring: Scoring, workers: int | None = None, report: Report = silent
) -> tuple[CaseScore, ...]:
    """Score pairs in parallel; the result is in the order of the pairs."""
    what = "Scoring"
    report(Started(what, len(pairs)))
    jobs = [_Job(pair, scoring) for pair in pairs]
    done = {}
    for job, score in over_cases(_score_file, jobs, workers or allowed_cores(), lambda job: job.pair.id):
        done[job.pair.id] = score
        report(Advanced(what, len(done), len(pairs), job.pair.id))
    report(Finished(what))
    return tuple(done[pair.id] for pair in pairs)


def score_case(
    case: str,
    prediction_ZYX: np.ndarray,
    reference_ZYX: np.ndarray,
    spacing_mm: tuple[float, float, float],
    classes: int,
    with_surface: bool = True,
    tolerance_mm: float = 1.0,
) -> CaseScore:
    """Score one case from two maps of label indices (negative in the reference: not annotated)."""
    voxel_mm3 = float(np.prod(spacing_mm))
    flat, rows = prediction_ZYX.shape[0] == 1, []
    for predicted_ZYX, referred_ZYX in class_masks(prediction_ZYX, reference_ZYX, classes):
        masks = (predicted_ZYX & referred_ZYX, predicted_ZYX, referred_ZYX)
        counts = overlap.Counts(*(int(np.count_nonzero(mask)) for mask in masks))
        row = {name: score(counts, voxel_mm3) for name, score in overlap.METRICS.items()}
        row["lesion_f1"] = _lesion_f1(predicted_ZYX, referred_ZYX)
        if with_surface:
            row |= surface.surface_scores(predicted_ZYX, referred_ZYX, spacing_mm, tolerance_mm, flat)
        rows.append(row)
    return CaseScore(id=case, values={name: tuple(row[name] for row in rows) for name in rows[0]})


def class_masks(
    prediction_ZYX: np.ndarray, reference_ZYX: np.ndarray, classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """For each foreground class its two bool masks, cropped to the box that holds both; empty where neither has it.

    Voxels that nobody annotated (reference below 0) are background in both.
    """
    inside = bounding_box((prediction_ZYX != 0) | (reference_ZYX != 0)) or (slice(0, 0),) * 3
    prediction_ZYX, reference_ZYX = prediction_ZYX[inside], reference_ZYX[inside]
    if reference_ZYX.size and reference_ZYX.min() < 0:
        prediction_ZYX = np.where(reference_ZYX < 0, 0, prediction_ZYX)
        reference_ZYX = np.maximum(reference_ZYX, 0)
    boxes = [ndimage.find_objects(each, classes - 1) for each in (prediction_ZYX, reference_ZYX)]
    for k in range(1, classes):
        box = _around(boxes[0][k - 1], boxes[1][k - 1])
        yield prediction_ZYX[box] == k, reference_ZYX[box] == k


def summary(cases: tuple[CaseScore, ...], labels: tuple[Label, ...], prediction: str, reference: str) -> Scores:
    """Put case scores together: means over the cases per class, and over the classes."""
    foreground = tuple(label.name for label in labels[1:])
    names = tuple(cases[0].values) if cases else ()
    means = {
        name: tuple(overlap.mean([case.values[name][k] for case in cases]) for k in range(len(foreground)))
        for name in names
    }
    return Scores(
        prediction=prediction,
        reference=reference,
        labels=foreground,
        policy=overlap.POLICY,
        cases=cases,
        mean=means,
        foreground_mean={name: overlap.mean(values) for name, values in means.items()},
    )


def as_csv(scores: Scores) -> str:
    """One line per case and class; an empty field is a score that is not defined."""
    text = io.StringIO()
    metrics = tuple(scores.mean)
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("case", "label", *metrics))
    for case in scores.cases:
        for k, label in enumerate(scores.labels):
            rows.writerow((case.id, label, *(case.values[metric][k] for metric in metrics)))
    return text.getvalue()


# ------------------------------------------------------------------------------------------------ folders and labels


def pair_up(
    predictions: Path, references: Path, known: Dataset | None = None, cases: Sequence[str] | None = None
) -> tuple[Pair, ...]:
    """Pair the label maps of two places by case id; `known` names the references when they are a run's data set.

    Raises:
        UserError: a case is on one side only (with `cases`: a named case is missing).
    """
    predicted = label_maps(predictions)
    if known is not None and (references.is_file() or Layout(references).dataset.is_file()) and known.cases:
        referred = {case.id: Path(case.label) for case in known.cases if case.label is not None}
    else:
        referred = label_maps(references)
    wanted = set(predicted) | set(referred) if cases is None else set(cases)
    for here, there, place in ((predicted, references, predictions), (referred, predictions, references)):
        missing = sorted(wanted - set(here))
        if missing:
            raise UserError(
                f"{place} has no label map for {len(missing)} of {len(wanted)} cases that "
                f"{'are asked for' if cases is not None else f'{there} has'}: {some(missing)}.",
                fix="Compare folders with the same cases, or name the cases to score.",
            )
    return tuple(Pair(case, predicted[case], referred[case]) for case in sorted(wanted))


def validation_pairs(
    run: Path, dataset: Dataset, configuration: str | None = None
) -> tuple[str, tuple[Pair, ...]]:
    """The configuration and its validation predictions of all folds (unnamed seed), paired with the references."""
    names = [configuration] if configuration else sorted(each.name for each in Layout(run).models.glob("*"))
    found: dict[str, dict[str, Path]] = {}
    for name in names:
        for folder in sorted(Layout(run).configuration(name).glob("fold_*")):
            validation = ModelLayout(folder).validation
            if ".seed_" not in folder.name and folder.name != "fold_all" and validation.is_dir():
                found.setdefault(name, {}).update(label_maps(validation))
    if not found:
        raise UserError(
            f"{run}: no validation predictions{f' of {configuration}' if configuration else ''} to learn from.",
            fix="Train at least one fold first: autoseg train.",
        )
    if len(found) > 1:
        raise UserError(
            f"{run}: several configurations have validation predictions: {', '.join(found)}.",
            fix="Name one with --configuration.",
        )
    (name, predictions), references = *found.items(), {case.id: case.label for case in dataset.cases}
    missing = [case for case in predictions if references.get(case) is None]
    if missing:
        raise UserError(f"{run}: predicted cases without a reference in dataset.json: {', '.join(missing[:5])}.")
    return name, tuple(Pair(case, path, Path(str(references[case]))) for case, path in sorted(predictions.items()))


def check_grids(pairs: Sequence[Pair]) -> None:
    """Raise UserError naming every pair whose two files do not lie on the same grid; reads only headers."""
    wrong = []
    for pair in pairs:
        difference = grid_difference(read_geometry(pair.prediction), read_geometry(pair.reference))
        if difference:
            wrong.append(f"{pair.id} ({difference})")
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(pairs)} predictions do not lie on their reference's grid: {some(wrong)}.",
            fix="Predict from the images that belong to these references.",
        )


def dataset_near(references: Path) -> Dataset | None:
    """The labels of a data set: of a run, or of a `dataset.json` in or beside the folder of references.

    Reads autoseg's own file and those of the Decathlon and of nnU-Net (of which only labels are taken). None when there
    is no such file, or it names regions (lists of values) instead of labels.
    """
    places = [references] if references.is_file() else [Layout(references).dataset, Layout(references.parent).dataset]
    for path in places:
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}).", fix="Mend or remove the file.") from error
        if isinstance(content, dict) and "autoseg" in content:
            return store.parse(content, Dataset, str(path))
        if isinstance(content, dict) and isinstance(content.get("labels"), dict):
            return _foreign(content["labels"], path)
    return None


# ------------------------------------------------------------------------------------------------ parts


def _score_file(job: _Job) -> CaseScore:
    pair, scoring = job.pair, job.scoring
    predicted_ZYX, _ = read_labels(pair.prediction)
    referred_ZYX, geometry = read_labels(pair.reference)
    return score_case(
        pair.id,
        to_indices(predicted_ZYX, scoring.labels, None, str(pair.prediction)),
        to_indices(referred_ZYX, scoring.labels, scoring.ignore_value, str(pair.reference)),
        geometry.spacing_mm,
        len(scoring.labels),
        scoring.surface,
        scoring.tolerance_mm,
    )


def _lesion_f1(predicted_ZYX: np.ndarray, referred_ZYX: np.ndarray) -> float | None:
    return overlap.lesion_f1(
        components(predicted_ZYX, LESION_CONNECTIVITY)[0], components(referred_ZYX, LESION_CONNECTIVITY)[0]
    )


def _around(one: tuple[slice, ...] | None, other: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The box around two boxes; of no boxes an empty one."""
    if one is None or other is None:
        return one or other or (slice(0, 0),) * 3
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))


def _foreign(named: dict, path: Path) -> Dataset | None:
    """Labels of a Decathlon ({"1": "liver"}) or nnU-Net ({"liver": 1}) file as a data set without cases."""
    try:
        pairs = [(str(b), int(a)) if str(a).lstrip("-").isdigit() else (str(a), int(b)) for a, b in named.items()]
    except (TypeError, ValueError):
        return None
    ignore = next((value for name, value in pairs if name == "ignore"), None)
    kept = sorted(((value, name) for name, value in pairs if name != "ignore"))
    if len(kept) < 2 or kept[0][0] != 0:
        raise UserError(f"{path}: its labels need a background with value 0 and at least one more.")
    labels = tuple(Label(name=name, value=value) for value, name in kept)
    return Dataset(name=path.parent.name, dimension=3, channels=("",), labels=labels, ignore_value=ignore)
