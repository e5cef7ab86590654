"""The commands after prediction, such as ensemble, evaluate, compare and report."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from autoseg.arguments import (
    AsJson,
    Device,
    Output,
    RunFolder,
    Validated,
    Workers,
    decimals,
    names,
    resumes,
    show,
    show_all,
    tolerances,
    watched,
)
from autoseg.errors import Interrupted
from autoseg.layout import agreement_file

if TYPE_CHECKING:
    from pydantic import BaseModel


def ensemble(
    predictions: Annotated[
        list[Path], typer.Argument(help="Prediction folders, or run folders with --runs.", show_default=False)
    ],
    output: Output,
    runs: Annotated[
        bool, typer.Option("--runs", help="The folders are runs, whose networks segment the images of -i.")
    ] = False,
    images: Annotated[
        Path | None, typer.Option("--input", "-i", help="Folder of images (with --runs).", show_default=False)
    ] = None,
    configuration: Annotated[
        str | None,
        typer.Option(
            "--configuration",
            "-c",
            help="With --runs: such as 2d,3d. [default: all trained but students; of several runs, what predict takes]",
        ),
    ] = None,
    folds: Annotated[str | None, typer.Option(help="With --runs: such as 0,1,2. [default: all trained]")] = None,
    weights: Annotated[str | None, typer.Option(help="One weight per member, such as 2,1. [default: equal]")] = None,
    method: Annotated[
        str | None, typer.Option(help="mean, vote or staple. [default: mean where all have probabilities, else vote]")
    ] = None,
    save_probabilities: Annotated[
        bool, typer.Option("--save-probabilities", help="Also write the averaged probabilities.")
    ] = False,
    no_mirror: Annotated[bool, typer.Option("--no-mirror", help="With --runs: no mirroring.")] = False,
    resume: Annotated[str, typer.Option(help="With --runs: leave out what is done.", show_default=False)] = "no",
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Combine predictions, or the networks of several runs."""
    if runs != (images is not None):
        raise typer.BadParameter("--runs and -i go together; leave both out to combine prediction folders")
    if not runs and (configuration or folds or no_mirror or device or resume != "no"):
        raise typer.BadParameter("-c, --folds, --no-mirror, --device and --resume are for networks: with --runs")
    with watched() as report:
        from autoseg.steps import ensemble as step

        shares = decimals(weights, "--weights")
        if images is not None:
            try:
                step.ensemble_runs(
                    predictions, images, output, configurations=names(configuration), folds=names(folds),
                    weights=shares, method=method or "mean", save_probabilities=save_probabilities,
                    mirroring=not no_mirror, resume=resumes(resume), device=device, report=report,
                )  # fmt: skip
            except KeyboardInterrupt as stopped:
                raise Interrupted("the same command with --resume.") from stopped
        else:
            step.ensemble(
                predictions, output, weights=shares, method=method, save_probabilities=save_probabilities,
                report=report,
            )  # fmt: skip
    if as_json and agreement_file(output).is_file():  # absent where all was done before
        from autoseg import store
        from autoseg.scoring.comparison import Agreement

        show(store.load(agreement_file(output), Agreement), as_json)


