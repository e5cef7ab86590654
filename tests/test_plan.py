"""`autoseg plan` on small data sets, without a GPU."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import SimpleITK as sitk
from fingerprints import alike, counting, fingerprint
from synthetic import write_dataset

from autoseg.errors import UserError
from autoseg.events import Said, Warned
from autoseg.layout import Layout
from autoseg.records import Dataset, Fingerprint, Plan
from autoseg.steps.plan import checked, edited, from_fingerprint, plan
from autoseg.steps.run import _planned
from autoseg.store import load, save


@pytest.fixture
def quick_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No step is simulated, which takes seconds, where a plan's memory is not what is tested."""
    monkeypatch.setattr("autoseg.network.memory.measurer", lambda budget, labelling: (counting(), "simulated"))


def test_plan_saves_data_set_fingerprint_and_plan(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=4, shape=(16, 24, 20))
    made = plan(data, tmp_path / "run", memory="4GB", workers=1)
    layout = Layout(tmp_path / "run")
    assert load(layout.plan, Plan) == made == checked(tmp_path / "run")
    assert len(load(layout.dataset, Dataset).cases) == len(load(layout.fingerprint, Fingerprint).cases) == 4
    assert [c.name for c in made.configurations] == ["2d", "3d"]
    assert made.configurations[1].patch_voxels == (16, 24, 20)
    assert {c.memory.source for c in made.configurations} == {"simulated"}
    assert made.budget.total_bytes == 4 * 2**30


def test_a_saved_fingerprint_gives_the_same_plan_without_data(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=4, shape=(24, 20), dimension=2)
    made = plan(data, tmp_path / "run", memory="4GB", workers=1)
    again = from_fingerprint(tmp_path / "run" / "fingerprint.json", tmp_path / "other", memory="4GB")
    assert [c.name for c in made.configurations] == ["2d"]
    assert again.configurations == made.configurations
    assert load(Layout(tmp_path / "other").plan, Plan) == again


SAGITTAL = (0.0, 0.0, -1.0, 1.0, 0.0, 0.0, 0.0, -1.0, 0.0)
"""ITK's cosines where X runs to the back, Y downwards and Z to the right."""


def with_sides(data: Path, sagittal: Iterable[int]) -> Path:
    """Call the two labels left and right, and have these cases lie as sagittal series do."""
    described = json.loads((data / "dataset.json").read_text())
    described["labels"] = {"0": "background", "1": "left hippocampus", "2": "right hippocampus"}
    (data / "dataset.json").write_text(json.dumps(described))
    for file in (f for number in sagittal for f in data.glob(f"*/case_{number:02d}*.nii.gz")):
        image = sitk.ReadImage(str(file))
        image.SetDirection(SAGITTAL)
        sitk.WriteImage(image, str(file))
    return data


@pytest.mark.usefixtures("quick_readings")
def test_left_and_right_of_sagittal_files_are_not_mirrored_into_each_other(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=3, shape=(20, 24, 16), spacing_mm=(1.0, 1.0, 2.0))
    warnings: list[str] = []
    made = plan(
        with_sides(data, range(3)), tmp_path / "run", memory="4GB", workers=1,
        report=lambda event: warnings.append(event.text) if isinstance(event, Warned) else None,
    )  # fmt: skip
    slices, volumes = made.configurations
    assert volumes.axes == (2, 0, 1)
    assert volumes.train.augment.mirror_axes == (0, 2)  # X and Y of the files: Z is the second axis of the patch
    assert slices.train.augment.mirror_axes == (1,)
    [because] = [c.because for c in made.choices if c.field == "3d.train.augment.mirror_axes"]
    assert "mirroring along Z, which is left-right in these files, would teach one as the other" in because
    assert not warnings
    stats = load(Layout(tmp_path / "run").fingerprint, Fingerprint).cases
    assert {each.patient_axes for each in stats} == {(("left-right",), ("head-foot",), ("front-back",))}
    by_hand = edited(tmp_path / "run", ["3d.train.augment.mirror_axes=1"])
    assert by_hand.configurations[1].train.augment.mirror_axes == (1,)


@pytest.mark.usefixtures("quick_readings")
def test_files_that_lie_in_different_ways_are_mirrored_along_none_of_their_sides(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=3, shape=(16, 24, 20))
    warnings: list[str] = []
    made = plan(
        with_sides(data, [1]), tmp_path / "run", memory="4GB", workers=1,
        report=lambda event: warnings.append(event.text) if isinstance(event, Warned) else None,
    )  # fmt: skip
    assert made.configurations[1].train.augment.mirror_axes == (1,)
    assert any("left-right is X in 2, Z in 1 of 3 cases" in each for each in warnings)


