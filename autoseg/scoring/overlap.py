"""Overlap of two label maps: Dice, IoU, precision, recall, volumes, lesions.

One is predicted, the other the reference.
Axes: Z Y X voxels. A score that is 0/0 is None: see `POLICY`.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

POLICY = (
    "A score that would divide by zero is not defined (null) and does not enter means. A class absent from reference "
    "and prediction has no score at all; a class absent from exactly one of them has Dice, IoU, lesion F1 and surface "
    "Dice 0. Precision needs a prediction, recall and volume error need a reference, HD95 and average surface distance "
    "need both. Means are over the cases where the score is defined, first per class, then over classes."
)


class Counts(NamedTuple):
    """Voxels of one class: in both maps, in the prediction, in the reference."""

    both: int
    prediction: int
    reference: int


def dice(counts: Counts, voxel_mm3: float = 1.0) -> float | None:
    """Dice = 2 |P and R| / (|P| + |R|), 0..1; None when both are empty."""
    return _ratio(2 * counts.both, counts.prediction + counts.reference)


def iou(counts: Counts, voxel_mm3: float = 1.0) -> float | None:
    """Intersection over union, 0..1; None when both are empty."""
    return _ratio(counts.both, counts.prediction + counts.reference - counts.both)


def precision(counts: Counts, voxel_mm3: float = 1.0) -> float | None:
    """Share of the predicted voxels that are right, 0..1; None when nothing is predicted."""
    return _ratio(counts.both, counts.prediction)


def recall(counts: Counts, voxel_mm3: float = 1.0) -> float | None:
    """Share of the reference voxels that are found, 0..1; None when the reference is empty."""
    return _ratio(counts.both, counts.reference)


def volume_error(counts: Counts, voxel_mm3: float = 1.0) -> float | None:
    """(|P| - |R|) / |R|: -1 is "all missed", 0 "same volume", 1 "twice as much"; None without a reference."""
    return _ratio(counts.prediction - counts.reference, counts.reference)


def reference_mm3(counts: Counts, voxel_mm3: float) -> float:
    """Volume of the reference in mm3 (pixels of one slice: times that slice's thickness)."""
    return counts.reference * voxel_mm3


def prediction_mm3(counts: Counts, voxel_mm3: float) -> float:
    """Volume of the prediction in mm3."""
    return counts.prediction * voxel_mm3


def false_positive_mm3(counts: Counts, voxel_mm3: float) -> float:
    """Volume in mm3 that is predicted and not in the reference."""
    return (counts.prediction - counts.both) * voxel_mm3


def lesion_f1(
    prediction_components_ZYX: np.ndarray, reference_components_ZYX: np.ndarray
) -> float | None:
    """F1 over components: harmonic mean of the share of true components found and of predicted ones that are true.

    A component counts as found (or true) when it shares at least one voxel with the other map.

    Args:
        prediction_components_ZYX, reference_components_ZYX: components numbered 1..n, 0 outside, of equal shape.

    Returns:
        0..1; None when both are empty, 0 when one is.
    """
    predicted = int(prediction_components_ZYX.max(initial=0))
    real = int(reference_components_ZYX.max(initial=0))
    if not predicted and not real:
        return None
    if not predicted or not real:
        return 0.0
    shared = (prediction_components_ZYX > 0) & (reference_components_ZYX > 0)
    true_share = np.count_nonzero(np.bincount(prediction_components_ZYX[shared])) / predicted
    found_share = np.count_nonzero(np.bincount(reference_components_ZYX[shared])) / real
    return 2 * true_share * found_share / (true_share + found_share) if true_share else 0.0


def mean(values: tuple[float | None, ...] | list[float | None]) -> float | None:
    """Mean of the defined values, or None when there is none."""
    defined = [value for value in values if value is not None]
    return float(np.mean(defined)) if defined else None


def _ratio(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


METRICS: dict[str, Callable[[Counts, float], float | None]] = {
    "dice": dice,
    "iou": iou,
    "precision": precision,
    "recall": recall,
    "volume_error": volume_error,
    "reference_mm3": reference_mm3,
    "prediction_mm3": prediction_mm3,
    "false_positive_mm3": false_positive_mm3,
}
"""Scores computed from voxel counts; add a function above and a line here. `evaluate` computes all of them."""
