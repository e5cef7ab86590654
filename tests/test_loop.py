"""network/loop.py: one training step, the schedule, what an epoch leaves behind, and when a training ends."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from autoseg.errors import UserError
from autoseg.events import Event, Trained, Warned
from autoseg.network import loop, losses, unet
from autoseg.network.device import Device
from autoseg.network.loop import Batch, Length, TrainState, fit
from autoseg.network.muon import Muon
from autoseg.network.step import (
    BETAS,
    follow_layout,
    gradient_signal,
    learn_mode,
    learning_rate,
    make_optimizer,
    make_scaler,
    step,
)
from autoseg.records import AugmentSpec, NetworkSpec, TrainSpec

CPU = Device(torch.device("cpu"), "fp32")
LOSS = losses.build("dice_ce", batch_dice=False)
SPEC = NetworkSpec(
    dimension=2, in_channels=1, classes=2, features=(4, 8), strides=((1, 1), (2, 2)), kernels=((3, 3),) * 2,
    encoder_blocks=(1, 1), decoder_blocks=(1,),
)  # fmt: skip
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])


def a_train(**changes: Any) -> TrainSpec:
    fields = {"warmup_steps": 0, "steps_per_epoch": 2, "augment": AugmentSpec(rotation_rad=(0.0,))}
    return TrainSpec.model_validate(fields | changes)


def a_network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return unet.build(SPEC).train()


def a_batch(number: int = 0) -> Batch:
    """Bright squares on noise, two images of 16 x 16."""
    generator = torch.Generator().manual_seed(number)
    labels = torch.zeros(2, 16, 16, dtype=torch.int16)
    labels[:, 4:10, 6:12] = 1
    image = 0.5 * torch.randn(2, 1, 16, 16, generator=generator) + labels[:, None]
    return Batch(image, labels, ("one", "two"), 0.0, 0.0)


def bad_batch() -> Batch:
    batch = a_batch()
    return Batch(batch.image * math.nan, batch.labels, ("broken", "two"), 0.0, 0.0)


def running_out(times: int) -> Callable[[int], Batch]:
    """Batches of which the second runs out of memory so many times while it is augmented."""
    left = [times]

    def draw(number: int) -> Batch:
        if number == 1 and left[0] > 0:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return a_batch(number)

    return draw


def weights_of(network: nn.Module) -> Tensor:
    return torch.cat([weight.detach().flatten() for weight in network.parameters()])


def one_step(network: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch, loss: Any = LOSS) -> Tensor:
    return step(network, optimizer, loss, batch.image, batch.labels, CPU, 12.0)


# ------------------------------------------------------------------------------------------------ one step


@pytest.mark.parametrize(("start", "reported"), [(65536.0, False), (0.5, True)])
def test_overflow_is_news_only_when_the_scale_of_the_loss_is_not_to_blame(start: float, reported: bool) -> None:
    def steep(logits: Any, target: Tensor) -> Tensor:
        value = LOSS(logits, target)
        value.register_hook(lambda gradient: gradient * math.inf)
        return value

    network, batch = a_network(), a_batch()
    optimizer = make_optimizer(network, a_train(), CPU)
    scaler = torch.amp.GradScaler("cpu", init_scale=start)
    before = weights_of(network)
    value = step(network, optimizer, steep, batch.image, batch.labels, CPU, 12.0, scaler)
    assert torch.isfinite(value) != reported
    assert torch.equal(weights_of(network), before)
    assert scaler.get_scale() == start / 2


def test_gradients_are_clipped_on_devices_without_kernels_over_many_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    clip = nn.utils.clip_grad_norm_
    monkeypatch.setattr(nn.utils, "clip_grad_norm_", lambda *of, **how: asked.append(how) or clip(*of, **how))
    network = a_network()
    one_step(network, make_optimizer(network, a_train(), CPU), a_batch())
    assert asked == [{}]  # foreach=True raises on MPS


@OPTIMIZERS
def test_a_step_changes_every_weight_and_leaves_no_gradient(optimizer: str) -> None:
    network = a_network()
    before = weights_of(network)
    value = one_step(network, make_optimizer(network, a_train(optimizer=optimizer), CPU), a_batch())
    assert torch.isfinite(value)
    assert not value.requires_grad
    assert (weights_of(network) != before).float().mean() > 0.9
    assert all(weight.grad is None for weight in network.parameters())


@OPTIMIZERS
@pytest.mark.parametrize("fused", [True, False])
def test_a_loss_that_is_not_finite_changes_nothing_for_ever(
    optimizer: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not even the moments: the good steps around it give what they give without it, to the last bit."""
    monkeypatch.setattr("autoseg.network.step.FUSED", ("cuda", "cpu") if fused else ())
    clean, hurt = a_network(), a_network()
    train = a_train(optimizer=optimizer)
    clean_optimizer, hurt_optimizer = make_optimizer(clean, train, CPU), make_optimizer(hurt, train, CPU)
    assert one_step(hurt, hurt_optimizer, bad_batch()).isnan()
    assert torch.equal(weights_of(hurt), weights_of(clean))
    for number in range(2):
        one_step(clean, clean_optimizer, a_batch(number))
        one_step(hurt, hurt_optimizer, a_batch(number))
        one_step(hurt, hurt_optimizer, bad_batch())
    assert torch.equal(weights_of(hurt), weights_of(clean))


