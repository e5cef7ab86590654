"""The nonzero region: found with its holes, cut out and put back."""

import numpy as np
from scipy import ndimage

from autoseg.image.crop import box_of, crop, insert, nonzero_mask


def test_the_mask_joins_all_channels_and_fills_holes() -> None:
    image = np.zeros((2, 9, 9, 9), np.float32)
    image[0, 2:7, 2:7, 2:7] = -3
    image[:, 4, 4, 4] = 0
    image[1, 0, 0, 0] = 1
    mask = nonzero_mask(image)
    assert mask[4, 4, 4]
    assert mask[0, 0, 0]
    assert mask.sum() == 126


def test_holes_are_those_of_the_reference() -> None:
    draw = np.random.default_rng(0)
    for shape in ((12, 13, 14), (1, 30, 30), (2, 20, 20), (3, 20, 20), (20, 1, 20), (1, 1, 30), (4, 4, 1)):
        for share in (0.5, 0.8, 0.95):
            found = draw.random(shape) < share
            expected = ndimage.binary_fill_holes(found.squeeze()).reshape(shape)
            assert np.array_equal(nonzero_mask(found[None].astype(np.float32)), expected), (shape, share)


def test_a_slice_of_its_own_has_holes_in_its_plane() -> None:
    image = np.zeros((1, 1, 9, 9), np.float32)
    image[0, 0, 2:7, 2:7] = 1
    image[0, 0, 4, 4] = 0
    assert nonzero_mask(image).sum() == 25


def test_a_flat_object_in_a_volume_has_no_hole_in_its_plane() -> None:
    image = np.zeros((1, 5, 9, 9), np.float32)
    image[0, 2, 2:7, 2:7] = 1
    image[0, 2, 4, 4] = 0
    assert nonzero_mask(image).sum() == 24


def test_the_box_is_the_smallest_around_all_true_voxels() -> None:
    mask = np.zeros((5, 6, 7), bool)
    mask[1, 2, 3] = mask[3, 5, 0] = True
    assert box_of(mask) == ((1, 4), (2, 6), (0, 4))


def test_an_empty_image_stays_whole() -> None:
    assert box_of(np.zeros((2, 3, 4), bool)) == ((0, 2), (0, 3), (0, 4))
    assert not nonzero_mask(np.zeros((1, 2, 3, 4), np.float32)).any()


def test_insert_undoes_crop_for_images_and_label_maps() -> None:
    image = np.random.default_rng(0).random((2, 5, 6, 7)).astype(np.float32)
    box = ((1, 4), (0, 6), (2, 5))
    part = crop(image, box)
    assert part.shape == (2, 3, 6, 3)
    assert np.shares_memory(part, image)
    whole = insert(part, box, (5, 6, 7), -1)
    assert np.array_equal(crop(whole, box), part)
    assert (whole == -1).sum() == image.size - part.size
    assert insert(part[0], box, (5, 6, 7), 0).shape == (5, 6, 7)
