"""What a data set is: its cases with their channels, labels and groups.

These are written down or can be found out.
`listing` finds the cases' files, `inspect` reads and checks them. Two are read here: a label map for its values when
nobody named them, and one image when nobody said how many channels there are.
A case that has two files for the same thing is named in `Dataset.left_out`, for `inspect` to report.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from autoseg.cases.description import (
    channel_names,
    read_description,
    read_label_names,
    read_regions,
    with_annotated,
    with_groups,
)
from autoseg.cases.listing import list_cases, read_or_none
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Started, Warned, silent
from autoseg.image.formats import (
    JPEG,
    PHOTOGRAPHS,
    TIFF,
    ending_of,
    label_ending,
    read_geometry,
    read_image,
    read_labels,
)
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import Case, Dataset, Label, LeftOut

MOST_LABELS = 1000
"""More values than this in unnamed label maps mean that they are no label maps."""

MANY_VALUES = 10
"""Fewer values in label maps are taken for classes, whatever their shares."""

READING = "read label values"

HEADERS_TO_TRY = 5
"""Images to look at for the dimension; `inspect` sees them all and has the last word."""


def discover(folder: Path, workers: int | None = None, report: Report = silent) -> Dataset:
    """The data set in `folder`; `left_out` names those of its cases that have two files for the same thing.

    Args:
        folder: of one of the layouts in `listing.ACCEPTED`. `groups.csv` (case,group) or 'patients' in dataset.json
            keep the cases of one patient together in the splits.
        workers: processes for reading label values where none are named; None takes all allowed cores.

    Raises:
        UserError: no accepted layout, no case, no label map at all, a broken dataset.json, or a name that no case can
            have or that differs from another in upper and lower case alone.
    """
    folder = Path(folder).absolute()
    cases, clashes = list_cases(folder)
    description, where = read_description(folder / "dataset.json") or {}, str(folder / "dataset.json")
    cases = with_groups(folder, description, cases)
    _refuse_lossy_labels(cases)
    if named := bool(description.get("labels")):
        labels, ignore_value = read_label_names(description, where)
    else:
        labels, ignore_value = _labels_found(folder, cases, workers or allowed_cores(), report), None
    regions = read_regions(description, where) if named else ()
    cases = with_annotated(folder, description, cases, regions or labels[1:])
    return Dataset(
        name=str(description.get("name") or folder.name),
        dimension=_dimension(cases),
        channels=channel_names(description) or _default_channels(cases),
        labels=labels,
        regions=regions,
        ignore_value=ignore_value,
        file_ending=_ending_for_results(cases),
        cases=cases,
        left_out=tuple(LeftOut(id=case, problem=what) for case, what in clashes.items()),
    )


def _labels_found(folder: Path, cases: Sequence[Case], workers: int, report: Report) -> tuple[Label, ...]:
    """Labels from the values in the files; files that cannot be read are left for `inspect` to report."""
    paths = [case.label for case in cases if case.label is not None]
    if not paths:
        raise UserError(
            f"{folder}: none of the {len(cases)} images has a label map.",
            fix="A label map has the name of its image: case.nii.gz in images/, case.nii.gz in labels/.",
        )
    report(Started(READING, of=len(paths)))
    values = Counter({0: 0})
    unreadable = 0
    for done, (_, found) in enumerate(over_cases(label_values, paths, workers, str, head_start_seconds=1.0), 1):
        values.update(found or {})
        unreadable += found is None
        report(Advanced(READING, done=done, of=len(paths)))
        if len(values) > MOST_LABELS:
            raise UserError(
                f"{paths[0]} and the other label maps hold more than {MOST_LABELS} values.",
                fix="Are these images? Label maps hold one whole number per class.",
            )
    report(Finished(READING))
    if len(values) < 2 and not unreadable:
        raise UserError(f"{folder}: the {len(paths)} label map(s) hold nothing but 0.", fix="Is this the right folder?")
    if any(ending_of(path) in PHOTOGRAPHS for path in paths) and _look_anti_aliased(values):
        report(Warned(
            f"{folder}: the label maps hold {len(values)} values, and most of what is not 0 is {max(values)}. They "
            "look anti-aliased: threshold the masks, or name the values in dataset.json."
        ))  # fmt: skip
    if len(values) < 2:
        values[1] = 0  # stands for what the unreadable files may hold: `inspect` refuses them, and a set without any
    return tuple(Label(name="background" if v == 0 else f"class_{v}", value=v) for v in sorted(values, key=_zero_first))


def _look_anti_aliased(voxels: Counter[int]) -> bool:
    """Whether values are those of a mask that was resized smoothly: many below the largest, which most voxels have."""
    foreground = voxels.total() - voxels[0]
    return len(voxels) >= MANY_VALUES and min(voxels) == 0 and voxels[max(voxels)] > foreground / 2


def _refuse_lossy_labels(cases: Sequence[Case]) -> None:
    lossy = [case.label for case in cases if case.label and ending_of(case.label) in JPEG]
    if lossy:
        raise UserError(
            f"{lossy[0]}: JPEG blurs label maps, {len(lossy)} of {len(cases)} are such files.",
            fix="Save them as PNG with one whole number per class, such as 0 and 1 below and above a half.",
        )


def _zero_first(value: int) -> tuple[bool, int]:
    return value != 0, value


def label_values(path: str) -> dict[int, int] | None:
    """The values in one label map and how many voxels have each; None when it cannot be read."""
    try:
        labels_ZYX, _ = read_labels(path)
    except UserError:
        return None
    low, high = int(labels_ZYX.min()), int(labels_ZYX.max())
    if high - low < 2**20:
        counts = np.bincount((labels_ZYX - low).ravel())
        return {int(value) + low: int(counts[value]) for value in np.flatnonzero(counts)}
    values, counts = np.unique(labels_ZYX, return_counts=True)
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def _dimension(cases: Sequence[Case]) -> Literal[2, 3]:
    """2 when the first readable images have one slice each."""
    readable = 0
    for case in cases:
        if ending_of(case.images[0]) in PHOTOGRAPHS and ending_of(case.images[0]) not in TIFF:
            return 2
        if (geometry := read_or_none(read_geometry, case.images[0])) is not None:
            readable += 1
            if geometry.size_voxels[0] > 1:
                return 3
            if readable == HEADERS_TO_TRY:
                break
    return 2 if readable else 3


def _default_channels(cases: Sequence[Case]) -> tuple[str, ...]:
    """Names from the number of channels in the first readable case."""
    count = max(len(case.images) for case in cases)
    if count == 1:
        volume = next(filter(None, (read_or_none(read_image, case.images) for case in cases)), None)
        count = 1 if volume is None else len(volume.array_CZYX)
        if count == 3:
            return "red", "green", "blue"
    return ("image",) if count == 1 else tuple(f"channel_{number}" for number in range(count))


def _ending_for_results(cases: Sequence[Case]) -> str:
    """The most frequent ending of the label maps, else of the images; what cannot hold labels is replaced."""
    paths = [case.label for case in cases if case.label] or [case.images[0] for case in cases]
    endings = [label_ending(ending_of(path)) for path in paths]
    return max(sorted(set(endings)), key=endings.count)
