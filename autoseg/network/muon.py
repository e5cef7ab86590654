"""Muon, an optimizer: AdamW with orthogonal updates of convolutions."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

MOMENTUM = 0.95
RMS = 0.2
"""Root mean square of an update's entries at a learning rate of 1: that of AdamW's, so that both take the same rate."""
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
TINY = 1e-7


class Muon(torch.optim.AdamW):
    """Momentum orthogonalized by Newton-Schulz for convolutions, AdamW for all else (Jordan et al. 2024, Muon).

    A convolution (O, I, *K) is taken as the matrix (O, I x K) that it applies at every place; a transposed one whose
    kernel is its stride likewise. The update is scaled to the size that AdamW's has (Liu et al. 2025, Muon is Scalable
    for LLM Training, equation 4), and weight decay is AdamW's. A step that the flag `found_inf` marks changes nothing.
    torch.optim.Muon (torch 2.9) refuses weights of more than two dimensions and knows no such flag.

    Args:
        matrices: the weights to be orthogonalized; their group comes first.
        others: further groups, as AdamW takes them.
    """

    def __init__(
        self, matrices: Sequence[Tensor], others: Sequence[dict[str, Any]], lr: float, weight_decay: float, **adamw: Any
    ) -> None:
        groups = [{"params": list(matrices), "weight_decay": weight_decay}, *others]
        super().__init__(groups, lr, **adamw)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """One step; AdamW leaves out weights without a gradient, and so what was updated here."""
        skip = getattr(self, "found_inf", None)
        group = self.param_groups[0]
        for weight in group["params"]:
            if weight.grad is not None:
                self._update(weight, weight.grad, group["lr"], group["weight_decay"], skip)
                weight.grad = None
        super().step(closure)

    def _update(self, weight: Tensor, gradient: Tensor, rate: float, decay: float, skip: Tensor | None) -> None:
        state = self.state[weight]
        if not state:
            state |= {"momentum": torch.zeros_like(weight), "step": torch.zeros(())}  # AdamW looks for steps in a state
        momentum = torch.lerp(gradient, state["momentum"], MOMENTUM)
        matrix = torch.lerp(gradient, momentum, MOMENTUM).flatten(1)
        size = RMS * math.sqrt(max(matrix.shape))
        changed = torch.add(weight * (1 - rate * decay), orthogonal(matrix).view_as(weight), alpha=-rate * size)
        if skip is not None:  # on the device, so that the host never waits
            momentum = torch.where(skip > 0, state["momentum"], momentum)
            changed = torch.where(skip > 0, weight, changed)
        state["momentum"].copy_(momentum)
        weight.copy_(changed)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix (M, N) with all singular values near 1: UV' of USV', by five Newton-Schulz iterations.

    All iterations are polynomials of the Gram matrix, so they are done on the smaller side and applied once.
    """
    matrix = matrix.float()
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    a, b, c = POLYNOMIAL
    gram = wide @ wide.T
    length = gram.trace().sqrt() + TINY
    gram = gram / length.square()
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    applied = identity
    for _ in range(ITERATIONS):
        polynomial = a * identity + b * gram + c * gram @ gram
        applied = polynomial @ applied
        gram = polynomial @ gram @ polynomial
    result = (applied / length) @ wide
    return result if matrix.shape[0] <= matrix.shape[1] else result.T
