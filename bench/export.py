"""Scores on the network's grid to a label map on the image's grid: seconds, memory and agreement, nnU-Net beside it.

    python bench/export.py --peer PEER_PYTHON

Three readings, each in a process of its own; `cpu_s` are seconds of processor time, which a busy machine changes less:
1. 62 classes from 112x101x122 to 112x404x488 (the example of nnU-Net's own export), float32 noise as scores; nnU-Net
   exports noise of the same size right after. Memory is the peak above what the process held with its input.
2. The same label map against a float32 reference: every class resampled whole by torch's interpolation, then argmax.
3. 117 classes to 600x512x512, scores as float16 in RAM on a grid of 300x256x256 (twice the voxel size); the peak is
   that of the whole process, input included. Noise is the worst case: in a real image most classes are far from most
   places, and a class that cannot win in a tile is left out. `--smooth` gives every class a place of its own.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from outside import PEER_SCRIPT, add_peer


def scores_of(classes: int, shape: tuple[int, ...], smooth: bool, half: bool):
    """Noise, or a bump per class on a jittered lattice with some noise on it; made class by class."""
    import torch

    generator = torch.Generator().manual_seed(0)
    scores = torch.empty((classes, *shape), dtype=torch.float16 if half else torch.float32)
    grids = torch.meshgrid(*(torch.linspace(0, 1, size) for size in shape), indexing="ij")
    noise = torch.randn(shape, generator=generator)
    for k in range(classes):
        one = noise.roll((7 * k, 5 * k, 3 * k), (0, 1, 2))  # other noise would take longer than its export
        if smooth:
            centre = torch.rand(3, generator=generator)
            one = 0.1 * one - 40 * sum((grid - c) ** 2 for grid, c in zip(grids, centre, strict=True))
        scores[k] = one
    return scores


def export(
    classes: int, source: tuple[int, ...], target: tuple[int, ...], smooth: bool, half: bool, check: bool
) -> dict:
    """One reading of ours, in this process."""
    import torch

    from autoseg.image.resample import operators
    from autoseg.network.export import Wanted, slabs
    from autoseg.parallel import allowed_cores

    torch.set_num_threads(allowed_cores())
    scores = scores_of(classes, source, smooth, half)
    spacing = [3.0 if new == old else 3.0 * new / old for old, new in zip(source, target, strict=True)]
    found = operators(source, target, spacing, (3.0, 3.0, 3.0), 1)
    matrices = [None if m is None else torch.from_numpy(m.copy()) for m in found]
    peak_of = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # noqa: E731
    before, start, own = peak_of(), time.perf_counter(), time.process_time()
    labels = torch.empty(target, dtype=torch.int16)
    for slab in slabs([scores], source, tuple(matrices), Wanted(are_logits=True)):
        labels[slab.window] = slab.labels_ZYX
    seconds, cpu = time.perf_counter() - start, time.process_time() - own
    figures = {"export_s": round(seconds, 2), "cpu_s": round(cpu, 2), "before_gb": before, "peak_gb": peak_of()}
    return figures | ({"agreement": agreement(scores, labels.numpy(), target)} if check else {})


def agreement(scores, labels_ZYX: np.ndarray, target: tuple[int, ...]) -> float:
    """Share of voxels that agree with resampling every class whole in float32."""
    from torch.nn.functional import interpolate

    best, winner = np.full(target, -np.inf, np.float32), np.zeros(target, np.int16)
    for k, class_ZYX in enumerate(scores):
        whole_ZYX = interpolate(class_ZYX[None, None].float(), target, mode="trilinear")[0, 0].numpy()
        better = whole_ZYX > best
        winner[better] = k
        np.copyto(best, whole_ZYX, where=better)
    return float((winner == labels_ZYX).mean())


def own(*options: str) -> dict:
    """One reading of ours in a fresh process."""
    command = [sys.executable, __file__, "--worker", *options]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def peer(python: str) -> dict:
    done = subprocess.run([python, PEER_SCRIPT, "export"], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_peer(parser)
    parser.add_argument("--smooth", action="store_true")
    parser.add_argument("--only", nargs="*", default=("pair", "check", "whole-body"))
    parser.add_argument("--worker", choices=("pair", "check", "whole-body"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        small = (62, (112, 101, 122), (112, 404, 488), given.smooth, False, given.worker == "check")
        large = (117, (300, 256, 256), (600, 512, 512), given.smooth, True, False)
        print(json.dumps(export(*(large if given.worker == "whole-body" else small))))
        return
    extra = ["--smooth"] if given.smooth else []
    for what in given.only:
        line = {"what": what, "smooth": given.smooth} | own(what, *extra)
        if what == "pair":
            line["extra_gb"] = line["peak_gb"] - line["before_gb"]
        print(json.dumps(line), flush=True)
        if what == "pair" and given.peer:
            theirs = peer(given.peer)
            extra_gb = theirs["peak_gb"] - theirs["before_gb"]
            ratios = {"time_ratio": line["export_s"] / theirs["export_s"], "memory_ratio": line["extra_gb"] / extra_gb}
            figures = {"peer": "nnU-Net", "export_s": theirs["export_s"], "extra_gb": extra_gb}
            print(json.dumps(figures | ratios), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    main()
