"""The training step and the loop around it. Knows batches and networks, no files: saving comes in as a function.

Legend: B batch, C channel, K class, Z Y X voxels (2D: Y X).
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.events import Report, Trained, Warned
from autoseg.network.device import Device
from autoseg.network.losses import Supervised
from autoseg.records import TrainSpec

BETAS = (0.9, 0.99)
SMOOTHING = 0.9
"""Weight of the past in the running validation Dice that decides about the best checkpoint (nnU-Net's rule)."""
SAVE_SECONDS = 60.0
"""An epoch longer than this is saved in between, so that a killed training loses little."""


@dataclass
class TrainState:
    """The one mutable thing of a training. `seconds` counts training time over all resumptions."""

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
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Batch:
    """One augmented batch on the device: image (B, C, ...), labels (B, ...), its cases, and seconds it took to come."""

    image: Tensor
    labels: Tensor
    cases: tuple[str, ...]
    wait_seconds: float
    augment_seconds: float


def make_optimizer(network: nn.Module, train: TrainSpec, device: Device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) or SGD with Nesterov momentum; fused where torch has the kernel.

    Weight decay spares norms and biases in AdamW; SGD follows nnU-Net and decays everything.
    """
    fused = device.torch_device.type in ("cuda", "cpu")
    if train.optimizer == "sgd":
        sgd = torch.optim.SGD(
            network.parameters(), train.learning_rate, train.momentum, weight_decay=train.weight_decay, nesterov=True,
            fused=fused,
        )
        for weight in network.parameters():  # else a first step that is skipped leaves them uninitialized
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return sgd
    decayed = [p for p in network.parameters() if p.ndim > 1]
    spared = [p for p in network.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": train.weight_decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, train.learning_rate, betas=BETAS, fused=fused)


def make_scaler(device: Device) -> torch.amp.GradScaler:
    """Loss scaling for fp16; does nothing in bf16 and fp32."""
    return torch.amp.GradScaler(device.torch_device.type, enabled=device.precision == "fp16")


def step(
    network: Callable[[Tensor], Any],
    optimizer: torch.optim.Optimizer,
    loss: Supervised,
    image: Tensor,
    labels: Tensor,
    device: Device,
    clip_norm: float,
    scaler: torch.amp.GradScaler | None = None,
) -> Tensor:
    """Forward, backward, clip and update once. Returns the loss, still on the device; NaN if the step was skipped.

    A loss or gradient that is not finite changes nothing: the fused optimizers are told so by a flag on the device, so
    that the host never waits for it. (With loss scaling the scaler decides, and its overflows are no news.)
    """
    with device.autocast():
        value = loss(network(image), labels)
    scale = scaler if scaler is not None and scaler.is_enabled() else None
    (scale.scale(value) if scale else value).backward()
    if scale:
        scale.unscale_(optimizer)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    norm = nn.utils.clip_grad_norm_(weights, clip_norm, foreach=True)
    if scale:
        scale.step(optimizer)
        scale.update()
    else:
        usable = torch.isfinite(norm) & torch.isfinite(value.detach())
        value = torch.where(usable, value.detach(), math.nan)
        # the flag that torch's own GradScaler sets on fused optimizers: 1 means "leave the weights as they are"
        optimizer.found_inf = (~usable).float().reshape(())  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
    optimizer.zero_grad(set_to_none=True)
    return value.detach()


def learning_rate(train: TrainSpec, done: float, step: int) -> float:
    """Learning rate when the share `done` (0..1) of the training is over; rises linearly in the warm-up steps."""
    falling = SCHEDULES[train.schedule](min(max(done, 0.0), 1.0))
    return train.learning_rate * falling * min(1.0, (step + 1) / max(1, train.warmup_steps))


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
    compiled: Callable[[Tensor], Any] | None = None,
    about_epoch: Callable[[], Mapping[str, float]] = dict,
) -> bool:
    """Train until the length is reached; True when it was, False when `stop()` asked to end earlier.

    Args:
        draw_batch: the batch of a step's number.
        validate: Dice per foreground class on validation patches after an epoch, NaN where a class is absent.
        save: called with the state and whether the running validation Dice is the best so far; after every epoch, in
            between when an epoch takes long, and when stopped.
        compiled: what to run instead of `state.network`, sharing its weights.
        about_epoch: further figures of an epoch that has ended, for its row of the history.
    """
    network = compiled or state.network
    state.network.train()
    sums, count, epoch_start, saved_at = _Sums(device), 0, time.perf_counter(), time.perf_counter()
    while length.done(state) < 1.0:
        start = time.perf_counter()
        rate = learning_rate(train, length.done(state), state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = rate
        batch = draw_batch(state.step)
        value = step(
            network, state.optimizer, loss, batch.image, batch.labels, device, train.clip_norm, state.scaler
        )
        if train.average_decay > 0:
            update_average(state, train.average_decay)
        state.step += 1
        count += 1
        sums.add(value, batch, time.perf_counter() - start)
        state.seconds += time.perf_counter() - start
        epoch_ends = state.step % state.steps_per_epoch == 0 or length.done(state) >= 1.0
        if epoch_ends:
            began = time.perf_counter()
            seconds = began - epoch_start
            _end_epoch(state, sums, count, rate, length, validate, save, report, seconds, about_epoch)
            state.seconds += time.perf_counter() - began
            sums, count, epoch_start, saved_at = _Sums(device), 0, time.perf_counter(), time.perf_counter()
        else:
            _announce(state, length, sums, count, batch, report)
            if time.perf_counter() - saved_at > SAVE_SECONDS:
                save(state, False)
                saved_at = time.perf_counter()
        if stop():
            if not epoch_ends:
                save(state, False)
            return False
    return True


class _Sums:
    """Totals of an epoch; the loss stays on the device until the epoch ends, so that no step waits for it."""

    def __init__(self, device: Device) -> None:
        self.loss = torch.zeros((), device=device.torch_device)
        self.bad = torch.zeros((), device=device.torch_device)
        self.seconds = self.wait = self.augment = 0.0
        self.samples = 0
        self.last_cases: tuple[str, ...] = ()

    def add(self, loss: Tensor, batch: Batch, seconds: float) -> None:
        finite = torch.isfinite(loss)
        self.loss += torch.where(finite, loss, torch.zeros_like(loss))
        self.bad += (~finite).float()
        self.seconds += seconds
        self.wait += batch.wait_seconds
        self.augment += batch.augment_seconds
        self.samples += len(batch.image)
        self.last_cases = batch.cases


def _announce(state: TrainState, length: Length, sums: _Sums, count: int, batch: Batch, report: Report) -> None:
    figures = {"images_per_second": sums.samples / max(sums.seconds, 1e-9), "seconds_left": _left(state, length)}
    inside = state.step % state.steps_per_epoch
    report(Trained(state.epoch + 1, _epochs(state, length), inside, state.steps_per_epoch, figures))


def _left(state: TrainState, length: Length) -> float:
    done = max(length.done(state), 1e-6)
    return state.seconds * (1.0 - min(done, 1.0)) / done


def _epochs(state: TrainState, length: Length) -> int:
    """Of how many epochs to speak: with a time limit, as many as the pace so far promises."""
    if length.max_seconds is None:
        return length.epochs
    return max(state.epoch, math.ceil(state.step / max(length.done(state), 1e-6) / state.steps_per_epoch))


def _end_epoch(
    state: TrainState, sums: _Sums, count: int, rate: float, length: Length,
    validate: Callable[[int], Sequence[float]], save: Callable[[TrainState, bool], None], report: Report,
    seconds: float, about_epoch: Callable[[], Mapping[str, float]],
) -> None:  # fmt: skip
    """Validate, write the epoch into the history, remember the best, save, announce."""
    bad = int(sums.bad.item())
    state.skipped += bad
    if bad:
        report(Warned(
            f"{bad} of {count} steps of epoch {state.epoch + 1} had a loss or gradient that is not finite and were "
            f"skipped; the last batch held {', '.join(sums.last_cases)}."
        ))  # fmt: skip
    state.network.eval()
    dice = [float(value) for value in validate(state.epoch)]
    state.network.train()
    known = [value for value in dice if math.isfinite(value)]
    mean = sum(known) / len(known) if known else math.nan
    best = False
    if known:  # an epoch without any class says nothing and must not poison the running mean
        old = state.smoothed_dice
        state.smoothed_dice = mean if math.isnan(old) else SMOOTHING * old + (1 - SMOOTHING) * mean
        best = state.smoothed_dice > state.best_dice
        state.best_dice = max(state.best_dice, state.smoothed_dice)
    state.epoch += 1
    row = {
        "epoch": float(state.epoch), "step": float(state.step), "seconds": state.seconds, "learning_rate": rate,
        "loss": float(sums.loss.item()) / max(1, count - bad), "dice": mean, "dice_running": state.smoothed_dice,
        "images_per_second": sums.samples / max(sums.seconds, 1e-9),
        "wait_share": sums.wait / max(sums.seconds, 1e-9), "augment_share": sums.augment / max(sums.seconds, 1e-9),
        "epoch_seconds": seconds, "skipped": float(bad),
    }  # fmt: skip
    row |= {f"dice_{k + 1}": value for k, value in enumerate(dice)} | dict(about_epoch())
    state.history.append(row)
    save(state, best)
    epochs = _epochs(state, length)
    report(Trained(state.epoch, epochs, state.steps_per_epoch, state.steps_per_epoch, {
        "loss": row["loss"], "dice": mean, "images_per_second": row["images_per_second"],
        "wait_share": row["wait_share"], "seconds_left": _left(state, length),
    }))  # fmt: skip


SCHEDULES: dict[str, Callable[[float], float]] = {
    "polynomial": lambda done: (1.0 - done) ** 0.9,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
"""Share of the learning rate left when a share of the training is over; polynomial as in nnU-Net (Chen et al. 2017)."""
