"""image/tiff.py: every kind of TIFF file gives what was put into it, and what cannot be read right is refused."""

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile

from autoseg.errors import UserError
from autoseg.image import tiff
from autoseg.image.formats import channels_held, read_geometry, read_image, read_labels, write_labels
from autoseg.image.slides import open_slide

TILES = pytest.mark.parametrize("tile", [None, (16, 32)], ids=["strips", "tiles"])


def noise(*shape: int, dtype: str = "u1") -> np.ndarray:
    return np.random.default_rng(0).integers(0, 250, shape).astype(dtype)


def write(path: Path, array: np.ndarray, tile: tuple[int, int] | None = None, **options: Any) -> Path:
    tifffile.imwrite(path, array, tile=tile, photometric=options.pop("photometric", "minisblack"), **options)
    return path


def rows_of(path: Path) -> np.ndarray:
    with open_slide(path) as slide:
        return slide.rows(0, slide.shape[1])


@TILES
@pytest.mark.parametrize("planes", ["contig", "separate"])
@pytest.mark.parametrize("channels", [2, 3, 5])
@pytest.mark.parametrize("dtype", ["u1", "u2", "f4"])
def test_channels_are_those_of_the_file(
    tmp_path: Path, tile: tuple[int, int] | None, planes: str, channels: int, dtype: str
) -> None:
    image_CYX = noise(channels, 40, 50, dtype=dtype)
    stored = image_CYX if planes == "separate" else np.moveaxis(image_CYX, 0, -1)
    path = write(tmp_path / "a.tif", stored, tile, planarconfig=planes)
    assert channels_held(path) == channels
    assert np.array_equal(read_image([path]).array_CZYX[:, 0], image_CYX)
    if planes == "contig":
        assert np.array_equal(rows_of(path), image_CYX)


@TILES
@pytest.mark.parametrize("dtype", ["u1", "i1", "u2", "i2", "u4", "i4", "f2", "f4", "f8"])
def test_numbers_of_any_type_are_read_and_pages_are_slices(
    tmp_path: Path, tile: tuple[int, int] | None, dtype: str
) -> None:
    labels_ZYX = np.random.default_rng(0).integers(0, 120 if dtype[1] == "1" else 301, (3, 40, 50))
    stack = write(tmp_path / "stack.tif", labels_ZYX.astype(dtype), tile)
    flat = write(tmp_path / "flat.tif", labels_ZYX[0].astype(dtype), tile)
    assert (channels_held(stack), read_geometry(stack).size_voxels) == (1, (3, 40, 50))
    assert np.array_equal(read_labels(stack)[0], labels_ZYX)
    assert np.array_equal(read_labels(flat)[0], labels_ZYX[:1])
    assert np.array_equal(read_image([stack]).array_CZYX[0], labels_ZYX)
    assert np.array_equal(rows_of(flat)[0], labels_ZYX[0])


@TILES
@pytest.mark.parametrize("white", [False, True])
def test_single_bits_are_0_and_255(tmp_path: Path, tile: tuple[int, int] | None, white: bool) -> None:
    bits = noise(40, 50) > 100
    path = write(tmp_path / "a.tif", bits, tile, photometric="miniswhite" if white else "minisblack")
    expected = (bits != white) * 255
    assert (channels_held(path), rows_of(path).dtype) == (1, np.uint8)
    assert np.array_equal(read_labels(path)[0][0], expected)
    assert np.array_equal(rows_of(path)[0], expected)


@TILES
@pytest.mark.parametrize(("grey", "bits"), [(True, 16), (False, 16), (True, 8)])
def test_a_palette_gives_its_colours_in_8_bits(
    tmp_path: Path, tile: tuple[int, int] | None, grey: bool, bits: int
) -> None:
    table = np.random.default_rng(1).permuted(np.tile(np.arange(256), (3, 1)), axis=1)
    table = np.repeat(table[:1], 3, 0) if grey else table
    indices = noise(40, 50)
    stored = (table * (257 if bits == 16 else 1)).astype(np.uint16)
    path = write(tmp_path / "a.tif", indices, tile, photometric="palette", colormap=stored)
    expected = table[: 1 if grey else 3, indices]
    assert channels_held(path) == len(expected)
    assert np.array_equal(read_image([path]).array_CZYX[:, 0], expected)
    assert np.array_equal(rows_of(path), expected)


