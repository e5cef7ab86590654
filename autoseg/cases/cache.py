"""Preprocessed cases on disk, in compressed blocks: a patch is read alone.

A case is four files; `<case>.json` is written last, and a case without it, or with another key, is not there.

How voxels are kept, and why (one thread, CPU time, size relative to float32; CT 112x101x122, patch 64x96x96):
- float16, where it is as good as float32. It keeps 11 bits, the network computes in bf16 (8 bits) or fp16 (11), and
  augmentation adds noise of up to 0.1 standard deviations. `_storable` measures the rounding of every image and
  falls back to float32 when it exceeds a thousandth of a standard deviation (unscaled intensities, outliers).
- LZ4 without a filter: written in 5.5 ms, a patch read in 1.2 ms, size 0.37. LZ4HC 57 / 1.9 ms / 0.30, ZSTD with
  shuffle 16 / 4.3 ms / 0.22, LZ4 of float32 17 / 3.0 ms / 0.59. Reading happens a million times, writing once.
- Blocks of at most 128 KiB and of at most a patch (what is decompressed for one voxel), channels apart. Chunks of
  one patch, or of several up to 1 MiB: reading takes single blocks out of a chunk at the same speed, but each chunk
  costs 0.13 ms to write (35 slices of 50x40 one by one 6.1 ms, in one chunk 0.5 ms).
Axes: C channel, Z Y X voxels of the preprocessed grid.
"""

import hashlib
import io
import json
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any
from weakref import ref

import numpy as np

from autoseg.cases.prepare import Prepared
from autoseg.errors import UserError
from autoseg.image.companions import files_of
from autoseg.image.labels import IGNORED
from autoseg.image.volume import Box
from autoseg.layout import CachedFiles
from autoseg.parallel import allowed_open_files
from autoseg.records import Case, Configuration, Millimetres3, Plan, Saved, Voxels3
from autoseg.store import load, save, write_bytes

PREPROCESSING = 2
"""Version of what `prepare` computes; a higher one makes every cache anew."""

LARGEST_BLOCK_BYTES = 128 * 1024
LARGEST_JOINED_CHUNK_BYTES = 1024 * 1024
LARGEST_ROUNDING = 1e-3
COMPRESSION_LEVEL = 5

Stamp = tuple[tuple[str, int, int], ...]


