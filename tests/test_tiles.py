"""Progress inside one image."""

import time
from pathlib import Path

import pytest
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from test_predict import write_network

from autoseg.events import Advanced, Event, Finished
from autoseg.lanes import Stage, side_by_side
from autoseg.records import AugmentSpec, TrainSpec
from autoseg.steps.predict import predict
from autoseg.steps.predicting import tiles


def told(monkeypatch: pytest.MonkeyPatch, seconds: list[float]) -> list[Event]:
    """What is announced of a case that begins at the first of these times and has a tile at each of the others."""
    events: list[Event] = []
    clock = iter(seconds)
    monkeypatch.setattr(tiles.time, "monotonic", lambda: next(clock))
    with tiles.telling(events.append, "tiles of a", lambda: False) as progress:
        for done in range(1, len(seconds)):
            progress(done, 9)
    return events


def test_a_quick_case_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert told(monkeypatch, [0.0, 1.0, 2.0, 3.9]) == []


def test_a_slow_case_says_how_far_it_is_but_not_with_every_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    events = told(monkeypatch, [0.0, 3.0, 4.0, 4.1, 4.2, 4.3, 9.0])
    shown = [Advanced("tiles of a", done, 9) for done in (2, 5, 6)]
    assert events == [*shown, Finished("tiles of a")]


def test_a_case_that_is_given_up_ends_at_its_next_tile_and_takes_its_bar_along(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    events: list[Event] = []
    monkeypatch.setattr(tiles, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(tiles, "ANNOUNCED_SECONDS", 0.0)
    gone: list[bool] = []

    def work() -> None:
        with tiles.telling(events.append, "tiles of a", lambda: bool(gone)) as progress:
            progress(1, 9)
            gone.append(True)
            progress(2, 9)

    with pytest.raises(InterruptedError):
        work()
    assert events == [Advanced("tiles of a", 1, 9), Finished("tiles of a")]


def test_a_case_with_many_tiles_is_not_given_up() -> None:
    """Its tiles together take longer than a worker may be silent."""

    def work(item: int, _: object) -> int:
        with tiles.telling(lambda _: None, "tiles of a", lambda: False) as progress:
            for done in range(6):
                time.sleep(0.25)
                progress(done + 1, 6)
        return item

    stage = Stage("predicting", (work,), stall_seconds=1.0)
    assert list(side_by_side([7], (stage,), str)) == [(7, 7)]


def test_predict_tells_of_the_tiles_of_slow_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = write_dataset(tmp_path / "data", cases=2, shape=(8, 8, 20), label_values=(1, 2), held_out=1)
    configuration = a_configuration(network=a_network(), train=TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,) * 3)))
    write_network(a_planned_run(tmp_path / "run", data, configuration), configuration, "0")
    monkeypatch.setattr(tiles, "SLOW_SECONDS", 0.0)
    monkeypatch.setattr(tiles, "ANNOUNCED_SECONDS", 0.0)
    events: list[Event] = []
    [written] = predict(tmp_path / "run", data / "imagesTs", tmp_path / "out", device="cpu", report=events.append)
    what = f"tiles of {written.name.removesuffix('.nii.gz')}"
    done = [(event.done, event.of) for event in events if isinstance(event, Advanced) and event.what == what]
    assert len(done) > 1
    assert done == [(number + 1, len(done)) for number in range(len(done))]
    assert events.count(Finished(what)) == 1
