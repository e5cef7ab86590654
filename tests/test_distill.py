"""`autoseg distill` on tiny volumes: who may teach, what is stored, what a student leaves behind."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset

from autoseg.cases.cache import open_array, open_case
from autoseg.errors import UserError
from autoseg.events import Event, Said, Trained, Warned, silent
from autoseg.layout import Layout, ModelLayout, distillation_file
from autoseg.network import augment, unet
from autoseg.network.checkpoint import save_weights
from autoseg.network.device import Device
from autoseg.network.distillation import from_8_bits, have_labels, to_8_bits
from autoseg.network.distributed import ALONE
from autoseg.network.patches import InMemory
from autoseg.network.sliding import Scorer, Tiling, score_blocks
from autoseg.records import (
    AugmentSpec,
    CaseScore,
    Configuration,
    Dataset,
    Fold,
    Plan,
    Run,
    Scores,
    Splits,
    TrainSpec,
)
from autoseg.scoring import statistics
from autoseg.scoring.distillation import Contestant, Distillation
from autoseg.steps import distill as step
from autoseg.steps.predict import predict
from autoseg.steps.predicting.models import load_network
from autoseg.steps.reporting import contest
from autoseg.steps.train import train
from autoseg.steps.training.batches import Batches
from autoseg.steps.training.begin import begin
from autoseg.steps.training.options import Machine, Options
from autoseg.steps.training.teachers import Lesson, WithTeacher, said_of_case, teachers_named, who_saw, with_teachers
from autoseg.steps.training.work import Instead, look_up
from autoseg.store import load, save

CPU = Device(torch.device("cpu"), "fp32")


def tiny() -> Configuration:
    augment_spec = AugmentSpec(rotation_rad=(0.5,) * 3, rotation_chance=1.0, mirror_axes=(1,), mirror_from_patches=0)
    spec = TrainSpec(epochs=2, steps_per_epoch=2, warmup_steps=1, augment=augment_spec)
    network = a_network().model_copy(update={"features": (8, 16)})
    return a_configuration(network=network, train=spec)


@pytest.fixture(scope="module", autouse=True)
def nothing_slow() -> Iterator[None]:
    """No picture of each single training, and scoring in this process: workers would take seconds to start."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("autoseg.steps.training.learn.draw_curves", lambda path, history: None)
        patched.setattr("autoseg.steps.evaluate.allowed_cores", lambda: 1)
        yield


@pytest.fixture(scope="module")
def taught(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Distillation]:
    """A run with two seeds of fold 0 and one network of fold 1, and a student of the seeds and of unlabelled images."""
    place = tmp_path_factory.mktemp("distill")
    data = write_dataset(place / "data", cases=10, shape=(8, 10, 12), held_out=2)
    run = a_planned_run(place / "run", data, tiny())
    plan = load(Layout(run).plan, Plan)
    far = plan.budget.model_copy(update={"device": "cuda:3"})  # planned on another machine
    save(Layout(run).plan, plan.model_copy(update={"budget": far}))
    for fold, seed in (("0", 0), ("0", 1), ("1", 0)):
        train(run, fold=fold, seed=seed, device="cpu", workers=1)
    ended = step.distill(run, epochs=2, unlabelled=data / "imagesTs", baseline=True, device="cpu", workers=1)
    return run, ended


def held_out(run: Path, fold: int = 0) -> tuple[str, ...]:
    return load(Layout(run).splits, Splits).folds[fold].validation


# ------------------------------------------------------------------------------------------------ what it leaves


def test_the_table_names_members_ensemble_student_and_baseline(taught: tuple[Path, Distillation]) -> None:
    run, ended = taught
    names = [row.name for row in ended.contestants]
    assert names == ["fold_0", "fold_0.seed_1", "ensemble of 2", "student", "labels alone"]
    assert all(row.dice is not None and row.seconds > 0 for row in ended.contestants)
    one, other, together, student, alone = ended.contestants
    assert together.parameters == one.parameters + other.parameters
    assert together.operations == one.operations + other.operations
    assert student.parameters == alone.parameters < one.parameters / 2
    network = load_network(Layout(run).model("3d_student_small", "0"), CPU)
    assert student.parameters == sum(weight.numel() for weight in network.parameters())
    assert ended == load(distillation_file(Layout(run).model("3d_student_small", "0").root), Distillation)
    assert ended.seen == ()
    assert ended.unlabelled == 2


