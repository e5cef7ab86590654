"""`autoseg distill`: one small network learns what an ensemble knows. A table says what each of them is worth."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from autoseg import store
from autoseg.cases.listing import list_images
from autoseg.errors import Interrupted, UserError
from autoseg.events import Report, Said, Warned, silent
from autoseg.layout import Layout, ModelLayout, distillation_file
from autoseg.network.device import pick, set_up
from autoseg.network.distributed import ALONE
from autoseg.network.memory import anywhere, measurer
from autoseg.planning.student import choose_student
from autoseg.records import Case, Configuration, Dataset, Fold, Plan
from autoseg.scoring.distillation import Distillation
from autoseg.steps.plan import checked, labelling_of
from autoseg.steps.predicting.models import configuration_named, default_configuration
from autoseg.steps.preprocess import Work as Preparing
from autoseg.steps.preprocess import keep_or_make_splits, preprocess, preprocess_case
from autoseg.steps.reporting.contest import School, contest
from autoseg.steps.train import train_one
from autoseg.steps.training.options import Machine, Options
from autoseg.steps.training.teachers import Lesson, teachers_named, who_saw
from autoseg.steps.training.work import Instead, fold_cases, look_up


def distill(
    run: Path,
    *,
    teachers: Sequence[str] = ("seeds",),
    student: str = "small",
    configuration: str | None = None,
    fold: str = "0",
    seed: int = 0,
    epochs: int | None = None,
    max_seconds: float | None = None,
    temperature: float = 1.0,
    labels_weight: float = 0.5,
    unlabelled: Path | None = None,
    baseline: bool = False,
    device: str | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> Distillation:
    """Train a student of trained networks, compare it with them, and make it a configuration of the run.

    `predict RUN -c 3d_student_small` takes it. The same call again goes on where it was stopped.

    Args:
        run: a run folder with trained networks.
        teachers: see `teachers_named`. Those that learned from validation cases of the fold are warned of.
        student: of `planning.student.SIZES`.
        configuration: the teachers'; None takes "3d", else "2d".
        fold: the student's; "all" learns from every case and is scored on none.
        seed: another one trains another student beside the first.
        epochs, max_seconds: length of the student's training, without what its teachers need to look at the cases.
        temperature, labels_weight: of `network.distillation.distilling`.
        unlabelled: folder of images; of these the student learns what the teachers say.
        baseline: also train the student's network on the labels alone, for as long and in batches as large.
        device, workers: as for `train`.

    Raises:
        UserError: no such teachers, another grid, or a student of this name that was begun otherwise.
        Interrupted: after Ctrl-C, when the state is saved.
    """
    layout, plan = Layout(run), checked(run)
    planned = configuration_named(plan, configuration or default_configuration(plan))
    dataset = store.load(layout.dataset, Dataset)
    cases = fold_cases(keep_or_make_splits(layout, dataset, report), dataset, fold)
    found = teachers_named(run, planned, fold, teachers)
    _check(temperature, labels_weight)
    own, choice = choose_student(planned, student, *measurer(anywhere(plan.budget), labelling_of(plan, dataset)))
    model = layout.model(own.name, fold, seed)
    alone = model.alone if baseline else None
    seen = who_saw(found, cases.validation)
    school = School(run, plan, dataset, cases, planned, own, found, seen, model, alone)
    extra = _unlabelled(unlabelled, plan, dataset, cases, report)
    begun = Distillation(
        student=own.name, fold=fold, seed=seed, teachers=tuple(school.called(each) for each in found),
        seen=tuple(school.called(each) for each in seen), temperature=temperature, labels_weight=labels_weight,
        unlabelled=len(extra), cases=len(cases.validation),
    )  # fmt: skip
    ways, asked = _ways(school, Lesson(found, temperature, labels_weight, extra)), Options(epochs, max_seconds)
    machine = Machine(device, workers)
    for way in ways:  # refuses what is impossible before the plan gets this student
        look_up(run, None, fold, seed, "auto", asked, machine, ALONE, silent, way)
    _begin(begun, model, report)
    _add_to_plan(layout, own, choice, report)
    preprocess(run, configuration=planned.name, workers=workers, report=report)
    _prepare(extra, plan, planned, layout)
    try:
        _trained(run, begun, ways, asked, machine, report)
    except Interrupted as stopped:
        raise Interrupted(_again(run, planned.name, begun, student, asked, unlabelled, baseline)) from stopped
    used = pick(device)
    set_up(used)
    ended = contest(begun, school, used, report)
    store.save(distillation_file(model.root), ended)
    return ended


def _check(temperature: float, labels_weight: float) -> None:
    if not 0 < temperature <= 100:
        raise UserError(f"--temperature {temperature:g} is not possible.", fix="Give a number above 0, up to 100.")
    if not 0 <= labels_weight <= 1:
        raise UserError(f"--labels {labels_weight:g} is not possible.", fix="Give the labels' share, from 0 to 1.")


def _begin(begun: Distillation, model: ModelLayout, report: Report) -> None:
    """Write down how the student learns; raises UserError where it was begun in another way.

    A table that is there already stays until there is a new one.
    """
    file, there = distillation_file(model.root), False
    settled = ("teachers", "temperature", "labels_weight", "unlabelled")
    if file.is_file() and model.run.is_file():
        before = store.load(file, Distillation)
        differing = [name for name in settled if getattr(before, name) != getattr(begun, name)]
        if differing:
            raise UserError(
                f"{model.root}: this student was begun with other values of {', '.join(differing)}.",
                fix="Give another --seed, or remove that folder.",
            )
        there = bool(before.contestants)
    if begun.seen:
        report(Warned(
            f"{', '.join(begun.seen)} learned from validation cases of fold {begun.fold}, so the student's scores "
            "there are better than on new images; teachers of the same fold (--from seeds) did not."
        ))  # fmt: skip
    if not there:
        store.save(file, begun)


def _add_to_plan(layout: Layout, own: Configuration, choice: object, report: Report) -> None:
    """Put the student into the plan as it is now, in the place of an older one of its name."""
    plan = store.load(layout.plan, Plan)
    others = tuple(each for each in plan.configurations if each.name != own.name)
    choices = tuple(each for each in plan.choices if each.field != getattr(choice, "field", ""))
    changed = plan.model_copy(update={"configurations": (*others, own), "choices": (*choices, choice)})
    if own not in plan.configurations:
        store.save(layout.plan, changed)
    report(Said(f"{own.name}: {getattr(choice, 'because', '')}"))


def _unlabelled(
    folder: Path | None, plan: Plan, dataset: Dataset, cases: Fold, report: Report
) -> tuple[Case, ...]:
    """The images without labels as cases; those that are images of validation cases are left out, and named."""
    if folder is None:
        return ()
    held_out = {path for case in dataset.cases if case.id in cases.validation for path in case.images}
    found = list_images(folder, len(plan.channels))
    kept = [case for case in found if not {str(Path(path).resolve()) for path in case.images} & _resolved(held_out)]
    if len(kept) < len(found):
        report(Warned(f"{len(found) - len(kept)} images of {folder} are validation cases and are left out."))
    return tuple(case.model_copy(update={"id": f"unlabelled_{case.id}", "label": None}) for case in kept)


def _resolved(paths: set[str]) -> set[str]:
    return {str(Path(path).resolve()) for path in paths}


def _prepare(cases: Sequence[Case], plan: Plan, planned: Configuration, layout: Layout) -> None:
    """Preprocess the images without labels beside the cases of the data set; those that are there stay."""
    for case in cases:
        preprocess_case(Preparing(case, plan, ((planned, layout.cache(planned.name)),)))


def _ways(school: School, lesson: Lesson) -> tuple[Instead, ...]:
    """What is trained: the student, then, where it is wanted, the same network on the labels alone."""
    own = Instead(school.own, school.student.root, lesson, keeps_norm=False)
    return (own,) if school.alone is None else (own, Instead(school.own, school.alone.root, keeps_norm=False))


def _trained(
    run: Path, begun: Distillation, ways: Sequence[Instead], asked: Options, machine: Machine, report: Report
) -> None:
    """Train one after the other, all for as long and in batches as large as the first; finished ones are kept."""
    for way in ways:
        record = train_one(run, None, begun.fold, begun.seed, "auto", asked, machine, ALONE, report, way)
        configuration = record.configuration
        asked = Options(configuration.train.epochs, record.max_seconds, batch_size=configuration.batch_size)


def _again(
    run: Path, configuration: str, begun: Distillation, student: str, asked: Options, unlabelled: Path | None,
    baseline: bool,
) -> str:  # fmt: skip
    """The command that goes on, with the teachers that this student has: `seeds` may have become more by then."""
    words = ["autoseg", "distill", str(run), "-c", configuration, "-f", begun.fold, "--from", ",".join(begun.teachers)]
    words += ["--student", student, "--seed", str(begun.seed)]
    words += ["--temperature", f"{begun.temperature:g}", "--labels", f"{begun.labels_weight:g}"]
    words += [] if asked.epochs is None else ["--epochs", str(asked.epochs)]
    words += [] if asked.max_seconds is None else ["--max-time", f"{asked.max_seconds:.12g}s"]
    words += [] if unlabelled is None else ["--unlabelled", str(unlabelled)]
    return shlex.join([*words, *(["--baseline"] if baseline else [])])
