"""`autoseg train`: one network on one fold, from the plan to validation scores. Survives a kill at any moment."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path

from torch import nn

from autoseg import store
from autoseg.errors import Interrupted
from autoseg.events import Report, Said, silent
from autoseg.layout import Layout
from autoseg.network.device import set_up
from autoseg.network.distributed import Team, first_goes_first, joined
from autoseg.records import Run, Scores
from autoseg.steps.plan import checked
from autoseg.steps.predict import configuration_named, default_configuration
from autoseg.steps.preprocess import preprocess
from autoseg.steps.training.begin import begin
from autoseg.steps.training.cascade import trained
from autoseg.steps.training.learn import in_precision, learn
from autoseg.steps.training.options import Machine, Options, resume_command
from autoseg.steps.training.sources import sources_of
from autoseg.steps.training.stopping import ended_by_sigterm
from autoseg.steps.training.validate import validate_fold
from autoseg.steps.training.work import (
    Instead,
    Work,
    command_to_go_on,
    look_up,
    trained_already,
    warn_of_restart,
)


def train(
    run: Path,
    *,
    configuration: str | None = None,
    fold: str = "0",
    seed: int = 0,
    epochs: int | None = None,
    max_seconds: float | None = None,
    resume: str = "no",
    loss: str | None = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    precision: str | None = None,
    deterministic: bool | None = None,
    init: str | None = None,
    freeze: str | None = None,
    sampling: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    cache_bytes: int | None = None,
    tensorboard: bool = False,
    report: Report = silent,
) -> Run:
    """Train a network, then predict and score the validation cases of its fold.

    The second stage of a cascade has the first one trained before, unless that has been done for this fold. Under
    torchrun all processes train one network together; the first one writes and reports.

    Args:
        run: a planned run folder; cases that are not preprocessed yet are.
        configuration: name in the plan; None takes "3d", else "2d".
        fold: its number ("0" to "4" unless the data set has its own), or "all" to learn from every case (and validate
            on none).
        seed: another one trains another network beside the first.
        max_seconds: the schedule ends after this time; validation follows. Both stages of a cascade share it.
        resume: "no" starts a training and refuses to overwrite one, "restart" overwrites it; "yes" goes on where it
            stopped (an error if there is none), "auto" does so or starts it; "extend" goes on to a larger `epochs` or
            `max_seconds`. One that came to its end is kept as it is unless it is to become longer, and takes no other
            options; without its saved state (an imported network, say) it can only be kept or overwritten.
        epochs, max_seconds, loss, batch_size, learning_rate, sampling: None takes what is planned, or what the training
            that is resumed had. Sampling is "mode" or "mode:class=rate,share=..."; see network/sampling.py.
        precision: "bf16", "fp16" or "fp32"; None takes what the device multiplies fastest.
        deterministic: only kernels that repeat their results, where there is a choice.
        init: run folder or model folder to take the first weights from, see steps/training/finetune.py.
        freeze: "encoder" leaves those weights as they are.
        device: "cpu", "cuda", "cuda:1" or "mps"; None: the GPU, else the CPU.
        workers: processes for reading and preparing; None takes all allowed cores.
        cache_bytes: preprocessed cases are kept in memory up to this; None: a quarter of the RAM there may be used.
        tensorboard: also write the history for TensorBoard.

    Raises:
        UserError: nothing planned, no such configuration or fold, nothing to resume or something to overwrite, another
            plan than the training began with, or the disk is full.
        Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
    """
    asked = Options(
        epochs, max_seconds, loss, batch_size, learning_rate, precision, deterministic, init, freeze, sampling
    )
    machine = Machine(device, workers, cache_bytes, tensorboard)
    return train_seeds(
        run, (seed,), configuration=configuration, fold=fold, resume=resume, asked=asked, machine=machine, report=report
    )[0]


def train_seeds(
    run: Path, seeds: Sequence[int], *, configuration: str | None = None, fold: str = "0", resume: str = "no",
    asked: Options = Options(), machine: Machine = Machine(), report: Report = silent,
) -> tuple[Run, ...]:  # fmt: skip
    """Train one network per seed, one after another; the other arguments are those of `train`.

    What is impossible for one of them is refused before the first is trained. With `resume` "no" none of them may be
    there before, and with "extend" all have to; with "yes" and "auto" finished ones are kept as they are, or go on to a
    larger length, stopped ones go on and missing ones are started, so that this completes whatever was stopped.
    """
    if len(seeds) == 1:
        with joined(machine.device) as team:
            own_report = report if team.is_first else silent
            return (train_one(run, configuration, fold, seeds[0], resume, asked, machine, team, own_report),)
    name = configuration or default_configuration(checked(run))
    how, ended = "auto" if resume == "yes" else resume, list[Run]()
    with joined(machine.device) as team:
        own_report = report if team.is_first else silent
        with first_goes_first(team):
            works = [_looked_up(run, name, fold, seed, how, asked, machine, team, silent)[0] for seed in seeds]
            if how == "restart" and team.is_first:
                _emptied(works, own_report)
        for seed in seeds:
            try:
                ended.append(train_one(run, name, fold, seed, how, asked, machine, team, own_report))
            except Interrupted as stopped:
                command = resume_command(run, name, fold, seeds[0], "auto", asked, len(seeds), machine)
                raise Interrupted(command) from stopped
    return tuple(ended)


@ended_by_sigterm()
def train_one(
    run: Path, configuration: str | None, fold: str, seed: int, resume: str, asked: Options, machine: Machine,
    team: Team, report: Report, instead: Instead | None = None,
) -> Run:  # fmt: skip
    """`train` inside a team. With `instead`, another configuration than the planned one, in a folder of its own."""
    with first_goes_first(team):
        work, asked, ended = _looked_up(run, configuration, fold, seed, resume, asked, machine, team, report, instead)
        warn_of_restart(work, resume)
    if ended is not None:
        report(Said(f"{work.planned.name}, fold {fold}, seed {seed}: trained already."))
        return ended
    with _alone(work):
        return _trained(work, asked)


def _looked_up(
    run: Path, configuration: str | None, fold: str, seed: int, resume: str, asked: Options, machine: Machine,
    team: Team, report: Report, instead: Instead | None = None,
) -> tuple[Work, Options, Run | None]:  # fmt: skip
    """The work, its own share of what is asked for, and its record where nothing is left to be done.

    Raises UserError for what is impossible; nothing is written.
    """
    own = asked if instead else _own_share(run, configuration, fold, seed, asked, resume)
    work = look_up(run, configuration, fold, seed, resume, own, machine, team, report, instead)
    return work, own, trained_already(work, own)


def _emptied(works: Sequence[Work], report: Report) -> None:
    """Delete all trainings that are to be overwritten, so that no old one looks finished when this one is stopped."""
    first = works[0]
    preprocess(first.run, configuration=first.planned.name, workers=first.machine.workers, report=report)
    with ExitStack() as held:
        for work in works:
            held.enter_context(_alone(work))
        for work in works:
            warn_of_restart(replace(work, report=report), "restart")
            store.empty_folder(work.model.root)


def _alone(work: Work) -> AbstractContextManager[None]:
    """No second training writes to this folder meanwhile; raises UserError where this one is the second."""
    if not work.team.is_first:
        return nullcontext()
    busy = f"{work.model.root}: another process is training this network."
    return store.held_alone(work.model.lock, busy, fix="Wait until it has ended, or give another --fold or --seed.")


def _trained(work: Work, asked: Options) -> Run:
    """The training that `train_one` looked up, from its first record to its scores."""
    set_up(work.device, deterministic=bool(asked.deterministic))
    if work.planned.previous is not None and not trained(work.layout, work.planned.previous, work.fold):
        asked = _train_previous(work, asked)
    with first_goes_first(work.team):
        record = begin(work, asked)
    set_up(work.device, record.deterministic)
    try:
        state, record = learn(work, record, sources_of(work, record.configuration))
    except KeyboardInterrupt as stopped:  # a second Ctrl-C, which does not wait for the step
        if work.model.resume_tensors.is_file():
            raise Interrupted(command_to_go_on(work)) from stopped
        raise
    if work.cases.validation:
        scores = _validate(in_precision(work, record), record, state.network)
        record = record.model_copy(update={"validation_dice": scores.mean["dice"]})
    record = record.model_copy(update={"finished": True})
    if work.team.is_first:
        store.save(work.model.run, record)
    return record


def _own_share(
    run: Path, configuration: str | None, fold: str, seed: int, asked: Options, resume: str
) -> Options:
    """Of a time that the second stage of a cascade shares with the first, its half; as they began with it."""
    if asked.max_seconds is None or asked.of_seconds is not None or resume == "extend":
        return asked
    layout, plan = Layout(run), checked(run)
    planned = configuration_named(plan, configuration or default_configuration(plan))
    if planned.previous is None:
        return asked
    own, first = layout.model(planned.name, fold, seed).run, trained(layout, planned.previous, fold)
    continues = resume != "restart" and own.is_file()
    known = [store.load(own, Run)] if continues else [record for record in first if record.seed == seed]
    return _halved(asked) if asked.max_seconds in {record.of_seconds for record in known} else asked


def _halved(asked: Options) -> Options:
    return asked if asked.max_seconds is None else replace(
        asked, max_seconds=asked.max_seconds / 2, of_seconds=asked.max_seconds
    )  # fmt: skip


def _train_previous(work: Work, asked: Options) -> Options:
    """Train the stage that a cascade refines, with the same options and half of the time; the rest is returned."""
    first = _halved(asked)
    half = first.max_seconds
    within = "" if half is None else f" in half of the time, {half:.0f} s"
    name, previous = work.planned.name, work.planned.previous
    work.report(Said(f"{name} refines what {previous} finds, which is trained first{within}."))
    fresh = replace(first, init=None, freeze=None)
    try:
        train_one(work.run, previous, work.fold, work.seed, "auto", fresh, work.machine, work.team, work.report)
    except Interrupted as stopped:
        command = resume_command(work.run, name, work.fold, work.seed, "auto", asked, machine=work.machine)
        raise Interrupted(command) from stopped
    return first


def _validate(work: Work, record: Run, network: nn.Module) -> Scores:
    """Score the trained network on the validation cases and save that; Ctrl-C loses no training."""
    try:
        return validate_fold(
            work.run, work.model, record.configuration, network, work.cases, work.dataset, work.plan, work.device,
            work.report, work.team,
        )  # fmt: skip
    except KeyboardInterrupt as stopped:
        raise Interrupted(command_to_go_on(work)) from stopped
