"""`autoseg train`: one network on one fold, from the plan to validation scores. Survives a kill at any moment."""

import json
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoseg import __version__, store
from autoseg.cases.cache import CachedCase, open_case
from autoseg.cases.split import make_splits
from autoseg.errors import Interrupted, UserError
from autoseg.events import Report, Said, Warned, silent
from autoseg.layout import Layout, ModelLayout, scores_csv
from autoseg.network import checkpoint, losses, unet
from autoseg.network.device import Device, channels_last, pays_to_compile, pick, set_up, try_compile
from autoseg.network.loop import Length, TrainState, fit, make_optimizer, make_scaler
from autoseg.network.patches import InMemory, Source, WithPrevious
from autoseg.records import Configuration, Dataset, Fold, Plan, Run, Scores, Splits
from autoseg.steps.batches import Batches
from autoseg.steps.cascade import is_trained, previous_label_maps, previous_on_grid
from autoseg.steps.curves import draw_curves
from autoseg.steps.evaluate import as_csv
from autoseg.steps.options import (
    Options,
    class_rates,
    fit_to_time,
    resume_command,
    seconds_per_sample,
    with_drawn_shares,
    with_options,
    with_suited_norm,
)
from autoseg.steps.plan import checked
from autoseg.steps.predict import configuration_named, default_configuration
from autoseg.steps.preprocess import preprocess
from autoseg.steps.validate import validate_fold

RAM_SHARE = 0.25
"""Preprocessed cases are kept in RAM while they need less than this share of what is free."""


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
    sampling: str | None = None,
    device: str | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> Run:
    """Train a network, then predict and score the validation cases of its fold.

    The second stage of a cascade has the first one trained before, unless that has been done for this fold.

    Args:
        run: a planned run folder; cases that are not preprocessed yet are.
        configuration: name in the plan; None takes "3d", else "2d".
        fold: "0" to "4", or "all" to learn from every case (and validate on none).
        max_seconds: the schedule ends after this time; validation follows. Both stages of a cascade share it.
        resume: "yes" goes on where a training stopped (an error if there is none), "auto" starts it otherwise.
        sampling: how patches are drawn, as "mode" or "mode:class=rate,share=..."; see network/sampling.py.
        epochs, max_seconds, loss, batch_size, learning_rate, sampling: None takes what is planned, or what the training
            that is resumed had.

    Raises:
        UserError: nothing planned, no such configuration or fold, nothing to resume, or the disk is full.
        Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
    """
    layout, plan = Layout(run), checked(run)
    planned = configuration_named(plan, configuration or default_configuration(plan))
    asked = Options(epochs, max_seconds, loss, batch_size, learning_rate, sampling)
    wanted = with_options(planned, asked).train
    losses.parse(wanted.loss)
    class_rates(wanted, plan)
    dataset = store.load(layout.dataset, Dataset)
    cases = fold_cases(_splits(layout, dataset), dataset, fold)
    model = layout.model(planned.name, fold, seed)
    continues = _continues(model, resume, report)
    where = pick(device)
    set_up(where)
    if planned.previous is not None and not is_trained(layout, planned.previous, fold):
        asked = _train_previous(run, planned, fold, seed, asked, device, workers, report)
    preprocess(run, configuration=planned.name, workers=workers, report=report)
    if continues:
        record = _resumed_run(store.load(model.run, Run), asked, where)
    else:
        record = _fresh_run(plan, planned, asked, fold, seed, where, report)
        shutil.rmtree(model.root, ignore_errors=True)  # a kill must not leave an older state beside the new record
    shutil.rmtree(model.for_next_stage, ignore_errors=True)
    model.root.mkdir(parents=True, exist_ok=True)
    store.remove_unfinished(model.root)
    store.save(model.run, record)
    opened = {case: open_case(layout.cache(planned.name), case) for case in (*cases.train, *cases.validation)}
    sources = _sources(opened, run, plan, record.configuration, dataset, fold, device, report)
    state, compiled = _train_network(run, record, model, plan, cases, sources, where, continues, workers, report)
    notes = with_drawn_shares(record, state.history, plan)
    ended = {"seconds": state.seconds, "steps": state.step, "compiled": compiled, "notes": notes}
    record = record.model_copy(update=ended)
    if cases.validation:
        scores = _validate(run, record, model, state.network, cases, dataset, plan, where, report)
        record = record.model_copy(update={"validation_dice": scores.mean["dice"]})
    record = record.model_copy(update={"finished": True})
    store.save(model.run, record)
    return record


