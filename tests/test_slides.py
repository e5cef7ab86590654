"""Slides: read and written in bands, segmented as in memory."""

import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest
import tifffile
from planned import INTENSITIES, a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from test_predict import write_network

from autoseg.errors import UserError
from autoseg.events import Event, Said, Warned
from autoseg.image import slides
from autoseg.image.formats import read_image, read_labels
from autoseg.image.slides import BAND_ROWS, channels_of, is_slide, nonzero_box, open_slide, write_slide
from autoseg.layout import Layout
from autoseg.records import AugmentSpec, Label, Plan, Postprocessing, Rule, TrainSpec
from autoseg.steps.ensemble import ensemble_runs
from autoseg.steps.predict import predict
from autoseg.steps.predicting.slides import empty_bands
from autoseg.store import load, save


def picture(height: int, width: int, channels: int = 1) -> np.ndarray:
    """Noise (Y, X, C) with a border of zeros on three sides."""
    found = np.random.default_rng(0).integers(1, 255, (height, width, channels), np.uint8)
    found[:9], found[:, :5], found[:, -3:] = 0, 0, 0
    return found


LAYOUTS = pytest.mark.parametrize(
    "layout", [{"tile": (32, 48)}, {"rowsperstrip": 7}, {"tile": (16, 16), "compression": "zlib"}, {}], ids=str
)


@LAYOUTS
@pytest.mark.parametrize("channels", [1, 3])
def test_bands_of_any_layout_are_what_is_in_the_file(tmp_path: Path, layout: dict, channels: int) -> None:
    whole = picture(100, 83, channels)
    tifffile.imwrite(tmp_path / "a.tif", whole.squeeze(), photometric="rgb" if channels == 3 else None, **layout)
    with open_slide(tmp_path / "a.tif") as slide:
        assert slide.shape == (channels, 100, 83)
        for start, stop in ((0, 100), (3, 4), (31, 33), (90, 100)):
            np.testing.assert_array_equal(slide.rows(start, stop), np.moveaxis(whole[start:stop], -1, 0))
        assert nonzero_box(slide, channels) == ((9, 100), (5, 80))


def test_a_constant_alpha_channel_does_not_count(tmp_path: Path) -> None:
    for alpha, channels in ((255, 3), (None, 4)):
        whole = picture(40, 40, 4)
        if alpha is not None:
            whole[..., 3] = alpha
        tifffile.imwrite(tmp_path / "a.tif", whole, photometric="rgb", tile=(16, 16), extrasamples=["unassalpha"])
        with open_slide(tmp_path / "a.tif") as slide:
            assert channels_of(slide) == channels


def test_a_blank_marker_is_a_channel(tmp_path: Path) -> None:
    """Four channels of a microscope, the last one blank: nothing says that it is alpha."""
    whole = picture(40, 40, 4)
    whole[..., 3] = 0
    tifffile.imwrite(tmp_path / "a.tif", whole, photometric="minisblack", planarconfig="contig", tile=(16, 16))
    with open_slide(tmp_path / "a.tif") as slide:
        assert channels_of(slide) == 4
    assert len(read_image([tmp_path / "a.tif"]).array_CZYX) == 4


def test_bands_of_labels_become_one_file_with_the_resolution_of_the_image(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture(700, 300).squeeze(), resolution=(40000.0, 30000.0), resolutionunit=3)
    labels = np.random.default_rng(1).integers(0, 3, (700, 300), np.uint8)
    cuts = [0, 1, 130, 131, 600, 700]
    with open_slide(tmp_path / "a.tif") as slide:
        rows = (labels[a:b] for a, b in itertools.pairwise(cuts))
        write_slide(tmp_path / "out.tif", slide, rows, np.dtype(np.uint8))
    np.testing.assert_array_equal(read_labels(tmp_path / "out.tif")[0][0], labels)
    with tifffile.TiffFile(tmp_path / "a.tif") as before, tifffile.TiffFile(tmp_path / "out.tif") as after:
        for tag in ("XResolution", "YResolution", "ResolutionUnit"):
            assert after.pages[0].tags[tag].value == before.pages[0].tags[tag].value


