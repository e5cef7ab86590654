"""cases/inspect.py and cases/measure.py: what is found wrong, what is measured, and what is not read again."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from autoseg.cases.discover import discover
from autoseg.cases.inspect import BadDataset, Problem, content_of, fingerprint_of, inspect
from autoseg.cases.measure import measure_case
from autoseg.errors import UserError
from autoseg.events import Event, Warned
from autoseg.layout import case_stats_file
from autoseg.records import Case, CaseStats, Dataset, Label, LeftOut
from autoseg.store import load, save

SHARED = Path(__file__).parents[2] / "shared" / "data"
LABELS = (Label(name="background", value=0), Label(name="a", value=1), Label(name="b", value=2))
Change = Callable[[sitk.Image], sitk.Image | None]


def as_it_is(image: sitk.Image) -> sitk.Image:
    return image


def write(path: Path, array: np.ndarray, change: Change = as_it_is) -> None:
    image = sitk.GetImageFromArray(array)
    image.SetSpacing((1.0, 1.5, 3.0))
    sitk.WriteImage(change(image) or image, str(path))


def arrays(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    image = np.random.default_rng(seed).normal(100, 10, (8, 9, 10)).astype(np.float32)
    labels = np.zeros((8, 9, 10), np.uint8)
    labels[1:3, 1:3, 1:3] = 1
    labels[5, 5, 5] = 1
    labels[6:8, 2:5, 2:9] = 2
    return image, labels


def a_dataset(folder: Path, cases: int = 3) -> Dataset:
    found = []
    for n in range(cases):
        image, labels = arrays(n)
        paths = folder / f"image_{n}.nii.gz", folder / f"label_{n}.nii.gz"
        for path, array in zip(paths, (image, labels), strict=True):
            write(path, array)
        found.append(Case(id=f"c{n}", images=(str(paths[0]),), label=str(paths[1])))
    return Dataset(name="toy", dimension=3, channels=("MRI",), labels=LABELS, cases=tuple(found))


def problems_of(dataset: Dataset, folder: Path) -> list[Problem]:
    with pytest.raises(BadDataset) as caught:
        inspect(dataset, folder / "stats", workers=1)
    return list(caught.value.problems)


def test_good_cases_are_measured(tmp_path: Path) -> None:
    dataset, stats = inspect(a_dataset(tmp_path), tmp_path / "stats", workers=1)
    image, labels = arrays(0)
    first = stats[0]
    assert [each.id for each in stats] == ["c0", "c1", "c2"]
    assert dataset.dimension == 3
    assert first.shape_voxels == first.full_shape_voxels == (8, 9, 10)
    assert first.spacing_mm == (3.0, 1.5, 1.0)
    assert first.class_voxels == (720 - 9 - 42, 9, 42)
    assert first.class_mm3 == pytest.approx([4.5 * count for count in first.class_voxels])
    assert first.class_components == (0, 2, 1)
    assert first.class_median_component_voxels == (0.0, 4.5, 42.0)
    foreground = image[labels > 0]
    measured = first.intensities[0]
    assert measured.mean == pytest.approx(foreground.mean(), rel=1e-5)
    assert measured.std == pytest.approx(foreground.std(), rel=1e-5)
    assert measured.percentile_99_5 == pytest.approx(np.percentile(foreground, 99.5), rel=1e-5)
    assert len(first.intensity_sample[0]) == 1000


def test_statistics_are_those_after_cropping() -> None:
    image = np.zeros((1, 10, 10, 10), np.float32)
    image[0, 2:7, :, 1:] = 5
    stats = measure_case("a", "", image, np.ones((10, 10, 10), np.int16), (1.0, 1.0, 1.0), 2)
    assert stats.shape_voxels == (5, 10, 9)
    assert stats.full_shape_voxels == (10, 10, 10)
    assert stats.crop_share == pytest.approx(0.45)
    assert stats.class_voxels == (0, 450)


def test_ignored_voxels_are_counted_in_no_class() -> None:
    indices = np.zeros((4, 4, 4), np.int16)
    indices[0], indices[1] = -1, 1
    stats = measure_case("a", "", np.ones((1, 4, 4, 4), np.float32), indices, (1.0, 1.0, 1.0), 2)
    assert stats.class_voxels == (32, 16)


def test_a_photograph_does_not_say_how_it_lies_in_the_patient(tmp_path: Path) -> None:
    paths = tmp_path / "image.png", tmp_path / "label.png"
    for path, array in zip(paths, arrays()[1].repeat(2, 0)[[2, 3]], strict=True):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(path))
    case = Case(id="a", images=(str(paths[0]),), label=str(paths[1]))
    dataset = Dataset(name="toy", dimension=2, channels=("grey",), labels=LABELS, cases=(case,))
    assert inspect(dataset, tmp_path / "stats", workers=1)[1][0].patient_axes is None


def test_all_problems_of_all_cases_are_found(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path, 6)
    image, labels = arrays()
    image[0, 0, 0], image[0, 0, 1] = np.nan, np.inf
    labels[0, 0, 0] = 7
    write(tmp_path / "image_0.nii.gz", image)
    write(tmp_path / "label_0.nii.gz", labels)
    os.unlink(tmp_path / "label_1.nii.gz")
    os.unlink(tmp_path / "image_2.nii.gz")
    (tmp_path / "image_2.nii.gz").symlink_to(tmp_path / "not fetched")
    write(tmp_path / "label_3.nii.gz", labels[:-1])
    (tmp_path / "image_4.nii.gz").write_bytes((tmp_path / "image_5.nii.gz").read_bytes()[:400])
    found = [(problem.case, f"{problem.what} {problem.fix}") for problem in problems_of(dataset, tmp_path)]
    for case, part in (
        ("c0", "2 voxel(s) that are NaN or infinite"),
        ("c0", "label has values {7}"),
        ("c1", "label_1.nii.gz does not exist. Add it or remove the image."),
        ("c2", "channel 0 (MRI)"),
        ("c2", "does not exist. It is a link: fetch the file that it leads to."),
        ("c3", "the label map has (7, 9, 10) voxels (Z Y X), the image (8, 9, 10)"),
        ("c4", "image_4.nii.gz"),
    ):
        assert any(case == name and part in what for name, what in found), (case, part, found)
    assert not any(name == "c5" for name, _ in found)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (lambda image: image.SetDirection((-1, 0, 0, 0, 1, 0, 0, 0, 1)), "direction"),
        (lambda image: image.SetOrigin((0, 0, 2)), "origin"),
        (lambda image: image.SetSpacing((1.0, 1.5, 3.1)), "spacing_mm"),
    ],
)
def test_a_label_map_on_another_grid_is_refused(tmp_path: Path, change: Change, names: str) -> None:
    dataset = a_dataset(tmp_path)
    write(tmp_path / "label_1.nii.gz", arrays(1)[1], change)
    (problem,) = problems_of(dataset, tmp_path)
    assert problem.case == "c1"
    assert problem.what.startswith(names)
    assert "mm apart" in problem.what


@pytest.mark.parametrize(
    "change",
    [
        lambda image: image.SetDirection((1, 1e-6, 0, -1e-6, 1, 0, 0, 0, 1)),
        lambda image: image.SetOrigin((1e-6, -1e-6, 1e-6)),
        lambda image: image.SetSpacing((1.000001, 1.499999, 3.0)),
    ],
)
def test_noise_in_the_header_passes(tmp_path: Path, change: Change) -> None:
    dataset = a_dataset(tmp_path)
    write(tmp_path / "label_1.nii.gz", arrays(1)[1], change)
    assert len(inspect(dataset, tmp_path / "stats", workers=1)[1]) == 3


def test_another_number_of_channels_is_a_problem(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    two = dataset.cases[1].model_copy(update={"images": dataset.cases[1].images * 2})
    dataset = dataset.model_copy(update={"cases": (dataset.cases[0], two, dataset.cases[2])})
    (problem,) = problems_of(dataset, tmp_path)
    assert "has 2 channel(s) instead of 1 (MRI)" in problem.what


def test_a_case_without_foreground_is_a_warning_but_not_when_all_are(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    write(tmp_path / "label_1.nii.gz", np.zeros((8, 9, 10), np.uint8))
    events: list[Event] = []
    for _ in range(2):  # measured, then from the kept statistics
        _, stats = inspect(dataset, tmp_path / "stats", workers=1, report=events.append)
        assert [event.text for event in events if isinstance(event, Warned)] == ["c1: its label map has no foreground."]
        events.clear()
    assert stats[1].intensity_sample == ((),)
    for n in (0, 2):
        write(tmp_path / f"label_{n}.nii.gz", np.zeros((8, 9, 10), np.uint8))
    assert len(problems_of(dataset, tmp_path)) == 3


def test_what_discover_could_not_tell_apart_is_a_problem_beside_the_others(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    os.unlink(tmp_path / "label_1.nii.gz")
    dataset = dataset.model_copy(update={"left_out": (LeftOut(id="c0", problem="it has two files"),)})
    found = problems_of(dataset, tmp_path)
    assert [(each.case, bool(each.fix)) for each in found] == [("c0", True), ("c1", True)]
    good, _ = inspect(dataset, tmp_path / "stats", workers=1, skip_bad=True)
    assert [case.id for case in good.cases] == ["c2"]
    assert [each.id for each in good.left_out] == ["c0", "c1"]


def test_good_cases_without_foreground_are_not_enough_beside_bad_ones(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    os.unlink(tmp_path / "label_1.nii.gz")
    for n in (0, 2):
        write(tmp_path / f"label_{n}.nii.gz", np.zeros((8, 9, 10), np.uint8))
    with pytest.raises(BadDataset, match="3 of 3 cases"):
        inspect(dataset, tmp_path / "stats", workers=1, skip_bad=True)


def test_bad_cases_can_be_left_out(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    os.unlink(tmp_path / "label_1.nii.gz")
    good, stats = inspect(dataset, tmp_path / "stats", workers=1, skip_bad=True)
    assert [case.id for case in good.cases] == [each.id for each in stats] == ["c0", "c2"]
    assert [left.id for left in good.left_out] == ["c1"]
    assert "does not exist" in good.left_out[0].problem


def test_a_second_run_reads_only_what_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = a_dataset(tmp_path)
    _, first = inspect(dataset, tmp_path / "stats", workers=1)
    read: list[str] = []
    original = measure_case

    def noting(case: str, *arguments: object) -> CaseStats:
        read.append(case)
        return original(case, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("autoseg.cases.inspect.measure_case", noting)
    assert inspect(dataset, tmp_path / "stats", workers=1)[1] == first
    assert read == []
    write(tmp_path / "image_2.nii.gz", arrays(9)[0])
    (tmp_path / "stats" / "c0.json").write_text("{")  # damaged
    _, second = inspect(dataset, tmp_path / "stats", workers=1)
    assert sorted(read) == ["c0", "c2"]
    assert second[:2] == first[:2]
    assert second[2] != first[2]


def test_statistics_that_do_not_say_how_the_files_lie_are_measured_anew(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    _, measured = inspect(dataset, tmp_path / "stats", workers=1)
    file = case_stats_file(tmp_path / "stats", "c1")
    save(file, measured[1].model_copy(update={"content": "as schema 1 hashed it"}))
    older = json.loads(file.read_text()) | {"schema": 1}
    del older["patient_axes"]
    file.write_text(json.dumps(older))
    assert load(file, CaseStats).patient_axes is None
    assert inspect(dataset, tmp_path / "stats", workers=1)[1] == measured
    assert measured[1].patient_axes == (("head-foot",), ("front-back",), ("left-right",))


def test_other_channel_names_make_the_statistics_stale(tmp_path: Path) -> None:
    """One name more than the files have channels is a problem of every case, also where they were measured before."""
    dataset = a_dataset(tmp_path)
    inspect(dataset, tmp_path / "stats", workers=1)
    with pytest.raises(UserError, match=r"channel\(s\) instead of"):
        inspect(dataset.model_copy(update={"channels": (*dataset.channels, "more")}), tmp_path / "stats", workers=1)


def test_other_label_values_make_the_statistics_stale(tmp_path: Path) -> None:
    case = a_dataset(tmp_path).cases[0]
    assert content_of(case, LABELS, None) == content_of(case, LABELS, None)
    assert content_of(case, LABELS, None) != content_of(case, LABELS[:2], None)
    assert content_of(case, LABELS, None) != content_of(case, LABELS, 2)


def test_worker_processes_find_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from autoseg.parallel import over_cases

    dataset = a_dataset(tmp_path, 6)
    os.unlink(tmp_path / "label_4.nii.gz")
    _, here = inspect(dataset, tmp_path / "one", workers=1, skip_bad=True)
    monkeypatch.setattr(
        "autoseg.cases.inspect.over_cases",
        lambda *arguments, **options: over_cases(*arguments, **(options | {"head_start_seconds": 0.0})),
    )
    good, there = inspect(dataset, tmp_path / "two", workers=2, skip_bad=True)
    assert there == here
    assert [left.id for left in good.left_out] == ["c4"]


def test_pooled_intensities_give_every_case_the_same_weight(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    dataset = a_dataset(tmp_path)
    values = [generator.normal(mean, std, (1, 10, 10, size)).astype(np.float32) for mean, std, size in
              ((0, 1, 80), (100, 5, 10), (50, 2, 40))]  # fmt: skip
    stats = [
        measure_case(f"c{n}", "", each, np.ones(each.shape[1:], np.int16), (1.0, 1.0, 1.0), 3)
        for n, each in enumerate(values)
    ]
    pooled = fingerprint_of(dataset, stats).intensities[0]
    equal = np.concatenate([generator.choice(each.ravel(), 200_000) for each in values])
    assert pooled.mean == pytest.approx(equal.mean(), rel=1e-2)
    assert pooled.std == pytest.approx(equal.std(), rel=1e-2)
    assert pooled.median == pytest.approx(np.median(equal), rel=1e-2)
    assert pooled.percentile_00_5 == pytest.approx(np.percentile(equal, 0.5), abs=0.1)
    assert pooled.percentile_99_5 == pytest.approx(np.percentile(equal, 99.5), abs=0.5)
    assert pooled.maximum == pytest.approx(max(each.max() for each in values))
    assert all(case.intensity_sample == () for case in fingerprint_of(dataset, stats).cases)


def test_every_channel_has_its_own_intensities(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path)
    cases = []
    for n, case in enumerate(dataset.cases):
        write(tmp_path / f"other_{n}.nii.gz", -3 - arrays(n + 10)[0] / 50)  # mean -5, deviation 0.2
        cases.append(case.model_copy(update={"images": (*case.images, str(tmp_path / f"other_{n}.nii.gz"))}))
    both = dataset.model_copy(update={"channels": ("T1", "T2"), "cases": tuple(cases)})
    first, second = fingerprint_of(*inspect(both, tmp_path / "stats", workers=1)).intensities
    for found, mean, std in ((first, 100.0, 10.0), (second, -5.0, 0.2)):
        assert (found.mean, found.median) == pytest.approx((mean, mean), abs=std)
        assert found.std == pytest.approx(std, rel=0.3)
        assert mean - 5 * std < found.minimum <= found.percentile_00_5 < mean - std
        assert mean + std < found.percentile_99_5 <= found.maximum < mean + 5 * std


def test_slices_make_a_data_set_of_dimension_two(tmp_path: Path) -> None:
    dataset = a_dataset(tmp_path, 2)
    for n in range(2):
        write(tmp_path / f"image_{n}.nii.gz", arrays(n)[0][1:2])
        write(tmp_path / f"label_{n}.nii.gz", arrays(n)[1][1:2])
    assert inspect(dataset, tmp_path / "stats", workers=1)[0].dimension == 2


def test_the_error_keeps_its_problems_across_processes() -> None:
    error = BadDataset([Problem(f"c{n}", "is bad", "Mend it.") for n in range(12)], of=20)
    again = pickle.loads(pickle.dumps(error))  # noqa: S301
    assert again.problems == error.problems
    assert "12 of 20 cases" in str(again)
    assert "and 2 more" in str(again)


@pytest.mark.skipif(not (SHARED / "broken").is_dir(), reason="needs the folder ../shared/data/broken")
def test_a_real_image_without_label_is_a_problem(tmp_path: Path) -> None:
    a_dataset(tmp_path)
    folder = tmp_path / "data"
    for kind in ("images", "labels"):
        (folder / kind).mkdir(parents=True)
    for n in range(2):
        (folder / "images" / f"c{n}.nii.gz").write_bytes((tmp_path / f"image_{n}.nii.gz").read_bytes())
        (folder / "labels" / f"c{n}.nii.gz").write_bytes((tmp_path / f"label_{n}.nii.gz").read_bytes())
    lonely = next((SHARED / "broken").glob("*.nii.gz"))
    (folder / "images" / lonely.name).write_bytes(lonely.read_bytes())
    (problem,) = problems_of(discover(folder, workers=1), tmp_path)
    assert "there is no label map for" in problem.what
    assert lonely.name in problem.what
