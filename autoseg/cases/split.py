"""Which cases are learned from and which validate, fold by fold; cases of one group never stand on both sides."""

from collections.abc import Sequence

import numpy as np

from autoseg.errors import UserError
from autoseg.records import Case, Fold, Splits


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