class CacheMark(Saved):
    """The last file of a cached case. `stamp` (path, bytes, nanoseconds of the last change) belongs to the input files.

    `files` are the names and sizes of the other three. `box`, `cropped_shape` and `spacing_mm` are those of `Prepared`.
    """

    id: str
    key: str
    content: str
    stamp: Stamp
    channels: int
    shape_voxels: Voxels3
    box: Box
    cropped_shape: Voxels3
    spacing_mm: Millimetres3
    files: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class CachedCase:
    """A preprocessed case. Files are opened on the first read and stay open, see `StoredArray`.

    Reading raises UserError where the case was preprocessed otherwise since `open_case`: cases would be of two kinds.

    Args:
        id: of the case.
        shape: Z Y X voxels.
        channels: number of them.
        mark: what else is known, for bringing results back to the file's grid.
    """

    id: str
    shape: Voxels3
    channels: int
    mark: CacheMark
    folder: Path

    @cached_property
    def locations(self) -> dict[int, np.ndarray]:
        """Label index -> (n, 3) int32 positions Z Y X; see `prepare.class_locations` for the key -1."""
        with self._unchanged(), np.load(self._files.locations, allow_pickle=False) as stored:
            return {int(name): stored[name].astype(np.int32) for name in stored.files}

    def read(self, box: Box | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Image (C, Z, Y, X) float32 and labels (Z, Y, X) int16 (-1: ignored) inside `box`, or all of them.

        Raises ValueError when the box does not lie inside the case; padding is the caller's.
        """
        box = box or ((0, self.shape[0]), (0, self.shape[1]), (0, self.shape[2]))
        if any(not 0 <= start <= stop <= size for (start, stop), size in zip(box, self.shape, strict=True)):
            raise ValueError(f"case {self.id}: the box {box} does not lie inside {self.shape}")
        slices = tuple(slice(start, stop) for start, stop in box)
        with self._one_reader:  # a blosc2 array decompresses for one thread at a time
            image_CZYX, labels_ZYX = self._image[(slice(None), *slices)], self._labels[slices]
        return np.asarray(image_CZYX, np.float32), np.asarray(labels_ZYX, np.int16)

    @cached_property
    def _one_reader(self) -> Lock:
        return Lock()

    @cached_property
    def _image(self) -> "StoredArray":
        return StoredArray(self._files.image, self._unchanged)

    @cached_property
    def _labels(self) -> "StoredArray":
        return StoredArray(self._files.labels, self._unchanged)

    @property
    def _files(self) -> CachedFiles:
        return CachedFiles(self.folder, self.id)

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        """Look at the mark when a file is open: `write` removes it before it replaces the others."""
        failed: Exception | None = None
        try:
            yield
        except (OSError, RuntimeError) as error:  # gone, or half of it is there
            failed = error
        if not is_current(self.folder, self.id, self.mark.key):
            raise UserError(
                f"{self.folder}: case {self.id} was preprocessed otherwise, or removed, while it was in use.",
                fix="Bring plan and data back and go on with --resume, or start anew with --restart.",
            ) from failed
        if failed is not None:
            raise failed

    def __getstate__(self) -> dict[str, Any]:  # open files do not travel to other processes
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}


@dataclass(frozen=True, eq=False)
class StoredArray:
    """An array that `write_array` wrote, to be read by one thread at a time.

    Its file is opened on the first read, inside `while_opening`, and stays open until so many are that half of what
    the system allows is used: then that which was opened first is closed, and opened again when it is read.
    """

    path: Path
    while_opening: Callable[[], AbstractContextManager[None]] = nullcontext

    def __getitem__(self, box: tuple[slice, ...]) -> np.ndarray:
        return np.asarray(self._array[box])

    @cached_property
    def _array(self) -> Any:
        with self.while_opening():
            array = _open(self.path)
        OPEN.append(ref(self))
        while len(OPEN) > allowed_open_files() // 2:
            if (first := OPEN.popleft()()) is not None:
                first.__dict__.pop("_array", None)  # a read that is under way holds the array, and so its file
        return array


OPEN: deque[ref[StoredArray]] = deque()
"""Arrays in the order in which their files were opened; some may be gone."""


def key_of(content: str, plan: Plan, configuration: Configuration) -> str:
    """Hash of all that a preprocessed case depends on.

    `content` is that of `inspect.content_of`: the bytes of the files. Training options and the configuration's name do
    not count, so changing them keeps the cache.
    """
    deciding = {
        "version": PREPROCESSING,
        "content": content,
        "labels": [label.value for label in plan.labels],
        "ignore": plan.ignore_value,
        "intensities": [each.model_dump() for each in plan.intensities],
        **configuration.model_dump(
            include={"axes", "spacing_mm", "normalization", "mask_for_normalization", "resampling", "patch_voxels"}
        ),
    }
    return hashlib.blake2b(json.dumps(deciding, sort_keys=True).encode(), digest_size=16).hexdigest()


def write(
    folder: Path,
    case_id: str,
    prepared: Prepared,
    locations: dict[int, np.ndarray],
    key: str,
    *,
    patch_voxels: Sequence[int] = (),
    content: str = "",
    stamp: Stamp = (),
) -> None:
    """Write a case; until the last file is there, `is_current` says no. What another process wrote meanwhile stays.

    Args:
        patch_voxels: of the configuration (two or three numbers); blocks are no larger.
        content, stamp: of the input files, so that `is_current` need not read them again.

    Without a label map all voxels are marked as not annotated.
    """
    if is_current(folder, case_id, key):
        return
    files = CachedFiles(folder, case_id)
    files.mark.unlink(missing_ok=True)
    image_CZYX, labels_ZYX = prepared.image_CZYX, prepared.labels_ZYX
    if labels_ZYX is None:
        labels_ZYX = np.full(image_CZYX.shape[1:], IGNORED, np.int8)
    patch = (*(1,) * (3 - len(patch_voxels)), *patch_voxels) if patch_voxels else labels_ZYX.shape
    image_CZYX = _storable(image_CZYX)
    small = np.int8 if labels_ZYX.size == 0 or labels_ZYX.max() <= np.iinfo(np.int8).max else np.int16
    table = io.BytesIO()
    position = np.uint16 if max(labels_ZYX.shape) <= 2**16 else np.int32
    np.savez(table, **{str(index): found.astype(position) for index, found in locations.items()})  # type: ignore[arg-type]
    written = {
        files.image: _compressed(image_CZYX, (1, *patch)),
        files.labels: _compressed(labels_ZYX.astype(small, copy=False), tuple(patch)),
        files.locations: table.getvalue(),
    }
    for path, content_bytes in written.items():
        write_bytes(path, content_bytes, durable=False)  # what a power failure leaves empty fails the size in the mark
    mark = CacheMark(
        id=case_id,
        key=key,
        content=content,
        stamp=stamp,
        channels=len(image_CZYX),
        shape_voxels=(labels_ZYX.shape[0], labels_ZYX.shape[1], labels_ZYX.shape[2]),
        box=prepared.box,
        cropped_shape=prepared.cropped_shape,
        spacing_mm=prepared.spacing_mm,
        files=tuple((path.name, len(content_bytes)) for path, content_bytes in written.items()),
    )
    save(files.mark, mark, durable=False)


def is_current(folder: Path, case_id: str, key: str) -> bool:
    """Whether the case was written with this key, and all of its files are whole."""
    mark = read_mark(folder, case_id)
    return mark is not None and mark.key == key


def read_mark(folder: Path, case_id: str) -> CacheMark | None:
    """The mark of a case, None unless all of its files are there with the size they had."""
    files = CachedFiles(folder, case_id)
    if not files.mark.is_file():
        return None
    try:
        mark = load(files.mark, CacheMark)
    except UserError:
        return None
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == size for name, size in mark.files)
    return mark if whole else None


def stamp_of(case: Case) -> Stamp:
    """Path, size and time of the last change of the case's files: when these are as before, so is the content.

    Raises UserError when a file is missing.
    """
    stamp = []
    for path in (*case.images, case.label):
        if path is not None:
            try:
                for part in files_of(path):
                    status = os.stat(part)
                    stamp.append((str(part), status.st_size, status.st_mtime_ns))
            except OSError as error:
                raise UserError(
                    f"{path}: {error.strerror}.", fix="Has the data been moved? Run `autoseg plan` again."
                ) from error
    return tuple(stamp)


def restamp(folder: Path, mark: CacheMark, stamp: Stamp) -> None:
    """Note that files with this stamp hold the content the case was made from."""
    save(CachedFiles(folder, mark.id).mark, mark.model_copy(update={"stamp": stamp}), durable=False)


def open_case(folder: Path, case_id: str) -> CachedCase:
    """A written case. Raises UserError when it is not there or not whole."""
    mark = read_mark(folder, case_id)
    if mark is None:
        raise UserError(
            f"{folder}: case {case_id} is not preprocessed.", fix="Run `autoseg preprocess` on the run folder."
        )
    return CachedCase(id=case_id, shape=mark.shape_voxels, channels=mark.channels, mark=mark, folder=folder)


def write_array(path: Path, array: np.ndarray, chunk: Sequence[int]) -> None:
    """Write one array as blosc2; `chunk` is what will be read at once."""
    write_bytes(path, _compressed(array, chunk))  # durable: no mark tells what a power failure left empty


def is_whole_array(path: Path) -> bool:
    """Whether there is a file that `open_array` can open; a power failure may have left it empty."""
    if not path.is_file():
        return False
    try:
        _open(path)
    except (RuntimeError, ValueError):
        return False
    return True


def open_array(path: Path) -> Any:
    """An array that `write_array` wrote; indexing decompresses what is asked for, one thread at a time."""
    return _open(path)


def _storable(image_CZYX: np.ndarray) -> np.ndarray:
    """The image in float16 if its rounding (root mean square) is below a thousandth of each channel's deviation."""
    if float(np.abs(image_CZYX).max(initial=0)) > float(np.finfo(np.float16).max):
        return image_CZYX
    half_CZYX = image_CZYX.astype(np.float16)
    for channel_ZYX, half_ZYX in zip(image_CZYX, half_CZYX, strict=True):
        rounding = (channel_ZYX - half_ZYX).ravel()
        error = (float(np.dot(rounding, rounding)) / max(rounding.size, 1)) ** 0.5
        if error > LARGEST_ROUNDING * float(channel_ZYX.std(dtype=np.float64)):
            return image_CZYX
    return half_CZYX


def _compressed(array: np.ndarray, chunk: Sequence[int]) -> bytes:
    """A blosc2 array file as bytes; `chunk` is what is read at once, the largest block per axis."""
    import blosc2  # half a second, which a run with nothing to do need not spend

    chunks = [max(1, min(int(want), size)) for want, size in zip(chunk, array.shape, strict=True)]
    blocks = list(chunks)
    while np.prod(blocks) * array.itemsize > LARGEST_BLOCK_BYTES:
        largest = int(np.argmax(blocks))
        blocks[largest] = -(-blocks[largest] // 2)
    for axis in range(1 if array.ndim > 3 else 0, array.ndim):  # channels stay apart
        joined = LARGEST_JOINED_CHUNK_BYTES // (int(np.prod(chunks)) * array.itemsize)
        chunks[axis] = min(array.shape[axis], chunks[axis] * max(1, joined))
    settings = blosc2.CParams(
        codec=blosc2.Codec.LZ4, clevel=COMPRESSION_LEVEL, nthreads=1, filters=[blosc2.Filter.NOFILTER]
    )
    stored = blosc2.asarray(np.ascontiguousarray(array), chunks=tuple(chunks), blocks=tuple(blocks), cparams=settings)
    return stored.to_cframe()


def _open(path: Path) -> Any:
    import blosc2

    return blosc2.open(str(path), mode="r", mmap_mode="r", dparams=blosc2.DParams(nthreads=1))
