"""What a comparison of methods found, as records."""

from autoseg.records import Record, Saved


class Difference(Record):
    """One metric of one label (or "foreground": the mean over classes) compared between two methods, case by case.

    `difference` is the mean of first - second over the `cases` where both are defined, with its bootstrap interval at
    the comparison's level; `better` names the better method where `p_wilcoxon_holm` is below 1 - level, else None.
    Where it is, but cases (the sign of `rank_correlation`) and the mean disagree on which is better, there is none and
    `torn` is true. The P values are None where there are too few cases to test. `unpaired` counts the scores of single
    classes that only one of the two has; they enter neither mean.
    """

    first: str
    second: str
    metric: str
    label: str
    cases: int
    mean_first: float | None
    mean_second: float | None
    difference: float | None
    low: float | None = None
    high: float | None = None
    effect_size: float | None = None
    rank_correlation: float | None = None
    p_t: float | None = None
    p_t_holm: float | None = None
    p_wilcoxon: float | None = None
    p_wilcoxon_holm: float | None = None
    better: str | None = None
    torn: bool = False
    unpaired: int = 0


class Comparison(Saved):
    """Several methods scored on the same cases. `rank_shares[m][r]`: how often method m comes on rank r (0 best).

    The ranking is by the first metric's foreground mean; shares are over drawings of the cases with replacement.
    """

    methods: tuple[str, ...]
    labels: tuple[str, ...]
    metrics: tuple[str, ...]
    cases: int
    level: float
    conclusion: str
    ranking: tuple[str, ...]
    rank_shares: tuple[tuple[float, ...], ...]
    differences: tuple[Difference, ...]


class Agreeing(Record):
    """Mean Dice over the cases between two members of an ensemble, or a member and the "ensemble"."""

    first: str
    second: str
    dice: float | None
    per_label: tuple[float | None, ...]


class Agreement(Saved):
    """How well the members of an ensemble agree, per foreground label; None where neither of two has the label."""

    members: tuple[str, ...]
    labels: tuple[str, ...]
    cases: int
    pairs: tuple[Agreeing, ...]