def test_the_student_is_a_configuration_that_predicts(taught: tuple[Path, Distillation], tmp_path: Path) -> None:
    run, _ = taught
    plan = load(Layout(run).plan, Plan)
    assert [each.name for each in plan.configurations] == ["3d", "3d_student_small"]
    assert plan.configurations[1].network.features == (4, 8)
    assert any(choice.field == "3d_student_small.network.features" for choice in plan.choices)
    written = predict(
        run, run.parent / "data" / "imagesTs", tmp_path / "out", configuration="3d_student_small", device="cpu"
    )  # fmt: skip
    assert len(written) == 2
    assert sorted(path.name for path in Layout(run).models.iterdir()) == ["3d", "3d_student_small"]
    assert sorted(path.name for path in (run / "cache").iterdir() if path.name != "fingerprint") == ["3d"]


def test_what_the_teachers_say_is_their_mean_and_stored_for_training_cases_only(
    taught: tuple[Path, Distillation],
) -> None:
    run, _ = taught
    (folder,) = Layout(run).cache("3d").glob("teachers-*")
    stored = {path.name.split(".")[0]: path for path in folder.iterdir()}
    assert not set(stored) & set(held_out(run))
    assert sum(name.startswith("unlabelled_") for name in stored) == 2
    assert len(stored) == 8 + 2
    name = next(iter(stored))
    said = open_array(stored[name])
    case = open_case(Layout(run).cache("3d"), name)
    assert (said.dtype, said.shape) == (np.uint8, (3, *case.shape))
    image = torch.from_numpy(case.read()[0])[None]
    networks = [load_network(Layout(run).model("3d", "0", seed), CPU) for seed in (0, 1)]
    size = tuple(min(have, 8) for have in case.shape)
    assert size[0] == 8
    assert float(from_8_bits(said[:]).sum(0).mean()) == pytest.approx(1.0, abs=0.02)
    with torch.no_grad():
        corner = image[..., :8, :8, :8]
        plain = torch.stack([torch.softmax(network(corner), 1)[0] for network in networks]).mean(0)
        flipped = [torch.softmax(network(corner.flip(3)).flip(3), 1)[0] for network in networks]
        mirrored = torch.stack(flipped).mean(0)
    # the window at the corner counts almost alone there; logits, not probabilities, are averaged over mirrorings
    own = from_8_bits(said[:])[:, 0, 0, 0]
    np.testing.assert_allclose(own, (0.5 * (plain + mirrored))[:, 0, 0, 0], atol=0.03)


