"""What a person sees meanwhile: live bars on a terminal, plain lines elsewhere.

Plain lines have no control codes. Progress, warnings and errors go to stderr; results go to stdout (`tables.py`).
"""

import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, TextIO, cast

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from autoseg.errors import UserError
from autoseg.events import Advanced, Event, Finished, Report, Said, Started, Trained, Warned

PLAIN_WIDTH = 120
PLAIN_SECONDS = 5.0
"""Where there is no terminal, a running piece of work says one line in this time at most."""


@contextmanager
def screen(stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> Iterator[Report]:
    """Give a `Report` that shows events on `stream` (default stderr): live on a terminal, else as throttled lines."""
    console = console_on(stream or sys.stderr)
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
        print_line(self.console, text)


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
                print_line(self.console, text)
            case Warned(text):
                print_line(self.console, text, "yellow")
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
                grid.add_row(Text(f"  {readable(name)}", style="dim"), Text(_figure(name, value)))
            parts.append(grid)
        if self.bars.tasks:
            parts.append(self.bars)
        return Group(*parts)


def _place(epoch: int, epochs: int, step: int, steps: int) -> str:
    where = f"epoch {epoch}" + (f"/{epochs}" if epochs else "")
    return where + (f"  step {step}/{steps}" if steps else "")


def _joined(figures: Mapping[str, float]) -> str:
    return "  ".join(f"{readable(name)} {_figure(name, value)}" for name, value in figures.items())


def readable(name: str) -> str:
    """The name of a figure as people write it."""
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


def show_error(error: UserError) -> None:
    """One red sentence on stderr; where the error lists problems of cases, a table of them before it."""
    console = console_on(sys.stderr)
    problems = getattr(error, "problems", ())
    if problems:
        rows = [(p.case, p.what, p.fix) for p in problems]
        console.print(filled(f"{len(rows)} problem{'s' if len(rows) > 1 else ''}", ("case", "problem", "fix"), rows))
        print_line(console, f"{error.what.splitlines()[0].rstrip(':')}. {error.fix}".strip(), "red")
        return
    print_line(console, str(error), "red")


def show_stopped(text: str) -> None:
    """What to do after Ctrl-C, on stderr."""
    print_line(console_on(sys.stderr), text, "yellow")


def filled(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table of plain text; long cells are folded, headings are not."""
    table = Table(title=title)
    for heading in headings:
        table.add_column(heading, overflow="fold", min_width=max(len(word) for word in heading.split()))
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


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


def console_on(stream: TextIO) -> Console:
    """Text is data here: no markup, no emoji, no colouring of what looks like a number. Results have to be written."""
    live, file = stream.isatty(), stream if stream is sys.stdout else cast(TextIO, _Forgiving(stream))
    width = None if live else PLAIN_WIDTH
    return Console(file=file, force_terminal=live, width=width, markup=False, emoji=False, highlight=False)


def print_line(console: Console, text: str, style: str = "") -> None:
    """One line, however long, as it is."""
    console.print(Text(text, style=style), soft_wrap=True)
