"""Label kinds: regions, ignored voxels and partial labels, from the gradient of a loss to a trained network's Dice."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
import torch.nn.functional as F
from planned import INTENSITIES, a_configuration, a_plan
from torch import Tensor

from autoseg.cases.discover import discover
from autoseg.errors import UserError
from autoseg.image.formats import read_labels
from autoseg.layout import Layout, ModelLayout, probabilities_file
from autoseg.network import losses
from autoseg.network.label_kinds import Labelling, Outputs
from autoseg.records import AugmentSpec, NetworkSpec, Scores, TrainSpec
from autoseg.steps.distill import distill
from autoseg.steps.evaluate import score_case
from autoseg.steps.plan import edited, plan
from autoseg.steps.predict import predict
from autoseg.steps.study import study
from autoseg.steps.train import train
from autoseg.store import load, save

REGIONS = ((1, 2, 3), (2, 3), (3,))
LABELS = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": [3]}


def batch(classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(3, classes, 5, 6) float64 logits and (3, 5, 6) target of 4 labels with some ignored voxels."""
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randn(3, classes, 5, 6, generator=chance, dtype=torch.float64)
    return logits, torch.randint(-1, 4, (3, 5, 6), generator=chance).to(torch.int16)


# ------------------------------------------------------------------------------------------------ losses


def test_cross_entropy_of_regions_is_that_of_their_sigmoids() -> None:
    logits, target = batch(3)
    value = losses.build("ce", batch_dice=False, regions=REGIONS)(logits, target)
    kept = target >= 0
    each = [
        F.binary_cross_entropy_with_logits(logits[:, r][kept], torch.isin(target, torch.tensor(members))[kept].double())
        for r, members in enumerate(REGIONS)
    ]
    assert value.item() == pytest.approx(float(sum(each)) / 3)


def test_dice_of_regions_is_that_of_their_sigmoids() -> None:
    logits, target = batch(3)
    value = losses.build("dice", batch_dice=True, regions=REGIONS)(logits, target)
    kept, found = (target >= 0).numpy(), []
    for r, members in enumerate(REGIONS):
        p, g = logits[:, r].sigmoid().numpy()[kept], np.isin(target, members)[kept]
        found.append(1 - (2 * (p * g).sum() + 1e-5) / (p.sum() + g.sum() + 1e-5))
    assert value.item() == pytest.approx(np.mean(found))


@pytest.mark.parametrize("name", losses.LOSSES)
@pytest.mark.parametrize("regions", [(), REGIONS])
def test_what_was_not_annotated_has_exactly_zero_gradient(name: str, regions: tuple[tuple[int, ...], ...]) -> None:
    logits, target = batch(len(regions) or 4)
    table = torch.ones(3, logits.shape[1], dtype=torch.bool)
    table[0, 1] = table[2, 2] = False
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        z = logits.detach().clone().to(dtype).requires_grad_()
        value = losses.build(name, batch_dice=False, regions=regions)(z, target, table)
        value.backward()
        assert value.isfinite()
        assert z.grad is not None
        assert z.grad.isfinite().all()
        assert z.grad[0, 1].abs().max() == 0
        assert z.grad[2, 2].abs().max() == 0
        for sample, output in ((1, 1), (0, 2), (2, 1)):
            assert z.grad[sample, output].abs().max() > 0, (sample, output)


def test_the_background_stands_for_what_was_not_annotated() -> None:
    logits, target = batch(4)
    table = torch.tensor([[True, False, True, False]]).repeat(3, 1)
    value = losses.build("ce", batch_dice=False)(logits, target, table)
    p = torch.softmax(logits, 1)
    of_background = p[:, 0] + p[:, 1] + p[:, 3]
    expected = torch.where(target == 0, of_background, p[:, 2])[(target == 0) | (target == 2)].log().mean()
    assert value.item() == pytest.approx(-expected.item())


@pytest.mark.parametrize("name", losses.LOSSES)
def test_a_table_that_denies_nothing_changes_nothing(name: str) -> None:
    logits, target = batch(4)
    loss = losses.build(name, batch_dice=False)
    assert torch.equal(loss(logits, target, torch.ones(3, 4, dtype=torch.bool)), loss(logits, target))


