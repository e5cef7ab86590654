"""network/device.py: which device and precision are chosen, and what is refused before anything is computed."""

import platform
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from autoseg.errors import UserError
from autoseg.network import device as module
from autoseg.network import unet
from autoseg.network.device import (
    Device,
    channels_last_format,
    in_one_piece,
    keep_freed_memory,
    lay_out,
    layout,
    native_precision,
    pick,
    sent_together,
    set_up,
    slow_convolutions,
)
from autoseg.records import NetworkSpec

CPU = Device(torch.device("cpu"), "fp32")
Cards = Callable[[int, tuple[int, int]], None]


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Cards:
    """Makes torch see so many CUDA devices of that compute capability."""

    def pretend(count: int, capability: tuple[int, int] = (9, 0)) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)

    return pretend


def pretend_cpu(monkeypatch: pytest.MonkeyPatch, flags: str | None) -> None:
    """Makes /proc/cpuinfo hold these flags, or be absent."""
    info = SimpleNamespace(is_file=lambda: flags is not None, read_text=lambda: f"flags\t\t: fpu sse2 {flags}\n")
    monkeypatch.setattr(module, "Path", lambda path: info if path == "/proc/cpuinfo" else Path(path))


def a_network(channels: int = 1) -> nn.Module:
    spec = NetworkSpec(
        dimension=2, in_channels=channels, classes=2, features=(4, 8), strides=((1, 1), (2, 2)), kernels=((3, 3),) * 2,
        encoder_blocks=(1, 1), decoder_blocks=(1,), norm="batch",
    )  # fmt: skip
    return unet.build(spec)


# ------------------------------------------------------------------------------------------------ choosing


def test_without_a_wish_the_first_card_is_taken_and_else_the_cpu(cards: Cards) -> None:
    cards(2, (9, 0))
    assert pick().name == "cuda:0"
    assert pick().is_cuda
    cards(0, (0, 0))
    assert pick().name == "cpu"
    assert not pick().is_cuda


@pytest.mark.parametrize(("asked", "name"), [("cuda", "cuda:0"), ("cuda:1", "cuda:1"), ("cpu", "cpu")])
def test_the_device_asked_for_is_taken(cards: Cards, asked: str, name: str) -> None:
    cards(2, (8, 0))
    assert pick(asked).name == name


@pytest.mark.parametrize(
    ("asked", "says"),
    [("cuda:2", "only 2 CUDA devices"), ("gpu", "no such device"), ("", "no such device"), ("cuda:x", "no such device"),
     ("meta", "no such device"), ("xpu", "no such device")],
)  # fmt: skip
def test_a_device_that_is_not_there_is_refused_by_name(cards: Cards, asked: str, says: str) -> None:
    cards(2, (8, 0))
    with pytest.raises(UserError, match=f"--device {asked}: .*{says}"):
        pick(asked)


def test_a_card_is_refused_where_torch_sees_none(cards: Cards) -> None:
    cards(0, (0, 0))
    with pytest.raises(UserError, match=r"--device cuda: .*no CUDA device.*--device cpu"):
        pick("cuda")


@pytest.mark.parametrize("there", [True, False])
def test_mps_is_taken_only_where_it_is(monkeypatch: pytest.MonkeyPatch, there: bool) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
    if there:
        assert pick("mps") == Device(torch.device("mps"), "fp32")
    else:
        with pytest.raises(UserError, match="--device mps"):
            pick("mps")


# ------------------------------------------------------------------------------------------------ precision


@pytest.mark.parametrize(
    ("capability", "precision"), [((7, 0), "fp16"), ((7, 5), "fp16"), ((8, 0), "bf16"), ((12, 0), "bf16")]
)  # fmt: skip
def test_cards_compute_in_bf16_where_they_can(cards: Cards, capability: tuple[int, int], precision: str) -> None:
    cards(1, capability)
    assert pick("cuda").precision == precision


@pytest.mark.parametrize(
    ("flags", "precision"),
    [("avx2 avx512f", "fp32"), ("avx512_bf16", "bf16"), ("amx_tile amx_bf16", "bf16"), ("", "fp32"), (None, "fp32")],
)
def test_cpus_compute_in_bf16_only_where_they_multiply_it(
    monkeypatch: pytest.MonkeyPatch, flags: str | None, precision: str
) -> None:
    pretend_cpu(monkeypatch, flags)
    assert native_precision(torch.device("cpu")) == precision
    assert pick("cpu").precision == precision


