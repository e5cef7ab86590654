"""From a fingerprint and a budget of memory to a plan. Knows no disk and no device: `measure` comes from outside."""

from collections.abc import Sequence
from dataclasses import replace

from autoseg import __version__
from autoseg.events import Report, Said, Warned, silent
from autoseg.planning import awareness, lowres
from autoseg.planning.architecture import choose_base_features, most_operations, preset_named
from autoseg.planning.checks import check_fingerprint
from autoseg.planning.grid import Grid, Shared, Source, can_be_halved, chain_of, drafter, plan_grid, quick_enough
from autoseg.planning.normalization import choose_masks, choose_normalization, warnings_of
from autoseg.planning.search import CONTEXT_BYTES, SMALLEST_BATCH, Measure, Patch, Readings, once
from autoseg.planning.spacing import (
    asked_spacing,
    choose_axes,
    choose_spacing,
    describe_shape,
    median_shape,
    transposed,
    warn_of_spacings,
)
from autoseg.planning.train import choose_sampling, describe_train, orientations_of, sided_labels, warn_of_mixed
from autoseg.planning.wording import device, gigabytes, some, voxels
from autoseg.records import Budget, Choice, Configuration, Fingerprint, Millimetres3, Plan

PlannedOne = tuple[Configuration, tuple[Choice, ...]]
_NO_LOWRES = "no low-resolution configuration exists, so Dice is taken per sample, as nnU-Net does."
_LOWRES = "patches see at least a quarter of the image, so Dice is taken per sample, as nnU-Net does."


def make_plan(
    fingerprint: Fingerprint,
    budget: Budget,
    measure: Measure,
    *,
    source: Source = "simulated",
    preset: str = "standard",
    file_ending: str = ".nii.gz",
    spacing_mm: Sequence[float] | None = None,
    report: Report = silent,
) -> Plan:
    """Decide everything about a data set, with a reason for each decision.

    Args:
        fingerprint: what the cases look like; nothing else of the data is needed.
        budget: the memory a training step may use, `budget_bytes`.
        measure: bytes one training step of a configuration needs at its peak (any number above the budget if it fails).
        source: how `measure` knows, for the record.
        preset: one of architecture.PRESETS.
        file_ending: ending of the label files to write.
        spacing_mm: Z Y X of the files, or Y X for 2D images; None: what the fingerprint suggests.
        report: receives what is noticed and each reading.

    Raises:
        UserError: the fingerprint or the spacing cannot be planned for, or the budget is too small for the smallest
            patch.
    """
    check_fingerprint(fingerprint)
    asked = None if spacing_mm is None else asked_spacing(fingerprint, spacing_mm)
    spacing, spacing_choice = asked or choose_spacing(fingerprint)
    axes, axes_choice = choose_axes(spacing, fingerprint.dimension)
    shape = median_shape(fingerprint.cases, spacing, fingerprint.dimension)
    shared, shared_choices = _shared(fingerprint, budget, axes, preset, source)
    full = Grid("3d", 3, transposed(spacing, axes), transposed(shape, axes))
    measure = once(measure)
    slices, slices_choices = plan_slices(full, shared, budget, measure, report)
    volumes, lowres_choice = plan_volumes(full, fingerprint.dimension, shared, budget, measure, report)
    grid_choices = (spacing_choice, axes_choice, describe_shape(full.median_shape_voxels, shared.cases))
    noticed = _notice(fingerprint, spacing, [each for each, _ in (*slices, *volumes)], report)
    choices = (_budget_choice(budget, source), *shared_choices, *grid_choices, *noticed, *slices_choices, lowres_choice)
    return Plan(
        autoseg_version=__version__,
        dataset=fingerprint.dataset,
        dimension=fingerprint.dimension,
        channels=fingerprint.channels,
        labels=fingerprint.labels,
        regions=fingerprint.regions,
        ignore_value=fingerprint.ignore_value,
        file_ending=file_ending,
        intensities=fingerprint.intensities,
        preset=preset,
        budget=budget,
        configurations=tuple(configuration for configuration, _ in (*slices, *volumes)),
        choices=(*choices, *(choice for _, own in (*slices, *volumes) for choice in own)),
    )


