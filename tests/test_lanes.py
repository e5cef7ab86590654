"""lanes.py: stages side by side, in bounded queues, that end soon whoever fails or dies."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from autoseg import lanes
from autoseg.errors import UserError
from autoseg.lanes import Failure, Stage, side_by_side

STAGES = ("reading", "computing", "writing")


def add(number: int, item: int, before: int | None) -> int:
    return (before or item) + number


def fail(item: int, before: int | None) -> int:
    if item == 3:
        raise ValueError("three")
    return item


def complain(item: int, before: int | None) -> int:
    if item == 3:
        raise UserError("This file is cut.", fix="Copy it again.")
    return item


def fill_the_disk(item: int, before: int | None) -> int:
    if item == 3:
        raise OSError(28, "No space left on device")
    return item


def die(item: int, before: int | None) -> int:
    if item == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def leave(item: int, before: int | None) -> int:
    if item == 3:
        os._exit(7)
    return item


def sleep_at_three(item: int, before: int | None) -> int:
    if item == 3:
        time.sleep(60)
    return item


class Unpicklable(Exception):
    def __init__(self, lock: object) -> None:
        super().__init__(lock)


def raise_unpicklable(item: int, before: int | None) -> int:
    raise Unpicklable(threading.Lock())


def three_stages(function: Callable[[Any, Any], Any], at: str, in_process: bool) -> tuple[Stage, ...]:
    """Three stages, of which the one called `at` runs `function`; the middle one is always a thread."""
    return tuple(
        Stage(doing, (function if doing == at else partial(add, 0),), in_process and doing != "computing")
        for doing in STAGES
    )


def keep(done: list[int], flow: Iterator[Any]) -> None:
    """Remember what came out, also where the flow then fails."""
    for item, _ in flow:
        done.append(item)


def named(item: int) -> str:
    return f"case_{item}"


@pytest.mark.parametrize("in_process", [False, True])
def test_every_item_goes_through_all_stages(in_process: bool) -> None:
    stages = tuple(Stage(doing, (partial(add, 10**n),) * 2, in_process) for n, doing in enumerate(STAGES, 1))
    assert dict(side_by_side(range(1, 9), stages, named)) == {k: k + 1110 for k in range(1, 9)}
    assert list(side_by_side([], stages, named)) == []


def test_what_waits_is_bounded_and_stages_overlap() -> None:
    begun, held = [], threading.Event()

    def read(item: int, _: object) -> int:
        begun.append(item)
        return item

    def compute(item: int, _: object) -> int:
        held.wait(10)
        return item

    flow = side_by_side(range(20), (Stage("reading", (read,)), Stage("computing", (compute,))), named)
    consumer = threading.Thread(target=lambda: [None for _ in flow])
    consumer.start()
    time.sleep(1.0)
    under_way = list(begun)
    held.set()
    consumer.join(30)
    assert under_way == [0, 1]  # one in the network, one waiting for it
    assert begun == list(range(20))


@pytest.mark.parametrize("at", STAGES)
@pytest.mark.parametrize("in_process", [False, True])
def test_a_failure_in_any_stage_ends_the_work_with_the_name_and_the_traceback(at: str, in_process: bool) -> None:
    done: list[int] = []
    began = time.monotonic()
    with pytest.raises(ValueError, match="three") as caught:
        keep(done, side_by_side(range(8), three_stages(fail, at, in_process), named))
    assert time.monotonic() - began < 10
    notes = "".join(caught.value.__notes__)
    assert f"while {at} case_3" in notes
    if in_process and at != "computing":
        assert 'raise ValueError("three")' in notes
    assert {0, 1} <= set(done)
    assert 3 not in done


@pytest.mark.parametrize("at", STAGES)
@pytest.mark.parametrize("function", [fail, complain, fill_the_disk])
def test_failed_items_can_be_skipped(at: str, function: Callable[[int, int | None], int]) -> None:
    outcomes = list(side_by_side(range(8), three_stages(function, at, False), named, stop_at_failure=False))
    [failure] = [each for each in outcomes if isinstance(each, Failure)]
    assert (failure.item, failure.doing) == (3, at)
    assert {each[0] for each in outcomes if not isinstance(each, Failure)} == {0, 1, 2, 4, 5, 6, 7}


def test_a_sentence_for_users_gets_the_name_of_the_case() -> None:
    with pytest.raises(UserError) as caught:
        list(side_by_side(range(8), three_stages(complain, "reading", True), named))
    assert (caught.value.what, caught.value.fix) == ("case_3: This file is cut.", "Copy it again.")


@pytest.mark.parametrize("at", ["reading", "writing"])
def test_a_killed_process_ends_the_work_and_the_likely_cause_is_said(at: str) -> None:
    done: list[int] = []
    began = time.monotonic()
    with pytest.raises(UserError, match=rf"case_3: the process {at} it was killed \(SIGKILL\). Likely out of memory"):
        keep(done, side_by_side(range(8), three_stages(die, at, True), named))
    assert time.monotonic() - began < 10
    assert {0, 1} <= set(done)


@pytest.mark.parametrize(("function", "said"), [(die, "SIGKILL"), (leave, "ended with exit code 7")])
def test_a_dead_process_is_replaced_where_failures_are_skipped(
    function: Callable[[int, int | None], int], said: str
) -> None:
    outcomes = list(side_by_side(range(6), three_stages(function, "reading", True), named, stop_at_failure=False))
    [failure] = [each for each in outcomes if isinstance(each, Failure)]
    assert said in str(failure.error)
    assert len(outcomes) == 6


def test_a_silent_worker_is_given_up() -> None:
    stages = (Stage("reading", (sleep_at_three,), in_process=True, stall_seconds=2.0),)
    began = time.monotonic()
    outcomes = list(side_by_side(range(5), stages, named, stop_at_failure=False))
    assert time.monotonic() - began < 20
    [failure] = [each for each in outcomes if isinstance(each, Failure)]
    assert "case_3: reading made no progress for 2 s" in str(failure.error)


def test_a_thread_that_advances_may_take_its_time() -> None:
    def compute(item: int, _: object) -> int:
        for _ in range(6):
            time.sleep(0.25)
            if item != 3:
                lanes.advanced()
        return item

    lanes.advanced()  # outside of any worker
    stages = (Stage("predicting", (compute,), stall_seconds=0.8),)
    outcomes = list(side_by_side(range(2, 4), stages, named, stop_at_failure=False))
    [failure] = [each for each in outcomes if isinstance(each, Failure)]
    assert "case_3: predicting made no progress" in str(failure.error)
    assert outcomes[0] == (2, 2)


def test_an_exception_that_cannot_be_sent_is_told_in_words() -> None:
    with pytest.raises(RuntimeError, match="Unpicklable") as caught:
        list(side_by_side([1], (Stage("reading", (raise_unpicklable,), in_process=True),), named))
    assert "raise Unpicklable" in "".join(caught.value.__notes__)


def test_memory_that_runs_out_is_a_sentence() -> None:
    error = lanes.named_error(MemoryError(), "reading", "case_3")
    assert isinstance(error, UserError)
    assert "case_3: memory ran out while reading" in str(error)


def test_no_process_stays_behind(tmp_path: Path) -> None:
    import multiprocessing

    flow = side_by_side(range(8), three_stages(fail, "writing", True), named)
    with pytest.raises(ValueError, match="three"):
        list(flow)
    assert not multiprocessing.active_children()


def test_threads_are_told_to_give_up_and_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interpreter that ends while a thread is inside of torch is aborted."""
    begun, given_up, ended, deaf = (threading.Event() for _ in range(4))

    def compute(item: int, _: object) -> None:
        begun.set()
        given_up.wait(20)
        time.sleep(0.3)
        ended.set()

    def ignore(item: int, _: object) -> None:
        begun.set()
        deaf.wait(30)

    def fail_second(item: int, _: object) -> int:
        if item:
            begun.wait(20)
            raise ValueError("two")
        return item

    before, behind = Stage("reading", (fail_second,)), Stage("writing", (lambda item, _: item,))
    with pytest.raises(ValueError, match="two"):
        list(side_by_side(range(2), (before, Stage("predicting", (compute,)), behind), named, give_up=given_up.set))
    assert ended.is_set()
    assert not lanes.left_behind()
    monkeypatch.setattr(lanes, "LEAVE_SECONDS", 0.2)
    begun.clear()
    with pytest.raises(ValueError, match="two"):
        list(side_by_side(range(2), (before, Stage("predicting", (ignore,)), behind), named))
    assert lanes.left_behind()
    deaf.set()
