"""How a configuration is trained: optimizer, length, loss and augmentation.

Ranges of augmentation are nnU-Net's.
Axes: rotations and mirror axes are those of the patch (Z Y X, or Y X in 2D), after transposition. Labels tell sides of
the patient; along which axes of the files these lie is known from the cases' `patient_axes`.
"""

import re
from collections import Counter
from collections.abc import Sequence
from math import degrees, pi
from typing import Literal

from autoseg.planning.wording import some
from autoseg.records import AugmentSpec, CaseStats, Choice, Fingerprint, PatientAxes3, PatientAxis, TrainSpec, Voxels3

IN_PLANE_BEYOND = 3.0
"""A patch this many times longer than its first axis is turned in the plane only."""
SQUARE_UP_TO = 1.5
"""A 2D patch is turned freely as long as its axes differ by at most this factor."""
FEW_CASES, ENOUGH_CASES = 0.1, 20
"""A class in fewer cases than this share is drawn at a rate of its own, where there are so many cases."""
TUBES = ("vessel", "artery", "arteries", "vein", "airway", "bronch", "aorta", "nerve", "ureter")
Sampling = Literal["foreground", "class_balanced", "case_balanced", "hard"]
Optimizer = Literal["adamw", "muon", "sgd"]
Sided = tuple[PatientAxis, str]
"""A label that tells a side, behind the axis of the patient it tells it of."""
Orientation = tuple[PatientAxes3 | None, int]
"""How files lie in the patient (None: they do not say), and in how many cases."""
AXIAL: PatientAxes3 = (("head-foot",), ("front-back",), ("left-right",))
"""How files are taken to lie that do not say it."""


def choose_augment(
    patch_voxels: Sequence[int],
    axes: Voxels3,
    sided: Sequence[Sided],
    orientations: Sequence[Orientation] = ((None, 1),),
) -> tuple[AugmentSpec, tuple[Choice, ...]]:
    """Rotation range and mirror axes for a patch.

    Args:
        patch_voxels: Z Y X, or Y X.
        axes: those of the files, in the order of the patch; see `Configuration.axes`.
        sided: the labels that tell one side from the other; see `sided_labels`.
        orientations: how the files lie in the patient; see `orientations_of`.
    """
    rotation, in_plane, rotation_choice = _rotation(patch_voxels)
    mirror_axes, mirror_choice = _mirror_axes(len(patch_voxels), axes, sided, orientations)
    augment = AugmentSpec(rotation_rad=rotation, turn_in_plane_only=in_plane, mirror_axes=mirror_axes)
    return augment, (rotation_choice, mirror_choice)


def choose_train(augment: AugmentSpec, sampling: Sampling = "foreground", device: str = "cuda:0") -> TrainSpec:
    """The training of every configuration; commands may override it."""
    return TrainSpec(augment=augment, sampling=sampling, optimizer=choose_optimizer(device))


def choose_optimizer(device: str) -> Optimizer:
    """Muon where trainings are short, on CPUs; AdamW on GPUs: after enough steps both end alike."""
    return "muon" if device == "cpu" else "adamw"


def choose_sampling(fingerprint: Fingerprint) -> Sampling:
    """`class_balanced` where some class is in few cases: any case would be drawn for it as rarely as these are."""
    return "class_balanced" if few_cases_with(fingerprint) else "foreground"


def few_cases_with(fingerprint: Fingerprint) -> dict[str, int]:
    """Classes that fewer than `FEW_CASES` of the cases have, and how many these are; none in a small data set."""
    total = len(fingerprint.cases)
    found = {
        label.name: sum(case.class_voxels[k] > 0 for case in fingerprint.cases)
        for k, label in enumerate(fingerprint.labels)
    }
    return {name: count for name, count in found.items() if 0 < count < FEW_CASES * total and total >= ENOUGH_CASES}


def tubes(names: Sequence[str]) -> tuple[str, ...]:
    """Labels whose names tell of tubes."""
    return tuple(name for name in names if any(word.startswith(TUBES) for word in _words(name)))


