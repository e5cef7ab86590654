"""Paired statistics: is one method better on the same cases, or is it chance?

`differences` are a - b, one number per case, without missing values. Tests need at least `FEWEST` cases: with five, a
two-sided Wilcoxon test cannot fall below 0.05 even if all agree. P values are two-sided, but for `best_of_many`.
"""

from typing import NamedTuple

import numpy as np
from scipy import special, stats

from autoseg.errors import UserError

FEWEST = 6
EXACT_CASES = 13
DECIMALS = 9
"""Of differences: 1 - 2/3 and 2/3 - 1/3 are the same gain, and 1e-17 is none."""


class Interval(NamedTuple):
    """A confidence interval of a mean."""

    low: float
    high: float


def paired_t(differences: np.ndarray) -> float:
    """P value of the paired t-test (Student 1908): is the mean difference zero?

    1 when all differences are 0; 0 when they are all the same other number.

    Raises:
        UserError: fewer than six cases.
    """
    enough(differences.size)
    if _all_equal(differences):
        return float(not _moved(differences).size)
    t = differences.mean() / (differences.std(ddof=1) / np.sqrt(differences.size))
    return float(2 * special.stdtr(differences.size - 1, -abs(t)))


def wilcoxon(differences: np.ndarray) -> float:
    """P value of Wilcoxon's signed-rank test: are differences symmetric around zero?

    Zero differences are left out (Wilcoxon 1945). Exact where 50 or fewer remain and no two sizes are equal, or 13 or
    fewer remain, whose ties share their mean rank; else the normal approximation with tie correction. 1 when nothing
    remains.

    Raises:
        UserError: fewer than six cases.
    """
    enough(differences.size)
    moved = _moved(differences)
    if not moved.size:
        return 1.0
    ranks = stats.rankdata(np.abs(moved))
    n, statistic = moved.size, float(ranks[moved > 0].sum())
    sizes = np.unique(ranks, return_counts=True)[1]
    if n <= 50 and sizes.max() == 1:
        return _exact_signed_rank(int(statistic), n)
    if n <= EXACT_CASES:
        return _of_all_signs(statistic, ranks)
    mean = n * (n + 1) / 4
    variance = n * (n + 1) * (2 * n + 1) / 24 - float((sizes**3 - sizes).sum()) / 48
    return float(2 * special.ndtr(-abs(statistic - mean) / np.sqrt(variance)))


def _of_all_signs(statistic: float, ranks: np.ndarray) -> float:
    """P value of a sum of positive ranks among the sums that all signs give."""
    bits = np.arange(1 << ranks.size)[:, None] >> np.arange(ranks.size) & 1
    sums = bits @ ranks
    above, below = float((sums >= statistic - 1e-9).mean()), float((sums <= statistic + 1e-9).mean())
    return min(1.0, 2 * min(above, below))


def rank_correlation(differences: np.ndarray) -> float:
    """Matched-pairs rank-biserial correlation (Kerby 2014): where Wilcoxon's test sees the difference, from -1 to 1.

    (W+ - W-) / (W+ + W-), the sums of ranks of positive and negative differences; 0 when all are 0. Its sign may be
    another one than the mean's, where a few cases are far worse and most a little better.
    """
    moved = _moved(differences)
    ranks = stats.rankdata(np.abs(moved))
    return float((ranks * np.sign(moved)).sum() / ranks.sum()) if moved.size else 0.0


def best_of_many(differences_CN: np.ndarray, chosen: int = 0, resamples: int = 10_000, seed: int = 0) -> float:
    """P value of one of several candidates, chosen after looking at all: is its mean gain above zero by chance?

    Single-step maxT test (Westfall and Young 1993) by sign flips of whole cases: how often the largest of all
    candidates' statistics sum(d) / sqrt(sum(d^2)), which grows with t, reaches the chosen one's. Candidates that do
    nearly the same therefore cost no power. Exact where there are at most 13 cases.

    Args:
        differences_CN: C candidates x N cases, after - before.
        chosen: index of the candidate.
        resamples: drawings of signs where there are more cases.

    Raises:
        UserError: fewer than six cases.
    """
    cases = differences_CN.shape[1]
    enough(cases)
    differences_CN = np.round(differences_CN, DECIMALS)
    size_C = np.sqrt((differences_CN**2).sum(axis=1))
    if size_C[chosen] == 0:
        return 1.0
    scaled_CN = differences_CN / np.where(size_C > 0, size_C, 1.0)[:, None]
    if cases <= EXACT_CASES:
        bits = np.arange(1 << cases)[:, None] >> np.arange(cases) & 1
        signs_SN = 1.0 - 2.0 * bits
    else:
        signs_SN = np.random.default_rng(seed).choice((-1.0, 1.0), (resamples, cases))
        signs_SN[0] = 1.0  # the signs that were observed are some that could have been
    largest_S = (signs_SN @ scaled_CN.T).max(axis=1)
    return float((largest_S >= scaled_CN[chosen].sum() - 1e-12).mean())


