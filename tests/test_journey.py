"""The whole pipeline on small synthetic data, as a user goes through it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from fingerprints import counting
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from typer.testing import CliRunner, Result

import autoseg
from autoseg.cases.cache import open_case
from autoseg.cli import app
from autoseg.errors import UserError
from autoseg.layout import Layout
from autoseg.records import AugmentSpec, Dataset, Plan, Postprocessing, Scores, TrainSpec
from autoseg.steps.demo import demo, draw
from autoseg.store import TEMPORARY, load, save

CPU = ("--device", "cpu")


def command(*arguments: str | Path) -> Result:
    ended = CliRunner().invoke(app, [str(each) for each in arguments], catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended


@pytest.fixture(scope="module")
def journey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which data were made, planned, preprocessed and trained on for a few seconds."""
    place = tmp_path_factory.mktemp("journey")
    write_dataset(place / "data", cases=6, shape=(16, 24, 20), held_out=2, spacing_mm=(1.5, 1.0, 1.25))
    command("plan", place / "data", "-o", place / "run", "--memory", "1GB", *CPU)
    command("preprocess", place / "run", "-c", "3d")
    command("train", place / "run", "-c", "3d", "-f", "0", "--max-time", "2s", *CPU)
    images = place / "data" / "imagesTs"
    command("predict", place / "run", "-i", images, "-o", place / "out", "--save-probabilities", *CPU)
    return place


@pytest.fixture
def quick_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is simulated again, which takes seconds: `journey` has done so."""
    monkeypatch.setattr("autoseg.network.memory.measurer", lambda budget, labelling: (counting(), "simulated"))


@pytest.fixture
def no_curves(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are drawn once, in `journey`."""
    monkeypatch.setattr("autoseg.steps.training.learn.draw_curves", lambda path, history: None)


def test_training_leaves_weights_history_and_scores(journey: Path) -> None:
    model = Layout(journey / "run").model("3d", "0")
    for path in (model.weights, model.run, model.history, model.scores, model.curves):
        assert path.is_file(), path
    assert all(json.loads(line) for line in model.history.read_text().splitlines())
    assert load(model.scores, Scores).cases


def test_predictions_lie_on_the_grid_of_their_images_to_the_last_bit(journey: Path) -> None:
    images = sorted((journey / "data" / "imagesTs").iterdir())
    assert len(images) == 2
    for path in images:
        image, predicted = sitk.ReadImage(str(path)), sitk.ReadImage(str(journey / "out" / path.name))
        assert predicted.GetSize() == image.GetSize()
        assert predicted.GetOrigin() == image.GetOrigin()
        assert predicted.GetSpacing() == image.GetSpacing()
        assert predicted.GetDirection() == image.GetDirection()
        assert set(np.unique(sitk.GetArrayFromImage(predicted))) <= {0, 1, 2}


def test_predictions_can_be_combined_postprocessed_and_scored(journey: Path) -> None:
    out = journey / "out"
    agreed = command("ensemble", out, out, "-o", journey / "ensemble", "--weights", "2,1", "--json").stdout
    assert json.loads(agreed)["cases"] == 2
    for path in (journey / "out").glob("*.nii.gz"):
        same = sitk.GetArrayFromImage(sitk.ReadImage(str(journey / "ensemble" / path.name)))
        assert (same == sitk.GetArrayFromImage(sitk.ReadImage(str(path)))).mean() > 0.999
    command("postprocess", journey / "run")
    assert load(Layout(journey / "run").postprocessing, Postprocessing).cases == 2
    command("postprocess", journey / "run", "-i", journey / "ensemble", "-o", journey / "clean")
    shown = command("evaluate", journey / "clean", journey / "data" / "labelsTs", "--json").stdout
    assert [case["id"] for case in json.loads(shown)["cases"]] == ["case_06", "case_07"]
    draw(journey / "picture.png", journey / "data", journey / "clean", "case_06")
    assert (journey / "picture.png").stat().st_size > 1000


