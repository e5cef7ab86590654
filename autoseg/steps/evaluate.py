"""`autoseg evaluate`: scores against references, or of a whole cross-validation.

Axes: Z Y X voxels. The policy for empty cases is `scoring.overlap.POLICY`; it is saved with the scores. A case whose
files and settings are those of the last time keeps its scores: they are found by a hash in `scores.json`.
"""

import csv
import hashlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy import ndimage

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.image.companions import files_of
from autoseg.image.components import bounding_box, components
from autoseg.image.formats import read_labels
from autoseg.image.labels import labels_found, some, to_indices
from autoseg.layout import Layout, scores_csv, scores_file
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import CaseScore, Dataset, Label, Region, Scores, Splits
from autoseg.scoring import overlap, surface
from autoseg.steps.predicting.pairs import (
    Pair,
    check_grids,
    dataset_near,
    not_validated,
    pair_up,
    predicted_names,
    validated_folds,
    validation_pairs,
)

LESION_CONNECTIVITY = 3
TOLERANCE_MM = 2.0
"""Of `surface_dice_at_tolerance` where none is asked for; `surface_dice` is always at 1 mm."""
HEAD_START_SECONDS = 1.0
"""Scored in this process before there are others, see `parallel.over_cases`."""
METHOD = "3"
"""Changes when a score is computed in another way, so that older ones are not taken for current."""


@dataclass(frozen=True)
class Scoring:
    """How pairs are scored; `tolerance_mm` is one for all foreground labels, or one for each in their order.

    Where there are `regions`, these get scores instead of the labels.
    """

    labels: tuple[Label, ...]
    ignore_value: int | None
    surface: bool
    tolerance_mm: float | tuple[float, ...] = TOLERANCE_MM
    regions: tuple[Region, ...] = ()

    @property
    def tolerances_mm(self) -> tuple[float, ...]:
        """One tolerance per foreground label."""
        one = self.tolerance_mm
        return one if isinstance(one, tuple) else (float(one),) * (len(self.classes) - 1)

    @property
    def classes(self) -> tuple[Label, ...]:
        """What gets scores, background first."""
        named = tuple(Label(name=region.name, value=region.paint) for region in self.regions)
        return (self.labels[0], *named) if named else self.labels

    @property
    def members(self) -> tuple[tuple[int, ...], ...] | None:
        """Label indices that each region is made of; None where there are no regions."""
        index = {label.value: k for k, label in enumerate(self.labels)}
        return tuple(tuple(index[value] for value in region.labels) for region in self.regions) or None

    def drawn(self, annotated: Sequence[str] | None) -> list[int] | None:
        """Which of `classes` somebody drew, by the names that a case has; None is all."""
        return None if annotated is None else [k for k, each in enumerate(self.classes) if each.name in annotated]


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
    tolerance_mm: float | Mapping[str, float] = TOLERANCE_MM,
    workers: int | None = None,
    report: Report = silent,
) -> Scores:
    """Score every label map in `predictions` against the one of the same name in `references`.

    Args:
        predictions: folder of label maps; the file name without its ending is the case id.
        references: folder of label maps, or a run folder or its `dataset.json`, whose cases name their label maps.
        labels: the classes, background first; None takes them from a `dataset.json` in or beside `references`, else
            the values found in the files of both sides.
        ignore_value: value in the references that nobody annotated; None takes it from the same place as the labels.
        cases: ids to score; None scores all, and then both sides must hold the same cases.
        output: folder for `scores.json` and `scores.csv`; None takes `predictions`.
        surface: also compute HD95, average surface distance (mm) and surface Dice at 1 mm and at a tolerance.
        tolerance_mm: of the latter, for all labels, or by label name (others: `TOLERANCE_MM`).
        workers: processes; None uses all allowed cores.

    Raises:
        UserError: cases or grids differ, a file is unreadable, or a value is no label; nothing is written then.
    """
    folder = predictions if output is None else output
    known = dataset_near(references)
    pairs = pair_up(predictions, references, known, cases)
    store.refuse_unwritable(folder)  # not after an hour of scoring
    check_grids(pairs)
    if labels is None:
        files = [path for pair in pairs for path in (pair.reference, pair.prediction)]
        labels = known.labels if known else labels_found(files, ignore_value)
    if ignore_value is None and known is not None:
        ignore_value = known.ignore_value
    regions = known.regions if known is not None and labels == known.labels else ()
    scoring = Scoring(labels, ignore_value, surface, regions=regions)
    scoring = replace(scoring, tolerance_mm=tolerances(tolerance_mm, scoring.classes))
    scored = score_pairs(pairs, scoring, workers, report, scored_before(folder))
    return save_scores(scored, scoring, predictions, references, folder)


