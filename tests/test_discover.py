"""cases/discover.py and cases/listing.py: the accepted layouts, and what is said about others."""

import json
import os
from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import SimpleITK as sitk
from skimage.transform import resize

from autoseg.cases.discover import discover
from autoseg.cases.listing import list_images
from autoseg.cases.split import splits_for
from autoseg.errors import UserError
from autoseg.events import Warned
from autoseg.records import Case, Label, Region

SHARED = Path(__file__).parents[2] / "shared" / "data"


def save(path: Path, array: np.ndarray, vector: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(sitk.GetImageFromArray(array, isVector=vector), str(path))


def volume(value: float = 1.0) -> np.ndarray:
    return np.full((3, 4, 5), value, np.float32)


def labels(*values: int) -> np.ndarray:
    array = np.zeros((3, 4, 5), np.uint8)
    array.flat[: len(values)] = values
    return array


def describe(folder: Path, **content: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "dataset.json").write_text(json.dumps(content))


def decathlon(folder: Path, **more: object) -> None:
    listed = [{"image": f"./imagesTr/a{n}.nii.gz", "label": f"./labelsTr/a{n}.nii.gz"} for n in (2, 1)]
    content = {"name": "Toy", "modality": {"0": "MRI"}, "labels": {"0": "background", "2": "late", "1": "early"}}
    describe(folder, **(content | {"training": listed} | more))
    for n in (1, 2):
        save(folder / f"imagesTr/a{n}.nii.gz", volume())
        save(folder / f"labelsTr/a{n}.nii.gz", labels(1, 2))


def test_a_decathlon_folder_is_read(tmp_path: Path) -> None:
    decathlon(tmp_path, patients={"a1": "p", "a2": "p"})
    dataset = discover(tmp_path)
    assert (dataset.name, dataset.channels, dataset.dimension, dataset.file_ending) == ("Toy", ("MRI",), 3, ".nii.gz")
    assert [label.name for label in dataset.labels] == ["background", "early", "late"]
    assert [(case.id, case.group) for case in dataset.cases] == [("a1", "p"), ("a2", "p")]
    assert dataset.cases[0].label == str(tmp_path / "labelsTr" / "a1.nii.gz")


def test_an_nnunet_folder_is_read_and_a_missing_channel_keeps_its_place(tmp_path: Path) -> None:
    describe(
        tmp_path,
        channel_names={"0": "T1", "1": "T2"},
        labels={"background": 0, "tumour": 1, "ignore": 2},
        file_ending=".nii.gz",
        numTraining=2,
    )
    for name in ("a_0000", "a_0001", "b_0000"):
        save(tmp_path / f"imagesTr/{name}.nii.gz", volume())
    for name in ("a", "b"):
        save(tmp_path / f"labelsTr/{name}.nii.gz", labels(1, 2))
    dataset = discover(tmp_path)
    assert dataset.ignore_value == 2
    assert dataset.labels == (Label(name="background", value=0), Label(name="tumour", value=1))
    assert dataset.channels == ("T1", "T2")
    assert [case.id for case in dataset.cases] == ["a", "b"]
    assert dataset.cases[1].images[1] == str(tmp_path / "imagesTr" / "b_0001.nii.gz")


@pytest.mark.parametrize("described", [True, False])
def test_photographs_of_nnunet_hold_all_channels_in_the_file_of_the_first(tmp_path: Path, described: bool) -> None:
    for name in ("img-0", "img-1"):
        save(tmp_path / f"imagesTr/{name}_0000.png", np.full((6, 7, 3), 9, np.uint8), vector=True)
        save(tmp_path / f"labelsTr/{name}.png", np.eye(6, 7, dtype=np.uint8))
    if described:
        names = {"0": "R", "1": "G", "2": "B"}
        describe(tmp_path, channel_names=names, labels={"background": 0, "road": 1}, numTraining=2, file_ending=".png")
    trained = discover(tmp_path, workers=1)
    assert [case.id for case in trained.cases] == ["img-0", "img-1"]
    assert [case.images for case in trained.cases] == [
        (str(tmp_path / "imagesTr" / f"img-{n}_0000.png"),) for n in (0, 1)
    ]
    found = list_images(tmp_path / "imagesTr", len(trained.channels))
    assert [(case.id, case.images) for case in found] == [(case.id, case.images) for case in trained.cases]
    assert list_images(tmp_path / "imagesTr" / "img-0_0000.png", 3) == found[:1]


@pytest.mark.parametrize("channels", [1, 2])
def test_the_first_version_of_nnunet_lists_cases_without_the_number_of_their_channels(
    tmp_path: Path, channels: int
) -> None:
    decathlon(tmp_path, modality={str(n): f"T{n}" for n in range(channels)})
    for n in (1, 2):
        (tmp_path / f"imagesTr/a{n}.nii.gz").unlink()
        for channel in range(channels):
            save(tmp_path / f"imagesTr/a{n}_{channel:04d}.nii.gz", volume())
    (tmp_path / f"imagesTr/a2_{channels - 1:04d}.nii.gz").unlink()
    first, second = discover(tmp_path, workers=1).cases
    assert (first.id, second.id) == ("a1", "a2")
    paths = [str(tmp_path / "imagesTr" / f"a1_{channel:04d}.nii.gz") for channel in range(channels)]
    assert first.images == tuple(paths)
    assert len(second.images) == channels


@pytest.mark.parametrize("key", ["channel_names", "modality"])
def test_channels_come_in_the_order_of_their_numbers(tmp_path: Path, key: str) -> None:
    numbers = (1, 10, 0, *range(9, 1, -1))
    describe(tmp_path, **{key: {str(n): f"C{n}" for n in numbers}}, labels={"background": 0, "tumour": 1})
    for number in numbers:
        save(tmp_path / f"imagesTr/a_{number:04d}.nii.gz", volume())
    save(tmp_path / "labelsTr/a.nii.gz", labels(1))
    dataset = discover(tmp_path, workers=1)
    assert dataset.channels == tuple(f"C{n}" for n in range(11))
    assert [Path(path).name for path in dataset.cases[0].images] == [f"a_{n:04d}.nii.gz" for n in range(11)]


@pytest.mark.parametrize("name", ["../../x/y", "site1/case3", "site1\\case3", ".hidden", "", "a.unfinished-b"])
def test_a_name_that_no_file_can_have_is_refused_with_where_it_stands(tmp_path: Path, name: str) -> None:
    decathlon(tmp_path)
    content = json.loads((tmp_path / "dataset.json").read_text())
    entries = content.pop("training")
    describe(tmp_path, **content, dataset={"good": entries[0], name or " ": entries[1]})
    if name:
        with pytest.raises(UserError, match=r"dataset\.json: a case cannot be called") as caught:
            discover(tmp_path)
        assert repr(name) in caught.value.what
    with pytest.raises(ValueError, match="a case cannot be called"):
        Case(id=name, images=("a.nii.gz",))


def test_names_that_differ_in_upper_and_lower_case_alone_are_refused(tmp_path: Path) -> None:
    for name in ("Scan1", "scan1", "scan2"):
        save(tmp_path / f"images/{name}.nii.gz", volume())
        save(tmp_path / f"labels/{name}.nii.gz", labels(1))
    with pytest.raises(UserError, match="cases Scan1 and scan1 differ in upper and lower case alone"):
        discover(tmp_path, workers=1)


def test_names_are_the_same_however_their_accents_are_written(tmp_path: Path) -> None:
    apart, whole = [[normalize(form, f"Müller{n}") for n in (0, 1)] for form in ("NFD", "NFC")]
    for image, label in zip(apart, whole, strict=True):
        save(tmp_path / f"images/{image}.nii.gz", volume())
        save(tmp_path / f"labels/{label}.nii.gz", labels(1))
    (tmp_path / "groups.csv").write_text(f"case,group\n{whole[0]},x\n")
    describe(tmp_path, labels={"background": 0, "a": 1}, annotated={whole[1]: ["a"]})
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": whole[:1], "val": whole[1:]}]))
    dataset = discover(tmp_path, workers=1)
    assert [(case.id, case.group, case.annotated) for case in dataset.cases] == [
        (apart[0], "x", None), (apart[1], None, ("a",))
    ]  # fmt: skip
    assert all(case.label for case in dataset.cases)
    assert splits_for(dataset).folds[0].validation == (apart[1],)
    listed = [{"image": f"images/{name}.nii.gz", "label": f"labels/{name}.nii.gz"} for name in whole]
    describe(tmp_path, labels={"background": 0, "a": 1}, training=listed)
    assert all(Path(path).is_file() for case in discover(tmp_path, workers=1).cases for path in case.images)
    save(tmp_path / f"images/{whole[0]}.nii.gz", volume())
    (tmp_path / "dataset.json").unlink()
    with pytest.raises(UserError, match="differ in how accents are written alone"):
        discover(tmp_path, workers=1)


@pytest.mark.skipif(os.name == "nt", reason="names are text there")
def test_a_name_whose_bytes_are_no_text_is_refused_before_a_file_is_opened(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.nii.gz", volume())
    save(tmp_path / "labels" / "a.nii.gz", labels(1))
    os.rename(tmp_path / "images" / "a.nii.gz", os.fsencode(tmp_path / "images") + b"/M\xfcller.nii.gz")
    for read in (lambda: discover(tmp_path, workers=1), lambda: list_images(tmp_path / "images", 1)):
        with pytest.raises(UserError, match=r"M\\xfcller.*not UTF-8\. Rename it"):
            read()


def test_links_to_files_that_are_not_there_are_missing_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"images/{name}.nii.gz", volume())
        save(tmp_path / f"labels/{name}.nii.gz", labels(1))
    for kind in ("images", "labels"):
        (tmp_path / kind / "b.nii.gz").unlink()
        (tmp_path / kind / "b.nii.gz").symlink_to("/nowhere/of/git-annex")
    assert [case.id for case in discover(tmp_path, workers=1).cases] == ["a", "b"]
    with pytest.raises(UserError, match=r"1 channel file\(s\) are missing: .*b\.nii\.gz\. They are links"):
        list_images(tmp_path / "images", 1)


def test_a_mask_that_was_resized_smoothly_is_noticed(tmp_path: Path) -> None:
    disk = np.hypot(*np.mgrid[-32:32, -32:32]) < 20
    for n, mask in enumerate((disk * 255.0, resize(disk * 255.0, (96, 96), order=3))):
        folder, told = tmp_path / str(n), []
        save(folder / "images" / "a.png", np.zeros(mask.shape, np.uint8))
        save(folder / "masks" / "a.png", np.rint(mask.clip(0, 255)).astype(np.uint8))
        discover(folder, workers=1, report=told.append)
        assert any(isinstance(each, Warned) and "look anti-aliased" in each.text for each in told) == bool(n)


@pytest.mark.parametrize(
    ("table", "description", "message"),
    [
        ("case,group\na1,Müller\n".encode("cp1252"), {}, r"groups\.csv: its text is not in UTF-8"),
        (b"group,case\nx,a1\ny\n", {}, ""),
        (None, {"patients": ["a1", "a2"]}, r"dataset\.json: 'patients' must map cases to patients"),
        (None, {"patients": {"p": ["a1", "a2"]}}, r"dataset\.json: 'patients' must map cases to patients"),
        (None, {"labels": {"1": "tumour", "2": "tumour"}}, "two label values are called 'tumour'"),
    ],
)
def test_what_stands_beside_the_images_is_refused_with_the_reason(
    tmp_path: Path, table: bytes | None, description: dict, message: str
) -> None:
    decathlon(tmp_path, **description)
    if table is not None:
        (tmp_path / "groups.csv").write_bytes(table)
    if not message:
        assert [case.group for case in discover(tmp_path, workers=1).cases] == ["x", None]
        return
    with pytest.raises(UserError, match=message):
        discover(tmp_path, workers=1)


def test_one_name_with_several_values_makes_every_name_a_region(tmp_path: Path) -> None:
    named = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    decathlon(tmp_path, labels=named, regions_class_order=[1, 2])
    dataset = discover(tmp_path)
    assert dataset.regions == (Region(name="whole", labels=(1, 2), paint=1), Region(name="core", labels=(2,), paint=2))
    assert [(label.name, label.value) for label in dataset.labels] == [("background", 0), ("label_1", 1), ("core", 2)]
    assert dataset.ignore_value == 3


def test_photographs_with_masks_of_another_ending_are_matched_by_name(tmp_path: Path) -> None:
    mask = np.zeros((6, 7), np.uint8)
    mask[2] = 255
    for n in (21, 22):
        save(tmp_path / f"images/{n}.tif", np.full((6, 7, 3), 9, np.uint8), vector=True)
        save(tmp_path / f"masks/{n}.png", mask)
    dataset = discover(tmp_path, workers=1)
    assert dataset.labels == (Label(name="background", value=0), Label(name="class_255", value=255))
    assert (dataset.channels, dataset.dimension, dataset.file_ending) == (("red", "green", "blue"), 2, ".png")
    assert dataset.cases[0].images == (str(tmp_path / "images" / "21.tif"),)
    assert dataset.cases[0].label == str(tmp_path / "masks" / "21.png")


def test_numbers_that_label_maps_carry_too_count_cases_and_not_channels(tmp_path: Path) -> None:
    for n in range(3):
        save(tmp_path / f"img/scan_{n:04d}.nii.gz", volume())
        save(tmp_path / f"mask/scan_{n:04d}.nii.gz", labels(4, 7))
    dataset = discover(tmp_path, workers=1)
    assert [case.id for case in dataset.cases] == ["scan_0000", "scan_0001", "scan_0002"]
    assert dataset.channels == ("image",)
    assert [label.value for label in dataset.labels] == [0, 4, 7]


def test_an_image_without_label_and_a_label_without_image_are_kept_for_the_check(tmp_path: Path) -> None:
    for name in ("a", "b"):
        save(tmp_path / f"images/{name}.nii.gz", volume())
    for name in ("a", "c"):
        save(tmp_path / f"labels/{name}.nii.gz", labels(1))
    cases = {case.id: case for case in discover(tmp_path, workers=1).cases}
    assert cases["b"].label is None
    assert cases["c"].images == (str(tmp_path / "images" / "c.nii.gz"),)


def test_groups_come_from_a_table(tmp_path: Path) -> None:
    decathlon(tmp_path)
    (tmp_path / "groups.csv").write_text("case,group\na1,x\na2,\n")
    assert [case.group for case in discover(tmp_path).cases] == ["x", None]
    (tmp_path / "groups.csv").write_text("case,group\na9,x\n")
    with pytest.raises(UserError, match="no case 'a9'"):
        discover(tmp_path)


def test_cases_with_two_files_for_one_thing_are_all_named_for_the_check(tmp_path: Path) -> None:
    for name in ("images/a.nii.gz", "images/a.mha", "images/b.mha", "images/c.mha"):
        save(tmp_path / name, volume())
    for name in ("labels/a.nii.gz", "labels/b.mha", "labels/b.nrrd", "labels/c.mha"):
        save(tmp_path / name, labels(1))
    dataset = discover(tmp_path, workers=1)
    assert [case.id for case in dataset.cases] == ["a", "b", "c"]
    assert [each.id for each in dataset.left_out] == ["b", "a"]
    assert all(part in dataset.left_out[1].problem for part in ("images/a.mha", "images/a.nii.gz"))
    with pytest.raises(UserError, match="Case a appears twice"):
        list_images(tmp_path / "images", 1)


def test_images_without_any_label_map_are_refused_with_the_rule(tmp_path: Path) -> None:
    save(tmp_path / "images/a.nii.gz", volume())
    (tmp_path / "labels").mkdir()
    with pytest.raises(UserError, match=r"none of the 1 images has a label map.*name of its image"):
        discover(tmp_path, workers=1)


def test_unreadable_label_maps_are_left_for_the_check(tmp_path: Path) -> None:
    save(tmp_path / "images/a.nii.gz", volume())
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / "a.nii.gz").write_text("hello")
    assert [case.id for case in discover(tmp_path, workers=1).cases] == ["a"]
    save(tmp_path / "labels" / "a.nii.gz", labels())
    with pytest.raises(UserError, match="nothing but 0"):
        discover(tmp_path, workers=1)


