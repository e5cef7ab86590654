"""`autoseg distill`: one small network learns what an ensemble knows; and a table of what each of them is worth."""

import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import nn

from autoseg import store
from autoseg.cases.discover import discover_images
from autoseg.errors import Interrupted, UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.image.formats import read_image
from autoseg.layout import Layout, ModelLayout, distillation_file
from autoseg.network.device import Device, pick, set_up
from autoseg.network.distributed import ALONE
from autoseg.network.memory import measurer
from autoseg.planning.cost import parameters, training_operations
from autoseg.planning.student import choose_student
from autoseg.records import Case, Configuration, Dataset, Fold, NetworkSpec, Plan, Run, Scores
from autoseg.scoring import overlap, statistics
from autoseg.scoring.distillation import Contestant, Distillation
from autoseg.steps.models import as_trained, configuration_named, default_configuration, load_network
from autoseg.steps.options import Machine, Options
from autoseg.steps.plan import checked
from autoseg.steps.predictor import Predictor
from autoseg.steps.preprocess import Work as Preparing
from autoseg.steps.preprocess import keep_or_make_splits, preprocess, preprocess_case
from autoseg.steps.teachers import Lesson, teachers_named, who_saw
from autoseg.steps.train import train_one
from autoseg.steps.validate import validate_fold
from autoseg.steps.work import Instead, fold_cases

TIMED_CASES = 5


@dataclass(frozen=True)
class Player:
    """One row of the table before it is measured; `configuration` is how its networks predict."""

    name: str
    configuration: Configuration
    networks: tuple[nn.Module, ...]
    scores: Scores | None