def fold_cases(splits: Splits, dataset: Dataset, fold: str) -> Fold:
    """The cases of a fold; "all" learns from every labelled one. Raises UserError that lists the folds."""
    if fold == "all":
        return Fold(train=tuple(sorted(case.id for case in dataset.cases if case.label is not None)), validation=())
    if not fold.isdigit() or int(fold) >= len(splits.folds):
        raise UserError(f"There is no fold {fold!r}.", fix=f"Choose 0 to {len(splits.folds) - 1}, or all.")
    return splits.folds[int(fold)]


def _splits(layout: Layout, dataset: Dataset) -> Splits:
    """The splits of the run, or those that preprocessing will write."""
    return store.load(layout.splits, Splits) if layout.splits.is_file() else make_splits(dataset.cases)


def _continues(model: ModelLayout, resume: str, report: Report) -> bool:
    """Whether to go on from a saved state, as the user's `--resume` and what is there say."""
    there = model.resume_tensors.is_file() and model.run.is_file()
    if resume not in ("no", "yes", "auto"):
        raise UserError(f"--resume {resume} is none of yes, auto, no.")
    if resume == "yes" and not there:
        raise UserError(f"{model.root}: there is no training to resume.", fix="Leave --resume out to start one.")
    if resume == "no" and there:
        finished = store.load(model.run, Run).finished
        state = "trained before" if finished else "an unfinished training"
        report(Warned(f"{model.root}: {state}; it is started anew (--resume would go on)."))
    return there and resume != "no"


def _fresh_run(
    plan: Plan, planned: Configuration, asked: Options, fold: str, seed: int, device: Device, report: Report
) -> Run:
    """The record of a new training: plan values, overridden by what was asked for, fitted to the time."""
    configuration, notes = with_options(planned, asked), []
    if asked.max_seconds is not None:
        seconds = seconds_per_sample(configuration, device)
        configuration, note = fit_to_time(configuration, asked, seconds)
        notes += [note] if note else []
    configuration, note = with_suited_norm(configuration)
    notes += [note] if note else []
    for note in notes:
        report(Said(note))
    return Run(
        autoseg_version=__version__, torch_version=torch.__version__, configuration=configuration, fold=fold, seed=seed,
        device=device.name, precision=device.precision, compiled=False, max_seconds=asked.max_seconds,
        notes=tuple(notes),
    )  # fmt: skip


def _resumed_run(record: Run, asked: Options, device: Device) -> Run:
    """The record of a training that goes on, with what is asked for now put in."""
    update = {
        "configuration": with_options(record.configuration, asked), "finished": False, "device": device.name,
        "precision": device.precision,
    }  # fmt: skip
    if asked.epochs is not None or asked.max_seconds is not None:
        update["max_seconds"] = asked.max_seconds
    return record.model_copy(update=update)


def _train_previous(
    run: Path, planned: Configuration, fold: str, seed: int, asked: Options, device: str | None, workers: int | None,
    report: Report,
) -> Options:  # fmt: skip
    """Train the stage that a cascade refines, with the same options and half of the time; the rest is returned."""
    half = None if asked.max_seconds is None else asked.max_seconds / 2
    first = replace(asked, max_seconds=half)
    within = "" if half is None else f" in half of the time, {half:.0f} s"
    report(Said(f"{planned.name} refines what {planned.previous} finds, which is trained first{within}."))
    try:
        train(
            run, configuration=planned.previous, fold=fold, seed=seed, epochs=first.epochs, max_seconds=half,
            resume="auto", loss=first.loss, batch_size=first.batch_size, learning_rate=first.learning_rate,
            sampling=first.sampling, device=device, workers=workers, report=report,
        )  # fmt: skip
    except Interrupted as stopped:
        raise Interrupted(resume_command(run, planned.name, fold, seed, "auto", asked)) from stopped
    return first


