"""NIfTI files where ITK is not enough: truncated ones, headers to the last bit.

Axes: Z Y X voxels. Field positions: nifti1.h (https://nifti.nimh.nih.gov/pub/dist/src/niftilib/nifti1.h).
"""

import gzip
import math
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from autoseg.errors import UserError
from autoseg.image.volume import FileHeader, Geometry

HEADER_BYTES = 348
PACKED = b"\x1f\x8b"
"""How a gzip file begins."""
SMALLEST_OFFSET = 352
KIND = "nifti:"
"""Beginning of `Geometry.header` from a NIfTI file; the 348 bytes follow as hexadecimal digits."""

FAST = 3
"""Level of zlib for label maps: they are so regular that higher levels only take longer."""

DTYPES = {2: "u1", 4: "i2", 8: "i4", 16: "f4", 64: "f8", 256: "i1", 512: "u2", 768: "u4", 1024: "i8", 1280: "u8"}
"""NIfTI datatype code -> NumPy type without byte order."""

SCANNER = 1
"""Code of an sform that says where the voxels lie in the scanner."""
OTHER_SPACING, UPRIGHT = 0.01, 1e-3
"""Spacings that differ by more are two; axes with smaller cosines between them are at right angles."""

UNITS_MM = {1: 1000.0, 3: 0.001}
"""Code of the unit of length (metre, micrometre) -> millimetres; everything else is in millimetres."""

CODES = {"u1": 2, "i2": 4, "i4": 8, "u2": 512}


def header_of(path: Path, dimension: int) -> str:
    """`Geometry.header` of a NIfTI-1 file; "" for other files that have this ending.

    Raises UserError where a voxel has no size: ITK would take 1 mm for 0, and the absolute value of a negative one. And
    where qform or sform is no number: ITK would take 0. And where a voxel has two sizes.
    """
    header = _first_bytes(path)
    order = _byte_order(header)
    if not order:
        return ""
    sides = struct.unpack_from(f"{order}{dimension}f", header, 80)
    if not all(0 < side < np.inf for side in sides):
        raise UserError(
            f"{path}: the header gives a spacing of {' x '.join(f'{side:g}' for side in sides)} (X first).",
            fix="Correct pixdim in the header; every spacing has to be above zero.",
        )
    for name, code, start, stop in (("qform", 252, 256, 280), ("sform", 254, 280, 328)):
        placed = struct.unpack_from(f"{order}{(stop - start) // 4}f", header, start)
        if struct.unpack_from(f"{order}h", header, code)[0] > 0 and not np.isfinite(placed).all():
            raise UserError(f"{path}: the {name} in the header holds NaN or infinity.", fix="Correct it in the header.")
    _refuse_two_spacings(header, order, sides, path)
    return f"{KIND}{header.hex()}"


def _refuse_two_spacings(header: bytes, order: str, sides: Sequence[float], path: Path) -> None:
    """Raise UserError where ITK takes its axes from an sform with other spacings than pixdim, which it takes as well.

    It takes the sform where that is the place in the scanner, or alone; what is skewed, `skewed_header` reads.
    """
    qform, sform = struct.unpack_from(f"{order}2h", header, 252)
    if sform <= 0 or (sform != SCANNER and qform > 0):
        return
    columns = np.reshape(struct.unpack_from(f"{order}12f", header, 280), (3, 4)).T[: len(sides)].astype(float)
    lengths = np.linalg.norm(columns, axis=1)
    products = columns @ columns.T
    upright = np.abs(products - np.diag(np.diag(products))).max() <= UPRIGHT * lengths.min() ** 2
    if upright and (np.abs(lengths / sides - 1) > OTHER_SPACING).any():
        given = [" x ".join(f"{side:.4g}" for side in each) for each in (lengths, sides)]
        raise UserError(
            f"{path}: the sform in the header gives a spacing of {given[0]}, pixdim {given[1]} (X first): programs "
            "differ in which they take.",
            fix="Correct whichever is wrong.",
        )


def skewed_header(path: Path) -> FileHeader | None:
    """Header of a file whose sform axes are not quite at right angles, which ITK refuses: the nearest axes that are.

    None where there is no sform. The file's own axes go into label maps by `Geometry.header`.
    Source of the nearest rotation (polar factor): Higham, "Computing the polar decomposition", 1986.
    """
    header = _first_bytes(path)
    order = _byte_order(header)
    if not order or struct.unpack_from(f"{order}h", header, 254)[0] <= 0:
        return None
    axes, *size = struct.unpack_from(f"{order}8h", header, 40)
    affine = np.reshape(struct.unpack_from(f"{order}12f", header, 280), (3, 4)) * UNITS_MM.get(header[123] & 7, 1.0)
    affine[:2] *= -1  # NIfTI counts to the right and to the front, ITK to the left and to the back
    spacing = np.linalg.norm(affine[:, :3], axis=0)
    if axes not in (3, 4) or not np.isfinite(affine).all() or not spacing.all():
        return None
    left, _, right = np.linalg.svd(affine[:, :3] / spacing)
    return FileHeader(
        size=tuple(size[:axes]),
        components=1,
        spacing=tuple(spacing.tolist()),
        origin=tuple(affine[:, 3].tolist()),
        direction=tuple((left @ right).ravel().tolist()),
    )


