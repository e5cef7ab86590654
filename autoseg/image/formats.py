"""Images and label maps of any format, read and written with their geometry.

Axes: C channel, K class, Z Y X voxels. SimpleITK reads what it reads well. NIfTI voxels are read here, because ITK
fills a truncated NIfTI file with zeros and says nothing. What only one format needs lies in a file called after it.
A changed byte in the middle of a file is noticed only where the format has a checksum (.nii.gz, PNG).
"""

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autoseg.errors import UserError
from autoseg.image import jpeg, nifti, nrrd, tiff
from autoseg.image.disk import failed_write
from autoseg.image.tiff import DAMAGED
from autoseg.image.volume import FileHeader, Geometry, Volume, displacement_mm
from autoseg.store import replacing

READABLE = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd", ".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
TIFF = (".tif", ".tiff")
JPEG = (".jpg", ".jpeg")
PHOTOGRAPHS = (".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")
LARGEST_LABEL = {".png": 65535, ".tif": 65535, ".tiff": 65535, ".bmp": 255}
LABEL_ENDINGS = {".jpg": ".png", ".jpeg": ".png", ".mhd": ".mha"}
SAME_GRID = 0.1
"""Channels of one case may lie this share of the smallest spacing apart."""


def ending_of(path: Path | str) -> str:
    """The ending of `READABLE` that the file name has, in lower case; "" if it has none."""
    name = Path(path).name.lower()
    return next((ending for ending in READABLE if name.endswith(ending) and name != ending), "")


def stem_of(path: Path | str) -> str:
    """The file name without the ending of `ending_of` ("a.b.nii.gz" -> "a.b")."""
    name = Path(path).name
    ending = ending_of(path)
    return name[: -len(ending)] if ending else Path(path).stem


def label_ending(image_ending: str) -> str:
    """The ending for label maps of images with `image_ending`: the same, but PNG for JPEG (its loss changes labels)."""
    return LABEL_ENDINGS.get(image_ending, image_ending)


