"""The command line: fast help, one clear sentence per user error, exit codes, durations."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Annotated

import pytest
import typer
from test_floors import SLOW
from typer.testing import CliRunner

from autoseg import cli
from autoseg.arguments import name_values, parse_length, watched
from autoseg.errors import EndedElsewhere, Interrupted, UserError
from autoseg.events import silent

COMMANDS = sorted(command.name or command.callback.__name__ for command in cli.app.registered_commands)  # type: ignore
DOCUMENTED = Path(__file__).parent.parent / "docs" / "reference" / "commands.md"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "autoseg", *arguments], capture_output=True, text=True, timeout=60)


@pytest.fixture
def step(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A stand-in for steps/preprocess.py, whose function the tests replace."""
    module = ModuleType("autoseg.steps.preprocess")
    monkeypatch.setitem(sys.modules, "autoseg.steps.preprocess", module)
    return module


HELPS = """
import sys, time
from autoseg.__main__ import main
for command in sys.argv[1:]:
    began, sys.argv = time.process_time(), ["autoseg", *command.split(), "--help"]
    try:
        main()
    except SystemExit as ended:
        print(ended.code, time.process_time() - began, file=sys.stderr)
print(*{name.split(".")[0] for name in sys.modules}, file=sys.stderr)
"""
NOTHING_BUT_TYPER = """
import typer
app = typer.Typer(rich_markup_mode=None)
@app.command()
def one(name: str = "") -> None:
    pass
@app.command()
def other(name: str = "") -> None:
    pass
app(["one", "--help"])
"""
BROUGHT_BY_TYPER = {"pydantic"}


@pytest.mark.skipif(sys.platform == "win32", reason="no resource usage of children")
def test_help_takes_hardly_longer_than_typer_alone_and_imports_nothing_heavy() -> None:
    """One process shows the help of all commands; all that it took but for the others is what the slowest one takes.

    Processor time, beside that of an application which does nothing: 0.3 of 0.35 s, mostly for imports.
    """
    ratios = []
    while len(ratios) < 5 and min(ratios, default=2.0) > 1.5:
        alone, _ = processor_seconds(NOTHING_BUT_TYPER)
        whole, ended = processor_seconds(HELPS, "", *COMMANDS)
        *rows, loaded = (line.split() for line in ended.stderr.splitlines())
        assert [code for code, _ in rows] == ["0"] * (len(COMMANDS) + 1), ended.stderr
        assert [command for command in COMMANDS if f"Usage: autoseg {command} " not in ended.stdout] == []
        assert not (SLOW - BROUGHT_BY_TYPER) & set(loaded)
        each = [float(seconds) for _, seconds in rows[1:]]  # the first one makes ready what all need
        ratios.append((whole - sum(each) + max(each)) / alone)
    assert min(ratios) <= 1.5


def processor_seconds(code: str, *words: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    import resource

    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    ended = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, ended


def test_options_without_a_name_of_their_own_are_given_that_of_the_parameter() -> None:
    own, other = typer.Option(help="Where."), typer.Option("--json", help="How.")

    def command(some_device: str | None = None, as_json: bool = False) -> None:
        pass

    command.__annotations__ = {"some_device": Annotated[str | None, own], "as_json": Annotated[bool, other]}
    name_values(command)
    assert own.param_decls == ("--some-device",)
    assert not other.param_decls


def test_the_version_is_printed() -> None:
    from autoseg import __version__

    assert run("--version").stdout.strip() == __version__


def test_every_command_and_option_is_in_the_reference() -> None:
    text = DOCUMENTED.read_text()
    for command in COMMANDS:
        assert f"## {command}" in text
        section = text.split(f"## {command}\n")[1].split("\n## ")[0]
        for parameter in typer.main.get_command(cli.app).commands[command].params:  # type: ignore[attr-defined]
            for option in parameter.opts:
                if option.startswith("--") and option != "--help":
                    assert f"`{option}" in section, f"{command} {option} is not documented"


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", 45), ("2M", 120)])
def test_durations_are_read_in_seconds(text: str, seconds: float) -> None:
    assert cli.parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "s", "ten", "-3m", "0s", "10d", "nan", "inf", "1e999h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a duration"):
        cli.parse_duration(text)


def test_a_bare_resume_means_yes() -> None:
    assert cli.with_resume_value(["train", "R", "--resume"]) == ["train", "R", "--resume=yes"]
    assert cli.with_resume_value(["train", "--resume", "R"]) == ["train", "--resume=yes", "R"]
    assert cli.with_resume_value(["train", "R", "--resume", "auto", "-f", "1"])[2:4] == ["--resume", "auto"]