def bootstrap_interval(
    differences: np.ndarray, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> Interval:
    """Bias-corrected and accelerated (BCa) bootstrap interval of the mean difference (Efron 1987).

    Args:
        level: share of repetitions in which the interval should hold the true mean.
        resamples: drawings of as many cases with replacement.

    Raises:
        UserError: fewer than six cases.
    """
    enough(differences.size)
    n, mean = differences.size, float(differences.mean())
    if _all_equal(differences):
        return Interval(mean, mean)
    chance = np.random.default_rng(seed)
    block = max(1, 2_000_000 // n)
    means = np.concatenate([
        differences[chance.integers(0, n, (min(block, resamples - start), n))].mean(axis=1)
        for start in range(0, resamples, block)
    ])
    below = ((means < mean).sum() + (means <= mean).sum()) / (2 * resamples)
    bias = special.ndtri(np.clip(below, 1 / resamples, 1 - 1 / resamples))
    without = (differences.sum() - differences) / (n - 1)
    pull = without.mean() - without
    acceleration = (pull**3).sum() / (6 * (pull**2).sum() ** 1.5)
    tails = special.ndtri(np.array([(1 - level) / 2, (1 + level) / 2]))
    at = special.ndtr(bias + (bias + tails) / (1 - acceleration * (bias + tails)))
    low, high = np.quantile(means, at)
    return Interval(float(low), float(high))


def effect_size(differences: np.ndarray) -> float | None:
    """Cohen's d of paired differences: mean / standard deviation; None when all differences are equal and not 0."""
    if _all_equal(differences):
        return None if _moved(differences).size else 0.0
    return float(differences.mean() / differences.std(ddof=1))


def holm(p_values: np.ndarray) -> np.ndarray:
    """P values adjusted by Holm (1979): the chance of even one false finding in the family stays below the level."""
    m = p_values.size
    order = np.argsort(p_values, kind="stable")
    adjusted = np.empty(m)
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(p_values[order] * np.arange(m, 0, -1)))
    return adjusted


def ranking_stability(scores_MN: np.ndarray, resamples: int = 2_000, seed: int = 0) -> np.ndarray:
    """How often method m comes on rank r when the cases are drawn anew.

    Args:
        scores_MN: M methods x N cases, higher is better, no missing values.

    Returns:
        (M, M) shares: [m, r] is the share of drawings where m has rank r (0 best) by mean; ties go to the first.
    """
    methods, cases = scores_MN.shape
    chance = np.random.default_rng(seed)
    shares = np.zeros((methods, methods))
    for _ in range(resamples):
        means = scores_MN[:, chance.integers(0, cases, cases)].mean(axis=1)
        shares[np.argsort(-means, kind="stable"), np.arange(methods)] += 1
    return shares / resamples


def enough(cases: int) -> None:
    """Raise UserError when there are too few cases to test anything."""
    if cases < FEWEST:
        raise UserError(
            f"{cases} paired case{'s are' if cases != 1 else ' is'} too few for a test; it needs {FEWEST}.",
            fix="Score more cases, or look at the numbers without a test.",
        )


def _moved(differences: np.ndarray) -> np.ndarray:
    """The differences that are not 0, without rounding noise, which would break ties and rank what is nothing."""
    rounded = np.round(differences, DECIMALS)
    return rounded[rounded != 0]


def _all_equal(differences: np.ndarray) -> bool:
    """Whether all are the same number but for rounding; the standard deviation of equal numbers need not be 0."""
    rounding = max(10.0**-DECIMALS, 1e-12 * float(np.abs(differences).max(initial=0.0)))
    return not differences.size or bool(np.ptp(differences) <= rounding)


def _exact_signed_rank(statistic: int, n: int) -> float:
    """P value from the exact null distribution of the sum of positive ranks 1..n."""
    ways = np.zeros(n * (n + 1) // 2 + 1)
    ways[0] = 1.0
    for rank in range(1, n + 1):
        ways[rank:] += ways[:-rank].copy()
    chances = ways / ways.sum()
    at_least, at_most = chances[statistic:].sum(), chances[: statistic + 1].sum()
    return float(min(1.0, 2 * min(at_least, at_most)))
