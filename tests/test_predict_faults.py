"""`autoseg predict` when things go wrong: it ends soon, says which case, and what is finished stays."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import SimpleITK as sitk
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from test_predict import write_network

from autoseg.cases import exchange
from autoseg.cases.predicted import Predicted
from autoseg.errors import UserError
from autoseg.events import Event, Said, Warned
from autoseg.layout import Layout, flagged_file, prediction_record
from autoseg.records import AugmentSpec, Plan, Run, TrainSpec
from autoseg.steps import predict as step
from autoseg.steps.predict import Predictor, predict
from autoseg.store import load, save

CASES = 10
CUT = "case_04"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights, and ten images of which one is cut off in the middle."""
    place = tmp_path_factory.mktemp("faults")
    data = write_dataset(place / "data", cases=2, shape=(8, 8, 8), label_values=(1, 2), held_out=CASES)
    images = sorted((data / "imagesTs").iterdir())
    for number, path in enumerate(images):
        path.rename(path.with_name(f"case_{number:02}.nii.gz"))
    shutil.copytree(data / "imagesTs", place / "whole")
    cut = data / "imagesTs" / f"{CUT}.nii.gz"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    configuration = a_configuration(
        network=a_network(), train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=()))
    )
    write_network(a_planned_run(place / "run", data, configuration), configuration, "0")
    return place