def test_a_user_error_is_one_sentence_without_traceback_and_exit_code_2(tmp_path: Path) -> None:
    ended = run("train", str(tmp_path / "nowhere"), "--max-time", "soon")
    assert ended.returncode == 2
    assert ended.stderr.strip() == "'soon' is not a duration. Write it as 90s, 10m or 1.5h."
    assert ended.stdout == ""


def test_all_problems_of_a_data_set_are_shown_in_one_table(step: ModuleType, tmp_path: Path) -> None:
    class Problem:
        def __init__(self, case: str, what: str, fix: str) -> None:
            self.case, self.what, self.fix = case, what, fix

    class Bad(UserError):
        problems = (Problem("case_1", "no label", "add one"), Problem("case_[2]", "NaN", "remove it"))

    def fails(*_: object, **__: object) -> None:
        raise Bad("2 of 9 cases cannot be used:\n  case_1: no label\n", fix="Mend them.")

    step.preprocess = fails  # type: ignore[attr-defined]
    ended = CliRunner().invoke(cli.app, ["preprocess", str(tmp_path)])
    assert ended.exit_code == 2
    assert "2 of 9 cases cannot be used. Mend them." in ended.stderr
    for words in ("case_1", "no label", "add one", "case_[2]", "NaN", "remove it"):
        assert words in ended.stderr


def test_an_interrupted_step_says_how_to_go_on(step: ModuleType, tmp_path: Path) -> None:
    def stops(*_: object, **__: object) -> None:
        raise Interrupted("autoseg train RUN --resume")

    step.preprocess = stops  # type: ignore[attr-defined]
    ended = CliRunner().invoke(cli.app, ["preprocess", str(tmp_path)])
    assert ended.exit_code == 130
    assert "autoseg train RUN --resume" in ended.stderr


def test_ctrl_c_says_how_to_go_on(step: ModuleType, tmp_path: Path) -> None:
    def stops(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    step.preprocess = stops  # type: ignore[attr-defined]
    ended = CliRunner().invoke(cli.app, ["preprocess", str(tmp_path)])
    assert ended.exit_code == 130
    assert "run the same command again" in ended.stderr


def test_a_defect_keeps_its_traceback(step: ModuleType, tmp_path: Path) -> None:
    def breaks(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    step.preprocess = breaks  # type: ignore[attr-defined]
    ended = CliRunner().invoke(cli.app, ["preprocess", str(tmp_path)])
    assert ended.exit_code == 1
    assert isinstance(ended.exception, ZeroDivisionError)


def test_what_may_not_be_read_is_named(step: ModuleType, tmp_path: Path) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/data/images")

    step.preprocess = denied  # type: ignore[attr-defined]
    ended = CliRunner().invoke(cli.app, ["preprocess", str(tmp_path)])
    assert ended.exit_code == 2
    assert "/data/images: this cannot be read or written. Are its permissions right?" in ended.stderr


def test_an_ensemble_of_runs_goes_on_and_one_of_folders_takes_no_options_of_networks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen: list[bool] = []

    def stops(*_: object, resume: bool, **__: object) -> None:
        seen.append(resume)
        raise KeyboardInterrupt

    monkeypatch.setattr("autoseg.steps.ensemble.ensemble_runs", stops)
    words = ["ensemble", "--runs", "A", "B", "-i", str(tmp_path), "-o", "OUT"]
    for given in (words, [*words, "--resume"]):
        ended = CliRunner().invoke(cli.app, cli.with_resume_value(given))
        assert ended.exit_code == 130
        assert "the same command with --resume" in ended.stderr
    assert seen == [False, True]
    for given in ([*words, "--resume=foo"], ["predict", "A", "-i", str(tmp_path), "-o", "OUT", "--resume=foo"]):
        ended = CliRunner().invoke(cli.app, given)
        assert ended.exit_code == 2
        assert "--resume foo is none of yes, auto, no." in ended.stderr
    for option in (["-c", "3d"], ["--no-mirror"], ["--resume"], ["--device", "cpu"]):
        ended = CliRunner().invoke(cli.app, cli.with_resume_value(["ensemble", "A", "B", "-o", "OUT", *option]))
        assert ended.exit_code == 2
        assert "with --runs" in ended.stderr.replace("\n", " ")


def test_a_demo_prints_nothing_but_json_if_asked_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from autoseg.scoring.comparison import Agreement

    some = Agreement(members=("a", "b"), labels=(), cases=0, pairs=())
    monkeypatch.setattr("autoseg.steps.demo.demo", lambda *_, **__: (some, tmp_path / "picture.png"))
    ended = CliRunner().invoke(cli.app, ["demo", str(tmp_path), "--json"])
    assert json.loads(ended.stdout)["members"] == ["a", "b"]


@pytest.mark.parametrize("options", [["--memory", "24GB"], ["--spacing", "1,1,1"]])
def test_what_a_plan_is_made_with_is_not_ignored_where_one_is_shown(tmp_path: Path, options: list[str]) -> None:
    (tmp_path / "plan.json").touch()
    ended = CliRunner().invoke(cli.app, ["plan", str(tmp_path), *options])
    assert ended.exit_code == 2
    assert "autoseg plan DATA -o RUN" in ended.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("step", "arguments"), [("plan", ["DATA", "-o", "RUN"]), ("from_fingerprint", ["--fingerprint", "F"])]
)
def test_the_spacing_of_a_plan_reaches_the_planner(monkeypatch: pytest.MonkeyPatch, step: str, arguments: list) -> None:
    asked: list = []

    def planning(*_: object, spacing_mm: object, **__: object) -> None:
        asked.append(spacing_mm)
        raise Interrupted("-")

    monkeypatch.setattr(f"autoseg.steps.plan.{step}", planning)
    CliRunner().invoke(cli.app, ["plan", *arguments, "--spacing", "2,0.5,1"])
    assert asked == [(2.0, 0.5, 1.0)]


def test_commands_of_several_steps_go_on_by_themselves(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stops(*_: object, **__: object) -> None:
        raise Interrupted("autoseg train RUN --resume")

    monkeypatch.setattr("autoseg.steps.run.run", stops)
    ended = CliRunner().invoke(cli.app, ["run", str(tmp_path), "-o", str(tmp_path / "run")])
    assert ended.exit_code == 130
    assert "To go on: the same command again." in ended.stderr


def test_a_missing_argument_exits_with_code_2() -> None:
    assert CliRunner().invoke(cli.app, ["train"]).exit_code == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("postprocess RUN -i PRED", "-i and -o go together"),
        ("postprocess RUN -i PRED -o OUT -c 2d", "are for learning: without -i"),
        ("postprocess RUN -i PRED -o OUT --no-test", "are for learning: without -i"),
        ("postprocess RUN -i PRED -o OUT --json", "are for learning: without -i"),
        ("evaluate PRED REF -c 3d", "--speeds and -c go with a run folder alone"),
        ("evaluate RUN --device cpu", "--device goes with --speeds"),
        ("plan --fingerprint FILE --skip-bad", "--skip-bad leaves out files, and a fingerprint has none"),
        ("train RUN --cache 2", "--cache 2 is not an amount of memory"),
    ],
)
def test_options_that_would_do_nothing_are_refused(words: str, message: str) -> None:
    ended = CliRunner().invoke(cli.app, words.split())
    assert ended.exit_code == 2
    assert message in " ".join(ended.stderr.split())