def distill(
    run: Path,
    *,
    teachers: Sequence[str] = ("seeds",),
    student: str = "small",
    configuration: str | None = None,
    fold: str = "0",
    seed: int = 0,
    epochs: int | None = None,
    max_seconds: float | None = None,
    temperature: float = 1.0,
    labels_weight: float = 0.5,
    unlabelled: Path | None = None,
    baseline: bool = False,
    device: str | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> Distillation:
    """Train a student of trained networks, compare it with them, and make it a configuration of the run.

    `predict RUN -c 3d_student_small` takes it. The same call again goes on where it was stopped.

    Args:
        teachers: see `teachers_named`. Those that learned from validation cases of the fold are warned of.
        student: of `planning.student.SIZES`.
        configuration: the teachers'; None takes "3d", else "2d".
        fold: the student's; "all" learns from every case and is scored on none.
        epochs, max_seconds: length of the student's training, without what its teachers need to look at the cases.
        temperature, labels_weight: of `network.distillation.distilling`.
        unlabelled: folder of images; of these the student learns what the teachers say.
        baseline: also train the student's network on the labels alone, for as long and in batches as large.

    Raises:
        UserError: no such teachers, another grid, or a student of this name that was begun otherwise.
        Interrupted: after Ctrl-C, when the state is saved.
    """
    layout, plan = Layout(run), checked(run)
    planned = configuration_named(plan, configuration or default_configuration(plan))
    dataset = store.load(layout.dataset, Dataset)
    cases = fold_cases(keep_or_make_splits(layout, dataset, report), dataset, fold)
    found = teachers_named(run, planned, fold, teachers)
    _check(temperature, labels_weight)
    own, choice = choose_student(planned, student, *measurer(plan.budget))
    model = layout.model(own.name, fold, seed)
    seen = who_saw(found, cases.validation)
    extra = _unlabelled(unlabelled, plan, dataset, cases, report)
    begun = Distillation(
        student=own.name, fold=fold, seed=seed, teachers=tuple(_called(each, run) for each in found),
        seen=tuple(_called(each, run) for each in seen), temperature=temperature, labels_weight=labels_weight,
        unlabelled=len(extra), cases=len(cases.validation),
    )  # fmt: skip
    _begin(begun, model, report)
    _add_to_plan(layout, plan, own, choice, report)
    preprocess(run, configuration=planned.name, workers=workers, report=report)
    _prepare(extra, plan, planned, layout)
    lesson = Lesson(found, temperature, labels_weight, extra)
    asked = Options(epochs, max_seconds)
    alone = ModelLayout(model.root.parent / "alone" / model.root.name)
    machine = Machine(device, workers)
    try:
        record = _trained(run, fold, seed, asked, machine, Instead(own, model.root, lesson, keeps_norm=False), report)
        if baseline:
            _trained(run, fold, seed, _as_long_as(record), machine, Instead(own, alone.root, keeps_norm=False), report)
    except Interrupted as stopped:
        raise Interrupted(_again(run, planned.name, begun, student, teachers, asked, unlabelled, baseline)) from stopped
    used = pick(device)
    set_up(used)
    last = alone if baseline else None
    players = _players(run, plan, planned, own, dataset, cases, found, seen, model, last, used, report)
    ended = _compared(begun, players, run, planned, dataset, cases, used, report)
    store.save(distillation_file(model.root), ended)
    return ended


def _check(temperature: float, labels_weight: float) -> None:
    if not 0 < temperature <= 100:
        raise UserError(f"--temperature {temperature:g} is not possible.", fix="Give a number above 0, up to 100.")
    if not 0 <= labels_weight <= 1:
        raise UserError(f"--labels {labels_weight:g} is not possible.", fix="Give the labels' share, from 0 to 1.")


def _called(model: ModelLayout, run: Path) -> str:
    inside = model.root.is_relative_to(Layout(run).models)
    return model.root.name if inside else str(model.root)


def _begin(begun: Distillation, model: ModelLayout, report: Report) -> None:
    """Write down how the student learns; raises UserError where it was begun in another way.

    A table that is there already stays until there is a new one.
    """
    file, there = distillation_file(model.root), False
    settled = ("teachers", "temperature", "labels_weight", "unlabelled")
    if file.is_file() and model.run.is_file():
        before = store.load(file, Distillation)
        differing = [name for name in settled if getattr(before, name) != getattr(begun, name)]
        if differing:
            raise UserError(
                f"{model.root}: this student was begun with other values of {', '.join(differing)}.",
                fix="Give another --seed, or remove that folder.",
            )
        there = bool(before.contestants)
    if begun.seen:
        report(Warned(
            f"{', '.join(begun.seen)} learned from validation cases of fold {begun.fold}, so the student's scores "
            "there are better than on new images; teachers of the same fold (--from seeds) did not."
        ))  # fmt: skip
    if not there:
        store.save(file, begun)


def _add_to_plan(layout: Layout, plan: Plan, own: Configuration, choice: object, report: Report) -> None:
    """Put the student into the plan, in the place of an older one of its name."""
    others = tuple(each for each in plan.configurations if each.name != own.name)
    choices = tuple(each for each in plan.choices if each.field != getattr(choice, "field", ""))
    changed = plan.model_copy(update={"configurations": (*others, own), "choices": (*choices, choice)})
    if own not in plan.configurations:
        store.save(layout.plan, changed)
    report(Said(f"{own.name}: {getattr(choice, 'because', '')}"))


def _unlabelled(
    folder: Path | None, plan: Plan, dataset: Dataset, cases: Fold, report: Report
) -> tuple[Case, ...]:
    """The images without labels as cases; those that are images of validation cases are left out, and named."""
    if folder is None:
        return ()
    held_out = {path for case in dataset.cases if case.id in cases.validation for path in case.images}
    found = discover_images(folder, len(plan.channels))
    kept = [case for case in found if not {str(Path(path).resolve()) for path in case.images} & _resolved(held_out)]
    if len(kept) < len(found):
        report(Warned(f"{len(found) - len(kept)} images of {folder} are validation cases and are left out."))
    return tuple(case.model_copy(update={"id": f"unlabelled_{case.id}", "label": None}) for case in kept)


def _resolved(paths: set[str]) -> set[str]:
    return {str(Path(path).resolve()) for path in paths}


def _prepare(cases: Sequence[Case], plan: Plan, planned: Configuration, layout: Layout) -> None:
    """Preprocess the images without labels beside the cases of the data set; those that are there stay."""
    for case in cases:
        preprocess_case(Preparing(case, plan, ((planned, layout.cache(planned.name)),)))


def _trained(
    run: Path, fold: str, seed: int, asked: Options, machine: Machine, instead: Instead, report: Report
) -> Run:
    """A training that goes on where it was stopped; a finished one is not done again, and must be as long as asked."""
    model = ModelLayout(instead.folder)
    if model.run.is_file() and (fold == "all" or model.scores.is_file()):
        record = store.load(model.run, Run)
        if record.finished:
            if (done := _length(_as_long_as(record))) != (_length(asked) or done):
                raise UserError(
                    f"{model.root}: this network was trained already, for {done}, not {_length(asked)}.",
                    fix="Give that length or another --seed, or remove that folder.",
                )
            report(Said(f"{model.root}: trained already."))
            return record
    return train_one(run, None, fold, seed, "auto", asked, machine, ALONE, report, instead)


def _as_long_as(record: Run) -> Options:
    """The options that give another training the same length and batch size."""
    return Options(record.configuration.train.epochs, record.max_seconds, batch_size=record.configuration.batch_size)


def _length(asked: Options) -> str:
    """Length in words; "" where none was asked for."""
    if asked.max_seconds is not None:
        return f"{asked.max_seconds:g} s"
    return "" if asked.epochs is None else f"{asked.epochs} epochs"


def _again(
    run: Path, configuration: str, begun: Distillation, student: str, teachers: Sequence[str], asked: Options,
    unlabelled: Path | None, baseline: bool,
) -> str:  # fmt: skip
    """The command that goes on."""
    words = ["autoseg", "distill", str(run), "-c", configuration, "-f", begun.fold, "--from", ",".join(teachers)]
    words += ["--student", student, "--seed", str(begun.seed)]
    words += ["--temperature", f"{begun.temperature:g}", "--labels", f"{begun.labels_weight:g}"]
    words += [] if asked.epochs is None else ["--epochs", str(asked.epochs)]
    words += [] if asked.max_seconds is None else ["--max-time", f"{asked.max_seconds:g}s"]
    words += [] if unlabelled is None else ["--unlabelled", str(unlabelled)]
    return shlex.join([*words, *(["--baseline"] if baseline else [])])


# ------------------------------------------------------------------------------------------------ the table


def _players(
    run: Path, plan: Plan, planned: Configuration, own: Configuration, dataset: Dataset, cases: Fold,
    teachers: Sequence[ModelLayout], seen: Sequence[ModelLayout], student: ModelLayout, alone: ModelLayout | None,
    device: Device, report: Report,
) -> list[Player]:  # fmt: skip
    """Members, ensemble, student and baseline with their networks and scores; the ensemble is scored here."""
    networks = tuple(load_network(each, device) for each in teachers)

    def player(name: str, configuration: Configuration, model: ModelLayout, network: nn.Module) -> Player:
        scores = None if model in seen else _scores(model, cases)
        return Player(name, as_trained(configuration, [model]), (network,), scores)

    players = [
        player(_called(model, run), planned, model, network) for model, network in zip(teachers, networks, strict=True)
    ]
    together, scores = as_trained(planned, teachers), None
    if cases.validation:
        folder = ModelLayout(student.root.parent / "ensemble" / student.root.name)
        scores = _newer_scores(folder, (*teachers, student), cases)
        if scores is None:
            scores = validate_fold(run, folder, together, networks, cases, dataset, plan, device, report)
    players.append(Player(f"ensemble of {len(networks)}", together, networks, scores))
    players.append(player("student", own, student, load_network(student, device)))
    if alone is not None:
        players.append(player("labels alone", own, alone, load_network(alone, device)))
    return players


def _scores(model: ModelLayout, cases: Fold) -> Scores | None:
    """What a network scored on exactly these cases, if it was scored on them."""
    scores = store.load(model.scores, Scores) if model.scores.is_file() else None
    return scores if scores and {case.id for case in scores.cases} == set(cases.validation) else None


def _newer_scores(model: ModelLayout, than: Sequence[ModelLayout], cases: Fold) -> Scores | None:
    """What was scored after all of these networks were trained; the student's may be another's whose folder is gone."""
    scores = _scores(model, cases)
    trained = max(each.weights.stat().st_mtime_ns for each in than)
    return scores if scores and model.scores.stat().st_mtime_ns >= trained else None


def _compared(
    begun: Distillation, players: Sequence[Player], run: Path, planned: Configuration, dataset: Dataset, cases: Fold,
    device: Device, report: Report,
) -> Distillation:  # fmt: skip
    """Time all players on the same cases, and put the table together."""
    names = (cases.validation or cases.train)[:TIMED_CASES]
    by_id = {case.id: case for case in dataset.cases}
    seconds = np.zeros(len(players))
    report(Started("time", len(names)))
    for number, name in enumerate(names):
        volume = read_image([Path(path) for path in by_id[name].images])
        for place, player in enumerate(players):
            name_of_fold = f"fold_{begun.fold}"
            predictor = Predictor.of_network(run, player.configuration, player.networks, name_of_fold, device)
            if number == 0:
                predictor.segment(volume, case=name)  # the first call of a network is slower than all others
            start = time.perf_counter()
            predictor.segment(volume, case=name)
            seconds[place] += (time.perf_counter() - start) / len(names)
        report(Advanced("time", number + 1, len(names), name))
    report(Finished("time"))
    rows = tuple(_row(player, float(each), planned) for player, each in zip(players, seconds, strict=True))
    by_name = {player.name: _dice(player.scores) for player in players}
    members = [_dice(player.scores) for player in players[: len(begun.teachers)]]
    chance = _chance(by_name["student"], by_name.get("labels alone", {}))
    gain = _chance(_dice(players[len(begun.teachers)].scores), _mean_of(members))
    return begun.model_copy(
        update={
            "contestants": rows, "timed_cases": len(names), "device": device.name, "p_value": chance,
            "p_ensemble": gain, "conclusion": conclude(rows, chance, gain),
        }
    )  # fmt: skip


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
    alone = by_name.get("labels alone")
    if alone is None or alone.dice is None or student.dice is None:
        return f"{sentence[0].upper()}{sentence[1:]}."
    verdict = "not tested" if chance is None else f"p = {chance:.2g} over cases"
    return f"{sentence}. On labels alone the same network has {alone.dice:.4f} ({verdict})."
