"""cases/prepare.py: the one preprocessing and its inverse."""

import numpy as np
import pytest
from planned import a_configuration, a_plan

from autoseg.cases.prepare import class_locations, prepare, restore, restore_probabilities, to_values
from autoseg.errors import UserError
from autoseg.image.labels import to_indices
from autoseg.image.resample import operators, resample_image, resample_labels
from autoseg.image.volume import Volume, plain_geometry
from autoseg.records import Label, Resampling
from autoseg.steps.predicting.predictor import to_cropped_grid

LABELS = tuple(Label(name=str(value), value=value) for value in (0, 5, 9))


def a_case(shape=(10, 12, 14), spacing_mm=(1.0, 1.0, 1.0), seed=0) -> tuple[Volume, np.ndarray]:  # type: ignore[no-untyped-def]
    """An image with an empty margin of 1, 2, 3 voxels in front, and labels 0, 5, 9 inside."""
    generator = np.random.default_rng(seed)
    image = np.zeros((1, *shape), np.float32)
    image[:, 1:, 2:, 3:] = generator.normal(50, 5, (1, shape[0] - 1, shape[1] - 2, shape[2] - 3))
    labels = np.zeros(shape, np.int32)
    labels[3:6, 4:7, 5:9] = 5
    labels[6:8, 4:7, 5:9] = 9
    return Volume(image, plain_geometry(shape, spacing_mm)), labels


def test_an_image_is_cropped_and_normalized_and_its_labels_become_indices() -> None:
    volume, labels = a_case()
    prepared = prepare(volume, labels, a_plan(), a_configuration())
    assert prepared.box == ((1, 10), (2, 12), (3, 14))
    assert prepared.image_CZYX.shape == (1, 9, 10, 11)
    assert (prepared.image_CZYX.dtype, prepared.labels_ZYX.dtype) == (np.float32, np.int16)
    assert abs(prepared.image_CZYX.mean()) < 1e-5
    assert abs(prepared.image_CZYX.std() - 1) < 1e-4
    np.testing.assert_array_equal(prepared.labels_ZYX, (labels[1:, 2:, 3:] == 5) + 2 * (labels[1:, 2:, 3:] == 9))


def test_transposing_and_resampling_use_the_axes_of_the_plan() -> None:
    volume, labels = a_case(shape=(10, 12, 16), spacing_mm=(1.0, 1.0, 2.0))
    configuration = a_configuration(axes=(2, 0, 1), spacing_mm=(1.0, 1.0, 0.5))
    prepared = prepare(volume, labels, a_plan(), configuration)
    assert prepared.spacing_mm == (2.0, 1.0, 1.0)
    assert prepared.cropped_shape == (13, 9, 10)
    assert prepared.image_CZYX.shape == (1, 26, 9, 20)
    assert prepared.labels_ZYX.shape == (26, 9, 20)
    assert set(np.unique(prepared.labels_ZYX)) == {0, 1, 2}


@pytest.mark.parametrize("anisotropy", [3.0, 1.8])
@pytest.mark.parametrize(
    ("spacing_mm", "target_mm"),
    [((1.0, 1.3, 2.0), (1.1, 1.5, 0.9)), ((5.0, 1.0, 1.0), (0.8, 3.0, 1.2)), ((1.0, 1.0, 1.2), (0.5, 1.6, 0.6))],
    ids=str,
)
def test_preparing_is_cropping_normalizing_within_the_mask_and_resampling_in_this_order(
    spacing_mm: tuple[float, float, float], target_mm: tuple[float, float, float], anisotropy: float
) -> None:
    axes, shape = (2, 0, 1), (10, 12, 14)
    volume, _ = a_case(shape, spacing_mm)
    labels = np.random.default_rng(1).choice(np.array([0, 5, 9], np.int32), shape)
    volume.array_CZYX[0, 6:, 8:, 10:] = 0  # inside the box and outside the mask
    configuration = a_configuration(
        axes=axes, spacing_mm=target_mm, mask_for_normalization=(True,), resampling=Resampling(anisotropy=anisotropy)
    )
    image = volume.array_CZYX[0, 1:, 2:, 3:].transpose(axes).astype(np.float64)
    inside = image != 0
    assert not inside.all()
    normalized = np.where(inside, (image - image[inside].mean()) / image[inside].std(), 0)
    turned_mm = tuple(spacing_mm[axis] for axis in axes)
    new = tuple(round(n * old / mm) for n, old, mm in zip(image.shape, turned_mm, target_mm, strict=True))
    indices = ((labels == 5) + 2 * (labels == 9))[1:, 2:, 3:].transpose(axes).astype(np.int16)
    prepared = prepare(volume, labels, a_plan(), configuration)
    image = normalized[None].astype(np.float32)
    expected = resample_image(image, turned_mm, target_mm, new, order=3, anisotropy=anisotropy)
    np.testing.assert_allclose(prepared.image_CZYX, expected, atol=1e-4)
    expected = resample_labels(indices, turned_mm, target_mm, new, order=1, anisotropy=anisotropy)
    np.testing.assert_array_equal(prepared.labels_ZYX, expected)
    back = to_cropped_grid(prepared, configuration)
    expected = operators(new, prepared.cropped_shape, target_mm, turned_mm, 1, anisotropy)
    assert all(np.array_equal(own, each) for own, each in zip(back, expected, strict=True))


def test_an_axis_without_target_spacing_keeps_its_slices() -> None:
    volume, _ = a_case(spacing_mm=(4.0, 1.0, 1.0))
    prepared = prepare(volume, None, a_plan(), a_configuration(dimension=2, spacing_mm=(None, 0.5, 0.5)))
    assert prepared.image_CZYX.shape == (1, 9, 20, 22)
    assert prepared.labels_ZYX is None