def broken_gradient(logits: Any, labels: Tensor) -> Tensor:
    """A loss of 0 whose gradient is not a number."""
    return sum(each.sum() * 0 for each in logits).sqrt()


def infinite_without_gradient(logits: Any, labels: Tensor) -> Tensor:
    return sum(each.sum() for each in logits) + math.inf


@OPTIMIZERS
@pytest.mark.parametrize("loss", [broken_gradient, infinite_without_gradient])
def test_loss_and_gradient_must_both_be_finite(optimizer: str, loss: Any) -> None:
    network = a_network()
    before = weights_of(network)
    value = one_step(network, make_optimizer(network, a_train(optimizer=optimizer), CPU), a_batch(), loss)
    assert torch.equal(weights_of(network), before)
    assert not torch.isfinite(value)  # so that the loop can count it


def test_large_gradients_are_clipped() -> None:
    network = a_network()
    before = weights_of(network)
    train = a_train(optimizer="sgd", weight_decay=0.0, learning_rate=0.5, momentum=0.5)
    optimizer = make_optimizer(network, train, CPU)
    batch = a_batch()
    step(network, optimizer, lambda x, y: 1e6 * LOSS(x, y), batch.image, batch.labels, CPU, clip_norm=2.0)
    # Nesterov's first step is (1 + momentum) gradients long
    assert (weights_of(network) - before).norm().item() == pytest.approx(0.5 * 1.5 * 2.0, rel=1e-3)


def test_adamw_decays_convolutions_and_spares_norms_and_biases() -> None:
    network = a_network()
    optimizer = make_optimizer(network, a_train(weight_decay=0.25), CPU)
    decayed, spared = optimizer.param_groups
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.25, 0.0)
    assert {weight.ndim for weight in decayed["params"]} == {4}
    assert {weight.ndim for weight in spared["params"]} == {1}
    assert len(decayed["params"]) + len(spared["params"]) == len(list(network.parameters()))


def test_muon_takes_the_convolutions_but_not_the_heads() -> None:
    network = a_network()
    optimizer = make_optimizer(network, a_train(optimizer="muon"), CPU)
    matrices, decayed, spared = (set(group["params"]) for group in optimizer.param_groups)
    heads = {weight for name, weight in network.named_parameters() if name.startswith("head") and weight.ndim > 1}
    assert len(heads) > 0
    assert decayed == heads
    assert {weight.ndim for weight in matrices} == {4}
    assert {weight.ndim for weight in spared} == {1}
    assert len(matrices | decayed | spared) == len(list(network.parameters()))


def test_sgd_is_that_of_the_plan_with_nesterov() -> None:
    optimizer = make_optimizer(a_network(), a_train(optimizer="sgd", momentum=0.9, weight_decay=3e-5), CPU)
    group = optimizer.param_groups[0]
    assert (group["momentum"], group["weight_decay"], group["nesterov"]) == (0.9, 3e-5, True)