def evaluate_run(
    run: Path,
    configuration: str | None = None,
    *,
    surface: bool = True,
    tolerance_mm: float | Mapping[str, float] = TOLERANCE_MM,
    workers: int | None = None,
    report: Report = silent,
) -> Scores:
    """Score the cross-validation of one configuration of a run: the validation predictions of all its folds together.

    `scores.json` and `scores.csv` go into the configuration's folder. `configuration` None takes the only one trained,
    else the selected one; a pair such as "2d+3d" that `select` has combined is one, too. `surface`, `tolerance_mm` and
    `workers` are those of `evaluate`.

    Raises:
        UserError: as `evaluate`; or nothing is trained yet.
    """
    dataset = store.load(Layout(run).dataset, Dataset)
    name, pairs = validation_pairs(run, dataset, configuration)
    check_grids(pairs)
    scoring = scoring_of(dataset, surface, tolerance_mm)
    folder = Layout(run).cross_validation(name)
    _say_folds(run, name, report)
    scored = score_pairs(pairs, scoring, workers, report, scored_before(folder))
    return save_scores(scored, scoring, folder, run, folder)


def evaluate_all(
    run: Path,
    configuration: str | None = None,
    *,
    surface: bool = True,
    tolerance_mm: float | Mapping[str, float] = TOLERANCE_MM,
    workers: int | None = None,
    report: Report = silent,
) -> dict[str, Scores]:
    """`evaluate_run` by name, for one or (None) for every configuration and pair that has validation predictions."""
    if not Layout(run).dataset.is_file():
        raise UserError(
            f"{run}: this is no run folder.", fix="Name the references, too: autoseg evaluate PRED REF"
        )
    names = (configuration,) if configuration else predicted_names(run)
    if not names:
        raise not_validated(run, "any configuration")
    return {
        name: evaluate_run(
            run, name, surface=surface, tolerance_mm=tolerance_mm, workers=workers, report=report
        )
        for name in names
    }


def save_scores(
    scored: tuple[CaseScore, ...], scoring: Scoring, predictions: Path, references: Path, folder: Path
) -> Scores:
    """Put case scores together and write `scores.csv` and `scores.json` into `folder`."""
    scores = summary(scored, scoring.classes, str(predictions), str(references))
    if scoring.surface:
        scores = scores.model_copy(update={"tolerances_mm": scoring.tolerances_mm})
    store.write_text(scores_csv(folder), as_csv(scores))
    store.save(scores_file(folder), scores)
    return scores


def score_pairs(
    pairs: Sequence[Pair],
    scoring: Scoring,
    workers: int | None = None,
    report: Report = silent,
    known: Mapping[str, CaseScore] | None = None,
) -> tuple[CaseScore, ...]:
    """Score pairs in parallel, in their order; `known` are scores by case id, kept where nothing has changed."""
    what, known = "Scoring", known or {}
    report(Started(what, len(pairs)))
    done = {pair.id: known[pair.id] for pair in pairs if pair.id in known and _unchanged(pair, scoring, known[pair.id])}
    if done:
        report(Said(f"{len(done)} of {len(pairs)} cases have not changed since they were scored."))
    jobs = [_Job(pair, scoring) for pair in pairs if pair.id not in done]
    workers = workers or allowed_cores()
    for job, score in over_cases(_score_file, jobs, workers, lambda job: job.pair.id, HEAD_START_SECONDS):
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
    tolerance_mm: float | Sequence[float] = TOLERANCE_MM,
    annotated: Sequence[int] | None = None,
    members: Sequence[Sequence[int]] | None = None,
) -> CaseScore:
    """Score one case from two maps of label indices (negative in the reference: not annotated).

    Args:
        tolerance_mm: of `surface_dice_at_tolerance`, one for all foreground classes or one for each.
        annotated: label indices that somebody drew in this reference; the others have no scores. None is all.
        members: label indices that each region is made of; then the regions are scored, and counted by `annotated`,
            instead of the labels. None: there are no regions.
    """
    voxel_mm3 = float(np.prod(spacing_mm))
    flat, rows = prediction_ZYX.shape[0] == 1, list[dict[str, float | None]]()
    masks_of = class_masks(prediction_ZYX, reference_ZYX, classes, members)
    for k, (predicted_ZYX, referred_ZYX) in enumerate(masks_of, 1):
        masks = (predicted_ZYX & referred_ZYX, predicted_ZYX, referred_ZYX)
        counts = overlap.Counts(*(int(np.count_nonzero(mask)) for mask in masks))
        row = {name: score(counts, voxel_mm3) for name, score in overlap.METRICS.items()}
        row["lesion_f1"] = _lesion_f1(predicted_ZYX, referred_ZYX)
        if with_surface:
            own_mm = tolerance_mm if isinstance(tolerance_mm, (int, float)) else tolerance_mm[k - 1]
            row |= surface.surface_scores(predicted_ZYX, referred_ZYX, spacing_mm, own_mm, flat)
        unknown = annotated is not None and k not in annotated
        rows.append(dict.fromkeys(row) if unknown else row)
    return CaseScore(id=case, values={name: tuple(row[name] for row in rows) for name in rows[0]})


