"""Whether a low-resolution configuration is worth having, and on which grid. Source: nnU-Net's experiment planner."""

from collections.abc import Callable
from math import prod

from autoseg.planning.grid import Grid, can_be_halved
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


def lowres_grid(full: Grid, patch_at: Callable[[Grid], Patch], start: Grid | None = None) -> Grid | str:
    """The finest coarser grid whose own patch, `patch_at(grid)`, covers a quarter of it; or why there is none.

    `start` continues from a grid found before, when its real patch turned out too small.
    """
    now = _next(full, start or full)
    while can_be_halved(now) and is_wanted(now, patch_at(now)):
        now = _next(full, now)
    saved = prod(full.median_shape_voxels) / prod(_exact_shape(full, now))
    if not can_be_halved(now):
        return "coarser grids get too small for a network before that changes"
    return now if saved >= LEAST_GAIN else "the grid that would change this has more than half of the voxels"


def describe(full: Grid, patch_voxels: Patch, why_not: str) -> Choice:
    """Whether there is a 3d_lowres, as a choice; `why_not` is empty where there is one, or none is wanted."""
    covered = f"the 3D patch {voxels(patch_voxels)} covers {percent(_share(full, patch_voxels))} of the median image"
    if not is_wanted(full, patch_voxels):
        because = f"{covered}, at least {percent(ENOUGH_SHARE)}: no second network is needed for context."
    elif why_not:
        because = f"{covered}, but {why_not}."
    else:
        why = "a coarser network sees the context, a second one refines it."
        because = f"{covered}, less than {percent(ENOUGH_SHARE)}; {why}"
    planned = is_wanted(full, patch_voxels) and not why_not
    return Choice(field="configurations.3d_lowres", value="yes, with 3d_cascade" if planned else "no", because=because)


def _next(full: Grid, now: Grid) -> Grid:
    spacing = coarser(now.spacing_mm)
    shape = resampled(full.median_shape_voxels, full.spacing_mm, spacing)
    return Grid("3d_lowres", 3, spacing, shape)


def _exact_shape(full: Grid, low: Grid) -> tuple[float, ...]:
    sizes = zip(full.median_shape_voxels, full.spacing_mm, low.spacing_mm, strict=True)
    return tuple(n * fine / coarse for n, fine, coarse in sizes)


def _share(grid: Grid, patch_voxels: Patch) -> float:
    return prod(patch_voxels) / prod(grid.median_shape_voxels)
