"""Simulated against real peak memory of one training step: on the CPU, and on a CUDA card where there is one.

    python bench/memory.py

On the CPU the real step's allocations are read from torch's profiler, which knows nothing of the simulation. On CUDA
the bytes that the planner would count as needed are compared with what the card held. Prints a table and one JSON line.
"""

import json

import torch

from autoseg.network.device import pick
from autoseg.network.memory import compare
from autoseg.network.simulate import real_cpu_peak, simulate
from autoseg.planning.architecture import network_spec
from autoseg.planning.topology import choose_topology
from autoseg.planning.train import choose_augment, choose_train
from autoseg.records import Configuration, Memory

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


def main() -> None:
    rows = []
    for spacing_mm, patch in SHAPES:
        for kind in ("plain", "residual"):
            planned = configuration_of(kind, spacing_mm, patch, 2)
            simulated, real = simulate(planned, "fp32", "cpu"), real_cpu_peak(planned, "fp32")
            error = 100 * (simulated - real) / real
            rows.append(error)
            size = "x".join(map(str, planned.patch_voxels))
            print(f"cpu fp32 {kind:8} {size:>12} {simulated:>12} {real:>12} {error:+.2f} %", flush=True)
    line = {"what": "memory", "cpu_configurations": len(rows), "worst_percent": max(map(abs, rows))}
    if torch.cuda.is_available():
        line |= on_cuda()
    print(json.dumps(line))


def on_cuda() -> dict[str, float | str]:
    """Errors of the simulation on the first card, for the same shapes."""
    card = pick("cuda")
    errors = []
    for spacing_mm, patch in SHAPES:
        planned = configuration_of("plain", spacing_mm, patch, 2)
        simulated, measured = compare(planned, card)
        errors.append(100 * (simulated - measured) / measured)
        print(f"{card.name} {planned.patch_voxels} {simulated} {measured} {errors[-1]:+.1f} %", flush=True)
    return {"card": torch.cuda.get_device_name(), "cuda_worst_percent": max(map(abs, errors))}


if __name__ == "__main__":
    main()