def class_masks(
    prediction_ZYX: np.ndarray, reference_ZYX: np.ndarray, classes: int,
    members: Sequence[Sequence[int]] | None = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """For each foreground class its two bool masks, cropped to the box that holds both; empty where neither has it.

    With `members`, for each region: the union of these classes. Voxels that nobody annotated (reference below 0) are
    background in both.
    """
    inside = bounding_box((prediction_ZYX != 0) | (reference_ZYX != 0)) or (slice(0, 0),) * 3
    prediction_ZYX, reference_ZYX = prediction_ZYX[inside], reference_ZYX[inside]
    if reference_ZYX.size and reference_ZYX.min() < 0:
        prediction_ZYX = np.where(reference_ZYX < 0, 0, prediction_ZYX)
        reference_ZYX = np.maximum(reference_ZYX, 0)
    if members is not None:
        for own in members:
            yield np.isin(prediction_ZYX, own), np.isin(reference_ZYX, own)
        return
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


def scoring_of(
    dataset: Dataset, surface: bool = True, tolerance_mm: float | Mapping[str, float] = TOLERANCE_MM
) -> Scoring:
    """How the cases of a data set are scored."""
    scoring = Scoring(dataset.labels, dataset.ignore_value, surface, regions=dataset.regions)
    return replace(scoring, tolerance_mm=tolerances(tolerance_mm, scoring.classes))


def tolerances(asked_mm: float | Mapping[str, float], labels: tuple[Label, ...]) -> tuple[float, ...]:
    """One tolerance in mm per foreground label. Raises UserError for a name that no label has, and below 0."""
    foreground = [label.name for label in labels[1:]]
    by_name = asked_mm if isinstance(asked_mm, Mapping) else dict.fromkeys(foreground, float(asked_mm))
    if unknown := sorted(set(by_name) - set(foreground)):
        raise UserError(f"A tolerance for {some(unknown)}, which is no label.", fix=f"Labels: {some(foreground)}.")
    if not all(0 <= value < float("inf") for value in by_name.values()):
        raise UserError(f"The tolerances {dict(by_name)} are no distances.", fix="Give millimetres, 0 or more.")
    return tuple(float(by_name.get(name, TOLERANCE_MM)) for name in foreground)


# ------------------------------------------------------------------------------------------------ scored before


def scored_before(folder: Path) -> dict[str, CaseScore]:
    """The scores by case id of a folder that was scored before; empty where there are none that can be read."""
    try:
        return {case.id: case for case in store.load(scores_file(folder), Scores).cases if case.content}
    except UserError:
        return {}


def content_of(pair: Pair, scoring: Scoring) -> str:
    """Hash of the bytes of both files of a pair and of how it is scored."""
    hashed = hashlib.blake2b(digest_size=16)
    hashed.update(repr((METHOD, scoring, pair.annotated)).encode())
    for path in (*files_of(pair.prediction), *files_of(pair.reference)):
        with open(path, "rb") as file:
            hashed.update(hashlib.file_digest(file, "blake2b").digest())
    return hashed.hexdigest()


def _unchanged(pair: Pair, scoring: Scoring, known: CaseScore) -> bool:
    return bool(known.content) and known.content == content_of(pair, scoring)


# ------------------------------------------------------------------------------------------------ parts


def _score_file(job: _Job) -> CaseScore:
    pair, scoring = job.pair, job.scoring
    content = content_of(pair, scoring)
    predicted_ZYX, _ = read_labels(pair.prediction)
    referred_ZYX, geometry = read_labels(pair.reference)
    scored = score_case(
        pair.id,
        to_indices(predicted_ZYX, scoring.labels, None, str(pair.prediction)),
        to_indices(referred_ZYX, scoring.labels, scoring.ignore_value, str(pair.reference)),
        geometry.spacing_mm,
        len(scoring.labels),
        scoring.surface,
        scoring.tolerances_mm,
        scoring.drawn(pair.annotated),
        scoring.members,
    )
    return scored.model_copy(update={"content": content})


def _say_folds(run: Path, name: str, report: Report) -> None:
    """Say so where only some folds of the cross-validation are there."""
    if Layout(run).splits.is_file():
        all_of, there = len(store.load(Layout(run).splits, Splits).folds), len(validated_folds(run, name))
        if there < all_of:
            report(Warned(f"{name}: {there} of {all_of} folds are trained, so only their validation cases are scored."))


def _lesion_f1(predicted_ZYX: np.ndarray, referred_ZYX: np.ndarray) -> float | None:
    return overlap.lesion_f1(
        components(predicted_ZYX, LESION_CONNECTIVITY)[0], components(referred_ZYX, LESION_CONNECTIVITY)[0]
    )


def _around(one: tuple[slice, ...] | None, other: tuple[slice, ...] | None) -> tuple[slice, ...]:
    """The box around two boxes; of no boxes an empty one."""
    if one is None or other is None:
        return one or other or (slice(0, 0),) * 3
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in zip(one, other, strict=True))
