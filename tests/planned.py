"""A plan made by hand, for tests of what comes after planning."""

from pathlib import Path

from autoseg.cases.discover import discover
from autoseg.layout import Layout
from autoseg.records import (
    AugmentSpec,
    Budget,
    Configuration,
    Intensities,
    Label,
    Memory,
    NetworkSpec,
    Plan,
    TrainSpec,
)
from autoseg.store import save

INTENSITIES = Intensities(
    mean=10.0, std=2.0, median=10.0, minimum=0.0, maximum=20.0, percentile_00_5=2.0, percentile_99_5=18.0
)


def a_configuration(**changes: object) -> Configuration:
    """One channel, two foreground classes, 1 mm, no transposition; `changes` replace fields."""
    dimension = 2 if changes.get("dimension") == 2 else 3
    network = NetworkSpec(
        dimension=dimension,
        in_channels=1,
        classes=3,
        features=(4, 8),
        strides=((1,) * dimension, (2,) * dimension),
        kernels=((3,) * dimension,) * 2,
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )
    fields = {
        "name": "3d",
        "dimension": dimension,
        "spacing_mm": (1.0, 1.0, 1.0),
        "median_shape_voxels": (16, 16, 16),
        "patch_voxels": (8,) * dimension,
        "batch_size": 2,
        "normalization": ("zscore",),
        "mask_for_normalization": (False,),
        "network": network,
        "train": TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,) * dimension)),
        "memory": Memory(source="assumed", peak_bytes=1),
    }
    return Configuration.model_validate(fields | changes)


def a_plan(*configurations: Configuration, **changes: object) -> Plan:
    """A plan with these configurations for label values 0, 5 and 9."""
    fields = {
        "autoseg_version": "0",
        "dataset": "hand",
        "dimension": 3,
        "channels": ("MRI",),
        "labels": tuple(Label(name=f"label_{value}", value=value) for value in (0, 5, 9)),
        "file_ending": ".nii.gz",
        "intensities": (INTENSITIES,),
        "budget": Budget(device="cpu", total_bytes=1, budget_bytes=1),
        "configurations": configurations or (a_configuration(),),
        "choices": (),
    }
    return Plan.model_validate(fields | changes)


def a_network(in_channels: int = 1, dimension: int = 3) -> NetworkSpec:
    """Two stages with 4 and 8 features, for three classes."""
    return NetworkSpec(
        dimension=2 if dimension == 2 else 3,
        in_channels=in_channels,
        classes=3,
        features=(4, 8),
        strides=((1,) * dimension, (2,) * dimension),
        kernels=((3,) * dimension,) * 2,
        encoder_blocks=(1, 1),
        decoder_blocks=(1,),
    )


def a_planned_run(run: Path, data: Path, *configurations: Configuration) -> Path:
    """A run folder for the data set in `data` as `autoseg plan` would leave it, with these configurations."""
    dataset = discover(data, workers=1)
    plan = a_plan(
        *configurations,
        dimension=dataset.dimension,
        channels=dataset.channels,
        labels=dataset.labels,
        file_ending=dataset.file_ending,
    )
    save(Layout(run).dataset, dataset)
    save(Layout(run).plan, plan)
    return run
