"""What each speed takes and costs: every validation case at every speed, scored like any prediction."""

from pathlib import Path

import pytest
from planned import a_configuration, a_network, a_planned_run
from synthetic import write_dataset
from test_predict import write_network

from autoseg.errors import UserError
from autoseg.events import Event, Said
from autoseg.layout import Layout, prediction_file, speeds_file
from autoseg.records import AugmentSpec, Dataset, TrainSpec
from autoseg.steps.evaluate import evaluate
from autoseg.steps.predict import predict
from autoseg.steps.predicting.speeds import SpeedReading, Speeds, measure_speeds, told
from autoseg.store import load


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose one network was validated on one of its two cases."""
    place = tmp_path_factory.mktemp("speeds")
    data = write_dataset(place / "data", cases=2, shape=(8, 8, 12), label_values=(1, 2))
    train = TrainSpec(augment=AugmentSpec(rotation_rad=(0.5,) * 3, mirror_axes=(2,)))
    configuration = a_configuration(network=a_network(), train=train)
    run = a_planned_run(place / "run", data, configuration)
    write_network(run, configuration, "0")
    case = load(Layout(run).dataset, Dataset).cases[1]
    validated = prediction_file(Layout(run).model("3d", "0").validation, case.id, ".nii.gz")
    validated.parent.mkdir()
    validated.write_bytes(Path(str(case.label)).read_bytes())
    return run


def test_every_speed_is_read_on_the_validation_cases_and_scored_as_predictions_are(run: Path, tmp_path: Path) -> None:
    said: list[Event] = []
    speeds = measure_speeds(run, device="cpu", report=said.append)
    assert load(speeds_file(Layout(run).cross_validation("3d")), Speeds) == speeds
    assert (speeds.configuration, speeds.model, speeds.cases) == ("3d", "fold_0", 1)
    assert [each.speed for each in speeds.readings] == ["accurate", "balanced", "fast"]
    assert all(each.seconds_per_case > 0 for each in speeds.readings)
    case = load(Layout(run).dataset, Dataset).cases[1]
    for reading in speeds.readings:
        out = tmp_path / reading.speed
        predict(run, Path(case.images[0]), out, device="cpu", speed=reading.speed)
        scores = evaluate(out, run, cases=[case.id], workers=1)
        assert reading.dice == scores.foreground_mean["dice"]
        assert reading.dice_per_class == scores.mean["dice"]
    assert len([each for each in said if isinstance(each, Said) and " s per case" in each.text]) == 3


def test_a_run_without_validated_fold_is_refused(run: Path, tmp_path: Path) -> None:
    data = write_dataset(tmp_path / "data", cases=2, shape=(8, 8, 8), label_values=(1, 2))
    with pytest.raises(UserError, match="no validation predictions of 3d"):
        measure_speeds(a_planned_run(tmp_path / "run", data, a_configuration()), device="cpu")


def test_the_cost_is_told_beside_accurate() -> None:
    def reading(speed: str, seconds: float, dice: float | None) -> SpeedReading:
        return SpeedReading(
            speed=speed, mirroring=False, overlap=0.5, seconds_per_case=seconds, dice=dice, dice_per_class=(dice,)
        )

    accurate = reading("accurate", 2.0, 0.9)
    assert told(accurate, accurate) == "accurate: 2 s per case (100% of accurate), Dice 0.9000."
    fast = "fast: 0.5 s per case (25% of accurate)"
    assert told(reading("fast", 0.5, 0.88), accurate) == f"{fast}, Dice 0.8800 (-0.0200)."
    assert told(reading("fast", 0.5, None), accurate) == f"{fast}."
