"""What a person sees: live bars and tables on a terminal, plain lines elsewhere.

Plain lines have no control codes. Progress, warnings and errors go to stderr, results (tables, JSON) to stdout.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from autoseg.errors import UserError
from autoseg.events import Advanced, Event, Finished, Report, Said, Started, Trained, Warned

if TYPE_CHECKING:
    from pydantic import BaseModel

    from autoseg.records import Plan, Postprocessing, Run, Scores
    from autoseg.scoring.comparison import Comparison
    from autoseg.scoring.distillation import Distillation
    from autoseg.scoring.selection import Selection
    from autoseg.scoring.study import Setting, Study

PLAIN_WIDTH = 120
PLAIN_SECONDS = 5.0
"""Where there is no terminal, a running piece of work says one line in this time at most."""


@contextmanager
def screen(stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
    """Give a `Report` that shows events on `stream` (default stderr): live on a terminal, else as throttled lines."""
    console = _console(stream or sys.stderr)
    if not console.is_terminal:
        yield _Lines(console, clock).show
        return
    shown = _Panel(console)
    with Live(get_renderable=shown.render, console=console, refresh_per_second=4, transient=True):
        yield shown.show


# ------------------------------------------------------------------------------------------------ progress


@dataclass
class _Lines:
    """Plain lines: work is announced when it begins and ends, and at most every `PLAIN_SECONDS` in between."""

    console: Console
    clock: Callable[[], float]
    began: dict[str, float] = field(default_factory=dict)
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    said_at: float = -math.inf

    def show(self, event: Event) -> None:
        now = self.clock()
        match event:
            case Started(what, of):
                self.began[what], self.counts[what] = now, (0, of)
                self._say(f"{what}: {of} to do" if of else what, now)
            case Advanced(what, done, of, note):
                if what in self.began:
                    self.counts[what] = (done, of)
                if now - self.said_at >= PLAIN_SECONDS:
                    self._say(f"{what}: {done}" + (f"/{of}" if of else "") + (f" ({note})" if note else ""), now)
            case Finished(what) if what in self.began:
                seconds = now - self.began.pop(what)
                done, _ = self.counts.pop(what, (0, 0))
                self._say(f"{what}: done" + (f", {done}" if done else "") + f" in {duration(seconds)}", now)
            case Said(text):
                self._say(text, now)
            case Warned(text):
                self._say(f"warning: {text}", now)
            case Trained(epoch, epochs, step, steps, figures):
                if now - self.said_at >= PLAIN_SECONDS or (step == steps and epoch == epochs):
                    self._say(f"{_place(epoch, epochs, step, steps)}  {_joined(figures)}", now)

    def _say(self, text: str, now: float) -> None:
        self.said_at = now
        _line(self.console, text)


class _Panel:
    """Live bars, one per piece of work under way, below the figures of a training."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=32),
            TextColumn("{task.fields[count]}", markup=False),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}", style="dim", markup=False),
            console=console,
        )
        self.tasks: dict[str, TaskID] = {}
        self.training: Trained | None = None

    def show(self, event: Event) -> None:
        match event:
            case Started(what, of):
                self._remove(what)
                self.tasks[what] = self.bars.add_task(what, total=of or None, count=f"0/{of}" if of else "", note="")
            case Advanced(what, done, of, note):
                if what not in self.tasks:
                    self.show(Started(what, of))
                count = f"{done}/{of}" if of else str(done)
                self.bars.update(self.tasks[what], completed=done, total=of or None, count=count, note=note)
            case Finished(what):
                self._remove(what)
                self.training = None
            case Said(text):
                _line(self.console, text)
            case Warned(text):
                _line(self.console, text, "yellow")
            case Trained():
                self.training = event

    def _remove(self, what: str) -> None:
        if what in self.tasks:
            self.bars.remove_task(self.tasks.pop(what))

    def render(self) -> RenderableType:
        parts: list[RenderableType] = []
        if self.training is not None:
            now = self.training
            parts.append(Text(f"training  {_place(now.epoch, now.epochs, now.step, now.steps)}", style="bold"))
            grid = Table.grid(padding=(0, 2))
            for name, value in now.figures.items():
                grid.add_row(Text(f"  {_readable(name)}", style="dim"), Text(_figure(name, value)))
            parts.append(grid)
        if self.bars.tasks:
            parts.append(self.bars)
        return Group(*parts)


def _place(epoch: int, epochs: int, step: int, steps: int) -> str:
    where = f"epoch {epoch}" + (f"/{epochs}" if epochs else "")
    return where + (f"  step {step}/{steps}" if steps else "")


