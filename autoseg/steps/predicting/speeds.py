"""What each `--speed` of `predict` takes and costs, measured on a fold.

It is measured on the fold's validation cases. `autoseg evaluate RUN --speeds` says it and writes `speeds.json` beside
the scores of the configuration.
"""

import time
from collections.abc import Sequence
from pathlib import Path

from autoseg import store
from autoseg.events import Advanced, Finished, Report, Said, Started, silent
from autoseg.image.formats import read_image, read_labels
from autoseg.image.labels import label_maps, to_indices
from autoseg.layout import Layout, ModelLayout, speeds_file
from autoseg.records import Case, CaseScore, Dataset, Record, Saved
from autoseg.steps.evaluate import score_case, scoring_of, summary
from autoseg.steps.plan import checked
from autoseg.steps.predicting.models import fold_and_seed, trained_configuration
from autoseg.steps.predicting.pairs import not_validated, validated_folds
from autoseg.steps.predicting.predictor import SPEEDS, Predictor

WHAT = "measure speeds"


class SpeedReading(Record):
    """One speed: seconds per case from the image in memory to the label map, and Dice per foreground label."""

    speed: str
    mirroring: bool
    overlap: float
    seconds_per_case: float
    dice: float | None
    dice_per_class: tuple[float | None, ...]


class Speeds(Saved):
    """The readings of one network on the cases that it was validated with, in the order of `SPEEDS`."""

    configuration: str
    model: str
    device: str
    precision: str
    cases: int
    readings: tuple[SpeedReading, ...]


def measure_speeds(
    run: Path, configuration: str | None = None, *, device: str | None = None, report: Report = silent
) -> Speeds:
    """Segment the validation cases of the first trained fold at every speed; say and save seconds and Dice.

    Args:
        configuration: None takes what `predict` takes.

    Raises:
        UserError: no fold of the configuration was validated.
    """
    layout, plan = Layout(run), checked(run)
    name = configuration or trained_configuration(layout, plan)
    folds = validated_folds(run, name)
    if not folds:
        raise not_validated(run, name)
    dataset = store.load(layout.dataset, Dataset)
    ids = label_maps(ModelLayout(layout.cross_validation(name) / folds[0]).validation)
    cases = [case for case in dataset.cases if case.id in ids and case.label is not None]
    report(Started(WHAT, len(SPEEDS) * len(cases)))
    readings = tuple(
        _reading(run, name, folds[0], speed, cases, dataset, device, report, number * len(cases))
        for number, speed in enumerate(SPEEDS)
    )
    report(Finished(WHAT))
    used = Predictor(run, configuration=name, folds=[fold_and_seed(folds[0])[0]], seeds=[0], device=device).device
    speeds = Speeds(
        configuration=name, model=folds[0], device=used.name, precision=used.precision, cases=len(cases),
        readings=readings,
    )  # fmt: skip
    store.save(speeds_file(layout.cross_validation(name)), speeds)
    for each in readings:
        report(Said(told(each, readings[0])))
    return speeds


def told(reading: SpeedReading, accurate: SpeedReading) -> str:
    """One line: what a speed takes and what it costs beside "accurate"."""
    share = reading.seconds_per_case / max(accurate.seconds_per_case, 1e-9)
    text = f"{reading.speed}: {reading.seconds_per_case:.3g} s per case ({share:.0%} of accurate)"
    if reading.dice is None or accurate.dice is None:
        return f"{text}."
    change = reading.dice - accurate.dice
    return f"{text}, Dice {reading.dice:.4f}" + (f" ({change:+.4f})." if reading is not accurate else ".")


def _reading(
    run: Path, name: str, fold: str, speed: str, cases: Sequence[Case], dataset: Dataset, device: str | None,
    report: Report, before: int,
) -> SpeedReading:  # fmt: skip
    predictor = Predictor(
        run, configuration=name, folds=[fold_and_seed(fold)[0]], seeds=[0], device=device, postprocess=False,
        speed=speed,
    )  # fmt: skip
    scoring, seconds, scored = scoring_of(dataset, surface=False), 0.0, list[CaseScore]()
    for number, case in enumerate(cases):
        volume = read_image([Path(path) for path in case.images])
        if number == 0:
            predictor.segment(volume, case=case.id)  # the first time is spent on searching and allocating
        start = time.perf_counter()
        found_ZYX = predictor.segment(volume, case=case.id).labels_ZYX
        seconds += time.perf_counter() - start
        referred_ZYX, geometry = read_labels(str(case.label))
        scored.append(score_case(
            case.id, to_indices(found_ZYX, scoring.labels, None, case.id),
            to_indices(referred_ZYX, scoring.labels, scoring.ignore_value, str(case.label)), geometry.spacing_mm,
            len(scoring.labels), with_surface=False, annotated=scoring.drawn(case.annotated), members=scoring.members,
        ))  # fmt: skip
        report(Advanced(WHAT, before + number + 1, len(SPEEDS) * len(cases), f"{speed}, {case.id}"))
    means = summary(tuple(scored), scoring.classes, "", "")
    how = SPEEDS[speed]
    return SpeedReading(
        speed=speed, mirroring=bool(predictor.mirror_axes), overlap=how.overlap,
        seconds_per_case=seconds / max(1, len(cases)), dice=means.foreground_mean["dice"],
        dice_per_class=means.mean["dice"],
    )  # fmt: skip
