import shutil
from pathlib import Path

import numpy as np
import pytest

from autoseg import store
from autoseg.errors import UserError
from autoseg.image.formats import read_labels, write_labels
from autoseg.image.rules import CaseParts, apply_rules, case_parts
from autoseg.image.volume import plain_geometry
from autoseg.layout import Layout, ModelLayout, prediction_file
from autoseg.records import Case, Dataset, Label, Postprocessing, Region, Rule
from autoseg.steps.postprocess import postprocess_apply, postprocess_learn
from autoseg.steps.predicting.judging import ALL_ACTIONS, VOLUMES_MM3, candidates_of, judge, search

LABELS = (Label(name="background", value=0), Label(name="organ", value=10), Label(name="lesion", value=20))
GEOMETRY = plain_geometry((10, 24, 24), (2.0, 1.0, 1.0))


def rule(action: str, label: str | None = "organ", **more) -> Rule:
    return Rule(label=label, action=action, dice_before=0.0, dice_after=0.0, **more)


def organ_map(lesions: int = 2) -> np.ndarray:
    """Index map: an organ of 216 voxels with a lesion of 8 voxels in it, and `lesions` - 1 further ones of 4."""
    labels = np.zeros((10, 24, 24), np.int16)
    labels[2:8, 2:8, 2:8] = 1
    labels[3:5, 3:5, 3:5] = 2
    for n in range(lesions - 1):
        labels[6, 4 + 2 * n, 4:8] = 2
    return labels


def with_crumbs(labels: np.ndarray, seed: int, sizes=(3, 5, 8)) -> np.ndarray:
    """The same map with false organ components far from the true one."""
    chance = np.random.default_rng(seed)
    noisy = labels.copy()
    for n, size in enumerate(sizes):
        z, y = int(chance.integers(0, 10)), 12 + 3 * n
        noisy[z, y, 12 : 12 + size] = 1
    return noisy


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


def test_a_true_second_component_is_never_removed(tmp_path):
    """Crumbs in all cases, in some also a second organ of half the size: keeping the largest only would lose it."""
    pairs = []
    for n in range(12):
        real = organ_map()
        if n < 2:
            real[1:7, 14:20, 2:5] = 1
        pairs.append((with_crumbs(real, n, (3, 5, 12)), real))
    run = make_run(tmp_path, pairs)
    learned = postprocess_learn(run, workers=1)
    assert learned.rules
    assert "keep_largest" not in {each.action for each in learned.rules}
    fold = Layout(run).model("3d", "0").validation
    for number in range(0, 12, 2):
        [path] = [p for p in postprocess_apply(run, fold, tmp_path / "out", workers=1) if f"_{number:02d}" in p.name]
        assert np.array_equal(read_labels(path)[0], np.array([0, 10, 20])[pairs[number][1]])


def test_a_rule_that_would_remove_a_true_component_is_out_even_where_dice_rises(tmp_path):
    """One case in twelve has a true second component above a third; large crumbs make `keep_largest` pay on average."""
    pairs = []
    for n in range(12):
        real = organ_map(1)
        predicted = real.copy()
        predicted[1:8, 14:20, 2:5] = 1
        if n == 0:
            real = predicted.copy()
        pairs.append((predicted, real))
    run = make_run(tmp_path, pairs)
    assert postprocess_learn(run, workers=1).rules == ()


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


def test_chance_is_not_learned_however_many_classes_and_candidates_there_are():
    """Components that are right as often as not: of 40 such data sets, no more than chance allows give a rule."""
    labels = (Label(name="background", value=0), *(Label(name=f"l{k}", value=k) for k in range(1, 5)))
    chance, kept = np.random.default_rng(2), 0
    candidates = candidates_of(ALL_ACTIONS, 1 / 3, 1)
    for _ in range(40):
        parts = []
        for n in range(10):
            right = chance.random(4) < 0.5
            parts.append(CaseParts(
                id=str(n), voxel_mm3=1.0, label_of=np.repeat(np.arange(1, 5), 2), sizes=np.tile((100, 20), 4),
                counted=np.tile((100, 20), 4), true=np.stack([np.full(4, 100), 20 * right], 1).ravel(),
                parent=np.arange(8), joint_sizes=np.tile((100, 20), 4), reference=100 + 20 * right,
            ))  # fmt: skip
        kept += bool(search(parts, labels, candidates, 0.05).rules)
    assert kept <= 6


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


def test_a_joint_rule_that_makes_any_class_worse_is_not_kept(tmp_path):
    """Far lesions are real: dropping small joined components would clean the organ but lose them."""
    real = organ_map(1)
    real[8, 20:22, 2:4] = 2
    run = make_run(tmp_path, [(with_crumbs(real, n), real) for n in range(6)])
    learned = postprocess_learn(run, workers=1)
    assert [each.label for each in learned.rules] == ["organ"]


