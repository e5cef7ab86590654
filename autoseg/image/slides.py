"""2D images too large for memory: TIFF read and written in bands of rows.

Axes: C channel, Y X pixels. Whole-slide images are cut into tiles or strips inside the file, so that a band is read
without the rest. Written are tiled, compressed (Big)TIFF files with the resolution of their image.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.errors import UserError
from autoseg.image import normalize as scales
from autoseg.image import tiff
from autoseg.image.formats import TIFF, ending_of, read_geometry
from autoseg.records import Intensities
from autoseg.store import replacing

SLIDE_PIXELS = 100_000_000
"""Larger 2D images are not read whole."""
BAND_ROWS = 1024
TILE = 256
Box2 = tuple[tuple[int, int], tuple[int, int]]
"""((y0, y1), (x0, x1)), half open."""


@dataclass(frozen=True)
class Slide:
    """An open image; `rows` reads bands. `shape` is C Y X."""

    path: Path
    page: Any
    file: Any
    shape: tuple[int, int, int]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop (exclusive) as in the file: (C, rows, X). Raises UserError for a damaged file."""
        channels, _, width = self.shape
        band = np.zeros((stop - start, width, channels), tiff.dtype_of(self.page))
        page = self.page
        high, wide = (page.tilelength, page.tilewidth) if page.is_tiled else (page.rowsperstrip, width)
        across = -(-width // wide)
        for down in range(start // high, -(-stop // high)):
            for column in range(across):
                top, left = down * high, column * wide
                piece = self._piece(down * across + column)[: self.shape[1] - top, : width - left]
                y0, y1 = max(top, start), min(top + len(piece), stop)
                band[y0 - start : y1 - start, left : left + piece.shape[1]] = piece[y0 - top : y1 - top]
        return np.moveaxis(band, -1, 0)

    def _piece(self, index: int) -> np.ndarray:
        """One tile or strip: (y, x, C)."""
        page = self.page
        with tiff.naming(self.path, "slide"):
            length = page.databytecounts[index]
            self.file.seek(page.dataoffsets[index])
            content = self.file.read(length) if length else None  # None: a tile that holds nothing
            if content is not None and len(content) != length:
                raise ValueError("the end of the file is missing")
            decoded = page.decode(content, index, jpegtables=page.jpegtables)[0]
            if decoded is None:
                _, height, width = self.shape
                size = (page.tilelength, page.tilewidth) if page.is_tiled else (min(page.rowsperstrip, height), width)
                decoded = np.full((1, *size, page.samplesperpixel), page.nodata, page.dtype)
            return tiff.values_of(page, decoded[0])


def is_slide(paths: Sequence[str]) -> bool:
    """Whether an image is one TIFF file of one slice that is too large to be read whole; a stack never is."""
    if len(paths) != 1 or ending_of(paths[0]) not in TIFF:
        return False
    size_voxels = read_geometry(paths[0]).size_voxels
    return size_voxels[0] == 1 and int(np.prod(size_voxels)) > SLIDE_PIXELS


@contextmanager
def open_slide(path: Path | str) -> Iterator[Slide]:
    """Open a TIFF file. Raises UserError when it is none, or has separate planes per channel."""
    import tifffile

    path = Path(path)
    with ExitStack() as stack:
        with tiff.naming(path, "slide"):
            file = stack.enter_context(tifffile.TiffFile(path))
            page = tiff.slices_of(file, path)[0]
            shape = (tiff.channels_in(page), int(page.imagelength), int(page.imagewidth))
        if page.samplesperpixel > 1 and page.planarconfig != 1:
            raise UserError(f"{path}: its channels lie in separate planes.", fix="Save it with interleaved channels.")
        yield Slide(path, page, file.filehandle, shape)


def write_slide(path: Path, like: Slide, values: Iterable[np.ndarray], dtype: np.dtype) -> None:
    """Write bands of rows (rows, X) as a tiled TIFF file, as a whole or not at all; resolution as in `like`."""
    import tifffile

    _, height, width = like.shape
    options: dict[str, Any] = {}
    with suppress(AttributeError, KeyError, ValueError, TypeError):
        options = {"resolution": like.page.get_resolution(), "resolutionunit": like.page.resolutionunit}
    with (
        replacing(path, ".tif") as temporary,
        tifffile.TiffWriter(temporary, bigtiff=height * width * dtype.itemsize > 2**31) as writer,
    ):
        writer.write(
            _tiles_of(values, width), shape=(height, width), dtype=dtype, tile=(TILE, TILE), compression="zlib",
            photometric="minisblack", **options,
        )  # fmt: skip


def _tiles_of(bands: Iterable[np.ndarray], width: int) -> Iterator[np.ndarray]:
    """Tiles in the order of the file out of bands of any height."""
    waiting = np.zeros((0, width), np.uint8)
    for band in bands:
        waiting = band if not len(waiting) else np.concatenate((waiting, band))
        whole = len(waiting) // TILE * TILE
        for top in range(0, whole, TILE):
            yield from _row_of_tiles(waiting[top : top + TILE])
        waiting = waiting[whole:]
    if len(waiting):
        yield from _row_of_tiles(waiting)


def _row_of_tiles(rows: np.ndarray) -> Iterator[np.ndarray]:
    for left in range(0, rows.shape[1], TILE):
        tile = np.zeros((TILE, TILE), rows.dtype)
        piece = rows[:, left : left + TILE]
        tile[: piece.shape[0], : piece.shape[1]] = piece
        yield tile


# ------------------------------------------------------------------------------------------------ what prepare does


def bands(slide: Slide, channels: int, box: Box2 | None = None) -> Iterator[np.ndarray]:
    """The slide in bands (C, rows, X) as in the file, within `box`."""
    (y0, y1), (x0, x1) = box or ((0, slide.shape[1]), (0, slide.shape[2]))
    for start in range(y0, y1, BAND_ROWS):
        yield slide.rows(start, min(start + BAND_ROWS, y1))[:channels, :, x0:x1]


def channels_of(slide: Slide) -> int:
    """Channels without a constant alpha channel, which readers of whole images drop too."""
    if slide.shape[0] not in (2, 4) or not tiff.is_alpha(slide.page):
        return slide.shape[0]
    ends = [(int(band[-1].min()), int(band[-1].max())) for band in bands(slide, slide.shape[0])]
    constant = min(low for low, _ in ends) == max(high for _, high in ends)
    return slide.shape[0] - constant


def nonzero_box(slide: Slide, channels: int) -> Box2:
    """The box around pixels that are not 0 in all channels; the whole slide when there are none."""
    rows, columns, top = [], np.zeros(slide.shape[2], bool), 0
    for band in bands(slide, channels):
        occupied = (band != 0).any(0)
        columns |= occupied.any(0)
        rows.extend((np.flatnonzero(occupied.any(1)) + top).tolist())
        top += band.shape[1]
    if not rows:
        return (0, slide.shape[1]), (0, slide.shape[2])
    found = np.flatnonzero(columns)
    return (rows[0], rows[-1] + 1), (int(found[0]), int(found[-1]) + 1)


def normalizers(
    slide: Slide, box: Box2, schemes: Sequence[str], intensities: Sequence[Intensities]
) -> list[Callable[[np.ndarray], np.ndarray]]:
    """Per channel a function of float32 pixels that does what `normalize` does to the whole image, bit for bit.

    Raises UserError for a normalization that this is not known for.
    """
    made: list[Callable[[np.ndarray], np.ndarray]] = []
    for c, (scheme, stats) in enumerate(zip(schemes, intensities, strict=True)):
        if scheme == "zscore":
            mean, std = _mean_and_std(slide, len(schemes), box, c)
            made.append(np.zeros_like if scales.is_constant(mean, std) else scales.shifter(mean, 1 / std))
        elif scheme == "rescale_0_1":
            low, high = _range(slide, len(schemes), box, c)
            made.append(np.zeros_like if low == high else scales.shifter(low, 1 / max(high - low, scales.SMALLEST)))
        else:
            made.append(partial(_scaled, scales.find(scheme), stats))
    return made


def _scaled(scheme: scales.Normalization, intensities: Intensities, pixels: np.ndarray) -> np.ndarray:
    return scheme(pixels, None, intensities)


def _range(slide: Slide, channels: int, box: Box2, c: int) -> tuple[float, float]:
    ends = [(float(band[c].min()), float(band[c].max())) for band in bands(slide, channels, box)]
    return min(low for low, _ in ends), max(high for _, high in ends)


def _mean_and_std(slide: Slide, channels: int, box: Box2, c: int) -> tuple[float, float]:
    """As `normalize` computes them: sums over the same pieces, so that not even rounding differs."""
    (y0, y1), (x0, x1) = box
    size = (y1 - y0) * (x1 - x0)
    mean = sum(float(row.sum(dtype=np.float64)) for row in _pieces(slide, channels, box, c)) / size
    squares = sum(scales.squares_about(row, mean) for row in _pieces(slide, channels, box, c))
    rounding = mean - float(np.float32(mean))
    return mean, max(squares / size - rounding**2, 0.0) ** 0.5


def _pieces(slide: Slide, channels: int, box: Box2, c: int) -> Iterator[np.ndarray]:
    """The pixels of a channel in order, cut where `np.array_split` cuts the whole channel."""
    (y0, y1), (x0, x1) = box
    size = (y1 - y0) * (x1 - x0)
    count = size // scales.ROW_VOXELS + 1
    short, longer = divmod(size, count)
    waiting, number = np.zeros(0, np.float32), 0
    for band in bands(slide, channels, box):
        waiting = np.concatenate((waiting, band[c].astype(np.float32).ravel()))
        start = 0
        while number < count:
            length = short + (number < longer)
            if start + length > len(waiting):
                break
            yield waiting[start : start + length]
            start, number = start + length, number + 1
        waiting = waiting[start:]
