"""Changing the voxel grid of images and label maps.

Axes: C channel, Z Y X voxels. Interpolation on a regular grid is separable, so each axis is one matrix product with a
small operator (new, old); BLAS does the rest. The operators are those of a spline with edge values continued and
half-pixel centres (Unser, "Splines: a perfect fit for signal and image processing", 1999), as in
`skimage.transform.resize(mode="edge", anti_aliasing=False)`.
A thick axis (spacing more than `anisotropy` times the finest) is resampled by nearest neighbour, because between two
slices that are far apart there is nothing to interpolate.
"""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import numpy as np
from scipy import ndimage

from autoseg.errors import UserError

Shape3 = tuple[int, int, int]

EDGE_VOXELS = 12
"""Voxels to continue the edge before the spline filter: its impulse response is below 1e-7 there."""
NEGLIGIBLE = 1e-7
"""Weights smaller than this are left out of a product; float32 would not show them."""
BLOCK = 64
"""Rows of an operator per matrix product: few enough to skip most of its zeros, enough to keep BLAS busy."""
TIE = 1e-5
"""Advantage of the nearest label where two labels are equally likely."""


def resampled_shape(shape: Sequence[int], spacing_mm: Sequence[float], target_mm: Sequence[float | None]) -> Shape3:
    """Voxels per axis (Z Y X) at spacing `target_mm`; None keeps an axis. At least 1."""
    depth, height, width = (
        int(size) if target is None else max(1, round(int(size) * float(spacing) / float(target)))
        for size, spacing, target in zip(shape, spacing_mm, target_mm, strict=True)
    )
    return depth, height, width


def thick_axis(
    spacing_mm: Sequence[float], target_mm: Sequence[float | None], anisotropy: float = 3.0
) -> int | None:
    """The axis (0 Z, 1 Y, 2 X) with spacing more than `anisotropy` times the finest one, or None.

    The present spacing decides; only if it is not anisotropic, the target's (where None, an axis keeps its own). None
    also when a second axis has the same spacing within a thousandth.
    """
    kept = [own if target is None else target for own, target in zip(spacing_mm, target_mm, strict=True)]
    for spacing in (spacing_mm, kept):
        if max(spacing) <= anisotropy * min(spacing):
            continue
        thickest = [axis for axis in range(len(spacing)) if spacing[axis] >= max(spacing) * (1 - 1e-3)]
        return thickest[0] if len(thickest) == 1 else None
    return None


def resample_image(
    image_CZYX: np.ndarray,
    spacing_mm: Sequence[float],
    target_mm: Sequence[float | None],
    new_shape: Sequence[int],
    order: int = 3,
    anisotropy: float = 3.0,
) -> np.ndarray:
    """Interpolate every channel to `new_shape` (Z Y X); float32, clipped to the range of the input.

    Args:
        spacing_mm: of the image, Z Y X; it only decides about a thick axis.
        target_mm: wanted, not what `new_shape` comes to; it decides about a thick axis too. None keeps an axis.
        order: 0 nearest, 1 linear, 3 cubic spline.

    Returns the input itself when the shape does not change (and it is float32 already).
    """
    image_CZYX = np.asarray(image_CZYX, np.float32)
    old, new = image_CZYX.shape[1:], tuple(int(size) for size in new_shape)
    if old == new:
        return image_CZYX
    thick = thick_axis(spacing_mm, target_mm, anisotropy)
    resampled_CZYX = np.empty((len(image_CZYX), *new), np.float32)
    for index, channel_ZYX in enumerate(image_CZYX):
        resampled_CZYX[index] = _resample_channel(channel_ZYX, new, order, thick)
    return resampled_CZYX


def resample_labels(
    labels_ZYX: np.ndarray,
    spacing_mm: Sequence[float],
    target_mm: Sequence[float | None],
    new_shape: Sequence[int],
    order: int = 1,
    anisotropy: float = 3.0,
) -> np.ndarray:
    """Resample a label map to `new_shape`: each label as a 0/1 image, the largest value wins, ties go to the nearest.

    Same dtype as the input; negative labels are labels like all others. Needs three arrays of the new shape, however
    many labels there are. Arguments as for `resample_image`. Returns the input itself when the shape does not change.
    """
    old, new = labels_ZYX.shape, tuple(int(size) for size in new_shape)
    if old == new:
        return labels_ZYX
    thick = thick_axis(spacing_mm, target_mm, anisotropy)
    if thick is not None:
        labels_ZYX = _take_nearest(labels_ZYX, thick, new[thick])
    nearest_ZYX = labels_ZYX
    for axis in range(3):
        nearest_ZYX = _take_nearest(nearest_ZYX, axis, new[axis])
    if order == 0 or labels_ZYX.shape == new:
        return nearest_ZYX
    return _most_likely_labels(labels_ZYX, nearest_ZYX, order)


