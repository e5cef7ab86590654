"""The commands plan, train, predict and others: each parses options, calls a step.

A step is one function of `steps/`, imported only then: `--help` stays fast.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from autoseg import cli_scores
from autoseg.arguments import (
    AsJson,
    ConfigurationName,
    DataFolder,
    Device,
    Fold,
    MaxTime,
    Output,
    Prepared,
    RunFolder,
    Trained,
    Workers,
    is_first_process,
    name_values,
    of_several_steps,
    parse_duration,
    parse_length,
    show_all,
)
from autoseg.arguments import decimals as _decimals
from autoseg.arguments import names as _names
from autoseg.arguments import numbers as _numbers
from autoseg.arguments import resumes as _resumes
from autoseg.arguments import seconds as _seconds
from autoseg.arguments import show as _show
from autoseg.arguments import watched as _watched
from autoseg.errors import Interrupted, UserError
from autoseg.layout import Layout

app = typer.Typer(
    name="autoseg",
    help="From a folder of images with label maps to a trained segmentation pipeline.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


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
    spacing: Annotated[
        str | None,
        typer.Option(help="Grid in mm, Z,Y,X of the files, such as 2,0.5,0.5. [default: chosen from the data]"),
    ] = None,
    workers: Workers = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave faulty cases out instead of stopping.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Print every decision with its reason; also of a run planned before.")
    ] = False,
    edit: Annotated[
        list[str] | None,
        typer.Option(help="Change a planned run, such as 3d.patch_voxels=48,64,48; repeatable.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check the data, take its fingerprint, plan the networks."""
    with _watched() as report:
        from autoseg.steps import plan as step

        if (data is None) == (fingerprint is None):
            raise UserError("Planning needs either a data folder or --fingerprint.")
        if fingerprint is not None and skip_bad:
            raise UserError("--skip-bad leaves out files, and a fingerprint has none.", fix="Give it with the data.")
        is_planned = data is not None and run is None and Layout(data).plan.is_file()
        if edit and not is_planned:
            raise UserError("--edit changes the plan of a run.", fix="Name its folder alone: autoseg plan RUN.")
        if is_planned and (memory or device or preset != "standard" or spacing or skip_bad):
            raise UserError(
                "--memory, --device, --preset, --spacing and --skip-bad are for planning a data set; this shows a run.",
                fix="Name the data: autoseg plan DATA -o RUN.",
            )
        spacing_mm = _decimals(spacing, "--spacing")
        if data is not None and is_planned:
            made = step.edited(data, edit, report) if edit else step.checked(data)
        elif data is not None and run is None:
            raise UserError("Where shall the run be written?", fix="Name a folder: -o RUN.")
        elif data is not None and run is not None:
            made = step.plan(
                data, run, memory=memory, device=device, preset=preset, spacing_mm=spacing_mm, workers=workers,
                skip_bad=skip_bad, report=report,
            )  # fmt: skip
        elif fingerprint is not None:
            made = step.from_fingerprint(
                fingerprint, run, memory=memory, device=device, preset=preset, spacing_mm=spacing_mm, report=report
            )
    _show(made, as_json, explain)


@app.command()
def preprocess(run: RunFolder, configuration: Prepared = None, workers: Workers = None) -> None:
    """Crop, normalize and resample every case. They go into the run's cache; an interrupted run continues."""
    with _watched() as report:
        from autoseg.steps.preprocess import preprocess as step

        step(run, configuration=configuration, workers=workers, report=report)


