"""`autoseg report`: all that is known of a run on one HTML page.

The page holds its pictures and needs no network. What the run has not is said in its place; a run that was only planned
gets a page, too.
"""

import json
import math
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TypeVar

from autoseg import __version__, store
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Started, Warned, silent
from autoseg.layout import Layout, ModelLayout, distillation_file
from autoseg.pages.markup import GENERATOR, Html, grid, heading, page, paragraph, picture, section
from autoseg.records import Dataset, Fingerprint, Plan, Postprocessing, Run, Saved
from autoseg.scoring.distillation import Distillation
from autoseg.scoring.selection import selected
from autoseg.scoring.study import Study
from autoseg.steps.reporting import sections
from autoseg.steps.reporting.curves import curves
from autoseg.steps.reporting.validated import Validated, names_of, score_table, validated, worst_cases

AnySaved = TypeVar("AnySaved", bound=Saved)

WORST = 5
"""Cases drawn per configuration where nothing else is asked for."""
DRAWING = "drawing cases"
SPREAD = (
    "Spread is the standard deviation over cases. The foreground row is of each case's mean over its classes; its mean "
    "is that of the classes' means. Only networks of seed 0 are counted."
)


def report(
    run: Path, *, output: Path | None = None, cases: int = WORST, report: Report = silent
) -> Path:
    """Write what the files of a run say as one HTML page, and return where it lies.

    Args:
        run: a run folder, at least planned.
        output: the file; None takes `report.html` in the run.
        cases: how many of the worst validation cases are drawn for each configuration.

    Raises:
        UserError: no run, or a file would be replaced that is not a report. What else is missing or damaged is said on
            the page, and announced as a warning.
    """
    layout, target = Layout(run), output or Layout(run).report
    plan = store.load(layout.plan, Plan)
    refuse_other_file(target)
    builders: dict[str, Callable[[], list[Html]]] = {
        "Data": partial(_data, layout, plan),
        "Plan": partial(sections.of_plan, plan, _written(layout.plan)),
        "Trainings": partial(_trainings, layout, plan),
        "Validation": partial(_validation, run, cases, report),
        "Selection and post-processing": partial(_decisions, layout),
        "Studies and students": partial(_studies, layout),
    }
    parts = {title: section(title, _guarded(title, build, report)) for title, build in builders.items()}
    made = f"What autoseg {__version__} found in the folder {run.resolve().name} on {_now()}."
    store.write_text(target, page(f"{plan.dataset}: autoseg report", made, parts))
    return target


def refuse_other_file(target: Path) -> None:
    """Raise UserError where a report would replace something else, or cannot be written."""
    fix = "Name another file, such as report.html."
    if target.is_dir():
        raise UserError(f"{target}: this is a folder, not a file.", fix=fix)
    if target.exists():
        with open(target, "rb") as file:
            if GENERATOR.encode() not in file.read(1000):
                raise UserError(f"{target}: this file is no report of autoseg and would be replaced.", fix=fix)
    store.refuse_unwritable(target.parent)


def _guarded(title: str, build: Callable[[], list[Html]], report: Report) -> list[Html]:
    """The parts of a section, or the sentence that says which of its files cannot be read."""
    try:
        return build()
    except (UserError, OSError) as error:
        report(Warned(f"{title} is not in the report: {error}"))
        return [paragraph(f"This cannot be shown: {error}", "problem")]


# ------------------------------------------------------------------------------------------------ sections


def _data(layout: Layout, plan: Plan) -> list[Html]:
    return sections.of_data(plan, _read(layout.dataset, Dataset), _read(layout.fingerprint, Fingerprint))


def _trainings(layout: Layout, plan: Plan) -> list[Html]:
    """A table of all networks, then the curves of each with what its record notes."""
    models = list(_models(layout))
    if not models:
        return [paragraph("Nothing is trained yet: autoseg train does that.", "missing")]
    trained = [(model, _as_far_as_it_got(model)) for model in models]
    names = [label.name for label in (plan.regions or plan.labels[1:])]
    rows = [(run, _written(model.run)) for model, run in trained]
    legend = [paragraph(sections.numbers_of(names))] if any(model.history.is_file() for model in models) else []
    pictures = grid(_curves(model, run) for model, run in trained)
    return [sections.training_table(rows, names), *legend, pictures]


