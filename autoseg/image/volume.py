"""A medical image in memory: its channels, and where its voxels are in the patient.

Axes: C channel, Z Y X voxels. A 2D image is a volume with one slice, 1 mm thick.
"""

import itertools
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from autoseg.errors import UserError
from autoseg.records import PatientAxes, PatientAxes3, PatientAxis

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
"""((z0, z1), (y0, y1), (x0, x1)), half open."""

LPS: tuple[PatientAxis, ...] = ("left-right", "front-back", "head-foot")
"""The axes of the patient in ITK's order: to the left, to the back, upwards."""
ALONG, OBLIQUE = 0.8, 0.5
"""A file axis with a cosine from `ALONG` on runs along one axis of the patient, else along all above `OBLIQUE`."""


@dataclass(frozen=True)
class Geometry:
    """Where the voxels of one file lie. What ITK gave is kept to the last bit, so that writing can restore it.

    Args:
        dimension: of the file, 2 or 3 (a fourth axis holds channels and is not counted).
        size_voxels: Z Y X; Z is 1 for a 2D file.
        spacing_mm: Z Y X. Photographs (PNG, TIFF, JPEG, BMP) have 1 mm: the dots per inch they carry are a print size.
        origin: X Y (Z) in mm, as ITK gave it.
        direction: row-major cosines, dimension^2 values, as ITK gave them.
        itk_spacing: X Y (Z), as ITK gave it.
        header: the part of the source file's header from which ITK computed the above, "" where none is needed.
            Computing it back from the cosines would lose the last bits (NIfTI: float32 quaternion, NRRD: one vector
            for spacing and direction).
    """

    dimension: int
    size_voxels: tuple[int, int, int]
    spacing_mm: tuple[float, float, float]
    origin: tuple[float, ...]
    direction: tuple[float, ...]
    itk_spacing: tuple[float, ...]
    header: str = ""

    def to_json(self) -> str:
        """One line of JSON that `Geometry.from_json` turns back into an equal geometry, bit for bit."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Geometry":
        """Undo `to_json`. Raises UserError where `text` is something else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}
            return cls(**values)
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"This is not a geometry written by autoseg: {text[:80]!r}.") from error


@dataclass(frozen=True)
class FileHeader:
    """What a file says about itself, in ITK's order X Y (Z); `size` has a fourth entry for channels of a 4D file."""

    size: tuple[int, ...]
    components: int
    spacing: tuple[float, ...]
    origin: tuple[float, ...]
    direction: tuple[float, ...]


@dataclass(frozen=True)
class Volume:
    """One case: `array_CZYX` float32 and where it lies."""

    array_CZYX: np.ndarray
    geometry: Geometry


def plain_geometry(size_voxels: tuple[int, int, int], spacing_mm: tuple[float, float, float]) -> Geometry:
    """A 3D geometry at the origin with axes along the patient's; for arrays that came without a file."""
    return Geometry(
        dimension=3,
        size_voxels=size_voxels,
        spacing_mm=spacing_mm,
        origin=(0.0, 0.0, 0.0),
        direction=(1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 1.0),
        itk_spacing=spacing_mm[::-1],
    )


def patient_axes(geometry: Geometry) -> PatientAxes3 | None:
    """How Z, Y and X of a file run in the patient; None for a 2D file, whose cosines only tell a turn in its plane.

    Each axis of the patient belongs to another axis of the file, those with the largest sum of cosines; a file axis
    between two or three of them runs along these too.
    """
    if geometry.dimension != 3:
        return None
    cosines = np.abs(np.reshape(geometry.direction, (3, 3)))  # [axis of the patient, axis X Y Z of the file]
    x, y, z = max(itertools.permutations(range(3)), key=lambda found: float(cosines[found, range(3)].sum()))
    return _along(cosines[:, 2], z), _along(cosines[:, 1], y), _along(cosines[:, 0], x)


def _along(cosines: np.ndarray, main: int) -> PatientAxes:
    """Its main axis of the patient first."""
    others = [k for k in range(3) if k != main and cosines.max() < ALONG and cosines[k] > OBLIQUE]
    return tuple(LPS[k] for k in (main, *others))


def displacement_mm(one: Geometry, other: Geometry) -> float:
    """How far apart two grids lie: the largest distance between their corner voxels in mm.

    One number for differences of spacing, origin and direction together. Infinite when the sizes differ, NaN where a
    geometry holds NaN: ask whether it is small, not whether it is large. A 2D and a 3D geometry of the same size are
    compared by spacing alone.
    """
    if one.size_voxels != other.size_voxels:
        return math.inf
    if one.dimension != other.dimension:
        extents = [np.multiply(each.spacing_mm[1:], each.size_voxels[1:]) for each in (one, other)]
        return float(np.abs(extents[0] - extents[1]).max())
    return float(np.linalg.norm(_corners_mm(one) - _corners_mm(other), axis=1).max())


def _corners_mm(geometry: Geometry) -> np.ndarray:
    """Positions of the corner voxels, (2^dimension, dimension), columns X Y (Z)."""
    dimension = geometry.dimension
    last_voxel = np.subtract(geometry.size_voxels[::-1][:dimension], 1)
    corners = np.stack(np.meshgrid(*[(0, last) for last in last_voxel], indexing="ij"), -1).reshape(-1, dimension)
    cosines = np.reshape(geometry.direction, (dimension, dimension))
    return corners * geometry.spacing_mm[::-1][:dimension] @ cosines.T + geometry.origin
