"""cases/cache.py and steps/preprocess.py: what is kept, what is made anew, and what a killed process leaves."""

import os
import pickle
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from planned import INTENSITIES, a_configuration, a_plan

from autoseg import store
from autoseg.cases import cache
from autoseg.cases.cache import PREPROCESSING, is_current, key_of, open_case, stamp_of, write
from autoseg.cases.exchange import input_file, is_unchanged
from autoseg.cases.inspect import content_of
from autoseg.cases.prepare import Prepared, class_locations, prepare
from autoseg.errors import UserError
from autoseg.events import Advanced, Event
from autoseg.image.companions import files_of
from autoseg.image.formats import read_image, read_labels, write_labels
from autoseg.image.volume import plain_geometry
from autoseg.layout import CachedFiles, Layout
from autoseg.parallel import over_cases
from autoseg.records import (
    AugmentSpec,
    Case,
    Configuration,
    Dataset,
    Fold,
    Label,
    Plan,
    Resampling,
    Splits,
    TrainSpec,
)
from autoseg.steps.preprocess import keep_or_make_splits, preprocess
from autoseg.store import save


def a_prepared(image_CZYX: np.ndarray, labels_ZYX: np.ndarray | None = None) -> Prepared:
    shape = image_CZYX.shape[1:]
    box = tuple((0, size) for size in shape)
    return Prepared(image_CZYX, labels_ZYX, box, shape, (1.0, 1.0, 1.0), plain_geometry(shape, (1.0, 1.0, 1.0)))  # type: ignore[arg-type]


def noise(channels: int = 2) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    image = generator.normal(0, 1, (channels, 21, 34, 40)).astype(np.float32)
    return image, generator.integers(-1, 3, (21, 34, 40)).astype(np.int16)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    image, labels = noise()
    locations = class_locations(labels, 3, seed=0)
    write(tmp_path, "a", a_prepared(image, labels), locations, "key", patch_voxels=(8, 16, 16))
    case = open_case(tmp_path, "a")
    read_image_CZYX, read_labels_ZYX = case.read()
    assert (case.shape, case.channels) == ((21, 34, 40), 2)
    assert (read_image_CZYX.dtype, read_labels_ZYX.dtype) == (np.float32, np.int16)
    np.testing.assert_array_equal(read_labels_ZYX, labels)
    np.testing.assert_allclose(read_image_CZYX, image, rtol=2**-11, atol=1e-7)
    assert sorted(case.locations) == sorted(locations)
    for index, places in locations.items():
        np.testing.assert_array_equal(case.locations[index], places)
        assert case.locations[index].dtype == np.int32


@pytest.mark.parametrize("patch_voxels", [(8, 16, 16), (16, 16), ()])
def test_a_part_is_what_the_whole_holds_there(tmp_path: Path, patch_voxels: tuple[int, ...]) -> None:
    image, labels = noise()
    write(tmp_path, "a", a_prepared(image, labels), {}, "key", patch_voxels=patch_voxels)
    case = open_case(tmp_path, "a")
    whole = case.read()
    part = case.read(((3, 19), (0, 30), (39, 40)))
    np.testing.assert_array_equal(part[0], whole[0][:, 3:19, 0:30, 39:40])
    np.testing.assert_array_equal(part[1], whole[1][3:19, 0:30, 39:40])
    with pytest.raises(ValueError, match="does not lie inside"):
        case.read(((3, 22), (0, 30), (39, 40)))


@pytest.mark.parametrize("image", [np.float32([[[[1e6, 2e6, 3e6]]]]), 30_000 + np.float32([[[[0, 0.5, 1.0, 1.5]]]])])
def test_intensities_that_half_precision_would_spoil_are_kept_exactly(tmp_path: Path, image: np.ndarray) -> None:
    write(tmp_path, "a", a_prepared(image), {}, "key")
    case = open_case(tmp_path, "a")
    np.testing.assert_array_equal(case.read()[0], image)
    assert (case.read()[1] == -1).all()  # without a label map nothing is annotated


