"""What a study of settings found, as records, and how noisy its trainings were.

A history is the list of rows that training writes, one per epoch; values that were not defined are None.
"""

import csv
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np

from autoseg.records import Configuration, Record, Saved
from autoseg.scoring.comparison import Difference

History = Sequence[Mapping[str, float | None]]

LEVEL = 0.95
"""Of the intervals that settings are compared by; P values below the rest of it are taken for more than chance."""
REACHED = 0.95
"""A training has arrived when its running Dice on validation patches is this share of the best one's end."""
SETTLED = 0.9
"""A training has settled when its running Dice on validation patches is this share of its own end."""


class Trial(Record):
    """One network of one setting and seed.

    `dice` and `hd95_mm` are the foreground means over the validation cases. `loss_noise`: the loss' standard deviation
    from step to step, as a share of what the training lowered the loss by. `dice_noise`: the same of the Dice on
    validation patches from epoch to epoch in the second half. `gradient_signal`: median share of the squared gradient
    that batches agree on, under Muon that of heads and norms. `reached_share`: share of the training until it had
    arrived (see `REACHED`), None if never; `settled_share`: until it had settled (see `SETTLED`).
    """

    seed: int
    steps: int
    seconds: float
    dice: float | None
    class_dice: tuple[float | None, ...]
    hd95_mm: float | None = None
    loss_noise: float | None = None
    dice_noise: float | None = None
    gradient_signal: float | None = None
    reached_share: float | None = None
    settled_share: float | None = None


class Setting(Record):
    """All trials of one setting. `spread` is the standard deviation of `dice` over seeds, None for a single one.

    `p_against_best` is Wilcoxon's over cases, Holm-corrected over all pairs of settings; None where not tested.
    `failed` says which seeds' trainings failed, and of what: such a setting is not compared with the others.
    """

    name: str
    batch_size: int
    trials: tuple[Trial, ...] = ()
    dice: float | None = None
    spread: float | None = None
    p_against_best: float | None = None
    failed: tuple[str, ...] = ()


class Study(Saved):
    """A grid of trainings under equal time or equal epochs; `configuration` is what all of them share."""

    SCHEMA = 2

    name: str
    configuration: Configuration
    fold: str
    vary: tuple[str, ...]
    fixed: tuple[str, ...] = ()
    seeds: int
    max_seconds: float | None = None
    epochs: int | None = None
    device: str = ""
    cases: int = 0
    finished: bool = False
    settings: tuple[Setting, ...] = ()
    conclusion: str = ""
    differences: tuple[Difference, ...] = ()


def loss_noise(history: History) -> float | None:
    """The loss' standard deviation from step to step over what the training lowered it by: free of scale and offset.

    None where the loss did not fall, or epochs have a single step.
    """
    rows = [row for row in history if _known(row, "loss_noise") and _known(row, "loss")]
    if len(rows) < 2:
        return None
    losses = column(rows, "loss")
    fall = float(losses.max() - losses[-max(1, len(losses) // 10) :].mean())
    return float(np.sqrt(np.mean(column(rows, "loss_noise") ** 2))) / fall if fall > 0 else None


def dice_noise(history: History) -> float | None:
    """Standard deviation of the validation patches' Dice from epoch to epoch, in the second half; None below 4 epochs.

    Differences of neighbours are taken, so a trend does not count as noise (von Neumann 1941).
    """
    dice = column([row for row in history if _known(row, "dice")], "dice")
    changes = np.diff(dice[len(dice) // 2 :])
    return float(np.sqrt(np.mean(changes**2) / 2)) if len(dice) >= 4 else None


def median_signal(history: History) -> float | None:
    """Median over epochs of the share of the squared gradient that batches agree on; None for optimizers without it."""
    values = column([row for row in history if _known(row, "gradient_signal")], "gradient_signal")
    return float(np.median(values)) if values.size else None


def final_dice(history: History) -> float | None:
    """The running Dice on validation patches at the end; None where no class was ever in them."""
    known = [row for row in history if _known(row, "dice_running")]
    return float(column(known, "dice_running")[-1]) if known else None


def reached_share(history: History, goal: float) -> float | None:
    """Share of the training's time after which the running Dice on validation patches is at least `goal`, or None."""
    known = [row for row in history if _known(row, "dice_running")]
    there = column(known, "dice_running") >= goal
    if not there.any():
        return None
    seconds = column(known, "seconds")
    return float(seconds[int(np.argmax(there))] / seconds[-1])


def settled_share(history: History) -> float | None:
    """Share of the training's time after which the running Dice is `SETTLED` of its own end; None without a Dice."""
    end = final_dice(history)
    return None if end is None else reached_share(history, SETTLED * end)


def column(history: History, name: str) -> np.ndarray:
    """One value per row, NaN where it is not defined or not written."""
    return np.array([row[name] if _known(row, name) else math.nan for row in history], float)


def _known(row: Mapping[str, float | None], name: str) -> bool:
    value = row.get(name)
    return value is not None and math.isfinite(value)


def as_table(ended: Study) -> str:
    """One line per training, for spreadsheets."""
    text = io.StringIO()
    columns = [name for name in Trial.model_fields if name != "class_dice"]
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(("setting", "batch_size", *columns, *(f"dice_{label}" for label in _classes(ended))))
    for setting in ended.settings:
        for trial in setting.trials:
            values = [getattr(trial, name) for name in columns]
            rows.writerow((setting.name, setting.batch_size, *values, *trial.class_dice))
    return text.getvalue()


def _classes(ended: Study) -> range:
    return range(1, 1 + max(len(trial.class_dice) for setting in ended.settings for trial in setting.trials))


def conclude(settings: Sequence[Setting], cases: int, seeds: int) -> str:
    """One or two sentences: which setting is best, which are worse by more than chance, and which may not be."""
    best = settings[0]
    if best.dice is None:
        return "No setting has a Dice."
    head = f"{best.name} has the highest mean Dice, {best.dice:.4f} ({cases} cases, seeds averaged: {seeds})"
    if len(settings) == 1:
        return f"{head}."
    over_cases = [s for s in settings[1:] if s.p_against_best is not None and s.p_against_best < 1 - LEVEL]
    real = [each.name for each in over_cases if not within_seeds(best, each, seeds)]
    lucky = [each.name for each in over_cases if each.name not in real]
    rest = [each.name for each in settings[1:] if each not in over_cases]
    parts = [f"it beats {', '.join(real)} by more than chance"] if real else []
    parts += [f"its lead over {', '.join(lucky)} is real for these networks, but seeds may undo it"] if lucky else []
    parts += [f"its lead over {', '.join(rest)} may be chance"] if rest else []
    return f"{head}; {'; '.join(parts)}."


def within_seeds(best: Setting, other: Setting, seeds: int) -> bool:
    """Whether a lead is below twice its standard error over seeds: the test over cases takes the networks as given."""
    if best.spread is None or other.spread is None or best.dice is None or other.dice is None:
        return True
    return best.dice - other.dice < 2 * float(np.hypot(best.spread, other.spread)) / seeds**0.5
