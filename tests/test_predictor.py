"""One `Predictor` for many images: every kind of image, several threads, probabilities and uncertainty."""

import threading
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from planned import a_configuration, a_network, a_plan, a_planned_run
from synthetic import write_dataset
from test_predict import write_network

from autoseg.cases.exchange import Ready
from autoseg.cases.prepare import prepare
from autoseg.errors import UserError
from autoseg.image.formats import read_image, read_labels, volume_of
from autoseg.image.probabilities import open_probabilities
from autoseg.image.volume import displacement_mm
from autoseg.layout import Layout, entropy_file, flagged_file, mutual_file, probabilities_file
from autoseg.network import export
from autoseg.network.device import pick
from autoseg.network.export import Slab
from autoseg.records import AugmentSpec, Label, TrainSpec
from autoseg.steps.predict import predict
from autoseg.steps.predicting.images import as_volume
from autoseg.steps.predicting.predictor import Predictor, Segmentation, uncertainty_of
from autoseg.store import save


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two folds on a transposed grid, and images whose border is cropped; with all that prediction can write."""
    place = tmp_path_factory.mktemp("predictor")
    data = write_dataset(
        place / "data", cases=2, shape=(9, 8, 10), spacing_mm=(1.5, 1.0, 1.25), label_values=(100, 255), held_out=2
    )
    for path in (data / "imagesTs").iterdir():
        array_ZYX = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        array_ZYX[:2], array_ZYX[:, :, -1:] = 0, 0
        image = sitk.GetImageFromArray(array_ZYX)
        image.SetSpacing((1.25, 1.0, 1.5))
        sitk.WriteImage(image, str(path))
    configuration = a_configuration(
        axes=(2, 0, 1), spacing_mm=(1.0, 1.5, 1.0), network=a_network(),
        train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=())),
    )  # fmt: skip
    run = a_planned_run(place / "run", data, configuration)
    for fold in ("0", "1"):
        write_network(run, configuration, fold)
    predict(run, data / "imagesTs", place / "out", device="cpu", save_probabilities=True, save_uncertainty=True)
    return place


def first_image(place: Path) -> Path:
    return sorted((place / "data" / "imagesTs").iterdir())[0]


def test_files_arrays_volumes_and_simpleitk_images_give_the_same(place: Path) -> None:
    predictor, path = Predictor(place / "run", device="cpu"), first_image(place)
    expected = read_labels(place / "out" / path.name)[0]
    volume = read_image([path])
    for image in (path, str(path), [path], volume, sitk.ReadImage(str(path))):
        np.testing.assert_array_equal(predictor(image), expected)
    np.testing.assert_array_equal(predictor(volume.array_CZYX, volume.geometry.spacing_mm), expected)


def test_components_of_a_simpleitk_image_are_channels_and_its_place_is_kept() -> None:
    image = sitk.Compose([sitk.GetImageFromArray(np.full((2, 3, 4), k, np.float32)) for k in (1, 2)])
    image.SetSpacing((0.5, 0.6, 0.7))
    volume = volume_of(image)
    assert volume.array_CZYX.shape == (2, 2, 3, 4)
    assert volume.array_CZYX[1].min() == 2
    assert volume.geometry.spacing_mm == (0.7, 0.6, 0.5)
    flat = volume_of(sitk.GetImageFromArray(np.zeros((3, 4), np.uint8)))
    assert (flat.array_CZYX.shape, flat.geometry.dimension) == ((1, 1, 3, 4), 2)
    with pytest.raises(UserError, match="4 axes"):
        volume_of(sitk.Image([2, 2, 2, 2], sitk.sitkFloat32))


def test_threads_share_a_predictor(place: Path) -> None:
    predictor, path = Predictor(place / "run", device="cpu"), first_image(place)
    expected, found = predictor(path), []
    threads = [threading.Thread(target=lambda: found.append(predictor(path))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(found) == 4
    for labels_ZYX in found:
        np.testing.assert_array_equal(labels_ZYX, expected)


def test_probabilities_and_uncertainty_come_on_request_and_as_they_are_written(place: Path) -> None:
    path = first_image(place)
    case = path.name.removesuffix(".nii.gz")
    found = Predictor(place / "run", device="cpu")(path, probabilities=True, uncertainty=True)
    assert isinstance(found, Segmentation)
    assert found.probabilities_KZYX is not None
    assert found.entropy_ZYX is not None
    assert found.mutual_ZYX is not None
    written = open_probabilities(probabilities_file(place / "out", case))
    np.testing.assert_array_equal(found.probabilities_KZYX, written.part((slice(None),)))
    assert (found.probabilities_KZYX[0, :2] == 1).all()
    for image_ZYX, name in ((found.entropy_ZYX, entropy_file), (found.mutual_ZYX, mutual_file)):
        thousandths, geometry = read_labels(name(place / "out", case, ".nii.gz"))
        np.testing.assert_allclose(thousandths / 1000, image_ZYX)
        assert displacement_mm(geometry, read_labels(place / "out" / path.name)[1]) == 0
        assert 0 < image_ZYX.max() <= 1
        assert not image_ZYX[:2].any()
    assert (found.mutual_ZYX <= found.entropy_ZYX + 2e-3).all()
    shares = found.probabilities_KZYX.astype(np.float64)
    entropy = -(shares * np.log(np.maximum(shares, 1e-30))).sum(0) / np.log(3)
    np.testing.assert_allclose(found.entropy_ZYX, entropy, atol=5e-3)
    rows = flagged_file(place / "out").read_text().splitlines()
    assert rows[0] == "case,uncertainty,flagged"
    assert len(rows) == 3
    assert f"{found.uncertainty:.4f},no" in {row.split(",", 1)[1] for row in rows[1:]}


def test_one_network_has_entropy_but_nothing_mutual(place: Path) -> None:
    found = Predictor(place / "run", folds=("0",), device="cpu")(first_image(place), uncertainty=True)
    assert found.entropy_ZYX is not None
    assert found.mutual_ZYX is None
    assert found.probabilities_KZYX is None


def test_chosen_classes_are_saved_in_bytes(place: Path, tmp_path: Path) -> None:
    path = first_image(place)
    case = path.name.removesuffix(".nii.gz")
    predict(
        place / "run", path, tmp_path, device="cpu", save_probabilities=True, probability_kind="uint8",
        classes=["small", "background"],
    )  # fmt: skip
    written = open_probabilities(probabilities_file(tmp_path, case))
    assert (written.names, written.header.values, written.header.complete) == (("background", "small"), (0, 255), False)
    whole = open_probabilities(probabilities_file(place / "out", case)).part((slice(None),))
    np.testing.assert_allclose(written.slab(0, 9), whole[[0, 2]], atol=0.5 / 255 + 1e-3)


def test_an_image_whose_scores_are_no_numbers_is_named(place: Path) -> None:
    predictor = Predictor(place / "run", folds=("0",), device="cpu")
    for weights in predictor._networks[0].parameters():
        weights.data.fill_(float("nan"))
    with pytest.raises(UserError, match="case_7: the network's scores are NaN"):
        predictor.segment(read_image([first_image(place)]), case="case_7")


def test_slabs_are_as_thick_as_is_said_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of probabilities are laid out for it; the mutual information of several networks is one score more."""
    monkeypatch.setattr(export, "SLAB_VOXELS", 256)
    labels = tuple(Label(name=str(value), value=value) for value in range(8))
    configuration = a_configuration(network=a_network().model_copy(update={"classes": 8}))
    plan = a_plan(configuration, labels=labels)
    save(Layout(tmp_path).plan, plan)
    networks = [torch.nn.Conv3d(1, 8, 1), torch.nn.Conv3d(1, 8, 1)]
    predictor = Predictor.of_network(tmp_path, configuration, networks, "fold_0", pick("cpu"))
    volume = as_volume(np.random.default_rng(0).normal(size=(16, 8, 8)))
    prepared = prepare(volume, None, plan, configuration)
    for uncertainty, height in ((False, 4), (True, 2)):
        found: list[Slab] = []
        predictor.compute(Ready((prepared,), ()), found.append, uncertainty)
        assert predictor.slab_height(prepared, uncertainty) == height
        assert {len(each.labels_ZYX) for each in found} == {height}


def test_doubt_is_that_of_what_was_found() -> None:
    doubt_ZYX = np.array([0, 0, 500, 700], np.uint16).reshape(1, 1, 4)
    assert uncertainty_of(doubt_ZYX, np.array([0, 0, 1, 2]).reshape(1, 1, 4)) == pytest.approx(0.6)
    assert uncertainty_of(doubt_ZYX, np.zeros((1, 1, 4), np.int16)) == pytest.approx(0.3)
