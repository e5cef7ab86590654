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


IGNORED = -1
"""Index of voxels nobody annotated."""
LARGEST_TABLE = 2**20
"""Span of label values up to which a lookup table is used instead of a search."""
NAME_THEM = "Add them under 'labels' in dataset.json, or remove them from the file."


def label_maps(folder: Path) -> dict[str, Path]:
    """The label maps in a folder by case id (file name without ending), in order; hidden files are left out.

    Raises:
        UserError: the folder does not exist or holds none, or two files share one id.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: {'this is a file, not a folder' if folder.is_file() else 'no such folder'}.")
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
    values_ZYX: np.ndarray,
    labels: Sequence[Label],
    ignore_value: int | None,
    where: str,
    fix: str = "Give the labels these files were made with.",
) -> np.ndarray:
    """Turn the values of a file into label indices (int16), `ignore_value` into -1.

    Raises UserError that lists the values which are neither, with `fix`.
    """
    known = [label.value for label in labels]
    indices = list(range(len(labels)))
    if ignore_value is not None and ignore_value not in known:
        known, indices = [*known, ignore_value], [*indices, IGNORED]
    if not values_ZYX.size:
        return values_ZYX.astype(np.int16)
    low, high = min(*known, int(values_ZYX.min())), max(*known, int(values_ZYX.max()))
    unknown = -2
    if high - low < LARGEST_TABLE:
        table = np.full(high - low + 1, unknown, np.int16)
        table[np.array(known) - low] = indices
        indices_ZYX = table[values_ZYX if low == 0 else values_ZYX.astype(np.int64) - low]
    else:
        order = np.argsort(known)
        ascending = np.array(known, np.int64)[order]
        position = np.minimum(np.searchsorted(ascending, values_ZYX), len(known) - 1)
        indices_ZYX = np.where(ascending[position] == values_ZYX, np.array(indices)[order][position], unknown)
    if indices_ZYX.min() == unknown:
        extra = some([str(value) for value in np.unique(values_ZYX[indices_ZYX == unknown])], 8)
        named = some([str(label.value) for label in labels])
        raise UserError(f"{where}: label has values {{{extra}}} that are not among those named, {named}.", fix=fix)
    return indices_ZYX.astype(np.int16, copy=False)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