@TILES
def test_smaller_pages_are_no_slices(tmp_path: Path, tile: tuple[int, int] | None) -> None:
    """A pyramid, with and without a word that its levels are smaller versions, and a thumbnail between slices."""
    whole = noise(2, 64, 64)
    for subfile in (0, 1):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            writer.write(whole[0], tile=tile)
            for step in (2, 4):
                writer.write(whole[0, ::step, ::step], tile=tile, subfiletype=subfile)
        assert read_geometry(tmp_path / "a.tif").size_voxels == (1, 64, 64)
        assert np.array_equal(read_labels(tmp_path / "a.tif")[0], whole[:1])
    with tifffile.TiffWriter(tmp_path / "b.tif") as writer:
        for page in (whole[0], whole[0, ::4, ::4], whole[1]):
            writer.write(page, tile=tile)
    assert np.array_equal(read_labels(tmp_path / "b.tif")[0], whole)


def test_pages_that_differ_in_another_way_are_refused(tmp_path: Path) -> None:
    for other in (noise(50, 40), noise(40, 40, dtype="u2")):
        with tifffile.TiffWriter(tmp_path / "a.tif") as writer:
            writer.write(noise(40, 40))
            writer.write(other)
        with pytest.raises(UserError, match=r"a\.tif: page 2 .* is no slice like the first"):
            read_geometry(tmp_path / "a.tif")


@TILES
@pytest.mark.parametrize("orientation", [2, 3, 4, 6])
def test_an_image_that_is_not_upright_is_refused_everywhere(
    tmp_path: Path, tile: tuple[int, int] | None, orientation: int
) -> None:
    path = write(tmp_path / "a.tif", noise(40, 50), tile, extratags=[(274, "H", 1, orientation, True)])
    for read in (read_geometry, read_labels, lambda each: read_image([each]), rows_of):
        with pytest.raises(UserError, match=rf"a\.tif: its tag Orientation is {orientation}"):
            read(path)


def test_other_colours_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(40, 50, 4), photometric="separated", planarconfig="contig")
    with pytest.raises(UserError, match=r"a\.tif: its colours are stored as SEPARATED"):
        read_image([path])


@pytest.mark.parametrize("unit", [None, 1, 2, 3])
@pytest.mark.parametrize("depth", [1, 3])
def test_the_resolution_is_what_itk_makes_of_it(tmp_path: Path, unit: int | None, depth: int) -> None:
    options = {} if unit is None else {"resolution": (333.3, 150.0), "resolutionunit": unit}
    path = write(tmp_path / "a.tif", noise(depth, 40, 50)[0 if depth == 1 else slice(None)], **options)
    geometry, itk = read_geometry(path), sitk.ReadImage(str(path))
    assert (geometry.itk_spacing, geometry.origin, geometry.direction) == (
        itk.GetSpacing(), itk.GetOrigin(), itk.GetDirection()
    )  # fmt: skip
    assert geometry.spacing_mm == (1, 1, 1)
    write_labels(tmp_path / "b.tif", noise(depth, 40, 50), geometry)
    assert np.allclose(read_geometry(tmp_path / "b.tif").itk_spacing, geometry.itk_spacing, rtol=1e-5)


@TILES
@pytest.mark.parametrize("share", [0.4, 0.9, 0.999])
def test_a_stack_that_was_cut_off_is_damaged(tmp_path: Path, tile: tuple[int, int] | None, share: float) -> None:
    path = tmp_path / "a.tif"
    with tifffile.TiffWriter(path) as writer:
        for page in noise(5, 40, 50):
            writer.write(page, tile=tile, contiguous=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=r"a\.tif: this image cannot be read"):
        read_image([path])


