"""Normalization: five schemes, their formulas, and no NaN."""

import numpy as np
import pytest

from autoseg.errors import UserError
from autoseg.image.normalize import NORMALIZATIONS, normalize
from autoseg.records import Intensities

STATS = Intensities(
    mean=50.0, std=20.0, median=50.0, minimum=-100.0, maximum=200.0, percentile_00_5=0.0, percentile_99_5=100.0
)


def one(image: np.ndarray, scheme: str, mask: np.ndarray | None = None) -> np.ndarray:
    return normalize(image[None].astype(np.float32), mask, [scheme], [mask is not None], [STATS])[0]


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).normal(1000, 250, (6, 7, 8)).astype(np.float32)


def test_zscore_gives_mean_0_and_deviation_1(image: np.ndarray) -> None:
    assert np.allclose(one(image, "zscore"), (image - image.mean()) / image.std(), atol=1e-4)


def test_zscore_within_a_mask_counts_only_the_mask_and_puts_0_outside(image: np.ndarray) -> None:
    mask = np.random.default_rng(1).random(image.shape) > 0.4
    inside = image[mask].astype(np.float64)
    normalized = one(image, "zscore", mask)
    assert np.allclose(normalized[mask], (inside - inside.mean()) / inside.std(), atol=1e-4)
    assert (normalized[~mask] == 0).all()


def test_a_mask_is_only_used_for_the_channels_that_ask_for_it(image: np.ndarray) -> None:
    mask = np.zeros(image.shape, bool)
    mask[:3] = True
    both = normalize(np.stack([image, image]), mask, ["zscore"] * 2, [True, False], [STATS] * 2)
    assert (both[0, 3:] == 0).all()
    assert np.array_equal(both[1], one(image, "zscore"))


def test_ct_clips_to_the_percentiles_of_the_data_set() -> None:
    image = np.array([-500.0, 0.0, 50.0, 100.0, 900.0]).reshape(1, 1, 5)
    assert one(image, "ct").ravel().tolist() == [-2.5, -2.5, 0.0, 2.5, 2.5]


def test_none_changes_nothing_and_gives_a_copy(image: np.ndarray) -> None:
    normalized = one(image, "none")
    assert np.array_equal(normalized, image)
    assert not np.shares_memory(normalized, image)


def test_rescale_maps_the_range_to_0_and_1(image: np.ndarray) -> None:
    normalized = one(image, "rescale_0_1")
    assert normalized.min() == 0
    assert normalized.max() == pytest.approx(1)
    assert np.allclose(normalized, (image - image.min()) / np.ptp(image), atol=1e-6)


def test_rgb_divides_by_255_and_refuses_other_ranges() -> None:
    assert one(np.array([0.0, 51.0, 255.0]).reshape(1, 1, 3), "rgb_0_1").ravel() == pytest.approx([0, 0.2, 1])
    with pytest.raises(UserError, match=r"0 to 300"):
        one(np.array([0.0, 300.0]).reshape(1, 1, 2), "rgb_0_1")


@pytest.mark.parametrize("scheme", NORMALIZATIONS)
@pytest.mark.parametrize("value", [0.0, 0.1, 211.3])
def test_a_constant_image_gives_finite_values(scheme: str, value: float) -> None:
    constant = np.full((5, 6, 7), value, np.float32)
    for mask in (None, np.ones(constant.shape, bool), np.zeros(constant.shape, bool)):
        assert np.isfinite(one(constant, scheme, mask)).all()
    if scheme in ("zscore", "rescale_0_1"):
        assert (one(constant, scheme) == 0).all()


def test_large_offsets_do_not_spoil_the_deviation() -> None:
    image = (np.random.default_rng(0).normal(0, 1, (40, 50, 60)) + 10_000).astype(np.float32)
    assert one(image, "zscore").std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("unit", [1e-36, 1e-22, 7e-13, 1e15, 1e30])
def test_the_unit_of_the_intensities_does_not_matter(image: np.ndarray, unit: float) -> None:
    """Diffusion in m^2/s has a deviation below 1e-9; squares of single precision end at 1e-38 and 1e38."""
    scaled = (image * unit).astype(np.float32)
    for scheme in ("zscore", "rescale_0_1"):
        np.testing.assert_allclose(one(scaled, scheme), one(image, scheme), atol=1e-4)
    foreground = Intensities(
        mean=1000 * unit, std=250 * unit, median=1000 * unit, minimum=0.0, maximum=2000 * unit,
        percentile_00_5=500 * unit, percentile_99_5=1500 * unit,
    )  # fmt: skip
    found = normalize(scaled[None], None, ["ct"], [False], [foreground])[0]
    np.testing.assert_allclose(found, (image.clip(500, 1500) - 1000) / 250, atol=1e-4)


@pytest.mark.parametrize("scheme", NORMALIZATIONS)
def test_the_input_is_not_changed(scheme: str) -> None:
    image = np.random.default_rng(0).uniform(0, 255, (1, 4, 5, 6)).astype(np.float32)
    before = image.copy()
    normalize(image, np.ones((4, 5, 6), bool), [scheme], [True], [STATS])
    assert np.array_equal(image, before)


def test_an_unknown_scheme_lists_the_valid_ones(image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"'zcore'.*zscore, ct, none, rescale_0_1, rgb_0_1"):
        one(image, "zcore")


def test_one_scheme_per_channel_is_needed(image: np.ndarray) -> None:
    with pytest.raises(UserError, match=r"1 channel.*2 schemes"):
        normalize(image[None], None, ["ct", "ct"], [False], [STATS])
