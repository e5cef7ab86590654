"""Distances between the surfaces of two masks, and the scores made of them.

Distances are in millimetres.
Axes: Z Y X, spacings too. The surface is that of marching cubes between voxel centres: every cube of 2x2x2 neighbouring
voxels that holds both inside and outside is one surface element, at the cube's centre, with the area the cube's
triangles have at this spacing. 2D images (`flat`) are treated the same way in their plane (2x2 squares, lengths).
This is the definition of Nikolov et al. 2018 (arXiv:1809.04430): scores do not depend on how finely a surface is cut.

Distances are exact Euclidean distances to the nearest element of the other surface. They come from a k-d tree over
surface elements, not from a distance map of the volume: same numbers, and the cost follows the surface, not the box
(docs/decisions/surface-distances.md).
"""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree

INSIDE_SHARE = 0.5
ROUNDING = 1e-6
"""Share of a tolerance by which a distance may exceed it: five voxels of 0.2 mm are 1 mm, but for rounding."""


class Distances(NamedTuple):
    """Per surface element: its distance to the other surface (mm) and its area (mm2; mm of length in one slice)."""

    prediction_mm: np.ndarray
    prediction_areas: np.ndarray
    reference_mm: np.ndarray
    reference_areas: np.ndarray


def distances(
    prediction_ZYX: np.ndarray, reference_ZYX: np.ndarray, spacing_mm: tuple[float, float, float], flat: bool = False
) -> Distances | None:
    """Distances between the surfaces of two masks, both ways; None when either mask is empty.

    Args:
        prediction_ZYX, reference_ZYX: bool, equal shape. Pass the crop that holds both: only that much is looked at.
        spacing_mm: voxel size along Z Y X.
        flat: the image is 2D (one slice).
    """
    predicted, predicted_codes, shape = _cut_cubes(prediction_ZYX, flat)
    referred, referred_codes, _ = _cut_cubes(reference_ZYX, flat)
    if not predicted.size or not referred.size:
        return None
    predicted_mm, referred_mm = (_places_mm(each, shape, spacing_mm, flat) for each in (predicted, referred))
    _, in_predicted, in_referred = np.intersect1d(predicted, referred, assume_unique=True, return_indices=True)
    return Distances(
        _nearest_mm(predicted_mm, in_predicted, referred_mm),
        _areas(predicted_codes, spacing_mm, flat),
        _nearest_mm(referred_mm, in_referred, predicted_mm),
        _areas(referred_codes, spacing_mm, flat),
    )


def hausdorff_mm(of: Distances, share: float = 0.95) -> float:
    """Robust Hausdorff distance: the larger of the two directed distances within which `share` of the area lies."""
    return max(
        _quantile(of.prediction_mm, of.prediction_areas, share), _quantile(of.reference_mm, of.reference_areas, share)
    )


def average_mm(of: Distances) -> float:
    """Average symmetric surface distance: mean over the area of both surfaces together."""
    total = of.prediction_areas.sum() + of.reference_areas.sum()
    summed = (of.prediction_mm * of.prediction_areas).sum() + (of.reference_mm * of.reference_areas).sum()
    return float(summed / total)


def surface_dice(of: Distances, tolerance_mm: float = 1.0) -> float:
    """Normalized surface Dice: share of both surfaces' area that lies within `tolerance_mm` of the other surface."""
    total, limit_mm = of.prediction_areas.sum() + of.reference_areas.sum(), tolerance_mm * (1 + ROUNDING)
    near = of.prediction_areas[of.prediction_mm <= limit_mm].sum()
    near += of.reference_areas[of.reference_mm <= limit_mm].sum()
    return float(near / total)


def surface_scores(
    prediction_ZYX: np.ndarray,
    reference_ZYX: np.ndarray,
    spacing_mm: tuple[float, float, float],
    tolerance_mm: float = 2.0,
    flat: bool = False,
) -> dict[str, float | None]:
    """HD95, average surface distance and surface Dice (at 1 mm and at a tolerance) of one class.

    Args:
        prediction_ZYX, reference_ZYX: bool, equal shape, cropped to what holds both (empty masks are fine).
        tolerance_mm: distance within which a surface counts as right, for `surface_dice_at_tolerance`.
        flat: the image is 2D (one slice).

    Returns:
        the metrics named in `SURFACE_METRICS`; distances are None unless both masks hold something, surface Dice is 0
        when exactly one does and None when neither does.
    """
    between = distances(prediction_ZYX, reference_ZYX, spacing_mm, flat)
    if between is None:
        missed = 0.0 if prediction_ZYX.any() or reference_ZYX.any() else None
        return dict.fromkeys(("hd95_mm", "asd_mm")) | dict.fromkeys(SURFACE_METRICS[2:], missed)
    return {
        "hd95_mm": hausdorff_mm(between),
        "asd_mm": average_mm(between),
        "surface_dice": surface_dice(between, 1.0),
        "surface_dice_at_tolerance": surface_dice(between, tolerance_mm),
    }


