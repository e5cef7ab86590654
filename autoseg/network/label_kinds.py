"""What the outputs of a network stand for: classes, or regions that overlap.

Classes exclude each other, regions need not.
Legend: B batch, K output (class, background first; or region), Z Y X voxels (2D: Y X).
Label maps always hold one index per voxel, -1 = ignore. A region is a union of label indices, such as a whole tumour
made of oedema, core and enhancing part; each has an output of its own and a sigmoid, and every loss sees it as a
problem of two classes with the logits 0 and z, whose softmax that sigmoid is.
Where only some outputs were annotated in a case, a table (B, K) says which. A region that was not is ignored in that
sample. The voxels of a class that was not lie under the background there, so background stands for it, too: its
probability is the sum of both (the marginal loss of Shi et al. 2021, Marginal loss and exclusion loss, equation 5). Its
own logit is held fixed in that sum, so it gets a gradient of exactly zero.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from autoseg.network.losses_sums import wide

IGNORED = -1
NOWHERE = -1e4
"""Logit of a class that is taken out: its softmax is exactly 0."""

One = Callable[[Tensor, Tensor], Tensor]
"""A loss of logits (B, K, ...) and target (B, ...)."""


@dataclass(frozen=True)
class Outputs:
    """`labels` label indices, background included; `regions` holds the indices that each region is made of, or none."""

    labels: int
    regions: tuple[tuple[int, ...], ...] = ()

    @property
    def foreground(self) -> int:
        """How many things are looked for: all regions, or all classes but the background."""
        return len(self.regions) or self.labels - 1

    @cached_property
    def members(self) -> tuple[tuple[int, ...], ...]:
        """Label indices of each of these."""
        return self.regions or tuple((k,) for k in range(1, self.labels))

    def masks(
        self, logits: Tensor, target: Tensor, annotated_BK: Tensor | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """For each foreground output what was found and what is true, two (B, ...) bool; False where not annotated."""
        best = None if self.regions else logits.argmax(1)
        for number, members in enumerate(self.members):
            output = number if self.regions else number + 1
            counted = target >= 0
            if annotated_BK is not None:
                counted = counted & _per_sample(annotated_BK[:, output], target.ndim)
            found = logits[:, output] > 0 if best is None else best == output
            yield found & counted, inside(target, members) & counted


@dataclass(frozen=True)
class Labelling:
    """What a loss has to know of label maps: the label indices of each region, where outputs are regions, and whether
    a table of what was annotated comes with every batch."""

    regions: tuple[tuple[int, ...], ...] = ()
    in_part: bool = False


def of_classes(loss: One, logits: Tensor, target: Tensor, annotated_BK: Tensor | None) -> Tensor:
    """The loss of classes that exclude each other; voxels of a class that the table denies are ignored."""
    if annotated_BK is None:
        return loss(logits, target)
    index_BN = target.flatten(1).clamp(min=0).long()
    target = torch.where(annotated_BK.gather(1, index_BN).view_as(target), target, IGNORED)
    z, drawn = wide(logits), _per_sample(annotated_BK, logits.ndim)
    missing = z.detach().masked_fill(drawn, -torch.inf)
    background = torch.logsumexp(torch.cat((z[:, :1], missing), 1), 1, keepdim=True)
    return loss(torch.cat((background, z[:, 1:].masked_fill(~drawn[:, 1:], NOWHERE)), 1), target)


def of_regions(
    loss_of: Callable[[int], One], regions: Sequence[Sequence[int]], logits: Tensor, target: Tensor,
    annotated_BK: Tensor | None,
) -> Tensor:  # fmt: skip
    """The mean over regions of the loss of each, which `loss_of` gives by the region's number."""
    total = torch.zeros((), device=logits.device)
    for number, (members, z) in enumerate(zip(regions, logits.unbind(1), strict=True)):  # one gradient for all
        own = torch.where(target >= 0, inside(target, members).to(target.dtype), IGNORED)
        if annotated_BK is not None:
            own = torch.where(_per_sample(annotated_BK[:, number], target.ndim), own, IGNORED)
        total = total + loss_of(number)(torch.stack((torch.zeros_like(z), z), 1), own)
    return total / len(regions)


def inside(target: Tensor, members: Sequence[int]) -> Tensor:
    """True where the label index is one of `members`."""
    found = target == members[0]
    for index in members[1:]:
        found = found | (target == index)
    return found


def _per_sample(table: Tensor, axes: int) -> Tensor:
    """(B,) or (B, K) with as many axes as the tensor it is to be combined with."""
    return table.view(*table.shape, *[1] * (axes - table.ndim))
