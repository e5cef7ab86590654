"""What lies in a folder: cases, channels and labels of a data set in one of the accepted layouts.

Files are only listed here; `inspect` reads and checks them. Two exceptions: a label map is read for its values when
nobody named them, and one image when nobody said how many channels there are.
A case is kept with the paths it should have, so that `inspect` can report what is missing with all other problems.
"""

import csv
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from autoseg.errors import UserError
from autoseg.image.formats import (
    PHOTOGRAPHS,
    READABLE,
    ending_of,
    label_ending,
    read_geometry,
    read_image,
    read_labels,
    stem_of,
)
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import Case, Dataset, Label

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
MOST_LABELS = 1000
"""More values than this in unnamed label maps mean that they are no label maps."""

HEADERS_TO_TRY = 5
"""Files to look at for the dimension; `inspect` sees them all and has the last word."""


def discover(folder: Path, workers: int | None = None) -> Dataset:
    """The data set in `folder`.

    Args:
        folder: of one of the layouts in `ACCEPTED`. `groups.csv` (case,group) or 'patients' in dataset.json keep the
            cases of one patient together in the splits.
        workers: processes for reading label values where none are named; None takes all allowed cores.

    Raises:
        UserError: no accepted layout, no case, two files for one case, regions as labels, or a broken dataset.json.
    """
    folder = Path(folder).absolute()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.", fix="Give the folder that holds the data set.")
    description = read_description(folder / "dataset.json")
    named = bool(description and description.get("labels"))
    pair = _folder_pair(folder)
    if description is not None and ("training" in description or "dataset" in description):
        cases = _listed_cases(folder, description)
    elif pair is not None:
        names = channel_names(description or {})
        cases = _paired_cases(*pair, len(names) if names else None)
    else:
        raise UserError(f"{folder}: no data set was found here.", fix=ACCEPTED)
    if not cases:
        raise UserError(f"{folder}: there is no readable image in it.", fix=ACCEPTED)
    cases = _with_groups(folder, description or {}, cases)
    if named:
        labels, ignore_value = read_label_names(description or {}, str(folder / "dataset.json"))
    else:
        labels, ignore_value = _labels_found(cases, workers or allowed_cores()), None
    return Dataset(
        name=str((description or {}).get("name") or folder.name),
        dimension=_dimension(cases),
        channels=channel_names(description or {}) or _default_channels(cases),
        labels=labels,
        ignore_value=ignore_value,
        file_ending=_ending_for_results(cases),
        cases=cases,
    )


def discover_images(folder: Path, channels: int) -> tuple[Case, ...]:
    """The images to predict: one file per case, or `case_0000`, `case_0001`, ... with one channel each.

    `folder` may also be a single image. Raises UserError when there is none, or when a channel is missing.
    """
    folder = Path(folder).absolute()
    if folder.is_file():
        return (Case(id=CHANNEL_SUFFIX.sub("", stem_of(folder)), images=(str(folder),)),)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.", fix="Give a folder with images, or one image.")
    files = _files(folder)
    if not files:
        raise UserError(f"{folder}: there is no readable image in it.", fix=f"Read are {', '.join(READABLE)}.")
    cases = _cases_of_files(files, set(), channels)
    missing = [path for case in cases for path in case.images if not Path(path).is_file()]
    if missing:
        raise UserError(
            f"{len(missing)} channel file(s) are missing: {', '.join(missing[:5])}.",
            fix=f"Every case needs {channels} channels, named case_0000, case_0001, ...",
        )
    return cases


# ------------------------------------------------------------------------------------------------ dataset.json


def read_description(path: Path) -> dict[str, Any] | None:
    """The content of a dataset.json, None where there is none. Raises UserError when it is no JSON object."""
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid JSON ({error}).", fix="Mend the file.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: it holds no JSON object.", fix="Mend the file.")
    return content


