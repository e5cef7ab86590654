"""How much of a GPU cached cases may take."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planned import a_configuration

from autoseg.network.device import Device
from autoseg.records import Memory
from autoseg.steps import sources

GIB = 2**30


@pytest.mark.parametrize(("needed", "expected"), [(2 * GIB, 2 * GIB), (7 * GIB, GIB), (9 * GIB, 0)])
def test_cached_cases_leave_a_card_what_the_planned_step_needs(
    monkeypatch: pytest.MonkeyPatch, needed: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (8 * GIB, 8 * GIB))
    work: Any = SimpleNamespace(device=Device(torch.device("cuda", 0), "bf16"))
    planned = a_configuration(memory=Memory(source="simulated", peak_bytes=needed))
    assert sources._device_bytes(work, planned) == expected
