"""Which configuration or pair of a run is best on its validation cases, as records."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import Field

from autoseg import store
from autoseg.layout import Layout
from autoseg.records import Record, Saved

PREFERRED = ("3d_cascade", "3d", "3d_lowres", "2d")


class Candidate(Record):
    """A configuration, or a pair whose probabilities are averaged, with its mean foreground Dice in validation.

    `per_class` belongs to the foreground labels in order. `p_value` is that of Wilcoxon's signed-rank test over cases
    against the one that was chosen; None for the chosen one itself and where there are too few cases.
    """

    members: Annotated[tuple[str, ...], Field(min_length=1)]
    dice: float | None
    per_class: tuple[float | None, ...]
    p_value: float | None = None

    @property
    def name(self) -> str:
        """Configurations joined by a plus sign, such as "2d+3d": the name of the folder with its predictions."""
        return "+".join(self.members)


class Selection(Saved):
    """What `predict RUN` uses where no configuration is named: `members`, found best on the validation cases.

    `single` is the best single configuration, for uses that cannot combine two.
    """

    members: Annotated[tuple[str, ...], Field(min_length=1)]
    single: str
    folds: tuple[str, ...]
    cases: int
    candidates: tuple[Candidate, ...]
    because: str


def selected(run: Path) -> Selection | None:
    """What `autoseg select` has written for this run, or None."""
    path = Layout(run).selection
    return store.load(path, Selection) if path.is_file() else None


def by_preference(names: Sequence[str]) -> list[str]:
    """Names of configurations, the one that is taken first where nothing is named or selected first."""
    known = [name for name in PREFERRED if name in names]
    return known + [name for name in names if name not in known]
