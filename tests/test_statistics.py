import numpy as np
import pytest
from scipy import stats

from autoseg.errors import UserError
from autoseg.scoring.statistics import (
    best_of_many,
    bootstrap_interval,
    effect_size,
    holm,
    paired_t,
    rank_correlation,
    ranking_stability,
    wilcoxon,
)


def drawn(seed: int, cases: int, shift: float = 0.2) -> np.ndarray:
    return np.random.default_rng(seed).normal(shift, 1.0, cases)


def test_the_t_test_equals_scipy():
    for seed in range(50):
        differences = drawn(seed, 6 + seed)
        assert paired_t(differences) == pytest.approx(stats.ttest_1samp(differences, 0.0).pvalue, abs=1e-10)


@pytest.mark.parametrize(
    ("differences", "two_sided"),
    [
        ([0.0, 1.0, 2.0, 3.0, 4.0, 5.0], 2 / 32),  # five cases cannot fall below 0.05, whatever a sixth adds
        ([0.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2 / 32),
        ([1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2 / 64),
        ([-1.0, 1.0, 1.0, 1.0, 1.0, 1.0], 2 * 7 / 64),
        ([1 / 3 - 2 / 3, *[1 - 2 / 3, 2 / 3 - 1 / 3] * 4, 1e-17], 2 * 10 / 512),  # equal gaps but for rounding
    ],
)
def test_wilcoxon_is_exact_in_few_cases_also_with_zeros_and_ties(differences: list[float], two_sided: float) -> None:
    assert wilcoxon(np.array(differences)) == pytest.approx(two_sided)
    assert wilcoxon(-np.array(differences)) == pytest.approx(two_sided)


def test_the_rank_correlation_is_the_share_of_ranks_for_less_that_against():
    """Ranks of 1, -2, 3, 4 are 1 to 4: (1 + 3 + 4 - 2) / 10."""
    assert rank_correlation(np.array([1.0, -2.0, 3.0, 4.0])) == pytest.approx(0.6)
    assert rank_correlation(np.array([1.0, 0.0, 2.0])) == 1.0
    assert rank_correlation(np.zeros(6)) == 0.0
    assert rank_correlation(np.array([1 / 3 - 2 / 3, 1 - 2 / 3, 1e-17])) == 0.0
    few = np.append(np.linspace(0.1, 0.2, 19), -9.0)
    assert rank_correlation(few) > 0 > few.mean()


def test_wilcoxon_equals_scipy_exact_and_approximate():
    for seed in range(50):
        for cases in (6, 13, 50, 51, 120):
            differences = drawn(seed, cases)
            assert wilcoxon(differences) == pytest.approx(stats.wilcoxon(differences).pvalue, abs=1e-10)


def test_wilcoxon_equals_scipy_with_ties_and_zeros():
    for seed in range(50):
        differences = np.round(drawn(seed, 40) * 2) / 2
        expected = stats.wilcoxon(differences, method="asymptotic").pvalue
        assert wilcoxon(differences) == pytest.approx(expected, abs=1e-10)


def test_differences_without_spread_have_plain_answers():
    assert paired_t(np.full(8, 0.5)) == 0.0
    assert wilcoxon(np.full(8, 0.5)) < 0.05
    assert bootstrap_interval(np.full(8, 0.5)) == (0.5, 0.5)
    assert effect_size(np.full(8, 0.5)) is None


@pytest.mark.parametrize("noise", [np.zeros(8), np.full(8, -1e-17), np.array([1e-17] * 6 + [0.0, 2e-17])])
def test_rounding_is_no_difference(noise: np.ndarray) -> None:
    """Means of the same numbers in another order differ by 1e-17; a t-test of such noise would find a difference."""
    assert paired_t(noise) == 1.0
    assert wilcoxon(noise) == 1.0
    assert effect_size(noise) == 0.0
    assert bootstrap_interval(noise) == pytest.approx((0.0, 0.0), abs=1e-15)


@pytest.mark.parametrize("gain", [0.1, 0.7, -0.1])
def test_equal_differences_have_plain_answers_whatever_rounding_makes_of_their_spread(gain: float) -> None:
    """The standard deviation of seven times 0.1 is 1e-17, and 0.8 - 0.7 is not quite 0.9 - 0.8."""
    for cases in range(6, 41):
        worse = np.random.default_rng(cases).uniform(0.2, 0.9, cases)
        for differences in (np.full(cases, gain), (worse + gain) - worse):
            assert bootstrap_interval(differences) == pytest.approx((gain, gain))
            assert effect_size(differences) is None
            assert paired_t(differences) == 0.0


def test_the_interval_equals_scipys_from_the_same_drawings():
    for seed in range(10):
        differences = drawn(seed, 20 + seed)
        ours = bootstrap_interval(differences, resamples=3000, seed=1)
        theirs = stats.bootstrap(
            (differences,), np.mean, n_resamples=3000, method="BCa", rng=np.random.default_rng(1)
        ).confidence_interval
        assert ours == pytest.approx((theirs.low, theirs.high), abs=1e-10)


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    held = 0
    for seed in range(300):
        low, high = bootstrap_interval(drawn(seed, 40, 0.0), resamples=1000)
        held += low <= 0.0 <= high
    assert 0.90 <= held / 300 <= 0.98


def test_the_sign_flip_test_equals_scipys_for_one_candidate():
    for seed in range(20):
        differences = drawn(seed, 6 + seed % 8, 0.5)
        expected = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
        ).pvalue
        assert best_of_many(differences[None]) == pytest.approx(expected, abs=1e-10)


def test_drawn_signs_come_close_to_all_of_them():
    differences = drawn(3, 16, 0.4)
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    ).pvalue
    assert best_of_many(differences[None]) == pytest.approx(exact, abs=0.01)