@app.command()
def train(
    run: RunFolder,
    configuration: ConfigurationName = None,
    fold: Fold = "0",
    seed: Annotated[int, typer.Option(min=0, help="Another seed trains another network beside the first.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs. [default: the plan's]")] = None,
    max_time: MaxTime = None,
    resume: Annotated[
        str, typer.Option(help="Go on where it stopped; `auto` starts what is not there yet.", show_default=False)
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
    sampling: Annotated[
        str | None, typer.Option(help="How patches are drawn, such as class_balanced:tumour=0.5. [default: the plan's]")
    ] = None,
    device: Device = None,
    workers: Workers = None,
    cache: Annotated[
        str | None, typer.Option(help="Memory for preprocessed cases, such as 2GB. [default: a quarter of the RAM]")
    ] = None,
    tensorboard: Annotated[bool, typer.Option("--tensorboard", help="Also write for TensorBoard.")] = False,
    as_json: AsJson = False,
) -> None:
    """Train one network on one fold. At the end it is scored on the cases it has not seen."""
    with _watched(together=True) as report:
        how, epochs, max_seconds = parse_length(resume, restart, extend_to, epochs, _seconds(max_time))
        from autoseg.network.memory import parse_bytes
        from autoseg.steps.train import train_seeds as step
        from autoseg.steps.training.options import Machine, Options

        asked = Options(
            epochs, max_seconds, loss, batch_size, learning_rate, precision, deterministic, init, freeze, sampling
        )
        limit = None if cache is None else parse_bytes(cache, "--cache")
        ended = step(
            run, range(seed, seed + seeds), configuration=configuration, fold=fold, resume=how, asked=asked,
            machine=Machine(device, workers, limit, tensorboard), report=report,
        )  # fmt: skip
    if is_first_process():
        show_all({str(each.seed): each for each in ended}, as_json, named=False)


@app.command("import-nnunet")
def import_nnunet(
    model: Annotated[Path, typer.Argument(help="nnU-Net's folder of a trained configuration.", show_default=False)],
    output: Output,
    checkpoint: Annotated[str, typer.Option(help="Which checkpoint of each fold.")] = "checkpoint_final.pth",
) -> None:
    """Make a run of a model that nnU-Net v2 trained. `predict` then takes it."""
    with _watched() as report:
        from autoseg.steps.import_nnunet import import_nnunet as step

        step(model, output, checkpoint_name=checkpoint, report=report)


@app.command()
def predict(
    run: RunFolder,
    images: Annotated[Path, typer.Option("--input", "-i", help="Folder of images named as in training, or an image.")],
    output: Output,
    configuration: Trained = None,
    folds: Annotated[
        str | None, typer.Option(help="Folds to average, such as 0,1,2. [default: all that are trained]")
    ] = None,
    seeds: Annotated[str | None, typer.Option(help="Seeds to average. [default: all that are trained]")] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write class probabilities, for `ensemble`.")
    ] = False,
    probability_kind: Annotated[str, typer.Option(help="float16, or uint8: half the size.")] = "float16",
    classes: Annotated[
        str | None, typer.Option(help="Classes whose probabilities are saved, such as liver,tumour. [default: all]")
    ] = None,
    save_uncertainty: Annotated[
        bool, typer.Option("--save-uncertainty", help="Also write images of uncertainty, and flagged.csv.")
    ] = False,
    no_postprocess: Annotated[bool, typer.Option("--no-postprocess", help="Leave the learned rules out.")] = False,
    no_mirror: Annotated[bool, typer.Option("--no-mirror", help="No mirroring: faster, a little less exact.")] = False,
    speed: Annotated[str, typer.Option(help="accurate, balanced or fast.")] = "accurate",
    resume: Annotated[str, typer.Option(help="Leave out what is done and unchanged.", show_default=False)] = "no",
    part: Annotated[str | None, typer.Option(help="3/10 takes the third of ten parts of the cases.")] = None,
    on_error: Annotated[str, typer.Option(help="stop at the first case that fails, or skip it.")] = "stop",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, mps, or several: cuda:0,cuda:1. [default: the GPU, else the CPU]")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes for reading and writing; 0 for none. Not of a selected pair.")
    ] = None,
) -> None:
    """Segment images. The label maps lie on the grid of their images."""
    with _watched() as report:
        from autoseg.steps.predict import predict as step

        try:
            step(
                run, images, output, configuration=configuration, folds=_names(folds), seeds=_numbers(seeds, "--seeds"),
                save_probabilities=save_probabilities, probability_kind=probability_kind, classes=_names(classes),
                save_uncertainty=save_uncertainty, postprocess=not no_postprocess, mirroring=not no_mirror,
                speed=speed, resume=_resumes(resume), part=part, on_error=on_error, device=device, workers=workers,
                report=report,
            )  # fmt: skip
        except KeyboardInterrupt as stopped:
            raise Interrupted("the same command with --resume.") from stopped


