"""How a training begins: its record, and an empty or kept folder.

The record is made of plan and options, or of what it was before.
"""

import torch

from autoseg import __version__, store
from autoseg.events import Said
from autoseg.records import Configuration, Fingerprint, Run
from autoseg.steps.plan import labelling_of
from autoseg.steps.preprocess import preprocess
from autoseg.steps.training.options import (
    DECAYS,
    SEES,
    Options,
    fit_to_time,
    seconds_per_sample,
    with_class_weights,
    with_options,
    with_suited_decay,
    with_suited_norm,
    with_suited_variation,
)
from autoseg.steps.training.work import Work, is_of_other_length, resumed_configuration


def begin(work: Work, asked: Options) -> Run:
    """Preprocess what is missing, and write the record of the training that starts or goes on; its folder is ready.

    In a team the first process does so, and the others read the record.
    """
    if not work.team.is_first:
        return store.load(work.model.run, Run)
    preprocess(work.run, configuration=work.planned.name, workers=work.machine.workers, report=work.report)
    if work.continues:
        record = _resumed(store.load(work.model.run, Run), work, asked)
    else:
        record = _fresh(work, asked)
        store.empty_folder(work.model.root)  # a kill must not leave an older state beside the new record
    store.empty_folder(work.model.for_next_stage)
    store.make_folder(work.model.root)
    store.remove_unfinished(work.model.root)
    store.save(work.model.run, record)
    return record


def _fresh(work: Work, asked: Options) -> Run:
    """The record of a new training: plan values, overridden by what was asked for, fitted to the time."""
    configuration, notes, seconds = with_options(work.planned, asked), [], None
    if asked.max_seconds is not None and (configuration.train.augment.mirror_axes or not work.is_paced):
        seconds = seconds_per_sample(configuration, work.device, labelling_of(work.plan, work.dataset)) / work.team.size
    if seconds is not None and not work.is_paced:
        configuration, note = fit_to_time(configuration, asked, seconds, least=work.team.size)
        notes += [note] if note else []
    if not work.is_paced:
        configuration, note = with_suited_decay(configuration, work.planned, asked, seconds)
        notes += [note] if note else []
    configuration, note = with_suited_variation(configuration, asked, seconds, moves=not work.is_paced)
    notes += [note] if note else []
    if not work.as_it_is:
        configuration, note = with_suited_norm(configuration)
        notes += [note] if note else []
    seen = store.load(work.layout.fingerprint, Fingerprint) if work.layout.fingerprint.is_file() else None
    configuration, note = with_class_weights(configuration, work.plan, seen)
    notes += [note] if note else []
    for note in notes:
        work.report(Said(note))
    return Run(
        autoseg_version=__version__, torch_version=torch.__version__, configuration=configuration,
        planned=work.planned, channels=work.plan.channels, labels=tuple(label.name for label in work.plan.labels),
        regions=tuple(region.name for region in work.plan.regions), intensities=work.plan.intensities,
        init=asked.init or "", freeze=asked.freeze or "", asked_precision=asked.precision or "",
        deterministic=bool(asked.deterministic), processes=work.team.size, fold=work.fold, cases=work.cases,
        seed=work.seed, device=work.device.name, precision=work.device.precision, compiled=False,
        max_seconds=asked.max_seconds, of_seconds=asked.of_seconds, notes=tuple(notes),
    )  # fmt: skip


def _resumed(record: Run, work: Work, asked: Options) -> Run:
    """The record of a training that goes on, with what is asked for now put in."""
    configuration, notes = resumed_configuration(work, record, asked), record.notes
    if is_of_other_length(record, asked):
        configuration, notes = _suited_anew(configuration, record, work, asked)
    update = {
        "configuration": configuration, "notes": notes, "finished": False, "cases": work.cases,
        "device": work.device.name, "precision": work.device.precision, "processes": work.team.size,
        "asked_precision": asked.precision or record.asked_precision,
        "deterministic": record.deterministic if asked.deterministic is None else asked.deterministic,
    }  # fmt: skip
    if asked.epochs is not None or asked.max_seconds is not None:
        update |= {"max_seconds": asked.max_seconds, "of_seconds": asked.of_seconds}
    return record.model_copy(update=update)


def _suited_anew(
    configuration: Configuration, record: Run, work: Work, asked: Options
) -> tuple[Configuration, tuple[str, ...]]:
    """Weight decay and variation that suit another length than the training began with, and its notes now.

    A training that goes on from other weights, one of a study, and one whose plan is not known stay as they are.
    """
    if record.planned is None or record.init or work.is_paced:
        return configuration, record.notes
    seconds = None
    if asked.max_seconds is not None:
        seconds = seconds_per_sample(configuration, work.device, labelling_of(work.plan, work.dataset)) / work.team.size
    before = record.planned.train
    train = configuration.train.model_copy(update={"weight_decay": before.weight_decay, "augment": before.augment})
    configuration = configuration.model_copy(update={"train": train})
    configuration, decays = with_suited_decay(configuration, record.planned, asked, seconds)
    configuration, sees = with_suited_variation(configuration, asked, seconds)
    said = [note for note in (decays, sees) if note]
    for note in said:
        work.report(Said(note))
    kept = (note for note in record.notes if not note.startswith((DECAYS, SEES)))
    return configuration, (*kept, *said)
