"""One configuration: its grid, and the search for its patch and batch. What all configurations share is here, too."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, prod
from typing import Literal

from autoseg.errors import UserError
from autoseg.planning.architecture import BASE_FEATURES, Preset, describe_network, network_spec
from autoseg.planning.batch import batch_cap, describe_cap, describe_norm
from autoseg.planning.cost import training_operations
from autoseg.planning.patch import LEAST_STAGES, choose_first_patch, patch_chain
from autoseg.planning.search import CLOSE_ENOUGH, SMALLEST_BATCH, Draft, Fit, Patch, Readings, fit
from autoseg.planning.topology import SMALLEST_EDGE, Topology, choose_topology
from autoseg.planning.train import Orientation, Sampling, Sided, choose_augment, choose_train
from autoseg.planning.wording import device, gigabytes, millimetres, voxels
from autoseg.records import Choice, Configuration, Memory, Millimetres3, Resampling, Voxels3

Source = Literal["measured", "simulated", "assumed"]


@dataclass(frozen=True, slots=True)
class Shared:
    """What all configurations of a plan have in common. `cases` counts them; `sided` names labels with a side.

    `most_operations` is what a step at batch 2 may cost on the device, in FLOP. `orientations` are those of the files.
    """

    channels: int
    classes: int
    cases: int
    axes: Voxels3
    normalization: tuple[str, ...]
    masks: tuple[bool, ...]
    sided: tuple[Sided, ...]
    preset_name: str
    preset: Preset
    source: Source
    device: str
    base_features: int = BASE_FEATURES
    most_operations: float = inf
    sampling: Sampling = "foreground"
    orientations: tuple[Orientation, ...] = ((None, 1),)
    outputs: int = 0
    """Of the network where they are regions; 0 where they are the classes."""


@dataclass(frozen=True, slots=True)
class Grid:
    """A configuration's name and grid, after transposition; `previous` names the configuration it refines."""

    name: str
    dimension: Literal[2, 3]
    spacing_mm: Millimetres3
    median_shape_voxels: Voxels3
    batch_dice: bool = False
    previous: str | None = None

    @property
    def patch_spacing_mm(self) -> tuple[float, ...]:
        return self.spacing_mm[3 - self.dimension :]

    @property
    def patch_median_voxels(self) -> tuple[int, ...]:
        return self.median_shape_voxels[3 - self.dimension :]


def can_be_halved(grid: Grid) -> bool:
    """Whether the largest patch of a grid has room for a U-Net."""
    return choose_first_patch(grid.patch_spacing_mm, grid.patch_median_voxels).stages >= LEAST_STAGES


def chain_of(grid: Grid) -> tuple[Topology, ...]:
    """All candidate patches of a grid, largest first. Raises UserError when the images are too small for a U-Net."""
    chain = patch_chain(grid.patch_spacing_mm, grid.patch_median_voxels)
    if chain[0].stages < LEAST_STAGES:
        raise UserError(
            f"Configuration {grid.name}: the median image has only {voxels(grid.patch_median_voxels)} voxels at "
            f"{millimetres(grid.patch_spacing_mm)}, too few to be halved even once.",
            fix=f"Two axes of similar spacing need {2 * SMALLEST_EDGE} voxels each, or the finest one "
            f"{3 * SMALLEST_EDGE}: crop less, or resample the images.",
        )
    return chain


def drafter(grid: Grid, shared: Shared) -> Draft:
    """The function that turns a patch and a batch size into the grid's full configuration, not measured yet."""
    known: dict[tuple[Patch, int], Configuration] = {}

    def draft(patch: Patch, batch_size: int) -> Configuration:
        if (patch, batch_size) not in known:
            known[patch, batch_size] = _configuration(grid, shared, patch, batch_size)
        return known[patch, batch_size]

    return draft


def capper(grid: Grid, shared: Shared) -> Callable[[Patch], int]:
    """The function that gives the most samples per batch for a patch."""
    return lambda patch: batch_cap(shared.cases * prod(grid.median_shape_voxels), patch)


def plan_grid(
    grid: Grid, chain: tuple[Patch, ...], shared: Shared, readings: Readings
) -> tuple[Configuration, tuple[Choice, ...]]:
    """The configuration with the largest patch of `chain` and then the largest batch that fit, and its choices.

    Raises UserError when the smallest patch at batch 2 does not fit.
    """
    draft = drafter(grid, shared)
    quick = quick_enough(chain, draft, shared.most_operations)
    found = fit(quick, capper(grid, shared), draft, readings)
    if found is None:
        least = min(readings.attempts, key=lambda attempt: attempt.peak_bytes)
        raise UserError(
            f"A budget of {gigabytes(readings.budget_bytes)} is too small for configuration {grid.name}: its smallest "
            f"patch, {voxels(least.patch_voxels)} at batch {least.batch_size}, needs {gigabytes(least.peak_bytes)}.",
            fix="Give more with --memory.",
        )
    configuration = draft(found.patch_voxels, found.batch_size).model_copy(
        update={"memory": Memory(source=shared.source, peak_bytes=found.peak_bytes, attempts=readings.attempts)}
    )
    return configuration, _choices(configuration, grid, (chain[0], quick[0]), shared, found, readings.budget_bytes)


