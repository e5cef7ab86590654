"""Every format is read, written back with its geometry to the last bit, and refused by name when damaged."""

import errno
import gzip
import os
import resource
import shutil
import struct
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.spatial.transform import Rotation
from whole_probabilities import read_whole, write_whole

from autoseg.errors import UserError
from autoseg.image import formats
from autoseg.image.companions import files_of
from autoseg.image.formats import read_geometry, read_image, read_labels, write_labels
from autoseg.image.volume import Geometry, displacement_mm, patient_axes, plain_geometry

DATA = Path(__file__).parents[2] / "shared" / "data"
VOLUMES = (".nii.gz", ".nii", ".nrrd", ".mha", ".mhd")


def itk_geometry(path: Path) -> tuple:
    image = sitk.ReadImage(str(path))
    return image.GetSize(), image.GetSpacing(), image.GetOrigin(), image.GetDirection()


def write_oblique(path: Path, seed: int, dtype: type = np.int16, vector: bool = False) -> np.ndarray:
    draw = np.random.default_rng(seed)
    array = draw.integers(0, 100, (3, 4, 5, 2) if vector else (3, 4, 5)).astype(dtype)
    image = sitk.GetImageFromArray(array, isVector=vector)
    cosines = Rotation.random(random_state=seed).as_matrix() @ np.diag([1, 1, (-1) ** seed])
    image.SetDirection(cosines.ravel().tolist())
    image.SetSpacing(draw.uniform(0.2, 5, 3).tolist())
    image.SetOrigin(draw.normal(0, 300, 3).tolist())
    sitk.WriteImage(image, str(path))
    return array


@pytest.mark.parametrize("ending", VOLUMES)
def test_oblique_geometry_survives_to_the_last_bit(tmp_path: Path, ending: str) -> None:
    for seed in range(8):  # proper and mirrored directions by turns
        source, copy, again = (tmp_path / f"{name}{ending}" for name in ("source", "copy", "again"))
        write_oblique(source, seed)
        labels, geometry = read_labels(source)
        write_labels(copy, labels, geometry)
        write_labels(again, *read_labels(copy))
        assert itk_geometry(copy) == itk_geometry(source) == itk_geometry(again)
        assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(copy))), labels)


def test_geometry_is_what_itk_says(tmp_path: Path) -> None:
    write_oblique(tmp_path / "a.nii.gz", 3)
    geometry = read_geometry(tmp_path / "a.nii.gz")
    size, spacing, origin, direction = itk_geometry(tmp_path / "a.nii.gz")
    assert (geometry.size_voxels[::-1], geometry.itk_spacing) == (size, spacing)
    assert (geometry.origin, geometry.direction, geometry.spacing_mm) == (origin, direction, spacing[::-1])
    assert Geometry.from_json(geometry.to_json()) == geometry


@pytest.mark.parametrize(
    ("direction", "expected"),
    [
        (np.diag([-1.0, 1, -1]), "H F L"),
        ([[0, 0, -1], [1, 0, 0], [0, -1, 0]], "L H F"),  # sagittal: X to the back, Y downwards, Z to the right
        ([[1, 0, 0], [0, 0, 1], [0, -1, 0]], "F H L"),  # coronal
        (Rotation.from_euler("z", 30, degrees=True).as_matrix(), "H F L"),
        (Rotation.from_euler("z", 44, degrees=True).as_matrix(), "H FL LF"),
        (Rotation.from_euler("z", 60, degrees=True).as_matrix(), "H L F"),
        (np.array([[2, -1, 2], [2, 2, -1], [-1, 2, 2]]) / 3, "HL FH LF"),  # equally far from two axes
    ],
)
def test_the_axes_of_the_patient_are_those_of_the_largest_cosines(direction: np.ndarray, expected: str) -> None:
    names = {"H": "head-foot", "F": "front-back", "L": "left-right"}
    geometry = replace(plain_geometry((4, 5, 6), (1.0, 1.0, 1.0)), direction=tuple(np.ravel(direction).tolist()))
    assert patient_axes(geometry) == tuple(tuple(names[each] for each in way) for way in expected.split())