def test_sgd_without_momentum_is_plain_and_impossible_momentum_is_refused() -> None:
    network, batch = a_network(), a_batch()
    before = weights_of(network)
    train = a_train(optimizer="sgd", momentum=0.0, weight_decay=0.0, learning_rate=0.5)
    step(network, make_optimizer(network, train, CPU), lambda x, y: 1e6 * LOSS(x, y), batch.image, batch.labels, CPU, 2)
    assert (weights_of(network) - before).norm().item() == pytest.approx(0.5 * 2.0, rel=1e-3)
    for momentum in (-0.1, 1.0):
        with pytest.raises(ValidationError):
            a_train(momentum=momentum)


@pytest.mark.parametrize(("precision", "scales"), [("fp32", False), ("bf16", False), ("fp16", True)])
def test_only_fp16_scales_the_loss(precision: str, scales: bool) -> None:
    assert make_scaler(Device(torch.device("cpu"), precision)).is_enabled() == scales


# ------------------------------------------------------------------------------------------------ learning rate


@pytest.mark.parametrize(
    ("schedule", "done", "share"),
    [
        ("polynomial", 0.0, 1.0), ("polynomial", 0.5, 0.5**0.9), ("polynomial", 1.0, 0.0), ("polynomial", 1.2, 0.0),
        ("cosine", 0.0, 1.0), ("cosine", 0.5, 0.5), ("cosine", 1.0, 0.0),
        ("constant", 0.0, 1.0), ("constant", 1.0, 1.0),
    ],
)  # fmt: skip
def test_the_learning_rate_falls_as_the_schedule_says(schedule: str, done: float, share: float) -> None:
    assert learning_rate(a_train(schedule=schedule, learning_rate=0.01), done, 99) == pytest.approx(0.01 * share)


@pytest.mark.parametrize(("number", "share"), [(0, 0.1), (4, 0.5), (9, 1.0), (10, 1.0), (500, 1.0)])
def test_the_learning_rate_rises_in_the_first_steps(number: int, share: float) -> None:
    train = a_train(schedule="constant", learning_rate=0.01, warmup_steps=10)
    assert learning_rate(train, 0.0, number) == pytest.approx(0.01 * share)


@pytest.mark.parametrize(("number", "share"), [(0, 0.02), (5, 0.5), (10, 1.0), (25, 1.0)])
def test_warm_up_takes_no_more_than_a_fifth_of_a_short_training(number: int, share: float) -> None:
    train = a_train(schedule="constant", learning_rate=0.01, warmup_steps=50)
    assert learning_rate(train, number / 50, number) == pytest.approx(0.01 * share)


# ------------------------------------------------------------------------------------------------ the loop


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@dataclass
class Training:
    """A fit() whose surroundings are visible: what was drawn, saved (with the step) and announced."""

    train: TrainSpec = field(default_factory=a_train)
    state: TrainState = field(init=False)
    clock: Clock = field(default_factory=Clock)
    step_seconds: float = 1.0
    validation_seconds: float = 0.0
    save_seconds: float = 0.0
    batch: Callable[[int], Batch] = a_batch
    dice: Callable[[int], list[float]] = lambda epoch: [0.5]
    stop_at: int | None = None
    device: Device = CPU
    losses_in: list[torch.dtype] = field(default_factory=list)
    drawn: list[int] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    saved: list[tuple[int, bool]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)

    def __post_init__(self) -> None:
        network = a_network()
        self.state = TrainState(
            network, make_optimizer(network, self.train, CPU), make_scaler(CPU),
            steps_per_epoch=self.train.steps_per_epoch,
        )  # fmt: skip

    def run(self, length: Length) -> bool:
        return fit(
            self.state, self.train, length, self.device, self._loss, self._draw, self._validate,
            self._save,
            lambda: self.state.step == self.stop_at, self.events.append,
        )  # fmt: skip

    def _loss(self, logits: Any, labels: Tensor) -> Tensor:
        self.losses_in.append(logits[0].dtype)
        return LOSS(logits, labels)

    def _draw(self, number: int) -> Batch:
        self.drawn.append(number)
        self.rates.append(self.state.optimizer.param_groups[0]["lr"])
        self.clock.now += self.step_seconds
        return self.batch(number)

    def _save(self, state: TrainState, best: bool) -> None:
        self.clock.now += self.save_seconds
        self.saved.append((state.step, best))

    def _validate(self, epoch: int) -> list[float]:
        self.clock.now += self.validation_seconds
        return self.dice(epoch)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=clock.perf_counter))
    return clock


