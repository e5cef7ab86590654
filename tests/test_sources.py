"""How much of a GPU cached cases may take."""

from math import prod
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from planned import a_configuration

from autoseg.network.augment import enlarged_patch
from autoseg.network.device import Device
from autoseg.network.distributed import Team
from autoseg.records import Memory
from autoseg.steps.training import sources

GIB = 2**30


@pytest.mark.parametrize(("needed", "expected"), [(2 * GIB, 2 * GIB), (7 * GIB, 13 * GIB // 16), (9 * GIB, 0)])
def test_cached_cases_leave_a_card_what_the_planned_step_needs(
    monkeypatch: pytest.MonkeyPatch, needed: int, expected: int
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda card: (8 * GIB, 8 * GIB))
    monkeypatch.setattr(sources, "_batch_bytes", lambda work, planned: GIB // 16)
    work: Any = SimpleNamespace(device=Device(torch.device("cuda", 0), "bf16"))
    planned = a_configuration(memory=Memory(source="simulated", peak_bytes=needed))
    assert sources._device_bytes(work, planned) == expected


def test_the_batches_that_are_read_ahead_are_as_large_as_what_is_read() -> None:
    planned = a_configuration(batch_size=3)
    work: Any = SimpleNamespace(team=Team(1, 2))
    voxels = prod(enlarged_patch(planned.train.augment, planned.patch_voxels))
    assert sources._batch_bytes(work, planned) == voxels * (4 * planned.network.in_channels + 2)