def test_geometry_goes_over_into_another_format(tmp_path: Path) -> None:
    for seed, (before, after) in enumerate([(".nrrd", ".nii.gz"), (".nii.gz", ".nrrd"), (".nii.gz", ".mha")]):
        array = write_oblique(tmp_path / f"a{before}", seed)
        write_labels(tmp_path / f"b{after}", *read_labels(tmp_path / f"a{before}"))
        labels, geometry = read_labels(tmp_path / f"b{after}")
        assert np.array_equal(labels, array)
        assert displacement_mm(geometry, read_geometry(tmp_path / f"a{before}")) < 1e-3


@pytest.mark.parametrize(("unit", "mm"), [("mm", 1.0), ("cm", 10.0), ("microns", 0.001)])
def test_the_unit_of_an_nrrd_file_counts_and_is_given_back(tmp_path: Path, unit: str, mm: float) -> None:
    source, copy, other = tmp_path / "a.nrrd", tmp_path / "b.nrrd", tmp_path / "c.nii.gz"
    write_oblique(source, 0, np.uint8)
    plain = read_geometry(source)
    content = source.read_bytes()
    lines = f'space units: "{unit}" "{unit}" "{unit}"\nspace origin: '.encode()
    source.write_bytes(content.replace(b"space origin: ", lines))
    labels, geometry = read_labels(source)
    assert geometry.spacing_mm == tuple(each * mm for each in plain.spacing_mm)
    assert geometry.origin == tuple(each * mm for each in plain.origin)
    for path in (copy, other):
        write_labels(path, labels, geometry)
        assert displacement_mm(read_geometry(path), geometry) < 1e-3 * mm
    assert itk_geometry(copy) == itk_geometry(source)
    source.write_bytes(content.replace(b"space origin: ", lines.replace(unit.encode(), b"nm", 1)))
    with pytest.raises(UserError, match=r"a.nrrd: its axes have different units"):
        read_labels(source)


def test_a_nifti_file_with_skewed_axes_is_read_and_its_axes_are_given_back(tmp_path: Path) -> None:
    source, copy = tmp_path / "a.nii", tmp_path / "b.nii.gz"
    array = write_oblique(source, 0)
    content = bytearray(source.read_bytes())
    struct.pack_into("<hh", content, 252, 0, 2)
    struct.pack_into("<12f", content, 280, 1, 0.02, 0, 5, 0, 1, 0, 6, 0, 0.01, 2, 7)
    source.write_bytes(content)
    labels, geometry = read_labels(source)
    assert np.array_equal(labels, array)
    cosines = np.reshape(geometry.direction, (3, 3))
    assert np.allclose(cosines @ cosines.T, np.eye(3), atol=1e-12)
    assert np.allclose(cosines, np.diag([-1, -1, 1]), atol=0.02)
    assert np.allclose(geometry.itk_spacing, (1, 1, 2), atol=1e-3)
    assert geometry.origin == (-5, -6, 7)
    write_labels(copy, labels, geometry)
    assert gzip.decompress(copy.read_bytes())[252:328] == content[252:328]
    assert read_geometry(copy).direction == geometry.direction


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.int16, np.uint16, np.int32, np.uint32, np.float32, np.float64])
def test_nifti_voxels_are_those_of_itk(tmp_path: Path, dtype: type) -> None:
    write_oblique(tmp_path / "a.nii.gz", 1, dtype)
    expected = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "a.nii.gz")))
    volume = read_image([tmp_path / "a.nii.gz"])
    assert volume.array_CZYX.dtype == np.float32
    assert np.array_equal(volume.array_CZYX[0], expected)
    assert volume.array_CZYX.flags.writeable
    assert volume.array_CZYX.flags.c_contiguous


