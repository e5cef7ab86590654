"""Which files belong to which case, in every accepted layout of a data set.

The same for images that are to be predicted.
Files are only listed here; `inspect` reads and checks them. One exception: the first of several images to predict is
asked how many channels it holds.
A case is kept with the paths it should have, so that `inspect` can report what is missing with all other problems.
"""

import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from pydantic import ValidationError

from autoseg.cases.description import channel_names, composed, read_description
from autoseg.errors import UserError
from autoseg.image.formats import READABLE, channels_held, ending_of, spelled, stem_of
from autoseg.records import Case
from autoseg.store import TEMPORARY

FOLDER_PAIRS = (
    ("images", "labels"),
    ("images", "masks"),
    ("imagesTr", "labelsTr"),
    ("image", "label"),
    ("image", "mask"),
    ("imgs", "masks"),
    ("img", "mask"),
    ("img", "label"),
)
"""Names of the image and the label folder of a data set without dataset.json."""

ACCEPTED = (
    "Accepted are: images/ with labels/ or masks/ (also imagesTr/ labelsTr/, img/ mask/), one file per case or "
    "case_0000, case_0001, ... per channel, label maps with the case's name; a Medical Segmentation Decathlon folder "
    "(dataset.json with 'training'); an nnU-Net v2 raw folder (dataset.json, imagesTr/, labelsTr/)."
)

CHANNEL_SUFFIX = re.compile(r"_(\d{4})$")

READ = f"Endings that are read: {', '.join(READABLE)}."
RENAME = "Rename or remove one of them."
Clash = Callable[[str, Path | str, Path | str], None]
"""Told of every case that has two files for the same thing: its id and both paths."""

DICOM_FIX = "Save every series as one file first, for example by `dcm2niix -z y -f %i -o images SERIES`."
FILES_TO_TRY = 50
"""Files to look at for signs of DICOM."""


def list_cases(folder: Path) -> tuple[tuple[Case, ...], dict[str, str]]:
    """The cases of a data set without their groups, no image being opened, and why some of them cannot be used.

    Raises UserError as `discover`.
    """
    folder = Path(folder).absolute()
    if folder.is_file():
        raise UserError(f"{folder}: this is a file, not a folder.", fix="Give the folder that holds the data set.")
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.", fix="Give the folder that holds the data set.")
    description, pair = read_description(folder / "dataset.json") or {}, _folder_pair(folder)
    clashes: dict[str, str] = {}

    def clash(case: str, first: Path | str, second: Path | str) -> None:
        clashes.setdefault(case, f"it has two files for the same thing: {first} and {second}.")

    if "training" in description or "dataset" in description:
        cases = _listed_cases(folder, description, len(channel_names(description)) or 1, clash)
    elif pair is not None:
        cases = _paired_cases(*pair, len(channel_names(description)) or None, clash)
    else:
        raise _nothing(folder, "no data set was found here.", ACCEPTED)
    if not cases:
        raise _nothing(folder, "there is no readable image in it.", ACCEPTED)
    _refuse_twins(folder, cases)
    return cases, clashes


def list_images(folder: Path, channels: int) -> tuple[Case, ...]:
    """The images to predict: one file per case, or `case_0000`, `case_0001`, ... with one channel each.

    Numbers other than 0000 count cases where the first file holds all channels, as photographs do. `folder` may also be
    a single image. Raises UserError when there is none, or when a channel is missing.
    """
    folder = Path(folder).absolute()
    if folder.is_file():
        return (_single(folder, channels),)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.", fix="Give a folder with images, or one image.")
    files = _files(folder)
    if not files:
        raise _nothing(folder, "there is no readable image in it.", READ)
    cases = _cases_of_files(files, set(), 1 if _holds_all(files[0], channels) else channels, _refuse)
    missing = [path for case in cases for path in case.images if not Path(path).is_file()]
    if missing:
        fix = f"Every case needs {channels} channels, named case_0000, case_0001, ..."
        fix = "They are links to files that are not there: fetch these." if Path(missing[0]).is_symlink() else fix
        raise UserError(f"{len(missing)} channel file(s) are missing: {', '.join(missing[:5])}.", fix=fix)
    return cases