def _joined(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{_readable(name)} {_figure(name, value)}" for name, value in figures.items())


def _readable(name: str) -> str:
    return name.replace("seconds_left", "time_left").replace("_", " ").removesuffix(" seconds")


def _figure(name: str, value: float) -> str:
    if math.isnan(value):
        return "-"
    if "seconds" in name:
        return duration(value)
    if name.endswith("share"):
        return f"{100 * value:.0f} %"
    if "dice" in name.lower():
        return f"{value:.3f}"
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "3.0 ms", "0.4 s", "12 s", "3 min 20 s", "2 h 05 min"."""
    if 0 < seconds < 0.1:
        return f"{1000 * seconds:.1f} ms"
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


# ------------------------------------------------------------------------------------------------ results


def say(text: str) -> None:
    """One line on stdout."""
    _line(_console(sys.stdout), text)


def show(result: "BaseModel", explain: bool = False) -> None:
    """The table of whatever a step returned; `explain` adds the reasons to a plan."""
    shown_by = SHOWN[type(result).__name__]
    shown_by(result, **({"explain": True} if explain and shown_by is show_plan else {}))


def show_plan(plan: "Plan", explain: bool = False) -> None:
    """The networks of a plan; with `explain` also every decision with its reason, every reading, and a drawing."""
    from autoseg.planning.explain import attempt_table, choice_table, cost_table, drawing

    for each in (choice_table(plan), attempt_table(plan), cost_table(plan)) if explain else (cost_table(plan),):
        _table(_filled(each.title, each.headings, each.rows))
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
        table.add_column(Text(_readable(metric)), justify="right")
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
    _table(_filled(f"Learned on {learned.cases} cases", headings, rows))


def show_selection(chosen: "Selection") -> None:
    """What was tried, best first, and what `predict` will use."""
    rows = [
        (each.name, *("-" if v is None else f"{v:.{n}g}" for v, n in ((each.dice, 4), (each.p_value, 2))))
        for each in chosen.candidates
    ]
    title = f"{chosen.cases} validation cases of folds {', '.join(chosen.folds)}"
    _table(_filled(title, ("candidate", "mean Dice", "p against the best"), rows))
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
    _table(_filled(f"Comparison on {found.cases} cases", headings, rows))
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
    _table(_filled(title, headings, rows))
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
    _table(_filled(title, headings, rows))
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


def show_error(error: UserError) -> None:
    """One red sentence on stderr; where the error lists problems of cases, a table of them before it."""
    console = _console(sys.stderr)
    problems = getattr(error, "problems", ())
    if problems:
        rows = [(p.case, p.what, p.fix) for p in problems]
        console.print(_filled(f"{len(rows)} problem{'s' if len(rows) > 1 else ''}", ("case", "problem", "fix"), rows))
        _line(console, f"{error.what.splitlines()[0].rstrip(':')}. {error.fix}".strip(), "red")
        return
    _line(console, str(error), "red")


def show_stopped(text: str) -> None:
    """What to do after Ctrl-C, on stderr."""
    _line(_console(sys.stderr), text, "yellow")


def _filled(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, overflow="fold", min_width=max(len(word) for word in heading.split()))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _score(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}" if abs(value) < 10 else f"{value:,.1f}"


@dataclass
class _Forgiving:
    """Loses what cannot be written: a full disk under a log, or a terminal that is gone, ends no training."""

    stream: TextIO

    def write(self, text: str) -> None:
        with suppress(OSError):
            self.stream.write(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def _console(stream: TextIO) -> Console:
    """Text is data here: no markup, no emoji, no colouring of what looks like a number. Results have to be written."""
    live, file = stream.isatty(), stream if stream is sys.stdout else cast(TextIO, _Forgiving(stream))
    width = None if live else PLAIN_WIDTH
    return Console(file=file, force_terminal=live, width=width, markup=False, emoji=False, highlight=False)


def _table(table: Table) -> None:
    _console(sys.stdout).print(table)


def _line(console: Console, text: str, style: str = "") -> None:
    console.print(Text(text, style=style), soft_wrap=True)


SHOWN_METRICS = ("dice", "iou", "precision", "recall", "volume_error", "hd95_mm", "asd_mm", "surface_dice")
"""Those that fit on a screen; the file holds them all."""

SHOWN: dict[str, Callable[..., None]] = {
    "Plan": show_plan, "Run": show_run, "Scores": show_scores, "Postprocessing": show_rules,
    "Comparison": show_comparison, "Selection": show_selection, "Study": show_study, "Distillation": show_distillation,
}  # fmt: skip
"""Record name -> its table."""
