"""What a person sees in the end: a table for each kind of result, on stdout."""

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from autoseg.screen import console_on, duration, filled, print_line, readable

if TYPE_CHECKING:
    from pydantic import BaseModel

    from autoseg.records import Plan, Postprocessing, Run, Scores
    from autoseg.scoring.comparison import Comparison
    from autoseg.scoring.distillation import Distillation
    from autoseg.scoring.selection import Selection
    from autoseg.scoring.study import Setting, Study


def say(text: str) -> None:
    """One line on stdout."""
    print_line(console_on(sys.stdout), text)


def show(result: "BaseModel", explain: bool = False) -> None:
    """The table of whatever a step returned; `explain` adds the reasons to a plan."""
    shown_by = SHOWN[type(result).__name__]
    shown_by(result, **({"explain": True} if explain and shown_by is show_plan else {}))


def show_plan(plan: "Plan", explain: bool = False) -> None:
    """The networks of a plan; with `explain` also every decision with its reason, every reading, and a drawing."""
    from autoseg.planning.explain import attempt_table, choice_table, cost_table, drawing

    for each in (choice_table(plan), attempt_table(plan), cost_table(plan)) if explain else (cost_table(plan),):
        _table(filled(each.title, each.headings, each.rows))
    for configuration in plan.configurations if explain else ():
        say("\n".join(("", *drawing(configuration))))


def show_run(run: "Run") -> None:
    """How a training ended."""
    state = "finished" if run.finished else "stopped early"
    say(f"{run.configuration.name}, fold {run.fold}: {state} after {run.steps} steps in {duration(run.seconds)}")
    if run.validation_dice:
        dice = ", ".join("-" if d is None else f"{d:.4f}" for d in run.validation_dice)
        known = [d for d in run.validation_dice if d is not None]
        mean = f", mean {sum(known) / len(known):.4f}" if known else ""
        say(f"validation Dice per class: {dice}{mean}")


def show_scores(scores: "Scores") -> None:
    """Means of the metrics in `SHOWN_METRICS` per class, and over the foreground."""
    metrics = [metric for metric in SHOWN_METRICS if metric in scores.mean]
    table = Table(title=f"Scores of {len(scores.cases)} cases")
    table.add_column("class", overflow="fold", min_width=len("foreground"))
    for metric in metrics:
        table.add_column(Text(readable(metric)), justify="right")
    for index, label in enumerate(scores.labels):
        table.add_row(Text(label), *(_score(scores.mean[metric][index]) for metric in metrics))
    table.add_section()
    table.add_row("foreground", *(_score(scores.foreground_mean.get(metric)) for metric in metrics))
    _table(table)
    say(f"All metrics of all cases of {scores.prediction}, and the policy for empty ones, are in scores.json.")


def show_rules(learned: "Postprocessing") -> None:
    """The post-processing rules that were worth keeping."""
    if not learned.rules:
        say(f"No rule raised the mean Dice of the {learned.cases} cases; predictions stay as they are.")
        return
    rows = [
        (
            r.label or "foreground", r.action, f"{r.dice_before:.4f} -> {r.dice_after:.4f}",
            f"{r.false_positive_mm3_before:.0f} -> {r.false_positive_mm3_after:.0f}",
            "-" if r.p_value is None else f"{r.p_value:.2g}",
        )
        for r in learned.rules
    ]  # fmt: skip
    headings = ("class", "rule", "mean Dice", "false positives, mm3 per case", "p")
    _table(filled(f"Learned on {learned.cases} cases", headings, rows))


def show_selection(chosen: "Selection") -> None:
    """What was tried, best first, and what `predict` will use."""
    rows = [
        (each.name, *("-" if v is None else f"{v:.{n}g}" for v, n in ((each.dice, 4), (each.p_value, 2))))
        for each in chosen.candidates
    ]
    title = f"{chosen.cases} validation cases of folds {', '.join(chosen.folds)}"
    _table(filled(title, ("candidate", "mean Dice", "p against the best"), rows))
    say(f"predict uses {'+'.join(chosen.members)}.")


