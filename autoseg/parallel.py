"""One function over many cases in worker processes, without hangs: a dead or failing worker ends the work at once."""

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

from autoseg.errors import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


def allowed_cores() -> int:
    """Cores this process may use: affinity, then the cgroup's CPU quota, then SLURM's allocation."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file():
        limit, period = quota.read_text().split()
        if limit != "max":
            cores = min(cores, max(1, round(int(limit) / int(period))))
    if slurm := os.environ.get("SLURM_CPUS_PER_TASK"):
        cores = min(cores, max(1, int(slurm)))
    return max(1, cores)


def over_cases(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, name: Callable[[Item], str]
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) as they finish, from `workers` processes (1: in this one).

    At most 2 x workers items are under way, so memory stays bounded. `function` and its items must be picklable.
    An exception of `function` is raised here with the item named; a killed worker raises UserError with the likely cause.
    """
    if workers <= 1 or len(items) <= 1:
        for item in items:
            yield item, function(item)
        return
    context = multiprocessing.get_context("forkserver" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context)
    waiting: dict[Future[Result], Item] = {}
    rest = iter(items)
    try:
        for item in rest:
            waiting[pool.submit(function, item)] = item
            if len(waiting) >= 2 * workers:
                break
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                item = waiting.pop(future)
                yield item, _result(future, item, [*waiting.values(), item], name)
                for following in rest:
                    waiting[pool.submit(function, following)] = following
                    break
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _result(future: Future[Result], item: Item, under_way: list[Item], name: Callable[[Item], str]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        cases = ", ".join(sorted(name(each) for each in under_way))
        raise UserError(
            f"A worker process was killed while these cases were under way: {cases}. Most likely the machine ran out of memory.",
            fix="Run the same command again with --workers 1.",
        ) from error
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"while working on {name(item)}")
        raise
