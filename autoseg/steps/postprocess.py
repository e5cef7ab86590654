"""`autoseg postprocess`: learns which components to remove, and removes them.

Axes: Z Y X voxels. A component's size and its share of true voxels are all that a rule about sizes needs, so each case
is read and numbered once and every candidate is judged by arithmetic on those lists; only holes need a second reading.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from autoseg import store
from autoseg.cases.exchange import files_of_cases, refuse_folder_of_images, refuse_loss
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, silent
from autoseg.image.components import fill_holes
from autoseg.image.formats import read_labels, write_labels
from autoseg.image.labels import label_maps, to_indices
from autoseg.image.rules import CaseParts, apply_rules, case_parts, index_of
from autoseg.layout import Layout
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import Case, Dataset, Label, Postprocessing, Rule
from autoseg.scoring import statistics
from autoseg.steps.predicting.judging import ACTIONS, ALL_ACTIONS, NOTHING, candidates_of, search, with_holes
from autoseg.steps.predicting.pairs import Pair, check_grids, validation_pairs
from autoseg.steps.predicting.staging import publish, staged

Result = TypeVar("Result")

HEAD_START_SECONDS = 1.0
"""Worked in this process before there are others, see `parallel.over_cases`."""
# ------------------------------------------------------------------------------------------------ learning


def postprocess_learn(
    run: Path,
    configuration: str | None = None,
    *,
    actions: Sequence[str] = ALL_ACTIONS,
    fraction: float = 1.0 / 3.0,
    connectivity: int = 1,
    significance: float | None = 0.05,
    output: Path | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> Postprocessing:
    """Learn from the predictions of all validation folds which rules raise the mean Dice, and save them.

    For the joined foreground first (kept only if the mean over classes rises and no class falls), then for each class
    on what is left, the candidate with the highest mean Dice is kept if that is above doing nothing by more than
    chance. A candidate that removes, in any case, a true component larger than `fraction` of the largest is out.
    Classes that nobody drew in a case neither gain nor lose there. For regions nothing is learned.

    Args:
        run: run folder; `models/<configuration>/fold_*/validation/` must hold label maps.
        configuration: None takes the only one that has validation predictions, or the selected one.
        actions: which of `ALL_ACTIONS` to try.
        fraction: for `drop_small`, of the largest component.
        connectivity: 1 faces, 2 edges, 3 corners.
        significance: keep a rule only if a paired sign-flip test over cases, for the best of the candidates tried and
            corrected over classes by Holm, says that it helps; this is the level of all rounds together (joined
            foreground, classes, holes), which share it. None asks only for a higher mean.
        output: where to save; None is `postprocess.json` of the run. workers: processes; None takes all cores.

    Raises:
        UserError: no predictions, a prediction without a reference, or differing grids; nothing is written then.
    """
    candidates = candidates_of(actions, fraction, connectivity)
    rounds = any(each in ACTIONS for each in actions) + bool(candidates) + ("fill_holes" in actions)
    level = None if significance is None else significance / max(1, rounds)  # Bonferroni
    dataset = store.load(Layout(run).dataset, Dataset)
    name, pairs = validation_pairs(run, dataset, configuration)
    check_grids(pairs)
    if significance is not None and len(pairs) < statistics.FEWEST:
        report(Said(f"{len(pairs)} cases are too few to tell a gain from chance: no post-processing is learned."))
        judged = NOTHING
    elif dataset.regions:
        report(Said("A rule about one label would change several regions: no post-processing is learned."))
        judged = NOTHING
    else:
        read = partial(_read_parts, labels=dataset.labels, ignore_value=dataset.ignore_value, connectivity=connectivity)
        parts = _over(pairs, read, "Components", workers, report)
        judged = search(parts, dataset.labels, candidates, level)
        if "fill_holes" in actions:
            count = partial(_count_filled, dataset=dataset, rules=judged.rules)
            judged = with_holes(judged, _over(pairs, count, "Holes", workers, report), dataset.labels, level)
        if not judged.rules:
            report(Said(f"Post-processing: nothing helps on {len(pairs)} validation cases, so nothing is applied."))
    for rule in judged.rules:
        report(Said(describe(rule)))
    learned = Postprocessing(learned_on=name, cases=len(pairs), rules=judged.rules)
    store.save(Layout(run).postprocessing if output is None else output, learned)
    return learned


# ------------------------------------------------------------------------------------------------ applying


def postprocess_apply(
    rules: Postprocessing | Path,
    predictions: Path,
    output: Path,
    *,
    labels: tuple[Label, ...] | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> tuple[Path, ...]:
    """Apply learned rules to every label map in `predictions`; geometry and label values are kept.

    Args:
        rules: the rules, or the run folder whose `postprocess.json` holds them.
        output: another folder for the label maps, which appear in it when all are done. workers: None: all cores.
        labels: names and values of the labels; None takes those of the run (needed when `rules` is no run folder).

    Raises:
        UserError: nothing was learned yet, no label maps, a value that no label has, or files that are not autoseg's
            would be replaced; nothing is written then.
    """
    known: tuple[Case, ...] = ()
    if isinstance(rules, Path):
        dataset = store.load(Layout(rules).dataset, Dataset)
        labels, known = labels or dataset.labels, dataset.cases
        rules = store.load(Layout(rules).postprocessing, Postprocessing)
    if labels is None:
        raise UserError("Post-processing rules name labels, but no labels are given.", fix="Give the run folder.")
    for rule in rules.rules:
        if rule.label is not None:
            index_of(rule.label, labels)
    if not rules.rules:
        report(Said("No rule was worth keeping when they were learned: label maps stay as they are."))
    paths = label_maps(predictions)
    refuse_folder_of_images(predictions, output, "label maps to clean")
    refuse_loss(output, [output / each.name for each in paths.values()], (*paths.values(), *files_of_cases(known)))
    with staged(output) as staging:
        pairs = tuple(Pair(case, path, staging / path.name) for case, path in paths.items())
        _over(pairs, partial(apply_to_file, rules=rules.rules, labels=labels), "Post-processing", workers, report)
        return publish(staging, output)


def describe(rule: Rule) -> str:
    """One sentence: what the rule does, to what, and what it gained."""
    what = {
        "drop_small": f"drop components below {rule.fraction:.3g} of the largest",
        "keep_largest": "keep only the largest component",
        "drop_volume": f"drop components under {rule.minimum_mm3:g} mm3",
        "fill_holes": "fill holes",
    }[rule.action]
    chance = "" if rule.p_value is None else f" (p = {rule.p_value:.2g})"
    return (
        f"{rule.label or 'joined foreground'}: {what}: Dice {rule.dice_before:.4f} -> {rule.dice_after:.4f}{chance}, "
        f"false positives {rule.false_positive_mm3_before:.0f} -> {rule.false_positive_mm3_after:.0f} mm3 per case"
    )


# ------------------------------------------------------------------------------------------------ files


def _over(
    pairs: Sequence[Pair], function: Callable[[Pair], Result], what: str, workers: int | None, report: Report
) -> list[Result]:
    """`function(pair)` over all pairs in parallel, in their order."""
    report(Started(what, len(pairs)))
    done, workers = {}, workers or allowed_cores()
    for pair, result in over_cases(function, pairs, workers, lambda pair: pair.id, HEAD_START_SECONDS):
        done[pair.id] = result
        report(Advanced(what, len(done), len(pairs), pair.id))
    report(Finished(what))
    return [done[pair.id] for pair in pairs]


def _read_parts(pair: Pair, labels: tuple[Label, ...], ignore_value: int | None, connectivity: int) -> CaseParts:
    predicted_ZYX, referred_ZYX, spacing_mm = _read_pair(pair, labels, ignore_value)
    voxel_mm3 = float(np.prod(spacing_mm))
    parts = case_parts(pair.id, predicted_ZYX, referred_ZYX, len(labels), voxel_mm3, connectivity)
    return replace(parts, drawn=_drawn(pair, labels))


def _drawn(pair: Pair, labels: tuple[Label, ...]) -> np.ndarray | None:
    """Which foreground classes somebody drew in the reference of a case, bool; None is all."""
    if pair.annotated is None:
        return None
    return np.array([label.name in pair.annotated for label in labels[1:]])


def _count_filled(pair: Pair, dataset: Dataset, rules: tuple[Rule, ...]) -> np.ndarray:
    """Voxels (both, prediction, reference) and voxel_mm3 per class when the holes of that class alone are filled."""
    predicted_ZYX, referred_ZYX, spacing_mm = _read_pair(pair, dataset.labels, dataset.ignore_value)
    predicted_ZYX = apply_rules(predicted_ZYX, rules, dataset.labels, spacing_mm)
    annotated_ZYX = referred_ZYX >= 0
    columns = []
    for k in range(1, len(dataset.labels)):
        mask_ZYX = predicted_ZYX == k
        mask_ZYX = mask_ZYX | (fill_holes(mask_ZYX) & (predicted_ZYX == 0))
        real_ZYX = referred_ZYX == k
        columns.append((
            (mask_ZYX & real_ZYX).sum(), (mask_ZYX & annotated_ZYX).sum(), real_ZYX.sum(), np.prod(spacing_mm)
        ))
    counts_4K = np.array(columns, float).T
    if (drawn := _drawn(pair, dataset.labels)) is not None:
        counts_4K[:3] *= drawn
    return counts_4K


def _read_pair(
    pair: Pair, labels: tuple[Label, ...], ignore_value: int | None
) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Label indices of prediction and reference, and the spacing in mm."""
    predicted_ZYX, geometry = read_labels(pair.prediction)
    referred_ZYX, _ = read_labels(pair.reference)
    return (
        to_indices(predicted_ZYX, labels, None, str(pair.prediction)),
        to_indices(referred_ZYX, labels, ignore_value, str(pair.reference)),
        geometry.spacing_mm,
    )


def apply_to_file(pair: Pair, rules: tuple[Rule, ...], labels: tuple[Label, ...]) -> None:
    """Read `pair.prediction`, apply the rules, and write `pair.reference`, which may be the same file."""
    values_ZYX, geometry = read_labels(pair.prediction)
    indices_ZYX = to_indices(values_ZYX, labels, None, str(pair.prediction))
    values = np.array([label.value for label in labels])
    write_labels(pair.reference, values[apply_rules(indices_ZYX, rules, labels, geometry.spacing_mm)], geometry)
