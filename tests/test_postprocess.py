import shutil
from pathlib import Path

import numpy as np
import pytest
from organs import LABELS, organ_map, rule, with_crumbs

from autoseg import store
from autoseg.errors import UserError
from autoseg.image.formats import read_labels, write_labels
from autoseg.image.volume import plain_geometry
from autoseg.layout import Layout, ModelLayout, prediction_file
from autoseg.records import Case, Dataset, Postprocessing, Region
from autoseg.steps.postprocess import postprocess_apply, postprocess_learn
from autoseg.steps.predicting.judging import ALL_ACTIONS, VOLUMES_MM3

GEOMETRY = plain_geometry((10, 24, 24), (2.0, 1.0, 1.0))


def make_run(root: Path, pairs: list[tuple[np.ndarray, np.ndarray]], configuration: str = "3d") -> Path:
    """A run folder with validation predictions spread over two folds; maps are given as indices."""
    values = np.array([label.value for label in LABELS])
    cases = []
    for number, (predicted, real) in enumerate(pairs):
        case = f"case_{number:02d}"
        label = prediction_file(root / "labels", case, ".nii.gz")
        write_labels(label, values[real], GEOMETRY)
        validation = Layout(root / "run").model(configuration, str(number % 2)).validation
        write_labels(prediction_file(validation, case, ".nii.gz"), values[predicted], GEOMETRY)
        cases.append(Case(id=case, images=("x.nii.gz",), label=str(label)))
    dataset = Dataset(name="x", dimension=3, channels=("ct",), labels=LABELS, cases=tuple(cases))
    store.save(Layout(root / "run").dataset, dataset)
    return root / "run"


def test_planted_false_components_are_learned_away_and_a_real_second_one_stays(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n), organ_map()) for n in range(6)])
    learned = postprocess_learn(run, workers=1)
    assert store.load(Layout(run).postprocessing, Postprocessing) == learned
    assert learned.learned_on == "3d"
    assert learned.cases == 6
    assert learned.rules
    assert all(each.dice_after > each.dice_before for each in learned.rules)
    postprocess_apply(run, Layout(run).model("3d", "0").validation, tmp_path / "out", workers=1)
    values, geometry = read_labels(prediction_file(tmp_path / "out", "case_00", ".nii.gz"))
    assert np.array_equal(values, np.array([0, 10, 20])[organ_map()])
    assert geometry == read_labels(tmp_path / "labels" / "case_00.nii.gz")[1]


def test_where_nothing_helps_nothing_is_learned(tmp_path):
    two_organs = organ_map()
    two_organs[1:9, 14:22, 14:22] = 1
    run = make_run(tmp_path, [(two_organs, two_organs) for _ in range(6)])
    assert postprocess_learn(run, actions=ALL_ACTIONS, workers=1).rules == ()
    before = read_labels(tmp_path / "labels" / "case_00.nii.gz")[0]
    postprocess_apply(run, tmp_path / "labels", tmp_path / "out", workers=1)
    assert np.array_equal(read_labels(tmp_path / "out" / "case_00.nii.gz")[0], before)


def test_the_fraction_and_the_connectivity_can_be_chosen(tmp_path):
    predicted = organ_map()
    predicted[8, 8, 8:14] = 1
    pairs = [(predicted, organ_map())] * 6
    faces = postprocess_learn(make_run(tmp_path / "faces", pairs), workers=1, actions=("drop_small",))
    assert faces.rules[0].connectivity == 1
    corners = postprocess_learn(make_run(tmp_path / "corners", pairs), workers=1, connectivity=3)
    assert corners.rules == ()
    tiny = postprocess_learn(make_run(tmp_path / "tiny", pairs), workers=1, fraction=0.01, actions=("drop_small",))
    assert tiny.rules == ()


def with_dataset(run: Path, **change: object) -> Path:
    dataset = store.load(Layout(run).dataset, Dataset)
    store.save(Layout(run).dataset, dataset.model_copy(update=change))
    return run


def test_what_nobody_drew_is_no_false_component(tmp_path):
    """Lesions are found in six cases where only the organ was drawn: removing them gains nothing."""
    real = organ_map(lesions=1)
    run = make_run(tmp_path, [(real, np.where(real == 2, 0, real))] * 6)
    assert {each.label for each in postprocess_learn(run, workers=1).rules} == {"lesion"}
    cases = store.load(Layout(run).dataset, Dataset).cases
    with_dataset(run, cases=tuple(case.model_copy(update={"annotated": ("organ",)}) for case in cases))
    assert postprocess_learn(run, workers=1).rules == ()


def test_for_regions_nothing_is_learned_and_that_is_said(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n), organ_map()) for n in range(6)])
    regions = (Region(name="whole", labels=(10, 20), paint=10), Region(name="lesion", labels=(20,), paint=20))
    with_dataset(run, regions=regions)
    heard: list = []
    assert postprocess_learn(run, workers=1, report=heard.append).rules == ()
    assert any("several regions" in getattr(event, "text", "") for event in heard)


def test_the_rounds_share_the_level(tmp_path):
    maps = [(with_crumbs(organ_map(), n) if n < 5 else organ_map(), organ_map()) for n in range(8)]
    run = make_run(tmp_path, maps)  # p = 1 / 32, for the joined foreground and for the organ
    for level, kept in ((0.05, False), (0.07, True)):  # which the two rounds share
        learned = postprocess_learn(run, actions=("keep_largest",), significance=level, workers=1)
        assert bool(learned.rules) == kept


