"""The commands. Each parses its options and calls one function of `steps/`, imported only then: `--help` stays fast."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoseg.errors import EndedElsewhere, Interrupted, UserError
from autoseg.events import Report, silent
from autoseg.layout import Layout
from autoseg.parallel import torchrun_setting

if TYPE_CHECKING:
    from pydantic import BaseModel

app = typer.Typer(
    name="autoseg",
    help="From a folder of images with label maps to a trained segmentation pipeline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RunFolder = Annotated[Path, typer.Argument(help="Folder of the run (made by `autoseg plan`).", show_default=False)]
DataFolder = Annotated[
    Path, typer.Argument(help="Decathlon folder, nnU-Net raw folder, or images/ + labels/.", show_default=False)
]
ConfigurationName = Annotated[
    str | None, typer.Option("--configuration", "-c", help="Name in the plan, such as 2d or 3d. [default: 3d, else 2d]")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. [default: the GPU, else the CPU]")]
Workers = Annotated[int | None, typer.Option(min=1, help="Processes for reading and preparing. [default: all cores]")]
MaxTime = Annotated[
    str | None, typer.Option("--max-time", help="Training ends on time: 90s, 10m, 1.5h.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON instead of a table.")]
Output = Annotated[Path, typer.Option("--output", "-o", help="Folder to write to.", show_default=False)]


@app.command()
def plan(
    data: Annotated[
        Path | None, typer.Argument(help="Decathlon folder, nnU-Net raw folder, images/ + labels/, or a planned run.")
    ] = None,
    run: Annotated[Path | None, typer.Option("--output", "-o", help="Folder of the run.", show_default=False)] = None,
    fingerprint: Annotated[
        Path | None, typer.Option(help="Plan from this fingerprint.json instead of data.", show_default=False)
    ] = None,
    memory: Annotated[
        str | None, typer.Option(help="Budget to plan for, such as 11GB. [default: what the device has]")
    ] = None,
    device: Device = None,
    preset: Annotated[str, typer.Option(help="standard, or the residual M, L, XL.")] = "standard",
    workers: Workers = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty cases out instead of stopping.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every decision with its reason; also of a run planned before.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Check the data, take its fingerprint and decide on everything: spacing, patch, network, batch."""
    with _watched() as report:
        from autoseg.steps import plan as step

        if (data is None) == (fingerprint is None):
            raise UserError("Planning needs either a data folder or --fingerprint.")
        if data is not None and run is None and Layout(data).plan.is_file():
            made = step.checked(data)
        elif data is not None and run is None:
            raise UserError("Where shall the run be written?", fix="Name a folder: -o RUN.")
        elif data is not None and run is not None:
            made = step.plan(
                data, run, memory=memory, device=device, preset=preset, workers=workers, skip_bad=skip_bad,
                report=report,
            )  # fmt: skip
        elif fingerprint is not None:
            made = step.from_fingerprint(
                fingerprint, run, memory=memory, device=device, preset=preset, report=report
            )
    _show(made, as_json, explain)


@app.command()
def preprocess(run: RunFolder, configuration: ConfigurationName = None, workers: Workers = None) -> None:
    """Crop, normalize and resample every case into the run's cache. An interrupted run continues."""
    with _watched() as report:
        from autoseg.steps.preprocess import preprocess as step

        step(run, configuration=configuration, workers=workers, report=report)


