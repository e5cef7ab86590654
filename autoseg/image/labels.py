"""Folders of label maps, and the way from the values in files to label indices.

Axes: Z Y X voxels. Inside autoseg a label is its index among the data set's labels, -1 what nobody annotated.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoseg import store
from autoseg.errors import UserError
from autoseg.image.formats import READABLE, read_labels, stem_of
from autoseg.image.volume import Geometry, displacement_mm
from autoseg.records import Label

TOLERANCE_SHARE = 0.05
"""Two grids are the same when no corner voxel lies further apart than this share of the smallest spacing."""


def label_maps(folder: Path) -> dict[str, Path]:
    """The label maps in a folder by case id (file name without ending), in order; hidden files are left out.

    Raises:
        UserError: the folder does not exist or holds none, or two files share one id.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if is_label_map(path):
            case = stem_of(path)
            if case in found:
                raise UserError(f"{folder}: {found[case].name} and {path.name} are both {case}.", fix="Remove one.")
            found[case] = path
    if not found:
        raise UserError(f"{folder}: there is no label map in this folder.", fix=f"Known endings: {' '.join(READABLE)}.")
    return found


def is_label_map(path: Path) -> bool:
    """Whether a path is a file that may be a label map; hidden and unfinished ones are none."""
    hidden = path.name.startswith(".") or store.TEMPORARY in path.name
    return path.name.lower().endswith(READABLE) and not hidden and path.is_file()


def grid_difference(one: Geometry, other: Geometry) -> str:
    """Why two grids are not the same, in words with numbers; "" when they are."""
    if one.size_voxels != other.size_voxels:
        return f"size {one.size_voxels} against {other.size_voxels} voxels"
    apart_mm = displacement_mm(one, other)
    if not apart_mm <= TOLERANCE_SHARE * min(*one.spacing_mm, *other.spacing_mm):
        return f"same size, but corners lie {apart_mm:.4g} mm apart"
    return ""


def labels_found(paths: Sequence[Path], ignore_value: int | None = None) -> tuple[Label, ...]:
    """The labels made of the values in these files: 0 is the background, the others are named by their value."""
    values: set[int] = set()
    for path in paths:
        values |= set(np.unique(read_labels(path)[0]).tolist())
    foreground = sorted(values - {0, ignore_value})
    if not foreground:
        raise UserError(
            f"The {len(paths)} label maps hold no foreground, so there is nothing to score.",
            fix="Give the labels, or other references.",
        )
    return (Label(name="background", value=0), *(Label(name=str(value), value=value) for value in foreground))


def to_indices(
    labels_ZYX: np.ndarray, labels: tuple[Label, ...], ignore_value: int | None, where: str
) -> np.ndarray:
    """Turn the values of a file into label indices (int16; -1 where `ignore_value` stands).

    Raises:
        UserError: the map holds a value that no label has.
    """
    known = {label.value: index for index, label in enumerate(labels)}
    if ignore_value is not None and ignore_value not in known:
        known[ignore_value] = -1
    low, high = int(labels_ZYX.min(initial=0)), int(labels_ZYX.max(initial=0))
    if low < 0 or high > 1 << 16:
        values, places = np.unique(labels_ZYX, return_inverse=True)
    else:
        present = np.bincount(labels_ZYX.ravel(), minlength=1) > 0
        values, places = np.flatnonzero(present), None
    unknown = sorted(set(values.tolist()) - set(known))
    if unknown:
        raise UserError(
            f"{where}: values {some([str(value) for value in unknown])} are not among the labels' values "
            f"{some([str(label.value) for label in labels])}.",
            fix="Give the labels these files were made with.",
        )
    indices = np.array([known[value] for value in values.tolist()], np.int16)
    if places is not None:
        return indices[places].reshape(labels_ZYX.shape)
    table = np.zeros(high + 1, np.int16)
    table[values] = indices
    return table[labels_ZYX]


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