@pytest.mark.usefixtures("quick_readings")
def test_a_plan_can_be_made_again_from_its_fingerprint(journey: Path) -> None:
    shown = command("plan", "--fingerprint", journey / "run" / "fingerprint.json", "--memory", "4GB", "--json", *CPU)
    assert json.loads(shown.stdout)["dataset"] == "blobs"


def test_nothing_unfinished_is_left(journey: Path) -> None:
    assert not list(journey.rglob(f"*{TEMPORARY}*"))


@pytest.mark.usefixtures("no_curves")
def test_two_channels_keep_their_order_from_the_files_to_the_label_map(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.steps.evaluate.allowed_cores", lambda: 1)
    data, run = tmp_path / "data", tmp_path / "run"
    write_dataset(data, cases=5, shape=(8, 10, 12), channels=2, layout="nnunet", held_out=1)
    train = TrainSpec(epochs=1, steps_per_epoch=2, warmup_steps=1, augment=AugmentSpec(rotation_rad=(0.5,) * 3))
    a_planned_run(run, data, a_configuration(
        network=a_network(2), train=train, normalization=("zscore",) * 2, mask_for_normalization=(False,) * 2
    ))  # fmt: skip
    plan = load(Layout(run).plan, Plan)
    assert plan.channels == ("modality 0", "modality 1")
    save(Layout(run).plan, plan.model_copy(update={"intensities": plan.intensities * 2}))
    command("train", run, "-f", "0", "--workers", "1", *CPU)
    case = load(Layout(run).dataset, Dataset).cases[0]
    assert [Path(path).name for path in case.images] == ["case_00_0000.nii.gz", "case_00_0001.nii.gz"]
    cached_CZYX = open_case(Layout(run).cache("3d"), case.id).read()[0]
    own = [sitk.GetArrayFromImage(sitk.ReadImage(path)).astype(np.float64) for path in case.images]
    for cached_ZYX, image_ZYX in zip(cached_CZYX, own, strict=True):
        assert np.corrcoef(cached_ZYX.ravel(), image_ZYX.ravel())[0, 1] > 0.999
    command("predict", run, "-i", data / "imagesTs", "-o", tmp_path / "out", "--workers", "0", *CPU)
    predictor = autoseg.Predictor(run, device="cpu")
    files = sorted((data / "imagesTs").iterdir())
    written = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / "out" / "case_05.nii.gz")))
    np.testing.assert_array_equal(predictor.predict(files), written)
    shares, other = (predictor(each, probabilities=True).probabilities_KZYX for each in (files, files[::-1]))
    assert np.abs(shares - other).max() > 0.01


@pytest.mark.usefixtures("no_curves")
def test_photographs_with_masks_of_0_and_255_keep_their_values(tmp_path: Path) -> None:
    data = write_dataset(
        tmp_path / "data", cases=6, shape=(48, 40), dimension=2, layout="plain", label_values=(100, 255), held_out=1
    )
    scores = autoseg.run(data, tmp_path / "run", max_seconds=2, memory="1GB", device="cpu", workers=1)
    assert scores.labels
    assert load(Layout(tmp_path / "run").dataset, Dataset).dimension == 2
    autoseg.predict(tmp_path / "run", data / "imagesTs", tmp_path / "out", device="cpu", workers=0)
    [predicted] = (tmp_path / "out").glob("*.png")
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(predicted))))) <= {0, 100, 255}
    weights = Layout(tmp_path / "run").model("2d", "0").weights
    written = os.stat(weights).st_mtime_ns
    again = autoseg.run(data, tmp_path / "run", max_seconds=2, memory="1GB", device="cpu", workers=1)
    assert again == scores
    assert os.stat(weights).st_mtime_ns == written
    other = write_dataset(tmp_path / "other", cases=5, dimension=2, layout="plain")
    with pytest.raises(UserError, match="planned for other data"):
        autoseg.run(other, tmp_path / "run", max_seconds=2)


@pytest.mark.slow
@pytest.mark.usefixtures("no_curves")
def test_the_demo_ends_with_scores_and_a_picture(tmp_path: Path) -> None:
    scores, picture = demo(tmp_path / "demo", max_seconds=1.0)
    assert len(scores.cases) == 4
    assert picture.is_file()
