"""A training step compiled for GPUs, and recorded as CUDA graphs where it is short.

The network and its loss are one function. Only GPUs compile: on CPUs the eager step is the faster one
(docs/decisions/training-on-a-cpu.md).
"""

import gc
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.events import Report, Warned
from autoseg.network import compile_workers
from autoseg.network.device import Device

COMPILE_SECONDS = {"cuda": 45.0}
"""What compiling a training step takes: 27 to 77 s beside other compilers on an H100's host (docs/benchmarks.md)."""
COMPILE_SAVES = 0.5
"""Share of an eager step that a compiled one saves: 0.54 to 0.67 on an H100 (docs/benchmarks.md)."""
GRAPHS_SHARE = 0.25
"""Steps that need less than this share of a card's memory are short: its host launches their kernels more slowly than
they run, so they are recorded once. A recording keeps its memory between steps, beside what validation needs."""
TRIALS = 3
"""Runs before a recorded step is replayed: CUDA graphs are recorded in the second."""

Step = Callable[..., Tensor]
"""From the tensors of a batch (image, labels, ...) to its loss."""


def pays_to_compile(device: Device, seconds_left: float | None) -> bool:
    """Whether `torch.compile` earns back its time in the seconds that are left (None: nobody knows how many)."""
    cost = COMPILE_SECONDS.get(device.torch_device.type)
    if cost is None or sys.platform == "win32" or device.precision == "fp32":
        return False
    return seconds_left is None or seconds_left * COMPILE_SAVES > cost


def pays_to_record(device: Device, step_bytes: int) -> bool:
    """Whether a step that needs so many bytes is recorded as CUDA graphs."""
    return device.is_cuda and step_bytes < GRAPHS_SHARE * torch.cuda.mem_get_info(device.torch_device)[1]


def try_compile(
    network: nn.Module, loss: Callable[..., Tensor], batch: Sequence[Tensor], device: Device, report: Report,
    records: bool = False,
) -> Step | None:  # fmt: skip
    """The compiled loss of a batch, tried on `batch`; None, with one line why, if that fails.

    What this process compiled before is forgotten: torch compiles a function for so many networks and sizes and leaves
    further ones eager without a word. The trial changes nothing: weights and running statistics are put back,
    gradients dropped. It runs in the modes that the modules are in. `batch` is laid out as those of a training, else
    the first step would compile again.

    Args:
        loss: of the network's outputs and all tensors of a batch but the first.
        records: record CUDA graphs; a loss is then a copy, since the next step writes over what the last one returned.
    """

    def whole(image: Tensor, *rest: Tensor) -> Tensor:
        return loss(network(image), *rest)

    records = records and threading.current_thread() is threading.main_thread()  # pytorch #123177
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    compiled: Any = None

    def recorded(*tensors: Tensor) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(*tensors).clone()

    try:
        torch.compiler.reset()
        compiled = torch.compile(whole, mode="reduce-overhead" if records else None, dynamic=False)
        run: Step = recorded if records else compiled
        with _no_silent_eager(), _compilers_remarks_unsaid(), compile_workers.watched():
            for _ in range(TRIALS if records else 1):
                with device.autocast():
                    value = run(*batch)
                value.backward()
                network.zero_grad(set_to_none=True)
    except Exception as error:  # noqa: BLE001  compilers fail in many ways, and the eager network does the same work
        report(Warned(f"torch.compile failed ({type(error).__name__}); training goes on without it, more slowly."))
        forget_compiled()
        return None
    finally:
        network.zero_grad(set_to_none=True)
        network.load_state_dict(before)
    return run


def forget_compiled() -> None:
    """Free what was compiled and recorded in this process: recordings keep their memory, and torch keeps them."""
    with suppress(AssertionError):  # torch's own, in threads that recorded nothing
        torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _no_silent_eager() -> AbstractContextManager[object]:
    """In this block a function that torch compiles no further raises, where this torch has a setting for it."""
    config = torch._dynamo.config
    if not hasattr(config, "fail_on_recompile_limit_hit"):
        return nullcontext()
    return config.patch(fail_on_recompile_limit_hit=True)  # type: ignore[no-any-return]


@contextmanager
def _compilers_remarks_unsaid() -> Iterator[None]:
    """In this block torch's compiler does not warn: it speaks of its own choices, about which a user can do nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module=r"torch\._(inductor|dynamo)")
        yield