def plan_slices(
    full: Grid, shared: Shared, budget: Budget, measure: Measure, report: Report
) -> tuple[list[PlannedOne], tuple[Choice, ...]]:
    """The 2d configuration: slices across the first (coarsest) axis; none where they are too small and volumes not."""
    grid = replace(full, name="2d", dimension=2, batch_dice=True)
    if full.median_shape_voxels[0] > 1 and can_be_halved(full) and not can_be_halved(grid):
        because = f"slices of {voxels(grid.patch_median_voxels)} voxels cannot be halved even once; volumes can."
        return [], (Choice(field="2d", value="none", because=because),)
    planned = plan_grid(grid, _patches(grid), shared, _readings("2d", measure, budget, report))
    return [_with_batch_dice(planned, True, "Dice is taken over the whole batch, as nnU-Net does in 2D.")], ()


def plan_volumes(
    full: Grid, dimension: int, shared: Shared, budget: Budget, measure: Measure, report: Report
) -> tuple[list[PlannedOne], Choice]:
    """3d, and where its patch sees too little also 3d_lowres and 3d_cascade; nothing for flat images."""
    if dimension == 2 or full.median_shape_voxels[0] == 1:
        why = "the images are 2D."
        if dimension == 3:
            why = "the median image is a single slice thick after cropping and resampling."
        return [], Choice(field="configurations", value="2d", because=why)
    if not can_be_halved(full):
        why = f"volumes of {voxels(full.median_shape_voxels)} voxels cannot be halved even once; slices can."
        return [], Choice(field="configurations", value="2d", because=why)
    readings = _readings("3d", measure, budget, report)
    volumes, choices = plan_grid(full, _patches(full), shared, readings)
    low = _plan_lowres(full, volumes.patch_voxels, shared, readings)
    choice = lowres.describe(full, volumes.patch_voxels, low if isinstance(low, str) else "")
    if isinstance(low, str):
        return [_with_batch_dice((volumes, choices), False, _NO_LOWRES)], choice
    cascade = _plan_cascade(full, volumes, shared, budget, measure, report)
    little = (
        "patches see less than a quarter of the image and often lack a class, so Dice is taken over the whole batch."
    )
    return [
        _with_batch_dice((volumes, choices), True, little),
        _with_batch_dice(low, False, _LOWRES),
        _with_batch_dice(cascade, True, little),
    ], choice


def _plan_lowres(
    full: Grid, patch: Patch, shared: Shared, readings_3d: Readings
) -> PlannedOne | str:
    """The low-resolution configuration; or why there is none, nothing where none is wanted.

    The grid is found with patches predicted from the 3d readings, quick ones on CPUs, and confirmed with its own.
    """
    if not lowres.is_wanted(full, patch):
        return ""
    readings = replace(readings_3d, name="3d_lowres", taken={})

    def predicted_patch(grid: Grid) -> Patch:
        draft, known = drafter(grid, shared), readings if readings.taken else readings_3d
        chain = quick_enough(_patches(grid), draft, shared.most_operations)
        fitting = (p for p in chain if known.predict(draft(p, SMALLEST_BATCH)) <= known.budget_bytes)
        return next(fitting, chain[-1])

    grid = lowres.lowres_grid(full, predicted_patch)
    while isinstance(grid, Grid):
        planned = plan_grid(grid, _patches(grid), shared, readings)
        if not lowres.is_wanted(grid, planned[0].patch_voxels):
            return planned
        grid = lowres.lowres_grid(full, predicted_patch, start=grid)
    return grid


