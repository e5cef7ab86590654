"""What the screen shows for the events of the steps, and how errors are said."""

import io
import math

import pytest

from autoseg import screen, tables
from autoseg.errors import UserError
from autoseg.events import Advanced, Event, Finished, Said, Started, Trained, Warned


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Full(io.StringIO):
    """A log on a disk that is full, or with `live` a terminal that is gone."""

    def __init__(self, live: bool = False) -> None:
        super().__init__()
        self.live = live

    def write(self, text: str) -> int:
        raise OSError(5 if self.live else 28, "cannot be written")

    def flush(self) -> None:
        raise OSError(28, "cannot be written")

    def isatty(self) -> bool:
        return self.live


class Clock:
    """Time that passes only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def shown(events: list[tuple[float, Event]]) -> list[str]:
    stream, clock = io.StringIO(), Clock()
    with screen.screen(stream, clock) as report:
        for at, event in events:
            clock.now = at
            report(event)
    return stream.getvalue().splitlines()


def test_work_is_announced_when_it_begins_and_ends() -> None:
    lines = shown([(0, Started("checking", 3)), (75, Advanced("checking", 3, 3)), (75, Finished("checking"))])
    assert lines == ["checking: 3 to do", "checking: 3/3", "checking: done, 3 in 1 min 15 s"]


def test_lines_in_between_are_few() -> None:
    events: list[tuple[float, Event]] = [(0.01 * k, Advanced("checking", k, 1000)) for k in range(1000)]
    assert len(shown(events)) <= 3


def test_work_that_never_began_ends_without_a_line() -> None:
    """As the tiles of a slow image, which are of interest only while they go on."""
    assert shown([(0, Advanced("tiles of a", 1, 3)), (9, Finished("tiles of a"))]) == ["tiles of a: 1/3"]


def test_the_last_epoch_is_always_shown() -> None:
    lines = shown([(0, Trained(1, 2, 5, 5, {"loss": 1.0})), (1, Trained(2, 2, 5, 5, {"loss": 0.5}))])
    assert lines[-1] == "epoch 2/2  step 5/5  loss 0.5"


def test_figures_have_the_form_of_what_they_are() -> None:
    figures = {"loss": 0.123456, "foreground_dice": 0.98765, "seconds_left": 200.0, "images_per_second": 3.21}
    figures["wait_share"] = 0.25
    [line] = shown([(0, Trained(1, 9, 1, 5, figures))])
    assert "loss 0.1235  foreground dice 0.988  time left 3 min 20 s  images per second 3.21  wait share 25 %" in line


def test_a_figure_that_is_not_known_is_a_dash() -> None:
    [line] = shown([(0, Trained(1, 9, 1, 5, {"loss": math.nan}))])
    assert line.endswith("loss -")


def test_text_is_not_taken_for_markup_and_long_lines_are_not_broken() -> None:
    text = "case [bold]x[/bold] :smile: " + "y" * 500
    assert shown([(0, Said(text)), (0, Warned(text))]) == [text, f"warning: {text}"]


def test_there_are_no_control_codes_where_there_is_no_terminal() -> None:
    lines = shown([(0, Started("a", 2)), (9, Advanced("a", 1, 2)), (9, Trained(1, 1, 1, 1, {})), (9, Warned("b"))])
    assert "\x1b" not in "".join(lines)


def test_a_terminal_shows_bars_and_figures() -> None:
    stream = Terminal()
    with screen.screen(stream) as report:
        report(Started("checking", 4))
        report(Advanced("checking", 2, 4, "case_02"))
        report(Trained(3, 9, 1, 5, {"loss": 0.25}))
        report(Said("one line"))
    text = stream.getvalue()
    assert "\x1b" in text
    assert "one line" in text


@pytest.mark.parametrize("live", [False, True])
def test_progress_that_cannot_be_written_is_lost_but_results_are_not(
    live: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with screen.screen(Full(live)) as report:
        for event in (Started("validate", 2), Said("said"), Warned("warned"), Finished("validate")):
            report(event)
    monkeypatch.setattr("sys.stderr", Full(live))
    screen.show_stopped("stopped")
    screen.show_error(UserError("wrong"))
    monkeypatch.setattr("sys.stdout", Full(live))
    with pytest.raises(OSError, match="cannot be written"):
        tables.say("a result")


def test_the_panel_holds_the_work_under_way_and_nothing_that_is_over() -> None:
    panel = screen._Panel(screen.console_on(io.StringIO()))
    panel.show(Started("checking", 4))
    panel.show(Advanced("checking", 2, 4, "case_02"))
    panel.show(Trained(3, 9, 1, 5, {"loss": 0.25}))
    stream = io.StringIO()
    screen.console_on(stream).print(panel.render())
    assert all(words in stream.getvalue() for words in ("checking", "2/4", "case_02", "epoch 3/9", "0.25"))
    panel.show(Finished("checking"))
    assert not panel.bars.tasks


def test_work_of_unknown_length_is_not_counted_against_a_question_mark() -> None:
    panel = screen._Panel(screen.console_on(io.StringIO()))
    for event in (Started("planning"), Advanced("measuring", 2, 0, "small"), Advanced("reading", 3, 7)):
        panel.show(event)
    stream = io.StringIO()
    screen.console_on(stream).print(panel.render())
    assert all(words in stream.getvalue() for words in ("planning", "2", "small", "3/7"))
    assert "?" not in stream.getvalue()


def test_words_of_headings_stay_whole_on_a_narrow_screen(capsys: pytest.CaptureFixture[str]) -> None:
    names = ("configuration", "patch", "batch", "parameters", "step", "receptive field", "memory", "epoch, roughly")
    row = ("3d", "24 x 32 x 28", "2", "1.4 M", "0.0483 TFLOP", "23 x 23 x 23", "0.70 GB", "24 s")
    screen.Console(width=100).print(screen.filled("Networks", names, [row]))
    shown_table = capsys.readouterr().out
    assert all(word in shown_table for name in names for word in name.split())


def test_an_error_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    screen.show_error(UserError("case_07 is empty.", fix="Remove it."))
    caught = capsys.readouterr()
    assert caught.out == ""
    assert caught.err == "case_07 is empty. Remove it.\n"


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.0123, "12.3 ms"), (0.42, "0.4 s"), (12.4, "12 s"), (59.7, "1 min 00 s"), (200, "3 min 20 s"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, words: str) -> None:
    assert screen.duration(seconds) == words
