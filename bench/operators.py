"""Where the milliseconds of one training step go on this machine, by operator, and how far the limit is.

Run: python bench/operators.py [PLAN] [--configuration 3d] [--steps 3] [--device cpu] [--precision fp32]
PLAN is a plan.json; by default the reference plan of the hippocampus for 8 GB. The step is the one that training runs,
on a batch without content, without data and augmentation. Operators are those of torch.profiler, by the time spent in
themselves. The limit: the step's operations at the speed of the fastest large matrix product of this machine and
precision, measured in the same minute. What is no convolution costs time and counts for nothing there.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from autoseg import store
from autoseg.network.device import pick, set_up
from autoseg.network.label_kinds import Labelling
from autoseg.network.simulate import make_step
from autoseg.network.timing import matmul_rate
from autoseg.planning.cost import training_operations
from autoseg.records import Plan
from autoseg.steps.predict import configuration_named

SHOWN = 16


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plan", type=Path, nargs="?", default=Path("plans/hippocampus/plan-8GB.json"))
    parser.add_argument("--configuration", default="3d")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--device", default=None)
    parser.add_argument("--precision", default=None)
    options = parser.parse_args()
    plan = store.load(options.plan, Plan)
    configuration = configuration_named(plan, options.configuration)
    if options.batch_size:
        configuration = configuration.model_copy(update={"batch_size": options.batch_size})
    device = pick(options.device, options.precision)
    set_up(device)
    one = make_step(configuration, device, Labelling(plan.region_indices))
    float(one.run())
    seconds = []
    for _ in range(options.steps):
        start = time.perf_counter()
        float(one.run())
        seconds.append(time.perf_counter() - start)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.is_cuda else [])]
    with profile(activities=activities) as profiled:
        for _ in range(options.steps):
            float(one.run())
    rows = profiled.key_averages()
    key = "self_device_time_total" if device.is_cuda else "self_cpu_time_total"
    rows = sorted(rows, key=lambda row: -getattr(row, key))
    total = sum(getattr(row, key) for row in rows)
    batch, patch = configuration.batch_size, "x".join(map(str, configuration.patch_voxels))
    print(f"torch {torch.__version__}, {device.name}, {device.precision}, patch {patch}, batch {batch}")
    print(f"{'operator':<44}{'ms per step':>12}{'share':>8}{'calls':>8}")
    for row in rows[:SHOWN]:
        own = getattr(row, key)
        each = row.count // options.steps
        print(f"{row.key:<44}{own / 1000 / options.steps:>12.1f}{100 * own / total:>7.1f}%{each:>8}")
    rest = sum(getattr(row, key) for row in rows[SHOWN:])
    print(f"{'everything else':<44}{rest / 1000 / options.steps:>12.1f}{100 * rest / total:>7.1f}%")
    operations = training_operations(configuration.network, configuration.patch_voxels, batch)
    rate = matmul_rate(device)
    limit = operations / rate
    reached = 100 * limit / min(seconds)
    print(
        f"one step: {1000 * min(seconds):.0f} ms without the profiler, {operations / 1e9:.0f} GFLOP; matrix products "
        f"run at {rate / 1e9:.0f} GFLOP/s: the limit is {1000 * limit:.0f} ms, {reached:.0f} % reached"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