def test_masks_of_regions_overlap_and_leave_out_what_was_not_annotated() -> None:
    logits, target = batch(3)
    table = torch.tensor([[True, True, True], [True, False, True], [True, True, True]])
    for r, (found, true) in enumerate(Outputs(4, REGIONS).masks(logits, target, table)):
        counted = (target >= 0) & table[:, r].view(-1, 1, 1)
        assert torch.equal(found, (logits[:, r] > 0) & counted)
        assert np.array_equal(true, np.isin(target, REGIONS[r]) & counted.numpy())
    best = logits.argmax(1)
    for k, (found, true) in enumerate(Outputs(3).masks(logits, target), 1):
        assert torch.equal(found, (best == k) & (target >= 0))
        assert torch.equal(true, target == k)


def test_class_weights_of_regions_are_one_per_region() -> None:
    logits, target = batch(3)
    spec = "weighted_ce:border=0,class_weights=1/2/3"
    value = losses.build(spec, batch_dice=False, regions=REGIONS)(logits, target)
    kept, found = target >= 0, []
    for r, members in enumerate(REGIONS):
        g = torch.from_numpy(np.isin(target, members))[kept]
        each = F.binary_cross_entropy_with_logits(logits[:, r][kept], g.double(), reduction="none")
        weight = torch.where(g, float(r + 1), 1.0)
        found.append(float((each * weight).sum() / weight.sum()))
    assert value.item() == pytest.approx(np.mean(found))
    with pytest.raises(UserError, match="2 numbers, but there are 3 regions"):
        losses.build("weighted_ce:class_weights=1/2", batch_dice=False, regions=REGIONS)


# ------------------------------------------------------------------------------------------------ trained networks

CASES, SIDE = 20, 32


def truth(case: int) -> np.ndarray:
    """Three nested squares of the values 1, 2 and 3, (SIDE, SIDE), somewhere."""
    y, x = np.random.default_rng(case).integers(2, SIDE - 20, 2)
    labels = np.zeros((SIDE, SIDE), np.uint8)
    for value, inset in ((1, 0), (2, 3), (3, 6)):
        labels[y + inset : y + 18 - inset, x + inset : x + 18 - inset] = value
    return labels


def write(folder: Path, description: dict, drawn: Callable[[int, np.ndarray], np.ndarray]) -> Path:
    """A 2D data set whose images show the truth with noise, and whose label maps hold what `drawn` makes of it."""
    for name in ("imagesTr", "labelsTr"):
        (folder / name).mkdir(parents=True)
    for case in range(CASES):
        labels = truth(case)
        image = labels * 10.0 + np.random.default_rng(100 + case).normal(30, 1, labels.shape)
        for place, array in (("imagesTr", image.astype(np.float32)), ("labelsTr", drawn(case, labels))):
            suffix = "_0000" if place == "imagesTr" else ""
            sitk.WriteImage(sitk.GetImageFromArray(array[None]), str(folder / place / f"c{case}{suffix}.nii.gz"))
    about = {"channel_names": {"0": "CT"}, "numTraining": CASES, "file_ending": ".nii.gz"}
    (folder / "dataset.json").write_text(json.dumps(about | description))
    return folder


def trained(place: Path, data: Path, steps: int = 30, **options: object) -> tuple[Path, ModelLayout]:
    """A tiny network trained for a few seconds, in epochs of so many steps; the run and the model."""
    dataset, run = discover(data, workers=1), place / "run"
    outputs = len(dataset.regions) or len(dataset.labels)
    network = NetworkSpec(
        dimension=2, in_channels=1, classes=outputs, features=(16, 32), strides=((1, 1), (2, 2)),
        kernels=((3, 3), (3, 3)), encoder_blocks=(1, 1), decoder_blocks=(1,),
    )  # fmt: skip
    never = {name: 0.0 for name in AugmentSpec.model_fields if name.endswith("_chance")}
    augment = AugmentSpec(rotation_rad=(0.0,), **never)  # the classes differ by their intensities
    spec = TrainSpec(epochs=4, steps_per_epoch=steps, warmup_steps=min(5, steps), learning_rate=1e-2, augment=augment)
    configuration = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.0), patch_voxels=(SIDE, SIDE), batch_size=4, network=network,
        train=spec, median_shape_voxels=(1, SIDE, SIDE), normalization=("zscore",),
    )  # fmt: skip
    plan = a_plan(
        configuration, dimension=2, channels=dataset.channels, labels=dataset.labels, regions=dataset.regions,
        ignore_value=dataset.ignore_value, intensities=(INTENSITIES,),
    )  # fmt: skip
    save(Layout(run).dataset, dataset)
    save(Layout(run).plan, plan)
    train(run, device="cpu", workers=1, precision="fp32", **options)  # type: ignore[arg-type]
    return run, Layout(run).model("2d", "0")


