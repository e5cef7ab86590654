"""One function over many cases in worker processes, without hangs. A dead or failing worker ends the work at once."""

import _thread
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing import connection
from multiprocessing.context import BaseContext
from pathlib import Path
from types import FrameType
from typing import TypeVar

from autoseg.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

Item = TypeVar("Item")
Result = TypeVar("Result")

THREAD_SETTINGS = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS", "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS")
"""Set to 1 in workers: with one worker per core, more threads only wait for each other."""
USUAL_OPEN_FILES = 1024
MOST_OPEN_FILES = 2**16
"""Enough for any data set; some systems allow a thousand million, over which some programs loop."""
LIMIT_OF_MACOS = 10_240
"""What it takes at most, though it says that there is no limit."""

LAST_WORDS_SECONDS = 5.0
"""Terminated workers are waited for no longer."""


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


def torchrun_setting(name: str, otherwise: int) -> int:
    """WORLD_SIZE, RANK, LOCAL_RANK or LOCAL_WORLD_SIZE as torchrun sets them for each process that it starts."""
    return int(os.environ.get(name, otherwise))  # a setting of torchrun


def own_cores() -> int:
    """Cores for this process where torchrun started several on this machine; else all that are allowed."""
    return max(1, allowed_cores() // torchrun_setting("LOCAL_WORLD_SIZE", 1))


@cache
def allowed_open_files() -> int:
    """Files this process may have open, the limit raised as far as the system lets it; often it is 1024 at first."""
    if resource is None:
        return USUAL_OPEN_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    wanted = MOST_OPEN_FILES if hard == unlimited else min(hard, MOST_OPEN_FILES)
    if soft == unlimited or soft >= wanted:
        return MOST_OPEN_FILES if soft == unlimited else soft
    for limit in (wanted, min(wanted, LIMIT_OF_MACOS)):
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(limit, soft), hard))
            break
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def make_cublas_repeatable() -> None:
    """Ask cuBLAS for the workspace with which it gives equal results; counts if no CUDA device was used before."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # a setting of cuBLAS


def over_cases(
    function: Callable[[Item], Result],
    items: Sequence[Item],
    workers: int,
    name: Callable[[Item], str],
    head_start_seconds: float = 0.0,
    preload: Sequence[str] = (),
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, function(item)) as they finish, from `workers` processes (1: in this one).

    At most 2 x workers items are under way, so memory stays bounded. `function` and its items must be picklable.
    An exception of `function` is raised here with the item named; a killed worker raises UserError with likely cause.
    Where this ends early, by an exception or Ctrl-C, workers are terminated wherever they are: what `function` writes
    has to be whole or absent, as `store.replacing` has it.
    Starting workers takes about a second of imports: with `head_start_seconds` this process works on the first items
    meanwhile, so that a small data set is done before a worker is needed. `preload` names slow modules that `function`
    imports late; they are imported once for all workers.
    """
    _refuse_beginning_worker()
    rest = iter(items)
    if workers <= 1 or len(items) <= 1:
        yield from _here(function, rest, name)
        return
    context = worker_context(function, preload)
    if head_start_seconds > 0:
        yield from _here(function, rest, name, until=time.monotonic() + head_start_seconds)
    first = list(_take(rest, 2 * workers))
    if not first:
        return
    pool = ProcessPoolExecutor(min(workers, len(items)), mp_context=context, initializer=begin_worker)
    waiting: dict[Future[Result], Item] = {}
    try:
        for item in first:
            waiting[_submit(pool, function, item, waiting, name)] = item
        while waiting:
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                item = waiting.pop(future)
                yield item, _result(future, item, [*waiting.values(), item], name)
                for following in _take(rest, 1):
                    waiting[_submit(pool, function, following, waiting, name)] = following
    except BaseException:
        with ctrl_c_later(forget=True):  # what is under way ends with an exception in any case
            _end(pool)
        raise
    pool.shutdown(wait=False)


def _refuse_beginning_worker() -> None:
    """Raise UserError in a worker that runs the user's script once more, as each does to know what it defines."""
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise UserError(
            "This script starts its work again in every worker process.",
            fix='Put what it does, not what it defines, under `if __name__ == "__main__":`.',
        )


