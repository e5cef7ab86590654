"""How the predictions of one case become one: mean, vote or STAPLE.

The mean is that of probabilities. Here is also which of them agree.
Axes: K class, Z Y X voxels; M members, of which the last is the result. Probabilities are read in slabs of Z, so memory
does not grow with the image, and only by one slab of one member with the number of members.
"""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import SimpleITK as sitk

from autoseg.errors import UserError
from autoseg.image.components import slabs
from autoseg.image.formats import ending_of, read_labels, write_labels
from autoseg.image.probabilities import Probabilities, open_probabilities, writing_probabilities
from autoseg.image.volume import Geometry
from autoseg.layout import probabilities_file

SUM_TOLERANCE = 0.02
"""How far from 1 the probabilities of a voxel may sum, beside what rounding on disk explains."""
SLAB_VALUES = 1 << 27
"""Probabilities (float32) of a slab of one member; two slabs are in memory at a time."""
MANY_VALUES = 1 << 16


class Overlaps(NamedTuple):
    """Voxels per foreground label that two members share, (M, M, labels); on the diagonal those of each member."""

    names: tuple[str, ...]
    voxels_MMK: np.ndarray


def mean_of_probabilities(
    paths: Sequence[Path], shares: Sequence[float], target: Path, save_probabilities: bool = False
) -> Overlaps:
    """Average the probabilities of one case slab by slab and write the label map of the largest, in file values.

    Equally likely classes: the first in the order of the labels. Regions that may overlap are painted in their order
    where they are likelier than not.

    Raises:
        UserError: the probabilities of a file do not sum to one in every voxel; the label map is not written then.
    """
    sources = [open_probabilities(path) for path in paths]
    header = sources[0].header
    regions = header.background is not None
    values = np.array([*([header.background] if regions else ()), *(header.values or ())], np.int32)
    labels_ZYX = np.zeros(header.geometry.size_voxels, np.int32)
    voxels_MMK = np.zeros((len(paths) + 1, len(paths) + 1, len(values)), np.int64)
    file = probabilities_file(target.parent, target.name[: -len(ending_of(target))])
    depth = slab_depth(sources[0].shape)
    writing = writing_probabilities(
        file, header.geometry, header.names, header.values, slab=(0, depth), background=header.background
    )
    with writing if save_probabilities else nullcontext() as put:
        for z0 in range(0, labels_ZYX.shape[0], depth):
            window = slice(z0, min(z0 + depth, labels_ZYX.shape[0]))
            mean_KZYX, best = _mean_slab(sources, shares, window)
            best.append(painted(mean_KZYX) if regions else largest(mean_KZYX))
            labels_ZYX[window] = values[best[-1]]
            voxels_MMK += overlaps(best, len(values))
            if put is not None:
                put((slice(None), window), mean_KZYX)
    write_labels(target, labels_ZYX, header.geometry)
    return Overlaps(header.names if regions else header.names[1:], voxels_MMK[..., 1:])