def _single(path: Path, channels: int) -> Case:
    """One image to predict, under the name that it has among the others of its folder."""
    if not ending_of(path):
        dicom = _is_dicom(path)
        what = "a DICOM file; DICOM is not read yet" if dicom else "its name has no ending that is read"
        raise UserError(f"{path}: {what}.", fix=DICOM_FIX if dicom else READ)
    if not _holds_all(path, channels):
        return _case(stem_of(path).removesuffix("_0000"), (path,))  # other numbers count cases
    beside = _cases_of_files(_files(path.parent), set(), 1, lambda *_: None)
    return next((case for case in beside if case.images == (str(path),)), _case(stem_of(path), (path,)))


def _holds_all(path: Path, channels: int) -> bool:
    """Whether one file holds all of several channels."""
    return channels > 1 and (read_or_none(channels_held, path) or 1) >= channels


# ------------------------------------------------------------------------------------------------ where files lie


def _listed_cases(folder: Path, description: Mapping[str, Any], channels: int, clash: Clash) -> tuple[Case, ...]:
    """Cases that dataset.json lists: 'training' (Decathlon; paths as text or {image, label}) or 'dataset' (nnU-Net).

    The first version of nnU-Net lists case.nii.gz where the files are case_0000.nii.gz, case_0001.nii.gz, ...
    """
    listed = description.get("training", description.get("dataset"))
    if isinstance(listed, Mapping):
        entries = [(str(name), entry) for name, entry in listed.items()]
    else:
        entries = [("", entry) for entry in listed or ()]
    cases: list[Case] = []
    for name, entry in entries:
        if not isinstance(entry, Mapping) or not (entry.get("image") or entry.get("images")):
            raise UserError(f"{folder / 'dataset.json'}: {entry!r} is no {{image, label}} entry.", fix="Mend the file.")
        images = entry.get("image") or entry["images"]
        paths = tuple(_below(folder, image) for image in ([images] if isinstance(images, str) else images))
        stem = stem_of(paths[0])
        label = entry.get("label")
        case = name or (CHANNEL_SUFFIX.sub("", stem) if len(paths) > 1 else stem)
        if len(paths) == 1 and not paths[0].is_file() and _channel_file(paths[0], stem, 0).is_file():
            paths = tuple(_channel_file(paths[0], stem, number) for number in range(channels))
        cases.append(_case(case, paths, _below(folder, label) if label else None, folder / "dataset.json"))
    return tuple(sorted(_once(cases, clash), key=lambda case: case.id))


def _below(folder: Path, path: str) -> Path:
    """The path, with its accents written as in the name of the file that is there."""
    written = (folder / form for form in (path, composed(path), normalize("NFD", path)))
    return next((each for each in written if each.is_file()), folder / path)


def _channel_file(beside: Path, stem: str, number: int) -> Path:
    return beside.with_name(f"{stem}_{number:04d}{ending_of(beside)}")


def _folder_pair(folder: Path) -> tuple[Path, Path] | None:
    present = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    for images, labels in FOLDER_PAIRS:
        if images.lower() in present and labels.lower() in present:
            return present[images.lower()], present[labels.lower()]
    return None


def _files(folder: Path) -> list[Path]:
    """Readable image files in name order; hidden ones (also those that macOS adds) and unfinished ones are left out.

    Links to files that are not there stay, so that they are reported as missing.
    """
    named = (path for path in folder.iterdir() if not path.name.startswith(".") and TEMPORARY not in path.name)
    return sorted(path for path in named if ending_of(path) and not path.is_dir())


def _paired_cases(images: Path, labels: Path, channels: int | None, clash: Clash) -> tuple[Case, ...]:
    """Every image with the label map of its name, and every label map without image with the image it should have."""
    label_files: dict[str, Path] = {}
    for path in _files(labels):
        if label_files.setdefault(composed(stem_of(path)), path) != path:
            clash(stem_of(path), label_files[composed(stem_of(path))], path)
    files = _files(images)
    cases = [
        case.model_copy(update={"label": str(label) if (label := label_files.get(composed(case.id))) else None})
        for case in _cases_of_files(files, set(label_files), channels, clash)
    ]
    found = {composed(case.id) for case in cases}
    for name, path in label_files.items():
        if name not in found:
            wanted = images / f"{stem_of(path)}{ending_of(files[0]) if files else ending_of(path)}"
            cases.append(_case(stem_of(path), (wanted,), path))
    return tuple(sorted(cases, key=lambda case: case.id)) if files else ()


