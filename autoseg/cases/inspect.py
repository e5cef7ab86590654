"""Checks every image with its label map and measures it for the fingerprint.

Each file is read once.
Nothing stops at the first bad case: all problems of all cases are collected, each with what to do about it.
Statistics are kept per case under a hash of the files' bytes, so that a second run only reads what changed.
Axes: C channel, Z Y X voxels.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from autoseg.cases.listing import RENAME
from autoseg.cases.measure import fingerprint_of as fingerprint_of
from autoseg.cases.measure import measure_case
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.image.companions import hash_into
from autoseg.image.formats import PHOTOGRAPHS, ending_of, read_image, read_labels
from autoseg.image.labels import NAME_THEM, to_indices
from autoseg.image.volume import Geometry, displacement_mm, patient_axes
from autoseg.layout import case_stats_file
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import Case, CaseStats, Dataset, Label, LeftOut
from autoseg.store import load, remove_unfinished, save

SAME_GRID = 0.05
"""An image and its label map may lie this share of the smallest spacing apart."""

WHAT = "check and fingerprint"


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one case and what to do about it. `blocking` is False for what training can live with."""

    case: str
    what: str
    fix: str = ""
    blocking: bool = True

    def __str__(self) -> str:
        return f"{self.case}: {self.what}"


class BadDataset(UserError):
    """Some cases cannot be learned from. `problems` holds all of them; the message shows the first ten."""

    def __init__(self, problems: Sequence[Problem], of: int) -> None:
        self.problems, self.of = tuple(problems), of
        lines = [f"  {problem}" + (f" {problem.fix}" if problem.fix else "") for problem in problems[:10]]
        more = [f"  and {len(problems) - 10} more"] if len(problems) > 10 else []
        bad = len({problem.case for problem in problems})
        what = "\n".join([f"{bad} of {of} cases cannot be used:", *lines, *more, ""])
        super().__init__(what, "Mend them, or go on without them with --skip-bad.")

    def __reduce__(self) -> tuple:
        return type(self), (self.problems, self.of)


@dataclass(frozen=True, slots=True)
class Inspected:
    """What a worker says about one case: statistics, or problems (or both, when they are not blocking)."""

    stats: CaseStats | None
    problems: tuple[Problem, ...] = ()


def inspect(
    dataset: Dataset,
    stats_folder: Path,
    workers: int | None = None,
    report: Report = silent,
    skip_bad: bool = False,
) -> tuple[Dataset, tuple[CaseStats, ...]]:
    """Check every case and measure it.

    Args:
        dataset: as discovered; cases in its `left_out` are reported as problems and not read.
        stats_folder: keeps the statistics per case; an interrupted or repeated run continues from it.
        workers: processes; None takes all allowed cores.
        skip_bad: go on without the bad cases; they move to `Dataset.left_out`.

    Returns:
        The data set with its true dimension and without what was left out, and the statistics of its cases in order.

    Raises:
        BadDataset: some case is bad (without `skip_bad`), or all are.
    """
    report(Started(WHAT, of=len(dataset.cases)))
    remove_unfinished(stats_folder)
    found = {each.id: Inspected(None, (Problem(each.id, each.problem, RENAME),)) for each in dataset.left_out}
    report(Advanced(WHAT, done=len(found), of=len(dataset.cases)))
    to_read = [case for case in dataset.cases if case.id not in found]
    function = partial(inspect_case, dataset=dataset.model_copy(update={"cases": ()}), stats_folder=stats_folder)
    for case, inspected in _inspected(dataset, to_read, stats_folder, workers or allowed_cores(), function):
        found[case.id] = inspected
        report(Advanced(WHAT, done=len(found), of=len(dataset.cases), note=case.id))
    report(Finished(WHAT))
    problems = [problem for case in dataset.cases for problem in found[case.id].problems]
    problems += _no_foreground_at_all(dataset, found)
    blocking = [problem for problem in problems if problem.blocking]
    for problem in problems:
        if not problem.blocking or skip_bad:
            report(Warned(str(problem)))
    bad = {problem.case for problem in blocking}
    good = tuple(case for case in dataset.cases if case.id not in bad)
    if bad and (not skip_bad or not good):
        raise BadDataset(blocking, len(dataset.cases))
    if bad:
        report(Said(f"{len(bad)} of {len(dataset.cases)} cases were left out."))
    left_out = tuple(LeftOut(id=problem.case, problem=problem.what) for problem in blocking)
    stats = tuple(_stats_of(found[case.id]) for case in good)
    dimension = 2 if all(each.full_shape_voxels[0] == 1 for each in stats) else 3
    update = {"cases": good, "left_out": left_out, "dimension": dimension}
    return dataset.model_copy(update=update), stats