def test_the_precision_asked_for_is_taken(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    cards(1, (9, 0))
    monkeypatch.setattr(module, "cpu_convolves_bf16", lambda: True)
    assert [pick("cuda", precision).precision for precision in ("bf16", "fp16", "fp32")] == ["bf16", "fp16", "fp32"]
    assert pick("cpu", "bf16").precision == "bf16"


@pytest.mark.parametrize(("precision", "says"), [("fp8", "fp8 is not one of bf16, fp16, fp32"), ("fp16", "Use bf16")])
def test_a_precision_that_cpus_do_not_compute_is_refused(precision: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        pick("cpu", precision)


def test_bf16_is_refused_on_a_cpu_without_convolutions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for has in (True, False):
        monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda has=has: has, raising=False)
        if has:
            assert pick("cpu", "bf16").precision == "bf16"
            continue
        with pytest.raises(UserError, match="bf16 is computed by a scalar reference on this CPU"):
            pick("cpu", "bf16")


@pytest.mark.parametrize(("precision", "dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_autocast_multiplies_in_the_precision_and_ends_with_the_block(precision: str, dtype: torch.dtype) -> None:
    ones = torch.ones(4, 4)
    with Device(torch.device("cpu"), precision).autocast():
        assert (ones @ ones).dtype == dtype
    assert (ones @ ones).dtype == torch.float32


# ------------------------------------------------------------------------------------------------ the process


def test_keeping_freed_memory_says_whether_it_could() -> None:
    found = keep_freed_memory()
    assert isinstance(found, bool)
    if sys.platform == "linux" and platform.libc_ver()[0] == "glibc":
        assert found


def test_keeping_freed_memory_needs_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.ctypes, "CDLL", lambda name: SimpleNamespace())
    assert keep_freed_memory() is False
    monkeypatch.setattr(module.sys, "platform", "win32")
    assert keep_freed_memory() is False


def test_a_process_on_the_cpu_uses_the_allowed_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    monkeypatch.setattr(torch, "set_flush_denormal", lambda wanted: wanted)
    monkeypatch.setattr(module, "own_cores", lambda: 3)
    set_up(CPU)
    assert threads == [3]


def test_only_eager_volumes_on_gpus_keep_channels_outside() -> None:
    card = Device(torch.device("cuda", 0), "bf16")
    assert layout(3, card) == torch.contiguous_format
    assert layout(3, card, compiled=True) == layout(3, CPU) == torch.channels_last_3d
    assert layout(2, card) == layout(2, CPU, compiled=True) == torch.channels_last


@pytest.mark.parametrize("dimension", [2, 3])
def test_weights_are_laid_out_with_channels_innermost(dimension: int) -> None:
    convolution = (nn.Conv2d if dimension == 2 else nn.Conv3d)(4, 8, 3)
    before = convolution.weight.detach().clone()
    laid_out = lay_out(convolution, dimension, CPU)
    assert laid_out.weight.is_contiguous(memory_format=channels_last_format(dimension))  # type: ignore[operator]
    assert torch.equal(laid_out.weight, before)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("version", "cudnn", "device", "precision", "warns"),
    [
        ("2.9.1+cu128", 91002, "cuda", "bf16", True),
        ("2.9.0", None, "cuda", "fp16", True),
        ("2.9.1", 91501, "cuda", "bf16", False),
        ("2.9.1", 91002, "cuda", "fp32", False),
        ("2.9.1", 91002, "cpu", "bf16", False),
        ("2.10.0", 91002, "cuda", "bf16", False),
    ],
)
def test_a_torch_without_cudnn_for_half_precision_is_named(
    monkeypatch: pytest.MonkeyPatch, version: str, cudnn: int | None, device: str, precision: str, warns: bool
) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: cudnn)
    found = slow_convolutions(Device(torch.device(device), precision))
    assert (found is not None) == warns
    assert found is None or version in found


def test_small_arrays_travel_in_one_piece_and_arrive_as_they_were() -> None:
    rng = np.random.default_rng(0)
    sent = {
        "rows": np.array([3, 1, 2]),
        "values": rng.normal(size=(3, 2, 5)).astype(np.float32),
        "turned": rng.normal(size=(4, 3)).astype(np.float32).T,
        "none": np.zeros((0, 2), np.float32),
        "one": np.array([7.0], np.float32),
    }
    for found in (in_one_piece(sent, torch.device("cpu")), sent_together(sent, torch.device("cpu"))):
        assert list(found) == list(sent)
        for name, array in sent.items():
            assert found[name].dtype == torch.from_numpy(array).dtype
            np.testing.assert_array_equal(found[name].numpy(), array)
    pieces = in_one_piece(sent, torch.device("cpu"))
    assert len({each.untyped_storage().data_ptr() for each in pieces.values()}) == 1
