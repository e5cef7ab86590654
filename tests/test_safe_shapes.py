"""Strided bf16 convolutions of planned networks against fp32: some CPU libraries compute some shapes silently wrong."""

from pathlib import Path

import pytest

from autoseg.planning.cost import sizes_per_stage
from autoseg.planning.topology import strided_to_one
from autoseg.records import Plan
from autoseg.store import load

torch = pytest.importorskip("torch")

PLANS = Path(__file__).parent.parent / "plans"
CHANNELS = 32
"""The fault depends on sizes and strides, not on channels; few keep the test short."""
MOST_VOXELS = 20_000


def strided_convolutions() -> list[tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]:
    """(input size, kernel, stride) of every strided convolution in the reference plans, without repetition."""
    found = set()
    for file in sorted(PLANS.glob("*/plan-*.json")):
        for configuration in load(file, Plan).configurations:
            spec = configuration.network
            sizes = sizes_per_stage(spec, configuration.patch_voxels)
            for stage in range(1, len(sizes)):
                found.add((sizes[stage - 1], spec.kernels[stage], spec.strides[stage]))
    return sorted(found)


def test_no_planned_convolution_strides_the_last_axis_down_to_one() -> None:
    files = sorted(PLANS.glob("*/plan-*.json"))
    assert files
    for file in files:
        for configuration in load(file, Plan).configurations:
            assert strided_to_one(configuration.network.strides, configuration.patch_voxels) == (), file


def test_planned_strided_convolutions_agree_in_bf16_and_fp32() -> None:
    """Only the deep stages: the fault is one of small sizes, and large ones take long."""
    checked = 0
    generator = torch.Generator().manual_seed(0)
    for size, kernel, stride in strided_convolutions():
        if torch.Size(size).numel() > MOST_VOXELS:
            continue
        convolve = {2: torch.nn.functional.conv2d, 3: torch.nn.functional.conv3d}[len(size)]
        image = torch.randn(1, CHANNELS, *size, generator=generator)
        weight = torch.randn(CHANNELS, CHANNELS, *kernel, generator=generator) / CHANNELS
        padding = tuple(k // 2 for k in kernel)
        exact = convolve(image, weight, stride=stride, padding=padding)
        half = convolve(image.bfloat16(), weight.bfloat16(), stride=stride, padding=padding).float()
        error = ((exact - half).abs().max() / exact.abs().max()).item()
        assert error < 0.05, (
            f"{size}, kernel {kernel}, stride {stride}: bf16 is off by {error:.2g} of the largest value"
        )
        checked += 1
    assert checked >= 10
