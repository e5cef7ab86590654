"""The training step: optimizer, loss scaling, forward, backward, clipping, update."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autoseg.network.device import Device
from autoseg.network.distributed import ALONE, Team, add_gradients
from autoseg.network.losses import Supervised
from autoseg.network.muon import Muon
from autoseg.network.pieces import Pieces, whole_backward
from autoseg.records import TrainSpec

BETAS = (0.9, 0.99)
WARMUP_SHARE = 0.2
"""Trainings of 50 steps learned little in 50 steps of warm-up (docs/decisions/quality-per-minute.md)."""
FUSED = ("cuda", "cpu")
"""Devices whose fused optimizers leave out a step by a flag; on others the host waits for the loss and decides."""


def make_optimizer(network: nn.Module, train: TrainSpec, device: Device) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019), Muon, or SGD with Nesterov momentum; fused where torch has the kernel.

    Weight decay spares norms and biases; SGD follows nnU-Net and decays everything. Muon's orthogonal updates are for
    convolutions but the heads, whose rows are classes. Weights that need no gradient are left out.
    """
    fused = device.torch_device.type in FUSED
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    if train.optimizer == "sgd":
        nesterov = train.momentum > 0  # which torch refuses without
        sgd = torch.optim.SGD(
            weights, train.learning_rate, train.momentum, weight_decay=train.weight_decay, nesterov=nesterov,
            fused=fused,
        )  # fmt: skip
        for weight in weights:  # else a first step that is skipped leaves them uninitialized
            sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
        return sgd
    kernels, spared = [p for p in weights if p.ndim > 1], [p for p in weights if p.ndim <= 1]
    decay = {"weight_decay": train.weight_decay}
    if train.optimizer == "muon":
        heads = {weight for name, weight in network.named_parameters() if "head" in name.split(".")}
        groups = [{"params": [p for p in kernels if p in heads], **decay}, {"params": spared, "weight_decay": 0.0}]
        matrices = [p for p in kernels if p not in heads]
        return Muon(matrices, groups, train.learning_rate, train.weight_decay, betas=BETAS, fused=fused)
    groups = [{"params": kernels, **decay}, {"params": spared, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, train.learning_rate, betas=BETAS, fused=fused)


def laid_out_like(weight: Tensor, tensor: Tensor) -> Tensor:
    """Moments in the memory order of their weight, which fused optimizers take for granted; step counts as they are."""
    if tensor.shape != weight.shape:
        return tensor
    return torch.empty_like(weight, dtype=tensor.dtype, device=tensor.device, requires_grad=False).copy_(tensor)


def follow_layout(optimizer: torch.optim.Optimizer) -> None:
    """Lay the optimizer's moments out as the weights are now."""
    for weight, values in optimizer.state.items():
        values |= {name: laid_out_like(weight, each) for name, each in values.items() if isinstance(each, Tensor)}


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
    *,
    extra: Sequence[Tensor] = (),
    pieces: Pieces | None = None,
    team: Team = ALONE,
    buffers: Sequence[Tensor] = (),
    lap: Callable[[str], None] = lambda part: None,
    compiled: Callable[..., Tensor] | None = None,
) -> Tensor:
    """Forward, backward, clip and update once. Returns the loss, still on the device; NaN if the step was skipped.

    A loss or gradient that is not finite changes nothing: the fused optimizers are told so by a flag on the device, so
    that the host never waits for it. With loss scaling the scaler decides, and its overflows are no news until the
    scale is below 1: it is the gradients then that are not finite.

    Args:
        extra: further tensors with a row per sample, which the loss takes after the labels.
        pieces: splits the batch where memory runs out; the loss has to reduce by it.
        team: whose gradients are added.
        buffers: running statistics of the network, which a skipped step leaves as they were.
        lap: called with "forward", "backward" and "step" when these are done.
        compiled: the loss of a whole batch as one function, instead of `loss` and `network`, whose weights it shares.
    """
    scale = scaler if scaler is not None and scaler.is_enabled() else None
    kept = [buffer.clone() for buffer in buffers]

    def forward(some_image: Tensor, *rest: Tensor) -> Tensor:
        whole = pieces is None or pieces.count == 1
        with device.autocast():
            return loss(network(some_image), *rest) if compiled is None or not whole else compiled(some_image, *rest)

    scaled: Callable[[Tensor], Tensor] = scale.scale if scale else lambda plain: plain
    if pieces is None:
        value = whole_backward(forward, scaled, (image, labels, *extra), lap)
    else:
        value = pieces.backward(forward, scaled, (image, labels, *extra), optimizer.zero_grad, buffers, lap)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    add_gradients(team, weights)
    if scale:
        scale.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(weights, clip_norm)
    usable = torch.isfinite(value)
    if scale:
        overflows = ~torch.isfinite(norm) & (scale.scale(torch.ones((), device=norm.device)) < 1)
        value = torch.where(overflows, math.nan, value)
        scale.step(optimizer)
        scale.update()
    else:
        usable &= torch.isfinite(norm)
        value = torch.where(usable, value, math.nan)
        # the flag that torch's own GradScaler sets on fused optimizers: 1 means "leave the weights as they are"
        if device.torch_device.type in FUSED:
            optimizer.found_inf = (~usable).float().reshape(())  # type: ignore[attr-defined]
            optimizer.grad_scale = None  # type: ignore[attr-defined]
            optimizer.step()
            del optimizer.found_inf, optimizer.grad_scale  # type: ignore[attr-defined]
        elif bool(usable):
            optimizer.step()
    for buffer, old in zip(buffers, kept, strict=True):
        buffer.copy_(torch.where(usable, buffer, old))
    optimizer.zero_grad(set_to_none=True)
    lap("step")
    return value


