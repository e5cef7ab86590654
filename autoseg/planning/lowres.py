"""Whether a low-resolution configuration is worth having, and on which grid. Source: nnU-Net's experiment planner."""

from collections.abc import Callable
from math import prod

from autoseg.planning.grid import Grid
from autoseg.planning.search import Patch
from autoseg.planning.spacing import coarser, resampled
from autoseg.planning.wording import percent, voxels
from autoseg.records import Choice

ENOUGH_SHARE = 0.25
"""A 3D patch that covers less of the median image lacks context; so a coarser grid is planned as well."""
LEAST_GAIN = 2.0
"""A low resolution that saves less than this factor in voxels is dropped."""


def is_wanted(grid: Grid, patch_voxels: Patch) -> bool:
    """True when the patch covers less than a quarter of the median shape."""
    return _share(grid, patch_voxels) < ENOUGH_SHARE


def lowres_grid(full: Grid, patch_at: Callable[[Grid], Patch], start: Grid | None = None) -> Grid | None:
    """The finest coarser grid whose own patch, `patch_at(grid)`, covers a quarter of it; None when it saves too little.

    `start` continues from a grid found before, when its real patch turned out too small.
    """
    now = _next(full, start or full)
    while is_wanted(now, patch_at(now)):
        now = _next(full, now)
    saved = prod(full.median_shape_voxels) / prod(_exact_shape(full, now))
    return now if saved >= LEAST_GAIN else None


def describe(full: Grid, patch_voxels: Patch, low: Grid | None) -> Choice:
    """Whether there is a 3d_lowres, as a choice."""
    covered = f"the 3D patch {voxels(patch_voxels)} covers {percent(_share(full, patch_voxels))} of the median image"
    if not is_wanted(full, patch_voxels):
        because = f"{covered}, at least {percent(ENOUGH_SHARE)}: no second network is needed for context."
    elif low is None:
        because = f"{covered}, but the grid that would change this has more than half of the voxels."
    else:
        why = "a coarser network sees the context, a second one refines it."
        because = f"{covered}, less than {percent(ENOUGH_SHARE)}; {why}"
    return Choice(
        field="configurations.3d_lowres", value="no" if low is None else "yes, with 3d_cascade", because=because
    )


def _next(full: Grid, now: Grid) -> Grid:
    spacing = coarser(now.spacing_mm)
    shape = resampled(full.median_shape_voxels, full.spacing_mm, spacing)
    return Grid("3d_lowres", 3, spacing, shape)


def _exact_shape(full: Grid, low: Grid) -> tuple[float, ...]:
    sizes = zip(full.median_shape_voxels, full.spacing_mm, low.spacing_mm, strict=True)
    return tuple(n * fine / coarse for n, fine, coarse in sizes)


def _share(grid: Grid, patch_voxels: Patch) -> float:
    return prod(patch_voxels) / prod(grid.median_shape_voxels)
