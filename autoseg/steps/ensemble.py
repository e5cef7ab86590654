"""`autoseg ensemble`: one prediction out of several folders of predictions, case by case and class by class.

Axes: Z Y X voxels. Where all folders hold probabilities their mean is taken (unweighted unless asked otherwise), else
the label maps vote. Probabilities are read one class at a time, so memory does not grow with classes or members.
"""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import SimpleITK as sitk

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.image.formats import ending_of, read_geometry, read_labels, write_labels
from autoseg.image.labels import grid_difference, label_maps
from autoseg.image.probabilities import ProbabilityHeader, read_classes, read_header, write_probabilities
from autoseg.image.volume import Geometry
from autoseg.layout import PROBABILITIES, prediction_file, probabilities_file
from autoseg.scoring import overlap

SUM_TOLERANCE = 0.02
"""How far from 1 the probabilities of a voxel may sum: float16 keeps three digits of each."""

MANY_VALUES = 1024


@dataclass(frozen=True)
class Member:
    """One folder of predictions: its label maps and probabilities by case id (either may be empty)."""

    folder: Path
    maps: dict[str, Path]
    probabilities: dict[str, Path]


def ensemble(
    predictions: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    method: str | None = None,
    save_probabilities: bool = False,
    report: Report = silent,
) -> tuple[Path, ...]:
    """Combine prediction folders into one; returns the label maps written.

    Args:
        predictions: two or more folders with the same cases, classes and grids.
        output: folder for the label maps. Files appear in it only when all cases are done.
        weights: one per folder, not negative; None weighs all alike.
        method: "mean" of probabilities, "vote" (ties: the label of the first of the tied folders) or "staple" (Warfield
            2004, undecided voxels by vote); None takes the mean where all folders hold probabilities, else the vote.
        save_probabilities: also write the mean probabilities (with "mean").

    Raises:
        UserError: folders differ in cases, classes or grids, or probabilities do not sum to one; nothing is written.
    """
    members = [_member(folder) for folder in predictions]
    if len(members) < 2:
        raise UserError("An ensemble needs at least two prediction folders.")
    shares = _shares(weights, len(members))
    method = _method(method, members, report)
    files = [member.probabilities if method == "mean" else member.maps for member in members]
    cases = _same_cases(members, files)
    _check(members, files, cases, HEADERS[method])
    for stale in output.parent.glob(f"{output.name}{store.TEMPORARY}-*"):
        shutil.rmtree(stale, ignore_errors=True)
    staging = output.with_name(f"{output.name}{store.TEMPORARY}-{os.getpid()}")
    what, agreements = "Ensembling", []
    report(Started(what, len(cases)))
    try:
        for done, case in enumerate(cases, 1):
            target = prediction_file(staging, case, _ending(members, case))
            inputs = [each[case] for each in files]
            labels_ZYX = METHODS[method](inputs, shares, target, save_probabilities)
            agreements.append([_agreement(member.maps.get(case), labels_ZYX) for member in members])
            report(Advanced(what, done, len(cases), case))
        written = _publish(staging, output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report(Finished(what))
    _say_agreement(members, agreements, report)
    return tuple(path for path in written if ending_of(path))


# ------------------------------------------------------------------------------------------------ methods


def mean_of_probabilities(
    paths: Sequence[Path], shares: Sequence[float], target: Path, save_probabilities: bool = False
) -> np.ndarray:
    """Average the probabilities of one case, write the label map of the largest, and return it (Z, Y, X), file values.

    Equally likely classes: the first in the order of the labels.
    """
    header = read_header(paths[0])
    if header.values is None:
        raise UserError(
            f"{paths[0]}: it does not say which values its classes have in label maps.", fix="Predict it again."
        )
    if partial := [path for path in paths if not read_header(path).complete]:
        raise UserError(
            f"{partial[0]}: it holds only some of the classes, which cannot be averaged.",
            fix="Predict with --save-probabilities alone, without --classes.",
        )
    size = header.geometry.size_voxels
    best_ZYX, labels_ZYX = np.full(size, -np.inf, np.float32), np.zeros(size, np.int32)
    values = header.values

    def judged() -> Iterator[np.ndarray]:
        for value, mean_ZYX in zip(values, mean_classes(paths, shares), strict=True):
            better_ZYX = mean_ZYX > best_ZYX
            labels_ZYX[better_ZYX] = value
            np.copyto(best_ZYX, mean_ZYX, where=better_ZYX)
            yield mean_ZYX

    if save_probabilities:
        file = probabilities_file(target.parent, target.name[: -len(ending_of(target))])
        write_probabilities(file, judged(), header.geometry, header.names, header.values)
    else:
        for _ in judged():
            pass
    write_labels(target, labels_ZYX, header.geometry)
    return labels_ZYX


def mean_classes(paths: Sequence[Path], shares: Sequence[float]) -> Iterator[np.ndarray]:
    """The weighted mean probability of each class, one (Z, Y, X) float32 array after the other.

    Raises:
        UserError: after the last class, when a file's probabilities do not sum to one everywhere.
    """
    readers = [read_classes(path) for path in paths]
    header = read_header(paths[0])
    sum_ZYX = np.zeros(header.geometry.size_voxels, np.float32)
    for _ in header.names:
        mean_ZYX = np.zeros(header.geometry.size_voxels, np.float32)
        for reader, share in zip(readers, shares, strict=True):  # one class of one member in memory at a time
            class_ZYX = next(reader)
            class_ZYX *= np.float32(share)
            mean_ZYX += class_ZYX
            del class_ZYX
        sum_ZYX += mean_ZYX
        yield mean_ZYX
    for reader in readers:
        next(reader, None)  # the end of the file, where its checksum is
    tolerance = SUM_TOLERANCE * min(share for share in shares if share > 0)
    rounding = max(read_header(path).rounding for path in paths) * len(header.names)
    if not _is_one(sum_ZYX, tolerance + rounding):
        raise _not_one(paths)


def _is_one(sum_ZYX: np.ndarray, tolerance: float) -> bool:
    return bool(np.abs(sum_ZYX - 1).max(initial=0.0) < tolerance)  # False for NaN, too


def _not_one(paths: Sequence[Path]) -> UserError:
    """The error that names the file whose probabilities do not sum to one."""
    for path in paths:
        sum_ZYX = sum(read_classes(path))
        header = read_header(path)
        if not _is_one(np.asarray(sum_ZYX), SUM_TOLERANCE + header.rounding * len(header.names)):
            low, high = float(np.min(sum_ZYX)), float(np.max(sum_ZYX))
            return UserError(
                f"{path}: the probabilities of a voxel sum to {low:.3g} to {high:.3g}, not to 1.",
                fix="Give probabilities, not network outputs.",
            )
    return UserError(f"{paths[0]} and its likes hold probabilities that do not sum to 1.", fix="Predict them again.")


def vote(
    paths: Sequence[Path], shares: Sequence[float], target: Path, save_probabilities: bool = False
) -> np.ndarray:
    """The label with most votes per voxel; ties go to the first folder among those that tie."""
    maps, geometry = _maps(paths)
    labels_ZYX = majority(maps, shares)
    write_labels(target, labels_ZYX, geometry)
    return labels_ZYX


def majority(maps: Sequence[np.ndarray], shares: Sequence[float]) -> np.ndarray:
    """The label with the largest summed share per voxel; ties go to the first map that holds one of the tied labels."""
    result_ZYX, most_ZYX = maps[0].copy(), np.full(maps[0].shape, -np.inf, np.float32)
    for one_ZYX in maps:
        votes_ZYX = np.zeros(one_ZYX.shape, np.float32)
        for other_ZYX, share in zip(maps, shares, strict=True):
            votes_ZYX += np.where(one_ZYX == other_ZYX, np.float32(share), np.float32(0))
        better_ZYX = votes_ZYX > most_ZYX + 1e-6
        result_ZYX[better_ZYX] = one_ZYX[better_ZYX]
        most_ZYX[better_ZYX] = votes_ZYX[better_ZYX]
    return result_ZYX


def staple(
    paths: Sequence[Path], shares: Sequence[float], target: Path, save_probabilities: bool = False
) -> np.ndarray:
    """Estimate the reference and every member's reliability together (Warfield et al. 2004); weights play no part."""
    maps, geometry = _maps(paths)
    values = np.unique(np.concatenate([np.unique(each) for each in maps]))
    undecided = len(values)
    if undecided > 65535:
        raise UserError(f"{target.name}: STAPLE takes up to 65535 labels, these maps hold {undecided}.")
    images = [sitk.GetImageFromArray(np.searchsorted(values, each).astype(np.uint16)) for each in maps]
    indices_ZYX = sitk.GetArrayFromImage(sitk.MultiLabelSTAPLE(images, undecided))
    labels_ZYX = np.append(values, 0)[indices_ZYX].astype(np.int32)
    open_ZYX = indices_ZYX == undecided
    if open_ZYX.any():
        labels_ZYX[open_ZYX] = majority(maps, shares)[open_ZYX]
    write_labels(target, labels_ZYX, geometry)
    return labels_ZYX


# ------------------------------------------------------------------------------------------------ parts


def _member(folder: Path) -> Member:
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    probabilities = {
        path.name[: -len(ending)]: path
        for ending in reversed(PROBABILITIES)  # the present format wins where a case has both
        for path in sorted(folder.glob(f"*{ending}"))
        if store.TEMPORARY not in path.name
    }
    try:
        maps = label_maps(folder)
    except UserError:
        if not probabilities:
            raise
        maps = {}
    return Member(folder, maps, probabilities)


def _shares(weights: Sequence[float] | None, members: int) -> list[float]:
    """Weights as shares that sum to one."""
    if weights is None:
        return [1 / members] * members
    if len(weights) != members:
        raise UserError(f"{len(weights)} weights for {members} prediction folders.", fix="Give one weight per folder.")
    if not np.isfinite(weights).all() or min(weights) < 0 or sum(weights) <= 0:
        raise UserError(f"The weights {list(weights)} are no weights.", fix="Give numbers that are not negative.")
    return [weight / sum(weights) for weight in weights]


def _method(wanted: str | None, members: Sequence[Member], report: Report) -> str:
    """The method to use: the one asked for if it is possible, else the best there are files for."""
    if wanted is not None and wanted not in METHODS:
        raise UserError(f"Unknown method {wanted!r}.", fix=f"Known: {', '.join(METHODS)}.")
    without = [member.folder for member in members if not member.probabilities]
    if wanted == "mean" and without:
        raise UserError(
            f"{without[0]}: there are no probabilities in this folder.", fix="Predict it with --save-probabilities."
        )
    if wanted is None and without and len(without) < len(members):
        report(Warned(f"{without[0]} holds no probabilities, so the label maps of all folders vote."))
    return wanted or ("vote" if without else "mean")


def _same_cases(members: Sequence[Member], files: Sequence[dict[str, Path]]) -> tuple[str, ...]:
    """The case ids, which must be those of the first folder in every folder."""
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
    if not first:
        raise UserError(f"{members[0].folder}: there are no label maps in this folder.")
    return tuple(sorted(first))


def _check(
    members: Sequence[Member],
    files: Sequence[dict[str, Path]],
    cases: Sequence[str],
    header_of: Callable[[Path], ProbabilityHeader],
) -> None:
    """Raise UserError where classes or grids of a case differ between folders; reads only headers."""
    for case in cases:
        first = header_of(files[0][case])
        for member, own in zip(members[1:], files[1:], strict=True):
            other = header_of(own[case])
            pair = f"{case}: {members[0].folder} and {member.folder}"
            if (first.names, first.values) != (other.names, other.values):
                raise UserError(
                    f"{pair} have different classes: {_classes(first)} against {_classes(other)}.",
                    fix="Only predictions of the same labels can be combined.",
                )
            if difference := grid_difference(first.geometry, other.geometry):
                raise UserError(
                    f"{pair} lie on different grids: {difference}.", fix="Predict both from the same images."
                )


def _classes(header: ProbabilityHeader) -> str:
    values = header.values or range(len(header.names))
    return ", ".join(f"{name} {value}" for name, value in zip(header.names, values, strict=True))


def _map_header(path: Path) -> ProbabilityHeader:
    return ProbabilityHeader((), None, read_geometry(path))


def _maps(paths: Sequence[Path]) -> tuple[list[np.ndarray], Geometry]:
    """Label maps (Z, Y, X) with the values of the files, and the first one's geometry."""
    read = [read_labels(path) for path in paths]
    return [labels_ZYX for labels_ZYX, _ in read], read[0][1]


def _ending(members: Sequence[Member], case: str) -> str:
    """The ending of the label maps there are of this case; probabilities alone do not say."""
    for member in members:
        if case in member.maps:
            return ending_of(member.maps[case])
    flat = any(read_header(m.probabilities[case]).geometry.dimension == 2 for m in members if case in m.probabilities)
    return ".png" if flat else ".nii.gz"


def _publish(staging: Path, output: Path) -> tuple[Path, ...]:
    """Move everything from `staging` into `output`, each file whole."""
    output.mkdir(parents=True, exist_ok=True)
    written = []
    for path in sorted(staging.iterdir()):
        os.replace(path, output / path.name)
        written.append(output / path.name)
    return tuple(written)


def _agreement(path: Path | None, labels_ZYX: np.ndarray) -> float | None:
    """Foreground Dice (mean over labels) of one member's label map with the ensemble's; None without a map."""
    if path is None:
        return None
    own_ZYX = read_labels(path)[0]
    lowest = min(int(own_ZYX.min()), int(labels_ZYX.min()))
    highest = max(int(own_ZYX.max()), int(labels_ZYX.max()))
    if lowest < 0 or highest >= MANY_VALUES:
        indices = np.unique(np.stack([own_ZYX, labels_ZYX]), return_inverse=True)[1]
        own_ZYX, labels_ZYX = indices.reshape(2, *own_ZYX.shape)
        highest = int(indices.max())
    return overlap.mean([overlap.dice(each) for each in overlap.count(own_ZYX, labels_ZYX, highest + 1)[1:]])


def _say_agreement(members: Sequence[Member], agreements: Sequence[Sequence[float | None]], report: Report) -> None:
    for member, own in zip(members, zip(*agreements, strict=True), strict=True):
        dice = overlap.mean(own)
        if dice is not None:
            report(Said(f"{member.folder} agrees with the ensemble: Dice {dice:.4f} over {len(own)} cases."))


METHODS: dict[str, Callable[[Sequence[Path], Sequence[float], Path, bool], np.ndarray]] = {
    "mean": mean_of_probabilities,
    "vote": vote,
    "staple": staple,
}
"""How one case is combined: (files, shares, label map to write, save probabilities?) -> label map."""

HEADERS: dict[str, Callable[[Path], ProbabilityHeader]] = {
    "mean": read_header,
    "vote": _map_header,
    "staple": _map_header,
}
"""What the files of a method say about themselves."""
