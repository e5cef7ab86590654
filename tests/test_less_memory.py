"""network/less_memory.py: where a GPU runs out, the same result comes with less; tested on a CPU that pretends to."""

from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from test_predict import write_network

from autoseg.errors import UserError
from autoseg.events import Event, Warned
from autoseg.image import slides
from autoseg.image.formats import read_labels
from autoseg.image.probabilities import open_probabilities
from autoseg.layout import probabilities_file
from autoseg.network import sliding
from autoseg.network.accumulators import Room
from autoseg.network.device import Device
from autoseg.network.less_memory import tilings, until_it_fits
from autoseg.network.sliding import Scorer, Tiling
from autoseg.records import AugmentSpec, TrainSpec
from autoseg.steps.predict import predict
from autoseg.steps.predicting import predictor as step
from autoseg.steps.predicting.predictor import Predictor

CPU = Device(torch.device("cpu"), "fp32")
GPU = Device(torch.device("cuda", 0), "bf16")
PATCH = (8, 8, 8)
WAYS = (Tiling(PATCH, samples=4, place="device"), Tiling(PATCH, place="device"), Tiling(PATCH))


def test_each_way_takes_less_of_the_device() -> None:
    def ways(room: Room) -> list[tuple[int, str]]:
        return [(each.samples, each.place) for each in tilings(Tiling(PATCH, (0,)), 1000, 4, 3, GPU, room)]

    plenty = 10**9
    assert ways(Room(plenty, plenty)) == [(32, "device"), (1, "device"), (1, "ram")]
    assert ways(Room(plenty, 100)) == [(32, "device"), (1, "device"), (1, "memory map")]
    assert ways(Room(1500, plenty)) == [(1, "ram")]
    assert tilings(Tiling(PATCH, (0,)), 1000, 4, 3, CPU, Room(0, plenty)) == (Tiling(PATCH, (0,)),)


@pytest.mark.parametrize("text", ["", "CUDA error: out of memory", "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"])
def test_the_first_way_that_fits_is_taken_and_each_next_one_is_said(text: str) -> None:
    said: list[Event] = []

    def compute(tiling: Tiling) -> str:
        if tiling.place == "device":
            raise RuntimeError(text) if text else torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return tiling.place

    assert until_it_fits(WAYS, compute, CPU, said.append) == "ram"
    assert [each.text for each in said if isinstance(each, Warned)] == [
        "Memory of cpu ran out; once more with one tile at a time.",
        "Memory of cpu ran out; once more with one tile at a time and sums in RAM.",
    ]
    with pytest.raises(UserError, match="ran out, even one tile at a time"):
        until_it_fits(WAYS[:2], compute, CPU, said.append)


def test_other_errors_are_not_tried_again() -> None:
    tried: list[Tiling] = []

    def compute(tiling: Tiling) -> None:
        tried.append(tiling)
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory" if len(tried) == 2 else "a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        until_it_fits(WAYS, compute, CPU, lambda _: None)
    with pytest.raises(MemoryError):
        until_it_fits(WAYS, compute, CPU, lambda _: None)
    assert len(tried) == 2


def pretend(monkeypatch: pytest.MonkeyPatch, fits: str) -> None:
    """Sums lie on a device and four tiles share a pass; memory runs out after some tiles where the place is another."""
    original, whole = step.tilings, Scorer.__call__

    def on_a_gpu(*arguments: object) -> tuple[Tiling, ...]:
        tiling = original(*arguments)[0]  # type: ignore[arg-type]
        return tuple(
            Tiling(tiling.patch_voxels, tiling.mirror_axes, tiling.overlap, each.samples, each.place) for each in WAYS
        )

    places: list[str] = []
    zeros = sliding.zeros

    def noting(shape: tuple[int, ...], place: str, device: torch.device) -> torch.Tensor:
        places.append(place)
        return zeros(shape, place, device)  # type: ignore[arg-type]

    calls: list[int] = []

    def running_out(self: Scorer, batch: torch.Tensor, flips: tuple, samples: int) -> torch.Tensor:
        calls.append(samples)
        if len(calls) % 3 == 0 and places[-1] != fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return whole(self, batch, flips, samples)

    monkeypatch.setattr(step, "tilings", on_a_gpu)
    monkeypatch.setattr(sliding, "zeros", noting)
    monkeypatch.setattr(Scorer, "__call__", running_out)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of random weights and an image of several tiles."""
    place = tmp_path_factory.mktemp("less")
    data = write_dataset(place / "data", cases=2, shape=(14, 18, 22), label_values=(100, 255), held_out=1)
    configuration = a_configuration(
        network=a_network(), train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=(2,)))
    )
    write_network(a_planned_run(place / "run", data, configuration), configuration, "0")
    predict(place / "run", data / "imagesTs", place / "out", device="cpu", save_probabilities=True)
    return place


def test_a_case_for_which_memory_runs_out_is_begun_anew_with_the_same_result(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "ram")
    said: list[Event] = []
    [written] = predict(
        place / "run", place / "data" / "imagesTs", tmp_path, device="cpu", save_probabilities=True, report=said.append
    )
    assert len([each for each in said if isinstance(each, Warned)]) == 2
    np.testing.assert_array_equal(read_labels(written)[0], read_labels(place / "out" / written.name)[0])
    case = written.name.removesuffix(".nii.gz")
    shares, expected = (
        open_probabilities(probabilities_file(folder, case)).slab(0, 14) for folder in (tmp_path, place / "out")
    )
    np.testing.assert_allclose(shares, expected, atol=2e-3)
    found = Predictor(place / "run", device="cpu")(
        place / "data" / "imagesTs" / written.name, probabilities=True
    )
    np.testing.assert_allclose(found.probabilities_KZYX, expected, atol=2e-3)


def test_memory_that_is_never_enough_is_a_sentence_about_the_case(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretend(monkeypatch, "nothing")
    with pytest.raises(UserError, match=r"case_02: memory of cpu ran out, even one tile at a time.*--device cpu"):
        predict(place / "run", place / "data" / "imagesTs", tmp_path, device="cpu")


def test_a_slide_is_begun_anew_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(
        tmp_path / "data", cases=2, shape=(20, 24), dimension=2, layout="plain", label_values=(100, 255)
    )
    configuration = a_configuration(
        name="2d", dimension=2, spacing_mm=(None, 1.0, 1.0), patch_voxels=(16, 16), network=a_network(dimension=2),
        train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,), mirror_axes=())),
    )  # fmt: skip
    write_network(a_planned_run(tmp_path / "run", data, configuration), configuration, "0")
    pixels = np.random.default_rng(0).integers(1, 255, (60, 50), np.uint8)
    (tmp_path / "in").mkdir()
    tifffile.imwrite(tmp_path / "in" / "slide.tif", pixels, tile=(16, 16))
    monkeypatch.setattr(slides, "SLIDE_PIXELS", 100)
    [expected] = predict(tmp_path / "run", tmp_path / "in", tmp_path / "whole", device="cpu")
    pretend(monkeypatch, "ram")
    [written] = predict(tmp_path / "run", tmp_path / "in", tmp_path / "out", device="cpu")
    np.testing.assert_array_equal(read_labels(written)[0], read_labels(expected)[0])
