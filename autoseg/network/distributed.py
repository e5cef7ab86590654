"""Several processes that train one network, each with a share of the batch.

Here is who they are, how they add up their shares, and how they agree. Every process holds the whole network and a
share of each batch. A loss is a function of sums over the batch, so the sums are added between the processes
(`adding`), every process knows the loss of the whole batch, and the sum of their gradients is the gradient that one
process with the whole batch has (no average: each backward pass is a part of it). Started by torchrun, which gives each
process its number; without it there is one process, `ALONE`.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from autoseg.errors import EndedElsewhere, UserError
from autoseg.network.losses_sums import Reduce, alone
from autoseg.parallel import torchrun_setting

Item = TypeVar("Item")
Result = TypeVar("Result")

STEP_PATIENCE = timedelta(minutes=10)
"""A process that has not come to the same sum within this time is taken for dead (a killed one is noticed at once)."""
WAITING_PATIENCE = timedelta(days=2)
"""The same where one process works and the others wait: preprocessing, validation."""

LOST = ("connect", "peer", "timed out", "timeout", "broken pipe", "socket", "pair closure")
"""What gloo says where another process is gone; its other errors, and those of the device, are this process' own."""


@dataclass(frozen=True)
class Team:
    """The processes that share a training. `host` is their way to talk without the device."""

    rank: int = 0
    size: int = 1
    host: Any = None

    @property
    def is_first(self) -> bool:
        """Whether this process is the one that writes files and speaks."""
        return self.rank == 0


ALONE = Team()


@contextmanager
def joined(device: str | None) -> Iterator[Team]:
    """The team that torchrun started this process in, `ALONE` without torchrun; left when the block ends well.

    Args:
        device: as the user named it; "cpu" talks by gloo, CUDA devices by NCCL.
    """
    size = torchrun_setting("WORLD_SIZE", 1)
    if size == 1:
        yield ALONE
        return
    cuda = torch.cuda.is_available() and not str(device).startswith("cpu")
    if cuda:
        own, cards = torchrun_setting("LOCAL_RANK", 0), torch.cuda.device_count()
        if own >= cards:
            raise UserError(
                f"torchrun started more processes on this machine than it has CUDA devices, {cards}.",
                fix=f"Start it with --nproc-per-node {cards}.",
            )
        torch.cuda.set_device(own)
    _heard(lambda: dist.init_process_group("nccl" if cuda else "gloo", timeout=STEP_PATIENCE))
    yield Team(dist.get_rank(), size, dist.new_group(backend="gloo", timeout=WAITING_PATIENCE))
    dist.destroy_process_group()  # not after an error: the others may be gone, and this would wait for them


def own_device(device: str | None) -> str | None:
    """The device of this process: each one on a machine takes its own GPU. Raises UserError for a numbered device."""
    if torchrun_setting("WORLD_SIZE", 1) == 1:
        return device
    if device is not None and device.startswith("cuda:"):
        raise UserError(
            f"--device {device}: every process of torchrun takes its own GPU.", fix="Say --device cuda, or nothing."
        )
    if device == "cuda" or (device is None and torch.cuda.is_available()):
        return f"cuda:{torchrun_setting('LOCAL_RANK', 0)}"
    return device


# ------------------------------------------------------------------------------------------------ sums


class _Added(torch.autograd.Function):
    """The sum over processes. What flows back is handed through: every process knows the same, whole loss."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        _heard(lambda: dist.all_reduce(total))
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def adding(team: Team) -> Reduce:
    """The `Reduce` of losses in this team."""
    return alone if team.size == 1 else _Added.apply  # type: ignore[return-value]


def add_gradients(team: Team, weights: Sequence[Tensor]) -> None:
    """Replace the gradients of `weights` by their sums over the team: one message per number format."""
    if team.size == 1:
        return
    present = [weight.grad for weight in weights if weight.grad is not None]
    for dtype in sorted({gradient.dtype for gradient in present}, key=str):
        some = [gradient for gradient in present if gradient.dtype == dtype]
        flat = torch.cat([gradient.reshape(-1) for gradient in some])
        _heard(lambda flat=flat: dist.all_reduce(flat))  # type: ignore[misc]
        for gradient, summed in zip(some, flat.split([each.numel() for each in some]), strict=True):
            gradient.copy_(summed.view(gradient.shape))


def add_up(team: Team, tensor: Tensor) -> Tensor:
    """The sum of a tensor over the team, in place, without gradient."""
    if team.size > 1:
        _heard(lambda: dist.all_reduce(tensor))
    return tensor


def whole_batch_statistics(network: nn.Module, team: Team) -> nn.Module:
    """Batch norms that use the statistics of the whole batch. Raises UserError on CPUs, where torch has none."""
    if team.size == 1 or not any(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in network.modules()):
        return network
    if next(network.parameters()).device.type != "cuda":
        raise UserError(
            "Batch norm cannot be shared between processes on a CPU.",
            fix="Train in one process, or set network.norm to instance in plan.json.",
        )
    return nn.SyncBatchNorm.convert_sync_batchnorm(network)


# ------------------------------------------------------------------------------------------------ agreement


def agreed(team: Team, stop: bool, seconds: float) -> tuple[bool, float]:
    """Whether any process was asked to stop, and the clock of the first one; the same answer everywhere.

    Goes by the host, so that no process waits for its device.
    """
    if team.size == 1:
        return stop, seconds
    said = torch.tensor([float(stop), seconds if team.is_first else 0.0], dtype=torch.float64)
    _heard(lambda: dist.all_reduce(said, group=team.host))
    return bool(said[0] > 0), float(said[1])


def wait_for_all(team: Team) -> None:
    """Return when every process of the team has come here."""
    if team.size > 1:
        agreed(team, False, 0.0)


@contextmanager
def first_goes_first(team: Team) -> Iterator[None]:
    """Run the block in the first process, then in the others: what it writes is there when they look."""
    if not team.is_first:
        wait_for_all(team)
    yield
    if team.is_first:
        wait_for_all(team)
    wait_for_all(team)


def share(team: Team, items: Sequence[Item]) -> Sequence[Item]:
    """What of `items` this process works on."""
    return items[team.rank :: team.size]


def _heard(call: Callable[[], Result]) -> Result:
    """Talk to the others; raises EndedElsewhere when one is not there any more, other errors as they are."""
    try:
        return call()
    except dist.DistBackendError as error:  # of NCCL, whose trouble may be this process' own
        raise EndedElsewhere(str(error).splitlines()[0]) from error
    except RuntimeError as error:  # torch's DistError is one; gloo raises it bare
        if not isinstance(error, dist.DistError) and not any(word in str(error).lower() for word in LOST):
            raise
        raise EndedElsewhere from error