def spelled(path: Path | str) -> Path:
    """The path. Raises UserError where it is no text: ITK would end the process, and no record could hold it."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        what = f"{os.fsencode(path)!r}: the bytes of this name are not UTF-8."
        raise UserError(what, fix="Rename it.") from error
    return Path(path)


def read_geometry(path: Path | str) -> Geometry:
    """Where the voxels of a file lie, from its header alone. Raises UserError when it cannot be read."""
    path = _existing(path)
    return _geometry(_read_header(path), path)


def channels_held(path: Path | str) -> int:
    """How many channels one file holds as its header says, alpha included. Raises UserError when it cannot be read."""
    header = _read_header(_existing(path))
    return 1 if _is_grey_palette(Path(path)) else max((header.components, *header.size[3:]))


def read_image(paths: Sequence[Path | str]) -> Volume:
    """One case: a file per channel, or files whose colours, components or fourth axis are channels; float32.

    A constant alpha channel is dropped. The geometry is that of the first file.
    Raises UserError naming the file when one cannot be read, or when the files do not lie on the same grid.
    """
    if not paths:
        raise UserError("An image needs at least one file.")
    first_path, *more = paths
    arrays, geometry = _read(first_path, np.float32)
    channels = [arrays]
    for path in more:
        array_CZYX, other = _read(path, np.float32)
        apart_mm = displacement_mm(geometry, other)
        if not apart_mm <= SAME_GRID * min(geometry.spacing_mm):
            raise UserError(
                f"{path}: this channel lies on another grid than {first_path}: "
                f"{_difference(geometry, other, apart_mm)}.",
                fix="Resample all channels of a case to the same grid.",
            )
        channels.append(array_CZYX)
    return Volume(channels[0] if len(channels) == 1 else np.concatenate(channels), geometry)


def volume_of(image: sitk.Image) -> Volume:
    """An image of SimpleITK in memory as a volume, components as channels. Raises UserError for other dimensions."""
    dimension = image.GetDimension()
    if dimension not in (2, 3):
        raise UserError(f"An image with {dimension} axes.", fix="autoseg takes 2D and 3D images.")
    header = FileHeader(
        size=tuple(image.GetSize()), components=image.GetNumberOfComponentsPerPixel(),
        spacing=tuple(image.GetSpacing()), origin=tuple(image.GetOrigin()), direction=tuple(image.GetDirection()),
    )  # fmt: skip
    depth, height, width = (1, *header.size[::-1])[-3:]
    thickness, row, column = (1.0, *header.spacing[::-1])[-3:]
    geometry = Geometry(
        dimension, (depth, height, width), (thickness, row, column), header.origin, header.direction, header.spacing
    )
    array = sitk.GetArrayFromImage(image)
    array_CZYX = np.moveaxis(array, -1, 0) if header.components > 1 else array[None]
    return Volume(np.ascontiguousarray(array_CZYX.reshape(-1, depth, height, width), np.float32), geometry)


def read_labels(path: Path | str) -> tuple[np.ndarray, Geometry]:
    """A label map with the values of the file: (Z, Y, X) int32, and where it lies.

    Colour masks with equal channels and floating point numbers that are whole are accepted.
    Raises UserError naming the file when it cannot be read or holds anything else.
    """
    path = Path(path)
    array_CZYX, geometry = _read(path, None)
    colours_CZYX = array_CZYX[:3] if len(array_CZYX) == 4 and _has_alpha(path) else array_CZYX
    if any(not np.array_equal(array_CZYX[0], other_ZYX) for other_ZYX in colours_CZYX[1:]):
        raise UserError(
            f"{path}: the {len(array_CZYX)} channels of this label map differ, so a voxel has no single value.",
            fix="Save the label map with one channel that holds the label values.",
        )
    labels_ZYX = array_CZYX[0]
    if labels_ZYX.dtype.kind == "f":
        labels_ZYX = _whole_numbers(labels_ZYX.astype(np.promote_types(labels_ZYX.dtype, np.float32), copy=False), path)
    elif labels_ZYX.dtype.itemsize >= 4 and (labels_ZYX.max() > 2**31 - 1 or labels_ZYX.min() < -(2**31)):
        raise UserError(f"{path}: label {labels_ZYX.max()} is too large.", fix="Use label values below 2147483648.")
    return np.ascontiguousarray(labels_ZYX, np.int32), geometry


def write_labels(path: Path | str, labels_ZYX: np.ndarray, geometry: Geometry) -> None:
    """Write a label map in the format of the path's ending, as a whole or not at all.

    The smallest integer type that holds the values is used, and the geometry is restored to the last bit where the
    source had the same format. Raises UserError for an ending or a label value that the format cannot hold.
    """
    path = Path(path)
    if labels_ZYX.shape != geometry.size_voxels:
        raise ValueError(f"labels have shape {labels_ZYX.shape}, their geometry {geometry.size_voxels}")
    ending = ending_of(path)
    if not ending or ending in JPEG:
        raise UserError(f"{path}: label maps cannot have this format.", fix="Use .png, .nii.gz, .nrrd or .mha.")
    labels_ZYX = _in_smallest_type(labels_ZYX, path, ending)
    writer = EXACT_WRITERS.get(ending)
    suffix = ".mha" if ending == ".mhd" else ending  # one file: an .mhd may hold its data itself, as .mha does
    with replacing(path, suffix) as temporary:
        if writer is None or not writer(temporary, labels_ZYX, geometry):
            _write_with_itk(temporary, labels_ZYX, geometry)


def _read(path: Path | str, dtype: type | None) -> tuple[np.ndarray, Geometry]:
    """Array (C, Z, Y, X) of `dtype` (None: as in the file) and geometry."""
    path = _existing(path)
    if (check := CHECKS.get(ending_of(path))) and (complaint := check(path)):
        raise UserError(f"{path}: {complaint}.", fix=DAMAGED)
    header = _read_header(path)
    geometry = _geometry(header, path)
    array = None
    if ending_of(path) in (".nii", ".nii.gz"):
        array = nifti.read_voxels(path, header.size[::-1], header.components)
    if ending_of(path) in TIFF:
        array = tiff.read_pixels(path, _read_with_itk)
    if array is None:
        array = _read_with_itk(path)
    array_CZYX = _channels_first(array, header, geometry, path)
    if len(array_CZYX) in (2, 4) and np.ptp(array_CZYX[-1]) == 0 and _has_alpha(path):
        array_CZYX = array_CZYX[:-1]
    if _is_grey_palette(path) and np.array_equal(array_CZYX[:1].repeat(len(array_CZYX) - 1, 0), array_CZYX[1:]):
        array_CZYX = array_CZYX[:1]
    return np.require(array_CZYX, dtype, ("C", "W")), geometry


def _has_alpha(path: Path) -> bool:
    """Whether the last of two or four channels is said to be alpha: a blank marker of a microscope is not."""
    return tiff.has_alpha(path) if ending_of(path) in TIFF else ending_of(path) in PHOTOGRAPHS


def _is_grey_palette(path: Path) -> bool:
    """Whether ITK makes three channels of a BMP file with one byte or less per pixel."""
    if ending_of(path) != ".bmp":
        return False
    with open(path, "rb") as file:
        return int.from_bytes(file.read(30)[28:], "little") <= 8


def _channels_first(array: np.ndarray, header: FileHeader, geometry: Geometry, path: Path) -> np.ndarray:
    """Bring ITK's axis order (channel, Z, Y, X of a 4D file; or Z, Y, X, component) to C Z Y X."""
    if array.dtype.kind not in "uif":
        raise UserError(f"{path}: voxels of type {array.dtype} cannot be used.", fix="Save it with real numbers.")
    fourth_axis, components = len(header.size) == 4, header.components
    if fourth_axis and components > 1:
        raise UserError(f"{path}: it has a fourth axis and {components} components.", fix="Save one file per channel.")
    if fourth_axis:
        return array
    if components > 1:
        array = np.moveaxis(array, -1, 0)
    return array.reshape(components, *geometry.size_voxels)


