"""The training itself: network, loss, batches and loop, and what is written."""

import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import torch
from torch import nn

from autoseg import store
from autoseg.errors import Interrupted
from autoseg.events import Said, Warned
from autoseg.network import checkpoint, losses, unet
from autoseg.network.compiling import Step, forget_compiled, pays_to_compile, pays_to_record, try_compile
from autoseg.network.device import Device, lay_out, layout
from autoseg.network.distillation import distilling
from autoseg.network.distributed import adding, agreed, share, whole_batch_statistics
from autoseg.network.loop import Length, TrainState, device_of, fit, is_as_compiled
from autoseg.network.losses import Supervised
from autoseg.network.losses_sums import Reduce, alone
from autoseg.network.patches import Source
from autoseg.network.pieces import Pieces
from autoseg.network.step import follow_layout, laid_out_like, learn_mode, make_optimizer, make_scaler
from autoseg.network.timing import Capacity, matmul_rate
from autoseg.planning.cost import training_operations
from autoseg.records import Configuration, Run
from autoseg.steps.reporting.curves import draw_curves
from autoseg.steps.training.batches import Batches
from autoseg.steps.training.boards import board
from autoseg.steps.training.finetune import donor_of, freeze, load_donor, names_of, short_list, take_over
from autoseg.steps.training.options import annotated_outputs, class_rates, with_drawn_shares
from autoseg.steps.training.stopping import stop_requests
from autoseg.steps.training.teachers import Lesson
from autoseg.steps.training.work import Work, command_to_go_on


def learn(work: Work, record: Run, sources: dict[str, Source]) -> tuple[TrainState, Run]:
    """Train until the length is reached or the user stops; the finished weights are on disk then.

    Returns the state, its network holding the finished weights, and the record with what it came to.
    """
    network, record = _network(work, record)
    capacity = capacity_of(record.configuration, work.device)
    shared = any(isinstance(module, nn.SyncBatchNorm) for module in network.modules())
    pieces = Pieces(adding(work.team), splits=not shared)
    compiled, seconds = _compiled(work, record, network, capacity, pieces, tries=not shared)
    state = _state(work, record, network)
    if record.max_seconds is not None:  # the time asked for is that of everything before validation
        state.seconds += _counted(seconds, record.max_seconds - state.seconds, work)
    _, state.seconds = agreed(work.team, False, state.seconds)  # learning rate and end go by it
    with _saving(work, state) as save:
        try:
            reached = _fit(work, record, state, sources, compiled, save, capacity, pieces)
        finally:
            was_compiled = compiled is not None and is_as_compiled(state)
            if compiled is not None:
                compiled = None
                forget_compiled()  # what comes next, validation or another training, has use for its memory
        if work.team.is_first:
            draw_curves(work.model.curves, state.history)
        if not reached:
            raise Interrupted(command_to_go_on(work))
        if state.step:
            save(state, False)
    if work.team.is_first:
        mirror_axes = record.configuration.train.augment.mirror_axes
        checkpoint.save_weights(work.model.weights, state.network, state.average, mirror_axes)
    _use_average(state)
    lay_out(state.network, record.configuration.dimension, work.device)
    precision = device_of(state, work.device).precision
    update = {
        "seconds": state.seconds, "steps": state.step, "compiled": was_compiled,
        "precision": precision,
        "notes": with_drawn_shares(record, state.history, work.plan),
    }  # fmt: skip
    return state, record.model_copy(update=update)


def _network(work: Work, record: Run) -> tuple[nn.Module, Run]:
    """The network with its first weights, and the record with what of them is fresh."""
    torch.manual_seed(record.seed)
    configuration = record.configuration
    network: nn.Module = unet.build(configuration.network)
    if record.init and not work.continues:
        donor = load_donor(donor_of(record.init, configuration.name, record.fold, record.seed, work.model))
        names = names_of(record.channels, record.labels, configuration.previous is not None, record.regions)
        fresh = take_over(network, names, donor)
        if fresh:
            work.report(Warned(
                f"{len(fresh)} of {len(network.state_dict())} tensors are not in {donor.folder} or do not fit, and "
                f"stay fresh: {short_list(fresh)}."
            ))  # fmt: skip
        record = record.model_copy(update={"fresh": fresh})
        if work.team.is_first:
            store.save(work.model.run, record)
    if record.freeze:
        freeze(network, record.freeze)
    return whole_batch_statistics(network.to(work.device.torch_device), work.team), record


