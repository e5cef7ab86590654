"""One network to train: which one, from which cases, on what machine. Looked up once, before anything is written."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autoseg import store
from autoseg.cases.split import splits_for
from autoseg.errors import UserError
from autoseg.events import Report, Warned
from autoseg.layout import Layout, ModelLayout
from autoseg.network import checkpoint, losses
from autoseg.network.device import Device, pick, slow_convolutions
from autoseg.network.distributed import Team, own_device
from autoseg.records import Configuration, Dataset, Fingerprint, Fold, Plan, Run, Splits
from autoseg.steps.plan import checked
from autoseg.steps.predict import configuration_named, default_configuration
from autoseg.steps.predicting.models import sees_otherwise
from autoseg.steps.training.boards import writer_class
from autoseg.steps.training.finetune import donor_of, load_donor, names_of, refuse_unfit, warn_of_seen
from autoseg.steps.training.options import (
    Machine,
    Options,
    annotated_outputs,
    class_rates,
    resume_command,
    with_class_weights,
    with_options,
)
from autoseg.steps.training.teachers import Lesson

MAY_DIFFER = ("memory",)
"""What of a configuration may change under a training: it says how the plan came about."""
RESUMES = ("no", "yes", "auto", "extend", "restart")


@dataclass(frozen=True)
class Instead:
    """What to train instead of the planned configuration of its name, and where to put it (see `Work`).

    `keeps_norm`: as it is, even where the batch becomes too small for its norm.
    """

    configuration: Configuration
    folder: Path
    lesson: Lesson | None = None
    is_paced: bool = False
    keeps_norm: bool = True


@dataclass(frozen=True)
class Work:
    """One training. `continues` says whether it goes on from a saved state; `as_it_is` keeps the norm of `planned`,
    and `is_paced` its batch and the length of its epochs also under a time limit.

    With a `lesson` it learns from other networks, too, and its training cases hold those without labels.
    """

    run: Path
    plan: Plan
    planned: Configuration
    dataset: Dataset
    fold: str
    seed: int
    cases: Fold
    model: ModelLayout
    continues: bool
    device: Device
    machine: Machine
    team: Team
    report: Report
    as_it_is: bool = False
    lesson: Lesson | None = None
    is_paced: bool = False

    @property
    def layout(self) -> Layout:
        return Layout(self.run)


def look_up(
    run: Path, configuration: str | None, fold: str, seed: int, resume: str, asked: Options, machine: Machine,
    team: Team, report: Report, instead: Instead | None = None,
) -> Work:  # fmt: skip
    """Everything a training needs to know; raises UserError for whatever is impossible, before anything is written."""
    layout, plan = Layout(run), checked(run)
    named = configuration or default_configuration(plan)
    planned = instead.configuration if instead else configuration_named(plan, named)
    wished = with_options(planned, asked)
    check_setting(wished, plan)
    dataset = store.load(layout.dataset, Dataset)
    annotated_outputs(dataset, plan)  # refuses names that no output has
    lesson = instead.lesson if instead else None
    cases = with_unlabelled(cases_of(layout, dataset, fold), lesson)
    model = ModelLayout(instead.folder) if instead else layout.model(planned.name, fold, seed)
    continues = _continues(model, resume)
    before = store.load(model.run, Run) if continues else None
    if before is not None:
        _check_unchanged(before, planned, plan, asked, layout.plan, model.root)
        check_cases(model, cases)
        if model.resume_tensors.is_file():
            _check_length(checkpoint.read_numbers(model.resume_tensors), resume, asked, before)
        wished = with_options(before.configuration, asked)
    elif asked.init is not None:
        donor = donor_of(asked.init, planned.name, fold, seed, model)
        labels, regions = ([each.name for each in part] for part in (plan.labels, plan.regions))
        names = names_of(plan.channels, labels, wished.previous is not None, regions)
        refuse_unfit(load_donor(donor), wished.network, names, asked.freeze)
        warn_of_seen(donor, cases.validation, layout, report)
    elif asked.freeze is not None:
        raise UserError("--freeze keeps weights as they are, which are random ones here.", fix="Name some with --init.")
    if machine.tensorboard:
        writer_class()
    if wished.batch_size < team.size:
        raise UserError(
            f"A batch of {wished.batch_size} cannot be shared by {team.size} processes.",
            fix=f"Start at most {wished.batch_size}, or give a larger --batch-size.",
        )
    device = pick(own_device(machine.device), asked.precision or (before and before.asked_precision) or None)
    if warning := slow_convolutions(device):
        report(Warned(warning))
    return Work(
        run, plan, planned, dataset, fold, seed, cases, model, continues, device, machine, team, report,
        as_it_is=instead is not None and instead.keeps_norm, lesson=lesson,
        is_paced=instead is not None and instead.is_paced,
    )  # fmt: skip


def check_setting(wished: Configuration, plan: Plan) -> None:
    """Raise UserError for a loss, rates of classes or a sampling that the classes or regions of a plan cannot have."""
    losses.check(wished.train.loss, [output.name for output in plan.outputs], bool(plan.regions))
    class_rates(wished.train, plan)
    if plan.regions and wished.train.sampling == "hard":
        raise UserError(
            "Sampling hard follows the error of classes, but this data has regions.",
            fix="Choose one of foreground, class_balanced, case_balanced.",
        )


def cases_of(layout: Layout, dataset: Dataset, fold: str) -> Fold:
    """`fold_cases` of the splits of a run, or of those it will get."""
    splits = store.load(layout.splits, Splits) if layout.splits.is_file() else splits_for(dataset)
    return fold_cases(splits, dataset, fold)


def with_unlabelled(cases: Fold, lesson: Lesson | None) -> Fold:
    """The cases with those that a lesson has more to learn from."""
    if lesson is None:
        return cases
    return cases.model_copy(update={"train": (*cases.train, *(case.id for case in lesson.unlabelled))})


def check_cases(model: ModelLayout, cases: Fold) -> None:
    """Refuse a training that is there and learned from, or is validated on, other cases than these.

    What is not written down counts as the same.
    """
    before = store.load(model.run, Run).cases if model.run.is_file() else None
    if before is None:
        return
    both = ((before.train, cases.train), (before.validation, cases.validation))
    changed = sorted({name for then, now in both for name in set(then) ^ set(now)})
    if not changed:
        return
    learned = len(set(before.train) & set(cases.validation))
    raise UserError(
        f"{model.root}: its fold has changed since this training began, by {len(changed)} cases, e.g. {changed[0]}"
        f"{f'; it learned from {learned} that it would be validated on' if learned else ''}.",
        fix="Bring the old splits.json back, or train it anew: remove that folder, or use autoseg train --restart.",
    )


def fold_cases(splits: Splits, dataset: Dataset, fold: str) -> Fold:
    """The cases of a fold; "all" learns from every labelled one. Raises UserError that lists the folds."""
    if fold == "all":
        return Fold(train=tuple(sorted(case.id for case in dataset.cases if case.label is not None)), validation=())
    if fold not in map(str, range(len(splits.folds))):  # "00" would be a folder of its own
        raise UserError(f"There is no fold {fold!r}.", fix=f"Choose 0 to {len(splits.folds) - 1}, or all.")
    return splits.folds[int(fold)]


def warn_of_restart(work: Work, resume: str) -> None:
    """Say so when an older training is about to be overwritten."""
    if resume == "restart" and is_there(work.model):
        work.report(Warned(f"{work.model.root}: {_state_of(work.model)} is overwritten."))


def is_there(model: ModelLayout) -> bool:
    """Whether a folder holds what only --restart may delete: a network, or a training that came to an end or a state.

    A network may be without a state: an imported one, or one whose resume.safetensors was removed.
    """
    if model.weights.is_file():
        return True
    return model.run.is_file() and (model.resume_tensors.is_file() or store.load(model.run, Run).finished)


def _state_of(model: ModelLayout) -> str:
    if not model.run.is_file():
        return "a network"
    return "a finished training" if store.load(model.run, Run).finished else "an unfinished training"


def _continues(model: ModelLayout, resume: str) -> bool:
    """Whether to go on with what is there, from its saved state or, if it is finished, as it is."""
    if resume not in RESUMES:
        raise UserError(f"--resume {resume} is none of yes, auto, no.")
    there = is_there(model)
    if resume in ("yes", "extend") and not there:
        option = "--extend-to" if resume == "extend" else "--resume"
        raise UserError(f"{model.root}: there is no training to resume.", fix=f"Leave {option} out to start one.")
    if resume == "no" and there:
        raise UserError(
            f"{model.root}: {_state_of(model)} is there already.",
            fix="Go on with --resume, lengthen it with --extend-to, or overwrite it with --restart.",
        )
    if not there or resume == "restart":
        return False
    if not model.run.is_file():
        raise _stateless(model)
    if not model.resume_tensors.is_file() and (resume == "extend" or not store.load(model.run, Run).finished):
        raise _stateless(model)
    return True


def _stateless(model: ModelLayout) -> UserError:
    missing = model.resume_tensors if model.run.is_file() else model.run
    return UserError(
        f"{model.root}: {_state_of(model)} without {missing.name} cannot go on.",
        fix="Restore that file, begin another --seed with --init, or overwrite it with --restart.",
    )


def resumed_configuration(work: Work, record: Run, asked: Options) -> Configuration:
    """What a training goes on with: its own configuration, what is asked for put in as at its beginning."""
    configuration = with_options(record.configuration, asked)
    if asked.loss is None:
        return configuration
    path = work.layout.fingerprint
    seen = store.load(path, Fingerprint) if path.is_file() else None
    return with_class_weights(configuration, work.plan, seen)[0]


def command_to_go_on(work: Work) -> str:
    """The command that goes on with a training that has begun."""
    return resume_command(work.run, work.planned.name, work.fold, work.seed, machine=work.machine)


def trained_already(work: Work, asked: Options) -> Run | None:
    """The record of a training that came to its end, scores included, if nothing else than that is asked for.

    Without a saved state it need not have scores. Raises UserError where more is asked for than such a one has, and for
    options that could only change steps which have been taken.
    """
    if not work.continues:
        return None
    record, has_state = store.load(work.model.run, Run), work.model.resume_tensors.is_file()
    goes_on = not record.finished or is_of_other_length(record, asked)
    changes = resumed_configuration(work, record, asked) != record.configuration
    if (goes_on or changes) and not has_state:
        raise _stateless(work.model)
    if goes_on:
        return None
    if changes:
        raise UserError(
            f"{work.model.root}: this training has ended, so other options have nothing to change.",
            fix="Lengthen it with --extend-to, overwrite it with --restart, or leave the options out.",
        )
    return record if work.model.scores.is_file() or not work.cases.validation or not has_state else None


def is_of_other_length(record: Run, asked: Options) -> bool:
    """Whether another number of epochs or another time is asked for than ended, or will end, a training."""
    if asked.epochs is None and asked.max_seconds is None:
        return False
    epochs = record.configuration.train.epochs
    return (asked.epochs or epochs, asked.max_seconds) != (epochs, record.max_seconds)


def _check_length(done: Mapping[str, Any], resume: str, asked: Options, before: Run) -> None:
    """Refuse another length than before that is no longer than what is `done`, the counters of the saved state."""
    extends = resume == "extend"
    whole = done["step"] / done["steps_per_epoch"]  # the epoch that a time limit cut short is none of them
    fewer = asked.epochs is not None and asked.epochs <= whole
    if fewer and (extends or asked.epochs != before.configuration.train.epochs):
        raise UserError(
            f"{'--extend-to' if extends else '--epochs'} {asked.epochs}: {whole:g} epochs are done already.",
            fix="Give a larger number.",
        )
    shorter = asked.max_seconds is not None and asked.max_seconds <= done["seconds"]
    if shorter and (extends or asked.max_seconds != before.max_seconds):
        option = "--extend-to" if extends else "--max-time"
        raise UserError(
            f"{option} {asked.max_seconds:g}s: {done['seconds']:.0f} s are done already.",
            fix="Give a longer time; it counts from the beginning of the training.",
        )


def _check_unchanged(before: Run, planned: Configuration, plan: Plan, asked: Options, path: Path, folder: Path) -> None:
    """Refuse to go on under another plan, or from other weights than the training began with."""
    changed: list[str] = []
    if before.planned is not None:
        changed += _differences(before.planned.model_dump(), planned.model_dump())
    names = {name: tuple(each.name for each in getattr(plan, name)) for name in ("labels", "regions")}
    for name, now in (names | {"channels": plan.channels}).items():
        then = getattr(before, name)
        changed += [f"{name} (was {then}, is {now})"] if then and then != now else []
    changed += ["intensities of the CT channels"] if sees_otherwise(before, plan) else []
    if changed:
        more = f", and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"{path} has changed since this training began: {'; '.join(changed[:3])}{more}.",
            fix=f"Bring the old plan back, or train it anew: remove {folder}, or use autoseg train --restart.",
        )
    for option, was, wanted in (("--init", before.init, asked.init), ("--freeze", before.freeze, asked.freeze)):
        if wanted is not None and wanted != was:
            raise UserError(
                f"{option} {wanted}: this training began with {was or 'fresh weights, nothing frozen'}.",
                fix="Leave the option out to go on, or start anew with --restart.",
            )


def _differences(then: dict, now: dict, prefix: str = "") -> list[str]:
    """Fields whose values differ, with both values; what the older record does not know counts as equal."""
    found = []
    for name in then.keys() & now.keys() - set(MAY_DIFFER):
        if isinstance(then[name], dict) and isinstance(now[name], dict):
            found += _differences(then[name], now[name], f"{prefix}{name}.")
        elif then[name] != now[name]:
            found.append(f"{prefix}{name} (was {then[name]}, is {now[name]})")
    return sorted(found)
