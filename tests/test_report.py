"""The page that `autoseg report` writes: every section, what is missing, whose slices are drawn, and hostile names."""

import json
import os
import re
import shutil
from collections.abc import Sequence
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from planned import a_configuration, a_planned_run
from synthetic import write_dataset
from typer.testing import CliRunner

from autoseg import store
from autoseg.cases.inspect import fingerprint_of, inspect
from autoseg.cli import app
from autoseg.errors import UserError
from autoseg.events import Advanced, Event, Finished, Started, Warned
from autoseg.image.formats import read_labels, write_labels
from autoseg.image.volume import plain_geometry
from autoseg.layout import Layout, ModelLayout, prediction_file, scores_file
from autoseg.pages import markup
from autoseg.pages.overlay import differing_voxels, draw, labelled_part, pictures_of, upright, window, worst_slice
from autoseg.records import Choice, Dataset, Fingerprint, Fold, Label, Plan, Postprocessing, Region, Rule, Run, Scores
from autoseg.scoring.selection import Candidate, Selection
from autoseg.scoring.study import Study
from autoseg.steps.evaluate import Scoring, save_scores, score_pairs, scoring_of
from autoseg.steps.predicting.pairs import pair_of
from autoseg.steps.report import report
from autoseg.steps.reporting.curves import draw_curves
from autoseg.steps.reporting.validated import groups_of, validated

CASES, SHAPE = 6, (8, 20, 24)
WORST, WORST_PLACE = "case_03", 5
HOSTILE = "<script>alert('1')</script>&\"x"


class Page(HTMLParser):
    """What is on a page: its tags with their attributes, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.source = path.read_text()
        self.feed(self.source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return "".join(self.words)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is planned and no more."""
    place = tmp_path_factory.mktemp("report")
    data = write_dataset(place / "data", cases=CASES, shape=SHAPE, spacing_mm=(1.5, 1.0, 1.25))
    run = a_planned_run(place / "planned", data, a_configuration())
    layout = Layout(run)
    dataset, stats = inspect(store.load(layout.dataset, Dataset), layout.case_stats, 1)
    store.save(layout.fingerprint, fingerprint_of(dataset, stats))
    plan = store.load(layout.plan, Plan)
    choices = (Choice(field="3d.patch_voxels", value="8 x 8 x 8", because="it fits."),)
    store.save(layout.plan, plan.model_copy(update={"choices": choices}))
    return run


