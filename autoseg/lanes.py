"""Stages of work side by side: reading, computing and writing of successive items.

Every stage has workers of its own, processes or threads, and takes an item only when the stage behind it has room, so
that a bounded number of items is in memory. Nothing waits without a limit: whoever dies, fails or falls silent ends the
work at once, or only its own item, with the item's name.
"""

import multiprocessing
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.connection import Connection
from typing import Any, Generic, TypeVar

from autoseg.errors import UserError
from autoseg.parallel import begin_worker, worker_context

Item = TypeVar("Item")

POLL_SECONDS = 0.5
GRACE_SECONDS = 4.0
"""How long workers of the last stage may still finish what they have when something else failed."""
LEAVE_SECONDS = 3.0
"""How long threads that are told to give up are waited for."""
THREAD_NAME = "lane"
STALL_SECONDS = 3600.0
"""A worker that has not answered for so long is given up."""

_here = threading.local()
"""`worker` of the thread that asks."""


@dataclass(frozen=True)
class Stage:
    """One kind of work.

    Args:
        doing: "reading"; for messages.
        functions: one worker each; (item, result of the stage before) -> result. Those of processes must be picklable
            and importable without slow modules.
        in_process: whether the workers are processes; a process that is killed takes only its own item with it.
        waiting: how many items may wait in front of this stage.
        stall_seconds: a worker that needs longer for one item is given up; a thread that calls `advanced` on the way,
            only when it does not for so long.
    """

    doing: str
    functions: tuple[Callable[[Any, Any], Any], ...]
    in_process: bool = False
    waiting: int = 1
    stall_seconds: float = STALL_SECONDS


@dataclass(frozen=True)
class Failure(Generic[Item]):
    """What kept one item from being done."""

    item: Item
    doing: str
    error: Exception


@dataclass
class _Flow(Generic[Item]):
    """Who works on what: `queues[s]` are items with their results waiting for stage s."""

    stages: Sequence[Stage]
    name: Callable[[Item], str]
    workers: list[list["_Process | _Thread"]] = field(default_factory=list)
    queues: list[deque[tuple[Item, Any]]] = field(default_factory=list)
    busy: dict["_Process | _Thread", tuple[int, Item, float]] = field(default_factory=dict)


def side_by_side(
    items: Sequence[Item],
    stages: Sequence[Stage],
    name: Callable[[Item], str],
    stop_at_failure: bool = True,
    preload: Sequence[str] = (),
    give_up: Callable[[], None] = lambda: None,
) -> Iterator[tuple[Item, Any] | Failure[Item]]:
    """Yield (item, result of the last stage) as items come out, or the `Failure` of those that do not.

    With `stop_at_failure` the first failure raises its error, named and with its own traceback, after what is being
    finished in the last stage was yielded; all workers are gone then, but for threads that do not heed `give_up`, which
    is called before workers are let go early (see `left_behind`). `preload` names modules that worker processes need.
    """
    flow = _Flow(stages, name)
    flow.queues = [deque() for _ in stages]
    flow.queues[0].extend((item, None) for item in items)
    ended = False
    try:
        flow.workers = [[_new_worker(stage, function, preload) for function in stage.functions] for stage in stages]
        while True:
            _hand_out(flow)
            if not flow.busy:
                break
            for outcome in _collect(flow):
                if isinstance(outcome, Failure) and stop_at_failure:
                    yield from _let_last_stage_finish(flow)
                    raise outcome.error
                yield outcome
        ended = True
    finally:
        if not ended:
            give_up()
        until = time.monotonic() + LEAVE_SECONDS
        for worker in (each for group in flow.workers for each in group):
            worker.end(ended, until)


def left_behind() -> bool:
    """Whether threads of an ended work are still in the middle of something.

    An interpreter that ends meanwhile would be aborted: Python stops such a thread inside of torch, which C++ forbids.
    """
    return any(thread.name == THREAD_NAME and thread.is_alive() for thread in threading.enumerate())


def advanced() -> None:
    """Say that the item of this worker thread advances, however long it takes; elsewhere this does nothing."""
    if (worker := getattr(_here, "worker", None)) is not None:
        worker.sign = time.monotonic()