def test_with_and_without_labels_the_image_is_the_same() -> None:
    volume, labels = a_case()
    configuration = a_configuration(spacing_mm=(1.0, 0.7, 0.7))
    with_labels, without = (prepare(volume, each, a_plan(), configuration) for each in (labels, None))
    np.testing.assert_array_equal(with_labels.image_CZYX, without.image_CZYX)


def test_normalizing_within_the_mask_leaves_zero_outside_and_counts_only_inside() -> None:
    image = np.zeros((1, 6, 6, 6), np.float32)
    image[0, :, :, :3] = np.random.default_rng(0).normal(50, 5, (6, 6, 3))
    image[0, 0, 0, 5] = 50.0  # keeps the box whole
    prepared = prepare(
        Volume(image, plain_geometry((6, 6, 6), (1.0, 1.0, 1.0))), None, a_plan(),
        a_configuration(mask_for_normalization=(True,)),
    )  # fmt: skip
    inside = image[0] != 0
    assert (prepared.image_CZYX[0][~inside] == 0).all()
    assert abs(prepared.image_CZYX[0][inside].std() - 1) < 1e-3


def test_an_image_of_zeros_stays_whole_and_finite() -> None:
    empty = Volume(np.zeros((1, 4, 5, 6), np.float32), plain_geometry((4, 5, 6), (1.0, 1.0, 1.0)))
    prepared = prepare(empty, None, a_plan(), a_configuration())
    assert prepared.image_CZYX.shape == (1, 4, 5, 6)
    assert np.isfinite(prepared.image_CZYX).all()


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1)])
def test_restoring_labels_gives_the_file_back(axes: tuple[int, int, int]) -> None:
    volume, labels = a_case()
    prepared = prepare(volume, labels, a_plan(), a_configuration(axes=axes))
    restored = restore(prepared.labels_ZYX, prepared, LABELS, None, axes)
    np.testing.assert_array_equal(restored, labels)
    assert restored.dtype == np.int32


def test_restored_probabilities_are_background_where_the_image_was_cropped() -> None:
    volume, _ = a_case()
    prepared = prepare(volume, None, a_plan(), a_configuration(axes=(2, 0, 1)))
    inside = np.zeros((3, *prepared.cropped_shape), np.float32)
    inside[1] = 1
    whole = restore_probabilities(inside, prepared, (2, 0, 1))
    assert whole.shape == (3, 10, 12, 14)
    np.testing.assert_array_equal(whole.sum(axis=0), 1)
    assert (whole[1] == 1).sum() == inside[1].size
    assert whole[1, 1:, 2:, 3:].all()


@pytest.mark.parametrize("far", [9, 5_000_000])  # a table for near values, a search for far ones
def test_values_become_indices_and_back(far: int) -> None:
    labels = (Label(name="background", value=0), Label(name="a", value=-3), Label(name="b", value=far))
    values = np.array([[[0, -3, far, 255]]], np.int32)
    indices = to_indices(values, labels, 255, "a file")
    assert indices.tolist() == [[[0, 1, 2, -1]]]
    assert indices.dtype == np.int16
    assert to_values(indices, labels, 255).tolist() == values.tolist()


@pytest.mark.parametrize("far", [9, 5_000_000])
def test_an_unknown_value_is_named(far: int) -> None:
    labels = (Label(name="background", value=0), Label(name="b", value=far))
    with pytest.raises(UserError, match=r"case_7: label has values \{3, 77\}"):
        to_indices(np.array([[[0, 3, far, 77]]]), labels, None, "case_7")
    volume, values = a_case()
    with pytest.raises(UserError, match=r"\{9\}.*Add them under 'labels' in dataset\.json"):
        prepare(volume, values, a_plan(labels=LABELS[:2]), a_configuration())


def test_another_number_of_channels_is_refused() -> None:
    volume, _ = a_case()
    two = Volume(np.concatenate([volume.array_CZYX] * 2), volume.geometry)
    with pytest.raises(UserError, match=r"2 channel\(s\), but the plan was made for 1 \(MRI\)"):
        prepare(two, None, a_plan(), a_configuration())


def test_locations_are_voxels_of_their_class_without_repetition() -> None:
    labels = np.random.default_rng(0).integers(0, 3, (20, 30, 40)).astype(np.int16)
    labels[0, 0, 0] = 3
    found = class_locations(labels, 5, seed=1)
    assert sorted(found) == [1, 2, 3]
    assert len(found[1]) == min(10_000, int((labels == 1).sum()))
    assert found[3].tolist() == [[0, 0, 0]]
    for index, places in found.items():
        assert places.dtype == np.int32
        assert (labels[tuple(places.T)] == index).all()
        assert len(np.unique(places, axis=0)) == len(places)
    np.testing.assert_array_equal(class_locations(labels, 5, seed=1)[1], found[1])


def test_of_very_many_voxels_one_percent_are_kept() -> None:
    labels = np.ones((120, 100, 100), np.int8)
    found = class_locations(labels, 2, seed=0)[1]
    assert len(found) == 12_000
    assert abs(found[:, 0].mean() - 59.5) < 2  # spread over the whole volume


def test_where_voxels_are_ignored_annotated_ones_are_listed_too() -> None:
    labels = np.full((4, 4, 4), -1, np.int16)
    labels[1] = 0
    labels[2, 2, 2] = 1
    found = class_locations(labels, 2, seed=0)
    assert len(found[-1]) == 17
    assert (labels[tuple(found[-1].T)] >= 0).all()
