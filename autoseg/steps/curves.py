"""The picture of a training: loss, Dice and learning rate over the time it took."""

import io
from collections.abc import Sequence
from pathlib import Path

from autoseg.store import write_bytes


def draw_curves(path: Path, history: Sequence[dict[str, float]]) -> None:
    """Write a PNG with loss and validation-patch Dice per epoch; nothing when there is no epoch yet."""
    if not history:
        return
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
    write_bytes(path, content.getvalue())