def named_error(error: Exception, doing: str, name: str, trace: str = "") -> Exception:
    """The same error, saying which item it is about; sentences for users get the name, others a note."""
    if isinstance(error, MemoryError):
        return UserError(f"{name}: memory ran out while {doing}.", fix="Close other programs, or use --speed fast.")
    if isinstance(error, UserError):
        return error if name in error.what else UserError(f"{name}: {error.what}", error.fix)
    error.add_note(f"while {doing} {name}" + (f"; in the worker process:\n{trace}" if trace else ""))
    return error


def _hand_out(flow: _Flow) -> None:
    """Give waiting items to idle workers, the last stage first, where the next stage still has room."""
    for number in reversed(range(len(flow.stages))):
        for place, worker in enumerate(flow.workers[number]):
            if worker in flow.busy or not flow.queues[number]:
                continue
            if not _has_room(flow, number):
                continue
            if not worker.alive():  # killed while it had nothing to do: nothing is lost
                worker = flow.workers[number][place] = worker.again()
            item, result = flow.queues[number].popleft()
            flow.busy[worker] = (number, item, time.monotonic())
            worker.begin(item, result)


def _has_room(flow: _Flow, number: int) -> bool:
    """Whether what this stage would make may wait for the next one; workers beyond the first add to what may wait."""
    if number + 1 == len(flow.stages):
        return True
    coming = len(flow.queues[number + 1]) + sum(1 for stage, _, _ in flow.busy.values() if stage == number)
    return coming < flow.stages[number + 1].waiting + len(flow.workers[number]) - 1


def _collect(flow: _Flow) -> Iterator[tuple[Any, Any] | Failure]:
    """Wait a moment for answers; pass results on to the next stage, yield those of the last one and failures."""
    watched = [handle for worker in flow.busy for handle in worker.handles()]
    connection.wait(watched, POLL_SECONDS)
    for worker in list(flow.busy):
        number, item, since = flow.busy[worker]
        since = max(since, worker.sign)
        stage, name = flow.stages[number], flow.name(item)
        answer = worker.answer()
        if answer is None and worker.alive():
            if time.monotonic() - since < stage.stall_seconds:
                continue
            stalled = f"{name}: {stage.doing} made no progress for {stage.stall_seconds:.0f} s."
            answer = (False, UserError(stalled, fix="Does the device still answer?"), "")
        del flow.busy[worker]
        if answer is None:
            answer = (False, worker.why_dead(stage.doing, name), "")
        good, result, trace = answer
        if not good or not worker.alive():
            place = flow.workers[number].index(worker)
            if not worker.alive() or time.monotonic() - since >= stage.stall_seconds:
                worker.end(False, time.monotonic())
                flow.workers[number][place] = worker.again()
        if not good:
            yield Failure(item, stage.doing, named_error(result, stage.doing, name, trace))
        elif number + 1 < len(flow.stages):
            flow.queues[number + 1].append((item, result))
        else:
            yield item, result


def _let_last_stage_finish(flow: _Flow) -> Iterator[tuple[Any, Any]]:
    until = time.monotonic() + GRACE_SECONDS
    last = len(flow.stages) - 1
    while time.monotonic() < until and any(number == last for number, _, _ in flow.busy.values()):
        for outcome in _collect(flow):
            if not isinstance(outcome, Failure):
                yield outcome


def _new_worker(stage: Stage, function: Callable[[Any, Any], Any], preload: Sequence[str]) -> "_Process | _Thread":
    return _Process(function, preload) if stage.in_process else _Thread(function)