def test_the_public_names_are_those_of_the_package() -> None:
    import autoseg

    assert set(autoseg.PUBLIC) | {"__version__"} == set(autoseg.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        autoseg.nonsense  # noqa: B018


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        (("no", False, None, 5, None), ("no", 5, None)),
        (("auto", False, None, None, 60.0), ("auto", None, 60.0)),
        (("no", True, None, None, None), ("restart", None, None)),
        (("no", False, "200", None, None), ("extend", 200, None)),
        (("no", False, "1.5h", None, None), ("extend", None, 5400.0)),
    ],
)
def test_a_training_is_resumed_extended_or_restarted(given: tuple, meant: tuple) -> None:
    assert parse_length(*given) == meant


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("yes", True, None, None, None), "--restart begins anew"),
        (("no", True, "200", None, None), "--restart begins anew"),
        (("no", False, "200", 300, None), "so do --epochs and --max-time"),
        (("no", False, "long", None, None), "not a duration"),
        (("no", False, None, 300, 60.0), "--epochs and --max-time both"),
    ],
)
def test_contradicting_lengths_are_refused(given: tuple, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_length(*given)


def test_of_several_processes_only_the_first_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "1")
    with watched(together=True) as report:
        assert report is silent

    def follow() -> None:
        with watched(together=True):
            raise EndedElsewhere

    with pytest.raises(typer.Exit):
        follow()
    assert capsys.readouterr().err == ""
    with pytest.raises(typer.Exit), watched(together=True):
        raise EndedElsewhere("NCCL error: unhandled cuda error")
    assert "unhandled cuda error" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("RANK", "0")
    with watched(together=True) as report:
        assert report is not silent
    with pytest.raises(typer.Exit):
        follow()
    assert "Another process of this training has ended" in " ".join(capsys.readouterr().err.split())
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(typer.Exit), watched():
        pass
    assert "can only train together" in capsys.readouterr().err