def show_comparison(found: "Comparison") -> None:
    """Every difference with its interval, and the conclusion."""
    rows = []
    for each in found.differences:
        interval = "-" if each.low is None or each.high is None else f"{each.low:+.4f} to {each.high:+.4f}"
        chance = "-" if each.p_wilcoxon_holm is None else f"{each.p_wilcoxon_holm:.2g}"
        difference = "-" if each.difference is None else f"{each.difference:+.4f}"
        pair = f"{each.first} - {each.second}"
        rows.append((each.metric, each.label, pair, difference, interval, chance, each.better or "-"))
    headings = ("metric", "class", "pair", "difference", f"{100 * found.level:.3g} % interval", "p", "better")
    _table(filled(f"Comparison on {found.cases} cases", headings, rows))
    if found.rank_shares:
        places = sorted(zip(found.methods, found.rank_shares, strict=True), key=lambda m: found.ranking.index(m[0]))
        said = ", ".join(f"{name} (first in {100 * shares[0]:.0f} %)" for name, shares in places)
        say(f"Ranking by {found.metrics[0]} when cases are drawn anew: {said}.")
    say(found.conclusion)


def show_study(ended: "Study") -> None:
    """One row per setting, the best first, and the conclusion."""
    field = ended.vary[0].partition("=")[0] if len(ended.vary) == 1 else ""
    rows = [(each.name.removeprefix(f"{field}="), *_setting_row(each)[1:]) for each in ended.settings]
    length = f"{ended.epochs} epochs" if ended.max_seconds is None else duration(ended.max_seconds)
    state = "" if ended.finished else ", not finished"
    what = f"{ended.configuration.name}, fold {ended.fold}"
    title = f"{what}: {ended.seeds} seeds, {length} each, {ended.cases} cases{state}"
    headings = (
        field or "setting", "Dice", "spread over seeds", "p against best", "HD95 mm", "steps", "loss noise",
        "Dice noise", "gradient signal", "90 % after", "best's 95 % after",
    )  # fmt: skip
    _table(filled(title, headings, rows))
    say(
        "p: Wilcoxon over cases, Holm over all pairs. Loss noise: from step to step, of what training lowered it by. "
        "Dice noise: on validation patches. Gradient signal: what batches agree on. 90 % after: share of the training "
        "until the Dice on patches is 90 % of its own end. Best's 95 % after: until 95 % of that of the best training."
    )
    say(ended.conclusion)


def show_distillation(ended: "Distillation") -> None:
    """One row per member, the ensemble, the student and the baseline, and the conclusion."""
    rows = [
        (row.name, _score(row.dice), *(f"{n:.3g}" for n in (row.parameters / 1e6, row.operations / 1e9, row.seconds)))
        for row in ended.contestants
    ]
    title = f"{ended.student}, fold {ended.fold}: {ended.cases} cases, {ended.timed_cases} timed on {ended.device}"
    headings = ("network", "Dice", "million parameters", "GFLOP per patch", "seconds per case")
    _table(filled(title, headings, rows))
    if ended.seen:
        say(f"Too good: {', '.join(ended.seen)} learned from validation cases of this fold.")
    say(ended.conclusion)


def _setting_row(setting: "Setting") -> tuple[str, ...]:
    def mean(name: str, shape: str) -> str:
        known = [value for trial in setting.trials if (value := getattr(trial, name)) is not None]
        return format(sum(known) / len(known), shape) if known else "-"

    arrived = sum(trial.reached_share is not None for trial in setting.trials)
    few = f" ({arrived} of {len(setting.trials)})" if 0 < arrived < len(setting.trials) else ""
    spread = "-" if setting.spread is None else f"{setting.spread:.4f}"
    chance = "-" if setting.p_against_best is None else f"{setting.p_against_best:.2g}"
    return (
        setting.name, _score(setting.dice), spread, chance, mean("hd95_mm", ".2f"), mean("steps", ".0f"),
        mean("loss_noise", ".3f"), mean("dice_noise", ".4f"), mean("gradient_signal", ".1%"),
        mean("settled_share", ".0%"), mean("reached_share", ".0%") + few if arrived else "never",
    )  # fmt: skip


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


def _table(table: Table) -> None:
    console_on(sys.stdout).print(table)


SHOWN_METRICS = ("dice", "iou", "precision", "recall", "volume_error", "hd95_mm", "asd_mm", "surface_dice")
"""Those that fit on a screen; the file holds them all."""

SHOWN: dict[str, Callable[..., None]] = {
    "Plan": show_plan, "Run": show_run, "Scores": show_scores, "Postprocessing": show_rules,
    "Comparison": show_comparison, "Selection": show_selection, "Study": show_study, "Distillation": show_distillation,
}  # fmt: skip
"""Record name -> its table."""
