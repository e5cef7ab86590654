"""A cascade on images larger than the patch: the first stage sees them coarsely, the second refines what it found."""

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from typer.testing import CliRunner

from autoseg.cases.cache import open_case
from autoseg.cases.prepare import prepare
from autoseg.cli import app
from autoseg.errors import Interrupted
from autoseg.events import Event, Report, Said, Trained, Warned, silent
from autoseg.image.formats import read_image, read_labels
from autoseg.layout import Layout
from autoseg.network.distributed import Team
from autoseg.records import AugmentSpec, Configuration, Dataset, Run, Splits, TrainSpec
from autoseg.steps.plan import checked
from autoseg.steps.predict import Predictor, configuration_named, on_grid
from autoseg.steps.train import train
from autoseg.steps.training.cascade import previous_label_maps, previous_on_grid, trained
from autoseg.store import load

PATCH = (8, 8, 8)
SIZE = (16, 14, 18)


def cascade() -> tuple[Configuration, Configuration]:
    """A grid of half the resolution, and the full one; both transposed, with patches smaller than the images."""
    spec = TrainSpec(
        epochs=1, steps_per_epoch=2, warmup_steps=1, augment=AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=(2,))
    )
    shared = {"axes": (2, 0, 1), "patch_voxels": PATCH, "train": spec}
    low = a_configuration(name="3d_lowres", spacing_mm=(2.0, 3.0, 2.0), network=a_network(), **shared)
    full = a_configuration(
        name="3d_cascade", spacing_mm=(1.0, 1.5, 1.0), network=a_network(in_channels=3), previous="3d_lowres", **shared
    )
    return low, full


def planned(place: Path) -> Path:
    data = write_dataset(
        place / "data", cases=3, shape=SIZE, spacing_mm=(1.5, 1.0, 1.0), label_values=(5, 9), held_out=1
    )
    return a_planned_run(place / "run", data, *cascade())


