import numpy as np
import pytest

from autoseg.scoring import overlap
from autoseg.scoring.overlap import Counts, lesion_f1, mean


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


def test_the_mean_is_over_defined_values():
    assert mean([None, 1.0, 0.0]) == 0.5
    assert mean([None]) is None
