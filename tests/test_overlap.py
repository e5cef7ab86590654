import numpy as np
import pytest

from autoseg.scoring import overlap
from autoseg.scoring.overlap import Counts, count, lesion_f1, mean


def random_maps(seed: int, shape: tuple[int, ...] = (7, 9, 11), classes: int = 4) -> tuple[np.ndarray, np.ndarray]:
    chance = np.random.default_rng(seed)
    return chance.integers(0, classes, shape, np.int16), chance.integers(0, classes, shape, np.int16)


def test_counts_equal_counting_by_hand(monkeypatch):
    monkeypatch.setattr(overlap, "SLAB_VOXELS", 200)
    for seed in range(20):
        prediction, reference = random_maps(seed)
        for k, counts in enumerate(count(prediction, reference, 4)):
            p, r = prediction == k, reference == k
            assert counts == ((p & r).sum(), p.sum(), r.sum())


def test_scores_equal_simpleitk():
    import SimpleITK as sitk

    prediction, reference = random_maps(3)
    measure = sitk.LabelOverlapMeasuresImageFilter()
    measure.Execute(
        sitk.GetImageFromArray(reference.astype(np.uint8)), sitk.GetImageFromArray(prediction.astype(np.uint8))
    )
    for k, counts in enumerate(count(prediction, reference, 4)):
        if k:
            assert overlap.dice(counts) == pytest.approx(measure.GetDiceCoefficient(k), abs=1e-12)
            assert overlap.iou(counts) == pytest.approx(measure.GetJaccardCoefficient(k), abs=1e-12)


def test_voxels_nobody_annotated_count_for_neither_side():
    prediction = np.array([[[1, 1, 0, 2]]])
    reference = np.array([[[1, -1, -1, 1]]])
    assert count(prediction, reference, 3) == (Counts(0, 0, 0), Counts(1, 1, 2), Counts(0, 1, 0))


def test_a_class_in_neither_map_has_no_score_and_a_missed_one_scores_zero():
    nothing, missed, invented = Counts(0, 0, 0), Counts(0, 0, 5), Counts(0, 5, 0)
    ratios = ("dice", "iou", "precision", "recall", "volume_error")
    assert [overlap.METRICS[name](nothing, 1.0) for name in ratios] == [None] * 5
    assert [overlap.METRICS[name](missed, 1.0) for name in ratios] == [0, 0, None, 0, -1]
    assert [overlap.METRICS[name](invented, 1.0) for name in ratios] == [0, 0, 0, None, None]


def test_volumes_are_in_cubic_millimetres():
    counts = Counts(2, 5, 3)
    volumes = [overlap.METRICS[name](counts, 1.5) for name in ("reference_mm3", "prediction_mm3", "false_positive_mm3")]
    assert volumes == [4.5, 7.5, 4.5]


def test_lesions_count_once_each_whatever_their_size():
    reference = np.zeros((1, 4, 12), np.int32)
    reference[0, :, 0:3] = 1
    reference[0, 0, 6] = 2
    prediction = np.zeros_like(reference)
    prediction[0, 0, 2:4] = 1
    prediction[0, 3, 8] = 2
    prediction[0, 1, 10] = 3
    found, true = 1 / 2, 1 / 3
    assert lesion_f1(prediction, reference) == pytest.approx(2 * found * true / (found + true))
    empty = np.zeros_like(reference)
    assert lesion_f1(empty, empty) is None
    assert lesion_f1(empty, reference) == 0.0 == lesion_f1(reference, empty)


def test_maps_that_do_not_match_are_refused():
    with pytest.raises(ValueError, match="shape"):
        count(np.zeros((1, 2, 3), int), np.zeros((1, 2, 4), int), 2)
    with pytest.raises(ValueError, match="below 2"):
        count(np.full((1, 2, 3), 2), np.zeros((1, 2, 3), int), 2)


def test_the_mean_is_over_defined_values():
    assert mean([None, 1.0, 0.0]) == 0.5
    assert mean([None]) is None
