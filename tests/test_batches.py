"""steps/training/batches.py: what is drawn is counted, and the same whatever was read ahead."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from torch import nn

from autoseg.errors import UserError
from autoseg.layout import Layout
from autoseg.network import unet
from autoseg.network.device import Device, lay_out
from autoseg.network.loop import Batch
from autoseg.network.patches import InMemory, WithPrevious
from autoseg.network.patches_on_device import OnDevice
from autoseg.network.sampling import hard_rates
from autoseg.records import AugmentSpec, TrainSpec
from autoseg.steps.predicting.predictor import one_hot
from autoseg.steps.train import train
from autoseg.steps.training.batches import Batches

STILL = AugmentSpec(rotation_rad=(0.0,) * 3, rotation_chance=0, scale_chance=0)


def a_case(*classes: int) -> InMemory:
    locations = {k: np.array([[k, k, k]], np.int32) for k in classes}
    return InMemory(np.zeros((1, 8, 8, 8), np.float32), np.zeros((8, 8, 8), np.int16), locations)


CASES = [a_case(1, 2), a_case(1), a_case(1), a_case()]


def batches(workers: int, sampling: str, rates: tuple[float, ...] = ()) -> Batches:
    configuration = a_configuration(network=a_network(), train=TrainSpec(sampling=sampling, augment=STILL))
    return Batches(configuration, 0, 1, 3, Device(torch.device("cpu"), "fp32"), workers, class_rates=rates)


def test_drawn_shares_are_those_of_the_batches_that_were_used_since_the_last_time() -> None:
    with batches(4, "case_balanced") as coming:
        batch = coming.draw(CASES, "abcd", 0)
        shares = coming.drawn_shares()
        size = len(batch.cases)
        assert shares["case_with_1"] == sum(case in "abc" for case in batch.cases) / size
        assert shares["case_with_2"] == sum(case == "a" for case in batch.cases) / size
        assert shares["drawn_free"] + shares["drawn_1"] + shares["drawn_2"] == pytest.approx(1)
        assert shares["drawn_free"] >= 0.5
        assert set(coming.drawn_shares().values()) == {0.0}


def test_a_batch_for_which_memory_ran_out_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("out of memory, as if")

    with batches(1, "foreground") as coming:
        with monkeypatch.context() as short:
            short.setattr("autoseg.steps.training.batches.augment.apply", run_out)
            with pytest.raises(torch.OutOfMemoryError):
                coming.draw(CASES, "abcd", 0)
        assert len(coming.draw(CASES, "abcd", 0).cases) == coming._drawn["samples"]


@pytest.mark.parametrize("moves", [False, True])
def test_with_an_ignore_label_nothing_is_learned_outside_the_image(moves: bool) -> None:
    augment = AugmentSpec(rotation_rad=(0.5,) * 3, rotation_chance=float(moves), scale_chance=0)
    configuration = a_configuration(network=a_network(), train=TrainSpec(augment=augment))
    labels = np.full((6, 8, 8), -1, np.int16)
    labels[2:6, 3, 2:6] = 1
    cases, counted = [InMemory(np.ones((1, *labels.shape), np.float32), labels, {})], []
    for ignores in (True, False):
        with Batches(configuration, 0, 1, 3, Device(torch.device("cpu"), "fp32"), 1, ignores=ignores) as coming:
            counted.append(set(coming.draw(cases, "a", 0).labels.unique().tolist()))
    assert counted == [{-1, 1}, {-1, 0, 1}]


def test_hard_sampling_draws_the_same_however_far_it_reads_ahead_and_wherever_it_resumes() -> None:
    rows = [{"step": 20.0, "dice_1": 0.99, "dice_2": 0.2}, {"step": 40.0, "dice_1": 0.3, "dice_2": 0.9}]

    def drawn(workers: int, first: int) -> list[tuple[str, ...]]:
        """The cases of every step; an epoch's row is known only when its last step is done."""
        with batches(workers, "hard") as coming:
            return [
                coming.draw(CASES, "abcd", step, [row for row in rows if row["step"] <= step]).cases
                for step in range(first, 70)
            ]

    assert hard_rates(rows, 70, 3) != hard_rates(rows, 36, 3)
    whole = drawn(1, 0)
    assert drawn(8, 0) == whole
    for first in (20, 33, 41):
        assert drawn(8, first) == whole[first:]


