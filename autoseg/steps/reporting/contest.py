"""What a student is worth beside its teachers: all scored and timed, one table.

That is done on the same cases. `autoseg distill` ends with it.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from autoseg import store
from autoseg.events import Advanced, Finished, Report, Started
from autoseg.image.formats import read_image
from autoseg.layout import Layout, ModelLayout
from autoseg.network.device import Device
from autoseg.planning.cost import parameters, training_operations
from autoseg.records import Configuration, Dataset, Fold, NetworkSpec, Plan, Scores
from autoseg.scoring import overlap, statistics
from autoseg.scoring.distillation import Contestant, Distillation
from autoseg.steps.predicting.models import as_trained, load_network
from autoseg.steps.predicting.predictor import Predictor
from autoseg.steps.training.validate import validate_fold

TIMED_CASES = 5
ALONE = "labels alone"


@dataclass(frozen=True)
class School:
    """Who learns from whom, on which cases.

    `planned` is the teachers' configuration, `own` the student's; `seen` are the teachers that learned from validation
    cases of the fold; `alone` is the student's network trained on the labels alone, if there is one.
    """

    run: Path
    plan: Plan
    dataset: Dataset
    cases: Fold
    planned: Configuration
    own: Configuration
    teachers: tuple[ModelLayout, ...]
    seen: tuple[ModelLayout, ...]
    student: ModelLayout
    alone: ModelLayout | None = None

    def called(self, model: ModelLayout) -> str:
        """A network of the teachers' configuration by its folder's name, another by its whole path."""
        is_own = model.root.parent == Layout(self.run).configuration(self.planned.name)
        return model.root.name if is_own else str(model.root)


@dataclass(frozen=True)
class Player:
    """One row of the table before it is measured; `configuration` is how its networks predict."""

    name: str
    configuration: Configuration
    networks: tuple[nn.Module, ...]
    scores: Scores | None


def contest(begun: Distillation, school: School, device: Device, report: Report) -> Distillation:
    """The record of a distillation that has ended: what each member, the ensemble, the student and, where it was
    trained, the student's network on the labels alone came to."""
    players = _players(school, device, report)
    seconds = _timed(begun.fold, players, school, device, report)
    rows = tuple(_row(player, each, school.planned) for player, each in zip(players, seconds, strict=True))
    by_name = {player.name: _dice(player.scores) for player in players}
    members = [_dice(player.scores) for player in players[: len(school.teachers)]]
    chance = _chance(by_name["student"], by_name.get(ALONE, {}))
    gain = _chance(_dice(players[len(school.teachers)].scores), _mean_of(members))
    return begun.model_copy(
        update={
            "contestants": rows, "timed_cases": len(_timed_cases(school)), "device": device.name, "p_value": chance,
            "p_ensemble": gain, "conclusion": conclude(rows, chance, gain),
        }
    )  # fmt: skip


def _players(school: School, device: Device, report: Report) -> list[Player]:
    """Members, ensemble, student and baseline with their networks and scores; the ensemble is scored here."""
    teachers, cases = school.teachers, school.cases
    networks = tuple(load_network(each, device) for each in teachers)

    def player(name: str, configuration: Configuration, model: ModelLayout, network: nn.Module) -> Player:
        scores = None if model in school.seen else _scores(model, cases)
        return Player(name, as_trained(configuration, [model], school.plan), (network,), scores)

    players = [
        player(school.called(model), school.planned, model, network)
        for model, network in zip(teachers, networks, strict=True)
    ]
    together, scores = as_trained(school.planned, teachers, school.plan), None
    if cases.validation:
        folder = school.student.together
        scores = _newer_scores(folder, (*teachers, school.student), cases)
        if scores is None:
            scores = validate_fold(
                school.run, folder, together, networks, cases, school.dataset, school.plan, device, report
            )
    players.append(Player(f"ensemble of {len(networks)}", together, networks, scores))
    players.append(player("student", school.own, school.student, load_network(school.student, device)))
    if school.alone is not None:
        players.append(player(ALONE, school.own, school.alone, load_network(school.alone, device)))
    return players


def _timed_cases(school: School) -> tuple[str, ...]:
    return (school.cases.validation or school.cases.train)[:TIMED_CASES]