def select(
    run: RunFolder,
    configuration: Annotated[
        str | None, typer.Option("--configuration", "-c", help="Such as 2d,3d. [default: all validated but students]")
    ] = None,
    no_pairs: Annotated[bool, typer.Option("--no-pairs", help="Only single configurations: no segmenting.")] = False,
    device: Device = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Find the best configuration or pair. `predict` then uses it."""
    with watched() as report:
        from autoseg.steps.select import select as step

        chosen = step(
            run, configurations=names(configuration), pairs=not no_pairs, device=device, workers=workers, report=report
        )
    show(chosen, as_json)


def postprocess(
    run: RunFolder,
    predictions: Annotated[
        Path | None, typer.Option("--input", "-i", help="Apply the learned rules to this folder.", show_default=False)
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Where the results go (with -i).", show_default=False)
    ] = None,
    configuration: Validated = None,
    fraction: Annotated[
        float, typer.Option(help="Components below this share (above 0, at most 1) of the largest may go.")
    ] = 1 / 3,
    connectivity: Annotated[int, typer.Option(min=1, max=3, help="Neighbours: 1 faces, 2 edges, 3 corners.")] = 1,
    no_test: Annotated[
        bool, typer.Option("--no-test", help="Keep what raises the mean Dice, even if it may be chance.")
    ] = False,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Learn which components to remove, or remove them. Learned on the cross-validation; applied with -i and -o."""
    if (predictions is None) != (output is None):
        raise typer.BadParameter("-i and -o go together; leave both out to learn the rules")
    learns = configuration is not None or no_test or connectivity != 1 or fraction != 1 / 3
    if predictions is not None and (learns or as_json):
        raise typer.BadParameter("-c, --fraction, --connectivity, --no-test and --json are for learning: without -i")
    with watched() as report:
        from autoseg.steps.postprocess import postprocess_apply, postprocess_learn

        if predictions is not None and output is not None:
            postprocess_apply(run, predictions, output, workers=workers, report=report)
            return
        learned = postprocess_learn(
            run, configuration, fraction=fraction, connectivity=connectivity, significance=None if no_test else 0.05,
            workers=workers, report=report,
        )  # fmt: skip
    show(learned, as_json)


def evaluate(
    predictions: Annotated[
        Path, typer.Argument(help="Folder of predicted label maps, or alone: a run folder.", show_default=False)
    ],
    references: Annotated[
        Path | None, typer.Argument(help="Folder of reference label maps, or a run folder.", show_default=False)
    ] = None,
    configuration: Annotated[
        str | None, typer.Option("--configuration", "-c", help="Of a run: this one. [default: all that are trained]")
    ] = None,
    cases: Annotated[
        str | None, typer.Option(help="Score only these, such as case_01,case_07. [default: all]")
    ] = None,
    no_surface: Annotated[bool, typer.Option("--no-surface", help="Skip the surface distances: faster.")] = False,
    tolerance: Annotated[
        str | None, typer.Option(help="Of the second surface Dice in mm, such as 3 or liver=3,tumour=1. [default: 2]")
    ] = None,
    speeds: Annotated[
        bool, typer.Option("--speeds", help="Of a run: also measure what each --speed of predict takes and costs.")
    ] = False,
    device: Device = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the scores of PRED. [default: PRED]", show_default=False),
    ] = None,
    workers: Workers = None,
    as_json: AsJson = False,
) -> None:
    """Score label maps, or the cross-validation of a run. Writes scores.json and scores.csv."""
    if cases is not None and references is None:
        raise typer.BadParameter("--cases needs two folders: PRED REF")
    if output is not None and references is None:
        raise typer.BadParameter("--output needs two folders: PRED REF")
    if (speeds or configuration) and references is not None:
        raise typer.BadParameter("--speeds and -c go with a run folder alone")
    if device is not None and not speeds:
        raise typer.BadParameter("--device goes with --speeds: nothing else is computed by networks")
    results: dict[str, BaseModel] = {}
    with watched() as report:
        from autoseg.steps import evaluate as step

        limit_mm = tolerances(tolerance, step.TOLERANCE_MM)
        if references is not None:
            results[""] = step.evaluate(
                predictions, references, cases=names(cases), output=output, surface=not no_surface,
                tolerance_mm=limit_mm, workers=workers, report=report,
            )  # fmt: skip
        else:
            results |= step.evaluate_all(
                predictions, configuration, surface=not no_surface, tolerance_mm=limit_mm, workers=workers,
                report=report,
            )  # fmt: skip
        if speeds:
            from autoseg.steps.predicting.speeds import measure_speeds

            measured = measure_speeds(predictions, configuration, device=device, report=report)
            results |= {"speeds": measured} if as_json else {}  # else they have been said
    show_all(results, as_json)


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
    """Test which differences between methods are real. Cases count that all of them have."""
    with watched() as report:
        from autoseg.steps.compare import compare as step

        found = step(*scores, metrics=names(metrics), output=output, report=report)
    show(found, as_json)


def report(
    run: RunFolder,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The page. [default: report.html in RUN]"),
    ] = None,
    cases: Annotated[
        int, typer.Option("--cases", min=0, metavar="N", help="Worst cases drawn per configuration; 0 for none.")
    ] = 5,
) -> None:
    """Write all that is known of a run as one HTML page. It holds its pictures and needs no network."""
    with watched() as report:
        from autoseg.steps.report import report as step

        written = step(run, output=output, cases=cases, report=report)
    sys.stdout.write(f"{written}\n")


COMMANDS = (ensemble, select, postprocess, evaluate, compare, report)
"""In the order of `autoseg --help`."""
