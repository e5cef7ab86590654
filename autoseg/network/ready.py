"""A trained network made ready to predict, on its device. It has no gradients and is laid out for the device."""

from torch import nn

from autoseg.network.device import Device, lay_out


def ready(network: nn.Module, dimension: int, device: Device) -> nn.Module:
    """The network on `device` in eval mode, changed in place; its weights keep their names and values."""
    network = network.to(device.torch_device).eval()
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return lay_out(network, dimension, device)
