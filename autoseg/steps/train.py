"""`autoseg train`: one network on one fold, from the plan to validation scores. Survives a kill at any moment."""

import json
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from autoseg import __version__, store
from autoseg.cases.cache import CachedCase, open_case
from autoseg.errors import Interrupted, UserError
from autoseg.events import Report, Said, Warned, silent
from autoseg.layout import Layout, ModelLayout, scores_csv
from autoseg.network import checkpoint, losses, unet
from autoseg.network.device import Device, channels_last, pays_to_compile, pick, set_up, try_compile
from autoseg.network.loop import Length, TrainState, fit, make_optimizer, make_scaler
from autoseg.network.patches import InMemory, Source, WithPrevious
from autoseg.planning.batch import choose_norm
from autoseg.records import Configuration, Dataset, Fold, Plan, Run, Scores, Splits
from autoseg.steps.batches import Batches
from autoseg.steps.cascade import previous_label_maps, previous_on_grid
from autoseg.steps.curves import draw_curves
from autoseg.steps.evaluate import as_csv
from autoseg.steps.plan import checked
from autoseg.steps.predict import configuration_named, default_configuration
from autoseg.steps.preprocess import preprocess
from autoseg.steps.validate import validate_fold

RAM_SHARE = 0.25
"""Preprocessed cases are kept in RAM while they need less than this share of what is free."""
STEPS_WANTED = 1000
"""With a time limit the batch shrinks until about this many steps fit: fewer, however large, do not converge."""
REPORTS_WANTED = 40
"""With a time limit an epoch is paced so that there are about this many."""
LEAST_BATCH = 2


@dataclass(frozen=True)
class Options:
    """What the user asked for beside the plan; None means: as planned."""

    epochs: int | None = None
    max_seconds: float | None = None
    loss: str | None = None
    batch_size: int | None = None
    learning_rate: float | None = None


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
    device: str | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> Run:
    """Train a network, then predict and score the validation cases of its fold.

    Args:
        run: a planned run folder; cases that are not preprocessed yet are.
        configuration: name in the plan; None takes "3d", else "2d".
        fold: "0" to "4", or "all" to learn from every case (and validate on none).
        max_seconds: the schedule ends after this time; validation follows.
        resume: "yes" goes on where a training stopped (an error if there is none), "auto" starts it otherwise.

    Raises:
        UserError: nothing planned, no such configuration or fold, nothing to resume, or the disk is full.
        Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
    """
    layout, plan = Layout(run), checked(run)
    planned = configuration_named(plan, configuration or default_configuration(plan))
    losses.parse(loss or planned.train.loss)
    where = pick(device)
    set_up(where)
    preprocess(run, configuration=planned.name, workers=workers, report=report)
    dataset = store.load(layout.dataset, Dataset)
    cases = fold_cases(store.load(layout.splits, Splits), dataset, fold)
    model = layout.model(planned.name, fold, seed)
    continues = _continues(model, resume, report)
    asked = Options(epochs, max_seconds, loss, batch_size, learning_rate)
    record = store.load(model.run, Run) if continues else _fresh_run(plan, planned, asked, fold, seed, where, report)
    record = record.model_copy(update={"finished": False, "device": where.name, "precision": where.precision})
    if continues:
        asked_anew = {"configuration": with_options(record.configuration, asked)}
        record = record.model_copy(update=asked_anew | ({"max_seconds": max_seconds} if max_seconds else {}))
    model.root.mkdir(parents=True, exist_ok=True)
    store.remove_unfinished(model.root)
    store.save(model.run, record)
    opened = {case: open_case(layout.cache(planned.name), case) for case in (*cases.train, *cases.validation)}
    sources = _sources(opened, run, plan, record.configuration, dataset, fold, device, report)
    state = _train_network(record, model, plan, cases, sources, where, continues, workers, report)
    record = record.model_copy(update={"seconds": state.seconds, "steps": state.step})
    if cases.validation:
        scores = validate_fold(run, model, record.configuration, state.network, cases, dataset, plan, where, report)
        _save_scores(model, scores)
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


