"""Where a prediction differs most from its reference, as a picture.

Channels are grey, side by side, and photographs in their colours; both contours are in colour.
Axes: C channel, Z Y X voxels; R C rows and columns of a slice as it is shown, then channels come first: CRC. Label maps
hold label indices, -1 in the reference what nobody annotated. Blue and orange are of Okabe and Ito's palette (2008),
which colour-blind readers can tell apart; the prediction is dashed besides.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from autoseg.image.volume import Geometry

COLOURS = ("red", "green", "blue")
"""Names of the channels of photographs, which are drawn as one picture."""
MOST_CHANNELS = 4
"""The first ones are drawn."""
COLUMNS = 2
REFERENCE, PREDICTION = "#e69f00", "#56b4e9"
BACKGROUND, TEXT = "#101214", "#e8e8e8"
PANEL_INCHES, DOTS_PER_INCH = 4.2, 100
MOST_PIXELS = 1000
"""Of the longer side of a slice; of larger ones every second, third, ... row and column is drawn."""
ROOM = 0.25
"""Around what is labelled, in the enlarged part, as a share of its size."""
FEWEST_SHOWN = 24
"""Pixels that the enlarged part has at least along each side."""
ENLARGED_BELOW = 0.6
"""A part is shown enlarged beside the whole slice where it takes up less than this share of both sides."""
FEWEST_GREYS = 0.1
"""Of the intensities of a slice at least this share lies on both sides of those of what is labelled."""
TOWARDS = {0: 1, 1: 1, 2: -1}
"""Axis of the patient (to the left, to the back, upwards) -> whether rows or columns run along it (1) or against (-1):
the patient's left is on the right side of the picture, the head above."""

Groups = Sequence[Sequence[int]]
"""Label indices of each thing that is scored: one index each, or several where regions are."""


@dataclass(frozen=True, eq=False)
class Slice:
    """A slice of a case as it is shown; `number` counts along `axis` (0 for Z) of the file from 1, of `of`.

    `differing` counts the voxels in it where prediction and reference are not the same.
    """

    image_CRC: np.ndarray
    prediction_RC: np.ndarray
    reference_RC: np.ndarray
    spacing_mm: tuple[float, float]
    axis: int
    number: int
    of: int
    differing: int


def worst_slice(
    image_CZYX: np.ndarray, prediction_ZYX: np.ndarray, reference_ZYX: np.ndarray, groups: Groups, geometry: Geometry
) -> Slice:
    """The slice with the most voxels that differ, across the axis with the largest spacing.

    Where nothing differs it is the one with the most labelled voxels. `groups` say what counts: label indices that are
    in none of them are background.
    """
    axis = int(np.argmax(geometry.spacing_mm)) if geometry.dimension == 3 else 0
    counts = differing_voxels(prediction_ZYX, reference_ZYX, groups, axis)
    if counts.any():
        place = int(np.argmax(counts))
    else:
        others = tuple(each for each in range(3) if each != axis)
        place = int(np.argmax((reference_ZYX > 0).sum(axis=others)))
    transposed, flips = upright(geometry, axis)
    prediction_RC, reference_RC, *channels = (
        _shown(each.take(place, axis), transposed, flips) for each in (prediction_ZYX, reference_ZYX, *image_CZYX)
    )
    rows_mm, columns_mm = (mm for number, mm in enumerate(geometry.spacing_mm) if number != axis)
    spacing_mm = (columns_mm, rows_mm) if transposed else (rows_mm, columns_mm)
    differing = int(counts[place])
    return Slice(np.stack(channels), prediction_RC, reference_RC, spacing_mm, axis, place + 1, len(counts), differing)


