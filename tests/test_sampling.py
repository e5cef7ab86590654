"""network/sampling.py: every mode draws what it promises, and what is asked for is checked."""

import math
from collections import Counter
from typing import Any

import numpy as np
import pytest

from autoseg.errors import UserError
from autoseg.network import sampling
from autoseg.network.patches import InMemory, Place, Sampling, draw_places
from autoseg.records import AugmentSpec, TrainSpec

PATCHES = 5000
BATCH = 5
RARE, COMMON, NOTHING = 2, 1, 0


def a_case(*classes: int) -> InMemory:
    """4 x 4 x 4 voxels; every class has one voxel, at a place of its own."""
    locations = {k: np.array([[k, k, k]], np.int32) for k in classes}
    return InMemory(np.zeros((1, 4, 4, 4), np.float32), np.zeros((4, 4, 4), np.int16), locations)


CASES = [a_case(COMMON, RARE)] + [a_case(COMMON)] * 79 + [a_case()] * 20
"""100 cases: the rare class is in 1 % of them, the common one in 80 %, a fifth is empty."""


def drawn(mode: str, rates: tuple[float, ...] = (), share: float = 0.4, cases: list[InMemory] = CASES) -> list[Place]:
    asked = Sampling((2, 2, 2), BATCH, share, seed=1, mode=mode, class_rates=rates)
    held = sampling.holders(cases)
    return [place for step in range(PATCHES // BATCH) for place in draw_places(cases, asked, step, held=held)]


def is_within(found: int, of: int, promised: float) -> bool:
    """Whether a count lies within 4 standard deviations of the binomial distribution: 6 in 100,000 do not."""
    return abs(found - of * promised) <= 4 * math.sqrt(of * promised * (1 - promised)) + 1e-9


def check(counts: Counter[Any], promised: dict[Any, float], of: int) -> None:
    for key, share in promised.items():
        assert is_within(counts[key], of, share), f"{key}: {counts[key]} of {of}, promised {share:.3f}"
    assert sum(counts[key] for key in promised) == of


def test_foreground_sampling_draws_classes_within_any_case() -> None:
    places = drawn("foreground")
    assert len(places) == PATCHES
    counts = Counter(place.forced_class for place in places)
    promised = {COMMON: 0.4 * (0.79 + 0.01 / 2), RARE: 0.4 * 0.01 / 2}
    check(counts, promised | {None: 1 - sum(promised.values())}, PATCHES)


@pytest.mark.parametrize(("rates", "rare"), [((), 0.5), ((0.5, 0.5), 0.5), ((0.9, 0.1), 0.1), ((0.0, 1.0), 1.0)])
def test_class_balanced_sampling_draws_a_class_of_one_case_in_a_hundred_at_its_rate(
    rates: tuple[float, ...], rare: float
) -> None:
    places = drawn("class_balanced", rates)
    counts = Counter(place.forced_class for place in places)
    assert counts[None] == 0.6 * PATCHES
    check(counts, {RARE: 0.4 * rare, COMMON: 0.4 * (1 - rare), None: 0.6}, PATCHES)
    forced = [place for place in places if place.forced_class == COMMON]
    if forced:  # every case that has the class is as likely as the next
        check(Counter(place.case == 0 for place in forced), {True: 1 / 80, False: 79 / 80}, len(forced))
    free = Counter(len(CASES[place.case].locations) for place in places if place.forced_class is None)
    check(free, {0: 0.2, 1: 0.79, 2: 0.01}, sum(free.values()))


@pytest.mark.parametrize(
    ("rates", "common", "rare", "nothing"), [((), 1 / 3, 1 / 3, 1 / 3), ((0.8, 0.2), 0.8 / 1.5, 0.2 / 1.5, 0.5 / 1.5)]
)
def test_case_balanced_sampling_draws_the_one_case_that_has_a_class_at_its_rate(
    rates: tuple[float, ...], common: float, rare: float, nothing: float
) -> None:
    places = drawn("case_balanced", rates)
    kinds = Counter(len(CASES[place.case].locations) for place in places)
    in_first = rare + common / 80
    check(kinds, {2: in_first, 1: common * 79 / 80, 0: nothing}, PATCHES)
    promised = {RARE: 0.4 * in_first / 2, COMMON: 0.4 * (in_first / 2 + common * 79 / 80)}
    counts = Counter(place.forced_class for place in places)
    check(counts, promised | {None: 1 - sum(promised.values())}, PATCHES)


def test_hard_sampling_draws_classes_in_proportion_to_their_error() -> None:
    history = [{"step": 100.0, "dice_1": 0.9, "dice_2": 0.6}]
    rates = sampling.hard_rates(history, 200, classes=3)
    assert rates == pytest.approx((0.125 + 0.75 * 0.2, 0.125 + 0.75 * 0.8))
    counts = Counter(place.forced_class for place in drawn("hard", rates))
    check(counts, {COMMON: 0.4 * rates[0], RARE: 0.4 * rates[1], None: 0.6}, PATCHES)


def test_a_class_that_no_case_has_leaves_its_rate_to_the_others() -> None:
    counts = Counter(place.forced_class for place in drawn("class_balanced", (0.25, 0.25, 0.5)))
    check(counts, {COMMON: 0.2, RARE: 0.2, None: 0.6}, PATCHES)
    only_zero = Counter(place.forced_class for place in drawn("class_balanced", (0.0, 0.0, 1.0)))
    check(only_zero, {COMMON: 0.2, RARE: 0.2, None: 0.6}, PATCHES)


@pytest.mark.parametrize("mode", sampling.CHOOSE)
def test_cases_without_any_class_give_free_patches_in_every_mode(mode: str) -> None:
    assert {place.forced_class for place in drawn(mode, cases=[a_case(), a_case()])} == {None}


@pytest.mark.parametrize("mode", sampling.CHOOSE)
def test_forced_patches_hold_their_class_and_repeat_with_seed_and_step(mode: str) -> None:
    places = drawn(mode)
    assert places == drawn(mode)
    for place in places:
        if place.forced_class is not None:
            assert place.forced_class in CASES[place.case].locations
            assert all(first <= place.forced_class < first + 2 for first in place.corner_ZYX)


def test_who_has_what_is_the_same_whether_given_or_found() -> None:
    asked = Sampling((2, 2, 2), BATCH, 0.4, seed=1, mode="case_balanced")
    assert sampling.holders(CASES) == {0: tuple(range(80, 100)), 1: tuple(range(80)), 2: (0,)}
    assert draw_places(CASES, asked, 3) == draw_places(CASES, asked, 3, held=sampling.holders(CASES))


# ------------------------------------------------------------------------------------------------ the running error


def a_history(*dice: tuple[float | None, ...]) -> list[dict[str, float | None]]:
    """One epoch of 100 steps per entry."""
    return [
        {"step": 100.0 * (e + 1)} | {f"dice_{k}": value for k, value in enumerate(row, 1)} for e, row in enumerate(dice)
    ]


def test_the_running_error_halves_the_past_with_every_epoch() -> None:
    history = a_history((0.0, 0.5), (0.5, 0.5))
    errors = np.array([0.5 * 1.0 + 0.5 * 0.5, 0.5])
    assert sampling.hard_rates(history, 1000, 3) == pytest.approx(tuple(0.125 + 0.75 * errors / errors.sum()))


@pytest.mark.parametrize("unknown", [None, math.nan])
def test_a_class_of_unknown_error_counts_as_average(unknown: float | None) -> None:
    rates = sampling.hard_rates(a_history((0.9, unknown, 0.7)), 1000, 4)
    assert rates == pytest.approx(tuple(0.25 / 3 + 0.75 * error / 0.6 for error in (0.1, 0.2, 0.3)))


def test_classes_are_drawn_alike_before_anything_is_known_and_when_all_is_right() -> None:
    assert sampling.hard_rates([], 0, 3) == pytest.approx((0.5, 0.5))
    assert sampling.hard_rates(a_history((1.0, 1.0)), 1000, 3) == pytest.approx((0.5, 0.5))


def test_a_step_knows_the_same_errors_however_far_batches_are_read_ahead() -> None:
    history = a_history((0.9, 0.1), (0.2, 0.8))
    for step in range(300):
        known_when_read_ahead = [row for row in history if row["step"] <= max(0, step - sampling.LAG_STEPS // 2)]
        assert sampling.hard_rates(known_when_read_ahead, step, 3) == sampling.hard_rates(history, step, 3)
    assert sampling.hard_rates(history, 200, 3) != sampling.hard_rates(history, 216, 3)


# ------------------------------------------------------------------------------------------------ what is asked for


def a_train(text: str) -> TrainSpec:
    return TrainSpec.model_validate({"augment": AugmentSpec(rotation_rad=(0.0,))} | sampling.parse(text))


def test_a_spec_names_mode_rates_and_share() -> None:
    train = a_train("class_balanced:tumour=0.5,share=0.6")
    assert (train.sampling, train.class_rates, train.foreground_share) == ("class_balanced", (("tumour", 0.5),), 0.6)
    assert sampling.rates_of(train, ["liver", "tumour", "cyst"]) == pytest.approx((0.25, 0.5, 0.25))
    assert sampling.rates_of(a_train("hard"), ["liver", "tumour"]) == (0.5, 0.5)
    assert sampling.rates_of(a_train("case_balanced:a=0.1,b=0.3"), ["a", "b"]) == pytest.approx((0.25, 0.75))
    whole = a_train("class_balanced:a=0.2,b=0.4,c=0.3,d=0.1")  # in floating point a little more than 1
    assert sampling.rates_of(whole, list("abcde"))[4] == 0.0


def test_asking_for_another_mode_forgets_the_rates_of_the_last() -> None:
    before = a_train("class_balanced:tumour=0.5")
    assert TrainSpec.model_validate(before.model_dump() | sampling.parse("hard")).class_rates == ()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("hardd", r"'hardd' is not known\. Choose one of foreground, class_balanced, case_balanced, hard\."),
        ("class_balanced:tumour=2", r"'tumour=2' is no rate\. .*number from 0 to 1"),
        ("class_balanced:tumour=-0.1", "is no rate"),
        ("class_balanced:tumour", "'tumour' is no rate"),
        ("hard:tumour=0.5", r"hard takes no rates of classes\. Choose one of class_balanced, case_balanced\."),
        ("class_balanced:tumor=0.5", r"no class 'tumor'\. The classes are liver, tumour\."),
        ("class_balanced:liver=0.7,tumour=0.7", r"add up to 1\.4\. .*1 at most"),
        ("case_balanced:liver=0,tumour=0", "every rate is 0"),
    ],
)  # fmt: skip
def test_a_bad_spec_is_one_sentence_with_the_valid_choices(text: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        sampling.rates_of(a_train(text), ["liver", "tumour"])
