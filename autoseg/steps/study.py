"""`autoseg study`: trains a grid of settings and says which are better.

Time or epochs are equal, and a difference has to be more than chance. Every setting is trained with the same seeds, so
that it sees the same patches. Finished trainings are not done again.
"""

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from autoseg import store
from autoseg.errors import Interrupted, UserError
from autoseg.events import Report, Said, Warned, silent
from autoseg.layout import Layout, ModelLayout, StudyLayout, scores_file
from autoseg.network.device import pick, set_up
from autoseg.network.distributed import ALONE
from autoseg.network.label_kinds import Labelling
from autoseg.records import CaseScore, Configuration, Dataset, Run, Scores
from autoseg.scoring import overlap, statistics
from autoseg.scoring import study as found
from autoseg.scoring.comparison import Difference
from autoseg.scoring.study import Setting, Study, Trial
from autoseg.steps.compare import FOREGROUND, compare
from autoseg.steps.evaluate import scoring_of, summary
from autoseg.steps.plan import checked, labelling_of
from autoseg.steps.predict import configuration_named, default_configuration
from autoseg.steps.preprocess import preprocess
from autoseg.steps.reporting.curves import draw_study
from autoseg.steps.train import train_one
from autoseg.steps.training.cascade import trained
from autoseg.steps.training.options import Machine, Options, fit_to_time, seconds_per_sample, with_suited_norm
from autoseg.steps.training.settings import fields_in, settings_of, with_fields
from autoseg.steps.training.side_by_side import side_by_side
from autoseg.steps.training.sources import usual_limit_bytes
from autoseg.steps.training.stopping import ended_by_sigterm
from autoseg.steps.training.work import Instead, cases_of, check_cases, check_setting

Failures = dict[str, list[str]]
"""Setting -> what its trainings that failed said, by seed."""
UNEQUAL = 2.0
"""Trainings of a study whose steps differ by more than this factor are warned of."""


@dataclass(frozen=True)
class Job:
    """One network to be trained; it travels to other processes where several devices share the work.

    beside: trainings at a time, which share what RAM preprocessed cases may take.
    """

    run: Path
    folder: Path
    setting: str
    configuration: Configuration
    fold: str
    seed: int
    epochs: int | None
    max_seconds: float | None
    workers: int | None
    beside: int = 1


