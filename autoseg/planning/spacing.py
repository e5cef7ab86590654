"""The grid of a configuration: target spacing, order of the axes, median shape. Source: nnU-Net's experiment planner.

Everything here is in the axes of the file (Z Y X) until `transposed`.
"""

from collections.abc import Sequence
from math import floor, prod
from statistics import median
from typing import TypeVar

from autoseg.planning.wording import millimetres, voxels
from autoseg.records import CaseStats, Choice, Fingerprint, Millimetres3, Voxels3

STRONG_ANISOTROPY = 3.0
LOWRES_STEP = 1.03
Number = TypeVar("Number")


def choose_spacing(fingerprint: Fingerprint) -> tuple[Millimetres3, Choice]:
    """The median spacing per axis; on a thick axis that is also short in voxels the 10th percentile, if coarser than
    the others, else theirs."""
    spacings = [case.spacing_mm for case in fingerprint.cases]
    target = [median(each) for each in zip(*spacings, strict=True)]
    sizes = [median(each) for each in zip(*(case.shape_voxels for case in fingerprint.cases), strict=True)]
    thick = target.index(max(target))
    others = [a for a in range(3) if a != thick]
    next_coarsest, next_shortest = max(target[a] for a in others), min(sizes[a] for a in others)
    because = f"the median over {len(spacings)} images, per axis"
    if target[thick] > STRONG_ANISOTROPY * next_coarsest and sizes[thick] * STRONG_ANISOTROPY < next_shortest:
        wanted = percentile([each[thick] for each in spacings], 10)
        source = "the 10th percentile"
        if wanted < next_coarsest:
            source = f"that of the next coarsest axis (the 10th percentile, {wanted:.4g} mm, is finer still)"
            wanted = next_coarsest + 1e-5
        because += (
            f"; on axis {'ZYX'[thick]} {source} instead of the median {target[thick]:.4g} mm, because it is "
            f"more than {STRONG_ANISOTROPY:g} times coarser and shorter than the other axes"
        )
        target[thick] = wanted
    spacing = (target[0], target[1], target[2])
    return spacing, Choice(field="spacing_mm", value=millimetres(spacing), because=because + ".")


def choose_axes(spacing_mm: Millimetres3, dimension: int) -> tuple[Voxels3, Choice]:
    """Transposition that brings the coarsest axis to the front; the others keep their order."""
    if dimension == 2:
        return (0, 1, 2), Choice(field="axes", value="0 1 2", because="the images are 2D.")
    first = spacing_mm.index(max(spacing_mm))
    rest = [a for a in range(3) if a != first]
    coarsest = f"axis {'ZYX'[first]} of the files is the coarsest with {spacing_mm[first]:.4g} mm"
    because = f"{coarsest}, so it comes first: slices are cut across it and kernels treat it apart."
    if min(spacing_mm) == max(spacing_mm):
        because = f"all axes have the same spacing, {spacing_mm[0]:.4g} mm, so their order stays."
    axes = (first, rest[0], rest[1])
    return axes, Choice(field="axes", value=" ".join(map(str, axes)), because=because)


def median_shape(cases: Sequence[CaseStats], spacing_mm: Millimetres3) -> Voxels3:
    """Median shape of the cases after cropping and resampling to `spacing_mm`, halves rounded up."""
    shapes = [
        [round(n * old / new) for n, old, new in zip(case.shape_voxels, case.spacing_mm, spacing_mm, strict=True)]
        for case in cases
    ]
    z, y, x = (max(1, floor(median(each) + 0.5)) for each in zip(*shapes, strict=True))
    return z, y, x


def transposed(values: Sequence[Number], axes: Voxels3) -> tuple[Number, Number, Number]:
    """`values` per axis of the file, in the order of `axes`."""
    return values[axes[0]], values[axes[1]], values[axes[2]]


def coarser(spacing_mm: Millimetres3) -> Millimetres3:
    """One step towards low resolution: first only the axes more than twice as fine as the coarsest, then all."""
    coarsest = max(spacing_mm)
    fine = [coarsest / each > 2 for each in spacing_mm]
    z, y, x = (s * LOWRES_STEP if f or not any(fine) else s for s, f in zip(spacing_mm, fine, strict=True))
    return z, y, x


def resampled(shape_voxels: Voxels3, old_mm: Millimetres3, new_mm: Millimetres3) -> Voxels3:
    """Shape at another spacing, at least one voxel per axis."""
    z, y, x = (max(1, round(n * a / b)) for n, a, b in zip(shape_voxels, old_mm, new_mm, strict=True))
    return z, y, x


def percentile(values: Sequence[float], share: float) -> float:
    """Linear between the neighbours, as NumPy's default."""
    ranked = sorted(values)
    place = (len(ranked) - 1) * share / 100
    low = floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (ranked[high] - ranked[low]) * (place - low)


def describe_shape(shape_voxels: Voxels3, cases: int) -> Choice:
    """The median shape as a choice with the size of the data set."""
    because = (
        f"the median of {cases} images at the target spacing; all of them hold {cases * prod(shape_voxels):.3g} voxels."
    )
    return Choice(field="median_shape_voxels", value=voxels(shape_voxels), because=because)
