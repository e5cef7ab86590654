"""The pictures of a training, and those of a study of many.

Loss, Dice and learning rate are drawn over the time it took.
"""

import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from autoseg.scoring.study import History, column
from autoseg.store import write_bytes


def draw_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Write a PNG with loss and validation-patch Dice per epoch; nothing when there is no epoch yet."""
    if history:
        write_bytes(path, curves(history))


def curves(history: Sequence[dict[str, float]]) -> bytes:
    """The PNG of `draw_curves`, of at least one epoch; what was not defined is NaN."""
    from matplotlib.figure import Figure

    minutes = [row["seconds"] / 60 for row in history]
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(minutes, [row["loss"] for row in history], color="tab:blue")
    left.set(xlabel="minutes", ylabel="training loss")
    rate = left.twinx()
    rate.plot(minutes, [row["learning_rate"] for row in history], color="tab:gray", linewidth=0.8)
    rate.set(ylabel="learning rate", yscale="log" if min(row["learning_rate"] for row in history) > 0 else "linear")
    classes = [name for name in history[0] if name.startswith("dice_") and name[5:].isdigit()]
    for name in classes:
        right.plot(minutes, [row[name] for row in history], linewidth=0.8, label=f"class {name[5:]}")
    right.plot(minutes, [row["dice_running"] for row in history], color="black", label="running mean")
    right.set(xlabel="minutes", ylabel="Dice on validation patches", ylim=(0, 1))
    right.legend(loc="lower right", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    return content.getvalue()


def draw_study(path: Path, histories: Mapping[str, Sequence[History]], by_steps: bool) -> None:
    """Write a PNG with the curves of every setting: mean over its seeds, and from the lowest to the highest.

    Panels: Dice on validation patches, the upper end of the same, training loss as a share of its first epoch's, and
    the share of the squared gradient that batches agree on. `by_steps` draws over steps instead of minutes. Nothing
    where no history has a row.
    """
    from matplotlib.figure import Figure

    unit, name = (1.0, "step") if by_steps else (60.0, "seconds")
    runs = {setting: [rows for rows in each if rows] for setting, each in histories.items()}
    longest = max((column(rows, name)[-1] for each in runs.values() for rows in each), default=0.0)
    if not longest:
        return
    figure = Figure(figsize=(13, 9), layout="constrained")
    panels = figure.subplots(2, 2).flatten()
    for setting, own in runs.items():
        for panel, curve in zip(panels, ("dice", "dice", "loss", "gradient_signal"), strict=True):
            _band(panel, setting, own, curve, name, unit)
    dice = "Dice on validation patches"
    panels[0].set(ylabel=dice, ylim=(0, 1))
    panels[1].set(ylabel=f"{dice}, upper end", ylim=_upper_end(own for each in runs.values() for own in each))
    panels[2].set(ylabel="training loss / that of the first epoch")
    panels[3].set(ylabel="share of the gradient that batches agree on", ylim=(0, None))
    for panel in panels:
        panel.set(xlabel="steps" if by_steps else "minutes", xlim=(0, longest / unit))
        panel.grid(linewidth=0.3)
    panels[0].legend(loc="lower right", fontsize="small")
    content = io.BytesIO()
    figure.savefig(content, format="png", dpi=120)
    write_bytes(path, content.getvalue())


def _upper_end(runs: Iterable[History]) -> tuple[float, float]:
    """Limits that hold what the trainings' Dice is in their second halves."""
    halves = [column(rows[len(rows) // 2 :], "dice") for rows in runs]
    known = np.concatenate([half[np.isfinite(half)] for half in halves] or [np.zeros(0)])
    if not known.size:
        return 0.0, 1.0
    low, high = np.quantile(known, 0.02), known.max()
    room = max(0.05 * (high - low), 0.005)
    return float(low - room), float(high + room)


def _band(panel: Any, setting: str, runs: Sequence[History], curve: str, over: str, unit: float) -> None:
    """One setting's curve: runs are brought to common places by linear interpolation, as far as all of them go."""
    read = [(column(rows, over) / unit, column(rows, curve)) for rows in runs]
    pairs = [(x[np.isfinite(y)], y[np.isfinite(y)]) for x, y in read if np.isfinite(y).any()]
    if not pairs:
        return
    first, last = max(x[0] for x, _ in pairs), min(x[-1] for x, _ in pairs)
    at = np.linspace(min(first, last), last, 200)
    scale = [abs(y[0]) or 1.0 if curve == "loss" else 1.0 for _, y in pairs]
    curves = np.stack([np.interp(at, x, y / s) for (x, y), s in zip(pairs, scale, strict=True)])
    (line,) = panel.plot(at, curves.mean(axis=0), linewidth=1.2, label=setting)
    panel.fill_between(at, curves.min(axis=0), curves.max(axis=0), color=line.get_color(), alpha=0.15, linewidth=0)
