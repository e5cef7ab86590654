"""network/checkpoint.py: a training goes on bit by bit from its file, and a file that is not right is refused."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from autoseg.errors import UserError
from autoseg.network import checkpoint, losses, unet
from autoseg.network.checkpoint import load_state, load_weights, read_mirror_axes, save_state, save_weights
from autoseg.network.device import Device, lay_out
from autoseg.network.loop import Batch, Length, TrainState, fit
from autoseg.network.step import make_optimizer, make_scaler
from autoseg.records import AugmentSpec, NetworkSpec, TrainSpec

CPU = Device(torch.device("cpu"), "fp32")
LOSS = losses.build("dice_ce", batch_dice=False)
OPTIMIZERS = pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])


def a_spec(**changes: Any) -> NetworkSpec:
    fields = {
        "dimension": 2, "in_channels": 2, "classes": 2, "features": (4, 8), "strides": ((1, 1), (2, 2)),
        "kernels": ((3, 3),) * 2, "encoder_blocks": (1, 1), "decoder_blocks": (1,),
    }  # fmt: skip
    return NetworkSpec.model_validate(fields | changes)


def a_train(**changes: Any) -> TrainSpec:
    augment = AugmentSpec(rotation_rad=(0.0,))
    fields = {"warmup_steps": 2, "steps_per_epoch": 3, "average_decay": 0.9, "augment": augment}
    return TrainSpec.model_validate(fields | changes)


def a_state(train: TrainSpec, seed: int = 0, **network: Any) -> TrainState:
    """As training starts: weights laid out with channels innermost."""
    torch.manual_seed(seed)
    built = lay_out(unet.build(a_spec(**network)), 2, CPU)
    return TrainState(built, make_optimizer(built, train, CPU), make_scaler(CPU), steps_per_epoch=train.steps_per_epoch)


def a_batch(number: int) -> Batch:
    generator = torch.Generator().manual_seed(number)
    labels = torch.randint(0, 2, (2, 16, 16), generator=generator, dtype=torch.int16)
    return Batch(torch.randn(2, 2, 16, 16, generator=generator), labels, ("a", "b"), 0.0, 0.0)


def go_on(state: TrainState, train: TrainSpec, steps: int | None = None) -> None:
    """Train for two epochs of three steps, or until step number `steps`."""
    fit(
        state, train, Length(epochs=2), CPU, LOSS, a_batch, lambda epoch: [0.25 * (epoch + 1), math.nan],
        lambda *_: None, lambda: state.step == steps, lambda _: None,
    )  # fmt: skip


def tensors_of(state: TrainState) -> dict[str, Tensor]:
    """All that learning depends on."""
    found = dict(state.network.state_dict())
    for index, values in state.optimizer.state_dict()["state"].items():
        found |= {f"optimizer.{index}.{name}": torch.as_tensor(value) for name, value in values.items()}
    return found | {f"average.{index}": tensor for index, tensor in enumerate(state.average)}


def assert_same(one: TrainState, other: TrainState) -> None:
    left, right = tensors_of(one), tensors_of(other)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []
    numbers = (
        "step", "epoch", "steps_per_epoch", "smoothed_dice", "best_dice", "skipped", "pieces", "precision", "troubled",
    )  # fmt: skip
    assert [str(getattr(one, name)) for name in numbers] == [str(getattr(other, name)) for name in numbers]


# ------------------------------------------------------------------------------------------------ going on


@pytest.mark.parametrize("half", [3, 4])
@pytest.mark.parametrize(
    ("optimizer", "network"),
    [
        ("adamw", {}), ("adamw", {"norm": "batch", "dropout": 0.3}), ("adamw", {"kind": "residual"}),
        ("muon", {"norm": "batch", "dropout": 0.3}), ("muon", {"kind": "residual"}), ("sgd", {"dropout": 0.3}),
    ],
    ids=str,
)  # fmt: skip
def test_a_training_in_two_parts_is_the_training_in_one(
    tmp_path: Path, optimizer: str, network: dict[str, Any], half: int
) -> None:
    train = a_train(optimizer=optimizer)
    whole = a_state(train, **network)
    go_on(whole, train)
    first = a_state(train, **network)
    go_on(first, train, half)
    assert first.step == half
    save_state(tmp_path / "state", first)
    torch.manual_seed(99)
    second = a_state(train, seed=1, **network)
    load_state(tmp_path / "state", second)
    go_on(second, train)
    assert second.step == whole.step == 6
    assert_same(whole, second)


@OPTIMIZERS
def test_a_state_comes_back_exactly(tmp_path: Path, optimizer: str) -> None:
    train = a_train(optimizer=optimizer)
    state = a_state(train, norm="batch")
    go_on(state, train, 5)
    state.skipped, state.pieces, state.precision, state.troubled = 3, 2, "fp32", 1
    save_state(tmp_path / "state", state)
    back = a_state(train, seed=1, norm="batch")
    load_state(tmp_path / "state", back)
    assert_same(state, back)
    assert (back.step, back.epoch, back.skipped) == (5, 1, 3)
    assert (back.pieces, back.precision, back.troubled) == (2, "fp32", 1)
    assert back.seconds == state.seconds
    assert json.dumps(back.history) == json.dumps(state.history)  # as text, for it holds a NaN
    assert math.isnan(back.history[0]["dice_2"])


def test_moments_are_laid_out_like_their_weights(tmp_path: Path) -> None:
    """The fused optimizers walk through memory in order, whatever the strides say."""
    train = a_train()
    state = a_state(train)
    go_on(state, train, 1)
    save_state(tmp_path / "state", state)
    back = a_state(train)
    load_state(tmp_path / "state", back)
    for weight, values in back.optimizer.state.items():
        assert values["exp_avg"].stride() == values["exp_avg_sq"].stride() == weight.stride()


def test_a_training_that_has_not_begun_can_be_saved(tmp_path: Path) -> None:
    train = a_train()
    save_state(tmp_path / "state", a_state(train))
    back = a_state(train, seed=1)
    load_state(tmp_path / "state", back)
    assert_same(a_state(train), back)
    assert math.isnan(back.smoothed_dice)
    assert back.best_dice == -math.inf


def test_random_numbers_go_on_where_they_were(tmp_path: Path) -> None:
    train = a_train()
    state = a_state(train)
    save_state(tmp_path / "state", state)
    expected = torch.rand(5)
    torch.manual_seed(5)
    load_state(tmp_path / "state", state)
    assert torch.equal(torch.rand(5), expected)


def test_the_scaler_of_fp16_goes_on_where_it_was(tmp_path: Path) -> None:
    train, half = a_train(), Device(torch.device("cpu"), "fp16")
    state, back = a_state(train), a_state(train)
    state.scaler, back.scaler = make_scaler(half), make_scaler(half)
    state.scaler.load_state_dict(state.scaler.state_dict() | {"scale": 128.0, "_growth_tracker": 7})
    save_state(tmp_path / "state", state)
    load_state(tmp_path / "state", back)
    assert back.scaler.state_dict()["scale"] == 128.0
    assert back.scaler.state_dict()["_growth_tracker"] == 7


def test_a_training_without_loss_scaling_goes_on_in_fp16(tmp_path: Path) -> None:
    """Begun in bf16, or given up mixed precision: its state knows of no scale, and the scaler begins anew."""
    train, half = a_train(), Device(torch.device("cpu"), "fp16")
    save_state(tmp_path / "state", a_state(train))
    back = a_state(train)
    back.scaler = make_scaler(half)
    fresh = back.scaler.state_dict()
    load_state(tmp_path / "state", back)
    assert back.scaler.state_dict() == fresh


# ------------------------------------------------------------------------------------------------ weights


def test_weights_come_back_exactly(tmp_path: Path) -> None:
    train = a_train()
    state = a_state(train, norm="batch")
    go_on(state, train, 2)
    save_weights(tmp_path / "weights", state.network)
    back = a_state(train, seed=1, norm="batch").network
    load_weights(tmp_path / "weights", back)
    for name, tensor in state.network.state_dict().items():
        assert torch.equal(back.state_dict()[name], tensor), name


def test_weights_are_the_average_where_one_was_kept_and_statistics_those_of_the_network(tmp_path: Path) -> None:
    train = a_train()
    state = a_state(train, norm="batch")
    go_on(state, train, 4)
    for name in ("weights", *"abcdef"):
        save_weights(tmp_path / name, state.network, state.average, (0, 2))
        assert (tmp_path / name).read_bytes() == (tmp_path / "weights").read_bytes()
    assert read_mirror_axes(tmp_path / "weights") == (0, 2)
    back = a_state(train, seed=1, norm="batch").network
    load_weights(tmp_path / "weights", back)
    parameters = list(back.parameters())
    assert all(torch.equal(a, b) for a, b in zip(parameters, state.average, strict=True))
    assert not torch.equal(parameters[0], next(state.network.parameters()))
    for name, tensor in state.network.named_buffers():
        assert torch.equal(back.get_buffer(name), tensor), name


# ------------------------------------------------------------------------------------------------ wrong files


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """A training state and weights."""
    train = a_train()
    state = a_state(train)
    go_on(state, train, 1)
    save_state(tmp_path / "state", state)
    save_weights(tmp_path / "weights", state.network)
    return tmp_path / "state", tmp_path / "weights"


def load_both(files: tuple[Path, Path], part: int, **network: Any) -> None:
    state = a_state(a_train(), **network)
    if part == 0:
        load_state(files[0], state)
    else:
        load_weights(files[1], state.network)


BOTH = pytest.mark.parametrize("part", [0, 1], ids=["state", "weights"])


@BOTH
@pytest.mark.parametrize("kept", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_truncated_file_is_refused_by_name(files: tuple[Path, Path], part: int, kept: float) -> None:
    content = files[part].read_bytes()
    files[part].write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(UserError, match=files[part].name):
        load_both(files, part)


@BOTH
@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x00" * 64, b"PK\x03\x04 no tensors at all"])
def test_a_damaged_file_is_refused_by_name(files: tuple[Path, Path], part: int, damage: bytes) -> None:
    content = files[part].read_bytes()
    files[part].write_bytes(damage + content[len(damage) :])
    with pytest.raises(UserError, match=files[part].name):
        load_both(files, part)


@BOTH
@pytest.mark.parametrize("network", [{"features": (4, 6)}, {"kind": "residual"}, {"in_channels": 1}], ids=str)
def test_the_file_of_another_network_is_refused(files: tuple[Path, Path], part: int, network: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{files[part].name}: th.* network"):
        load_both(files, part, **network)


@BOTH
def test_a_missing_file_is_named(files: tuple[Path, Path], part: int) -> None:
    files[part].unlink()
    with pytest.raises(UserError, match=f"{files[part].name}: no such file"):
        load_both(files, part)


def test_weights_and_states_are_not_taken_for_each_other(files: tuple[Path, Path]) -> None:
    with pytest.raises(UserError, match="not a training state"):
        load_both((files[1], files[0]), 0)
    with pytest.raises(UserError, match="do not belong"):
        load_both((files[1], files[0]), 1)


def test_a_state_of_a_later_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "STATE_VERSION", 2)
    save_state(tmp_path / "state", a_state(a_train()))
    monkeypatch.undo()
    with pytest.raises(UserError, match="not a training state this version can continue"):
        load_state(tmp_path / "state", a_state(a_train()))


@pytest.mark.parametrize("said", ["No space left on device (os error 28)", "Disk quota exceeded (os error 122)"])
@BOTH
def test_a_full_disk_leaves_the_last_file_and_no_rubbish(
    files: tuple[Path, Path], part: int, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files[part].read_bytes()

    def full(_: Any, path: Path, **__: Any) -> None:
        path.write_bytes(b"half of it")
        raise SafetensorError(f"Error while serializing: I/O error: {said}")

    monkeypatch.setattr(checkpoint, "save_file", full)
    state = a_state(a_train(), seed=1)
    with pytest.raises(UserError, match="disk is full"):
        save_state(files[0], state) if part == 0 else save_weights(files[1], state.network)
    assert files[part].read_bytes() == before
    assert len(list(files[part].parent.iterdir())) == 2


def test_a_network_with_shared_memory_between_weights_is_saved_in_full(tmp_path: Path) -> None:
    tied = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    tied[1].weight = tied[0].weight
    save_weights(tmp_path / "weights", tied)
    back = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    load_weights(tmp_path / "weights", back)
    assert torch.equal(back[0].weight, tied[0].weight)
    assert torch.equal(back[1].weight, tied[0].weight)
