"""The dataset.json of a data set, as the Decathlon and nnU-Net write it: names of channels and labels."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from autoseg.errors import UserError
from autoseg.records import Label


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