def test_a_gain_in_one_case_is_chance_and_in_all_is_not(tmp_path):
    once = make_run(tmp_path / "once", [(with_crumbs(organ_map(), 0), organ_map())] + [(organ_map(), organ_map())] * 7)
    assert postprocess_learn(once, significance=None, workers=1).rules
    assert postprocess_learn(once, workers=1).rules == ()
    maps = [(with_crumbs(organ_map(), n) if n < 5 else organ_map(), organ_map()) for n in range(8)]
    five = make_run(tmp_path / "five", maps)  # p = 1 / 32, for the joined foreground and for the organ
    for level, kept in ((0.05, False), (0.07, True)):  # which the two rounds share
        learned = postprocess_learn(five, actions=("keep_largest",), significance=level, workers=1)
        assert bool(learned.rules) == kept
    often = make_run(tmp_path / "often", [(with_crumbs(organ_map(), n, (3, 5, 3 + n)), organ_map()) for n in range(8)])
    learned = postprocess_learn(often, workers=1)
    assert learned.rules
    assert learned.rules[0].p_value < 0.05


def test_too_few_cases_for_a_test_learn_nothing_and_say_so(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n), organ_map()) for n in range(3)])
    heard: list = []
    assert postprocess_learn(run, significance=0.05, workers=1, report=heard.append).rules == ()
    assert any("too few" in getattr(event, "text", "") for event in heard)


def test_the_gain_in_false_positive_volume_is_stated(tmp_path):
    run = make_run(tmp_path, [(with_crumbs(organ_map(), n, (4,)), organ_map()) for n in range(6)])
    first = postprocess_learn(run, workers=1).rules[0]
    assert first.false_positive_mm3_before == pytest.approx(8.0)
    assert first.false_positive_mm3_after == 0.0


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


@pytest.mark.parametrize("label", ["organ", None])
def test_volumes_are_dropped_by_cubic_millimetres(label):
    labels = np.zeros((10, 24, 24), np.int16)
    labels[9, 22, 2:12] = 1
    for spacing_mm, limits in (((2.0, 1.0, 1.0), (15.0, 20.0, 25.0)), ((0.5, 0.5, 1.0), (2.0, 2.5, 4.0))):
        left = [
            int((apply_rules(labels, (rule("drop_volume", label, minimum_mm3=mm3),), LABELS, spacing_mm) > 0).sum())
            for mm3 in limits
        ]
        assert left == [10, 10, 0]


def test_judging_by_lists_of_components_equals_applying_the_rules():
    chance = np.random.default_rng(1)
    rules = (
        rule("drop_small", None, fraction=0.4),
        rule("drop_small", fraction=0.5),
        rule("keep_largest", "lesion"),
    )
    for _ in range(5):
        predicted = (chance.random((6, 12, 12)) < 0.3).astype(np.int16) * chance.integers(1, 3, (6, 12, 12), np.int16)
        real = chance.integers(-1, 3, (6, 12, 12)).astype(np.int16)
        part = case_parts("x", predicted, real, 3, voxel_mm3=2.0)
        for used in (rules[:1], rules[1:], rules):
            judged = judge([part], LABELS, used)
            after = apply_rules(predicted, used, LABELS, (2.0, 1.0, 1.0))
            for k in (1, 2):
                p, r = (after == k) & (real >= 0), real == k
                assert judged.dice_NK[0, k - 1] == pytest.approx(2 * (p & r).sum() / (p.sum() + r.sum()))
                assert judged.false_mm3_NK[0, k - 1] == pytest.approx(2.0 * (p & ~r).sum())


def test_a_class_absent_from_both_counts_as_perfect_in_learning(tmp_path):
    """A healthy case whose only false voxels are removed must count as a gain."""
    empty = np.zeros((10, 24, 24), np.int16)
    part = case_parts("x", empty, empty, 3)
    assert judge([part], LABELS, ()).dice_NK.tolist() == [[1.0, 1.0]]


def test_applied_rules_leave_the_input_and_other_labels_alone():
    labels = with_crumbs(organ_map(), 0)
    before = labels.copy()
    after = apply_rules(labels, (rule("drop_small"), rule("keep_largest", "lesion")), LABELS, (1.0, 1.0, 1.0))
    assert np.array_equal(labels, before)
    assert after.dtype == labels.dtype
    assert ((after == 1) == (organ_map() == 1)).all()
    assert (after == 2).sum() == 8
    assert np.array_equal(apply_rules(labels, (), LABELS, (1.0, 1.0, 1.0)), before)


def test_holes_are_filled_only_where_there_is_background():
    shell = np.zeros((10, 24, 24), np.int16)
    shell[1:7, 1:7, 1:7] = 1
    shell[3, 3, 3], shell[4, 4, 4] = 0, 2
    filled = apply_rules(shell, (rule("fill_holes"),), LABELS, (1.0, 1.0, 1.0))
    assert filled[3, 3, 3] == 1
    assert filled[4, 4, 4] == 2


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