def test_nothing_is_read_ahead_from_cases_on_the_device() -> None:
    host = a_case(1, 2)
    image, labels = torch.from_numpy(host.image_CZYX), torch.from_numpy(host.labels_ZYX)
    found = []
    for source, ahead in ((host, 4), (OnDevice(image, labels, host.locations), 0)):
        with batches(4, "foreground") as coming:
            found.append(coming.draw([source], ["a"], 0))
            assert len(coming._coming) == ahead
            assert (found[-1].wait_seconds == 0) == (ahead == 0)
    assert torch.equal(found[0].image, found[1].image)
    assert torch.equal(found[0].labels, found[1].labels)


def test_batches_are_pinned_by_the_threads_that_read_them(monkeypatch: pytest.MonkeyPatch) -> None:
    pinned: list[int] = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(threading.get_ident()) or tensor)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *where, **how: tensor)
    with batches(2, "foreground") as coming:
        coming._device = Device(torch.device("cuda", 0), "bf16")
        image, labels = coming._next([a_case(1, 2)], 0, ())[:2]
        before = len(pinned)
        coming._to_device(image), coming._to_device(labels)
    assert before >= 2
    assert threading.get_ident() not in pinned


@pytest.mark.parametrize("patch", [(8, 8, 8), (10, 8, 6)])
def test_images_that_lie_inside_the_patch_are_moved_as_if_more_were_read_around_them(
    patch: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(0)
    cases = [
        InMemory(rng.normal(0, 1, (1, *shape)).astype(np.float32), rng.integers(0, 3, shape).astype(np.int16), {})
        for shape in ((8, 7, 8), (6, 8, 5))
    ]
    spec = AugmentSpec(rotation_rad=(0.5,) * 3, rotation_chance=1.0, scale_chance=0.5)
    configuration = a_configuration(network=a_network(), train=TrainSpec(augment=spec), patch_voxels=patch)
    read: list[tuple[int, ...]] = []

    def drawn() -> list[Batch]:
        with Batches(configuration, 0, 1, 3, Device(torch.device("cpu"), "fp32"), 1) as coming:
            found = [coming.draw(cases, "ab", step) for step in range(4)]
            read.append(coming._enlarged)
            return found

    fitted = drawn()
    monkeypatch.setattr("autoseg.steps.training.batches._within_reach", lambda enlarged, patch, sources: enlarged)
    for small, large in zip(fitted, drawn(), strict=True):
        torch.testing.assert_close(small.image, large.image, atol=1e-4, rtol=1e-4)
        assert (small.labels == large.labels).float().mean() > 0.99  # ties between two labels
    assert read[0][:2] == patch[:2]
    assert read[1][0] > patch[0]
    assert (read[0][2] > patch[2]) == (patch[2] < 8)


def test_what_the_stage_before_found_moves_with_the_image_and_is_told_by_one_channel_per_class() -> None:
    """It finds exactly the labels here, so their channels must say what the labels of the batch say."""
    rng = np.random.default_rng(0)
    labels_ZYX = rng.integers(0, 3, (8, 8, 8)).astype(np.int16)
    image_CZYX = rng.normal(0, 1, (1, 8, 8, 8)).astype(np.float32)
    case = WithPrevious(InMemory(image_CZYX, labels_ZYX, {}), labels_ZYX)
    spec = AugmentSpec(rotation_rad=(0.5,) * 3, rotation_chance=0.5, mirror_axes=(0, 1, 2))
    configuration = a_configuration(network=a_network(3), previous="3d_lowres", train=TrainSpec(augment=spec))
    seen: list[torch.Tensor] = []

    def network(inputs: torch.Tensor) -> torch.Tensor:
        seen.append(inputs)
        return torch.zeros(len(inputs), 3, 8, 8, 8)

    with Batches(configuration, 0, 1, 3, Device(torch.device("cpu"), "fp32"), 1) as coming:
        drawn = [coming.draw([case], "a", step) for step in range(4)]
        coming.validation_dice(network, [case], 10)  # type: ignore[arg-type]
    for batch in drawn:
        for image, labels in zip(batch.image, batch.labels, strict=True):
            np.testing.assert_array_equal(image[1:].numpy(), one_hot(labels.numpy(), 3))
    assert len({labels.numpy().tobytes() for batch in drawn for labels in batch.labels}) > 5
    for image in seen[0]:
        np.testing.assert_array_equal(image[:1].numpy(), image_CZYX)
        np.testing.assert_array_equal(image[1:].numpy(), one_hot(labels_ZYX, 3))


def test_a_compiled_network_is_validated_in_the_layout_of_eager_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_on_cards(dimension: int, device: Device, compiled: bool = False) -> torch.memory_format:
        return torch.channels_last_3d if compiled else torch.contiguous_format

    monkeypatch.setattr("autoseg.steps.training.batches.layout", as_on_cards)
    monkeypatch.setattr("autoseg.network.device.layout", as_on_cards)
    rng, cpu = np.random.default_rng(0), Device(torch.device("cpu"), "fp32")
    labels = rng.integers(0, 3, (8, 8, 8)).astype(np.int16)
    case = InMemory(rng.normal(0, 1, (1, 8, 8, 8)).astype(np.float32), labels, {})
    configuration = a_configuration(network=a_network(), train=TrainSpec(augment=STILL))
    network = unet.build(configuration.network).eval()
    first = next(module for module in network.modules() if isinstance(module, nn.Conv3d) and module.in_channels > 1)
    seen: list[tuple[bool, bool]] = []
    first.register_forward_pre_hook(
        lambda module, inputs: seen.append((inputs[0].is_contiguous(), module.weight.is_contiguous()))
    )

    def validated(compiled: bool) -> list[float]:
        with Batches(configuration, 0, 1, 3, cpu, 1, compiled=compiled) as coming:
            return coming.validation_dice(network, [case], 10)

    plain = validated(False)
    weights = dict(lay_out(network, 3, cpu, compiled=True).named_parameters())
    places = [weight.data_ptr() for weight in weights.values()]
    assert not first.weight.is_contiguous()
    assert validated(True) == pytest.approx(plain, abs=1e-6)
    assert all(both == (True, True) for both in seen)
    assert [weight.data_ptr() for weight in network.parameters()] == places
    assert 0 < plain[0] < 1


def test_a_training_says_what_its_patches_were_drawn_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autoseg.steps.training.learn.draw_curves", lambda path, history: None)
    spec = TrainSpec(epochs=2, steps_per_epoch=2, warmup_steps=1, augment=STILL)
    data = write_dataset(tmp_path / "data", cases=4, shape=(8, 10, 12))
    run = a_planned_run(tmp_path / "run", data, a_configuration(network=a_network(), train=spec))
    options = {"configuration": "3d", "fold": "0", "device": "cpu", "workers": 1}
    for text, sentence in (
        ("balanced", "Choose one of foreground, class_balanced, case_balanced, hard"),
        ("class_balanced:huge=1", "no class 'huge'. The classes are large, small"),
    ):
        with pytest.raises(UserError, match=sentence):
            train(run, **options, sampling=text)
    assert not Layout(run).models.exists()
    record = train(run, **options, sampling="class_balanced:small=1")
    assert record.configuration.train.class_rates == (("small", 1.0),)
    drawn = "Patches were drawn (class_balanced): centred on large 0.0%, small 50.0%; anywhere 50.0%."
    assert record.notes[-1] == drawn
    rows = [json.loads(line) for line in Layout(run).model("3d", "0").history.read_text().splitlines()]
    assert [(row["drawn_free"], row["drawn_1"], row["drawn_2"]) for row in rows] == [(0.5, 0.0, 0.5)] * 2
    longer = train(run, **options, epochs=3, resume="yes", sampling="case_balanced:share=1")
    assert longer.configuration.train.class_rates == ()
    notes = [note for note in longer.notes if note.startswith("Patches were drawn")]
    assert len(notes) == 1
    assert "from cases with large" in notes[0]
    free = [json.loads(line)["drawn_free"] for line in Layout(run).model("3d", "0").history.read_text().splitlines()]
    assert free == [0.5, 0.5, 0.0]
    assert f"anywhere {100 / 3:.1f}%" in notes[0]
    assert math.isclose(sum(rows[0][name] for name in ("drawn_free", "drawn_1", "drawn_2")), 1.0)


def test_validation_goes_on_in_smaller_parts_where_memory_runs_out() -> None:
    rng = np.random.default_rng(0)
    shape = (12, 12, 12)
    cases = [
        InMemory(rng.normal(size=(1, *shape)).astype(np.float32), rng.integers(0, 3, shape).astype(np.int16), {})
        for _ in range(3)
    ]
    sizes: list[int] = []

    class Narrow(nn.Module):
        """One that runs out of memory with more than a sample."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > most[0]:
                raise torch.OutOfMemoryError("out of memory, as if")
            return torch.cat((x, -x, x.square() - 1), 1)

    found, most = [], [99]
    for most[0] in (99, 1):
        with batches(1, "foreground") as coming:
            found.append([coming.validation_dice(Narrow(), cases, 30) for _ in range(2)])
    assert found[0] == found[1]
    whole = sizes[0]
    assert whole > 1
    assert sizes.count(whole) == 6 + 1, "tried once, then in parts for good"
    most[0] = 0
    with batches(1, "foreground") as coming, pytest.raises(UserError, match="too little memory for a single patch"):
        coming.validation_dice(Narrow(), cases, 10)
