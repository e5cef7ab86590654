"""Which device, which precision, and how the process is set up for it."""

import ctypes
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call

from autoseg.errors import UserError
from autoseg.parallel import make_cublas_repeatable, own_cores

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True, slots=True)
class Device:
    """Where to compute and in which precision; `precision` is a key of DTYPES."""

    torch_device: torch.device
    precision: str

    @property
    def name(self) -> str:
        return str(self.torch_device)

    @property
    def is_cuda(self) -> bool:
        return self.torch_device.type == "cuda"

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """Mixed precision for the forward pass and the loss; nothing at all in fp32."""
        with torch.autocast(self.torch_device.type, DTYPES[self.precision], enabled=self.precision != "fp32"):
            yield


def pick(device: str | None = None, precision: str | None = None) -> Device:
    """Choose the device named by the user, else the first GPU, else the CPU; and its native precision.

    Raises UserError for a device that is not there or a precision it cannot compute.
    """
    if device is None:
        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"--device {device}: no such device.", fix="Use cpu, cuda, cuda:1 or mps.") from error
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {device}: no such device.", fix="Use cpu, cuda, cuda:1 or mps.")
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"--device {device}: torch sees no MPS device here.", fix="Use --device cpu.")
    if chosen.type == "cuda":
        if not torch.cuda.is_available():
            raise UserError(f"--device {device}: torch sees no CUDA device here.", fix="Use --device cpu.")
        chosen = torch.device("cuda", chosen.index or 0)
        if chosen.index >= torch.cuda.device_count():
            raise UserError(f"--device {device}: there are only {torch.cuda.device_count()} CUDA devices.")
    if precision is not None and precision not in DTYPES:
        raise UserError(f"--precision {precision} is not one of {', '.join(DTYPES)}.")
    if precision == "fp16" and chosen.type == "cpu":
        raise UserError("--precision fp16 is computed by a scalar reference on CPUs.", fix="Use bf16 or fp32.")
    if precision == "bf16" and chosen.type == "cpu" and not cpu_convolves_bf16():
        raise UserError(
            "--precision bf16 is computed by a scalar reference on this CPU, which has no AVX-512.", fix="Use fp32."
        )
    return Device(chosen, precision or native_precision(chosen))


def native_precision(device: torch.device) -> str:
    """bf16 where the hardware multiplies it, fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device)[0] >= 8 else "fp16"
    if device.type == "cpu":
        return "bf16" if _cpu_multiplies_bf16() else "fp32"
    return "fp32"


def _cpu_multiplies_bf16() -> bool:
    info = Path("/proc/cpuinfo")
    flags = info.read_text() if info.is_file() else ""
    return "amx_bf16" in flags or "avx512_bf16" in flags


def cpu_convolves_bf16() -> bool:
    """Whether oneDNN has convolutions in bf16 for this CPU; without them torch's own take over ten times as long."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return supported is not None and bool(supported())


def slow_convolutions(device: Device) -> str | None:
    """What to say of a torch that computes 3D convolutions in half precision without cuDNN; None where all is well.

    torch 2.9 leaves cuDNN out before 9.15, whose results were wrong (pytorch #163539, #166122).
    """
    if not device.is_cuda or device.precision == "fp32" or not str(torch.__version__).startswith("2.9."):
        return None
    if (torch.backends.cudnn.version() or 0) >= REPAIRED_CUDNN:
        return None
    return (
        f"torch {torch.__version__} computes 3D convolutions in {device.precision} without cuDNN: about four times "
        "slower, and with more memory. Install another version of torch."
    )


REPAIRED_CUDNN = 91500
ALIGNED = 16
"""Bytes that every array in a shared buffer begins at a multiple of."""


def set_up(device: Device, deterministic: bool = False) -> None:
    """Prepare this process once before the first tensor: threads, allocator, convolution search.

    `deterministic` takes only kernels that give equal results for equal input where there is a choice, and warns of
    those that have none; it stays on until the process ends.
    """
    if device.torch_device.type == "cpu":
        torch.set_num_threads(own_cores())
        keep_freed_memory()
        # denormal numbers appear in the tails of trained networks and cost hundreds of cycles each
        torch.set_flush_denormal(True)
    if deterministic:
        make_cublas_repeatable()
        torch.use_deterministic_algorithms(True, warn_only=True)
    if device.is_cuda:
        # the search takes whatever was fastest this time
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def keep_freed_memory() -> bool:
    """Stop glibc from giving every large freed block back to the system; True if it could be arranged.

    Each activation of a step would otherwise be mapped anew and faulted in page by page, which costs a third of the
    step on CPUs (docs/benchmarks.md).
    """
    if sys.platform != "linux":
        return False
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another libc
        return False
    largest = 2**31 - 1
    return bool(mallopt(mmap_threshold, largest)) and bool(mallopt(trim_threshold, largest))


def lay_out(network: nn.Module, dimension: int, device: Device, compiled: bool = False) -> nn.Module:
    """Lay the weights out as `layout` says, in place; returns the network."""
    return network.to(memory_format=layout(dimension, device, compiled))  # type: ignore[call-overload]


def laid_out_for_eager(network: nn.Module, dimension: int, device: Device) -> Callable[[Tensor], Any]:
    """The network with its weights copied into the layout that is fastest when it is not compiled.

    For a few passes of a network whose own weights may not move, since recorded CUDA graphs know where they lie.
    """
    wanted = layout(dimension, device)
    copies = {
        name: weight.detach().contiguous(memory_format=wanted) if weight.ndim == dimension + 2 else weight
        for name, weight in network.named_parameters()
    }
    return lambda image: functional_call(network, copies, (image,))


def layout(dimension: int, device: Device, compiled: bool = False) -> torch.memory_format:
    """How images and weights are laid out: with channels innermost, which is how convolutions read them fastest.

    But not in 3D on a GPU, unless compiled: torch's instance norm there returns contiguous channels, and the step takes
    2.6 times as long with all the copies between (docs/benchmarks.md; pytorch #59168).
    """
    if device.is_cuda and dimension == 3 and not compiled:
        return torch.contiguous_format
    return channels_last_format(dimension)


def channels_last_format(dimension: int) -> torch.memory_format:
    """The memory format with channels innermost in 2D or 3D."""
    return torch.channels_last_3d if dimension == 3 else torch.channels_last


def sent_together(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """Small arrays of the host on `device`, in one transfer: each costs a GPU's host as much as several kernels.

    A GPU need not have done what came before; only without pinned memory would the host wait for it.
    """
    if device.type == "cpu":
        return {name: torch.from_numpy(array) for name, array in arrays.items()}
    return in_one_piece(arrays, device)


def in_one_piece(arrays: Mapping[str, np.ndarray], device: torch.device) -> dict[str, Tensor]:
    """The arrays as tensors that share the memory of one, which was moved."""
    starts = list(accumulate((-(-array.nbytes // ALIGNED) * ALIGNED for array in arrays.values()), initial=0))
    buffer = torch.empty(starts[-1], dtype=torch.uint8, pin_memory=device.type == "cuda")
    flat, tensors = buffer.numpy(), {}
    for start, array in zip(starts, arrays.values(), strict=False):
        flat[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    there = buffer.to(device, non_blocking=device.type == "cuda")  # MPS would read what is freed (pytorch #189690)
    for start, (name, array) in zip(starts, arrays.items(), strict=False):
        part = there[start : start + array.nbytes]
        tensors[name] = part.view(torch.from_numpy(array).dtype).view(array.shape)
    return tensors
