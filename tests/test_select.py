"""Networks of random weights: which is best, and that `predict` uses it, needs no training."""

import json
import os
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import a_configuration, a_network, a_plan, a_planned_run
from synthetic import write_dataset
from typer.testing import CliRunner
from whole_probabilities import read_whole

from autoseg import cli, store
from autoseg.errors import UserError
from autoseg.image.formats import read_labels, write_labels
from autoseg.image.labels import label_maps
from autoseg.layout import Layout, ModelLayout, agreement_file, prediction_file, probabilities_file
from autoseg.network import checkpoint, unet
from autoseg.records import CaseScore, Configuration, Dataset, Label, Plan, Postprocessing, Rule, Run
from autoseg.scoring.comparison import Agreement
from autoseg.scoring.selection import Selection, selected
from autoseg.steps.ensemble import ensemble, ensemble_runs
from autoseg.steps.evaluate import Scoring, evaluate_all
from autoseg.steps.predict import predict
from autoseg.steps.predicting.combine import mean_of_probabilities
from autoseg.steps.predicting.members import members_of_runs, same_plans
from autoseg.steps.predicting.pairs import predicted_names
from autoseg.steps.select import choose, select

LABELS = tuple(Label(name=name, value=value) for name, value in (("background", 0), ("large", 100), ("small", 255)))


def write_network(run: Path, configuration: Configuration, fold: str, seed: int) -> None:
    """A finished training whose weights are random."""
    model = Layout(run).model(configuration.name, fold)
    torch.manual_seed(seed)
    model.root.mkdir(parents=True)
    checkpoint.save_weights(model.weights, unet.build(configuration.network))
    store.save(model.run, Run(
        autoseg_version="0", torch_version="0", configuration=configuration, fold=fold, seed=0, device="cpu",
        precision="fp32", compiled=False, finished=True,
    ))  # fmt: skip


