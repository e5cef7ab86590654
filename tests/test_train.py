"""Training on tiny synthetic volumes: what it leaves behind, how it stops and goes on, what it refuses."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from fingerprints import alike, fingerprint
from planned import a_configuration, a_network, a_planned_run
from safetensors.numpy import load_file
from synthetic import write_dataset

from autoseg.errors import Interrupted, UserError
from autoseg.events import Event, Said, Started, Trained, Warned, silent
from autoseg.image.formats import read_labels
from autoseg.layout import Layout, ModelLayout
from autoseg.network import checkpoint, pieces, unet
from autoseg.network.device import Device, cpu_convolves_bf16, native_precision
from autoseg.records import AugmentSpec, Configuration, Dataset, Memory, Plan, Run, Scores, Splits, TrainSpec
from autoseg.steps.predicting.models import as_trained
from autoseg.steps.predicting.predictor import Predictor
from autoseg.steps.preprocess import preprocess
from autoseg.steps.run import run as whole_run
from autoseg.steps.train import train, train_seeds
from autoseg.steps.training.options import (
    Machine,
    Options,
    fit_to_time,
    resume_command,
    seconds_per_sample,
    with_options,
    with_suited_decay,
    with_suited_variation,
)
from autoseg.steps.training.work import Work
from autoseg.store import TEMPORARY, load, save

STEPS = 2


def tiny() -> Configuration:
    """Two epochs of two steps on patches of 8 voxels."""
    spec = TrainSpec(
        epochs=2, steps_per_epoch=STEPS, warmup_steps=1, average_decay=0.9,
        augment=AugmentSpec(
            rotation_rad=(0.5,) * 3, mirror_axes=(1,), mirror_from_patches=0, extra_movement_to_patches=0
        ),
    )  # fmt: skip
    return a_configuration(network=a_network(), train=spec)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that is planned and no more; tests copy it."""
    place = tmp_path_factory.mktemp("train")
    data = write_dataset(place / "data", cases=4, shape=(8, 10, 12))
    return a_planned_run(place / "planned", data, tiny())


@pytest.fixture(scope="module")
def preprocessed(planned: Path) -> Path:
    run = planned.parent / "preprocessed"
    shutil.copytree(planned, run)
    preprocess(run, workers=1)
    return run


@pytest.fixture(scope="module")
def trained(preprocessed: Path) -> Path:
    """A run whose fold 0 was trained without interruption."""
    run = preprocessed.parent / "trained"
    shutil.copytree(preprocessed, run)
    start(run)
    return run