def test_a_case_travels_to_another_process_after_it_was_read(tmp_path: Path) -> None:
    image, labels = noise(1)
    write(tmp_path, "a", a_prepared(image, labels), {}, "key")
    case = open_case(tmp_path, "a")
    before = case.read()
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(case)).read()[0], before[0])  # noqa: S301


def test_a_case_that_is_preprocessed_otherwise_while_in_use_is_refused(tmp_path: Path) -> None:
    image, labels = noise()
    write(tmp_path, "a", a_prepared(image, labels), {}, "key")
    early, late, gone = (open_case(tmp_path, "a") for _ in range(3))
    before = early.read()[0]
    write(tmp_path, "a", a_prepared(image + 1, labels), {}, "other key")
    np.testing.assert_array_equal(early.read()[0], before)  # its files are open
    for read in (late.read, lambda: early.locations):
        with pytest.raises(UserError, match=r"case a was preprocessed otherwise.*--resume"):
            read()
    for path in tmp_path.iterdir():
        path.unlink()
    with pytest.raises(UserError, match="case a was preprocessed otherwise, or removed"):
        gone.read()


def test_few_files_stay_open_and_all_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "allowed_open_files", lambda: 6)
    monkeypatch.setattr(cache, "OPEN", deque())
    cases = []
    for number in range(5):
        write(tmp_path, f"c{number}", a_prepared(np.full((1, 4, 5, 6), number, np.float32)), {}, "key")
        cases.append(open_case(tmp_path, f"c{number}"))
    for _ in range(2):
        for number, case in enumerate(cases):
            assert (case.read()[0] == number).all()
            assert sum("_array" in each.__dict__ for one in cases for each in (one._image, one._labels)) <= 3


def test_a_case_counts_only_when_whole_and_of_the_same_key(tmp_path: Path) -> None:
    image, labels = noise(1)
    assert not is_current(tmp_path, "a", "key")
    write(tmp_path, "a", a_prepared(image, labels), {}, "key")
    assert is_current(tmp_path, "a", "key")
    assert not is_current(tmp_path, "a", "other")
    CachedFiles(tmp_path, "a").image.write_bytes(b"")  # what a power failure may leave
    assert not is_current(tmp_path, "a", "key")
    with pytest.raises(UserError, match="case a is not preprocessed"):
        open_case(tmp_path, "a")


def test_voxels_beside_their_header_are_part_of_a_case(tmp_path: Path) -> None:
    """The header of an .mhd file stays the same where its .raw file changes."""
    sitk.WriteImage(sitk.GetImageFromArray(np.zeros((3, 4, 5), np.uint8)), str(tmp_path / "lab.mhd"))
    case = Case(id="a", images=(str(tmp_path / "lab.mhd"),), label=str(tmp_path / "lab.mhd"))
    before = (stamp_of(case), content_of(case, (), None), input_file(tmp_path / "lab.mhd"))
    assert is_unchanged(tmp_path / "lab.mhd", before[2])
    raw = tmp_path / "lab.raw"
    raw.write_bytes(b"\1" * raw.stat().st_size)
    os.utime(raw, ns=(2**61, 2**61))  # later, whatever the clock's resolution
    after = (stamp_of(case), content_of(case, (), None), input_file(tmp_path / "lab.mhd"))
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert not is_unchanged(tmp_path / "lab.mhd", before[2])


@pytest.mark.parametrize(
    ("named", "files"),
    [
        ("LOCAL", []), ("a.raw", ["a.raw"]), ("gone.raw", []), ("s%02d.raw 1 3 2", ["s01.raw", "s03.raw"]),
        ("LIST\na.raw\ns02.raw", ["a.raw", "s02.raw"]),
    ],
)
def test_the_files_that_a_header_names(tmp_path: Path, named: str, files: list[str]) -> None:
    for name in ("a.raw", "s01.raw", "s02.raw", "s03.raw"):
        (tmp_path / name).touch()
    (tmp_path / "x.mhd").write_text(f"ObjectType = Image\nElementDataFile = {named}\n")
    assert files_of(tmp_path / "x.mhd") == (tmp_path / "x.mhd", *(tmp_path / name for name in files))


