import os
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from scipy import stats

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Warned
from autoseg.layout import comparison_file, comparison_picture, scores_file
from autoseg.records import CaseScore, Scores
from autoseg.scoring import statistics
from autoseg.scoring.comparison import Comparison, Difference
from autoseg.steps.compare import BETTER, _corrected, compare, draw

LABELS = ("organ", "lesion")
PAIRS = ((0, 1), (0, 2), (1, 2))


def save(folder: Path, dice_NK: np.ndarray, *, labels=LABELS, volume: float = 100.0, first: int = 0) -> Path:
    """A prediction folder with scores: Dice, and HD95 that falls as Dice rises; NaN is "not defined"."""
    cases = []
    for number, row in enumerate(dice_NK, first):
        dice = tuple(None if np.isnan(value) else float(value) for value in row)
        far = tuple(None if value is None else 10 * (1 - value) for value in dice)
        volumes = tuple(volume + number for _ in row)
        cases.append(CaseScore(id=f"c{number:03d}", values={"dice": dice, "hd95_mm": far, "reference_mm3": volumes}))
    means = {metric: tuple(0.0 for _ in labels) for metric in cases[0].values}
    scores = Scores(
        prediction=str(folder),
        reference="nowhere",
        labels=labels,
        policy="",
        cases=tuple(cases),
        mean=means,
        foreground_mean=dict.fromkeys(means, 0.0),
    )
    store.save(scores_file(folder), scores)
    return folder


def drawn(seed: int, gain: tuple[float, float] = (0.0, 0.0), cases: int = 30) -> np.ndarray:
    """Dice of organ and lesion; difficulty of the cases is shared, `gain` is added per class."""
    hard = np.random.default_rng(99).uniform(0.5, 0.8, (cases, 1))
    return hard + np.random.default_rng(seed).normal(0, 0.02, (cases, 2)) + np.array(gain)


def row_of(found: Comparison, metric: str, label: str) -> Difference:
    return next(row for row in found.differences if (row.metric, row.label) == (metric, label))


def test_a_real_difference_is_found_where_it_is_and_only_there(tmp_path):
    a, b = save(tmp_path / "a", drawn(1, (0.05, 0.0))), save(tmp_path / "b", drawn(2))
    found = compare(a, b)
    organ, lesion = row_of(found, "dice", "organ"), row_of(found, "dice", "lesion")
    assert organ.better == "a"
    assert lesion.better is None
    assert organ.low < 0.05 < organ.high
    assert organ.effect_size > 1
    assert row_of(found, "hd95_mm", "organ").better == "a"
    assert found.ranking == ("a", "b")
    assert found.rank_shares[0][0] > 0.99
    assert found.conclusion.startswith("On 30 cases a beats b in ")
    assert "dice of organ by 0.0" in found.conclusion
    assert "of lesion" not in found.conclusion
    assert "may be chance" in found.conclusion
    assert not comparison_file(a).exists()


def test_label_maps_that_changed_after_their_scores_are_named(tmp_path):
    a, b = save(tmp_path / "a", drawn(1)), save(tmp_path / "b", drawn(2))
    said = []
    for name, seconds in (("c002.nii.gz", 10), ("c003.nii.gz", -10), ("other.nii.gz", 10)):
        (b / name).write_bytes(b"")
        os.utime(b / name, ns=(0, scores_file(b).stat().st_mtime_ns + seconds * 10**9))
    compare(a, b, report=said.append)
    warned = [event.text for event in said if isinstance(event, Warned)]
    assert warned == [f"c002 in {b} changed after the scores; `autoseg evaluate` makes them anew."]


def write_values(folder: Path, metric: str, values_N: np.ndarray) -> Path:
    """A prediction folder with scores of one metric; errors of volume have the other sign for lesions."""
    sign = -1 if metric == "volume_error" else 1
    cases = tuple(
        CaseScore(id=f"c{n:03d}", values={metric: (float(value), sign * float(value))})
        for n, value in enumerate(values_N)
    )
    store.save(scores_file(folder), Scores(
        prediction=str(folder), reference="nowhere", labels=LABELS, policy="", cases=cases,
        mean={metric: (0.0, 0.0)}, foreground_mean={metric: 0.0},
    ))  # fmt: skip
    return folder