def channel_names(description: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of 'channel_names' or 'modality' in the order of their numbers; empty when neither is there."""
    names = description.get("channel_names") or description.get("modality") or {}
    if isinstance(names, str):
        return (names,)
    if isinstance(names, Mapping):
        return tuple(str(names[key]) for key in sorted(names, key=_number))
    return tuple(str(name) for name in names)


def read_label_names(description: Mapping[str, Any], where: str) -> tuple[tuple[Label, ...], int | None]:
    """Labels, background first and the others by value, and the value of 'ignore' if there is one.

    `labels` may map values to names (Decathlon) or names to values (nnU-Net). Raises UserError for regions (several
    values per name), values that are no whole numbers, and two names for one value.
    """
    named = description.get("labels")
    if not isinstance(named, Mapping):
        raise UserError(
            f"{where}: 'labels' must map names to values.", fix='For example {"background": 0, "liver": 1}.'
        )
    found: list[Label] = []
    for key, entry in named.items():
        if isinstance(entry, list):
            raise UserError(
                f"{where}: label {key!r} has several values {entry}: regions are not supported yet.",
                fix="Give each class one value.",
            )
        by_value = _is_number(key) and isinstance(entry, str)
        name, value = (entry, key) if by_value else (key, entry)
        if not _is_number(value):
            raise UserError(
                f"{where}: label {key!r}: neither it nor {entry!r} is a whole number.", fix="Mend the file."
            )
        found.append(Label(name=str(name), value=int(value)))
    values = [label.value for label in found]
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise UserError(f"{where}: label value {twice[0]} has two names.", fix="Name each value once.")
    ignored = next((label.value for label in found if label.name.lower() == "ignore"), None)
    classes = [label for label in found if label.value != ignored]
    background = next((label for label in classes if label.name.lower() == "background"), None)
    background = background or next((label for label in classes if label.value == 0), Label(name="background", value=0))
    foreground = sorted((label for label in classes if label != background), key=lambda label: label.value)
    if not foreground:
        raise UserError(f"{where}: it names no label beside the background.", fix="Name at least one class.")
    return (background, *foreground), ignored


def _is_number(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("-").isdigit())


def _number(key: str) -> tuple[int, str]:
    return (int(key), "") if _is_number(key) else (10**6, str(key))


def _listed_cases(folder: Path, description: Mapping[str, Any]) -> tuple[Case, ...]:
    """Cases that dataset.json lists: 'training' (Decathlon; paths as text or {image, label}) or 'dataset' (nnU-Net)."""
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
        paths = tuple(str(_below(folder, image)) for image in ([images] if isinstance(images, str) else images))
        stem = stem_of(paths[0])
        label = entry.get("label")
        case = name or (CHANNEL_SUFFIX.sub("", stem) if len(paths) > 1 else stem)
        cases.append(Case(id=case, images=paths, label=str(_below(folder, label)) if label else None))
    _refuse_twice(cases)
    return tuple(sorted(cases, key=lambda case: case.id))


def _below(folder: Path, path: str) -> Path:
    return Path(path) if Path(path).is_absolute() else folder / Path(path)


# ------------------------------------------------------------------------------------------------ folders of files


def _folder_pair(folder: Path) -> tuple[Path, Path] | None:
    present = {path.name.lower(): path for path in folder.iterdir() if path.is_dir()}
    for images, labels in FOLDER_PAIRS:
        if images.lower() in present and labels.lower() in present:
            return present[images.lower()], present[labels.lower()]
    return None


def _files(folder: Path) -> list[Path]:
    """Readable image files in name order; hidden ones (also those that macOS adds) are left out."""
    return sorted(
        path for path in folder.iterdir() if not path.name.startswith(".") and ending_of(path) and path.is_file()
    )


def _paired_cases(images: Path, labels: Path, channels: int | None) -> tuple[Case, ...]:
    """Every image with the label map of its name, and every label map without image with the image it should have."""
    label_files: dict[str, Path] = {}
    for path in _files(labels):
        if stem_of(path) in label_files:
            raise _twice(stem_of(path), label_files[stem_of(path)], path)
        label_files[stem_of(path)] = path
    files = _files(images)
    cases = [
        case.model_copy(update={"label": str(label_files[case.id]) if case.id in label_files else None})
        for case in _cases_of_files(files, set(label_files), channels)
    ]
    found = {case.id for case in cases}
    for stem, path in label_files.items():
        if stem not in found:
            wanted = images / f"{stem}{ending_of(files[0]) if files else ending_of(path)}"
            cases.append(Case(id=stem, images=(str(wanted),), label=str(path)))
    return tuple(sorted(cases, key=lambda case: case.id)) if files else ()


def _cases_of_files(files: Sequence[Path], label_stems: set[str], channels: int | None) -> tuple[Case, ...]:
    """Group channel files; a channel that is missing gets the path it should have.

    `_0001` at the end of a name is a channel number, unless label maps carry it too (then it counts cases) or no file
    is the first channel, or only one channel is expected and the numbers differ.
    """
    numbers = {path: CHANNEL_SUFFIX.search(stem_of(path)) for path in files}
    counted = {int(match.group(1)) for match in numbers.values() if match}
    by_channel = (
        all(numbers.values())
        and 0 in counted
        and not any(stem_of(path) in label_stems for path in files)
        and (channels != 1 or counted == {0})
    )
    if not by_channel:
        cases = [Case(id=stem_of(path), images=(str(path),)) for path in files]
        _refuse_twice(cases)
        return tuple(cases)
    wanted = channels or max(counted) + 1
    by_case: dict[str, dict[int, Path]] = {}
    for path in files:
        stem, number = stem_of(path)[:-5], int(stem_of(path)[-4:])
        if number in by_case.setdefault(stem, {}):
            raise _twice(stem, by_case[stem][number], path)
        by_case[stem][number] = path
    cases = []
    for stem, found in by_case.items():
        present = next(iter(found.values()))
        every = range(max(wanted, max(found) + 1))
        paths = (found.get(n, present.with_name(f"{stem}_{n:04d}{ending_of(present)}")) for n in every)
        cases.append(Case(id=stem, images=tuple(str(path) for path in paths)))
    return tuple(cases)


def _refuse_twice(cases: Iterable[Case]) -> None:
    first: dict[str, str] = {}
    for case in cases:
        if case.id in first:
            raise _twice(case.id, first[case.id], case.images[0])
        first[case.id] = case.images[0]


def _twice(case: str, first: Path | str, second: Path | str) -> UserError:
    return UserError(f"Case {case} appears twice: {first} and {second}.", fix="Rename or remove one of them.")


# ----------------------------------------------------------------------------------------------- what nobody wrote down


def _with_groups(folder: Path, description: Mapping[str, Any], cases: tuple[Case, ...]) -> tuple[Case, ...]:
    groups = {str(case): str(group) for case, group in dict(description.get("patients") or {}).items()}
    table = folder / "groups.csv"
    if table.is_file():
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"case", "group"} <= set(rows.fieldnames or ()):
                raise UserError(f"{table}: its first line must be 'case,group'.", fix="Add that line.")
            groups |= {row["case"].strip(): (row["group"] or "").strip() for row in rows}
    unknown = sorted(set(groups) - {case.id for case in cases})
    if unknown:
        raise UserError(f"{table if table.is_file() else folder / 'dataset.json'}: there is no case {unknown[0]!r}.")
    return tuple(case.model_copy(update={"group": groups.get(case.id) or None}) for case in cases)


def _labels_found(cases: Sequence[Case], workers: int) -> tuple[Label, ...]:
    """Labels from the values in the files; files that cannot be read are left for `inspect` to report."""
    paths = [case.label for case in cases if case.label is not None]
    values: set[int] = {0}
    for _, found in over_cases(label_values, paths, workers, str, head_start_seconds=1.0):
        values.update(found)
        if len(values) > MOST_LABELS:
            raise UserError(
                f"{paths[0]} and the other label maps hold more than {MOST_LABELS} values.",
                fix="Are these images? Label maps hold one whole number per class.",
            )
    if len(values) < 2:
        raise UserError(f"The {len(paths)} label map(s) hold nothing but 0.", fix="Is this the right folder?")
    return tuple(Label(name="background" if v == 0 else f"class_{v}", value=v) for v in sorted(values, key=_zero_first))


def _zero_first(value: int) -> tuple[bool, int]:
    return value != 0, value


def label_values(path: str) -> tuple[int, ...]:
    """The values in one label map; none when it cannot be read."""
    try:
        labels_ZYX, _ = read_labels(path)
    except UserError:
        return ()
    low, high = int(labels_ZYX.min()), int(labels_ZYX.max())
    if high - low < 2**20:
        return tuple(int(value) + low for value in np.flatnonzero(np.bincount((labels_ZYX - low).ravel())))
    return tuple(int(value) for value in np.unique(labels_ZYX))


def _dimension(cases: Sequence[Case]) -> Literal[2, 3]:
    """2 when the first readable images have one slice each."""
    readable = 0
    for case in cases:
        if ending_of(case.images[0]) in PHOTOGRAPHS and not ending_of(case.images[0]).startswith(".tif"):
            return 2
        if (geometry := _first(read_geometry, case.images[0])) is not None:
            readable += 1
            if geometry.size_voxels[0] > 1:
                return 3
            if readable == HEADERS_TO_TRY:
                break
    return 2 if readable else 3


def _default_channels(cases: Sequence[Case]) -> tuple[str, ...]:
    """Names from the number of channels in the first readable case."""
    count = max(len(case.images) for case in cases)
    if count == 1:
        volume = next(filter(None, (_first(read_image, case.images) for case in cases)), None)
        count = 1 if volume is None else len(volume.array_CZYX)
        if count == 3:
            return "red", "green", "blue"
    return ("image",) if count == 1 else tuple(f"channel_{number}" for number in range(count))


def _first(read: Callable[[Any], Any], where: object) -> Any:
    try:
        return read(where)
    except UserError:
        return None


def _ending_for_results(cases: Sequence[Case]) -> str:
    """The most frequent ending of the label maps, else what fits the images."""
    endings = [ending_of(case.label) for case in cases if case.label] or [
        label_ending(ending_of(case.images[0])) for case in cases
    ]
    return max(sorted(set(endings)), key=endings.count)
