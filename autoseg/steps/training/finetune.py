"""Training that begins with the weights of another: `--init`.

What fits is taken over, channels and classes by their names.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Report, Warned
from autoseg.layout import Layout, ModelLayout
from autoseg.network import checkpoint, unet
from autoseg.records import NetworkSpec, Plan, Run
from autoseg.steps.predicting.models import learned_from

FIRST_LAYERS = ("stem.conv.weight", "encoder.0.0.conv.weight", "encoder.0.0.conv1.weight")
"""Names that the layer which sees the image may have; the first that a network has is it."""
FROZEN = {"encoder": ("stem.", "encoder.")}
"""What `--freeze` may name -> beginnings of the names of the weights that stay as they are."""
NAMED_AT_MOST = 5


@dataclass(frozen=True)
class Names:
    """What the inputs and outputs of a network mean, in order; empty where nobody knows."""

    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    are_regions: bool = False


@dataclass(frozen=True)
class Donor:
    """Weights to begin with: their tensors by name, and what the network's inputs and outputs meant."""

    folder: Path
    tensors: dict[str, Tensor]
    names: Names


def donor_of(init: str, configuration: str, fold: str, seed: int, own: ModelLayout) -> ModelLayout:
    """The model that `--init` means: a model folder, or the run's model of this configuration, fold and seed.

    A run without that fold or seed gives the first it has. Raises UserError where there is none, or it is `own`.
    """
    folder, layout = Path(init), Layout(Path(init))
    if ModelLayout(folder).weights.is_file():
        found = [folder]
    else:
        wanted = [layout.model(configuration, fold, seed).root, layout.model(configuration, fold).root]
        found = [*wanted, *sorted(layout.configuration(configuration).glob("fold_*"))]
        found = [each for each in found if ModelLayout(each).weights.is_file()]
    if not found:
        trained = sorted({path.parts[-3] for path in layout.models.glob("*/fold_*/weights.safetensors")})
        raise UserError(
            f"--init {init}: {configuration} is not trained there (trained: {', '.join(trained) or 'nothing'}).",
            fix="Name a run folder, or the folder of a model: RUN/models/3d/fold_0.",
        )
    if found[0].resolve() == own.root.resolve():
        raise UserError(f"--init {init}: that is the network to be trained.", fix="Give this one another --seed.")
    return ModelLayout(found[0])


def load_donor(model: ModelLayout) -> Donor:
    """Read a donor's weights, and its names from its record or, for old ones, from the plan of its run."""
    tensors = checkpoint.read_weights(model.weights)
    names = Names()
    if model.run.is_file():
        record = store.load(model.run, Run)
        channels, labels, regions = record.channels, record.labels, record.regions
        plan_path = Layout(model.root.parents[2]).plan if len(model.root.parents) > 2 else None
        if not (labels and regions) and plan_path is not None and plan_path.is_file():
            plan = store.load(plan_path, Plan)
            named = tuple(region.name for region in plan.regions)
            regions = named if len(named) == record.configuration.network.classes else ()
            if not labels:
                channels, labels = plan.channels, tuple(label.name for label in plan.labels)
        names = names_of(channels, labels, record.configuration.previous is not None, regions)
    return Donor(model.root, tensors, names)


def names_of(channels: Sequence[str], labels: Sequence[str], cascade: bool, regions: Sequence[str] = ()) -> Names:
    """Names of a network's inputs (a cascade also sees what the first stage found) and outputs, classes or regions."""
    previous = tuple(f"previous {label}" for label in labels[1:]) if cascade else ()
    return Names((*channels, *previous), tuple(regions or labels), bool(regions))


def take_over(network: nn.Module, names: Names, donor: Donor) -> tuple[str, ...]:
    """Put the donor's weights into `network` where they fit; returns the names of the tensors that stay fresh.

    Raises UserError as `fitting`.
    """
    own, taken = network.state_dict(), fitting(network, names, donor)
    network.load_state_dict(own | taken)
    return tuple(name for name in own if name not in taken)