def gradient_signal(optimizer: torch.optim.Optimizer) -> float:
    """Share of the squared gradient that the batches agree on: 1 all of it, 0 nothing but noise.

    Read off AdamW's moments, so it costs nothing and does not depend on the scale of the loss. With the mean gradient G
    and its variance S over batches, and m and v freed of their bias, E[v] = G^2 + S and E[m^2] = G^2 + cS with
    c = (1 - b1) (1 + b1^t) / ((1 + b1) (1 - b1^t)) after t steps, summed over the weights that have such moments (the
    ratio S / G^2 is the noise scale of McCandlish et al. 2018): under Muon the heads, norms and biases, whose batches
    agree more, so that its figures are not to be compared with AdamW's. Both are taken to change slowly. NaN without
    moments and after one step, which says nothing of the others.
    """
    states = [state for state in optimizer.state.values() if "exp_avg_sq" in state]
    if not states:
        return math.nan
    squared_mean = torch.stack([state["exp_avg"].square().sum() for state in states]).sum().item()
    mean_square = torch.stack([state["exp_avg_sq"].sum() for state in states]).sum().item()
    steps = float(states[0]["step"])
    if steps < 2 or not mean_square > 0:
        return math.nan
    forgotten = 1 - BETAS[0] ** steps
    squared_mean /= forgotten**2
    mean_square /= 1 - BETAS[1] ** steps
    floor = (1 - BETAS[0]) / (1 + BETAS[0]) * (2 - forgotten) / forgotten
    return min(1.0, max(0.0, (squared_mean / mean_square - floor) / (1 - floor)))


def learning_rate(train: TrainSpec, done: float, number: int) -> float:
    """Learning rate of step `number` when the share `done` (0..1) of the training is over.

    It rises linearly in the warm-up steps, which are at most `WARMUP_SHARE` of the training.
    """
    done = min(max(done, 0.0), 1.0)
    rising = max((number + 1) / max(1, train.warmup_steps), done / WARMUP_SHARE)
    return train.learning_rate * SCHEDULES[train.schedule](done) * min(1.0, rising)


def running_statistics(network: nn.Module) -> list[Tensor]:
    """What the network keeps of the data it saw beside its weights: means and variances of batch norms."""
    return [buffer for buffer in network.buffers() if buffer.is_floating_point()]


def learn_mode(network: nn.Module) -> None:
    """Training mode, but not for what is frozen: its batch norms keep their statistics."""
    network.train()
    for module in network.modules():
        own = list(module.parameters(recurse=False))
        if own and not any(weight.requires_grad for weight in own):
            module.eval()


SCHEDULES: dict[str, Callable[[float], float]] = {
    "polynomial": lambda done: (1.0 - done) ** 0.9,
    "cosine": lambda done: 0.5 * (1.0 + math.cos(math.pi * done)),
    "constant": lambda done: 1.0,
}
"""Share of the learning rate left when a share of the training is over; polynomial as in nnU-Net (Chen et al. 2017)."""
