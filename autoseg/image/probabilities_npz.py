"""Class probabilities as autoseg 0.1 wrote them: a zip of .npy members.

It can only be read from front to back. `about` holds label names, label values and geometry as JSON,
`probabilities_KZYX` the float16 numbers, one class after the other.
"""

import json
import math
import os
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.image.volume import Geometry

ABOUT, NUMBERS = "about.npy", "probabilities_KZYX.npy"
DAMAGE = (zipfile.BadZipFile, zlib.error)
"""What a damaged zip raises beside what any file does."""


def is_npz(path: Path) -> bool:
    """Whether the file begins like a zip."""
    with open(path, "rb") as file:
        return file.read(2) == b"PK"


def about(path: Path) -> dict[str, Any]:
    """What the file says before its numbers."""
    with zipfile.ZipFile(path) as file, file.open(ABOUT) as member:
        return json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))


def classes(path: Path, expected: tuple[int, ...]) -> Iterator[np.ndarray]:
    """One class after the other, (Z, Y, X) float32; ValueError where the shape is not `expected`, (K, Z, Y, X)."""
    with zipfile.ZipFile(path) as file, file.open(NUMBERS) as member:
        if np.lib.format.read_magic(member) != (1, 0):
            raise ValueError("not version 1.0 of .npy")
        shape, fortran_order, kind = np.lib.format.read_array_header_1_0(member)
        if fortran_order or shape != expected or kind.kind != "f":
            raise ValueError(f"shape {shape} of {kind} instead of {expected}")
        length = int(np.prod(shape[1:])) * kind.itemsize
        for k in range(shape[0]):
            content = member.read(length)
            if len(content) != length:
                raise EOFError(f"class {k} is incomplete")
            class_ZYX = np.frombuffer(content, kind).reshape(shape[1:]).astype(np.float32)
            del content
            yield class_ZYX
            del class_ZYX
        if member.read(1):
            raise ValueError("there is more than the header says")


def opened(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    """What the file says, and its numbers unpacked into a temporary file, (K, Z, Y, X) float16, to read parts of.

    Raises OSError when there is no room for it.
    """
    found = about(path)
    shape = (len(found["labels"]), *Geometry.from_json(found["geometry"]).size_voxels)
    with tempfile.TemporaryFile() as file:
        if hasattr(os, "posix_fallocate"):  # a disk that fills up under a memory map kills the process
            os.posix_fallocate(file.fileno(), 0, max(1, math.prod(shape) * np.dtype(np.float16).itemsize))
        numbers_KZYX = np.memmap(file, np.float16, "w+", shape=shape)
        for k, class_ZYX in enumerate(classes(path, shape)):
            numbers_KZYX[k] = class_ZYX
    return found, numbers_KZYX
