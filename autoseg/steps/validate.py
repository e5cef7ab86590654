"""Whole-image validation of a fold: the same functions as prediction, scored against the references of the data set."""

from pathlib import Path

from torch import nn

from autoseg import store
from autoseg.events import Advanced, Finished, Report, Started
from autoseg.image.formats import read_image, write_labels
from autoseg.layout import ModelLayout, prediction_file
from autoseg.network.device import Device
from autoseg.records import Configuration, Dataset, Fold, Plan, Scores
from autoseg.steps.evaluate import Pair, Scoring, score_pairs, summary
from autoseg.steps.predict import Predictor


def validate_fold(
    run: Path, model: ModelLayout, configuration: Configuration, network: nn.Module, cases: Fold, dataset: Dataset,
    plan: Plan, device: Device, report: Report,
) -> Scores:  # fmt: skip
    """Predict every validation case of a fold on its file's grid, write the label maps, and score them."""
    predictor = Predictor.of_network(run, configuration, network, model.root.name, device)
    by_id = {case.id: case for case in dataset.cases}
    model.validation.mkdir(parents=True, exist_ok=True)
    store.remove_unfinished(model.validation)
    report(Started("validate", len(cases.validation)))
    pairs = []
    for number, name in enumerate(cases.validation):
        case = by_id[name]
        volume = read_image([Path(path) for path in case.images])
        path = prediction_file(model.validation, name, plan.file_ending)
        write_labels(path, predictor.segment(volume, case=name).labels_ZYX, volume.geometry)
        pairs.append(Pair(name, path, Path(str(case.label))))
        report(Advanced("validate", number + 1, len(cases.validation), name))
    report(Finished("validate"))
    scoring = Scoring(dataset.labels, dataset.ignore_value, surface=True, tolerance_mm=1.0)
    scored = score_pairs(pairs, scoring, None, report)
    return summary(scored, dataset.labels, str(model.validation), str(run))
