"""The patches a configuration may have: the largest that spacing and median shape justify, and what it shrinks to.

Axes are those of the patch: Z Y X, or Y X in 2D. Source of the rules: nnU-Net's experiment planner (see topology.py).
"""

from collections.abc import Sequence
from math import prod

from autoseg.planning.topology import Topology, choose_topology

VOXELS_OF_FIRST_PATCH = {3: 256**3, 2: 2048**2}
LEAST_STAGES = 2


def choose_first_patch(spacing_mm: Sequence[float], median_shape_voxels: Sequence[int]) -> Topology:
    """The largest patch: as long in mm on every axis, 256^3 (2D: 2048^2) voxels, but not beyond the median shape."""
    density = [1.0 / each for each in spacing_mm]
    scale = (VOXELS_OF_FIRST_PATCH[len(density)] / prod(density)) ** (1.0 / len(density))
    wanted = [max(1, min(round(d * scale), s)) for d, s in zip(density, median_shape_voxels, strict=True)]
    return choose_topology(spacing_mm, wanted)


def shrink(now: Topology, spacing_mm: Sequence[float], median_shape_voxels: Sequence[int]) -> Topology | None:
    """The next smaller patch: the axis that is largest relative to the median shape loses one step; None at the end.

    The step is the divisor that the axis has *after* shrinking, so that no valid size is skipped (224 between 256 and
    192). Ties go to the last axis.
    """
    patch = list(now.patch_voxels)
    axis = max(range(len(patch)), key=lambda a: (patch[a] / median_shape_voxels[a], a))
    tried = list(patch)
    tried[axis] -= now.divisors[axis]
    if tried[axis] < 1:
        return None
    patch[axis] -= choose_topology(spacing_mm, tried).divisors[axis]
    smaller = choose_topology(spacing_mm, patch)
    if smaller.stages < LEAST_STAGES or prod(smaller.patch_voxels) >= prod(now.patch_voxels):
        return None
    return smaller


def patch_chain(spacing_mm: Sequence[float], median_shape_voxels: Sequence[int]) -> tuple[Topology, ...]:
    """All candidate patches, largest first; each is the `shrink` of the one before."""
    now: Topology | None = choose_first_patch(spacing_mm, median_shape_voxels)
    chain: list[Topology] = []
    while now is not None:
        chain.append(now)
        now = shrink(now, spacing_mm, median_shape_voxels)
    return tuple(chain)