@pytest.mark.parametrize(
    ("metric", "good", "bad"),
    [
        ("dice", 0.9, 0.8), ("surface_dice", 0.9, 0.8), ("surface_dice_at_tolerance", 0.9, 0.8), ("iou", 0.9, 0.8),
        ("precision", 0.9, 0.8), ("recall", 0.9, 0.8), ("lesion_f1", 0.9, 0.8), ("hd95_mm", 2.0, 9.0),
        ("asd_mm", 0.5, 2.0), ("false_positive_mm3", 10.0, 40.0), ("volume_error", 0.1, -0.3),
        ("volume_error", -0.1, 0.3), ("volume_error", -0.1, -0.3),
    ],
)  # fmt: skip
def test_of_every_metric_it_is_known_which_end_is_better(tmp_path, metric, good, bad):
    spread = np.linspace(-0.01, 0.01, 8)
    worse = write_values(tmp_path / "a", metric, bad + spread**2)
    found = compare(worse, write_values(tmp_path / "b", metric, good + spread), metrics=[metric])
    assert row_of(found, metric, "organ").better == row_of(found, metric, "foreground").better == "b"
    assert found.ranking == ("b", "a")
    assert found.rank_shares == ((0.0, 1.0), (1.0, 0.0))


def test_every_metric_has_a_better_end():
    tested = test_of_every_metric_it_is_known_which_end_is_better.pytestmark[0].args[1]
    assert {metric for metric, _, _ in tested} == set(BETTER)


def test_no_method_is_better_where_most_cases_and_the_mean_disagree(tmp_path):
    """a is a little better 19 times and fails once: Wilcoxon's test sees the 19, the mean the one."""
    b = drawn(2, cases=20)
    a = b + np.linspace(0.001, 0.003, 40).reshape(20, 2)
    a[7] -= 0.5
    found = compare(save(tmp_path / "a", a), save(tmp_path / "b", b), metrics=["dice"])
    organ = row_of(found, "dice", "organ")
    assert organ.difference < 0 < organ.rank_correlation
    assert organ.p_wilcoxon_holm < 0.05
    assert (organ.better, organ.torn) == (None, True)
    assert found.conclusion == (
        "None of a and b is better on 20 cases by all accounts; most cases say the one and the mean the other in "
        "dice of foreground (a against b), dice of organ (a against b) and dice of lesion (a against b)."
    )


def test_p_values_are_those_of_the_tests_with_holm_over_classes(tmp_path):
    one, other = drawn(1, (0.01, 0.005)), drawn(2)
    found = compare(save(tmp_path / "a", one), save(tmp_path / "b", other), metrics=["dice"])
    plain = np.array([statistics.wilcoxon(one[:, k] - other[:, k]) for k in range(2)])
    rows = [row_of(found, "dice", label) for label in LABELS]
    assert [row.p_wilcoxon for row in rows] == pytest.approx(plain)
    assert [row.p_wilcoxon_holm for row in rows] == pytest.approx(statistics.holm(plain))
    assert rows[0].p_t == pytest.approx(statistics.paired_t(one[:, 0] - other[:, 0]))
    foreground = row_of(found, "dice", "foreground")
    assert foreground.p_wilcoxon_holm == pytest.approx(statistics.wilcoxon((one - other).mean(1)))


def test_equal_methods_differ_by_chance(tmp_path):
    found = compare(save(tmp_path / "a", drawn(1)), save(tmp_path / "b", drawn(2)))
    assert found.conclusion == "No difference between a and b on 30 cases is more than chance."


def test_three_methods_are_compared_in_pairs_and_ranked(tmp_path):
    gains = {"x": 0.0, "y": 0.1, "z": 0.05}
    folders = [save(tmp_path / name, drawn(n, (gain, gain))) for n, (name, gain) in enumerate(gains.items())]
    found = compare(*[scores_file(folder) for folder in folders], names=("x", "y", "z"), metrics=["dice"])
    assert found.ranking == ("y", "z", "x")
    assert len(found.differences) == 3 * 3
    assert all(row.better for row in found.differences)


def test_cases_where_a_score_is_not_defined_do_not_count(tmp_path):
    one, other = drawn(1), drawn(2)
    one[:5, 1], other[5:8, 1] = np.nan, np.nan
    assert row_of(compare(save(tmp_path / "a", one), save(tmp_path / "b", other)), "dice", "lesion").cases == 22
    one[:26, 1] = np.nan
    found = compare(save(tmp_path / "a", one), save(tmp_path / "b", other), metrics=["dice"])
    assert row_of(found, "dice", "lesion").p_wilcoxon is None
    assert row_of(found, "dice", "lesion").cases == 4
    assert "1 could not be tested for lack of cases" in found.conclusion


