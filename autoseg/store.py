"""How records reach the disk: as versioned JSON, whole or not at all.

Each is written to a temporary file beside its target, which is then renamed. A killed process therefore leaves either
the old file or the new one. A wrong file fails with the path of the bad field.
"""

import json
import os
import shutil
import socket
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import ValidationError

from autoseg.errors import UserError
from autoseg.records import Saved
from autoseg.upgrades import UPGRADES

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

AnySaved = TypeVar("AnySaved", bound=Saved)

TEMPORARY = ".unfinished"
"""Part of the name of every file that is not complete yet; readers skip such files, writers remove stale ones."""

DAY_SECONDS = 86_400.0

OTHER_FOLDER = "Is this the right folder?"
MADE_BY = {
    "Plan": f"{OTHER_FOLDER} A run is made by: autoseg plan DATA -o RUN",
    "Dataset": f"{OTHER_FOLDER} It is made with the plan: autoseg plan DATA -o RUN",
    "Postprocessing": "Learn the rules first: autoseg postprocess RUN",
}
"""Record -> what to do where its file is missing."""


@contextmanager
def replacing(path: Path, suffix: str = "", durable: bool = True) -> Iterator[Path]:
    """Give a temporary path beside `path`; when the block ends well, flush it to disk and rename it to `path`.

    On an exception the temporary file is removed and `path` keeps its old content. `suffix` is for writers that choose
    the format by the file's ending. Without `durable` the flush (about 4 ms) is left out: a killed process still leaves
    the old or the new file, but a power failure may leave an empty one.
    Raises UserError when the disk is full or the folder can't be written.
    """
    temporary = temporary_beside(path, suffix)
    make_folder(path.parent)
    try:
        yield temporary
        if durable and not temporary.is_dir():
            _flush(temporary)
        os.replace(temporary, path)
    except OSError as error:
        if told := _told(error, path):
            raise told from error
        raise
    finally:
        with suppress(OSError):  # where nothing could be written nothing can be removed
            temporary.unlink()


def _flush(file: Path) -> None:
    with open(file, "rb+") as written:
        os.fsync(written.fileno())


def temporary_beside(path: Path, suffix: str = "") -> Path:
    """A name beside `path` for what is not complete, which says who writes it."""
    writer = f"{socket.gethostname()}~{os.getpid()}~{uuid.uuid4().hex[:6]}"
    return path.with_name(f"{path.name}{TEMPORARY}-{writer}{suffix}")


def make_folder(folder: Path) -> None:
    """Make a folder with all above it, or leave it as it is. Raises UserError where that cannot be."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next((each for each in (folder, *folder.parents) if each.is_file()), folder)
        raise UserError(f"{file}: this is a file, not a folder.", fix="Choose another output folder.") from error
    except OSError as error:
        if told := _told(error, folder):
            raise told from error
        raise


def empty_folder(folder: Path) -> None:
    """Delete all that is in a folder, if there is one; the folder stays, which may be a link to one elsewhere.

    Raises UserError where that is not allowed.
    """
    try:
        for found in list(folder.iterdir()) if folder.is_dir() else ():
            if found.is_dir() and not found.is_symlink():
                shutil.rmtree(found)
            else:
                found.unlink()
    except OSError as error:
        if told := _told(error, folder):
            raise told from error
        raise


def refuse_unwritable(folder: Path) -> None:
    """Raise UserError where no file can be made in a folder, or in what is there of those around it."""
    there = next(each for each in (folder, *folder.absolute().parents) if each.exists())
    if not there.is_dir():
        raise UserError(f"{there}: this is a file, not a folder.", fix="Choose another output folder.")
    if not os.access(there, os.W_OK):
        raise UserError(f"{folder}: this place cannot be written.", fix="Choose another output folder.")


def _told(error: OSError, path: Path) -> UserError | None:
    """What only the user can mend: a full disk, a place that cannot be written."""
    if is_disk_full(error):
        return UserError(f"{path}: the disk is full.", fix="Free some space and run the same command again.")
    if error.errno in (13, 30):  # EACCES, EROFS
        return UserError(f"{path}: this place cannot be written.", fix="Choose another output folder.")
    return None


def is_disk_full(error: Exception) -> bool:
    """Whether an error says by its number, or without one by its text, that disk or quota are full."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in (28, 122)  # ENOSPC, EDQUOT
    return any(text in str(error).lower() for text in ("no space left", "os error 28", "quota", "os error 122"))


def remove_unfinished(folder: Path) -> None:
    """Delete what killed processes left half-written in `folder` (not below it); what a live one writes stays.

    A process on another machine can't be asked, so its files count as left behind once they are a day old.
    """
    for found in folder.glob(f"*{TEMPORARY}-*"):
        if is_being_written(found):
            continue
        if found.is_dir():
            shutil.rmtree(found, ignore_errors=True)
        else:
            with suppress(OSError):
                found.unlink()


