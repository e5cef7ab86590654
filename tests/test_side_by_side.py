"""Jobs on several devices at a time. Imports little: so does every process that is started here."""

from pathlib import Path

import pytest

from autoseg.errors import UserError
from autoseg.steps.side_by_side import side_by_side


def write_device(folder: Path, device: str) -> None:
    (folder / device.replace(":", "_")).write_text(device)


def fails(job: str, device: str) -> None:
    raise UserError(f"{job} cannot be done.")


def test_jobs_run_side_by_side_each_on_a_device_of_its_own(tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(4)]
    for folder in folders:
        folder.mkdir()
    assert set(side_by_side(write_device, folders, ["cuda:0", "cuda:1"])) == set(folders)
    assert all(len(list(folder.iterdir())) == 1 for folder in folders)
    with pytest.raises(UserError, match="cannot be done"):
        list(side_by_side(fails, ["this"], ["cpu"]))
