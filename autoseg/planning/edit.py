"""A plan changed by hand, field by field: `autoseg plan RUN --edit`.

It is checked as a whole, and told among its choices.
"""

import json
from collections.abc import Sequence
from typing import Any

from autoseg.errors import UserError
from autoseg.planning.checks import check_plan
from autoseg.records import Choice, Plan
from autoseg.store import parse

EXAMPLE = "3d.patch_voxels=48,64,48"


def edit(plan: Plan, changes: Sequence[str]) -> Plan:
    """The plan with other values in some fields of its configurations, and a choice for each that says so.

    Args:
        changes: such as "3d.patch_voxels=48,64,48" or "2d.train.loss=ce": a configuration, a field, and its value as
            in JSON; numbers between commas are a list, and what is no JSON is text.

    Raises UserError for a field that is not there, a value that does not suit it, or a plan that contradicts itself.
    """
    content = plan.model_dump(mode="json")
    for change in changes:
        path, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--edit {change}: a field and its value are needed.", fix=f"Such as {EXAMPLE}.")
        before = _set(content["configurations"], path, _value(text))
        because = f"set by hand; it was {json.dumps(before)}."
        replaced = (path, path.partition(".")[2]) if len(content["configurations"]) == 1 else (path,)
        others = [each for each in content["choices"] if each["field"] not in replaced]
        content["choices"] = [*others, Choice(field=path, value=text, because=because).model_dump(mode="json")]
    edited = parse({"autoseg": "plan", "schema": Plan.SCHEMA, **content}, Plan, f"--edit {' '.join(changes)}")
    check_plan(edited)
    _check_training(edited, plan)
    return edited


def _check_training(edited: Plan, before: Plan) -> None:
    """Raise UserError where the loss or a class that is drawn at a rate is no such thing."""
    from autoseg.network.sampling import rates_of

    known = {each.train.loss for each in before.configurations}
    for train in (each.train for each in edited.configurations):
        rates_of(train, [label.name for label in edited.labels[1:]])
        if train.loss not in known:
            from autoseg.network import losses  # torch takes seconds

            losses.parse(train.loss)


def _set(configurations: list[dict[str, Any]], path: str, value: object) -> object:
    """Put `value` into the field that `path` names, and return what was there."""
    name, *fields = path.split(".")
    found = {each["name"]: each for each in configurations}
    place: Any = found.get(name)
    if place is None or not fields:
        raise UserError(f"--edit {path}: begin with a configuration, such as {EXAMPLE}.", fix=_choose(found))
    for field in fields:
        holder: dict[str, Any] = place
        if not isinstance(holder, dict) or field not in holder:
            known = holder if isinstance(holder, dict) else {}
            raise UserError(f"--edit {path}: there is no field {field!r}.", fix=_choose(known) if known else "")
        place = holder[field]
    holder[fields[-1]] = [value] if isinstance(place, list) and not isinstance(value, list) else value
    return place


def _choose(names: dict[str, Any]) -> str:
    return f"Choose one of {', '.join(names)}."


def _value(text: str) -> object:
    for written in (text, f"[{text}]"):
        try:
            return json.loads(written)
        except json.JSONDecodeError:
            continue
    return text
