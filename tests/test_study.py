"""Studies on tiny volumes: what is varied, what is refused, what is not done twice, and what the figures mean."""

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from typer.testing import CliRunner

from autoseg.cli import app
from autoseg.errors import Interrupted, UserError
from autoseg.events import Event, Said, Trained, silent
from autoseg.layout import Layout
from autoseg.records import AugmentSpec, CaseScore, Configuration, Run, Scores, Splits, TrainSpec
from autoseg.scoring import study as figures
from autoseg.scoring.study import Setting, Study
from autoseg.steps import study as step
from autoseg.steps.training.settings import FIELDS, fields_in, settings_of, with_fields
from autoseg.store import load, save

CASES = 30
"""Six of them are validated on, which is what a test needs."""


def tiny() -> Configuration:
    augment = AugmentSpec(rotation_rad=(0.0,) * 3, rotation_chance=0.0, scale_chance=0.0)
    spec = TrainSpec(epochs=2, steps_per_epoch=2, warmup_steps=1, augment=augment)
    return a_configuration(network=a_network(), train=spec)


@pytest.fixture(scope="module", autouse=True)
def nothing_slow() -> Iterator[None]:
    """No picture of each single training, and scoring in this process: workers would take seconds to start."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("autoseg.steps.training.learn.draw_curves", lambda path, history: None)
        patched.setattr("autoseg.steps.evaluate.allowed_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("study")
    data = write_dataset(place / "data", cases=CASES, shape=(8, 8, 8))
    return a_planned_run(place / "run", data, tiny())


@pytest.fixture(scope="module")
def studied(planned: Path) -> tuple[Path, Study]:
    """A run with a study of two losses and two seeds."""
    run = planned.parent / "studied"
    shutil.copytree(planned, run)
    return run, start(run)


@pytest.fixture
def run(studied: tuple[Path, Study], tmp_path: Path) -> Path:
    """The preprocessed run without the study."""
    shutil.copytree(studied[0], tmp_path / "run", ignore=shutil.ignore_patterns("studies"))
    return tmp_path / "run"


def start(run: Path, *vary: str, **options: object) -> Study:
    given = {"seeds": 2, "epochs": 2, "devices": ["cpu"], "workers": 1} | options
    return step.study(run, vary or ("loss=ce,dice_ce",), **given)  # type: ignore[arg-type]


def never_train(*_: object, **__: object) -> Run:
    raise AssertionError("a training was started")


# ------------------------------------------------------------------------------------------------ what is varied


def test_several_fields_make_a_grid() -> None:
    grid = settings_of(tiny(), ["loss=ce,focal:gamma=1,alpha=0.5", "norm=group,instance"], ["batch_size=1"])
    assert list(grid) == [
        "loss=ce+norm=group", "loss=ce+norm=instance", "loss=focal:gamma=1,alpha=0.5+norm=group",
        "loss=focal:gamma=1,alpha=0.5+norm=instance",
    ]  # fmt: skip
    changed = grid["loss=focal:gamma=1,alpha=0.5+norm=group"]
    assert (changed.train.loss, changed.network.norm) == ("focal:gamma=1,alpha=0.5", "group")
    assert {each.batch_size for each in grid.values()} == {1}
    back = {"train": tiny().train, "network": tiny().network, "batch_size": 2}
    assert changed.model_copy(update=back) == tiny()


@pytest.mark.parametrize(
    ("pair", "read"),
    [
        ("learning_rate=0.01", lambda c: c.train.learning_rate == 0.01),
        ("optimizer=sgd", lambda c: c.train.optimizer == "sgd"),
        ("average_decay=0.5", lambda c: c.train.average_decay == 0.5),
        ("foreground_share=0", lambda c: c.train.foreground_share == 0),
        ("kind=residual", lambda c: c.network.kind == "residual"),
        ("deep_supervision=no", lambda c: c.network.deep_supervision is False),
        ("batch_dice=yes", lambda c: c.batch_dice is True),
        ("gamma_chance=0.9", lambda c: c.train.augment.gamma_chance == 0.9),
    ],
)
def test_numbers_words_and_switches_can_be_set(pair: str, read: Callable[[Configuration], bool]) -> None:
    assert read(with_fields(tiny(), [pair]))
    assert not read(tiny())


@pytest.mark.parametrize(
    ("vary", "said"),
    [
        ("los=ce", "no field 'los'.*loss.*norm"),
        ("loss=dicee", "no loss 'dicee'.*dice_ce"),
        ("norm=layer", "norm=layer.*'instance', 'batch' or 'group'"),
        ("optimizer=adam", "'adamw', 'muon' or 'sgd'"),
        ("batch_size=0", "greater than or equal to 1"),
        ("learning_rate=fast", "valid number"),
        ("loss=ce,ce", "different values"),
        ("loss", "different values"),
        ("loss=", "different values"),
        ("epochs=3", "no field 'epochs'"),
        ("loss=dice,weighted_ce:class_weights=1/2", "but there are 3 classes"),
    ],
)
def test_what_cannot_be_varied_is_refused_before_anything_is_trained(
    planned: Path, monkeypatch: pytest.MonkeyPatch, vary: str, said: str
) -> None:
    monkeypatch.setattr(step, "train_one", never_train)
    with pytest.raises(UserError, match=said):
        start(planned, "loss=ce,dice" if vary[:4] != "loss" else "norm=group", vary)
    assert not Layout(planned).study("loss").root.parent.exists()


def test_a_field_varied_twice_and_nothing_to_vary_are_refused() -> None:
    with pytest.raises(UserError, match="loss is varied twice"):
        settings_of(tiny(), ["loss=ce", "loss=dice"])
    with pytest.raises(UserError, match="needs something to vary"):
        settings_of(tiny(), [])
    with pytest.raises(UserError, match="one value"):
        with_fields(tiny(), ["loss=ce,dice"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epochs": None}, "--max-time 10m or --epochs 20"),
        ({"max_seconds": 5.0}, "--max-time 10m or --epochs 20"),
        ({"fold": "9"}, "no fold '9'"),
        ({"fold": "all"}, "no validation cases"),
        ({"seeds": 0}, "at least one seed"),
        ({"name": "../models"}, r"--name \.\./models: a study is one folder"),
        ({"configuration": "4d"}, "no configuration '4d'"),
    ],
)
def test_impossible_studies_are_refused_before_anything_is_trained(
    planned: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], said: str
) -> None:
    monkeypatch.setattr(step, "train_one", never_train)
    with pytest.raises(UserError, match=said):
        start(planned, **options)


def test_the_fields_that_are_the_datas_own_cannot_be_varied() -> None:
    assert {"loss", "batch_size", "norm", "kind", "optimizer", "schedule", "warmup_steps"} <= set(FIELDS)
    assert not {"name", "dimension", "in_channels", "classes", "patch_voxels", "epochs", "previous"} & set(FIELDS)
    assert fields_in(["loss=ce,dice", "norm=group"]) == ("loss", "norm")


# ------------------------------------------------------------------------------------------------ what it leaves


def test_a_study_trains_every_setting_with_every_seed_and_writes_what_it_found(studied: tuple[Path, Study]) -> None:
    run, ended = studied
    files = Layout(run).study("loss")
    for setting, loss in (("loss=ce", "ce"), ("loss=dice_ce", "dice_ce")):
        for seed in (0, 1):
            record = load(files.model(setting, "0", seed).run, Run)
            assert (record.finished, record.seed, record.steps, record.fold) == (True, seed, 4, "0")
            assert record.configuration.train.loss == loss
    assert ended == load(files.study, Study)
    assert ended.finished
    assert ended.cases == CASES / 5
    assert files.picture.read_bytes().startswith(b"\x89PNG")
    assert len(files.table.read_text().splitlines()) == 1 + 4
    assert not Layout(run).models.exists()


def test_the_dice_of_a_setting_is_the_mean_of_its_seeds(studied: tuple[Path, Study]) -> None:
    run, ended = studied
    files = Layout(run).study("loss")
    for setting in ended.settings:
        of_seeds = [load(files.model(setting.name, "0", s).scores, Scores).foreground_mean["dice"] for s in (0, 1)]
        assert setting.dice == pytest.approx(np.mean(of_seeds))
        assert setting.spread == pytest.approx(abs(of_seeds[0] - of_seeds[1]) / math.sqrt(2))
    assert ended.settings[0].dice >= ended.settings[1].dice


def test_the_test_is_over_cases_with_seeds_averaged(studied: tuple[Path, Study]) -> None:
    run, ended = studied
    files = Layout(run).study("loss")
    rows = [row for row in ended.differences if (row.metric, row.label) == ("dice", "foreground")]
    assert [(row.first, row.second, row.cases) for row in rows] == [("loss=ce", "loss=dice_ce", CASES / 5)]
    assert ended.settings[1].p_against_best == rows[0].p_wilcoxon_holm
    assert ended.settings[0].p_against_best is None
    means = {}
    for name in (rows[0].first, rows[0].second):
        per_seed = [load(files.model(name, "0", seed).scores, Scores) for seed in (0, 1)]
        means[name] = np.mean([[np.mean(case.values["dice"]) for case in scores.cases] for scores in per_seed], axis=0)
    assert rows[0].difference == pytest.approx(float(np.mean(means[rows[0].first] - means[rows[0].second])))


def test_a_finished_study_trains_nothing_again_and_more_seeds_train_only_those(
    studied: tuple[Path, Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(studied[0], run)
    monkeypatch.setattr(step, "train_one", never_train)
    again = start(run)
    assert again.settings == studied[1].settings
    trained, meanwhile = [], []

    def copy(*given: object) -> None:
        folder = given[-1].folder  # type: ignore[attr-defined]
        trained.append((folder.parent.name, folder.name))
        meanwhile.append(load(Layout(run).study("loss").study, Study))
        shutil.copytree(folder.with_name("fold_0.seed_1"), folder)

    monkeypatch.setattr(step, "train_one", copy)
    more = start(run, seeds=3)
    assert trained == [("loss=ce", "fold_0.seed_2"), ("loss=dice_ce", "fold_0.seed_2")]
    assert [len(setting.trials) for setting in more.settings] == [3, 3]
    assert (meanwhile[1].conclusion, meanwhile[1].differences, meanwhile[1].cases) == ("", (), 0)  # not the old ones


def test_a_setting_that_cannot_be_trained_is_named_and_the_others_are_compared(
    studied: tuple[Path, Study], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(studied[0], run)

    def diverges(*given: object) -> None:
        if given[3] == 0:  # the seed
            raise UserError("No loss was finite.", fix="Go on with --resume --lr.")
        folder = given[-1].folder  # type: ignore[attr-defined]
        shutil.copytree(folder.parent.with_name("loss=ce") / folder.name, folder)

    monkeypatch.setattr(step, "train_one", diverges)
    monkeypatch.setattr(step, "draw_study", lambda *given: None)
    ended = start(run, "loss=dice,ce,dice_ce", name="loss")
    assert ended.settings[:2] == studied[1].settings
    (last,) = ended.settings[2:]
    assert (last.name, last.failed, len(last.trials)) == ("loss=dice", ("seed 0: No loss was finite.",), 1)
    assert not ended.finished
    said = "loss=dice is not compared, a training failed: seed 0: No loss was finite."
    assert ended.conclusion == f"{studied[1].conclusion} {said}"
    assert ended.differences == studied[1].differences
    with pytest.raises(UserError, match=r"no setting came to its end\. loss=dice .*: seed 0: No loss was finite\.$"):
        start(run, "loss=dice", seeds=1, name="alone")
    monkeypatch.setattr(step, "study", lambda *given, **options: ended)
    shown = CliRunner().invoke(app, ["study", str(run), "--vary", "loss=dice,ce,dice_ce", "--epochs", "2"])
    assert (shown.exit_code, said in " ".join(shown.output.split())) == (1, True)


def test_a_stopped_study_goes_on_where_it_was(run: Path, studied: tuple[Path, Study]) -> None:
    import signal

    seen = []

    def stop(event: Event) -> None:
        if isinstance(event, Trained):
            seen.append(event)
            if len(seen) == 6:  # in the second training
                signal.raise_signal(signal.SIGINT)

    with pytest.raises(Interrupted) as stopped:
        start(run, report=stop)
    words = stopped.value.how_to_resume
    assert words.startswith("autoseg study")
    assert all(part in words for part in ("--vary loss=ce,dice_ce", "--seeds 2", "--epochs 2", "--device cpu"))
    partial = load(Layout(run).study("loss").study, Study)
    assert not partial.finished
    assert [len(setting.trials) for setting in partial.settings] == [1, 0]
    said: list[str] = []
    ended = start(run, report=lambda event: said.append(event.text) if isinstance(event, Said) else None)
    assert any(text.startswith("4 trainings, 1 of them done") for text in said)
    dice = {setting.name: setting.dice for setting in ended.settings}
    assert dice == {setting.name: setting.dice for setting in studied[1].settings}


def test_a_study_does_not_go_on_with_other_folds(studied: tuple[Path, Study], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(studied[0], run)
    splits = load(Layout(run).splits, Splits)
    save(Layout(run).splits, splits.model_copy(update={"folds": splits.folds[::-1]}))
    with pytest.raises(UserError, match="its fold has changed since"):
        start(run)


def test_a_study_of_the_same_name_with_another_length_is_refused(studied: tuple[Path, Study]) -> None:
    for other in ({"epochs": 3}, {"fixed": ["batch_size=4"]}):
        with pytest.raises(UserError, match=r"another length, fold, configuration or --set.*--name"):
            start(studied[0], **other)


def test_under_a_time_limit_all_settings_have_the_same_batch(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared: list[str] = []
    monkeypatch.setattr(step, "set_up", lambda device: prepared.append(device.name))
    monkeypatch.setattr(step, "seconds_per_sample", lambda configuration, device, _: float(prepared == ["cpu"]))
    plan = json.loads(Layout(run).plan.read_text())
    plan["configurations"][0]["batch_size"] = 8
    Layout(run).plan.write_text(json.dumps(plan))
    ended = start(run, seeds=1, epochs=None, max_seconds=0.3)
    assert [setting.batch_size for setting in ended.settings] == [2, 2]
    used = [load(Layout(run).study("loss").model(name, "0", 0).run, Run) for name in ("loss=ce", "loss=dice_ce")]
    assert [(record.configuration.batch_size, record.max_seconds) for record in used] == [(2, 0.3)] * 2


def test_under_a_time_limit_all_trainings_have_epochs_of_the_same_length(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed = iter((0.001, 0.004, 0.002))
    monkeypatch.setattr(step, "seconds_per_sample", lambda configuration, device, _: next(timed))
    monkeypatch.setattr("autoseg.steps.training.begin.seconds_per_sample", lambda configuration, device, _: next(timed))
    plan = json.loads(Layout(run).plan.read_text())
    plan["configurations"][0]["train"]["steps_per_epoch"] = 250
    Layout(run).plan.write_text(json.dumps(plan))
    first = start(run, "loss=ce,dice", seeds=1, epochs=None, max_seconds=0.8)
    assert next(timed) == 0.004
    used = [load(Layout(run).study("loss").model(name, "0", 0).run, Run) for name in ("loss=ce", "loss=dice")]
    assert [record.configuration.train.steps_per_epoch for record in used] == [10, 10]
    assert start(run, "loss=ce,dice", seeds=1, epochs=None, max_seconds=0.8).settings == first.settings


def test_a_varied_norm_is_trained_even_where_the_planner_would_take_another(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended = start(run, "norm=batch,instance", seeds=1, epochs=1)
    assert len(ended.settings) == 2
    record = load(Layout(run).study("norm").model("norm=batch", "0", 0).run, Run)
    assert record.configuration.network.norm == "batch"


# ------------------------------------------------------------------------------------------------ figures


def rows(loss: list[float], noise: float, dice: list[float]) -> list[dict[str, float | None]]:
    return [
        {"seconds": 10.0 * (n + 1), "loss": loss[n], "loss_noise": noise, "dice": dice[n], "dice_running": dice[n]}
        for n in range(len(loss))
    ]


def test_loss_noise_does_not_depend_on_the_scale_and_offset_of_the_loss() -> None:
    falling = [1.0, 0.5, 0.3, 0.2]
    noise = figures.loss_noise(rows(falling, 0.08, falling))
    assert noise == pytest.approx(0.08 / 0.8)
    assert figures.loss_noise(rows([7 * v - 3 for v in falling], 7 * 0.08, falling)) == pytest.approx(noise)
    assert figures.loss_noise(rows(falling[::-1], 0.1, falling)) is None


def test_dice_noise_measures_jumps_and_not_the_trend() -> None:
    rising = list(np.linspace(0.1, 0.9, 40))
    jumps = np.random.default_rng(0).normal(0, 0.05, 4000)
    steady = figures.dice_noise(rows(rising, 0.0, rising))
    assert steady is not None
    assert steady < 0.02
    jumping = rows(list(jumps), 0.0, list(0.5 + jumps))
    assert figures.dice_noise(jumping) == pytest.approx(0.05, rel=0.05)
    assert figures.dice_noise(jumping[:3]) is None


def test_arrival_is_the_first_time_that_the_goal_is_reached() -> None:
    history = rows([1.0] * 4, 0.1, [0.2, 0.7, 0.6, 0.8])
    assert figures.reached_share(history, 0.65) == pytest.approx(0.5)
    assert figures.reached_share(history, 0.9) is None
    assert figures.final_dice(history) == 0.8
    assert figures.final_dice([{"dice_running": None}]) is None
    assert figures.settled_share(history) == 1.0
    assert figures.settled_share(rows([1.0] * 4, 0.1, [0.2, 0.75, 0.75, 0.8])) == pytest.approx(0.5)
    assert figures.settled_share([{"dice_running": None}]) is None


def test_trainings_that_got_far_fewer_steps_than_others_are_named() -> None:
    def history(steps: float) -> dict[int, list[dict[str, float | None]]]:
        return {0: [{"step": 1.0}, {"step": steps}]}

    assert step.unequal_steps({"loss=ce": history(110), "loss=dice": history(60)}) == ""
    said = step.unequal_steps({"loss=ce": history(110), "loss=dice": history(50)})
    assert said.startswith("From 50 steps (loss=dice, seed 0) to 110 (loss=ce, seed 0)")


def test_seeds_are_averaged_case_by_case_where_defined() -> None:
    def scores(**cases: tuple[float | None, float]) -> Scores:
        each = tuple(CaseScore(id=name, values={"dice": dice}) for name, dice in cases.items())
        return Scores(
            prediction="", reference="", labels=("x", "y"), policy="", cases=each, mean={}, foreground_mean={}
        )

    one, other = scores(a=(None, 0.5), b=(0.1, 0.1)), scores(b=(0.3, 0.3), a=(0.4, 0.7))
    means = {case.id: case.values["dice"] for case in step.seed_means([one, other])}
    assert means == {"a": (0.4, pytest.approx(0.6)), "b": (pytest.approx(0.2), pytest.approx(0.2))}
    with pytest.raises(UserError, match="not all seeds were scored on the same cases, b is only in some"):
        step.seed_means([one, scores(a=(0.4, 0.7))])


@pytest.mark.parametrize(
    ("chances", "spread", "said"),
    [
        ((0.01, 0.2), 0.01, "beats b by more than chance; its lead over c may be chance"),
        ((None, None), 0.01, "its lead over b, c may be chance"),
        ((0.01, 0.02), 0.01, "beats b, c by more than chance."),
        ((0.01, 0.02), 0.1, "beats c by more than chance; its lead over b is real for these networks, but seeds may"),
        ((0.01, 0.02), None, "its lead over b, c is real for these networks, but seeds may undo it"),
    ],
)
def test_the_conclusion_says_which_leads_are_real(
    chances: tuple[float | None, ...], spread: float | None, said: str
) -> None:
    settings = [
        Setting(name=name, batch_size=2, dice=dice, p_against_best=chance, spread=spread)
        for name, dice, chance in zip("abc", (0.9, 0.8, 0.7), (None, *chances), strict=True)
    ]
    assert said in figures.conclude(settings, 52, 3)


def test_trainings_side_by_side_share_what_cases_may_take_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int | None] = []
    monkeypatch.setattr(step, "train_one", lambda *given: limits.append(given[6].cache_bytes))
    monkeypatch.setattr(step, "usual_limit_bytes", lambda: 1000.0)

    def beside(work: object, jobs: list[step.Job], devices: list[str]) -> list[step.Job]:
        for job in jobs:
            step.train_job(job, devices[0])
        return jobs

    monkeypatch.setattr(step, "side_by_side", beside)
    job = step.Job(Path("run"), Path("run"), "planned", a_configuration(network=a_network()), "0", 0, 1, None, 1)
    assert len(list(step._trained([job, job], ["cuda:0", "cuda:1", "cuda:2"], silent))) == 2
    assert len(list(step._trained([job], ["cpu"], silent))) == 1
    assert limits == [333, 333, None]
