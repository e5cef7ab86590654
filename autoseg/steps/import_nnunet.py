"""`autoseg import-nnunet`: a model that nnU-Net v2 trained becomes a run. `predict` understands it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from autoseg import __version__, store
from autoseg.cases.description import channel_names, read_label_names, read_regions
from autoseg.errors import UserError
from autoseg.events import Report, Said, silent
from autoseg.layout import Layout
from autoseg.network import checkpoint, nnunet
from autoseg.network.unet import UNet
from autoseg.records import (
    AugmentSpec,
    Budget,
    Choice,
    Configuration,
    Intensities,
    Label,
    Memory,
    Plan,
    Resampling,
    Run,
    TrainSpec,
)

NAMES = {"2d": "2d", "3d_fullres": "3d", "3d_lowres": "3d_lowres"}
"""Their name of a configuration and ours; others keep their name."""
THEIRS = {"minimum": "min", "maximum": "max"}
"""Our name of a statistic and theirs, where they differ."""
USUAL_RESAMPLING, LINEAR_RESAMPLING = "resample_data_or_seg_to_shape", "resample_torch_fornnunet"
NEVER = 1e9
"""Anisotropy that no image has: its thick axis is resampled like the others."""
READERS = ("SimpleITKIO", "NibabelIO", "NaturalImage2DIO")
"""Their readers that give the array and the spacing that autoseg reads; others turn images or take sizes elsewhere."""
NORMALIZATIONS = {
    "ZScoreNormalization": "zscore", "CTNormalization": "ct", "NoNormalization": "none",
    "RescaleTo01Normalization": "rescale_0_1", "RGBTo01Normalization": "rgb_0_1",
}  # fmt: skip


def import_nnunet(
    folder: Path, run: Path, *, checkpoint_name: str = "checkpoint_final.pth", report: Report = silent
) -> Plan:
    """Write plan and weights of all folds that nnU-Net trained into a run folder; returns the plan.

    A run that already holds another configuration of the same data set gets this one beside it.

    Args:
        folder: nnU-Net's model folder, `<trainer>__<plans>__<configuration>`, with plans.json, dataset.json and fold_*.
        run: the run folder to make, or one imported before.
        checkpoint_name: which checkpoint of each fold.

    Raises:
        UserError: a file is missing, a checkpoint would have to be run, or the model does what autoseg cannot.
    """
    plans, dataset = nnunet.read_json(folder / "plans.json"), nnunet.read_json(folder / "dataset.json")
    theirs = folder.name.rsplit("__", 1)[-1]
    trained = {each.name.removeprefix("fold_"): each for each in sorted(folder.glob("fold_*"))}
    files = {fold: path / checkpoint_name for fold, path in trained.items() if (path / checkpoint_name).is_file()}
    if not files:
        raise UserError(f"{folder}: no fold has a {checkpoint_name}.", fix="Give nnU-Net's folder of a trained model.")
    read = {fold: nnunet.read_checkpoint(path) for fold, path in files.items()}
    labels, ignore_value = read_label_names(dataset, f"{folder}/dataset.json")
    regions = read_regions(dataset, f"{folder}/dataset.json")
    mirror_axes = next(iter(read.values())).mirror_axes
    channels, outputs = len(channel_names(dataset)), len(regions or labels)
    configuration = _configuration(plans, theirs, channels, outputs, mirror_axes, folder)
    weights = {fold: nnunet.weights_from_nnunet(each.weights, configuration.network) for fold, each in read.items()}
    made = _plan(plans, dataset, configuration, labels, ignore_value, folder).model_copy(update={"regions": regions})
    layout = Layout(run)
    if layout.plan.is_file():
        made = _joined(store.load(layout.plan, Plan), made, run)
    for fold, tensors in weights.items():
        network = UNet(configuration.network)
        network.load_state_dict(tensors)
        model = layout.model(configuration.name, fold)
        store.make_folder(model.root)
        checkpoint.save_weights(model.weights, network)
        note = f"Trained by nnU-Net, read from {files[fold]}."
        store.save(model.run, Run(
            autoseg_version=__version__, torch_version=torch.__version__, configuration=configuration, fold=fold,
            seed=0, device="", precision="", compiled=False, finished=True, notes=(note,),
        ))  # fmt: skip
    store.save(layout.plan, made)
    report(Said(f"{configuration.name}: fold {', '.join(weights)} of {folder.name}."))
    return made


def _configuration(
    plans: Mapping[str, Any], theirs: str, channels: int, classes: int, mirror_axes: tuple[int, ...], folder: Path
) -> Configuration:
    entry = nnunet.inherited(plans, theirs)
    if entry.get("previous_stage"):
        raise UserError(f"{folder}: the second stage of a cascade cannot be imported.")
    unknown = [name for name in entry["normalization_schemes"] if name not in NORMALIZATIONS]
    if unknown:
        known = ", ".join(NORMALIZATIONS)
        raise UserError(f"{folder}: the normalization {unknown[0]} is not known here.", fix=f"Known are {known}.")
    if (reader := plans.get("image_reader_writer", READERS[0])) not in READERS:
        raise UserError(
            f"{folder}: nnU-Net read its images by {reader}, which gives other axes, values or voxel sizes than here.",
            fix=f"Known are {', '.join(READERS)}.",
        )
    network = nnunet.spec_from_nnunet(nnunet.architecture_of(plans, theirs), channels, classes)
    dimension = network.dimension
    spacing, shape = entry["spacing"], [round(n) for n in entry["median_image_size_in_voxels"]]
    return Configuration.model_validate({
        "name": NAMES.get(theirs, theirs), "dimension": dimension, "axes": plans["transpose_forward"],
        "spacing_mm": (None, *spacing) if dimension == 2 else spacing,
        "median_shape_voxels": (1, *shape) if len(shape) == 2 else shape,
        "patch_voxels": entry["patch_size"], "batch_size": entry["batch_size"],
        "normalization": [NORMALIZATIONS[name] for name in entry["normalization_schemes"]],
        "mask_for_normalization": entry["use_mask_for_norm"],
        "resampling": _resampling(entry, folder),
        "batch_dice": entry.get("batch_dice", False), "network": network,
        "train": TrainSpec(augment=AugmentSpec(rotation_rad=(0.0,) * dimension, mirror_axes=mirror_axes)),
        "memory": Memory(source="assumed", peak_bytes=0),
    })  # fmt: skip


def _resampling(entry: Mapping[str, Any], folder: Path) -> Resampling:
    """How nnU-Net resampled images and labels; raises UserError for what has no like here."""
    how = {what: entry.get(f"resampling_fn_{what}", USUAL_RESAMPLING) for what in ("data", "seg")}
    kwargs = {what: entry.get(f"resampling_fn_{what}_kwargs", {}) for what in how}
    separate = kwargs["data"].get("force_separate_z")
    if unknown := set(how.values()) - {USUAL_RESAMPLING, LINEAR_RESAMPLING}:
        raise UserError(f"{folder}: nnU-Net resampled by {unknown.pop()}, which is not known here.")
    if separate:
        raise UserError(f"{folder}: nnU-Net resampled slices apart whatever their spacing, which is not done here.")
    first, second = (
        1 if how[what] == LINEAR_RESAMPLING else kwargs[what].get("order", usual)
        for what, usual in (("data", 3), ("seg", 1))
    )
    anisotropy = {} if separate is None else {"anisotropy": NEVER}
    return Resampling.model_validate({"image_order": first, "label_order": second} | anisotropy)


def _plan(
    plans: Mapping[str, Any], dataset: Mapping[str, Any], configuration: Configuration, labels: tuple[Label, ...],
    ignore_value: int | None, folder: Path,
) -> Plan:  # fmt: skip
    stored = plans["foreground_intensity_properties_per_channel"]
    intensities = tuple(
        Intensities.model_validate({name: stored[str(c)][THEIRS.get(name, name)] for name in Intensities.model_fields})
        for c in range(len(channel_names(dataset)))
    )
    flat = configuration.dimension == 2 and round(plans["original_median_shape_after_transp"][0]) == 1
    because = "nnU-Net trained this network; grid, normalization, network and weights are its own."
    return Plan(
        autoseg_version=__version__, dataset=plans["dataset_name"], dimension=2 if flat else 3,
        channels=channel_names(dataset), labels=labels, ignore_value=ignore_value, file_ending=dataset["file_ending"],
        intensities=intensities, preset="imported", budget=Budget(device="imported", total_bytes=1, budget_bytes=1),
        configurations=(configuration,),
        choices=(Choice(field=f"{configuration.name}.network", value=folder.name, because=because),),
    )  # fmt: skip


def _joined(old: Plan, new: Plan, run: Path) -> Plan:
    """The old plan with the new configuration, in place of one of that name."""
    if old.preset != "imported":
        raise UserError(f"{run}: this run was planned here.", fix="Import into another folder.")
    if any(getattr(old, field) != getattr(new, field) for field in ("channels", "labels", "regions", "dataset")):
        raise UserError(f"{run}: this run is of another data set ({old.dataset}).", fix="Import into another folder.")
    name = new.configurations[0].name
    kept = tuple(each for each in old.configurations if each.name != name)
    choices = tuple(each for each in old.choices if each.field != f"{name}.network")
    return new.model_copy(update={"configurations": kept + new.configurations, "choices": choices + new.choices})