def is_being_written(temporary: Path) -> bool:
    """Whether the process that a name of `temporary_beside` speaks of lives, or on another machine may."""
    writer = temporary.name.partition(f"{TEMPORARY}-")[2].split("~")
    if len(writer) != 3 or not writer[1].isdecimal():
        return False
    if writer[0] != socket.gethostname():
        with suppress(FileNotFoundError):
            return time.time() - temporary.stat().st_mtime < DAY_SECONDS
        return False
    try:
        os.kill(int(writer[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # alive, and somebody else's
        return True
    return True


@contextmanager
def held_alone(lock: Path, busy: str, fix: str) -> Iterator[None]:
    """Hold the lock file while the block runs; it is gone afterwards, and free again when the process is killed.

    Raises UserError with `busy` and `fix` where another process holds it, and as `replacing` where the place cannot be
    written. Does nothing where there are no such locks.
    """
    if fcntl is None:
        yield
        return
    make_folder(lock.parent)
    while True:
        try:
            file = open(lock, "w")  # noqa: SIM115 - closed below
        except OSError as error:
            if told := _told(error, lock):
                raise told from error
            raise
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(busy, fix=fix) from None
            except OSError:  # a file system without locks
                pass
            if not _is_file_at(file.fileno(), lock):
                continue  # its last holder removed it between our opening and locking it
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _is_file_at(descriptor: int, path: Path) -> bool:
    """Whether the open file is the one that has this name now."""
    with suppress(FileNotFoundError):
        return os.fstat(descriptor).st_ino == path.stat().st_ino
    return False


def write_bytes(path: Path, content: bytes, durable: bool = True) -> None:
    """Write `content` to `path` as a whole or not at all; `durable` as for `replacing`."""
    with replacing(path, durable=durable) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """Write `content` to `path` as a whole or not at all, UTF-8."""
    write_bytes(path, content.encode())


def save(path: Path, record: Saved, durable: bool = True) -> None:
    """Write `record` as readable JSON with its name and schema version on top; `durable` as for `replacing`."""
    write_bytes(path, _content(record), durable)


def save_together(records: Sequence[tuple[Path, Saved]]) -> None:
    """Write records that belong together, each to its path.

    All are on the disk before the first takes its place, so that a full disk leaves what was there. While they are
    replaced the last one is missing: a killed process leaves none of that kind rather than one beside others' records.
    Raises UserError as `replacing` does.
    """
    with ExitStack() as places:
        for path, record in reversed(records):  # the last one entered leaves first
            temporary = places.enter_context(replacing(path))
            temporary.write_bytes(_content(record))
            _flush(temporary)
        records[-1][0].unlink(missing_ok=True)


def _content(record: Saved) -> bytes:
    head = {"autoseg": type(record).__name__.lower(), "schema": type(record).SCHEMA}
    return (dump(head | record.model_dump(mode="json")) + "\n").encode()


def load(path: Path, kind: type[AnySaved]) -> AnySaved:
    """Read the record of type `kind` at `path`.

    Raises UserError when the file is missing, no JSON, of another kind, of a newer schema, or wrong in a named field.
    """
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.", fix=MADE_BY.get(kind.__name__, OTHER_FOLDER)) from error
    except NotADirectoryError as error:
        file = next((each for each in path.parents if each.is_file()), path.parent)
        raise UserError(f"{file}: this is a file, not a folder.", fix="Name the folder that it lies in.") from error
    except IsADirectoryError as error:
        raise UserError(f"{path}: this is a folder, not a file.", fix="Name the file in it.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not valid JSON ({error}).", fix="Mend the file or remove it to have it made anew."
        ) from error
    return parse(content, kind, str(path))


def record_name(path: Path) -> str:
    """Which record a file says it is; "" where it is none of autoseg."""
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError):
        return ""
    return str(content.get("autoseg", "")) if isinstance(content, dict) else ""


def parse(content: object, kind: type[AnySaved], where: str) -> AnySaved:
    """Turn a decoded JSON file into a record; `where` names it in errors (see `load`)."""
    name, version = kind.__name__.lower(), kind.SCHEMA
    if not isinstance(content, dict) or content.get("autoseg") != name:
        raise UserError(f"{where}: this is not an autoseg {name} file.")
    fields = dict(content)
    fields.pop("autoseg")
    found = fields.pop("schema", None)
    if not isinstance(found, int) or found < 1:
        raise UserError(f"{where}: the schema version {found!r} is not a positive number.")
    if found > version:
        raise UserError(
            f"{where}: schema {found} is newer than the {version} that this autoseg reads.",
            fix="Install a newer autoseg.",
        )
    while found < version:
        upgrade = UPGRADES.get((name, found))
        if upgrade is None:
            raise UserError(f"{where}: schema {found} is too old to be upgraded.", fix="Make it anew.")
        try:
            fields, found = upgrade(fields), found + 1
        except (AttributeError, TypeError, ValueError) as error:
            raise UserError(f"{where}: not what schema {found} of a {name} holds.", fix="Make it anew.") from error
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or name
        raise UserError(f"{where}: field {field}: {first['msg'].removeprefix('Value error, ')}.") from error


def dump(content: object, indent: int = 0) -> str:
    """JSON with one line per short value: readable, and small in a diff. Lists of plain values stay on one line."""
    if not isinstance(content, (dict, list)) or not content or not _too_many(content):
        flat = json.dumps(content)
        if len(flat) + indent <= 110 or not isinstance(content, (dict, list)) or not content:
            return flat
    inner = " " * (indent + 1)
    if isinstance(content, list):
        if not any(isinstance(each, (dict, list)) for each in content):
            return json.dumps(content)
        return "[\n" + ",\n".join(inner + dump(each, indent + 1) for each in content) + "\n" + " " * indent + "]"
    rows = (f"{inner}{json.dumps(key)}: {dump(value, indent + 1)}" for key, value in content.items())
    return "{\n" + ",\n".join(rows) + "\n" + " " * indent + "}"


def _too_many(content: dict | list, most: int = 38) -> bool:
    """Whether it is too long for a line without encoding it: a value and its comma take at least three characters."""
    count = 0
    unseen: list[object] = [content]
    while unseen:
        each = unseen.pop()
        if isinstance(each, (dict, list)) and each:
            if len(each) >= most:
                return True
            unseen.extend(each.values() if isinstance(each, dict) else each)
        else:
            count += 1
            if count >= most:
                return True
    return False
