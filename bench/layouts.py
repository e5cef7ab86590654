"""Bare training steps of a network, eager and compiled, with channels innermost and outermost: time and memory.

Run: python bench/layouts.py [--device cuda:0] [--precision bf16] [--patch 40 56 40] [--batch-size 7] [--features 32]
     [--only compiled-last ...] [--steps 50]
The network is the one that the planner takes for this patch at 1 mm, the step the one that training runs, on a batch
of noise that is there already. Every variant runs in turn in this process: a tenth of the steps to warm up, then the
mean of the rest, without waiting for the device in between. "compiled" is the network with its loss, "graphs" are CUDA
graphs of that. The limit is that of the fastest large matrix product, read in the same run.
"""

import argparse
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from autoseg.network import losses, unet
from autoseg.network.compiling import Step, try_compile
from autoseg.network.device import Device, channels_last_format, pick, set_up
from autoseg.network.step import make_optimizer, step
from autoseg.network.timing import matmul_rate
from autoseg.planning.architecture import network_spec
from autoseg.planning.cost import training_operations
from autoseg.planning.topology import choose_topology
from autoseg.planning.train import choose_augment, choose_train
from autoseg.records import NetworkSpec

VARIANTS = ("eager-first", "eager-last", "compiled-first", "compiled-last", "graphs-first", "graphs-last")


def seconds_of(
    variant: str, spec: NetworkSpec, shape: tuple[int, ...], device: Device, steps: int
) -> tuple[float, float, float]:
    """Seconds of a step, seconds of the first one, and the largest number of bytes that were allocated (0: no GPU)."""
    how, _, layout = variant.partition("-")
    torch.manual_seed(0)
    torch._dynamo.reset()
    where = device.torch_device
    network: nn.Module = unet.build(spec).to(where).train()
    image = torch.randn(shape[0], spec.in_channels, *shape[1:], device=where)
    labels = torch.randint(0, spec.classes, shape, device=where, dtype=torch.int16)
    if layout == "last":
        network = network.to(memory_format=channels_last_format(spec.dimension))  # type: ignore[call-overload]
        image = image.contiguous(memory_format=channels_last_format(spec.dimension))
    train = choose_train(choose_augment(shape[1:], (0, 1, 2), ())[0])
    optimizer = make_optimizer(network, train, device)
    loss: Callable[..., Tensor] = losses.build(train.loss, batch_dice=False)
    compiled: Step | None = None
    start = time.perf_counter()
    if how != "eager":
        compiled = try_compile(network, loss, (image, labels), device, print, records=how == "graphs")
        if compiled is None:
            raise SystemExit(f"{variant}: could not be compiled")

    def one() -> Tensor:
        return step(network, optimizer, loss, image, labels, device, train.clip_norm, compiled=compiled)

    float(one())
    first = time.perf_counter() - start
    for _ in range(max(3, steps // 10)):
        one()
    wait_for(device)
    if device.is_cuda:
        torch.cuda.reset_peak_memory_stats(where)
    start = time.perf_counter()
    for _ in range(steps):
        value = one()
    wait_for(device)
    seconds = (time.perf_counter() - start) / steps
    if not bool(torch.isfinite(value)):
        raise SystemExit(f"{variant}: the loss is {float(value)}")
    return seconds, first, torch.cuda.max_memory_allocated(where) if device.is_cuda else 0.0


def wait_for(device: Device) -> None:
    if device.is_cuda:
        torch.cuda.synchronize(device.torch_device)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default=None)
    parser.add_argument("--precision", default=None)
    parser.add_argument("--patch", type=int, nargs="+", default=[40, 56, 40])
    parser.add_argument("--batch-size", type=int, default=7)
    parser.add_argument("--features", type=int, default=32, help="channels of the first stage")
    parser.add_argument("--residual", action="store_true")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--steps", type=int, default=50)
    options = parser.parse_args()
    device = pick(options.device, options.precision)
    set_up(device)
    topology = choose_topology((1.0,) * len(options.patch), tuple(options.patch))
    kind = "residual" if options.residual else "plain"
    spec = network_spec(kind, 1, 3, topology, options.batch_size, options.features)
    shape = (options.batch_size, *topology.patch_voxels)
    operations = training_operations(spec, shape[1:], shape[0])
    limit = operations / matmul_rate(device)
    card = torch.cuda.get_device_name(device.torch_device) if device.is_cuda else device.name
    size = f"patch {'x'.join(map(str, shape[1:]))}, batch {shape[0]}, channels {spec.features}"
    limited = f"{operations / 1e9:.0f} GFLOP, limit {1000 * limit:.2f} ms"
    print(f"torch {torch.__version__}, {card}, {device.precision}: {size}, {limited}", flush=True)
    for variant in options.only:
        seconds, first, peak = seconds_of(variant, spec, shape, device, options.steps)
        reached = f"{100 * limit / seconds:5.1f} % of the limit, first step {first:6.1f} s"
        allocated = f", {peak / 2**20:.0f} MiB allocated" if peak else ""
        print(f"{variant:<16}{1000 * seconds:9.2f} ms {reached}{allocated}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
