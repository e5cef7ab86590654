"""A trained network made ready to predict: no gradients, channels innermost, and norms that keep them there.

On CPUs `nn.InstanceNorm2d` and `3d` copy a channels-last input to channels first and leave it so, after which every
convolution copies it back: a fifth of a forward pass. Of a single sample, instance norm is batch norm with the
statistics of the batch, which torch computes in the layout it is given.
"""

import torch
from torch import Tensor, nn

from autoseg.network.device import Device, channels_last

REPLACED = (nn.InstanceNorm2d, nn.InstanceNorm3d)


class SampleNorm(nn.Module):
    """What the instance norm `norm` computes, sample by sample, in the memory format of its input (B, C, [Z,] Y, X)."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.weight, self.bias = norm.get_parameter("weight"), norm.get_parameter("bias")
        self.eps = float(norm.eps)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        samples = [
            nn.functional.batch_norm(each, None, None, self.weight, self.bias, training=True, eps=self.eps)
            for each in x.split(1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)


def ready(network: nn.Module, dimension: int, device: Device) -> nn.Module:
    """The network on `device` in eval mode, changed in place; its weights keep their names and values."""
    network = network.to(device.torch_device).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    if device.torch_device.type == "cpu":
        _replace_norms(network)
    return channels_last(network, dimension)


def _replace_norms(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, REPLACED) and child.affine and not child.track_running_stats:
            setattr(module, name, SampleNorm(child))
        else:
            _replace_norms(child)
