"""The box of an image that holds anything: found, cut out, and put back.

Axes: C channel, Z Y X voxels. A box is ((z0, z1), (y0, y1), (x0, x1)), half open.
"""

from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from autoseg.image.volume import Box


def nonzero_mask(image_CZYX: np.ndarray) -> np.ndarray:
    """Voxels where any channel is not 0, with holes filled: bool Z Y X.

    A hole is zero voxels that no path over faces connects with the border of the image.
    """
    mask_ZYX = image_CZYX[0] != 0
    for channel_ZYX in image_CZYX[1:]:
        mask_ZYX |= channel_ZYX != 0
    inside_ZYX = crop(mask_ZYX, box_of(mask_ZYX))  # a view; what lies around the box is connected with the border
    if not inside_ZYX.all():
        fill_holes_in(inside_ZYX, mask_ZYX.shape)
    return mask_ZYX


def fill_holes_in(mask_ZYX: np.ndarray, whole: Sequence[int]) -> None:
    """Fill in place what no border touches, in a part of a mask of shape `whole` that holds all its True voxels.

    An axis of one voxel in the whole has no border: a slice is filled in its plane. Labelling the background once takes
    linear time, unlike dilation until nothing changes.
    """
    parts_ZYX, count = ndimage.label(~mask_ZYX)
    is_hole = np.ones(count + 1, bool)
    is_hole[0] = False  # the mask itself
    for axis in (axis for axis, voxels in enumerate(whole) if voxels > 1):
        for side in (0, -1):
            is_hole[np.take(parts_ZYX, side, axis)] = False
    if is_hole.any():
        mask_ZYX |= is_hole[parts_ZYX]


def box_of(mask_ZYX: np.ndarray) -> Box:
    """The smallest box around the True voxels; the whole array when there is none (an empty image stays whole)."""
    plane_YX = np.asarray(mask_ZYX.any(axis=0))
    lines = [np.asarray(line) for line in (mask_ZYX.any(axis=(1, 2)), plane_YX.any(axis=1), plane_YX.any(axis=0))]
    if not lines[0].any():
        depth, height, width = mask_ZYX.shape
        return (0, depth), (0, height), (0, width)
    (z0, z1), (y0, y1), (x0, x1) = ((int(line.argmax()), len(line) - int(line[::-1].argmax())) for line in lines)
    return (z0, z1), (y0, y1), (x0, x1)


def crop(array: np.ndarray, box: Box) -> np.ndarray:
    """The part of `array` (..., Z, Y, X) inside `box`, as a view."""
    (z0, z1), (y0, y1), (x0, x1) = box
    return array[..., z0:z1, y0:y1, x0:x1]


def insert(small: np.ndarray, box: Box, shape_ZYX: Sequence[int], fill: float) -> np.ndarray:
    """Undo `crop`: an array (..., *shape_ZYX) of `fill` that holds `small` inside `box`, same dtype as `small`."""
    if tuple(small.shape[-3:]) == tuple(shape_ZYX):
        return small
    whole = np.full((*small.shape[:-3], *shape_ZYX), fill, small.dtype)
    crop(whole, box)[...] = small
    return whole
