"""JPEG files, where ITK is not enough: what is cut, and what is to be shown turned."""

from pathlib import Path
from typing import Literal

from autoseg.image.tiff import ORIENTATION, UPRIGHT, not_upright

EXIF = b"\xff\xe1"
SCAN = b"\xff\xda"
EXIF_BEGINS = b"Exif\0\0"


def complaint(path: Path) -> str:
    """What is wrong with a file that ITK would read, "" if nothing. Raises UserError where it is to be shown turned."""
    content = path.read_bytes()
    if (orientation := _orientation(content)) != UPRIGHT:
        raise not_upright(path, orientation)
    # libjpeg fills what is missing with grey; the end marker must come after the start of the last scan
    return "" if content.rfind(b"\xff\xd9") > content.rfind(SCAN) else "the end of this JPEG file is missing"


def _orientation(content: bytes) -> int:
    """The tag of the first segment of EXIF (JEITA CP-3451: a TIFF directory), `UPRIGHT` where there is none."""
    place = 2
    while content[place : place + 1] == b"\xff" and content[place : place + 2] != SCAN:
        start, length = place + 4, int.from_bytes(content[place + 2 : place + 4], "big")
        if content[place : place + 2] == EXIF and content.startswith(EXIF_BEGINS, start):
            return _tag(content[start + len(EXIF_BEGINS) : place + 2 + length])
        place += 2 + length
    return UPRIGHT


def _tag(exif: bytes) -> int:
    order: Literal["little", "big"] = "little" if exif.startswith(b"II") else "big"

    def number(place: int, size: int) -> int:
        return int.from_bytes(exif[place : place + size], order)

    first = number(4, 4)
    for entry in range(first + 2, min(first + 2 + 12 * number(first, 2), len(exif)), 12):
        if number(entry, 2) == ORIENTATION:
            return number(entry + 8, 2) or UPRIGHT  # 0 is what some programs write for nothing
    return UPRIGHT