def differing_voxels(
    prediction_ZYX: np.ndarray, reference_ZYX: np.ndarray, groups: Groups, axis: int = 0
) -> np.ndarray:
    """How many annotated voxels belong to other groups in the two label maps, for each place along `axis`."""
    labels = 1 + max(int(prediction_ZYX.max(initial=0)), int(reference_ZYX.max(initial=0)))
    belongs = np.zeros((labels, len(groups)), bool)
    for number, members in enumerate(groups):
        belongs[[each for each in members if each < labels], number] = True
    kind = np.unique(belongs, axis=0, return_inverse=True)[1].reshape(-1)  # of each label index
    pairs = zip(np.moveaxis(prediction_ZYX, axis, 0), np.moveaxis(reference_ZYX, axis, 0), strict=True)
    return np.array([np.count_nonzero((kind[one] != kind[other]) & (other >= 0)) for one, other in pairs], np.int64)


def upright(geometry: Geometry, axis: int) -> tuple[bool, tuple[bool, bool]]:
    """Whether a slice across `axis` is to be transposed, then flipped along rows and columns, to show it as is usual.

    That is seen from the feet, from the front or from the left, with the head or the front above. 2D files stay as they
    are.
    """
    if geometry.dimension != 3:
        return False, (False, False)
    cosines = np.reshape(geometry.direction, (3, 3))[:, ::-1]  # [axis of the patient, axis Z Y X of the file]
    rows, columns = (each for each in range(3) if each != axis)
    along = [int(np.argmax(np.abs(cosines[:, each]))) for each in range(3)]
    transposed = along[rows] < along[columns]
    if transposed:
        rows, columns = columns, rows
    first, second = (bool(cosines[along[each], each] * TOWARDS[along[each]] < 0) for each in (rows, columns))
    return transposed, (first, second)


def draw(shown: Slice, groups: Groups, channels: Sequence[str]) -> bytes:
    """A PNG of the slice with both contours; where what is labelled is small, that part enlarged beside it.

    Each of the first channels, whose names are `channels`, has a panel, and the first one also the whole slice.
    """
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    step = -(-max(shown.prediction_RC.shape) // MOST_PIXELS)
    maps = [each[::step, ::step] for each in (shown.reference_RC, shown.prediction_RC)]
    labelled_RC = (maps[0] > 0) | (maps[1] > 0)
    pictures = pictures_of(shown.image_CRC[:, ::step, ::step], labelled_RC, channels)
    box, size = labelled_part(labelled_RC), labelled_RC.shape
    is_small = all(_share(each, n) < ENLARGED_BELOW for each, n in zip(box, size, strict=True))
    panels = [(name, False) for name in list(pictures)[: 1 if is_small else None]]
    panels += [(name, True) for name in pictures if is_small]
    size_mm = [pixels * mm for pixels, mm in zip(size, shown.spacing_mm, strict=True)]
    height = PANEL_INCHES * float(np.clip(size_mm[0] / size_mm[1], 0.4, 1.6))
    columns, rows = min(COLUMNS, len(panels)), -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(columns * PANEL_INCHES, rows * height + 0.4), layout="constrained", facecolor=BACKGROUND)
    all_axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, (name, enlarged) in zip(all_axes, panels, strict=False):
        axes.imshow(pictures[name], cmap="gray", vmin=0, vmax=1, interpolation="nearest",
                    aspect=shown.spacing_mm[0] / shown.spacing_mm[1])  # fmt: skip
        axes.set_title(name if len(pictures) > 1 else "", color=TEXT, fontsize="small")
        for map_RC, colour, style in zip(maps, (REFERENCE, PREDICTION), ("solid", "dashed"), strict=True):
            _contours(axes, map_RC, groups, colour, style)
        _limit(axes, box if enlarged else (slice(0, size[0]), slice(0, size[1])))
    for axes in all_axes[len(panels) :]:
        axes.set_visible(False)
    if is_small:
        all_axes[0].plot(*_outline(*_edges(box)), color=TEXT, linewidth=0.8, linestyle="dotted")
    lines = [Line2D([], [], color=REFERENCE, label="reference")]
    lines += [Line2D([], [], color=PREDICTION, linestyle="dashed", label="prediction")]
    figure.legend(handles=lines, loc="outside lower center", ncols=2, frameon=False, labelcolor=TEXT)
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=DOTS_PER_INCH)
    return content.getvalue()


