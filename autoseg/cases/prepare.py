"""The one preprocessing: crop, normalize and resample, and all of it undone.

Training and prediction both call `prepare`, so they cannot differ; `restore` undoes it.
Order: transpose, crop to the nonzero box, normalize, resample. Normalizing comes before resampling on purpose: a
resampled mask would no longer fit the image (Isensee et al., nnU-Net, Nature Methods 2021).
Axes: C channel, K class, Z Y X voxels. "File grid" is that of the user's file, "transposed" after `Configuration.axes`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.errors import UserError
from autoseg.image.crop import box_of, crop, insert, nonzero_mask
from autoseg.image.labels import IGNORED, NAME_THEM, to_indices
from autoseg.image.normalize import normalize
from autoseg.image.resample import resample_image, resample_labels, resampled_shape
from autoseg.image.volume import Box, Geometry, Volume
from autoseg.records import Configuration, Label, Millimetres3, Plan, Voxels3

MOST_LOCATIONS = 10_000
LEAST_SHARE = 0.01


@dataclass(frozen=True, slots=True)
class Prepared:
    """One case on the grid of a configuration, and what is needed to bring a result back to the file's grid.

    Args:
        image_CZYX: float32, normalized and resampled.
        labels_ZYX: int16 label indices, -1 where ignored; None without a label map.
        box: of the nonzero region, in the transposed file grid.
        cropped_shape: Z Y X of that box; results are resampled to it before `restore`.
        spacing_mm: Z Y X of the transposed file grid.
        geometry: of the file.
    """

    image_CZYX: np.ndarray
    labels_ZYX: np.ndarray | None
    box: Box
    cropped_shape: Voxels3
    spacing_mm: Millimetres3
    geometry: Geometry


def prepare(
    volume: Volume, labels_ZYX: np.ndarray | None, plan: Plan, configuration: Configuration, case: str = "the image"
) -> Prepared:
    """Bring an image, and its label map where there is one, to the grid and scale of `configuration`.

    Args:
        volume: as read, channels in the order of `plan.channels`.
        labels_ZYX: values of the file, on the same grid; None when there are none.
        case: names the image in errors.

    Raises:
        UserError: another number of channels than planned, sizes that differ, or label values that are not planned.
    """
    image_CZYX, size = volume.array_CZYX, tuple(volume.array_CZYX.shape[1:])
    if len(image_CZYX) != len(plan.channels):
        raise UserError(
            f"{case}: {len(image_CZYX)} channel(s), but the plan was made for {len(plan.channels)} "
            f"({', '.join(plan.channels)}).",
            fix="Give the same channels in the same order as in training.",
        )
    if labels_ZYX is not None and labels_ZYX.shape != size:
        raise UserError(f"{case}: the label map has {labels_ZYX.shape} voxels (Z Y X), the image {size}.")
    axes = configuration.axes
    image_CZYX = image_CZYX.transpose(0, *(1 + axis for axis in axes))
    spacing_mm = _transposed(volume.geometry.spacing_mm, axes)
    image_CZYX, mask_ZYX, box = _crop_to_nonzero(image_CZYX, configuration.mask_for_normalization)
    cropped_shape = (image_CZYX.shape[1], image_CZYX.shape[2], image_CZYX.shape[3])
    image_CZYX = normalize(
        image_CZYX, mask_ZYX, configuration.normalization, configuration.mask_for_normalization, plan.intensities
    )
    how, target_mm = configuration.resampling, configuration.spacing_mm
    new_shape = resampled_shape(cropped_shape, spacing_mm, target_mm)
    image_CZYX = resample_image(image_CZYX, spacing_mm, target_mm, new_shape, how.image_order, how.anisotropy)
    if labels_ZYX is not None:
        cropped_ZYX = crop(labels_ZYX.transpose(axes), box)
        labels_ZYX = to_indices(cropped_ZYX, plan.labels, plan.ignore_value, case, NAME_THEM)
        labels_ZYX = resample_labels(labels_ZYX, spacing_mm, target_mm, new_shape, how.label_order, how.anisotropy)
        labels_ZYX = np.ascontiguousarray(labels_ZYX)
    return Prepared(np.ascontiguousarray(image_CZYX), labels_ZYX, box, cropped_shape, spacing_mm, volume.geometry)


def _crop_to_nonzero(image_CZYX: np.ndarray, use_mask: Sequence[bool]) -> tuple[np.ndarray, np.ndarray | None, Box]:
    """The cropped image, its mask if any channel is normalized within it, and the box.

    Holes lie inside the box whether they are filled or not, so the costly filling is left out where no mask is used.
    """
    mask_ZYX = nonzero_mask(image_CZYX) if any(use_mask) else occupied(image_CZYX)
    box = box_of(mask_ZYX)
    return crop(image_CZYX, box), crop(mask_ZYX, box) if any(use_mask) else None, box


def occupied(image_CZYX: np.ndarray) -> np.ndarray:
    """Voxels where any channel is not 0, holes left open: bool Z Y X."""
    mask_ZYX = image_CZYX[0] != 0
    for channel_ZYX in image_CZYX[1:]:
        mask_ZYX |= channel_ZYX != 0
    return mask_ZYX


def restore(
    indices_ZYX: np.ndarray, prepared: Prepared, labels: Sequence[Label], ignore_value: int | None, axes: Voxels3
) -> np.ndarray:
    """Bring predicted label indices on the cropped grid back to the file: uncropped, turned back, the user's values.

    Args:
        indices_ZYX: label indices of shape `prepared.cropped_shape` (transposed grid).
        prepared: of the same case; only its box and geometry are read.
        labels, ignore_value, axes: those of the plan and the configuration.

    Returns:
        int32 values in the file's Z Y X, `prepared.geometry.size_voxels`. What was cropped away is background.
    """
    full = _transposed(prepared.geometry.size_voxels, axes)
    whole_ZYX = insert(to_values(indices_ZYX, labels, ignore_value), prepared.box, full, labels[0].value)
    return np.ascontiguousarray(whole_ZYX.transpose(np.argsort(axes)))


def restore_probabilities(
    probabilities_KZYX: np.ndarray, prepared: Prepared, axes: Voxels3, regions: bool = False
) -> np.ndarray:
    """The same for class probabilities on the cropped grid; what was cropped away is background with probability 1.

    Regions have no background: there all of them have probability 0.
    """
    full = _transposed(prepared.geometry.size_voxels, axes)
    whole_KZYX = insert(probabilities_KZYX, prepared.box, full, 0)
    if whole_KZYX is not probabilities_KZYX and not regions:
        whole_KZYX[0] = insert(probabilities_KZYX[0], prepared.box, full, 1)
    return np.ascontiguousarray(whole_KZYX.transpose(0, *(1 + axis for axis in np.argsort(axes))))


def to_values(indices_ZYX: np.ndarray, labels: Sequence[Label], ignore_value: int | None) -> np.ndarray:
    """Turn label indices back into the values of the user's files (int32); -1 into `ignore_value`, else background."""
    ignored = labels[0].value if ignore_value is None else ignore_value
    table = np.array([*(label.value for label in labels), ignored], np.int32)  # index -1 is the last entry
    return table[indices_ZYX]


