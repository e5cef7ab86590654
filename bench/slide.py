"""A 2D image of 20,000 x 20,000 pixels segmented from file to file: seconds, peak memory, and equality with memory.

    python bench/slide.py [--size 20000] [--compare 4000] [--speed accurate]

The network has random weights (8 and 16 channels, patch 512): what is measured does not depend on what it says. The
peak is that of a whole `autoseg predict` process. `--compare` segments a smaller image both ways in this process and
counts the pixels that differ.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[:0] = [str(Path(__file__).parent.parent), str(Path(__file__).parent.parent / "tests")]


def write_run(folder: Path) -> Path:
    """A run with one 2D network of random weights."""
    from planned import a_configuration, a_network, a_planned_run
    from synthetic import write_dataset
    from test_predict import write_network

    from autoseg.records import AugmentSpec, TrainSpec

    data = write_dataset(folder / "data", cases=2, shape=(20, 24), dimension=2, layout="plain", label_values=(1, 2))
    configuration = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.0), median_shape_voxels=(1, 512, 512),
        patch_voxels=(512, 512), network=a_network(dimension=2).model_copy(update={"features": (8, 16)}),
        train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,), mirror_axes=())),
    )  # fmt: skip
    run = a_planned_run(folder / "run", data, configuration)
    write_network(run, configuration, "0")
    return run


def write_picture(path: Path, edge: int) -> None:
    """Noise of many scales, tiled and compressed, written tile by tile."""
    import tifffile

    generator = np.random.default_rng(0)

    def tiles():
        for _ in range((-(-edge // 512)) ** 2):
            coarse = generator.integers(0, 200, (16, 16), np.uint8).repeat(32, 0).repeat(32, 1)
            yield coarse + generator.integers(1, 50, (512, 512), np.uint8)

    tifffile.imwrite(path, tiles(), shape=(edge, edge), dtype=np.uint8, tile=(512, 512), compression="zlib")


def measured(run: Path, images: Path, output: Path, speed: str) -> dict:
    code = (
        "import json, resource, sys, time; from pathlib import Path; from autoseg import predict\n"
        "start = time.perf_counter(); predict(*map(Path, sys.argv[1:4]), device='cpu', speed=sys.argv[4])\n"
        "print(json.dumps({'seconds': time.perf_counter() - start,"
        " 'peak_gb': resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6}))"
    )
    command = [sys.executable, "-c", code, *map(str, (run, images, output)), speed]
    root = Path(__file__).parent.parent
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=root)
    return json.loads(done.stdout.splitlines()[-1])


def differing(run: Path, folder: Path, edge: int, speed: str) -> int:
    """Pixels that differ between a slide and the same image in memory."""
    import tifffile

    from autoseg import Predictor
    from autoseg.image.volume import Volume, plain_geometry
    from autoseg.steps.predicting.slides import segment_slide

    path = folder / "small.tif"
    write_picture(path, edge)
    predictor = Predictor(run, device="cpu", speed=speed)
    whole = tifffile.imread(path).astype(np.float32)[None, None]
    expected = predictor(Volume(whole, plain_geometry((1, edge, edge), (1.0, 1.0, 1.0))))[0]
    segment_slide(predictor, path, folder / "small_labels.tif")
    return int((tifffile.imread(folder / "small_labels.tif") != expected).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20000)
    parser.add_argument("--compare", type=int, default=4000)
    parser.add_argument("--speed", default="accurate")
    given = parser.parse_args()
    from autoseg.image.slides import SLIDE_PIXELS

    if 0 < given.size**2 <= SLIDE_PIXELS:
        parser.error(f"--size {given.size}: up to {SLIDE_PIXELS:,} pixels are segmented in memory; give more, or 0")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = write_run(folder)
        if given.compare:
            pixels = differing(run, folder, given.compare, given.speed)
            print(json.dumps({"edge": given.compare, "differing_pixels": pixels}), flush=True)
        if given.size:
            (folder / "in").mkdir()
            write_picture(folder / "in" / "slide.tif", given.size)
            start = time.perf_counter()
            figures = measured(run, folder / "in", folder / "out", given.speed)
            print(json.dumps({"edge": given.size, "whole_s": time.perf_counter() - start} | figures), flush=True)


if __name__ == "__main__":
    main()