def quick_enough(chain: tuple[Patch, ...], draft: Draft, most_operations: float) -> tuple[Patch, ...]:
    """The patches whose training step at batch 2 costs at most so many FLOP; at least the smallest patch."""
    costs = (training_operations(draft(p, SMALLEST_BATCH).network, p, SMALLEST_BATCH) for p in chain)
    return tuple(p for p, cost in zip(chain, costs, strict=True) if cost <= most_operations) or chain[-1:]


def _configuration(grid: Grid, shared: Shared, patch: Patch, batch_size: int) -> Configuration:
    topology = choose_topology(grid.patch_spacing_mm, patch)
    augment, _ = choose_augment(patch, shared.axes, shared.sided, shared.orientations)
    spacing, outputs = grid.spacing_mm, shared.outputs or shared.classes
    inputs = shared.channels + (shared.classes - 1 if grid.previous else 0)
    return Configuration(
        name=grid.name,
        dimension=grid.dimension,
        axes=shared.axes,
        spacing_mm=spacing if grid.dimension == 3 else (None, spacing[1], spacing[2]),
        median_shape_voxels=grid.median_shape_voxels,
        patch_voxels=patch,
        batch_size=batch_size,
        normalization=shared.normalization,
        mask_for_normalization=shared.masks,
        resampling=Resampling(),
        batch_dice=grid.batch_dice,
        network=network_spec(shared.preset.kind, inputs, outputs, topology, batch_size, shared.base_features),
        train=choose_train(augment, shared.sampling, shared.device),
        memory=Memory(source=shared.source, peak_bytes=0),
        previous=grid.previous,
    )


def _choices(
    configuration: Configuration, grid: Grid, tops: tuple[Patch, Patch], shared: Shared, found: Fit, budget_bytes: int
) -> tuple[Choice, ...]:
    _, augment = choose_augment(found.patch_voxels, shared.axes, shared.sided, shared.orientations)
    own = (
        _patch_choice(grid, tops, shared, found, budget_bytes),
        _batch_choice(grid, shared, found, budget_bytes),
        *describe_network(configuration.network, found.patch_voxels),
        describe_norm(found.batch_size),
        *augment,
        Choice(
            field="memory",
            value=gigabytes(found.peak_bytes),
            because=f"{shared.source} on {device(shared.device)}, readings: {len(configuration.memory.attempts)}; "
            f"the budget is {gigabytes(budget_bytes)}.",
        ),
    )
    return tuple(choice.model_copy(update={"field": f"{grid.name}.{choice.field}"}) for choice in own)


def _patch_choice(
    grid: Grid, tops: tuple[Patch, Patch], shared: Shared, found: Fit, budget_bytes: int
) -> Choice:
    """`tops` are the largest patch that makes sense, and the largest that is quick enough on this device."""
    share = prod(found.patch_voxels) / prod(grid.patch_median_voxels)
    because = f"covers {100 * share:.0f} % of the median shape {voxels(grid.patch_median_voxels)}"
    if found.too_large is None and tops[0] != tops[1]:
        because += (
            f"; shrunk from {voxels(tops[0])} until a step at batch {SMALLEST_BATCH} cost at most "
            f"{shared.most_operations / 1e9:.0f} GFLOP, about a second on such a CPU: there many samples teach more "
            "than large ones."
        )
    elif found.too_large is None:
        largest = (
            "the patch of configuration 3d" if grid.previous else "the largest that spacing and median shape justify"
        )
        because += f"; it is {largest}, and it fits."
    else:
        larger, need, is_read = found.too_large
        because += (
            f"; shrunk from {voxels(tops[0])} until a step at batch {SMALLEST_BATCH} fit {gigabytes(budget_bytes)}: "
            f"the next larger, {voxels(larger)}, {'needs' if is_read else 'is expected to need'} {gigabytes(need)}."
        )
    return Choice(field="patch_voxels", value=voxels(found.patch_voxels), because=because)


def _batch_choice(grid: Grid, shared: Shared, found: Fit, budget_bytes: int) -> Choice:
    cap = describe_cap(shared.cases * prod(grid.median_shape_voxels), found.patch_voxels, shared.preset_name)
    if found.batch_size < found.batch_cap:
        most = "as many as fit, to 5 %" if found.batch_size * CLOSE_ENOUGH > 1 else "the most that fits"
        because = f"{most}: {gigabytes(found.peak_bytes)} of {gigabytes(budget_bytes)}; {cap}."
    elif found.batch_size > SMALLEST_BATCH:
        because = f"{cap}; it needs {gigabytes(found.peak_bytes)} of {gigabytes(budget_bytes)}."
    else:
        because = f"{cap}."
    return Choice(field="batch_size", value=str(found.batch_size), because=because)
