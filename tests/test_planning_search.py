"""The memory search, with a measure that only counts."""

import random
from math import prod

import pytest

from autoseg.planning.architecture import PRESETS, network_spec
from autoseg.planning.cost import elements, parameters
from autoseg.planning.grid import Grid, Shared, chain_of, drafter
from autoseg.planning.search import SMALLEST_BATCH, Readings, fit, largest_batch, largest_patch
from autoseg.records import Configuration

GB = 2**30
SHARED = Shared(1, 3, 100, (0, 1, 2), ("zscore",), (False,), (), "standard", PRESETS["standard"], "simulated", "a card")


def like_a_real_step(configuration: Configuration, bytes_per_element: float = 5.3) -> int:
    spec = configuration.network
    return int(
        3e8
        + 16 * parameters(spec)
        + bytes_per_element * elements(spec, configuration.patch_voxels) * configuration.batch_size
    )


def search(grid: Grid, budget_bytes: int, cap: int, measure=like_a_real_step):
    readings = Readings(grid.name, measure, budget_bytes)
    chain = [t.patch_voxels for t in chain_of(grid)]
    return chain, fit(chain, lambda patch: cap, drafter(grid, SHARED), readings), readings


def random_grid(rng: random.Random) -> Grid:
    fine, thick = rng.choice([0.5, 0.8, 1.0]), rng.choice([1, 1, 2, 4])
    shape = (rng.randint(20, 300), rng.randint(60, 512), rng.randint(60, 512))
    return Grid("3d", 3, (fine * thick, fine, fine), shape)


def test_the_found_patch_fits_and_the_next_larger_does_not() -> None:
    rng = random.Random(1)
    for _ in range(25):
        grid, budget = random_grid(rng), rng.choice([6, 8, 11, 24]) * GB
        chain, found, readings = search(grid, budget, cap=2)
        assert found is not None
        draft, index = drafter(grid, SHARED), chain.index(found.patch_voxels)
        assert like_a_real_step(draft(found.patch_voxels, 2)) <= budget
        assert index == 0 or like_a_real_step(draft(chain[index - 1], 2)) > budget
        assert len(readings.attempts) <= 4
        assert (found.too_large is None) == (index == 0)


