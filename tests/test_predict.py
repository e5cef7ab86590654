"""Prediction on files and arrays, with networks of random weights: what is right about it needs no training."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from whole_probabilities import read_whole

from autoseg.cases.prepare import prepare
from autoseg.errors import UserError
from autoseg.events import Event, Said, Warned
from autoseg.image.formats import read_image
from autoseg.image.resample import resample_image
from autoseg.layout import Layout, prediction_file, probabilities_file
from autoseg.network import checkpoint, unet
from autoseg.records import AugmentSpec, Configuration, Postprocessing, Rule, Run, TrainSpec
from autoseg.steps.predict import Predictor, predict
from autoseg.steps.predicting.images import as_volume
from autoseg.store import TEMPORARY, save

VALUES = {0, 100, 255}
OBLIQUE = (0.6, -0.8, 0.0, 0.8, 0.6, 0.0, 0.0, 0.0, 1.0)


def write_network(run: Path, configuration: Configuration, fold: str, seed: int = 0) -> None:
    """A finished training whose weights are random."""
    model = Layout(run).model(configuration.name, fold, seed)
    torch.manual_seed(10 * seed + (ord(fold[0]) % 10))
    model.root.mkdir(parents=True)
    checkpoint.save_weights(model.weights, unet.build(configuration.network))
    record = Run(
        autoseg_version="0", torch_version="0", configuration=configuration, fold=fold, seed=seed, device="cpu",
        precision="fp32", compiled=False, finished=True,
    )  # fmt: skip
    save(model.run, record)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds on a transposed grid with other spacings than the images', and three images to predict.

    `plain` lies on the grid of the plan, `oblique` is turned and has odd spacings, `dark` has a border of zeros.
    """
    place = tmp_path_factory.mktemp("predict")
    data = write_dataset(
        place / "data", cases=3, shape=(12, 14, 13), spacing_mm=(1.5, 1.0, 1.25), label_values=(100, 255), held_out=3
    )
    images = data / "imagesTs"
    plain, oblique, dark = sorted(images.iterdir())
    turned = sitk.ReadImage(str(oblique))
    turned.SetDirection(OBLIQUE)
    turned.SetOrigin((0.1, 1 / 3, -7e-5))
    turned.SetSpacing((0.7, 0.8000001, 2.3))
    sitk.WriteImage(turned, str(images / "oblique.nii.gz"))
    array_ZYX = sitk.GetArrayFromImage(sitk.ReadImage(str(dark)))
    array_ZYX[:3], array_ZYX[:, :, -4:] = 0, 0
    sitk.WriteImage(sitk.GetImageFromArray(array_ZYX), str(images / "dark.nii.gz"))
    plain.rename(images / "plain.nii.gz")
    oblique.unlink()
    dark.unlink()
    configuration = a_configuration(
        axes=(2, 0, 1), spacing_mm=(1.25, 1.5, 1.0), network=a_network(),
        train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=(2,))),
    )  # fmt: skip
    run = a_planned_run(place / "run", data, configuration)
    for fold in ("0", "1"):
        write_network(run, configuration, fold)
    predict(run, images, place / "out", device="cpu", save_probabilities=True)
    return place


def values_in(path: Path) -> np.ndarray:
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


@pytest.mark.parametrize("case", ["plain", "oblique", "dark"])
def test_label_maps_lie_on_the_grid_of_their_images_and_hold_the_values_of_the_data_set(place: Path, case: str) -> None:
    image = sitk.ReadImage(str(place / "data" / "imagesTs" / f"{case}.nii.gz"))
    predicted = sitk.ReadImage(str(place / "out" / f"{case}.nii.gz"))
    assert predicted.GetSize() == image.GetSize()
    assert predicted.GetOrigin() == image.GetOrigin()
    assert predicted.GetSpacing() == image.GetSpacing()
    assert predicted.GetDirection() == image.GetDirection()
    assert predicted.GetPixelID() == sitk.sitkUInt8
    found = set(np.unique(sitk.GetArrayFromImage(predicted)).tolist())
    assert found <= VALUES
    assert len(found) > 1


def test_what_was_cropped_away_is_background(place: Path) -> None:
    values_ZYX = values_in(place / "out" / "dark.nii.gz")
    assert values_ZYX.any()
    assert not values_ZYX[:3].any()
    assert not values_ZYX[:, :, -4:].any()
    probabilities_KZYX, _, _ = read_whole(probabilities_file(place / "out", "dark"))
    assert (probabilities_KZYX[0, :3] == 1).all()


