"""How far the network is inside one image, for those that take long."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autoseg.events import Advanced, Finished, Report
from autoseg.lanes import advanced
from autoseg.network.sliding import Progress

SLOW_SECONDS = 4.0
"""A case whose tiles take longer gets a bar of its own."""
ANNOUNCED_SECONDS = 0.25
"""Time between two announcements of tiles."""


@contextmanager
def telling(report: Report, what: str, abandoned: Callable[[], bool]) -> Iterator[Progress]:
    """Progress of one case, announced once it proves slow; it raises InterruptedError once the run is given up.

    A worker thread that makes progress is not given up, however long the case takes.
    """
    last = time.monotonic() + SLOW_SECONDS - ANNOUNCED_SECONDS
    told = False

    def progress(done: int, of: int) -> None:
        nonlocal last, told
        advanced()
        if abandoned():
            raise InterruptedError("the run was given up")
        if (now := time.monotonic()) - last >= ANNOUNCED_SECONDS:
            report(Advanced(what, done, of))
            last, told = now, True

    try:
        yield progress
    finally:
        if told:
            report(Finished(what))