def fitting(network: nn.Module, names: Names, donor: Donor) -> dict[str, Tensor]:
    """What `network` takes of the donor's weights, by the name of the tensor.

    The first layer takes each input channel by name, and the mean of the donor's channels for one that it does not
    know. The heads take each class or region by name and keep fresh rows for new ones; background is background, and
    between classes and regions nothing is taken. Everything else is taken where name and shape agree. A tensor counts
    as fresh if no part of it was taken.

    Raises UserError when no convolution fits.
    """
    own = network.state_dict()
    first = next((name for name in FIRST_LAYERS if name in own), "")
    taken: dict[str, Tensor] = {}
    for name, tensor in own.items():
        given = donor.tensors.get(name)
        if given is None:
            continue
        if name == first:
            fitted = _by_channel(tensor, given, names.inputs, donor.names.inputs)
        elif name.startswith("head."):
            fitted = _by_output(tensor, given, names, donor.names)
        else:
            fitted = given if given.shape == tensor.shape else None
        if fitted is not None:
            taken[name] = fitted
    if not any(tensor.ndim > 2 for tensor in taken.values()):
        raise UserError(f"--init {donor.folder}: nothing of it fits the network of this plan.")
    return taken


def refuse_unfit(donor: Donor, spec: NetworkSpec, names: Names, frozen: str | None) -> None:
    """Raise UserError where nothing of the donor fits such a network, or not all of the part that is to be frozen."""
    with torch.device("meta"):
        network = unet.build(spec)
    taken = fitting(network, names, donor)
    part = _beginnings(frozen) if frozen is not None else ()
    random = [name for name, _ in network.named_parameters() if name.startswith(part) and name not in taken]
    if random:
        raise UserError(
            f"--freeze {frozen}: {len(random)} of its tensors are not in {donor.folder} or do not fit, and would stay "
            f"random: {short_list(random)}.",
            fix="Leave --freeze out, or name another network with --init.",
        )


def warn_of_seen(donor: ModelLayout, validation: Sequence[str], own: Layout, report: Report) -> None:
    """Say so where a donor learned from validation cases; in another run the same name may be of another case."""
    try:
        seen = set(validation) & set(learned_from(donor)) if donor.run.is_file() else set()
    except UserError:  # an old record, whose splits are gone: nobody knows
        return
    if not seen:
        return
    cases = f"{len(seen)} of the {len(validation)} validation cases ({short_list(sorted(seen))})"
    if donor.root.resolve().is_relative_to(own.root.resolve()):
        said = f"learned from {cases}: scores there"
    else:
        said = f"learned from cases that are named like {cases}: if they are the same, scores there"
    report(Warned(f"--init: {donor.root} {said} are better than on new images."))


def freeze(network: nn.Module, part: str) -> None:
    """Keep the weights of a part as they are. Raises UserError for a part that is not in `FROZEN`."""
    beginnings = _beginnings(part)
    for name, weight in network.named_parameters():
        if name.startswith(beginnings):
            weight.requires_grad_(False)


def _beginnings(part: str) -> tuple[str, ...]:
    if part not in FROZEN:
        raise UserError(f"--freeze {part}: only {', '.join(FROZEN)} can be frozen.")
    return FROZEN[part]


def short_list(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - NAMED_AT_MOST
    return ", ".join(names[:NAMED_AT_MOST]) + (f" and {more} more" if more > 0 else "")


def _by_channel(fresh: Tensor, given: Tensor, own: Sequence[str], theirs: Sequence[str]) -> Tensor | None:
    """(features, channels, kernel ...) with the donor's channels put where their names are."""
    if fresh.shape[0] != given.shape[0] or fresh.shape[2:] != given.shape[2:]:
        return None
    if len(own) != fresh.shape[1] or len(theirs) != given.shape[1]:  # nobody knows which is which
        return given if fresh.shape == given.shape else given.mean(1, keepdim=True).expand_as(fresh).clone()
    known = {name: given[:, place] for place, name in enumerate(theirs)}
    return torch.stack([known.get(name, given.mean(1)) for name in own], dim=1)


def _by_output(fresh: Tensor, given: Tensor, own: Names, theirs: Names) -> Tensor | None:
    """(classes or regions, ...) with the donor's rows put where their names are; the others stay fresh."""
    known = len(own.outputs) == len(fresh) and len(theirs.outputs) == len(given)
    if fresh.shape[1:] != given.shape[1:] or (own.are_regions != theirs.are_regions and theirs.outputs):
        return None
    if not known:
        return given if fresh.shape == given.shape else None
    rows = {name: row for row, name in enumerate(theirs.outputs)}
    result, taken = fresh.clone(), 0
    for row, name in enumerate(own.outputs):
        from_row = rows.get(name) if row or own.are_regions else 0
        if from_row is not None and (from_row or own.are_regions or not row):
            result[row] = given[from_row].to(fresh)
            taken += 1
    return result if taken else None
