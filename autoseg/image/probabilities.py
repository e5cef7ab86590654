"""Class probabilities on disk, written and read one class at a time: memory does not grow with the number of classes.

Axes: K class, Z Y X voxels. A file is a compressed .npz (a zip of .npy members): `about` holds label names, label
values and geometry as JSON, `probabilities_KZYX` the float16 numbers, class after class. Nothing in it can run code.
"""

import json
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg.errors import UserError
from autoseg.image.volume import Geometry
from autoseg.store import replacing

ABOUT, NUMBERS = "about.npy", "probabilities_KZYX.npy"


@dataclass(frozen=True)
class ProbabilityHeader:
    """What a file of probabilities says before its numbers. `values` are those of the label maps on disk, or None."""

    names: tuple[str, ...]
    values: tuple[int, ...] | None
    geometry: Geometry


def write_probabilities(
    path: Path | str,
    probabilities_KZYX: np.ndarray | Iterable[np.ndarray],
    geometry: Geometry,
    label_names: Sequence[str],
    label_values: Sequence[int] | None = None,
) -> None:
    """Write class probabilities as float16, as a whole or not at all.

    Args:
        probabilities_KZYX: the array, or an iterable that gives one (Z, Y, X) array per class.
        label_names: one per class, background first.
        label_values: the values of the classes in label maps on disk; needed to turn probabilities into label maps.
    """
    classes = len(label_names)
    if isinstance(probabilities_KZYX, np.ndarray) and len(probabilities_KZYX) != classes:
        raise ValueError(f"{classes} names for {len(probabilities_KZYX)} classes")
    if label_values is not None and len(label_values) != classes:
        raise ValueError(f"{classes} names for {len(label_values)} values")
    about: dict[str, object] = {"labels": list(label_names), "geometry": geometry.to_json()}
    if label_values is not None:
        about["values"] = [int(value) for value in label_values]
    head = {"descr": "<f2", "fortran_order": False, "shape": (classes, *geometry.size_voxels)}
    with replacing(Path(path)) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED, True, 1) as file:
        with file.open(ABOUT, "w") as member:
            np.lib.format.write_array(member, np.array(json.dumps(about)), allow_pickle=False)
        with file.open(NUMBERS, "w", force_zip64=True) as member:
            np.lib.format.write_array_header_1_0(member, head)
            written = 0
            for class_ZYX in probabilities_KZYX:
                if class_ZYX.shape != geometry.size_voxels:
                    raise ValueError(f"class {written} has shape {class_ZYX.shape}, not {geometry.size_voxels}")
                member.write(np.ascontiguousarray(class_ZYX, "<f2").data)
                written += 1
            if written != classes:
                raise ValueError(f"{classes} names for {written} classes")


def read_header(path: Path | str) -> ProbabilityHeader:
    """Names, values and geometry of a file of probabilities. Raises UserError when it is none."""
    path = _existing(path)
    with _naming(path), zipfile.ZipFile(path) as file, file.open(ABOUT) as member:
        about = json.loads(str(np.lib.format.read_array(member, allow_pickle=False)))
        values = tuple(int(value) for value in about["values"]) if "values" in about else None
        names = tuple(str(name) for name in about["labels"])
        return ProbabilityHeader(names, values, Geometry.from_json(about["geometry"]))


def read_classes(path: Path | str) -> Iterator[np.ndarray]:
    """The probabilities of a file, one class after the other: (Z, Y, X) float32 each.

    Raises UserError when the file is damaged, possibly only at its end, where the checksum is.
    """
    path, header = _existing(path), read_header(path)
    expected = (len(header.names), *header.geometry.size_voxels)
    with _naming(path), zipfile.ZipFile(path) as file, file.open(NUMBERS) as member:
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


def read_probabilities(path: Path | str) -> tuple[np.ndarray, tuple[str, ...], Geometry]:
    """What `write_probabilities` wrote, all classes at once: (K, Z, Y, X) float32, label names, geometry."""
    header = read_header(path)
    probabilities_KZYX = np.empty((len(header.names), *header.geometry.size_voxels), np.float32)
    for k, class_ZYX in enumerate(read_classes(path)):
        probabilities_KZYX[k] = class_ZYX
    return probabilities_KZYX, header.names, header.geometry


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.", fix="Is the path right, and is the disk there?")
    return path


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path}: these are no probabilities written by autoseg, or the file is damaged or incomplete.",
        fix="Predict again with --save-probabilities.",
    )


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into a UserError that names it."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile, zlib.error, UserError) as error:
        raise _damaged(path) from error