def test_a_case_that_is_there_is_not_written_again(tmp_path: Path) -> None:
    """Two trainings that start at once prepare the same cases: the slower one must not take the mark away."""
    write(tmp_path, "a", a_prepared(noise()[0]), {}, "key")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    write(tmp_path, "a", a_prepared(noise()[0]), {}, "key")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_a_writer_that_stops_half_way_leaves_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, labels = noise(1)
    write(tmp_path, "a", a_prepared(image, labels), {}, "old")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("autoseg.cases.cache.save", stop)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, "a", a_prepared(image, labels), {}, "new")
    assert not is_current(tmp_path, "a", "old")
    assert not is_current(tmp_path, "a", "new")


def test_the_key_follows_what_decides_and_nothing_else() -> None:
    plan, configuration = a_plan(), a_configuration()
    key = key_of("content", plan, configuration)
    assert key == key_of("content", plan, configuration.model_copy(update={"name": "other", "batch_size": 7}))
    assert key == key_of("content", plan, configuration.model_copy(update={"train": TrainSpec(augment=AugmentSpec(
        rotation_rad=(0.1,) * 3, noise_chance=1.0
    ))}))  # fmt: skip
    assert key != key_of("changed", plan, configuration)


@pytest.mark.parametrize(
    "change",
    [
        {"spacing_mm": (2.0, 1.0, 1.0)}, {"normalization": ("ct",)}, {"axes": (1, 0, 2)}, {"patch_voxels": (8, 8, 16)},
        {"mask_for_normalization": (True,)}, {"resampling": Resampling(image_order=1)},
        {"resampling": Resampling(label_order=0)}, {"resampling": Resampling(anisotropy=2.0)},
    ],
    ids=str,
)  # fmt: skip
def test_the_key_follows_every_field_of_a_configuration_that_decides(change: dict) -> None:
    plan, configuration = a_plan(), a_configuration()
    assert key_of("c", plan, configuration) != key_of("c", plan, configuration.model_copy(update=change))


@pytest.mark.parametrize(
    "change",
    [
        {"ignore_value": 3}, {"intensities": (INTENSITIES.model_copy(update={"std": 3.0}),)},
        {"labels": tuple(Label(name=f"label_{value}", value=value) for value in (0, 5, 8))},
        {"labels": tuple(Label(name=f"label_{value}", value=value) for value in (0, 9, 5))},
    ],
    ids=str,
)  # fmt: skip
def test_the_key_follows_every_field_of_a_plan_that_decides(change: dict) -> None:
    plan, configuration = a_plan(), a_configuration()
    assert key_of("c", plan, configuration) != key_of("c", plan.model_copy(update=change), configuration)


def test_the_key_follows_the_version_of_the_preprocessing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key_of("c", a_plan(), a_configuration())
    monkeypatch.setattr("autoseg.cases.cache.PREPROCESSING", PREPROCESSING + 1)
    assert key_of("c", a_plan(), a_configuration()) != before


# ------------------------------------------------------------------------------------------------ steps/preprocess.py


