"""What a study may vary: fields of a configuration, from text like `loss=ce,dice`."""

import itertools
from collections.abc import Iterator, Sequence
from typing import Literal, get_origin

from pydantic import ValidationError

from autoseg.errors import UserError
from autoseg.network import losses
from autoseg.records import AugmentSpec, Configuration, NetworkSpec, TrainSpec


def settings_of(planned: Configuration, vary: Sequence[str], fixed: Sequence[str] = ()) -> dict[str, Configuration]:
    """Every combination of the varied fields as a configuration, by its name ("loss=ce", "loss=ce+batch_size=2").

    Args:
        vary: one "field=value,value,..." per field; an option of a loss may hold commas: "loss=ce,focal:gamma=2".
        fixed: "field=value", the same for all.

    Raises:
        UserError: an unknown field or an impossible value, with the valid ones; a field or value given twice.
    """
    base = with_fields(planned, fixed)
    fields = [_assignment(text) for text in vary]
    names = [field for field, _ in fields]
    twice = sorted({name for name in names if names.count(name) > 1})
    if not fields or twice:
        raise UserError(
            f"{twice[0]} is varied twice." if twice else "A study needs something to vary.",
            fix="Give every field once, such as --vary loss=ce,dice --vary learning_rate=0.001,0.003.",
        )
    settings: dict[str, Configuration] = {}
    for values in itertools.product(*(values for _, values in fields)):
        pairs = [f"{name}={value}" for name, value in zip(names, values, strict=True)]
        settings["+".join(pairs)] = with_fields(base, pairs)
    return settings


def with_fields(configuration: Configuration, pairs: Sequence[str]) -> Configuration:
    """The configuration with each "field=value" put in. Raises UserError as `settings_of`."""
    for pair in pairs:
        field, values = _assignment(pair)
        if len(values) != 1:
            raise UserError(f"{pair}: one value is needed.", fix="Use --vary for several.")
        configuration = _with(configuration, field, values[0])
    return configuration


def fields_in(texts: Sequence[str]) -> tuple[str, ...]:
    """The names of the fields in "field=value,..." texts."""
    return tuple(_assignment(text)[0] for text in texts)


def _with(configuration: Configuration, field: str, value: str) -> Configuration:
    fields = configuration.model_dump()
    place = fields
    for group in FIELDS[field]:
        place = place[group]
    place[field] = value
    if field == "loss":
        losses.parse(value)
    try:
        return Configuration.model_validate(fields)
    except ValidationError as error:
        raise UserError(f"{field}={value} is not possible: {error.errors()[0]['msg']}.") from error


def _assignment(text: str) -> tuple[str, tuple[str, ...]]:
    """ "loss=ce,focal:gamma=2,alpha=0.5" -> loss and (ce; focal:gamma=2,alpha=0.5)."""
    field, equals, rest = (part.strip() for part in text.partition("="))
    if field not in FIELDS:
        raise UserError(f"There is no field {field!r} to set.", fix=f"Choose one of {', '.join(FIELDS)}.")
    values: list[str] = []
    for part in (each.strip() for each in rest.split(",")):
        if values and "=" in part.partition(":")[0]:
            values[-1] += f",{part}"
        else:
            values.append(part)
    if not equals or not all(values) or len(set(values)) < len(values):
        raise UserError(f"{text!r} does not say what to set.", fix=f"Write {field}=value,value with different values.")
    return field, tuple(values)


def _simple_fields() -> Iterator[tuple[str, tuple[str, ...]]]:
    for groups, record in RECORDS:
        for name, field in record.model_fields.items():
            plain = field.annotation in (int, float, str, bool) or get_origin(field.annotation) is Literal
            if plain and name not in NOT_VARIED:
                yield name, groups


RECORDS = (
    (("train",), TrainSpec), (("network",), NetworkSpec), ((), Configuration), (("train", "augment"), AugmentSpec),
)  # fmt: skip
NOT_VARIED = ("name", "dimension", "in_channels", "classes", "epochs", "steps_per_epoch", "previous")
"""Those that are the data's, or the length that all trainings share."""

FIELDS: dict[str, tuple[str, ...]] = dict(_simple_fields())
"""Every field that can be varied, and the records in which it lies: all numbers, words and switches of a training."""
