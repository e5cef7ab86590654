"""Jobs on several devices at a time. Imports little: so does every process that is started here."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoseg.errors import UserError
from autoseg.steps.training.side_by_side import side_by_side
from autoseg.steps.training.stopping import stop_requests

PATHS = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:2])


def write_device(folder: Path, device: str) -> str:
    (folder / device.replace(":", "_")).write_text(device)
    return folder.name


def fails(job: str, device: str) -> None:
    raise UserError(f"{job} cannot be done.")


def waits(folder: Path, device: str) -> None:
    (folder / "pid").write_text(str(os.getpid()))
    time.sleep(60)


def is_there(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False


def fails_or_takes_long(job: Path, device: str) -> None:
    job.touch()
    if device == "cuda:0":
        raise UserError("This one cannot be done.")
    time.sleep(1)


def is_killed(job: str, device: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def saves(folder: Path, device: str) -> None:
    """As a training: SIGTERM lets it end its step and save."""
    with stop_requests() as asked:
        (folder / device).write_text(str(os.getpid()))
        while not asked():
            time.sleep(0.05)
        time.sleep(0.5)
    (folder / f"{device}.saved").touch()


def begun_script(script: Path, code: str) -> "subprocess.Popen[bytes]":
    """A process of its own group, whose parent's signals it does not get."""
    script.write_text(code)
    here = os.environ | {"PYTHONPATH": PATHS}
    return subprocess.Popen([sys.executable, str(script)], env=here, stderr=subprocess.PIPE, start_new_session=True)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_trainings_save_when_their_parent_is_stopped_or_dies_and_none_begins(tmp_path: Path, how: int) -> None:
    code = (
        "from pathlib import Path\nfrom test_side_by_side import saves\n"
        "from autoseg.steps.training.side_by_side import side_by_side\n"
        "from autoseg.steps.training.stopping import ended_by_sigterm\n"
        "if __name__ == '__main__':\n    with ended_by_sigterm():\n"
        f"        list(side_by_side(saves, [Path({str(tmp_path)!r})] * 5, ['a', 'b']))\n"
    )
    parent = begun_script(tmp_path / "script.py", code)
    deadline = time.monotonic() + 60
    begun = [tmp_path / "a", tmp_path / "b"]
    while not all(file.is_file() and file.read_text() for file in begun):
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    pids = [int(file.read_text()) for file in begun]
    for file in begun:
        file.unlink()
    parent.send_signal(how)
    parent.communicate()
    while not all((tmp_path / f"{each}.saved").is_file() for each in "ab") or (
        how != signal.SIGKILL and any(is_there(pid) for pid in pids)
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not any(file.is_file() for file in begun)


def test_after_a_failure_no_job_begins_and_those_under_way_end(tmp_path: Path) -> None:
    jobs = [tmp_path / str(number) for number in range(6)]
    with pytest.raises(UserError, match="This one cannot"):
        list(side_by_side(fails_or_takes_long, jobs, ["cuda:0", "cuda:1"]))
    assert {job for job in jobs if job.is_file()} <= set(jobs[:3])


def test_a_killed_training_is_said_to_have_lacked_memory() -> None:
    with pytest.raises(UserError, match=r"trained on cuda:1 was killed.*out of memory.*same command"):
        list(side_by_side(is_killed, ["this"], ["cuda:1"]))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_no_training_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom test_side_by_side import waits\n"
        "from autoseg.steps.training.side_by_side import side_by_side\n"
        f"if __name__ == '__main__':\n    list(side_by_side(waits, [Path({str(tmp_path)!r})], ['cpu']))\n"
    )
    parent = begun_script(tmp_path / "script.py", code)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").is_file() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        assert parent.poll() is None
        time.sleep(0.05)
    worker = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    while is_there(worker):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_jobs_run_side_by_side_each_on_a_device_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    found = side_by_side(write_device, folders, ["cuda:0", "cuda:1"])
    assert set(found) == {(folder, folder.name) for folder in folders}
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)
    with pytest.raises(UserError, match="cannot be done"):
        list(side_by_side(fails, ["this"], ["cpu"]))
