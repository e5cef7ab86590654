"""Jobs on several devices at a time. Imports little: so does every process that is started here."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from autoseg.errors import UserError
from autoseg.steps.side_by_side import side_by_side


def write_device(folder: Path, device: str) -> None:
    (folder / device.replace(":", "_")).write_text(device)


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


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_no_training_outlives_the_process_that_started_it(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path\nfrom test_side_by_side import waits\n"
        "from autoseg.steps.side_by_side import side_by_side\n"
        f"if __name__ == '__main__':\n    list(side_by_side(waits, [Path({str(tmp_path)!r})], ['cpu']))\n"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    here = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    parent = subprocess.Popen([sys.executable, str(script)], env=here, start_new_session=True)
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
    assert set(side_by_side(write_device, folders, ["cuda:0", "cuda:1"])) == set(folders)
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)
    with pytest.raises(UserError, match="cannot be done"):
        list(side_by_side(fails, ["this"], ["cpu"]))