def _state(work: Work, record: Run, network: nn.Module) -> TrainState:
    """A fresh training state, or the saved one, whose batches are whole until memory runs out again."""
    spec = record.configuration.train
    optimizer = make_optimizer(network, spec, work.device)
    state = TrainState(network, optimizer, make_scaler(work.device), steps_per_epoch=spec.steps_per_epoch)
    if work.continues:
        checkpoint.load_state(work.model.resume_tensors, state)
        state.pieces = 1  # the card may be another one, or emptier
        if state.precision:
            state.scaler = make_scaler(device_of(state, work.device))
        work.report(Said(f"Going on at epoch {state.epoch + 1}, step {state.step}."))
    return state


def loss_of(
    configuration: Configuration, reduce: Reduce, lesson: Lesson | None = None,
    regions: tuple[tuple[int, ...], ...] = (),
) -> Supervised:  # fmt: skip
    """What the network of a configuration is trained with; a lesson adds what its teachers say."""
    loss = losses.loss_of(configuration, regions, reduce)
    if lesson is None:
        return loss
    has_dice = "dice" in losses.parse(configuration.train.loss).name
    one = ((1,),) if regions else ()
    dice = losses.build("dice", batch_dice=configuration.batch_dice, reduce=reduce, regions=one)
    overlap = dice if has_dice else None
    return distilling(loss, lesson.temperature, lesson.labels_weight, bool(regions), reduce, overlap)


def batches_of(work: Work, record: Run, compiled: bool = False) -> Batches:
    """Where this process' share of every batch comes from."""
    plan, machine, configuration = work.plan, work.machine, record.configuration
    return Batches(
        configuration, record.seed, len(plan.channels), plan.classes, work.device, machine.workers,
        work.team, class_rates(configuration.train, plan), teachers=work.lesson is not None,
        regions=plan.region_indices, annotated=annotated_outputs(work.dataset, plan), compiled=compiled,
        ignores=plan.ignore_value is not None,
    )  # fmt: skip


def _compiled(
    work: Work, record: Run, network: nn.Module, capacity: Capacity, pieces: Pieces, tries: bool
) -> tuple[Step | None, float]:
    """The compiled step where compiling pays in the time that is left, and the seconds that took.

    Epochs are estimated to take what matrix products and the launching of kernels let expect. The network is laid out
    for what comes of it. Nothing is tried with batch norm over processes: they would wait for one that has failed.
    """
    configuration, device, began = record.configuration, work.device, time.perf_counter()
    samples, train = len(share(work.team, range(configuration.batch_size))), record.configuration.train
    done = checkpoint.read_numbers(work.model.resume_tensors) if work.continues else {}
    if done.get("precision"):
        device = replace(device, precision=done["precision"])
    if record.max_seconds is not None:
        left: float | None = record.max_seconds - done.get("seconds", 0.0)
    else:
        steps = train.epochs * train.steps_per_epoch - int(done.get("step", 0))
        left = capacity.seconds(steps * samples, steps)
    _, same = agreed(work.team, False, math.nan if left is None else left)
    compiled = None
    if tries and pays_to_compile(device, None if math.isnan(same) else same):
        lay_out(network, configuration.dimension, device, compiled=True)
        learn_mode(network)
        with pieces.by_itself() if work.team.size > 1 else nullcontext():
            compiled = _tried(work, configuration, network, samples, device, pieces)
        failed, _ = agreed(work.team, compiled is None, 0.0)
        compiled = None if failed else compiled
    lay_out(network, configuration.dimension, device, compiled is not None)
    return compiled, time.perf_counter() - began


def _counted(seconds: float, left: float, work: Work) -> float:
    """What of the seconds before the first step counts for a time limit: half of what is left is for the training."""
    if seconds <= left / 2:
        return seconds
    if round(seconds) > 0:
        work.report(Warned(f"Getting ready took {seconds:.0f} s; the training has half of its time for itself."))
    return max(0.0, left / 2)


