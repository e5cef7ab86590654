"""TIFF files: what they hold, and the pixels of all kinds of them.

Axes: C channel, S sample as stored, Z Y X voxels. ITK makes one channel of bytes of interleaved samples, four channels
of 8 bits of tiles, planes and single bits, and whole numbers of float16. So it only reads what it reads right, and
tifffile the rest. Tags: TIFF 6.0 (https://www.itu.int/itudoc/itu-t/com16/tiff-fx/docs/tiff6.pdf).
"""

import logging
import lzma
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.errors import UserError
from autoseg.image.volume import FileHeader

DAMAGED = "It is damaged or incomplete: copy it again, or leave this case out."
UNDECODABLE = (ValueError, RuntimeError, OSError, IndexError, KeyError, TypeError, zlib.error, lzma.LZMAError)
"""What tifffile raises for damaged files; its own error is a kind of the first."""
CODECS = "imagecodecs"
"""The package without which tifffile names it and decodes little but deflate, LZMA and PackBits."""

ORIENTATION = 274
UPRIGHT = 1
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, YCBCR = 0, 1, 2, 3, 6
JPEG = (6, 7, 33003, 33004, 33005, 34712)
"""Compressions (JPEG, JPEG 2000) whose decoders turn YCbCr into RGB."""
SMALLER_OR_MASK = 1 | 4
"""Bits of NewSubfileType: a smaller version of another page, a transparency mask."""
AXES = {"C": "channels", "T": "times", "Z": "slices"}
"""What pages may be, by the letters of tifffile."""
UNITS_MM = {2: 25.4, 3: 10.0}
"""ResolutionUnit (inch, centimetre) -> millimetres."""


def read_header(path: Path) -> FileHeader:
    """Size, channels and resolution of a TIFF file; without a unit 1 mm. Raises UserError as `slices_of`."""
    with opened(path) as file:
        slices = slices_of(file, path)
        page = slices[0]
        size = (int(page.imagewidth), int(page.imagelength), len(slices))
        dimension = 3 if len(slices) > 1 else 2
        return FileHeader(
            size=size[:dimension],
            components=channels_in(page),
            spacing=(*_spacing_mm(page), 1.0)[:dimension],
            origin=(0.0,) * dimension,
            direction=tuple(np.eye(dimension).ravel().tolist()),
        )


def read_pixels(path: Path, read_with_itk: Callable[[Path], np.ndarray]) -> np.ndarray:
    """The pixels (Z, Y, X, C), or (Y, X) and (Y, X, C) from `read_with_itk`, in the type of the file.

    Single bits become 0 and 255 (uint8), and the colours of a palette 8 bits, one channel where all are grey.
    Raises UserError when the file is damaged, or compressed in a way that nothing here decodes.
    """
    with opened(path) as file:
        slices = slices_of(file, path)
        page = slices[0]
        alone = len(slices) == len(file.pages)
        if alone and _itk_reads(page):
            return read_with_itk(path)
        try:
            return np.stack([_pixels(each, file.filehandle.size) for each in slices])
        except UNDECODABLE as error:
            bits, palette = page.bitspersample == 1, page.photometric == PALETTE
            if CODECS not in str(error) or not alone or page.is_tiled or page.samplesperpixel > 1:
                raise
            if bits and not palette:
                return read_with_itk(path)[..., :1]  # of R G B A
            if palette and page.bitspersample == 8:
                return (read_with_itk(path) >> _shift(page)).astype(np.uint8)
            raise


def has_alpha(path: Path) -> bool:
    """Whether the last channel of a TIFF file is said to be alpha."""
    with opened(path) as file:
        return is_alpha(file.pages[0])


def is_alpha(page: Any) -> bool:
    """Whether the last sample of a TIFF page is alpha by its tag ExtraSamples; a fourth one beside RGB counts too."""
    rgb_and_one = page.photometric == RGB and page.samplesperpixel == 4
    return rgb_and_one or tuple(page.extrasamples or ())[-1:] in ((1,), (2,))


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """A `tifffile.TiffFile`, with `naming` around the block: for reading, not for work of other kinds."""
    import tifffile

    with naming(path), tifffile.TiffFile(path) as file:
        yield file


@contextmanager
def naming(path: Path, kind: str = "image") -> Iterator[None]:
    """Turn what tifffile raises for damaged files into a UserError that names the file."""
    try:
        yield
    except UNDECODABLE as error:
        raise unreadable(path, error, kind) from error


def unreadable(path: Path, error: BaseException, kind: str = "image") -> UserError:
    """What to say about a file for which tifffile raised `error`."""
    reason = (str(error) or type(error).__name__).splitlines()[0]
    install = f"Install it (pip install {CODECS}), or save the file with deflate compression."
    fix = install if CODECS in reason else DAMAGED
    return UserError(f"{path}: this {kind} cannot be read ({reason}).", fix=fix)


def not_upright(path: Path, orientation: int) -> UserError:
    """What to say about an image that is to be shown turned or mirrored."""
    return UserError(
        f"{path}: its tag Orientation is {orientation}: programs differ in whether they turn such an image.",
        fix="Save the image, and its label map, upright with orientation 1.",
    )


def slices_of(file: Any, path: Path) -> list[Any]:
    """The pages that are slices of one image: the first and all like it. Smaller ones (pyramids, thumbnails) are not.

    Raises UserError where pages differ in another way, are not upright, or have colours other than grey, RGB or a
    palette; ValueError where the file ends before its last page.
    """
    first, *others = list(file.pages)
    _check(first, path)
    if _next_page(file):
        raise ValueError("the end of the file is missing")
    slices = [first]
    for number, page in enumerate(others, start=2):
        if page.subfiletype & SMALLER_OR_MASK:
            continue
        if _kind(page) == _kind(first):
            _check(page, path)
            slices.append(page)
        elif page.imagelength > first.imagelength or page.imagewidth > first.imagewidth or _size(page) == _size(first):
            raise UserError(
                f"{path}: page {number} ({_described(page)}) is no slice like the first ({_described(first)}).",
                fix="Save every image in a file of its own.",
            )
    if len(slices) > 1 and (file.is_imagej or file.is_ome):
        _refuse_more_than_slices(file.series[0], path)
    return slices


