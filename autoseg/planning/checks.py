"""What planning refuses: wrong spacings, slices among volumes, broken edits."""

import json
from math import prod

from autoseg.errors import UserError
from autoseg.image.normalize import NORMALIZATIONS
from autoseg.planning.topology import strided_to_one
from autoseg.planning.wording import some
from autoseg.records import CaseStats, Configuration, Fingerprint, Plan


def check_fingerprint(fingerprint: Fingerprint) -> None:
    """Raise UserError for the first thing in a fingerprint that no plan can be made from."""
    for case in fingerprint.cases:
        _check_case(case, fingerprint)
    single = [case.id for case in fingerprint.cases if case.full_shape_voxels[0] == 1]
    if fingerprint.dimension == 3:
        thin = [case.id for case in fingerprint.cases if 1 in case.full_shape_voxels]
        if thin:
            all_or_some = "all" if len(thin) == len(fingerprint.cases) else f"{len(thin)} of {len(fingerprint.cases)}"
            fix = "Train 2D images as a data set of their own, and move them out of this one."
            if not single and len(thin) == len(fingerprint.cases):
                fix = "Save them and their label maps with the single slice along the third axis (Z), as 2D images lie."
            raise UserError(f"The data set is 3D, but {all_or_some} images have a single slice: {some(thin)}.", fix=fix)
    elif len(single) < len(fingerprint.cases):
        total = len(fingerprint.cases)
        thick = [case.id for case in fingerprint.cases if case.id not in set(single)]
        raise UserError(
            f"The data set is 2D, but {len(thick)} of {total} images have several slices: {some(thick)}.",
            fix="Keep 2D and 3D images in two data sets.",
        )


def check_plan(plan: Plan) -> None:
    """Raise UserError where an edited plan contradicts itself (records.py checks the patches)."""
    names = [configuration.name for configuration in plan.configurations]
    if len(set(names)) < len(names):
        raise UserError(
            f"The plan has two configurations of the same name among {', '.join(names)}.", fix="Rename one."
        )
    for configuration in plan.configurations:
        if not configuration.name or configuration.name.startswith(".") or set("/\\") & set(configuration.name):
            what = f"The plan has a configuration called {configuration.name!r}, and folders are called after it."
            raise UserError(what, fix="Give it a name without / and \\ that begins with no dot.")
        _check_previous(configuration, plan)
        _check_configuration(configuration, plan)


def _check_previous(configuration: Configuration, plan: Plan) -> None:
    """Raise UserError where the stages before a configuration do not end: one is not there, or comes twice."""
    previous = {each.name: each.previous for each in plan.configurations}
    stages = [configuration.name]
    while (before := previous[stages[-1]]) is not None:
        if before not in previous:
            raise UserError(
                f"Configuration {stages[-1]} follows {before!r}, which the plan does not have.",
                fix=f"Choose one of {', '.join(previous)}.",
            )
        if before in stages:
            raise UserError(f"Configuration {before} follows itself: {' after '.join([*stages, before])}.")
        stages.append(before)


def _check_case(case: CaseStats, fingerprint: Fingerprint) -> None:
    if min(case.spacing_mm) <= 0:
        raise UserError(
            f"{case.id}: the voxel spacing is {case.spacing_mm} mm (Z Y X), but has to be above zero on every axis.",
            fix="Mend the image's header.",
        )
    if min(case.shape_voxels) < 1:
        raise UserError(f"{case.id}: the image has no voxels ({case.shape_voxels}).", fix="Remove it or mend the file.")
    counted, named = len(case.class_voxels), len(fingerprint.labels)
    if counted != named:
        raise UserError(
            f"{case.id}: the fingerprint counts {counted} classes, but the data set has {named}.",
            fix="Run autoseg plan on the data again.",
        )


def _check_configuration(configuration: Configuration, plan: Plan) -> None:
    name, channels = configuration.name, len(plan.channels)
    for field in ("normalization", "mask_for_normalization"):
        given = getattr(configuration, field)
        if len(given) != channels:
            raise UserError(f"Configuration {name}: {field} has {len(given)} entries for {channels} channels.")
    unknown = [each for each in configuration.normalization if each not in NORMALIZATIONS]
    if unknown:
        raise UserError(
            f"Configuration {name}: there is no normalization {unknown[0]!r}.",
            fix=f"Choose one of {', '.join(NORMALIZATIONS)}.",
        )
    _check_spacing(configuration)
    _check_axes(configuration, plan)
    inputs = channels + (plan.classes - 1 if configuration.previous else 0)
    if configuration.network.in_channels != inputs or configuration.network.classes != len(plan.outputs):
        raise UserError(
            f"Configuration {name}: the network has {configuration.network.in_channels} input channels and "
            f"{configuration.network.classes} outputs, the data {inputs} and {len(plan.outputs)}.",
        )
    if unsafe := strided_to_one(configuration.network.strides, configuration.patch_voxels):
        least = 2 * prod(stride[-1] for stride in configuration.network.strides)
        raise UserError(
            f"Configuration {name}: stage {unsafe[0]} would leave a single voxel on the last axis of the patch, which "
            "some processors compute wrongly in bf16.",
            fix=f"Make the last axis of patch_voxels at least {least}, or its stride in that stage 1.",
        )


def _check_spacing(configuration: Configuration) -> None:
    what = f"Configuration {configuration.name}: spacing_mm is {json.dumps(configuration.spacing_mm)}, but"
    first, *in_plane = configuration.spacing_mm
    if (first is None) != (configuration.dimension == 2):
        whole = "a volume has three numbers." if first is None else "slices are never resampled across."
        raise UserError(f"{what} {whole}", fix="The first is null in 2D, and only there.")
    if min(in_plane) <= 0 or (first is not None and first <= 0):
        raise UserError(f"{what} has to be above zero.")


def _check_axes(configuration: Configuration, plan: Plan) -> None:
    name, augment = configuration.name, configuration.train.augment
    mirrored, angles = augment.mirror_axes, 3 if configuration.dimension == 3 else 1
    if sorted(configuration.axes) != [0, 1, 2]:
        raise UserError(
            f"Configuration {name}: axes is {configuration.axes}, but has to name each axis of the files once.",
            fix="Write 0, 1 and 2 in the order the patch shall have, such as [2, 0, 1].",
        )
    if plan.dimension == 2 and configuration.axes[0] != 0:
        raise UserError(
            f"Configuration {name}: axes is {configuration.axes}, but the first has to be that of the slice, 0, in 2D."
        )
    if len(augment.rotation_rad) < angles:
        raise UserError(
            f"Configuration {name}: rotation_rad has {len(augment.rotation_rad)} angles for a patch with "
            f"{configuration.dimension} axes.",
            fix="Give three angles (Z Y X) in 3D and one in 2D.",
        )
    if not set(mirrored) <= set(range(configuration.dimension)):
        raise UserError(
            f"Configuration {name}: mirror_axes is {mirrored}, but the patch has {configuration.dimension} axes.",
            fix=f"Choose from {', '.join(map(str, range(configuration.dimension)))}.",
        )
