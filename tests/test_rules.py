"""image/rules.py: rules applied to label maps remove and fill what they say, and nothing else."""

import numpy as np
import pytest
from organs import LABELS, organ_map, rule, with_crumbs

from autoseg.image.rules import apply_rules


@pytest.mark.parametrize("label", ["organ", None])
def test_volumes_are_dropped_by_cubic_millimetres(label):
    labels = np.zeros((10, 24, 24), np.int16)
    labels[9, 22, 2:12] = 1
    for spacing_mm, limits in (((2.0, 1.0, 1.0), (15.0, 20.0, 25.0)), ((0.5, 0.5, 1.0), (2.0, 2.5, 4.0))):
        left = [
            int((apply_rules(labels, (rule("drop_volume", label, minimum_mm3=mm3),), LABELS, spacing_mm) > 0).sum())
            for mm3 in limits
        ]
        assert left == [10, 10, 0]


def test_applied_rules_leave_the_input_and_other_labels_alone():
    labels = with_crumbs(organ_map(), 0)
    before = labels.copy()
    after = apply_rules(labels, (rule("drop_small"), rule("keep_largest", "lesion")), LABELS, (1.0, 1.0, 1.0))
    assert np.array_equal(labels, before)
    assert after.dtype == labels.dtype
    assert ((after == 1) == (organ_map() == 1)).all()
    assert (after == 2).sum() == 8
    assert np.array_equal(apply_rules(labels, (), LABELS, (1.0, 1.0, 1.0)), before)


def test_holes_are_filled_only_where_there_is_background():
    shell = np.zeros((10, 24, 24), np.int16)
    shell[1:7, 1:7, 1:7] = 1
    shell[3, 3, 3], shell[4, 4, 4] = 0, 2
    filled = apply_rules(shell, (rule("fill_holes"),), LABELS, (1.0, 1.0, 1.0))
    assert filled[3, 3, 3] == 1
    assert filled[4, 4, 4] == 2