@ended_by_sigterm()
def study(
    run: Path,
    vary: Sequence[str],
    *,
    seeds: int = 3,
    epochs: int | None = None,
    max_seconds: float | None = None,
    configuration: str | None = None,
    fold: str = "0",
    fixed: Sequence[str] = (),
    name: str | None = None,
    devices: Sequence[str] | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> Study:
    """Train every combination of the varied fields with every seed, score them on the fold's validation cases, compare.

    Args:
        run: a planned run folder.
        vary: "field=value,value,..." per field, see `settings.FIELDS`.
        seeds: seeds 0 .. seeds - 1 of every setting; a later call may ask for more.
        epochs, max_seconds: length of every training; one of them is needed. With a time limit the batch is fitted to
            the time once, before the first training, unless it is set or varied.
        configuration: name in the plan; None takes "3d", else "2d".
        fold: whose validation cases are scored.
        fixed: "field=value" to set for all.
        name: of the study's folder; None: the varied fields' names.
        devices: trainings run side by side on these; None: all GPUs, else the CPU.
        workers: processes for reading and preparing; None takes all allowed cores.

    Raises:
        UserError: an impossible setting (before anything is trained), a study of this name that was made otherwise, or
            no setting whose trainings all came to their end; where some did, the others are `failed` in the study.
        Interrupted: after Ctrl-C or SIGTERM, when the state is saved.
    """
    layout, plan = Layout(run), checked(run)
    planned = configuration_named(plan, configuration or default_configuration(plan))
    for each in settings_of(planned, vary, fixed).values():
        check_setting(each, plan)
    _check(layout, planned, fold, seeds, epochs, max_seconds)
    if name is not None and (name != Path(name).name or name.startswith(".")):
        fix = "Name it without a / or a dot in front."
        raise UserError(f"--name {name}: a study is one folder in {layout.studies}.", fix=fix)
    where = [str(pick(each).torch_device) for each in devices or _all_devices()]
    files = layout.study(name or "_".join(fields_in(vary)))
    dataset = store.load(layout.dataset, Dataset)
    begun = _begin(
        files, planned, labelling_of(plan, dataset), fold, tuple(vary), tuple(fixed), seeds, epochs, max_seconds,
        where[0], report,
    )  # fmt: skip
    preprocess(run, configuration=planned.name, workers=workers, report=report)
    settings = settings_of(begun.configuration, vary)
    jobs = [
        Job(run, files.model(each, fold, seed).root, each, changed, fold, seed, epochs, max_seconds, workers)
        for seed in range(seeds)
        for each, changed in settings.items()
    ]
    cases = cases_of(layout, dataset, fold)
    for job in jobs:
        check_cases(ModelLayout(job.folder), cases)
    waiting, failures = [job for job in jobs if not _is_done(ModelLayout(job.folder))], Failures()
    report(Said(f"{len(jobs)} trainings, {len(jobs) - len(waiting)} of them done: {', '.join(settings)}."))
    try:
        for done, (job, trouble) in enumerate(_trained(waiting, where, report), len(jobs) - len(waiting) + 1):
            if trouble:
                failures.setdefault(job.setting, []).append(f"seed {job.seed}: {trouble}")
                report(Warned(f"{job.setting}, seed {job.seed}, failed: {trouble}"))
            trials = _read_trials(files, settings, fold, seeds, failures)
            store.save(files.study, begun.model_copy(update={"settings": trials}))
            report(Said(f"{done} of {len(jobs)} trainings are over: {job.setting}, seed {job.seed}."))
    except (Interrupted, KeyboardInterrupt) as stopped:
        raise Interrupted(_again(run, planned.name, begun, where)) from stopped
    return _concluded(begun, files, settings, failures, run, report)


def _check(
    layout: Layout, planned: Configuration, fold: str, seeds: int, epochs: int | None, max_seconds: float | None
) -> None:
    """Raise UserError for what would only fail after the first training."""
    if (epochs is None) == (max_seconds is None):
        raise UserError("All trainings need the same length.", fix="Give either --max-time 10m or --epochs 20.")
    if seeds < 1 or (epochs is not None and epochs < 1) or (max_seconds is not None and not max_seconds > 0):
        raise UserError("A study needs at least one seed and a length above 0.")
    if fold == "all":
        raise UserError("Fold all has no validation cases to score on.", fix="Choose a fold, such as -f 0.")
    cases_of(layout, store.load(layout.dataset, Dataset), fold)
    if planned.previous is not None and not trained(layout, planned.previous, fold):
        raise UserError(
            f"{planned.name} refines {planned.previous}, which is not trained for fold {fold}.",
            fix=f"Run: {shlex.join(['autoseg', 'train', str(layout.root), '-c', planned.previous, '-f', fold])}",
        )


def _all_devices() -> tuple[str | None, ...]:
    count = torch.cuda.device_count()
    return tuple(f"cuda:{number}" for number in range(count)) if count > 1 else (None,)


def _begin(
    files: StudyLayout, planned: Configuration, labelling: Labelling, fold: str, vary: tuple[str, ...],
    fixed: tuple[str, ...], seeds: int, epochs: int | None, max_seconds: float | None, device: str, report: Report,
) -> Study:  # fmt: skip
    """The study as it was begun, with what all of its trainings share; a new one is written down first."""
    asked = with_fields(planned, fixed)
    if files.study.is_file():
        before = store.load(files.study, Study)
        paced = before.configuration.train.model_copy(update={"steps_per_epoch": asked.train.steps_per_epoch})
        update = {"batch_size": asked.batch_size, "network": asked.network, "train": paced}
        same = before.configuration.model_copy(update=update) == asked
        then = (before.fold, before.epochs, before.max_seconds, before.fixed)
        if not same or then != (fold, epochs, max_seconds, fixed):
            raise UserError(
                f"{files.root} holds a study with another length, fold, configuration or --set.",
                fix="Give this one another --name, or remove that folder.",
            )
        nothing = {"finished": False, "conclusion": "", "differences": (), "cases": 0}
        return before.model_copy(update={"vary": vary, "seeds": seeds} | nothing)
    chosen = {*fields_in(vary), *fields_in(fixed)}
    if max_seconds is not None:
        limit = Options(max_seconds=max_seconds, batch_size=asked.batch_size if "batch_size" in chosen else None)
        timed_on = pick(device)
        set_up(timed_on)  # as every training does
        asked, note = fit_to_time(asked, limit, seconds_per_sample(asked, timed_on, labelling))
        report(Said(note or f"Batch size {asked.batch_size}, as planned."))
    if "norm" not in chosen:
        asked, note = with_suited_norm(asked)
        report(Said(note)) if note else None
    begun = Study(
        name=files.root.name, configuration=asked, fold=fold, vary=vary, fixed=fixed, seeds=seeds, epochs=epochs,
        max_seconds=max_seconds, device=device,
    )  # fmt: skip
    store.save(files.study, begun)
    return begun


def _is_done(model: ModelLayout) -> bool:
    return model.run.is_file() and model.scores.is_file() and store.load(model.run, Run).finished


def _trained(jobs: Sequence[Job], devices: Sequence[str], report: Report) -> Iterator[tuple[Job, str]]:
    """Train one after the other, or side by side on several devices; each job is yielded with what `train_job` said."""
    if len(devices) > 1 and len(jobs) > 1:
        yield from side_by_side(train_job, [replace(job, beside=len(devices)) for job in jobs], devices)
        return
    for job in jobs:
        report(Said(f"{job.setting}, seed {job.seed}:"))
        yield job, train_job(job, devices[0], report)


def train_job(job: Job, device: str, report: Report = silent) -> str:
    """Train one network of a study, going on where it was stopped. Its epochs are as long as those of all others.

    Returns what made it fail, or "": one setting that diverges must not keep the others from being trained.
    """
    asked = Options(job.epochs, job.max_seconds, batch_size=job.configuration.batch_size)
    instead = Instead(job.configuration, job.folder, is_paced=True)
    limit = None if job.beside == 1 else int(usual_limit_bytes() / job.beside)
    machine = Machine(device, job.workers, limit)
    try:
        train_one(job.run, None, job.fold, job.seed, "auto", asked, machine, ALONE, report, instead)
    except UserError as error:
        return error.what  # without its fix, which names options of `train`
    return ""


def _again(run: Path, configuration: str, begun: Study, devices: Sequence[str]) -> str:
    """The command that goes on with the study."""
    words = ["autoseg", "study", str(run), "-c", configuration, "-f", begun.fold, "--name", begun.name]
    words += [word for text in begun.vary for word in ("--vary", text)]
    words += [word for text in begun.fixed for word in ("--set", text)]
    words += ["--seeds", str(begun.seeds), "--device", ",".join(devices)]
    words += ["--epochs", str(begun.epochs)] if begun.max_seconds is None else []
    words += [] if begun.max_seconds is None else ["--max-time", f"{begun.max_seconds:.12g}s"]
    return shlex.join(words)


# ------------------------------------------------------------------------------------------------ results


def _history(model: ModelLayout) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in model.history.read_text().splitlines()]


