"""Learning from other networks: the loss, and probabilities in 8 bits.

Legend: B batch, K class (or region), Z Y X voxels (2D: Y X).
The loss is that of Hinton, Vinyals & Dean, Distilling the Knowledge in a Neural Network, 2015, section 2, per voxel:
the teachers' probabilities are softened by a temperature, and the term is multiplied by its square, so that its
gradient keeps its size. What a network learns from here is one tensor (B, 1 + K, ...) float32: label indices (-1:
ignored), then the teachers' probabilities, which sum to less than a half where there are none. The probabilities of
regions say nothing of that by their sum, so there one more channel stands before them, 1 where teachers say something.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from autoseg.network.losses import Supervised, supervision_weights
from autoseg.network.losses_region import mean_of
from autoseg.network.losses_sums import Reduce, alone, wide

LARGEST_LOGIT = 13.8
"""Of 1e-6: less would lift impossible classes, of which there may be hundreds; more would be spent on nothing."""
STEPS = 254
LEAST = 1e-6
"""Smaller probabilities of teachers count as this."""
LEAST_SUM = 0.5
"""Voxels of which teachers say less than this in all lie mostly outside the image: there is nothing to learn there."""
SURELY_INSIDE = 0.9
"""From here on the label of a moved voxel comes from inside the image, whether it was interpolated or the nearest."""


def distilling(
    labels_loss: Supervised, temperature: float, labels_weight: float, regions: bool = False, reduce: Reduce = alone,
    overlap: Supervised | None = None,
) -> Supervised:  # fmt: skip
    """labels_weight * (loss against the labels) + (1 - labels_weight) * (temperature^2 * `divergence` + overlap).

    Samples without any label have no part in the first term, so their weight goes to the second one. The divergence is
    summed over the outputs of deep supervision with their usual weights; lower outputs learn from the mean of the
    probabilities in their cell.

    Args:
        labels_loss: of `losses.build`; it sees the label indices.
        overlap: likewise; it sees the classes that the teachers find most likely, or region by region, built for one,
            where they find it more likely than not. None: no such term. Without it the Dice of the labels' loss counts
            for less the more is taught (docs/decisions/ensembles-and-students.md).
        regions: outputs are regions, each with a probability of its own, instead of classes.
        reduce: as for `losses.build`.
    Returns a function of (logits: list, highest resolution first, or one tensor; target, see above).
    """

    def supervised(logits: list[Tensor] | Tensor, target: Tensor, *rest: Tensor) -> Tensor:
        outputs = [logits] if isinstance(logits, Tensor) else logits
        labels, teacher = target[:, 0].to(torch.int16), target[:, 1:]
        drawn_B = have_labels(labels, teacher, regions)
        labels = torch.where(drawn_B.view(-1, *[1] * (labels.ndim - 1)), labels, -1)
        total = labels_weight * labels_loss(logits, labels, *rest)
        taught = 1 - labels_weight * mean_of(drawn_B.float(), False, reduce)
        if overlap is not None:
            total = total + taught * _with_likeliest(overlap, outputs, teacher, regions)
        with torch.autocast(target.device.type, enabled=False):
            for output, weight in zip(outputs, supervision_weights(len(outputs)), strict=True):
                if weight > 0:
                    softer = divergence(output, pooled(teacher, output), temperature, regions, reduce)
                    total = total + taught * temperature**2 * weight * softer
        return total

    return supervised


def have_labels(labels: Tensor, teacher: Tensor, regions: bool = False) -> Tensor:
    """(B,) bool: which samples have a label somewhere inside the image.

    Around an image patches are filled with background, and that would be all that the labels of a sample without labels
    say. What teachers say is 0 there, and in between at the edge of an image that was moved.
    """
    return ((labels >= 0) & (_said(teacher, regions) >= SURELY_INSIDE)).flatten(1).any(1)


def _with_likeliest(overlap: Supervised, outputs: list[Tensor], teacher: Tensor, regions: bool) -> Tensor:
    """`overlap` with the classes that the teachers find most likely, or its mean over the regions."""
    known = _known(teacher, regions)
    if not regions:
        likeliest = teacher.max(1).indices  # argmax takes ten times as long on a CPU
        return overlap(outputs, torch.where(known, likeliest, -1).to(torch.int16))
    likely = torch.where(known.unsqueeze(1), teacher[:, 1:] >= teacher[:, :1] / 2, -1).to(torch.int16)
    each = [
        overlap([output[:, number : number + 1] for output in outputs], likely[:, number])
        for number in range(likely.shape[1])
    ]
    return torch.stack(each).mean()


def _known(teacher: Tensor, regions: bool) -> Tensor:
    """(B, ...) bool: where the teachers say something."""
    return _said(teacher, regions) >= LEAST_SUM


def _said(teacher: Tensor, regions: bool) -> Tensor:
    """(B, ...) how much the teachers say in all: 1 inside the image, 0 outside."""
    return teacher[:, 0] if regions else teacher.sum(1)


def divergence(
    logits: Tensor, teacher: Tensor, temperature: float, regions: bool = False, reduce: Reduce = alone
) -> Tensor:
    """Mean over voxels of KL(teacher || network), both at a temperature; for regions the sum of that of each region.

    Args:
        logits: (B, K, ...) of the network.
        teacher: what the teachers say, see above. It is brought to a sum of 1 here; voxels with less than `LEAST_SUM`
            do not count.
    """
    teacher, logits = wide(teacher), wide(logits)
    known = _known(teacher, regions)
    if regions:
        shares = teacher[:, 1:] / teacher[:, :1].clamp_min(LEAST_SUM)
        hard = torch.logit(shares.clamp(LEAST, 1 - LEAST)) / temperature
        soft, log_on, log_off = hard.sigmoid(), *_log_sigmoids(logits / temperature)
        log_own_on, log_own_off = _log_sigmoids(hard)
        each = (soft * (log_own_on - log_on) + (1 - soft) * (log_own_off - log_off)).sum(1)
        total = torch.where(known, each, 0.0).sum()
    else:
        total = _ClassDivergence.apply(logits, teacher, known.unsqueeze(1), temperature)
    return reduce(total) / reduce(known.sum().to(total.dtype)).clamp_min(1.0)


class _ClassDivergence(torch.autograd.Function):
    """Sum over the known voxels of KL(teacher || network), both at temperature T; keeps only its own gradient.

    With q the softened teacher and p = softmax(z / T): dKL/dz = (p - q) / T.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, teacher: Tensor, known: Tensor, temperature: float) -> Tensor:
        log_q = torch.log_softmax(teacher.clamp_min(LEAST).log().div_(temperature), 1)
        log_p = torch.log_softmax(logits / temperature, 1)
        q = log_q.exp().mul_(known)
        total = torch.sum(q * log_q.sub_(log_p))
        ctx.save_for_backward(log_p.exp_().mul_(known).sub_(q).div_(temperature))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor) -> tuple:
        (gradient,) = ctx.saved_tensors
        return gradient * d_total, None, None, None