for each in cli_scores.COMMANDS:
    app.command()(each)


@app.command()
def distill(
    run: RunFolder,
    teachers: Annotated[
        str, typer.Option("--from", help="seeds, folds, fold_0..4, fold_0.seed_1 or other runs; joined by commas.")
    ] = "seeds",
    student: Annotated[str, typer.Option(help="standard, small (half the channels) or tiny (a quarter).")] = "small",
    configuration: ConfigurationName = None,
    fold: Fold = "0",
    seed: Annotated[int, typer.Option(min=0, help="Another seed trains another student beside the first.")] = 0,
    epochs: Annotated[int | None, typer.Option(min=1, help="Number of epochs. [default: the plan's]")] = None,
    max_time: MaxTime = None,
    temperature: Annotated[float, typer.Option(help="How soft the teachers' probabilities are made.")] = 1.0,
    labels: Annotated[float, typer.Option(min=0, max=1, help="Weight of the true labels, the rest is taught.")] = 0.5,
    unlabelled: Annotated[
        Path | None, typer.Option(help="Folder of images to learn from what is taught.", show_default=False)
    ] = None,
    baseline: Annotated[bool, typer.Option("--baseline", help="Also train it on the labels alone.")] = False,
    device: Device = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Train one small network to do what an ensemble does. It is compared with its teachers."""
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
    fold: Annotated[
        str, typer.Option("--fold", "-f", help="Number of a fold (0 to 4 unless the data set has its own).")
    ] = "0",
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
    """Train a grid of settings and test which differ. Each has several seeds, and all trainings are equally long."""
    with _watched() as report:
        max_seconds = _seconds(max_time)
        from autoseg.steps.study import study as step

        ended = step(
            run, vary, seeds=seeds, epochs=epochs, max_seconds=max_seconds, configuration=configuration, fold=fold,
            fixed=fixed or (), name=name, devices=_names(device), workers=workers, report=report,
        )  # fmt: skip
    _show(ended, as_json)
    if not ended.finished:
        raise typer.Exit(1)


@app.command()
def demo(
    folder: Annotated[Path, typer.Argument(help="Where the demo's files go.")] = Path("demo"),
    max_time: Annotated[str, typer.Option("--max-time", help="Time for each of the two trainings.")] = "50s",
    as_json: AsJson = False,
) -> None:
    """Take a small synthetic data set through all of it. Under five minutes on 2 cores."""
    with _watched() as report:
        from autoseg.steps.demo import demo as step

        with of_several_steps():
            scores, picture = step(folder, max_seconds=parse_duration(max_time), report=report)
    _show(scores, as_json)
    if not as_json:
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
    """Do all of it, from the data to scores. What is finished is not done again."""
    with _watched() as report:
        max_seconds = _seconds(max_time)
        from autoseg.steps.run import run as step

        with of_several_steps():
            scores = step(
                data, run, max_seconds=max_seconds, folds=_names(folds) or ("0",), configuration=configuration,
                memory=memory, device=device, workers=workers, skip_bad=skip_bad, report=report,
            )  # fmt: skip
    _show(scores, as_json)


for command in app.registered_commands:
    name_values(command.callback)


def main() -> None:
    """Entry point of the `autoseg` command."""
    try:
        app(with_resume_value(sys.argv[1:]))
    except SystemExit as ending:
        lanes = sys.modules.get("autoseg.lanes")
        if lanes is None or not lanes.left_behind():
            raise
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(ending.code if isinstance(ending.code, int) else 1)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        from autoseg import __version__

        sys.stdout.write(f"{__version__}\n")
        raise typer.Exit


def with_resume_value(arguments: Sequence[str]) -> list[str]:
    """Put the value `yes` behind a bare `--resume`: parsers know options with a value or without, not both."""
    filled = []
    for here, following in zip(arguments, [*arguments[1:], ""], strict=True):
        filled.append(f"{here}=yes" if here == "--resume" and following not in ("yes", "no", "auto") else here)
    return filled
