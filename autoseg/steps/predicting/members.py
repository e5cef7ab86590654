"""Folders of predictions to be combined: what they hold, and if they fit together."""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from autoseg import store
from autoseg.errors import UserError
from autoseg.image.formats import ending_of, read_geometry
from autoseg.image.labels import grid_difference, label_maps
from autoseg.image.probabilities import ProbabilityHeader, read_header
from autoseg.layout import PROBABILITIES, Layout, is_student
from autoseg.records import Plan
from autoseg.scoring.selection import by_preference, selected


@dataclass(frozen=True)
class Member:
    """One folder of predictions: its label maps and probabilities by case id (either may be empty)."""

    folder: Path
    maps: dict[str, Path]
    probabilities: dict[str, Path]


def member_of(folder: Path) -> Member:
    """What a folder holds. Raises UserError when that is nothing."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    probabilities = {
        path.name[: -len(ending)]: path
        for ending in reversed(PROBABILITIES)  # what is written today last: it counts where both are there
        for path in sorted(folder.glob(f"*{ending}"))
        if store.TEMPORARY not in path.name and not path.name.startswith(".")
    }
    try:
        maps = label_maps(folder)
    except UserError:
        if not probabilities:
            raise
        maps = {}
    return Member(folder, maps, probabilities)


def shares_of(weights: Sequence[float] | None, members: int) -> list[float]:
    """Weights as shares that sum to one; None is equal ones. Raises UserError for what are no weights."""
    if weights is None:
        return [1 / members] * members
    if len(weights) != members:
        raise UserError(f"{len(weights)} weights for {members} prediction folders.", fix="Give one weight per folder.")
    if not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"The weights {list(weights)} are no weights.", fix="Give numbers that are not negative.")
    return [weight / sum(weights) for weight in weights]


def same_cases(members: Sequence[Member], files: Sequence[dict[str, Path]]) -> tuple[str, ...]:
    """The case ids, which must be those of the first folder in every folder. Raises UserError otherwise."""
    for member, own in zip(members, files, strict=True):
        if not own:
            raise UserError(
                f"{member.folder}: there are no label maps in this folder.",
                fix="All folders must hold label maps, or all probabilities.",
            )
    first = set(files[0])
    for member, own in zip(members[1:], files[1:], strict=True):
        only = [(members[0].folder, first - set(own)), (member.folder, set(own) - first)]
        for folder, names in only:
            if names:
                raise UserError(
                    f"{members[0].folder} and {member.folder} hold different cases: only {folder} has "
                    f"{', '.join(sorted(names)[:5])}{' ...' if len(names) > 5 else ''}.",
                    fix="Give folders with predictions of the same cases.",
                )
    return tuple(sorted(first))


def check(
    members: Sequence[Member], files: Sequence[dict[str, Path]], cases: Sequence[str], probabilities: bool
) -> None:
    """Raise UserError where classes or grids of a case differ between folders; reads only headers."""
    header_of: Callable[[Path], ProbabilityHeader] = _complete_header if probabilities else _map_header
    for case in cases:
        first = header_of(files[0][case])
        for member, own in zip(members[1:], files[1:], strict=True):
            other = header_of(own[case])
            pair = f"{case}: {members[0].folder} and {member.folder}"
            if (first.names, first.values, first.background) != (other.names, other.values, other.background):
                raise UserError(
                    f"{pair} have different classes: {_classes(first)} against {_classes(other)}.",
                    fix="Only predictions of the same labels can be combined.",
                )
            if difference := grid_difference(first.geometry, other.geometry):
                raise UserError(
                    f"{pair} lie on different grids: {difference}.", fix="Predict both from the same images."
                )


def members_of_runs(runs: Sequence[Path], configurations: Sequence[str] | None) -> tuple[tuple[Path, str], ...]:
    """(run, configuration) of every member; see `ensemble_runs` for what is taken where none is named.

    Raises:
        UserError: fewer than two members, or a configuration that is not trained.
    """
    if configurations:
        members = [(run, name) for run in runs for name in configurations]
    elif len(runs) == 1:
        members = [(runs[0], name) for name in trained_configurations(runs[0]) if not is_student(name)]
    else:
        members = [(run, name) for run in runs for name in (default_members(run) or ("",))]
    for run, name in members:
        trained = trained_configurations(run)
        if name not in trained:
            raise UserError(
                f"{run}: {name or 'nothing'} is {'not ' if name else ''}trained (trained: "
                f"{', '.join(trained) or 'nothing yet'}).",
                fix=f"Run: {shlex.join(['autoseg', 'train', str(run), *(['-c', name] if name else [])])}",
            )
    if len(set(members)) < max(2, len(members)):
        raise UserError(
            "An ensemble needs at least two different members: runs, or configurations of a run.",
            fix="Name several runs, or several configurations such as -c 2d,3d.",
        )
    return tuple(members)


def trained_configurations(run: Path) -> tuple[str, ...]:
    """The configurations of the plan that have finished networks, in the order of the plan."""
    layout = Layout(run)
    named = [each.name for each in store.load(layout.plan, Plan).configurations]
    return tuple(name for name in named if any(layout.configuration(name).glob("fold_*/weights.safetensors")))


def default_members(run: Path) -> tuple[str, ...]:
    """What `predict` takes of a run: what was selected, else the first of the cascade, 3D and 2D that is trained."""
    if chosen := selected(run):
        return chosen.members
    return tuple(by_preference(trained_configurations(run))[:1])


def same_plans(plans: Sequence[Plan], names: Sequence[str]) -> Plan:
    """The first of the plans. Raises UserError that names two with other channels, another order, or labels."""
    first = plans[0]
    for plan, name in zip(plans[1:], names[1:], strict=True):
        if (plan.labels, getattr(plan, "regions", ())) != (first.labels, getattr(first, "regions", ())):
            mine, other = (", ".join(f"{each.name} {each.value}" for each in p.labels) for p in (first, plan))
            raise UserError(
                f"{names[0]} and {name} have different labels: {mine} against {other}.",
                fix="Only networks of the same labels can be combined.",
            )
        if len(plan.channels) != len(first.channels) or _are_moved(first.channels, plan.channels):
            raise UserError(
                f"{names[0]} and {name} have different channels: {', '.join(first.channels)} against "
                f"{', '.join(plan.channels)}.",
                fix="Only networks of the same images can be combined.",
            )
    return first


def _are_moved(first: Sequence[str], other: Sequence[str]) -> bool:
    """Whether a channel of the first lies at another place in the other; one of another name may be the same."""
    mine, theirs = ([name.casefold() for name in names] for names in (first, other))
    return any(name in mine and mine[c] != name for c, name in enumerate(theirs))


def ending_for(members: Sequence[Member], case: str) -> str:
    """The ending of the label maps there are of this case; probabilities alone do not say."""
    for member in members:
        if case in member.maps:
            return ending_of(member.maps[case])
    flat = any(read_header(m.probabilities[case]).geometry.dimension == 2 for m in members if case in m.probabilities)
    return ".png" if flat else ".nii.gz"


def _classes(header: ProbabilityHeader) -> str:
    values = header.values or range(len(header.names))
    return ", ".join(f"{name} {value}" for name, value in zip(header.names, values, strict=True))


def _map_header(path: Path) -> ProbabilityHeader:
    return ProbabilityHeader((), None, read_geometry(path))


def _complete_header(path: Path) -> ProbabilityHeader:
    header = read_header(path)
    if header.values is None:
        raise UserError(
            f"{path}: it does not say which values its classes have in label maps.", fix="Predict it again."
        )
    if not header.complete:
        raise UserError(
            f"{path}: it holds only some of the classes, which cannot be averaged.",
            fix="Predict with --save-probabilities alone.",
        )
    return header