def _sources(
    opened: dict[str, CachedCase], run: Path, plan: Plan, configuration: Configuration, dataset: Dataset, fold: str,
    device: str | None, report: Report,
) -> dict[str, Source]:  # fmt: skip
    """The cases to read patches from: in RAM if they fit well, else from disk; with the previous stage's channel."""
    from autoseg.network.memory import allowed_ram_bytes

    need = sum(int(np.prod(case.shape)) * (4 * case.channels + 2) for case in opened.values())
    in_ram = need < RAM_SHARE * allowed_ram_bytes()
    sources: dict[str, Source] = {}
    for name, case in opened.items():
        sources[name] = InMemory(*case.read(), case.locations) if in_ram else case
    if not in_ram:
        report(Said(f"{need / 2**30:.1f} GB of preprocessed cases are read from disk, patch by patch."))
    if configuration.previous is None:
        return sources
    wanted = [case for case in dataset.cases if case.id in opened]
    maps = previous_label_maps(run, plan, configuration, fold, wanted, device, report)
    return {
        name: WithPrevious(source, previous_on_grid(maps[name], opened[name].mark, plan, configuration))
        for name, source in sources.items()
    }


def _train_network(
    run: Path, record: Run, model: ModelLayout, plan: Plan, cases: Fold, sources: dict[str, Source], device: Device,
    continues: bool, workers: int | None, report: Report,
) -> tuple[TrainState, bool]:  # fmt: skip
    """Train until the length is reached or the user stops; the finished weights are on disk then.

    Returns the state and whether the step was compiled.
    """
    configuration, spec = record.configuration, record.configuration.train
    torch.manual_seed(record.seed)
    network: nn.Module = unet.build(configuration.network).to(device.torch_device)
    network = channels_last(network, configuration.dimension)
    optimizer = make_optimizer(network, spec, device)
    state = TrainState(network, optimizer, make_scaler(device), steps_per_epoch=spec.steps_per_epoch)
    if continues:
        checkpoint.load_state(model.resume_tensors, state)
        report(Said(f"Going on at epoch {state.epoch + 1}, step {state.step}."))
    loss = losses.build(spec.loss, batch_dice=configuration.batch_dice)
    length = Length(spec.epochs, record.max_seconds)
    compiled = None
    if pays_to_compile(device, None if record.max_seconds is None else record.max_seconds - state.seconds):
        shape = (configuration.batch_size, configuration.network.in_channels, *configuration.patch_voxels)
        compiled = try_compile(network, shape, device, report)

    def save(state: TrainState, best: bool) -> None:
        checkpoint.save_state(model.resume_tensors, state)
        store.write_text(model.history, "".join(json.dumps(_plain(row)) + "\n" for row in state.history))
        if best:
            checkpoint.save_weights(model.best, state.network, state.average)

    channels = len(plan.channels)
    rates = class_rates(spec, plan)
    coming = Batches(configuration, record.seed, channels, plan.classes, device, workers, rates)
    with _stop_requests() as asked, coming as batches:
        learned = [sources[case] for case in cases.train]
        held_out = [sources[case] for case in cases.validation] or learned
        reached = fit(
            state, spec, length, device, loss,
            draw_batch=lambda step: batches.draw(learned, cases.train, step, state.history),
            validate=lambda epoch: batches.validation_dice(network, held_out, state.steps_per_epoch),
            save=save, stop=asked, report=report, compiled=compiled,
            about_epoch=batches.drawn_shares,
        )  # fmt: skip
    draw_curves(model.curves, state.history)
    if not reached:
        raise Interrupted(resume_command(run, configuration.name, record.fold, record.seed))
    if state.step:
        save(state, False)
    checkpoint.save_weights(model.weights, state.network, state.average)
    if state.average:
        checkpoint.load_weights(model.weights, state.network)
    return state, compiled is not None


def _validate(
    run: Path, record: Run, model: ModelLayout, network: nn.Module, cases: Fold, dataset: Dataset, plan: Plan,
    device: Device, report: Report,
) -> Scores:  # fmt: skip
    """Score the trained network on the validation cases and save that; Ctrl-C loses no training."""
    try:
        scores = validate_fold(run, model, record.configuration, network, cases, dataset, plan, device, report)
    except KeyboardInterrupt as stopped:
        raise Interrupted(resume_command(run, record.configuration.name, record.fold, record.seed)) from stopped
    store.save(model.scores, scores)
    store.write_text(scores_csv(model.validation), as_csv(scores))
    return scores


def _plain(row: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: a value that is not defined becomes null."""
    return {name: value if np.isfinite(value) else None for name, value in row.items()}


@contextmanager
def _stop_requests() -> Iterator[Callable[[], bool]]:
    """Catch Ctrl-C and SIGTERM inside the block; the function tells whether one came. A second one ends at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def remember(number: int, frame: object) -> None:
        asked.set()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
