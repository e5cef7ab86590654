import numpy as np
import pytest
from scipy import ndimage

from autoseg.scoring.surface import (
    _areas,
    _cut_cubes,
    _places_mm,
    average_mm,
    distances,
    hausdorff_mm,
    surface_dice,
    surface_scores,
)

SPACING_MM = (3.0, 1.2, 0.7)
MISSED = {"hd95_mm": None, "asd_mm": None, "surface_dice": 0.0, "surface_dice_at_tolerance": 0.0}


def ball(shape=(40, 60, 70), centre_mm=(57.0, 36.0, 24.0), radius_mm=18.0, spacing_mm=SPACING_MM) -> np.ndarray:
    axes = np.ogrid[tuple(slice(n) for n in shape)]
    distance2 = sum((x * s - c) ** 2 for x, s, c in zip(axes, spacing_mm, centre_mm, strict=True))
    return distance2 <= radius_mm**2


def blobs(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Two related random masks with an anisotropic spacing; some are empty, some have a single voxel."""
    chance = np.random.default_rng(seed)
    shape = tuple(int(n) for n in chance.integers(6, 24, 3))
    spacing_mm = tuple(float(s) for s in np.random.default_rng(seed % 20).uniform(0.5, 4.0, 3))
    field = ndimage.gaussian_filter(chance.normal(size=shape), 1.5)
    other = field + 0.5 * ndimage.gaussian_filter(chance.normal(size=shape), 1.5)
    reference, prediction = field > np.quantile(field, 0.8), other > np.quantile(other, 0.8)
    if seed % 10 == 0:
        prediction = np.zeros(shape, bool)
    if seed % 10 in (0, 5):
        prediction[tuple(n // 2 for n in shape)] = seed % 20 != 0
    return prediction, reference, spacing_mm


def surface_elements(
    mask: np.ndarray, spacing_mm: tuple[float, float, float], flat: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Places (mm from the centre of the first voxel) and areas (mm2, or mm) of the surface elements of a mask."""
    elements, codes, shape = _cut_cubes(mask, flat)
    return _places_mm(elements, shape, spacing_mm, flat), _areas(codes, spacing_mm, flat)


def test_distances_equal_an_exact_distance_map_of_the_volume():
    """The other way to compute them: Euclidean distance transform on the grid of surface elements."""
    for seed in range(30):
        prediction, reference, spacing_mm = blobs(seed)
        between = distances(prediction, reference, spacing_mm)
        if not prediction.any():
            assert between is None
            continue
        shape = tuple(n + 1 for n in prediction.shape)
        maps = []
        for mask in (prediction, reference):
            places_mm, _ = surface_elements(mask, spacing_mm)
            places = np.rint(places_mm / np.array(spacing_mm) + 0.5).astype(int)
            free = np.ones(shape, bool)
            free[tuple(places.T)] = False
            maps.append((ndimage.distance_transform_edt(free, sampling=spacing_mm), places))
        assert np.allclose(between.prediction_mm, maps[1][0][tuple(maps[0][1].T)], atol=1e-9)
        assert np.allclose(between.reference_mm, maps[0][0][tuple(maps[1][1].T)], atol=1e-9)


def test_scores_equal_the_published_implementation():
    """On 200 random cases, by the package `surface-distance` of the extra `dev`; skipped where that is missing."""
    published = pytest.importorskip("surface_distance", reason="the package surface-distance is not installed")
    for seed in range(200):
        prediction, reference, spacing_mm = blobs(seed)
        ours = surface_scores(prediction, reference, spacing_mm)
        if not prediction.any():
            assert ours == MISSED
            continue
        theirs = published.compute_surface_distances(reference, prediction, spacing_mm)
        assert ours["hd95_mm"] == pytest.approx(published.compute_robust_hausdorff(theirs, 95), abs=1e-6)
        expected = published.compute_surface_dice_at_tolerance(theirs, 1.0)
        assert ours["surface_dice"] == pytest.approx(expected, abs=1e-6)
        expected = published.compute_surface_dice_at_tolerance(theirs, 2.0)
        assert ours["surface_dice_at_tolerance"] == pytest.approx(expected, abs=1e-6)
        total = sum(theirs[f"surfel_areas_{side}"].sum() for side in ("gt", "pred"))
        summed = (theirs["distances_gt_to_pred"] * theirs["surfel_areas_gt"]).sum()
        summed += (theirs["distances_pred_to_gt"] * theirs["surfel_areas_pred"]).sum()
        assert ours["asd_mm"] == pytest.approx(summed / total, abs=1e-6)


def test_scores_equal_those_from_distance_maps_of_simpleitk():
    """200 random cases: its exact map (Maurer 2003) of the surface elements, read at the other surface."""
    import SimpleITK as sitk

    for seed in range(200):
        prediction, reference, spacing_mm = blobs(seed)
        ours = surface_scores(prediction, reference, spacing_mm)
        if not prediction.any():
            assert ours == MISSED
            continue
        found = []
        for mask, other in ((prediction, reference), (reference, prediction)):
            places_mm, areas = surface_elements(mask, spacing_mm)
            elements = np.zeros(tuple(n + 1 for n in mask.shape), np.uint8)
            elements[index_of(surface_elements(other, spacing_mm)[0], spacing_mm)] = 1
            image = sitk.GetImageFromArray(elements)
            image.SetSpacing(spacing_mm[::-1])
            far = sitk.SignedMaurerDistanceMap(image, squaredDistance=False, useImageSpacing=True)
            found.append((np.maximum(sitk.GetArrayFromImage(far), 0)[index_of(places_mm, spacing_mm)], areas))
        (there, one), (back, other) = found
        total = one.sum() + other.sum()
        assert ours["asd_mm"] == pytest.approx(((there * one).sum() + (back * other).sum()) / total, rel=1e-5, abs=1e-5)
        near = one[there <= 2.0].sum() + other[back <= 2.0].sum()
        assert ours["surface_dice_at_tolerance"] == pytest.approx(near / total, abs=1e-6)
        reached = []
        for far, areas in found:
            order = np.argsort(far)
            reached.append(far[order][np.searchsorted(np.cumsum(areas[order]) / areas.sum(), 0.95)])
        assert ours["hd95_mm"] == pytest.approx(max(reached), rel=1e-5, abs=1e-5)


def index_of(places_mm: np.ndarray, spacing_mm: tuple[float, float, float]) -> tuple[np.ndarray, ...]:
    """Indices of surface elements in the grid of cubes, which starts half a voxel before the mask."""
    return tuple(np.rint(places_mm / np.array(spacing_mm) + 0.5).astype(int).T)


def test_the_area_of_a_ball_is_that_of_a_sphere():
    """Up to the stairs of a binary mask, which are 8 % longer than what they stand for."""
    mask = ball((50, 50, 50), (25.0, 25.0, 25.0), spacing_mm=(1.0, 1.0, 1.0))
    _, areas = surface_elements(mask, (1.0, 1.0, 1.0))
    assert areas.sum() == pytest.approx(1.08 * 4 * np.pi * 18.0**2, rel=0.03)


def test_a_box_has_flat_faces_of_known_area():
    mask = np.zeros((9, 9, 9), bool)
    mask[2:7, 2:7, 2:7] = True
    places_mm, areas = surface_elements(mask, (2.0, 1.0, 1.0))
    on_top = (np.abs(places_mm[:, 0] - 6.5 * 2.0) < 1e-9) & (np.abs(places_mm[:, 1:] - 4.0) < 1.6).all(axis=1)
    assert on_top.sum() == 16
    assert np.allclose(areas[on_top], 1.0)


def test_a_surface_is_the_same_seen_from_both_sides():
    prediction, _, spacing_mm = blobs(3)
    inner = np.pad(prediction, 2)
    places, areas = surface_elements(inner, spacing_mm)
    outside = ~inner
    other_places, other_areas = surface_elements(outside, spacing_mm)
    rim = np.array([(n - 0.5) * s for n, s in zip(inner.shape, spacing_mm, strict=True)])
    within = ((other_places > 0) & (other_places < rim - 1e-9)).all(axis=1)
    assert np.allclose(np.sort(other_areas[within]), np.sort(areas))
    assert within.sum() == len(places)


def test_shifting_by_voxels_gives_the_shift_in_millimetres():
    mask = ball(radius_mm=9.0)
    for axis, voxels in ((0, 2), (1, 3), (2, 5)):
        between = distances(np.roll(mask, voxels, axis), mask, SPACING_MM)
        shift_mm = voxels * SPACING_MM[axis]
        assert hausdorff_mm(between, 1.0) == pytest.approx(shift_mm)
        assert 0 < average_mm(between) < hausdorff_mm(between, 0.95) <= shift_mm + 1e-9


def test_surface_dice_counts_what_lies_within_the_tolerance():
    mask = np.zeros((12, 12, 12), bool)
    mask[3:9, 3:9, 3:9] = True
    between = distances(np.roll(mask, 2, 2), mask, (1.0, 1.0, 1.0))
    assert surface_dice(between, 2.0) == 1.0
    assert 0.5 < surface_dice(between, 1.0) < 1.0
    assert surface_dice(between, 0.0) < surface_dice(between, 1.0)


@pytest.mark.parametrize("side_mm", [0.2, 0.7, 1 / 3, float(np.float32(0.2)), 0.8])
def test_what_is_as_far_away_as_the_tolerance_lies_within_it_wherever_it_is(side_mm: float) -> None:
    for start in range(1, 8):
        mask = np.zeros((1, 12, 24), bool)
        mask[:, 4:8, start : start + 6] = True
        between = distances(np.roll(mask, 5, 2), mask, (1.0, side_mm, side_mm), flat=True)
        assert surface_dice(between, round(5 * side_mm, 6)) == 1.0
        assert surface_dice(between, 4.999 * side_mm) < 1.0


def test_equal_masks_are_perfect_and_one_voxel_is_enough():
    one = np.zeros((3, 3, 3), bool)
    one[1, 1, 1] = True
    for mask in (one, np.ones((2, 3, 4), bool), ball()):
        perfect = {"hd95_mm": 0.0, "asd_mm": 0.0, "surface_dice": 1.0, "surface_dice_at_tolerance": 1.0}
        assert surface_scores(mask, mask, SPACING_MM) == perfect


def test_empty_masks_follow_the_policy():
    empty, full = np.zeros((3, 3, 3), bool), np.ones((3, 3, 3), bool)
    assert surface_scores(empty, empty, SPACING_MM)["surface_dice"] is None
    for one, other in ((empty, full), (full, empty)):
        assert surface_scores(one, other, SPACING_MM) == MISSED


def test_a_2d_outline_is_measured_in_its_plane():
    mask = np.zeros((1, 30, 30), bool)
    mask[0, 5:15, 5:15] = True
    _, lengths = surface_elements(mask, (1.0, 0.5, 2.0), flat=True)
    corner = np.hypot(0.25, 1.0)
    assert lengths.sum() == pytest.approx(2 * 9 * 0.5 + 2 * 9 * 2.0 + 4 * corner)
    scores = surface_scores(np.roll(mask, 3, 2), mask, (1.0, 0.5, 2.0), flat=True)
    assert scores["hd95_mm"] == pytest.approx(6.0)
    deep = surface_scores(np.roll(mask, 3, 2), mask, (1.0, 0.5, 2.0))
    assert deep["surface_dice"] > scores["surface_dice"]