def content_of(case: Case, labels: Sequence[Label], ignore_value: int | None) -> str:
    """Hash of the bytes of the case's files and of the label values. Raises UserError when a file is missing."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr((CaseStats.SCHEMA, [label.value for label in labels], ignore_value)).encode())
    for path in (*case.images, case.label):
        if path is None:
            continue
        try:
            hash_into(digest, path)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror or error}.", fix="Is the path right?") from error
        digest.update(b"\0end of file")
    return digest.hexdigest()


def inspect_case(case: Case, dataset: Dataset, stats_folder: Path) -> Inspected:
    """Check and measure one case; its statistics are saved. `dataset` may come without cases."""
    problems = [
        _absent(case, f"channel {number} ({_channel(dataset, number)}):", path, "Add the file.")
        for number, path in enumerate(case.images)
        if not Path(path).is_file()
    ]
    if case.label is None:
        problems.append(Problem(case.id, f"there is no label map for {case.images[0]}.", "Add it or remove the image."))
    elif not Path(case.label).is_file():
        problems.append(_absent(case, "its label map", case.label, "Add it or remove the image."))
    if problems or case.label is None:
        return Inspected(None, tuple(problems))
    image, label = _tried(case, read_image, case.images), _tried(case, read_labels, case.label)
    problems = [each for each in (image, label) if isinstance(each, Problem)]
    if isinstance(image, Problem) or isinstance(label, Problem):
        return Inspected(None, tuple(problems))
    labels_ZYX, label_geometry = label
    geometry = image.geometry
    problems += _image_problems(case, dataset, image.array_CZYX)
    problems += _grid_problems(case, geometry, label_geometry)
    named = (dataset.labels, dataset.ignore_value)
    indices_ZYX = _tried(case, to_indices, labels_ZYX, *named, "its label map", NAME_THEM)
    if isinstance(indices_ZYX, Problem):
        problems.append(indices_ZYX)
    if problems or isinstance(indices_ZYX, Problem):
        return Inspected(None, tuple(problems))
    content = content_of(case, dataset.labels, dataset.ignore_value)
    axes = None if ending_of(case.images[0]) in PHOTOGRAPHS else patient_axes(geometry)
    classes = len(dataset.labels)
    stats = measure_case(case.id, content, image.array_CZYX, indices_ZYX, geometry.spacing_mm, classes, axes)
    save(case_stats_file(stats_folder, case.id), stats, durable=False)
    return Inspected(stats, tuple(_empty(stats)))


# ------------------------------------------------------------------------------------------------ what may be known


def _inspected(
    dataset: Dataset, cases: Sequence[Case], stats_folder: Path, workers: int, function: partial[Inspected]
) -> Iterator[tuple[Case, Inspected]]:
    """Cases whose statistics are still true are hashed here in threads, without starting a process; others are read."""
    known = [case for case in cases if case_stats_file(stats_folder, case.id).is_file()]
    unknown = [case for case in cases if not case_stats_file(stats_folder, case.id).is_file()]
    if known:
        with ThreadPoolExecutor(workers) as pool:
            for case, stats in zip(known, pool.map(partial(_known, dataset, stats_folder), known), strict=True):
                if stats is None:
                    unknown.append(case)
                else:
                    yield case, Inspected(stats, tuple(_empty(stats)))
    yield from over_cases(function, unknown, workers, _id_of, head_start_seconds=1.0)


def _known(dataset: Dataset, stats_folder: Path, case: Case) -> CaseStats | None:
    """The saved statistics if they belong to these files and labels."""
    try:
        stats = load(case_stats_file(stats_folder, case.id), CaseStats)
        same = stats.content == content_of(case, dataset.labels, dataset.ignore_value)
        return stats if same and len(stats.intensities) == len(dataset.channels) else None
    except UserError:
        return None


def _id_of(case: Case) -> str:
    return case.id


def _stats_of(inspected: Inspected) -> CaseStats:
    if inspected.stats is None:
        raise RuntimeError("a case without problems has no statistics")
    return inspected.stats


# ------------------------------------------------------------------------------------------------ checks


def _tried(case: Case, function, *arguments):  # type: ignore[no-untyped-def]
    """The function's result, or the UserError it raised as a problem of the case."""
    try:
        return function(*arguments)
    except UserError as error:
        return Problem(case.id, error.what, error.fix)


