"""Ctrl-C and SIGTERM, caught so that a training can save before it ends."""

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