def _histories(files: StudyLayout, setting: str, fold: str, seeds: int) -> dict[int, list[dict[str, float | None]]]:
    """The histories of the finished trainings of a setting, by seed."""
    models = {seed: files.model(setting, fold, seed) for seed in range(seeds)}
    return {seed: _history(model) for seed, model in models.items() if _is_done(model)}


def _read_trials(
    files: StudyLayout, settings: Mapping[str, Configuration], fold: str, seeds: int, failures: Failures
) -> tuple[Setting, ...]:
    """What the finished trainings say, setting by setting."""
    histories = {name: _histories(files, name, fold, seeds) for name in settings}
    ends = [found.final_dice(rows) for each in histories.values() for rows in each.values()]
    goal = found.REACHED * max((end for end in ends if end is not None), default=1.0)
    read = []
    for name, configuration in settings.items():
        trials = tuple(
            _trial(files.model(name, fold, seed), seed, rows, goal) for seed, rows in histories[name].items()
        )
        known = [trial.dice for trial in trials if trial.dice is not None]
        spread = float(np.std(known, ddof=1)) if len(known) > 1 else None
        mean = float(np.mean(known)) if known else None
        read.append(Setting(
            name=name, batch_size=configuration.batch_size, trials=trials, dice=mean, spread=spread,
            failed=tuple(failures.get(name, ())),
        ))  # fmt: skip
    return tuple(read)


def _trial(model: ModelLayout, seed: int, history: list[dict[str, float | None]], goal: float) -> Trial:
    record, scores = store.load(model.run, Run), store.load(model.scores, Scores)
    return Trial(
        seed=seed, steps=record.steps, seconds=record.seconds, dice=scores.foreground_mean["dice"],
        class_dice=scores.mean["dice"], hd95_mm=scores.foreground_mean.get("hd95_mm"),
        loss_noise=found.loss_noise(history), dice_noise=found.dice_noise(history),
        gradient_signal=found.median_signal(history), reached_share=found.reached_share(history, goal),
        settled_share=found.settled_share(history),
    )  # fmt: skip


