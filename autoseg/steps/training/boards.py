"""The history of a training for TensorBoard, which is an extra of the installation."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from autoseg.errors import UserError

Row = dict[str, float]


def writer_class() -> Callable[[str], Any]:
    """What writes for TensorBoard. Raises UserError where that is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(
            "--tensorboard: TensorBoard is not installed.",
            fix="Run, where autoseg was cloned: pip install -e '.[tensorboard]'",
        ) from error
    return SummaryWriter


@contextmanager
def board(folder: Path, written: int) -> Iterator[Callable[[Sequence[Row]], None]]:
    """A function that writes what a history has gained since the last call as scalars over the training's steps.

    Its file and thread are closed with the block.

    Args:
        written: rows of the history that an earlier part of the same training has written already.
    Raises UserError where TensorBoard is not installed.
    """
    writer = writer_class()(str(folder))
    done = written

    def write(history: Sequence[Row]) -> None:
        nonlocal done
        for row in history[done:]:
            for name, value in row.items():
                if name not in ("epoch", "step") and math.isfinite(value):
                    writer.add_scalar(name, value, int(row["step"]))
        done = len(history)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()