def test_too_few_cases_for_a_test_learn_nothing_and_say_so(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n), organ_map()) for n in range(3)])
    heard: list = []
    assert postprocess_learn(run, significance=0.05, workers=1, report=heard.append).rules == ()
    assert any("too few" in getattr(event, "text", "") for event in heard)


def test_volume_and_hole_rules_are_found(tmp_path):
    real = np.zeros((10, 24, 24), np.int16)
    real[2:8, 2:8, 2:8] = 1
    real[2:6, 14:18, 14:18] = 1
    holed = real.copy()
    holed[4:6, 4:6, 4:6] = 0
    run = make_run(tmp_path, [(holed, real)] * 6)
    assert [each.action for each in postprocess_learn(run, actions=ALL_ACTIONS, workers=1).rules] == ["fill_holes"]
    crumbs = real.copy()
    crumbs[9, 22, 2:6] = 1
    run = make_run(tmp_path / "v", [(crumbs, real)] * 6)
    learned = postprocess_learn(run, actions=("drop_volume",), workers=1)
    assert [each.action for each in learned.rules] == ["drop_volume"]
    assert 8.0 < learned.rules[0].minimum_mm3 <= 128.0
    assert learned.rules[0].minimum_mm3 in VOLUMES_MM3


def test_volumes_are_learned_in_cubic_millimetres(tmp_path):
    """A false crumb of 8 voxels has 16 mm3, so the rule about 10 mm3 leaves it and that about 30 removes it."""
    real = np.zeros((10, 24, 24), np.int16)
    real[2:8, 2:8, 2:8] = 1
    crumbs = real.copy()
    crumbs[9, 22, 2:10] = 1
    run = make_run(tmp_path, [(crumbs, real)] * 6)
    learned = postprocess_learn(run, actions=("drop_volume",), workers=1)
    assert [each.minimum_mm3 for each in learned.rules] == [30.0]


def test_missing_predictions_and_unknown_labels_are_named(tmp_path):
    run = make_run(tmp_path, [(organ_map(), organ_map())] * 2)
    with pytest.raises(UserError, match=r"no validation predictions of 2d.*There are some of: 3d"):
        postprocess_learn(run, "2d", workers=1)
    with pytest.raises(UserError, match=r"postprocess\.json: no such file\. Learn the rules first"):
        postprocess_apply(run, tmp_path / "labels", tmp_path / "out", workers=1)
    wrong = Postprocessing(learned_on="3d", cases=2, rules=(rule("keep_largest", "spleen"),))
    with pytest.raises(UserError, match="'spleen', which is no label"):
        postprocess_apply(wrong, tmp_path / "labels", tmp_path / "out", labels=LABELS, workers=1)
    assert not (tmp_path / "out").exists()
    make_run(tmp_path, [(organ_map(), organ_map())] * 2, "2d")
    with pytest.raises(UserError, match=r"several configurations .* 2d, 3d"):
        postprocess_learn(run, workers=1)


def test_a_bad_file_among_good_ones_leaves_the_output_as_it_was(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n), organ_map()) for n in range(6)])
    postprocess_learn(run, workers=1)
    write_labels(tmp_path / "labels" / "case_05.nii.gz", np.full((10, 24, 24), 7, np.int32), GEOMETRY)
    with pytest.raises(UserError, match=r"case_05\.nii\.gz: label has values \{7\} that are not among"):
        postprocess_apply(run, tmp_path / "labels", tmp_path / "out", workers=1)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob("*unfinished*"))


def test_rules_replace_neither_their_input_nor_what_autoseg_has_not_written(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n), organ_map()) for n in range(2)])
    rules = Postprocessing(learned_on="3d", cases=2, rules=(rule("keep_largest"),))
    store.save(Layout(run).postprocessing, rules)
    predicted = Layout(run).model("3d", "0").validation
    drawn, linked = tmp_path / "drawn", tmp_path / "linked"
    for folder in (drawn, linked):
        folder.mkdir()
    shutil.copy(predicted / "case_00.nii.gz", drawn)
    (linked / "case_09.nii.gz").symlink_to(tmp_path / "labels" / "case_00.nii.gz")
    for given, output, said in (
        (predicted, predicted, "the label maps to clean lie there"),
        (predicted, drawn, r"case_00\.nii\.gz would be replaced, which autoseg has not written"),
        (predicted, tmp_path / "labels", "an image or label map of the data"),
        (linked, tmp_path / "labels", "an image or label map of the data"),
    ):
        before = {path.name: path.read_bytes() for path in output.iterdir()}
        with pytest.raises(UserError, match=said):
            postprocess_apply(run, given, output, workers=1)
        assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    for _ in range(2):  # its own results it does replace
        postprocess_apply(run, predicted, tmp_path / "out", workers=1)


def test_folds_of_other_seeds_are_not_mixed_in(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n), organ_map()) for n in range(2)])
    other = ModelLayout(Layout(run).model("3d", "0", seed=3).root).validation
    write_labels(prediction_file(other, "stranger", ".nii.gz"), organ_map(), GEOMETRY)
    assert postprocess_learn(run, workers=1).cases == 2
