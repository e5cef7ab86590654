"""Which files an image is made of: a .mhd header names the file of its voxels."""

import hashlib
from pathlib import Path

from autoseg.image.formats import ending_of

HEADER_BYTES = 2**16
HASHED_AT_ONCE = 2**24


def files_of(path: Path | str) -> tuple[Path, ...]:
    """The file itself, and where it is a header those of its voxels that are there. Raises OSError where it is not."""
    path = Path(path)
    if ending_of(path) != ".mhd":
        return (path,)
    with open(path, "rb") as file:
        lines = file.read(HEADER_BYTES).decode("latin-1").splitlines()
    starts = [number for number, line in enumerate(lines) if line.replace(" ", "").startswith("ElementDataFile=")]
    if not starts:
        return (path,)
    named = lines[starts[0]].partition("=")[2].strip()
    if named.split(" ")[0] == "LIST":
        names = [line.strip() for line in lines[starts[0] + 1 :] if line.strip()]
    else:
        names = [] if named in ("LOCAL", "") else _numbered(named)
    return (path, *(each for each in (path.parent / name for name in names) if each.is_file()))


def hash_into(digest: "hashlib.blake2b", path: Path | str) -> None:
    """Put the bytes of an image's files into a hash. Raises OSError where one cannot be read."""
    for part in files_of(path):
        with open(part, "rb") as file:
            while block := file.read(HASHED_AT_ONCE):
                digest.update(block)


def _numbered(named: str) -> list[str]:
    """The files of a pattern such as "slice_%03d.raw 1 20 1" (first, last, step), or the one that is named."""
    pattern, *numbers = named.split()
    if "%" not in pattern or not all(each.isdigit() for each in numbers) or len(numbers) < 2:
        return [named]
    first, last, step = (*(int(each) for each in numbers), 1)[:3]
    return [pattern % number for number in range(first, last + 1, max(1, step))]