def class_locations(labels_ZYX: np.ndarray, classes: int, seed: int) -> dict[int, np.ndarray]:
    """Voxels to centre patches on: for each foreground class that occurs, min(10000, n) of its n voxels, at least 1 %.

    Args:
        labels_ZYX: label indices, -1 where ignored.
        classes: number of label indices, background included.

    Returns:
        label index -> (n, 3) int32 positions Z Y X, drawn without replacement and sorted. Where voxels are ignored, the
        key -1 holds annotated voxels of any class, background included: patches without any would teach nothing.
    """
    flat = labels_ZYX.ravel()
    positions = np.flatnonzero(flat > 0)
    values = flat[positions]
    order = np.argsort(values, kind="stable")
    ends = np.searchsorted(values[order], np.arange(1, classes + 1))
    groups = {k: positions[order[ends[k - 1] : ends[k]]] for k in range(1, classes)}
    if (flat == IGNORED).any():
        groups[IGNORED] = np.flatnonzero(flat != IGNORED)
    generator = np.random.default_rng(seed)
    locations = {}
    for k, found in groups.items():
        if found.size:
            wanted = max(min(MOST_LOCATIONS, found.size), -(-found.size // round(1 / LEAST_SHARE)))
            if wanted < found.size:
                found = np.sort(generator.choice(found, wanted, replace=False, shuffle=False))
            locations[k] = np.stack(np.unravel_index(found, labels_ZYX.shape), axis=1).astype(np.int32)
    return locations


def _transposed(values: tuple, axes: Voxels3) -> tuple:
    return (values[axes[0]], values[axes[1]], values[axes[2]])