def test_nifti_scaling_and_byte_order_are_applied(tmp_path: Path) -> None:
    array = write_oblique(tmp_path / "a.nii", 1)
    content = bytearray((tmp_path / "a.nii").read_bytes())
    struct.pack_into("<2f", content, 112, 0.5, -7)
    (tmp_path / "scaled.nii").write_bytes(content)
    assert np.array_equal(read_image([tmp_path / "scaled.nii"]).array_CZYX[0], array * 0.5 - 7)
    assert np.array_equal(
        read_image([tmp_path / "scaled.nii"]).array_CZYX[0],
        sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "scaled.nii"))),
    )
    swapped = bytearray(content[:352])
    for start, stop, kind in ((0, 4, "i4"), (40, 56, "i2"), (56, 68, "f4"), (68, 76, "i2"), (76, 120, "f4")):
        swapped[start:stop] = np.frombuffer(content[start:stop], kind).byteswap().tobytes()
    for start, stop, kind in ((120, 148, "f4"), (252, 256, "i2"), (256, 328, "f4")):
        swapped[start:stop] = np.frombuffer(content[start:stop], kind).byteswap().tobytes()
    struct.pack_into(">2f", swapped, 112, 1, 0)
    (tmp_path / "big.nii").write_bytes(bytes(swapped) + array.astype(">i2").tobytes())
    labels, geometry = read_labels(tmp_path / "big.nii")
    assert np.array_equal(labels, array)
    write_labels(tmp_path / "out.nii", labels, geometry)
    assert itk_geometry(tmp_path / "out.nii") == itk_geometry(tmp_path / "a.nii")
    assert np.array_equal(sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out.nii"))), array)


@pytest.mark.parametrize("ending", [".nii.gz", ".nrrd", ".mha"])
def test_components_are_channels_and_labels_keep_the_geometry(tmp_path: Path, ending: str) -> None:
    array = write_oblique(tmp_path / f"a{ending}", 2, np.float32, vector=True)
    volume = read_image([tmp_path / f"a{ending}"])
    assert np.array_equal(volume.array_CZYX, np.moveaxis(array, -1, 0))
    write_labels(tmp_path / f"b{ending}", np.ones((3, 4, 5), np.int16), volume.geometry)
    assert itk_geometry(tmp_path / f"b{ending}") == itk_geometry(tmp_path / f"a{ending}")


def test_the_fourth_axis_of_a_nifti_file_holds_channels(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=(4, 3, 5, 6)).astype(np.float32)
    image = sitk.JoinSeries([sitk.GetImageFromArray(each) for each in array])
    image.SetSpacing((0.7, 0.8, 2.5, 1.0))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    volume = read_image([tmp_path / "a.nii.gz"])
    assert np.array_equal(volume.array_CZYX, array)
    assert volume.geometry.size_voxels == (3, 5, 6)
    assert volume.geometry.dimension == 3
    write_labels(tmp_path / "b.nii.gz", np.zeros((3, 5, 6), np.int16), volume.geometry)
    written = read_geometry(tmp_path / "b.nii.gz")
    assert (written.itk_spacing, written.origin) == (volume.geometry.itk_spacing, volume.geometry.origin)
    with pytest.raises(UserError, match=r"a.nii.gz: the 4 channels of this label map differ"):
        read_labels(tmp_path / "a.nii.gz")


def test_a_file_per_channel_must_lie_on_one_grid(tmp_path: Path) -> None:
    first, same, moved, small = (tmp_path / f"{name}.nrrd" for name in ("first", "same", "moved", "small"))
    a, b = write_oblique(first, 4), write_oblique(same, 4)
    assert np.array_equal(read_image([first, same]).array_CZYX, np.stack([a, b]))
    image = sitk.ReadImage(str(first))
    image.SetOrigin([each + 2 for each in image.GetOrigin()])
    sitk.WriteImage(image, str(moved))
    sitk.WriteImage(image[1:], str(small))
    with pytest.raises(UserError, match=r"moved.nrrd.*another grid than .*first.nrrd.*3.46 mm"):
        read_image([first, moved])
    with pytest.raises(UserError, match=r"small.nrrd.*\(3, 4, 4\) voxels"):
        read_image([first, small])


@pytest.mark.parametrize(
    ("ending", "dtype"), [(".png", "u1"), (".png", "u2"), (".tif", "u1"), (".tif", "u2"), (".bmp", "u1")]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_photographs_have_one_slice_and_millimetre_pixels(
    tmp_path: Path, ending: str, dtype: str, channels: int
) -> None:
    top = np.iinfo(dtype).max
    array = np.random.default_rng(0).integers(0, top, (12, 17, channels)).astype(dtype)
    path = tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(array if channels > 1 else array[..., 0], isVector=channels > 1), str(path))
    volume = read_image([path])
    assert np.array_equal(volume.array_CZYX, np.moveaxis(array, -1, 0)[:, None])
    assert volume.geometry.spacing_mm == (1, 1, 1)
    assert volume.geometry.size_voxels == (1, 12, 17)


def test_the_print_size_of_a_photograph_is_no_spacing(tmp_path: Path) -> None:
    image = sitk.GetImageFromArray(np.zeros((5, 6), np.uint8))
    image.SetSpacing((0.25, 0.25))
    sitk.WriteImage(image, str(tmp_path / "a.png"))
    geometry = read_geometry(tmp_path / "a.png")
    assert geometry.spacing_mm == (1, 1, 1)
    assert geometry.itk_spacing == (0.25, 0.25)
    for ending, expected in ((".png", (0.25, 0.25)), (".nii.gz", (1, 1)), (".mha", (1, 1))):
        write_labels(tmp_path / f"b{ending}", np.ones((1, 5, 6), np.int32), geometry)
        assert sitk.ReadImage(str(tmp_path / f"b{ending}")).GetSpacing() == expected


def test_alpha_is_dropped_only_when_it_says_nothing(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 255, (8, 9, 4)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / "varied.png"))
    array[..., 3] = 255
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(tmp_path / "constant.png"))
    assert len(read_image([tmp_path / "varied.png"]).array_CZYX) == 4
    assert len(read_image([tmp_path / "constant.png"]).array_CZYX) == 3


