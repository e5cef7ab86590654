"""Losses that look at whole regions: overlap, boundary, centre line.

Legend: B batch, K class (0 = background), Z Y X voxels (2D: Y X), p softmax, g one-hot target; sums run over the
annotated voxels of one sample, or of the whole batch where `batch_dice` says so.
All take logits (B, K, Z, Y, X) or (B, K, Y, X) in any floating type and target (B, Z, Y, X) or (B, Y, X) of integer
class indices, -1 = ignore, and return a scalar in float32 (float64 for float64 logits): the mean over classes, and over
samples unless `batch_dice`. `background` counts class 0 as well. `reduce` adds sums over the processes that share a
batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from autoseg.network.distance import signed_distances
from autoseg.network.losses_pixel import ratio
from autoseg.network.losses_sums import Reduce, Sums, alone, class_sums, wide


def dice(
    logits: Tensor,
    target: Tensor,
    *,
    batch_dice: bool = False,
    background: bool = False,
    squared: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """Soft Dice: 1 - (2 sum(p g) + smooth) / (sum(p) + sum(g) + smooth). Range [0, 1].

    Drozdzal et al. 2016; `squared` takes sum(p^2) as in Milletari et al. 2016 (V-Net). A class that is absent and not
    predicted costs 0. One minus the coefficient, so that a perfect output costs 0.
    """
    sums = class_sums(logits, target, square=squared)
    return dice_of(sums, batch_dice=batch_dice, background=background, smooth=smooth, reduce=reduce)


def dice_of(sums: Sums, *, batch_dice: bool, background: bool, smooth: float, reduce: Reduce = alone) -> Tensor:
    """`dice` from sums that were computed already."""
    inter, predicted, true = overlap(sums, batch_dice, background, reduce)
    coefficient = (2 * inter + smooth) / (predicted + true + smooth).clamp(min=1e-8)
    return mean_of(1 - coefficient, batch_dice, reduce)


def generalized_dice(
    logits: Tensor,
    target: Tensor,
    *,
    batch_dice: bool = False,
    background: bool = True,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """Generalised Dice: 1 - (2 sum_k w_k sum(p g) + smooth) / (sum_k w_k (sum(p) + sum(g)) + smooth). Range [0, 1].

    w_k = 1 / sum(g)^2 (Sudre et al. 2017), 0 for a class that is absent, scaled so that the largest w_k sum(g) is 1.
    """
    inter, predicted, true = overlap(class_sums(logits, target), batch_dice, background, reduce)
    weight = torch.where(true > 0, 1 / true.clamp(min=1) ** 2, 0.0)
    weight = weight / (weight * true).amax(1, keepdim=True).clamp(min=1e-20)
    top, bottom = (weight * inter).sum(1), (weight * (predicted + true)).sum(1)
    return mean_of(1 - (2 * top + smooth) / (bottom + smooth).clamp(min=1e-8), batch_dice, reduce)


def tversky(
    logits: Tensor,
    target: Tensor,
    *,
    alpha: float = 0.3,
    beta: float = 0.7,
    batch_dice: bool = False,
    background: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """Tversky: 1 - (TP + smooth) / (TP + alpha FP + beta FN + smooth), TP = sum(p g). Range [0, 1].

    Salehi et al. 2017; beta above alpha prefers finding too much to missing something. 0.5 and 0.5 is Dice.
    """
    misses = _tversky_misses(logits, target, alpha, beta, batch_dice, background, smooth, reduce)
    return mean_of(misses, batch_dice, reduce)


def focal_tversky(
    logits: Tensor,
    target: Tensor,
    *,
    gamma: float = 4 / 3,
    alpha: float = 0.3,
    beta: float = 0.7,
    batch_dice: bool = False,
    background: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """Focal Tversky: the Tversky loss of each class to the power of 1 / gamma. Range [0, 1].

    Abraham and Khan 2018, equation 4. gamma above 1 keeps the slope large for classes that are nearly right.
    """
    misses = _tversky_misses(logits, target, alpha, beta, batch_dice, background, smooth, reduce)
    return mean_of(misses.clamp(min=1e-7) ** (1 / gamma), batch_dice, reduce)  # no finite slope at 0


def boundary(
    logits: Tensor, target: Tensor, *, background: bool = False, radius: int = 16, reduce: Reduce = alone
) -> Tensor:
    """Boundary loss: mean over annotated voxels and classes of d(x) p(x). Range about [-radius, radius].

    Kervadec et al. 2019, equation 5. d is the signed distance to the class (negative inside) in voxels, clipped at
    `radius`; 0 in samples without the class. It has no slope of its own where classes are missing: add Dice or CE.
    The least value is negative: the mean of d where it is below 0.
    """
    first = 0 if background else 1
    p = torch.softmax(wide(logits), dim=1)[:, first:]
    distance = signed_distances(target, logits.shape[1], radius)[:, first:]
    valid = (target >= 0).unsqueeze(1)
    total = torch.where(valid, distance * p, 0.0).sum()
    return ratio(total, valid.sum() * p.shape[1], reduce)


def cldice(logits: Tensor, target: Tensor, *, steps: int = 3, smooth: float = 1e-5, reduce: Reduce = alone) -> Tensor:
    """Centre-line Dice: 1 - 2 T S / (T + S) per sample and foreground class, for tubes. Range [0, 1].

    T = sum(skeleton(p) g) / sum(skeleton(p)), S = sum(skeleton(g) p) / sum(skeleton(g)), skeletons by `steps` soft
    erosions. Shit et al. 2021, algorithm 1. `steps` should reach the largest radius of the tubes, voxels.
    """
    valid = (target >= 0).unsqueeze(1)
    p = torch.where(valid, torch.softmax(wide(logits), dim=1), 0.0)[:, 1:]
    labels = torch.arange(1, logits.shape[1], device=target.device, dtype=target.dtype)
    g = (target.unsqueeze(1) == labels.view(1, -1, *[1] * (target.ndim - 1))).to(p.dtype)
    spine_p, spine_g = soft_skeleton(p, steps), soft_skeleton(g, steps)
    precision = ((spine_p * g).flatten(2).sum(-1) + smooth) / (spine_p.flatten(2).sum(-1) + smooth).clamp(min=1e-8)
    recall = ((spine_g * p).flatten(2).sum(-1) + smooth) / (spine_g.flatten(2).sum(-1) + smooth).clamp(min=1e-8)
    return mean_of(1 - 2 * precision * recall / (precision + recall).clamp(min=1e-8), False, reduce)


def soft_skeleton(mask: Tensor, steps: int) -> Tensor:
    """Soft skeleton of (B, K, Z, Y, X) or (B, K, Y, X) values in [0, 1] by repeated opening (Shit et al. 2021)."""
    spine = F.relu(mask - _dilate(_erode(mask)))
    for _ in range(steps):
        mask = _erode(mask)
        top = F.relu(mask - _dilate(_erode(mask)))
        spine = spine + F.relu(top - spine * top)
    return spine


def _erode(mask: Tensor) -> Tensor:
    """Minimum over the cross of face neighbours."""
    least = mask
    dimension = mask.ndim - 2
    pool = F.max_pool3d if dimension == 3 else F.max_pool2d
    for axis in range(dimension):
        window = [3 if each == axis else 1 for each in range(dimension)]
        least = torch.minimum(least, -pool(-mask, window, 1, [w // 2 for w in window]))
    return least


def _dilate(mask: Tensor) -> Tensor:
    """Maximum over the cube of neighbours."""
    return F.max_pool3d(mask, 3, 1, 1) if mask.ndim == 5 else F.max_pool2d(mask, 3, 1, 1)


def overlap(sums: Sums, batch_dice: bool, background: bool, reduce: Reduce) -> tuple[Tensor, Tensor, Tensor]:
    """(intersection, predicted, true), each (B, K), or (1, K) for the whole batch; class 0 only if `background`."""
    three = torch.stack([sums.intersection_BK, sums.predicted_BK, sums.true_BK])
    three = three if background else three[:, :, 1:]
    if batch_dice:
        three = reduce(three.sum(1, keepdim=True))
    return three[0], three[1], three[2]


def mean_of(values: Tensor, already_reduced: bool, reduce: Reduce) -> Tensor:
    """Mean of all entries, over all processes unless they hold the same values already."""
    if already_reduced:
        return values.mean()
    return ratio(values.sum(), torch.full((), values.numel(), device=values.device), reduce)


def _tversky_misses(
    logits: Tensor,
    target: Tensor,
    alpha: float,
    beta: float,
    batch_dice: bool,
    background: bool,
    smooth: float,
    reduce: Reduce,
) -> Tensor:
    inter, predicted, true = overlap(class_sums(logits, target), batch_dice, background, reduce)
    bottom = inter + alpha * (predicted - inter) + beta * (true - inter)
    return 1 - (inter + smooth) / (bottom + smooth).clamp(min=1e-8)