@pytest.mark.parametrize("case", ["plain", "oblique", "dark"])
def test_probabilities_sum_to_one_and_their_largest_is_the_label(place: Path, case: str) -> None:
    probabilities_KZYX, names, geometry = read_whole(probabilities_file(place / "out", case))
    values_ZYX = values_in(prediction_file(place / "out", case, ".nii.gz"))
    assert names == ("background", "large", "small")
    assert geometry.size_voxels == values_ZYX.shape
    np.testing.assert_allclose(probabilities_KZYX.sum(0), 1.0, atol=2e-3)
    best_ZYX = np.array([0, 100, 255])[probabilities_KZYX.argmax(0)]
    two = np.sort(probabilities_KZYX, 0)
    clear_ZYX = two[-1] - two[-2] > 2e-3  # half precision cannot tell those apart that are nearly equal
    assert clear_ZYX.mean() > 0.9
    assert (best_ZYX == values_ZYX)[clear_ZYX].all()


def test_folds_are_averaged(place: Path) -> None:
    """On an image of one tile that needs no resampling: the mean is taken tile by tile, before both."""
    image, spacing_mm = np.random.default_rng(0).normal(size=(8, 8, 8)), (1.5, 1.0, 1.25)
    first, second, both = (
        Predictor(place / "run", folds=folds, device="cpu")(image, spacing_mm, probabilities=True).probabilities_KZYX
        for folds in (("0",), ("1",), None)
    )
    np.testing.assert_allclose(both, (first.astype(np.float32) + second) / 2, atol=2e-3)
    assert np.abs(first - second).max() > 0.05
    assert Predictor(place / "run", device="cpu").members == ("fold_0", "fold_1")


def test_between_slices_that_are_far_apart_nothing_is_interpolated(place: Path, tmp_path: Path) -> None:
    """5 x 1 x 1 mm, one tile of 4 x 1.25 x 1.25 mm: what the network says is repeated from slice to slice."""
    configuration = a_configuration(axes=(2, 0, 1), spacing_mm=(1.25, 4.0, 1.25), network=a_network())
    run = a_planned_run(tmp_path / "run", place / "data", configuration)
    write_network(run, configuration, "0")
    image_ZYX = np.random.default_rng(0).normal(5, 1, (6, 10, 10)).astype(np.float32)
    predictor = Predictor(run, device="cpu", mirroring=False)
    volume = as_volume(image_ZYX, (5.0, 1.0, 1.0))
    found = predictor(volume, probabilities=True).probabilities_KZYX
    prepared = prepare(volume, None, predictor.plan, configuration)
    assert prepared.image_CZYX.shape == (1, 8, 8, 8)
    with torch.no_grad(), predictor.device.autocast():
        logits_KXZY = predictor._networks[0](torch.from_numpy(prepared.image_CZYX)[None])[0].float().numpy()
    logits_KXZY = resample_image(logits_KXZY, (1.25, 4.0, 1.25), (1.0, 5.0, 1.0), (10, 6, 10), 1)
    expected = torch.from_numpy(logits_KXZY.transpose(0, 2, 3, 1)).softmax(0).numpy()
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_a_predictor_gives_for_arrays_and_files_what_the_command_writes(place: Path) -> None:
    predictor = Predictor(place / "run", device="cpu")
    path = place / "data" / "imagesTs" / "oblique.nii.gz"
    written_ZYX = values_in(place / "out" / "oblique.nii.gz")
    np.testing.assert_array_equal(predictor.predict([path]), written_ZYX)
    volume = read_image([path])
    spacing_mm = volume.geometry.spacing_mm
    np.testing.assert_array_equal(predictor(volume.array_CZYX, spacing_mm), written_ZYX)
    np.testing.assert_array_equal(predictor(volume.array_CZYX[0], spacing_mm), written_ZYX)
    assert not np.array_equal(predictor(volume.array_CZYX[0], (1.0, 1.0, 1.0)), written_ZYX)


def test_mirroring_can_be_left_out(place: Path) -> None:
    path = place / "data" / "imagesTs" / "plain.nii.gz"
    plain_ZYX = Predictor(place / "run", device="cpu", mirroring=False).predict([path])
    assert not np.array_equal(plain_ZYX, values_in(place / "out" / "plain.nii.gz"))


@pytest.mark.parametrize(
    ("speed", "mirror_axes", "overlap"), [("accurate", (2,), 0.5), ("balanced", (), 0.5), ("fast", (), 0.25)]
)
def test_a_speed_decides_about_mirroring_and_overlap(
    place: Path, speed: str, mirror_axes: tuple[int, ...], overlap: float
) -> None:
    tiling = Predictor(place / "run", device="cpu", speed=speed).tilings(1, 3)[0]
    assert (tiling.mirror_axes, tiling.overlap) == (mirror_axes, overlap)


