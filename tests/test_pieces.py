"""network/pieces.py: a batch in pieces has the gradient of the whole, and is split where memory runs out."""

import pytest
import torch
from torch import Tensor, nn
from two_processes import SPEC, batch

from autoseg.errors import UserError
from autoseg.events import Event, Warned
from autoseg.network import losses, unet
from autoseg.network.device import Device
from autoseg.network.distributed import ALONE
from autoseg.network.loop import Batch, Length, TrainState, fit
from autoseg.network.pieces import Pieces
from autoseg.network.step import make_optimizer, make_scaler, running_statistics, step
from autoseg.records import AugmentSpec, NetworkSpec, TrainSpec

CPU = Device(torch.device("cpu"), "fp32")


def a_network(**changes: object) -> nn.Module:
    torch.manual_seed(0)
    return unet.build(NetworkSpec.model_validate(SPEC.model_dump() | changes)).train()


class Small(nn.Module):
    """A network on a device that holds only so many samples, or runs out in its backward pass."""

    def __init__(self, network: nn.Module, holds: int, backward: bool = False) -> None:
        super().__init__()
        self.network, self.holds, self.backward = network, holds, backward
        self.seen: list[int] = []
        self.error: RuntimeError = torch.OutOfMemoryError("out of memory, as if")

    def forward(self, image: Tensor) -> list[Tensor]:
        self.seen.append(len(image))
        out = self.network(image)
        if len(image) > self.holds and not self.backward:
            raise self.error
        if len(image) > self.holds and torch.is_grad_enabled():
            out[0].register_hook(self.run_out)
        return out

    def run_out(self, gradient: Tensor) -> None:
        raise torch.OutOfMemoryError("out of memory, as if")


def stepped(network: nn.Module, loss: str, batch_dice: bool, pieces: Pieces) -> Tensor:
    """The change of the weights in one step of SGD, all weights one after another."""
    before = [weight.detach().clone() for weight in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), 1.0, fused=True)
    function = losses.build(loss, batch_dice=batch_dice, reduce=pieces)
    image, labels = batch()
    buffers = running_statistics(network)
    step(network, optimizer, function, image, labels, CPU, 1e9, pieces=pieces, team=ALONE, buffers=buffers)
    return torch.cat([(old - new.detach()).flatten() for old, new in zip(before, network.parameters(), strict=True)])


def test_a_trial_by_itself_asks_nobody_else_and_has_a_gradient() -> None:
    def nobody(part: Tensor) -> Tensor:
        raise AssertionError("the others are not there yet")

    pieces, part = Pieces(nobody), torch.tensor(2.0, requires_grad=True)
    with pieces.by_itself():
        (3 * pieces(part)).backward()
    assert part.grad == 3
    with pytest.raises(AssertionError, match="not there yet"):
        pieces(part)


@pytest.mark.parametrize("loss", ["dice_ce", "ce", "weighted_ce", "generalized_dice", "dice_focal", "focal_tversky"])
@pytest.mark.parametrize("batch_dice", [True, False])
@pytest.mark.parametrize("count", [2, 3])
def test_a_batch_in_pieces_has_the_gradient_of_the_whole(loss: str, batch_dice: bool, count: int) -> None:
    whole = stepped(a_network(), loss, batch_dice, Pieces())
    found = stepped(a_network(), loss, batch_dice, Pieces(count=count))
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def test_the_hardest_voxels_are_those_of_each_piece() -> None:
    """The exception: with a threshold of its own in every piece the gradient is not that of the whole."""
    whole, found = (stepped(a_network(), "topk_ce", False, Pieces(count=count)) for count in (1, 3))
    assert 0.02 < (found - whole).norm() / whole.norm() < 1


def test_dropout_is_the_same_in_both_passes() -> None:
    pieces = Pieces(count=3)
    torch.manual_seed(1)
    network = a_network(dropout=0.5)
    values = []
    function = losses.build("dice_ce", batch_dice=True, reduce=pieces)

    def forward(image: Tensor, labels: Tensor) -> Tensor:
        value = function(network(image), labels)
        if torch.is_grad_enabled():
            values.append(value.item())
        return value

    pieces.backward(forward, lambda value: value, batch(), lambda: None)
    assert values == pytest.approx([values[0]] * 3, rel=1e-5)  # every piece sees the loss of the same whole


