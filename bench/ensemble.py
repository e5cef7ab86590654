"""Memory and time of the mean of several members' probabilities: 5 members of 62 classes at 512x512x300.

Run: python bench/ensemble.py [--size 300 512 512] [--classes 62] [--members 5] [--folder PLACE]
Makes one file of probabilities and gives it to every member under a hard link (what a member costs to read does not
depend on whose file it is), then runs `autoseg ensemble` in a process of its own and reads its peak resident memory.
Prints one JSON line. Needs disk space for one file, a few GB at full size.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from autoseg.image.probabilities import writing_probabilities
from autoseg.image.volume import plain_geometry
from autoseg.layout import probabilities_file

SPACING_MM = (1.0, 0.8, 0.8)
SLICES = 8


def write_member(path: Path, size_voxels: tuple[int, int, int], classes: int, seed: int = 0) -> None:
    """Probabilities as networks give them: one likely class per place, others with a little, some of them noisy."""
    chance = np.random.default_rng(seed)
    depth, height, width = size_voxels
    coarse_YX = chance.integers(0, classes, (-(-height // 32), -(-width // 32)))
    likely_YX = np.kron(coarse_YX, np.ones((32, 32), int))[:height, :width]
    names = ["background", *(f"class_{k}" for k in range(1, classes))]
    geometry = plain_geometry(size_voxels, SPACING_MM)
    with writing_probabilities(path, geometry, names, range(classes), slab=(0, SLICES)) as put:
        for z0 in range(0, depth, SLICES):
            slices = min(SLICES, depth - z0)
            sure_ZYX = chance.uniform(0.6, 1.0, (slices, height, width)).astype(np.float32)
            slab_KZYX = np.broadcast_to((1 - sure_ZYX) / (classes - 1), (classes, slices, height, width)).copy()
            np.put_along_axis(slab_KZYX, ((likely_YX + z0 // 32) % classes)[None, None], sure_ZYX[None], axis=0)
            put((slice(None), slice(z0, z0 + slices)), slab_KZYX)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(300, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--classes", type=int, default=62)
    parser.add_argument("--members", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where files go for the time being")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as place:
        members = [Path(place) / f"member_{m}" for m in range(options.members)]
        first = probabilities_file(members[0], "case")
        write_member(first, tuple(options.size), options.classes)
        for member in members[1:]:
            member.mkdir()
            os.link(first, probabilities_file(member, "case"))
        start = time.perf_counter()
        command = [sys.executable, "-m", "autoseg", "ensemble", *map(str, members), "-o", str(Path(place) / "out")]
        subprocess.run(command, check=True)
        figures = {
            "members": options.members, "classes": options.classes, "size_voxels": list(options.size),
            "file_gigabytes": round(first.stat().st_size / 1e9, 2),
            "seconds": round(time.perf_counter() - start, 1),
            "peak_gigabytes": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9, 2),
        }  # fmt: skip
        print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
