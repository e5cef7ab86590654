import csv
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from planned import a_configuration
from scipy import ndimage
from typer.testing import CliRunner

from autoseg import store
from autoseg.cli import app
from autoseg.errors import UserError
from autoseg.image.formats import write_labels
from autoseg.image.labels import label_maps, labels_found, to_indices
from autoseg.image.volume import plain_geometry
from autoseg.layout import Layout, scores_csv, scores_file
from autoseg.records import Case, Dataset, Fold, Label, Run, Scores, Splits
from autoseg.steps import evaluate as step
from autoseg.steps.evaluate import evaluate, evaluate_all, evaluate_run, score_case
from autoseg.steps.predicting.pairs import dataset_near, validated_folds

SPACING_MM = (3.0, 1.0, 0.5)
LABELS = (Label(name="background", value=0), Label(name="liver", value=10), Label(name="tumour", value=20))


def save(folder: Path, case: str, labels_ZYX: np.ndarray, spacing_mm=SPACING_MM, ending: str = ".nii.gz") -> Path:
    path = folder / f"{case}{ending}"
    write_labels(path, labels_ZYX, plain_geometry(labels_ZYX.shape, spacing_mm))
    return path


def cube(at: int, value: int = 10, size: int = 4) -> np.ndarray:
    labels = np.zeros((8, 12, 12), np.int32)
    labels[2:6, 2 : 2 + size, at : at + size] = value
    return labels


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Case a is perfect, b is half right, c has neither class, in d the liver is invented; only a has a tumour."""
    predictions, references = tmp_path / "predictions", tmp_path / "references"
    with_tumour = cube(2)
    with_tumour[3, 8, 8] = 20
    for case, predicted, real in (
        ("a", with_tumour, with_tumour),
        ("b", cube(4), cube(2)),
        ("c", cube(2, 0), cube(2, 0)),
        ("d", cube(2), cube(2, 0)),
    ):
        save(predictions, case, predicted)
        save(references, case, real)
    return predictions, references


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_scored(
    folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    predictions, references = folders
    monkeypatch.setattr("autoseg.store.os.access", lambda path, mode: Path(path) != predictions)
    monkeypatch.setattr(step, "score_pairs", lambda *_: pytest.fail("it was scored"))
    with pytest.raises(UserError, match="predictions: this place cannot be written"):
        evaluate(predictions, references, workers=1)
    monkeypatch.undo()
    shown = CliRunner().invoke(app, ["evaluate", str(predictions), str(references), "-o", str(tmp_path / "deep/out")])
    assert shown.exit_code == 0, shown.output
    assert store.load(scores_file(tmp_path / "deep" / "out"), Scores).prediction == str(predictions)
    assert not scores_file(predictions).exists()


def test_a_fold_that_is_still_validated_is_none(tmp_path: Path) -> None:
    for fold, finished in (("0", True), ("1", False), ("2", None)):
        model = Layout(tmp_path).model("3d", fold)
        model.validation.mkdir(parents=True)
        (model.validation / "a.nii.gz").touch()
        if finished is not None:
            store.save(model.run, Run(
                autoseg_version="", torch_version="", configuration=a_configuration(), fold=fold, seed=0, device="cpu",
                precision="fp32", compiled=False, finished=finished,
            ))  # fmt: skip
    assert validated_folds(tmp_path, "3d") == ("fold_0", "fold_2")


def test_no_case_at_all_is_no_choice_of_cases(tmp_path: Path) -> None:
    for name in ("predicted", "real"):
        save(tmp_path / name, "a", cube(2))
    with pytest.raises(UserError, match="No case is named"):
        evaluate(tmp_path / "predicted", tmp_path / "real", cases=())


def test_scores_per_case_and_their_means_follow_the_policy(folders):
    scores = evaluate(*folders, labels=LABELS, workers=1)
    by_case = {case.id: case.values for case in scores.cases}
    assert scores.labels == ("liver", "tumour")
    assert by_case["a"]["dice"] == (1.0, 1.0)
    assert by_case["b"]["dice"] == (0.5, None)
    assert by_case["b"]["iou"] == (pytest.approx(1 / 3), None)
    assert by_case["c"]["dice"] == (None, None)
    assert by_case["d"]["dice"] == (0.0, None)
    assert scores.mean["dice"] == (0.5, 1.0)
    assert scores.foreground_mean["dice"] == 0.75
    assert by_case["a"]["reference_mm3"] == (64 * 1.5, 1.5)
    assert by_case["b"]["volume_error"] == (0.0, None)
    assert "not defined" in scores.policy


def test_surface_scores_are_in_millimetres(folders):
    scores = evaluate(*folders, labels=LABELS, workers=1)
    by_case = {case.id: case.values for case in scores.cases}
    assert by_case["a"]["hd95_mm"] == (0.0, 0.0)
    assert by_case["a"]["surface_dice"] == (1.0, 1.0)
    assert by_case["b"]["hd95_mm"][0] == pytest.approx(1.0)
    assert by_case["d"]["hd95_mm"] == (None, None)
    assert by_case["d"]["surface_dice"] == (0.0, None)
    assert by_case["b"]["lesion_f1"] == (1.0, None)
    fewer = evaluate(*folders, labels=LABELS, surface=False, workers=1)
    assert "hd95_mm" not in fewer.mean
    assert "lesion_f1" in fewer.mean


def test_scores_are_saved_as_json_and_csv(folders, tmp_path):
    scores = evaluate(*folders, labels=LABELS, output=tmp_path / "out", workers=1)
    assert store.load(scores_file(tmp_path / "out"), Scores) == scores
    rows = list(csv.DictReader(scores_csv(tmp_path / "out").read_text().splitlines()))
    assert len(rows) == 8
    assert rows[0]["case"] == "a"
    assert rows[0]["label"] == "liver"
    assert rows[0]["dice"] == "1.0"
    assert rows[4]["dice"] == ""
    assert not scores_file(folders[0]).exists()


def test_two_processes_give_the_same_scores_as_one(folders, monkeypatch):
    monkeypatch.setattr(step, "HEAD_START_SECONDS", 0.0)
    assert evaluate(*folders, labels=LABELS, workers=2) == evaluate(*folders, labels=LABELS, workers=1)


def test_folders_with_different_cases_are_refused_and_nothing_is_written(folders):
    predictions, references = folders
    save(references, "e", cube(2))
    with pytest.raises(UserError, match=r"predictions has no label map for 1 of 5 cases that .*: e\."):
        evaluate(predictions, references, labels=LABELS, workers=1)
    assert not scores_file(predictions).exists()
    assert len(evaluate(predictions, references, labels=LABELS, cases=["a", "b"], workers=1).cases) == 2
    (predictions / "d.nii.gz").unlink()
    with pytest.raises(UserError, match=r"predictions has no label map for 2 of 5 cases that .*: d, e\."):
        evaluate(predictions, references, labels=LABELS, workers=1)
    with pytest.raises(UserError, match=r"a\.nii\.gz: this is a file, not a folder"):
        evaluate(predictions / "a.nii.gz", references / "a.nii.gz", labels=LABELS, workers=1)
    with pytest.raises(UserError, match=r": nobody\."):
        evaluate(predictions, references, labels=LABELS, cases=["a", "nobody"], workers=1)


def test_another_grid_is_refused_by_name_and_nothing_is_written(folders):
    predictions, references = folders
    save(predictions, "b", cube(4), spacing_mm=(3.0, 1.0, 0.6))
    save(predictions, "c", np.zeros((8, 12, 13), np.int32))
    with pytest.raises(UserError, match=r"2 of 4 .* b \(same size.* mm apart\), c \(size"):
        evaluate(predictions, references, labels=LABELS, workers=1)
    assert not scores_file(predictions).exists()


def test_a_value_that_is_no_label_is_named(folders):
    predictions, references = folders
    save(predictions, "c", cube(2, 7))
    with pytest.raises(UserError, match=r"c\.nii\.gz: label has values \{7\} that are not among"):
        evaluate(predictions, references, labels=LABELS, workers=1)
    assert not scores_file(predictions).exists()


@pytest.mark.parametrize("beside", [True, False])
def test_labels_come_from_a_dataset_file_in_or_beside_the_references(folders, beside):
    predictions, references = folders
    content = {"labels": {"0": "background", "10": "liver", "20": "tumour"}}
    (Layout(references.parent if beside else references).dataset).write_text(json.dumps(content))
    assert evaluate(predictions, references, workers=1).labels == ("liver", "tumour")
    content = {"labels": {"background": 0, "leber": 10, "tumor": 20, "ignore": 30}}
    (Layout(references.parent if beside else references).dataset).write_text(json.dumps(content))
    assert evaluate(predictions, references, workers=1).labels == ("leber", "tumor")


@pytest.mark.parametrize(
    ("named", "labels", "ignored"),
    [
        ({"background": 0, "liver": 10, "Ignore": 20}, (("background", 0), ("liver", 10)), 20),
        ({"background": 20, "liver": 10, "air": 0}, (("background", 20), ("air", 0), ("liver", 10)), None),
        ({"background": 0, "liver": [10], "x": 20}, (("background", 0), ("liver", 10), ("x", 20)), None),
    ],
)
def test_a_dataset_file_is_read_as_in_training(tmp_path: Path, named, labels, ignored) -> None:
    Layout(tmp_path).dataset.write_text(json.dumps({"labels": named}))
    known = dataset_near(tmp_path)
    assert known is not None
    assert known.ignore_value == ignored
    assert tuple((label.name, label.value) for label in known.labels) == labels


def test_without_a_dataset_file_the_values_found_are_the_labels(folders):
    assert evaluate(*folders, workers=1).labels == ("10", "20")
    save(folders[0], "c", cube(2, 7))  # invented: it counts, too
    scores = evaluate(*folders, workers=1)
    assert scores.labels == ("7", "10", "20")
    assert scores.mean["dice"][0] == 0
    with pytest.raises(UserError, match="no foreground"):
        labels_found([folders[1] / "c.nii.gz"])


def test_a_run_is_a_reference_and_its_ignored_voxels_do_not_count(folders, tmp_path):
    predictions, references = folders
    real = cube(2)
    real[:, :, 6:] = 99
    reference = save(references, "b", real)
    cases = (Case(id="b", images=("b.nii.gz",), label=str(reference)),)
    dataset = Dataset(name="x", dimension=3, channels=("t1",), labels=LABELS, ignore_value=99, cases=cases)
    store.save(Layout(tmp_path / "run").dataset, dataset)
    scores = evaluate(predictions, tmp_path / "run", cases=["b"], workers=1)
    assert scores.cases[0].values["dice"][0] == pytest.approx(2 * 32 / (64 + 32))


def test_values_become_indices_also_when_negative_or_huge():
    labels = (Label(name="b", value=0), Label(name="x", value=-5), Label(name="y", value=1_000_000))
    array = np.array([[[0, -5, 1_000_000, 3]]])
    assert to_indices(array, labels, 3, "file").tolist() == [[[0, 1, 2, -1]]]
    assert to_indices(np.array([[[0, 10, 20]]]), LABELS, None, "file").tolist() == [[[0, 1, 2]]]


def test_a_2d_image_is_scored_in_its_plane():
    reference = np.zeros((1, 20, 20), np.int16)
    reference[0, 4:12, 4:12] = 1
    score = score_case("x", np.roll(reference, 2, axis=2), reference, (1.0, 1.0, 1.0), 2)
    assert score.values["hd95_mm"][0] == pytest.approx(2.0)


def test_a_folder_is_read_by_case_and_two_files_of_one_case_are_refused(tmp_path):
    save(tmp_path, "b", cube(2))
    save(tmp_path, "a", cube(2), ending=".nrrd")
    (tmp_path / "scores.json").write_text("{}")
    assert list(label_maps(tmp_path)) == ["a", "b"]
    save(tmp_path, "a", cube(2))
    with pytest.raises(UserError, match=r"a\.nii\.gz and a\.nrrd"):
        label_maps(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        label_maps(tmp_path / "nowhere")


def test_a_run_is_scored_on_the_validation_cases_of_all_folds(folders, tmp_path):
    predictions, references = folders
    layout = Layout(tmp_path / "run")
    cases = tuple(Case(id=c, images=("x",), label=str(references / f"{c}.nii.gz")) for c in "abcd")
    store.save(layout.dataset, Dataset(name="x", dimension=3, channels=("t1",), labels=LABELS, cases=cases))
    for fold, case in enumerate("abc"):
        target = layout.model("3d", str(fold)).validation / f"{case}.nii.gz"
        target.parent.mkdir(parents=True)
        target.write_bytes((predictions / f"{case}.nii.gz").read_bytes())
    scores = evaluate_run(layout.root, workers=1)
    assert [case.id for case in scores.cases] == ["a", "b", "c"]
    assert scores.mean["dice"][0] == 0.75
    assert store.load(scores_file(layout.configuration("3d")), Scores) == scores


def test_all_configurations_of_a_run_are_scored_and_missing_folds_are_said(folders, tmp_path):
    predictions, references = folders
    layout = Layout(tmp_path / "run")
    cases = tuple(Case(id=c, images=("x",), label=str(references / f"{c}.nii.gz")) for c in "abcd")
    store.save(layout.dataset, Dataset(name="x", dimension=3, channels=("t1",), labels=LABELS, cases=cases))
    fold = Fold(train=("a",), validation=("b",))
    store.save(layout.splits, Splits(seed=0, grouped=False, folds=(fold, fold)))
    with pytest.raises(UserError, match="no validation predictions"):
        evaluate_all(layout.root, workers=1)
    with pytest.raises(UserError, match=r"no run folder.*autoseg evaluate PRED REF"):
        evaluate_all(predictions, workers=1)
    for name, shown in (("2d", "ab"), ("3d", "abc")):
        for case in shown:
            target = layout.model(name, "0").validation / f"{case}.nii.gz"
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((predictions / f"{case}.nii.gz").read_bytes())
    heard: list = []
    scores = evaluate_all(layout.root, workers=1, report=heard.append)
    assert {name: len(each.cases) for name, each in scores.items()} == {"2d": 2, "3d": 3}
    assert scores_csv(layout.configuration("2d")).is_file()
    assert any("3d: 1 of 2 folds are trained" in getattr(event, "text", "") for event in heard)
    with pytest.raises(UserError, match="several configurations"):
        evaluate_run(layout.root, workers=1)


def test_what_has_not_changed_is_not_scored_again(folders, monkeypatch):
    first = evaluate(*folders, labels=LABELS, workers=1)
    scored = []
    real = step.score_case
    monkeypatch.setattr(step, "score_case", lambda case, *rest: scored.append(case) or real(case, *rest))
    assert evaluate(*folders, labels=LABELS, workers=1) == first
    assert scored == []
    save(folders[0], "b", cube(3))
    save(folders[1], "c", cube(2))
    changed = evaluate(*folders, labels=LABELS, workers=1)
    assert scored == ["b", "c"]
    assert changed.cases[1].values["dice"] == (0.75, None)
    assert changed.cases[0] == first.cases[0]
    evaluate(*folders, labels=LABELS, workers=1, tolerance_mm=3.0)
    assert len(scored) == 6


def test_a_file_of_scores_that_cannot_be_read_is_made_anew(folders):
    first = evaluate(*folders, labels=LABELS, workers=1)
    scores_file(folders[0]).write_text("{")
    assert evaluate(*folders, labels=LABELS, workers=1) == first
    content = json.loads(scores_file(folders[0]).read_text())
    del content["tolerances_mm"]
    for case in content["cases"]:
        del case["content"]
    scores_file(folders[0]).write_text(json.dumps(content))
    assert store.load(scores_file(folders[0]), Scores).cases[0].content == ""
    assert evaluate(*folders, labels=LABELS, workers=1) == first


def test_every_class_may_have_its_own_tolerance(folders):
    predictions, references = folders
    save(predictions, "b", cube(4, 20) + cube(8))
    save(references, "b", cube(2, 20) + cube(8))
    near = evaluate(*folders, labels=LABELS, workers=1, tolerance_mm={"tumour": 0.4})
    assert near.tolerances_mm == (2.0, 0.4)
    assert near.cases[1].values["surface_dice"][1] == 1.0
    within = near.cases[1].values["surface_dice_at_tolerance"]
    assert within[0] == 1.0
    assert 0 < within[1] < 1
    with pytest.raises(UserError, match="A tolerance for spleen, which is no label"):
        evaluate(*folders, labels=LABELS, workers=1, tolerance_mm={"spleen": 1.0})
    with pytest.raises(UserError, match="no distances"):
        evaluate(*folders, labels=LABELS, workers=1, tolerance_mm=-1.0)


def test_classes_that_nobody_drew_in_a_case_have_no_score_there():
    reference, prediction = cube(2, 1), cube(2, 1)
    prediction[2:6, 8:10] = 2
    full = score_case("x", prediction, reference, SPACING_MM, 3)
    assert full.values["dice"] == (1.0, 0.0)
    partly = score_case("x", prediction, reference, SPACING_MM, 3, annotated=(0, 1))
    assert partly.values["dice"] == (1.0, None)
    assert partly.values["prediction_mm3"][1] is None
    assert step.summary((full, partly), LABELS, "", "").mean["dice"] == (1.0, 0.0)


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[float, float, float]]:
    """Two related maps of two classes and an anisotropic spacing; some are empty, some hold a single voxel."""
    chance = np.random.default_rng(seed)
    shape = tuple(int(n) for n in chance.integers(4, 16, 3))
    spacing_mm = tuple(float(s) for s in chance.uniform(0.5, 4.0, 3))
    maps = np.zeros((2, *shape), np.int16)
    for k in (1, 2):
        field = ndimage.gaussian_filter(chance.normal(size=shape), 1.0)
        other = field + 0.5 * ndimage.gaussian_filter(chance.normal(size=shape), 1.0)
        for one, values in zip(maps, (field, other), strict=True):
            one[values > np.quantile(values, 0.8)] = k
    if seed % 5 == 0:
        maps[seed // 5 % 2] = 0
    if seed % 10 in (0, 3):
        maps[0, 1, 2, 3] = 1
        maps[0][maps[0] == 2] = 0
    return maps[0], maps[1], spacing_mm


def test_scores_by_overlap_equal_simpleitk_on_80_random_cases():
    for seed in range(80):
        prediction, reference, spacing_mm = random_case(seed)
        scored = score_case("x", prediction, reference, spacing_mm, 3, with_surface=False).values
        images = [sitk.GetImageFromArray(each.astype(np.uint8)) for each in (reference, prediction)]
        for image in images:
            image.SetSpacing(spacing_mm[::-1])
        measure, sizes = sitk.LabelOverlapMeasuresImageFilter(), []
        for image in images:
            shapes = sitk.LabelShapeStatisticsImageFilter()
            shapes.Execute(image)
            sizes.append({k: shapes.GetPhysicalSize(k) if k in shapes.GetLabels() else 0.0 for k in (1, 2)})
        measure.Execute(images[1], images[0])
        for k in (1, 2):
            ours = {name: values[k - 1] for name, values in scored.items()}
            assert ours["reference_mm3"] == pytest.approx(sizes[0][k], rel=1e-6)
            assert ours["prediction_mm3"] == pytest.approx(sizes[1][k], rel=1e-6)
            if not (reference == k).any() or not (prediction == k).any():
                assert not ours["dice"]
                continue
            assert ours["dice"] == pytest.approx(measure.GetDiceCoefficient(k), abs=1e-6)
            assert ours["iou"] == pytest.approx(measure.GetJaccardCoefficient(k), abs=1e-6)
            assert ours["recall"] == pytest.approx(1 - measure.GetFalseNegativeError(k), abs=1e-6)
            assert ours["precision"] == pytest.approx(1 - measure.GetFalseDiscoveryRate(k), abs=1e-6)
            assert ours["volume_error"] == pytest.approx(sizes[1][k] / sizes[0][k] - 1, abs=1e-6)
            assert ours["lesion_f1"] == pytest.approx(lesion_f1_by_simpleitk(images, k), abs=1e-6)


def lesion_f1_by_simpleitk(images: list[sitk.Image], k: int) -> float:
    """From its connected components (26 neighbours), counted one by one."""
    real, found = (sitk.GetArrayFromImage(sitk.ConnectedComponent(image == k, True)) for image in images)
    hit = sum(bool((found[real == n] > 0).any()) for n in range(1, real.max() + 1)) / real.max()
    true = sum(bool((real[found == n] > 0).any()) for n in range(1, found.max() + 1)) / found.max()
    return 2 * hit * true / (hit + true) if hit + true else 0.0
