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
        group = self.param_groups[0]
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if weights:
            self._update(weights, group["lr"], group["weight_decay"], getattr(self, "found_inf", None))
        for weight in weights:
            weight.grad = None
        super().step(closure)

    def _update(self, weights: list[Tensor], rate: float, decay: float, skip: Tensor | None) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        kept = torch.ones((), device=weights[0].device) if skip is None else 1 - skip
        if skip is not None:  # on the device, so that the host never waits
            nothing, is_skipped = torch.zeros_like(skip), skip > 0
            gradients = [torch.where(is_skipped, nothing, gradient) for gradient in gradients]
        for weight in weights:
            if not self.state[weight]:  # AdamW looks for steps in a state
                self.state[weight] |= {"momentum": torch.zeros_like(weight), "step": torch.zeros(())}
        momenta = [self.state[weight]["momentum"] for weight in weights]
        towards = torch._foreach_sub(gradients, momenta)
        torch._foreach_mul_(towards, (1 - MOMENTUM) * kept)
        torch._foreach_add_(momenta, towards)
        ahead = torch._foreach_lerp(gradients, momenta, MOMENTUM)
        updates = orthogonal([each.flatten(1) for each in ahead])
        torch._foreach_mul_(updates, [RMS * math.sqrt(max(each.shape)) for each in updates])
        torch._foreach_mul_(updates, rate * kept)
        torch._foreach_mul_(weights, 1 - rate * decay * kept)
        torch._foreach_sub_(weights, [each.view_as(weight) for each, weight in zip(updates, weights, strict=True)])


def orthogonal(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Every matrix (M, N) with all singular values near 1: UV' of USV', by five Newton-Schulz iterations.

    All iterations are polynomials of the Gram matrix, so they are done on the smaller side and applied once; those of
    one size together, since a GPU's host takes longer to launch these products than they run.
    """
    wide = [each.float() if each.shape[0] <= each.shape[1] else each.float().T for each in matrices]
    sizes: dict[int, list[int]] = {}
    for number, each in enumerate(wide):
        sizes.setdefault(len(each), []).append(number)
    found = list(wide)
    for numbers in sizes.values():
        grams = torch.stack([wide[number] @ wide[number].T for number in numbers])
        for number, applied in zip(numbers, _iterated(grams), strict=True):
            product = applied @ wide[number]
            found[number] = product if product.shape == matrices[number].shape else product.T
    return found


def _iterated(gram: Tensor) -> Tensor:
    """What the iterations multiply matrices with, from their Gram matrices (B, M, M)."""
    a, b, c = POLYNOMIAL
    length = gram.diagonal(dim1=1, dim2=2).sum(1).sqrt()[:, None, None] + TINY
    gram = gram / length.square()
    identity = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    applied = identity.expand_as(gram)
    for _ in range(ITERATIONS):
        polynomial = torch.baddbmm(torch.add(a * identity, gram, alpha=b), gram, gram, alpha=c)
        applied = polynomial @ applied
        gram = polynomial @ gram @ polynomial
    return applied / length