def pooled(teacher: Tensor, output: Tensor) -> Tensor:
    """The mean of the teachers' probabilities in each cell of a lower output."""
    if teacher.shape[2:] == output.shape[2:]:
        return teacher
    pool = functional.adaptive_avg_pool3d if teacher.ndim == 5 else functional.adaptive_avg_pool2d
    return pool(teacher, tuple(output.shape[2:]))  # type: ignore[arg-type]


def _log_sigmoids(logits: Tensor) -> tuple[Tensor, Tensor]:
    return functional.logsigmoid(logits), functional.logsigmoid(-logits)


# ------------------------------------------------------------------------------------------------ in 8 bits


def to_8_bits(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities as uint8, evenly spaced in log(p / (1 - p)) from -13.8 to 13.8.

    What small probabilities say is what a teacher adds to the labels, so they are kept to within 6 % of their size down
    to 1e-6, and those near 1 likewise; at a half the error is below 0.014.
    """
    clipped = np.clip(probabilities.astype(np.float32), LEAST, 1 - LEAST)
    logits = np.log(clipped) - np.log1p(-clipped)
    scaled = (logits + LARGEST_LOGIT) * (STEPS / (2 * LARGEST_LOGIT))
    return np.clip(np.rint(scaled), 0, STEPS).astype(np.uint8)


def from_8_bits(stored: np.ndarray) -> np.ndarray:
    """The float32 probabilities that `to_8_bits` stored."""
    return TABLE[stored]


TABLE = (1 / (1 + np.exp(LARGEST_LOGIT - np.arange(256) * (2 * LARGEST_LOGIT / STEPS)))).astype(np.float32)
"""Probability of every stored value."""