def _plan_cascade(
    full: Grid, volumes: Configuration, shared: Shared, budget: Budget, measure: Measure, report: Report
) -> PlannedOne:
    """3d_cascade: the 3d grid, with the low-resolution classes as further input channels; at most the patch of 3d."""
    grid = replace(full, name="3d_cascade", previous="3d_lowres")
    chain = _patches(grid)
    chain = chain[chain.index(volumes.patch_voxels) :]
    readings = _readings(grid.name, measure, budget, report)
    configuration, choices = plan_grid(grid, chain, shared, readings)
    inputs = Choice(
        field="3d_cascade.network.in_channels",
        value=str(configuration.network.in_channels),
        because=f"{shared.channels} channels of the image and {shared.classes - 1} classes of 3d_lowres, one-hot.",
    )
    return configuration, (inputs, *choices)


def _shared(
    fingerprint: Fingerprint, budget: Budget, axes: tuple[int, int, int], preset: str, source: Source
) -> tuple[Shared, tuple[Choice, ...]]:
    chosen = preset_named(preset)
    normalization, normalization_choices = choose_normalization(fingerprint.channels)
    masks, masks_choice = choose_masks(fingerprint.cases, normalization)
    shared = Shared(
        channels=len(fingerprint.channels),
        classes=len(fingerprint.labels),
        cases=len(fingerprint.cases),
        axes=axes,
        normalization=normalization,
        masks=masks,
        sided=sided_labels([label.name for label in fingerprint.labels[1:]]),
        preset_name=preset,
        preset=chosen,
        source=source,
        device=budget.device,
        base_features=choose_base_features(budget.device),
        most_operations=most_operations(budget.device, budget.precision),
        sampling=choose_sampling(fingerprint),
        orientations=orientations_of(fingerprint.cases),
        outputs=len(fingerprint.regions),
    )
    return shared, (Choice(field="preset", value=preset, because=chosen.because), *normalization_choices, masks_choice)


def _notice(
    fingerprint: Fingerprint, spacing_mm: Millimetres3, planned: Sequence[Configuration], report: Report
) -> tuple[Choice, ...]:
    """What the data itself suggests, announced where it matters."""
    tiny, warnings = awareness.describe_tiny(fingerprint, spacing_mm)
    unfit = *warnings_of(fingerprint.channels), *warn_of_spacings(fingerprint, spacing_mm)
    for warning in (*unfit, *awareness.warn_of_rare(fingerprint), *warnings):
        report(Warned(warning))
    sided = sided_labels([label.name for label in fingerprint.labels[1:]])
    if sided:
        names = some(list(dict.fromkeys(name for _, name in sided)))
        report(Said(f"{names}: labels that tell one side from the other; no mirroring along that axis."))
    for warning in warn_of_mixed(sided, orientations_of(fingerprint.cases)):
        report(Warned(warning))
    train, batches = planned[0].train, {each.name: each.batch_size for each in planned}
    imbalance = awareness.describe_imbalance(fingerprint, train, batches)
    return awareness.describe_empty(fingerprint), imbalance, tiny, *describe_train(train)


def _readings(name: str, measure: Measure, budget: Budget, report: Report) -> Readings:
    context_bytes = CONTEXT_BYTES if budget.device.startswith("cuda") else 0
    return Readings(name, measure, budget.budget_bytes, report, context_bytes)


def _patches(grid: Grid) -> tuple[Patch, ...]:
    return tuple(topology.patch_voxels for topology in chain_of(grid))


def _budget_choice(budget: Budget, source: Source) -> Choice:
    total = f"{gigabytes(budget.total_bytes)} on {device(budget.device)}"
    because = f"what may be used of {total}; a step's memory is {source}."
    return Choice(field="budget.budget_bytes", value=gigabytes(budget.budget_bytes), because=because)


def _with_batch_dice(planned: PlannedOne, whole_batch: bool, because: str) -> PlannedOne:
    configuration, choices = planned
    choice = Choice(field=f"{configuration.name}.batch_dice", value="yes" if whole_batch else "no", because=because)
    return configuration.model_copy(update={"batch_dice": whole_batch}), (*choices, choice)