def test_who_misses_the_hard_class_has_no_better_mean_of_distances(tmp_path):
    """Both are as good in the organ; a alone misses every lesion, which has no HD95 then, and Dice 0."""
    both, heard = drawn(1), []
    missed = both.copy()
    missed[:, 1] = np.nan
    a, b, c = save(tmp_path / "a", missed), save(tmp_path / "b", both), save(tmp_path / "c", both - 0.01)
    found = compare(a, b, metrics=["hd95_mm", "dice"], report=heard.append)
    row = row_of(found, "hd95_mm", "foreground")
    assert row.mean_first == row.mean_second == pytest.approx(10 * (1 - both[:, 0].mean()))
    assert (row.unpaired, row.better, row.cases) == (30, None, 30)
    assert "hd95_mm: only one of a and b has 30 scores of single classes" in heard[0].text
    assert row_of(found, "hd95_mm", "lesion").unpaired == 30
    ranked = compare(a, b, c, metrics=["hd95_mm"])
    assert ranked.ranking[-1] == "c"
    assert next(r for r in ranked.differences if (r.first, r.second) == ("b", "c")).unpaired == 0


def test_a_class_drawn_in_vain_lowers_the_mean_dice(tmp_path):
    """Dice is not defined where a class is rightly absent, and 0 where it is drawn all the same."""
    a, b = drawn(1), drawn(1)
    a[:, 1], b[:, 1] = np.nan, 0.0
    row = row_of(compare(save(tmp_path / "a", a), save(tmp_path / "b", b), metrics=["dice"]), "dice", "foreground")
    assert row.mean_second == pytest.approx(row.mean_first / 2)
    assert (row.better, row.unpaired) == ("a", 0)


def test_fewer_than_six_cases_are_refused(tmp_path):
    five, six = (
        [save(tmp_path / f"{name}{cases}", drawn(n, cases=cases)) for n, name in enumerate("ab")] for cases in (5, 6)
    )
    with pytest.raises(UserError, match="5 paired cases are too few"):
        compare(*five)
    compare(*six)


def test_what_is_not_paired_is_refused_by_name(tmp_path):
    a = save(tmp_path / "a", drawn(1))
    with pytest.raises(UserError, match=r"have no case in common: only one of them has c000, c001"):
        compare(a, save(tmp_path / "b", drawn(2), first=100))
    with pytest.raises(UserError, match="5 paired cases are too few"):
        compare(a, save(tmp_path / "g", drawn(2), first=25))
    with pytest.raises(UserError, match="different labels: organ, lesion against organ, vessel"):
        compare(a, save(tmp_path / "c", drawn(2), labels=("organ", "vessel")))
    with pytest.raises(UserError, match="different references: their volumes differ in c000"):
        compare(a, save(tmp_path / "d", drawn(2), volume=150.0))
    with pytest.raises(UserError, match="given twice"):
        compare(a, a)
    with pytest.raises(UserError, match="at least two"):
        compare(a)
    (tmp_path / "e").mkdir()
    with pytest.raises(UserError, match="autoseg evaluate"):
        compare(a, tmp_path / "e")
    with pytest.raises(UserError, match=r"by beauty\. Metrics in all of them: dice, hd95_mm"):
        compare(a, save(tmp_path / "f", drawn(2)), metrics=["beauty"])
    for folder, tolerances_mm in ((a, (2.0, 2.0)), (tmp_path / "f", (5.0, 2.0))):
        scores = store.load(scores_file(folder), Scores)
        cases = tuple(
            case.model_copy(update={"values": case.values | {"surface_dice_at_tolerance": case.values["dice"]}})
            for case in scores.cases
        )
        changed = {"mean": scores.mean | {"surface_dice_at_tolerance": (0.0, 0.0)}, "tolerances_mm": tolerances_mm}
        store.save(scores_file(folder), scores.model_copy(update=changed | {"cases": cases}))
    with pytest.raises(UserError, match=r"at different tolerances, in mm: 2, 2 against 5, 2\."):
        compare(a, tmp_path / "f", metrics=["dice", "surface_dice_at_tolerance"])
    compare(a, tmp_path / "f", metrics=["dice"])


