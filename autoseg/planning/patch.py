"""The patches that a configuration may have, from the largest downwards.

The largest is what spacing and median shape justify.
Axes are those of the patch: Z Y X, or Y X in 2D. Source of the rules: nnU-Net's experiment planner (see topology.py).
"""

from collections.abc import Sequence
from math import prod

from autoseg.planning.topology import SMALLEST_EDGE, Topology, choose_topology

VOXELS_OF_FIRST_PATCH = {3: 256**3, 2: 2048**2}
LEAST_STAGES = 2
SMALLEST_OUT_OF_TURN = 2 * SMALLEST_EDGE
"""Voxels that an axis keeps where it shrinks because another one cannot."""


def choose_first_patch(spacing_mm: Sequence[float], median_shape_voxels: Sequence[int]) -> Topology:
    """The largest patch: as long in mm on every axis, 256^3 (2D: 2048^2) voxels, but not beyond the median shape."""
    density = [1.0 / each for each in spacing_mm]
    scale = (VOXELS_OF_FIRST_PATCH[len(density)] / prod(density)) ** (1.0 / len(density))
    wanted = [max(1, min(round(d * scale), s)) for d, s in zip(density, median_shape_voxels, strict=True)]
    return choose_topology(spacing_mm, wanted)


def shrink(now: Topology, spacing_mm: Sequence[float], median_shape_voxels: Sequence[int]) -> Topology | None:
    """The next smaller patch: the axis that is largest relative to the median shape loses one step; None at the end.

    Where that gives no valid or no smaller patch (one voxel is left on the axis, or another one grows by rounding up),
    it is the next largest axis that stays at `SMALLEST_OUT_OF_TURN` or above. Ties go to the last axis.
    """
    share = [size / median for size, median in zip(now.patch_voxels, median_shape_voxels, strict=True)]
    first, *others = sorted(range(len(share)), key=lambda a: (share[a], a), reverse=True)
    for axis in (first, *others):
        smaller = _one_step_less(now, axis, spacing_mm)
        if smaller is None or (axis != first and smaller.patch_voxels[axis] < SMALLEST_OUT_OF_TURN):
            continue
        if smaller.stages >= LEAST_STAGES and prod(smaller.patch_voxels) < prod(now.patch_voxels):
            return smaller
    return None


def _one_step_less(now: Topology, axis: int, spacing_mm: Sequence[float]) -> Topology | None:
    """The patch with one step less on an axis; None where nothing is left of it.

    The step is the divisor that the axis has *after* shrinking, so that no valid size is skipped (224 between 256 and
    192).
    """
    tried, patch = list(now.patch_voxels), list(now.patch_voxels)
    tried[axis] -= now.divisors[axis]
    if tried[axis] < 1:
        return None
    patch[axis] -= choose_topology(spacing_mm, tried).divisors[axis]
    return choose_topology(spacing_mm, patch) if patch[axis] >= 1 else None


def patch_chain(spacing_mm: Sequence[float], median_shape_voxels: Sequence[int]) -> tuple[Topology, ...]:
    """All candidate patches, largest first; each is the `shrink` of the one before."""
    now: Topology | None = choose_first_patch(spacing_mm, median_shape_voxels)
    chain: list[Topology] = []
    while now is not None:
        chain.append(now)
        now = shrink(now, spacing_mm, median_shape_voxels)
    return tuple(chain)
