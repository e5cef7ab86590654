"""cases/split.py: folds over cases and groups."""

import json
from pathlib import Path

import numpy as np
import pytest

from autoseg.cases.split import make_splits, splits_for
from autoseg.errors import UserError
from autoseg.records import Case, Dataset, Fold, Label, LeftOut


def cases_of(count: int, groups: dict[int, str] | None = None) -> list[Case]:
    return [
        Case(id=f"case_{n:03d}", images=("i.nii.gz",), label="l.nii.gz", group=(groups or {}).get(n))
        for n in range(count)
    ]


def test_every_case_validates_exactly_once_and_never_trains_in_the_same_fold() -> None:
    splits = make_splits(cases_of(23))
    assert len(splits.folds) == 5
    assert not splits.grouped
    assert sorted(i for fold in splits.folds for i in fold.validation) == [f"case_{n:03d}" for n in range(23)]
    for fold in splits.folds:
        assert not set(fold.train) & set(fold.validation)
        assert len(fold.train) + len(fold.validation) == 23
        assert 4 <= len(fold.validation) <= 5


def test_the_folds_are_those_of_a_shuffled_kfold_with_the_same_seed() -> None:
    order = np.arange(12)
    np.random.RandomState(12345).shuffle(order)
    first = sorted(f"case_{n:03d}" for n in order[:3])  # 12 cases in 5 folds: 3, 3, 2, 2, 2
    assert list(make_splits(cases_of(12)).folds[0].validation) == first


def test_the_order_of_the_cases_does_not_matter_but_the_seed_does() -> None:
    cases = cases_of(20)
    assert make_splits(cases) == make_splits(cases[::-1])
    assert make_splits(cases).folds != make_splits(cases, seed=1).folds


def test_cases_of_one_group_stay_on_one_side_and_folds_stay_balanced() -> None:
    groups = {n: f"patient_{n // 3}" for n in range(24)}  # 8 patients of 3, then 6 cases without a group
    splits = make_splits(cases_of(30, groups))
    assert splits.grouped
    for fold in splits.folds:
        of_train, of_validation = ({groups.get(int(i[-3:]), i) for i in ids} for ids in (fold.train, fold.validation))
        assert not of_train & of_validation
        assert 5 <= len(fold.validation) <= 7
    assert sorted(i for fold in splits.folds for i in fold.validation) == [f"case_{n:03d}" for n in range(30)]


def test_fewer_cases_or_groups_than_folds_give_fewer_folds() -> None:
    assert [len(fold.validation) for fold in make_splits(cases_of(3)).folds] == [1, 1, 1]
    assert len(make_splits(cases_of(10, {n: str(n % 2) for n in range(10)})).folds) == 2


def a_dataset(folder: Path) -> Dataset:
    """Cases a to d with labels and e without, f left out; a and b are of one patient."""
    groups = {"a": "patient", "b": "patient"}
    cases = tuple(
        Case(id=i, images=(str(folder / "imagesTr" / i),), label=None if i == "e" else i, group=groups.get(i))
        for i in "abcde"
    )
    labels = (Label(name="background", value=0), Label(name="organ", value=1))
    left_out = (LeftOut(id="f", problem="unreadable"),)
    return Dataset(name="x", dimension=3, channels=("MRI",), labels=labels, cases=cases, left_out=left_out)


def test_a_data_set_s_own_folds_are_taken_as_nnunet_writes_them(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    assert len(splits_for(dataset).folds) == 3  # made: a and b go together
    folds = [{"train": ["a", "b", "f"], "val": ["c", "d"]}, {"train": ["c", "d"], "val": ["a", "b"]}]
    (tmp_path / "splits_final.json").write_text(json.dumps(folds))
    splits = splits_for(dataset)
    assert splits.folds[0] == Fold(train=("a", "b"), validation=("c", "d"))
    assert len(splits.folds) == 2
    assert splits.grouped
    (tmp_path / "splits_final.json").write_text(json.dumps([{"train": ["a"], "val": ["b"]}]))
    assert not splits_for(dataset).grouped


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('[{"train": ["a"], "val": ["x"]}]', "fold 0 names x"),
        ('[{"train": ["a"], "val": ["e"]}]', "no labelled case is called that"),
        ('[{"train": ["a", "b"], "val": ["b"]}]', "learns from b and validates on it"),
        ('[{"train": ["a"], "val": ["b"]}, {"train": ["a"], "val": ["f"]}]', "fold 1 has no case to validate on"),
        ("[]", "lists no fold"), ('{"train": []}', "holds no folds"), ('[{"train": ["a"]}]', "holds no folds"),
        ('[{"train": [1], "val": ["b"]}]', "holds no folds"), ("[", "holds no folds"),
    ],
)  # fmt: skip
def test_own_folds_that_do_not_fit_are_refused(content: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "splits_final.json").write_text(content)
    with pytest.raises(UserError, match=problem):
        splits_for(a_dataset(tmp_path))


def test_cases_without_a_label_map_are_not_split() -> None:
    unlabelled = Case(id="x", images=("i.nii.gz",))
    assert all("x" not in (*fold.train, *fold.validation) for fold in make_splits([*cases_of(5), unlabelled]).folds)


@pytest.mark.parametrize("cases", [cases_of(0), cases_of(1), cases_of(4, dict.fromkeys(range(4), "same"))])
def test_too_little_to_split_is_said(cases: list[Case]) -> None:
    with pytest.raises(UserError, match="cannot be split"):
        make_splits(cases)