def _timed(fold: str, players: Sequence[Player], school: School, device: Device, report: Report) -> list[float]:
    """Mean seconds per case of every player, on the same cases."""
    names, seconds = _timed_cases(school), np.zeros(len(players))
    by_id = {case.id: case for case in school.dataset.cases}
    report(Started("time", len(names)))
    for number, name in enumerate(names):
        volume = read_image([Path(path) for path in by_id[name].images])
        for place, player in enumerate(players):
            predictor = Predictor.of_network(
                school.run, player.configuration, player.networks, f"fold_{fold}", device
            )
            if number == 0:
                predictor.segment(volume, case=name)  # the first call of a network is slower than all others
            start = time.perf_counter()
            predictor.segment(volume, case=name)
            seconds[place] += (time.perf_counter() - start) / len(names)
        report(Advanced("time", number + 1, len(names), name))
    report(Finished("time"))
    return [float(each) for each in seconds]


def _scores(model: ModelLayout, cases: Fold) -> Scores | None:
    """What a network scored on exactly these cases, if it was scored on them."""
    scores = store.load(model.scores, Scores) if model.scores.is_file() else None
    return scores if scores and {case.id for case in scores.cases} == set(cases.validation) else None


def _newer_scores(model: ModelLayout, than: Sequence[ModelLayout], cases: Fold) -> Scores | None:
    """What was scored after all of these networks were trained; the student's may be another's whose folder is gone."""
    scores = _scores(model, cases)
    trained = max(each.weights.stat().st_mtime_ns for each in than)
    return scores if scores and model.scores.stat().st_mtime_ns >= trained else None


def _row(player: Player, seconds: float, planned: Configuration) -> Contestant:
    specs = [spec for network in player.networks if isinstance(spec := network.spec, NetworkSpec)]
    return Contestant(
        name=player.name, seconds=seconds,
        dice=player.scores.foreground_mean["dice"] if player.scores else None,
        class_dice=player.scores.mean["dice"] if player.scores else (),
        parameters=sum(parameters(spec) for spec in specs),
        operations=sum(training_operations(spec, planned.patch_voxels, 1) // 3 for spec in specs),
    )  # fmt: skip


def _dice(scores: Scores | None) -> dict[str, float]:
    """The mean Dice over the foreground of every case that has one."""
    means = {case.id: overlap.mean(case.values["dice"]) for case in (scores.cases if scores else ())}
    return {name: mean for name, mean in means.items() if mean is not None}


def _mean_of(members: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The members' mean per case; empty where a member has no scores."""
    common = set.intersection(*(set(member) for member in members))
    return {name: float(np.mean([member[name] for member in members])) for name in common}


def _chance(one: Mapping[str, float], other: Mapping[str, float]) -> float | None:
    """P value of Wilcoxon's test over the cases that both have; None where they are too few."""
    differences = np.array([one[name] - other[name] for name in sorted(set(one) & set(other))])
    return statistics.wilcoxon(differences) if differences.size >= statistics.FEWEST else None


def conclude(rows: Sequence[Contestant], chance: float | None, gain: float | None = None) -> str:
    """One or two sentences: what the ensemble gains, what the student keeps of it, and what it costs.

    `chance` and `gain` are the P values of student against labels alone and of the ensemble against its members' mean.
    """
    by_name = {row.name: row for row in rows}
    student = by_name["student"]
    together = next(row for row in rows if row.name.startswith("ensemble of "))
    members = [row.dice for row in rows[: rows.index(together)] if row.dice is not None]
    share = student.seconds / together.seconds
    parts = [f"the student takes {100 * share:.0f} % of the ensemble's time per case"]
    if student.dice is not None and together.dice is not None:
        apart = f"{together.dice:.4f}, the student {student.dice:.4f}"
        tested = "" if gain is None else f", p = {gain:.2g} over cases"
        mean = f" (its members in the mean {sum(members) / len(members):.4f}{tested})" if members else ""
        parts.insert(0, f"The ensemble has a Dice of {apart}{mean}")
    sentence = "; ".join(parts)
    alone = by_name.get(ALONE)
    if alone is None or alone.dice is None or student.dice is None:
        return f"{sentence[0].upper()}{sentence[1:]}."
    verdict = "not tested" if chance is None else f"p = {chance:.2g} over cases"
    return f"{sentence}. On labels alone the same network has {alone.dice:.4f} ({verdict})."