@pytest.fixture(scope="module")
def trained(planned: Path) -> Path:
    """The same with two folds that look as if they had been trained; their maps are the references, made worse."""
    run = planned.parent / "trained"
    shutil.copytree(planned, run)
    cases = [case.id for case in store.load(Layout(run).dataset, Dataset).cases]
    for fold in (0, 1):
        pretend_training(run, str(fold), cases[fold::2])
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A trained run of its own for each test, with images of its own."""
    shutil.copytree(trained, tmp_path / "run")
    shutil.copytree(trained.parent / "data", tmp_path / "data")
    path = Layout(tmp_path / "run").dataset
    store.write_text(path, path.read_text().replace(str(trained.parent / "data"), str(tmp_path / "data")))
    return tmp_path / "run"


def pretend_training(run: Path, fold: str, validated_on: Sequence[str]) -> None:
    """What a finished training leaves behind, without its weights."""
    dataset, model = store.load(Layout(run).dataset, Dataset), Layout(run).model("3d", fold)
    pairs = []
    for case in (each for each in dataset.cases if each.id in validated_on):
        labels_ZYX, geometry = read_labels(str(case.label))
        shifted_ZYX = np.roll(labels_ZYX, 1, axis=2)
        if case.id == WORST:
            shifted_ZYX[WORST_PLACE] = 1
        write_labels(prediction_file(model.validation, case.id, ".nii.gz"), shifted_ZYX, geometry)
        pairs.append(pair_of(case, prediction_file(model.validation, case.id, ".nii.gz")))
    scoring = scoring_of(dataset)
    scores = save_scores(score_pairs(pairs, scoring, 1), scoring, model.validation, run, model.validation)
    others = tuple(case.id for case in dataset.cases if case.id not in validated_on)
    store.save(model.run, Run(
        autoseg_version="0.0.9", torch_version="2.6", configuration=a_configuration(), fold=fold, seed=0, device="cpu",
        precision="fp32", compiled=False, finished=True, steps=1234, seconds=61.0, notes=("A note & more.",),
        cases=Fold(train=others, validation=tuple(validated_on)), validation_dice=scores.mean["dice"],
    ))  # fmt: skip
    rows: list[dict] = [
        {"epoch": n, "step": n, "seconds": n * 2.0, "loss": 1 / n, "learning_rate": 1e-3, "dice_1": 0.5,
         "dice_2": None, "dice_running": 0.5}
        for n in (1, 2)
    ]  # fmt: skip
    store.write_text(model.history, "".join(json.dumps(row) + "\n" for row in rows))
    draw_curves(model.curves, [row | {"dice_2": 0.4} for row in rows])


# ------------------------------------------------------------------------------------------------ the whole page


def test_a_trained_run_has_every_section(run: Path) -> None:
    layout = Layout(run)
    rule = Rule(label="small", action="drop_volume", minimum_mm3=30, dice_before=0.5, dice_after=0.6)
    store.save(layout.postprocessing, Postprocessing(learned_on="3d", cases=CASES, rules=(rule,)))
    best = Candidate(members=("3d",), dice=0.75, per_class=(0.7, 0.8))
    store.save(layout.selection, Selection(
        members=("3d",), single="3d", folds=("0", "1"), cases=CASES, candidates=(best,), because="3d is the only one."
    ))  # fmt: skip
    ended = Study(
        name="losses", configuration=a_configuration(), fold="0", vary=("loss=ce,dice",), seeds=1, epochs=1,
        conclusion="ce may be chance.",
    )  # fmt: skip
    store.save(layout.study("losses").study, ended)
    page = Page(report(run))
    text = page.text
    for words in (
        "hand: autoseg report", "6, all with a label map", "8 x 20 x 24 voxels (all alike)", "1.5 x 1 x 1.25 mm",
        "modality 0", "Classes in the cases that have them", "Intensities of the foreground", "3d.patch_voxels",
        "it fits.", "8 x 8 x 8", "plain U-Net", "Trained networks", "1,234", "61 s", "0.0.9, 2.6", "A note & more.",
        "class 1 is large, class 2 is small", "3d: 6 validation cases of folds 0, 1", "surface Dice at 1 mm",
        "3d: the 5 cases with the lowest mean Dice", "3d is the only one. predict uses 3d.", "ce may be chance.",
        "small: drop components under 30 mm3: Dice 0.5000 -> 0.6000",
    ):  # fmt: skip
        assert words in text, words
    assert [each["id"] for each in page.of("section")] == [
        "data", "plan", "trainings", "validation", "selection-and-post-processing", "studies-and-students"
    ]  # fmt: skip
    assert not [each for each in page.of("p") if each.get("class")]


def test_a_planned_run_has_a_report_that_says_what_is_not_there_yet(planned: Path, tmp_path: Path) -> None:
    page = Page(report(planned, output=tmp_path / "page.html"))
    assert "it fits." in page.text
    assert "Nothing is trained yet" in page.text
    assert "no scores of validation cases" in page.text
    assert "No post-processing was learned" in page.text
    assert "autoseg select has not been run" in page.text
    assert not page.of("img")


def test_a_run_of_a_plan_alone_has_a_report(planned: Path, tmp_path: Path) -> None:
    shutil.copy(Layout(planned).plan, tmp_path / "plan.json")
    text = Page(report(tmp_path)).text
    assert "no dataset.json" in text
    assert "no fingerprint.json" in text
    assert "large" in text


def test_nothing_is_fetched_and_nothing_is_run(run: Path) -> None:
    page = Page(report(run))
    links = [value for _, each in page.tags for name, value in each.items() if name in ("src", "href")]
    assert len(page.of("img")) == 5 + 2
    assert all(str(link).startswith(("data:image/png;base64,", "#")) for link in links)
    assert not re.search(r"https?:|url\(|@import", page.source)
    assert not page.of("script")
    assert not [name for _, each in page.tags for name in each if name.startswith("on")]


def test_tables_and_pictures_say_what_they_are(run: Path) -> None:
    page = Page(report(run))
    tags = [name for name, _ in page.tags]
    assert tags.count("table") == tags.count("caption") > 5
    assert all(each.get("alt") for each in page.of("img"))
    assert {each["scope"] for each in page.of("th")} == {"col", "colgroup", "row"}
    targets = {each["id"] for each in page.of("section")}
    assert {f"#{target}" for target in targets} == {each["href"] for each in page.of("a")}


def test_hostile_names_stay_text(run: Path) -> None:
    layout = Layout(run)
    plan, dataset = store.load(layout.plan, Plan), store.load(layout.dataset, Dataset)
    labels = (plan.labels[0], Label(name=HOSTILE, value=1), plan.labels[2])
    choices = (Choice(field=HOSTILE, value=HOSTILE, because=HOSTILE),)
    changed = {"dataset": HOSTILE, "labels": labels, "channels": (HOSTILE,), "choices": choices}
    store.save(layout.plan, plan.model_copy(update=changed))
    name = '"><img src=x onerror=alert(1)>'
    cases = tuple(e.model_copy(update={"id": name} if e.id == WORST else {}) for e in dataset.cases)
    store.save(layout.dataset, dataset.model_copy(update={"cases": cases, "labels": labels}))
    seen = store.load(layout.fingerprint, Fingerprint)
    store.save(layout.fingerprint, seen.model_copy(update={"labels": labels, "channels": (HOSTILE,)}))
    for fold in ("0", "1"):
        model = layout.model("3d", fold)
        record, scores = store.load(model.run, Run), store.load(model.scores, Scores)
        store.save(model.run, record.model_copy(update={"notes": (HOSTILE,)}))
        scored = tuple(e.model_copy(update={"id": name} if e.id == WORST else {}) for e in scores.cases)
        store.save(model.scores, scores.model_copy(update={"cases": scored, "labels": (HOSTILE, "small")}))
        for path in model.validation.glob(f"{WORST}.*"):
            path.rename(path.with_name(path.name.replace(WORST, name)))
    page = Page(report(run))
    assert not page.of("script")
    assert all("src" in each and str(each["src"]).startswith("data:") for each in page.of("img"))
    assert HOSTILE in page.text
    assert f"{name}: mean Dice" in page.text
    assert "</script>" not in page.source


# ------------------------------------------------------------------------------------------------ the worst cases


def test_the_case_with_the_lowest_dice_comes_first_with_the_slice_that_differs_most(run: Path) -> None:
    page = Page(report(run, cases=1))
    found = validated(run, "3d")
    assert found is not None
    dice = {case.id: np.mean([value for value in case.values["dice"] if value is not None]) for case in found.cases}
    assert min(dice, key=lambda case: dice[case]) == WORST
    alts = [str(each["alt"]) for each in page.of("img")]
    assert f"{WORST}, slice {WORST_PLACE + 1} of {SHAPE[0]} along Z, where most voxels differ" in alts[-1]
    assert len(alts) == 2 + 1
    assert f"{WORST}: mean Dice {dice[WORST]:.4f}" in page.text


def test_the_number_of_cases_drawn_is_asked_for_and_announced(run: Path) -> None:
    heard: list[Event] = []
    page = Page(report(run, cases=0, report=heard.append))
    assert len(page.of("img")) == 2
    assert not heard
    report(run, cases=2, report=heard.append)
    started, *advanced, finished = heard
    assert started == Started("drawing cases", 2)
    assert [(each.done, each.of) for each in advanced if isinstance(each, Advanced)] == [(1, 2), (2, 2)]
    assert finished == Finished("drawing cases")


@pytest.mark.parametrize("gone", ["imagesTr", "labelsTr", "validation"])
def test_a_file_that_is_gone_is_said_in_its_place(run: Path, gone: str) -> None:
    folder = Layout(run).model("3d", "1").validation if gone == "validation" else run.parent / "data" / gone
    prediction_file(folder, WORST, ".nii.gz").unlink()
    heard: list[Event] = []
    page = Page(report(run, report=heard.append))
    said = "its predicted label map is gone." if gone == "validation" else f"{WORST}.nii.gz: no such file."
    assert f"{WORST}: mean Dice" in page.text
    assert said in page.text
    assert len(page.of("img")) == 2 + 4
    assert [said in each.text for each in heard if isinstance(each, Warned)] == [True]


def test_an_image_of_another_grid_is_not_drawn(run: Path) -> None:
    path = prediction_file(run.parent / "data" / "imagesTr", WORST, ".nii.gz")
    write_labels(path, np.zeros((4, 5, 6), np.int32), plain_geometry((4, 5, 6), (1.0, 1.0, 1.0)))
    assert "does not lie on the grid of" in Page(report(run)).text


def test_a_damaged_record_costs_only_its_section(run: Path) -> None:
    Layout(run).model("3d", "0").run.write_text("{")
    heard: list[Event] = []
    page = Page(report(run, report=heard.append))
    assert "run.json: not valid JSON" in page.text
    assert "Classes in the cases that have them" in page.text
    assert len([each for each in heard if isinstance(each, Warned)]) == 2


def test_a_training_that_has_not_ended_is_shown_as_far_as_it_got_and_not_scored(run: Path) -> None:
    model = Layout(run).model("3d", "0")
    record = store.load(model.run, Run)
    store.save(model.run, record.model_copy(update={"finished": False, "steps": 0, "seconds": 0.0}))
    text = Page(report(run, cases=0)).text
    assert "not finished" in text
    assert "3d: 3 validation cases of fold 1" in text
    rows = [json.loads(line) for line in model.history.read_text().splitlines()]
    assert f"not finished{rows[-1]['step']}4 s" in text


def test_only_folds_of_the_unnamed_seed_are_scored(run: Path) -> None:
    layout = Layout(run)
    model = layout.model("3d", "1", seed=2)
    layout.model("3d", "1").root.rename(model.root)
    record = store.load(model.run, Run)
    store.save(model.run, record.model_copy(update={"seed": 2}))
    store.write_text(layout.configuration("3d") / "fold_0.distill.json", "{}")
    found = validated(run, "3d")
    assert found is not None
    assert found.folds == ("0",)
    assert len(found.cases) == CASES // 2
    (layout.configuration("3d") / "fold_0.distill.json").unlink()
    assert "3d, fold 1, seed 2" in Page(report(run, cases=0)).text


def test_mean_median_and_spread_are_over_cases(run: Path) -> None:
    text = Page(report(run, cases=0)).source
    found = validated(run, "3d")
    assert found is not None
    large = [case.values["dice"][0] for case in found.cases]
    figures = (np.mean(large), np.median(large), np.std(large, ddof=1), np.min(large))
    cells = "".join(f"<td class=number>{each:.4f}</td>" for each in figures)
    assert f"<th scope=row>large</th><td class=number>{CASES}</td>{cells}" in text


@pytest.mark.parametrize("newer", [True, False])
def test_the_newer_scores_of_a_case_are_shown(run: Path, newer: bool) -> None:
    """Of the training of its fold, or of `evaluate RUN`, which also scored a fold that is trained anew now."""
    layout = Layout(run)
    own = store.load(layout.model("3d", "0").scores, Scores)
    low = tuple(case.model_copy(update={"values": case.values | {"dice": (0.125,) * 2}}) for case in own.cases)
    gone = low[0].model_copy(update={"id": "of_another_fold"})
    together = scores_file(layout.cross_validation("3d"))
    store.save(together, own.model_copy(update={"cases": (*low, gone)}))
    when = layout.model("3d", "0").scores.stat().st_mtime
    os.utime(together, (when, when + (1 if newer else -1)))
    found = validated(run, "3d")
    assert found is not None
    assert len(found.cases) == CASES
    changed = {case.id for case in found.cases if case.values["dice"] == (0.125,) * 2}
    assert changed == ({case.id for case in low} if newer else set())


def test_a_pair_has_the_scores_that_evaluate_wrote_and_its_own_maps(run: Path) -> None:
    layout, dataset = Layout(run), store.load(Layout(run).dataset, Dataset)
    folder = layout.cross_validation("2d+3d")
    maps = ModelLayout(folder / "fold_1").validation
    shutil.copytree(layout.model("3d", "1").validation, maps)
    (maps / "scores.json").unlink()
    pairs = [pair_of(case, prediction_file(maps, case.id, ".nii.gz")) for case in dataset.cases[1::2]]
    scoring = scoring_of(dataset, surface=False)
    save_scores(score_pairs(pairs, scoring, 1), scoring, folder, run, folder)
    page = Page(report(run, cases=1))
    assert "2d+3d: 3 validation cases of fold 1" in page.text
    assert "of the prediction of 2d+3d" in str(page.of("img")[-1]["alt"])


# ------------------------------------------------------------------------------------------------ which slice


def test_the_slice_is_across_the_coarsest_axis_and_voxels_that_nobody_annotated_do_not_count() -> None:
    reference_ZYX, prediction_ZYX = np.zeros((4, 6, 8), np.int16), np.zeros((4, 6, 8), np.int16)
    prediction_ZYX[:, 2, :4] = 1
    prediction_ZYX[0, 4] = 2
    reference_ZYX[0, 5], prediction_ZYX[0, 5] = -1, 1
    groups, image_ZYX = ((1,), (2,)), np.arange(192.0).reshape(4, 6, 8)
    assert differing_voxels(prediction_ZYX, reference_ZYX, groups).tolist() == [12, 4, 4, 4]
    assert differing_voxels(prediction_ZYX, reference_ZYX, groups, 1).tolist() == [0, 0, 16, 0, 8, 0]
    geometry = plain_geometry((4, 6, 8), (1.0, 3.0, 1.0))
    shown = worst_slice(np.stack([-image_ZYX, image_ZYX]), prediction_ZYX, reference_ZYX, groups, geometry)
    assert (shown.axis, shown.number, shown.of, shown.differing) == (1, 3, 6, 16)
    np.testing.assert_array_equal(shown.image_CRC[1], image_ZYX[::-1, 2])  # the head, at the end of Z, is above


def test_where_nothing_differs_the_slice_with_most_labels_is_shown() -> None:
    labels_ZYX = np.zeros((5, 6, 7), np.int16)
    labels_ZYX[2:4, 2] = 1
    labels_ZYX[3, 3] = 1
    shown = worst_slice(labels_ZYX[None], labels_ZYX, labels_ZYX, ((1,),), plain_geometry((5, 6, 7), (1.0, 1.0, 1.0)))
    assert (shown.number, shown.differing) == (4, 0)


def test_regions_and_classes_that_nobody_drew_count_as_they_are_scored(run: Path) -> None:
    case = store.load(Layout(run).dataset, Dataset).cases[0]
    names = ("background", "core", "edema")
    labels = tuple(Label(name=name, value=value) for value, name in enumerate(names))
    plain = Scoring(labels, None, False)
    assert groups_of(plain, case) == ((1,), (2,))
    assert groups_of(plain, case.model_copy(update={"annotated": ("edema",)})) == ((2,),)
    whole = Region(name="whole", labels=(1, 2), paint=1)
    groups = groups_of(Scoring(labels, None, False, regions=(whole,)), case)
    assert groups == ((1, 2),)
    one, other = np.full((1, 1, 3), 1), np.array([[[1, 2, 0]]])
    assert differing_voxels(one, other, groups).tolist() == [1]
    assert differing_voxels(one, other, ((2,),)).tolist() == [1]
    assert differing_voxels(one, other, ((1,), (2,))).tolist() == [2]


@pytest.mark.parametrize(
    ("direction_XYZ", "axis", "expected"),
    [
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), 0, (False, (False, False))),
        ((-1, 0, 0, 0, -1, 0, 0, 0, 1), 0, (False, (True, True))),
        ((0, 1, 0, 1, 0, 0, 0, 0, 1), 0, (True, (False, False))),
        ((0, 0, 1, 1, 0, 0, 0, 1, 0), 0, (False, (True, False))),
        ((0, 0, 1, 1, 0, 0, 0, -1, 0), 0, (False, (False, False))),
        ((1, 0, 0, 0, 1, 0, 0, 0, 1), 2, (False, (True, False))),
    ],
    ids=["LPS", "RAS", "X to the back", "sagittal", "sagittal, head first", "across X"],
)
def test_the_front_or_the_head_is_above_and_the_left_on_the_right(
    direction_XYZ: tuple[int, ...], axis: int, expected: tuple
) -> None:
    geometry = plain_geometry((3, 4, 5), (1.0, 1.0, 1.0))
    turned = type(geometry)(**{**geometry.__dict__, "direction": tuple(map(float, direction_XYZ))})
    assert upright(turned, axis) == expected


def test_a_small_structure_is_enlarged_and_a_slice_without_any_is_whole() -> None:
    labelled_RC = np.zeros((100, 200), bool)
    assert labelled_part(labelled_RC) == (slice(0, 100), slice(0, 200))
    labelled_RC[40:80, 3:5] = True
    assert labelled_part(labelled_RC) == (slice(30, 90), slice(0, 16))


def test_contrast_is_that_of_what_is_labelled() -> None:
    image_RC = np.full((20, 20), -1000.0)
    image_RC[5:15] = 40.0
    image_RC[8:12, 8:12] = np.linspace(90.0, 110.0, 16).reshape(4, 4)
    image_RC[0] = 1000.0
    labelled_RC = image_RC > 80
    labelled_RC[0] = False
    low, high = window(image_RC, labelled_RC)
    assert -120 < low < -100
    assert 300 < high < 320
    assert window(image_RC, np.zeros_like(labelled_RC)) == (-1000.0, 1000.0)
    assert window(np.full((2, 2), 7.0), np.ones((2, 2), bool)) == (6.0, 8.0)
    assert window(np.full((2, 2), np.nan), np.ones((2, 2), bool)) == (0.0, 1.0)


def test_large_slices_and_images_without_contrast_can_be_drawn() -> None:
    labels_ZYX = np.zeros((1, 2500, 600), np.int16)
    labels_ZYX[0, 1000:1400, :300] = 1
    image_ZYX = np.full(labels_ZYX.shape, np.nan, np.float32)
    geometry = plain_geometry(labels_ZYX.shape, (1.0, 1.0, 1.0))
    shown = worst_slice(image_ZYX[None], labels_ZYX, np.zeros_like(labels_ZYX), ((1,),), geometry)
    png = draw(shown, ((1,),), ("MRI",))
    assert png.startswith(b"\x89PNG")
    assert len(png) < 300_000


def test_channels_are_drawn_by_name_each_with_its_own_contrast_and_photographs_in_colour() -> None:
    image_CRC = np.stack([np.linspace(0, top, 100).reshape(10, 10) for top in (100.0, 1.0, 50.0, 9.0, 1.0)])
    nothing_RC = np.zeros((10, 10), bool)
    drawn = pictures_of(image_CRC, nothing_RC, ("T1", "T2", "CT", "PET", "ADC"))
    assert list(drawn) == ["T1", "T2", "CT", "PET"]
    for picture_RC in drawn.values():
        np.testing.assert_allclose(picture_RC, drawn["T1"], atol=1e-6)
        assert (picture_RC.min(), picture_RC.max()) == (0, 1)
    assert list(pictures_of(image_CRC[:2], nothing_RC, ("MRI",))) == ["channel 0", "channel 1"]
    [colours_RCC] = pictures_of(image_CRC[:3], nothing_RC, ("red", "green", "blue")).values()
    assert colours_RCC.shape == (10, 10, 3)
    assert colours_RCC[-1, -1, 0] > colours_RCC[-1, -1, 2] > colours_RCC[-1, -1, 1]


@pytest.mark.parametrize(
    ("channels", "labelled", "expected"), [(1, 2, (840, 460)), (2, 2, (840, 880)), (3, 40, (840, 880))]
)
def test_every_channel_has_a_panel(channels: int, labelled: int, expected: tuple[int, int]) -> None:
    """Enlarged beside the whole slice of the first one, or whole where what is labelled is large."""
    labels_ZYX = np.zeros((1, 40, 40), np.int16)
    labels_ZYX[0, :labelled, :labelled] = 1
    image_CZYX = np.random.default_rng(0).normal(size=(channels, 1, 40, 40))
    shown = worst_slice(
        image_CZYX, labels_ZYX, np.zeros_like(labels_ZYX), ((1,),), plain_geometry((1, 40, 40), (1.0, 1.0, 1.0))
    )
    png = draw(shown, ((1,),), tuple("abc"[:channels]))
    assert (int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")) == expected


# ------------------------------------------------------------------------------------------------ files and commands


def test_what_is_no_report_is_not_replaced(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.html"
    other.write_text("<html>mine</html>")
    with pytest.raises(UserError, match=r"other\.html: this file is no report of autoseg"):
        report(run, output=other)
    assert other.read_text() == "<html>mine</html>"
    with pytest.raises(UserError, match="this is a folder"):
        report(run, output=tmp_path)
    written = report(run, output=tmp_path / "new" / "page.html", cases=0)
    assert report(run, output=written, cases=0) == written
    assert not Layout(run).report.exists()


def test_the_command_writes_the_page_and_says_where(run: Path) -> None:
    ended = CliRunner().invoke(app, ["report", str(run), "--cases", "1"], catch_exceptions=False)
    assert ended.exit_code == 0
    assert ended.stdout == f"{Layout(run).report}\n"
    assert len(Page(Layout(run).report).of("img")) == 2 + 1


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    ended = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert ended.exit_code == 2
    said = " ".join(ended.stderr.split())
    assert "plan.json: no such file. Is this the right folder? A run is made by: autoseg plan DATA -o RUN" in said


def test_text_is_escaped_once() -> None:
    shown = markup.table("a<b", ("x", "y"), (("a & b", "<i>"),))
    assert "<caption>a&lt;b</caption>" in shown
    assert "<th scope=row>a &amp; b</th><td>&lt;i&gt;</td>" in shown
    assert unescape(markup.listing(["a & b"])) == "<ul><li>a & b</li></ul>"
