"""The dataset.json of a data set: channels, labels, regions, what was annotated."""

import csv
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize

from autoseg.errors import UserError
from autoseg.image.labels import some
from autoseg.records import Case, Label, Region


def composed(name: str) -> str:
    """A name as names are compared: each accent in one character with its letter (NFC), which macOS may take apart."""
    return normalize("NFC", name)


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

    `labels` may map values to names (Decathlon) or names to values (nnU-Net); values that occur only in regions
    (several values for a name) are named by their number. Raises UserError for values that are no whole numbers, two
    names for one value, two values for one name, and regions that hold the background or what is ignored.
    """
    named = description.get("labels")
    if not isinstance(named, Mapping):
        raise UserError(
            f"{where}: 'labels' must map names to values.", fix='For example {"background": 0, "liver": 1}.'
        )
    found: list[Label] = []
    for key, entry in _plainer(named).items():
        if isinstance(entry, list):
            continue
        by_value = _is_number(key) and isinstance(entry, str)
        name, value = (entry, key) if by_value else (key, entry)
        if not _is_number(value):
            raise UserError(
                f"{where}: label {key!r}: neither it nor {entry!r} is a whole number.", fix="Mend the file."
            )
        found.append(Label(name=str(name), value=int(value)))
    values = [label.value for label in found]
    regions = read_regions(description, where)
    members = {value for region in regions for value in region.labels}
    found += [Label(name=f"label_{value}", value=value) for value in sorted(members - set(values))]
    if twice := sorted({value for value in values if values.count(value) > 1}):
        raise UserError(f"{where}: label value {twice[0]} has two names.", fix="Name each value once.")
    names = [label.name for label in found]
    if twins := sorted({name for name in names if names.count(name) > 1}):
        fix = 'Give each value a name of its own, or make a region of them: {"name": [1, 2]}.'
        raise UserError(f"{where}: two label values are called {twins[0]!r}.", fix=fix)
    ignored = next((label.value for label in found if label.name.lower() == "ignore"), None)
    classes = [label for label in found if label.value != ignored]
    background = next((label for label in classes if label.name.lower() == "background"), None)
    background = background or next((label for label in classes if label.value == 0), Label(name="background", value=0))
    foreground = sorted((label for label in classes if label != background), key=lambda label: label.value)
    if not foreground:
        raise UserError(f"{where}: it names no label beside the background.", fix="Name at least one class.")
    for value, what in ((background.value, "the background"), (ignored, "what nobody annotated")):
        if named_in := [region.name for region in regions if value in region.labels]:
            raise UserError(f"{where}: region {named_in[0]!r} holds {value}, which is {what}.", fix="Leave it out.")
    return (background, *foreground), ignored


def read_regions(description: Mapping[str, Any], where: str) -> tuple[Region, ...]:
    """The regions of a dataset.json (nnU-Net's way): every name is one as soon as one name has several values.

    'regions_class_order' says what each region but the background paints in a label map, in the order of their names.
    Raises UserError where it is missing or does not fit.
    """
    named = description.get("labels")
    entries = _plainer(named) if isinstance(named, Mapping) else {}
    if not any(isinstance(entry, list) for entry in entries.values()):
        return ()
    regions = {
        str(name): tuple(entry) if isinstance(entry, list) else (entry,)
        for name, entry in entries.items()
        if str(name).lower() != "ignore" and entry != 0
    }
    wrong = [name for name, values in regions.items() if not values or not all(type(v) is int for v in values)]
    if wrong:
        raise UserError(f"{where}: region {wrong[0]!r} is no list of whole numbers.", fix="Mend the file.")
    order, known = description.get("regions_class_order"), sorted({v for values in regions.values() for v in values})
    fits = isinstance(order, list) and len(order) == len(regions) and all(value in known for value in order)
    if not fits or order is None:
        raise UserError(
            f"{where}: the regions {', '.join(regions)} need 'regions_class_order' with {len(regions)} of the values "
            f"{', '.join(map(str, known))}{'' if order is None else f', not {order}'}.",
            fix="It says what each region paints in a label map, the later ones over the earlier.",
        )
    if len(set(order)) < len(order):
        raise UserError(
            f"{where}: 'regions_class_order' is {order}, but regions that paint the same value cannot be told apart.",
            fix="Give each region a value of its own.",
        )
    return tuple(
        Region(name=name, labels=values, paint=paint)
        for (name, values), paint in zip(regions.items(), order, strict=True)
    )


def _plainer(named: Mapping[str, Any]) -> dict[str, Any]:
    """The labels with a value in place of a list of one."""
    return {name: entry[0] if isinstance(entry, list) and len(entry) == 1 else entry for name, entry in named.items()}


def with_groups(folder: Path, description: Mapping[str, Any], cases: tuple[Case, ...]) -> tuple[Case, ...]:
    """The patient of each case, where 'patients' in dataset.json or groups.csv (case,group) say so.

    Raises UserError where groups.csv has no such first line, or a case is named that is not there.
    """
    patients, table = description.get("patients") or {}, folder / "groups.csv"
    if not isinstance(patients, Mapping) or any(isinstance(each, (list, Mapping)) for each in patients.values()):
        where = folder / "dataset.json"
        raise UserError(f"{where}: 'patients' must map cases to patients.", fix='For example {"case_1": "patient_1"}.')
    groups = {composed(str(case)): str(group) for case, group in patients.items()}
    if table.is_file():
        groups |= {composed(case): group for case, group in _rows(table)}
    unknown = sorted(set(groups) - {composed(case.id) for case in cases})
    if unknown:
        where = table if table.is_file() else folder / "dataset.json"
        raise UserError(
            f"{where}: there is no case {some([repr(each) for each in unknown])}.",
            fix=f"Cases are named as their files are without the ending, such as {cases[0].id!r}.",
        )
    return tuple(case.model_copy(update={"group": groups.get(composed(case.id)) or None}) for case in cases)


def _rows(table: Path) -> Iterator[tuple[str, str]]:
    """Case and group of each line of groups.csv; a line without a case is left out."""
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            rows = csv.DictReader(file)
            if not {"case", "group"} <= set(rows.fieldnames or ()):
                raise UserError(f"{table}: its first line must be 'case,group'.", fix="Add that line.")
            for row in rows:
                if case := (row["case"] or "").strip():
                    yield case, (row["group"] or "").strip()
    except UnicodeDecodeError as error:
        raise UserError(f"{table}: its text is not in UTF-8.", fix="Save it as CSV with the encoding UTF-8.") from error


def with_annotated(
    folder: Path, description: Mapping[str, Any], cases: tuple[Case, ...], outputs: Sequence[Label | Region]
) -> tuple[Case, ...]:
    """What was annotated in each case, where 'annotated' in dataset.json says so: {case: [names]}, others have all."""
    given = description.get("annotated") or {}
    where, names = folder / "dataset.json", [each.name for each in outputs]
    known = {composed(case.id) for case in cases}
    if not isinstance(given, Mapping) or not all(isinstance(each, list) for each in given.values()):
        raise UserError(f"{where}: 'annotated' must map cases to lists of names.", fix='For example {"a": ["liver"]}.')
    for case, drawn in given.items():
        if composed(case) not in known:
            raise UserError(f"{where}: 'annotated' names {case!r}, but there is no such case.", fix="Mend the file.")
        if unknown := [name for name in drawn if name not in names]:
            raise UserError(
                f"{where}: 'annotated' of {case} names {unknown[0]!r}, which nothing is called.",
                fix=f"Choose among {', '.join(names)}.",
            )
    of = {composed(case): tuple(drawn) for case, drawn in given.items()}
    return tuple(
        case.model_copy(update={"annotated": of[composed(case.id)]}) if composed(case.id) in of else case
        for case in cases
    )


def _is_number(value: object) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("-").isdigit())


def _number(key: str) -> tuple[int, str]:
    return (int(key), "") if _is_number(key) else (10**6, str(key))