def _refuse_more_than_slices(series: Any, path: Path) -> None:
    """Raise UserError where ImageJ or OME says that pages are channels, or have more than one axis."""
    beside = [f"{size} {AXES[axis]}" for axis, size in zip(series.axes, series.shape, strict=True) if axis in AXES]
    if len(beside) > 1 or "C" in series.axes:
        raise UserError(
            f"{path}: its pages are {' x '.join(beside)}, but autoseg takes pages for slices.",
            fix="Save each channel (case_0000.tif, case_0001.tif) and each time by itself, with a page per slice.",
        )


def channels_in(page: Any) -> int:
    """How many channels the pixels of a page have."""
    return _colours(page).shape[1] if page.photometric == PALETTE else int(page.samplesperpixel)


def dtype_of(page: Any) -> np.dtype:
    """The type of what `values_of` gives."""
    narrow = page.photometric == PALETTE or page.dtype == np.dtype(bool)
    return np.dtype(np.uint8) if narrow else np.dtype(page.dtype)


def values_of(page: Any, samples: np.ndarray) -> np.ndarray:
    """Samples of a page as stored, (..., S), as pixels (..., C): palettes as colours, single bits as 0 and 255."""
    if page.photometric == PALETTE:
        return _colours(page)[samples[..., 0].astype(np.intp)]
    if page.dtype == np.dtype(bool):
        return np.where(samples.astype(bool) == (page.photometric != WHITE_IS_ZERO), np.uint8(255), np.uint8(0))
    return samples


def _pixels(page: Any, file_bytes: int) -> np.ndarray:
    """One page: (Y, X, C)."""
    ends = np.add(page.dataoffsets, page.databytecounts, dtype=np.int64)
    if len(ends) and ends.max() > file_bytes:  # tifffile would fill up with zeros
        raise ValueError("the end of the file is missing")
    samples = page.asarray()
    if page.samplesperpixel == 1:
        samples = samples[..., None]
    elif page.planarconfig != 1:
        samples = np.moveaxis(samples, 0, -1)
    return values_of(page, samples)


def _itk_reads(page: Any) -> bool:
    """Whether ITK makes of a page what is in it: strips of grey or interleaved colours in plain numbers."""
    if page.is_tiled or page.dtype is None or page.bitspersample != 8 * page.dtype.itemsize:
        return False
    if page.samplesperpixel == 1:
        return page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO) and (
            page.dtype == np.float32 or (page.dtype.kind in "ui" and page.dtype.itemsize <= 4)
        )
    colours = page.photometric in (RGB, YCBCR) and page.samplesperpixel in (3, 4) and page.planarconfig == 1
    return colours and page.dtype in (np.uint8, np.uint16)


def _check(page: Any, path: Path) -> None:
    if not page.imagewidth or not page.imagelength:
        raise ValueError("it has no pixels")
    orientation = int(page.tags.valueof(ORIENTATION, UPRIGHT))
    if orientation != UPRIGHT:
        raise not_upright(path, orientation)
    known = page.photometric in (WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE)
    if not known and not (page.photometric == YCBCR and page.compression in JPEG):
        name = getattr(page.photometric, "name", page.photometric)
        raise UserError(f"{path}: its colours are stored as {name}.", fix="Save it as grey or RGB.")
    if page.imagedepth > 1:
        raise UserError(f"{path}: one page holds {page.imagedepth} slices.", fix="Save every slice as a page.")


def _next_page(file: Any) -> int:
    """Where the page after the last that was found should be; 0 if there is none to come."""
    handle, kind = file.filehandle, file.tiff
    handle.seek(file.pages.next_page_offset)
    return int.from_bytes(handle.read(kind.offsetsize), "little" if kind.byteorder == "<" else "big")


def _size(page: Any) -> tuple[int, int]:
    return page.imagelength, page.imagewidth


def _kind(page: Any) -> tuple[object, ...]:
    return (*_size(page), page.samplesperpixel, page.dtype, page.photometric)


def _described(page: Any) -> str:
    return f"{page.imagewidth} x {page.imagelength} x {page.samplesperpixel} of {page.dtype}"


def _colours(page: Any) -> np.ndarray:
    """The palette as (index, C) uint8, C = 1 where all colours are grey."""
    table = (np.asarray(page.colormap) >> _shift(page)).astype(np.uint8)
    grey = (table == table[:1]).all()
    return np.ascontiguousarray(table[: 1 if grey else 3].T)


def _shift(page: Any) -> int:
    """Palettes have 16 bits; some programs fill only the lower 8."""
    return 8 if np.max(page.colormap) > 255 else 0


def _spacing_mm(page: Any) -> tuple[float, float]:
    """X Y, in single precision as ITK computes it."""
    unit = UNITS_MM.get(int(page.tags.valueof("ResolutionUnit", 1)))
    dots: Sequence[tuple[int, int]] = [page.tags.valueof(name, (0, 1)) for name in ("XResolution", "YResolution")]
    if unit is None or any(above <= 0 or below <= 0 for above, below in dots):
        return 1.0, 1.0
    x, y = (unit / float(np.float32(above / below)) for above, below in dots)
    return x, y


logging.getLogger("tifffile").addHandler(logging.NullHandler())  # else Python prints what nobody listens to
