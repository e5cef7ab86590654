"""Seconds per training step, data and augmentation included: nnU-Net and autoseg on one plan, data, machine and torch.

Run: python bench/train.py [DATA] [--peer PEER_PYTHON] [--steps 15] [--precision fp32]
nnU-Net prepares the data set (a Decathlon folder) and makes its own plan; autoseg trains the network, patch and batch
of that plan with its own augmentation. nnU-Net runs twice: as its users run it, and with glibc told to keep freed
memory, which autoseg does by itself; autoseg in bf16, where the CPU has it, and in fp32. On a GPU nnU-Net runs once,
autoseg eager and compiled. nnU-Net's runs are processes of their own with the same number of threads; medians of the
steps after the first fifth, on a GPU autoseg's mean of those. Without --peer autoseg's step alone is timed, on the plan
that it makes itself.
The environment of PEER_PYTHON holds nnunetv2; its torch is the one that counts for it and is printed beside ours.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from outside import PEER_SCRIPT, add_data, add_peer

from autoseg import store
from autoseg.events import silent
from autoseg.layout import Layout
from autoseg.network import unet
from autoseg.network.compiling import Step, pays_to_record, try_compile
from autoseg.network.device import Device, lay_out, layout, pick, set_up
from autoseg.network.distributed import ALONE
from autoseg.network.losses import Supervised, build
from autoseg.network.step import make_optimizer, step
from autoseg.network.timing import PARTS, Stopwatch
from autoseg.parallel import allowed_cores
from autoseg.records import Configuration, Plan
from autoseg.steps.predict import configuration_named
from autoseg.steps.training.batches import Batches
from autoseg.steps.training.learn import capacity_of
from autoseg.steps.training.options import Machine, Options
from autoseg.steps.training.sources import sources_of
from autoseg.steps.training.work import look_up

KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": "2147483647", "MALLOC_TRIM_THRESHOLD_": "2147483647"}
"""What autoseg.network.device.keep_freed_memory sets for its own process."""
PLAN_FILE = Path("pre", "Dataset004_Peer", "nnUNetPlans.json")


def like_the_peer(planned: Configuration, plans: Path) -> Configuration:
    """Our configuration with the patch, batch and network of nnU-Net's 3d_fullres plan."""
    theirs = json.loads(plans.read_text())["configurations"]["3d_fullres"]
    made = theirs["architecture"]["arch_kwargs"]
    network = planned.network.model_copy(update={
        "features": tuple(made["features_per_stage"]), "strides": tuple(map(tuple, made["strides"])),
        "kernels": tuple(map(tuple, made["kernel_sizes"])), "encoder_blocks": tuple(made["n_conv_per_stage"]),
        "decoder_blocks": tuple(made["n_conv_per_stage_decoder"]), "norm": "instance", "bias": made["conv_bias"],
        "deep_supervision": True,
    })  # fmt: skip
    # theirs counts decoder levels from the coarsest, ours from the finest
    network = network.model_copy(update={"decoder_blocks": network.decoder_blocks[::-1]})
    fields = planned.model_dump() | {
        "patch_voxels": tuple(theirs["patch_size"]), "batch_size": theirs["batch_size"],
        "batch_dice": theirs["batch_dice"], "network": network.model_dump(),
    }  # fmt: skip
    return Configuration.model_validate(fields)


def prepared(data: Path, run: Path, plans: Path | None, device: Device) -> tuple[Plan, Configuration]:
    """A plan and its preprocessed data, with the network, patch and batch of nnU-Net's plan where there is one."""
    as_typed("plan", str(data), "-o", str(run), "--memory", "8GB", "--device", device.name)
    made = store.load(Layout(run).plan, Plan)
    planned = configuration_named(made, "3d" if made.dimension == 3 else "2d")
    if plans is not None:
        planned = like_the_peer(planned, plans)
        others = tuple(planned if each.name == planned.name else each for each in made.configurations)
        store.save(Layout(run).plan, made.model_copy(update={"configurations": others}))
    as_typed("preprocess", str(run), "-c", planned.name)
    return made, planned


def as_typed(*words: str) -> None:
    """An autoseg command as a process of its own, whose workers do not import what this script does."""
    ended = subprocess.run([sys.executable, "-m", "autoseg", *words], capture_output=True, text=True)
    if ended.returncode != 0:
        raise SystemExit(f"autoseg {' '.join(words)} failed:\n{ended.stderr[-2000:]}")