@pytest.mark.parametrize(("dtype", "channels"), [(np.uint8, 1), (np.uint16, 1), (np.uint8, 3)])
def test_tiff_images_in_tiles_keep_their_type_and_channels(tmp_path: Path, dtype: type, channels: int) -> None:
    """ITK makes three channels of bytes of all of them."""
    import tifffile

    shape = (40, 50) if channels == 1 else (40, 50, channels)
    array = np.random.default_rng(0).integers(0, 250, shape).astype(dtype)
    path = tmp_path / "tiled.tif"
    tifffile.imwrite(path, array, tile=(16, 32), compression="zlib")
    found = read_image([path]).array_CZYX
    assert np.array_equal(found[:, 0], np.moveaxis(array.reshape(40, 50, channels), -1, 0))
    if channels == 1:
        assert np.array_equal(read_labels(path)[0][0], array)
    path.write_bytes(path.read_bytes()[:1500])
    with pytest.raises(UserError, match=r"tiled\.tif: this image cannot be read"):
        read_image([path])


def test_jpeg_photographs_are_read_but_label_maps_are_never_written_as_such(tmp_path: Path) -> None:
    array = np.kron(np.random.default_rng(0).integers(0, 255, (4, 4)), np.ones((8, 8))).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / "a.jpg"))
    volume = read_image([tmp_path / "a.jpg"])
    assert volume.array_CZYX.shape == (1, 1, 32, 32)
    assert np.abs(volume.array_CZYX[0, 0] - array).mean() < 5
    with pytest.raises(UserError, match=r"b.jpg: label maps cannot have"):
        write_labels(tmp_path / "b.jpg", np.zeros((1, 32, 32), int), volume.geometry)
    assert formats.label_ending(".jpg") == formats.label_ending(".jpeg") == ".png"
    assert formats.label_ending(".tif") == ".tif"