def test_hidden_files_are_left_out(tmp_path: Path) -> None:
    save(tmp_path / "images/a.nii.gz", volume())
    save(tmp_path / "labels/a.nii.gz", labels(1))
    (tmp_path / "images" / "._a.nii.gz").write_bytes(b"resource fork")
    (tmp_path / "images" / "a.nii.gz.unfinished-here~1~ab.nii.gz").write_bytes(b"half")
    assert len(discover(tmp_path, workers=1).cases) == 1


def test_a_folder_of_no_layout_is_refused_with_the_layouts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Accepted are: images/ with labels/.*Decathlon.*nnU-Net"):
        discover(tmp_path)
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    with pytest.raises(UserError, match="no readable image"):
        discover(tmp_path)


def test_dicom_series_are_called_so_and_the_way_out_is_named(tmp_path: Path) -> None:
    (tmp_path / "images" / "case").mkdir(parents=True)
    (tmp_path / "labels").mkdir()
    (tmp_path / "images" / "case" / "IM0001").write_bytes(bytes(128) + b"DICM" + bytes(64))
    for read in (discover, lambda folder: list_images(folder / "images", 1)):
        with pytest.raises(UserError, match=r"DICOM files, which are not read yet.*dcm2niix"):
            read(tmp_path)
    with pytest.raises(UserError, match=r"IM0001: a DICOM file; DICOM is not read yet.*dcm2niix"):
        list_images(tmp_path / "images" / "case" / "IM0001", 1)
    (tmp_path / "a.txt").write_text("no image")
    with pytest.raises(UserError, match=r"a\.txt: its name has no ending that is read.*\.nii\.gz"):
        list_images(tmp_path / "a.txt", 1)


