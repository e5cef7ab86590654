"""Resampling equals the reference in scikit-image, keeps labels exact, and needs little memory."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
import SimpleITK as sitk
from skimage.transform import resize

from autoseg.errors import UserError
from autoseg.image import resample
from autoseg.image.resample import (
    axis_matrix,
    operators,
    resample_image,
    resample_labels,
    resampled_shape,
    thick_axis,
)

ISOTROPIC = ((1.0, 1.0, 1.0),) * 2
"""Spacing before and after."""
THICK = ((5.0, 1.0, 1.0),) * 2
SHAPES = [((20, 31, 17), (33, 20, 17)), ((1, 40, 30), (1, 57, 44)), ((9, 8, 70), (3, 24, 150)), ((2, 3, 5), (7, 1, 9))]


def reference(array: np.ndarray, shape: tuple[int, ...], order: int) -> np.ndarray:
    return resize(array.astype(np.float64), shape, order=order, mode="edge", anti_aliasing=False, clip=True)


def blobs(shape: tuple[int, int, int], labels: int, seed: int = 0) -> np.ndarray:
    """A label map of touching smooth regions."""
    draw = np.random.default_rng(seed)
    centres = draw.uniform(0, 1, (labels, 3)) * shape
    grid = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij"), -1)
    return np.linalg.norm(grid[..., None, :] - centres, axis=-1).argmin(-1).astype(np.int16)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize(("old", "new"), SHAPES)
def test_images_equal_scikit_image(old: tuple, new: tuple, order: int) -> None:
    image = np.random.default_rng(0).normal(size=(2, *old)).astype(np.float32)
    resampled = resample_image(image, *ISOTROPIC, new, order, anisotropy=np.inf)
    assert resampled.dtype == np.float32
    for index in range(2):
        assert np.abs(resampled[index] - reference(image[index], new, order)).max() < 1e-4


@pytest.mark.parametrize(
    ("order", "interpolator"), [(0, sitk.sitkNearestNeighbor), (1, sitk.sitkLinear), (3, sitk.sitkBSpline)]
)
def test_new_voxels_hold_what_lies_at_their_place_in_the_patient(order: int, interpolator: int) -> None:
    """Both grids begin at the outer edge of the first voxel and end at that of the last."""
    image_ZYX = np.random.default_rng(0).normal(size=(31, 40, 37)).astype(np.float32)
    spacing_mm = np.array([1.0, 0.8, 1.2])
    new = resampled_shape(image_ZYX.shape, spacing_mm, (1.3, 0.5, 2.0))
    found_ZYX = resample_image(image_ZYX[None], spacing_mm, (1.3, 0.5, 2.0), new, order, anisotropy=9)[0]
    new_mm = spacing_mm * image_ZYX.shape / new
    image = sitk.GetImageFromArray(image_ZYX)
    image.SetSpacing(spacing_mm[::-1].tolist())
    begin_mm = ((new_mm - spacing_mm) / 2)[::-1].tolist()
    moved = sitk.Resample(image, new[::-1], sitk.Transform(), interpolator, begin_mm, new_mm[::-1].tolist())
    inner = (slice(10, -10), slice(16, -16), slice(7, -7))  # near the edges splines go on differently
    np.testing.assert_allclose(found_ZYX[inner], sitk.GetArrayFromImage(moved)[inner], atol=2e-4)


def test_nearest_neighbour_takes_the_voxel_that_holds_the_centre() -> None:
    image = np.arange(6, dtype=np.float32).reshape(1, 6, 1, 1)
    assert resample_image(image, *ISOTROPIC, (2, 1, 1), 0).ravel().tolist() == [1, 4]
    assert resample_image(image, *ISOTROPIC, (12, 1, 1), 0).ravel().tolist() == np.repeat(np.arange(6), 2).tolist()


def test_slices_of_a_thick_axis_are_interpolated_one_by_one_and_then_repeated() -> None:
    image = np.random.default_rng(1).normal(size=(1, 5, 20, 22)).astype(np.float32)
    resampled = resample_image(image, *THICK, (8, 30, 18))
    nearest = np.floor((np.arange(8) + 0.5) * 5 / 8).astype(int)
    expected = np.stack([reference(image[0, index], (30, 18), 3) for index in nearest])
    assert np.abs(resampled[0] - expected).max() < 1e-4
    fewer = resample_image(image, *THICK, (3, 30, 18))
    assert np.abs(fewer[0] - expected[[1, 4, 6]]).max() < 1e-4


@pytest.mark.parametrize("spacing_mm", [(5.0, 1.0, 1.0), (1.0, 1.0, 5.0), (1.0, 1.0, 1.0)])
@pytest.mark.parametrize("new", [(8, 30, 18), (3, 30, 22), (5, 11, 30)])
def test_operators_do_to_a_piece_what_is_done_to_a_whole_image(spacing_mm: tuple, new: tuple) -> None:
    image_ZYX = np.random.default_rng(1).normal(size=(5, 20, 22)).astype(np.float32)
    matrices = operators(image_ZYX.shape, new, spacing_mm, spacing_mm, 1)
    assert [matrix is None for matrix in matrices] == [old == size for old, size in zip((5, 20, 22), new, strict=True)]
    z, y, x = (np.eye(n) if each is None else each for each, n in zip(matrices, image_ZYX.shape, strict=True))
    found = np.einsum("az,by,cx,zyx->abc", z, y, x, image_ZYX)
    np.testing.assert_allclose(found, resample_image(image_ZYX[None], spacing_mm, spacing_mm, new, 1)[0], atol=1e-5)


def test_a_thick_last_axis_is_found_as_well() -> None:
    image = np.random.default_rng(1).normal(size=(1, 20, 22, 5)).astype(np.float32)
    resampled = resample_image(image, (1.0, 1.0, 5.0), (1.0, 1.0, 5.0), (30, 18, 8))
    turned = resample_image(image.transpose(0, 3, 1, 2), *THICK, (8, 30, 18)).transpose(0, 2, 3, 1)
    assert np.abs(resampled - turned).max() < 1e-5


def test_the_thick_axis_follows_the_present_spacing_first_and_needs_to_be_alone() -> None:
    assert thick_axis(*THICK) == 0
    assert thick_axis((1.0, 1.0, 3.01), (5.0, 1.0, 1.0)) == 2
    assert thick_axis((1.0, 1.0, 3.0), (1.0, 1.0, 3.0)) is None
    assert thick_axis((1.0, 1.0, 1.0), (1.0, 5.0, 1.0)) == 1
    assert thick_axis((0.24, 1.25, 1.25), (1.0, 1.0, 1.0)) is None
    assert thick_axis((0.24, 1.25, 1.25), (5.0, 1.0, 1.0)) is None
    assert thick_axis((2.0, 1.0, 1.0), (None, 0.5, 0.5)) == 0
    assert thick_axis(*THICK, anisotropy=6) is None


@pytest.mark.parametrize("resample", [resample_image, resample_labels])
def test_the_target_spacing_decides_and_not_what_rounded_shapes_come_to(resample: Callable) -> None:
    """Three times 0.8 mm is not thick, whatever rounded shapes come to: 3.25, 2.84 and 3.01 times here."""
    before, target = (1.3, 1.0, 1.0), (2.4, 0.8, 0.8)
    for slices in (4, 14, 37):
        array = np.random.default_rng(2).integers(0, 3, (slices, 20, 20)).astype(np.float32)
        array = array if resample is resample_labels else array[None]
        new = resampled_shape((slices, 20, 20), before, target)
        found, nearest = resample(array, before, target, new), resample(array, before, (2.5, 0.8, 0.8), new)
        assert np.array_equal(found, resample(array, *ISOTROPIC, new))
        assert np.array_equal(nearest, resample(array, *THICK, new))
        assert not np.array_equal(found, nearest)


def test_an_unchanged_shape_costs_nothing() -> None:
    image, labels = np.zeros((1, 3, 4, 5), np.float32), np.zeros((3, 4, 5), np.int16)
    assert resample_image(image, *ISOTROPIC, (3, 4, 5)) is image
    assert resample_labels(labels, *ISOTROPIC, (3, 4, 5)) is labels


def test_values_stay_in_the_range_of_the_input() -> None:
    image = (np.random.default_rng(3).random((1, 12, 12, 12)) > 0.5).astype(np.float32)
    resampled = resample_image(image, *ISOTROPIC, (31, 31, 31))
    assert resampled.min() == 0
    assert resampled.max() == 1


def test_a_constant_image_stays_constant() -> None:
    assert np.allclose(resample_image(np.full((1, 4, 5, 6), 7.5, np.float32), *ISOTROPIC, (9, 3, 11)), 7.5)


@pytest.mark.parametrize("order", [1, 3])
@pytest.mark.parametrize("new", [(37, 26, 50), (13, 20, 11), (30, 28, 26)])
def test_labels_equal_the_argmax_of_every_label_resized(new: tuple, order: int) -> None:
    labels = blobs((30, 28, 26), 12)
    labels[:3] = -1
    scores = np.stack([reference(labels == label, new, order) for label in np.unique(labels)])
    nearest = resample_labels(labels, *ISOTROPIC, new, order=0)
    scores += 1e-5 * (nearest == np.unique(labels).reshape(-1, 1, 1, 1))
    expected = np.unique(labels)[scores.argmax(0)]
    resampled = resample_labels(labels, *ISOTROPIC, new, order)
    assert resampled.dtype == labels.dtype
    assert resampled.shape == new
    assert (resampled == expected).mean() >= 0.9999


def test_labels_of_a_thick_axis_are_never_mixed_between_slices() -> None:
    labels = blobs((4, 30, 30), 5)
    resampled = resample_labels(labels, (6.0, 1.0, 1.0), (6.0, 1.0, 1.0), (8, 20, 41))
    for index in range(8):
        alone = resample_labels(labels[index // 2 : index // 2 + 1], (6.0, 1.0, 1.0), (6.0, 1.0, 1.0), (1, 20, 41))
        assert np.array_equal(resampled[index], alone[0])


def test_a_label_map_with_one_label_and_one_with_large_gaps_both_work() -> None:
    assert np.array_equal(resample_labels(np.full((3, 3, 3), 5), *ISOTROPIC, (4, 5, 6)), np.full((4, 5, 6), 5))
    gaps = np.zeros((8, 8, 8), np.int32)
    gaps[2:6] = 3000
    assert np.array_equal(resample_labels(gaps, *ISOTROPIC, (16, 16, 16)), np.kron(gaps, np.ones((2, 2, 2), np.int32)))


def test_memory_does_not_grow_with_the_number_of_labels() -> None:
    new = (80, 80, 80)
    peaks = []
    for labels in (4, 40):
        before = blobs((40, 40, 40), labels)
        resample_labels(before, *ISOTROPIC, new)  # fills the cache of operators
        tracemalloc.start()
        resample_labels(before, *ISOTROPIC, new)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] <= 1.1 * peaks[0]
    assert peaks[1] < 6 * 4 * np.prod(new)


def test_resampled_shapes_are_rounded_kept_where_asked_and_never_zero() -> None:
    assert resampled_shape((10, 20, 30), (3.0, 1.0, 1.0), (None, 0.5, 2.0)) == (10, 40, 15)
    assert resampled_shape((1, 20, 30), (1.0, 1.0, 1.0), (9.0, 3.0, 1.0)) == (1, 7, 30)


def test_operators_of_large_images_are_not_kept() -> None:
    before = resample._kept_matrix.cache_info().currsize
    assert resample.axis_matrix(2001, 1000, 1).shape == (1000, 2001)
    assert resample._kept_matrix.cache_info().currsize == before
    assert resample.axis_matrix(61, 59, 1) is resample.axis_matrix(61, 59, 1)


def test_operators_keep_constants_and_name_the_orders_they_know() -> None:
    for order in (0, 1, 3):
        assert np.allclose(axis_matrix(13, 29, order).sum(axis=1), 1, atol=1e-6)
    with pytest.raises(UserError, match=r"order 7"):
        axis_matrix(3, 4, 7)