def _validation(run: Path, most: int, report: Report) -> list[Html]:
    """Scores of every configuration and pair, then the worst cases of each."""
    found = [each for name in names_of(run) if (each := validated(run, name)) is not None]
    if not found:
        return [paragraph("There are no scores of validation cases: they come at the end of a training.", "missing")]
    parts = [*(score_table(each) for each in found), paragraph(SPREAD)]
    return parts + _drawn(found, _read(Layout(run).dataset, Dataset), most, report)


def _drawn(found: list[Validated], dataset: Dataset | None, most: int, report: Report) -> list[Html]:
    count, done, parts = sum(len(each.ranked[:most]) for each in found), [0], list[Html]()
    if not count:
        return parts

    def advance(case: str) -> None:
        done[0] += 1
        report(Advanced(DRAWING, done[0], count, case))

    report(Started(DRAWING, count))
    for each in found:
        parts += worst_cases(each, dataset, most, advance, report)
    report(Finished(DRAWING))
    return parts


def _decisions(layout: Layout) -> list[Html]:
    rules = sections.of_rules(_read(layout.postprocessing, Postprocessing))
    return [*sections.of_selection(selected(layout.root)), *rules]


def _studies(layout: Layout) -> list[Html]:
    """What studies of settings and distillations concluded."""
    parts: list[Html] = []
    for folder in sorted(layout.studies.glob("*")):
        files = layout.study(folder.name)
        ended = _read(files.study, Study)
        if ended is not None:
            parts += [heading(f"Study {ended.name}"), paragraph(ended.conclusion or "It is not finished.")]
        if ended is not None and files.picture.is_file():
            alt = f"Training curves of the settings of study {ended.name}"
            caption = "Mean over seeds, and from the lowest to the highest."
            parts.append(picture(files.picture.read_bytes(), alt, caption))
    for model in _models(layout):
        learned = _read(distillation_file(model.root), Distillation)
        if learned is not None:
            title = f"Student {learned.student}, fold {learned.fold}"
            parts += [heading(title), paragraph(learned.conclusion or "It is not finished.")]
    return parts or [paragraph("No settings were compared, and no student was taught.", "missing")]


# ------------------------------------------------------------------------------------------------ files


def _read(path: Path, kind: type[AnySaved]) -> AnySaved | None:
    """A record, or None where there is no such file; a damaged one raises UserError."""
    return store.load(path, kind) if path.is_file() else None


def _models(layout: Layout) -> Iterator[ModelLayout]:
    """The folders of all networks of the run whose training has begun."""
    for folder in sorted(layout.models.glob("*/fold_*")):
        if ModelLayout(folder).run.is_file():
            yield ModelLayout(folder)


def _as_far_as_it_got(model: ModelLayout) -> Run:
    """The record of a training; of one that has not ended with the steps and the time of its last epoch."""
    record, rows = store.load(model.run, Run), history_of(model)
    if record.finished or not rows:
        return record
    return record.model_copy(update={"steps": int(rows[-1]["step"]), "seconds": float(rows[-1]["seconds"])})


def history_of(model: ModelLayout) -> list[dict[str, float]]:
    """The rows of a history; NaN where a value was not defined. Empty where there is none."""
    if not model.history.is_file():
        return []
    try:
        rows = [json.loads(line) for line in model.history.read_text().splitlines()]
    except ValueError as error:
        raise UserError(f"{model.history}: not valid JSON ({error}).") from error
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _curves(model: ModelLayout, run: Run) -> Html:
    """The curves of a training, as they were drawn at its end, or of the epochs so far."""
    name = f"{run.configuration.name}, fold {run.fold}, seed {run.seed}"
    caption = " ".join((f"{name}.", *run.notes))
    if model.curves.is_file() and run.finished:
        png = model.curves.read_bytes()
    elif rows := history_of(model):
        png = curves(rows)
    else:
        return paragraph(f"{caption} There is no history of its training.", "missing")
    return picture(png, f"Loss, learning rate and Dice on validation patches over time: {name}", caption)


def _written(path: Path) -> str:
    return _moment(datetime.fromtimestamp(path.stat().st_mtime, UTC))


def _now() -> str:
    return _moment(datetime.now(UTC))


def _moment(when: datetime) -> str:
    return f"{when:%Y-%m-%d %H:%M} UTC"
