"""Distances to label boundaries on the training device, exact up to a radius.

Beyond it they are clipped.
Legend: B batch, K class, Z Y X voxels (2D: Y X). Distances are Euclidean, in voxels, between voxel centres.
No network learns through them, and compiled their loops would unroll into thousands of operations: they stay eager.
"""

import torch
from torch import Tensor


@torch.compiler.disable
def distance_to(mask: Tensor, radius: int) -> Tensor:
    """Distance of every voxel to the nearest True voxel of its sample, at most `radius`.

    The squared distance is separable: along each axis in turn D(i) = min over |o| <= radius of D(i + o) + o^2
    (Felzenszwalb and Huttenlocher 2012, with a window in place of the lower envelope, which suits GPUs).

    Args:
        mask: (B, Z, Y, X) or (B, Y, X) bool.
        radius: voxels; larger distances (also where nothing is True) are given as `radius`.
    Returns float32 of the same shape.
    """
    far = float(radius * radius)
    squared = torch.where(mask, 0.0, far)
    for axis in range(1, mask.ndim):
        size = mask.shape[axis]
        nearest = squared.clone()
        for offset in range(1, min(radius, size)):  # at offset = radius the result is clipped anyway
            length = size - offset
            stepped = squared + float(offset * offset)
            ahead, behind = nearest.narrow(axis, offset, length), nearest.narrow(axis, 0, length)
            ahead.copy_(torch.minimum(ahead, stepped.narrow(axis, 0, length)))
            behind.copy_(torch.minimum(behind, stepped.narrow(axis, offset, length)))
        squared = nearest
    return squared.clamp(max=far).sqrt()


@torch.compiler.disable
def signed_distances(target: Tensor, classes: int, radius: int) -> Tensor:
    """Per class the distance to the class outside of it, and minus (the distance to the rest, less 1) inside.

    Classes that a sample does not contain get 0 everywhere. Ignored voxels count as outside.

    Args:
        target: (B, Z, Y, X) or (B, Y, X) class indices, -1 = ignore.
        radius: voxels; distances are clipped there.
    Returns (B, classes, ...) float32.
    """
    maps = []
    for label in range(classes):
        inside = target == label
        signed = distance_to(inside, radius) - (distance_to(~inside, radius) - 1).clamp(min=0)
        present = inside.flatten(1).any(1).view(-1, *[1] * (target.ndim - 1))
        maps.append(torch.where(present, signed, 0.0))
    return torch.stack(maps, dim=1)


def boundary_voxels(target: Tensor) -> Tensor:
    """True where a face neighbour has another label; ignored voxels have and make no boundary.

    Args:
        target: (B, Z, Y, X) or (B, Y, X) class indices, -1 = ignore.
    """
    found = torch.zeros_like(target, dtype=torch.bool)
    for axis in range(1, target.ndim):
        length = target.shape[axis] - 1
        before, after = target.narrow(axis, 0, length), target.narrow(axis, 1, length)
        differs = (before != after) & (before >= 0) & (after >= 0)
        for start in (0, 1):
            found.narrow(axis, start, length).logical_or_(differs)
    return found
