"""Which post-processing rules help: candidates judged on validation cases.

A class absent from reference and prediction counts as Dice 1 (not as "not defined" as in `evaluate`): a rule that
removes the last false voxel of a healthy case must gain something, and all candidates need the same cases.
Legend: N cases, C candidates, K foreground classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.errors import UserError
from autoseg.image.rules import CaseParts, index_of, survives
from autoseg.records import Label, Rule
from autoseg.scoring import statistics

ACTIONS = ("drop_small", "keep_largest")
"""Tried for the joined foreground, too."""
ALL_ACTIONS = (*ACTIONS, "drop_volume", "fill_holes")
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


def with_holes(
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


def candidates_of(actions: Sequence[str], fraction: float, connectivity: int) -> tuple[Rule, ...]:
    """The rules about sizes to try, without a label yet. Raises UserError for unknown actions and fractions."""
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
