"""Sums of two losses, a region's and a pixel's, each with its weight.

Legend and arguments as in `losses.py`; the options of each part are explained in `losses_pixel` and `losses_region`.
"""

from collections.abc import Sequence

from torch import Tensor

from autoseg.network.losses_pixel import boundary_weights, ce_of, focal, topk_ce, weighted_ce_of
from autoseg.network.losses_region import boundary, cldice, dice, dice_of
from autoseg.network.losses_sums import Reduce, alone, class_sums


def dice_ce(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    batch_dice: bool = False,
    background: bool = False,
    squared: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """dice_weight * `dice` + ce_weight * `ce`, from one softmax (Isensee et al. 2021). Range [0, inf)."""
    sums = class_sums(logits, target, square=squared)
    region = dice_of(sums, batch_dice=batch_dice, background=background, smooth=smooth, reduce=reduce)
    return dice_weight * region + ce_weight * ce_of(sums, reduce=reduce)


def dice_weighted_ce(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    ce_weight: float = 1.0,
    class_weights: Sequence[float] | None = None,
    border: float = 10.0,
    sigma: float = 3.0,
    batch_dice: bool = False,
    background: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """dice_weight * `dice` + ce_weight * `weighted_ce`, from one softmax. Range [0, inf)."""
    weight = boundary_weights(target, border, sigma)
    sums = class_sums(logits, target, weight=weight)
    region = dice_of(sums, batch_dice=batch_dice, background=background, smooth=smooth, reduce=reduce)
    return dice_weight * region + ce_weight * weighted_ce_of(sums, target, weight, class_weights, reduce)


def dice_focal(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    focal_weight: float = 1.0,
    gamma: float = 2.0,
    alpha: float = -1.0,
    class_weights: Sequence[float] | None = None,
    batch_dice: bool = False,
    background: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """dice_weight * `dice` + focal_weight * `focal` (Zhu et al. 2019, AnatomyNet). Range [0, inf)."""
    region = dice(logits, target, batch_dice=batch_dice, background=background, smooth=smooth, reduce=reduce)
    pixel = focal(logits, target, gamma=gamma, alpha=alpha, class_weights=class_weights, reduce=reduce)
    return dice_weight * region + focal_weight * pixel


def dice_topk(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    topk_weight: float = 1.0,
    k: float = 0.1,
    batch_dice: bool = False,
    background: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """dice_weight * `dice` + topk_weight * `topk_ce`. Range [0, inf)."""
    region = dice(logits, target, batch_dice=batch_dice, background=background, smooth=smooth, reduce=reduce)
    return dice_weight * region + topk_weight * topk_ce(logits, target, k=k, reduce=reduce)


def dice_boundary(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 1.0,
    boundary_weight: float = 0.01,
    radius: int = 16,
    batch_dice: bool = False,
    background: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """dice_weight * `dice` + boundary_weight * `boundary` (Kervadec et al. 2019). Range from slightly below 0."""
    region = dice(logits, target, batch_dice=batch_dice, background=background, smooth=smooth, reduce=reduce)
    return dice_weight * region + boundary_weight * boundary(logits, target, radius=radius, reduce=reduce)


def dice_cldice(
    logits: Tensor,
    target: Tensor,
    *,
    dice_weight: float = 0.5,
    cldice_weight: float = 0.5,
    steps: int = 3,
    batch_dice: bool = False,
    background: bool = False,
    smooth: float = 1e-5,
    reduce: Reduce = alone,
) -> Tensor:
    """dice_weight * `dice` + cldice_weight * `cldice` (Shit et al. 2021, equation 4). Range [0, 1] with weights 0.5."""
    region = dice(logits, target, batch_dice=batch_dice, background=background, smooth=smooth, reduce=reduce)
    return dice_weight * region + cldice_weight * cldice(logits, target, steps=steps, reduce=reduce)