def read_voxels(path: Path, shape: tuple[int, ...], components: int = 1) -> np.ndarray | None:
    """The voxels as an array of `shape` (slowest axis first) in the type of the file, scaled where the header says so.

    None where the file is no NIfTI-1, or its voxels are no plain numbers or have several `components`. Raises UserError
    when bytes are missing or a checksum is wrong, whoever decodes the voxels.
    """
    content = _content(path)
    order = _byte_order(content[:HEADER_BYTES])
    code = struct.unpack_from(f"{order}h", content, 70)[0] if order else 0
    if not order or code not in DTYPES or components > 1:
        _check_length(content, path)
        return None
    dtype = np.dtype(DTYPES[code]).newbyteorder(order)
    offset, slope, intercept = struct.unpack_from(f"{order}3f", content, 108)
    count, start = int(np.prod(shape)), _start(offset)
    _check_missing(start + count * dtype.itemsize - len(content), path)
    array = np.frombuffer(content, dtype, count, start).reshape(shape)
    if np.isfinite([slope, intercept]).all() and slope != 0 and (slope, intercept) != (1, 0):
        array = array * np.float32(slope) + np.float32(intercept)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def write(path: Path, labels_ZYX: np.ndarray, geometry: Geometry) -> bool:
    """Write integers (Z, Y, X) with the source's own header; False if the source was no NIfTI file."""
    if not geometry.header.startswith(KIND):
        return False
    header = bytearray.fromhex(geometry.header.removeprefix(KIND))
    order = _byte_order(bytes(header))
    if not order:
        return False
    dtype = labels_ZYX.dtype
    size = geometry.size_voxels[::-1][: geometry.dimension]
    struct.pack_into(f"{order}8h", header, 40, geometry.dimension, *size, *(1,) * (7 - geometry.dimension))
    struct.pack_into(f"{order}3f3h", header, 56, 0, 0, 0, 0, CODES[dtype.str[1:]], 8 * dtype.itemsize)
    struct.pack_into(f"{order}3f", header, 108, SMALLEST_OFFSET, 1, 0)
    struct.pack_into(f"{order}2f", header, 124, 0, 0)  # displayed range
    header[148:252] = bytes(104)  # description and auxiliary file
    header[344:348] = b"n+1\0"
    labels_ZYX = np.ascontiguousarray(labels_ZYX, dtype.newbyteorder(order))
    with open(path, "wb") as plain:
        if path.name.endswith(".gz"):
            with gzip.GzipFile("", "wb", FAST, plain, mtime=0) as packed:
                packed.write(bytes(header) + bytes(4))
                packed.write(labels_ZYX.data)
        else:
            plain.write(bytes(header) + bytes(4))
            plain.write(labels_ZYX.data)
    return True


def _check_length(content: bytes, path: Path) -> None:
    """Compare the length with what the header says, whatever the voxels are."""
    order = _byte_order(content[:HEADER_BYTES])
    if not order:
        return
    axes, *size = struct.unpack_from(f"{order}8h", content, 40)
    [bits], [offset] = struct.unpack_from(f"{order}h", content, 72), struct.unpack_from(f"{order}f", content, 108)
    start = _start(offset)
    voxels = math.prod(max(1, side) for side in size[: max(0, axes)])
    _check_missing(start + voxels * bits // 8 - len(content), path)


def _start(offset: float) -> int:
    """Where the voxels begin; right behind the header where it gives no place behind it."""
    return max(int(offset), SMALLEST_OFFSET) if math.isfinite(offset) else SMALLEST_OFFSET


def _check_missing(missing: int, path: Path) -> None:
    if missing > 0:
        raise UserError(
            f"{path}: the file is truncated: {missing} bytes of voxels are missing.",
            fix="Copy it again, or leave this case out.",
        )


def _byte_order(header: bytes) -> Literal["<", ">", ""]:
    """ "<" or ">", or "" if this is no NIfTI-1 header with the voxels in the same file."""
    if len(header) < HEADER_BYTES or header[344:348] != b"n+1\0":
        return ""
    if int.from_bytes(header[:4], "little") == HEADER_BYTES:
        return "<"
    return ">" if int.from_bytes(header[:4], "big") == HEADER_BYTES else ""


def _first_bytes(path: Path) -> bytes:
    """The header, unpacked; shorter where the file is damaged."""
    with open(path, "rb") as file:
        beginning = file.read(8192)
    if beginning[:2] == PACKED:
        try:
            beginning = zlib.decompressobj(wbits=31).decompress(beginning, HEADER_BYTES)
        except zlib.error:
            return b""
    return beginning[:HEADER_BYTES]


def _content(path: Path) -> bytes:
    content = path.read_bytes()
    if content[:2] != PACKED:
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(
            f"{path}: the file is truncated or damaged ({error}).", fix="Copy it again, or leave this case out."
        ) from error
