"""The grid of a configuration: target spacing, order of the axes, median shape. Source: nnU-Net's experiment planner.

Everything here is in the axes of the file (Z Y X) until `transposed`.
"""

from collections import Counter
from collections.abc import Sequence
from math import floor, inf, prod
from statistics import median
from typing import TypeVar

from autoseg.errors import UserError
from autoseg.image.resample import thick_axis
from autoseg.planning.wording import millimetres, some, voxels
from autoseg.records import CaseStats, Choice, Fingerprint, Millimetres3, Voxels3

STRONG_ANISOTROPY = 3.0
LOWRES_STEP = 1.03
FAR_OFF = 7.0
"""A spacing that differs by this factor on the mean of its axes was hardly given in the same unit: cm are ten mm."""
MOST_VOXELS = 2**34
"""A median image of more, 64 GiB per channel, comes from a slip of the pen."""
Number = TypeVar("Number")


def asked_spacing(fingerprint: Fingerprint, asked_mm: Sequence[float]) -> tuple[Millimetres3, Choice]:
    """The spacing that the user asked for: Z Y X of the files in mm, or Y X for 2D images.

    Raises UserError for another number of axes, for what is not above zero, and where the median image would get huge.
    """
    suggested_mm, choice = choose_spacing(fingerprint)
    option, dimension = f"--spacing {','.join(f'{each:g}' for each in asked_mm)}", fingerprint.dimension
    if len(asked_mm) != dimension or not all(0 < each < inf for each in asked_mm):
        fix = f"Write {'Z,Y,X' if dimension == 3 else 'Y,X'} in mm, such as {'2,0.5,0.5' if dimension == 3 else '2,2'}."
        raise UserError(f"{option}: {dimension} numbers above zero are needed for these {dimension}D images.", fix=fix)
    z, y, x = (*suggested_mm[: 3 - dimension], *asked_mm)
    refuse_huge(option, median_shape(fingerprint.cases, (z, y, x), dimension))
    because = f"asked for by the user. From the data it would be {choice.value}: {choice.because}"
    return (z, y, x), choice.model_copy(update={"value": millimetres((z, y, x)), "because": because})


def refuse_huge(what: str, shape_voxels: Voxels3) -> None:
    """Raise UserError where a spacing, named by `what`, gives a median image that no machine would hold."""
    if prod(shape_voxels) > MOST_VOXELS:
        raise UserError(
            f"{what}: the median image would have {prod(shape_voxels):.2g} voxels.", fix="Give a coarser spacing."
        )


def choose_spacing(fingerprint: Fingerprint) -> tuple[Millimetres3, Choice]:
    """The median spacing per axis; on a thick axis that is also short in voxels the 10th percentile, if coarser than
    the others, else theirs."""
    spacings = [case.spacing_mm for case in fingerprint.cases]
    target = [median(each) for each in zip(*spacings, strict=True)]
    because = f"the median over {len(spacings)} images, per axis" if len(spacings) > 1 else "that of the only image"
    if fingerprint.dimension == 2:
        because += "; slices are not resampled across, so Z counts for nothing."
        return (target[0], target[1], target[2]), Choice(
            field="spacing_mm", value=millimetres(target), because=because
        )
    sizes = [median(each) for each in zip(*(case.shape_voxels for case in fingerprint.cases), strict=True)]
    thick = target.index(max(target))
    others = [a for a in range(3) if a != thick]
    next_coarsest, next_shortest = max(target[a] for a in others), min(sizes[a] for a in others)
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
    which = "the coarsest" if spacing_mm.count(spacing_mm[first]) == 1 else "one of the coarsest"
    coarsest = f"axis {'ZYX'[first]} of the files is {which} with {spacing_mm[first]:.4g} mm"
    because = f"{coarsest}, so it comes first: slices are cut across it and kernels treat it apart."
    if min(spacing_mm) == max(spacing_mm):
        because = f"all axes have the same spacing, {spacing_mm[0]:.4g} mm, so their order stays."
    axes = (first, rest[0], rest[1])
    return axes, Choice(field="axes", value=" ".join(map(str, axes)), because=because)


def median_shape(cases: Sequence[CaseStats], spacing_mm: Millimetres3, dimension: int = 3) -> Voxels3:
    """Median shape of the cases after cropping and resampling to `spacing_mm`, halves rounded up; 2D is one slice."""
    shapes = [
        [round(n * old / new) for n, old, new in zip(case.shape_voxels, case.spacing_mm, spacing_mm, strict=True)]
        for case in cases
    ]
    z, y, x = (max(1, floor(median(each) + 0.5)) for each in zip(*shapes, strict=True))
    return z if dimension == 3 else 1, y, x


def warn_of_spacings(fingerprint: Fingerprint, spacing_mm: Millimetres3) -> tuple[str, ...]:
    """A warning where slices lie along different axes of the files, and where headers seem to be in another unit."""
    warnings, cases = [], fingerprint.cases
    own = [case.spacing_mm for case in cases]
    thick = Counter(thick_axis(each, each, STRONG_ANISOTROPY) for each in own if fingerprint.dimension == 3)
    counts = [f"{'ZYX'[axis]} in {count}" for axis, count in thick.most_common() if axis is not None]
    if len(counts) > 1:
        warnings.append(
            f"The slices lie along different axes of the files: {', '.join(counts)} of {len(cases)} cases. The target "
            f"spacing, {millimetres(spacing_mm)}, is the median per axis of the files and suits none of them: save all "
            "in one orientation."
        )
    axes = range(3 - fingerprint.dimension, 3)
    ratios = [prod(each[a] / spacing_mm[a] for a in axes) ** (1 / len(axes)) for each in own]
    far = [case.id for case, ratio in zip(cases, ratios, strict=True) if not 1 / FAR_OFF < ratio < FAR_OFF]
    if far:
        case = next(each for each in cases if each.id == far[0])
        warnings.append(
            f"{some(far)}: a spacing such as {millimetres(case.spacing_mm)} is far from that of the others, "
            f"{millimetres(spacing_mm)}. Is the header in millimetres?"
        )
    return tuple(warnings)


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
    of = f"the median of {cases} images" if cases > 1 else "that of the only image"
    together = f"; all of them hold about {cases * prod(shape_voxels):.3g} voxels" if cases > 1 else ""
    because = f"{of} at the target spacing{together}."
    return Choice(field="median_shape_voxels", value=voxels(shape_voxels), because=because)
