"""What holds for all tests."""

import signal
import sys
from functools import cache

# a shell's background jobs are started with Ctrl-C ignored, and so would be the processes that tests send it to
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """Matrix products are timed once, not by each of hundreds of trainings whose steps take less than that."""
    learn = sys.modules.get("autoseg.steps.training.learn")
    if learn is not None:
        learn.matmul_rate = cache(learn.matmul_rate)
