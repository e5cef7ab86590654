"""Changes of intensity, each for the rows (one sample's channel each) that are hit: R rows of (Z, Y, X) or (Y, X).

Formulas as in nnU-Net's default trainer (Isensee et al. 2021); what happens to which row is drawn in `augment.py`.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_BLUR_VOXELS = 1.0


def places(chosen: Tensor, device: torch.device) -> Tensor | None:
    """Indices of the True entries on `device`, or None if there are none."""
    found = chosen.nonzero().flatten()
    return sent(found, device) if len(found) else None


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; a GPU need not have done what came before, for which a plain copy waits."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def change_rows(rows: Tensor, values: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Replace the rows whose value says that something happens (neither 0 nor 1) by their change."""
    hit = ((values != 0) & (values != 1)).reshape(len(values), -1).any(1)
    found = places(hit, rows.device)
    if found is not None:
        rows[found] = change(rows[found], values[hit])


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """One value per row, (R,), shaped to be multiplied with rows, on their device."""
    return sent(values.to(rows.dtype), rows.device).view(-1, *[1] * (rows.ndim - 1))


def blur(rows: Tensor, sigma_RD: Tensor) -> Tensor:
    """Gaussian of `sigma_RD` (at most 1) voxels, one axis after the other, cut off at 3 voxels, edges repeated."""
    reach = math.ceil(3 * LARGEST_BLUR_VOXELS)
    steps = torch.arange(-reach, reach + 1)
    weights_RDK = torch.exp(-0.5 * (steps / sigma_RD.unsqueeze(-1)) ** 2)
    weights_RDK = weights_RDK / weights_RDK.sum(-1, keepdim=True)
    for axis in range(1, rows.ndim):
        size = rows.shape[axis]
        repeated = torch.arange(-reach, size + reach, device=rows.device).clamp(0, size - 1)
        padded = rows.index_select(axis, repeated)
        rows = torch.zeros_like(rows)
        for k in range(len(steps)):
            rows.addcmul_(padded.narrow(axis, k, size), per_row(weights_RDK[:, axis - 1, k], rows))
    return rows


def brighten(rows: Tensor, factor_R: Tensor) -> Tensor:
    """Times a factor."""
    return rows * per_row(factor_R, rows)


def contrast(rows: Tensor, factor_R: Tensor) -> Tensor:
    """Stretch around the mean, clipped to the old range."""
    axes = tuple(range(1, rows.ndim))
    mean, low, high = rows.mean(axes, keepdim=True), rows.amin(axes, keepdim=True), rows.amax(axes, keepdim=True)
    return torch.minimum(torch.maximum((rows - mean) * per_row(factor_R, rows) + mean, low), high)


def coarsen(rows: Tensor, scale_R: Tensor, fixed_axes: int = 0) -> Tensor:
    """Down to `scale_R` of each axis by nearest, back up linearly."""
    changed = []
    for row, scale in zip(rows, scale_R.tolist(), strict=True):
        small = [s if a < fixed_axes else max(1, round(s * scale)) for a, s in enumerate(row.shape)]
        coarse = F.interpolate(row[None, None], small, mode="nearest-exact")
        changed.append(F.interpolate(coarse, row.shape, mode="trilinear" if row.ndim == 3 else "bilinear")[0, 0])
    return torch.stack(changed)


def coarsen_in_plane(rows: Tensor, scale_R: Tensor) -> Tensor:
    """`coarsen` slice by slice."""
    return coarsen(rows, scale_R, fixed_axes=1)


def gamma(rows: Tensor, gamma_R: Tensor) -> Tensor:
    """((x - min) / range)^gamma, then mean and standard deviation as before."""
    axes = tuple(range(1, rows.ndim))
    low, high = rows.amin(axes, keepdim=True), rows.amax(axes, keepdim=True)
    deviation, mean = torch.std_mean(rows, axes, correction=0, keepdim=True)
    bent = ((rows - low) / (high - low).clamp(min=1e-7)).pow(per_row(gamma_R, rows))
    bent_deviation, bent_mean = torch.std_mean(bent, axes, correction=0, keepdim=True)
    return (bent - bent_mean) * (deviation / bent_deviation.clamp(min=1e-7)) + mean


def gamma_inverted(rows: Tensor, gamma_R: Tensor) -> Tensor:
    """`gamma` of the negative."""
    return -gamma(-rows, gamma_R)