def test_so_many_epochs_are_so_many_steps(clock: Clock) -> None:
    training = Training(a_train(learning_rate=1.0), clock=clock)
    assert training.run(Length(epochs=3))
    assert training.drawn == [0, 1, 2, 3, 4, 5]
    assert (training.state.step, training.state.epoch, training.state.seconds) == (6, 3, 6.0)
    assert training.rates == pytest.approx([(1 - done / 6) ** 0.9 for done in range(6)])
    assert [row["epoch"] for row in training.state.history] == [1.0, 2.0, 3.0]
    assert [number for number, _ in training.saved] == [2, 4, 6]


def test_a_time_limit_ends_the_schedule_and_counts_validation(clock: Clock) -> None:
    training = Training(a_train(learning_rate=1.0), clock=clock, step_seconds=2.0, validation_seconds=3.0)
    assert training.run(Length(epochs=1000, max_seconds=20.0))
    # two steps and a validation take 7 s; the sixth step ends at 6 x 2 + 2 x 3 = 18 s, and 3 s of validation follow
    assert training.state.step == 6
    assert training.state.seconds == pytest.approx(21.0)
    assert training.rates == pytest.approx([(1 - passed / 20) ** 0.9 for passed in (0, 2, 7, 9, 14, 16)])


def test_a_time_limit_amid_an_epoch_ends_it_there(clock: Clock) -> None:
    training = Training(a_train(steps_per_epoch=100), clock=clock)
    assert training.run(Length(epochs=1000, max_seconds=5.0))
    assert (training.state.step, training.state.epoch) == (5, 1)
    assert training.saved == [(5, True)]


def test_an_epoch_that_a_time_limit_cut_short_is_one_of_those_that_are_announced_when_it_goes_on(clock: Clock) -> None:
    training = Training(a_train(steps_per_epoch=3), clock=clock)
    training.run(Length(epochs=1000, max_seconds=4.0))
    training.events.clear()
    training.run(Length(epochs=3))
    announced = [(event.epoch, event.epochs) for event in training.events if isinstance(event, Trained)]
    assert announced == [(3, 4), (3, 4), (4, 4), (4, 4), (4, 4)]
    assert len(training.state.history) == 4


def test_a_training_that_is_over_does_nothing_more(clock: Clock) -> None:
    training = Training(clock=clock)
    training.run(Length(epochs=1))
    assert training.run(Length(epochs=1))
    assert training.drawn == [0, 1]


def test_a_stop_amid_an_epoch_saves_and_ends(clock: Clock) -> None:
    training = Training(clock=clock, stop_at=3)
    assert not training.run(Length(epochs=3))
    assert training.saved == [(2, True), (3, False)]
    training.stop_at = None
    assert training.run(Length(epochs=3))
    assert training.drawn == [0, 1, 2, 3, 4, 5]
    assert (training.state.step, training.state.epoch, len(training.state.history)) == (6, 3, 3)


@pytest.mark.parametrize("stop_at", [2, 6])
def test_a_stop_at_the_end_of_an_epoch_keeps_the_epoch(clock: Clock, stop_at: int) -> None:
    training = Training(clock=clock, stop_at=stop_at)
    assert not training.run(Length(epochs=3))
    assert training.state.epoch == len(training.state.history) == stop_at // 2
    assert training.saved[-1][0] == stop_at
    training.stop_at = None
    assert training.run(Length(epochs=3))
    assert [row["step"] for row in training.state.history] == [2.0, 4.0, 6.0]


