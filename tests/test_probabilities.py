"""image/probabilities.py: files of class probabilities that are written and read in parts."""

import errno
import json
import os
import resource
import shutil
from pathlib import Path

import numpy as np
import pytest
from whole_probabilities import read_whole, write_whole

from autoseg.errors import UserError
from autoseg.image.disk import failed_write
from autoseg.image.probabilities import (
    open_probabilities,
    read_header,
    writing_probabilities,
)
from autoseg.image.volume import plain_geometry

GEOMETRY = plain_geometry((9, 20, 7), (2.0, 1.0, 0.5))
NAMES, VALUES = ("background", "organ", "tumour"), (0, 100, 255)


def some() -> np.ndarray:
    scores = np.random.default_rng(0).random((3, 9, 20, 7))
    return (scores / scores.sum(0)).astype(np.float32)


@pytest.mark.parametrize(("kind", "tolerance"), [("float16", 2.0**-12), ("uint8", 0.5 / 255 + 1e-6)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_what_is_written_in_slabs_along_any_axis_is_read_in_slabs_along_z(
    tmp_path: Path, kind: str, tolerance: float, axis: int
) -> None:
    path, probabilities = tmp_path / "a.probabilities.b2nd", some()
    with writing_probabilities(path, GEOMETRY, NAMES, VALUES, kind=kind, slab=(axis, 4)) as put:
        for start in range(0, GEOMETRY.size_voxels[axis], 4):
            window = (slice(None),) * (1 + axis) + (slice(start, start + 4),)
            put(window, probabilities[window])
    opened = open_probabilities(path)
    assert (opened.shape, opened.names, opened.dtype) == ((3, 9, 20, 7), NAMES, np.dtype(kind))
    assert (opened.header.values, opened.header.geometry, opened.header.complete) == (VALUES, GEOMETRY, True)
    part = opened.slab(3, 8)
    assert part.dtype == np.float32
    assert np.abs(part - probabilities[:, 3:8]).max() <= tolerance == pytest.approx(opened.header.rounding, abs=1e-5)
    for k in range(3):
        assert np.abs(opened.part((slice(k, k + 1),))[0] - probabilities[k]).max() <= tolerance


def test_some_of_the_classes_may_be_saved(tmp_path: Path) -> None:
    path = tmp_path / "a.b2nd"
    with writing_probabilities(path, GEOMETRY, NAMES[1:2], VALUES[1:2], complete=False) as put:
        put((slice(None),), some()[1:2])
    header = read_header(path)
    assert (header.names, header.values, header.complete) == (("organ",), (100,), False)


def test_chunks_are_as_thick_as_the_slabs_so_that_each_is_compressed_once(tmp_path: Path) -> None:
    with writing_probabilities(tmp_path / "a.b2nd", GEOMETRY, NAMES, slab=(1, 5)):
        pass
    assert open_probabilities(tmp_path / "a.b2nd").array_KZYX.chunks[:3] == (1, 9, 5)


def test_nothing_appears_when_writing_fails(tmp_path: Path) -> None:

    def broken() -> None:
        with writing_probabilities(tmp_path / "a.b2nd", GEOMETRY, NAMES) as put:
            put((slice(None),), some())
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        broken()
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match=r"'int4'.*uint8, float16"):
        write_whole(tmp_path / "a.b2nd", some(), GEOMETRY, NAMES, kind="int4")
    with pytest.raises(ValueError, match="3 names for 2 values"):
        write_whole(tmp_path / "a.b2nd", some(), GEOMETRY, NAMES, (0, 1))


def write_as_npz(path: Path, probabilities_KZYX: np.ndarray) -> None:
    """What autoseg 0.1 wrote."""
    about = json.dumps({"labels": list(NAMES), "values": list(VALUES), "geometry": GEOMETRY.to_json()})
    np.savez_compressed(path, about=np.array(about), probabilities_KZYX=probabilities_KZYX.astype(np.float16))


def test_files_of_earlier_versions_are_read_whole_and_by_slab(tmp_path: Path) -> None:
    path, probabilities = tmp_path / "a.probabilities.npz", some()
    write_as_npz(path, probabilities)
    read_KZYX, names, geometry = read_whole(path)
    assert (names, geometry, read_header(path).values) == (NAMES, GEOMETRY, VALUES)
    np.testing.assert_allclose(read_KZYX, probabilities, atol=1e-3)
    np.testing.assert_array_equal(open_probabilities(path).slab(2, 5), read_KZYX[:, 2:5])


def test_no_room_to_unpack_a_file_of_earlier_versions_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fills up under a memory map kills the process, so the room is taken first."""

    def full(descriptor: int, start: int, length: int) -> None:
        assert length == 3 * 9 * 20 * 7 * 2
        raise OSError(errno.ENOSPC, "No space left on device")

    write_as_npz(tmp_path / "a.probabilities.npz", some())
    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match=r"a\.probabilities\.npz: the disk of temporary files .* has no room"):
        open_probabilities(tmp_path / "a.probabilities.npz")


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    import blosc2

    blosc2.asarray(np.zeros((3, 9, 20, 7), np.float16), urlpath=str(tmp_path / "bare.b2nd"), mode="w")
    (tmp_path / "text.b2nd").write_text("hello")
    (tmp_path / "zip.npz").write_bytes(b"PK and nothing else")
    for name in ("bare.b2nd", "text.b2nd", "zip.npz"):
        for read in (read_header, open_probabilities):
            with pytest.raises(UserError, match=f"{name}: these are no probabilities"):
                read(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        read_header(tmp_path / "nothing.b2nd")


def test_a_limit_that_the_disk_does_not_tell_is_found_by_writing(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, limits[1]))
    try:
        assert failed_write(tmp_path / "a", "no more").errno == errno.EFBIG
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert failed_write(tmp_path / "a", "no more").errno == errno.EIO
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """blosc2 says RuntimeError to everything; how much is free decides what it is."""
    whole = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: whole._replace(free=0))

    def write() -> None:
        with writing_probabilities(tmp_path / "a.b2nd", GEOMETRY, NAMES) as put:
            [unfinished] = tmp_path.iterdir()
            os.truncate(unfinished, 10)  # blosc2 fails on what it finds there
            put((slice(None),), some())

    with pytest.raises(UserError, match=r"a\.b2nd: the disk is full"):
        write()
    assert not list(tmp_path.iterdir())
