"""Connected components of label maps, and the rules that remove or fill some.

Axes: Z Y X voxels. `connectivity` counts how many coordinates may differ between neighbours: 1 faces, 2 edges, 3
corners. Components are found among runs (stretches of one label along X), of which there are far fewer than voxels,
for all labels in one pass; docs/decisions/connected-components.md measures this against three libraries.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from autoseg.errors import UserError
from autoseg.image.crop import fill_holes_in

Box = tuple[slice, ...]

SLAB_VOXELS = 1 << 22
MANY_RUNS = 1 / 16
"""Share of runs per voxel from which on (noise, not organs) a pass over voxels is faster than one over runs."""


class LabelComponents(NamedTuple):
    """Components of all labels of a map: entry i of `label_of` and `sizes_voxels` belongs to number i + 1."""

    numbers_ZYX: np.ndarray
    label_of: np.ndarray
    sizes_voxels: np.ndarray


def bounding_box(mask_ZYX: np.ndarray) -> Box | None:
    """The smallest box that holds all True voxels, or None for an empty mask."""
    box = []
    part = mask_ZYX
    for axis in range(mask_ZYX.ndim):
        others = tuple(a for a in range(mask_ZYX.ndim) if a != axis)
        used = np.flatnonzero(part.any(axis=others))
        if not used.size:
            return None
        bounds = slice(int(used[0]), int(used[-1]) + 1)
        part = part[(slice(None),) * axis + (bounds,)]
        box.append(bounds)
    return tuple(box)


def components(mask_ZYX: np.ndarray, connectivity: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Number the connected components of a mask.

    Args:
        mask_ZYX: bool (or 0/1) array of one to three axes.
        connectivity: 1 faces, 2 edges, 3 corners (at most the number of axes counts).

    Returns:
        int32 array of the same shape, 0 outside and 1..n on the components in scan order, and their n sizes in voxels.

    Raises:
        UserError: `connectivity` is not 1, 2 or 3.
    """
    found = label_components(mask_ZYX, connectivity)
    return found.numbers_ZYX, found.sizes_voxels


def label_components(labels_ZYX: np.ndarray, connectivity: int = 1) -> LabelComponents:
    """Number the connected components of every label above 0 in one pass; touching labels are never joined.

    Args:
        labels_ZYX: integer labels, one to three axes; 0 and below are outside.
        connectivity: 1 faces, 2 edges, 3 corners.

    Returns:
        numbers_ZYX int32 (0 outside, 1..n in scan order), and per component its label and its size in voxels.
    """
    numbers_ZYX = np.zeros(labels_ZYX.shape, np.int32)
    inside = bounding_box(labels_ZYX > 0)
    if inside is None:
        _check(connectivity)
        return LabelComponents(numbers_ZYX, np.zeros(0, np.int64), np.zeros(0, np.int64))
    count, number_of, runs = _numbered(labels_ZYX[inside], connectivity)
    numbers_ZYX[inside] = _painted(runs, number_of + 1, np.int32)
    sizes_voxels = np.bincount(number_of, runs.stops - runs.starts, minlength=count).astype(np.int64)
    label_of = np.zeros(count, np.int64)
    label_of[number_of] = runs.labels
    return LabelComponents(numbers_ZYX, label_of, sizes_voxels)