def test_an_empty_image_is_all_background(place: Path) -> None:
    predictor = Predictor(place / "run", device="cpu")
    assert predictor(np.zeros((9, 10, 11))).shape == (9, 10, 11)
    small = predictor(np.random.default_rng(0).normal(size=(1, 3, 2)))
    assert small.shape == (1, 3, 2)


def test_learned_rules_are_applied_unless_told_not_to(place: Path, tmp_path: Path) -> None:
    run, images = place / "run", place / "data" / "imagesTs" / "plain.nii.gz"
    rules = tuple(
        Rule(label=label, action="drop_volume", minimum_mm3=1e9, dice_before=0.0, dice_after=1.0)
        for label in ("large", "small")
    )
    save(Layout(run).postprocessing, Postprocessing(learned_on="3d", cases=1, rules=rules))
    try:
        [with_rules] = predict(run, images, tmp_path / "with", device="cpu,cpu")
        [without] = predict(run, images, tmp_path / "without", device="cpu", postprocess=False)
    finally:
        Layout(run).postprocessing.unlink()
    assert not values_in(with_rules).any()
    np.testing.assert_array_equal(values_in(without), values_in(place / "out" / "plain.nii.gz"))


@pytest.mark.parametrize("learned_on", ["2d", "2d+3d"])
def test_rules_learned_on_another_configuration_are_left_out_in_one_line(
    place: Path, tmp_path: Path, learned_on: str
) -> None:
    run, images = place / "run", place / "data" / "imagesTs" / "plain.nii.gz"
    rule = Rule(label="large", action="drop_volume", minimum_mm3=1e9, dice_before=0.0, dice_after=1.0)
    said: list[Event] = []
    try:
        for rules in ((rule,), ()):
            save(Layout(run).postprocessing, Postprocessing(learned_on=learned_on, cases=1, rules=rules))
            [written] = predict(run, images, tmp_path, device="cpu,cpu", report=said.append)
            np.testing.assert_array_equal(values_in(written), values_in(place / "out" / "plain.nii.gz"))
    finally:
        Layout(run).postprocessing.unlink()
    [told] = [each.text for each in said if isinstance(each, Warned)]
    assert f"learned on {learned_on}, so 3d goes without: autoseg postprocess {run} -i OUT -o CLEANED" in told


def test_nothing_unfinished_is_left_and_older_leftovers_are_removed(place: Path, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "records", tmp_path / "entropy"):
        folder.mkdir(exist_ok=True)
        (folder / f"plain.nii.gz{TEMPORARY}-1-abc.nii.gz").write_bytes(b"half")
    predict(place / "run", place / "data" / "imagesTs" / "plain.nii.gz", tmp_path, device="cpu")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["entropy", "plain.nii.gz", "records"]
    assert [path.name for path in tmp_path.glob("*/*")] == ["plain.json"]


def test_what_lay_beside_an_older_label_map_goes_with_it(place: Path, tmp_path: Path) -> None:
    run, image = place / "run", place / "data" / "imagesTs" / "plain.nii.gz"
    predict(run, image, tmp_path, device="cpu", save_probabilities=True, save_uncertainty=True)
    other = probabilities_file(tmp_path, "other")
    beside = [probabilities_file(tmp_path, "plain"), *tmp_path.glob("*/plain.nii.gz")]
    assert len(beside) == 3
    said: list[Event] = []
    for missing in (*beside, tmp_path):
        missing.unlink() if missing.is_file() else None
        predict(
            run, image, tmp_path, device="cpu", save_probabilities=True, save_uncertainty=True, resume=True,
            report=said.append,
        )  # fmt: skip
    assert [each.text for each in said if isinstance(each, Said)].count("1 of 1 cases are done already.") == 1
    shutil.copytree(beside[0], other) if beside[0].is_dir() else shutil.copy(beside[0], other)
    predict(run, image, tmp_path, device="cpu", speed="fast")
    assert not any(path.exists() for path in beside)
    assert other.exists()
    predict(run, image, tmp_path, device="cpu", save_probabilities=True)
    assert beside[0].exists()


def test_photographs_in_2d_become_masks_with_the_values_of_the_data_set(tmp_path: Path) -> None:
    data = write_dataset(
        tmp_path / "data", cases=2, shape=(20, 24), dimension=2, layout="plain", label_values=(100, 255), held_out=1
    )
    configuration = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.0), median_shape_voxels=(1, 20, 24),
        network=a_network(dimension=2), train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,), mirror_axes=(0, 1))),
    )  # fmt: skip
    run = a_planned_run(tmp_path / "run", data, configuration)
    write_network(run, configuration, "0")
    [written] = predict(run, data / "imagesTs", tmp_path / "out", device="cpu")
    assert written == tmp_path / "out" / "case_02.png"
    values_YX = values_in(written)
    assert values_YX.shape == (20, 24)
    assert set(np.unique(values_YX).tolist()) <= VALUES
    assert values_YX.any()