def _existing(path: Path | str) -> Path:
    path = spelled(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.", fix="Is the path right, and is the disk there?")
    try:
        with open(path, "rb") as file:
            empty = not file.read(1)
    except OSError as error:
        fix = "Is the disk there, and are you allowed to read the file?"
        raise UserError(f"{path}: this file cannot be opened ({error.strerror or error}).", fix=fix) from error
    if empty:
        raise UserError(f"{path}: the file is empty.", fix=DAMAGED)
    return path


def _read_header(path: Path) -> FileHeader:
    if ending_of(path) in TIFF:
        return tiff.read_header(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with _quiet():
            reader.ReadImageInformation()
    except RuntimeError as error:
        skewed = nifti.skewed_header(path) if "orthonormal" in str(error) else None
        if skewed is None:
            raise _unreadable(path, error) from error
        return skewed
    axes = reader.GetDimension()
    if axes not in (2, 3, 4):
        raise UserError(f"{path}: an image with {axes} axes.", fix="autoseg takes 2D and 3D images.")
    dimension = min(axes, 3)
    cosines = np.reshape(reader.GetDirection(), (axes, axes))[:dimension, :dimension]
    unit_mm = nrrd.unit_mm(path) if ending_of(path) == ".nrrd" else 1.0
    return FileHeader(
        size=tuple(int(each) for each in reader.GetSize()),
        components=reader.GetNumberOfComponents(),
        spacing=tuple(float(each) * unit_mm for each in reader.GetSpacing()[:dimension]),
        origin=tuple(float(each) * unit_mm for each in reader.GetOrigin()[:dimension]),
        direction=tuple(float(each) for each in cosines.ravel()),
    )


def _read_with_itk(path: Path) -> np.ndarray:
    try:
        with _quiet():
            return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
    except RuntimeError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: RuntimeError) -> UserError:
    if "Bad direction" in str(error):  # of several lines, of which the last is a row of a matrix
        return UserError(f"{path}: two axes run the same way in its header.", fix="Correct its directions.")
    last_line = str(error).strip().splitlines()[-1]
    if "Unable to determine ImageIO reader" in last_line:
        return UserError(f"{path}: its content is not that of a {ending_of(path)} file.", fix=DAMAGED)
    reason = re.sub(r"^.*?(?:ITK ERROR|sitk::ERROR): (?:\w+\(0x[0-9a-f]+\): )?", "", last_line).strip(" .")
    fix = next((fix for words, fix in NOT_READ.items() if words in reason), DAMAGED)
    return UserError(f"{path}: this image cannot be read ({reason}).", fix=fix)


def _geometry(header: FileHeader, path: Path) -> Geometry:
    if not np.isfinite((*header.spacing, *header.origin, *header.direction)).all():
        raise UserError(
            f"{path}: its header places the voxels at NaN or infinity (origin {header.origin}, X first).",
            fix="Correct spacing, origin and direction in the header.",
        )
    ending, dimension = ending_of(path), len(header.spacing)
    depth, height, width = (1, *header.size[:dimension][::-1])[-3:]
    thickness, row, column = (1.0, *header.spacing[::-1])[-3:] if ending not in PHOTOGRAPHS else (1.0, 1.0, 1.0)
    own_header = HEADERS[ending](path, dimension) if ending in HEADERS else ""
    if min(thickness, row, column) <= 0:
        spacing = (thickness, row, column)
        raise UserError(
            f"{path}: the voxel spacing is {spacing} mm (Z Y X), but has to be above zero on every axis.",
            fix="Mend the image's header.",
        )
    return Geometry(
        dimension=dimension,
        size_voxels=(depth, height, width),
        spacing_mm=(thickness, row, column),
        origin=header.origin,
        direction=header.direction,
        itk_spacing=header.spacing,
        header=own_header,
    )


def _difference(one: Geometry, other: Geometry, apart_mm: float) -> str:
    if one.size_voxels != other.size_voxels:
        return f"{other.size_voxels} voxels (Z Y X) instead of {one.size_voxels}"
    return f"its corners are up to {apart_mm:.3g} mm away"


def _whole_numbers(labels_ZYX: np.ndarray, path: Path) -> np.ndarray:
    rounded_ZYX = np.rint(labels_ZYX)
    with np.errstate(invalid="ignore"):
        close_ZYX = np.abs(labels_ZYX - rounded_ZYX) < 1e-3  # False for NaN and infinity too
    close_ZYX &= np.abs(rounded_ZYX) < 2**31
    if not close_ZYX.all():
        wrong = labels_ZYX[~close_ZYX][0]
        raise UserError(f"{path}: the label map holds {wrong:g}, which is no whole number.", fix="Is it an image?")
    return rounded_ZYX


def _in_smallest_type(labels_ZYX: np.ndarray, path: Path, ending: str) -> np.ndarray:
    low, high = (int(labels_ZYX.min()), int(labels_ZYX.max())) if labels_ZYX.size else (0, 0)
    largest = LARGEST_LABEL.get(ending, 2**31 - 1)
    if high > largest or (low < 0 and ending in LARGEST_LABEL):
        raise UserError(f"{path}: this format holds labels 0 to {largest}, not {low} to {high}.", fix="Use .nii.gz.")
    fitting = (kind for kind in (np.uint8, np.uint16, np.int16, np.int32) if np.iinfo(kind).min <= low)
    return labels_ZYX.astype(next(kind for kind in fitting if high <= np.iinfo(kind).max), order="C", copy=False)


def _write_with_itk(path: Path, labels_ZYX: np.ndarray, geometry: Geometry) -> None:
    image = sitk.GetImageFromArray(labels_ZYX[0] if geometry.dimension == 2 else labels_ZYX)
    scanned = ending_of(path) not in PHOTOGRAPHS  # where the print size of a photograph would be taken for millimetres
    image.SetSpacing(geometry.spacing_mm[::-1][: geometry.dimension] if scanned else geometry.itk_spacing)
    image.SetOrigin(geometry.origin)
    image.SetDirection(geometry.direction)
    try:
        with _quiet():
            sitk.WriteImage(image, str(path), useCompression=not path.name.endswith(".bmp"))
    except RuntimeError as error:
        raise failed_write(path, str(error).strip().splitlines()[-1]) from error
    if not _holds(path, labels_ZYX):
        raise failed_write(path, "the file came out incomplete")


def _holds(path: Path, labels_ZYX: np.ndarray) -> bool:
    """Whether a file came out as it should: for most formats ITK says nothing when the disk is full."""
    try:
        return np.array_equal(_read(path, None)[0], labels_ZYX[None])
    except UserError:
        return False


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep C++ messages of ITK's libraries off the screen; what matters comes as an exception too.

    The descriptors belong to the whole process, so nothing is done while other threads might write to them.
    """
    if threading.active_count() > 1:
        yield
        return
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            stream.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in kept:
            os.dup2(nowhere, descriptor)
        yield
    finally:
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)


def _bmp_is_cut(path: Path) -> str:
    with open(path, "rb") as file:
        declared = int.from_bytes(file.read(6)[2:], "little")
    actual = path.stat().st_size
    return f"it has {actual} bytes instead of {declared}" if actual < declared else ""


sitk.ProcessObject.SetGlobalWarningDisplay(False)

NOT_READ = {"Unknown PixelType": "Save it as grey or RGB.", "BMP depths": "Save it as PNG."}
"""Words in what ITK says of a file that it does not read, though nothing is wrong with it, and what to do."""

CHECKS: dict[str, Callable[[Path], str]] = {**dict.fromkeys(JPEG, jpeg.complaint), ".bmp": _bmp_is_cut}
"""Ending -> what is wrong with a file that ITK would read without complaint, "" if nothing."""

HEADERS: dict[str, Callable[[Path, int], str]] = {
    ".nii.gz": nifti.header_of,
    ".nii": nifti.header_of,
    ".nrrd": nrrd.header_of,
}
"""Ending -> `Geometry.header` of (path, dimension)."""

EXACT_WRITERS: dict[str, Callable[[Path, np.ndarray, Geometry], bool]] = {
    ".nii.gz": nifti.write,
    ".nii": nifti.write,
    ".nrrd": nrrd.write,
}
"""Ending -> function that writes with the geometry of the source's own header, or returns False if there is none."""
