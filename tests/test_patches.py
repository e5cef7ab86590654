"""network/patches.py: which places are drawn, and that what is cut there is what the image holds there."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest
import torch

from autoseg.network.patches import (
    InMemory,
    Place,
    Sampling,
    WithPrevious,
    draw_places,
    gather,
    generator_of,
)
from autoseg.network.patches_on_device import OnDevice, gather_on_device

Shape = tuple[int, int, int]


def a_case(shape: Shape, locations: Mapping[int, np.ndarray] | None = None, first: int = 1) -> InMemory:
    """Two channels; every voxel has a value of its own, counted from `first`, so that none can be taken for another."""
    numbers = np.arange(first, first + int(np.prod(shape))).reshape(shape)
    image_CZYX = np.stack((numbers, -numbers)).astype(np.float32)
    return InMemory(image_CZYX, (numbers % 30000).astype(np.int16), locations or {})


def at(*places: Shape) -> np.ndarray:
    return np.array(places, np.int32)


def drawn(
    sources: list[InMemory], patch: tuple[int, ...], steps: int = 50, batch: int = 4, share: float = 0.33, seed: int = 0
) -> list[Place]:
    sampling = Sampling(patch, batch, share, seed)
    return [place for step in range(steps) for place in draw_places(sources, sampling, step)]


def padded(array: np.ndarray, margin: int = 50) -> np.ndarray:
    """The last three axes with zeros around."""
    return np.pad(array, [(0, 0)] * (array.ndim - 3) + [(margin, margin)] * 3)


def cut(array: np.ndarray, corner: Shape, size: tuple[int, ...], margin: int = 50) -> np.ndarray:
    """What plain slicing finds in the image with zeros around."""
    slices = tuple(slice(c + margin, c + margin + s) for c, s in zip(corner, size, strict=True))
    return padded(array, margin)[(..., *slices)]


# ------------------------------------------------------------------------------------------------ places


def test_the_places_of_a_step_depend_on_seed_and_step_alone() -> None:
    sources = [a_case((20, 30, 40)), a_case((40, 30, 20))]

    def places(seed: int, step: int, purpose: int = 0) -> tuple[Place, ...]:
        return draw_places(sources, Sampling((8, 8, 8), 4, 0.33, seed), step, purpose)

    assert places(3, 7) == places(3, 7)
    assert len({places(3, 7), places(3, 8), places(4, 7), places(7, 3), places(3, 7, purpose=1)}) == 5


def test_the_random_numbers_of_purposes_are_kept_apart() -> None:
    assert len({float(generator_of(1, 2, purpose).random()) for purpose in range(3)}) == 3
    assert generator_of(1, 2, 0).random() == generator_of(1, 2, 0).random()


@pytest.mark.parametrize(
    ("batch", "share", "forced"),
    [(2, 0.33, 1), (5, 0.33, 2), (4, 0.5, 2), (2, 0.01, 1), (1, 0.33, 1), (3, 1.0, 3), (3, 0.0, 0)],
)  # fmt: skip
def test_the_last_samples_of_a_batch_are_forced_to_the_foreground(batch: int, share: float, forced: int) -> None:
    sources = [a_case((20, 20, 20), {1: at((5, 5, 5))})]
    places = draw_places(sources, Sampling((8, 8, 8), batch, share, 0), 0)
    assert [place.forced_class is not None for place in places] == [False] * (batch - forced) + [True] * forced


@pytest.mark.parametrize("corner", [(0, 0, 0), (19, 29, 39), (0, 15, 39), (10, 15, 20)])
@pytest.mark.parametrize("patch", [(8, 8, 8), (7, 9, 8), (32, 8, 8), (8, 16)])
def test_a_forced_patch_contains_its_class_and_stays_inside(corner: Shape, patch: tuple[int, ...]) -> None:
    size = (1,) * (3 - len(patch)) + patch
    for place in drawn([a_case((20, 30, 40), {2: at(corner)})], patch, steps=5, share=1.0):
        assert place.forced_class == 2
        for where, first, p, full in zip(corner, place.corner_ZYX, size, (20, 30, 40), strict=True):
            assert first <= where < first + p
            assert first >= 0 or p > full
            assert first + p <= full or p > full


def test_a_forced_patch_is_centred_on_its_voxel_where_there_is_room() -> None:
    places = drawn([a_case((40, 40, 40), {1: at((20, 18, 16))})], (8, 8, 8), steps=2, share=1.0)
    assert {place.corner_ZYX for place in places} == {(16, 14, 12)}


def test_a_free_patch_reaches_every_place_inside_the_image_and_none_beyond() -> None:
    places = drawn([a_case((10, 9, 8))], (8, 8, 8), steps=100, share=0.0)
    assert {place.corner_ZYX for place in places} == {(z, y, 0) for z in range(3) for y in range(2)}


def test_a_free_patch_of_slices_reaches_every_slice() -> None:
    places = drawn([a_case((5, 16, 16))], (16, 16), steps=50, share=0.0)
    assert {place.corner_ZYX for place in places} == {(z, 0, 0) for z in range(5)}


def test_an_image_smaller_than_the_patch_lies_in_its_middle() -> None:
    places = drawn([a_case((4, 5, 30), {1: at((1, 1, 1))})], (8, 8, 8), share=0.5)
    assert {place.corner_ZYX[:2] for place in places} == {(-2, -1)}


def test_rare_and_frequent_classes_are_drawn_alike() -> None:
    many = np.argwhere(np.ones((10, 10, 10)))
    source = a_case((20, 20, 20), {1: many, 2: at((15, 15, 15))})
    counts = Counter(place.forced_class for place in drawn([source], (8, 8, 8), steps=100, share=1.0))
    assert sum(counts.values()) == 400
    assert 150 < counts[2] < 250


def test_all_cases_are_drawn_alike() -> None:
    counts = Counter(place.case for place in drawn([a_case((8, 8, 8))] * 4, (8, 8, 8), steps=100))
    assert sorted(counts) == [0, 1, 2, 3]
    assert min(counts.values()) > 60


def test_annotated_voxels_of_the_key_minus_one_are_a_place_for_free_patches_and_no_class() -> None:
    source = a_case((20, 20, 20), {-1: at((3, 3, 3)), 1: at((16, 16, 16))})
    places = drawn([source], (4, 4, 4), share=0.5)
    assert {(place.forced_class, place.corner_ZYX) for place in places} == {(None, (1, 1, 1)), (1, (14, 14, 14))}


def test_a_case_without_foreground_gives_free_patches_instead_of_forced_ones() -> None:
    assert {place.forced_class for place in drawn([a_case((20, 20, 20), {0: at((1, 1, 1))})], (8, 8, 8))} == {None}
    annotated = drawn([a_case((20, 20, 20), {-1: at((10, 10, 10))})], (8, 8, 8))
    assert {(place.forced_class, place.corner_ZYX) for place in annotated} == {(None, (6, 6, 6))}


# ------------------------------------------------------------------------------------------------ cutting


CORNERS: tuple[Shape, ...] = ((0, 0, 0), (2, 5, 9), (-2, 3, -1), (6, 14, 22))


def places_at(corners: tuple[Shape, ...]) -> list[Place]:
    return [Place(number % 2, corner, None) for number, corner in enumerate(corners)]


def test_unmoved_patches_are_slices_of_the_image_with_zeros_around() -> None:
    sources = [a_case((10, 20, 30)), a_case((9, 19, 28), first=7001)]
    image, labels = gather(sources, places_at(CORNERS), (8, 10, 12), (14, 16, 18), [False] * 4)
    assert (image.shape, image.dtype) == ((4, 2, 8, 10, 12), np.float32)
    assert (labels.shape, labels.dtype) == ((4, 8, 10, 12), np.int16)
    for sample, corner in enumerate(CORNERS):
        source = sources[sample % 2]
        np.testing.assert_array_equal(image[sample], cut(source.image_CZYX, corner, (8, 10, 12)))
        np.testing.assert_array_equal(labels[sample], cut(source.labels_ZYX, corner, (8, 10, 12)))


@pytest.mark.parametrize("enlarged", [(14, 16, 18), (13, 15, 17), (8, 16, 18)])
def test_moved_samples_are_filled_beyond_the_patch_and_the_others_only_inside_it(enlarged: Shape) -> None:
    sources = [a_case((10, 20, 30)), a_case((9, 19, 28), first=7001)]
    moved = [True, False, True, False]
    image, labels = gather(sources, places_at(CORNERS), (8, 10, 12), enlarged, moved)
    margins = tuple((e - p) // 2 for e, p in zip(enlarged, (8, 10, 12), strict=True))
    inside = tuple(slice(m, m + p) for m, p in zip(margins, (8, 10, 12), strict=True))
    assert image.shape == (4, 2, *enlarged)
    for sample, corner in enumerate(CORNERS):
        z, y, x = (c - m for c, m in zip(corner, margins, strict=True))
        expected_image = cut(sources[sample % 2].image_CZYX, (z, y, x), enlarged)
        expected_labels = cut(sources[sample % 2].labels_ZYX, (z, y, x), enlarged)
        if not moved[sample]:
            kept = np.zeros(enlarged, bool)
            kept[inside] = True
            expected_image, expected_labels = expected_image * kept, expected_labels * kept
        np.testing.assert_array_equal(image[sample], expected_image)
        np.testing.assert_array_equal(labels[sample], expected_labels)


@pytest.mark.parametrize("moved", [False, True])
def test_a_slice_has_two_axes_and_no_neighbours(moved: bool) -> None:
    source = a_case((5, 12, 14))
    places = [Place(0, (0, 1, 2), None), Place(0, (4, -1, 3), None)]
    image, labels = gather([source], places, (8, 10), (12, 14), [moved, moved])
    size, margin = ((12, 14), 2) if moved else ((8, 10), 0)
    assert (image.shape, labels.shape) == ((2, 2, *size), (2, *size))
    for sample, place in enumerate(places):
        z, y, x = place.corner_ZYX
        expected = cut(source.image_CZYX, (z, y - margin, x - margin), (1, *size))[:, 0]
        np.testing.assert_array_equal(image[sample], expected)


def test_a_batch_without_places_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one place"):
        gather([a_case((8, 8, 8))], [], (8, 8, 8), (8, 8, 8), [])


def test_what_the_previous_stage_found_is_the_last_channel() -> None:
    source = a_case((10, 12, 14), {1: at((2, 2, 2))})
    previous = np.random.default_rng(0).integers(0, 3, (10, 12, 14)).astype(np.int16)
    case = WithPrevious(source, previous)
    assert case.shape == (10, 12, 14)
    assert case.locations is source.locations
    image, labels = gather([case], [Place(0, (-1, 4, 8), None)], (8, 8, 8), (8, 8, 8), [False])
    assert (image.shape, image.dtype) == ((1, 3, 8, 8, 8), np.float32)
    np.testing.assert_array_equal(image[0, :2], cut(source.image_CZYX, (-1, 4, 8), (8, 8, 8)))
    np.testing.assert_array_equal(image[0, 2], cut(previous, (-1, 4, 8), (8, 8, 8)))
    np.testing.assert_array_equal(labels[0], cut(source.labels_ZYX, (-1, 4, 8), (8, 8, 8)))


@pytest.mark.parametrize("moved", [(False, False, False), (True, False, True)])
@pytest.mark.parametrize("patch", [(4, 6, 8), (6, 8)])
def test_cases_on_the_device_give_the_same_patches(patch: tuple[int, ...], moved: tuple[bool, ...]) -> None:
    cases = [a_case((9, 10, 11)), a_case((3, 5, 30), first=5000)]
    places = [Place(0, (-2, 3, 1), None), Place(1, (0, -1, 20), 1), Place(0, (5, 4, 3), None)]
    enlarged = tuple(size + 6 for size in patch)
    held = [OnDevice(torch.from_numpy(c.image_CZYX), torch.from_numpy(c.labels_ZYX), c.locations) for c in cases]
    for outside in (-1, 0):
        image, labels = gather(cases, places, patch, enlarged, moved, outside)
        device_image, device_labels = gather_on_device(held, places, patch, enlarged, moved, outside)
        np.testing.assert_array_equal(device_image.numpy(), image)
        np.testing.assert_array_equal(device_labels.numpy(), labels)
        assert set(labels[image[:, 0] == 0].tolist()) == {outside}
    assert (device_image.dtype, device_labels.dtype) == (torch.float32, torch.int16)
    for one, other in zip(cases[0].read(((1, 3), (2, 9), (0, 4))), held[0].read(((1, 3), (2, 9), (0, 4))), strict=True):
        np.testing.assert_array_equal(one, other)
