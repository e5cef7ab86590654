"""Every convolution of a plan's network alone on the CPU: its three passes in milliseconds and GFLOP per second.

Run: python bench/convolutions.py [PLAN] [--configuration 3d] [--batch-size 2] [--precision bf16] [--repeats 7]
PLAN is a plan.json; by default the reference plan of the hippocampus for 8 GB. Channels are innermost, as training has
them. Medians. For upsamplings that have a bias, its gradient is read as oneDNN computes it together with that of the
weights, and as training does, apart (`unet._Transposed`). The image needs no gradient, so the first row has none.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from autoseg import store
from autoseg.network import unet
from autoseg.network.device import channels_last_format, pick, set_up
from autoseg.network.simulate import CONVOLUTIONS
from autoseg.records import Plan
from autoseg.steps.predict import configuration_named


def calls_of(network: nn.Module, image: Tensor) -> list[tuple[str, nn.Module, Tensor, Tensor]]:
    """(name, convolution, input, output) in the order in which they run."""
    found: list[tuple[str, nn.Module, Tensor, Tensor]] = []
    names = {module: name for name, module in network.named_modules() if isinstance(module, CONVOLUTIONS)}
    for module in names:
        module.register_forward_hook(lambda m, given, made: found.append((names[m], m, given[0], made)))
    network.eval()(image)  # training calls upsamplings past their module
    return found


def milliseconds(one: Callable[[], object], repeats: int) -> float:
    """The median of some calls after a first one."""
    one()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        one()
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, nargs="?", default=Path("plans/hippocampus/plan-8GB.json"))
    parser.add_argument("--configuration", default="3d")
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--precision", default=None)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    configuration = configuration_named(store.load(options.plan, Plan), options.configuration)
    device = pick("cpu", options.precision)
    set_up(device)
    dtype = torch.bfloat16 if device.precision == "bf16" else torch.float32
    layout = channels_last_format(configuration.dimension)
    network = unet.build(configuration.network).to(dtype=dtype).to(memory_format=layout)  # type: ignore[call-overload]
    size = (options.batch_size, configuration.network.in_channels, *configuration.patch_voxels)
    image = torch.randn(size).to(dtype).contiguous(memory_format=layout)
    with torch.no_grad():
        calls = calls_of(network, image)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device.precision}, batch {size[0]}")
    print(f"{'convolution':<20}{'channels':>12}{'output':>12}{'GFLOP':>8}" + "".join(
        f"{part:>17}" for part in ("forward", "to input", "to weights", "with bias", "apart")
    ))  # fmt: skip
    totals = [0.0] * 5
    for name, module, given, made in calls:
        row = times_of(module, given, made, options.repeats)
        row[1] *= given is not image
        wide = given if isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d) else made
        weight = module.get_parameter("weight")
        gflop = 2e-9 * wide.numel() / wide.shape[1] * weight.numel()
        totals = [total + each for total, each in zip(totals, row, strict=True)]
        shown = "".join(f"{each:>9.2f} {gflop / each * 1000:>4.0f}/s" if each else f"{'':>16}" for each in row)
        channels, place = f"{given.shape[1]} to {made.shape[1]}", "x".join(map(str, made.shape[2:]))
        print(f"{name:<20}{channels:>12}{place:>12}{gflop:>8.2f} {shown}", flush=True)
    print(f"{'all, ms':<52} " + "".join(f"{total:>9.2f}{'':>7}" for total in totals))
    return 0


def times_of(module: nn.Module, given: Tensor, made: Tensor, repeats: int) -> list[float]:
    """Milliseconds: forward, gradient of the input, of the weights, of weights and bias by oneDNN, and apart."""
    weight = module.get_parameter("weight").detach()
    bias = None if module.bias is None else module.get_parameter("bias").detach()
    transposed = isinstance(module, nn.ConvTranspose2d | nn.ConvTranspose3d)
    how = (module.stride, module.padding, module.dilation, transposed, [0] * len(module.stride), 1)
    gradient = torch.randn_like(made)

    def backward(*wanted: bool) -> Callable[[], object]:
        sizes = [made.shape[1]] if wanted[2] else None
        return lambda: torch.ops.aten.convolution_backward(gradient, given, weight, sizes, *how, list(wanted))

    passes = [lambda: torch.ops.aten.convolution(given, weight, bias, *how)]
    passes += [backward(True, False, False), backward(False, True, False)]
    times = [milliseconds(one, repeats) for one in passes]
    if not transposed or bias is None:
        return [*times, 0.0, 0.0]
    leaves = [each.clone().requires_grad_() for each in (weight, bias)]
    raised = unet._Transposed.apply(given, *leaves, module.stride)
    apart = lambda: torch.autograd.grad(raised, leaves, gradient, retain_graph=True)  # noqa: E731
    return [*times, milliseconds(backward(False, True, True), repeats), milliseconds(apart, repeats)]


if __name__ == "__main__":
    sys.exit(main())
