"""A batch in pieces, for a device that runs out of memory: the same gradient.

The whole batch's gradient is had in the memory of a part. Most losses are functions of sums over the batch, such as
Dice over the batch, so the mean of the pieces' losses is not the loss of the batch. Here the pieces go through the
network twice. The first time nothing is kept for a backward pass, and the sums that the loss hands to its `reduce` are
added over the pieces; the second time every piece sees the totals, with its own part in them as what the gradient flows
through. That costs a forward pass, a third of a step. It asks of a loss that what it reduces does not depend on what it
reduced before. The hardest voxels of topk_ce and dice_topk are those of each piece, so there the gradient is another.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network.losses_sums import Reduce, alone

Forward = Callable[..., Tensor]
Result = TypeVar("Result")

ON_THE_HOST = "DefaultCPUAllocator"
"""How torch begins to say that RAM ran out."""
OUT_OF_MEMORY = (
    ON_THE_HOST,
    "CUDA error: out of memory", "CUDNN_STATUS_ALLOC_FAILED", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUBLAS_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_INITIALIZED", "DEVICE_ALLOCATION_FAILED",
    "unable to find an engine", "Triton Error [CUDA]: out of memory", "MPS backend out of memory",
)  # fmt: skip
"""Where it is not torch's allocator of a card that runs out: RAM, kernels loaded late, handles of cuDNN and cuBLAS
(every thread makes its own, which then are "not initialized"), and cuDNN's workspaces, for want of which it finds no
engine that computes a convolution (pytorch #108645)."""


def whole_backward(
    forward: Forward, scaled: Callable[[Tensor], Tensor], batch: Sequence[Tensor], lap: Callable[[str], None]
) -> Tensor:
    """Add the gradient of a batch to the weights, in one piece; arguments and result are those of `Pieces.backward`."""
    value = forward(*batch)
    lap("forward")
    scaled(value).backward()
    lap("backward")
    return value.detach()


def ran_out(error: RuntimeError) -> bool:
    """Whether an error of torch, cuDNN or cuBLAS says that there is too little memory, on a device or in RAM."""
    return isinstance(error, torch.OutOfMemoryError) or any(words in str(error) for words in OUT_OF_MEMORY)


def by_parts(
    compute: Callable[[slice], Result], samples: int, parts: int, device: torch.device
) -> tuple[list[Result], int]:
    """`compute` of consecutive slices of so many samples, of more and smaller ones where memory runs out.

    Returns the results and in how many parts they came. Raises UserError where there is too little for one sample.
    """
    while True:
        size = -(-samples // parts)
        try:
            return [compute(slice(start, start + size)) for start in range(0, samples, size)], parts
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not ran_out(error):
                raise
            if parts >= samples:
                raise too_little_memory(str(device), error) from error
        parts = min(2 * parts, samples)  # here, not above: the exception holds what the attempt had got
        if device.type == "cuda":
            torch.cuda.empty_cache()


def once_more(compute: Callable[[], Result], device: torch.device, what: str) -> Result:
    """`compute`, a second time where memory runs out, when torch has given back what it keeps for later.

    Raises UserError, which says that there is too little for `what`, where it runs out again.
    """
    try:
        return compute()
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not ran_out(error):
            raise
    if device.type == "cuda":  # here, not above: the exception holds what the attempt had got
        torch.cuda.empty_cache()
    try:
        return compute()
    except RuntimeError as error:
        if not ran_out(error):
            raise
        raise too_little_memory(str(device), error, what) from error


def too_little_memory(device: str, error: Exception, what: str = "a single patch") -> UserError:
    """What is said where not even that fits."""
    return UserError(
        f"{device} has too little memory for {what} ({str(error).splitlines()[0]}).",
        fix="Free memory on it, or plan again with less --memory.",
    )


def _not_split(device: str, error: Exception) -> UserError:
    return UserError(
        f"{device} ran out of memory ({str(error).splitlines()[0]}), and with batch norm between processes a batch "
        "cannot be split.",
        fix="Train with a smaller --batch-size, or set network.norm to instance in plan.json.",
    )


class Pieces:
    """How many pieces batches are in; and the `Reduce` of the loss, which has to know that there are pieces.

    Args:
        between: adds sums over processes, with gradient; each sum is added once, however often a piece is tried.
        count: pieces to begin with.
        splits: whether batches may be split. Not where the network's forward pass waits for other processes, as batch
            norms of the whole batch do: their pieces are not as many.
    """

    def __init__(self, between: Reduce = alone, count: int = 1, splits: bool = True) -> None:
        self.count, self._splits = count, splits
        self._between = between
        self._totals: list[Tensor] = []
        """What each call of `reduce` in this step came to, over all processes."""
        self._heard: list[Tensor] | None = None
        self._calls = 0

    def __call__(self, part: Tensor) -> Tensor:
        """The `Reduce` of the loss."""
        call = self._calls
        self._calls += 1
        if self._heard is not None:
            self._heard.append(part.detach())
            return part
        if call < len(self._totals):
            return part + (self._totals[call] - part.detach())
        total = self._between(part)
        self._totals.append(total.detach())
        return total

    @contextmanager
    def by_itself(self) -> Iterator[None]:
        """In this block sums are those of this process, so that a trial does not wait for the others."""
        self._heard = []
        try:
            yield
        finally:
            self._heard = None

    def backward(
        self,
        forward: Forward,
        scaled: Callable[[Tensor], Tensor],
        batch: Sequence[Tensor],
        forget: Callable[[], None],
        buffers: Sequence[Tensor] = (),
        lap: Callable[[str], None] = lambda part: None,
    ) -> Tensor:
        """Add the gradient of a batch to the weights, in `count` pieces; returns the loss of the batch.

        Where memory runs out (see `ran_out`), the number of pieces is doubled until it is enough or a piece
        is a single sample; `count` keeps what was needed. Raises UserError where that is too much, or may not be split.

        Args:
            forward: from the tensors of a piece to its loss, which calls this object as its `reduce`.
            scaled: what becomes of a loss before its backward pass.
            batch: image, labels and whatever else has one row per sample.
            forget: drops the gradients of a pass that failed half-way.
            buffers: running statistics of the network, which the forward passes without gradient leave as they were.
            lap: called with "forward" and "backward" when these are done.
        """
        self._totals = []
        before = [buffer.clone() for buffer in buffers]
        while True:
            short = False
            try:
                return self._try(forward, scaled, batch, buffers, lap)
            except RuntimeError as error:  # torch.OutOfMemoryError is one
                if not ran_out(error):
                    raise
                short = True
                if not self._splits:
                    raise _not_split(str(batch[0].device), error) from error
                if self.count >= len(batch[0]):
                    raise too_little_memory(str(batch[0].device), error) from error
            if short:  # here, not above: the exception still holds every tensor of the failed pass
                forget()
                for buffer, old in zip(buffers, before, strict=True):
                    buffer.copy_(old)
                self.count = min(2 * self.count, len(batch[0]))
                if batch[0].is_cuda:
                    torch.cuda.empty_cache()

    def _try(
        self, forward: Forward, scaled: Callable[[Tensor], Tensor], batch: Sequence[Tensor],
        buffers: Sequence[Tensor], lap: Callable[[str], None],
    ) -> Tensor:  # fmt: skip
        count = min(self.count, len(batch[0]))
        if count == 1:
            self._calls = 0
            return whole_backward(forward, scaled, batch, lap)
        parts = list(zip(*(tensor.tensor_split(count) for tensor in batch), strict=True))
        self._listen(forward, parts, buffers)
        lap("forward")
        for part in parts:
            self._calls = 0
            value = forward(*part)
            scaled(value).backward()
        lap("backward")
        return value.detach()

    def _listen(
        self, forward: Forward, parts: Sequence[Sequence[Tensor]], buffers: Sequence[Tensor]
    ) -> None:
        """Fill `_totals`: the sums of all pieces, then of all processes."""
        before = [buffer.clone() for buffer in buffers]
        sums: list[Tensor] = []
        devices = [parts[0][0].device] if parts[0][0].is_cuda else []
        with torch.no_grad(), torch.random.fork_rng(devices):  # the second pass has the same dropout
            for part in parts:
                self._heard, self._calls = [], 0
                try:
                    forward(*part)
                    heard = self._heard
                finally:
                    self._heard = None
                sums = [total + more for total, more in zip(sums, heard, strict=True)] if sums else heard
        for total in sums[len(self._totals) :]:
            self._totals.append(self._between(total).detach())
        for buffer, old in zip(buffers, before, strict=True):
            buffer.copy_(old)