def slabs(shape: tuple[int, ...]) -> list[slice]:
    """Slices of the first axis that hold about 4 million voxels each, so that temporaries stay small."""
    rows = max(1, SLAB_VOXELS // max(1, int(np.prod(shape[1:]))))
    return [slice(start, start + rows) for start in range(0, shape[0], rows)]


def drop_small(mask_ZYX: np.ndarray, fraction: float = 1.0 / 3.0, connectivity: int = 1) -> np.ndarray:
    """The mask without the components smaller than `fraction` (0..1) of its largest one."""
    return _keep(mask_ZYX, connectivity, lambda sizes_voxels: sizes_voxels >= fraction * sizes_voxels.max())


def keep_largest(mask_ZYX: np.ndarray, connectivity: int = 1) -> np.ndarray:
    """The mask's largest component alone; of several equally large ones the first in scan order."""
    return _keep(
        mask_ZYX, connectivity, lambda sizes_voxels: np.arange(sizes_voxels.size) == int(np.argmax(sizes_voxels))
    )


def drop_volume(mask_ZYX: np.ndarray, minimum_voxels: float, connectivity: int = 1) -> np.ndarray:
    """The mask without the components of fewer than `minimum_voxels` voxels."""
    return _keep(mask_ZYX, connectivity, lambda sizes_voxels: sizes_voxels >= minimum_voxels)


def fill_holes(mask_ZYX: np.ndarray) -> np.ndarray:
    """The mask with its holes filled: background that cannot reach the outside across faces.

    A volume with one slice is filled in its plane: with the third axis counted, no background would be enclosed.
    """
    filled_ZYX = mask_ZYX.astype(bool)
    box = bounding_box(mask_ZYX)
    if box is not None:
        fill_holes_in(filled_ZYX[box], mask_ZYX.shape)
    return filled_ZYX


def _keep(mask_ZYX: np.ndarray, connectivity: int, wanted: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    """The components for which `wanted(sizes_voxels)` is True, as a new bool mask."""
    _check(connectivity)
    kept_ZYX = np.zeros(mask_ZYX.shape, bool)
    box = bounding_box(mask_ZYX)
    if box is None:
        return kept_ZYX
    count, number_of, runs = _numbered(mask_ZYX[box], connectivity)
    sizes_voxels = np.bincount(number_of, runs.stops - runs.starts, minlength=count).astype(np.int64)
    kept_ZYX[box] = _painted(runs, wanted(sizes_voxels)[number_of], bool)
    return kept_ZYX


# ------------------------------------------------------------------------------------------------ runs


class _Runs(NamedTuple):
    """Stretches of one label above 0 within a row of X, in scan order; `starts` and `stops` are flat indices."""

    shape: tuple[int, ...]
    starts: np.ndarray
    stops: np.ndarray
    labels: np.ndarray


def _runs(labels_ZYX: np.ndarray) -> _Runs:
    flat = np.ascontiguousarray(labels_ZYX).ravel()
    changes = np.empty(flat.size, bool)
    np.not_equal(flat[1:], flat[:-1], out=changes[1:])
    changes.reshape(-1, labels_ZYX.shape[-1])[:, 0] = True
    starts = np.flatnonzero(changes)
    stops = np.append(starts[1:], flat.size)
    labels = flat[starts]
    inside = labels > 0
    return _Runs(labels_ZYX.shape, starts[inside], stops[inside], labels[inside].astype(np.int64))


def _numbered(labels_ZYX: np.ndarray, connectivity: int) -> tuple[int, np.ndarray, _Runs]:
    """Number of components, the component 0.. of every run, and the runs."""
    _check(connectivity)
    runs = _runs(labels_ZYX)
    if runs.starts.size <= MANY_RUNS * labels_ZYX.size:
        return (*_joined(runs, connectivity), runs)
    from skimage.measure import label

    whole_ZYX = np.maximum(labels_ZYX.astype(np.int32), 0)
    found_ZYX, count = label(
        whole_ZYX, background=0, connectivity=min(connectivity, labels_ZYX.ndim), return_num=True
    )
    return int(count), found_ZYX.ravel()[runs.starts].astype(np.int64) - 1, runs


def _joined(runs: _Runs, connectivity: int) -> tuple[int, np.ndarray]:
    """Number of components, and the component 0.. of every run.

    Runs of neighbouring rows touch where their stretches overlap; with one more coordinate allowed to differ than the
    rows do, also where they are off by one. A run's place is its row times (width + 2) plus X, so that nothing reaches
    from the end of a row into the next.
    """
    depth, height, width = (*((1,) * (3 - len(runs.shape))), *runs.shape)
    rows, first = np.divmod(runs.starts, width)
    begins = rows * (width + 2) + first
    ends = begins + (runs.stops - runs.starts)
    pairs = []
    for dz, dy in ((0, 1), (1, -1), (1, 0), (1, 1)):
        off = connectivity - abs(dz) - abs(dy)
        if off < 0:
            continue
        z, y = np.divmod(rows, height)
        has_row = np.flatnonzero((z + dz < depth) & (y + dy >= 0) & (y + dy < height))
        step, reach = (dz * height + dy) * (width + 2), min(off, 1)
        low = np.searchsorted(ends, begins[has_row] + step - reach, side="right")
        high = np.searchsorted(begins, ends[has_row] + step + reach, side="left")
        counts = np.maximum(high - low, 0)
        one = np.repeat(has_row, counts)
        other = np.repeat(low - (np.cumsum(counts) - counts), counts) + np.arange(one.size)
        same = runs.labels[one] == runs.labels[other]
        pairs.append((one[same], other[same]))
    one, other = (np.concatenate(each) for each in zip(*pairs, strict=True))
    graph = sparse.coo_array((np.ones(one.size, bool), (one, other)), shape=(rows.size, rows.size))
    count, number_of = csgraph.connected_components(graph, directed=False)
    return int(count), number_of


def _painted(runs: _Runs, values: np.ndarray, kind: type) -> np.ndarray:
    """An array of the runs' shape with `values[i]` on run i and 0 outside."""
    size = int(np.prod(runs.shape))
    edges = np.empty(2 * runs.starts.size + 1, np.int64)
    edges[0:-1:2], edges[1::2], edges[-1] = runs.starts, runs.stops, size
    painted: np.ndarray = np.zeros(2 * runs.starts.size + 1, kind)
    painted[1::2] = values
    return np.repeat(painted, np.diff(edges, prepend=0)).reshape(runs.shape)


def _check(connectivity: int) -> None:
    if connectivity not in (1, 2, 3):
        raise UserError(f"connectivity is {connectivity}.", fix="It must be 1 (faces), 2 (edges) or 3 (corners).")