def describe_train(train: TrainSpec) -> tuple[Choice, ...]:
    """Optimizer and length as choices."""
    return (
        Choice(
            field="train.optimizer",
            value=f"{train.optimizer}, learning rate {train.learning_rate:g}, weight decay {train.weight_decay:g}",
            because=f"{REASONS[train.optimizer]} {train.warmup_steps} warm-up steps, but no more than a fifth "
            "of the training, then (1 - share done)^0.9; weight decay is raised in shorter trainings.",
        ),
        Choice(
            field="train.epochs",
            value=f"{train.epochs} of {train.steps_per_epoch} steps",
            because="nnU-Net's length; --epochs or --max-time shorten it, and the learning rate still ends at 0.",
        ),
    )


REASONS: dict[Optimizer, str] = {
    "adamw": "a hippocampus Dice of 0.884 was reached with it in 15 minutes of 2 CPU cores, and Muon ended no higher.",
    "muon": "AdamW whose updates of convolutions are made orthogonal: hippocampus Dice 0.877 instead of 0.872 after "
    "1,000 steps, and 0.883 after 2,500 instead of about 6,000.",
    "sgd": "nnU-Net's optimizer.",
}


def sided_labels(names: Sequence[str]) -> tuple[Sided, ...]:
    """Labels whose names tell a side: the same name with left for right (or anterior for posterior, ..) exists too."""
    spellings = {_words(name) for name in names} | {name.lower() for name in names}
    return tuple((axis, name) for name in names for axis in _axes_told_by(name, spellings))


def orientations_of(cases: Sequence[CaseStats]) -> tuple[Orientation, ...]:
    """How the files of the cases lie in the patient, the most frequent first."""
    return tuple(Counter(case.patient_axes for case in cases).most_common())


def warn_of_mixed(sided: Sequence[Sided], orientations: Sequence[Orientation]) -> tuple[str, ...]:
    """A warning for each axis of the patient that labels tell sides of and that is not the same axis in all files."""
    warnings = []
    for told in dict.fromkeys(told for told, _ in sided):
        found: Counter[str] = Counter()
        for each, cases in orientations:
            found[" and ".join("ZYX"[axis] for axis in _file_axes(told, [(each, cases)]))] += cases
        if len(found) > 1:
            counts = ", ".join(f"{axes} in {cases}" for axes, cases in found.most_common())
            total = sum(found.values())
            lost = " or ".join("ZYX"[axis] for axis in _file_axes(told, orientations))
            warnings.append(
                f"The files lie in different ways: {told} is {counts} of {total} cases. {_names(told, sided)} "
                f"tell {SIDES[told]}, so there is no mirroring along {lost}. Saved in one orientation, the files would "
                "lose one axis only."
            )
    return tuple(warnings)


def _rotation(patch: Sequence[int]) -> tuple[tuple[float, ...], bool, Choice]:
    in_plane = False
    if len(patch) == 2:
        free = max(patch) / min(patch) <= SQUARE_UP_TO
        rotation: tuple[float, ...] = (pi if free else pi / 12,)
        uneven = f"the patch's sides differ by a factor of {max(patch) / min(patch):.2g}"
        because = f"{uneven}; up to {SQUARE_UP_TO} any turn is allowed."
    elif max(patch) / patch[0] > IN_PLANE_BEYOND:
        in_plane, rotation = True, (pi, 0.0, 0.0)
        because = (
            f"the patch is {max(patch) / patch[0]:.2g} times longer than thick, so it is only turned in its plane."
        )
    else:
        rotation = (pi / 6,) * 3
        because = f"nnU-Net's range where no side of the patch is over {IN_PLANE_BEYOND:g} times the first."
    value = " ".join(f"{degrees(each):.0f}" for each in rotation) + " degrees at most"
    return rotation, in_plane, Choice(field="train.augment.rotation_rad", value=value, because=because)


