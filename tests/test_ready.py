"""network/ready.py: what is changed for prediction computes the same, and keeps channels innermost."""

import pytest
import torch
from torch import nn

from autoseg.network import unet
from autoseg.network.device import Device, channels_last_format
from autoseg.network.ready import ready
from autoseg.records import NetworkSpec

CPU = Device(torch.device("cpu"), "fp32")


def a_network(dimension: int, norm: str = "instance", kind: str = "plain") -> nn.Module:
    ones, twos, threes = ((n,) * dimension for n in (1, 2, 3))
    network = unet.build(NetworkSpec.model_validate({
        "kind": kind, "dimension": dimension, "in_channels": 2, "classes": 3, "features": (4, 8),
        "strides": (ones, twos), "kernels": (threes, threes), "encoder_blocks": (1, 2), "decoder_blocks": (1,),
        "norm": norm,
    }))  # fmt: skip
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.3)  # so that weights and biases of the norms count
    return network


@pytest.mark.parametrize("kind", ["plain", "residual"])
@pytest.mark.parametrize(("dimension", "samples"), [(2, 1), (2, 3), (3, 1), (3, 2)])
def test_a_ready_network_computes_the_same(dimension: int, samples: int, kind: str) -> None:
    network = a_network(dimension, kind=kind).eval()
    batch = torch.randn((samples, 2, *(8,) * dimension), generator=torch.Generator().manual_seed(0)) * 3 + 1
    with torch.inference_mode():
        expected = network(batch)
        names = list(network.state_dict())
        changed = ready(network, dimension, CPU)
        found = changed(batch)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not any(each.requires_grad for each in changed.parameters())
    assert not changed.training
    assert sorted(changed.state_dict()) == sorted(names)


@pytest.mark.parametrize("samples", [1, 3])
@pytest.mark.parametrize("dimension", [2, 3])
def test_channels_stay_innermost_in_bf16(dimension: int, samples: int) -> None:
    innermost = channels_last_format(dimension)
    batch = torch.randn((samples, 4, *(6,) * dimension)).bfloat16().contiguous(memory_format=innermost)
    with torch.inference_mode():
        assert unet.InstanceNorm(4).eval()(batch).is_contiguous(memory_format=innermost)


def test_in_bf16_the_norm_is_no_less_exact_than_instance_norm() -> None:
    generator = torch.Generator().manual_seed(0)
    exact = (torch.randn((2, 8, 12, 14, 10), generator=generator) * 5 + 3).bfloat16()
    norm, ours = nn.InstanceNorm3d(8, affine=True), unet.InstanceNorm(8).eval()
    nn.init.normal_(norm.weight, generator=generator)
    ours.load_state_dict(norm.state_dict())
    with torch.inference_mode():
        expected = norm(exact.float())
        errors = [
            (each(exact.contiguous(memory_format=torch.channels_last_3d)).float() - expected).abs().max()
            for each in (norm, ours)
        ]
    assert errors[1] <= errors[0] * 1.5 + 1e-3