def _take(rest: Iterator[Item], most: int) -> Iterator[Item]:
    for _ in range(most):
        for item in rest:
            yield item
            break


def _here(
    function: Callable[[Item], Result], rest: Iterator[Item], name: Callable[[Item], str], until: float = float("inf")
) -> Iterator[tuple[Item, Result]]:
    """Work in this process until the clock says `until`."""
    while time.monotonic() < until:
        for item in rest:
            try:
                result = function(item)
            except UserError:
                raise
            except Exception as error:
                error.add_note(f"while working on {name(item)}")
                raise
            yield item, result
            break
        else:
            return


def worker_context(function: Callable, preload: Sequence[str]) -> BaseContext:
    """Fork a small server that has imported the function's module, without the threads that make plain forks hang.

    The server is started, not waited for. It inherits one thread per worker from the environment.
    """
    if sys.platform != "linux":
        return multiprocessing.get_context("spawn")
    from multiprocessing import forkserver, resource_tracker

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([getattr(function, "func", function).__module__, *preload])
    before = {setting: os.environ.get(setting) for setting in THREAD_SETTINGS}
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
    resource_tracker.ensure_running()  # which would unblock Ctrl-C below
    unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()  # blocked there, too: it would complain of Ctrl-C while it still imports
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)
        for setting, value in before.items():
            if value is None:
                os.environ.pop(setting)
            else:
                os.environ[setting] = value
    return context


def begin_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(dict.fromkeys(THREAD_SETTINGS, "1"))
    end_with_parent()


def end_with_parent() -> None:
    """Have this worker process end when the process that started it is gone, killed perhaps."""
    # A bare thread: `threading.active_count()` stays 1, by which others tell that they may redirect standard output.
    _thread.start_new_thread(_wait_for_parent, ())


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def _end(pool: ProcessPoolExecutor) -> None:
    """Terminate the workers, who would work off what is queued for them, and wait until they are gone.

    With Python 3.14 the first three lines are `pool.terminate_workers()`.
    """
    workers, results, manager = [*(pool._processes or {}).values()], pool._result_queue, pool._executor_manager_thread
    pool.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()
    if results is not None:  # else the pool's thread would wait for the rest of a result that was cut short
        results._writer.close()  # type: ignore[attr-defined]
    if manager is not None:
        manager.join(LAST_WORDS_SECONDS)  # type: ignore[attr-defined]


@contextmanager
def ctrl_c_later(forget: bool = False) -> Iterator[None]:
    """Let the block end before Ctrl-C counts; with `forget` it never does.

    A worker whose start is cut short belongs to no pool: it outlives this process and complains on the screen.
    """
    known = callable(signal.getsignal(signal.SIGINT))
    if not known or threading.current_thread() is not threading.main_thread():  # only that one is interrupted
        yield
        return
    pressed: list[FrameType | None] = []
    before = signal.signal(signal.SIGINT, lambda _, frame: pressed.append(frame))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed and callable(before) and not forget:
        before(signal.SIGINT, pressed[-1])


def _submit(
    pool: ProcessPoolExecutor,
    function: Callable[[Item], Result],
    item: Item,
    waiting: dict[Future[Result], Item],
    name: Callable[[Item], str],
) -> Future[Result]:
    try:
        with ctrl_c_later():
            return pool.submit(function, item)
    except BrokenProcessPool as error:  # a worker died since the last result
        raise _killed([*waiting.values()], name) from error


def _result(future: Future[Result], item: Item, under_way: list[Item], name: Callable[[Item], str]) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _killed(under_way, name) from error
    except UserError:
        raise
    except Exception as error:
        error.add_note(f"while working on {name(item)}")
        raise


def _killed(under_way: list[Item], name: Callable[[Item], str]) -> UserError:
    cases = ", ".join(sorted(name(each) for each in under_way))
    return UserError(
        f"A worker process was killed while these cases were under way: {cases}. "
        "Most likely the machine ran out of memory, or a script of your own calls autoseg without a guard.",
        fix='Run the same again with one worker; a script has to call autoseg below `if __name__ == "__main__":`.',
    )
