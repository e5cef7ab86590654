"""What a distillation came to, as records."""

from autoseg.records import Record, Saved


class Contestant(Record):
    """One row of the table: a member, the ensemble, the student, or the student's network trained on labels alone.

    `dice` and `class_dice` are over the fold's validation cases, None where they are not known or were learned from.
    `operations` are those of one patch forward, `seconds` of one case, all members of an ensemble together.
    """

    name: str
    dice: float | None
    class_dice: tuple[float | None, ...] = ()
    parameters: int
    operations: int
    seconds: float


class Distillation(Saved):
    """A student, its teachers and what both are worth.

    `seen` names teachers that learned from validation cases of the fold: then the scores are better than they ought to
    be.
    `p_value` is Wilcoxon's over cases, student against labels alone, `p_ensemble` that of the ensemble against the mean
    of its members; None where not tested. The seconds are a mean of `timed_cases`, all contestants in one process, one
    after the other on each case.
    """

    student: str
    fold: str
    seed: int
    teachers: tuple[str, ...]
    seen: tuple[str, ...] = ()
    temperature: float
    labels_weight: float
    unlabelled: int = 0
    cases: int = 0
    timed_cases: int = 0
    device: str = ""
    contestants: tuple[Contestant, ...] = ()
    p_value: float | None = None
    p_ensemble: float | None = None
    conclusion: str = ""
