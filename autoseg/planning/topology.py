"""Strides, kernels and divisors of a U-Net, derived from spacing and patch.

The rules are those that nnU-Net published. Source: Isensee et al., "nnU-Net", Nature Methods 18 (2021), supplementary
note 5; constants as in nnU-Net 2. Axes are those of the patch: Z Y X, or Y X in 2D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

SMALLEST_EDGE = 4
"""No axis is pooled below this many voxels. It also keeps every strided bf16 convolution away from an output whose
last axis is 1, which oneDNN computes wrongly on CPUs (pytorch issue 169688)."""

SIMILAR = 2.0
"""Spacings that differ by less than this factor count as equal."""


@dataclass(frozen=True, slots=True)
class Topology:
    """Strides and kernels per stage (the first stride is all ones), and the patch padded to what they divide."""

    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    divisors: tuple[int, ...]
    patch_voxels: tuple[int, ...]

    @property
    def stages(self) -> int:
        return len(self.strides)


def choose_topology(spacing_mm: Sequence[float], patch_voxels: Sequence[int]) -> Topology:
    """Pool the finest axes first until no axis may be halved; kernels open from 1 to 3 once the spacings agree."""
    spacing, size, axes = list(spacing_mm), list(patch_voxels), range(len(patch_voxels))
    kernel = [1] * len(size)
    divisors = [1] * len(size)
    strides, kernels = [tuple(kernel)], []
    while pooled := _axes_to_pool(spacing, size):
        kernel = [3 if kernel[a] == 3 or spacing[a] / min(spacing) < SIMILAR else 1 for a in axes]
        kernels.append(tuple(kernel))
        strides.append(tuple(2 if a in pooled else 1 for a in axes))
        for a in pooled:
            divisors[a] *= 2
            spacing[a] *= 2
            size[a] = -(-size[a] // 2)
    kernels.append((3,) * len(size))
    padded = tuple(-(-patch_voxels[a] // divisors[a]) * divisors[a] for a in axes)
    return Topology(tuple(strides), tuple(kernels), tuple(divisors), padded)


def choose_features(stages: int, dimension: int, base: int = 32) -> tuple[int, ...]:
    """`base` channels, doubled per stage, at most 320 in 3D and 512 in 2D."""
    return tuple(min(base * 2**stage, 320 if dimension == 3 else 512) for stage in range(stages))


def strided_to_one(strides: Sequence[Sequence[int]], patch_voxels: Sequence[int]) -> tuple[int, ...]:
    """Stages whose strided convolution leaves one voxel on the last axis (see SMALLEST_EDGE); safe plans have none."""
    size, found = patch_voxels[-1], []
    for stage, stride in enumerate(strides):
        size = -(-size // stride[-1])
        if stride[-1] > 1 and size == 1:
            found.append(stage)
    return tuple(found)


def _axes_to_pool(spacing: Sequence[float], size: Sequence[float]) -> list[int]:
    long_enough = [a for a in range(len(size)) if size[a] >= 2 * SMALLEST_EDGE]
    if not long_enough:
        return []
    finest = min(spacing[a] for a in long_enough)
    pooled = [a for a in long_enough if spacing[a] / finest < SIMILAR]
    if len(pooled) == 1 and size[pooled[0]] < 3 * SMALLEST_EDGE:
        return []
    return pooled
