"""steps/training/boards.py: TensorBoard gets what the history gained, and says how to get it where it is absent."""

import math
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from autoseg.errors import UserError
from autoseg.steps.training.boards import board


def test_only_new_rows_are_written_undefined_values_left_out_and_the_file_closed_also_after_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple] = []
    writer = SimpleNamespace(
        add_scalar=lambda *scalar: written.append(scalar), flush=lambda: None, close=lambda: written.append(())
    )
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=lambda folder: writer))
    rows = [{"epoch": each, "step": 10.0 * each, "loss": 1 / each, "dice": math.nan} for each in (1.0, 2.0, 4.0)]
    with suppress(KeyboardInterrupt), board(tmp_path, written=1) as write:
        write(rows[:2])
        write(rows)
        raise KeyboardInterrupt
    assert written == [("loss", 0.5, 20), ("loss", 0.25, 40), ()]


def test_without_tensorboard_the_way_to_install_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match=r"not installed.*pip install -e '\.\[tensorboard\]'"):
        board(tmp_path, 0).__enter__()