@pytest.fixture
def run(preprocessed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run of its own for each test, preprocessed; its curves, which take a second, are not drawn."""
    monkeypatch.setattr("autoseg.steps.training.learn.draw_curves", lambda path, history: None)
    shutil.copytree(preprocessed, tmp_path / "run")
    return tmp_path / "run"


def start(run: Path, **options: object) -> Run:
    """Train fold 0 on the CPU."""
    return train(run, **({"configuration": "3d", "fold": "0", "device": "cpu", "workers": 1} | options))  # type: ignore[arg-type]


def start_seeds(run: Path, resume: str, asked: Options = Options()) -> tuple[Run, ...]:
    """Train two seeds of fold 0 on the CPU."""
    return train_seeds(run, (0, 1), configuration="3d", resume=resume, asked=asked, machine=Machine("cpu", 1))


def at_step(number: int, action: Callable[[], None]) -> Callable[[Event], None]:
    """A report that acts when so many steps have been announced."""
    seen = []

    def report(event: Event) -> None:
        if isinstance(event, Trained):
            seen.append(event)
            if len(seen) == number:
                action()

    return report


def files_in(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def history_of(model: ModelLayout) -> list[dict]:
    return [json.loads(line) for line in model.history.read_text().splitlines()]


# ------------------------------------------------------------------------------------------------ what it leaves


def test_training_writes_weights_state_history_curves_and_scores(trained: Path) -> None:
    layout = Layout(trained)
    model = layout.model("3d", "0")
    network = unet.build(tiny().network)
    for path in (model.weights, model.best):
        checkpoint.load_weights(path, network)
    assert model.resume_tensors.is_file()
    assert model.curves.read_bytes().startswith(b"\x89PNG")
    rows = history_of(model)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, STEPS), (2, 2 * STEPS)]
    assert all(np.isfinite(row["loss"]) and 0 < row["learning_rate"] <= tiny().train.learning_rate for row in rows)
    held_out = load(layout.splits, Splits).folds[0].validation
    scores = load(model.scores, Scores)
    assert tuple(case.id for case in scores.cases) == held_out
    assert all((model.validation / f"{case}.nii.gz").is_file() for case in held_out)
    record = load(model.run, Run)
    assert record.finished
    assert (record.steps, record.fold, record.device, record.compiled) == (2 * STEPS, "0", "cpu", False)
    assert record.seconds > 0
    assert record.validation_dice == scores.mean["dice"]
    assert record.configuration == tiny()
    assert not list(trained.rglob(f"*{TEMPORARY}*"))


def test_the_weights_are_the_average_that_the_state_holds(trained: Path) -> None:
    model = Layout(trained).model("3d", "0")
    weights, state = load_file(model.weights), load_file(model.resume_tensors)
    names = [name for name, _ in unet.build(tiny().network).named_parameters()]
    assert len(names) > 5
    for index, name in enumerate(names):
        np.testing.assert_array_equal(weights[name], state[f"average.{index}"])
    assert any(not np.array_equal(weights[name], state[f"network.{name}"]) for name in names)


def test_validation_is_of_the_weights_that_prediction_loads(trained: Path) -> None:
    predictor = Predictor(trained, folds=["0"], device="cpu", postprocess=False)
    cases = {case.id: case.images for case in load(Layout(trained).dataset, Dataset).cases}
    validated = sorted(Layout(trained).model("3d", "0").validation.glob("*.nii.gz"))
    assert validated
    for path in validated:
        labels_ZYX, _ = read_labels(path)
        assert labels_ZYX.any()
        np.testing.assert_array_equal(predictor.predict(cases[path.name.removesuffix(".nii.gz")]), labels_ZYX)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others(trained: Path, run: Path) -> None:
    same = load_file(Layout(trained).model("3d", "0").weights)
    start(run)
    again = load_file(Layout(run).model("3d", "0").weights)
    assert all(np.array_equal(again[name], same[name]) for name in same)
    start(run, seed=3)
    other = load_file(Layout(run).model("3d", "0", seed=3).weights)
    assert not all(np.array_equal(other[name], same[name]) for name in same)


def test_options_beat_the_plan_and_are_written_down(run: Path) -> None:
    start(run, epochs=1, batch_size=1, learning_rate=0.005, loss="ce", seed=7)
    record = load(Layout(run).model("3d", "0", seed=7).run, Run)
    used = record.configuration
    assert (used.train.epochs, used.batch_size, used.train.learning_rate, used.train.loss) == (1, 1, 0.005, "ce")
    assert (record.seed, record.steps) == (7, STEPS)


def test_all_learns_from_every_case_and_validates_on_none(run: Path) -> None:
    record = start(run, fold="all", epochs=1)
    model = Layout(run).model("3d", "all")
    assert record.finished
    assert record.validation_dice == ()
    assert model.weights.is_file()
    assert not model.scores.exists()


def test_a_time_limit_ends_the_training_and_is_written_down(run: Path) -> None:
    record = start(run, max_seconds=0.5)
    assert record.max_seconds == 0.5
    assert record.seconds >= 0.5
    assert 1 <= record.steps < STEPS * tiny().train.epochs * 100
    assert record.finished


def test_a_short_time_limit_shrinks_the_batch_unless_it_was_asked_for() -> None:
    planned = tiny().model_copy(update={"batch_size": 12})
    fitted, note = fit_to_time(planned, Options(max_seconds=1500.0), seconds=0.02)
    assert fitted.batch_size == 5
    assert "Batch size 5 instead of 12" in note
    asked = with_options(planned, Options(max_seconds=1500.0, batch_size=9))
    kept, note = fit_to_time(asked, Options(max_seconds=1500.0, batch_size=9), seconds=0.02)
    assert (kept.batch_size, note) == (9, "")


def test_weights_decay_as_much_in_a_shorter_training() -> None:
    spec = TrainSpec(epochs=100, steps_per_epoch=50, augment=tiny().train.augment)
    assert (spec.learning_rate, spec.weight_decay) == (1e-3, 0.01)
    planned = tiny().model_copy(update={"train": spec})

    def decay(asked: Options, seconds: float | None = None, of: Configuration = planned) -> float:
        fitted, note = with_suited_decay(with_options(of, asked), of, asked, seconds)
        assert bool(note) == (fitted != with_options(of, asked))
        return fitted.train.weight_decay

    assert decay(Options()) == 0.01
    assert decay(Options(epochs=10)) == 0.1
    assert decay(Options(epochs=10, learning_rate=5e-4)) == 0.2
    assert decay(Options(epochs=200)) == 0.01
    assert decay(Options(epochs=1)) == 1.0
    assert decay(Options(epochs=1, learning_rate=1e-2)) == 0.1  # at most a thousandth per step
    _, note = with_suited_decay(planned, planned, Options(max_seconds=0.5, batch_size=2), seconds=0.1)
    assert note == "Weight decay 1 instead of 0.01: the most that is allowed, 5 % of the plan's in all."
    assert decay(Options(max_seconds=50.0, batch_size=2), seconds=0.1) == 0.2
    assert decay(Options(epochs=10, init="other")) == 0.01
    with_momentum = planned.model_copy(update={"train": spec.model_copy(update={"optimizer": "sgd"})})
    assert decay(Options(epochs=10), of=with_momentum) == 0.01


def mirroring_from(patches: int) -> Configuration:
    """`tiny`, whose two epochs see 8 patches, that mirrors along Z and X from so many patches on."""
    augment = AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=(0, 2), mirror_from_patches=patches)
    planned = tiny()
    return planned.model_copy(update={"train": planned.train.model_copy(update={"augment": augment})})


def test_a_training_of_few_patches_does_not_mirror() -> None:
    def axes(patches: int, asked: Options, seconds: float | None = None) -> tuple[int, ...]:
        fitted, note = with_suited_variation(mirroring_from(patches), asked, seconds)
        assert bool(note) == (fitted != mirroring_from(patches))
        return fitted.train.augment.mirror_axes

    assert tiny().train.epochs * STEPS * tiny().batch_size == 8
    assert axes(8, Options()) == (0, 2)
    assert axes(9, Options()) == ()
    assert axes(100, Options(max_seconds=10.0), seconds=0.1) == (0, 2)
    assert axes(101, Options(max_seconds=10.0), seconds=0.1) == ()


def test_patches_of_a_short_training_are_moved_more_often() -> None:
    def movement(augment: AugmentSpec) -> tuple[float, float]:
        return augment.rotation_chance, augment.scale_chance

    planned, note = with_suited_variation(mirroring_from(9), Options(), None)
    assert movement(planned.train.augment) == (0.6, 0.6)
    assert "so no mirroring, but 60% of the patches turned and as many scaled; " in note
    often = mirroring_from(9).train.augment.model_copy(update={"rotation_chance": 0.9, "mirror_axes": ()})
    moved = planned.model_copy(update={"train": planned.train.model_copy(update={"augment": often})})
    assert movement(with_suited_variation(moved, Options(), None)[0].train.augment) == (0.9, 0.6)
    still = with_suited_variation(mirroring_from(9), Options(), None, moves=False)[0].train.augment
    assert (movement(still), still.mirror_axes) == ((0.2, 0.2), ())
    longer, note = with_suited_variation(mirroring_from(8), Options(), None)
    assert (movement(longer.train.augment), longer.train.augment.mirror_axes) == ((0.6, 0.6), (0, 2))
    assert note.startswith("About 8 patches are seen, so 60% of the patches turned and as many scaled; mirroring pays")
    for seconds, chances in ((0.1001, (0.6, 0.6)), (0.1, (0.2, 0.2))):
        asked = Options(max_seconds=20_000.0)
        long = with_suited_variation(mirroring_from(8), asked, seconds)[0].train.augment
        assert (movement(long), long.mirror_axes) == (chances, (0, 2))


def test_patches_turned_to_all_sides_are_mirrored_however_short_the_training() -> None:
    planned = mirroring_from(9)
    augment = planned.train.augment.model_copy(update={"rotation_rad": (math.pi, 0.0, 0.0)})
    turned = planned.model_copy(update={"train": planned.train.model_copy(update={"augment": augment})})
    assert with_suited_variation(planned, Options(), None)[0].train.augment.mirror_axes == ()
    assert with_suited_variation(turned, Options(), None) == (turned, "")


def test_prediction_mirrors_only_as_all_of_its_networks_learned(run: Path) -> None:
    layout, models = Layout(run), []
    for seed, patches in enumerate((8, 9)):
        plan = load(layout.plan, Plan)
        save(layout.plan, plan.model_copy(update={"configurations": (mirroring_from(patches),)}))
        record = start(run, seed=seed)
        assert record.configuration.train.augment.mirror_axes == ((0, 2) if patches == 8 else ())
        models.append(layout.model("3d", "0", seed))
    planned = mirroring_from(8)
    plan = load(Layout(run).plan, Plan)
    assert as_trained(planned, models[:1], plan) == planned
    assert as_trained(planned, models, plan).train.augment.mirror_axes == ()
    found = [Predictor(run, device="cpu", seeds=seeds).tilings(1, 3)[0] for seeds in ([0], [1], None)]
    assert [tiling.mirror_axes for tiling in found] == [(0, 2), (), ()]


def test_prediction_mirrors_as_the_weights_learned_while_a_training_is_lengthened(run: Path) -> None:
    plan = load(Layout(run).plan, Plan)
    save(Layout(run).plan, plan.model_copy(update={"configurations": (mirroring_from(9),)}))
    start(run)

    def mirrored() -> tuple[int, ...]:
        return Predictor(run, device="cpu").tilings(1, 3)[0].mirror_axes

    axes = []
    record = start(run, resume="extend", epochs=4, report=at_step(1, lambda: axes.append(mirrored())))
    assert record.configuration.train.augment.mirror_axes == (0, 2)
    assert (axes, mirrored()) == ([()], (0, 2))


def test_a_second_training_of_the_same_network_is_refused_while_the_first_runs(run: Path) -> None:
    refused: list[UserError] = []

    def second() -> None:
        with pytest.raises(UserError, match="fold_0: another process is training this network") as caught:
            start(run, resume="restart")
        refused.append(caught.value)
        start(run, seed=1, epochs=1)  # another seed is another network

    record = start(run, report=at_step(1, second))
    assert len(refused) == 1
    assert record.finished
    assert not [path for path in Layout(run).configuration("3d").iterdir() if path.name.startswith(".")]


# ------------------------------------------------------------------------------------------------ stopping and going on


@pytest.mark.parametrize("stop_at", [STEPS - 1, STEPS], ids=["within an epoch", "at the end of an epoch"])
def test_stopped_and_resumed_gives_the_same_weights_to_the_last_bit(trained: Path, run: Path, stop_at: int) -> None:
    with pytest.raises(Interrupted, match=f"train {run} -c 3d -f 0 --device cpu --resume"):
        start(run, report=at_step(stop_at, lambda: signal.raise_signal(signal.SIGINT)))
    model, straight = Layout(run).model("3d", "0"), Layout(trained).model("3d", "0")
    assert not load(model.run, Run).finished
    assert not model.weights.exists()
    said: list[Event] = []
    record = start(run, resume="yes", report=said.append)
    assert any(isinstance(event, Said) and f"step {stop_at}" in event.text for event in said)
    assert record.finished
    assert record.steps == 2 * STEPS
    for path, other in (
        (model.weights, straight.weights), (model.best, straight.best), (model.resume_tensors, straight.resume_tensors)
    ):  # fmt: skip
        tensors, expected = load_file(path), load_file(other)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, expected[name], err_msg=f"{path.name}: {name}")
    known = ("epoch", "step", "dice", "dice_running", "learning_rate")
    assert [[row[k] for k in known] for row in history_of(model)] == [
        [row[k] for k in known] for row in history_of(straight)
    ]


def test_a_finished_training_goes_on_for_more_epochs(run: Path) -> None:
    start(run, epochs=1)
    record = start(run, resume="yes", epochs=2)
    assert record.steps == 2 * STEPS
    assert len(history_of(Layout(run).model("3d", "0"))) == 2


def test_a_finished_training_is_extended_by_epochs_and_not_to_fewer(run: Path) -> None:
    start(run, epochs=1)
    with pytest.raises(UserError, match="--extend-to 1: 1 epochs are done already"):
        start(run, resume="extend", epochs=1)
    with pytest.raises(UserError, match="s are done already"):
        start(run, resume="extend", max_seconds=1e-6)
    record = start(run, resume="extend", epochs=2)
    assert (record.steps, record.configuration.train.epochs, record.finished) == (2 * STEPS, 2, True)


def test_a_training_that_ended_by_the_clock_is_extended_to_the_planned_epochs(run: Path) -> None:
    """A time limit leaves the number of epochs as planned, though they were not reached, not even the first."""
    assert start(run, epochs=4, max_seconds=1e-3).steps < STEPS
    assert start(run, resume="extend", epochs=1).steps == STEPS
    record = start(run, resume="extend", epochs=4)
    assert (record.max_seconds, record.steps) == (None, 4 * STEPS)


def test_a_longer_training_decays_and_varies_as_one_of_that_length(run: Path) -> None:
    """Until 12 patches are seen there is no mirroring; as many decayed weights in all are the plan's."""
    plan = load(Layout(run).plan, Plan)
    planned = plan.configurations[0]
    augment = planned.train.augment.model_copy(update={"mirror_from_patches": 4 * STEPS * planned.batch_size})
    train = planned.train.model_copy(update={"augment": augment, "weight_decay": 0.1})
    save(Layout(run).plan, plan.model_copy(update={"configurations": (planned.model_copy(update={"train": train}),)}))
    short = start(run, epochs=1)
    assert short.configuration.train.weight_decay == pytest.approx(0.2)
    assert short.configuration.train.augment.mirror_axes == ()
    assert len(short.notes) == 3
    longer = start(run, resume="extend", epochs=4)
    assert longer.configuration.train.weight_decay == 0.1
    assert longer.configuration.train.augment == augment
    assert [note for note in longer.notes if note.startswith(("Weight", "About"))] == []
    again = start(run, resume="yes", epochs=4)
    assert again.configuration == longer.configuration


def test_class_weights_stay_when_the_same_command_goes_on(run: Path) -> None:
    classes = len(load(Layout(run).plan, Plan).labels)
    shares = tuple(1000 // (k + 1) ** 2 for k in range(classes))
    seen = fingerprint(alike(3, class_voxels=shares), classes=[f"class {k}" for k in range(1, classes)])
    save(Layout(run).fingerprint, seen)
    with pytest.raises(Interrupted):
        start(run, loss="weighted_ce", epochs=3, report=at_step(2, lambda: signal.raise_signal(signal.SIGINT)))
    begun = load(Layout(run).model("3d", "0").run, Run).configuration
    assert "class_weights=" in begun.train.loss
    ended = start(run, loss="weighted_ce", epochs=3, resume="auto")
    assert ended.configuration == begun
    before = files_in(run)
    assert start(run, loss="weighted_ce", epochs=3, resume="auto") == ended
    assert files_in(run) == before


def test_a_step_is_timed_with_as_many_samples_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    class Step:
        def run(self) -> float:
            return 0.0

    def make(configuration: Configuration, device: Device, labelling: object) -> Step:
        tried.append(configuration.batch_size)
        if configuration.batch_size > holds:
            raise error
        made.append(Step())
        alive.add(made[-1])
        return made.pop()

    monkeypatch.setattr("autoseg.network.simulate.make_step", make)
    alive, made, emptied = weakref.WeakSet[Step](), list[Step](), list[int]()
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(len(alive)))
    card, holds, error = Device(torch.device("cuda"), "fp16"), 2, RuntimeError("GET was unable to find an engine")
    assert seconds_per_sample(tiny().model_copy(update={"batch_size": 8}), card) > 0
    assert tried == [8, 4, 2]
    assert emptied[-1] == 0  # the step is gone by then
    holds, error = 0, torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(UserError, match="too little memory for a single patch"):
        seconds_per_sample(tiny(), card)


def test_an_unfinished_training_is_not_extended_to_less_than_it_has(run: Path) -> None:
    with pytest.raises(Interrupted):
        start(run, epochs=9, report=at_step(2 * STEPS, lambda: signal.raise_signal(signal.SIGINT)))
    with pytest.raises(UserError, match="--extend-to 2: 2 epochs are done already"):
        start(run, resume="extend", epochs=2)
    assert not load(Layout(run).model("3d", "0").run, Run).finished


def test_a_training_does_not_go_on_to_less_than_it_has(run: Path) -> None:
    with pytest.raises(Interrupted):
        start(run, epochs=9, report=at_step(2 * STEPS, lambda: signal.raise_signal(signal.SIGINT)))
    before = files_in(run)
    with pytest.raises(UserError, match="--epochs 2: 2 epochs are done already"):
        start(run, resume="yes", epochs=2)
    with pytest.raises(UserError, match=r"--max-time 0\.001s: \d+ s are done already.*from the beginning"):
        start(run, resume="auto", max_seconds=0.001)
    assert files_in(run) == before
    assert start(run, resume="yes", epochs=3).steps == 3 * STEPS
    assert start(run, resume="yes", epochs=3).finished  # as long as before: nothing to do, nothing to refuse


def test_a_second_ctrl_c_says_how_to_go_on_from_what_is_saved(run: Path) -> None:
    def again() -> None:
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stopped:
        start(run, epochs=9, report=at_step(2 * STEPS, again))
    assert stopped.value.how_to_resume == f"autoseg train {run} -c 3d -f 0 --device cpu --resume"


def test_a_damaged_state_is_told_before_anything_is_written(run: Path) -> None:
    start(run, epochs=1)
    model = Layout(run).model("3d", "0")
    model.resume_tensors.write_bytes(b"")
    before = files_in(run)
    with pytest.raises(UserError, match=r"resume\.safetensors: no valid safetensors file"):
        start(run, resume="auto", epochs=2)
    assert files_in(run) == before


def test_a_plan_that_changed_under_a_training_is_refused(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start(run, epochs=1)
    plan = load(Layout(run).plan, Plan)
    update = {"batch_dice": True, "memory": Memory(source="measured", peak_bytes=9)}
    changed = plan.configurations[0].model_copy(update=update)
    save(Layout(run).plan, plan.model_copy(update={"configurations": (changed,)}))
    expected = r"plan\.json has changed since .*: batch_dice \(was False, is True\)\. .*anew: remove .*train --restart"
    data = Path(load(Layout(run).dataset, Dataset).cases[0].images[0]).parents[1]
    monkeypatch.setattr("autoseg.steps.run.postprocess_learn", lambda *given, **options: None)
    monkeypatch.setattr("autoseg.steps.run.evaluate_run", lambda *given, **options: None)

    def all_of_it(report: Callable[[Event], None] = silent) -> None:
        whole_run(data, run, max_seconds=9.0, device="cpu", workers=1, report=report)

    for go_on in (lambda: start(run, resume="yes"), lambda: start_seeds(run, "auto"), all_of_it):
        with pytest.raises(UserError, match=expected):
            go_on()
    save(Layout(run).plan, plan)
    assert start(run, resume="yes").finished
    said: list[Event] = []
    all_of_it(said.append)  # its time is for what is not trained yet
    assert Said("3d, fold 0, seed 0: trained already.") in said
    assert not [event for event in said if isinstance(event, Trained)]


def with_other_folds(run: Path) -> Splits:
    """Give the run splits whose fold 0 validates on what it learned from; returns those it had."""
    splits = load(Layout(run).splits, Splits)
    save(Layout(run).splits, splits.model_copy(update={"folds": splits.folds[::-1]}))
    return splits


def test_a_fold_that_changed_under_a_training_is_refused(run: Path) -> None:
    cases = start(run, epochs=1).cases
    splits = with_other_folds(run)
    assert cases == splits.folds[0]
    for go_on in (
        lambda: start(run, resume="auto"),
        lambda: start(run, resume="extend", epochs=2),
        lambda: start_seeds(run, "auto"),
    ):
        with pytest.raises(UserError, match=r"its fold has changed since .* by \d cases.* it learned from \d"):
            go_on()
    model = Layout(run).model("3d", "0")
    record = load(model.run, Run)
    save(model.run, record.model_copy(update={"cases": None}))  # as an older version wrote it
    assert start(run, resume="yes", epochs=2).cases == splits.folds[-1]


def test_only_maps_of_the_fold_stay_among_its_validation(run: Path) -> None:
    start(run, epochs=1)
    model = Layout(run).model("3d", "0")
    (own,) = model.validation.glob("*.nii.gz")
    shutil.copy(own, model.validation / "case_of_other_splits.nii.gz")
    start(run, resume="extend", epochs=2)
    assert list(model.validation.glob("*.nii.gz")) == [own]


def test_a_disk_that_is_full_ends_the_training_and_leaves_the_last_state(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, calls = safetensors.torch.save_file, []

    def save_file(tensors: dict, path: Path, metadata: dict) -> None:
        calls.append(path)
        if len(calls) > 2:  # state and best weights of the first epoch were written
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoint, "save_file", save_file)
    with pytest.raises(UserError, match=r"best\.safetensors: the disk is full"):
        start(run)
    model = Layout(run).model("3d", "0")
    assert not list(model.root.glob(f"*{TEMPORARY}*"))
    names = [path.name.partition(TEMPORARY)[0] for path in calls]
    assert names == ["best.safetensors", "resume.safetensors", "best.safetensors"]  # a state knows of no lost best
    monkeypatch.setattr(checkpoint, "save_file", write)
    said: list[Event] = []
    assert start(run, resume="yes", report=said.append).steps == 2 * STEPS
    assert any(isinstance(event, Said) and f"step {STEPS}." in event.text for event in said)


def test_seeds_are_trained_one_after_another_and_finished_ones_are_kept(run: Path) -> None:
    asked = Options(epochs=1)
    first, second = train_seeds(run, (0, 1), configuration="3d", asked=asked, machine=Machine("cpu", 1))
    assert (first.seed, second.seed) == (0, 1)
    with pytest.raises(UserError, match=r"seed_1: a finished training is there already"):
        train_seeds(run, (2, 1), configuration="3d", asked=asked, machine=Machine("cpu", 1))
    shutil.rmtree(Layout(run).model("3d", "0").root)
    said: list[Event] = []
    again = train_seeds(
        run, (0, 1), configuration="3d", resume="auto", asked=asked, machine=Machine("cpu", 1), report=said.append
    )
    assert [record.finished for record in again] == [True, True]
    assert [event.text for event in said if isinstance(event, Said) and "trained already" in event.text] == [
        "3d, fold 0, seed 1: trained already."
    ]


@pytest.mark.parametrize(
    ("resume", "asked", "meanwhile"),
    [("extend", Options(epochs=4), [True, True]), ("restart", Options(loss="ce"), [True, False])],
)
def test_seeds_that_were_stopped_while_all_are_done_anew_or_longer_are_completed_by_the_printed_command(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resume: str, asked: Options, meanwhile: list[bool]
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    models = [Layout(run).model("3d", "0", seed) for seed in (0, 1)]
    shutil.copytree(models[0].root, models[1].root)
    before, began = load(models[0].run, Run), list[tuple[int, bool]]()

    def as_if(work: Work, options: Options) -> Run:
        began.append((work.seed, work.continues))
        if len(began) == 2:
            raise Interrupted("of this seed alone")
        record = before.model_copy(update={"configuration": with_options(before.configuration, options)})
        save(work.model.run, record)
        return record

    monkeypatch.setattr("autoseg.steps.train._trained", as_if)
    with pytest.raises(Interrupted, match=r"--seeds 2 .*--resume auto$"):
        start_seeds(run, resume, asked)
    assert [model.weights.is_file() for model in models] == [resume == "extend"] * 2
    assert [model.run.is_file() for model in models] == meanwhile
    start_seeds(run, "auto", asked)
    goes_on = resume == "extend"
    assert began == [(0, goes_on), (1, goes_on), (1, goes_on)]


def test_seeds_are_checked_before_the_first_is_trained_or_deleted(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("autoseg.steps.train._trained", lambda *given: pytest.fail("a training was started"))
    before = files_in(trained)
    with pytest.raises(UserError, match=r"seed_1: there is no training to resume\. Leave --extend-to out"):
        start_seeds(trained, "extend", Options(epochs=4))
    with pytest.raises(UserError, match="the network to be trained"):
        start_seeds(trained, "restart", Options(init=str(trained)))
    assert files_in(trained) == before


def test_the_precision_that_was_asked_for_is_kept_when_resuming(run: Path) -> None:
    asked = "fp32" if native_precision(torch.device("cpu")) == "bf16" else "bf16"
    if asked == "bf16" and not cpu_convolves_bf16():
        pytest.skip("this CPU computes in one precision only")
    assert start(run, epochs=1, precision=asked).precision == asked
    record = start(run, resume="extend", epochs=2)
    assert (record.precision, record.asked_precision) == (asked, asked)


def test_the_history_says_where_the_time_went(trained: Path) -> None:
    row = history_of(Layout(trained).model("3d", "0"))[-1]
    parts = [row[f"{part}_seconds"] for part in ("wait", "augment", "forward", "backward", "step")]
    assert all(part >= 0 for part in parts)
    assert 0 < sum(parts) * STEPS <= 1.05 * row["epoch_seconds"]
    assert 0 < row["peak_share"] < 1


def test_cases_beyond_the_limit_are_read_from_disk_and_give_the_same_weights(trained: Path, run: Path) -> None:
    said: list[Event] = []
    start(run, cache_bytes=15_000, report=said.append)
    assert [event for event in said if isinstance(event, Said) and "of 4 preprocessed cases" in event.text]
    same, found = (load_file(Layout(each).model("3d", "0").weights) for each in (trained, run))
    assert all(np.array_equal(found[name], same[name]) for name in same)


def test_resuming_needs_something_to_resume(run: Path) -> None:
    before = files_in(run)
    with pytest.raises(UserError, match="no training to resume"):
        start(run, resume="yes")
    assert files_in(run) == before


def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(run: Path) -> None:
    said: list[Event] = []
    assert start(run, resume="auto", epochs=1, report=said.append).finished
    assert not [event for event in said if isinstance(event, Warned)]
    record = start(run, resume="auto", epochs=2, report=said.append)
    assert record.steps == 2 * STEPS
    assert [event for event in said if isinstance(event, Said) and "Going on" in event.text]


@pytest.mark.parametrize("resume", ["auto", "yes"])
def test_a_finished_training_is_kept_as_it_is(trained: Path, resume: str) -> None:
    before, said = files_in(trained), []
    record = start(trained, resume=resume, report=said.append)
    assert said == [Said("3d, fold 0, seed 0: trained already.")]
    assert record == load(Layout(trained).model("3d", "0").run, Run)
    assert start(trained, resume=resume, epochs=2, batch_size=2) == record
    with pytest.raises(UserError, match=r"has ended, so other options.*--extend-to.*--restart"):
        start(trained, resume=resume, loss="ce")
    assert files_in(trained) == before


def test_a_training_that_is_there_is_not_overwritten_by_accident(trained: Path) -> None:
    before = files_in(trained)
    with pytest.raises(UserError, match=r"a finished training is there already.*--resume.*--extend-to.*--restart"):
        start(trained)
    assert files_in(trained) == before


def test_a_network_without_its_state_is_kept_unless_it_is_to_be_overwritten(run: Path) -> None:
    record = start(run, epochs=1)
    model = Layout(run).model("3d", "0")
    model.resume_tensors.unlink()
    shutil.rmtree(model.validation)  # as an imported network has none
    before = files_in(run)
    with pytest.raises(UserError, match=r"a finished training is there already.*--restart"):
        start(run)
    with pytest.raises(UserError, match="a finished training is there already"):
        start_seeds(run, "no")
    assert start(run, resume="auto") == start(run, resume="yes") == record
    for resume, epochs in (("auto", 2), ("extend", 2)):
        with pytest.raises(UserError, match=r"without resume\.safetensors cannot go on.*--restart"):
            start(run, resume=resume, epochs=epochs)
    save(model.run, record.model_copy(update={"finished": False}))
    with pytest.raises(UserError, match=r"an unfinished training without resume\.safetensors cannot go on"):
        start(run, resume="auto")
    model.run.unlink()
    with pytest.raises(UserError, match=r"a network without run\.json cannot go on"):
        start(run, resume="auto")
    save(model.run, record)
    assert set(files_in(run)) == set(before)
    start(run, resume="restart", epochs=1)
    assert model.resume_tensors.is_file()


def test_starting_anew_empties_a_folder_that_is_a_link(run: Path, tmp_path: Path) -> None:
    model = Layout(run).model("3d", "0")
    (tmp_path / "elsewhere" / "validation").mkdir(parents=True)
    (tmp_path / "elsewhere" / "resume.safetensors").write_bytes(b"old")
    model.root.parent.mkdir(parents=True, exist_ok=True)
    model.root.symlink_to(tmp_path / "elsewhere")

    def killed(event: Event) -> None:
        if isinstance(event, Trained):
            raise MemoryError("as if killed before the first state was saved")

    with pytest.raises(MemoryError):
        start(run, resume="restart", report=killed)
    assert model.root.is_symlink()
    assert [path.name for path in model.root.iterdir()] == ["run.json"]


def test_starting_anew_warns_and_leaves_nothing_of_the_old_training(run: Path) -> None:
    start(run, epochs=1)
    model = Layout(run).model("3d", "0")
    said: list[Event] = []

    def killed(event: Event) -> None:
        said.append(event)
        if isinstance(event, Trained):
            raise MemoryError("as if killed before the first state was saved")

    with pytest.raises(MemoryError):
        start(run, resume="restart", report=killed)
    assert [event for event in said if isinstance(event, Warned) and "a finished training is over" in event.text]
    assert sorted(path.name for path in model.root.iterdir()) == ["run.json"]
    record = start(run, resume="auto", epochs=1)
    assert record.steps == STEPS


def test_stopping_in_validation_keeps_the_training(run: Path) -> None:
    def stop_validation(event: Event) -> None:
        if isinstance(event, Started) and event.what == "validate":
            raise KeyboardInterrupt

    with pytest.raises(Interrupted, match="--resume"):
        start(run, epochs=1, report=stop_validation)
    model = Layout(run).model("3d", "0")
    weights = model.weights.read_bytes()
    steps: list[Event] = []
    record = start(run, resume="yes", report=lambda e: steps.append(e) if isinstance(e, Trained) else None)
    assert not steps
    assert record.finished
    assert model.scores.is_file()
    assert model.weights.read_bytes() == weights


def test_sigterm_in_validation_ends_like_ctrl_c(run: Path) -> None:
    def stop_validation(event: Event) -> None:
        if isinstance(event, Started) and event.what == "validate":
            signal.raise_signal(signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted, match="--resume"):
        start(run, epochs=1, report=stop_validation)
    assert signal.getsignal(signal.SIGTERM) == before
    assert Layout(run).model("3d", "0").weights.is_file()


def test_ctrl_c_ends_with_code_130_and_the_command_that_goes_on(run: Path) -> None:
    words = [sys.executable, "-m", "autoseg", "train", run, "-c", "3d", "--epochs", "100000", "--device", "cpu"]
    words += ["--precision", "fp32"]  # else the step is compiled, which takes seconds
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    model = Layout(run).model("3d", "0")
    try:
        until = time.monotonic() + 120
        while not model.history.is_file() and process.poll() is None and time.monotonic() < until:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, errors
    assert f"autoseg train {run} -c 3d -f 0 --device cpu --resume" in " ".join(errors.split())
    assert "Traceback" not in errors
    assert load_file(model.resume_tensors)


def test_the_command_that_goes_on_names_what_it_needs() -> None:
    run = Path("a run")
    assert resume_command(run, "2d", "all", 3) == "autoseg train 'a run' -c 2d -f all --seed 3 --resume"
    asked = Options(epochs=5, max_seconds=90.0, learning_rate=0.01)
    assert resume_command(run, "3d", "0", 0, "auto", asked).endswith("--epochs 5 --max-time 90 --lr 0.01 --resume auto")


@pytest.fixture
def slow_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that takes 0.6 s and then fails."""
    monkeypatch.setattr("autoseg.steps.training.learn.pays_to_compile", lambda device, seconds_left: True)
    monkeypatch.setattr("autoseg.steps.training.learn.try_compile", lambda *given: time.sleep(0.6))


def about_getting_ready(events: list[Event]) -> list[str]:
    return [event.text for event in events if isinstance(event, Warned) and "Getting ready" in event.text]


@pytest.mark.usefixtures("slow_compiler")
def test_compiling_takes_of_the_time_that_was_asked_for(run: Path) -> None:
    events: list[Event] = []
    record = start(run, max_seconds=2.0, report=events.append)
    assert record.seconds >= 2.0
    assert history_of(Layout(run).model("3d", "0"))[0]["seconds"] > 0.6
    assert about_getting_ready(events) == []


@pytest.mark.usefixtures("slow_compiler")
def test_a_compiler_that_takes_all_the_time_leaves_half_of_it_to_the_training(run: Path) -> None:
    events: list[Event] = []
    record = start(run, max_seconds=0.5, report=events.append)
    assert record.steps > 0
    assert record.seconds >= 0.5
    assert about_getting_ready(events) == ["Getting ready took 1 s; the training has half of its time for itself."]


def test_a_compiled_training_is_the_eager_one_also_when_it_was_stopped(
    trained: Path, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that leaves all as it is: what remains is how the compiled step is made, called and resumed."""
    compiled: list[object] = []
    monkeypatch.setattr("autoseg.steps.training.learn.pays_to_compile", lambda device, seconds_left: True)
    monkeypatch.setattr(torch, "compile", lambda whole, mode, dynamic: compiled.append(mode) or whole)
    with pytest.raises(Interrupted):
        start(run, report=at_step(STEPS, lambda: signal.raise_signal(signal.SIGINT)))
    record = start(run, resume="yes")
    assert (compiled, record.compiled) == ([None, None], True)
    same, found = (load_file(Layout(each).model("3d", "0").weights) for each in (trained, run))
    assert all(np.array_equal(found[name], same[name]) for name in same)


def test_a_compiled_training_that_runs_out_of_memory_goes_on_eager_and_whole_again_when_resumed(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reset: list[int] = []
    monkeypatch.setattr("autoseg.steps.training.learn.pays_to_compile", lambda device, seconds_left: True)
    monkeypatch.setattr(torch, "compile", lambda whole, mode, dynamic: whole)
    monkeypatch.setattr(torch.compiler, "reset", lambda: reset.append(1))
    whole, short = pieces.Pieces._try, [True]

    def runs_out_once(self: pieces.Pieces, *given: object) -> object:
        if short and short.pop():
            raise torch.OutOfMemoryError("out of memory, as if")
        return whole(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(pieces.Pieces, "_try", runs_out_once)
    with pytest.raises(Interrupted):
        start(run, report=at_step(STEPS, lambda: signal.raise_signal(signal.SIGINT)))
    resume = Layout(run).model("3d", "0").resume_tensors
    assert checkpoint.read_numbers(resume)["pieces"] == 2
    assert len(reset) == 3  # before the trial, with the first batch in pieces, and at the end
    assert start(run, resume="yes").compiled
    assert checkpoint.read_numbers(resume)["pieces"] == 1


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fold": "4"}, "no fold '4'.*0 to 3, or all"),
        ({"fold": "first"}, "no fold 'first'"),
        ({"configuration": "4d"}, "no configuration '4d'.*3d"),
        ({"loss": "diced"}, "diced"),
        ({"epochs": 0}, "epochs 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"learning_rate": -1.0}, "-1"),
        ({"max_seconds": 0.0}, "above 0"),
        ({"resume": "maybe"}, "none of yes, auto, no"),
        ({"device": "cuda:99"}, "CUDA"),
    ],
)
def test_impossible_options_are_refused_before_anything_is_written(
    planned: Path, options: dict[str, object], message: str
) -> None:
    before = files_in(planned)
    with pytest.raises(UserError, match=message):
        start(planned, **options)
    assert files_in(planned) == before


def test_a_folder_without_a_plan_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        start(tmp_path)
