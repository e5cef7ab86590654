"""Class probabilities on disk, written and read slab by slab.

Memory does not grow with the image or its classes.
Axes: K class, Z Y X voxels. A file is one blosc2 array (K, Z, Y, X) of float16 or of uint8 (255 is probability 1), in
compressed chunks of one class each; label names, label values and geometry lie beside it as JSON. Files of earlier
versions, a zip of .npy members, are read too (`probabilities_npz.py`). Nothing in either can run code.
"""

import errno
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.errors import UserError
from autoseg.image import probabilities_npz
from autoseg.image.disk import failed_write
from autoseg.image.volume import Geometry
from autoseg.parallel import allowed_cores
from autoseg.store import replacing

KINDS: dict[str, np.dtype] = {"uint8": np.dtype(np.uint8), "float16": np.dtype(np.float16)}
ABOUT = "autoseg"
CHUNK_EDGE = 256
CHUNK_DEPTH = 16
"""Slices of a slab where nothing else is asked for."""
BLOCK_VOXELS = 2**16
BLOCK_DEPTH = 4

Put = Callable[[tuple[slice, ...], np.ndarray], None]
"""(part of K Z Y X, probabilities (k, z, y, x) of it, any float type) -> None."""


@dataclass(frozen=True)
class ProbabilityHeader:
    """What a file of probabilities says before its numbers.

    `values` are those of the label maps on disk, or None. `kind` is a key of KINDS. Where not `complete`, only some of
    the classes were saved and a voxel's probabilities do not sum to one. `background` is the background's value in
    label maps where the classes are regions that may overlap, else None.
    """

    names: tuple[str, ...]
    values: tuple[int, ...] | None
    geometry: Geometry
    kind: str = "float16"
    complete: bool = True
    background: int | None = None

    @property
    def rounding(self) -> float:
        """How far from the truth a stored probability may be."""
        return 0.5 / 255 if self.kind == "uint8" else 2.0**-12


@dataclass(frozen=True)
class Probabilities:
    """An open file of probabilities; `slab` and `part` read parts of it as float32."""

    path: Path
    header: ProbabilityHeader
    array_KZYX: Any

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """K Z Y X."""
        return (len(self.header.names), *self.header.geometry.size_voxels)

    @property
    def names(self) -> tuple[str, ...]:
        return self.header.names

    @property
    def dtype(self) -> np.dtype:
        """Of the numbers on disk; what is read is float32."""
        return KINDS[self.header.kind]

    def slab(self, z0: int, z1: int) -> np.ndarray:
        """Slices z0 to z1 (exclusive) of all classes: (K, z, Y, X) float32. Raises UserError for a damaged file."""
        return self.part((slice(None), slice(z0, z1)))

    def part(self, window: tuple[slice, ...]) -> np.ndarray:
        """Any part of (K, Z, Y, X) as float32."""
        with _naming(self.path):
            found = np.asarray(self.array_KZYX[window])
        wide = found.astype(np.float32)
        return np.divide(wide, np.float32(255), out=wide) if found.dtype == np.uint8 else wide


@contextmanager
def writing_probabilities(
    path: Path | str,
    geometry: Geometry,
    label_names: Sequence[str],
    label_values: Sequence[int] | None = None,
    *,
    kind: str = "float16",
    complete: bool = True,
    background: int | None = None,
    slab: tuple[int, int] = (0, CHUNK_DEPTH),
) -> Iterator[Put]:
    """Give a function that writes one part of the image; the file appears, whole, when the block ends well.

    Args:
        label_names: one per class, background first where it is among them.
        label_values: the values of the classes in label maps on disk; needed to turn probabilities into label maps.
        kind: "float16" or "uint8".
        complete: False where only some of the classes are written.
        background: value of the background where these are regions, in the order in which they are painted.
        slab: (axis, thickness) of the parts to come: parts that begin at whole multiples are compressed only once.

    Raises:
        UserError: the disk is full or cannot be written, or `kind` is unknown.
    """
    if kind not in KINDS:
        raise UserError(f"Probabilities cannot be saved as {kind!r}.", fix=f"Choose one of: {', '.join(KINDS)}.")
    if label_values is not None and len(label_values) != len(label_names):
        raise ValueError(f"{len(label_names)} names for {len(label_values)} values")
    about: dict[str, object] = {
        "labels": list(label_names), "geometry": geometry.to_json(), "kind": kind, "complete": complete
    }  # fmt: skip
    if label_values is not None:
        about["values"] = [int(value) for value in label_values]
    if background is not None:
        about["background"] = int(background)
    with replacing(Path(path)) as temporary:
        array_KZYX = _new_array(temporary, (len(label_names), *geometry.size_voxels), KINDS[kind], slab)
        with _saying_full(temporary):
            array_KZYX.schunk.vlmeta[ABOUT] = json.dumps(about)

        def put(window: tuple[slice, ...], block_KZYX: np.ndarray) -> None:
            if kind == "uint8":
                block_KZYX = np.rint(np.asarray(block_KZYX, np.float32) * np.float32(255))
            with _saying_full(temporary):
                array_KZYX[window] = np.ascontiguousarray(block_KZYX, KINDS[kind])

        yield put


