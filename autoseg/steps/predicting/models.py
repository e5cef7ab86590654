"""The trained networks of a run: which there are, and one ready to predict."""

import hashlib
import json
import shlex
from collections.abc import Sequence

from torch import nn

from autoseg.errors import UserError
from autoseg.layout import Layout, ModelLayout
from autoseg.network import checkpoint, unet
from autoseg.network.device import Device
from autoseg.network.ready import ready
from autoseg.records import Configuration, Dataset, Plan, Run, Splits
from autoseg.scoring.selection import by_preference, selected
from autoseg.store import load

HASHED_AT_ONCE = 2**24
SAME_GRID = ("dimension", "axes", "spacing_mm", "normalization", "mask_for_normalization", "resampling", "previous")
"""What a network and a configuration must share, so that it sees cases as it learned them."""


def load_network(model: ModelLayout, device: Device) -> nn.Module:
    """The trained network of a model folder, ready to predict on `device`."""
    network = unet.build(load(model.run, Run).configuration.network)
    checkpoint.load_weights(model.weights, network)
    return ready(network, network.spec.dimension, device)


def mirror_axes_of(model: ModelLayout) -> tuple[int, ...]:
    """The axes along which the weights of a network saw patches mirrored.

    A record is ahead of the weights while a training is lengthened, so it counts only where the weights do not say.
    """
    learned = checkpoint.read_mirror_axes(model.weights)
    return load(model.run, Run).configuration.train.augment.mirror_axes if learned is None else learned


def unlike(learned: Configuration, planned: Configuration) -> list[str]:
    """In which fields two configurations differ that make cases, or what is said of them, other ones."""
    differing = [name for name in SAME_GRID if getattr(learned, name) != getattr(planned, name)]
    inside = ("in_channels", "classes")
    return differing + [name for name in inside if getattr(learned.network, name) != getattr(planned.network, name)]


def learned_from(model: ModelLayout) -> tuple[str, ...]:
    """Ids of the cases a network learned from, as its record says, or where that says nothing the splits of its run."""
    record = load(model.run, Run)
    if record.cases is not None:
        return record.cases.train
    layout = Layout(model.root.absolute().parents[2])
    if record.fold == "all":
        return tuple(case.id for case in load(layout.dataset, Dataset).cases)
    return load(layout.splits, Splits).folds[int(record.fold)].train


def sees_otherwise(learned: Run, plan: Plan) -> bool:
    """Whether a plan scales CT channels by other intensities than those that a network learned with."""
    others = bool(learned.intensities) and learned.intensities != plan.intensities
    return others and "ct" in learned.configuration.normalization


def as_trained(planned: Configuration, models: Sequence[ModelLayout], plan: Plan) -> Configuration:
    """The configuration with the mirror axes that all of these networks learned with, and their patch if it is one.

    Raises UserError where a network was trained by a plan that prepared cases otherwise, or whose outputs mean others.
    """
    records = {model: load(model.run, Run) for model in models}
    for model, learned_by in records.items():
        differing = unlike(learned_by.configuration, planned)
        differing += ["intensities"] if sees_otherwise(learned_by, plan) else []
        differing += ["channels"] if learned_by.channels and learned_by.channels != plan.channels else []
        regions = tuple(region.name for region in plan.regions)
        differing += ["regions"] if learned_by.regions and learned_by.regions != regions else []
        if differing:
            raise UserError(
                f"{model.root} was trained by another plan: {', '.join(differing)} differ.",
                fix="Bring the old plan back, or train again with --restart.",
            )
    learned = [set(mirror_axes_of(model)) for model in models]
    axes = tuple(sorted(set.intersection(*learned)))
    augment = planned.train.augment.model_copy(update={"mirror_axes": axes})
    patches = {each.configuration.patch_voxels for each in records.values()}
    patch = patches.pop() if len(patches) == 1 else planned.patch_voxels
    train = planned.train.model_copy(update={"augment": augment})
    return planned.model_copy(update={"train": train, "patch_voxels": patch})


def trained_models(
    layout: Layout, configuration: str, folds: Sequence[str] | None = None, seeds: Sequence[int] | None = None
) -> tuple[ModelLayout, ...]:
    """The finished networks of a configuration, by fold and seed; a fold is named "0" or as its folder is, "fold_0".

    Raises UserError that lists what is trained, when nothing fits or a named fold or seed is missing.
    """
    folds = None if folds is None else [fold.removeprefix("fold_") for fold in folds]
    found = sorted(path.parent for path in layout.configuration(configuration).glob("fold_*/weights.safetensors"))
    names = {folder.name: fold_and_seed(folder.name) for folder in found}
    chosen = [
        folder
        for folder in found
        if (folds is None or names[folder.name][0] in folds) and (seeds is None or names[folder.name][1] in seeds)
    ]
    missing = [fold for fold in folds or () if fold not in {names[folder.name][0] for folder in chosen}]
    missing_seeds = [seed for seed in seeds or () if seed not in {names[folder.name][1] for folder in chosen}]
    if missing or missing_seeds or not chosen:
        what = ", ".join([*missing, *(f"seed {seed}" for seed in missing_seeds)]) or "any fold"
        fold = next((each for each in [*missing, *(folds or ())] if each.isdigit()), "0")
        words = ["autoseg", "train", str(layout.root), "-c", configuration, "-f", fold]
        words += ["--seed", str(missing_seeds[0])] if missing_seeds else []
        raise UserError(
            f"{layout.root}: {configuration} is not trained for {what} "
            f"(trained: {', '.join(names) or 'nothing yet'}).",
            fix=f"Run: {shlex.join(words)}",
        )
    return tuple(ModelLayout(folder) for folder in chosen)


def configuration_named(plan: Plan, name: str) -> Configuration:
    """The configuration of that name. Raises UserError that lists the valid names."""
    for configuration in plan.configurations:
        if configuration.name == name:
            return configuration
    names = ", ".join(each.name for each in plan.configurations)
    raise UserError(f"The plan has no configuration {name!r}.", fix=f"Choose one of: {names}.")


def default_configuration(plan: Plan) -> str:
    """What is trained when nothing is named: "3d" where the plan has it, else "2d"."""
    names = [each.name for each in plan.configurations]
    return "3d" if "3d" in names else names[0]


def trained_configuration(layout: Layout, plan: Plan) -> str:
    """What is predicted with when nothing is named: the first that is trained of cascade, 3d, low resolution and 2d."""
    names = [each.name for each in plan.configurations]
    wanted = by_preference(names)
    if chosen := selected(layout.root):
        wanted.insert(0, chosen.single)
    for name in wanted:
        if any(layout.configuration(name).glob("fold_*/weights.safetensors")):
            return name
    return wanted[0]


def fold_and_seed(folder: str) -> tuple[str, int]:
    """Fold and seed of a model folder's name."""
    fold, _, seed = folder.removeprefix("fold_").partition(".seed_")
    return fold, int(seed or 0)


def hash_of(models: Sequence[ModelLayout], plan: Plan, options: dict[str, object]) -> str:
    """A hash of everything a prediction depends on beside the image: weights, plan and options."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps([plan.model_dump(mode="json"), options], sort_keys=True).encode())
    for model in models:
        with open(model.weights, "rb") as file:
            while block := file.read(HASHED_AT_ONCE):
                digest.update(block)
    return digest.hexdigest()
