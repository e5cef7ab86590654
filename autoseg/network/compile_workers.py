"""The processes in which torch compiles for GPUs, so that their death is noticed.

It then ends a compilation, which would else wait for ever. Ctrl-C and the signals of schedulers reach them, and so does
a kernel that is short of memory. torch hears of it by the end of a pipe, which before 2.14 never comes, since it keeps
the other end of its own pipes open (pytorch #189290). Half of a compilation happens in a thread of torch's that no
signal interrupts, so that only kill -9 would be left. Processes that it has begun itself hold the pipes for another
minute.
"""

import os
import re
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

LOOK_SECONDS = 0.2
OTHER_END = re.compile(r"--(?:read|write)-fd=(\d+)")
"""How the process of a pool is told what it reads from and writes to."""
TALKS_BY = ("process", "read_pipe", "write_pipe", "running", "futures_lock", "pending_futures")
"""What the pools have that are meant here."""


@contextmanager
def watched() -> Iterator[None]:
    """In this block a compilation fails when the processes that do it die; the next one begins with new ones."""
    over = threading.Event()
    dead: list[Any] = []

    def watch() -> None:
        seen: list[Any] = []
        while not over.wait(LOOK_SECONDS):
            for pool in _pools():
                if pool not in seen:
                    close_other_ends(pool)
                    seen.append(pool)
                if pool not in dead and pool.process.poll() is not None:
                    dead.append(pool)
                    _wait_no_longer(pool)

    watcher = threading.Thread(target=watch, name="compile-workers", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()
        anew = getattr(sys.modules.get("torch._inductor.async_compile"), "after_fork", None)
        # asked anew: torch itself may have seen it first
        closed = not all(pool.running and pool.process.poll() is None for pool in _pools())
        if closed and anew is not None:
            anew()  # torch forgets its pools


def _wait_no_longer(pool: Any) -> None:
    """Let everything fail that is still expected of a pool."""
    pool.running = False
    if getattr(pool, "timer", None) is not None:
        pool.timer.quit()  # it would talk to the closed pool later
    with pool.futures_lock:
        waiting = list(pool.pending_futures.values())
        pool.pending_futures.clear()
    for future in waiting:
        if not future.done():
            future.set_exception(RuntimeError("the process that compiles has died"))


def _pools() -> tuple[Any, ...]:
    """torch's pools of compiling processes that it talks to through pipes; none in versions that have no such."""
    try:
        found = tuple(getattr(sys.modules.get("torch._inductor.async_compile"), "_pool_set", ()))
    except RuntimeError:  # one is being added
        return ()
    return tuple(pool for pool in found if all(hasattr(pool, name) for name in TALKS_BY))


def close_other_ends(pool: Any) -> None:
    """Close this process' copies of what the pool's process reads from and writes to, unless torch has done so."""
    for word in pool.process.args:
        told = OTHER_END.fullmatch(word) if isinstance(word, str) else None
        if told is None:
            continue
        end = int(told[1])
        try:
            owns = [pipe.fileno() for pipe in (pool.read_pipe, pool.write_pipe)]
            if end not in owns and any(_same_pipe(end, own) for own in owns):
                os.close(end)
        except (OSError, ValueError):  # closed already
            continue


def _same_pipe(one: int, other: int) -> bool:
    """Whether two descriptors belong to the same pipe."""
    first, second = os.fstat(one), os.fstat(other)
    return stat.S_ISFIFO(first.st_mode) and (first.st_dev, first.st_ino) == (second.st_dev, second.st_ino)
