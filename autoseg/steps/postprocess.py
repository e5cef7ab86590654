"""`autoseg postprocess`: learns which components to remove, and removes them.

Axes: Z Y X voxels. A component's size and its share of true voxels are all that a rule about sizes needs, so each case
is read and numbered once and every candidate is judged by arithmetic on those lists; only holes need a second reading.

In learning, a class absent from reference and prediction counts as Dice 1 (not as "not defined" as in `evaluate`): a
rule that removes the last false voxel of a healthy case must gain something, and all candidates need the same cases.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
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
from autoseg.image.rules import CaseParts, apply_rules, case_parts, index_of, survives
from autoseg.layout import Layout
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import Case, Dataset, Label, Postprocessing, Rule
from autoseg.scoring import statistics
from autoseg.steps.predicting.pairs import Pair, check_grids, validation_pairs
from autoseg.steps.predicting.staging import publish, staged

Result = TypeVar("Result")

ACTIONS = ("drop_small", "keep_largest")
"""Tried for the joined foreground, too."""
ALL_ACTIONS = (*ACTIONS, "drop_volume", "fill_holes")
HEAD_START_SECONDS = 1.0
"""Worked in this process before there are others, see `parallel.over_cases`."""
VOLUMES_MM3 = (3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
"""Candidates of `drop_volume`."""


@dataclass(frozen=True, eq=False)
class Judged:
    """A set of rules with what it achieves: Dice and false-positive mm3, (cases, foreground classes).

    `harms`: its last rule removes, in some case, a true component that is larger than the rule's fraction of the
    largest one of its label.
    """

    rules: tuple[Rule, ...]
    dice_NK: np.ndarray
    false_mm3_NK: np.ndarray
    harms: bool = False


NOTHING = Judged((), np.zeros((0, 0)), np.zeros((0, 0)))


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
    candidates = _candidates(actions, fraction, connectivity)
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
            judged = _with_holes(judged, _over(pairs, count, "Holes", workers, report), dataset.labels, level)
        if not judged.rules:
            report(Said(f"Post-processing: nothing helps on {len(pairs)} validation cases, so nothing is applied."))
    for rule in judged.rules:
        report(Said(describe(rule)))
    learned = Postprocessing(learned_on=name, cases=len(pairs), rules=judged.rules)
    store.save(Layout(run).postprocessing if output is None else output, learned)
    return learned


def search(
    parts: Sequence[CaseParts],
    labels: tuple[Label, ...],
    candidates: Sequence[Rule],
    significance: float | None = None,
) -> Judged:
    """Choose among size rules (with `label` None): for the joined foreground, then for each class on what is left."""
    current = judge(parts, labels, ())
    joint = [judge(parts, labels, (rule,)) for rule in candidates if rule.action in ACTIONS]
    current = keep(current, {None: joint}, significance)
    own: dict[int | None, list[Judged]] = {}
    for k in range(1, len(labels)):
        rules = [rule.model_copy(update={"label": labels[k].name}) for rule in candidates]
        own[k] = [judge(parts, labels, (*current.rules, rule)) for rule in rules]
    return keep(current, own, significance)


def judge(parts: Sequence[CaseParts], labels: tuple[Label, ...], rules: tuple[Rule, ...]) -> Judged:
    """Dice and false positives of every case and class once `rules` (about sizes only) are applied."""
    kept = [_kept(part, labels, rules) for part in parts]
    counts_N3K = np.stack([_counts(part, len(labels), own) for part, own in zip(parts, kept, strict=True)])
    harms = bool(rules) and any(_harms(part, own, rules[-1]) for part, own in zip(parts, kept, strict=True))
    voxel_mm3 = np.array([[part.voxel_mm3] for part in parts])
    return Judged(rules, *_figures(counts_N3K, voxel_mm3), harms)


def keep(current: Judged, tried: Mapping[int | None, Sequence[Judged]], significance: float | None) -> Judged:
    """Add to `current`, for each class (None: all joined), its best candidate if the gain is more than chance.

    Args:
        tried: candidates by class index; each is `current` with one more rule, about that class alone.
        significance: level of the test, which knows how many candidates there were; Holm's correction is over the
            classes where any of them changes anything.
    """
    safe = {k: [each for each in judged if not each.harms] for k, judged in tried.items()}
    best = {k: _best(current, judged, k) for k, judged in safe.items()}
    p_values: dict[int | None, float] = {}
    if significance is not None:
        gains = {k: [_target(each.dice_NK - current.dice_NK, k) for each in safe[k]] for k in tried}
        changing = [k for k, gain_CN in gains.items() if np.any(gain_CN)]
        found = [
            1.0 if each is None else statistics.best_of_many(np.array(gains[k]), safe[k].index(each))
            for k, each in best.items()
            if k in changing
        ]
        p_values = dict(zip(changing, statistics.holm(np.array(found)).tolist(), strict=True))
    for k, chosen in best.items():
        if chosen is not None and p_values.get(k, 0.0) <= (1.0 if significance is None else significance):
            current = _with(current, chosen, k, p_values.get(k))
    return current


def _best(current: Judged, candidates: Sequence[Judged], k: int | None) -> Judged | None:
    """The candidate with the highest mean Dice if that rises and does not fall in any class; else None."""
    best, best_dice = None, float(_target(current.dice_NK, k).mean()) + 1e-9
    for tried in candidates:
        dice = float(_target(tried.dice_NK, k).mean())
        falls = (tried.dice_NK.mean(axis=0) < current.dice_NK.mean(axis=0) - 1e-12).any()
        if dice > best_dice and not falls:
            best, best_dice = tried, dice
    return best


def _with(current: Judged, best: Judged, k: int | None, p_value: float | None) -> Judged:
    """`current` with the last rule of `best`, which concerns class k alone, its gain written down."""
    columns = slice(None) if k is None else slice(k - 1, k)
    dice_NK, false_mm3_NK = current.dice_NK.copy(), current.false_mm3_NK.copy()
    dice_NK[:, columns], false_mm3_NK[:, columns] = best.dice_NK[:, columns], best.false_mm3_NK[:, columns]
    gain = {
        "dice_before": float(_target(current.dice_NK, k).mean()),
        "dice_after": float(_target(dice_NK, k).mean()),
        "false_positive_mm3_before": float(current.false_mm3_NK[:, columns].sum(axis=1).mean()),
        "false_positive_mm3_after": float(false_mm3_NK[:, columns].sum(axis=1).mean()),
        "p_value": p_value,
    }
    return Judged((*current.rules, best.rules[-1].model_copy(update=gain)), dice_NK, false_mm3_NK)


def _with_holes(
    judged: Judged, counts: Sequence[np.ndarray], labels: tuple[Label, ...], significance: float | None
) -> Judged:
    """Add `fill_holes` for the classes where it helps; `counts` per case: voxel counts after it, (4, classes)."""
    counts_N4K = np.stack(counts)
    filled = Judged((), *_figures(counts_N4K[:, :3], counts_N4K[:, 3, :1]))
    tried: dict[int | None, list[Judged]] = {}
    for k in range(1, len(labels)):
        rule = Rule(label=labels[k].name, action="fill_holes", dice_before=0.0, dice_after=0.0)
        dice_NK, false_mm3_NK = judged.dice_NK.copy(), judged.false_mm3_NK.copy()
        dice_NK[:, k - 1], false_mm3_NK[:, k - 1] = filled.dice_NK[:, k - 1], filled.false_mm3_NK[:, k - 1]
        tried[k] = [Judged((*judged.rules, rule), dice_NK, false_mm3_NK)]
    return keep(judged, tried, significance)


def _candidates(actions: Sequence[str], fraction: float, connectivity: int) -> tuple[Rule, ...]:
    unknown = sorted(set(actions) - set(ALL_ACTIONS))
    if unknown:
        raise UserError(f"Unknown post-processing {', '.join(unknown)}.", fix=f"Known: {', '.join(ALL_ACTIONS)}.")
    if not 0 < fraction <= 1:
        raise UserError(f"The fraction is {fraction}.", fix="It must be above 0 and at most 1.")
    small = Rule(
        label=None, action="drop_small", fraction=fraction, connectivity=connectivity, dice_before=0.0, dice_after=0.0
    )
    largest = small.model_copy(update={"action": "keep_largest"})
    volumes = [small.model_copy(update={"action": "drop_volume", "minimum_mm3": volume}) for volume in VOLUMES_MM3]
    return tuple(rule for rule in (small, largest, *volumes) if rule.action in actions)


def _target(values_NK: np.ndarray, k: int | None) -> np.ndarray:
    """Per case: the mean over classes, or the value of class k."""
    return values_NK.mean(axis=1) if k is None else values_NK[:, k - 1]


def _figures(counts_N3K: np.ndarray, voxel_mm3_N1: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Dice (1 where a class is in neither map) and false-positive mm3 from counts (both, prediction, reference)."""
    both, predicted, referred = np.moveaxis(counts_N3K, 1, 0)
    total = predicted + referred
    dice_NK = np.where(total > 0, 2 * both / np.maximum(total, 1), 1.0)
    return dice_NK, (predicted - both) * voxel_mm3_N1


