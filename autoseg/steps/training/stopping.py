"""Ctrl-C and SIGTERM, caught so that a training can save before it ends."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from autoseg.parallel import torchrun_setting

IMPATIENT_SECONDS = 2.0
"""torchrun hands a Ctrl-C on that its processes have got already; a second signal counts only after this time."""


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch Ctrl-C and SIGTERM inside the block; the function tells whether one came. A later second one ends at once.

    In any thread but the main one signals cannot be caught, and the function always says no.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    first_at = 0.0

    def remember(number: int, frame: object) -> None:
        nonlocal first_at
        if not asked.is_set():
            first_at = time.monotonic()
            asked.set()
        elif time.monotonic() - first_at > IMPATIENT_SECONDS:
            raise KeyboardInterrupt

    with _handled(remember, signal.SIGINT, signal.SIGTERM):
        yield asked.is_set


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """Let SIGTERM raise KeyboardInterrupt inside the block, as Ctrl-C does: schedulers send it, and all is left tidy.

    Without effect in any thread but the main one, and among the processes of torchrun: one that waits for the others
    would not come to it.
    """

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread() or torchrun_setting("WORLD_SIZE", 1) > 1:
        yield
        return
    with _handled(stop, signal.SIGTERM):
        yield


@contextmanager
def _handled(handler: Callable[[int, object], None], *numbers: signal.Signals) -> Iterator[None]:
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
