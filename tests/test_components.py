import numpy as np
import pytest

from autoseg.errors import UserError
from autoseg.image import components as module
from autoseg.image.components import (
    bounding_box,
    components,
    drop_small,
    drop_volume,
    fill_holes,
    keep_largest,
    label_components,
)


@pytest.fixture(autouse=True, params=["runs", "voxels"])
def way(request, monkeypatch) -> None:
    """Every test goes both ways: along runs, and along voxels as for noise."""
    monkeypatch.setattr(module, "MANY_RUNS", 1.0 if request.param == "runs" else 0.0)


def three_blocks() -> np.ndarray:
    """Components of 27, 8 and 12 voxels in scan order."""
    mask = np.zeros((8, 12, 12), bool)
    mask[1:4, 1:4, 1:4] = True
    mask[1:3, 6:8, 6:8] = True
    mask[5:7, 8:10, 8:11] = True
    return mask


def test_components_are_numbered_with_their_sizes():
    labelled, sizes = components(three_blocks())
    assert labelled.dtype == np.int32
    assert sizes.tolist() == [27, 8, 12]
    for number, size in enumerate(sizes, 1):
        assert (labelled == number).sum() == size
    assert np.array_equal(labelled > 0, three_blocks())


def test_components_are_numbered_in_scan_order():
    mask = np.random.default_rng(3).random((12, 13, 14)) < 0.2
    labelled, sizes = components(mask)
    first_seen = list(dict.fromkeys(labelled[mask].tolist()))
    assert first_seen == list(range(1, sizes.size + 1))


def test_rows_that_end_and_begin_at_the_rim_do_not_touch():
    mask = np.zeros((2, 4, 4), bool)
    mask[0, 1, 3] = mask[0, 2, 0] = mask[0, 3, 3] = mask[1, 0, 0] = True
    assert components(mask, 3)[1].tolist() == [1, 1, 1, 1]
    assert components(np.ones((5, 1), bool))[1].tolist() == [5]
    assert components(np.array([1, 1, 0, 1], bool), 3)[1].tolist() == [2, 1]


def test_a_full_labelling_equals_scikit_image_on_noise():
    from skimage.measure import label

    mask = np.random.default_rng(0).random((20, 21, 22)) < 0.3
    for connectivity in (1, 2, 3):
        ours, sizes = components(mask, connectivity)
        theirs = label(mask, connectivity=connectivity)
        assert sizes.size == theirs.max()
        pairs = np.unique(np.stack([ours[mask], theirs[mask]]), axis=1)
        assert pairs.shape[1] == sizes.size


def test_connectivity_decides_whether_corners_touch():
    mask = np.zeros((3, 3, 3), bool)
    mask[0, 0, 0] = mask[1, 1, 1] = True
    assert [components(mask, c)[1].size for c in (1, 2, 3)] == [2, 2, 1]
    with pytest.raises(UserError, match="connectivity is 6"):
        components(mask, 6)


def test_drop_small_removes_below_the_fraction_and_keeps_exactly_at_it():
    mask = three_blocks()
    assert drop_small(mask, 1 / 3).sum() == 27 + 12
    assert drop_small(mask, 8 / 27).sum() == 27 + 8 + 12
    assert drop_small(mask, 0.5).sum() == 27


def test_keep_largest_keeps_one_of_two_equals():
    mask = np.zeros((1, 3, 9), bool)
    mask[0, :2, 0:2] = mask[0, :2, 5:7] = True
    kept = keep_largest(mask)
    assert kept.sum() == 4
    assert kept[0, 0, 0]


def test_drop_volume_counts_voxels():
    assert drop_volume(three_blocks(), 12).sum() == 27 + 12
    assert drop_volume(three_blocks(), 12.5).sum() == 27


def test_empty_and_one_voxel_masks_pass_every_rule():
    empty = np.zeros((3, 4, 5), bool)
    one = empty.copy()
    one[1, 2, 3] = True
    for rule in (drop_small, keep_largest, fill_holes, lambda mask: drop_volume(mask, 1)):
        assert not rule(empty).any()
        assert np.array_equal(rule(one), one)
    assert bounding_box(empty) is None
    assert components(empty)[1].size == 0


def test_fill_holes_fills_enclosed_background_only():
    shell = np.zeros((7, 7, 7), bool)
    shell[1:6, 1:6, 1:6] = True
    shell[3, 3, 3] = False
    assert fill_holes(shell)[3, 3, 3]
    assert fill_holes(shell).sum() == 125
    shell[3, 3, 1:4] = False
    assert not fill_holes(shell)[3, 3, 3]


def test_fill_holes_works_in_the_plane_of_a_2d_image():
    ring = np.zeros((1, 7, 7), bool)
    ring[0, 1:6, 1:6] = True
    ring[0, 3, 3] = False
    assert fill_holes(ring)[0, 3, 3]


def test_no_rule_changes_its_input():
    mask = three_blocks()
    before = mask.copy()
    for rule in (drop_small, keep_largest, fill_holes, lambda m: drop_volume(m, 20)):
        rule(mask)
    assert np.array_equal(mask, before)


def test_all_labels_are_numbered_in_one_pass_as_one_by_one():
    chance = np.random.default_rng(5)
    labels = chance.integers(-1, 4, (9, 10, 11)).astype(np.int16)
    for connectivity in (1, 3):
        numbers, label_of, sizes = label_components(labels, connectivity)
        assert not numbers[labels <= 0].any()
        for k in (1, 2, 3):
            one, one_sizes = components(labels == k, connectivity)
            assert sorted(sizes[label_of == k]) == sorted(one_sizes)
            for number in np.flatnonzero(label_of == k) + 1:
                assert np.unique(one[numbers == number]).size == 1
                assert (numbers == number).sum() == sizes[number - 1]