@pytest.fixture(autouse=True)
def nothing_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.steps.training.learn.draw_curves", lambda path, history: None)
    monkeypatch.setattr("autoseg.steps.evaluate.allowed_cores", lambda: 1)


def dice_against_truth(model: ModelLayout) -> np.ndarray:
    """Dice of the values 1, 2, 3 against what is really there, the mean over the validation cases."""
    found = []
    for path in sorted(model.validation.glob("*.nii.gz")):
        predicted_ZYX, _ = read_labels(path)
        real_ZYX = truth(int(path.name[1:].partition(".")[0]))[None].astype(np.int16)
        scored = score_case("x", predicted_ZYX.astype(np.int16), real_ZYX, (1.0, 1.0, 1.0), 4, with_surface=False)
        found.append(scored.values["dice"])
    assert len(found) == CASES / 5
    return np.mean(found, axis=0)


def test_regions_train_to_a_dice_above_nine_tenths_and_so_does_a_student_of_the_teacher_alone(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"labels": LABELS, "regions_class_order": [1, 2, 3]}, lambda case, labels: labels)
    run, model = trained(tmp_path, data)
    scores = load(model.scores, Scores)
    assert scores.labels == ("whole", "core", "inner")
    assert min(scores.mean["dice"]) > 0.9
    assert dice_against_truth(model).min() > 0.9
    rows = [json.loads(line) for line in model.history.read_text().splitlines()]
    assert min(rows[-1][f"dice_{r}"] for r in (1, 2, 3)) > 0.9
    predict(run, data / "imagesTr", tmp_path / "out", device="cpu", workers=0, save_probabilities=True, part="1/10")
    again = read_labels(tmp_path / "out" / "c0.nii.gz")[0]
    assert set(np.unique(again)) == {0, 1, 2, 3}
    assert probabilities_file(tmp_path / "out", "c0").is_file()
    ended = distill(run, labels_weight=0.0, device="cpu", workers=1)
    student = load(Layout(run).model(ended.student, "0").scores, Scores)
    assert ended.contestants[-1].name == "student"
    assert student.labels == scores.labels
    assert min(student.mean["dice"]) > 0.9


def test_scribbles_train_to_a_dice_above_nine_tenths(tmp_path: Path) -> None:
    def scribbled(case: int, labels: np.ndarray) -> np.ndarray:
        return np.where(np.random.default_rng(200 + case).random(labels.shape) < 0.1, labels, 9).astype(np.uint8)

    named = {"background": 0, "a": 1, "b": 2, "c": 3, "ignore": 9}
    _, model = trained(tmp_path, write(tmp_path / "data", {"labels": named}, scribbled))
    assert dice_against_truth(model).min() > 0.9


def test_cases_with_some_classes_annotated_train_to_a_dice_above_nine_tenths(tmp_path: Path) -> None:
    def of_one_hand(case: int, labels: np.ndarray) -> np.ndarray:
        kept = (1, 3) if case % 2 else (2,)
        return np.where(np.isin(labels, kept), labels, 0).astype(np.uint8)

    annotated = {f"c{case}": ["a", "c"] if case % 2 else ["b"] for case in range(CASES)}
    named = {"background": 0, "a": 1, "b": 2, "c": 3}
    data = write(tmp_path / "data", {"labels": named, "annotated": annotated}, of_one_hand)
    _, model = trained(tmp_path, data)
    assert dice_against_truth(model).min() > 0.9
    for case in load(model.scores, Scores).cases:
        drawn = annotated[case.id]
        for name, dice in zip("abc", case.values["dice"], strict=True):
            assert (dice is None) == (name not in drawn)


