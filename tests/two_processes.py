"""What two processes run for test_distributed.py: gradients of shared batches, then the death of one of them."""

import os
import sys

import torch
from torch import Tensor

from autoseg.errors import EndedElsewhere
from autoseg.network import losses, unet
from autoseg.network.device import Device
from autoseg.network.distributed import ALONE, Team, add_gradients, add_up, adding, agreed, joined, share, wait_for_all
from autoseg.network.losses_sums import alone
from autoseg.network.pieces import Pieces
from autoseg.network.step import step
from autoseg.records import NetworkSpec

SPEC = NetworkSpec(
    dimension=2, in_channels=1, classes=3, features=(4, 8, 8), strides=((1, 1), (2, 2), (2, 2)),
    kernels=((3, 3),) * 3, encoder_blocks=(1, 1, 1), decoder_blocks=(1, 1),
)  # fmt: skip
LOSSES = (("dice_ce", True), ("dice_ce", False), ("ce", False), ("weighted_ce", False), ("focal_tversky", True))


def batch() -> tuple[Tensor, Tensor]:
    """Three samples: much foreground, none, and half of it not annotated."""
    chance = torch.Generator().manual_seed(1)
    labels = torch.zeros(3, 16, 16, dtype=torch.int16)
    labels[0, 2:14, 3:12] = 1
    labels[0, 5:7, 5:7] = 2
    labels[2, :4, :4] = 2
    labels[2, 8:] = -1
    return torch.randn(3, 1, 16, 16, generator=chance) + labels[:, None], labels


def gradient(loss: str, batch_dice: bool, team: Team, pieces: int) -> Tensor:
    """The gradient that a step of SGD takes, all weights one after another."""
    torch.manual_seed(0)
    network = unet.build(SPEC).train()
    before = [weight.detach().clone() for weight in network.parameters()]
    optimizer = torch.optim.SGD(network.parameters(), 1.0, momentum=0.0, fused=True)
    reduce = Pieces(adding(team) if team.size > 1 else alone, pieces)
    image, labels = (tensor[team.rank :: team.size] for tensor in batch())
    function = losses.build(loss, batch_dice=batch_dice, reduce=reduce)
    cpu = Device(torch.device("cpu"), "fp32")
    step(network, optimizer, function, image, labels, cpu, 1e9, pieces=reduce, team=team)
    return torch.cat(
        [(old - weight.detach()).flatten() for old, weight in zip(before, network.parameters(), strict=True)]
    )


def check_sums(team: Team) -> None:
    assert add_up(team, torch.tensor([1.0 + team.rank])).item() == 3.0
    assert agreed(team, team.rank == 1, 5.0 if team.is_first else 7.0) == (True, 5.0)
    assert list(share(team, [10, 11, 12])) == ([10, 12] if team.is_first else [11])
    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, float(team.rank)])
    add_gradients(team, [weight, torch.nn.Parameter(torch.zeros(1))])
    assert weight.grad.tolist() == [2.0, 1.0]


def main() -> None:
    torch.set_num_threads(1)
    with joined("cpu") as team:
        check_sums(team)
        for loss, batch_dice in LOSSES:
            together = gradient(loss, batch_dice, team, pieces=1)
            in_pieces = gradient(loss, batch_dice, team, pieces=2)
            if team.is_first:
                whole = gradient(loss, batch_dice, ALONE, pieces=1)
                for found in (together, in_pieces):
                    error = ((found - whole).abs().max() / whole.abs().max()).item()
                    sys.stdout.write(f"{loss} {batch_dice} {error:.3e}\n")
        if not team.is_first:
            sys.stdout.flush()
            os._exit(9)
        try:
            wait_for_all(team)
        except EndedElsewhere as error:
            sys.stdout.write(f"noticed: {error}\n")
            sys.stdout.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