def test_what_a_power_failure_left_empty_is_said_again(taught: tuple[Path, Distillation], tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(taught[0], run)
    layout, plan = Layout(run), load(Layout(run).plan, Plan)
    lesson = Lesson(teachers_named(run, tiny(), "0", ["seeds"]), 1.0, 0.5)
    (folder,) = layout.cache("3d").glob("teachers-*")
    lost, kept = sorted(folder.iterdir())[:2]
    said, age = open_array(lost)[:], kept.stat().st_mtime_ns
    lost.write_bytes(b"")
    names = [path.name.split(".")[0] for path in (lost, kept)]
    sources = {name: open_case(layout.cache("3d"), name) for name in names}
    with_teachers(layout, plan, tiny(), lesson, names, sources, CPU, silent)
    np.testing.assert_allclose(open_array(lost)[:].astype(int), said.astype(int), atol=1)
    assert kept.stat().st_mtime_ns == age


def test_teachers_of_other_patches_and_mirrorings_count_like_all_others(tmp_path: Path) -> None:
    image_CZYX = np.random.default_rng(0).normal(0, 1, (1, 10, 9, 12)).astype(np.float32)
    models, networks, shares = [], [], []
    for number, (patch, axes) in enumerate((((8, 8, 8), ()), ((4, 8, 12), (2,)), ((8, 8, 8), ()))):
        spec = tiny().train.augment.model_copy(update={"mirror_axes": axes})
        changes = {"patch_voxels": patch, "train": tiny().train.model_copy(update={"augment": spec})}
        models.append(ModelLayout(tmp_path / str(number)))
        save(models[-1].run, Run(
            autoseg_version="0", torch_version="0", configuration=tiny().model_copy(update=changes), fold="0",
            seed=number, device="cpu", precision="fp32", compiled=False, finished=True,
        ))  # fmt: skip
        torch.manual_seed(number)
        networks.append(unet.build(tiny().network).eval())
        save_weights(models[-1].weights, networks[-1])
        scorer = Scorer([networks[-1]], 3, CPU, probabilities=True)
        blocks = score_blocks(scorer, torch.from_numpy(image_CZYX), Tiling(patch, axes))
        shares.append(np.concatenate([block.numpy().copy() for block in blocks], 1))
    said = said_of_case(networks, image_CZYX, Lesson(tuple(models), 2.0, 0.5), CPU)
    mean = (shares[0] + shares[1] + shares[2]) / 3
    np.testing.assert_allclose(said.astype(int), to_8_bits(mean).astype(int), atol=1)
    for wrong in (shares[0], (shares[0] + shares[1]) / 2, (shares[0] + 2 * shares[1] + shares[2]) / 4):
        assert np.abs(to_8_bits(wrong).astype(int) - said).max() > 3


def test_the_same_command_again_trains_and_teaches_nothing_anew(
    taught: tuple[Path, Distillation], monkeypatch: pytest.MonkeyPatch
) -> None:
    run, ended = taught
    said: list[Event] = []
    monkeypatch.setattr(contest, "validate_fold", lambda *_: pytest.fail("the ensemble was validated again"))
    options = {"epochs": 2, "unlabelled": run.parent / "data" / "imagesTs", "device": "cpu", "workers": 1}
    again = step.distill(run, baseline=True, report=said.append, **options)  # type: ignore[arg-type]
    assert [event for event in said if isinstance(event, Trained)] == []
    assert said.count(Said("3d_student_small, fold 0, seed 0: trained already.")) == 2
    assert [row.dice for row in again.contestants] == [row.dice for row in ended.contestants]
    with pytest.raises(UserError, match="other values of temperature"):
        step.distill(run, temperature=3.0, **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="--epochs 1: 2 epochs are done already"):
        step.distill(run, **(options | {"epochs": 1}))  # type: ignore[arg-type]
    assert load(distillation_file(Layout(run).model("3d_student_small", "0").root), Distillation) == again
    words = step._again(run, "3d", ended, "small", Options(), None, False)
    assert "--from fold_0,fold_0.seed_1 " in words  # `seeds` may be more by then


def test_a_student_is_not_kept_under_a_changed_plan(taught: tuple[Path, Distillation]) -> None:
    run, _ = taught
    plan = load(Layout(run).plan, Plan)
    changed = plan.configurations[0].model_copy(update={"batch_dice": True})
    save(Layout(run).plan, plan.model_copy(update={"configurations": (changed, plan.configurations[1])}))
    before = Layout(run).plan.read_text()
    with pytest.raises(UserError, match="has changed since this training began: batch_dice"):
        step.distill(run, unlabelled=run.parent / "data" / "imagesTs", device="cpu", workers=1)
    assert Layout(run).plan.read_text() == before
    save(Layout(run).plan, plan)


def test_the_ensemble_is_validated_again_once_a_teacher_is_newer(taught: tuple[Path, Distillation]) -> None:
    run, _ = taught
    student, cases = Layout(run).model("3d_student_small", "0"), load(Layout(run).splits, Splits).folds[0]
    together = student.together
    teachers = teachers_named(run, tiny(), "0", ["seeds"])
    assert contest._newer_scores(together, (*teachers, student), cases) is not None
    before = teachers[1].weights.stat()
    os.utime(teachers[1].weights, ns=(before.st_atime_ns, together.scores.stat().st_mtime_ns + 10**9))
    assert contest._newer_scores(together, (*teachers, student), cases) is None
    os.utime(teachers[1].weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_baseline_is_as_long_as_the_student_whatever_is_asked_for_later(
    taught: tuple[Path, Distillation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(taught[0], copy)
    shutil.rmtree(Layout(copy).configuration("3d_student_small") / "alone")
    really = step.train_one

    def only_the_student(*given: Any) -> Run:
        if given[-1].lesson is None:
            raise UserError(str(given[5]))
        return really(*given)

    monkeypatch.setattr(step, "train_one", only_the_student)
    with pytest.raises(UserError, match=r"epochs=2, max_seconds=None.*batch_size=2"):
        step.distill(copy, unlabelled=taught[0].parent / "data" / "imagesTs", baseline=True, device="cpu", workers=1)


def test_a_student_whose_batch_becomes_small_changes_its_norm_like_its_teachers(
    taught: tuple[Path, Distillation], tmp_path: Path
) -> None:
    """A study varies the norm as it is asked to; a student, and its baseline, do what `train` does."""
    network = tiny().network.model_copy(update={"norm": "batch"})
    own = tiny().model_copy(update={"network": network})
    for keeps, norm in ((False, "instance"), (True, "batch")):
        instead = Instead(own, tmp_path / norm, keeps_norm=keeps)
        work = look_up(taught[0], None, "0", 0, "auto", Options(), Machine("cpu"), ALONE, silent, instead)
        assert begin(work, Options()).configuration.network.norm == norm


def test_a_student_learns_otherwise_than_from_labels_alone(taught: tuple[Path, Distillation]) -> None:
    model = Layout(taught[0]).model("3d_student_small", "0")
    alone = ModelLayout(model.root.parent / "alone" / model.root.name)
    weights = [torch.cat([p.flatten() for p in load_network(each, CPU).parameters()]) for each in (model, alone)]
    assert not torch.equal(*weights)
    assert load(model.run, Run).configuration == load(alone.run, Run).configuration


# ------------------------------------------------------------------------------------------------ who may teach


def test_teachers_are_found_by_seeds_folds_ranges_and_names(taught: tuple[Path, Distillation]) -> None:
    run, _ = taught

    def names(*texts: str) -> list[str]:
        return [model.root.name for model in teachers_named(run, tiny(), "0", texts)]

    assert names("seeds") == ["fold_0", "fold_0.seed_1"]
    assert names("folds") == names("fold_0..1") == [*names("seeds"), "fold_1"]
    assert names("fold_1", "fold_0.seed_1", "fold_1") == ["fold_1", "fold_0.seed_1"]
    assert names(str(Layout(run).model("3d", "1").root)) == ["fold_1"]
    assert names(str(run)) == names("folds")
    whole = Layout(Path(os.path.relpath(run))).model("3d", "0", 1).root
    assert teachers_named(run, tiny(), "0", ["seeds", str(whole)]) == teachers_named(run, tiny(), "0", ["seeds"])


def test_a_network_outside_of_any_run_teaches_if_its_outputs_mean_the_same(
    taught: tuple[Path, Distillation], tmp_path: Path
) -> None:
    run, _ = taught
    model = ModelLayout(tmp_path / "one")
    shutil.copytree(Layout(run).model("3d", "0").root, model.root)
    assert teachers_named(run, tiny(), "0", [str(model.root)]) == (model,)
    record = load(model.run, Run)
    for other in ({"labels": ("background", "a", "b")}, {"channels": ("CT",)}):
        save(model.run, record.model_copy(update=other))
        with pytest.raises(UserError, match=f"one cannot teach 3d: {next(iter(other))} differ"):
            teachers_named(run, tiny(), "0", [str(model.root)])


@pytest.mark.parametrize(
    ("named", "said"),
    [
        (["fold_3"], "no finished network"),
        (["fold_0..4"], "not trained for 2, 3, 4"),
        (["nowhere"], "no finished network.*fold_0..4"),
        ([], "needs teachers"),
    ],
)
def test_teachers_that_are_not_there_are_named(taught: tuple[Path, Distillation], named: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        teachers_named(taught[0], tiny(), "0", named)


def test_a_teacher_on_another_grid_is_refused(taught: tuple[Path, Distillation]) -> None:
    other = tiny().model_copy(update={"spacing_mm": (2.0, 1.0, 1.0)})
    with pytest.raises(UserError, match="spacing_mm differ"):
        teachers_named(taught[0], other, "0", ["seeds"])


def test_a_teacher_of_other_labels_is_refused(taught: tuple[Path, Distillation], tmp_path: Path) -> None:
    run, _ = taught
    other = tmp_path / "other"
    shutil.copytree(run, other)
    plan = load(Layout(other).plan, Plan)
    renamed = (plan.labels[0], *(each.model_copy(update={"name": f"no {each.name}"}) for each in plan.labels[1:]))
    save(Layout(other).plan, plan.model_copy(update={"labels": renamed}))
    assert len(teachers_named(run, tiny(), "0", [str(run)])) == 3
    for named in (str(other), str(Layout(other).model("3d", "0").root)):
        with pytest.raises(UserError, match="different labels"):
            teachers_named(run, tiny(), "0", [named])


def test_teachers_that_saw_the_validation_cases_are_told(
    taught: tuple[Path, Distillation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = taught
    models = teachers_named(run, tiny(), "0", ["folds"])
    assert [model.root.name for model in who_saw(models, held_out(run))] == ["fold_1"]
    assert who_saw(models, ()) == ()
    cases = [load(model.run, Run).cases for model in models]
    assert cases == [load(Layout(run).splits, Splits).folds[fold] for fold in (0, 0, 1)]
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    monkeypatch.setattr(step, "train_one", lambda *_: (_ for _ in ()).throw(UserError("far enough")))
    events: list[Event] = []
    with pytest.raises(UserError, match="far enough"):
        step.distill(copy, teachers=["folds"], student="tiny", epochs=1, device="cpu", report=events.append)
    warned = [event.text for event in events if isinstance(event, Warned)]
    assert any(text.startswith("fold_1 learned from validation cases of fold 0") for text in warned)
    begun = load(distillation_file(Layout(copy).model("3d_student_tiny", "0").root), Distillation)
    assert begun.seen == ("fold_1",)


def test_unlabelled_images_that_are_validation_cases_are_left_out(
    taught: tuple[Path, Distillation], tmp_path: Path
) -> None:
    run, _ = taught
    case = held_out(run)[0]
    images = tmp_path / "more"
    images.mkdir()
    (images / "copy.nii.gz").symlink_to(run.parent / "data" / "imagesTr" / f"{case}.nii.gz")
    shutil.copy(run.parent / "data" / "imagesTs" / "case_10.nii.gz", images / "new.nii.gz")
    events: list[Event] = []
    layout = Layout(run)
    dataset, fold = load(layout.dataset, Dataset), load(layout.splits, Splits).folds[0]
    kept = step._unlabelled(images, load(layout.plan, Plan), dataset, fold, events.append)
    assert [each.id for each in kept] == ["unlabelled_new"]
    assert any(isinstance(event, Warned) and "1 images" in event.text for event in events)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"student": "huge"}, "standard, small, tiny"),
        ({"temperature": 0.0}, "above 0"),
        ({"labels_weight": 1.5}, "from 0 to 1"),
        ({"fold": "7"}, "no fold '7'"),
        ({"teachers": ["fold_4"]}, "no finished network"),
    ],
)
def test_impossible_students_are_refused_and_nothing_is_written(
    taught: tuple[Path, Distillation], options: dict[str, object], said: str
) -> None:
    run, _ = taught
    before = sorted(path for path in run.rglob("*"))
    with pytest.raises(UserError, match=said):
        step.distill(run, **({"epochs": 1, "device": "cpu"} | options))  # type: ignore[arg-type]
    assert sorted(path for path in run.rglob("*")) == before


# ------------------------------------------------------------------------------------------------ batches


def test_what_teachers_say_moves_with_the_image_and_the_labels() -> None:
    """Teachers that say exactly the labels, and an image that is the labels: after augmentation all three agree."""
    rng = np.random.default_rng(0)
    blocks = rng.integers(0, 3, (4, 4, 4)).repeat(5, 0).repeat(5, 1).repeat(5, 2).astype(np.int16)
    hot = np.stack([blocks == k for k in range(3)])
    where = {k: np.argwhere(blocks == k).astype(np.int32) for k in (1, 2)}
    case = InMemory(blocks[None].astype(np.float32), blocks, where)
    source = WithTeacher(case, np.where(hot, 254, 0).astype(np.uint8))
    chances = {name for name in AugmentSpec.model_fields if name.endswith("chance")}
    still = dict.fromkeys(chances - {"rotation_chance", "scale_chance"}, 0.0)
    spec = AugmentSpec(rotation_rad=(0.5,) * 3, rotation_chance=1.0, scale_chance=1.0, mirror_axes=(0, 1, 2), **still)
    configuration = tiny().model_copy(update={"train": tiny().train.model_copy(update={"augment": spec})})
    with Batches(configuration, 0, 1, 3, CPU, 1, teachers=True) as batches:
        batch = batches.draw([source], ["a"], 0)
        assert batch.image.shape == (2, 1, 8, 8, 8)
        assert batch.labels.shape == (2, 1 + 3, 8, 8, 8)
        labels, said = batch.labels[:, 0], batch.labels[:, 1:]
        inside = said.sum(1) > 0.99
        sure = inside & (said.amax(1) > 0.9)
        assert sure.float().mean() > 0.2
        assert torch.equal(said.argmax(1)[sure].float(), labels[sure])
        mean = (said * torch.arange(3.0).view(1, 3, 1, 1, 1)).sum(1)
        torch.testing.assert_close(mean[inside], batch.image[:, 0][inside], atol=0.01, rtol=0.01)
        assert int((labels > 0).sum()) > 0
    still_moves = augment.enlarged_patch(spec, (8, 8, 8))
    assert min(still_moves) > 8


@pytest.mark.parametrize("classes", [3, 6])
@pytest.mark.parametrize("regions", [(), ((1, 2), (2,))])
def test_a_moved_image_without_labels_has_none(classes: int, regions: tuple[tuple[int, ...], ...]) -> None:
    rng = np.random.default_rng(0)
    said = torch.softmax(torch.from_numpy(rng.normal(0, 3, (len(regions) or classes, 9, 11, 10))), 0)
    image, nothing = rng.normal(0, 1, (1, 9, 11, 10)).astype(np.float32), np.full((9, 11, 10), -1, np.int16)
    source = WithTeacher(InMemory(image, nothing, {}), to_8_bits(said.numpy()), bool(regions))
    drawn = WithTeacher(InMemory(image, nothing + 1, {}), to_8_bits(said.numpy()), bool(regions))
    spec = AugmentSpec(rotation_rad=(0.5,) * 3, rotation_chance=1.0, scale_chance=1.0, mirror_axes=(0, 1, 2))
    changes = {"train": tiny().train.model_copy(update={"augment": spec}), "patch_voxels": (14, 14, 14)}
    configuration = tiny().model_copy(update=changes)
    for one, label in ((source, -1), (drawn, 0)):
        with Batches(configuration, 0, 1, classes, CPU, 1, teachers=True, regions=regions) as batches:
            for step in range(8):
                labels = batches.draw([one], ["a"], step).labels
                assert (labels[:, 0] == 0).any()
                assert (have_labels(labels[:, 0], labels[:, 1:], bool(regions)) == (label == 0)).all()


# ------------------------------------------------------------------------------------------------ words


def test_the_conclusion_says_what_is_kept_and_what_it_costs() -> None:
    def row(name: str, dice: float | None, seconds: float) -> Contestant:
        return Contestant(name=name, dice=dice, parameters=1, operations=1, seconds=seconds)

    members = [row("fold_0", 0.8, 1), row("fold_0.seed_1", 0.82, 1)]
    rows = [*members, row("ensemble of 2", 0.85, 2), row("student", 0.84, 0.1)]
    said = contest.conclude(rows, None)
    assert "ensemble has a Dice of 0.8500, the student 0.8400 (its members in the mean 0.8100)" in said
    assert "5 % of the ensemble's time" in said
    assert "0.8000 (p = 0.003 over cases)" in contest.conclude([*rows, row("labels alone", 0.8, 0.1)], 0.003)
    assert "in the mean 0.8100, p = 0.02 over cases)" in contest.conclude(rows, None, 0.02)
    nothing = [row(each.name, None, each.seconds) for each in rows]
    assert contest.conclude(nothing, None) == "The student takes 5 % of the ensemble's time per case."


def test_the_ensemble_is_tested_against_the_mean_of_its_members() -> None:
    rng = np.random.default_rng(0)
    members = [{f"c{n}": float(value) for n, value in enumerate(rng.normal(0.8, 0.01, 10))} for _ in range(3)]
    mean = contest._mean_of(members)
    assert mean["c4"] == pytest.approx(sum(member["c4"] for member in members) / 3)
    better = {name: value + 0.01 + 0.001 * n for n, (name, value) in enumerate(mean.items())}
    assert contest._chance(better, mean) == pytest.approx(2 / 2**10)
    assert contest._chance({name: better[name] for name in ("c1", "c2")}, mean) is None
    assert contest._mean_of([*members, {}]) == {}


def test_the_record_tests_the_student_against_labels_alone_and_the_ensemble_against_its_members(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = np.random.default_rng(1)
    names = ("fold_0", "fold_1", "ensemble of 2", "student", contest.ALONE)
    dice = {name: chance.normal(0.8, 0.02, 9) for name in names}

    def player(name: str) -> contest.Player:
        cases = tuple(CaseScore(id=f"c{n}", values={"dice": (float(d),)}) for n, d in enumerate(dice[name]))
        mean = float(dice[name].mean())
        scores = Scores(
            prediction="p", reference="r", labels=("x",), policy="", cases=cases, mean={"dice": (mean,)},
            foreground_mean={"dice": mean},
        )  # fmt: skip
        return contest.Player(name, tiny(), (), scores)

    monkeypatch.setattr(contest, "_players", lambda *_: [player(name) for name in names])
    monkeypatch.setattr(contest, "_timed", lambda *_: [1.0, 1.0, 2.0, 0.5, 0.5])
    models = tuple(ModelLayout(tmp_path / name) for name in names)
    school = contest.School(
        tmp_path, None, None, Fold(train=(), validation=("c0",)), tiny(), tiny(), models[:2], (), models[3]  # type: ignore[arg-type]
    )  # fmt: skip
    begun = Distillation(student="s", fold="0", seed=0, teachers=names[:2], temperature=2.0, labels_weight=0.5)
    ended = contest.contest(begun, school, CPU, silent)
    chances = {
        (one, other): statistics.wilcoxon(dice[one] - dice[other])
        for one in names for other in names if one != other
    }  # fmt: skip
    members = (dice["fold_0"] + dice["fold_1"]) / 2
    assert ended.p_value == pytest.approx(chances["student", contest.ALONE])
    assert ended.p_ensemble == pytest.approx(statistics.wilcoxon(dice["ensemble of 2"] - members))
    assert sum(abs(p - ended.p_value) < 1e-9 for p in chances.values()) == 2  # the same pair in both orders
    assert f"p = {ended.p_value:.2g} over cases)." in ended.conclusion
    assert f", p = {ended.p_ensemble:.2g} over cases)" in ended.conclusion


def test_records_of_a_distillation_are_whole_after_a_round_trip(tmp_path: Path) -> None:
    one = Distillation(student="s", fold="0", seed=0, teachers=("fold_0",), temperature=2.0, labels_weight=0.5)
    save(tmp_path / "d.json", one)
    assert load(tmp_path / "d.json", Distillation) == one