def test_a_broken_dataset_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text("{")
    with pytest.raises(UserError, match=r"dataset\.json: not valid JSON"):
        discover(tmp_path)


def test_images_to_predict_are_grouped_by_channel(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000", "b_0001"):
        save(tmp_path / "two" / f"{name}.nii.gz", volume())
    assert [case.id for case in list_images(tmp_path / "two", 2)] == ["a", "b"]
    save(tmp_path / "one" / "a_0000.nii.gz", volume())
    assert [case.id for case in list_images(tmp_path / "one", 1)] == ["a"]
    save(tmp_path / "plain" / "a.nii.gz", volume())
    assert [case.id for case in list_images(tmp_path / "plain", 3)] == ["a"]
    assert list_images(tmp_path / "plain" / "a.nii.gz", 1)[0].id == "a"


def test_one_image_has_the_name_that_it_has_among_others(tmp_path: Path) -> None:
    for name in ("amos_0004", "amos_0007"):
        save(tmp_path / f"{name}.nii.gz", volume())
    together = [case.id for case in list_images(tmp_path, 1)]
    assert together == [list_images(tmp_path / f"{name}.nii.gz", 1)[0].id for name in together]
    assert together == ["amos_0004", "amos_0007"]
    save(tmp_path / "first" / "scan_0000.nii.gz", volume())
    assert list_images(tmp_path / "first" / "scan_0000.nii.gz", 1)[0].id == "scan"


def test_photographs_that_are_numbered_from_nought_are_cases_in_training_and_prediction(tmp_path: Path) -> None:
    for number in range(3):
        colours = np.random.default_rng(number).integers(0, 255, (6, 7, 3), np.uint8)
        save(tmp_path / "images" / f"frame_{number:04d}.png", colours, vector=True)
        save(tmp_path / "masks" / f"frame_{number:04d}.png", np.eye(6, 7, dtype=np.uint8))
    trained = discover(tmp_path, workers=1)
    assert [case.id for case in trained.cases] == ["frame_0000", "frame_0001", "frame_0002"]
    found = list_images(tmp_path / "images", len(trained.channels))
    assert [(case.id, case.images) for case in found] == [(case.id, case.images) for case in trained.cases]
    assert list_images(tmp_path / "images" / "frame_0000.png", 3)[0].id == "frame_0000"


def test_label_maps_as_jpeg_are_refused_before_anything_is_learned_from_them(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.jpg", np.zeros((8, 9), np.uint8))
    save(tmp_path / "masks" / "a.jpg", np.eye(8, 9, dtype=np.uint8) * 255)
    with pytest.raises(UserError, match=r"masks/a\.jpg: JPEG blurs label maps, 1 of 1"):
        discover(tmp_path, workers=1)


def test_a_missing_channel_of_an_image_to_predict_is_named(tmp_path: Path) -> None:
    for name in ("a_0000", "a_0001", "b_0000"):
        save(tmp_path / f"{name}.nii.gz", volume())
    with pytest.raises(UserError, match="b_0001"):
        list_images(tmp_path, 2)


@pytest.mark.skipif(not (SHARED / "drive").is_dir(), reason="needs the folder ../shared/data/drive")
def test_the_retina_photographs_are_understood() -> None:
    dataset = discover(SHARED / "drive", workers=1)
    assert len(dataset.cases) == 20
    assert (dataset.dimension, dataset.channels) == (2, ("red", "green", "blue"))
    assert [label.value for label in dataset.labels] == [0, 255]


@pytest.mark.skipif(not (SHARED / "broken").is_dir(), reason="needs the folder ../shared/data/broken")
def test_a_folder_with_nothing_but_an_image_is_refused() -> None:
    with pytest.raises(UserError, match="Accepted are"):
        discover(SHARED / "broken")