def _absent(case: Case, what: str, path: str, fix: str) -> Problem:
    """That a file is not there, or what it is a link to, and what to do about it."""
    fix = "It is a link: fetch the file that it leads to." if Path(path).is_symlink() else fix
    return Problem(case.id, f"{what} {path} does not exist.", fix)


def _channel(dataset: Dataset, number: int) -> str:
    return dataset.channels[number] if number < len(dataset.channels) else "not named"


def _image_problems(case: Case, dataset: Dataset, image_CZYX: np.ndarray) -> Iterator[Problem]:
    if len(image_CZYX) != len(dataset.channels):
        channels = f"{len(dataset.channels)} ({', '.join(dataset.channels)})"
        what = f"{case.images[0]} has {len(image_CZYX)} channel(s) instead of {channels}."
        yield Problem(case.id, what, "Save every image with the same channels.")
    for number, channel_ZYX in enumerate(image_CZYX):
        if not (np.isfinite(channel_ZYX.min()) and np.isfinite(channel_ZYX.max())):  # min and max pass NaN on
            count = int(np.count_nonzero(~np.isfinite(channel_ZYX)))
            what = f"channel {number} ({_channel(dataset, number)}) has {count} voxel(s) that are NaN or infinite"
            path = case.images[min(number, len(case.images) - 1)]
            yield Problem(case.id, f"{what}: {path}.", "Replace them by numbers.")


def _grid_problems(case: Case, image: Geometry, label: Geometry) -> Iterator[Problem]:
    """Same size, and corners within a twentieth of a voxel: header noise passes, a flipped axis does not."""
    fix = "Resample the label map to the image's grid, or remove the case."
    if image.size_voxels != label.size_voxels:
        what = f"the label map has {label.size_voxels} voxels (Z Y X), the image {image.size_voxels}"
        yield Problem(case.id, f"{what}: {case.label}.", fix)
        return
    if set(PHOTOGRAPHS) & {ending_of(case.images[0]), ending_of(str(case.label))}:
        return  # their headers hold a print size, no place in the patient
    apart_mm = displacement_mm(image, label)
    if not apart_mm <= SAME_GRID * min(image.spacing_mm):
        what = f"{_difference(image, label)}; corners lie up to {apart_mm:.3g} mm apart: {case.label}."
        fix = (
            "If only its header is wrong, give it the image's, in Python with SimpleITK: label.CopyInformation(image), "
            "and write it; else resample it to the image's grid."
        )
        yield Problem(case.id, what, fix)


def _difference(image: Geometry, label: Geometry) -> str:
    """The header field that differs most plainly."""
    for field in ("spacing_mm", "direction", "origin"):
        one, other = getattr(image, field), getattr(label, field)
        if len(one) != len(other) or not np.allclose(one, other, rtol=1e-4, atol=1e-4):
            shown = [tuple(round(value, 4) + 0.0 for value in values) for values in (other, one)]
            return f"{field} of the label map is {shown[0]}, of the image {shown[1]}"
    return "the label map lies on another grid than the image"


def _empty(stats: CaseStats) -> Iterator[Problem]:
    if not any(stats.class_voxels[1:]):
        yield Problem(stats.id, "its label map has no foreground.", "Is it the right file?", blocking=False)


def _no_foreground_at_all(dataset: Dataset, found: dict[str, Inspected]) -> list[Problem]:
    """Cases that would pass are problems when none of them has any foreground."""
    stats = [found[case.id].stats for case in dataset.cases]
    measured = [each for each in stats if each is not None]
    if any(any(each.class_voxels[1:]) for each in measured):
        return []
    what, fix = "its label map has no foreground, like all others.", "Are these the right files?"
    return [Problem(each.id, what, fix) for each in measured]