def with_options(planned: Configuration, asked: Options) -> Configuration:
    """The planned configuration with the options of this training put in. Raises UserError for a rate of 0 or less."""
    if asked.learning_rate is not None and asked.learning_rate <= 0:
        raise UserError(f"--lr {asked.learning_rate:g} is no learning rate.", fix="Give a number above 0.")
    update: dict[str, object] = {}
    for field in ("epochs", "loss", "learning_rate"):
        if (value := getattr(asked, field)) is not None:
            update[field] = value
    train_spec = planned.train.model_copy(update=update)
    batch = planned.batch_size if asked.batch_size is None else asked.batch_size
    return planned.model_copy(update={"train": train_spec, "batch_size": batch})


def fit_to_time(configuration: Configuration, asked: Options, seconds: float) -> tuple[Configuration, str]:
    """Shrink the batch, unless it was asked for, until enough steps fit; and pace the epochs. Returns a note or "".

    Args:
        seconds: of one training step per sample.
    """
    limit = asked.max_seconds or 0.0
    batch, note = configuration.batch_size, ""
    if asked.batch_size is None and limit / (seconds * batch) < STEPS_WANTED:
        fitting = max(LEAST_BATCH, int(limit / STEPS_WANTED / seconds))
        if fitting < batch:
            note = (
                f"Batch size {fitting} instead of {batch}: a sample takes {seconds:.2f} s, and {limit:.0f} s shall "
                f"hold about {STEPS_WANTED} steps."
            )
            batch = fitting
    pace = int(limit / (seconds * batch) / REPORTS_WANTED)
    steps = min(max(pace, 2), configuration.train.steps_per_epoch)
    train_spec = configuration.train.model_copy(update={"steps_per_epoch": steps})
    return configuration.model_copy(update={"batch_size": batch, "train": train_spec}), note


def with_suited_norm(configuration: Configuration) -> tuple[Configuration, str]:
    """Instance norm instead of batch norm where the batch became too small for it, by the planner's own rule."""
    network = configuration.network
    if network.norm != "batch" or choose_norm(configuration.batch_size) == "batch":
        return configuration, ""
    note = f"Instance norm instead of batch norm: {configuration.batch_size} samples are too few for batch statistics."
    return configuration.model_copy(update={"network": network.model_copy(update={"norm": "instance"})}), note


def seconds_per_sample(configuration: Configuration, device: Device) -> float:
    """Seconds of one training step per sample, timed on a network of its own."""
    from autoseg.network.simulate import make_step

    small = configuration.model_copy(update={"batch_size": min(LEAST_BATCH, configuration.batch_size)})
    one = make_step(small, device)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        float(one.run())
        times.append(time.perf_counter() - start)
    return min(times) / small.batch_size


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
    record: Run, model: ModelLayout, plan: Plan, cases: Fold, sources: dict[str, Source], device: Device,
    continues: bool, workers: int | None, report: Report,
) -> TrainState:  # fmt: skip
    """Train until the length is reached or the user stops; the finished weights are on disk then."""
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
    coming = Batches(configuration, record.seed, channels, plan.classes, device, workers)
    with _stop_requests() as asked, coming as batches:
        learned = [sources[case] for case in cases.train]
        held_out = [sources[case] for case in cases.validation] or learned
        reached = fit(
            state, spec, length, device, loss,
            draw_batch=lambda step: batches.draw(learned, cases.train, step),
            validate=lambda epoch: batches.validation_dice(network, held_out, state.steps_per_epoch),
            save=save, stop=asked, report=report, compiled=compiled,
        )  # fmt: skip
    draw_curves(model.curves, state.history)
    if not reached:
        save(state, False)
        raise Interrupted(_resume_command(record, model))
    if state.step:
        save(state, False)
    checkpoint.save_weights(model.weights, state.network, state.average)
    if state.average:
        checkpoint.load_weights(model.weights, state.network)
    return state


def _save_scores(model: ModelLayout, scores: Scores) -> None:
    store.save(model.scores, scores)
    store.write_text(scores_csv(model.validation), as_csv(scores))


def _resume_command(record: Run, model: ModelLayout) -> str:
    run = model.root.parents[2]
    seed = f" --seed {record.seed}" if record.seed else ""
    return f"autoseg train {run} -c {record.configuration.name} -f {record.fold}{seed} --resume"


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