@pytest.mark.parametrize("ending", [".png", ".tif", ".tiff", ".bmp"])
@pytest.mark.parametrize("top", [3, 255, 256])
def test_flat_label_maps_come_back_as_written(tmp_path: Path, ending: str, top: int) -> None:
    labels = np.random.default_rng(0).integers(0, top + 1, (1, 14, 15)).astype(np.int32)
    labels[0, 0, 0] = top
    geometry = Geometry(2, (1, 14, 15), (1, 1, 1), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0), (1.0, 1.0))
    if (ending, top) == (".bmp", 256):
        with pytest.raises(UserError, match=r"0 to 255"):
            write_labels(tmp_path / "a.bmp", labels, geometry)
        return
    write_labels(tmp_path / f"a{ending}", labels, geometry)
    assert np.array_equal(read_labels(tmp_path / f"a{ending}")[0], labels)
    if ending != ".bmp":  # which ITK reads as colours
        assert sitk.ReadImage(str(tmp_path / f"a{ending}")).GetPixelID() == (
            sitk.sitkUInt8 if top < 256 else sitk.sitkUInt16
        )


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ((0, 255), "8-bit unsigned"),
        ((0, 256), "16-bit unsigned"),
        ((-1, 9), "16-bit signed"),
        ((0, 70000), "32-bit signed"),
    ],
)
@pytest.mark.parametrize("ending", VOLUMES)
def test_the_smallest_type_that_holds_the_labels_is_written(
    tmp_path: Path, values: tuple, kind: str, ending: str
) -> None:
    write_oblique(tmp_path / f"a{ending}", 0)
    labels = np.full((3, 4, 5), values[0], np.int32)
    labels[1] = values[1]
    for geometry in (read_geometry(tmp_path / f"a{ending}"), plain_geometry((3, 4, 5), (2.0, 1.0, 1.0))):
        write_labels(tmp_path / f"b{ending}", labels, geometry)
        assert np.array_equal(read_labels(tmp_path / f"b{ending}")[0], labels)
        assert kind in sitk.ReadImage(str(tmp_path / f"b{ending}")).GetPixelIDTypeAsString()
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("ending", [each for each in formats.READABLE if each not in formats.LABEL_ENDINGS])
def test_a_label_map_that_did_not_fit_is_never_put_in_place(
    tmp_path: Path, ending: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ITK says nothing when it cannot write on: not for TIFF, BMP and NIfTI, nor for a small PNG."""
    labels = np.random.default_rng(0).integers(0, 250, (1, 90, 90))
    geometry = Geometry(2, (1, 90, 90), (1, 1, 1), (0.0, 0.0), (1.0, 0.0, 0.0, 1.0), (1.0, 1.0))
    path = tmp_path / f"a{ending}"
    write_labels(path, labels, geometry)
    before = path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match=f"a{ending}") as caught:
            write_labels(path, labels, geometry)
        assert caught.value.errno == errno.EFBIG
        free = shutil.disk_usage(tmp_path)._replace(free=0)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(UserError, match=r"the disk is full"):
            write_labels(path, labels, geometry)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.read_bytes() == before
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


def test_a_later_channel_of_a_label_map_may_not_differ(tmp_path: Path) -> None:
    same = np.ones((5, 3, 4, 5), np.uint8)
    for count, last in ((4, 1), (4, 2), (5, 2)):
        array = same[:count].copy()
        array[-1] = last
        image = sitk.JoinSeries([sitk.GetImageFromArray(each) for each in array])
        sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
        if last == 1:
            assert np.array_equal(read_labels(tmp_path / "a.nii.gz")[0], same[0])
            continue
        with pytest.raises(UserError, match=rf"a.nii.gz: the {count} channels of this label map differ"):
            read_labels(tmp_path / "a.nii.gz")


def test_colour_masks_with_equal_channels_and_whole_floats_are_label_maps(tmp_path: Path) -> None:
    grey = np.random.default_rng(0).integers(0, 3, (6, 7)).astype(np.uint8)
    alpha = np.arange(42, dtype=np.uint8).reshape(6, 7)
    sitk.WriteImage(
        sitk.GetImageFromArray(np.stack([grey] * 3 + [alpha], -1), isVector=True), str(tmp_path / "rgba.png")
    )
    assert np.array_equal(read_labels(tmp_path / "rgba.png")[0][0], grey)
    sitk.WriteImage(sitk.GetImageFromArray(grey.astype(np.float64)[None]), str(tmp_path / "whole.nrrd"))
    assert np.array_equal(read_labels(tmp_path / "whole.nrrd")[0][0], grey)
    for wrong in (0.5, np.nan, np.inf):
        sitk.WriteImage(sitk.GetImageFromArray(np.full((2, 2, 2), wrong, np.float32)), str(tmp_path / "wrong.nii.gz"))
        with pytest.raises(UserError, match=f"wrong.nii.gz: the label map holds {wrong}"):
            read_labels(tmp_path / "wrong.nii.gz")


@pytest.mark.parametrize("ending", formats.READABLE)
@pytest.mark.parametrize("damage", ["empty", "half", "end", "junk"])
@pytest.mark.parametrize("vector", [False, True])
def test_damaged_files_are_named_and_nothing_is_printed(
    tmp_path: Path, ending: str, damage: str, vector: bool, capfd: pytest.CaptureFixture
) -> None:
    path = tmp_path / f"case_07{ending}"
    if ending in formats.PHOTOGRAPHS:
        array = np.random.default_rng(0).integers(0, 255, (40, 50, 3)).astype(np.uint8)
        sitk.WriteImage(sitk.GetImageFromArray(array, isVector=True), str(path))
    else:
        write_oblique(path, 0, vector=vector)
    whole = path.read_bytes()
    junk = np.random.default_rng(0).bytes(600)
    path.write_bytes({"empty": b"", "half": whole[: len(whole) // 2], "end": whole[:-20], "junk": junk}[damage])
    for read in (lambda each: read_image([each]), read_labels):
        with pytest.raises(UserError, match=f"case_07{ending}: .*"):
            read(path)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("ending", [".nii", ".nii.gz"])
def test_a_nifti_file_of_colours_is_whole_too(tmp_path: Path, ending: str) -> None:
    """ITK decodes it, and fills up with zeros what is missing."""
    array = np.random.default_rng(0).integers(1, 100, (3, 4, 5, 3)).astype(np.uint8)
    plain, path = tmp_path / "plain.nii", tmp_path / f"a{ending}"
    sitk.WriteImage(sitk.GetImageFromArray(array[..., 0]), str(plain))
    header = bytearray(plain.read_bytes()[:352])
    struct.pack_into("<2h", header, 70, 128, 24)  # RGB24
    for missing in (0, 7):
        content = (bytes(header) + array.tobytes())[: 352 + array.size - missing]
        path.write_bytes(content if ending == ".nii" else gzip.compress(content))
        if missing:
            with pytest.raises(UserError, match=rf"a{ending}: the file is truncated: 7 bytes"):
                read_image([path])
        else:
            assert np.array_equal(read_image([path]).array_CZYX, np.moveaxis(array, -1, 0))


def test_a_wrong_checksum_in_a_compressed_nifti_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.nii.gz"
    array = np.random.default_rng(0).integers(0, 2**15, (90, 90, 90)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a.nii.gz: the file is truncated or damaged"):
        read_image([path])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.nii.gz: no such file"):
        read_geometry(tmp_path / "nothing.nii.gz")


def test_a_file_that_may_not_be_read_and_a_name_that_is_no_text_are_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match=r"M\\xfcller.*not UTF-8\. Rename it"):
        read_geometry(os.fsdecode(os.fsencode(tmp_path) + b"/M\xfcller.mha"))
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((8, 9), np.uint8)), str(tmp_path / "a.jpg"))

    def refuse(*_: object) -> None:  # root may read everything
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(formats, "open", refuse, raising=False)
    for read in (read_geometry, read_labels, formats.channels_held, lambda each: read_image([each])):
        with pytest.raises(UserError, match=r"a\.jpg: this file cannot be opened \(Permission denied\)"):
            read(tmp_path / "a.jpg")


@pytest.mark.parametrize(
    ("name", "line", "message"),
    [
        ("a.mha", "ElementSpacing = 1 -1 2", r"the voxel spacing is \(2\.0, -1\.0, 1\.0\) mm \(Z Y X\)"),
        ("a.nrrd", "spacings: 1 -1 2", r"the voxel spacing is \(2\.0, -1\.0, 1\.0\) mm \(Z Y X\)"),
        ("a.mha", "TransformMatrix = 1 0 0 1 0 0 0 0 1", "two axes run the same way in its header"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_in_every_format(tmp_path: Path, name: str, line: str, message: str) -> None:
    nrrd = f"NRRD0004\ntype: uint8\ndimension: 3\nsizes: 5 4 3\nencoding: raw\n{line}\n\n"
    mha = (
        "ObjectType = Image\nNDims = 3\nDimSize = 5 4 3\nElementType = MET_UCHAR\n"
        f"{line}\nElementDataFile = LOCAL\n"
    )
    (tmp_path / name).write_bytes((mha if name == "a.mha" else nrrd).encode() + bytes(60))
    with pytest.raises(UserError, match=rf"a\.\w+: {message}"):
        read_image([tmp_path / name])


@pytest.mark.parametrize("orientation", [0, 1, 3, 6])
def test_photographs_that_are_to_be_shown_turned_are_refused(tmp_path: Path, orientation: int) -> None:
    from PIL import Image

    exif = Image.Exif()
    exif[271], exif[274] = "a camera", orientation
    Image.fromarray(np.zeros((8, 9, 3), np.uint8)).save(tmp_path / "a.jpg", exif=exif)
    if orientation < 2:
        assert read_image([tmp_path / "a.jpg"]).array_CZYX.shape == (3, 1, 8, 9)
        return
    with pytest.raises(UserError, match=rf"a\.jpg: its tag Orientation is {orientation}.*upright"):
        read_image([tmp_path / "a.jpg"])


def test_what_itk_does_not_read_in_bmp_is_not_called_damaged(tmp_path: Path) -> None:
    from PIL import Image

    Image.fromarray(np.eye(8, 9) > 0).save(tmp_path / "a.bmp")
    with pytest.raises(UserError, match=r"a\.bmp: .*Not 1\)\. Save it as PNG"):
        read_labels(tmp_path / "a.bmp")


def test_a_header_that_names_no_file_of_voxels_has_none(tmp_path: Path) -> None:
    (tmp_path / "a.mhd").write_text("NDims = 3\nElementDataFile =\n")
    assert files_of(tmp_path / "a.mhd") == (tmp_path / "a.mhd",)


def test_probabilities_come_back_with_names_and_geometry(tmp_path: Path) -> None:
    write_oblique(tmp_path / "a.nii.gz", 5)
    geometry = read_geometry(tmp_path / "a.nii.gz")
    probabilities = np.random.default_rng(0).random((2, 3, 4, 5)).astype(np.float32)
    path = tmp_path / "a.probabilities.b2nd"
    write_whole(path, probabilities, geometry, ("background", "Läsion"))
    read, names, where = read_whole(path)
    assert read.dtype == np.float32
    assert np.abs(read - probabilities).max() < 1e-3
    assert names == ("background", "Läsion")
    assert where == geometry
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match=r"a.probabilities.b2nd"):
        read_whole(path)


def test_endings_are_found_in_any_case_and_stems_keep_their_dots() -> None:
    assert formats.ending_of("x/a.b.NII.GZ") == ".nii.gz"
    assert formats.stem_of("x/a.b.NII.GZ") == "a.b"
    assert formats.ending_of("a.gz") == formats.ending_of(".png") == formats.ending_of("a") == ""
    assert formats.stem_of("case_0000.tif") == "case_0000"


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the folder ../shared/data")
def test_real_photographs_and_scans_are_read() -> None:
    volume = read_image([DATA / "drive" / "images" / "21.tif"])
    assert volume.array_CZYX.shape == (3, 1, 584, 565)
    assert volume.array_CZYX.max() <= 255
    assert volume.array_CZYX.std() > 10
    assert np.unique(read_labels(DATA / "drive" / "masks" / "21.png")[0]).tolist() == [0, 255]
    assert read_image([DATA / "ct" / "ct.nii.gz"]).geometry.spacing_mm == (3, 3, 3)


@pytest.mark.parametrize("field", [268, 292])
def test_a_place_that_is_not_a_number_is_refused_by_name(tmp_path: Path, field: int) -> None:
    path = tmp_path / "a.nii"
    write_oblique(path, 0)
    content = bytearray(path.read_bytes())
    forms = (1, 0) if field < 280 else (0, 2)
    struct.pack_into("<2h", content, 252, *forms)
    struct.pack_into("<f", content, field, np.nan)
    path.write_bytes(content)
    for read in (read_geometry, read_labels, lambda each: read_image([each])):
        with pytest.raises(UserError, match=r"a.nii: "):
            read(path)


@pytest.mark.parametrize("side", [0.0, -1.5, float("nan")])
def test_a_nifti_file_whose_voxels_have_no_size_is_refused_by_name(tmp_path: Path, side: float) -> None:
    path = tmp_path / "flat.nii.gz"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(path))
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[80:84] = np.float32(side).tobytes()
    path.write_bytes(gzip.compress(bytes(content)))
    with pytest.raises(UserError, match=r"flat.nii.gz: the header gives a spacing"):
        read_image([path])


@pytest.mark.parametrize("offset", [float("nan"), float("inf")])
def test_voxels_without_a_place_lie_behind_the_header(tmp_path: Path, offset: float) -> None:
    path = tmp_path / "a.nii"
    array = write_oblique(path, 0)
    content = bytearray(path.read_bytes())
    struct.pack_into("<f", content, 108, offset)
    path.write_bytes(content)
    assert np.array_equal(read_labels(path)[0], array)


@pytest.mark.parametrize(
    ("codes", "side", "refused"),
    [((0, 1), 0.5, True), ((0, 2), 0.5, True), ((1, 1), 0.5, True), ((1, 4), 0.5, False), ((0, 1), 0.995, False)],
)
def test_a_nifti_file_whose_headers_give_two_spacings_is_refused_where_itk_would_mix_them(
    tmp_path: Path, codes: tuple[int, int], side: float, refused: bool
) -> None:
    path = tmp_path / "a.nii"
    sitk.WriteImage(sitk.GetImageFromArray(np.ones((4, 5, 6), np.float32)), str(path))
    content = bytearray(path.read_bytes())
    struct.pack_into("<2h", content, 252, *codes)
    struct.pack_into("<12f", content, 280, *np.diag([side, 1.0, 1.0, 0.0])[:3].ravel())
    path.write_bytes(content)
    if refused:
        with pytest.raises(UserError, match=r"a\.nii: the sform .* spacing of 0\.5 x 1 x 1, pixdim 1 x 1 x 1"):
            read_geometry(path)
    else:
        assert read_geometry(path).spacing_mm == (1, 1, 1)