def test_the_best_of_many_candidates_is_judged_as_such():
    """Under the null, the best of ten rejects as often as one; ten that are the same lose no power."""
    chance, rejected = np.random.default_rng(5), 0
    for _ in range(500):
        drawn_CN = chance.normal(size=(10, 8))
        rejected += best_of_many(drawn_CN, int(drawn_CN.mean(axis=1).argmax())) < 0.05
    assert rejected <= stats.binom.interval(0.999, 500, 0.05)[1]
    one = drawn(1, 8, 1.0)
    assert best_of_many(np.repeat(one[None], 10, axis=0), 3) == best_of_many(one[None])
    assert best_of_many(np.zeros((2, 8)), 1) == 1.0
    assert best_of_many(np.full((1, 6), 0.1)) == pytest.approx(1 / 64)
    large_and_bad = np.stack([np.full(8, 0.01), np.linspace(-1.0, -0.9, 8)])
    assert best_of_many(large_and_bad) < 0.05
    with pytest.raises(UserError, match="too few"):
        best_of_many(np.ones((1, 5)))


def test_effect_size_is_the_mean_in_standard_deviations():
    differences = drawn(0, 20)
    assert effect_size(differences) == pytest.approx(stats.ttest_1samp(differences, 0).statistic / np.sqrt(20))


def test_holm_equals_its_definition():
    p = np.array([0.01, 0.04, 0.03, 0.005])
    assert holm(p) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm(np.array([0.9, 0.8])).tolist() == [1.0, 1.0]
    assert holm(np.array([0.02])) == pytest.approx([0.02])


def test_fewer_than_six_cases_are_refused():
    for test in (paired_t, wilcoxon, bootstrap_interval):
        with pytest.raises(UserError, match="5 paired cases are too few"):
            test(np.arange(5.0))
        test(np.arange(6.0))


def test_under_the_null_tests_and_corrected_families_reject_at_their_level():
    """2,000 comparisons of equal methods; rejections must lie within the 95 % binomial interval around 5 %."""
    chance = np.random.default_rng(7)
    rejected = {"t": 0, "wilcoxon": 0, "family": 0}
    for _ in range(2000):
        p_values = [wilcoxon(chance.normal(size=20)) for _ in range(4)]
        rejected["wilcoxon"] += p_values[0] < 0.05
        rejected["family"] += holm(np.array(p_values)).min() < 0.05
        rejected["t"] += paired_t(chance.normal(size=20)) < 0.05
    low, high = stats.binom.interval(0.95, 2000, 0.05)
    assert low <= rejected["t"] <= high
    assert low <= rejected["wilcoxon"] <= high
    assert low <= rejected["family"] <= high


def test_the_ranking_is_stable_where_the_gap_is_large_and_not_where_it_is_chance():
    chance = np.random.default_rng(0)
    scores = chance.normal(0, 0.05, (3, 30))
    scores[0] += 0.5
    stability = ranking_stability(scores)
    assert np.allclose(stability.sum(0), 1)
    assert np.allclose(stability.sum(1), 1)
    assert stability[0, 0] == 1.0
    assert 0.02 < stability[1, 1] < 0.98
