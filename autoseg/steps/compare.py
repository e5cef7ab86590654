"""`autoseg compare`: which differences between methods are more than chance.

Every pair of methods is compared per class and metric on the cases where both have a score. What counts is Wilcoxon's
signed-rank test, corrected by Holm over all classes and pairs of a metric; the mean over classes ("foreground") is a
family of its own, over the pairs. The t-test is reported beside it.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path

import numpy as np

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Report, Said, Warned, silent
from autoseg.image.formats import stem_of
from autoseg.image.labels import is_label_map, some
from autoseg.layout import comparison_file, comparison_picture, scores_file
from autoseg.records import CaseScore, Scores
from autoseg.scoring import statistics
from autoseg.scoring.comparison import Comparison, Difference
from autoseg.steps.predicting.pairs import dataset_near

FOREGROUND, VOLUME, AT_TOLERANCE = "foreground", "reference_mm3", "surface_dice_at_tolerance"
DEFAULT_METRICS = ("dice", "surface_dice", "hd95_mm")
MOST_NAMED = 12
"""Real differences that the conclusion names one by one."""


def compare(
    *scores: Path,
    metrics: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    groups: Mapping[str, str] | None = None,
    level: float = 0.95,
    output: Path | None = None,
    report: Report = silent,
) -> Comparison:
    """Compare two or more sets of scores of the same cases.

    Args:
        scores: `scores.json` files, or prediction folders that hold one.
        metrics: of `BETTER`; None takes Dice, surface Dice and HD95 as far as all have them. The first one ranks.
        names: what to call the methods; None takes the folders' names.
        groups: patient of each case, to warn when cases are not independent; None looks them up in the run's data set.
        level: of the intervals; a difference is real when its corrected P value is below 1 - level.
        output: folder for `comparison.json` and `comparison.png`; None writes nothing.

    Raises:
        UserError: fewer than two sets or six cases, or sets of different cases, labels, references or tolerances.
    """
    if len(scores) < 2:
        raise UserError("A comparison needs at least two sets of scores.")
    read = [_read(path, report) for path in scores]
    called = _names(scores, names)
    read = _paired(read, scores, report)
    chosen = _metrics(read, metrics)
    _refuse_tolerances(read, scores, chosen)
    _warn_of_groups(read[0], groups, report)
    rows = [
        row
        for metric in chosen
        for family in ((FOREGROUND,), read[0].labels)
        for row in _corrected(list(_family(read, called, metric, family, level)), level)
    ]
    _warn_of_unpaired(rows, report)
    ranking, shares = _ranking(read, called, chosen[0])
    found = Comparison(
        methods=called,
        labels=read[0].labels,
        metrics=chosen,
        cases=len(read[0].cases),
        level=level,
        conclusion=conclude(rows, called, len(read[0].cases)),
        ranking=ranking,
        rank_shares=shares,
        differences=tuple(rows),
    )
    report(Said(found.conclusion))
    if output is not None:
        draw(found, comparison_picture(output))
        store.save(comparison_file(output), found)
    return found


def conclude(rows: Sequence[Difference], methods: Sequence[str], cases: int) -> str:
    """One sentence: which differences are real, and that the others may be chance."""
    real = [row for row in rows if row.better is not None]
    torn = [f"{row.metric} of {row.label} ({row.first} against {row.second})" for row in rows if row.torn]
    untested = sum(row.p_wilcoxon is None for row in rows)
    too_few = f"; {untested} could not be tested for lack of cases" if untested else ""
    if torn:
        too_few = f"; most cases say the one and the mean the other in {_listed(torn[:MOST_NAMED])}{too_few}"
    if not real and torn:
        return f"None of {' and '.join(methods)} is better on {cases} cases by all accounts{too_few}."
    if not real:
        return f"No difference between {' and '.join(methods)} on {cases} cases is more than chance{too_few}."
    found: dict[tuple[str, str], list[str]] = {}
    for row in real[:MOST_NAMED]:
        worse = row.second if row.better == row.first else row.first
        size = f"{abs(row.difference or 0.0):.4g} (p = {row.p_wilcoxon_holm:.2g})"
        found.setdefault((str(row.better), worse), []).append(f"{row.metric} of {row.label} by {size}")
    parts = [f"{better} beats {worse} in {_listed(what)}" for (better, worse), what in found.items()]
    more = f"; and {len(real) - MOST_NAMED} more are real" if len(real) > MOST_NAMED else ""
    chance = len(rows) - len(real) - len(torn) - untested
    rest = f"; the other {chance} differences may be chance" if chance else ""
    return f"On {cases} cases {'; '.join(parts)}{more}{rest}{too_few}."


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def draw(found: Comparison, path: Path) -> None:
    """Save a picture of all differences with their intervals, one panel per metric, real ones in colour.

    The panels share their rows (class and pair of methods), which are named at the left.
    """
    from matplotlib.figure import Figure

    by_metric = {metric: [row for row in found.differences if row.metric == metric] for metric in found.metrics}
    names = [f"{row.label}: {row.first} - {row.second}" for row in by_metric[found.metrics[0]]]
    width, height = 3.5 * len(found.metrics) + 0.5 + 0.08 * max(map(len, names)), 1.2 + 0.3 * len(names)
    figure = Figure(figsize=(width, height), layout="constrained")
    panels = figure.subplots(1, len(found.metrics), squeeze=False, sharey=True)[0]
    for panel, (metric, rows) in zip(panels, by_metric.items(), strict=True):
        for place, row in enumerate(rows):
            if row.difference is None:
                continue
            low, high = (row.difference if end is None else end for end in (row.low, row.high))
            colour = "tab:blue" if row.better else "0.6"
            panel.plot([low, high], [place, place], color=colour)
            panel.plot([row.difference], [place], "o", color=colour)
        panel.axvline(0.0, color="black", linewidth=0.8)
        panel.set_xlabel(f"{metric}, {'higher' if BETTER[metric] > 0 else 'lower'} is better")
    panels[0].set_yticks(range(len(names)), names)
    panels[0].set_ylim(len(names) - 0.5, -0.5)
    with store.replacing(path, path.suffix) as temporary:
        figure.savefig(temporary, dpi=120)


# ------------------------------------------------------------------------------------------------ tests


def _family(
    read: Sequence[Scores], called: Sequence[str], metric: str, labels: Sequence[str], level: float
) -> Iterator[Difference]:
    """Differences of all pairs of methods in these labels, not yet corrected."""
    for label in labels:
        for one, other in combinations(range(len(read)), 2):
            values_MN, unpaired = _values((read[one], read[other]), metric, label)
            first, second = values_MN[:, ~np.isnan(values_MN).any(axis=0)]
            row = _difference(first, second, called[one], called[other], metric, label, level)
            yield row.model_copy(update={"unpaired": unpaired})


def _difference(
    first: np.ndarray, second: np.ndarray, name: str, other_name: str, metric: str, label: str, level: float
) -> Difference:
    """One row without correction; only means where fewer than six cases are left."""
    differences = first - second
    row = Difference(
        first=name,
        second=other_name,
        metric=metric,
        label=label,
        cases=differences.size,
        mean_first=float(first.mean()) if first.size else None,
        mean_second=float(second.mean()) if second.size else None,
        difference=float(differences.mean()) if differences.size else None,
    )
    if differences.size < statistics.FEWEST:
        return row
    low, high = statistics.bootstrap_interval(differences, level)
    figures = {
        "low": low,
        "high": high,
        "effect_size": statistics.effect_size(differences),
        "rank_correlation": statistics.rank_correlation(differences),
        "p_t": statistics.paired_t(differences),
        "p_wilcoxon": statistics.wilcoxon(differences),
    }
    return row.model_copy(update=figures)


def _corrected(rows: Sequence[Difference], level: float) -> list[Difference]:
    """The rows of one family with P values corrected by Holm, and the better method where the difference is real."""
    tested = [row for row in rows if row.p_wilcoxon is not None]
    t = iter(statistics.holm(np.array([row.p_t for row in tested], float)))
    signed = iter(statistics.holm(np.array([row.p_wilcoxon for row in tested], float)))
    result = []
    for row in rows:
        if row.p_wilcoxon is None:
            result.append(row)
            continue
        p_t, p_wilcoxon = float(next(t)), float(next(signed))
        mean, cases, real = row.difference or 0.0, row.rank_correlation or 0.0, p_wilcoxon < 1 - level
        agree = mean * cases > 0
        better = (row.first if cases * BETTER[row.metric] > 0 else row.second) if real and agree else None
        found = {"p_t_holm": p_t, "p_wilcoxon_holm": p_wilcoxon, "better": better, "torn": real and not agree}
        result.append(row.model_copy(update=found))
    return result


def _ranking(
    read: Sequence[Scores], called: tuple[str, ...], metric: str
) -> tuple[tuple[str, ...], tuple[tuple[float, ...], ...]]:
    """Methods from best to worst by the foreground mean, and how often each has each rank when cases are redrawn."""
    values_MN = BETTER[metric] * _values(read, metric, FOREGROUND)[0]
    values_MN = values_MN[:, ~np.isnan(values_MN).any(axis=0)]
    if not values_MN.size:
        return called, ()
    shares = statistics.ranking_stability(values_MN)
    order = np.argsort(-values_MN.mean(axis=1), kind="stable")
    return tuple(called[m] for m in order), tuple(tuple(float(share) for share in row) for row in shares)


def _values(read: Sequence[Scores], metric: str, label: str) -> tuple[np.ndarray, int]:
    """One number per method and case, and how many scores were left out because not all methods have them.

    Returns:
        values_MN: M methods x N cases in the order of their ids, NaN where not defined; volume errors without their
            sign. The foreground mean of a case is over the classes that all methods have a score of: one that always
            misses the hard class would look better without it. Scores in `ZERO_WHERE_WRONG` need no such care.
        unpaired: scores of single classes that some methods have and others lack, which therefore do not count.
    """
    values_MNK = np.array([[case.values[metric] for case in _ordered(scores)] for scores in read], float)
    if metric == "volume_error":
        values_MNK = np.abs(values_MNK)
    if label != FOREGROUND:
        values_MNK = values_MNK[..., [read[0].labels.index(label)]]
    undefined_MNK = np.isnan(values_MNK)
    if label == FOREGROUND and metric in ZERO_WHERE_WRONG:
        unpaired_NK = np.zeros_like(undefined_MNK[0])
    else:
        unpaired_NK = undefined_MNK.any(axis=0) & ~undefined_MNK.all(axis=0)
    counts_MNK = ~undefined_MNK & ~unpaired_NK
    sums_MN, defined_MN = np.where(counts_MNK, values_MNK, 0.0).sum(axis=2), counts_MNK.sum(axis=2)
    values_MN = np.where(defined_MN > 0, sums_MN / np.maximum(defined_MN, 1), np.nan)
    return values_MN, int(unpaired_NK.sum())


# ------------------------------------------------------------------------------------------------ input


def _read(path: Path, report: Report) -> Scores:
    """The scores of a folder or file; warns where a label map beside them is newer, which may have other scores."""
    file = scores_file(path) if path.is_dir() else path
    if not file.is_file():
        raise UserError(f"{file}: no such file.", fix="Score this folder first: autoseg evaluate.")
    found, written = store.load(file, Scores), file.stat().st_mtime_ns
    newer = [each for each in file.parent.iterdir() if is_label_map(each) and each.stat().st_mtime_ns > written]
    if cases := sorted({stem_of(each) for each in newer} & {case.id for case in found.cases}):
        report(Warned(f"{some(cases)} in {file.parent} changed after the scores; `autoseg evaluate` makes them anew."))
    return found


def _names(scores: Sequence[Path], names: Sequence[str] | None) -> tuple[str, ...]:
    """Names of the methods: those given, else the shortest parts of the paths that tell them apart.

    What all paths end in says nothing: models/2d/fold_0/validation and models/3d/fold_0/validation are 2d and 3d.
    """
    if names is not None:
        if len(names) != len(scores) or len(set(names)) != len(names):
            raise UserError(f"{len(names)} names for {len(scores)} sets of scores.", fix="Give different names to all.")
        return tuple(names)
    folders = [path if path.is_dir() else path.parent / path.stem for path in (each.resolve() for each in scores)]
    if len(set(folders)) < len(folders):
        raise UserError("The same scores are given twice.", fix="Compare different sets of scores.")
    paths = [folder.parts for folder in folders]
    while len({parts[-1] for parts in paths}) == 1 and min(map(len, paths)) > 2:
        paths = [parts[:-1] for parts in paths]
    for count in range(1, max(map(len, paths)) + 1):
        ends = tuple("/".join(parts[-count:]) for parts in paths)
        if len(set(ends)) == len(ends):
            return ends
    return tuple(str(folder) for folder in folders)


def _paired(read: Sequence[Scores], paths: Sequence[Path], report: Report) -> list[Scores]:
    """All sets with the cases that every one of them has, with a warning where some had more.

    Raises UserError unless all score the same labels against the same references, in at least six common cases.
    """
    first = read[0]
    common = set.intersection(*({case.id for case in scores.cases} for scores in read))
    for scores, path in zip(read[1:], paths[1:], strict=True):
        both = f"{paths[0]} and {path}"
        if scores.labels != first.labels:
            raise UserError(
                f"{both} score different labels: {', '.join(first.labels)} against {', '.join(scores.labels)}.",
                fix="Compare scores of one data set.",
            )
        apart = sorted({case.id for case in first.cases} ^ {case.id for case in scores.cases})
        if apart and not common:
            raise UserError(f"{both} have no case in common: only one of them has {some(apart)}.",
                            fix="Compare scores of one data set.")  # fmt: skip
        if apart:
            report(Warned(f"{both} are not paired: only one of them has {some(apart)}, which therefore do not count."))
        volumes, others = _volumes(first), _volumes(scores)
        moved = [
            case
            for case in sorted(common & set(volumes) & set(others))
            if not np.allclose(volumes[case], others[case], rtol=1e-4, equal_nan=True)
        ]
        if moved:
            raise UserError(
                f"{both} were scored against different references: their volumes differ in {some(moved)}.",
                fix="Score all methods against the same references.",
            )
    statistics.enough(len(common))
    return [
        scores.model_copy(update={"cases": tuple(case for case in scores.cases if case.id in common)})
        for scores in read
    ]


def _volumes(scores: Scores) -> dict[str, np.ndarray]:
    """Reference volumes per case, the fingerprint of what was scored against; empty for scores without them."""
    return {case.id: np.array(case.values[VOLUME], float) for case in scores.cases if VOLUME in case.values}


def _metrics(read: Sequence[Scores], wanted: Sequence[str] | None) -> tuple[str, ...]:
    there = [metric for metric in BETTER if all(metric in scores.mean for scores in read)]
    unknown = [metric for metric in wanted or () if metric not in there]
    if unknown or not there:
        raise UserError(
            f"The scores cannot be compared by {', '.join(unknown) or 'any metric'}.",
            fix=f"Metrics in all of them: {', '.join(there) or 'none'}.",
        )
    return tuple(wanted) if wanted else tuple(metric for metric in DEFAULT_METRICS if metric in there) or (there[0],)


def _refuse_tolerances(read: Sequence[Scores], paths: Sequence[Path], chosen: Sequence[str]) -> None:
    """Raise UserError where surface Dice at a tolerance is compared that was computed at different ones."""
    for scores, path in zip(read, paths, strict=True):
        if AT_TOLERANCE in chosen and scores.tolerances_mm != read[0].tolerances_mm:
            said = (", ".join(f"{mm:g}" for mm in each.tolerances_mm) or "unknown" for each in (read[0], scores))
            raise UserError(
                f"{paths[0]} and {path} have {AT_TOLERANCE} at different tolerances, in mm: {' against '.join(said)}.",
                fix="Score both with the same --tolerance.",
            )


def _warn_of_groups(scores: Scores, groups: Mapping[str, str] | None, report: Report) -> None:
    """Say so when several cases come from one patient: then they are no independent witnesses."""
    if groups is None:
        place = Path(scores.reference)
        known = dataset_near(place) if place.exists() else None
        groups = {case.id: case.group for case in known.cases if case.group} if known else {}
    counts = Counter(groups[case.id] for case in scores.cases if case.id in groups)
    several = sorted(group for group, count in counts.items() if count > 1)
    if several:
        who = some(several)
        report(Warned(f"Several cases come from the same patient ({who}), so P values look better than they are."))


def _warn_of_unpaired(rows: Sequence[Difference], report: Report) -> None:
    """Say how many scores a mean over classes is without, because only one of two methods has them."""
    for row in rows:
        if row.label == FOREGROUND and row.unpaired:
            lacking = f"only one of {row.first} and {row.second} has {row.unpaired} scores of single classes"
            report(Warned(f"{row.metric}: {lacking}, which therefore do not count; see how Dice judges these classes."))


def _ordered(scores: Scores) -> list[CaseScore]:
    return sorted(scores.cases, key=lambda case: case.id)


BETTER: dict[str, int] = {
    "dice": 1,
    "surface_dice": 1,
    AT_TOLERANCE: 1,
    "hd95_mm": -1,
    "asd_mm": -1,
    "iou": 1,
    "precision": 1,
    "recall": 1,
    "lesion_f1": 1,
    "volume_error": -1,
    "false_positive_mm3": -1,
}
"""What can be compared, and whether more (1) or less (-1) is better."""

ZERO_WHERE_WRONG = ("dice", "surface_dice", AT_TOLERANCE, "iou", "lesion_f1")
"""Not defined only where a class is rightly absent; 0 where it is missed or drawn in vain (see `overlap.POLICY`)."""
