"""The loop around the training step. Knows batches and networks, no files: saving comes in as a function.

Legend: B batch, C channel, K class, Z Y X voxels (2D: Y X).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from autoseg.errors import UserError
from autoseg.events import Report, Trained, Warned
from autoseg.network.device import Device
from autoseg.network.distributed import ALONE, Team, agreed
from autoseg.network.losses import Supervised
from autoseg.network.pieces import Pieces, once_more
from autoseg.network.step import (
    gradient_signal,
    learn_mode,
    learning_rate,
    make_scaler,
    running_statistics,
    step,
)
from autoseg.network.timing import PARTS, Capacity, Stopwatch
from autoseg.records import TrainSpec

SMOOTHING = 0.9
"""Weight of the past in the running validation Dice that decides about the best checkpoint (nnU-Net's rule)."""
SAVE_SECONDS = 60.0
"""An epoch longer than this is saved in between, so that a killed training loses little."""
BAD_SHARE = 0.1
"""An epoch of which more steps than this share are not finite is in trouble."""
TROUBLED_EPOCHS = 2
"""After so many such epochs in a row mixed precision ends; in full precision the training does, if no step was good."""


SHOWN = (
    "loss", "dice", "images_per_second", *(f"{part}_seconds" for part in ("wait", *PARTS)), "peak_share", "wait_share",
)  # fmt: skip
"""Of a row of the history, what is announced."""
ANNOUNCED_AS = {"dice": "dice_on_patches"}
"""On the screen the pooled Dice of validation patches must not look like that of whole images."""


@dataclass
class TrainState:
    """The one mutable thing of a training. `seconds` counts training time over all resumptions.

    pieces: how many each batch is split into for lack of memory. precision: "fp32" once mixed precision was given up.
    troubled: epochs in trouble in a row.
    """

    network: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    average: list[Tensor] = field(default_factory=list)
    step: int = 0
    epoch: int = 0
    seconds: float = 0.0
    steps_per_epoch: int = 0
    smoothed_dice: float = math.nan
    best_dice: float = -math.inf
    skipped: int = 0
    pieces: int = 1
    precision: str = ""
    troubled: int = 0
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """One augmented batch on the device: image (B, C, ...), labels (B, ...), its cases, and seconds it took to come.

    Where a team shares the batch, tensors hold this process' part of it, and `cases` those of all samples.
    `annotated` is a bool table (B, K) of what somebody drew in each sample's case; None where that is everything.
    """

    image: Tensor
    labels: Tensor
    cases: tuple[str, ...]
    wait_seconds: float
    augment_seconds: float
    annotated: Tensor | None = None


def device_of(state: TrainState, device: Device) -> Device:
    """The device in the precision that this training computes in."""
    return replace(device, precision=state.precision) if state.precision else device


def update_average(state: TrainState, decay: float) -> None:
    """Exponential moving average of the weights; early steps count more, so that the start is forgotten."""
    weights = [p.detach() for p in state.network.parameters()]
    if not state.average:
        state.average = [w.clone() for w in weights]
        return
    torch._foreach_lerp_(state.average, weights, 1.0 - min(decay, (1 + state.step) / (10 + state.step)))


@dataclass(frozen=True)
class Length:
    """When a training ends: after so many epochs, or after so many seconds; then epochs only pace the reports."""

    epochs: int
    max_seconds: float | None = None

    def done(self, state: TrainState) -> float:
        """Share of the training that is over."""
        if self.max_seconds is not None:
            return state.seconds / self.max_seconds
        return state.step / (self.epochs * state.steps_per_epoch)


def fit(
    state: TrainState,
    train: TrainSpec,
    length: Length,
    device: Device,
    loss: Supervised,
    draw_batch: Callable[[int], Batch],
    validate: Callable[[int], Sequence[float]],
    save: Callable[[TrainState, bool], None],
    stop: Callable[[], bool],
    report: Report,
    compiled: Callable[..., Tensor] | None = None,
    *,
    go_eager: Callable[[], None] = lambda: None,
    pieces: Pieces | None = None,
    team: Team = ALONE,
    capacity: Capacity = Capacity(),
    about_epoch: Callable[[], Mapping[str, float]] = dict,
) -> bool:
    """Train until the length is reached; True when it was, False when `stop()` asked to end earlier.

    Args:
        draw_batch: the batch of a step's number; asked once more where memory runs out.
        validate: Dice per foreground class on validation patches after an epoch, NaN where a class is absent.
        save: called with the state and whether the running validation Dice is the best so far; after every epoch, in
            between when an epoch takes long, and when stopped.
        compiled: the loss of a batch as one function, sharing the weights of `state.network`; left for good, after a
            call of `go_eager`, with the first batch in pieces and with full precision, for which it is not made.
        pieces: splits batches where memory runs out; the loss has to reduce by it. None: running out is an error.
        team: the processes that share this training; each draws its share of the batch.
        capacity: what steps are measured against in the history.
        about_epoch: further figures of an epoch that has ended, for its row of the history.
    Raises UserError when epochs are in trouble one after the other in full precision, too, and the last of them had no
    finite step; where it had some the training goes on, and the cases of the others are named.
    """
    learn_mode(state.network)
    sums, saved_at, counted_to = _Sums(device), time.perf_counter(), time.perf_counter()
    while length.done(state) < 1.0:
        start = time.perf_counter()
        sums.watch.start()
        rate = learning_rate(train, length.done(state), state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        batch = once_more(partial(draw_batch, state.step), device.torch_device, "a batch of patches")
        value = _learn(state, train, device_of(state, device), loss, batch, compiled, pieces, team, sums, report)
        sums.add(value, batch, time.perf_counter() - start)
        compiled = _while_it_serves(compiled, state, go_eager)
        asked, state.seconds = agreed(team, stop(), state.seconds + time.perf_counter() - counted_to)
        counted_to = time.perf_counter()  # from here on: also a save inside the epoch is training time
        epoch_ends = state.step % state.steps_per_epoch == 0 or length.done(state) >= 1.0
        if epoch_ends:
            _end_epoch(state, sums, rate, length, device, validate, save, report, capacity, about_epoch)
            asked_now, state.seconds = agreed(team, stop(), state.seconds + time.perf_counter() - counted_to)
            counted_to = time.perf_counter()
            asked, compiled = asked or asked_now, _while_it_serves(compiled, state, go_eager)
            sums, saved_at = _Sums(device), time.perf_counter()
        else:
            _announce(state, length, sums, batch, report)
            if time.perf_counter() - saved_at > SAVE_SECONDS:
                _save(state, save, False)
                saved_at = time.perf_counter()
        if asked or (team.size == 1 and stop()):
            if not epoch_ends:
                _save(state, save, False)
            return False
    return True


def is_as_compiled(state: TrainState) -> bool:
    """Whether batches are still whole and in the precision that the training began with."""
    return state.pieces == 1 and not state.precision


def _while_it_serves(
    compiled: Callable[..., Tensor] | None, state: TrainState, go_eager: Callable[[], None]
) -> Callable[..., Tensor] | None:
    if compiled is None or is_as_compiled(state):
        return compiled
    go_eager()
    return None


def _learn(
    state: TrainState, train: TrainSpec, device: Device, loss: Supervised, batch: Batch,
    compiled: Callable[..., Tensor] | None, pieces: Pieces | None, team: Team, sums: "_Sums", report: Report,
) -> Tensor:  # fmt: skip
    """One step on one batch, and the average after it; returns the loss, still on the device."""
    if pieces is not None:
        pieces.count = max(pieces.count, state.pieces)
    sums.watch.lap("augment")
    value = step(
        state.network, state.optimizer, loss, batch.image, batch.labels, device, train.clip_norm,
        state.scaler, extra=() if batch.annotated is None else (batch.annotated,), pieces=pieces, team=team,
        buffers=running_statistics(state.network), lap=sums.watch.lap, compiled=compiled,
    )  # fmt: skip
    if pieces is not None and pieces.count > state.pieces:
        state.pieces = pieces.count
        report(Warned(
            f"{device.name} ran out of memory: batches go through the network in {state.pieces} pieces from now on, "
            f"{_in_pieces(state.network, train.loss)}, more slowly."
        ))  # fmt: skip
    if train.average_decay > 0:
        update_average(state, train.average_decay)
        sums.watch.lap("step")
    state.step += 1
    return value


def _in_pieces(network: nn.Module, loss: str) -> str:
    """What splitting a batch does to its gradient."""
    if "topk" in loss.partition(":")[0]:
        return "each with its own hardest voxels"
    normed = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
    return "each with its own batch statistics" if normed else "with the same gradient"


class _Sums:
    """Totals of an epoch; losses stay on the device until the epoch ends, so that no step waits for them.

    `samples` are those of the whole team, `own` those of this process.
    """

    def __init__(self, device: Device) -> None:
        self.watch = Stopwatch(device)
        self.began = time.perf_counter()
        self.losses: list[Tensor] = []
        self.cases: list[tuple[str, ...]] = []
        self.seconds = self.wait = self.augment = 0.0
        self.own = self.samples = 0

    @property
    def count(self) -> int:
        return len(self.losses)

    def add(self, loss: Tensor, batch: Batch, seconds: float) -> None:
        self.losses.append(loss)
        self.cases.append(batch.cases)
        self.seconds += seconds
        self.wait += batch.wait_seconds
        self.augment += batch.augment_seconds
        self.own += len(batch.image)
        self.samples += len(batch.cases)

    def read(self) -> tuple[float, list[tuple[str, ...]]]:
        """The mean of the losses that are finite (NaN if none is), and the cases of the steps that were skipped."""
        values = torch.stack(self.losses).tolist()
        finite = [value for value in values if math.isfinite(value)]
        bad = [cases for value, cases in zip(values, self.cases, strict=True) if not math.isfinite(value)]
        return sum(finite) / len(finite) if finite else math.nan, bad

    def noise(self) -> float:
        """Standard deviation of the loss from step to step, its trend left out (von Neumann 1941); NaN for one step."""
        values = torch.stack(self.losses).tolist()
        pairs = [(a, b) for a, b in pairwise(values) if math.isfinite(a - b)]
        return math.sqrt(sum((b - a) ** 2 for a, b in pairs) / (2 * len(pairs))) if pairs else math.nan

    def seconds_per_step(self) -> dict[str, float]:
        """Where the time of a step went; on CUDA what the device did, which the host does not wait for."""
        parts = self.watch.read()
        wait, augment = self.wait, parts.get("augment", 0.0) - self.wait
        if augment < 0:  # the device was busy while the host waited
            wait, augment = 0.0, parts.get("augment", 0.0)
        parts |= {"augment": augment}
        return {"wait": wait / self.count} | {part: parts.get(part, 0.0) / self.count for part in PARTS}


def _announce(state: TrainState, length: Length, sums: _Sums, batch: Batch, report: Report) -> None:
    """Where the epoch is, with what the last one came to."""
    figures = _shown(state.history[-1]) if state.history else {}
    figures |= {"images_per_second": sums.samples / max(sums.seconds, 1e-9), "seconds_left": _left(state, length)}
    inside = state.step % state.steps_per_epoch
    report(Trained(state.epoch + 1, _epochs(state, length), inside, state.steps_per_epoch, figures))


def _left(state: TrainState, length: Length) -> float:
    done = max(length.done(state), 1e-6)
    return state.seconds * (1.0 - min(done, 1.0)) / done


def _epochs(state: TrainState, length: Length) -> int:
    """Of how many to speak: those so far, cut short or not, and those to come, under a time limit at this pace."""
    done = length.done(state)
    if done >= 1.0:
        return state.epoch
    steps = length.epochs * state.steps_per_epoch if length.max_seconds is None else state.step / max(done, 1e-6)
    return state.epoch + math.ceil(steps / state.steps_per_epoch) - state.step // state.steps_per_epoch


def _end_epoch(
    state: TrainState, sums: _Sums, rate: float, length: Length, device: Device,
    validate: Callable[[int], Sequence[float]], save: Callable[[TrainState, bool], None], report: Report,
    capacity: Capacity, about_epoch: Callable[[], Mapping[str, float]],
) -> None:  # fmt: skip
    """Validate, write the epoch into the history, remember the best, save, announce."""
    loss, bad = sums.read()
    seconds = sums.seconds_per_step()
    state.network.eval()
    dice = [float(value) for value in validate(state.epoch)]
    learn_mode(state.network)
    mean, best = _remember(state, dice, learned=len(bad) < sums.count)
    state.epoch += 1
    share = capacity.share(sums.own, sum(seconds.values()) * sums.count)
    row = {
        "epoch": float(state.epoch), "step": float(state.step), "seconds": state.seconds, "learning_rate": rate,
        "loss": loss, "dice": mean, "dice_running": state.smoothed_dice,
        "images_per_second": sums.samples / max(sums.seconds, 1e-9),
        "wait_share": sums.wait / max(sums.seconds, 1e-9), "augment_share": sums.augment / max(sums.seconds, 1e-9),
        "epoch_seconds": time.perf_counter() - sums.began, "skipped": float(len(bad)), "peak_share": share,
        "loss_noise": sums.noise(), "gradient_signal": gradient_signal(state.optimizer),
    }  # fmt: skip
    row |= {f"{part}_seconds": value for part, value in seconds.items()}
    row |= {f"dice_{k + 1}": value for k, value in enumerate(dice)} | dict(about_epoch())
    state.history.append(row)
    if bad:
        _face_trouble(state, bad, sums.count, device, report)
    else:
        state.troubled = 0
    _save(state, save, best)
    figures = _shown(row) | {"seconds_left": _left(state, length)}
    report(Trained(state.epoch, _epochs(state, length), state.steps_per_epoch, state.steps_per_epoch, figures))


def _shown(row: dict[str, float]) -> dict[str, float]:
    """What a reader wants to watch of an epoch; rows of older versions lack some of it."""
    return {ANNOUNCED_AS.get(name, name): row[name] for name in SHOWN if name in row}


def _remember(state: TrainState, dice: Sequence[float], learned: bool) -> tuple[float, bool]:
    """Mean Dice of an epoch, and whether the running mean is the best so far.

    An epoch without any class says nothing and must not poison the running mean; one that learned nothing, because no
    step of it was finite, is never the best.
    """
    known = [value for value in dice if math.isfinite(value)]
    mean = sum(known) / len(known) if known else math.nan
    if not known or not learned:
        return mean, False
    old = state.smoothed_dice
    state.smoothed_dice = mean if math.isnan(old) else SMOOTHING * old + (1 - SMOOTHING) * mean
    best = state.smoothed_dice > state.best_dice
    state.best_dice = max(state.best_dice, state.smoothed_dice)
    return mean, best


def _save(state: TrainState, save: Callable[[TrainState, bool], None], best: bool) -> None:
    """Save, but never over a good state with weights that are not finite: raises UserError then."""
    norms = torch.stack(torch._foreach_norm([weight.detach() for weight in state.network.parameters()]))
    if not bool(torch.isfinite(norms).all()):
        raise UserError(
            f"After step {state.step} the weights are not finite any more; the checkpoint before that is intact.",
            fix="Go on from it with a smaller learning rate: --resume --lr.",
        )
    save(state, best)


def _face_trouble(
    state: TrainState, bad: Sequence[tuple[str, ...]], count: int, device: Device, report: Report
) -> None:
    """Name the cases of skipped steps; when epochs are bad in a row, compute in fp32, or give up where that is done."""
    state.skipped += len(bad)
    cases = list(dict.fromkeys(case for batch in bad for case in batch))
    named = ", ".join(cases[:8]) + (f" and {len(cases) - 8} more" if len(cases) > 8 else "")
    report(Warned(
        f"{len(bad)} of {count} steps of epoch {state.epoch} had a loss or gradient that is not finite and were "
        f"skipped; their batches held {named}."
    ))  # fmt: skip
    state.troubled = state.troubled + 1 if len(bad) > BAD_SHARE * count else 0
    if state.troubled < TROUBLED_EPOCHS:
        return
    if device_of(state, device).precision != "fp32":
        state.precision, state.troubled = "fp32", 0
        state.scaler = make_scaler(device_of(state, device))
        report(Warned("Mixed precision is given up after repeated trouble: the training goes on in fp32."))
    elif len(bad) == count:
        raise UserError(
            f"No step of epoch {state.epoch} had a finite loss, in full precision either; the last checkpoint is that "
            "of the epoch before.",
            fix=f"Look at the cases {named}, or go on with a smaller learning rate: --resume --lr.",
        )
