"""How long training waits for its data: on the hippocampus, and on volumes that do not fit the cache limit.

Run: python bench/loader.py [DATA] [--steps 20] [--cases 6] [--shape 200 512 512] [--cache 1GB] [--most 0.05]
The large data set is noise with a labelled ball per case, written straight into a cache of preprocessed cases; under
the limit its patches are read from the compressed files. Its network is small (patch 64x96x96, batch 2, 8 channels in
the first stage), so that waiting would show. Prints the wait for data as a share of the time of the steps, data and
augmentation included; ends with code 1 where a share is above --most.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from outside import DATA, data_set

from autoseg import store
from autoseg.cases.cache import CachedCase, open_case, write
from autoseg.cases.prepare import Prepared, class_locations
from autoseg.image.volume import plain_geometry
from autoseg.layout import Layout
from autoseg.network import unet
from autoseg.network.device import Device, lay_out, pick, set_up
from autoseg.network.losses import build
from autoseg.network.memory import GIB, parse_bytes
from autoseg.network.step import make_optimizer, step
from autoseg.planning.architecture import network_spec
from autoseg.planning.topology import choose_topology
from autoseg.planning.train import choose_augment, choose_train
from autoseg.records import Configuration, Memory, Splits
from autoseg.steps.plan import plan
from autoseg.steps.predict import configuration_named
from autoseg.steps.preprocess import preprocess
from autoseg.steps.training.batches import Batches
from autoseg.steps.training.sources import bytes_of, held

PATCH = (64, 96, 96)


def large_configuration() -> Configuration:
    """A small network on large patches."""
    topology = choose_topology((1.0, 1.0, 1.0), PATCH)
    augment, _ = choose_augment(topology.patch_voxels, (0, 1, 2), ())
    network = network_spec("plain", 1, 2, topology, 2)
    features = tuple(min(64, 8 * 2**stage) for stage in range(len(network.features)))
    return Configuration(
        name="3d", dimension=3, spacing_mm=(1.0, 1.0, 1.0), median_shape_voxels=PATCH,
        patch_voxels=topology.patch_voxels, batch_size=2, normalization=("zscore",), mask_for_normalization=(False,),
        network=network.model_copy(update={"features": features}), train=choose_train(augment),
        memory=Memory(source="assumed", peak_bytes=0),
    )  # fmt: skip


def write_large(folder: Path, cases: int, shape: tuple[int, int, int]) -> dict[str, CachedCase]:
    """So many cases of noise with a ball, as preprocessing would leave them."""
    axes = [np.arange(size, dtype=np.float32)[(...,) + (None,) * (2 - axis)] for axis, size in enumerate(shape)]
    opened = {}
    for number in range(cases):
        chance = np.random.default_rng(number)
        centre = [chance.uniform(0.3, 0.7) * size for size in shape]
        ball = sum((axis - c) ** 2 for axis, c in zip(axes, centre, strict=True)) < (min(shape) / 5) ** 2
        labels = ball.astype(np.int16)
        image = chance.standard_normal(shape, dtype=np.float32) + labels
        box = ((0, shape[0]), (0, shape[1]), (0, shape[2]))
        prepared = Prepared(image[None], labels, box, shape, (1.0, 1.0, 1.0), plain_geometry(shape, (1.0, 1.0, 1.0)))
        name = f"case_{number}"
        write(folder, name, prepared, class_locations(labels, 2, seed=number), "bench", patch_voxels=PATCH)
        opened[name] = open_case(folder, name)
    return opened


def planned(data: Path, run: Path) -> tuple[Configuration, dict[str, CachedCase], int, int]:
    """The planned configuration with the training cases of fold 0, and the numbers of channels and classes."""
    made = plan(data, run, memory="8GB", device="cpu")
    configuration = configuration_named(made, "3d" if made.dimension == 3 else "2d")
    preprocess(run, configuration=configuration.name)
    layout = Layout(run)
    names = store.load(layout.splits, Splits).folds[0].train
    opened = {name: open_case(layout.cache(configuration.name), name) for name in names}
    return configuration, opened, len(made.channels), made.classes


def wait_share(
    configuration: Configuration, opened: dict[str, CachedCase], channels: int, classes: int, limit: int, steps: int,
    device: Device,
) -> tuple[float, float, int]:  # fmt: skip
    """(share of the time spent waiting, seconds per step, cases on disk) of training after two steps of warming up."""
    sources = held(opened, limit)
    on_disk = sum(isinstance(source, CachedCase) for source in sources.values())
    network = unet.build(configuration.network).to(device.torch_device)
    network = lay_out(network, configuration.dimension, device).train()
    train = configuration.train
    optimizer = make_optimizer(network, train, device)
    loss = build(train.loss, batch_dice=configuration.batch_dice)
    waited, start = 0.0, time.perf_counter()
    with Batches(configuration, 0, channels, classes, device, None) as batches:
        for number in range(steps + 2):
            if number == 2:
                waited, start = 0.0, time.perf_counter()
            batch = batches.draw(list(sources.values()), list(sources), number)
            float(step(network, optimizer, loss, batch.image, batch.labels, device, train.clip_norm))
            waited += batch.wait_seconds
        passed = time.perf_counter() - start
    return waited / passed, passed / steps, on_disk


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=data_set, nargs="?", help=f"a Decathlon folder; default: {DATA}, where it is")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cases", type=int, default=6, help="of the large data set")
    parser.add_argument("--shape", type=int, nargs=3, default=(200, 512, 512), help="of its cases, voxels Z Y X")
    parser.add_argument("--cache", default="1GB", help="memory for its cases")
    parser.add_argument("--most", type=float, default=0.05, help="share of waiting that is too much")
    parser.add_argument("--device", default=None)
    options = parser.parse_args(words)
    data = options.data or Path(DATA)
    device = pick(options.device)
    set_up(device)
    torch.manual_seed(0)
    worst = 0.0
    with tempfile.TemporaryDirectory(prefix="loader-") as folder:
        shape = tuple(options.shape)
        large = write_large(Path(folder) / "cache", options.cases, shape)
        work = [("x".join(map(str, shape)), large_configuration(), large, 1, 2, parse_bytes(options.cache))]
        if data.is_dir():
            work.append((data.name, *planned(data, Path(folder) / "run"), parse_bytes("64GB")))
        else:
            print(f"{data} (Task04 of the Decathlon) is not there: only the large data set is read", flush=True)
        for name, configuration, opened, channels, classes, limit in work:
            share, seconds, on_disk = wait_share(
                configuration, opened, channels, classes, limit, options.steps, device
            )
            size = sum(bytes_of(case) for case in opened.values()) / GIB
            worst = max(worst, share)
            print(
                f"{name:<14} {len(opened):>4} cases, {size:6.2f} GB, {on_disk:>3} on disk: {seconds:.3f} s per step, "
                f"waiting {100 * share:.2f} % of it",
                flush=True,
            )
    return 1 if worst > options.most else 0


if __name__ == "__main__":
    sys.exit(main())
