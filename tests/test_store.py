"""Records on disk: whole or not at all, versioned, and wrong files are refused by the name of the bad field."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoseg import store
from autoseg.errors import UserError
from autoseg.records import Case, Dataset, Fold, Label, Plan, Run, Splits
from autoseg.scoring.study import Study


def a_dataset(cases: int = 2) -> Dataset:
    return Dataset(
        name="blobs",
        dimension=3,
        channels=("T1",),
        labels=(Label(name="background", value=0), Label(name="blob", value=255)),
        cases=tuple(Case(id=f"case_{k}", images=(f"/data/case_{k}.nii.gz",)) for k in range(cases)),
    )


def test_a_record_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    store.save(tmp_path / "deep" / "dataset.json", a_dataset())
    assert store.load(tmp_path / "deep" / "dataset.json", Dataset) == a_dataset()


def test_a_saved_file_names_its_kind_and_version(tmp_path: Path) -> None:
    store.save(tmp_path / "dataset.json", a_dataset())
    content = json.loads((tmp_path / "dataset.json").read_text())
    assert (content["autoseg"], content["schema"]) == ("dataset", 1)


def test_a_failed_write_keeps_the_old_file_and_leaves_nothing_behind(tmp_path: Path) -> None:
    target = tmp_path / "notes.txt"
    store.write_text(target, "old")
    with pytest.raises(OSError, match="half"), store.replacing(target) as temporary:
        raise OSError(f"{temporary.write_text('half')} characters: half")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"dataset\.json: no such file"):
        store.load(tmp_path / "dataset.json", Dataset)


def test_a_file_named_instead_of_its_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(UserError, match=r"plan\.json: this is a file, not a folder\. Name the folder"):
        store.load(tmp_path / "plan.json" / "models" / "dataset.json", Dataset)
    with pytest.raises(UserError, match="this is a folder, not a file"):
        store.load(tmp_path, Dataset)


def test_a_torn_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "dataset.json").write_text('{"autoseg": "dataset", ')
    with pytest.raises(UserError, match="not valid JSON"):
        store.load(tmp_path / "dataset.json", Dataset)


def test_another_kind_of_record_is_refused(tmp_path: Path) -> None:
    store.save(tmp_path / "splits.json", Splits(seed=1, grouped=False, folds=(Fold(train=("a",), validation=("b",)),)))
    with pytest.raises(UserError, match="not an autoseg dataset file"):
        store.load(tmp_path / "splits.json", Dataset)


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    store.save(tmp_path / "dataset.json", a_dataset())
    changed = (tmp_path / "dataset.json").read_text().replace('"schema": 1', '"schema": 99')
    (tmp_path / "dataset.json").write_text(changed)
    with pytest.raises(UserError, match="schema 99 is newer"):
        store.load(tmp_path / "dataset.json", Dataset)


def test_movement_of_older_plans_and_runs_keeps_its_meaning(tmp_path: Path) -> None:
    content = json.loads((Path(__file__).parent.parent / "plans/hippocampus/plan-8GB.json").read_text())
    plan = store.parse(content, Plan, "plan.json")
    old = json.loads(json.dumps(content)) | {"schema": 1}
    for configuration in old["configurations"]:
        augment = configuration["train"]["augment"]
        augment |= {"unmirrored_move_chance": 0.5, "mirror_from_patches": 5000}
        del augment["extra_movement_chance"], augment["extra_movement_to_patches"], augment["elastic_chance"]
    (tmp_path / "plan.json").write_text(json.dumps(old))
    upgraded = store.load(tmp_path / "plan.json", Plan)
    for found, known in zip(upgraded.configurations, plan.configurations, strict=True):
        now = found.train.augment
        assert (now.extra_movement_chance, now.extra_movement_to_patches, now.elastic_chance) == (0.5, 50_000, 0.0)
        renamed = {"extra_movement_chance": 0.6, "extra_movement_to_patches": 200_000, "mirror_from_patches": 20_000}
        assert now.model_copy(update=renamed) == known.train.augment
    run = {"autoseg": "run", "schema": 1, "configuration": old["configurations"][0], "planned": None}
    run |= {"autoseg_version": "0.1.0", "torch_version": "2", "fold": "0", "seed": 0}
    run |= {"device": "cpu", "precision": "fp32", "compiled": False}
    upgraded_run = store.parse(run, Run, "run.json")
    assert (upgraded_run.configuration, upgraded_run.planned) == (upgraded.configurations[0], None)
    assert upgraded_run.cases is None
    for configuration, known in ((old["configurations"][0], upgraded), (content["configurations"][0], plan)):
        study = {"autoseg": "study", "schema": 1, "name": "x", "fold": "0", "vary": ["loss=ce,dice"], "seeds": 1}
        found = store.parse(study | {"configuration": configuration}, Study, "study.json")
        assert found.configuration == known.configurations[0]
    with pytest.raises(UserError, match=r"plan.json: not what schema 1 of a plan holds"):
        store.parse(old | {"configurations": 3}, Plan, "plan.json")


def test_a_wrong_value_is_named_by_its_place(tmp_path: Path) -> None:
    store.save(tmp_path / "dataset.json", a_dataset())
    content = json.loads((tmp_path / "dataset.json").read_text())
    content["labels"][1]["value"] = "many"
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"field labels\.1\.value"):
        store.load(tmp_path / "dataset.json", Dataset)


def test_an_unknown_field_is_refused(tmp_path: Path) -> None:
    store.save(tmp_path / "dataset.json", a_dataset())
    content = json.loads((tmp_path / "dataset.json").read_text()) | {"lables": []}
    (tmp_path / "dataset.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="field lables"):
        store.load(tmp_path / "dataset.json", Dataset)


def test_dumped_json_means_the_same_as_the_content() -> None:
    content = json.loads(a_dataset(40).model_dump_json())
    assert json.loads(store.dump(content)) == content


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="cannot be written"):
        store.write_text(tmp_path / "a.txt", "a")


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.EROFS, "cannot be written"), (errno.ENOSPC, "disk is full"), (errno.EDQUOT, "disk is full")],
)
def test_what_the_disk_refuses_is_a_user_error_also_where_nothing_can_be_removed(
    number: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a place mounted read-only, removing a file that is not there fails for the mount."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    for method in ("write_bytes", "unlink"):
        monkeypatch.setattr(Path, method, refuse)
    with pytest.raises(UserError, match=message):
        store.write_text(tmp_path / "a.txt", "a")


@pytest.mark.parametrize("stage", ["written", "flushed"])
def test_records_that_belong_together_all_stay_where_the_disk_fills_up(
    stage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [tmp_path / name for name in "abc"]
    store.save_together([(path, a_dataset(1)) for path in paths])
    calls: list[str] = []

    def fails_at_the_third(*given: object) -> int:
        calls.append(stage)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return plainly(*given)

    owner, name = (Path, "write_bytes") if stage == "written" else (os, "fsync")
    plainly = getattr(owner, name)
    monkeypatch.setattr(owner, name, fails_at_the_third)
    with pytest.raises(UserError, match=r"a: the disk is full"):
        store.save_together([(path, a_dataset(2)) for path in paths])
    assert [store.load(path, Dataset) for path in paths] == [a_dataset(1)] * 3
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_stopped_between_records_that_belong_together_the_last_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, replaced = [tmp_path / name for name in "abc"], []
    store.save_together([(path, a_dataset(1)) for path in paths])

    def stops_at_the_second(temporary: Path, path: Path) -> None:
        replaced.append(path.name)
        if len(replaced) == 2:
            raise KeyboardInterrupt
        rename(temporary, path)

    rename = os.replace
    monkeypatch.setattr(os, "replace", stops_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        store.save_together([(path, a_dataset(2)) for path in paths])
    assert replaced == ["a", "b"]
    assert [store.load(path, Dataset) for path in paths[:2]] == [a_dataset(2), a_dataset(1)]
    assert not paths[2].exists()


def test_a_full_disk_is_known_by_number_and_by_text() -> None:
    full = ("I/O error: No space left on device (os error 28)", "Disk quota exceeded (os error 122)")
    assert all(store.is_disk_full(RuntimeError(text)) for text in full)
    assert not store.is_disk_full(RuntimeError("I/O error: Permission denied (os error 13)"))
    assert not store.is_disk_full(OSError(errno.EACCES, "no space left for you"))


def test_a_file_in_the_place_of_a_folder_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    for folder in (tmp_path / "taken", tmp_path / "taken" / "run" / "cache"):
        with pytest.raises(UserError, match="taken: this is a file, not a folder"):
            store.write_text(folder / "plan.json", "{}")


WRITER = """
import sys
from pathlib import Path
from autoseg import store
for round in range(10**9):
    store.write_text(Path(sys.argv[1]), str(round % 10) * 400_000)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_writer_leaves_a_whole_file(tmp_path: Path) -> None:
    target = tmp_path / "target.txt"
    for pause in (0.0, 0.01, 0.03):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(target)])
        began = time.monotonic()
        while not target.exists() and time.monotonic() - began < 20:
            time.sleep(0.005)
        time.sleep(pause)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        content = target.read_text()
        assert len(content) == 400_000
        assert len(set(content)) == 1
        target.unlink()
    store.remove_unfinished(tmp_path)
    assert not list(tmp_path.iterdir())


def test_what_a_live_process_is_writing_stays_and_what_a_dead_one_left_goes(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = socket.gethostname()
    for name in (f"a.json{store.TEMPORARY}-{host}~{dead.pid}~abcdef", f"b.json{store.TEMPORARY}-1-abc"):
        (tmp_path / name).write_text("half")
    staged = tmp_path / f"out{store.TEMPORARY}-{host}~{dead.pid}~abcdef"
    staged.mkdir()
    (staged / "a.nii.gz").write_text("half")
    abroad = tmp_path / f"c.json{store.TEMPORARY}-another-host~1~abcdef"
    abroad.write_text("half")
    with store.replacing(tmp_path / "d.json") as temporary:
        temporary.write_text("whole")
        store.remove_unfinished(tmp_path)
        assert sorted(tmp_path.iterdir()) == sorted([abroad, temporary])
        long_ago = time.time() - 2 * store.DAY_SECONDS
        os.utime(abroad, (long_ago, long_ago))
        store.remove_unfinished(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["d.json"]