@app.command()
def train(
    run: RunFolder,
    configuration: ConfigurationName = None,
    fold: Annotated[str, typer.Option("--fold", "-f", help="0 to 4, or all.")] = "0",
    seed: Annotated[int, typer.Option(help="Another seed trains another network beside the first.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs. [default: the plan's]")] = None,
    max_time: MaxTime = None,
    resume: Annotated[
        str, typer.Option(help="Continue where this training stopped; `auto` starts it where there is nothing yet.")
    ] = "no",
    extend_to: Annotated[
        str | None, typer.Option(help="Go on to so many epochs (200) or so much time (1.5h).", show_default=False)
    ] = None,
    restart: Annotated[bool, typer.Option("--restart", help="Overwrite a training that is there.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="Train so many, from --seed on, one after another.")] = 1,
    init: Annotated[
        str | None, typer.Option(help="Begin with the weights of this run or model.", show_default=False)
    ] = None,
    freeze: Annotated[str | None, typer.Option(help="encoder: keep its weights as --init gives them.")] = None,
    loss: Annotated[str | None, typer.Option(help="Loss by name. [default: the plan's]")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Patches per step. [default: the plan's]")] = None,
    learning_rate: Annotated[float | None, typer.Option("--lr", help="Learning rate. [default: the plan's]")] = None,
    precision: Annotated[str | None, typer.Option(help="bf16, fp16 or fp32. [default: the device's best]")] = None,
    deterministic: Annotated[
        bool | None, typer.Option("--deterministic", help="Only kernels that repeat their results.", show_default=False)
    ] = None,
    device: Device = None,
    workers: Workers = None,
    cache: Annotated[
        str | None, typer.Option(help="Memory for preprocessed cases, such as 2GB. [default: a quarter]")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write for TensorBoard.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one network on one fold and score it on the cases it has not seen."""
    with _watched() as report:
        how, epochs, max_seconds = _length(resume, restart, extend_to, epochs, _seconds(max_time))
        from autoseg.network.memory import parse_bytes
        from autoseg.steps.options import Machine, Options
        from autoseg.steps.train import train_seeds as step

        asked = Options(epochs, max_seconds, loss, batch_size, learning_rate, precision, deterministic, init, freeze)
        limit = None if cache is None else parse_bytes(cache)
        ended = step(
            run, range(seed, seed + seeds), configuration=configuration, fold=fold, resume=how, asked=asked,
            machine=Machine(device, workers, limit, tensorboard), report=report,
        )  # fmt: skip
    for each in ended if _is_first() else ():
        _show(each, as_json)


@app.command()
def predict(
    run: RunFolder,
    images: Annotated[Path, typer.Option("--input", "-i", help="Folder of images, named as the training images.")],
    output: Output,
    configuration: ConfigurationName = None,
    folds: Annotated[
        str | None, typer.Option(help="Folds to average, such as 0,1,2. [default: all that are trained]")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to average. [default: all that are trained]")] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write class probabilities, for `ensemble`.")
    ] = False,
    no_postprocess: Annotated[bool, typer.Option("--no-postprocess", help="Leave the learned rules out.")] = False,
    no_mirror: Annotated[bool, typer.Option("--no-mirror", help="No mirroring: faster, a little less exact.")] = False,
    device: Device = None,
) -> None:
    """Segment images; the label maps lie on the grid of their images."""
    with _watched() as report:
        from autoseg.steps.predict import predict as step

        step(
            run, images, output, configuration=configuration, folds=_names(folds), seeds=_numbers(seeds, "--seeds"),
            save_probabilities=save_probabilities, postprocess=not no_postprocess, mirroring=not no_mirror,
            device=device, report=report,
        )  # fmt: skip


@app.command()
def ensemble(
    predictions: Annotated[list[Path], typer.Argument(help="Folders written by predict --save-probabilities.")],
    output: Output,
    weights: Annotated[str | None, typer.Option(help="One weight per folder, such as 2,1. [default: equal]")] = None,
    method: Annotated[
        str | None, typer.Option(help="mean, vote or staple. [default: mean where all have probabilities, else vote]")
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write the averaged probabilities.")
    ] = False,
) -> None:
    """Average the probabilities of several prediction folders."""
    with _watched() as report:
        from autoseg.steps.ensemble import ensemble as step

        step(
            predictions, output, weights=_decimals(weights, "--weights"), method=method,
            save_probabilities=save_probabilities, report=report,
        )  # fmt: skip


@app.command()
def postprocess(
    run: RunFolder,
    predictions: Annotated[
        Path | None, typer.Option("--input", "-i", help="Apply the learned rules to this folder.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the results go (with -i).", show_default=False)
    ] = None,
    configuration: ConfigurationName = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Learn on the cross-validation which small components to remove; with -i and -o, apply what was learned."""
    if (predictions is None) != (output is None):
        raise typer.BadParameter("-i and -o go together; leave both out to learn the rules")
    with _watched() as report:
        from autoseg.steps.postprocess import postprocess_apply, postprocess_learn

        if predictions is not None and output is not None:
            postprocess_apply(run, predictions, output, workers=workers, report=report)
            return
        learned = postprocess_learn(run, configuration, workers=workers, report=report)
    _show(learned, as_json)


@app.command()
def evaluate(
    predictions: Annotated[Path, typer.Argument(help="Folder of predicted label maps.", show_default=False)],
    references: Annotated[Path, typer.Argument(help="Folder of reference label maps, or a run folder.")],
    no_surface: Annotated[bool, typer.Option("--no-surface", help="Skip the surface distances: faster.")] = False,
    tolerance_mm: Annotated[float, typer.Option("--tolerance", min=0, help="Of the surface Dice, in mm.")] = 1.0,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Score label maps against references; writes scores.json into the folder of predictions."""
    with _watched() as report:
        from autoseg.steps.evaluate import evaluate as step

        scores = step(
            predictions, references, surface=not no_surface, tolerance_mm=tolerance_mm, workers=workers, report=report
        )
    _show(scores, as_json)


@app.command()
def compare(
    scores: Annotated[list[Path], typer.Argument(help="Two or more scored folders, or their scores.json.")],
    metrics: Annotated[
        str | None, typer.Option(help="Such as dice,hd95_mm. [default: Dice, surface Dice, HD95]")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the comparison and its picture.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Compare methods scored on the same cases: differences, their intervals, and which are more than chance."""
    with _watched() as report:
        from autoseg.steps.compare import compare as step

        found = step(*scores, metrics=_names(metrics), output=output, report=report)
    _show(found, as_json)


@app.command()
def distill(
    run: RunFolder,
    teachers: Annotated[
        str, typer.Option("--from", help="seeds, folds, fold_0..4, fold_0.seed_1 or other runs; joined by commas.")
    ] = "seeds",
    student: Annotated[str, typer.Option(help="standard, small (half the channels) or tiny (a quarter).")] = "small",
    configuration: ConfigurationName = None,
    fold: Annotated[str, typer.Option("--fold", "-f", help="0 to 4, or all.")] = "0",
    seed: Annotated[int, typer.Option(help="Another seed trains another student beside the first.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs. [default: the plan's]")] = None,
    max_time: MaxTime = None,
    temperature: Annotated[float, typer.Option(help="How soft the teachers' probabilities are made.")] = 2.0,
    labels: Annotated[float, typer.Option(min=0, max=1, help="Weight of the true labels, the rest is taught.")] = 0.5,
    unlabelled: Annotated[
        Path | None, typer.Option(help="Folder of images to learn from what is taught.", show_default=False)
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also train it on the labels alone.")] = False,
    device: Device = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Train one small network to do what an ensemble does, and compare it with its teachers."""
    with _watched() as report:
        max_seconds = _seconds(max_time)
        from autoseg.steps.distill import distill as step

        ended = step(
            run, teachers=_names(teachers) or (), student=student, configuration=configuration, fold=fold, seed=seed,
            epochs=epochs, max_seconds=max_seconds, temperature=temperature, labels_weight=labels,
            unlabelled=unlabelled, baseline=baseline, device=device, workers=workers, report=report,
        )  # fmt: skip
    _show(ended, as_json)


@app.command()
def study(
    run: RunFolder,
    vary: Annotated[list[str], typer.Option("--vary", help="Such as loss=ce,dice; several make a grid.")],
    seeds: Annotated[int, typer.Option(min=1, help="Trainings per setting.")] = 3,
    epochs: Annotated[int | None, typer.Option(min=1, help="Length of every training.", show_default=False)] = None,
    max_time: MaxTime = None,
    configuration: ConfigurationName = None,
    fold: Annotated[str, typer.Option("--fold", "-f", help="0 to 4.")] = "0",
    fixed: Annotated[
        list[str] | None, typer.Option("--set", help="Set for all, such as batch_size=2.", show_default=False)
    ] = None,
    name: Annotated[str | None, typer.Option(help="Of the study's folder. [default: the varied fields]")] = None,
    device: Annotated[
        str | None, typer.Option(help="One or several, such as cuda:0,cuda:1. [default: all GPUs, else the CPU]")
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Train a grid of settings, each with several seeds and of equal length, and test which differences are real."""
    with _watched() as report:
        max_seconds = _seconds(max_time)
        from autoseg.steps.study import study as step

        ended = step(
            run, vary, seeds=seeds, epochs=epochs, max_seconds=max_seconds, configuration=configuration, fold=fold,
            fixed=fixed or (), name=name, devices=_names(device), workers=workers, report=report,
        )  # fmt: skip
    _show(ended, as_json)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo's files go.")] = Path("demo"),
    max_time: Annotated[str, typer.Option("--max-time", help="Time for each of the two trainings.")] = "50s",
) -> None:
    """Make a small synthetic data set and take it through the whole pipeline, in under five minutes on 2 cores."""
    with _watched() as report:
        from autoseg.steps.demo import demo as step

        scores, picture = step(folder, max_seconds=parse_duration(max_time), report=report)
    _show(scores)
    sys.stdout.write(f"Image, reference and prediction side by side: {picture}\n")


@app.command()
def run(
    data: DataFolder,
    run: Annotated[Path, typer.Option("--output", "-o", help="Folder of the run.", show_default=False)],
    max_time: MaxTime = None,
    configuration: ConfigurationName = None,
    folds: Annotated[str, typer.Option(help="Folds to train, such as 0,1,2,3,4.")] = "0",
    memory: Annotated[str | None, typer.Option(help="Budget to plan for, such as 11GB.", show_default=False)] = None,
    device: Device = None,
    workers: Workers = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty cases out instead of stopping.")] = False,
    as_json: AsJson = False,
) -> None:
    """Plan, preprocess, train, postprocess and evaluate. What is finished is not done again."""
    with _watched() as report:
        max_seconds = _seconds(max_time)
        from autoseg.steps.run import run as step

        scores = step(
            data, run, max_seconds=max_seconds, folds=_names(folds) or ("0",), configuration=configuration,
            memory=memory, device=device, workers=workers, skip_bad=skip_bad, report=report,
        )  # fmt: skip
    _show(scores, as_json)


def main() -> None:
    """Entry point of the `autoseg` command."""
    app(with_resume_value(sys.argv[1:]))


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from autoseg import __version__

        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


@contextmanager
def _watched() -> Iterator[Report]:
    """Show the events of a step, and turn the errors meant for the user into a sentence and an exit code."""
    from autoseg import screen

    first = _is_first()
    try:
        if first:
            with screen.screen() as report:
                yield report
        else:
            yield silent
    except EndedElsewhere as error:
        if first:
            screen.show_error(error)
        raise typer.Exit(2) from error
    except UserError as error:
        screen.show_error(error)
        raise typer.Exit(2) from error
    except Interrupted as stopped:
        if first:
            screen.show_stopped(f"Stopped; everything is saved. To go on: {stopped.how_to_resume}")
        raise typer.Exit(130) from stopped
    except KeyboardInterrupt as stopped:
        screen.show_stopped("Stopped; run the same command again to continue.")
        raise typer.Exit(130) from stopped


def _is_first() -> bool:
    """Whether this process is the one that speaks; torchrun starts several with the same command."""
    return torchrun_setting("RANK", 0) == 0


def with_resume_value(arguments: Sequence[str]) -> list[str]:
    """Put the value `yes` behind a bare `--resume`: parsers know options with a value or without, not both."""
    filled = []
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        filled.append(f"{here}=yes" if here == "--resume" and following not in ("yes", "no", "auto") else here)
    return filled


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


def _length(
    resume: str, restart: bool, extend_to: str | None, epochs: int | None, max_seconds: float | None
) -> tuple[str, int | None, float | None]:
    """How to resume, and to how many epochs or seconds; raises UserError where options contradict each other."""
    if restart and (extend_to is not None or resume != "no"):
        raise UserError("--restart begins anew, --resume and --extend-to go on.", fix="Give one of them.")
    if extend_to is None:
        return "restart" if restart else resume, epochs, max_seconds
    if epochs is not None or max_seconds is not None:
        raise UserError("--extend-to says how long the training shall be, and so do --epochs and --max-time.")
    whole = extend_to.strip().isdigit()
    return "extend", int(extend_to) if whole else None, None if whole else parse_duration(extend_to)


def _seconds(text: str | None) -> float | None:
    return None if text is None else parse_duration(text)


def _names(text: str | None) -> tuple[str, ...] | None:
    return None if text is None else tuple(part.strip() for part in text.split(",") if part.strip())


def _numbers(text: str | None, option: str) -> tuple[int, ...] | None:
    try:
        return None if text is None else tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text}: not whole numbers.", fix="Write them as 0,1,2.") from error


def _decimals(text: str | None, option: str) -> tuple[float, ...] | None:
    try:
        return None if text is None else tuple(float(part) for part in text.split(","))
    except ValueError as error:
        raise UserError(f"{option} {text}: not numbers.", fix="Write them as 2,1.") from error


def _show(result: "BaseModel", as_json: bool = False, explain: bool = False) -> None:
    if as_json:
        sys.stdout.write(json.dumps(result.model_dump(mode="json"), indent=1) + "\n")
    else:
        from autoseg import screen

        screen.show(result, explain)


UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}
