"""A plan in tables and drawings, for screens and reports.

These are its choices, readings, costs, and a drawing of each network. Nothing here prints. Costs are counted on paper
(cost.py), times are a rough guess from such counts.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import degrees
from typing import Any

from autoseg.planning.architecture import describe_network
from autoseg.planning.cost import parameters, receptive_fields, sizes_per_stage, training_operations
from autoseg.planning.edit import value_of
from autoseg.planning.train import describe_train
from autoseg.planning.wording import device, gigabytes, millimetres, voxels
from autoseg.records import Budget, Choice, Configuration, Plan
from autoseg.specs import forced_of

OPERATIONS_PER_SECOND = {"cuda": 30e12, "cpu": 0.5e12, "cpu in fp32": 0.12e12}
"""What training has reached: nnU-Net on an A100 (Liver, 44.5 s per epoch); two CPU cores in bf16
(804 GFLOP in 1.1 to 1.8 s) and in fp32 (in 2.1 to 8.0 s, docs/benchmarks.md). Kept low: few machines are idle."""
LONGEST_BAR = 24
LONG_SECONDS = 2 * 86_400
"""A training that takes longer is worth a word before it begins."""


@dataclass(frozen=True, slots=True)
class Table:
    """A title, the headings of the columns, and rows of text."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


def tables(plan: Plan) -> tuple[Table, ...]:
    """Everything about a plan that fits into tables: choices, costs, readings."""
    return choice_table(plan), cost_table(plan), attempt_table(plan)


def choice_table(plan: Plan) -> Table:
    """One row per decision: what, value, why; and where the plan was edited since, what it holds now."""
    rows = tuple((choice.field, choice.value + _edited(choice, plan), choice.because) for choice in plan.choices)
    return Table(f"Choices for {plan.dataset}", ("field", "value", "because"), rows)


def grid_table(plan: Plan) -> Table:
    """One row per configuration: the grid that cases are brought to, how they are normalized, how it is trained."""
    rows = []
    for configuration in plan.configurations:
        train = configuration.train
        row = (
            configuration.name,
            millimetres(configuration.spacing_mm),
            voxels(configuration.median_shape_voxels),
            ", ".join(configuration.normalization),
            f"{configuration.network.kind}, {configuration.network.norm} norm",
            f"{train.epochs} x {train.steps_per_epoch} steps, {train.loss}, {train.optimizer}",
            configuration.previous or "-",
        )
        rows.append(row)
    headings = ("configuration", "spacing", "median shape", "normalization", "network", "training", "refines")
    return Table("Configurations", headings, tuple(rows))


def attempt_table(plan: Plan) -> Table:
    """One row per reading, in the order they were taken."""
    rows = []
    for configuration in plan.configurations:
        for attempt in configuration.memory.attempts:
            row = (configuration.name, voxels(attempt.patch_voxels), str(attempt.batch_size))
            rows.append((*row, gigabytes(attempt.peak_bytes), "yes" if attempt.fits else "no"))
    sources = ", ".join(sorted({configuration.memory.source for configuration in plan.configurations}))
    title = f"Training steps, {sources} on {device(plan.budget.device)} with {gigabytes(plan.budget.budget_bytes)}"
    return Table(title, ("configuration", "patch", "batch", "peak", "fits"), tuple(rows))


def cost_table(plan: Plan) -> Table:
    """One row per configuration: size of the network, work per step, memory, and a rough time per epoch."""
    rows = []
    for configuration in plan.configurations:
        spec = configuration.network
        operations = training_operations(spec, configuration.patch_voxels, configuration.batch_size)
        row = (
            configuration.name,
            voxels(configuration.patch_voxels),
            str(configuration.batch_size),
            f"{parameters(spec) / 1e6:.1f} M",
            f"{operations / 1e12:.3g} TFLOP",
            voxels(receptive_fields(spec)[-1]),
            gigabytes(configuration.memory.peak_bytes),
            duration(seconds_per_epoch(configuration, plan.budget)),
        )
        rows.append(row)
    headings = ("configuration", "patch", "batch", "parameters", "step", "receptive field", "memory", "epoch, roughly")
    return Table("Networks", headings, tuple(rows))


def seconds_per_epoch(configuration: Configuration, budget: Budget) -> float:
    """A guess within a factor of a few: operations of an epoch at a rate that such training has reached."""
    cpu = "cpu in fp32" if budget.precision == "fp32" else "cpu"
    rate = OPERATIONS_PER_SECOND["cuda" if budget.device.startswith("cuda") else cpu]
    operations = training_operations(configuration.network, configuration.patch_voxels, configuration.batch_size)
    return configuration.train.steps_per_epoch * operations / rate


def long_trainings(plan: Plan) -> tuple[str, ...]:
    """A sentence for every configuration whose planned epochs take days on the device that was planned for."""
    found = []
    for configuration in plan.configurations:
        seconds = configuration.train.epochs * seconds_per_epoch(configuration, plan.budget)
        if seconds > LONG_SECONDS:
            smaller = " or plan for less --memory, which makes patches smaller and steps shorter"
            found.append(
                f"{configuration.name}: the planned {configuration.train.epochs} epochs take about "
                f"{duration(seconds)}. Train with --max-time{smaller if plan.budget.device.startswith('cuda') else ''}."
            )
    return tuple(found)


