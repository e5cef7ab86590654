"""What commands share: options, how values are written, results and errors shown."""

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_type_hints

import typer
from typer.models import OptionInfo

from autoseg.errors import STOPPED, EndedElsewhere, Interrupted, UserError
from autoseg.events import Report, silent
from autoseg.parallel import torchrun_setting

if TYPE_CHECKING:
    from pydantic import BaseModel

RunFolder = Annotated[Path, typer.Argument(help="Folder of the run (made by `autoseg plan`).", show_default=False)]
DataFolder = Annotated[
    Path, typer.Argument(help="Decathlon folder, nnU-Net raw folder, or images/ + labels/.", show_default=False)
]
ConfigurationName = Annotated[
    str | None, typer.Option("--configuration", "-c", help="Name in the plan, such as 2d or 3d. [default: 3d, else 2d]")
]
Trained = Annotated[
    str | None,
    typer.Option("--configuration", "-c", help="Such as 3d. [default: what was selected, else the best guess]"),
]
Validated = Annotated[
    str | None,
    typer.Option("--configuration", "-c", help="Such as 3d. [default: the only validated one, else the selected]"),
]
Prepared = Annotated[
    str | None, typer.Option("--configuration", "-c", help="Name in the plan, such as 2d or 3d. [default: all]")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or mps. [default: the GPU, else the CPU]")]
Fold = Annotated[
    str,
    typer.Option("--fold", "-f", help="Number of a fold (0 to 4 unless the data set has its own), or all."),
]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes for reading and preparing. [default: all cores]")]
MaxTime = Annotated[
    str | None, typer.Option("--max-time", help="Training ends on time: 90s, 10m, 1.5h.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.", show_default=False)]


@contextmanager
def watched(together: bool = False) -> Iterator[Report]:
    """Show the events of a step, and turn the errors meant for the user into a sentence and an exit code.

    `together` says that several processes of torchrun may do this step as one; else they are refused.
    """
    from autoseg import screen

    first = is_first_process()
    try:
        if not together and torchrun_setting("WORLD_SIZE", 1) > 1:
            raise EndedElsewhere if not first else UserError(
                "Several processes can only train together.", fix="Run this command without torchrun."
            )
        if first:
            with screen.screen() as report:
                yield report
        else:
            yield silent
    except EndedElsewhere as error:
        if first or error.reason:
            screen.show_error(error)
        raise typer.Exit(2) from error
    except UserError as error:
        screen.show_error(error)
        raise typer.Exit(2) from error
    except PermissionError as error:
        if error.filename is None:
            raise
        denied = UserError(f"{error.filename}: this cannot be read or written.", fix="Are its permissions right?")
        screen.show_error(denied)
        raise typer.Exit(2) from error
    except Interrupted as stopped:
        if first:
            screen.show_stopped(f"Stopped; everything is saved. To go on: {stopped.how_to_resume}")
        raise typer.Exit(STOPPED) from stopped
    except KeyboardInterrupt as stopped:
        screen.show_stopped("Stopped; run the same command again to continue.")
        raise typer.Exit(STOPPED) from stopped


@contextmanager
def of_several_steps() -> Iterator[None]:
    """For commands of several steps, which go on where they were: what one of them says of itself is not enough."""
    try:
        yield
    except Interrupted as stopped:
        raise Interrupted("the same command again.") from stopped


def name_values(command: Callable[..., None] | None) -> None:
    """Let `--help` call what an option takes by its word in `WORDS`, not by its Python type.

    Options are given the names that they would take anyway: typer 0.27 leaves out those of which the word is the name.
    """
    for name, hint in get_type_hints(command, include_extras=True).items() if command else ():
        for declared in getattr(hint, "__metadata__", ()):
            declared.metavar = declared.metavar or WORDS.get(name)
            named = isinstance(declared, OptionInfo) and (declared.param_decls or isinstance(declared.default, str))
            if isinstance(declared, OptionInfo) and not named:
                declared.param_decls = (f"--{name.replace('_', '-')}",)


def is_first_process() -> bool:
    """Whether this process is the one that speaks; torchrun starts several with the same command."""
    return torchrun_setting("RANK", 0) == 0


def parse_length(
    resume: str, restart: bool, extend_to: str | None, epochs: int | None, max_seconds: float | None
) -> tuple[str, int | None, float | None]:
    """How to resume, and to how many epochs or seconds; raises UserError where options contradict each other."""
    if restart and (extend_to is not None or resume != "no"):
        raise UserError("--restart begins anew, --resume and --extend-to go on.", fix="Give one of them.")
    if epochs is not None and max_seconds is not None:
        raise UserError("--epochs and --max-time both say how long the training shall be.", fix="Give one of them.")
    if extend_to is None:
        return "restart" if restart else resume, epochs, max_seconds
    if epochs is not None or max_seconds is not None:
        raise UserError("--extend-to says how long the training shall be, and so do --epochs and --max-time.")
    whole = extend_to.strip().isdigit()
    return "extend", int(extend_to) if whole else None, None if whole else parse_duration(extend_to)


def resumes(text: str) -> bool:
    """Whether --resume was given, bare (`with_resume_value` in cli.py) or as auto; raises UserError for other words."""
    if text not in ("yes", "auto", "no"):
        raise UserError(f"--resume {text} is none of yes, auto, no.")
    return text != "no"


def parse_duration(text: str) -> float:
    """Seconds of a duration such as "90s", "10m" or "1.5h"; a bare number is seconds. Raises UserError otherwise."""
    unit = UNITS.get(text[-1:].lower())
    digits = text[:-1] if unit else text
    try:
        seconds = float(digits) * (unit or 1.0)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds < float("inf"):
        raise UserError(f"{text!r} is not a duration.", fix="Write it as 90s, 10m or 1.5h.")
    return seconds


def seconds(text: str | None) -> float | None:
    """`parse_duration`, or None."""
    return None if text is None else parse_duration(text)


def names(text: str | None) -> tuple[str, ...] | None:
    """The parts between commas, or None."""
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    """Whole numbers between commas, or None. Raises UserError that names the option."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text}: not whole numbers.", fix="Write them as 0,1,2.") from error


def decimals(text: str | None, option: str) -> tuple[float, ...] | None:
    """Numbers between commas, or None. Raises UserError that names the option."""
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text}: not numbers.", fix="Write them as 2,1.") from error


def tolerances(text: str | None, default_mm: float) -> "float | dict[str, float]":
    """Millimetres for all labels ("3"), or by name ("liver=3,tumour=1")."""
    parts = [part.rpartition("=") for part in (text or str(default_mm)).split(",")]
    try:
        by_name = {name.strip(): float(value) for name, _, value in parts}
    except ValueError as error:
        raise UserError(f"--tolerance {text}: not millimetres.", fix="Write 3, or liver=3,tumour=1.") from error
    return by_name[""] if set(by_name) == {""} else by_name


def show_all(results: "Mapping[str, BaseModel]", as_json: bool, named: bool = True) -> None:
    """Show one result as it is, several under their names, or without them unless `named`."""
    if as_json and len(results) > 1:
        content = {name: result.model_dump(mode="json") for name, result in results.items()}
        sys.stdout.write(json.dumps(content, indent=1) + "\n")
        return
    for name, result in results.items():
        if named and name and not as_json:
            sys.stdout.write(f"{name}:\n")
        show(result, as_json)


def show(result: "BaseModel", as_json: bool = False, explain: bool = False) -> None:
    """Print a record as JSON, or as the screen shows it."""
    if as_json:
        sys.stdout.write(json.dumps(result.model_dump(mode="json"), indent=1) + "\n")
    else:
        from autoseg import tables

        tables.show(result, explain)


WORDS = {
    "batch_size": "N", "cache": "SIZE", "checkpoint": "FILE", "classes": "NAMES", "configuration": "NAME",
    "connectivity": "N", "data": "DATA", "device": "DEVICE", "epochs": "N", "extend_to": "LENGTH",
    "fingerprint": "FILE", "fixed": "FIELD=VALUE", "fold": "FOLD", "folder": "FOLDER", "folds": "FOLDS",
    "fraction": "SHARE", "freeze": "PART", "images": "FOLDER", "init": "RUN", "labels": "WEIGHT",
    "learning_rate": "RATE", "loss": "NAME", "max_time": "TIME", "memory": "SIZE", "method": "NAME",
    "metrics": "NAMES", "model": "MODEL", "name": "NAME", "on_error": "WHAT", "output": "FOLDER", "part": "K/N",
    "precision": "NAME", "predictions": "PREDICTIONS", "preset": "NAME", "probability_kind": "KIND",
    "references": "REFERENCES", "resume": "[auto]", "run": "RUN", "sampling": "MODE", "scores": "SCORES", "seed": "N",
    "seeds": "N", "spacing": "MM", "speed": "NAME", "student": "SIZE", "teachers": "NAMES", "temperature": "T",
    "tolerance": "MM", "unlabelled": "FOLDER", "vary": "FIELD=VALUES", "weights": "NUMBERS", "workers": "N",
}  # fmt: skip
"""Parameter of a command -> what `--help` calls its value."""

UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