def maps(folder: Path) -> set[str]:
    """The label maps in a folder, all of which must open."""
    found = {path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz")}
    for name in found:
        sitk.ReadImage(str(folder / f"{name}.nii.gz"))
    return found


ALL = {f"case_{number:02}" for number in range(CASES)}


@pytest.mark.parametrize("workers", [0, 2])
def test_a_truncated_image_among_ten_is_named_and_the_others_are_done_with_skip(
    place: Path, tmp_path: Path, workers: int
) -> None:
    said: list[Event] = []
    options = {"device": "cpu", "workers": workers}
    with pytest.raises(UserError, match=rf"1 of 10 cases failed: {CUT}.*The others are done"):
        predict(
            place / "run", place / "data" / "imagesTs", tmp_path, on_error="skip", save_uncertainty=True,
            report=said.append, **options,
        )  # fmt: skip
    assert maps(tmp_path) == ALL - {CUT}
    assert {line.split(",")[0] for line in flagged_file(tmp_path).read_text().splitlines()[1:]} == ALL - {CUT}
    assert any(isinstance(each, Warned) and CUT in each.text for each in said)
    with pytest.raises(UserError, match=CUT):
        predict(place / "run", place / "data" / "imagesTs", tmp_path / "stopped", **options)
    assert CUT not in maps(tmp_path / "stopped")
    assert not list(tmp_path.rglob("*unfinished*"))


@pytest.mark.parametrize("stage", ["read_case", "_compute", "write_case"])
def test_an_exception_in_any_stage_ends_the_run_with_the_case_and_what_is_finished_stays(
    place: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = getattr(step, stage)

    def broken(*arguments: object) -> object:
        if any(getattr(each, "id", "") == "case_05" for each in arguments):
            raise ZeroDivisionError("injected")
        return whole(*arguments)

    monkeypatch.setattr(step, stage, broken)
    with pytest.raises(ZeroDivisionError, match="injected") as caught:
        predict(place / "run", place / "whole", tmp_path, device="cpu", workers=0)
    assert "case_05" in "".join(caught.value.__notes__)
    assert {"case_00", "case_01"} <= maps(tmp_path)
    with pytest.raises(UserError, match=r"1 of 10 cases failed: case_05 \(injected\)"):
        predict(place / "run", place / "whole", tmp_path, device="cpu", workers=0, on_error="skip")
    assert maps(tmp_path) == ALL - {"case_05"}


def test_a_worker_that_is_killed_from_outside_ends_the_command_soon(place: Path, tmp_path: Path) -> None:
    """The first worker process that appears reads. It is stopped, so that it has a case, and then killed."""
    (tmp_path / "images").mkdir()
    for number in range(40):  # more than are read before it is found
        (tmp_path / "images" / f"case_{number:02}.nii.gz").symlink_to(place / "whole" / f"case_0{number % 10}.nii.gz")
    command = [sys.executable, "-m", "autoseg", "predict", str(place / "run"), "-i", str(tmp_path / "images")]
    command += ["-o", str(tmp_path / "out"), "--device", "cpu", "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    workers: list[int] = []
    while len(workers) < 2 and process.poll() is None:
        server = next((pid for pid in _descendants(process.pid) if "forkserver" in _command_of(pid)), None)
        workers = _descendants(server) if server else []
        if workers:
            os.kill(workers[0], signal.SIGSTOP)
        time.sleep(0.01)
    assert len(workers) == 2, "cases are handed out once the other worker, which writes, is there too"
    time.sleep(1.0)
    assert process.poll() is None
    os.kill(workers[0], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "the process reading it was killed (SIGKILL)" in said
    assert re.search(r"case_\d\d", said)


def _descendants(pid: int) -> list[int]:
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(each) for each in text.split()]


def _command_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().replace("\0", " ")
    except OSError:
        return ""


def test_resume_leaves_out_what_is_done_and_unchanged(place: Path, tmp_path: Path) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(place / "whole", images)
    predict(place / "run", images, out, device="cpu", part="1/2")
    before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    assert set(before) == {f"case_{number:02}.nii.gz" for number in range(0, CASES, 2)}
    os.utime(images / "case_00.nii.gz")  # another time, the same content
    shutil.copy(images / "case_01.nii.gz", images / "case_02.nii.gz")
    (out / "case_04.nii.gz").unlink()
    for changed in ("case_06.nii.gz", "case_07.nii.gz"):  # one corrected by hand, one drawn by hand: not autoseg's
        kept = (out / changed).read_bytes() if (out / changed).is_file() else b""
        shutil.copy(out / "case_08.nii.gz", out / changed)
        with pytest.raises(
            UserError, match=rf"out: {changed} would be replaced, which .* or somebody has changed since"
        ):
            predict(place / "run", images, out, device="cpu", resume=True)
        (out / changed).unlink()
        if kept:
            (out / changed).write_bytes(kept)
    said: list[Event] = []
    written = predict(place / "run", images, out, device="cpu", resume=True, report=said.append)
    assert [path.name for path in written] == sorted(f"{each}.nii.gz" for each in ALL)
    assert any(isinstance(each, Said) and each.text == "3 of 10 cases are done already." for each in said)
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.nii.gz")}
    kept = {name for name, when in before.items() if after[name] == when}
    assert kept == {"case_00.nii.gz", "case_08.nii.gz"}
    said.clear()
    predict(place / "run", images, out, device="cpu", resume=True, speed="fast", part="1/5", report=said.append)
    assert not any(isinstance(each, Said) and "done already" in each.text for each in said)


def test_a_case_that_is_being_written_anew_is_not_done(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between a label map and its record, the old record would vouch for the new map; it is autoseg's still."""
    [image] = [place / "whole" / "case_00.nii.gz"]
    predict(place / "run", image, tmp_path, device="cpu", workers=0)
    record = prediction_record(tmp_path, "case_00")
    assert load(record, Predicted).model
    after = tmp_path / "after"

    def killed(*_: object) -> None:
        raise MemoryError("no more")

    monkeypatch.setattr(Predictor, "compute", killed)
    with pytest.raises(UserError, match="memory ran out"):
        predict(place / "run", image, tmp_path, device="cpu", workers=0, speed="fast")
    assert not load(record, Predicted).model
    monkeypatch.undo()
    monkeypatch.setattr(exchange, "keep_record", killed)
    for output in (tmp_path, after):
        with pytest.raises(UserError, match="memory ran out"):
            predict(place / "run", image, output, device="cpu", workers=0)
        assert (output / image.name).is_file()
        assert not load(prediction_record(output, "case_00"), Predicted).model
    monkeypatch.undo()
    for output in (tmp_path, after):
        predict(place / "run", image, output, device="cpu", workers=0, resume=True)
        assert load(prediction_record(output, "case_00"), Predicted).model


def test_networks_of_another_plan_are_refused(place: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(place / "run", run)
    plan = load(Layout(run).plan, Plan)
    changed = plan.configurations[0].model_copy(update={"spacing_mm": (3.0, 1.0, 1.0)})
    save(Layout(run).plan, plan.model_copy(update={"configurations": (changed,)}))
    with pytest.raises(UserError, match=r"was trained by another plan: spacing_mm differ"):
        predict(run, place / "whole", tmp_path / "out", device="cpu")
    smaller = plan.configurations[0].model_copy(update={"patch_voxels": (4, 4, 4)})
    save(Layout(run).plan, plan.model_copy(update={"configurations": (smaller,)}))
    assert Predictor(run, device="cpu").configuration.patch_voxels == plan.configurations[0].patch_voxels
    save(Layout(run).plan, plan.model_copy(update={"channels": ("other",) * len(plan.channels)}))
    for record in Layout(run).configuration(changed.name).glob("fold_*/run.json"):
        save(record, load(record, Run).model_copy(update={"channels": plan.channels}))
    with pytest.raises(UserError, match="channels differ"):
        Predictor(run, device="cpu")
    ct = plan.configurations[0].model_copy(update={"normalization": ("ct",) * len(plan.channels)})
    save(Layout(run).plan, plan.model_copy(update={"configurations": (ct,)}))
    for model in Layout(run).configuration(ct.name).glob("fold_*/run.json"):
        record = load(model, Run).model_copy(update={"configuration": ct, "intensities": plan.intensities})
        save(model, record)
    assert Predictor(run, device="cpu").members
    moved = tuple(each.model_copy(update={"mean": each.mean + 1}) for each in plan.intensities)
    save(Layout(run).plan, plan.model_copy(update={"configurations": (ct,), "intensities": moved}))
    with pytest.raises(UserError, match="another plan: intensities differ"):
        Predictor(run, device="cpu")


@pytest.mark.parametrize("part", ["0/3", "4/3", "2", "a/b", "1/0"])
def test_a_part_that_is_none_is_refused(place: Path, tmp_path: Path, part: str) -> None:
    with pytest.raises(UserError, match=rf"--part {part} is no part"):
        predict(place / "run", place / "whole", tmp_path, device="cpu", part=part)


def test_unknown_choices_are_named(place: Path, tmp_path: Path) -> None:
    for wrong, said in (
        ({"speed": "warp"}, r"no speed 'warp'.*accurate, balanced, fast"),
        ({"on_error": "hope"}, "--on-error hope"),
        ({"classes": ["background"]}, "No probabilities are saved.*Add --save-probabilities"),
        ({"save_probabilities": True, "classes": ["liver"]}, r"no class liver.*background"),
        ({"save_probabilities": True, "probability_kind": "int4"}, r"'int4'.*uint8"),
    ):
        with pytest.raises(UserError, match=said):
            predict(place / "run", place / "whole", tmp_path, device="cpu", **wrong)