def slab_depth(shape_KZYX: tuple[int, int, int, int]) -> int:
    """Slices of a slab: as many as `SLAB_VALUES` allow, in multiples of 4 (the blocks on disk) where possible."""
    classes, depth, height, width = shape_KZYX
    slices = min(depth, max(1, SLAB_VALUES // (classes * height * width)))
    return slices if slices < 4 else slices - slices % 4


def _mean_slab(
    sources: Sequence[Probabilities], shares: Sequence[float], window: slice
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The weighted mean (K, z, Y, X) of a slab, and each member's label indices there."""
    mean_KZYX, best = None, []
    for source, share in zip(sources, shares, strict=True):
        slab_KZYX = source.slab(window.start, window.stop)
        _check(source, slab_KZYX)
        best.append(largest(slab_KZYX) if source.header.background is None else painted(slab_KZYX))
        slab_KZYX *= np.float32(share)
        if mean_KZYX is None:
            mean_KZYX = slab_KZYX
        else:
            mean_KZYX += slab_KZYX
        del slab_KZYX
    if mean_KZYX is None:
        raise ValueError("at least one file is needed")
    return mean_KZYX, best


def _check(source: Probabilities, slab_KZYX: np.ndarray) -> None:
    """Raise UserError unless these are probabilities: of regions each from 0 to 1, of classes with the sum 1."""
    tolerance = SUM_TOLERANCE + source.header.rounding * len(slab_KZYX)
    if source.header.background is not None:
        low, high = float(slab_KZYX.min(initial=0.0)), float(slab_KZYX.max(initial=0.0))
        good, what = low >= -tolerance and high <= 1 + tolerance, f"are {low:.3g} to {high:.3g}, not 0 to 1"
    else:
        sum_ZYX = slab_KZYX.sum(axis=0)
        low, high = float(sum_ZYX.min()), float(sum_ZYX.max())
        good = abs(low - 1) < tolerance and abs(high - 1) < tolerance
        what = f"of a voxel sum to {low:.3g} to {high:.3g}, not to 1"
    if not good:  # NaN is not good
        raise UserError(f"{source.path}: the probabilities {what}.", fix="Give probabilities, not network outputs.")


def painted(slab_KZYX: np.ndarray) -> np.ndarray:
    """Index of the last region that is likelier than not, counted from 1; 0 where none is. int16."""
    indices_ZYX = np.zeros(slab_KZYX.shape[1:], np.int16)
    for k, region_ZYX in enumerate(slab_KZYX, 1):
        indices_ZYX[region_ZYX > 0.5] = k
    return indices_ZYX


def largest(slab_KZYX: np.ndarray) -> np.ndarray:
    """Index of the largest along K, the first of equal ones, int16; without the copy that argmax makes."""
    best_ZYX, indices_ZYX = slab_KZYX[0].copy(), np.zeros(slab_KZYX.shape[1:], np.int16)
    for k in range(1, len(slab_KZYX)):
        indices_ZYX[slab_KZYX[k] > best_ZYX] = k
        np.maximum(best_ZYX, slab_KZYX[k], out=best_ZYX)
    return indices_ZYX


def vote(
    paths: Sequence[Path], shares: Sequence[float], target: Path, save_probabilities: bool = False
) -> Overlaps:
    """The label with most votes per voxel; ties go to the first folder among those that tie."""
    maps, geometry = _maps(paths)
    labels_ZYX = _majority_by_slabs(maps, shares)
    write_labels(target, labels_ZYX, geometry)
    return overlaps_of_maps([*maps, labels_ZYX])


def majority(maps: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """The label with the largest summed share per voxel; ties go to the first map that holds one of the tied labels."""
    result_ZYX, most_ZYX = maps[0].copy(), np.full(maps[0].shape, -np.inf, np.float32)
    for one_ZYX in maps:
        votes_ZYX = np.zeros(one_ZYX.shape, np.float32)
        for other_ZYX, share in zip(maps, shares, strict=True):
            votes_ZYX += np.where(one_ZYX == other_ZYX, np.float32(share), np.float32(0))
        better_ZYX = votes_ZYX > most_ZYX + 1e-6
        result_ZYX[better_ZYX] = one_ZYX[better_ZYX]
        most_ZYX[better_ZYX] = votes_ZYX[better_ZYX]
    return result_ZYX


def _majority_by_slabs(maps: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """`majority` of whole maps, without temporaries of their size."""
    result_ZYX = np.empty_like(maps[0])
    for slab in slabs(result_ZYX.shape):
        result_ZYX[slab] = majority([each[slab] for each in maps], shares)
    return result_ZYX


def staple(
    paths: Sequence[Path], shares: Sequence[float], target: Path, save_probabilities: bool = False
) -> Overlaps:
    """Estimate the reference and every member's reliability together (Warfield et al. 2004); weights play no part."""
    maps, geometry = _maps(paths)
    values = values_in(maps)
    undecided = len(values)
    if undecided >= MANY_VALUES:
        raise UserError(f"{target.name}: STAPLE takes up to {MANY_VALUES - 1} labels, these maps hold {undecided}.")
    images = [sitk.GetImageFromArray(np.searchsorted(values, each).astype(np.uint16)) for each in maps]
    indices_ZYX = sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(images, undecided))
    del images
    labels_ZYX = np.append(values, 0)[indices_ZYX].astype(np.int32)
    open_ZYX = indices_ZYX == undecided
    if open_ZYX.any():
        labels_ZYX[open_ZYX] = _majority_by_slabs(maps, shares)[open_ZYX]
    write_labels(target, labels_ZYX, geometry)
    return overlaps_of_maps([*maps, labels_ZYX])


# ------------------------------------------------------------------------------------------------ agreement


def overlaps(members: Sequence[np.ndarray], classes: int) -> np.ndarray:
    """Voxels per class that two maps of label indices share, (M, M, classes); on the diagonal those of each map."""
    count = len(members)
    voxels_MMK = np.zeros((count, count, classes), np.int64)
    for m, one in enumerate(members):
        voxels_MMK[m, m] = np.bincount(one.ravel(), minlength=classes)
        for n in range(m + 1, count):
            voxels_MMK[m, n] = voxels_MMK[n, m] = np.bincount(one[one == members[n]], minlength=classes)
    return voxels_MMK


def overlaps_of_maps(maps: Sequence[np.ndarray]) -> Overlaps:
    """The same of maps with the values of files, which then are the names; 0 is the background."""
    values = values_in(maps)
    total = np.zeros((len(maps), len(maps), len(values)), np.int64)
    for slab in slabs(maps[0].shape):
        total += overlaps([np.searchsorted(values, each[slab]) for each in maps], len(values))
    foreground = values != 0
    return Overlaps(tuple(str(value) for value in values[foreground]), total[..., foreground])


def values_in(maps: Sequence[np.ndarray]) -> np.ndarray:
    """The sorted values that occur in label maps."""
    found = set()
    for each in maps:
        for slab in slabs(each.shape):
            part = each[slab]
            if part.min(initial=0) >= 0 and part.max(initial=0) < MANY_VALUES:
                found.update(np.flatnonzero(np.bincount(part.ravel())).tolist())
            else:
                found.update(np.unique(part).tolist())
    return np.array(sorted(found), np.int64)


def dice_of(one: Overlaps) -> np.ndarray:
    """Dice of every two members per foreground label, (M, M, labels); NaN where neither has the label."""
    own = np.einsum("mmk->mk", one.voxels_MMK)
    total = own[:, None] + own[None]
    return np.where(total > 0, 2 * one.voxels_MMK / np.maximum(total, 1), np.nan)


def _maps(paths: Sequence[Path]) -> tuple[list[np.ndarray], Geometry]:
    """Label maps (Z, Y, X) with the values of the files, and the first one's geometry."""
    read = [read_labels(path) for path in paths]
    return [labels_ZYX for labels_ZYX, _ in read], read[0][1]


METHODS: dict[str, Callable[[Sequence[Path], Sequence[float], Path, bool], Overlaps]] = {
    "mean": mean_of_probabilities,
    "vote": vote,
    "staple": staple,
}
"""How one case is combined: (files, shares, label map to write, save probabilities?) -> who agrees with whom."""
