"""Which cases are learned from and which validate, fold by fold. Cases of one group never stand on both sides."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from autoseg.cases.description import composed
from autoseg.errors import UserError
from autoseg.records import Case, Dataset, Fold, Splits

OWN_FOLDS = "splits_final.json"
"""Folds that come with a data set, as nnU-Net writes them: [{"train": [ids], "val": [ids]}, ...]."""


def splits_for(dataset: Dataset) -> Splits:
    """The folds of `splits_final.json` beside the image folder, where there is one, else those of `make_splits`.

    Cases that were left out of the data set are left out of the folds.

    Raises:
        UserError: fewer than two cases or groups; a file with another content, an unknown or unlabelled case, one on
            both sides of a fold, or a side without any.
    """
    file = own_folds(dataset)
    return make_splits(dataset.cases) if file is None else _read(file, dataset)


def own_folds(dataset: Dataset) -> Path | None:
    """The `splits_final.json` that lies beside the data set's image folder, None where there is none."""
    beside = {Path(case.images[0]).parent.parent / OWN_FOLDS for case in dataset.cases}
    return next((path for path in sorted(beside) if path.is_file()), None)


def _read(file: Path, dataset: Dataset) -> Splits:
    left_out, ids = {case.id for case in dataset.left_out}, {composed(case.id): case.id for case in dataset.cases}
    ids |= {composed(case): case for case in left_out}

    def kept(named: Sequence[str]) -> tuple[str, ...]:
        found = (ids.get(composed(each), each) for each in named)
        return tuple(each for each in found if each not in left_out)

    try:
        folds = tuple(
            Fold(train=kept(fold["train"]), validation=kept(fold["val"]))
            for fold in json.loads(file.read_text())
        )
    except (ValueError, TypeError, KeyError) as error:  # those of json and pydantic are ValueErrors
        raise UserError(
            f"{file}: it holds no folds as nnU-Net writes them.",
            fix='It should be [{"train": ["case_1", ...], "val": ["case_2", ...]}, ...]; or remove it.',
        ) from error
    if problem := _problem(folds, {case.id for case in dataset.cases if case.label is not None}):
        raise UserError(f"{file}: {problem}.", fix="Correct it, or remove it to have folds made.")
    grouped = any(case.group for case in dataset.cases)
    torn = any(groups_on_both_sides(fold, dataset.cases) for fold in folds)
    return Splits(seed=0, grouped=grouped and not torn, folds=folds)


def _problem(folds: Sequence[Fold], labelled: set[str]) -> str:
    """What is wrong with the first wrong fold; empty where all are right."""
    for number, fold in enumerate(folds):
        train, validation = set(fold.train), set(fold.validation)
        if unknown := sorted((train | validation) - labelled):
            return f"fold {number} names {unknown[0]}, but no labelled case is called that"
        if both := sorted(train & validation):
            return f"fold {number} learns from {both[0]} and validates on it"
        if not (train and validation):
            return f"fold {number} has no case to {'validate on' if train else 'learn from'}"
    return "" if folds else "it lists no fold"


def groups_on_both_sides(fold: Fold, cases: Sequence[Case]) -> set[str]:
    """Groups of which some cases are learned from and others validate."""
    group = {case.id: case.group for case in cases if case.group}
    train, validation = ({group[each] for each in side if each in group} for side in (fold.train, fold.validation))
    return train & validation


def make_splits(cases: Sequence[Case], folds: int = 5, seed: int = 12345) -> Splits:
    """A shuffled cross-validation over the labelled cases; every case validates in exactly one fold.

    The order of `cases` does not matter, only their ids. Without groups the folds are those of scikit-learn's
    `KFold(folds, shuffle=True, random_state=seed)` over the sorted ids, and with that the ones that nnU-Net makes. With
    groups (a case without one stands for itself) the shuffled groups, largest first, go to the smallest fold each.
    Fewer groups than folds give as many folds as groups.

    Raises:
        UserError: fewer than two cases or groups.
    """
    labelled = sorted((case for case in cases if case.label is not None), key=lambda case: case.id)
    members: dict[str, list[str]] = {}
    for case in labelled:
        members.setdefault(f"group {case.group}" if case.group is not None else f"case {case.id}", []).append(case.id)
    grouped = any(case.group is not None for case in labelled)
    if len(members) < 2:
        raise UserError(
            f"{len(members)} labelled {'group' if grouped else 'case'}(s) cannot be split in two.",
            fix="Give at least two.",
        )
    folds = max(2, min(folds, len(members)))
    order = np.arange(len(members))
    np.random.RandomState(seed).shuffle(order)
    shuffled = [sorted(members)[index] for index in order]
    parts = _balanced(shuffled, members, folds) if grouped else np.array_split(shuffled, folds)
    ids = [case.id for case in labelled]
    held_out = [{member for group in part for member in members[group]} for part in parts]
    return Splits(
        seed=seed,
        grouped=grouped,
        folds=tuple(
            Fold(train=tuple(i for i in ids if i not in out), validation=tuple(i for i in ids if i in out))
            for out in held_out
        ),
    )


def _balanced(shuffled: Sequence[str], members: dict[str, list[str]], folds: int) -> list[list[str]]:
    """Groups spread over the folds so that the numbers of cases differ little; none of the folds stays empty."""
    parts: list[list[str]] = [[] for _ in range(folds)]
    sizes = [0] * folds
    for group in sorted(shuffled, key=lambda group: -len(members[group])):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(group)
        sizes[smallest] += len(members[group])
    return parts