class _Process:
    """A worker process."""

    sign = 0.0
    """When it last said that it advances: only threads do."""

    def __init__(self, function: Callable[[Any, Any], Any], preload: Sequence[str]) -> None:
        self.function, self.preload = function, preload
        context = worker_context(function, preload)
        self.line, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, function), daemon=True)  # type: ignore[attr-defined]
        self.process.start()
        theirs.close()

    def again(self) -> "_Process":
        """Another one like this."""
        return _Process(self.function, self.preload)

    def alive(self) -> bool:
        """Whether the process exists."""
        return bool(self.process.is_alive())

    def handles(self) -> list[Any]:
        """What becomes ready when there is an answer, or when there will be none."""
        return [self.line, self.process.sentinel]

    def begin(self, item: object, result: object) -> None:
        """Send the work; a process that is gone is noticed when its answer is asked for."""
        with suppress(BrokenPipeError, ConnectionResetError):
            self.line.send((item, result))

    def answer(self) -> tuple[bool, Any, str] | None:
        """(good, result or error, traceback), or None."""
        try:
            return self.line.recv() if self.line.poll() else None
        except (EOFError, OSError):
            self.process.join(1.0)
            return None

    def why_dead(self, doing: str, name: str) -> Exception:
        """What its exit code says."""
        self.process.join(1.0)
        code = self.process.exitcode
        if code is not None and code < 0:
            killed = signal.Signals(-code).name
            likely = " Likely out of memory." if killed == "SIGKILL" else ""
            return UserError(
                f"{name}: the process {doing} it was killed ({killed}).{likely}",
                fix="Run the same command again with --resume and fewer --workers.",
            )
        return UserError(f"{name}: the process {doing} it ended with exit code {code}.")

    def end(self, kindly: bool, until: float) -> None:
        """Let the process go, and kill it where it does not."""
        self.line.close()
        if not kindly:
            self.process.kill()
        self.process.join(2.0)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(2.0)


class _Thread:
    """A worker thread of this process, for work that must share its memory. It cannot be killed, only left behind."""

    sign = 0.0
    """When it last said that it advances."""

    def __init__(self, function: Callable[[Any, Any], Any]) -> None:
        self.function = function
        self.line, self.theirs = multiprocessing.Pipe()
        self.work: tuple[Any, Any] | None = None
        self.outcome: tuple[bool, Any, str] | None = None
        self.wake = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._run, name=THREAD_NAME, daemon=True)
        self.thread.start()

    def again(self) -> "_Thread":
        """Another one like this."""
        return _Thread(self.function)

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self.thread.is_alive()

    def handles(self) -> list[Any]:
        """What becomes ready when there is an answer."""
        return [self.line]

    def begin(self, item: object, result: object) -> None:
        """Pass the work on."""
        self.work = (item, result)
        self.wake.release()

    def answer(self) -> tuple[bool, Any, str] | None:
        """(good, result or error, ""), or None."""
        if not self.line.poll():
            return None
        self.line.recv_bytes()
        found, self.outcome = self.outcome, None
        return found

    def why_dead(self, doing: str, name: str) -> Exception:
        """A thread answers whatever happens, unless the interpreter is ending."""
        return UserError(f"{name}: the thread {doing} it ended without an answer.")

    def end(self, kindly: bool, until: float) -> None:
        """Let the thread go; where it is in the middle of something, it is waited for `until` then."""
        self.work = None
        self.wake.release()
        self.thread.join(max(0.0, until - time.monotonic()))

    def _run(self) -> None:
        _here.worker = self
        while True:
            self.wake.acquire()
            if self.work is None:
                return
            item, result = self.work
            self.work = None
            try:
                self.outcome = (True, self.function(item, result), "")
            except Exception as error:  # noqa: BLE001  handed to whoever waits for the answer
                self.outcome = (False, error, "")
            del item, result
            self.theirs.send_bytes(b"!")


def _serve(line: Connection, function: Callable[[Any, Any], Any]) -> None:
    """What a worker process does: one item after the other until the other end closes."""
    begin_worker()
    while True:
        try:
            item, result = line.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[bool, Any, str] = (True, function(item, result), "")
        except Exception as error:  # noqa: BLE001  handed to whoever waits for the answer
            answer = (False, error, traceback.format_exc())
        try:
            line.send(answer)
        except Exception as error:  # noqa: BLE001  such as an exception that cannot be pickled
            reason = answer[1] if not answer[0] else error
            line.send((False, RuntimeError(f"{type(reason).__name__}: {reason}"), answer[2] or traceback.format_exc()))
        del item, result, answer