@pytest.fixture(scope="module")
def cascaded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which one command trained both stages and one predicted."""
    place = tmp_path_factory.mktemp("cascade")
    run = planned(place)
    device = ("--device", "cpu")
    for words in (
        ("train", run, "-c", "3d_cascade", "-f", "1", "--epochs", "2", "--workers", "1", *device),
        ("predict", run, "-i", place / "data" / "imagesTs", "-o", place / "out", *device),
    ):
        ended = CliRunner().invoke(app, [str(each) for each in words], catch_exceptions=False)
        assert ended.exit_code == 0, ended.output
    return place


def test_training_the_second_stage_trains_the_first_one_before_it(cascaded: Path) -> None:
    layout = Layout(cascaded / "run")
    assert trained(layout, "3d_lowres", "1")
    assert not trained(layout, "3d_lowres", "0")
    for name in ("3d_lowres", "3d_cascade"):
        model = layout.model(name, "1")
        record = load(model.run, Run)
        assert record.finished
        assert (record.steps, record.fold, record.configuration.train.epochs) == (4, "1", 2)
        assert model.scores.is_file()
    assert len(open_case(layout.cache("3d_cascade"), "case_00").read()[0]) == 1


def test_one_command_predicts_through_both_stages(cascaded: Path) -> None:
    [path] = (cascaded / "out").glob("*.nii.gz")
    image = sitk.ReadImage(str(cascaded / "data" / "imagesTs" / path.name))
    predicted = sitk.ReadImage(str(path))
    assert predicted.GetSize() == image.GetSize() == SIZE[::-1]
    assert predicted.GetOrigin() == image.GetOrigin()
    assert predicted.GetSpacing() == image.GetSpacing()
    assert set(np.unique(sitk.GetArrayFromImage(predicted)).tolist()) <= {0, 5, 9}
    predictor = Predictor(cascaded / "run", device="cpu")
    assert (predictor.configuration.name, predictor.members) == ("3d_cascade", ("fold_1",))


def test_the_second_stage_reads_what_the_first_one_finds(cascaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [path] = (cascaded / "data" / "imagesTs").glob("*.nii.gz")
    predictor = Predictor(cascaded / "run", device="cpu")
    volume = read_image([path])
    found_KZYX = predictor.segment(volume, with_probabilities=True).probabilities_KZYX
    monkeypatch.setattr("autoseg.steps.predicting.predictor.on_grid", lambda values, prepared, *_: np.ones(
        prepared.image_CZYX.shape[1:], np.int16
    ))  # fmt: skip
    other_KZYX = predictor.segment(volume, with_probabilities=True).probabilities_KZYX
    assert found_KZYX is not None
    assert other_KZYX is not None
    assert np.abs(found_KZYX.astype(np.float32) - other_KZYX.astype(np.float32)).max() > 0.01


def test_training_and_prediction_bring_the_first_stage_to_the_same_grid(cascaded: Path) -> None:
    run = cascaded / "run"
    layout, plan, dataset = Layout(run), checked(run), load(Layout(run).dataset, Dataset)
    configuration = configuration_named(plan, "3d_cascade")
    maps = previous_label_maps(run, plan, configuration, "1", dataset.cases, "cpu", lambda event: None)
    for case in dataset.cases:
        values_ZYX, _ = read_labels(maps[case.id])
        reference_ZYX, _ = read_labels(case.label)
        prepared = prepare(read_image(case.images), reference_ZYX, plan, configuration)
        opened = open_case(layout.cache("3d_cascade"), case.id)
        seen_ZYX = previous_on_grid(maps[case.id], opened.mark, plan, configuration)
        assert seen_ZYX.shape == opened.shape
        np.testing.assert_array_equal(seen_ZYX, on_grid(values_ZYX, prepared, plan, configuration))
        np.testing.assert_array_equal(on_grid(reference_ZYX, prepared, plan, configuration), prepared.labels_ZYX)


def test_validation_cases_keep_the_predictions_of_the_network_that_did_not_see_them(cascaded: Path) -> None:
    layout = Layout(cascaded / "run")
    fold = load(layout.splits, Splits).folds[1]
    first = layout.model("3d_lowres", "1")
    assert {path.name for path in first.for_next_stage.iterdir()} == {f"{case}.nii.gz" for case in fold.train}
    assert {path.name for path in first.validation.glob("*.nii.gz")} == {f"{case}.nii.gz" for case in fold.validation}


def test_maps_of_a_network_that_learned_from_the_case_are_warned_of(cascaded: Path) -> None:
    run = cascaded / "run"
    layout, plan, dataset = Layout(run), checked(run), load(Layout(run).dataset, Dataset)
    configuration = configuration_named(plan, "3d_cascade")
    said: list[Event] = []
    previous_label_maps(run, plan, configuration, "1", dataset.cases, "cpu", said.append)
    (warned,) = said
    assert isinstance(warned, Warned)
    seen = len(load(layout.splits, Splits).folds[1].train)
    assert warned.text.startswith(f"{seen} of {len(dataset.cases)} label maps are of 3d_lowres, fold_1, which learned")
    assert "Train all folds of 3d_lowres first (autoseg train" in warned.text


def test_processes_share_the_maps_that_are_missing(cascaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, waited, predicted = cascaded / "run", [], []
    plan, dataset = checked(run), load(Layout(run).dataset, Dataset)
    configuration = configuration_named(plan, "3d_cascade")
    shutil.rmtree(Layout(run).model("3d_lowres", "1").for_next_stage)
    monkeypatch.setattr("autoseg.steps.training.cascade.wait_for_all", waited.append)

    def segment(predictor: Predictor, cases: list, *_: object) -> None:
        assert len(waited) % 2 == 1
        predicted.append([case.id for case in cases])

    for rank in (0, 1):
        with monkeypatch.context() as patched:
            patched.setattr("autoseg.steps.training.cascade.segment_cases", segment)
            team = Team(rank, 2)
            maps = previous_label_maps(run, plan, configuration, "1", dataset.cases, "cpu", silent, team)
            assert set(maps) == {case.id for case in dataset.cases}
    assert len(waited) == 4
    fold = load(Layout(run).splits, Splits).folds[1]
    assert sorted(each for some in predicted for each in some) == sorted(fold.train)
    previous_label_maps(run, plan, configuration, "1", dataset.cases, "cpu", silent)  # as it was


def test_a_first_stage_that_is_trained_is_used_as_it_is(cascaded: Path) -> None:
    run = cascaded / "run"
    weights = Layout(run).model("3d_lowres", "1").weights
    before = weights.stat().st_mtime_ns
    said: list[Event] = []
    train(run, configuration="3d_cascade", fold="1", resume="auto", device="cpu", workers=1, report=said.append)
    assert weights.stat().st_mtime_ns == before
    assert not [event for event in said if isinstance(event, Said) and "trained first" in event.text]
    assert not [event for event in said if isinstance(event, Trained)]


def test_both_stages_share_a_time_limit_and_the_command_to_go_on_is_that_of_the_second(tmp_path: Path) -> None:
    run = planned(tmp_path)

    def stop(event: Event) -> None:
        if isinstance(event, Trained):
            raise Interrupted("autoseg train -c 3d_lowres")

    expected = f"autoseg train {run} -c 3d_cascade -f 0 --max-time 20 --batch-size 2 --device cpu --resume auto"
    with pytest.raises(Interrupted, match=re.escape(expected)):
        train(run, configuration="3d_cascade", max_seconds=20.0, batch_size=2, device="cpu", workers=1, report=stop)
    record = load(Layout(run).model("3d_lowres", "0").run, Run)
    assert record.max_seconds == 10.0
    assert not Layout(run).model("3d_cascade", "0").run.exists()


def test_a_half_of_a_shared_time_stays_a_half_when_the_command_is_repeated(tmp_path: Path) -> None:
    run = planned(tmp_path)

    def again(resume: str = "auto", seconds: float = 0.25, report: Report = silent) -> Run:
        return train(
            run, configuration="3d_cascade", max_seconds=seconds, resume=resume, batch_size=2, device="cpu", workers=1,
            report=report,
        )  # fmt: skip

    def stop(event: Event) -> None:
        if isinstance(event, Trained):
            raise Interrupted("after its first step")

    both = again()
    assert (both.max_seconds, both.of_seconds) == (0.125, 0.25)
    assert load(Layout(run).model("3d_lowres", "0").run, Run).of_seconds == 0.25
    assert again() == both
    shutil.rmtree(Layout(run).model("3d_cascade", "0").root)  # stopped between the stages
    assert again().max_seconds == 0.125
    with pytest.raises(Interrupted):
        again("extend", 1000.0, stop)
    assert load(Layout(run).model("3d_cascade", "0").run, Run).max_seconds == 1000.0
