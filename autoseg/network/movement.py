"""Reads samples that are turned, scaled or bent, at the places they come from.

A matrix and a bent control grid say these places; `augment.py` draws both.
Legend: M moved samples, C channel, Z Y X voxels (2D: Y X), D moved axes, P points of the control grid per axis.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LINEAR_LABELS = 4
"""Up to this many classes labels are interpolated linearly; with more that would cost more than the image does."""
MATRICES, BEND, SPLINE = "matrices", "bend", "spline_"
"""Names of what `places_of` returns; there is a spline for every axis."""


def places_of(
    matrix_MDD: np.ndarray, bend_MDP: np.ndarray | None, size_voxels: Sequence[int], patch_voxels: Sequence[int]
) -> dict[str, np.ndarray]:
    """What `grid` needs on the device to find the places of patches in images of another size.

    In units of half the axis length; shifted so that the identity is exactly the centre crop also when one of
    the two sizes is odd.

    Args:
        matrix_MDD, bend_MDP: see `augment.Drawn`, of the axes that move.
    """
    old, new = np.array(size_voxels, np.float64), np.array(patch_voxels, np.float64)
    shift = (old - new) // 2 + (new - old) / 2
    turn = matrix_MDD.astype(np.float64) * new / old[:, None]
    shifts = np.broadcast_to(2 * shift / old, turn.shape[:2])[:, :, None]
    found = {MATRICES: np.concatenate((turn[:, ::-1, ::-1], shifts[:, ::-1]), 2).astype(np.float32)}
    if bend_MDP is not None:
        in_grid_MDP = np.einsum("mij,mj...->mi...", turn * 2 / new, bend_MDP.astype(np.float64))[:, ::-1]
        found[BEND] = np.ascontiguousarray(in_grid_MDP, np.float32)
        for axis, (voxels, points) in enumerate(zip(patch_voxels, bend_MDP.shape[2:], strict=True)):
            found[f"{SPLINE}{axis}"] = _spline(voxels, points)
    return found


def _spline(voxels: int, points: int) -> np.ndarray:
    """(voxels, points) float32: the weights of a control grid's points at each voxel of an axis, cubic B-splines."""
    place = (np.arange(voxels) + 0.5) * (points - 3) / voxels
    away = np.abs(place[:, None] - np.arange(-1, points - 1))
    weights = np.where(away < 1, 2 / 3 - away**2 + away**3 / 2, (2 - away).clip(min=0) ** 3 / 6)
    return weights.astype(np.float32)


def grid(there: Mapping[str, Tensor], patch_voxels: Sequence[int]) -> Tensor:
    """Sampling places of the moved samples for `grid_sample` (align_corners False): (M, *patch, D), last axis first."""
    matrices = there[MATRICES]
    places = F.affine_grid(matrices, [len(matrices), 1, *patch_voxels], align_corners=False)
    if BEND not in there:
        return places
    return places + between_points(there[BEND], there).movedim(1, -1)


def between_points(values: Tensor, there: Mapping[str, Tensor]) -> Tensor:
    """Values (M, D, *points) of a control grid at each voxel of the patch, (M, D, *patch), by cubic B-splines."""
    for axis in range(values.ndim - 2):  # the new axis comes last
        values = torch.tensordot(values, there[f"{SPLINE}{axis}"], dims=([2], [1]))
    return values


def read_with_labels(
    image: Tensor, labels: Tensor, grid: Tensor, in_plane_only: bool, classes: int | None, outside: int = 0
) -> tuple[Tensor, Tensor]:
    """(M, C, ...) image and (M, 1, ...) labels at the grid, labels (M, ...) `outside` (0, -1); see `augment.apply`.

    Labels that are interpolated linearly are sampled as further channels of the image: places are worked out once. The
    label of outside is none of them: what the others lack is its share.
    """
    if classes is None or classes > LINEAR_LABELS:  # labels below 2^24 are exact in float32
        found = read((labels - outside).float(), grid, in_plane_only, "nearest")  # which is 0 outside
        return read(image, grid, in_plane_only, "bilinear"), found.squeeze(1).to(labels.dtype) + outside
    names = torch.arange(1 + outside, classes, device=labels.device, dtype=labels.dtype)
    if outside == 0 and (labels.device.type != "cpu" or bool((labels < 0).any())):  # a GPU would wait for the answer
        names = F.pad(names, (0, 1), value=-1)
    hot = labels == names.view(1, -1, *[1] * (labels.ndim - 2))
    sampled = read(torch.cat((image, hot.float()), 1), grid, in_plane_only, "bilinear")
    image, shares = sampled.split((image.shape[1], len(names)), 1)
    best, place = shares.max(1)
    return image, names[place].masked_fill_(1 - shares.sum(1) >= best, outside)


def read(values: Tensor, grid: Tensor, in_plane_only: bool, mode: str) -> Tensor:
    """(M, C, Z, Y, X) or (M, C, Y, X) at the grid, 0 outside. In-plane grids have no Z: it is folded into channels."""
    if in_plane_only:
        return _read_at(values.flatten(1, 2), grid, mode).unflatten(1, values.shape[1:3])
    threads = torch.get_num_threads()
    if values.device.type != "cpu" or values.ndim == 4 or len(values) % threads == 0:
        return _read_at(values, grid, mode)
    # a CPU gives each volume to one thread, so each becomes as many as there are threads, thinner ones
    parts = next(parts for parts in range(threads, 0, -1) if grid.shape[1] % parts == 0)
    found = [
        _read_at(one.expand(parts, *one.shape), places.unflatten(0, (parts, -1)), mode).transpose(0, 1).flatten(1, 2)
        for one, places in zip(values, grid, strict=True)
    ]
    return torch.stack(found)


def _read_at(values: Tensor, grid: Tensor, mode: str) -> Tensor:
    return F.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)
