"""Several trainings at a time, one per device, each in a process of its own."""

import _thread
import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import connection, get_context
from typing import TypeVar

from autoseg.errors import UserError
from autoseg.parallel import ctrl_c_later

Job = TypeVar("Job")
Result = TypeVar("Result")

GRACE_SECONDS = 60.0
"""A training whose parent is gone has so long to end its step and to save."""


def side_by_side(
    work: Callable[[Job, str], Result], jobs: Sequence[Job], devices: Sequence[str]
) -> Iterator[tuple[Job, Result]]:
    """Call `work(job, device)` for every job, as many at a time as there are devices; yield each as it ends, with what
    `work` returned.

    `work` and the jobs are pickled. A device is given its next job when the last one has ended, so none begins after a
    failure or Ctrl-C. What `work` raises is raised here when the others under way have ended; for Ctrl-C, and when the
    caller wants no more, they are sent SIGTERM and waited for while they save. Raises UserError where a process was
    killed.
    """
    context = get_context("spawn")  # a fork would share the parent's CUDA context, which no child may use
    told, tell = context.Pipe(duplex=False)
    # one process per pool: a killed one takes none of the others with it
    pools = [ProcessPoolExecutor(1, context, initializer=_begin, initargs=(told,)) for _ in devices]
    waiting, free = deque(jobs), deque(zip(devices, pools, strict=True))
    running: dict[Future[Result], tuple[Job, str, ProcessPoolExecutor]] = {}
    try:
        try:
            while waiting or running:
                while waiting and free:
                    device, pool = free.popleft()
                    job = waiting.popleft()
                    running[_submit(pool, work, job, device)] = job, device, pool
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    job, device, pool = running.pop(future)
                    said = _result_of(future, device)
                    free.append((device, pool))
                    yield job, said
        except Exception:
            wait(running)
            raise
    except (KeyboardInterrupt, GeneratorExit):
        tell.close()
        raise
    finally:
        for pool in pools:
            pool.shutdown(wait=True, cancel_futures=True)
        tell.close()
        told.close()


def _submit(pool: ProcessPoolExecutor, work: Callable[[Job, str], Result], job: Job, device: str) -> Future[Result]:
    try:
        with ctrl_c_later():
            return pool.submit(_in_worker, work, job, device)
    except BrokenProcessPool as error:  # it was killed between two jobs
        raise _killed(device) from error


def _result_of(future: Future[Result], device: str) -> Result:
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise _killed(device) from error


def _killed(device: str) -> UserError:
    return UserError(
        f"The process that trained on {device} was killed, most likely because the machine ran out of memory.",
        fix="Run the same command again, it goes on where trainings were saved; fewer devices need less memory.",
    )


def _in_worker(work: Callable[[Job, str], Result], job: Job, device: str) -> Result:
    try:
        return work(job, device)
    finally:
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():
            os._exit(1)


def _begin(told: connection.Connection) -> None:
    """Leave Ctrl-C to the parent: an idle worker would die of it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _thread.start_new_thread(_stop_when_told, (told,))  # a bare one, see `parallel.end_with_parent`


def _stop_when_told(told: connection.Connection) -> None:
    """Wait until the parent closes its end or dies; then have the training save, and outlive a dead parent briefly."""
    connection.wait([told])
    signal.raise_signal(signal.SIGTERM)
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
    time.sleep(GRACE_SECONDS)
    os._exit(1)