def _cases_of_files(
    files: Sequence[Path], label_stems: set[str], channels: int | None, clash: Clash
) -> tuple[Case, ...]:
    """Group channel files; a channel that is missing gets the path it should have.

    `_0001` at the end of a name is a channel number, unless label maps carry it too (then it counts cases) or no file
    is the first channel, or only one channel is expected and the numbers differ. A first channel alone may hold all of
    them, as nnU-Net's photographs do.
    """
    numbers = {path: CHANNEL_SUFFIX.search(stem_of(path)) for path in files}
    counted = {int(match.group(1)) for match in numbers.values() if match}
    by_channel = (
        all(numbers.values())
        and 0 in counted
        and not any(composed(stem_of(path)) in label_stems for path in files)
        and (channels != 1 or counted == {0})
    )
    if not by_channel:
        return _once((_case(stem_of(path), (path,)) for path in files), clash)
    alone = counted == {0} and (not channels or _holds_all(files[0], channels))
    wanted = 1 if alone else channels or max(counted) + 1
    by_case: dict[str, dict[int, Path]] = {}
    for path in files:
        stem, number = stem_of(path)[:-5], int(stem_of(path)[-4:])
        if (first := by_case.setdefault(stem, {}).setdefault(number, path)) != path:
            clash(stem, first, path)
    cases = []
    for stem, found in by_case.items():
        present, every = next(iter(found.values())), range(max(wanted, max(found) + 1))
        cases.append(_case(stem, tuple(found.get(n, _channel_file(present, stem, n)) for n in every)))
    return tuple(cases)


def _case(case: str, images: Sequence[Path | str], label: Path | None = None, listed_in: Path | None = None) -> Case:
    for path in (case, *images, label or ""):
        spelled(path)
    try:
        return Case(id=case, images=tuple(map(str, images)), label=None if label is None else str(label))
    except ValidationError as error:
        what = f"{listed_in or images[0]}: {error.errors()[0]['msg'].removeprefix('Value error, ')}."
        raise UserError(what, fix="Give the case another name.") from error


def _refuse_twins(folder: Path, cases: Sequence[Case]) -> None:
    """Names that differ only in upper and lower case, or in how accents are written, are one file on some disks."""
    known: dict[str, Case] = {}
    for case in cases:
        if (twin := known.setdefault(composed(case.id).casefold(), case)) is not case:
            how = "in upper and lower case" if composed(case.id) != composed(twin.id) else "in how accents are written"
            what = f"{folder}: cases {twin.id} and {case.id} differ {how} alone."
            raise UserError(what, fix="Rename one of them, in dataset.json if it names the cases.")


def _nothing(folder: Path, what: str, fix: str) -> UserError:
    """Why a folder is of no use; DICOM series, which are not read yet, by their name."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("."))
    if any(_is_dicom(path) for path in itertools.islice(files, FILES_TO_TRY)):
        what, fix = "it holds DICOM files, which are not read yet.", DICOM_FIX
    return UserError(f"{folder}: {what}", fix=fix)


def _is_dicom(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return file.read(132)[128:] == b"DICM"
    except OSError:
        return False


def _once(cases: Iterable[Case], clash: Clash) -> tuple[Case, ...]:
    """The first case of every id."""
    first: dict[str, Case] = {}
    for case in cases:
        if first.setdefault(case.id, case) is not case:
            clash(case.id, first[case.id].images[0], case.images[0])
    return tuple(first.values())


def _refuse(case: str, first: Path | str, second: Path | str) -> None:
    raise UserError(f"Case {case} appears twice: {first} and {second}.", fix=RENAME)


def read_or_none(read: Callable[[Any], Any], where: object) -> Any:
    """`read(where)`, None where it raises UserError: `inspect` says why."""
    try:
        return read(where)
    except UserError:
        return None
