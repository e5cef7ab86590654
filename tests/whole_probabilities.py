"""Files of probabilities as a whole, which autoseg itself only writes and reads in parts."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoseg.image.probabilities import open_probabilities, writing_probabilities
from autoseg.image.volume import Geometry


def write_whole(
    path: Path, probabilities_KZYX: np.ndarray, geometry: Geometry, label_names: Sequence[str],
    label_values: Sequence[int] | None = None, **more: int,
) -> None:  # fmt: skip
    """Arguments as for `writing_probabilities`."""
    with writing_probabilities(path, geometry, label_names, label_values, **more) as put:
        put((slice(None),), probabilities_KZYX)


def read_whole(path: Path) -> tuple[np.ndarray, tuple[str, ...], Geometry]:
    """(K, Z, Y, X) float32, label names, geometry."""
    opened = open_probabilities(path)
    return opened.slab(0, opened.shape[1]), opened.names, opened.header.geometry
