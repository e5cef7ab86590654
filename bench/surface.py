"""Scores of large label maps with three classes: autoseg against the published surface-distance implementation.

Run: python bench/surface.py [--size 200 512 512] [--cases 100]   (surface-distance comes with the extra `dev`)
Both sides compute HD95, average surface distance and surface Dice at 1 mm of every class from the same arrays, in one
process; autoseg computes Dice, IoU, precision, recall, volumes and lesion F1 as well. Cases come in pairs, in turn.
Prints one JSON line per case, and at the end the ratio of the sums, which should be 3 or more, and what 100 volumes
take: measured with 100 cases, else extrapolated, and then the line says so.
"""

import argparse
import json
import time

import numpy as np

from autoseg.steps.evaluate import score_case

SPACING_MM = (2.0, 0.8, 0.8)
VOLUMES = 100


def organs(size_voxels: tuple[int, int, int], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference and prediction with three ellipsoids: large, medium, small; the prediction is a little off."""
    chance = np.random.default_rng(seed)
    maps = np.zeros((2, *size_voxels), np.int16)
    axes = np.ogrid[tuple(slice(n) for n in size_voxels)]
    for k, share in enumerate((0.28, 0.14, 0.05), 1):
        centre = [n * chance.uniform(0.35, 0.65) for n in size_voxels]
        radius = [n * share * chance.uniform(0.8, 1.2) for n in size_voxels]
        for number in range(2):
            off = [number * chance.normal(0, 1.5) for _ in size_voxels]
            swell = 1 + number * chance.normal(0, 0.03)
            places = zip(axes, centre, off, radius, strict=True)
            maps[number][sum(((x - c - o) / (r * swell)) ** 2 for x, c, o, r in places) <= 1] = k
    return maps[0], maps[1]


def published(prediction_ZYX: np.ndarray, reference_ZYX: np.ndarray) -> dict[int, tuple[float, float]]:
    """(HD95, surface Dice) per class by surface-distance."""
    import surface_distance

    scores = {}
    for k in range(1, 4):
        found = surface_distance.compute_surface_distances(reference_ZYX == k, prediction_ZYX == k, SPACING_MM)
        surface_distance.compute_average_surface_distance(found)
        hd95_mm = surface_distance.compute_robust_hausdorff(found, 95)
        scores[k] = (hd95_mm, surface_distance.compute_surface_dice_at_tolerance(found, 1.0))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, nargs=3, default=(200, 512, 512), metavar=("Z", "Y", "X"))
    parser.add_argument("--cases", type=int, default=VOLUMES, help="fewer: the sums are extrapolated to 100")
    options = parser.parse_args()
    sums = {"autoseg": 0.0, "published": 0.0}
    for seed in range(options.cases):
        reference_ZYX, prediction_ZYX = organs(tuple(options.size), seed)
        start = time.perf_counter()
        ours = score_case("x", prediction_ZYX, reference_ZYX, SPACING_MM, 4).values
        middle = time.perf_counter()
        theirs = published(prediction_ZYX, reference_ZYX)
        end = time.perf_counter()
        apart = max(abs(ours["hd95_mm"][k - 1] - theirs[k][0]) for k in theirs)
        apart = max(apart, *(abs(ours["surface_dice"][k - 1] - theirs[k][1]) for k in theirs))
        seconds = {"autoseg": middle - start, "published": end - middle}
        sums = {name: sums[name] + seconds[name] for name in sums}
        line = {name: round(value, 2) for name, value in seconds.items()}
        print(json.dumps({"case": seed} | line | {"largest_difference": float(f"{apart:.1e}")}), flush=True)
    hundred = {f"{name}_seconds_of_{VOLUMES}": round(value * VOLUMES / options.cases) for name, value in sums.items()}
    how = "measured" if options.cases == VOLUMES else f"extrapolated from {options.cases}"
    print(json.dumps({"ratio": round(sums["published"] / sums["autoseg"], 2)} | hundred | {"how": how}), flush=True)


if __name__ == "__main__":
    main()