def _kept(part: CaseParts, labels: tuple[Label, ...], rules: tuple[Rule, ...]) -> np.ndarray:
    """Which components of a case size rules leave, bool per component."""
    kept = np.ones(part.sizes.size, bool)
    for rule in rules:
        if rule.label is None:
            present = np.bincount(part.parent[kept], minlength=part.joint_sizes.size) > 0
            good = np.zeros(part.joint_sizes.size, bool)
            good[present] = survives(part.joint_sizes[present], rule, part.voxel_mm3)
            kept &= good[part.parent]
        else:
            own = kept & (part.label_of == index_of(rule.label, labels))
            kept[own] = survives(part.sizes[own], rule, part.voxel_mm3)
    return kept


def _counts(part: CaseParts, classes: int, kept: np.ndarray) -> np.ndarray:
    """Voxels (both, prediction, reference) per foreground class of one case with these components, (3, classes)."""
    both = np.bincount(part.label_of[kept], part.true[kept], minlength=classes)[1:]
    predicted = np.bincount(part.label_of[kept], part.counted[kept], minlength=classes)[1:]
    counts_3K = np.stack([both, predicted, part.reference])
    return counts_3K if part.drawn is None else counts_3K * part.drawn  # absent from both: 1 whatever is removed


def _harms(part: CaseParts, kept: np.ndarray, rule: Rule) -> bool:
    """Whether a component is gone that is mostly true and larger than the rule's fraction of its label's largest."""
    largest = np.zeros(int(part.label_of.max(initial=0)) + 1)
    np.maximum.at(largest, part.label_of, part.sizes)
    large = part.sizes > rule.fraction * largest[part.label_of]
    return bool((~kept & large & (2 * part.true > part.counted)).any())


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