def duration(seconds: float) -> str:
    """E.g. "45 s", "12 min", "3.4 h", "7 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds > LONG_SECONDS:
        return f"{seconds / 86_400:.0f} days"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def drawing(configuration: Configuration) -> tuple[str, ...]:
    """The U of one configuration, a line per stage from the finest to the bottom; bars show the number of channels."""
    spec = configuration.network
    head = (
        f"{configuration.name}: {spec.kind} U-Net, {spec.in_channels} channels in, {spec.classes} classes out, "
        f"{spec.norm} norm, {parameters(spec) / 1e6:.1f} M parameters"
    )
    return head, *_aligned(tuple(_stage_rows(configuration)))


def _edited(choice: Choice, plan: Plan) -> str:
    """E.g. " (edited: now 7 of 250 steps in 3d)" where the plan does not hold any more what a choice says, else ""."""
    name, _, field = choice.field.partition(".")
    own = [each for each in plan.configurations if each.name == name]
    if not own and choice.field == "median_shape_voxels":
        return ""
    now: dict[str, list[str]] = {}
    for each in own or plan.configurations:
        if own or choice.field != "spacing_mm" or each.name == "3d":
            held = _held_instead(field if own else choice.field, choice.value, each)
            now.setdefault(held, []).append(each.name)
    said = ", ".join(held if own else f"{held} in {' and '.join(names)}" for held, names in now.items() if held)
    return f" (edited: now {said})" if said else ""


def _held_instead(field: str, value: str, one: Configuration) -> str:
    """What a field of the configuration holds, where that is not the value of its choice; else ""."""
    if field == "data.imbalance":
        forced = f"{forced_of(one.batch_size, one.train.foreground_share)} of {one.batch_size}"
        held = f"{one.train.loss}, {forced}"
        return "" if value.startswith(f"{one.train.loss},") and f" {forced} (" in value else held
    worded, typed = _worded(one).get(field), _at(one, field)
    by_hand = value_of(value)
    if value == worded or typed in (by_hand, [by_hand]) or (worded is typed is None):
        return ""
    return worded or json.dumps(typed)


def _worded(one: Configuration) -> dict[str, str]:
    """What a configuration holds now, as its choices would word it; by field."""
    of_file, augment = one.axes[3 - one.dimension :], one.train.augment
    letters = ["ZYX"[axis : axis + 1] for a, axis in enumerate(of_file) if a in augment.mirror_axes]  # any axes
    turns = " ".join(f"{degrees(turn):.0f}" for turn in augment.rotation_rad)
    spacing_mm = [each for _, each in sorted(zip(one.axes, one.spacing_mm, strict=True), key=lambda pair: pair[0])]
    described = (*describe_network(one.network, one.patch_voxels), *describe_train(one.train))
    return {choice.field: choice.value for choice in described} | {
        "patch_voxels": voxels(one.patch_voxels),
        "median_shape_voxels": voxels(one.median_shape_voxels),
        "axes": " ".join(map(str, one.axes)),
        "mask_for_normalization": " ".join("yes" if each else "no" for each in one.mask_for_normalization),
        "batch_dice": "yes" if one.batch_dice else "no",
        "memory": gigabytes(one.memory.peak_bytes),
        "spacing_mm": millimetres(spacing_mm),
        "train.augment.rotation_rad": f"{turns} degrees at most",
        "train.augment.mirror_axes": f"{' '.join(letters) or 'none'} of the files",
    }


def _at(one: Configuration, field: str) -> object:
    """The value at a path such as "train.loss", as in JSON; None where there is none, or a record."""
    held: Any = one.model_dump(mode="json")
    for part in field.split("."):
        held = held.get(part) if isinstance(held, dict) else held[int(part)] if part.isdigit() else None
    return None if isinstance(held, dict) else held


def _stage_rows(configuration: Configuration) -> Iterator[tuple[str, ...]]:
    spec = configuration.network
    sizes, fields = sizes_per_stage(spec, configuration.patch_voxels), receptive_fields(spec)
    yield ("stage", "stride", "kernel", "channels", "size", "encoder", "decoder", "sees", "")
    for stage in range(len(spec.features)):
        has_decoder = stage < len(spec.decoder_blocks)
        bar = "#" * max(1, round(LONGEST_BAR * spec.features[stage] / max(spec.features)))
        yield (
            str(stage),
            "x".join(map(str, spec.strides[stage])),
            "x".join(map(str, spec.kernels[stage])),
            str(spec.features[stage]),
            voxels(sizes[stage]),
            f"{spec.encoder_blocks[stage]} {'blocks' if spec.kind == 'residual' else 'conv'}",
            f"{spec.decoder_blocks[stage]} conv" if has_decoder else "bottom",
            voxels(fields[stage]),
            f"{'  ' * stage}{bar}",
        )


def _aligned(rows: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    padded = ([cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows)
    return tuple("  ".join(cells).rstrip() for cells in padded)