def operators(
    old_shape: Sequence[int],
    new_shape: Sequence[int],
    spacing_mm: Sequence[float],
    target_mm: Sequence[float | None],
    order: int = 1,
    anisotropy: float = 3.0,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Per axis Z Y X the matrix (new, old) that `resample_image` would apply, or None where the size stays.

    For whoever must resample piece by piece. The thick axis gets the matrix of nearest neighbours.
    """
    thick = thick_axis(spacing_mm, target_mm, anisotropy)
    z, y, x = (
        None if old == new else axis_matrix(old, new, 0 if axis == thick else order)
        for axis, (old, new) in enumerate(zip(old_shape, new_shape, strict=True))
    )
    return z, y, x


def _resample_channel(channel_ZYX: np.ndarray, new: Sequence[int], order: int, thick: int | None) -> np.ndarray:
    """One channel; with a thick axis every slice is a 2D image of its own, clipped to its own range."""
    if thick is not None and new[thick] < channel_ZYX.shape[thick]:
        channel_ZYX = _take_nearest(channel_ZYX, thick, new[thick])
    in_plane = None if thick is None else tuple(axis for axis in range(3) if axis != thick)
    low = channel_ZYX.min(axis=in_plane, keepdims=True)
    high = channel_ZYX.max(axis=in_plane, keepdims=True)
    axes = [axis for axis in range(3) if axis != thick and new[axis] != channel_ZYX.shape[axis]]
    for axis in sorted(axes, key=lambda axis: new[axis] / channel_ZYX.shape[axis]):  # shrink first: less to do after
        channel_ZYX = _along(channel_ZYX, axis, axis_matrix(channel_ZYX.shape[axis], new[axis], order))
    if order > 1 and axes:
        np.clip(channel_ZYX, low, high, out=channel_ZYX)
    if thick is not None:
        channel_ZYX = _take_nearest(channel_ZYX, thick, new[thick])
    return channel_ZYX


def _most_likely_labels(labels_ZYX: np.ndarray, nearest_ZYX: np.ndarray, order: int) -> np.ndarray:
    """Argmax over the interpolated 0/1 images. The label with the largest box is not interpolated: it has the rest.

    Interpolation weights sum to 1, so the rest is 1 minus the sum of all other labels.
    """
    matrices = [axis_matrix(old, new, order) for old, new in zip(labels_ZYX.shape, nearest_ZYX.shape, strict=True)]
    found = sorted(_boxes(labels_ZYX), key=lambda label_and_box: _voxels(label_and_box[1]))
    common, others = found[-1][0], sorted(found[:-1], key=lambda label_and_box: label_and_box[0])
    rest_ZYX = np.ones(nearest_ZYX.shape, np.float32)
    best_ZYX = np.zeros(nearest_ZYX.shape, np.float32)
    winner_ZYX = np.full(nearest_ZYX.shape, common, labels_ZYX.dtype)
    for label, box in others:
        score_ZYX, target = _interpolate_label(labels_ZYX, label, box, matrices)
        rest_ZYX[target] -= score_ZYX
        score_ZYX[nearest_ZYX[target] == label] += TIE
        better_ZYX = score_ZYX > best_ZYX[target]
        np.copyto(best_ZYX[target], score_ZYX, where=better_ZYX)
        np.copyto(winner_ZYX[target], label, where=better_ZYX)
    rest_ZYX[nearest_ZYX == common] += TIE
    if others and common < others[0][0]:
        np.copyto(winner_ZYX, common, where=rest_ZYX >= best_ZYX)
    else:
        np.copyto(winner_ZYX, common, where=rest_ZYX > best_ZYX)
    return winner_ZYX


def _interpolate_label(
    labels_ZYX: np.ndarray, label: int, box: tuple[slice, ...], matrices: Sequence[np.ndarray]
) -> tuple[np.ndarray, tuple[slice, ...]]:
    """The 0/1 image of `label`, interpolated where it can be above 0, and where in the new grid that is."""
    score_ZYX = (labels_ZYX[box] == label).astype(np.float32)
    target = []
    for axis, (matrix, old) in enumerate(zip(matrices, box, strict=True)):
        columns = matrix[:, old]
        reached = np.flatnonzero(np.abs(columns).max(axis=1) > NEGLIGIBLE)
        rows = slice(int(reached[0]), int(reached[-1]) + 1) if len(reached) else slice(0, 0)
        score_ZYX = _along(score_ZYX, axis, columns[rows])
        target.append(rows)
    return score_ZYX, tuple(target)


def _boxes(labels_ZYX: np.ndarray) -> Iterator[tuple[int, tuple[slice, ...]]]:
    """Each label present and its bounding box, in one pass."""
    lowest = int(labels_ZYX.min())
    from_one_ZYX = labels_ZYX.astype(np.int32) - (lowest - 1)
    for index, box in enumerate(ndimage.find_objects(from_one_ZYX)):
        if box is not None:
            yield index + lowest, box


def _voxels(box: tuple[slice, ...]) -> int:
    return int(np.prod([each.stop - each.start for each in box]))


def _take_nearest(array_ZYX: np.ndarray, axis: int, new: int) -> np.ndarray:
    """Nearest neighbour along one axis, half-pixel centres."""
    old = array_ZYX.shape[axis]
    return array_ZYX if old == new else np.take(array_ZYX, _nearest(old, new), axis)


def _along(array_ZYX: np.ndarray, axis: int, matrix: np.ndarray) -> np.ndarray:
    """Multiply `matrix` (new, old) into one axis of a float32 array, leaving out blocks of the matrix that are 0."""
    new, old = matrix.shape
    if new == old and np.array_equal(matrix, np.eye(new, dtype=matrix.dtype)):
        return array_ZYX
    array_ZYX = np.ascontiguousarray(array_ZYX)
    shape = [*array_ZYX.shape]
    shape[axis] = new
    before, after = int(np.prod(shape[:axis])), int(np.prod(shape[axis + 1 :]))
    result = np.empty((before, new, after) if axis < 2 else (before, new), np.float32)
    source = array_ZYX.reshape((before, old, after) if axis < 2 else (before, old))
    for start in range(0, new, BLOCK):
        rows = matrix[start : start + BLOCK]
        used = np.flatnonzero(np.abs(rows).max(axis=0) > NEGLIGIBLE)
        if not len(used):
            result[:, start : start + BLOCK] = 0
            continue
        first, last = int(used[0]), int(used[-1]) + 1
        if axis < 2:
            np.matmul(rows[:, first:last], source[:, first:last], out=result[:, start : start + BLOCK])
        else:
            np.matmul(source[:, first:last], rows[:, first:last].T, out=result[:, start : start + BLOCK])
    return result.reshape(shape)


def axis_matrix(old: int, new: int, order: int) -> np.ndarray:
    """The linear operator (new, old) float32 that interpolates `old` samples at `new` positions; read-only.

    Small ones are kept (256 MiB of them at most); large ones of images that all differ would fill the memory.

    Args:
        order: 0 nearest, 1 linear, 3 cubic spline. Raises UserError for another one.
    """
    return (_kept_matrix if old * new <= KEPT_ENTRIES else _matrix)(old, new, order)


def _matrix(old: int, new: int, order: int) -> np.ndarray:
    if old == new:
        matrix = np.eye(old, dtype=np.float32)
    elif order in SPLINES:
        matrix = SPLINES[order](old, new).astype(np.float32)
    else:
        raise UserError(f"Interpolation order {order} is not one of {sorted(SPLINES)}.", fix="Change it in the plan.")
    matrix.flags.writeable = False
    return matrix


KEPT_ENTRIES = 2**18
"""Larger matrices are made anew each time."""
_kept_matrix = lru_cache(maxsize=256)(_matrix)


def _positions(old: int, new: int) -> np.ndarray:
    """Where the centres of the new voxels lie, in old voxels (0 is the centre of the first)."""
    return (np.arange(new) + 0.5) * (old / new) - 0.5


def _nearest(old: int, new: int) -> np.ndarray:
    """Index of the old voxel that holds the centre of each new one, in whole numbers: no rounding errors."""
    return (2 * np.arange(new) + 1) * old // (2 * new)


def _nearest_operator(old: int, new: int) -> np.ndarray:
    return np.eye(old)[_nearest(old, new)]


def _linear_operator(old: int, new: int) -> np.ndarray:
    position = np.clip(_positions(old, new), 0, old - 1)
    left = np.minimum(position.astype(int), max(old - 2, 0))
    share = (position - left)[:, None]
    samples = np.eye(old)
    return (1 - share) * samples[left] + share * samples[np.minimum(left + 1, old - 1)]


def _cubic_operator(old: int, new: int) -> np.ndarray:
    """Spline coefficients of each unit sample (edge continued), weighted with the cubic B-spline at each position."""
    samples = np.pad(np.eye(old), ((EDGE_VOXELS, EDGE_VOXELS), (0, 0)), mode="edge")
    coefficients = ndimage.spline_filter1d(samples, 3, axis=0, mode="mirror")
    position = _positions(old, new) + EDGE_VOXELS
    left = np.floor(position).astype(int)
    t = (position - left)[:, None]
    weights = ((1 - t) ** 3, 4 - 6 * t**2 + 3 * t**3, 1 + 3 * t + 3 * t**2 - 3 * t**3, t**3)
    return sum(weight / 6 * coefficients[left + offset] for offset, weight in zip((-1, 0, 1, 2), weights, strict=True))


SPLINES = {0: _nearest_operator, 1: _linear_operator, 3: _cubic_operator}