def test_a_long_epoch_is_saved_in_between(clock: Clock) -> None:
    """And what the saves take is time of the training, whose schedule goes by it."""
    training = Training(a_train(steps_per_epoch=5), clock=clock, step_seconds=31.0, save_seconds=2.0)
    training.run(Length(epochs=1))
    assert training.saved == [(2, False), (4, False), (5, True)]
    assert training.state.seconds == clock.now == 5 * 31.0 + 3 * 2.0
    assert training.state.history[-1]["images_per_second"] == pytest.approx(2 / 31.0)


def test_a_batch_for_which_memory_ran_out_is_drawn_once_more() -> None:
    training = Training(batch=running_out(1))
    assert training.run(Length(epochs=1))
    assert training.drawn == [0, 1, 1]
    with pytest.raises(UserError, match=r"^cpu has too little memory for a batch of patches \(CUDA out of memory"):
        Training(batch=running_out(2)).run(Length(epochs=1))


@pytest.mark.parametrize("steps_per_epoch", [1, 3, 7])
def test_the_number_of_epochs_that_is_announced_is_the_one_asked_for(clock: Clock, steps_per_epoch: int) -> None:
    training = Training(a_train(steps_per_epoch=steps_per_epoch), clock=clock)
    training.run(Length(epochs=6))
    announced = [event for event in training.events if isinstance(event, Trained)]
    assert {event.epochs for event in announced} == {6}
    assert [(event.epoch - 1) * steps_per_epoch + event.step for event in announced] == list(
        range(1, 6 * steps_per_epoch + 1)
    )