def _mirror_axes(
    dimension: int, axes: Voxels3, sided: Sequence[Sided], orientations: Sequence[Orientation]
) -> tuple[tuple[int, ...], Choice]:
    of_file = axes[3 - dimension :]
    along = {told: _file_axes(told, orientations) for told, _ in sided}
    lost = [(axis, told) for axis in of_file for told, file_axes in along.items() if axis in file_axes]
    mirrored = tuple(a for a in range(dimension) if of_file[a] not in dict(lost))
    names = (" ".join("ZYX"[of_file[a]] for a in mirrored) or "none") + " of the files"
    because = (
        "no label name tells left from right or front from back, so every axis may be mirrored. A training too "
        "short for it (mirror_from_patches) moves more patches instead, unless they are turned to all sides."
    )
    if lost:
        because = " ".join(
            f"{sum(each == told for each, _ in sided)} labels tell {SIDES[told]} ({_names(told, sided)}): mirroring "
            f"along {'ZYX'[axis]}, {_run(axis, told, orientations)}, would teach one as the other."
            for axis, told in lost
        )
    elif sided:
        telling = list(dict.fromkeys(name for _, name in sided))
        because = f"{some(telling)} tell a side, but along no axis of these slices."
    return mirrored, Choice(field="train.augment.mirror_axes", value=names, because=because)


def _file_axes(told: PatientAxis, orientations: Sequence[Orientation]) -> tuple[int, ...]:
    """The file axes (0 Z, 1 Y, 2 X) that run along this axis of the patient in any case."""
    return tuple(axis for axis in range(3) if any(told in (each or AXIAL)[axis] for each, _ in orientations))


def _run(axis: int, told: PatientAxis, orientations: Sequence[Orientation]) -> str:
    """How a file axis runs, e.g. "which is left-right in 3 of 20 cases"."""
    if all(each is None for each, _ in orientations):
        return "taken to run that way"
    along = [((each or AXIAL)[axis], cases) for each, cases in orientations if told in (each or AXIAL)[axis]]
    cases, total = sum(cases for _, cases in along), sum(cases for _, cases in orientations)
    partly = "partly " if all(len(axes) > 1 for axes, _ in along) else ""
    return f"which is {partly}{told} in " + ("these files" if cases == total else f"{cases} of {total} cases")


def _names(told: PatientAxis, sided: Sequence[Sided]) -> str:
    return some([name for axis, name in sided if axis == told])


def _words(name: str) -> tuple[str, ...]:
    spaced = re.sub(r"([a-z])([A-Z])", r"\1 \2", name)
    spaced = re.sub(r"(?<![A-Za-z])([LR])(?=[A-Z][a-z])", r"\1 ", spaced)  # LKidney
    return tuple(word for word in re.split(r"[^a-z0-9]+", spaced.lower()) if word)


def _axes_told_by(name: str, spellings: set[tuple[str, ...] | str]) -> tuple[PatientAxis, ...]:
    """The axes of the patient along which a mirrored label would get the name of another label.

    Words of three letters and more are found within others too, as in "leftkidney".
    """
    words, lower = _words(name), name.lower()
    told: list[PatientAxis] = []
    for axis, opposites in OPPOSITES.items():
        swapped = tuple(opposites.get(word, word) for word in words)
        parts = re.split("(" + "|".join(word for word in opposites if len(word) > 2) + ")", lower)
        respelled = "".join(opposites.get(part, part) for part in parts)
        if (swapped != words and swapped in spellings) or (respelled != lower and respelled in spellings):
            told.append(axis)
    return tuple(told)


SIDES: dict[PatientAxis, str] = {
    "head-foot": "above from below",
    "front-back": "front from back",
    "left-right": "left from right",
}
OPPOSITES: dict[PatientAxis, dict[str, str]] = {
    "left-right": {
        "left": "right", "l": "r", "lt": "rt", "lh": "rh", "lhs": "rhs", "sinister": "dexter", "links": "rechts",
    },
    "front-back": {"anterior": "posterior", "ant": "post", "front": "back", "ventral": "dorsal"},
    "head-foot": {
        "superior": "inferior", "sup": "inf", "upper": "lower", "cranial": "caudal", "top": "bottom",
    },
}  # fmt: skip
for _pairs in OPPOSITES.values():
    _pairs |= {other: word for word, other in _pairs.items()}
"""Per axis of the patient: words in label names, and the word of the opposite side."""