def test_a_convolution_without_room_for_its_workspace_or_result_splits_the_batch_and_other_errors_do_not() -> None:
    for words in ("FIND was unable to find an engine", "[enforce fail] DefaultCPUAllocator: can't allocate memory"):
        small, pieces = Small(a_network(), holds=1), Pieces()
        small.error = RuntimeError(words)
        stepped(small, "dice_ce", True, pieces)
        assert pieces.count == 3
    small.error = RuntimeError("CUDA error: device-side assert triggered")
    with pytest.raises(RuntimeError, match="assert"):
        stepped(small, "dice_ce", True, Pieces())


@pytest.mark.parametrize("backward", [False, True])
def test_where_memory_runs_out_the_batch_is_split_with_the_same_gradient(backward: bool) -> None:
    whole = stepped(a_network(), "dice_ce", True, Pieces())
    small, pieces = Small(a_network(), holds=1, backward=backward), Pieces()
    found = stepped(small, "dice_ce", True, pieces)
    assert pieces.count == 3
    assert small.seen[0] == 3
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


def test_memory_for_less_than_one_sample_is_an_error_with_a_fix() -> None:
    with pytest.raises(UserError, match=r"too little memory for a single patch.*--memory"):
        stepped(Small(a_network(), holds=0), "dice_ce", True, Pieces())


def test_a_batch_that_may_not_be_split_is_an_error_with_a_fix() -> None:
    small = Small(a_network(), holds=1)
    with pytest.raises(UserError, match=r"cpu ran out of memory.*batch norm.*--batch-size"):
        stepped(small, "dice_ce", True, Pieces(splits=False))
    assert small.seen == [3]


def test_running_statistics_see_every_sample_once() -> None:
    network = a_network(norm="batch")
    moved = [buffer.clone() for buffer in running_statistics(network)]
    stepped(network, "dice_ce", True, Pieces(count=3))
    norm = next(each for each in network.modules() if isinstance(each, nn.BatchNorm2d))
    assert int(norm.num_batches_tracked) == 6  # both passes count; only the second moves the statistics
    image, _ = batch()
    expected = a_network(norm="batch")
    for one in image.split(1):
        expected(one)
    for found, wanted, old in zip(running_statistics(network), running_statistics(expected), moved, strict=True):
        assert not torch.equal(found, old)
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize(
    ("norm", "spec", "gradient"),
    [
        ("instance", "dice_ce", "with the same gradient"),
        ("batch", "dice_ce", "each with its own batch statistics"),
        ("instance", "dice_topk:k=0.2", "each with its own hardest voxels"),
    ],
)
def test_a_training_that_ran_out_of_memory_goes_on_in_pieces_and_says_so_once(
    norm: str, spec: str, gradient: str
) -> None:
    train = TrainSpec(warmup_steps=0, steps_per_epoch=2, loss=spec, augment=AugmentSpec(rotation_rad=(0.0,)))
    network = Small(a_network(norm=norm), holds=2)
    state = TrainState(network, make_optimizer(network, train, CPU), make_scaler(CPU), steps_per_epoch=2)
    pieces, events = Pieces(), list[Event]()
    loss = losses.build(spec, batch_dice=True, reduce=pieces)
    image, labels = batch()
    fit(
        state, train, Length(2), CPU, loss, lambda number: Batch(image, labels, ("a", "b", "c"), 0.0, 0.0),
        lambda epoch: [0.5], lambda *_: None, lambda: False, events.append, pieces=pieces,
    )  # fmt: skip
    warnings = [event.text for event in events if isinstance(event, Warned)]
    assert warnings == [
        f"cpu ran out of memory: batches go through the network in 2 pieces from now on, {gradient}, more slowly."
    ]
    assert (state.pieces, state.step) == (2, 4)
    assert network.seen.count(3) == 1