def a_run(root: Path, data: Path, seed: int = 0) -> Path:
    """Two folds of a 2D and a 3D configuration on different grids, with predictions of their validation cases."""
    flat = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.25), network=a_network(dimension=2), patch_voxels=(8, 8),
    )  # fmt: skip
    deep = a_configuration(axes=(2, 0, 1), spacing_mm=(1.5, 1.5, 1.25), network=a_network())
    run = a_planned_run(root, data, flat, deep)
    cases = [case.id for case in store.load(Layout(run).dataset, Dataset).cases]
    for number, configuration in enumerate((flat, deep)):
        for fold in (0, 1):
            write_network(run, configuration, str(fold), 100 * seed + 10 * number + fold)
            for case in cases[fold::2]:
                folder = Layout(run).model(configuration.name, str(fold)).validation
                predict(
                    run, data / "imagesTr" / f"{case}.nii.gz", folder, configuration=configuration.name,
                    folds=[str(fold)], device="cpu",
                )  # fmt: skip
    return run


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs `a` and `b` of one data set, and images to predict."""
    torch.set_num_threads(1)
    place = tmp_path_factory.mktemp("select")
    data = write_dataset(
        place / "data", cases=4, shape=(6, 8, 8), spacing_mm=(1.5, 1.0, 1.25), label_values=(100, 255), held_out=2
    )
    a_run(place / "a", data)
    a_run(place / "b", data, seed=1)
    return place


def maps_in(folder: Path) -> dict[str, np.ndarray]:
    return {case: read_labels(path)[0] for case, path in label_maps(folder).items()}


def same(one: Path, other: Path) -> bool:
    first, second = maps_in(one), maps_in(other)
    return set(first) == set(second) and all(np.array_equal(first[case], second[case]) for case in first)


# ------------------------------------------------------------------------------------------------ ensembles of runs


def test_a_2d_and_a_3d_network_of_one_run_are_averaged_on_the_images_grid(place, tmp_path):
    images = place / "data" / "imagesTs"
    written = ensemble_runs([place / "a"], images, tmp_path / "out", save_probabilities=True, device="cpu")
    assert len(written) == 2
    for name in ("2d", "3d"):
        predict(place / "a", images, tmp_path / name, configuration=name, save_probabilities=True, device="cpu")
    ensemble([tmp_path / "2d", tmp_path / "3d"], tmp_path / "folders", save_probabilities=True)
    assert same(tmp_path / "out", tmp_path / "folders")
    case = next(iter(maps_in(tmp_path / "out")))
    own, of_folders = (read_whole(probabilities_file(tmp_path / name, case))[0] for name in ("out", "folders"))
    assert np.array_equal(own, of_folders)
    agreement = store.load(agreement_file(tmp_path / "out"), Agreement)
    assert agreement.members == (f"{place / 'a'}:2d", f"{place / 'a'}:3d")
    assert not list(tmp_path.glob("*unfinished*"))


@pytest.mark.parametrize("weights", [(3, 1, 0), (1, 0, 0)])
def test_every_weight_is_that_of_its_run_and_configuration(place, tmp_path, weights):
    image = place / "data" / "imagesTs" / "case_04.nii.gz"
    members = ((place / "a", "2d"), (place / "a", "3d"), (place / "b", "3d"))
    mean = 0.0
    for number, ((run, name), weight) in enumerate(zip(members, weights, strict=True)):
        out = tmp_path / str(number)
        predict(run, image, out, configuration=name, save_probabilities=True, device="cpu")
        mean += weight / sum(weights) * read_whole(probabilities_file(out, "case_04"))[0].astype(np.float32)
    four = (*weights[:2], 0, weights[2])
    ensemble_runs(
        [place / "a", place / "b"], image, tmp_path / "out", configurations=("2d", "3d"), weights=four,
        save_probabilities=True, device="cpu",
    )  # fmt: skip
    found = read_whole(probabilities_file(tmp_path / "out", "case_04"))[0]
    np.testing.assert_allclose(found, mean, atol=2e-3)


def test_two_runs_and_their_configurations_work_from_the_command_line(place, tmp_path):
    images = str(place / "data" / "imagesTs")
    command = ["ensemble", "--runs", str(place / "a"), str(place / "b"), "-i", images, "-o"]
    ended = CliRunner().invoke(cli.app, [*command, str(tmp_path / "two"), "--device", "cpu"])
    assert ended.exit_code == 0, ended.output
    assert len(maps_in(tmp_path / "two")) == 2
    assert store.load(agreement_file(tmp_path / "two"), Agreement).members == (
        f"{place / 'a'}:3d", f"{place / 'b'}:3d"
    )  # fmt: skip
    four = ["-c", "2d,3d", "--method", "vote", "--weights", "1,1,1,2", "--device", "cpu"]
    ended = CliRunner().invoke(cli.app, [*command, str(tmp_path / "four"), *four])
    assert ended.exit_code == 0, ended.output
    assert len(store.load(agreement_file(tmp_path / "four"), Agreement).members) == 4
    assert CliRunner().invoke(cli.app, ["ensemble", "a", "b", "-i", images, "-o", "c"]).exit_code == 2


def test_runs_that_do_not_belong_together_are_named_and_nothing_is_written(place, tmp_path):
    def refused(runs: list[Path], message: str, **more: object) -> None:
        with pytest.raises(UserError, match=message):
            ensemble_runs(runs, place / "data" / "imagesTs", tmp_path / "out", device="cpu", **more)
        assert not list(tmp_path.glob("out*"))

    other = a_planned_run(tmp_path / "other", place / "data", a_configuration(network=a_network()))
    plan = store.load(Layout(other).plan, Plan)
    labels = (plan.labels[0], plan.labels[1], Label(name="vessel", value=7))
    store.save(Layout(other).plan, plan.model_copy(update={"labels": labels}))
    refused([place / "a", other], "nothing is trained")
    write_network(other, plan.configurations[0], "0", 0)
    refused([place / "a", other], "different labels: .*small 255 against .*vessel 7")
    refused([place / "a"], "3d_lowres is not trained", configurations=["2d", "3d_lowres"])
    refused([place / "a"], "at least two", configurations=["2d"])
    refused([place / "a"], "3 weights for 2", weights=(1, 1, 1))
    refused([place / "a"], "Unknown method", method="median")
    with pytest.raises(UserError, match="an image or label map of the data"):
        ensemble_runs([place / "a"], place / "data" / "imagesTs", place / "data" / "labelsTr", device="cpu")


def test_channels_in_another_order_do_not_belong_together():
    first, other, renamed = (
        a_plan(a_configuration()).model_copy(update={"channels": channels})
        for channels in (("T1", "T2"), ("t2", "FLAIR"), ("t1w", "T2"))
    )
    assert same_plans([first, renamed], ["a", "b"]) is first
    with pytest.raises(UserError, match="a and b have different channels: T1, T2 against t2, FLAIR"):
        same_plans([first, other], ["a", "b"])


# ------------------------------------------------------------------------------------------------ selection


def test_the_best_pair_is_found_and_predict_uses_it(place, tmp_path):
    run, layout = place / "b", Layout(place / "b")
    chosen = select(run, device="cpu", workers=1)
    assert store.load(layout.selection, Selection) == chosen == selected(run)
    assert {each.name for each in chosen.candidates} == {"2d", "3d", "2d+3d"}
    assert [each.dice for each in chosen.candidates] == sorted((c.dice for c in chosen.candidates), reverse=True)
    assert chosen.cases == 4
    assert chosen.folds == ("0", "1")
    scores = evaluate_all(run, workers=1)
    assert {name: each.foreground_mean["dice"] for name, each in scores.items()} == pytest.approx(
        {each.name: each.dice for each in chosen.candidates}
    )
    pair = chosen.model_copy(update={"members": ("2d", "3d"), "single": "2d"})
    store.save(layout.selection, pair)
    images = place / "data" / "imagesTs"
    predict(run, images, tmp_path / "pair", device="cpu")
    ensemble_runs([run], images, tmp_path / "both", configurations=("2d", "3d"), device="cpu")
    assert same(tmp_path / "pair", tmp_path / "both")
    first, *others = sorted((tmp_path / "pair").glob("*.nii.gz"))
    before = {path: path.stat().st_mtime_ns for path in (first, *others)}
    others[0].unlink()
    heard: list = []
    predict(run, images, tmp_path / "pair", device="cpu", resume=True, report=heard.append)
    assert f"{len(others)} of {len(before)} cases are done already." in {getattr(each, "text", "") for each in heard}
    assert [path for path, when in before.items() if path.stat().st_mtime_ns != when] == [others[0]]
    assert same(tmp_path / "pair", tmp_path / "both")
    rule = Rule(label="large", action="drop_volume", minimum_mm3=1e9, dice_before=0.0, dice_after=1.0)
    store.save(layout.postprocessing, Postprocessing(learned_on="2d+3d", cases=4, rules=(rule,)))
    predict(run, images, tmp_path / "clean", device="cpu")
    assert all((each == 255).any() and not (each == 100).any() for each in maps_in(tmp_path / "clean").values())
    heard = []
    predict(run, images, tmp_path / "flat", configuration="2d", device="cpu", report=heard.append)
    assert any("learned on 2d+3d, so 2d goes without" in str(event) for event in heard)
    store.save(layout.postprocessing, Postprocessing(learned_on="2d", cases=4, rules=(rule,)))
    heard = []
    predict(run, images, tmp_path / "unclean", device="cpu", report=heard.append)
    assert same(tmp_path / "unclean", tmp_path / "both")
    assert any("learned on 2d, so 2d+3d goes without" in str(event) for event in heard)
    layout.postprocessing.unlink()
    for more in ({"part": "1/2"}, {"device": "cpu,cpu"}, {"save_probabilities": True, "probability_kind": "uint8"}):
        heard = []
        predict(run, images, tmp_path / "part", report=heard.append, **({"device": "cpu"} | more))
        assert any("A pair cannot do all that is asked for, so 2d alone is used." in str(event) for event in heard)
    store.save(layout.selection, chosen.model_copy(update={"members": ("2d",), "single": "2d"}))
    predict(run, images, tmp_path / "one", device="cpu")
    predict(run, images, tmp_path / "flat", configuration="2d", device="cpu")
    assert same(tmp_path / "one", tmp_path / "flat")
    layout.selection.unlink()


def test_pairs_are_combined_by_the_networks_that_have_not_seen_the_case_and_not_twice(place, tmp_path, monkeypatch):
    run, layout = place / "a", Layout(place / "a")
    select(run, device="cpu", workers=1)
    folder = ModelLayout(layout.cross_validation("2d+3d") / "fold_1").validation
    [case, _] = maps_in(folder)
    ensemble_runs(
        [run], place / "data" / "imagesTr" / f"{case}.nii.gz", tmp_path / "fold_1", configurations=("2d", "3d"),
        folds=["1"], device="cpu",
    )  # fmt: skip
    assert np.array_equal(maps_in(folder)[case], maps_in(tmp_path / "fold_1")[case])
    before = {path: path.stat().st_mtime_ns for path in layout.ensembles.rglob("*.nii.gz")}
    assert len(before) == 4
    listed: Counter[Path] = Counter()
    with monkeypatch.context() as patched:
        patched.setattr("autoseg.steps.select.label_maps", lambda folder: listed.update([folder]) or label_maps(folder))
        select(run, device="cpu", workers=1)
    assert max(listed.values()) <= 4  # however many cases there are
    assert {path: path.stat().st_mtime_ns for path in layout.ensembles.rglob("*.nii.gz")} == before
    newest = max(before.values()) + 10**10
    os.utime(layout.model("2d", "1").weights, ns=(newest, newest))
    select(run, device="cpu", workers=1)
    after = {path: path.stat().st_mtime_ns for path in layout.ensembles.rglob("*.nii.gz")}
    assert sum(after[path] != before[path] for path in before) == 2
    layout.selection.unlink()


def test_a_pair_that_was_stopped_half_way_is_not_scored(place, tmp_path, monkeypatch):
    """Also not where older networks had combined all of it: half of that would be left."""
    run = tmp_path / "run"
    a_run(run, place / "data")
    layout = Layout(run)
    combined = mean_of_probabilities
    written: list[Path] = []

    def stopped(files: list[Path], shares: tuple[float, ...], target: Path) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        combined(files, shares, target)
        written.append(target)

    for _ in range(2):
        written.clear()
        with monkeypatch.context() as patched:
            patched.setattr("autoseg.steps.select.mean_of_probabilities", stopped)
            with pytest.raises(KeyboardInterrupt):
                select(run, device="cpu", workers=1)
        assert predicted_names(run) == ("2d", "3d")
        assert set(evaluate_all(run, workers=1)) == {"2d", "3d"}
        select(run, device="cpu", workers=1)
        assert predicted_names(run) == ("2d", "3d", "2d+3d")
        later = time.time() + 100
        for name in ("2d", "3d"):
            for fold in ("0", "1"):
                os.utime(layout.model(name, fold).weights, (later, later))


def test_what_is_no_label_map_is_no_prediction(place, tmp_path):
    run = a_planned_run(tmp_path / "run", place / "data", *[a_configuration(name=name) for name in ("x", "y")])
    write_network(run, a_configuration(name="x"), "0", 0)
    path = prediction_file(Layout(run).model("x", "0").validation, "case_00", ".nii.gz")
    write_labels(path, *read_labels(place / "data" / "labelsTr" / "case_00.nii.gz"))
    for name in ("y", "x+y"):
        folder = ModelLayout(Layout(run).cross_validation(name) / "fold_0").validation
        folder.mkdir(parents=True)
        for junk in (".DS_Store", "._case_00.nii.gz", "case_00.nii.gz.unfinished-1-a.nii.gz"):
            (folder / junk).touch()
    assert predicted_names(run) == ("x",)
    assert set(evaluate_all(run, workers=1)) == {"x"}


def test_select_evaluate_and_postprocess_work_from_the_command_line(place):
    run = str(place / "a")

    def said(*arguments: str) -> str:
        ended = CliRunner().invoke(cli.app, [*arguments, "--workers", "1"])
        assert ended.exit_code == 0, ended.output
        return ended.stdout

    assert "predict uses " in said("select", run, "--device", "cpu")
    assert set(json.loads(said("evaluate", run, "--json"))) == {"2d", "3d", "2d+3d"}
    alone = json.loads(said("evaluate", run, "-c", "2d+3d", "--tolerance", "large=3,small=1", "--no-surface", "--json"))
    assert len(alone["cases"]) == 4
    learned = said("postprocess", run, "-c", "2d+3d", "--fraction", "0.2", "--connectivity", "3", "--no-test", "--json")
    assert json.loads(learned)["learned_on"] == "2d+3d"
    Layout(place / "a").postprocessing.unlink()
    Layout(place / "a").selection.unlink()


def test_configurations_without_a_common_fold_are_refused(place, tmp_path):
    run = a_planned_run(tmp_path / "run", place / "data", *[a_configuration(name=name) for name in ("x", "y")])
    with pytest.raises(UserError, match="no validation predictions of any configuration"):
        select(run)
    for name, fold in (("x", "0"), ("y", "1")):
        write_network(run, a_configuration(name=name), fold, 0)
        path = prediction_file(Layout(run).model(name, fold).validation, "case_00", ".nii.gz")
        write_labels(path, *read_labels(place / "data" / "labelsTr" / "case_00.nii.gz"))
    with pytest.raises(UserError, match=r"no fold is trained for all configurations \(x: fold_0; y: fold_1\)"):
        select(run)
    with pytest.raises(UserError, match=r"no validation predictions of z.*There are some of: x, y"):
        select(run, configurations=["x", "z"])
    chosen = select(run, configurations=["x"], workers=1)
    assert chosen.members == ("x",)
    assert chosen.candidates[0].dice == 1.0


def test_students_are_only_taken_where_they_are_named(place, tmp_path):
    names = ("x", "x_student_small", "y")
    run = a_planned_run(tmp_path / "run", place / "data", *[a_configuration(name=name) for name in names])
    for name in names:
        write_network(run, a_configuration(name=name), "0", 0)
        path = prediction_file(Layout(run).model(name, "0").validation, "case_00", ".nii.gz")
        write_labels(path, *read_labels(place / "data" / "labelsTr" / "case_00.nii.gz"))
    tried = select(run, pairs=False, workers=1).candidates
    assert {candidate.members for candidate in tried} == {("x",), ("y",)}
    named = select(run, configurations=["x", "x_student_small"], pairs=False, workers=1).candidates
    assert {candidate.members for candidate in named} == {("x",), ("x_student_small",)}
    assert members_of_runs([run], None) == ((run, "x"), (run, "y"))
    assert members_of_runs([run], ["x_student_small", "y"]) == ((run, "x_student_small"), (run, "y"))


def scored(*dice: float) -> tuple[CaseScore, ...]:
    return tuple(CaseScore(id=f"c{n}", values={"dice": (value, value)}) for n, value in enumerate(dice))


def test_of_equally_good_candidates_the_simplest_is_chosen_and_chance_is_stated():
    scoring = Scoring(LABELS, None, surface=False)
    values = np.linspace(0.5, 0.9, 8)
    chosen = choose({("2d",): scored(*values), ("2d", "3d"): scored(*values)}, scoring, ("0",))
    assert chosen.members == ("2d",)
    gains = np.linspace(0.04, 0.06, 8)
    better = choose({("2d",): scored(*values), ("2d", "3d"): scored(*(values + gains))}, scoring, ("0",))
    assert better.members == ("2d", "3d")
    assert better.single == "2d"
    assert better.candidates[1].p_value == pytest.approx(2 / 2**8)
    assert "2d+3d has the highest mean Dice, 0.7500 on 8 validation cases; 2d has 0.7000, p = 0.0078" in better.because
    few = choose({("2d",): scored(0.5, 0.6), ("3d",): scored(0.4, 0.5)}, scoring, ("0",))
    assert few.candidates[1].p_value is None
