"""Fingerprints, budgets and a measure for tests of the planner; no image and no network behind them."""

from collections.abc import Callable, Sequence
from math import prod

from autoseg.planning.cost import elements, parameters
from autoseg.records import Budget, CaseStats, Configuration, Fingerprint, Label

GB = 2**30


def case(
    name: str = "case",
    shape: tuple[int, int, int] = (36, 50, 35),
    spacing: tuple[float, float, float] = (1.0, 1.0, 1.0),
    class_voxels: Sequence[int] = (10_000, 500, 400),
    component_voxels: Sequence[float] | None = None,
    components: Sequence[int] | None = None,
    full_shape: tuple[int, int, int] | None = None,
) -> CaseStats:
    full = full_shape or shape
    return CaseStats(
        id=name,
        content="",
        shape_voxels=shape,
        full_shape_voxels=full,
        spacing_mm=spacing,
        crop_share=prod(shape) / prod(full),
        class_voxels=tuple(class_voxels),
        class_mm3=tuple(n * prod(spacing) for n in class_voxels),
        class_components=tuple(components or [1] * len(class_voxels)),
        class_median_component_voxels=tuple(component_voxels or class_voxels),
        intensities=(),
    )


def fingerprint(
    cases: Sequence[CaseStats],
    dimension: int = 3,
    channels: Sequence[str] = ("MRI",),
    classes: Sequence[str] = ("anterior", "posterior"),
) -> Fingerprint:
    names = ("background", *classes)
    return Fingerprint(
        dataset="made up",
        dimension=dimension,
        channels=tuple(channels),
        labels=tuple(Label(name=name, value=value) for value, name in enumerate(names)),
        cases=tuple(cases),
        intensities=(),
    )


def alike(count: int, **arguments) -> list[CaseStats]:
    """`count` equal cases."""
    return [case(f"case_{index:03d}", **arguments) for index in range(count)]


def budget(gigabytes: float) -> Budget:
    size = int(gigabytes * GB)
    return Budget(device="cuda", total_bytes=size, budget_bytes=size)


def counting(seen: list[Configuration] | None = None) -> Callable[[Configuration], int]:
    """A measure that is linear in the elements of the feature maps; `seen` collects what it was asked."""

    def measure(configuration: Configuration) -> int:
        if seen is not None:
            seen.append(configuration)
        spec = configuration.network
        activations = elements(spec, configuration.patch_voxels) * configuration.batch_size
        return int(0.6 * GB + 16 * parameters(spec) + 6.9 * activations)

    return measure
