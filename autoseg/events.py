"""What the core may announce: progress, warnings and messages for the screen.

The core never prints: it calls `report(event)`, and a screen shows it (or does not).
"""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Event:
    """Base of everything announced; never announced itself."""


@dataclass(frozen=True, slots=True)
class Started(Event):
    """A piece of work with a known or unknown (`of` 0) number of parts begins."""

    what: str
    of: int = 0


@dataclass(frozen=True, slots=True)
class Advanced(Event):
    """`done` of `of` parts of `what` are finished; `note` may name the part."""

    what: str
    done: int
    of: int
    note: str = ""


@dataclass(frozen=True, slots=True)
class Finished(Event):
    """The piece of work named `what` is over."""

    what: str


@dataclass(frozen=True, slots=True)
class Said(Event):
    """A decision or result worth one line."""

    text: str


@dataclass(frozen=True, slots=True)
class Warned(Event):
    """Something is not as it should be, but the work goes on."""

    text: str


@dataclass(frozen=True, slots=True)
class Trained(Event):
    """State of a running training: `figures` holds name -> value of what a reader wants to watch."""

    epoch: int
    epochs: int
    step: int
    steps: int
    figures: dict[str, float] = field(default_factory=dict)


Report = Callable[[Event], None]


def silent(event: Event) -> None:
    """A `Report` that shows nothing; the default of every library function."""
