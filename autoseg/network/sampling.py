"""Which case and which class a patch is drawn for: the modes of `--sampling`.

Here is also how a mode is asked for, and its rates. A batch has forced samples, which are centred on a voxel of a
class, and free ones, which lie anywhere. With the label index k counted from 1, the modes promise:

- `foreground`: any case; a forced sample takes any class of that case. Source: nnU-Net's data loader (Isensee et al.
  2021). A class that few cases have is drawn as rarely as these cases are.
- `class_balanced`: a forced sample is of class k at the rate of k, in any case that has it, however few they are.
- `case_balanced`: every sample, forced or free, is from a case drawn for class k at the rate of k; the cases without
  any class are one more group, drawn as often as the average class. Forced ones take any class of their case.
- `hard`: `class_balanced` with rates that follow the running validation error, 1 - Dice of each class.

Rates are equal where none are given, and shared among the classes that some case has.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np

from autoseg.errors import UserError
from autoseg.records import TrainSpec

MEMORY = 0.5
"""Weight of the past in the running validation error."""
EVEN_SHARE = 0.25
"""Of the forced samples in mode `hard` that all classes share alike, so that none is forgotten."""
LAG_STEPS = 16
"""A step's rates follow the epochs that ended so many steps before it: batches are read ahead, fewer steps than this,
and which errors a step knows must not depend on how far."""

Holders = Mapping[int, Sequence[int]]
"""Class -> numbers of the cases that have it; the key 0 holds the cases without any class."""


class HasLocations(Protocol):
    """A case that knows where its classes are: label index -> (n, 3) positions; the key -1 is no class."""

    @property
    def locations(self) -> Mapping[int, np.ndarray]: ...


def parse(text: str) -> dict[str, object]:
    """The fields of a `TrainSpec` for "mode" or "mode:class=rate,..,share=forced share".

    Raises UserError, with the valid choices, for another mode and for rates that are none.
    """
    mode, _, options = text.partition(":")
    if mode not in CHOOSE:
        raise UserError(f"Sampling {mode!r} is not known.", fix=f"Choose one of {', '.join(CHOOSE)}.")
    fields: dict[str, object] = {"sampling": mode}
    rates: list[tuple[str, float]] = []
    for option in filter(None, options.split(",")):
        name, _, number = option.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not 0.0 <= value <= 1.0:
            fix = "Write a class or `share`, =, and a number from 0 to 1."
            raise UserError(f"Sampling {text!r}: {option!r} is no rate.", fix=fix)
        if name == "share":
            fields["foreground_share"] = value
        else:
            rates.append((name, value))
    if rates and mode not in WITH_RATES:
        raise UserError(f"Sampling {mode} takes no rates of classes.", fix=f"Choose one of {', '.join(WITH_RATES)}.")
    return fields | {"class_rates": tuple(rates)}


def rates_of(train: TrainSpec, classes: Sequence[str]) -> tuple[float, ...]:
    """The rate of every foreground class; those without one share what is left, and the sum is 1.

    Raises UserError for a class that is not there, and for rates that add up to more than 1 or to nothing.
    """
    given = dict(train.class_rates)
    for name in given:
        if name not in classes:
            raise UserError(f"Sampling: there is no class {name!r}.", fix=f"The classes are {', '.join(classes)}.")
    total, others = sum(given.values()), len(classes) - len(given)
    if total > 1.0 + 1e-9:
        raise UserError(f"Sampling: the rates add up to {total:g}.", fix="Give rates that add up to 1 at most.")
    if total <= 0.0 and not others:
        raise UserError("Sampling: every rate is 0.", fix="Give at least one class a rate above 0.")
    scale = 1.0 if others else 1.0 / total
    return tuple(given[name] * scale if name in given else max(0.0, 1.0 - total) / others for name in classes)


def holders(sources: Sequence[HasLocations]) -> dict[int, tuple[int, ...]]:
    """Which cases have which class."""
    found: dict[int, list[int]] = {}
    for case, source in enumerate(sources):
        for k in _classes(source) or [0]:
            found.setdefault(k, []).append(case)
    return {k: tuple(cases) for k, cases in sorted(found.items())}


def shares(held: Holders, rates: Sequence[float], *, without: bool = False) -> dict[int, float]:
    """The chance of every class that some case has; with `without`, also of the cases that have none (key 0)."""
    weights = {k: rates[k - 1] if k <= len(rates) else 1.0 for k in held if k > 0}
    if weights and not any(weights.values()):
        weights = dict.fromkeys(weights, 1.0)
    if without and 0 in held:
        weights[0] = sum(weights.values()) / len(weights) if weights else 1.0
    total = sum(weights.values())
    return {k: weight / total for k, weight in sorted(weights.items())}


def hard_rates(history: Sequence[Mapping[str, float | None]], step: int, classes: int) -> tuple[float, ...]:
    """Rates of the foreground classes at a step of mode `hard`; equal until the first epoch is known.

    A quarter is shared alike, the rest in proportion to the running error of each class: 1 - Dice on the validation
    patches, half of it from the last epoch, a quarter from the one before, and so on. A class that has never been in
    those patches counts as one of average error. Depends on the history up to `LAG_STEPS` before the step alone, so a
    resumed training draws what an uninterrupted one draws.

    Args:
        history: rows with `step`, the number of steps done, and `dice_<k>`.
        classes: background included.
    """
    errors: dict[int, float] = {}
    for row in history:
        if (row["step"] or 0.0) > step - LAG_STEPS:
            continue
        for k in range(1, classes):
            dice = row.get(f"dice_{k}")
            if dice is not None and math.isfinite(dice):
                errors[k] = MEMORY * errors[k] + (1 - MEMORY) * (1 - dice) if k in errors else 1 - dice
    average = sum(errors.values()) / len(errors) if errors else 1.0
    each = [errors.get(k, average) for k in range(1, classes)]
    total = sum(each)
    if total <= 0.0:
        return (1.0 / len(each),) * len(each)
    return tuple(EVEN_SHARE / len(each) + (1 - EVEN_SHARE) * error / total for error in each)


# ------------------------------------------------------------------------------------------------ the modes

Chosen = tuple[int, int | None]
"""The number of a case, and the class that the patch is centred on (None: anywhere)."""


def _foreground(
    chance: np.random.Generator, sources: Sequence[HasLocations], held: Holders, rates: Sequence[float], forced: bool
) -> Chosen:
    case = int(chance.integers(len(sources)))
    classes = _classes(sources[case])
    return case, classes[chance.integers(len(classes))] if forced and classes else None


def _class_balanced(
    chance: np.random.Generator, sources: Sequence[HasLocations], held: Holders, rates: Sequence[float], forced: bool
) -> Chosen:
    chances = shares(held, rates) if forced else {}
    if not chances:
        return int(chance.integers(len(sources))), None
    k = _one_of(chance, chances)
    return held[k][int(chance.integers(len(held[k])))], k


def _case_balanced(
    chance: np.random.Generator, sources: Sequence[HasLocations], held: Holders, rates: Sequence[float], forced: bool
) -> Chosen:
    group = _one_of(chance, shares(held, rates, without=True))
    case = held[group][int(chance.integers(len(held[group])))]
    classes = _classes(sources[case])
    return case, classes[chance.integers(len(classes))] if forced and classes else None


def _one_of(chance: np.random.Generator, chances: Mapping[int, float]) -> int:
    return int(chance.choice(list(chances), p=list(chances.values())))


def _classes(source: HasLocations) -> list[int]:
    return sorted(k for k, found in source.locations.items() if k > 0 and len(found))


Choose = Callable[[np.random.Generator, Sequence[HasLocations], Holders, Sequence[float], bool], Chosen]
CHOOSE: dict[str, Choose] = {
    "foreground": _foreground,
    "class_balanced": _class_balanced,
    "case_balanced": _case_balanced,
    "hard": _class_balanced,
}
WITH_RATES = ("class_balanced", "case_balanced")