def open_probabilities(path: Path | str) -> Probabilities:
    """Open a file of probabilities to read parts of it. Raises UserError when it is none, or damaged."""
    path = _existing(path)
    if probabilities_npz.is_npz(path):
        with _naming(path):
            about, array_KZYX = probabilities_npz.opened(path)
            return Probabilities(path, _header(about), array_KZYX)
    with _naming(path):
        array_KZYX = _open(path)
        header = _header(json.loads(array_KZYX.schunk.vlmeta[ABOUT]))
        expected = (len(header.names), *header.geometry.size_voxels)
        if array_KZYX.shape != expected or array_KZYX.dtype != KINDS[header.kind]:
            raise ValueError(f"{array_KZYX.shape} of {array_KZYX.dtype} instead of {expected}")
        return Probabilities(path, header, array_KZYX)


def read_header(path: Path | str) -> ProbabilityHeader:
    """Names, values and geometry of a file of probabilities. Raises UserError when it is none."""
    path = _existing(path)
    if probabilities_npz.is_npz(path):
        with _naming(path):
            return _header(probabilities_npz.about(path))
    return open_probabilities(path).header


def _header(about: dict[str, Any]) -> ProbabilityHeader:
    values = tuple(int(value) for value in about["values"]) if "values" in about else None
    names = tuple(str(name) for name in about["labels"])
    kind = str(about.get("kind", "float16"))
    if kind not in KINDS:
        raise ValueError(f"numbers of kind {kind!r}")
    return ProbabilityHeader(
        names, values, Geometry.from_json(about["geometry"]), kind, bool(about.get("complete", True)),
        about.get("background"),
    )  # fmt: skip


def _new_array(path: Path, shape: tuple[int, int, int, int], dtype: np.dtype, slab: tuple[int, int]) -> Any:
    """An empty array file whose chunks are one class deep and as thick as the slabs that will be written."""
    import blosc2  # half a second, which only those pay who read or write probabilities

    axis, thickness = slab
    chunks = [1, *(min(size, CHUNK_EDGE) for size in shape[1:])]
    if axis != 0:
        chunks[1] = min(shape[1], CHUNK_DEPTH)
    chunks[1 + axis] = max(1, min(shape[1 + axis], thickness))
    blocks = [1, min(chunks[1], BLOCK_DEPTH), *chunks[2:]]
    while np.prod(blocks) > BLOCK_VOXELS:
        largest = int(np.argmax(blocks))
        blocks[largest] = -(-blocks[largest] // 2)
    settings = blosc2.CParams(codec=blosc2.Codec.ZSTD, clevel=1, nthreads=allowed_cores())
    with _saying_full(path):
        return blosc2.zeros(
            shape, dtype=dtype, chunks=tuple(chunks), blocks=tuple(blocks), urlpath=str(path), mode="w",
            contiguous=True, cparams=settings,
        )  # fmt: skip


def _open(path: Path) -> Any:
    """The array of a file. Some objects of blosc2 hold code; they name themselves in the file's first bytes."""
    import blosc2

    with open(path, "rb") as file:
        if b"LazyArray" in file.read(4096):
            raise ValueError("an expression, not an array")
    opened = blosc2.open(str(path), mode="r", dparams=blosc2.DParams(nthreads=allowed_cores()))
    if type(opened) is not blosc2.NDArray:
        raise ValueError(f"a {type(opened).__name__}, not an array")
    return opened


@contextmanager
def _saying_full(path: Path) -> Iterator[None]:
    """blosc2 has one error for everything; whether the disk is full is asked of the disk."""
    try:
        yield
    except RuntimeError as error:
        raise failed_write(path, str(error)) from error


def _existing(path: Path | str) -> Path:
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file.", fix="Is the path right, and is the disk there?")
    return path


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn whatever a damaged file raises into a UserError that names it."""
    try:
        yield
    except DAMAGE as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: the disk of temporary files ({tempfile.gettempdir()}) has no room to unpack it.",
                fix="Free some space there, or name another folder in TMPDIR.",
            ) from error
        raise UserError(
            f"{path}: these are no probabilities written by autoseg, or the file is damaged or incomplete.",
            fix="Predict again with --save-probabilities.",
        ) from error


DAMAGE = (OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError, UserError, *probabilities_npz.DAMAGE)
