"""The published topology rules, written a second time and compared on random spacings and patches."""

import math
import random

import pytest

from autoseg.planning.patch import choose_first_patch, patch_chain, shrink
from autoseg.planning.topology import choose_features, choose_topology, strided_to_one

PAIRS = 1500


def published(spacing: list[float], size: list[float]) -> tuple[list, list, list, list]:
    """Strides, kernels, divisors and padded patch, read off the published description; deliberately recursive."""

    def step(spacing: list[float], size: list[float], kernel: list[int]) -> tuple[list, list]:
        candidates = {i: spacing[i] for i, n in enumerate(size) if n >= 8}
        chosen = [i for i, s in candidates.items() if s < 2 * min(candidates.values())]
        if not chosen or (len(chosen) == 1 and size[chosen[0]] < 12):
            return [], [[3] * len(size)]
        kernel = [max(k, 3 if s < 2 * min(spacing) else 1) for k, s in zip(kernel, spacing, strict=True)]
        stride = [2 if i in chosen else 1 for i in range(len(size))]
        strides, kernels = step(
            [s * f for s, f in zip(spacing, stride, strict=True)],
            [math.ceil(n / f) for n, f in zip(size, stride, strict=True)],
            kernel,
        )
        return [stride, *strides], [kernel, *kernels]

    strides, kernels = step(spacing, size, [1] * len(size))
    strides = [[1] * len(size), *strides]
    pools = [sum(stride[i] == 2 for stride in strides) for i in range(len(size))]
    padded = [math.ceil(n / 2**p) * 2**p for n, p in zip(size, pools, strict=True)]
    return strides, kernels, [2**p for p in pools], padded


def random_pair(rng: random.Random, dimension: int) -> tuple[list[float], list[int]]:
    fine = rng.choice([0.3, 0.5, 0.78125, 1.0, 1.5])
    spacing = [fine * rng.choice([1, 1, 1, 1.3, 1.99, 2, 2.01, 3, 4, 6.5, 9]) for _ in range(dimension)]
    size = [rng.choice([rng.randint(1, 24), rng.randint(8, 200), rng.randint(100, 700)]) for _ in range(dimension)]
    return spacing, size


@pytest.mark.parametrize("dimension", [2, 3])
def test_topology_follows_the_published_rules(dimension: int) -> None:
    rng = random.Random(dimension)
    stages = set()
    for _ in range(PAIRS):
        spacing, size = random_pair(rng, dimension)
        strides, kernels, divisors, padded = published(spacing, size)
        topology = choose_topology(spacing, size)
        found = [[list(each) for each in which] for which in (topology.strides, topology.kernels)]
        assert found == [strides, kernels], (spacing, size)
        assert (list(topology.divisors), list(topology.patch_voxels)) == (divisors, padded), (spacing, size)
        stages.add(topology.stages)
    assert stages >= {1, 2, 3, 4, 5, 6, 7}


def test_a_padded_patch_keeps_its_topology() -> None:
    rng = random.Random(7)
    for _ in range(PAIRS):
        spacing, size = random_pair(rng, 3)
        once = choose_topology(spacing, size)
        assert choose_topology(spacing, once.patch_voxels) == once


def test_no_chosen_stride_leaves_a_single_voxel_on_the_last_axis() -> None:
    rng = random.Random(8)
    for dimension in (2, 3):
        for _ in range(PAIRS):
            spacing, size = random_pair(rng, dimension)
            topology = choose_topology(spacing, size)
            assert strided_to_one(topology.strides, topology.patch_voxels) == ()
            for axis, divisor in enumerate(topology.divisors):
                assert divisor == 1 or topology.patch_voxels[axis] // divisor >= 4


def test_a_stride_that_leaves_a_single_voxel_is_found() -> None:
    assert strided_to_one(((1, 1, 1), (2, 2, 2)), (8, 8, 2)) == (1,)
    assert strided_to_one(((1, 1, 1), (1, 1, 2)), (8, 8, 2)) == (1,)
    assert strided_to_one(((1, 1, 1), (2, 2, 1)), (2, 2, 1)) == ()
    assert strided_to_one(((1, 1, 1), (2, 2, 2)), (8, 8, 4)) == ()


def test_anisotropic_axes_are_pooled_later() -> None:
    topology = choose_topology((3.0, 0.6, 0.6), (20, 320, 256))
    assert topology.strides[:4] == ((1, 1, 1), (1, 2, 2), (1, 2, 2), (2, 2, 2))
    assert topology.kernels[:3] == ((1, 3, 3), (1, 3, 3), (3, 3, 3))
    assert topology.patch_voxels == (20, 320, 256)


def test_features_double_to_their_limit() -> None:
    assert choose_features(6, 3) == (32, 64, 128, 256, 320, 320)
    assert choose_features(7, 2) == (32, 64, 128, 256, 512, 512, 512)


def test_the_first_patch_is_a_cube_in_millimetres_within_the_median_shape() -> None:
    assert choose_first_patch((1.0, 1.0, 1.0), (500, 500, 500)).patch_voxels == (256, 256, 256)
    assert choose_first_patch((4.0, 1.0, 1.0), (900, 900, 900)).patch_voxels == (112, 448, 448)
    assert choose_first_patch((1.0, 1.0, 1.0), (36, 50, 35)).patch_voxels == (40, 56, 40)
    assert choose_first_patch((1.0, 1.0), (4000, 4000)).patch_voxels == (2048, 2048)


def test_shrinking_does_not_skip_valid_sizes() -> None:
    sizes = [t.patch_voxels for t in patch_chain((1.0, 1.0), (256, 256))]
    assert sizes[:4] == [(256, 256), (256, 224), (224, 224), (224, 192)]


def test_shrinking_takes_the_axis_that_covers_most() -> None:
    first = choose_topology((1.0, 1.0, 1.0), (128, 128, 128))
    smaller = shrink(first, (1.0, 1.0, 1.0), (400, 150, 400))
    assert smaller is not None
    assert smaller.patch_voxels == (128, 112, 128)


def test_a_chain_goes_on_where_its_largest_axis_cannot_shrink() -> None:
    """One slice is left at (1, 896, 896); (32, 136, 80) is rounded up to more voxels than (32, 135, 81)."""
    thick = [t.patch_voxels for t in patch_chain((10.0, 0.3, 0.3), (3, 3000, 3000))]
    assert thick[2:4] == [(1, 896, 896), (1, 896, 768)]
    assert thick[-1] == (1, 8, 8)
    assert math.prod(patch_chain((0.43, 4.8, 8.1), (33, 330, 410))[-1].patch_voxels) < 1000


def test_every_chain_falls_to_a_small_end() -> None:
    rng = random.Random(9)
    for _ in range(150):
        dimension = rng.choice([2, 3])
        spacing, median = random_pair(rng, dimension)
        chain = patch_chain(spacing, median)
        volumes = [math.prod(t.patch_voxels) for t in chain]
        assert volumes == sorted(volumes, reverse=True)
        assert len(set(volumes)) == len(volumes)
        assert all(t.stages >= 2 for t in chain[1:])
        assert volumes[-1] < 1000 or chain[0].stages < 2