def _concluded(
    begun: Study, files: StudyLayout, settings: Mapping[str, Configuration], failures: Failures, run: Path,
    report: Report,
) -> Study:  # fmt: skip
    """Average over seeds, test over cases, draw the curves, and write it all down."""
    read = _read_trials(files, settings, begun.fold, begun.seeds, failures)
    whole, failed = [each for each in read if not each.failed], [each for each in read if each.failed]
    if not whole:
        raise UserError(f"{files.root}: no setting came to its end. {said_of(failed[0])}")
    classes = scoring_of(store.load(Layout(run).dataset, Dataset)).classes
    names, cases = [each.name for each in whole], 0
    for name in names:
        scores = [store.load(files.model(name, begun.fold, seed).scores, Scores) for seed in range(begun.seeds)]
        means = summary(seed_means(scores), classes, str(files.setting(name)), str(run))
        store.save(scores_file(files.setting(name)), means)
        cases = len(means.cases)
    histories = {name: _histories(files, name, begun.fold, begun.seeds) for name in names}
    differences: tuple[Difference, ...] = ()
    if len(names) > 1 and cases >= statistics.FEWEST:
        folders = [files.setting(name) for name in names]
        differences = compare(*folders, names=names, level=found.LEVEL, output=files.root).differences
    elif len(names) > 1:
        report(Warned(f"{cases} validation cases are too few to test anything; it needs {statistics.FEWEST}."))
    if note := unequal_steps(histories):
        report(Warned(note))
    ranked = _against_best(whole, differences)
    draw_study(
        files.picture, {name: list(each.values()) for name, each in histories.items()}, begun.max_seconds is None
    )
    ended = begun.model_copy(
        update={
            "settings": (*ranked, *failed), "cases": cases, "differences": differences, "finished": not failed,
            "conclusion": " ".join([found.conclude(ranked, cases, begun.seeds), *(said_of(each) for each in failed)]),
        }
    )  # fmt: skip
    store.write_text(files.table, found.as_table(ended))
    store.save(files.study, ended)
    return ended


def said_of(failed: Setting) -> str:
    """Why a setting is not compared."""
    return f"{failed.name} is not compared, a training failed: {' '.join(failed.failed)}"


def unequal_steps(histories: Mapping[str, Mapping[int, found.History]]) -> str:
    """A sentence where equal time gave some training far fewer steps than another, else ""."""
    steps = {f"{name}, seed {seed}": found.column(rows, "step")[-1] for name, each in histories.items()
             for seed, rows in each.items() if rows}  # fmt: skip
    fewest, most = min(steps, key=lambda name: steps[name]), max(steps, key=lambda name: steps[name])
    if steps[most] <= UNEQUAL * steps[fewest]:
        return ""
    return (
        f"From {steps[fewest]:.0f} steps ({fewest}) to {steps[most]:.0f} ({most}): unless one costs so much more, the "
        "machine was not always free, and the comparison is not fair. --epochs makes the steps equal."
    )


def seed_means(scores: Sequence[Scores]) -> tuple[CaseScore, ...]:
    """Every case's scores averaged over networks that differ by their seed; not defined where none of them is.

    Raises UserError when they were not all scored on the same cases.
    """
    by_id = [{case.id: case for case in each.cases} for each in scores]
    if others := sorted({name for each in by_id for name in each.keys() ^ by_id[0].keys()}):
        raise UserError(
            f"{scores[0].prediction}: not all seeds were scored on the same cases, {others[0]} is only in some.",
            fix="Remove the networks of the older splits, and start the study again.",
        )
    averaged = []
    for name in by_id[0]:
        of_seeds = [each[name] for each in by_id]
        values = {
            metric: tuple(overlap.mean(each) for each in zip(*(case.values[metric] for case in of_seeds), strict=True))
            for metric in of_seeds[0].values
        }
        averaged.append(CaseScore(id=name, values=values))
    return tuple(averaged)


def _against_best(settings: Sequence[Setting], differences: Sequence[Difference]) -> tuple[Setting, ...]:
    """The settings from the best Dice down, each with the corrected P value of its difference from the best."""
    ranked = sorted(settings, key=lambda each: -1.0 if each.dice is None else each.dice, reverse=True)
    pairs = {
        frozenset((row.first, row.second)): row.p_wilcoxon_holm
        for row in differences
        if row.metric == "dice" and row.label == FOREGROUND
    }
    return tuple(
        each.model_copy(update={"p_against_best": pairs.get(frozenset((each.name, ranked[0].name)))}) for each in ranked
    )
