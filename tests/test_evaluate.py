import csv
import json
from pathlib import Path

import numpy as np
import pytest

from autoseg import store
from autoseg.errors import UserError
from autoseg.image.formats import write_labels
from autoseg.image.labels import label_maps, labels_found, to_indices
from autoseg.image.volume import plain_geometry
from autoseg.layout import Layout, scores_csv, scores_file
from autoseg.records import Case, Dataset, Label, Scores
from autoseg.steps.evaluate import evaluate, evaluate_run, score_case

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


def test_two_processes_give_the_same_scores_as_one(folders):
    assert evaluate(*folders, labels=LABELS, workers=2) == evaluate(*folders, labels=LABELS, workers=1)


def test_folders_with_different_cases_are_refused_and_nothing_is_written(folders):
    predictions, references = folders
    save(references, "e", cube(2))
    with pytest.raises(UserError, match=r"predictions has no label map .*: e\."):
        evaluate(predictions, references, labels=LABELS, workers=1)
    assert not scores_file(predictions).exists()
    assert len(evaluate(predictions, references, labels=LABELS, cases=["a", "b"], workers=1).cases) == 2
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
    with pytest.raises(UserError, match=r"c\.nii\.gz: values 7 are not among"):
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


def test_without_a_dataset_file_the_values_found_are_the_labels(folders):
    assert evaluate(*folders, workers=1).labels == ("10", "20")
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