@pytest.mark.parametrize("rows", [0, 5, 2 * BAND_ROWS, 2 * BAND_ROWS + 1])
def test_a_margin_comes_in_bands(rows: int) -> None:
    bands = list(empty_bands(rows, 3, 7, np.dtype(np.uint8)))
    assert sum(map(len, bands)) == rows
    assert all(len(band) <= BAND_ROWS and (band == 7).all() for band in bands)


def in_memory_and_in_bands(
    run: Path, pixels: np.ndarray, place: Path, monkeypatch: pytest.MonkeyPatch, **how: str
) -> tuple[np.ndarray, Path]:
    """An image segmented as a whole, and the file of the same one segmented as a slide in tiles."""
    image = place / "in" / "a.tif"
    image.parent.mkdir()
    tifffile.imwrite(image, pixels, **how)
    [in_memory] = predict(run, image.parent, place / "memory", device="cpu")
    tifffile.imwrite(image, pixels, tile=(32, 32), **how)
    monkeypatch.setattr(slides, "SLIDE_PIXELS", 10)
    monkeypatch.setattr(slides, "BAND_ROWS", 32)
    monkeypatch.setattr(slides.scales, "ROW_VOXELS", 100)
    [in_bands] = predict(run, image.parent, place / "bands", device="cpu")
    return read_labels(in_memory)[0], in_bands


@pytest.mark.parametrize(
    ("normalization", "shape"),
    [("zscore", (50, 33)), ("rescale_0_1", (30, 24)), ("none", (30, 24)), ("zscore", (20, 14))],
)
def test_a_slide_is_segmented_as_in_memory(
    tmp_path: Path, normalization: str, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(
        tmp_path / "data", cases=2, shape=(20, 24), dimension=2, layout="plain", label_values=(100, 255), held_out=1
    )
    configuration = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.0), median_shape_voxels=(1, 20, 24), patch_voxels=(16, 16),
        normalization=(normalization,), network=a_network(dimension=2),
        train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,), mirror_axes=(1,))),
    )  # fmt: skip
    run = a_planned_run(tmp_path / "run", data, configuration)
    write_network(run, configuration, "0")
    expected, in_bands = in_memory_and_in_bands(run, picture(*shape).squeeze(), tmp_path, monkeypatch)
    assert len(np.unique(expected)) > 1
    found = tifffile.imread(tmp_path / "bands" / in_bands.name)
    np.testing.assert_array_equal(found, expected[0])


def test_what_a_slide_goes_without_is_said_and_it_is_done_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_dataset(
        tmp_path / "data", cases=2, shape=(20, 24), dimension=2, layout="plain", label_values=(100, 255)
    )
    configuration = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.0), median_shape_voxels=(1, 20, 24), patch_voxels=(16, 16),
        network=a_network(dimension=2), train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,))),
    )  # fmt: skip
    run, image = a_planned_run(tmp_path / "run", data, configuration), tmp_path / "a.tif"
    write_network(run, configuration, "0")
    rule = Rule(label="large", action="keep_largest", dice_before=0.0, dice_after=1.0)
    save(Layout(run).postprocessing, Postprocessing(learned_on="2d", cases=6, rules=(rule,)))
    shutil.copytree(run, tmp_path / "other")
    tifffile.imwrite(image, picture(20, 24).squeeze(), tile=(16, 16))
    monkeypatch.setattr(slides, "SLIDE_PIXELS", 10)
    said: list[Event] = []
    for _ in range(2):
        predict(
            run, image, tmp_path / "out", device="cpu", save_probabilities=True, save_uncertainty=True, resume=True,
            report=said.append,
        )  # fmt: skip
    without = "Too large to be segmented whole, and therefore without post-processing, probabilities, uncertainty: a."
    assert [each.text for each in said if isinstance(each, Warned)] == [without] * 2
    assert [each.text for each in said if isinstance(each, Said)].count("1 of 1 cases are done already.") == 1
    with pytest.raises(UserError, match=r"a\.tif: an image this large cannot be segmented by several"):
        ensemble_runs([run, tmp_path / "other"], image, tmp_path / "both", configurations=["2d"], device="cpu")
    plan = load(Layout(run).plan, Plan)
    labels = (*plan.labels[:2], Label(name="small", value=70_000))
    save(Layout(run).plan, plan.model_copy(update={"labels": labels}))
    with pytest.raises(UserError, match="holds labels 0 to 65535, not 0 to 70000"):
        predict(run, image, tmp_path / "high", device="cpu")


