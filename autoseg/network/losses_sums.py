"""The sums over voxels that most losses are made of, in one pass.

Only the logits are kept for the backward pass.
Legend: B batch, K class (0 = background), N voxels of one sample, p softmax of the logits, g one-hot target.
Half-precision logits are widened to float32 piece by piece; float64 stays float64.
With 100 classes a plain softmax, its logarithm and a one-hot target at full resolution cost more memory than the
network itself; the closed-form gradient below needs one small piece of each at a time.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Reduce = Callable[[Tensor], Tensor]
"""Adds a tensor over all processes that share a batch, with gradient; `alone` where there is one process."""

PIECE = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Largest number of logits worked on at once: what stays in the cache of a CPU; on a GPU few, large kernels."""


class Sums(NamedTuple):
    """Sums over the annotated voxels, each (B, K) in float32 (float64 for float64 logits).

    intersection: of p where g = 1. predicted: of p (of p squared if asked). true: of g.
    surprise: of -log p where g = 1, times the voxel's weight.
    """

    intersection_BK: Tensor
    predicted_BK: Tensor
    true_BK: Tensor
    surprise_BK: Tensor


def alone(tensor: Tensor) -> Tensor:
    """The `Reduce` of a single process: changes nothing."""
    return tensor


def flat(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K, ...) logits and (B, ...) target -> (B, K, N) logits and (B, N) class indices (uint8 has no -1, fine)."""
    return logits.flatten(2), target.flatten(1)


def wide(tensor: Tensor) -> Tensor:
    """Float32, or float64 if it already is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def voxel_surprise(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """-log p of the true class per voxel, (B, N), zero where ignored; and where annotated, (B, N) bool."""
    logits_BKN, index_BN = flat(logits, target)
    valid_BN = index_BN >= 0
    log_p = torch.log_softmax(wide(logits_BKN), dim=1)
    picked = log_p.gather(1, index_BN.clamp(min=0).long().unsqueeze(1)).squeeze(1)
    return torch.where(valid_BN, -picked, 0.0), valid_BN


def class_sums(logits: Tensor, target: Tensor, *, square: bool = False, weight: Tensor | None = None) -> Sums:
    """All `Sums` of one batch, differentiable in the logits.

    Args:
        logits: (B, K, Z, Y, X) or (B, K, Y, X), any floating type.
        target: (B, Z, Y, X) or (B, Y, X), integer class indices, -1 = ignore.
        square: sum p squared instead of p into `predicted`.
        weight: (B, Z, Y, X) or (B, Y, X), a constant weight per voxel for `surprise`.
    """
    logits_BKN, index_BN = flat(logits, target)
    weight_BN = None if weight is None else weight.flatten(1)
    if torch.compiler.is_compiling():  # the compiler fuses the plain formula by itself
        return Sums(*_plain_sums(logits_BKN, index_BN, square, weight_BN))
    return Sums(*_LeanSums.apply(logits_BKN, index_BN, square, weight_BN))


def _hot(index_BN: Tensor, classes: int) -> Tensor:
    """(B, K, N) bool: the one-hot target; ignored voxels belong to no class."""
    return index_BN.unsqueeze(1) == torch.arange(classes, device=index_BN.device, dtype=index_BN.dtype).view(1, -1, 1)


def _plain_sums(logits_BKN: Tensor, index_BN: Tensor, square: bool, weight_BN: Tensor | None) -> tuple[Tensor, ...]:
    log_p = torch.log_softmax(wide(logits_BKN), dim=1)
    p = log_p.exp()
    hot = _hot(index_BN, p.shape[1])
    valid = (index_BN >= 0).unsqueeze(1)
    surprise = torch.where(hot, -log_p, 0.0)
    if weight_BN is not None:
        surprise = surprise * weight_BN.unsqueeze(1)
    predicted = torch.where(valid, p * p if square else p, 0.0)
    return torch.where(hot, p, 0.0).sum(-1), predicted.sum(-1), hot.sum(-1).to(p.dtype), surprise.sum(-1)


def _pieces(logits_BKN: Tensor) -> Iterator[slice]:
    batch, classes, voxels = logits_BKN.shape
    step = max(1, PIECE.get(logits_BKN.device.type, PIECE["cuda"]) // (batch * classes))
    return (slice(start, start + step) for start in range(0, voxels, step))


def _piece_sums(logits_BKN: Tensor, index_BN: Tensor, square: bool, weight_BN: Tensor | None) -> list[Tensor]:
    """`_plain_sums` without a gradient, writing over what is no longer needed."""
    log_p = torch.log_softmax(wide(logits_BKN), dim=1)
    surprise_BN = -log_p.gather(1, index_BN.clamp(min=0).long().unsqueeze(1)).squeeze(1)
    p = log_p.exp_()
    hot = _hot(index_BN, p.shape[1]).to(p.dtype)
    p_true_BN = torch.exp(-surprise_BN)
    if weight_BN is not None:
        surprise_BN = surprise_BN * weight_BN
    inter_BK, surprise_BK = ((hot * each.unsqueeze(1)).sum(-1) for each in (p_true_BN, surprise_BN))
    p = p.square_() if square else p
    return [inter_BK, p.mul_((index_BN >= 0).unsqueeze(1)).sum(-1), hot.sum(-1), surprise_BK]


class _LeanSums(torch.autograd.Function):
    """`_plain_sums` piece by piece; the backward pass computes the softmax anew instead of keeping it.

    With dp_k = dL/dp_k and S the derivative by `surprise` of the voxel's class c (times its weight):
    dL/dz_k = p_k (dp_k - sum_j p_j dp_j) + S_c (p_k - g_k).
    """

    @staticmethod
    def forward(
        ctx: Any, logits_BKN: Tensor, index_BN: Tensor, square: bool, weight_BN: Tensor | None
    ) -> tuple[Tensor, ...]:
        totals: list[Tensor] = []
        for piece in _pieces(logits_BKN):
            weight = None if weight_BN is None else weight_BN[:, piece]
            parts = _piece_sums(logits_BKN[:, :, piece], index_BN[:, piece], square, weight)
            totals = [t + p for t, p in zip(totals, parts, strict=True)] if totals else parts
        ctx.save_for_backward(logits_BKN, index_BN, weight_BN)
        ctx.square = square
        ctx.mark_non_differentiable(totals[2])
        return tuple(totals)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_inter: Tensor, d_predicted: Tensor, _d_true: Tensor, d_surprise: Tensor) -> tuple:
        logits_BKN, index_BN, weight_BN = ctx.saved_tensors
        gradient = torch.empty_like(logits_BKN)
        d_inter, d_predicted, d_surprise = (each.unsqueeze(-1) for each in (d_inter, d_predicted, d_surprise))
        for piece in _pieces(logits_BKN):
            index = index_BN[:, piece]
            p = torch.softmax(wide(logits_BKN[:, :, piece]), dim=1)
            hot = _hot(index, p.shape[1]).to(p.dtype)
            dz = torch.addcmul(2 * p * d_predicted if ctx.square else d_predicted, hot, d_inter).mul_(p)
            slope = hot.mul_(d_surprise)
            if weight_BN is not None:
                slope.mul_(weight_BN[:, piece].unsqueeze(1))
            dz.addcmul_(p, slope.sum(1, keepdim=True) - dz.sum(1, keepdim=True))
            dz.sub_(slope).mul_((index >= 0).unsqueeze(1))
            gradient[:, :, piece] = dz
        return gradient, None, None, None