def pictures_of(image_CRC: np.ndarray, labelled_RC: np.ndarray, channels: Sequence[str]) -> dict[str, np.ndarray]:
    """What is drawn, by name, from 0 (black) to 1: the first channels, or one picture (R, C, 3) of three colours."""
    if tuple(channels) == COLOURS and len(image_CRC) == len(COLOURS):
        low, high = window(image_CRC, np.zeros(image_CRC.shape, bool))
        return {"colours": np.moveaxis(_scaled(image_CRC, low, high), 0, -1)}
    is_named = len(channels) == len(image_CRC) == len(set(channels))
    names = channels if is_named else [f"channel {number}" for number in range(len(image_CRC))]
    drawn = list(zip(names, image_CRC, strict=True))[:MOST_CHANNELS]
    return {name: _scaled(image_RC, *window(image_RC, labelled_RC)) for name, image_RC in drawn}


def labelled_part(labelled_RC: np.ndarray) -> tuple[slice, slice]:
    """Rows and columns around all that is labelled, with some room; everything where nothing is."""
    parts = []
    for axis in (1, 0):
        size, there = labelled_RC.shape[1 - axis], np.flatnonzero(labelled_RC.any(axis=axis))
        low, high = (int(there[0]), int(there[-1]) + 1) if there.size else (0, size)
        room = max(round(ROOM * (high - low)), (FEWEST_SHOWN - (high - low)) // 2, 2)
        parts.append(slice(max(0, low - room), min(size, high + room)))
    return parts[0], parts[1]


def window(image_RC: np.ndarray, labelled_RC: np.ndarray) -> tuple[float, float]:
    """The intensities that are shown black and white: those of what is labelled, with as much room on both sides.

    Never more than the slice has; without labels all of that, and an image without contrast is grey.
    """
    known_RC = np.isfinite(image_RC)
    if not known_RC.any():
        return 0.0, 1.0
    lowest, highest = np.percentile(image_RC[known_RC], (0.5, 99.5)).tolist()
    if (labelled_RC & known_RC).any():
        low, high = np.percentile(image_RC[labelled_RC & known_RC], (5, 95)).tolist()
        room = max(high - low, FEWEST_GREYS * (highest - lowest))
        lowest, highest = max(lowest, low - room), min(highest, high + room)
    return (lowest, highest) if highest > lowest else (lowest - 1.0, lowest + 1.0)


def _scaled(image: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.nan_to_num(np.clip((image - low) / (high - low), 0.0, 1.0))


def _limit(axes: Any, part: tuple[slice, slice]) -> None:
    """Show this part of a slice, without a frame; the first row is above."""
    left, right, top, bottom = _edges(part)
    axes.set(xticks=(), yticks=(), frame_on=False, xlim=(left, right), ylim=(bottom, top))


def _edges(part: tuple[slice, slice]) -> tuple[float, float, float, float]:
    """Left, right, top and bottom of a part."""
    rows, columns = part
    return columns.start - 0.5, columns.stop - 0.5, rows.start - 0.5, rows.stop - 0.5


def _shown(plane: np.ndarray, transposed: bool, flips: tuple[bool, bool]) -> np.ndarray:
    rows, columns = (slice(None, None, -1 if flip else 1) for flip in flips)
    return (plane.T if transposed else plane)[rows, columns]


def _share(part: slice, size: int) -> float:
    return (part.stop - part.start) / size


def _contours(axes: Any, map_RC: np.ndarray, groups: Groups, colour: str, style: str) -> None:
    """The outline of every group that is in a slice, closed also where the slice ends."""
    rows, columns = (np.arange(-1, size + 1) for size in map_RC.shape)
    there = set(np.unique(map_RC).tolist())
    for members in groups:
        if there.isdisjoint(members):
            continue
        mask_RC = np.pad(np.isin(map_RC, list(members)).astype(np.float32), 1)
        axes.contour(columns, rows, mask_RC, levels=[0.5], colors=colour, linestyles=style, linewidths=1.4)


def _outline(left: float, right: float, top: float, bottom: float) -> tuple[list[float], list[float]]:
    return [left, right, right, left, left], [top, top, bottom, bottom, top]
