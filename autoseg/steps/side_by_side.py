"""Several trainings at a time, one per device, each in a process of its own."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from multiprocessing.queues import Queue
from typing import TypeVar

from autoseg.parallel import end_with_parent

Job = TypeVar("Job")

_DEVICE: list[str] = []
"""In a worker process: the device that is its own."""


def side_by_side(work: Callable[[Job, str], None], jobs: Sequence[Job], devices: Sequence[str]) -> Iterator[Job]:
    """Call `work(job, device)` for every job, as many at a time as there are devices; yield the jobs as they end.

    `work` and the jobs are pickled. What `work` raises is raised here when the others under way have ended; jobs that
    have not begun are left out then.
    """
    context = get_context("spawn")  # a fork would share the parent's CUDA context, which no child may use
    free: Queue[str] = context.Queue()
    for device in devices:
        free.put(device)
    pool = ProcessPoolExecutor(len(devices), mp_context=context, initializer=_take_device, initargs=(free,))
    try:
        running = {pool.submit(_on_own_device, work, job): job for job in jobs}
        for done in as_completed(running):
            done.result()
            yield running[done]
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _take_device(free: "Queue[str]") -> None:
    end_with_parent()  # else a killed study would go on, and keep its device
    _DEVICE.append(free.get())


def _on_own_device(work: Callable[[Job, str], None], job: Job) -> None:
    work(job, _DEVICE[0])