def test_a_tile_that_holds_nothing_is_blank(tmp_path: Path) -> None:
    image = noise(64, 64)
    image[32:, :32] = 0
    pieces = [image[top : top + 32, left : left + 32] for top in (0, 32) for left in (0, 32)]
    tiles = (piece if piece.any() else None for piece in pieces)
    tifffile.imwrite(tmp_path / "a.tif", tiles, shape=image.shape, dtype=image.dtype, tile=(32, 32))
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert file.pages[0].databytecounts[2] == 0
    assert np.array_equal(rows_of(tmp_path / "a.tif")[0], image)
    assert np.array_equal(read_labels(tmp_path / "a.tif")[0][0], image)


@pytest.mark.skipif(importlib.util.find_spec("imagecodecs") is not None, reason="imagecodecs is installed")
def test_a_missing_codec_is_named_where_itk_cannot_help(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(noise(40, 50, 3)).save(tmp_path / "rgb.tif", compression="tiff_lzw")
    assert np.array_equal(read_image([tmp_path / "rgb.tif"]).array_CZYX[:, 0], np.moveaxis(noise(40, 50, 3), -1, 0))
    Image.fromarray(noise(40, 50) > 100).save(tmp_path / "fax.tif", compression="group4")
    assert np.array_equal(read_labels(tmp_path / "fax.tif")[0][0], (noise(40, 50) > 100) * 255)
    Image.fromarray(np.stack([noise(40, 50)] * 2, -1), "LA").save(tmp_path / "two.tif", compression="tiff_lzw")
    for read in (lambda each: read_image([each]), rows_of):
        with pytest.raises(UserError, match=r"two\.tif: this .* cannot be read .*imagecodecs.*pip install"):
            read(tmp_path / "two.tif")


def test_the_tables_of_a_jpeg_slide_reach_the_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    Image.fromarray(noise(40, 50, 3)).save(tmp_path / "a.tif", compression="jpeg")
    given = []

    def decode(content: bytes, index: int, jpegtables: bytes | None = None) -> tuple[np.ndarray]:
        given.append(jpegtables)
        return (np.zeros((1, 40, 50, 3), np.uint8),)

    monkeypatch.setattr(tifffile.TiffPage, "decode", property(lambda page: decode))
    rows_of(tmp_path / "a.tif")
    with tifffile.TiffFile(tmp_path / "a.tif") as file:
        assert given[0] == file.pages[0].jpegtables is not None


@pytest.mark.parametrize(
    ("axes", "kind", "message"),
    [
        ("CYX", "imagej", r"its pages are 2 channels, but autoseg takes pages for slices.*case_0000\.tif"),
        ("ZCYX", "imagej", "its pages are 3 slices x 2 channels"),
        ("TZYX", "imagej", "its pages are 2 times x 3 slices"),
        ("CYX", "ome", "its pages are 2 channels"),
        ("ZYX", "imagej", ""), ("TYX", "imagej", ""), ("ZYX", "ome", ""), ("YXS", "ome", ""), ("ZYX", "", ""),
    ],
)  # fmt: skip
def test_pages_that_imagej_or_ome_call_channels_are_no_slices(
    tmp_path: Path, axes: str, kind: str, message: str
) -> None:
    sizes = {"C": 2, "Z": 3, "T": 2, "Y": 40, "X": 50, "S": 3}
    path = tmp_path / ("a.ome.tif" if kind == "ome" else "a.tif")
    colour = {"photometric": "rgb"} if "S" in axes else {}
    write(path, noise(*(sizes[axis] for axis in axes)), imagej=kind == "imagej", metadata={"axes": axes}, **colour)
    if not message:
        assert read_image([path]).array_CZYX.shape[1:] == (1 if "S" in axes else sizes[axes[0]], 40, 50)
        return
    for read in (read_geometry, read_labels):
        with pytest.raises(UserError, match=message):
            read(path)


def test_what_goes_wrong_while_a_slide_is_open_is_no_fault_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tif", noise(40, 50))
    with pytest.raises(RuntimeError, match="out of memory"), open_slide(path):
        raise RuntimeError("out of memory")
    assert not tiff.has_alpha(path)
