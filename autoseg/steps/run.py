"""`autoseg run`: from a data set to trained networks and their scores. What is finished is not done again."""

from collections.abc import Sequence
from pathlib import Path

from autoseg import store
from autoseg.cases.listing import list_cases
from autoseg.errors import UserError
from autoseg.events import Report, Said, Warned, silent
from autoseg.image.labels import some
from autoseg.layout import Layout
from autoseg.records import Dataset, Plan, Run, Scores
from autoseg.steps.evaluate import evaluate_run
from autoseg.steps.plan import checked, plan
from autoseg.steps.postprocess import postprocess_learn
from autoseg.steps.predict import default_configuration
from autoseg.steps.preprocess import keep_or_make_splits, preprocess
from autoseg.steps.train import train
from autoseg.steps.training.work import fold_cases


def run(
    data: Path,
    run: Path,
    *,
    max_seconds: float | None = None,
    folds: Sequence[str] = ("0",),
    configuration: str | None = None,
    memory: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    report: Report = silent,
) -> Scores:
    """Plan, preprocess, train every fold, learn the post-processing, and score the validation cases of all folds.

    Args:
        data: the data set, see `plan`.
        run: the run folder; one that exists is continued, with its plan as it is there (edited or not) and the cases
            that it was made for, with a warning where `data` has others now.
        max_seconds: for all trainings together; None: the plan's epochs.
        folds: "0" to "4", and "all" beside them if wanted.
        configuration: name in the plan; None: 3d where the plan has it, else 2d.
        memory, device, skip_bad: as for `plan`, where nothing is planned yet; all steps use this device.
        workers: processes for reading and preparing; None takes all allowed cores.

    Returns the scores before post-processing; they are also saved beside the folds.

    Raises:
        UserError: bad data, a run folder made for other data, or only fold "all", which has no cases to be scored on.
    """
    if not any(fold != "all" for fold in folds):
        raise UserError("A network that learns from all cases has none to be scored on.", fix="Name a fold, such as 0.")
    layout = Layout(run)
    planned = _planned(data, run, memory, device, workers, skip_bad, report)
    name = configuration or default_configuration(planned)
    dataset = store.load(layout.dataset, Dataset)
    splits = keep_or_make_splits(layout, dataset, report)
    for fold in folds:
        fold_cases(splits, dataset, fold)  # refuses a fold that is none before the others are trained
    preprocess(run, configuration=name, workers=workers, report=report)
    share = None if max_seconds is None else max_seconds / len(folds)
    for fold in folds:
        length = None if is_trained(layout, name, fold) else share  # a finished one stays, however long it was
        train(
            run, configuration=name, fold=fold, max_seconds=length, resume="auto", device=device, workers=workers,
            report=report,
        )  # fmt: skip
    postprocess_learn(run, name, workers=workers, report=report)
    return evaluate_run(run, name, workers=workers, report=report)


def _planned(
    data: Path, run: Path, memory: str | None, device: str | None, workers: int | None, skip_bad: bool, report: Report
) -> Plan:
    """The plan that is there, if it is for this data; else a new one."""
    layout = Layout(run)
    if not layout.plan.is_file() or not layout.dataset.is_file():
        return plan(data, run, memory=memory, device=device, workers=workers, skip_bad=skip_bad, report=report)
    known = store.load(layout.dataset, Dataset)
    if known.cases and not _is_of(known, data):
        raise UserError(f"{run} was planned for other data than {data}.", fix="Choose another folder for -o.")
    report(Said(f"Going on with {layout.plan}."))
    _warn_of_other_cases(known, data, run, report)
    return checked(run)


def _warn_of_other_cases(known: Dataset, data: Path, run: Path, report: Report) -> None:
    """Say so where the data set has gained or lost cases since it was planned for."""
    if not data.is_dir():
        return  # all that is needed may be in the cache
    now, then = {case.id for case in list_cases(data)[0]}, {case.id for case in known.cases}
    new, gone = sorted(now - then - {each.id for each in known.left_out}), sorted(then - now)
    changes = [f"{len(ids)} {what} ({some(ids)})" for ids, what in ((new, "more"), (gone, "fewer")) if ids]
    if changes:
        counted = f"{data} has {' and '.join(changes)} cases than {Layout(run).dataset}, which this run keeps to."
        report(Warned(f"{counted} To take them in: autoseg plan {data} -o {run}"))


def _is_of(known: Dataset, data: Path) -> bool:
    """Whether a data set lies in a folder, or is what its dataset.json lists elsewhere."""
    first = Path(known.cases[0].images[0])
    if first.is_relative_to(data.absolute()) or first.resolve().is_relative_to(data.resolve()):
        return True
    return first.resolve() in {Path(path).resolve() for case in list_cases(data)[0] for path in case.images}


def is_trained(layout: Layout, configuration: str, fold: str) -> bool:
    """Whether this training came to its end, scores of its validation cases included."""
    model = layout.model(configuration, fold)
    has_scores = fold == "all" or model.scores.is_file()
    return model.run.is_file() and has_scores and store.load(model.run, Run).finished