def test_colours_of_a_slide_are_scaled_each_by_its_own_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(
        tmp_path / "data", cases=2, shape=(20, 24), dimension=2, layout="plain", channels=3, label_values=(100, 255)
    )
    configuration = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.0), median_shape_voxels=(1, 20, 24), patch_voxels=(16, 16),
        normalization=("zscore", "ct", "rescale_0_1"), mask_for_normalization=(False,) * 3,
        network=a_network(in_channels=3, dimension=2), train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,))),
    )  # fmt: skip
    run = a_planned_run(tmp_path / "run", data, configuration)
    plan = load(Layout(run).plan, Plan)
    middle = INTENSITIES.model_copy(update={"mean": 60.0, "std": 20.0, "percentile_99_5": 90.0})
    save(Layout(run).plan, plan.model_copy(update={"intensities": (INTENSITIES, middle, INTENSITIES)}))
    write_network(run, configuration, "0")
    colours = picture(50, 33, 3) // np.array([1, 2, 4], np.uint8)
    expected, in_bands = in_memory_and_in_bands(run, colours, tmp_path, monkeypatch, photometric="rgb")
    assert len(np.unique(expected)) > 1
    np.testing.assert_array_equal(tifffile.imread(in_bands), expected[0])


def test_a_large_stack_is_no_slide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slides, "SLIDE_PIXELS", 1000)
    tifffile.imwrite(tmp_path / "stack.tif", np.zeros((3, 40, 40), np.uint8), photometric="minisblack")
    tifffile.imwrite(tmp_path / "flat.tif", np.zeros((40, 40), np.uint8))
    with tifffile.TiffWriter(tmp_path / "pyramid.tif") as writer:
        for side in (40, 20, 10):
            writer.write(np.zeros((side, side), np.uint8))
    names = ("stack.tif", "flat.tif", "pyramid.tif")
    assert [is_slide([str(tmp_path / name)]) for name in names] == [False, True, True]


def test_small_and_other_images_are_no_slides(tmp_path: Path) -> None:
    tifffile.imwrite(tmp_path / "a.tif", picture(30, 30).squeeze())
    assert not is_slide([str(tmp_path / "a.tif")])
    assert not is_slide(["a.nii.gz"])
    assert read_image([tmp_path / "a.tif"]).array_CZYX.shape == (1, 1, 30, 30)


def test_a_damaged_slide_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    tifffile.imwrite(path, picture(200, 200).squeeze(), tile=(32, 32))
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(UserError, match=r"a\.tif: this slide cannot be read"), open_slide(path) as slide:
        slide.rows(0, 200)
    path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"a\.tif: this slide cannot be read"), open_slide(path):
        pass
    tifffile.imwrite(path, picture(200, 200).squeeze(), tile=(32, 32), compression="zlib")
    content = bytearray(path.read_bytes())
    content[-500:] = bytes(500)  # inside the last compressed tiles
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.tif: this slide cannot be read"), open_slide(path) as slide:
        slide.rows(0, 200)
