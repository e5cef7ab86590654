"""Losses that look at one voxel at a time.

Legend: B batch, K class (0 = background), Z Y X voxels (2D: Y X), p softmax, c(x) the true class of voxel x.
All take logits (B, K, Z, Y, X) or (B, K, Y, X) in any floating type and target (B, Z, Y, X) or (B, Y, X) of integer
class indices, -1 = ignore, and return a scalar in float32 (float64 for float64 logits). Without any annotated voxel
they are 0.
`reduce` adds sums over the processes that share a batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network.distance import boundary_voxels, distance_to
from autoseg.network.losses_sums import Reduce, Sums, alone, class_sums, voxel_surprise, wide


def ce(logits: Tensor, target: Tensor, *, reduce: Reduce = alone) -> Tensor:
    """Cross-entropy: mean over annotated voxels of -log p_c(x). Range [0, inf)."""
    return ce_of(class_sums(logits, target), reduce=reduce)


def ce_of(sums: Sums, *, reduce: Reduce = alone) -> Tensor:
    """`ce` from sums that were computed already."""
    return ratio(sums.surprise_BK.sum(), sums.true_BK.sum(), reduce)


def weighted_ce(
    logits: Tensor,
    target: Tensor,
    *,
    class_weights: Sequence[float] | None = None,
    border: float = 10.0,
    sigma: float = 3.0,
    reduce: Reduce = alone,
) -> Tensor:
    """Cross-entropy with class and boundary weights: sum of w(x) (-log p_c(x)) / sum of w(x). Range [0, inf).

    w(x) = v_c(x) (1 + border exp(-d(x)^2 / (2 sigma^2))), d the distance to the nearest boundary voxel. After
    equation 2 of Ronneberger et al. 2015 (U-Net), whose two distances to the two nearest cells become one distance to
    the nearest boundary: label maps have classes, not single cells.

    Args:
        class_weights: v, one per class (see `CLASS_WEIGHTS`); all ones if None.
        border: extra weight of a boundary voxel; 0 switches the boundary term off.
        sigma: how far the boundary term reaches, voxels.
    """
    weight = boundary_weights(target, border, sigma)
    return weighted_ce_of(class_sums(logits, target, weight=weight), target, weight, class_weights, reduce)


def weighted_ce_of(
    sums: Sums, target: Tensor, weight: Tensor, class_weights: Sequence[float] | None, reduce: Reduce
) -> Tensor:
    """`weighted_ce` from sums of surprise with voxel weights `weight` (B, ...) that were computed already."""
    classes = sums.true_BK.shape[1]
    v_K = class_weight_tensor(class_weights, classes, sums.true_BK)
    per_class = torch.stack([torch.where(target == label, weight, 0.0).sum() for label in range(classes)])
    return ratio((sums.surprise_BK.sum(0) * v_K).sum(), (per_class * v_K).sum(), reduce)


def focal(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float = -1.0,
    class_weights: Sequence[float] | None = None,
    reduce: Reduce = alone,
) -> Tensor:
    """Focal loss: mean over annotated voxels of -a_c(x) (1 - p_c(x))^gamma log p_c(x). Range [0, inf).

    Lin et al. 2017, equation 5. gamma 0 without alpha is cross-entropy.

    Args:
        gamma: how much voxels that are right already are played down, >= 0.
        alpha: a = alpha for foreground classes and 1 - alpha for background; a = 1 if alpha is -1.
        class_weights: further factors of a, one per class.
    """
    surprise_BN, valid_BN = voxel_surprise(logits, target)
    doubt = (-torch.expm1(-surprise_BN)).clamp(min=1e-8)  # 1 - p; its power has no finite slope at 0 if gamma < 1
    values = doubt**gamma * surprise_BN
    index = target.flatten(1)
    if alpha >= 0:
        values = values * torch.where(index > 0, alpha, 1 - alpha)
    if class_weights is not None:
        values = values * class_weight_tensor(class_weights, logits.shape[1], values)[index.clamp(min=0).long()]
    return ratio(values.sum(), valid_BN.sum(), reduce)


def topk_ce(logits: Tensor, target: Tensor, *, k: float = 0.1, reduce: Reduce = alone) -> Tensor:
    """Cross-entropy of the hardest voxels: mean -log p over the share `k` of annotated voxels where it is largest.

    Range [0, inf). Wu et al. 2016 ("Bridging category-level and instance-level semantic image segmentation"). The
    hardest are chosen in the whole batch of one process; the count is rounded up.
    """
    surprise_BN, valid_BN = voxel_surprise(logits, target)
    ranked = torch.where(valid_BN, surprise_BN, -1.0).flatten()
    most = -(-ranked.numel() * k // 1)
    hardest = torch.topk(ranked, max(1, int(most)), sorted=True).values
    rank = torch.arange(hardest.numel(), device=hardest.device)
    kept = rank < torch.ceil(valid_BN.sum() * k)
    return ratio(torch.where(kept, hardest, 0.0).sum(), kept.sum(), reduce)


def ratio(total: Tensor, count: Tensor, reduce: Reduce) -> Tensor:
    """total / count over all processes; 0 where there is nothing to count."""
    both = reduce(torch.stack([total, count.to(total.dtype)]))
    return both[0] / torch.where(both[1] > 0, both[1], 1.0)


def boundary_weights(target: Tensor, border: float, sigma: float) -> Tensor:
    """1 + border exp(-d^2 / (2 sigma^2)) per annotated voxel, 0 where ignored; cut off at 3 sigma. Float32."""
    annotated = (target >= 0).float()
    if border == 0:
        return annotated
    radius = max(2, int(3 * sigma) + 1)
    far = distance_to(boundary_voxels(target), radius)
    bonus = torch.where(far < radius, border * torch.exp(-(far**2) / (2 * sigma**2)), 0.0)
    return annotated * (1 + bonus)


def class_weight_tensor(class_weights: Sequence[float] | None, classes: int, like: Tensor) -> Tensor:
    """(K,) weights on the device of `like`; ones if None. Raises UserError if there is not one weight per class."""
    if class_weights is None:
        return torch.ones(classes, dtype=like.dtype, device=like.device)
    if len(class_weights) != classes:
        raise UserError(
            f"class_weights has {len(class_weights)} numbers, but the network has {classes} classes.",
            fix="Give one weight per class, background first.",
        )
    dtype, where = wide(like).dtype, like.device  # filled there: a copy from the host would wait for the device
    return torch.stack([torch.full((), weight, dtype=dtype, device=where) for weight in class_weights])


# ------------------------------------------------------------------------------------ class weights from voxel counts


def inverse_share(class_voxels: Sequence[int]) -> tuple[float, ...]:
    """1 / share of the class, scaled to a mean of 1 over present classes; absent classes get 0."""
    return _scaled([1 / n if n else 0.0 for n in class_voxels])


def median_frequency(class_voxels: Sequence[int]) -> tuple[float, ...]:
    """Median share / share of the class (Eigen and Fergus 2015), absent classes 0; not scaled further."""
    present = sorted(n for n in class_voxels if n)
    if not present:
        return tuple(0.0 for _ in class_voxels)
    half = len(present) // 2
    median = present[half] if len(present) % 2 else (present[half - 1] + present[half]) / 2
    return tuple(median / n if n else 0.0 for n in class_voxels)


def effective_number(class_voxels: Sequence[int], beta: float = 0.9999) -> tuple[float, ...]:
    """(1 - beta) / (1 - beta^n) (Cui et al. 2019), scaled to a mean of 1 over present classes; absent classes get 0."""
    return _scaled([(1 - beta) / (1 - beta**n) if n else 0.0 for n in class_voxels])


def _scaled(weights: list[float]) -> tuple[float, ...]:
    present = [w for w in weights if w > 0]
    mean = sum(present) / len(present) if present else 1.0
    return tuple(w / mean for w in weights)


CLASS_WEIGHTS: dict[str, Callable[[Sequence[int]], tuple[float, ...]]] = {
    "inverse_share": inverse_share,
    "median_frequency": median_frequency,
    "effective_number": effective_number,
}
