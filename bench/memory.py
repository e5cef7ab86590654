"""Simulated against real peak memory of one training step: on the CPU, and on a CUDA card where there is one.

    python bench/memory.py                  ten shapes on the CPU, plain and residual, in fp32 and bf16
    python bench/memory.py --device cuda    and three large ones on a card, then 50 steps of plans for 8, 11 and 24 GB

On the CPU the real bytes are the allocations that torch's profiler records, which knows nothing of the simulation. On
CUDA the simulated tensors, without and with the allowance for a workspace, stand beside max_memory_allocated, and the
bytes that the planner counts as needed beside what the card held. The plans of the reference data sets then run for 50
steps at full batch, with the allocator capped at their budget less the context, so that one large card stands in for
small ones. Prints a table and one JSON line; exit code 1 if a plan did not stay within its budget.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from autoseg.network.device import Device, pick, set_up
from autoseg.network.memory import CONTEXT_BYTES, context_bytes, device_peaks, needed_bytes
from autoseg.network.simulate import real_cpu_peak, replay
from autoseg.planning.architecture import network_spec
from autoseg.planning.topology import choose_topology
from autoseg.planning.train import choose_augment, choose_train
from autoseg.records import Configuration, Memory, Plan
from autoseg.store import load

MIB = 2**20
PLANS = Path(__file__).parent.parent / "plans"
BUDGETS_GB = (8, 11, 24)
STEPS = 50
SHAPES = (
    ((1.0, 1.0), (64, 64)),
    ((1.0, 1.0), (96, 160)),
    ((1.0, 1.0), (256, 256)),
    ((1.0, 1.0, 1.0), (16, 24, 16)),
    ((1.0, 1.0, 1.0), (32, 32, 32)),
    ((1.0, 1.0, 1.0), (40, 56, 40)),
    ((3.0, 1.0, 1.0), (8, 48, 48)),
    ((5.0, 0.8, 0.8), (8, 64, 64)),
    ((2.0, 1.0, 1.0), (16, 40, 56)),
    ((1.0, 1.0, 1.0), (64, 32, 32)),
)
"""Spacing and patch of the configurations that are compared, each plain and residual."""
LARGE = (((1.0, 1.0), (512, 512)), ((1.0, 1.0, 1.0), (128, 128, 128)), ((3.0, 0.8, 0.8), (48, 192, 192)))
"""More of them, for cards."""


def configuration_of(kind: str, spacing_mm: tuple[float, ...], patch: tuple[int, ...], batch: int) -> Configuration:
    """A configuration as the planner would make it for this spacing and patch."""
    topology = choose_topology(spacing_mm, patch)
    augment, _ = choose_augment(topology.patch_voxels, (0, 1, 2), ())
    flat = len(patch) == 2
    whole = (1,) * flat + topology.patch_voxels
    return Configuration(
        name="2d" if flat else "3d",
        dimension=2 if flat else 3,
        spacing_mm=(None, 1.0, 1.0) if flat else (1.0, 1.0, 1.0),
        median_shape_voxels=(whole[0], whole[1], whole[2]),
        patch_voxels=topology.patch_voxels,
        batch_size=batch,
        normalization=("zscore",),
        mask_for_normalization=(False,),
        network=network_spec("residual" if kind == "residual" else "plain", 1, 3, topology, batch),
        train=choose_train(augment),
        memory=Memory(source="assumed", peak_bytes=0),
    )


def on_cpu() -> dict[str, float]:
    """Errors of the simulation in percent, and its milliseconds."""
    errors, milliseconds = [], []
    print(f"{'CPU: network, patch, precision':42} simulated MiB  real MiB    error  simulated in")
    for spacing_mm, patch in SHAPES:
        for kind in ("plain", "residual"):
            planned = configuration_of(kind, spacing_mm, patch, 2)
            for precision in ("fp32", "bf16"):
                start = time.perf_counter()
                simulated = replay(planned, precision, "cpu").peak_with_copies_bytes
                milliseconds.append(1000 * (time.perf_counter() - start))
                real = real_cpu_peak(planned, precision)
                errors.append(100 * (simulated - real) / real)
                name = f"{kind:8} {'x'.join(map(str, planned.patch_voxels)):>11} {precision}"
                figures = f"{simulated / MIB:13.2f} {real / MIB:9.2f} {errors[-1]:+7.3f} % {milliseconds[-1]:8.0f} ms"
                print(f"{name:42} {figures}", flush=True)
    return {
        "cpu_readings": len(errors),
        "cpu_worst_percent": max(map(abs, errors)),
        "simulation_median_ms": sorted(milliseconds)[len(milliseconds) // 2],
    }


def on_card(device: Device, shapes: tuple) -> dict[str, float]:
    """Errors against max_memory_allocated in percent, and how much more is counted as needed than was held."""
    plain, with_workspace, needed_more = [], [], []
    print(f"{device.name}, {device.precision}: MiB simulated | with workspace | allocated || needed | held")
    for spacing_mm, patch in shapes:
        for kind in ("plain", "residual"):
            planned = configuration_of(kind, spacing_mm, patch, 2)
            reading = replay(planned, device.precision, "cuda")
            allocated, reserved = device_peaks(planned, device)
            held = reserved + context_bytes(device.torch_device)
            needed = needed_bytes(reading, "cuda")
            plain.append(100 * (reading.peak_bytes - allocated) / allocated)
            with_workspace.append(100 * (reading.peak_bytes + reading.workspace_bytes - allocated) / allocated)
            needed_more.append(100 * (needed - held) / held)
            sizes = (reading.peak_bytes, reading.peak_bytes + reading.workspace_bytes, allocated, needed, held)
            figures = " ".join(f"{size / MIB:9.1f}" for size in sizes)
            size = "x".join(map(str, planned.patch_voxels))
            print(f"{kind:8} {size:>11} {figures}  {plain[-1]:+.1f} % {needed_more[-1]:+.1f} %", flush=True)
    return {
        "card_worst_percent": max(map(abs, plain)),
        "card_worst_percent_with_workspace": max(map(abs, with_workspace)),
        "needed_least_above_held_percent": min(needed_more),
    }


def plans_within_budget(device: Device, names: list[str], steps: int) -> bool:
    """Run every reference plan for 8, 11 and 24 GB for some steps under its budget; True if all stayed within.

    names: of the data sets; empty for all.
    """
    card = device.torch_device
    total = torch.cuda.mem_get_info(card)[1]
    good = True
    for file in sorted(PLANS.glob("*/plan-*.json")):
        plan = load(file, Plan)
        if names and file.parent.name not in names:
            continue
        if plan.budget.total_bytes not in {gigabytes << 30 for gigabytes in BUDGETS_GB}:
            continue
        if plan.budget.budget_bytes > total:
            print(f"{file.parent.name}/{file.name}: not tried, this card has {total / MIB:.0f} MiB", flush=True)
            continue
        for planned in plan.configurations:
            torch.cuda.reset_accumulated_memory_stats(card)
            torch.cuda.set_per_process_memory_fraction((plan.budget.budget_bytes - CONTEXT_BYTES) / total, card)
            try:
                held = device_peaks(planned, device, steps)[1] + context_bytes(card)
                retries = torch.cuda.memory_stats(card)["num_alloc_retries"]
                fits = held <= plan.budget.budget_bytes
                said = f"{held / MIB:9.1f} of {plan.budget.budget_bytes / MIB:9.1f} MiB, {retries} retries"
            except torch.cuda.OutOfMemoryError:
                fits, said = False, "out of memory"
            finally:
                torch.cuda.set_per_process_memory_fraction(1.0, card)
            good = good and fits
            print(f"{file.parent.name}/{file.name} {planned.name}: {said}{'' if fits else '  TOO LARGE'}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda:0")
    parser.add_argument("--plans", nargs="+", default=[], metavar="NAME", help="only these of the reference plans")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each reference plan")
    parser.add_argument("--large", action="store_true", help="on a card: only the largest shapes")
    options = parser.parse_args()
    device = pick(options.device)
    set_up(device)
    line: dict[str, object] = {"what": "memory", "device": device.name, "torch": torch.__version__}
    if not device.is_cuda:
        print(json.dumps(line | {"threads": torch.get_num_threads()} | on_cpu()))
        return
    line |= {"card": torch.cuda.get_device_name(device.torch_device), "cudnn": torch.backends.cudnn.version()}
    line |= on_card(device, LARGE if options.large else SHAPES + LARGE)
    good = plans_within_budget(device, options.plans, options.steps)
    print(json.dumps(line | {"plans_within_budget": good}))
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