def test_cases_that_only_one_method_has_are_named_in_a_warning_and_left_out(tmp_path):
    heard: list = []
    one, other = drawn(1, (0.05, 0.0)), drawn(2)
    a, b = save(tmp_path / "a", one), save(tmp_path / "b", other[2:], first=2)
    with pytest.raises(UserError, match="different references"):
        compare(a, save(tmp_path / "moved", other[2:], first=2, volume=101.0))
    found = compare(a, b, metrics=["dice"], report=heard.append)
    assert any("not paired: only one of them has c000, c001" in event.text for event in heard)
    assert found.cases == 28
    assert row_of(found, "dice", "organ").difference == pytest.approx((one - other)[2:, 0].mean())


def test_equal_methods_are_found_different_no_more_often_than_they_should(tmp_path):
    """800 comparisons of three equal methods in three classes, as `compare` corrects them: one family of nine."""
    chance, found_any, repetitions = np.random.default_rng(3), 0, 800
    row = Difference(first="a", second="b", metric="dice", label="x", cases=20, mean_first=0, mean_second=0,
                     difference=1.0, rank_correlation=1.0)  # fmt: skip
    for _ in range(repetitions):
        scores_MKN = chance.normal(size=(3, 3, 20))
        p = [statistics.wilcoxon(scores_MKN[m, k] - scores_MKN[n, k]) for m, n in PAIRS for k in range(3)]
        family = _corrected([row.model_copy(update={"p_wilcoxon": each, "p_t": each}) for each in p], 0.95)
        found_any += any(each.better is not None for each in family)
    low, high = stats.binom.interval(0.95, repetitions, 0.05)
    assert 0.4 * low <= found_any <= high  # Holm does not know that pairs share a method, and errs on the safe side


def test_cases_of_one_patient_are_warned_of(tmp_path):
    heard: list = []
    groups = {f"c{n:03d}": f"patient {n // 2}" for n in range(30)}
    compare(save(tmp_path / "a", drawn(1)), save(tmp_path / "b", drawn(2)), groups=groups, report=heard.append)
    assert any("same patient (patient 0, patient 1" in event.text for event in heard)


def test_record_and_picture_are_written_on_request(tmp_path):
    a, b = save(tmp_path / "run" / "a", drawn(1, (0.05, 0.0))), save(tmp_path / "other" / "a", drawn(2))
    found = compare(a, b, output=tmp_path / "out")
    assert found.methods == ("run", "other")
    assert store.load(comparison_file(tmp_path / "out"), Comparison) == found
    assert comparison_picture(tmp_path / "out").stat().st_size > 5000


def test_methods_are_named_by_the_shortest_parts_of_their_paths_that_differ(tmp_path):
    models = tmp_path / "run" / "models"
    folders = [models / name / "validation" for name in ("2d/fold_0", "3d/fold_0", "3d/fold_0.seed_1")]
    a, b, c = (save(folder, drawn(number)) for number, folder in enumerate(folders))
    assert compare(a, b).methods == ("2d", "3d")
    assert compare(b, c).methods == ("fold_0", "fold_0.seed_1")
    assert compare(a, b, c).methods == ("2d/fold_0", "3d/fold_0", "3d/fold_0.seed_1")
    assert compare(scores_file(a), scores_file(b)).methods == ("2d", "3d")


def test_the_sentence_names_each_pair_of_methods_once(tmp_path):
    a, b = save(tmp_path / "a", drawn(1, (0.05, 0.05))), save(tmp_path / "b", drawn(2))
    sentence = compare(a, b).conclusion
    assert sentence.count("a beats b in") == 1
    assert ", dice of organ by 0.0" in sentence
    assert " and hd95_mm of lesion by " in sentence


@pytest.mark.filterwarnings("error")
def test_the_picture_has_room_for_long_names(tmp_path, monkeypatch):
    """All panels lie beside each other inside the figure, and only the first one has the names."""
    seen, save_figure = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: seen.append(figure) or save_figure(figure, *a, **k))
    three = [save(tmp_path / f"a_run_with_a_long_name_{n}" / "x", drawn(n)) for n in range(3)]
    draw(compare(*three), tmp_path / "picture.png")
    [figure] = seen
    boxes = [panel.get_tightbbox().transformed(figure.transFigure.inverted()) for panel in figure.axes]
    assert len(boxes) == 2
    assert all(box.x0 >= 0 and box.x1 <= 1 for box in boxes)
    assert boxes[0].x1 <= boxes[1].x0
    assert all(panel.get_position().width > 0.15 for panel in figure.axes)