def _cut_cubes(mask_ZYX: np.ndarray, flat: bool) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """The cubes of 2x2x2 voxels that hold inside and outside: flat indices (rising), codes, and the grid's shape.

    Bit b of a code says whether the b-th corner (Z slowest) is inside. The grid starts half a voxel before the mask.
    """
    padded_ZYX = np.pad(mask_ZYX, ((0, 0) if flat else (1, 1), (1, 1), (1, 1))).view(np.uint8)
    corners = list(product((0,) if flat else (0, 1), (0, 1), (0, 1)))
    shape = tuple(n - (0 if flat and axis == 0 else 1) for axis, n in enumerate(padded_ZYX.shape))
    code_ZYX = np.zeros(shape, np.uint8)
    for bit, corner in enumerate(corners):
        code_ZYX |= padded_ZYX[tuple(slice(c, c + n) for c, n in zip(corner, shape, strict=True))] << bit
    full = (1 << len(corners)) - 1
    codes = code_ZYX.ravel()
    elements = np.flatnonzero((codes != 0) & (codes != full))
    return elements, codes[elements], shape


def _places_mm(
    elements: np.ndarray, shape: tuple[int, ...], spacing_mm: tuple[float, float, float], flat: bool
) -> np.ndarray:
    """Centres of elements given by flat index, (n, 3) in mm from the centre of voxel (0, 0, 0)."""
    shift = np.array((0.0 if flat else -0.5, -0.5, -0.5))
    return (np.stack(np.unravel_index(elements, shape), axis=1) + shift) * np.asarray(spacing_mm)


def _areas(codes: np.ndarray, spacing_mm: tuple[float, float, float], flat: bool) -> np.ndarray:
    return (_line_lengths(spacing_mm[1:]) if flat else _triangle_areas(spacing_mm))[codes]


def _nearest_mm(from_mm: np.ndarray, shared: np.ndarray, to_mm: np.ndarray) -> np.ndarray:
    """Distance of every place to the nearest one of `to_mm`; the places at the indices `shared` are in both sets."""
    nearest_mm = np.zeros(len(from_mm))
    apart = np.ones(len(from_mm), bool)
    apart[shared] = False
    if apart.any():
        nearest_mm[apart] = cKDTree(to_mm, balanced_tree=False, compact_nodes=False).query(from_mm[apart])[0]
    return nearest_mm


def _quantile(distances_mm: np.ndarray, areas: np.ndarray, share: float) -> float:
    order = np.argsort(distances_mm)
    reached = np.cumsum(areas[order]) / areas.sum()
    return float(distances_mm[order][min(int(np.searchsorted(reached, share)), order.size - 1)])


@lru_cache(maxsize=64)
def _triangle_areas(spacing_mm: tuple[float, float, float]) -> np.ndarray:
    """Area in mm2 of the marching-cubes surface for each of the 256 ways to fill the corners of a cube.

    A way and its complement share one surface: that of the side with fewer corners (Lorensen and Cline 1987).
    """
    from skimage.measure import marching_cubes, mesh_surface_area

    areas = np.zeros(256)
    for code in range(1, 255):
        cube = np.array([(code >> bit) & 1 for bit in range(8)], np.float32).reshape(2, 2, 2)
        vertices, faces, _, _ = marching_cubes(cube, INSIDE_SHARE, spacing=spacing_mm, method="lorensen")
        areas[code] = mesh_surface_area(vertices, faces)
    few = np.array([code.bit_count() <= 4 for code in range(256)])
    return np.where(few, areas, areas[::-1])


@lru_cache(maxsize=64)
def _line_lengths(spacing_mm: tuple[float, float]) -> np.ndarray:
    """Length in mm of the boundary for each of the 16 ways to fill the corners of a square."""
    height, width = spacing_mm
    diagonal = float(np.hypot(height, width)) / 2
    lengths = np.zeros(16)
    for code in range(1, 15):
        corners = [(code >> bit) & 1 for bit in range(4)]
        inside = sum(corners)
        if inside in (1, 3):
            lengths[code] = diagonal
        elif corners[0] == corners[3]:
            lengths[code] = 2 * diagonal
        else:
            lengths[code] = width if corners[0] == corners[1] else height
    return lengths


SURFACE_METRICS = ("hd95_mm", "asd_mm", "surface_dice", "surface_dice_at_tolerance")
"""What `surface_scores` returns."""
