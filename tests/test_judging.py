"""steps/predicting/judging.py: only rules that help by more than chance, and harm nothing true, are chosen."""

import numpy as np
import pytest
from organs import LABELS, organ_map, rule, with_crumbs

from autoseg.image.rules import CaseParts, apply_rules, case_parts
from autoseg.records import Label, Rule
from autoseg.steps.predicting.judging import ALL_ACTIONS, candidates_of, judge, search

ROUND = 0.05 / 3
"""The level of each of the three rounds that share 0.05 when a run's rules are learned."""


def chosen(pairs: list[tuple[np.ndarray, np.ndarray]], significance: float | None = ROUND) -> tuple[Rule, ...]:
    """The rules about sizes for these predictions and references (label indices), of voxels of 2 mm3."""
    parts = [case_parts(str(n), predicted, real, len(LABELS), 2.0) for n, (predicted, real) in enumerate(pairs)]
    return search(parts, LABELS, candidates_of(ALL_ACTIONS, 1 / 3, 1), significance).rules


def test_a_true_second_component_is_never_removed():
    """Crumbs in all cases, in some also a second organ of half the size: keeping the largest only would lose it."""
    pairs = []
    for n in range(12):
        real = organ_map()
        if n < 2:
            real[1:7, 14:20, 2:5] = 1
        pairs.append((with_crumbs(real, n, (3, 5, 12)), real))
    rules = chosen(pairs)
    assert rules
    assert "keep_largest" not in {each.action for each in rules}
    for predicted, real in pairs:
        assert np.array_equal(apply_rules(predicted, rules, LABELS, (2.0, 1.0, 1.0)), real)


def test_a_rule_that_would_remove_a_true_component_is_out_even_where_dice_rises():
    """One case in twelve has a true second component above a third; large crumbs make `keep_largest` pay on average."""
    pairs = []
    for n in range(12):
        real = organ_map(1)
        predicted = real.copy()
        predicted[1:8, 14:20, 2:5] = 1
        if n == 0:
            real = predicted.copy()
        pairs.append((predicted, real))
    assert chosen(pairs) == ()
    assert chosen(pairs[1:])


def test_chance_is_not_learned_however_many_classes_and_candidates_there_are():
    """Components of four sizes that are right as often as not: of 40 such data sets, no more give a rule than may."""
    labels = (Label(name="background", value=0), *(Label(name=f"l{k}", value=k) for k in range(1, 5)))
    sizes_KP = np.tile((1000, 5, 20, 60, 200), (4, 1))
    chance, kept, level = np.random.default_rng(2), 0, 0.2
    candidates = candidates_of(ALL_ACTIONS, 1 / 3, 1)
    for _ in range(40):
        parts = []
        for n in range(8):
            true_KP = sizes_KP.copy()
            true_KP[:, 1:] *= chance.integers(0, 2, (4, 4))
            parts.append(CaseParts(
                id=str(n), voxel_mm3=1.0, label_of=np.repeat(np.arange(1, 5), 5), sizes=sizes_KP.ravel(),
                counted=sizes_KP.ravel(), true=true_KP.ravel(), parent=np.arange(20), joint_sizes=sizes_KP.ravel(),
                reference=true_KP.sum(axis=1),
            ))  # fmt: skip
        kept += bool(search(parts, labels, candidates, level).rules)
    assert kept <= 40 * level


def test_a_joint_rule_that_makes_any_class_worse_is_not_kept():
    """Far lesions are real: dropping small joined components would clean the organ but lose them."""
    real = organ_map(1)
    real[8, 20:22, 2:4] = 2
    assert [each.label for each in chosen([(with_crumbs(real, n), real) for n in range(6)])] == ["organ"]
    real = organ_map(1)  # now the mean over classes would rise: so much less is lost than is gained
    real[3:7, 3:7, 3:7], real[8, 20:22, 2:4] = 2, 2
    pairs = [(with_crumbs(real, n), real) for n in range(8)]
    joint = rule("drop_small", None, fraction=1 / 3)
    parts = [case_parts("x", *each, len(LABELS)) for each in pairs]
    change_K = (judge(parts, LABELS, (joint,)).dice_NK - judge(parts, LABELS, ()).dice_NK).mean(axis=0)
    assert change_K[1] < 0 < change_K.mean()
    assert [each.label for each in chosen(pairs)] == ["organ"]


def test_a_gain_in_one_case_is_chance_and_in_all_is_not():
    once = [(with_crumbs(organ_map(), 0), organ_map())] + [(organ_map(), organ_map())] * 7
    assert chosen(once, significance=None)
    assert chosen(once) == ()
    often = chosen([(with_crumbs(organ_map(), n, (3, 5, 3 + n)), organ_map()) for n in range(8)])
    assert often
    assert often[0].p_value < 0.05


def test_the_gain_in_false_positive_volume_is_stated():
    first = chosen([(with_crumbs(organ_map(), n, (4,)), organ_map()) for n in range(6)])[0]
    assert first.false_positive_mm3_before == pytest.approx(8.0)
    assert first.false_positive_mm3_after == 0.0


def test_judging_by_lists_of_components_equals_applying_the_rules():
    chance = np.random.default_rng(1)
    rules = (
        rule("drop_small", None, fraction=0.4),
        rule("drop_small", fraction=0.5),
        rule("keep_largest", "lesion"),
    )
    for _ in range(5):
        predicted = (chance.random((6, 12, 12)) < 0.3).astype(np.int16) * chance.integers(1, 3, (6, 12, 12), np.int16)
        real = chance.integers(-1, 3, (6, 12, 12)).astype(np.int16)
        part = case_parts("x", predicted, real, 3, voxel_mm3=2.0)
        for used in (rules[:1], rules[1:], rules):
            judged = judge([part], LABELS, used)
            after = apply_rules(predicted, used, LABELS, (2.0, 1.0, 1.0))
            for k in (1, 2):
                p, r = (after == k) & (real >= 0), real == k
                assert judged.dice_NK[0, k - 1] == pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum()))
                assert judged.false_mm3_NK[0, k - 1] == pytest.approx(2.0 * (p & ~r).sum())


def test_a_class_absent_from_both_counts_as_perfect_in_learning():
    """A healthy case whose only false voxels are removed must count as a gain."""
    empty = np.zeros((10, 24, 24), np.int16)
    part = case_parts("x", empty, empty, 3)
    assert judge([part], LABELS, ()).dice_NK.tolist() == [[1.0, 1.0]]