def _tried(
    work: Work, configuration: Configuration, network: nn.Module, samples: int, device: Device, pieces: Pieces
) -> Step | None:
    """The step, compiled on a batch without content; in a team without the loss, which then talks to the others."""
    where, alone_here = device.torch_device, work.team.size == 1
    shape = (samples, *configuration.patch_voxels)
    image = torch.zeros(samples, configuration.network.in_channels, *shape[1:], device=where)
    labels = torch.zeros(shape, dtype=torch.int16, device=where)
    if work.lesson is not None:
        said = 1 + len(work.plan.regions) if work.plan.regions else work.plan.classes  # by the teachers, see `Batches`
        labels = torch.zeros(samples, 1 + said, *shape[1:], device=where)
    batch = [image.contiguous(memory_format=layout(configuration.dimension, device, compiled=True)), labels]
    if annotated_outputs(work.dataset, work.plan):
        batch.append(torch.ones(samples, len(work.plan.outputs), dtype=torch.bool, device=where))
    loss = loss_of(configuration, alone if alone_here else pieces, work.lesson, work.plan.region_indices)
    if not alone_here:
        loss = torch.compiler.disable(loss)
    step_bytes = configuration.memory.peak_bytes * samples // work.planned.batch_size
    records = alone_here and pays_to_record(device, step_bytes)
    return try_compile(network, loss, batch, device, work.report, records)


@contextmanager
def _saving(work: Work, state: TrainState) -> Iterator[Callable[[TrainState, bool], None]]:
    """The function that writes state, history and best weights; in a team only the first process does."""
    model = work.model
    if not work.team.is_first:
        yield lambda state, best: None
        return

    def save(state: TrainState, best: bool) -> None:
        if best:
            checkpoint.save_weights(model.best, state.network, state.average)
        store.write_text(model.history, "".join(json.dumps(_plain(row)) + "\n" for row in state.history))
        checkpoint.save_state(model.resume_tensors, state)  # last: a kill before it has the epoch done again
        shown(state.history)

    wanted = work.machine.tensorboard
    with board(model.tensorboard, len(state.history)) if wanted else nullcontext(lambda history: None) as shown:
        yield save


def _fit(
    work: Work, record: Run, state: TrainState, sources: dict[str, Source],
    compiled: Step | None, save: Callable[[TrainState, bool], None], capacity: Capacity, pieces: Pieces,
) -> bool:  # fmt: skip
    """Run the loop; False when it was stopped."""
    configuration, team = record.configuration, work.team
    learned, seen = [sources[case] for case in work.cases.train], work.cases.validation or work.cases.train
    held_out = [sources[case] for case in seen]
    with stop_requests() as asked, batches_of(work, record, compiled is not None) as batches:

        def validate(epoch: int) -> Sequence[float]:
            device = device_of(state, work.device)
            return batches.validation_dice(state.network, held_out, state.steps_per_epoch, device, seen)

        return fit(
            state, configuration.train, Length(configuration.train.epochs, record.max_seconds), work.device,
            loss_of(configuration, pieces, work.lesson, work.plan.region_indices),
            lambda step: batches.draw(learned, work.cases.train, step, state.history), validate, save,
            asked, work.report, compiled, go_eager=lambda: _go_eager(work, configuration, state, batches),
            pieces=pieces, team=team, capacity=capacity, about_epoch=batches.drawn_shares,
        )  # fmt: skip


def _go_eager(work: Work, configuration: Configuration, state: TrainState, batches: Batches) -> None:
    """Forget what was compiled, and lay everything out as eager steps read it fastest."""
    forget_compiled()
    lay_out(state.network, configuration.dimension, work.device)
    follow_layout(state.optimizer)
    weights = state.network.parameters()
    state.average = [laid_out_like(*both) for both in zip(weights, state.average, strict=bool(state.average))]
    batches.go_eager()


def capacity_of(configuration: Configuration, device: Device) -> Capacity:
    """What the steps of a configuration are measured against on this device."""
    operations = training_operations(configuration.network, configuration.patch_voxels, 1)
    return Capacity(float(operations), matmul_rate(device))


def _use_average(state: TrainState) -> None:
    """Put the average of the weights, where one was kept, into the network: that is what was saved."""
    with torch.no_grad():
        for weight, average in zip(state.network.parameters(), state.average, strict=bool(state.average)):
            weight.copy_(average)


def in_precision(work: Work, record: Run) -> Work:
    """The work on its device in the precision that the training ended with."""
    return replace(work, device=replace(work.device, precision=record.precision))


def _plain(row: dict[str, float]) -> dict[str, float | None]:
    """JSON has no NaN: a value that is not defined becomes null."""
    return {name: value if math.isfinite(value) else None for name, value in row.items()}