def ours(run: Path, made: Plan, planned: Configuration, steps: int, device: Device, compiles: bool) -> dict:
    """Seconds of each part of a step: medians on a CPU; means on a GPU, where the host runs ahead."""
    asked, machine = Options(precision=device.precision), Machine(device.name)
    work = look_up(run, planned.name, "0", 0, "no", asked, machine, ALONE, silent)
    sources = sources_of(work, planned)
    learned = [sources[case] for case in work.cases.train]
    set_up(device)
    torch.manual_seed(0)
    network = unet.build(planned.network).to(device.torch_device).train()
    network = lay_out(network, planned.dimension, device, compiles)
    optimizer = make_optimizer(network, planned.train, device)
    loss = build(planned.train.loss, batch_dice=planned.batch_dice)
    began, warm = time.perf_counter(), max(2, steps // 5)
    compiled = compile_step(network, loss, planned, device) if compiles else None
    compile_seconds = time.perf_counter() - began
    waits: list[float] = []
    rows: list[dict[str, float]] = []
    watch, start = Stopwatch(device), time.perf_counter()
    with Batches(planned, 0, len(made.channels), made.classes, device, None, compiled=compiles) as batches:
        for number in range(steps):
            if number == warm:
                watch.read()
                start = time.perf_counter()
            begins = time.perf_counter()
            watch.start()
            batch = batches.draw(learned, work.cases.train, number)
            watch.lap("augment")
            step(
                network, optimizer, loss, batch.image, batch.labels, device, planned.train.clip_norm, lap=watch.lap,
                compiled=compiled,
            )  # fmt: skip
            waits.append(batch.wait_seconds)
            if not device.is_cuda:
                rows.append(watch.read() | {"whole": time.perf_counter() - begins})
    if device.is_cuda:  # as in a training the host does not wait for the device, so only the total means something
        parts = watch.read()
        whole = time.perf_counter() - start
        found = {name: seconds / (steps - warm) for name, seconds in (parts | {"whole": whole}).items()}
    else:
        found = {name: statistics.median(row[name] for row in rows[warm:]) for name in (*PARTS, "whole")}
        found["augment"] -= statistics.median(waits[warm:])
    found["compile"] = compile_seconds
    capacity = capacity_of(planned, device)
    return found | {
        "wait": statistics.median(waits[warm:]), "batch": planned.batch_size, "patch": planned.patch_voxels,
        "gflop": capacity.operations_per_sample * planned.batch_size / 1e9,
        "peak_share": capacity.share(planned.batch_size, found["whole"]),
    }  # fmt: skip


def compile_step(network: torch.nn.Module, loss: Supervised, planned: Configuration, device: Device) -> Step:
    shape = (planned.batch_size, *planned.patch_voxels)
    image = torch.zeros(shape[0], planned.network.in_channels, *shape[1:], device=device.torch_device)
    image = image.contiguous(memory_format=layout(planned.dimension, device, compiled=True))
    labels = torch.zeros(shape, dtype=torch.int16, device=device.torch_device)
    records = pays_to_record(device, planned.memory.peak_bytes)
    compiled = try_compile(network, loss, (image, labels), device, print, records)
    if compiled is None:
        raise SystemExit("the step could not be compiled")
    return compiled


def theirs(python: str, words: list[str], keep_memory: bool = False) -> dict:
    """The line of figures that the peer's script prints."""
    environment = os.environ | {"OMP_NUM_THREADS": str(allowed_cores())} | (KEEP_MEMORY if keep_memory else {})
    ended = subprocess.run([python, PEER_SCRIPT, *words], env=environment, capture_output=True, text=True)
    if ended.returncode != 0 or not ended.stdout.strip():
        raise SystemExit(f"nnU-Net's {' '.join(words)} failed:\n{ended.stderr[-2000:]}")
    return json.loads(ended.stdout.strip().splitlines()[-1])


def variants(device: Device, precision: str | None) -> list[tuple[Device, bool]]:
    """How autoseg runs: on a GPU eager and compiled, on a CPU also without half precision unless one was asked for."""
    if device.is_cuda:
        return [(device, False), (device, True)]
    full = [] if precision or device.precision == "fp32" else [(pick(device.name, "fp32"), False)]
    return [(device, False), *full]


def show(name: str, seconds: float, more: str, base: float | None, digits: int) -> None:
    ratio = "" if base is None else f"{seconds / base:6.2f}"
    print(f"{name:<44}{seconds:9.{digits}f} s {ratio:>8}  {more}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add_data(parser)
    add_peer(parser)
    parser.add_argument("--work", type=Path, help="folder to keep the peer's preprocessed data in")
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--device", default=None)
    parser.add_argument("--precision", default=None, help="of autoseg: bf16, fp16 or fp32")
    options = parser.parse_args()
    if options.steps < 3:
        parser.error("--steps: give at least 3, the first two are not counted")
    device = pick(options.device, options.precision)
    print(f"torch {torch.__version__}, {allowed_cores()} cores, {device.name}, {device.precision}", flush=True)
    base, digits = None, 5 if device.is_cuda else 3
    with tempfile.TemporaryDirectory(prefix="train-") as folder:
        work = options.work or Path(folder) / "peer"
        if options.peer:
            if not (work / PLAN_FILE).is_file():
                theirs(options.peer, ["prepare", str(options.data.resolve()), str(work.resolve())])
            words = ["step", str(work.resolve()), "--steps", str(options.steps), "--device", device.torch_device.type]
            for name, keep in (("nnU-Net", False), ("nnU-Net, freed memory kept", True))[: 1 if device.is_cuda else 2]:
                found = theirs(options.peer, words, keep)
                seconds = found["step_s"] + found["wait_s"]
                base = base or seconds
                parts = f"step {found['step_s']:.{digits}f}, wait {found['wait_s']:.{digits}f}, batch {found['batch']}"
                show(name, seconds, parts, base, digits)
        plans = work / PLAN_FILE if options.peer else None
        run = Path(folder) / "run"
        made, planned = prepared(options.data, run, plans, device)
        for each, compiles in variants(device, options.precision):
            found = ours(run, made, planned, options.steps, each, compiles)
            parts = ", ".join(f"{part} {found[part]:.{digits}f}" for part in ("wait", *PARTS))
            more = f"{parts}, batch {found['batch']}, {100 * found['peak_share']:.0f} % of matrix products"
            also = f", compiled in {found['compile']:.0f} s" if compiles else ""
            show(f"autoseg, {each.precision}{also}", found["whole"], more, base, digits)
        print(f"patch {found['patch']}, {found['gflop']:.0f} GFLOP per step", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
