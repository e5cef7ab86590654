"""Changes of intensity: blur, brightness, contrast, low resolution, gamma.

Each is for the rows (one sample's channel each) that are hit: R rows of (Z, Y, X) or (Y, X). Formulas as in nnU-Net's
default trainer (Isensee et al. 2021); what happens to which row is drawn in `augment.py`.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_BLUR_VOXELS = 1.0
REACH = math.ceil(3 * LARGEST_BLUR_VOXELS)
"""Neighbours on each side that a blur takes in."""


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """One value per row, (R,), shaped to be multiplied with rows."""
    return values.view(-1, *[1] * (rows.ndim - 1))


def blur_weights(sigma_RD: np.ndarray) -> np.ndarray:
    """(R, D, K) float32: the Gaussians that `blur` takes, of `sigma_RD` (at most 1) voxels, cut off at 3 voxels."""
    steps = np.arange(-REACH, REACH + 1)
    weights_RDK = np.exp(-0.5 * (steps / sigma_RD[:, :, None].astype(np.float64)) ** 2)
    return (weights_RDK / weights_RDK.sum(-1, keepdims=True)).astype(np.float32)


def blur(rows: Tensor, weights_RDK: Tensor) -> Tensor:
    """Weighted sums of neighbours, one axis after the other, edges repeated."""
    for axis in range(1, rows.ndim):
        size = rows.shape[axis]
        repeated = torch.arange(-REACH, size + REACH, device=rows.device).clamp(0, size - 1)
        padded = rows.index_select(axis, repeated)
        weights_KR = weights_RDK[:, axis - 1].T
        rows = padded.narrow(axis, 0, size) * per_row(weights_KR[0], rows)
        for k in range(1, len(weights_KR)):
            rows.addcmul_(padded.narrow(axis, k, size), per_row(weights_KR[k], rows))
    return rows


def brighten(rows: Tensor, factor_R: Tensor) -> Tensor:
    """Times a factor."""
    return rows * per_row(factor_R, rows)


def contrast(rows: Tensor, factor_R: Tensor) -> Tensor:
    """Stretch around the mean, clipped to the old range."""
    flat = rows.flatten(1)
    low, high = flat.aminmax(dim=1, keepdim=True)
    stretched = torch.lerp(flat.mean(1, keepdim=True), flat, factor_R.unsqueeze(1))
    return stretched.clamp(low, high).view_as(rows)


def coarsen(rows: Tensor, scale_R: Tensor, fixed_axes: int = 0) -> Tensor:
    """Down to `scale_R` (on the host) of each axis by nearest, back up linearly."""
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
    flat = rows.flatten(1)
    low, high = flat.aminmax(dim=1, keepdim=True)
    deviation, mean = torch.std_mean(flat, 1, correction=0, keepdim=True)
    bent = ((flat - low) / (high - low).clamp(min=1e-7)).pow(gamma_R.unsqueeze(1))
    bent_deviation, bent_mean = torch.std_mean(bent, 1, correction=0, keepdim=True)
    return torch.addcmul(mean, bent - bent_mean, deviation / bent_deviation.clamp(min=1e-7)).view_as(rows)


def gamma_inverted(rows: Tensor, gamma_R: Tensor) -> Tensor:
    """`gamma` of the negative."""
    return -gamma(-rows, gamma_R)
