"""What a report shows of validation: scores, and the worst cases drawn.

These are of cases that networks had not seen. Scores are those on the disk; nothing is scored again. Axes: Z Y X
voxels.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Report, Warned
from autoseg.image.formats import read_image, read_labels
from autoseg.image.labels import grid_difference, label_maps, to_indices
from autoseg.layout import Layout, ModelLayout, scores_file
from autoseg.pages.markup import Html, heading, paragraph, picture, table
from autoseg.pages.overlay import MOST_CHANNELS, Slice, draw, worst_slice
from autoseg.records import Case, CaseScore, Dataset, Run, Scores
from autoseg.scoring import overlap
from autoseg.steps.evaluate import Scoring, scoring_of

METRICS = (("dice", "Dice"), ("hd95_mm", "HD95 in mm"), ("surface_dice", "surface Dice at 1 mm"))
FOREGROUND = "foreground"
CLASSES_BESIDE = 12
"""Of the classes of a case so many stand beside its picture, the worst first."""


@dataclass(frozen=True)
class Validated:
    """Scores of the validation cases of a configuration, or of a pair such as "2d+3d", with where their maps lie."""

    name: str
    folds: tuple[str, ...]
    labels: tuple[str, ...]
    cases: tuple[CaseScore, ...]
    folders: tuple[Path, ...]

    @property
    def ranked(self) -> tuple[CaseScore, ...]:
        """The cases that have a Dice, those with the lowest mean over classes first."""
        having = [case for case in self.cases if mean_dice(case) is not None]
        return tuple(sorted(having, key=lambda case: (mean_dice(case), case.id)))


def validated(run: Path, name: str) -> Validated | None:
    """The scores of all folds (unnamed seed) whose training has ended; None where there are none.

    Each fold has its own from its training, of which `autoseg evaluate RUN` may have made newer ones; a pair has only
    the latter.
    """
    layout = Layout(run)
    found = [each for each in sorted(layout.cross_validation(name).glob("fold_*")) if each.is_dir()]
    unnamed = [ModelLayout(each) for each in found if ".seed_" not in each.name and each.name != "fold_all"]
    models = [model for model in unnamed if _has_ended(model)]
    scored = [model for model in models if model.scores.is_file()]
    together = scores_file(layout.cross_validation(name))
    files = sorted((p for p in (together, *(m.scores for m in scored)) if p.is_file()), key=lambda p: p.stat().st_mtime)
    read = [(path, store.load(path, Scores)) for path in files]
    if not read:
        return None
    labels = read[-1][1].labels
    cases = {case.id: case for _, each in read if each.labels == labels for case in each.cases}  # the newest of each
    if scored:  # what was scored together may be of folds that are trained anew
        own = {case.id for path, each in read if path != together for case in each.cases}
        cases = {case: score for case, score in cases.items() if case in own}
    folds = tuple(model.root.name.removeprefix("fold_") for model in scored or models)
    folders = tuple(model.validation for model in scored or models)
    return Validated(name, folds, labels, tuple(cases[each] for each in sorted(cases)), folders)


def names_of(run: Path) -> tuple[str, ...]:
    """Configurations, then pairs of them, that have folders in the run."""
    layout = Layout(run)
    folders = (*sorted(layout.models.glob("*")), *sorted(layout.ensembles.glob("*+*")))
    return tuple(each.name for each in folders if each.is_dir() and not each.name.startswith("."))


def mean_dice(case: CaseScore) -> float | None:
    """Over the classes of a case."""
    return overlap.mean(case.values["dice"])


# ------------------------------------------------------------------------------------------------ the table


def score_table(found: Validated) -> Html:
    """Mean, median and standard deviation over cases, per class and metric; of Dice also the lowest."""
    metrics = [(name, called) for name, called in METRICS if all(name in case.values for case in found.cases)]
    rows = [(label, *_figures(found, metrics, [k])) for k, label in enumerate(found.labels)]
    if len(found.labels) > 1:
        rows.append((FOREGROUND, *_figures(found, metrics, range(len(found.labels)))))
    columns = ("mean", "median", "spread")
    headings = ["class", "cases", *(each for name, _ in metrics for each in _columns(name, columns))]
    groups = [("", 2), *((called, len(_columns(name, columns))) for name, called in metrics)]
    folds = f"{len(found.cases)} validation cases of fold{'s' * (len(found.folds) > 1)} {', '.join(found.folds)}"
    return table(f"{found.name}: {folds}", headings, rows, groups)


def _columns(metric: str, columns: tuple[str, ...]) -> tuple[str, ...]:
    return (*columns, "lowest") if metric == "dice" else columns


def _figures(found: Validated, metrics: Sequence[tuple[str, str]], classes: Sequence[int]) -> list[str]:
    """The cells of a row; of several classes a case counts with its mean over them, and the mean is over classes."""
    cells = []
    for metric, _ in metrics:
        per_case = [overlap.mean([case.values[metric][k] for k in classes]) for case in found.cases]
        known = [value for value in per_case if value is not None]
        mean = overlap.mean([overlap.mean([case.values[metric][k] for case in found.cases]) for k in classes])
        spread = statistics.stdev(known) if len(known) > 1 else None
        row = [mean, statistics.median(known) if known else None, spread]
        cells += [str(len(known))] if metric == "dice" else []
        cells += [shown(metric, value) for value in row + ([min(known, default=None)] if metric == "dice" else [])]
    return cells


def shown(metric: str, value: float | None) -> str:
    """Millimetres with two decimals, shares with four."""
    if value is None:
        return "-"
    return f"{value:.2f}" if metric.endswith("_mm") else f"{value:.4f}"


# ------------------------------------------------------------------------------------------------ the worst cases


def worst_cases(
    found: Validated, dataset: Dataset | None, most: int, drawn: Callable[[str], None], report: Report
) -> list[Html]:
    """The cases with the lowest mean Dice, each with a picture or with the sentence why there is none.

    `drawn` is called with the id of each when it is done, `report` with a warning for each without a picture.
    """
    worst = found.ranked[:most]
    if not worst:
        return []
    which = f"the {len(worst)} cases" if len(worst) > 1 else "the case"
    parts = [heading(f"{found.name}: {which} with the lowest mean Dice")]
    for case in worst:
        parts.append(_one(case, found, dataset, report))
        drawn(case.id)
    return parts


def _one(score: CaseScore, found: Validated, dataset: Dataset | None, report: Report) -> Html:
    caption = f"{score.id}: mean Dice {shown('dice', mean_dice(score))}"
    beside = _beside(score, found.labels)
    try:
        if dataset is None:
            raise UserError("the run has no dataset.json, which says where its image lies.")
        png, where = picture_of(score.id, found.folders, dataset)
    except (UserError, OSError) as error:
        report(Warned(f"{found.name}, {score.id} is not drawn: {error}"))
        return Html(paragraph(f"{caption}. No picture: {error}", "problem") + beside)
    alt = f"{score.id}, {where}, with the outlines of the reference and of the prediction of {found.name}"
    return picture(png, alt, f"{caption}. {where[:1].upper()}{where[1:]}.", beside)


def picture_of(case_id: str, folders: Sequence[Path], dataset: Dataset) -> tuple[bytes, str]:
    """A PNG of the slice of a case where prediction and reference differ most, and which slice that is.

    Raises UserError or OSError where a file is gone or cannot be read, or is not of the same grid any more.
    """
    case = next((each for each in dataset.cases if each.id == case_id), None)
    if case is None or case.label is None:
        raise UserError("dataset.json names no label map for it any more.")
    path = next((maps[case_id] for maps in map(_maps, folders) if case_id in maps), None)
    if path is None:
        raise UserError("its predicted label map is gone.")
    predicted_ZYX, predicted = read_labels(path)
    referred_ZYX, geometry = read_labels(case.label)
    image = read_image(case.images)
    for where, grid in ((path, predicted), (Path(case.images[0]), image.geometry)):
        if difference := grid_difference(grid, geometry):
            raise UserError(f"{where} does not lie on the grid of {case.label} ({difference}).")
    scoring = scoring_of(dataset, surface=False)
    prediction_ZYX = to_indices(predicted_ZYX, dataset.labels, None, str(path))
    reference_ZYX = to_indices(referred_ZYX, dataset.labels, dataset.ignore_value, case.label)
    groups = groups_of(scoring, case)
    worst = worst_slice(image.array_CZYX, prediction_ZYX, reference_ZYX, groups, geometry)
    return draw(worst, groups, dataset.channels), _where(worst)


def _where(worst: Slice) -> str:
    """Which slice it is, how many of its channels are drawn where not all are, and how much differs."""
    place = f"slice {worst.number} of {worst.of} along {'ZYX'[worst.axis]}" if worst.of > 1 else "the image"
    count = len(worst.image_CRC)
    channel = f" (the first {MOST_CHANNELS} of {count} channels)" if count > MOST_CHANNELS else ""
    most = ", where most voxels differ" if worst.of > 1 and worst.differing else ""
    return f"{place}{channel}{most}: {worst.differing:,} of {worst.prediction_RC.size:,} voxels are not the reference's"


def groups_of(scoring: Scoring, case: Case) -> tuple[tuple[int, ...], ...]:
    """Label indices of each class or region that somebody drew in a case."""
    members = scoring.members or tuple((k,) for k in range(1, len(scoring.classes)))
    drawn = scoring.drawn(case.annotated)
    return tuple(each for k, each in enumerate(members, 1) if drawn is None or k in drawn)


def _maps(folder: Path) -> dict[str, Path]:
    try:
        return label_maps(folder)
    except UserError:
        return {}


def _beside(case: CaseScore, labels: Sequence[str]) -> Html:
    """The scores of a case per class, the lowest Dice first."""
    metrics = [(name, called) for name, called in METRICS if name in case.values]
    dice = case.values["dice"]
    order = sorted((k for k in range(len(labels)) if dice[k] is not None), key=lambda k: (dice[k], k))
    rows = [(labels[k], *(shown(name, case.values[name][k]) for name, _ in metrics)) for k in order[:CLASSES_BESIDE]]
    more = f" (the lowest {CLASSES_BESIDE} of {len(order)} classes)" if len(order) > CLASSES_BESIDE else ""
    return table(f"Scores of {case.id}{more}", ("class", *(called for _, called in metrics)), rows)


def _has_ended(model: ModelLayout) -> bool:
    return not model.run.is_file() or store.load(model.run, Run).finished
