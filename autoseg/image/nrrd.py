"""NRRD files whose geometry is kept to the last bit, as ITK does not.

ITK multiplies spacing into directions and divides it out again.
Axes: Z Y X voxels. Format: https://teem.sourceforge.net/nrrd/format.html
"""

import gzip
from pathlib import Path

import numpy as np

from autoseg.errors import UserError
from autoseg.image.volume import Geometry

KIND = "nrrd:"
"""Beginning of `Geometry.header` from an NRRD file; lines of its header follow."""

WHOLE_IMAGE = ("space", "space dimension", "space units", "space origin", "measurement frame")
PER_AXIS = ("space directions", "spacings", "axis mins", "axis maxs", "centers", "centerings")
UNITS_MM = {
    **dict.fromkeys(("m", "meter", "meters", "metre", "metres"), 1000.0),
    **dict.fromkeys(("cm", "centimeter", "centimeters", "centimetre", "centimetres"), 10.0),
    **dict.fromkeys(("um", "\u00b5m", "\u03bcm", "micron", "microns", "micrometer", "micrometers"), 0.001),
    **dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 1e-6),
}
"""Unit of length -> millimetres; every other one counts as a millimetre."""
TYPES = {"u1": "uint8", "u2": "uint16", "i2": "int16", "i4": "int32"}
FAST = 3
LONGEST_HEADER = 1 << 20


def header_of(path: Path, dimension: int) -> str:
    """`Geometry.header`: the lines about geometry; "" where they do not fit an image of `dimension` axes."""
    fields = _fields(path)
    axes = fields.get("dimension")
    if axes != str(dimension):
        directions = fields.get("space directions", "").split()
        if directions.count("none") != 1 or axes != str(dimension + 1):
            return ""
        fields["space directions"] = " ".join(each for each in directions if each != "none")
        fields = {name: value for name, value in fields.items() if name == "space directions" or name not in PER_AXIS}
    return KIND + "\n".join(f"{name}: {fields[name]}" for name in WHOLE_IMAGE + PER_AXIS if name in fields)


def unit_mm(path: Path) -> float:
    """The unit of length of spacing and origin in millimetres, which ITK does not look at; 1 where none is named.

    Raises UserError where the axes have different units.
    """
    named = _fields(path).get("space units", "")
    units = {UNITS_MM.get(each.strip().lower(), 1.0) for each in named.split('"') if each.strip()}
    if len(units) > 1:
        raise UserError(f"{path}: its axes have different units ({named}).", fix="Save it with all in millimetres.")
    return units.pop() if units else 1.0


def write(path: Path, labels_ZYX: np.ndarray, geometry: Geometry) -> bool:
    """Write integers (Z, Y, X) with the source's own geometry lines; False if the source was no NRRD file."""
    if not geometry.header.startswith(KIND):
        return False
    size = " ".join(str(each) for each in geometry.size_voxels[::-1][: geometry.dimension])
    lines = ["NRRD0005", f"type: {TYPES[labels_ZYX.dtype.str[1:]]}", f"dimension: {geometry.dimension}"]
    lines += [line for line in geometry.header.removeprefix(KIND).splitlines() if line.startswith("space")]
    lines += [f"sizes: {size}"]
    lines += [line for line in geometry.header.removeprefix(KIND).splitlines() if not line.startswith("space")]
    lines += [f"kinds:{' domain' * geometry.dimension}", "endian: little", "encoding: gzip"]
    labels_ZYX = np.ascontiguousarray(labels_ZYX, labels_ZYX.dtype.newbyteorder("<"))
    with open(path, "wb") as plain:
        plain.write(("\n".join(lines) + "\n\n").encode())
        with gzip.GzipFile("", "wb", FAST, plain, mtime=0) as packed:
            packed.write(labels_ZYX.data)
    return True


def _fields(path: Path) -> dict[str, str]:
    """The header's names, in lower case, and values."""
    with open(path, "rb") as file:
        text = file.read(LONGEST_HEADER).replace(b"\r\n", b"\n").split(b"\n\n", 1)[0].decode("utf-8", "replace")
    fields = {}
    for line in text.splitlines()[1:]:
        name, separator, value = line.partition(": ")
        if separator and not line.startswith("#"):
            fields[name.strip().lower()] = value.strip()
    return fields
