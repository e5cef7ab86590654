"""A plan changed by hand, field by field: `autoseg plan RUN --edit`.

It is checked as a whole, and told among its choices.
"""

import json
from collections.abc import Sequence
from typing import Any

from autoseg.errors import UserError
from autoseg.planning.checks import check_plan
from autoseg.planning.spacing import refuse_huge, resampled
from autoseg.planning.wording import millimetres, voxels
from autoseg.records import Choice, Configuration, Plan
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
        before = _set(content["configurations"], path, value_of(text))
        because = f"set by hand; it was {json.dumps(before)}."
        replaced = (path, path.partition(".")[2]) if len(content["configurations"]) == 1 else (path,)
        others = [each for each in content["choices"] if each["field"] not in replaced]
        content["choices"] = [*others, Choice(field=path, value=text, because=because).model_dump(mode="json")]
    edited = parse({"autoseg": "plan", "schema": Plan.SCHEMA, **content}, Plan, f"--edit {' '.join(changes)}")
    check_plan(edited)
    _check_training(edited, plan)
    return _with_median_shapes(edited, plan)


def value_of(text: str) -> object:
    """The value that a text stands for: JSON, a list of JSON between commas, else the text itself."""
    for spelled in (text, f"[{text}]"):
        try:
            return json.loads(spelled)
        except json.JSONDecodeError:
            continue
    return text


def _with_median_shapes(edited: Plan, before: Plan) -> Plan:
    """The plan where the median shape follows a spacing that was changed alone. Raises UserError where it gets huge."""
    old = {each.name: each for each in before.configurations}
    resized = {
        each.name: _resized(each, old[each.name]) for each in edited.configurations
        if each.name in old and each.spacing_mm != old[each.name].spacing_mm
        and (each.axes, each.median_shape_voxels) == (old[each.name].axes, old[each.name].median_shape_voxels)
    }  # fmt: skip
    fields = {f"{name}.median_shape_voxels": each for name, each in resized.items()}
    choices = [each for each in edited.choices if each.field not in fields]
    for field, each in fields.items():
        because = f"what the images come to at {millimetres(each.spacing_mm)}, set by hand."
        choices.append(Choice(field=field, value=voxels(each.median_shape_voxels), because=because))
    configurations = tuple(resized.get(each.name, each) for each in edited.configurations)
    return edited.model_copy(update={"configurations": configurations, "choices": tuple(choices)})


def _resized(configuration: Configuration, before: Configuration) -> Configuration:
    old_mm, new_mm = (
        (1.0 if each.spacing_mm[0] is None else each.spacing_mm[0], *each.spacing_mm[1:])
        for each in (before, configuration)
    )  # where slices are not resampled across, both are None
    shape = resampled(before.median_shape_voxels, old_mm, new_mm)
    refuse_huge(f"Configuration {configuration.name}: at {millimetres(configuration.spacing_mm)}", shape)
    return configuration.model_copy(update={"median_shape_voxels": shape})


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
    if fields[0] == "memory":
        fix = "Edit patch_voxels or batch_size: the memory is read anew then."
        raise UserError(f"--edit {path}: the memory of a step is read, not set.", fix=fix)
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
