"""Connected components of every class of a whole-body label map: which library, and on what part of the volume.

Run: python bench/components.py [--size 600 512 512] [--classes 60] [--repeat 3]
Prints one JSON line per contender: seconds (best of the repeats), peak resident memory above the label map, and the
number of components over all classes, which must agree. Contenders whose package is absent are left out; cc3d comes
from `pip install connected-components-3d`, which autoseg itself does not need.

Each contender runs in a fresh process, so that peaks are its own. "whole" labels the whole map in one call that knows
several values (scipy's knows one, so it is called per class); "crop" labels each class on its bounding box. "autoseg"
is autoseg/image/components.py, which finds all classes in one pass over runs of equal voxels.
"""

import argparse
import json
import multiprocessing
import resource
import time
from collections.abc import Callable

import numpy as np
from scipy import ndimage


def label_map(size_voxels: tuple[int, int, int], classes: int, seed: int = 0) -> np.ndarray:
    """A (Z,Y,X) int16 map: per class one large ellipsoid on a jittered lattice, and 20 crumbs of 1 to 27 voxels."""
    chance = np.random.default_rng(seed)
    map_ZYX = np.zeros(size_voxels, np.int16)
    rows = int(np.ceil(classes ** (1 / 3)))
    cell = [s / rows for s in size_voxels]
    for k in range(classes):
        place = (k // (rows * rows), k // rows % rows, k % rows)
        centre = [(p + 0.5 + chance.uniform(-0.1, 0.1)) * c for p, c in zip(place, cell, strict=True)]
        radius = [chance.uniform(0.25, 0.6) * c for c in cell]
        low = [max(0, int(c - r)) for c, r in zip(centre, radius, strict=True)]
        high = [min(s, int(c + r) + 1) for c, r, s in zip(centre, radius, size_voxels, strict=True)]
        part = tuple(slice(a, b) for a, b in zip(low, high, strict=True))
        axes = np.ogrid[part]
        inside = sum(((x - c) / r) ** 2 for x, c, r in zip(axes, centre, radius, strict=True)) <= 1
        map_ZYX[part][inside] = k + 1
        for _ in range(20):
            at = [int(chance.integers(0, s - 3)) for s in size_voxels]
            edge = int(chance.integers(1, 4))
            map_ZYX[tuple(slice(a, a + edge) for a in at)] = k + 1
    return map_ZYX


def per_class(map_ZYX: np.ndarray, count: Callable[[np.ndarray], int]) -> int:
    """Sum of `count(mask)` over the classes, each on its bounding box."""
    boxes = ndimage.find_objects(map_ZYX)
    return sum(count(map_ZYX[box] == k + 1) for k, box in enumerate(boxes) if box is not None)


def scipy_crop(map_ZYX: np.ndarray) -> int:
    return per_class(map_ZYX, lambda mask: ndimage.label(mask)[1])


def scipy_whole(map_ZYX: np.ndarray) -> int:
    return sum(ndimage.label(map_ZYX == k + 1)[1] for k in range(int(map_ZYX.max())))


def skimage_crop(map_ZYX: np.ndarray) -> int:
    from skimage.measure import label

    return per_class(map_ZYX, lambda mask: label(mask, connectivity=1, return_num=True)[1])


def skimage_whole(map_ZYX: np.ndarray) -> int:
    from skimage.measure import label

    return label(map_ZYX, background=0, connectivity=1, return_num=True)[1]


def cc3d_crop(map_ZYX: np.ndarray) -> int:
    import cc3d

    return per_class(map_ZYX, lambda mask: cc3d.connected_components(mask, connectivity=6, return_N=True)[1])


def cc3d_whole(map_ZYX: np.ndarray) -> int:
    import cc3d

    return cc3d.connected_components(map_ZYX, connectivity=6, return_N=True)[1]


def autoseg(map_ZYX: np.ndarray) -> int:
    from autoseg.image.components import label_components

    return len(label_components(map_ZYX).sizes_voxels)


def measure(name: str, size_voxels: tuple[int, int, int], classes: int, repeat: int) -> None:
    """Print the JSON line of one contender; to be run in a process of its own."""
    map_ZYX = label_map(size_voxels, classes)
    before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seconds, count = [], 0
    for _ in range(repeat):
        start = time.perf_counter()
        try:
            count = CONTENDERS[name](map_ZYX)
        except ImportError as error:
            print(json.dumps({"contender": name, "left_out": str(error)}), flush=True)
            return
        seconds.append(time.perf_counter() - start)
    extra_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib) / 1024
    figures = {"seconds": round(min(seconds), 2), "extra_megabytes": round(extra_mb), "components": count}
    print(json.dumps({"contender": name} | figures), flush=True)


CONTENDERS: dict[str, Callable[[np.ndarray], int]] = {
    "scipy_crop": scipy_crop,
    "skimage_crop": skimage_crop,
    "cc3d_crop": cc3d_crop,
    "skimage_whole": skimage_whole,
    "cc3d_whole": cc3d_whole,
    "scipy_whole": scipy_whole,
    "autoseg": autoseg,
}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(600, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--classes", type=int, default=60)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=tuple(CONTENDERS), default=tuple(CONTENDERS))
    options = parser.parse_args()
    for each in options.only:
        process = multiprocessing.get_context("spawn").Process(
            target=measure, args=(each, tuple(options.size), options.classes, options.repeat)
        )
        process.start()
        process.join()