@pytest.mark.parametrize("epochs", [1, 30, 49, 100, 1000])
@pytest.mark.parametrize("steps_per_epoch", [1, 30, 49, 250])
def test_rounding_adds_no_epoch(epochs: int, steps_per_epoch: int) -> None:
    state = Training().state
    state.steps_per_epoch = steps_per_epoch
    seen = set()
    for number in range(1, epochs * steps_per_epoch + 1, max(1, epochs * steps_per_epoch // 500)):
        state.step, state.epoch = number, number // steps_per_epoch
        seen.add(loop._epochs(state, Length(epochs)))
    assert seen == {epochs}


def test_time_left_is_what_the_pace_so_far_says(clock: Clock) -> None:
    training = Training(clock=clock)
    training.run(Length(epochs=2))
    left = [event.figures["seconds_left"] for event in training.events if isinstance(event, Trained)]
    assert left == pytest.approx([3.0, 2.0, 1.0, 0.0])


def test_the_dice_of_patches_is_not_announced_as_that_of_images(clock: Clock) -> None:
    training = Training(clock=clock, dice=lambda epoch: [0.25])
    training.run(Length(epochs=2))
    figures = [event.figures for event in training.events if isinstance(event, Trained)][-1]
    assert "dice" not in figures
    assert figures["dice_on_patches"] == training.state.history[-1]["dice"] == 0.25


def test_bad_steps_are_counted_named_and_left_out_of_the_mean_loss() -> None:
    training = Training(batch=lambda number: bad_batch() if number == 1 else a_batch())
    training.run(Length(epochs=2))
    assert training.state.skipped == 1
    assert [row["skipped"] for row in training.state.history] == [1.0, 0.0]
    assert all(math.isfinite(row["loss"]) and row["loss"] > 0.1 for row in training.state.history)
    warnings = [event.text for event in training.events if isinstance(event, Warned)]
    assert len(warnings) == 1
    assert "1 of 2 steps of epoch 1" in warnings[0]
    assert "broken" in warnings[0]
    assert torch.isfinite(weights_of(training.state.network)).all()


def test_the_cases_of_bad_steps_are_named_and_not_those_of_others() -> None:
    training = Training(a_train(steps_per_epoch=12), batch=lambda number: bad_batch() if number == 3 else a_batch())
    training.run(Length(epochs=1))
    [warning] = [event.text for event in training.events if isinstance(event, Warned)]
    assert "their batches held broken, two." in warning
    assert "one" not in warning.split("held")[1]


def test_an_epoch_without_a_finite_step_is_never_the_best_and_has_no_loss() -> None:
    training = Training(batch=lambda number: bad_batch() if number < 2 else a_batch())
    training.dice = lambda epoch: [0.9 - epoch / 2]
    training.run(Length(epochs=2))
    assert [best for _, best in training.saved] == [False, True]
    assert training.state.best_dice == pytest.approx(0.4)
    first, second = training.state.history
    assert math.isnan(first["loss"])
    assert math.isnan(first["dice_running"])
    assert math.isfinite(second["loss"])


def test_bad_steps_leave_running_statistics_and_the_average_finite() -> None:
    training = Training(a_train(average_decay=0.9), batch=lambda number: bad_batch() if number % 2 else a_batch())
    torch.manual_seed(0)
    network = unet.build(NetworkSpec.model_validate(SPEC.model_dump() | {"norm": "batch"}))
    training.state.network, training.state.optimizer = network, make_optimizer(network, training.train, CPU)
    training.run(Length(epochs=1))
    assert all(torch.isfinite(tensor).all() for tensor in network.state_dict().values())
    assert all(torch.isfinite(tensor).all() for tensor in training.state.average)


def test_repeated_trouble_ends_mixed_precision_and_says_so() -> None:
    training = Training(batch=lambda number: bad_batch() if number < 4 else a_batch())
    training.device = Device(CPU.torch_device, "bf16")
    training.run(Length(epochs=3))
    assert training.state.precision == "fp32"
    last = [event.text for event in training.events if isinstance(event, Warned)][-1]
    assert last.startswith("Mixed precision is given up")
    assert training.losses_in == [torch.bfloat16] * 4 + [torch.float32] * 2


def test_in_full_precision_repeated_trouble_ends_the_training_before_it_is_saved() -> None:
    training = Training(batch=lambda number: a_batch() if number < 2 else bad_batch())
    with pytest.raises(UserError, match=r"No step of epoch 3 had a finite loss.*broken, two.*--resume --lr"):
        training.run(Length(epochs=9))
    assert [number for number, _ in training.saved] == [2, 4]


def test_in_full_precision_a_training_goes_on_while_some_steps_are_good() -> None:
    training = Training(batch=lambda number: bad_batch() if number % 2 else a_batch())
    assert training.run(Length(epochs=4))
    warnings = [event.text for event in training.events if isinstance(event, Warned)]
    assert [("1 of 2 steps" in text, "broken" in text) for text in warnings] == [(True, True)] * 4


def test_weights_that_are_not_finite_are_never_saved() -> None:
    training = Training(batch=lambda number: spoil(training.state.network) if number == 3 else a_batch(number))
    with pytest.raises(UserError, match="After step 4 the weights are not finite any more"):
        training.run(Length(epochs=3))
    assert [number for number, _ in training.saved] == [2]


def spoil(network: nn.Module) -> Batch:
    """As if an update had overflowed."""
    with torch.no_grad():
        next(network.parameters()).fill_(math.inf)
    return a_batch()


def test_what_is_frozen_keeps_its_statistics() -> None:
    network = unet.build(NetworkSpec.model_validate(SPEC.model_dump() | {"norm": "batch"}))
    for weight in network.encoder.parameters():
        weight.requires_grad_(False)
    learn_mode(network)
    assert network.training
    norms = {name: each.training for name, each in network.named_modules() if isinstance(each, nn.BatchNorm2d)}
    assert {name.split(".")[0]: training for name, training in norms.items()} == {"encoder": False, "decoder": True}


def test_the_running_dice_follows_slowly_and_marks_the_best() -> None:
    training = Training(dice=lambda epoch: [[0.5, 0.7], [0.9, 0.9], [0.1, 0.1]][epoch])
    training.run(Length(epochs=3))
    assert [row["dice"] for row in training.state.history] == pytest.approx([0.6, 0.9, 0.1])
    running = [0.6, 0.9 * 0.6 + 0.1 * 0.9, 0.9 * (0.9 * 0.6 + 0.1 * 0.9) + 0.1 * 0.1]
    assert [row["dice_running"] for row in training.state.history] == pytest.approx(running)
    assert training.state.best_dice == pytest.approx(running[1])
    assert [best for _, best in training.saved] == [True, True, False]
    assert [row["dice_2"] for row in training.state.history] == [0.7, 0.9, 0.1]


def test_an_epoch_whose_validation_shows_no_class_poisons_nothing() -> None:
    nothing = [math.nan, math.nan]
    training = Training(dice=lambda epoch: [nothing, [0.5, math.nan], nothing, [0.6, 0.8]][epoch])
    training.run(Length(epochs=4))
    assert [best for _, best in training.saved] == [False, True, False, True]
    assert training.state.best_dice == pytest.approx(0.9 * 0.5 + 0.1 * 0.7)
    assert training.state.history[2]["dice_running"] == 0.5


def test_validation_runs_in_eval_mode_and_training_in_training_mode() -> None:
    training = Training()
    modes = []
    training.dice = lambda epoch: modes.append(training.state.network.training) or [0.5]  # type: ignore[func-returns-value]
    training.batch = lambda number: modes.append(training.state.network.training) or a_batch()  # type: ignore[func-returns-value]
    training.run(Length(epochs=2))
    assert modes == [True, True, False, True, True, False]


def test_the_loop_runs_the_compiled_step_where_there_is_one() -> None:
    training, calls = Training(), []

    class Compiled:
        """Like torch's: neither true nor false."""

        def __call__(self, image: Tensor, labels: Tensor) -> Any:
            calls.append(image.shape)
            return LOSS(training.state.network(image), labels)

        def __len__(self) -> int:
            raise TypeError

    state = training.state
    fit(state, training.train, Length(1), CPU, LOSS, a_batch, lambda _: [0.5], lambda *_: None, lambda: False,
        lambda _: None, Compiled())  # fmt: skip
    assert len(calls) == 2


@pytest.mark.parametrize("why", ["pieces", "precision"])
def test_the_compiled_step_is_left_with_pieces_and_with_full_precision(why: str) -> None:
    training, calls = Training(), list[str]()
    state = training.state

    def compiled(image: Tensor, labels: Tensor) -> Tensor:
        calls.append("compiled")
        if len(calls) == 2 and why == "pieces":
            state.pieces = 2
        return LOSS(state.network(image), labels)

    def validate(epoch: int) -> list[float]:
        if why == "precision":
            state.precision = "fp32"
        return [0.5]

    fit(state, training.train, Length(3), CPU, LOSS, a_batch, validate, lambda *_: None, lambda: False,
        lambda _: None, compiled, go_eager=lambda: calls.append("eager"))  # fmt: skip
    assert calls == ["compiled", "compiled", "eager"]
    assert state.step == 6


@OPTIMIZERS
def test_moments_follow_the_layout_of_the_weights(optimizer: str) -> None:
    network, other = a_network(), a_network()
    own, others = (make_optimizer(each, a_train(optimizer=optimizer), CPU) for each in (network, other))
    one_step(network, own, a_batch())
    one_step(other, others, a_batch())
    network.to(memory_format=torch.channels_last)
    follow_layout(own)
    for weight, values in own.state.items():
        assert all(each.stride() == weight.stride() for each in values.values() if each.shape == weight.shape)
    one_step(network, own, a_batch(1))
    one_step(other, others, a_batch(1))
    torch.testing.assert_close(weights_of(network), weights_of(other), rtol=1e-4, atol=1e-5)


def test_a_tiny_batch_is_learned_by_heart() -> None:
    train = a_train(learning_rate=0.01, steps_per_epoch=10, average_decay=0.5)
    training = Training(train, batch=lambda number: a_batch(0))
    training.run(Length(epochs=6))
    found = [row["loss"] for row in training.state.history]
    assert found == sorted(found, reverse=True)
    assert found[-1] < 0.3 * found[0]
    labels = a_batch(0).labels
    with torch.no_grad():
        assert ((training.state.network.eval()(a_batch(0).image).argmax(1) == labels).float().mean()) > 0.97


# ------------------------------------------------------------------------------------------------ the average


def test_the_average_follows_the_weights_as_the_formula_says() -> None:
    seen: list[Tensor] = []
    training = Training(a_train(average_decay=0.3, learning_rate=0.05), dice=lambda epoch: [0.5])
    training.batch = lambda number: seen.append(weights_of(training.state.network)) or a_batch(number)  # type: ignore[func-returns-value]
    training.run(Length(epochs=3))
    weights = [*seen[1:], weights_of(training.state.network)]
    expected = weights[0]
    for number, each in enumerate(weights[1:], start=1):
        decay = min(0.3, (1 + number) / (10 + number))
        expected = decay * expected + (1 - decay) * each
    found = torch.cat([each.flatten() for each in training.state.average])
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, weights[-1])


def test_without_a_decay_no_average_is_kept() -> None:
    training = Training()
    training.run(Length(epochs=1))
    assert training.state.average == []


# ------------------------------------------------------------------------------------------------ noise


@pytest.mark.parametrize("noise", [0.0, 0.5, 3.0])
def test_the_gradient_signal_is_what_batches_agree_on(noise: float) -> None:
    """Gradients of mean 1 and a standard deviation of `noise`: the share is 1 / (1 + noise^2), whatever their scale."""
    chance = torch.Generator().manual_seed(1)
    for scale in (1.0, 1e-3):
        weight = torch.nn.Parameter(torch.zeros(20_000))
        optimizer = torch.optim.AdamW([weight], 1e-3, betas=BETAS)
        for _ in range(60):
            weight.grad = scale * (1.0 + noise * torch.randn(20_000, generator=chance))
            optimizer.step()
        assert gradient_signal(optimizer) == pytest.approx(1 / (1 + noise**2), abs=0.02)


@pytest.mark.parametrize("steps", [2, 5])
def test_after_few_steps_the_gradient_signal_is_that_of_few(steps: int) -> None:
    chance = torch.Generator().manual_seed(1)
    for mean in (0.0, 1.0):
        weight = torch.nn.Parameter(torch.zeros(100_000))
        optimizer = torch.optim.AdamW([weight], 1e-3, betas=BETAS)
        for number in range(steps):
            weight.grad = mean + torch.randn(100_000, generator=chance)
            optimizer.step()
            assert math.isnan(gradient_signal(optimizer)) == (number == 0)
        assert gradient_signal(optimizer) == pytest.approx(mean / 2, abs=0.02)


def test_under_muon_the_gradient_signal_is_that_of_the_weights_that_have_adamws_moments() -> None:
    chance = torch.Generator().manual_seed(1)
    kernel, norm = torch.nn.Parameter(torch.zeros(2, 2, 3, 3)), torch.nn.Parameter(torch.zeros(20_000))
    optimizer = Muon([kernel], [{"params": [norm]}], 1e-3, 0.0, betas=BETAS)
    for _ in range(60):
        kernel.grad = torch.randn(kernel.shape, generator=chance)
        norm.grad = 1.0 + torch.randn(20_000, generator=chance)
        optimizer.step()
    assert gradient_signal(optimizer) == pytest.approx(0.5, abs=0.02)


def test_an_optimizer_without_moments_has_no_gradient_signal() -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    assert math.isnan(gradient_signal(torch.optim.SGD([weight], 0.1, momentum=0.9)))


def test_the_loss_noise_of_an_epoch_is_that_from_step_to_step() -> None:
    sums = loop._Sums(CPU)
    nothing = loop.Batch(torch.zeros(1, 1), torch.zeros(1), ("a",), 0.0, 0.0)
    sums.add(torch.tensor(7.0), nothing, 0.0)
    assert math.isnan(sums.noise())
    sums = loop._Sums(CPU)
    for value in (1.0, 3.0, math.nan, 2.0, 4.0):
        sums.add(torch.tensor(value), nothing, 0.0)
    assert sums.noise() == pytest.approx(2.0 / math.sqrt(2))


def test_images_per_second_are_those_of_the_whole_team() -> None:
    """`own` images against the speed of this process, `samples` of all processes for the reader."""
    sums = loop._Sums(CPU)
    for cases in (("a", "b", "c", "d", "e", "f", "g"), ("a", "b")):
        sums.add(torch.tensor(1.0), loop.Batch(torch.zeros(2, 1), torch.zeros(2), cases, 0.0, 0.0), 0.5)
    assert (sums.own, sums.samples) == (4, 9)