@pytest.mark.usefixtures("quick_readings")
def test_a_fingerprint_that_does_not_say_how_files_lie_is_planned_as_before(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=3, shape=(16, 24, 20))
    plan(with_sides(data, range(3)), tmp_path / "run", memory="4GB", workers=1)
    older = json.loads(Layout(tmp_path / "run").fingerprint.read_text()) | {"schema": 1}
    for each in older["cases"]:
        del each["patient_axes"]
    (tmp_path / "older.json").write_text(json.dumps(older))
    made = from_fingerprint(tmp_path / "older.json", memory="4GB")
    assert made.configurations[1].train.augment.mirror_axes == (0, 1)
    assert any("mirroring along X, taken to run that way" in each.because for each in made.choices)


@pytest.mark.parametrize(
    ("memory", "message"), [("0.6GB", "too small for configuration 2d"), ("lots", "not an amount of memory")]
)
def test_memory_that_makes_no_sense_is_refused(tmp_path: Path, memory: str, message: str) -> None:
    save(tmp_path / "fingerprint.json", fingerprint(alike(3, shape=(100, 300, 300))))
    with pytest.raises(UserError, match=message):
        from_fingerprint(tmp_path / "fingerprint.json", memory=memory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "huge"}, "no preset"),
        ({"memory": "11"}, "--memory 11 is not an amount of memory"),
        ({"device": "gpu"}, "--device gpu: no such device"),
    ],
)
def test_a_wrong_option_is_refused_before_any_image_is_read(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(tmp_path / "nothing", tmp_path / "run", **options)


def test_an_unknown_preset_is_refused_for_a_fingerprint(tmp_path: Path) -> None:
    save(tmp_path / "fingerprint.json", fingerprint(alike(3)))
    with pytest.raises(UserError, match="no preset"):
        from_fingerprint(tmp_path / "fingerprint.json", memory="8GB", preset="huge")


@pytest.mark.usefixtures("quick_readings")
def test_a_plan_that_changes_under_trained_models_is_announced(tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=3, shape=(24, 20), dimension=2)
    events: list = []
    plan(data, tmp_path / "run", memory="4GB", workers=1, report=events.append)
    Layout(tmp_path / "run").configuration("2d").mkdir(parents=True)
    plan(data, tmp_path / "run", memory="4GB", workers=1, report=events.append)
    plan(data, tmp_path / "run", memory="5GB", workers=1, report=events.append)  # small images: the same networks
    assert not [e for e in events if isinstance(e, Warned) and "trained" in e.text]
    plan(data, tmp_path / "run", memory="5GB", preset="M", workers=1, report=events.append)
    assert [e for e in events if isinstance(e, Warned) and "2d was trained by the old one" in e.text]


@pytest.mark.usefixtures("quick_readings")
def test_trained_configurations_that_the_new_plan_lacks_are_named(tmp_path: Path) -> None:
    data, events = write_dataset(tmp_path / "data", cases=3, shape=(24, 20), dimension=2), []
    made = plan(data, tmp_path / "run", memory="4GB", workers=1)
    student = made.configurations[0].model_copy(update={"name": "2d_student"})
    save(Layout(tmp_path / "run").plan, made.model_copy(update={"configurations": (*made.configurations, student)}))
    Layout(tmp_path / "run").configuration("2d_student").mkdir(parents=True)
    plan(data, tmp_path / "run", memory="4GB", workers=1, report=events.append)
    [said] = [event.text for event in events if isinstance(event, Warned) and "trained" in event.text]
    assert said == "The new plan is without 2d_student, of which there are trained networks: they stay."


@pytest.mark.usefixtures("quick_readings")
def test_a_plan_never_lies_beside_a_data_set_that_it_was_not_made_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while the records are saved, the run has the new data set and no plan."""
    data, run = write_dataset(tmp_path / "data", cases=3, shape=(24, 20), dimension=2), tmp_path / "run"
    plan(data, run, memory="4GB", workers=1)
    more = write_dataset(tmp_path / "more", cases=4, shape=(24, 20), dimension=2)

    def until_the_fingerprint(temporary: Path, path: Path) -> None:
        if path.name == "fingerprint.json":
            raise KeyboardInterrupt
        rename(temporary, path)

    rename = os.replace
    monkeypatch.setattr(os, "replace", until_the_fingerprint)
    with pytest.raises(KeyboardInterrupt):
        plan(more, run, memory="4GB", workers=1)
    assert len(load(Layout(run).dataset, Dataset).cases) == 4
    assert not Layout(run).plan.exists()


@pytest.mark.usefixtures("quick_readings")
def test_going_on_with_a_run_says_which_cases_are_new_and_which_are_gone(tmp_path: Path) -> None:
    data, run, events = write_dataset(tmp_path / "data", cases=3, layout="plain"), tmp_path / "run", []
    plan(data, run, memory="2GB", workers=1)
    _planned(data, run, None, None, 1, False, events.append)
    assert not [event for event in events if isinstance(event, Warned)]
    for folder in ("images", "labels"):
        [first, *_] = sorted((data / folder).iterdir())
        first.rename(first.with_name(f"new{''.join(first.suffixes)}"))
    _planned(data, run, None, None, 1, False, events.append)
    [said] = [event.text for event in events if isinstance(event, Warned)]
    assert "1 more (new) and 1 fewer (case_00) cases" in said
    assert f"autoseg plan {data} -o {run}" in said


@pytest.mark.usefixtures("quick_readings")
def test_data_that_was_moved_leaves_the_plan_as_it_is(tmp_path: Path) -> None:
    """Memory that was asked for, edits and students are in the plan alone."""
    data, run = write_dataset(tmp_path / "data", cases=3, shape=(24, 20), dimension=2), tmp_path / "run"
    plan(data, run, memory="4GB", workers=1)
    kept = edited(run, ["2d.train.epochs=7"])
    moved, said = data.rename(tmp_path / "elsewhere"), []
    assert plan(moved, run, workers=1, report=said.append) == kept
    assert any("the plan stays as it is" in getattr(each, "text", "") for each in said)
    assert all(Path(case.images[0]).is_file() for case in load(Layout(run).dataset, Dataset).cases)
    assert plan(moved, run, memory="4GB", workers=1) != kept


def test_a_plan_of_a_newer_schema_is_refused(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text('{"autoseg": "plan", "schema": 99}')
    with pytest.raises(UserError, match="newer"):
        checked(tmp_path)


@pytest.mark.usefixtures("quick_readings")
@pytest.mark.parametrize(
    ("cases", "message"), [(1, "cannot be split in two"), (2, r"splits_final\.json: fold 0 names case_9")]
)
def test_what_cannot_be_trained_is_planned_with_a_warning(tmp_path: Path, cases: int, message: str) -> None:
    events: list[object] = []
    data = write_dataset(tmp_path / "data", cases=cases)
    if cases > 1:
        (data / "splits_final.json").write_text('[{"train": ["case_00"], "val": ["case_9"]}]')
    plan(data, tmp_path / "run", memory="2GB", workers=1, report=events.append)
    assert any(re.search(message, event.text) for event in events if isinstance(event, Warned))


def test_a_run_never_takes_the_place_of_a_data_set(tmp_path: Path) -> None:
    listed = write_dataset(tmp_path / "listed", cases=2)
    plain = write_dataset(tmp_path / "plain", cases=2, layout="plain")
    before = (listed / "dataset.json").read_text()
    for data, run in ((listed, listed), (plain, plain), (plain, listed)):
        with pytest.raises(UserError, match="holds a data set"):
            plan(data, run, memory="2GB", workers=1)
    with pytest.raises(UserError, match="imagesTr: images or label maps of the data lie there"):
        plan(listed, listed / "imagesTr", workers=1)
    with pytest.raises(UserError, match=r"dataset\.json: this is a file, not a folder"):
        plan(listed / "dataset.json", tmp_path / "run", workers=1)
    assert (listed / "dataset.json").read_text() == before
    assert not (plain / "dataset.json").exists()
    assert not list(listed.glob("imagesTr/cache"))


def test_an_edit_is_saved_with_the_memory_it_needs(tmp_path: Path) -> None:
    save(tmp_path / "fingerprint.json", fingerprint(alike(30, shape=(1, 40, 40)), dimension=2))
    made = from_fingerprint(tmp_path / "fingerprint.json", tmp_path / "run", memory="4GB")
    [before] = made.configurations
    events: list = []
    changes = [f"2d.batch_size={2 * before.batch_size}"]
    changed = edited(tmp_path / "run", changes, events.append)
    [after] = changed.configurations
    assert checked(tmp_path / "run") == changed
    assert after.batch_size == 2 * before.batch_size
    assert before.memory.peak_bytes < after.memory.peak_bytes
    assert {choice.field: choice for choice in changed.choices}["2d.memory"].because == "simulated after the edit."
    assert not events
    [other] = edited(tmp_path / "run", ["2d.train.optimizer=sgd", "2d.train.epochs=3"]).configurations
    assert other.memory.peak_bytes < after.memory.peak_bytes
    edited(tmp_path / "run", ["2d.batch_size=100000"], events.append)
    assert "more than the budget of 3.75 GB" in events[0].text


def test_memory_and_device_together_check_the_simulation(tmp_path: Path) -> None:
    save(tmp_path / "fingerprint.json", fingerprint(alike(3, shape=(1, 24, 24)), dimension=2))
    events: list = []
    from_fingerprint(tmp_path / "fingerprint.json", memory="1GB", device="cpu", report=events.append)
    [said] = [event.text for event in events if isinstance(event, Said) and "simulated" in event.text]
    found = re.fullmatch(r"2d at batch 2: simulated .* MB, measured .* MB: ([+-]\d+\.\d) %", said)
    assert found is not None
    assert abs(float(found[1])) <= 5.0
    events.clear()
    from_fingerprint(tmp_path / "fingerprint.json", device="cpu", report=events.append)
    assert not [event for event in events if isinstance(event, Said) and "simulated" in event.text]