def a_run(folder: Path, cases: int = 4, configurations: tuple[Configuration, ...] = ()) -> tuple[Path, Dataset, Plan]:
    generator = np.random.default_rng(0)
    found = []
    for n in range(cases):
        paths = [folder / "data" / f"{kind}_{n}.nii.gz" for kind in ("image", "label")]
        labels = np.zeros((6, 7, 8), np.int32)
        labels[2:4, 2:5, 2:6], labels[4, 2:5, 2:6] = 5, 9
        geometry = plain_geometry((6, 7, 8), (1.0, 1.0, 1.0))
        write_labels(paths[0], generator.integers(1, 100, (6, 7, 8)), geometry)
        write_labels(paths[1], labels, geometry)
        found.append(Case(id=f"c{n}", images=(str(paths[0]),), label=str(paths[1])))
    plan = a_plan(*configurations)
    dataset = Dataset(name="toy", dimension=3, channels=plan.channels, labels=plan.labels, cases=tuple(found))
    store.save(Layout(folder / "run").dataset, dataset)
    store.save(Layout(folder / "run").plan, plan)
    return folder / "run", dataset, plan


def ages(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.b2nd")}


def test_preprocessing_writes_what_prepare_gives_and_the_splits(tmp_path: Path) -> None:
    slices = a_configuration(name="2d", dimension=2, spacing_mm=(None, 2.0, 2.0))
    run, dataset, plan = a_run(tmp_path, configurations=(a_configuration(), slices))
    events: list[Event] = []
    preprocess(run, workers=1, report=events.append)
    for configuration in plan.configurations:
        for case in dataset.cases:
            wanted = prepare(read_image(case.images), read_labels(case.label)[0], plan, configuration)
            stored = open_case(Layout(run).cache(configuration.name), case.id)
            np.testing.assert_allclose(stored.read()[0], wanted.image_CZYX, atol=2e-3)
            np.testing.assert_array_equal(stored.read()[1], wanted.labels_ZYX)
            assert sorted(stored.locations) == [1, 2]
    assert len(store.load(Layout(run).splits, Splits).folds) == 4
    assert [event.done for event in events if isinstance(event, Advanced)] == [1, 2, 3, 4]


def test_worker_processes_give_the_same_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _, _ = a_run(tmp_path, cases=12)
    preprocess(run, workers=1)
    folder = Layout(run).cache("3d")
    one = {path.name: path.read_bytes() for path in folder.iterdir()}
    for path in folder.iterdir():
        path.unlink()

    def without_head_start(*arguments: Any, **options: Any) -> Any:
        return over_cases(*arguments, **(options | {"head_start_seconds": 0.0}))

    monkeypatch.setattr("autoseg.steps.preprocess.over_cases", without_head_start)
    preprocess(run, workers=2)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == one


def test_a_second_run_changes_nothing_and_a_changed_file_only_its_own_case(tmp_path: Path) -> None:
    run, dataset, _ = a_run(tmp_path)
    preprocess(run, workers=1)
    before = ages(Layout(run).cache("3d"))
    os.utime(dataset.cases[0].images[0])  # touched, not changed
    image, geometry = read_labels(dataset.cases[1].images[0])
    write_labels(dataset.cases[1].images[0], image + 1, geometry)
    preprocess(run, workers=1)
    after = ages(Layout(run).cache("3d"))
    assert {name for name in after if after[name] != before[name]} == {"c1.image.b2nd", "c1.labels.b2nd"}


def test_an_image_that_became_nan_since_it_was_checked_is_named(tmp_path: Path) -> None:
    run, dataset, _ = a_run(tmp_path)
    image = dataset.cases[0].images[0]
    volume = sitk.Cast(sitk.ReadImage(image), sitk.sitkFloat32)
    volume.SetPixel(0, 0, 0, float("nan"))
    sitk.WriteImage(volume, image)
    with pytest.raises(UserError, match=f"{image}.* 1 voxel.s. that are NaN"):
        preprocess(run, workers=1)


def test_a_changed_plan_makes_only_its_configuration_anew(tmp_path: Path) -> None:
    other = a_configuration(name="low", spacing_mm=(2.0, 2.0, 2.0))
    run, _, plan = a_run(tmp_path, configurations=(a_configuration(), other))
    preprocess(run, workers=1)
    before = {name: ages(Layout(run).cache(name)) for name in ("3d", "low")}
    lower = other.model_copy(update={"spacing_mm": (1.5, 1.5, 1.5)})
    store.save(Layout(run).plan, plan.model_copy(update={"configurations": (plan.configurations[0], lower)}))
    preprocess(run, workers=1)
    after = {name: ages(Layout(run).cache(name)) for name in ("3d", "low")}
    assert after["3d"] == before["3d"]
    assert all(after["low"][name] != before["low"][name] for name in before["low"])


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    run, _, _ = a_run(tmp_path)
    folder = Layout(run).cache("3d")
    preprocess(run, workers=1)
    before = ages(folder)
    CachedFiles(folder, "c2").mark.unlink()  # as if killed before the last file of this case
    stale = folder / f"c2.image.b2nd{store.TEMPORARY}-1-abc"
    stale.write_bytes(b"half")
    preprocess(run, workers=1)
    assert {name[:2] for name, age in ages(folder).items() if age != before[name]} == {"c2"}
    assert not stale.exists()
    assert open_case(folder, "c2").shape == (6, 7, 8)


def test_only_the_named_configuration_is_prepared_and_a_wrong_name_is_refused(tmp_path: Path) -> None:
    run, _, _ = a_run(tmp_path, configurations=(a_configuration(), a_configuration(name="low")))
    preprocess(run, configuration="low", workers=1)
    assert not Layout(run).cache("3d").exists()
    assert Layout(run).cache("low").is_dir()
    with pytest.raises(UserError, match="Choose one of: 3d, low"):
        preprocess(run, configuration="4d", workers=1)


def test_groups_that_splits_tear_apart_are_warned_of(tmp_path: Path) -> None:
    layout, said = Layout(tmp_path), []
    groups = {"a": "1", "b": "1", "c": "2", "d": "2"}
    cases = tuple(Case(id=name, images=("x",), label="y", group=group) for name, group in groups.items())
    labels = (Label(name="background", value=0), Label(name="organ", value=1))
    dataset = Dataset(name="x", dimension=3, channels=("MRI",), labels=labels, cases=cases)
    save(layout.splits, Splits(seed=0, grouped=False, folds=(Fold(train=("a", "c"), validation=("b", "d")),)))
    keep_or_make_splits(layout, dataset, said.append)
    assert any("fold 0 validates on groups that it learns from, e.g. 1" in getattr(each, "text", "") for each in said)
    said.clear()
    save(layout.splits, Splits(seed=0, grouped=True, folds=(Fold(train=("a", "b"), validation=("c", "d")),)))
    keep_or_make_splits(layout, dataset, said.append)
    assert said == []


def test_folds_that_come_with_the_data_are_saved_and_named(tmp_path: Path) -> None:
    run, dataset, _ = a_run(tmp_path)
    (tmp_path / "splits_final.json").write_text('[{"train": ["c0", "c1", "c2"], "val": ["c3"]}]')
    said: list[Event] = []
    splits = keep_or_make_splits(Layout(run), dataset, said.append)
    assert store.load(Layout(run).splits, Splits) == splits
    assert splits.folds == (Fold(train=("c0", "c1", "c2"), validation=("c3",)),)
    assert any("1 folds, those of" in getattr(each, "text", "") for each in said)


def test_own_splits_are_kept_and_must_name_known_cases(tmp_path: Path) -> None:
    run, _, _ = a_run(tmp_path)
    own = Splits(seed=0, grouped=False, folds=(Fold(train=("c0", "c1"), validation=("c2", "c3")),))
    store.save(Layout(run).splits, own)
    preprocess(run, workers=1)
    assert store.load(Layout(run).splits, Splits) == own
    store.save(Layout(run).splits, own.model_copy(update={"folds": (Fold(train=("c0",), validation=("x",)),)}))
    with pytest.raises(UserError, match=r"1 case\(s\) that the data set does not have, e\.g\. x"):
        preprocess(run, workers=1)
