"""network/timing.py: the parts of a step add up to it, and a step is measured against matrix products."""

import math
import time

import pytest
import torch

from autoseg.network.device import Device
from autoseg.network.timing import MATMUL_SIZE, Capacity, Stopwatch, matmul_rate

CPU = Device(torch.device("cpu"), "fp32")


def test_laps_belong_to_their_part_and_a_start_drops_what_was_before() -> None:
    watch = Stopwatch(CPU)
    time.sleep(0.05)
    start = time.perf_counter()
    watch.start()
    time.sleep(0.01)
    watch.lap("forward")
    watch.lap("backward")
    time.sleep(0.01)
    watch.lap("forward")
    passed = time.perf_counter() - start
    found = watch.read()
    assert found.keys() == {"forward", "backward"}
    assert 0.02 <= found["forward"] <= passed
    assert sum(found.values()) <= passed
    assert watch.read() == {}


def test_the_share_of_the_peak_is_what_was_computed_by_what_could_have_been() -> None:
    capacity = Capacity(operations_per_sample=3e9, operations_per_second=1e12)
    assert capacity.share(samples=10, seconds=0.1) == pytest.approx(0.3)
    assert math.isnan(Capacity(3e9).share(10, 0.1))
    assert capacity.seconds(samples=1000, steps=500) == pytest.approx(30.0)
    assert capacity.seconds(samples=8000, steps=4000) == pytest.approx(240.0)
    assert capacity.seconds(samples=4000, steps=16000) == pytest.approx(240.0), "launching takes longer than computing"
    assert Capacity(3e9).seconds(1000, 100) is None


def test_matrix_products_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MATMUL_SIZE, "cpu", 64)
    assert matmul_rate(CPU) > 2 * 64**3 / 10
    assert matmul_rate(Device(torch.device("meta"), "fp32")) == 0.0
