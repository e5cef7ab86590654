"""Whole-image validation of a fold, by the same functions as prediction.

Its predictions are scored against the references of the data set.
"""

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from autoseg import store
from autoseg.events import Advanced, Finished, Report, Started
from autoseg.image.formats import read_image, write_labels
from autoseg.layout import ModelLayout, prediction_file
from autoseg.network.device import Device
from autoseg.network.distributed import ALONE, Team, share, wait_for_all
from autoseg.records import Configuration, Dataset, Fold, Plan, Scores
from autoseg.steps.evaluate import save_scores, score_pairs, scoring_of
from autoseg.steps.predicting.pairs import pair_of
from autoseg.steps.predicting.predictor import Predictor


def validate_fold(
    run: Path, model: ModelLayout, configuration: Configuration, network: nn.Module | Sequence[nn.Module],
    cases: Fold, dataset: Dataset, plan: Plan, device: Device, report: Report, team: Team = ALONE,
) -> Scores:  # fmt: skip
    """Predict every validation case of a fold on its file's grid, write the label maps, score them and save that.

    A team shares the cases; the first process scores them all.
    """
    predictor = Predictor.of_network(run, configuration, network, model.root.name, device)
    by_id = {case.id: case for case in dataset.cases}
    paths = {name: prediction_file(model.validation, name, plan.file_ending) for name in cases.validation}
    if team.is_first:
        model.validation.mkdir(parents=True, exist_ok=True)
        store.remove_unfinished(model.validation)
        for path in set(model.validation.glob(f"*{plan.file_ending}")) - set(paths.values()):
            path.unlink()  # of other splits; all that lies here counts as validated
    wait_for_all(team)
    own = share(team, cases.validation)
    report(Started("validate", len(own)))
    for number, name in enumerate(own):
        volume = read_image([Path(path) for path in by_id[name].images])
        write_labels(paths[name], predictor.segment(volume, case=name).labels_ZYX, volume.geometry)
        report(Advanced("validate", number + 1, len(own), name))
    report(Finished("validate"))
    wait_for_all(team)
    if team.is_first:
        pairs = [pair_of(by_id[name], path) for name, path in paths.items()]
        scoring = scoring_of(dataset)
        scored = score_pairs(pairs, scoring, None, report)
        scores = save_scores(scored, scoring, model.validation, run, model.validation)
    wait_for_all(team)
    return scores if team.is_first else store.load(model.scores, Scores)