# ------------------------------------------------------------------------------------------------ what it refuses


def test_a_fold_or_seed_that_is_not_trained_is_named_with_those_that_are(place: Path) -> None:
    with pytest.raises(UserError, match=r"not trained for 3 \(trained: fold_0, fold_1\).*train .* -f 3"):
        Predictor(place / "run", folds=("fold_0", "3"), device="cpu")
    with pytest.raises(UserError, match=r"not trained for seed 5 \(trained: fold_0, fold_1\).*-f 0 --seed 5"):
        Predictor(place / "run", seeds=(5,), device="cpu")
    with pytest.raises(UserError, match="no configuration '2d'"):
        Predictor(place / "run", configuration="2d", device="cpu")


def test_a_run_without_networks_is_refused_before_the_output_is_made(place: Path, tmp_path: Path) -> None:
    run = a_planned_run(tmp_path / "run", place / "data", a_configuration())
    with pytest.raises(UserError, match=r"not trained for any fold \(trained: nothing yet\)"):
        predict(run, place / "data" / "imagesTs", tmp_path / "out", device="cpu")
    assert not (tmp_path / "out").exists()


def test_an_image_is_never_replaced_by_its_label_map(place: Path, tmp_path: Path) -> None:
    image = tmp_path / "held_out.nii.gz"
    image.write_bytes(next((place / "data" / "imagesTr").glob("*.nii.gz")).read_bytes())
    before = image.read_bytes()
    with pytest.raises(UserError, match="the images lie there"):
        predict(place / "run", tmp_path, tmp_path)
    assert image.read_bytes() == before


def test_no_image_or_label_map_of_the_data_is_replaced(place: Path, tmp_path: Path) -> None:
    """Links lead to where the result would go; the output holds references of the run, or maps of somebody else."""
    run, data = place / "run", place / "data"
    linked, real, drawn = tmp_path / "linked", tmp_path / "real", tmp_path / "drawn"
    for folder in (linked, real, drawn):
        folder.mkdir()
    shutil.copy(data / "imagesTs" / "plain.nii.gz", real)
    shutil.copy(place / "out" / "plain.nii.gz", drawn)
    (linked / "plain.nii.gz").symlink_to(real / "plain.nii.gz")
    (tmp_path / "labels").symlink_to(data / "labelsTr")
    for images, output, said in (
        (linked, real, r"real: plain\.nii\.gz lies there, an image or label map of the data"),
        (data / "imagesTs", tmp_path / "labels", r"case_00\.nii\.gz lies there"),
        (data / "imagesTs", data / "imagesTr", r"case_00.*\.nii\.gz lies there"),
        (data / "imagesTs", drawn, r"drawn: plain\.nii\.gz would be replaced, which autoseg has not written"),
    ):
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        with pytest.raises(UserError, match=said):
            predict(run, images, output, device="cpu")
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before


def test_another_number_of_channels_is_refused(place: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"2 channel\(s\), but the plan was made for 1"):
        Predictor(place / "run", device="cpu")(np.ones((2, 8, 8, 8)))
    with pytest.raises(UserError, match=r"\(C, Z, Y, X\) or \(Z, Y, X\)"):
        Predictor(place / "run", device="cpu")(np.ones((8, 8)))
    two = sitk.Compose([sitk.GetImageFromArray(np.ones((8, 8, 8), np.float32))] * 2)
    sitk.WriteImage(two, str(tmp_path / "two.mha"))
    with pytest.raises(UserError, match=r"two: 2 channel\(s\)"):
        predict(place / "run", tmp_path / "two.mha", tmp_path / "out", device="cpu")
    for image in (tmp_path / "two.mha", [str(tmp_path / "two.mha")]):
        with pytest.raises(UserError, match=r"two\.mha: 2 channel\(s\)"):
            Predictor(place / "run", device="cpu")(image)


def test_weights_of_another_network_are_refused(place: Path, tmp_path: Path) -> None:
    configuration = a_configuration(network=a_network())
    run = a_planned_run(tmp_path / "run", place / "data", configuration)
    write_network(run, configuration, "0")
    wider = a_network().model_copy(update={"features": (4, 16)})
    checkpoint.save_weights(Layout(run).model("3d", "0").weights, unet.build(wider))
    with pytest.raises(UserError, match="do not belong to the network of this plan"):
        Predictor(run, device="cpu")