def test_the_found_batch_is_the_largest_within_cap_and_budget_or_five_percent_less() -> None:
    rng = random.Random(2)
    for _ in range(25):
        grid, budget, cap = random_grid(rng), rng.choice([6, 8, 11, 24]) * GB, rng.choice([2, 3, 7, 40, 400])
        _, found, readings = search(grid, budget, cap)
        assert found is not None
        draft = drafter(grid, SHARED)
        assert found.peak_bytes == like_a_real_step(draft(found.patch_voxels, found.batch_size)) <= budget
        more = like_a_real_step(draft(found.patch_voxels, found.batch_size + 1 + found.batch_size // 20))
        assert found.batch_size >= 0.95 * cap or more > budget
        assert len(readings.attempts) <= 6


def test_a_large_budget_needs_a_single_reading() -> None:
    _, found, readings = search(Grid("3d", 3, (1.0, 1.0, 1.0), (36, 50, 35)), 8 * GB, cap=7)
    assert found is not None
    assert (found.patch_voxels, found.batch_size, len(readings.attempts)) == ((40, 56, 40), 7, 1)


def test_no_step_is_measured_twice() -> None:
    seen: list[tuple] = []

    def measure(configuration: Configuration) -> int:
        seen.append((configuration.patch_voxels, configuration.batch_size, configuration.network))
        return like_a_real_step(configuration)

    search(Grid("3d", 3, (1.0, 1.0, 1.0), (300, 300, 300)), 11 * GB, 12, measure)
    assert len(seen) == len(set(seen)) > 1


@pytest.mark.parametrize("bytes_per_element", [0.5, 2.0, 12.0, 40.0])
def test_a_wrong_prior_costs_readings_but_not_the_answer(bytes_per_element: float) -> None:
    grid, budget = Grid("3d", 3, (1.0, 1.0, 1.0), (300, 280, 260)), 11 * GB

    def measure(configuration: Configuration) -> int:
        return like_a_real_step(configuration, bytes_per_element)

    chain, found, readings = search(grid, budget, 4, measure)
    assert found is not None
    assert measure(drafter(grid, SHARED)(found.patch_voxels, found.batch_size)) <= budget
    index = chain.index(found.patch_voxels)
    assert index == 0 or measure(drafter(grid, SHARED)(chain[index - 1], 2)) > budget
    assert len(readings.attempts) <= 9


def test_a_step_that_dies_on_the_card_only_counts_as_too_large() -> None:
    """Beyond the card's memory the measure cannot tell how far, and says a huge number."""
    budget = 8 * GB

    def measure(configuration: Configuration) -> int:
        peak = like_a_real_step(configuration, 11.0)
        return peak if peak <= budget else 2**62

    grid = Grid("3d", 3, (1.0, 1.0, 1.0), (300, 280, 260))
    chain, found, readings = search(grid, budget, 4, measure)
    assert found is not None
    assert measure(drafter(grid, SHARED)(chain[chain.index(found.patch_voxels) - 1], 2)) > budget
    assert found.peak_bytes <= budget
    assert len(readings.attempts) <= 9


def test_nothing_fits_a_tiny_budget() -> None:
    chain, found, readings = search(Grid("3d", 3, (1.0, 1.0, 1.0), (100, 100, 100)), GB // 100, cap=2)
    assert found is None
    assert chain[-1] in {attempt.patch_voxels for attempt in readings.attempts}


def test_batch_growth_survives_a_step_that_is_not_linear() -> None:
    grid = Grid("2d", 2, (1.0, 1.0, 1.0), (30, 64, 64))
    draft = drafter(grid, SHARED)
    patch = chain_of(grid)[0].patch_voxels

    def measure(configuration: Configuration) -> int:
        return int(like_a_real_step(configuration) * (1.5 if configuration.batch_size > 20 else 1.0))

    budget = like_a_real_step(draft(patch, 30))
    batch, attempt = largest_batch(patch, 200, draft, Readings("2d", measure, budget))
    assert batch == 20
    assert attempt.peak_bytes == measure(draft(patch, 20))


def test_patches_are_measured_at_batch_two() -> None:
    grid = Grid("3d", 3, (1.0, 1.0, 1.0), (300, 280, 260))
    readings = Readings("3d", like_a_real_step, 8 * GB)
    largest_patch([t.patch_voxels for t in chain_of(grid)], drafter(grid, SHARED), readings)
    assert {attempt.batch_size for attempt in readings.attempts} == {SMALLEST_BATCH}


def test_elements_are_those_of_a_network_counted_by_hand() -> None:
    grid = Grid("3d", 3, (1.0, 1.0, 1.0), (16, 16, 16))
    spec = network_spec("plain", 1, 3, chain_of(grid)[0], 2)
    assert spec.features == (32, 64, 128)
    full, half, quarter = 16**3, 8**3, 4**3
    by_hand = 32 * full * 2 + 64 * half * 2 + 128 * quarter * 2
    by_hand += 64 * half * 3 + 3 * half + 32 * full * 3 + 3 * full
    assert elements(spec, (16, 16, 16)) == by_hand


@pytest.mark.parametrize("preset", ["standard", "L"])
def test_parameters_are_those_of_the_real_network(preset: str) -> None:
    unet = pytest.importorskip("autoseg.network.unet")
    grid = Grid("3d", 3, (2.5, 1.0, 1.0), (20, 64, 48))
    topology = chain_of(grid)[0]
    spec = network_spec(PRESETS[preset].kind, 2, 4, topology, 2)
    real = sum(prod(p.shape) for p in unet.build(spec).parameters())
    assert parameters(spec) == real