def test_a_study_of_regions_names_and_scores_regions(tmp_path: Path) -> None:
    """Of three regions the scores are three, though there may be more labels or fewer, or as many of other names."""
    described = {"labels": LABELS, "regions_class_order": [1, 2, 3]}
    run, _ = trained(tmp_path, write(tmp_path / "data", described, lambda case, labels: labels), steps=2, epochs=1)
    study(run, ["loss=dice_ce,ce"], seeds=1, epochs=1, devices=("cpu",), workers=1)
    for name in ("loss=ce", "loss=dice_ce"):
        [folder] = Layout(run).root.glob(f"studies/*/{name}")
        scores = load(folder / "scores.json", Scores)
        assert scores.labels == ("whole", "core", "inner")
        assert all(len(case.values["dice"]) == 3 for case in scores.cases)


def test_plans_and_timings_are_of_steps_with_the_regions_and_the_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Labelling] = []

    def measurer(budget: object, labelling: Labelling) -> tuple[Callable[[object], int], str]:
        told.append(labelling)
        return lambda _: 1, "simulated"

    def timed(configuration: object, device: object, labelling: Labelling) -> float:
        told.append(labelling)
        raise UserError("That is enough.")

    monkeypatch.setattr("autoseg.network.memory.measurer", measurer)
    monkeypatch.setattr("autoseg.steps.training.begin.seconds_per_sample", timed)
    description = {"labels": LABELS, "regions_class_order": [1, 2, 3], "annotated": {"c0": ["core"]}}
    data, run = write(tmp_path / "data", description, lambda case, labels: labels), tmp_path / "run"
    plan(data, run, memory="2GB", workers=1)
    edited(run, ["2d.batch_size=7"])
    with pytest.raises(UserError, match="enough"):
        train(run, device="cpu", workers=1, max_seconds=60.0)
    assert told == [Labelling(REGIONS, True)] * 3


# ------------------------------------------------------------------------------------------------ what is asked for


@pytest.mark.parametrize(
    ("description", "says"),
    [
        ({"labels": LABELS}, "whole, core, inner need 'regions_class_order' with 3 of the values 1, 2, 3"),
        ({"labels": LABELS, "regions_class_order": [1, 2]}, "with 3 of the values 1, 2, 3, not"),
        ({"labels": LABELS, "regions_class_order": [1, 2, 7]}, "with 3 of the values 1, 2, 3, not"),
        ({"labels": LABELS, "regions_class_order": [1, 2, 2]}, "cannot be told apart"),
        ({"labels": LABELS | {"inner": 2, "ignore": 3}, "regions_class_order": [1, 2, 3]}, "'whole' holds 3, which"),
        ({"labels": LABELS | {"core": [0, 3]}, "regions_class_order": [1, 2, 3]}, "'core' holds 0, which is the backg"),
        ({"labels": {"background": 0, "a": 1, "b": 2}, "annotated": {"c0": ["d"]}}, "'d'.*Choose among a, b"),
        ({"labels": {"background": 0, "a": 1, "b": 2}, "annotated": {"zz": ["a"]}}, "no such case"),
        ({"labels": {"background": 0, "a": 1, "b": 2}, "annotated": ["c0"]}, "lists of names"),
    ],
)
def test_a_wrong_description_is_one_sentence_with_the_choices(tmp_path: Path, description: dict, says: str) -> None:
    write(tmp_path / "data", description, lambda case, labels: np.minimum(labels, 2))
    with pytest.raises(UserError, match=says):
        discover(tmp_path / "data", workers=1)


def test_what_regions_cannot_do_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    data = write(tmp_path / "data", {"labels": LABELS, "regions_class_order": [1, 2, 3]}, lambda case, labels: labels)
    with pytest.raises(UserError, match="foreground, class_balanced, case_balanced"):
        trained(tmp_path, data, sampling="hard")
    with pytest.raises(UserError, match=r"2 number.*3 regions.*whole, core, inner"):
        trained(tmp_path, data, loss="weighted_ce:class_weights=1/2")
    with pytest.raises(UserError, match="fingerprint, which this run lacks"):
        trained(tmp_path, data, loss="weighted_ce")
