"""The fingerprint: statistics of one case, and what they say together.

Axes: C channel, Z Y X voxels.
"""

from collections.abc import Sequence

import numpy as np

from autoseg.cases.prepare import occupied
from autoseg.errors import UserError
from autoseg.image.components import label_components
from autoseg.image.crop import box_of, crop
from autoseg.records import CaseStats, Dataset, Fingerprint, Intensities, Millimetres3, PatientAxes3

SAMPLE_SIZE = 1000
LARGEST_SORTED = 2_000_000
"""Of more foreground voxels than this, an evenly spaced part is sorted for the percentiles."""


def measure_case(
    case: str,
    content: str,
    image_CZYX: np.ndarray,
    indices_ZYX: np.ndarray,
    spacing_mm: Millimetres3,
    classes: int,
    patient_axes: PatientAxes3 | None = None,
) -> CaseStats:
    """Statistics of one case after cropping to the nonzero region.

    Args:
        content: see `inspect.content_of`.
        image_CZYX: as read, finite.
        indices_ZYX: label indices, -1 where ignored.
        classes: number of label indices, background included.
        patient_axes: see `volume.patient_axes`.
    """
    box = box_of(occupied(image_CZYX))
    cropped_CZYX, cropped_ZYX = crop(image_CZYX, box), crop(indices_ZYX, box)
    counts = np.bincount(cropped_ZYX.ravel() + 1, minlength=classes + 1)[1:]
    components = _component_sizes(cropped_ZYX, classes)
    foreground_ZYX = cropped_ZYX > 0
    has_foreground = bool(foreground_ZYX.any())
    intensities, samples = [], []
    for channel_ZYX in cropped_CZYX:
        values = channel_ZYX[foreground_ZYX] if has_foreground else channel_ZYX.ravel()
        measured, sample = _intensities(values)
        intensities.append(measured)
        samples.append(sample if has_foreground else ())
    depth, height, width = cropped_ZYX.shape
    return CaseStats(
        id=case,
        content=content,
        shape_voxels=(depth, height, width),
        full_shape_voxels=(indices_ZYX.shape[0], indices_ZYX.shape[1], indices_ZYX.shape[2]),
        spacing_mm=spacing_mm,
        crop_share=cropped_ZYX.size / indices_ZYX.size,
        class_voxels=tuple(int(count) for count in counts),
        class_mm3=tuple(float(count * np.prod(spacing_mm)) for count in counts),
        class_components=tuple(len(sizes) for sizes in components),
        class_median_component_voxels=tuple(float(np.median(sizes)) if len(sizes) else 0.0 for sizes in components),
        intensities=tuple(intensities),
        intensity_sample=tuple(samples),
        patient_axes=patient_axes,
    )


def fingerprint_of(dataset: Dataset, stats: Sequence[CaseStats], source: str = "") -> Fingerprint:
    """What the planner needs: all cases, and the foreground intensities pooled with the same weight per case.

    Mean and deviation are exact; the percentiles come from the samples, which are then dropped.
    Raises UserError when there is no case.
    """
    if not stats:
        raise UserError(f"{dataset.name}: there is no case to take a fingerprint of.")
    return Fingerprint(
        dataset=dataset.name,
        dimension=dataset.dimension,
        channels=dataset.channels,
        labels=dataset.labels,
        regions=dataset.regions,
        ignore_value=dataset.ignore_value,
        cases=tuple(each.model_copy(update={"intensity_sample": ()}) for each in stats),
        intensities=tuple(_pooled(stats, channel) for channel in range(len(dataset.channels))),
        source=source,
    )


def _component_sizes(indices_ZYX: np.ndarray, classes: int) -> list[np.ndarray]:
    """Voxels of every connected component (over faces) per class; none of the background's, for which nobody asks."""
    found = label_components(indices_ZYX)
    return [found.sizes_voxels[found.label_of == index] for index in range(classes)]


def _intensities(values: np.ndarray) -> tuple[Intensities, tuple[float, ...]]:
    """Statistics of some voxels, and `SAMPLE_SIZE` of them at evenly spaced ranks: no chance, tails included."""
    ordered = np.sort(values[:: values.size // LARGEST_SORTED + 1])
    ranks = ((np.arange(SAMPLE_SIZE) + 0.5) / SAMPLE_SIZE * ordered.size).astype(np.int64)
    low, median, high = np.percentile(ordered, (0.5, 50, 99.5))
    measured = Intensities(
        mean=_short(values.mean(dtype=np.float64)),
        std=_short(values.std(dtype=np.float64)),
        median=_short(median),
        minimum=_short(values.min()),
        maximum=_short(values.max()),
        percentile_00_5=_short(low),
        percentile_99_5=_short(high),
    )
    return measured, tuple(_rounded(ordered[ranks]).tolist())


def _short(value: float) -> float:
    """Seven digits: as many as the float32 intensities have, and half the size in JSON."""
    return float(f"{value:.7g}")


def _rounded(values: np.ndarray) -> np.ndarray:
    """The same for many values at once; float64. Tiny ones keep 30 decimals."""
    values = values.astype(np.float64)
    magnitude = np.floor(np.log10(np.maximum(np.abs(values), 1e-24))).astype(int)
    finer = 10.0 ** np.clip(6 - magnitude, 0, None)
    coarser = 10.0 ** np.clip(magnitude - 6, 0, None)
    return np.rint(values / coarser * finer) / finer * coarser


def _pooled(stats: Sequence[CaseStats], channel: int) -> Intensities:
    """Mean and deviation by the law of total variance, percentiles of all samples; only cases with foreground count."""
    counted = [each for each in stats if each.intensity_sample and each.intensity_sample[channel]] or list(stats)
    each_case = [each.intensities[channel] for each in counted]
    means, stds = np.array([one.mean for one in each_case]), np.array([one.std for one in each_case])
    samples = [each.intensity_sample[channel] for each in counted if each.intensity_sample]
    values = np.concatenate(samples) if any(samples) else np.array([one.median for one in each_case])
    low, median, high = np.percentile(values, (0.5, 50, 99.5))
    return Intensities(
        mean=_short(means.mean()),
        std=_short(np.sqrt((stds**2).mean() + means.var())),
        median=_short(median),
        minimum=min(one.minimum for one in each_case),
        maximum=max(one.maximum for one in each_case),
        percentile_00_5=_short(low),
        percentile_99_5=_short(high),
    )
