"""`autoseg predict`: label maps for images, on the grid of their files."""

import threading
import traceback
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from autoseg.cases.exchange import (
    Ending,
    Found,
    Ready,
    UncertaintyFile,
    begin_output,
    begin_record,
    done_before,
    files_of_cases,
    forget,
    read_case,
    refuse_folder_of_images,
    refuse_loss,
    slide_file,
    write_case,
)
from autoseg.cases.listing import list_images
from autoseg.cases.prepare import Prepared
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.image.formats import read_geometry
from autoseg.image.probabilities import KINDS, Put, writing_probabilities
from autoseg.lanes import Failure, Stage, side_by_side
from autoseg.layout import Layout, entropy_file, mutual_file, prediction_file, probabilities_file
from autoseg.network.device import set_up
from autoseg.network.export import Slab
from autoseg.network.sliding import Progress
from autoseg.parallel import allowed_cores
from autoseg.records import Case, Dataset, Plan
from autoseg.scoring.selection import selected
from autoseg.steps.predicting.flags import flagging
from autoseg.steps.predicting.models import configuration_named as configuration_named
from autoseg.steps.predicting.models import default_configuration as default_configuration
from autoseg.steps.predicting.models import trained_models as trained_models
from autoseg.steps.predicting.predictor import Predictor as Predictor
from autoseg.steps.predicting.predictor import on_grid as on_grid
from autoseg.steps.predicting.slides import say_what_slides_lack, segment_slide
from autoseg.steps.predicting.tiles import telling
from autoseg.store import load

WHAT = "predict"
MOST_READERS = 4
CORES_PER_READER = 4
FEWEST_FOR_PROCESSES = 3
MOST_TOLD = 10
STALL_SECONDS = 6 * 3600.0
"""A device that finishes no tile for so long is given up: ten networks in eight mirrorings take long on an old CPU."""
PRELOAD = ("autoseg.cases.exchange",)


@dataclass(frozen=True)
class Wishes:
    """What is written beside label maps, and what becomes of cases that fail.

    Args:
        probabilities: "float16", "uint8" or "" for none.
        classes: names of the classes whose probabilities are saved; empty for all.
        uncertainty: images of entropy and mutual information, and flagged.csv.
        skip_failed: go on with the other cases.
        workers: processes for reading and writing; 0 for threads of this process, None chooses.
        records: write the records that `--resume` needs.
    """

    probabilities: str = ""
    classes: tuple[str, ...] = ()
    uncertainty: bool = False
    skip_failed: bool = False
    workers: int | None = None
    records: bool = True


def predict(
    run: Path,
    images: Path,
    output: Path,
    *,
    configuration: str | None = None,
    folds: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    save_probabilities: bool = False,
    probability_kind: str = "float16",
    classes: Sequence[str] | None = None,
    save_uncertainty: bool = False,
    postprocess: bool = True,
    mirroring: bool = True,
    speed: str = "accurate",
    resume: bool = False,
    part: str | None = None,
    on_error: str = "stop",
    device: str | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> tuple[Path, ...]:
    """Segment every image of a folder with the mean of the trained networks; returns the label maps, in order of cases.

    Args:
        run: run folder with at least one trained network.
        images: folder whose files are named as the training images were.
        output: folder of the label maps; made if absent.
        configuration: None takes what `select` chose, else the first trained of "3d_cascade", "3d", "3d_lowres", "2d".
        folds, seeds: networks to average; None takes all that are trained. A cascade's first stage takes the same folds
            and all of their seeds.
        save_probabilities: also write probabilities, for `ensemble`: of all classes, or of those in `classes`;
            `probability_kind` is "float16" or "uint8".
        save_uncertainty: also write images of entropy (and with several networks of mutual information), in thousandths
            of the largest possible entropy, and flagged.csv with one number per case.
        postprocess: apply the learned rules, if there are any that were learned on what predicts.
        mirroring: average over the mirrorings that training used. speed: a key of `predictor.SPEEDS`.
        resume: leave out cases whose files and networks are those of the prediction that is there.
        part: "3/10" takes the third of ten parts of the cases. on_error: "stop" at the first case that fails, or "skip"
            it and fail at the end.
        device: "cuda:0,cuda:1" shares the cases between several.
        workers: processes for reading and writing; 0 for none, None chooses. A selected pair has none.

    Raises:
        UserError: no images, no trained network, an unreadable file, or a killed worker; files written before stay.
    """
    refuse_folder_of_images(images, output)
    chooses = bool(classes or probability_kind != "float16")
    if chooses and not save_probabilities:
        raise UserError("No probabilities are saved, of any classes or kind.", fix="Add --save-probabilities.")
    more = chooses or save_uncertainty or part is not None or "," in (device or "")
    more = more or speed != "accurate" or on_error != "stop"
    if configuration is None and _takes_pair(run, more, report):
        from autoseg.steps import select  # which imports this file

        return select.predict_pair(
            run, images, output, folds=folds, seeds=seeds, save_probabilities=save_probabilities, rules=postprocess,
            mirroring=mirroring, resume=resume, device=device, report=report,
        )  # fmt: skip
    kind = probability_kind if save_probabilities else ""
    wishes = Wishes(kind, tuple(classes or ()), save_uncertainty, _is_skip(on_error), workers)
    predictors = [
        Predictor(
            run, configuration=configuration, folds=folds, seeds=seeds, device=each, mirroring=mirroring,
            postprocess=postprocess and number == 0, speed=speed, report=report,  # rules are applied in writing
        )
        for number, each in enumerate(device.split(",") if device else [None])
    ]  # fmt: skip
    plan = predictors[0].plan
    _check_classes(wishes, plan)
    cases = _part_of(list_images(images, len(plan.channels)), part)
    report(Said(f"{predictors[0].configuration.name}: mean of {', '.join(predictors[0].members)}."))
    refuse_loss_in_prediction([run], cases, output, plan.file_ending)
    beside = {"post-processing": predictors[0].rules, "probabilities": kind, "uncertainty": save_uncertainty}
    say_what_slides_lack(cases, [what for what, asked in beside.items() if asked], report)
    begin_output(output)
    paths = _done(cases, output, predictors[0], wishes, report) if resume else {}
    todo = [case for case in cases if case.id not in paths]
    with flagging(output, report) if save_uncertainty else nullcontext():
        written = segment_cases(predictors, todo, output, report=report, wishes=wishes)
    paths |= {case.id: path for case, path in zip(todo, written, strict=True)}
    return tuple(paths[case.id] for case in cases)


def refuse_loss_in_prediction(runs: Sequence[Path], cases: Sequence[Case], output: Path, planned: str) -> None:
    """Raise UserError where label maps would go among the data of a run, or replace files that are not autoseg's."""
    files = [Layout(run).dataset for run in runs]
    learned_from = [case for path in files if path.is_file() for case in load(path, Dataset).cases]
    targets = (name(output, case.id, planned) for case in cases for name in (prediction_file, slide_file))
    refuse_loss(output, targets, files_of_cases((*cases, *learned_from)))


def _done(
    cases: Sequence[Case], output: Path, predictor: Predictor, wishes: Wishes, report: Report
) -> dict[str, Path]:
    beside = (entropy_file, mutual_file)[: len(predictor.members)] if wishes.uncertainty else ()
    return done_cases(cases, output, _content(predictor, wishes), bool(wishes.probabilities), report, beside)


def done_cases(
    cases: Sequence[Case], output: Path, model: str, probabilities: bool, report: Report,
    beside: Sequence[UncertaintyFile] = (),
) -> dict[str, Path]:  # fmt: skip
    """The label maps that are there, with what lies beside them, as `model` would make them now, by case id."""
    found = {case.id: done_before(case, output, model, probabilities, beside) for case in cases}
    done = {name: path for name, path in found.items() if path is not None}
    if done:
        report(Said(f"{len(done)} of {len(cases)} cases are done already."))
    return done


def _takes_pair(run: Path, more: bool, report: Report) -> bool:
    """Whether two configurations were selected together; with `more`, which a pair cannot do, one is taken instead."""
    chosen = selected(run)
    if chosen is None or len(chosen.members) == 1:
        return False
    if more:
        report(Warned(f"A pair cannot do all that is asked for, so {chosen.single} alone is used."))
    return not more


def segment_cases(
    predictors: Predictor | Sequence[Predictor],
    cases: Sequence[Case],
    output: Path,
    save_probabilities: bool = False,
    report: Report = silent,
    wishes: Wishes | None = None,
    about_tiles: Report | None = None,
) -> tuple[Path, ...]:
    """Predict and write cases, reading, computing and writing side by side; returns the label maps in order of `cases`.

    `about_tiles` hears of the tiles of slow cases, from other threads; without it `report` does.
    Raises the first failure, or with `wishes.skip_failed` one UserError at the end that lists them all.
    """
    predictors = [predictors] if isinstance(predictors, Predictor) else list(predictors)
    wishes = wishes or Wishes(probabilities="float16" if save_probabilities else "", workers=0, records=False)
    abandoned = threading.Event()
    written: dict[str, Path] = {}
    failures: list[Failure[Case]] = []
    report(Started(WHAT, of=len(cases)))
    flow = side_by_side(
        largest_first(cases, predictors[0]),
        _stages(predictors, output, wishes, len(cases), abandoned, about_tiles or report),
        lambda case: case.id, not wishes.skip_failed, PRELOAD, abandoned.set,
    )  # fmt: skip
    try:
        for outcome in flow:
            if isinstance(outcome, Failure):
                failures.append(outcome)
                report(Warned(_told(outcome)))
            else:
                written[outcome[0].id] = outcome[1]
                report(Advanced(WHAT, len(written), len(cases), outcome[0].id))
    finally:
        abandoned.set()
    report(Finished(WHAT))
    if failures:
        listed = "; ".join(f"{each.item.id} ({each.error})" for each in failures[:MOST_TOLD])
        listed += f"; and {len(failures) - MOST_TOLD} more." if len(failures) > MOST_TOLD else ""
        others = "The others are done." if written else ""
        raise UserError(f"{len(failures)} of {len(cases)} cases failed: {listed}", fix=others)
    return tuple(written[case.id] for case in cases)


def largest_first(cases: Sequence[Case], predictor: Predictor) -> list[Case]:
    """Cases by voxels on the network's grid, so that memory peaks early; what cannot be read comes first of all."""

    def voxels(case: Case) -> float:
        try:
            geometry = read_geometry(case.images[0])
        except UserError:
            return float("inf")
        axes = predictor.configuration.axes
        spacing = [geometry.spacing_mm[axis] for axis in axes]
        targets = zip(spacing, predictor.configuration.spacing_mm, strict=True)
        scale = [1.0 if target is None else own / target for own, target in targets]
        return float(np.prod(geometry.size_voxels) * np.prod(scale))

    return sorted(cases, key=voxels, reverse=True) if len(cases) > 1 else list(cases)


# ------------------------------------------------------------------------------------------------ stages


def _stages(
    predictors: Sequence[Predictor], output: Path, wishes: Wishes, cases: int, abandoned: threading.Event,
    report: Report,
) -> tuple[Stage, ...]:  # fmt: skip
    """Reading, computing and writing. Few cases are not worth processes, which take a second to start."""
    first = predictors[0]
    readers = max(1, min(MOST_READERS, allowed_cores() // CORES_PER_READER, cases))
    if wishes.workers is not None:
        readers = max(1, wishes.workers - 1)
    in_process = cases > FEWEST_FOR_PROCESSES and wishes.workers != 0
    ending = Ending(
        first.plan, first.configuration, first.rules, output, _content(first, wishes) if wishes.records else ""
    )
    read = partial(read_case, first.plan, first.stages)
    computing = tuple(partial(_compute, each, output, wishes, abandoned, report) for each in predictors)
    return (
        Stage("reading", (read,) * readers, in_process),
        Stage("predicting", computing, stall_seconds=STALL_SECONDS),
        Stage("writing", (partial(write_case, ending),), in_process),
    )


def _compute(
    predictor: Predictor, output: Path, wishes: Wishes, abandoned: threading.Event, report: Report, case: Case,
    ready: Ready,
) -> Found:  # fmt: skip
    """The network's part, in a thread of this process; it ends at the next tile once the run is given up."""
    set_up(predictor.device)  # some of it belongs to the thread
    forget(output, case.id)
    with telling(report, f"tiles of {case.id}", abandoned.is_set) as progress:
        return _computed(predictor, output, wishes, progress, case, ready)


def _computed(
    predictor: Predictor, output: Path, wishes: Wishes, progress: Progress, case: Case, ready: Ready
) -> Found:
    """What the networks find in one case; a slide's label map, and probabilities, are written on the way."""
    if not ready.stages:
        target = slide_file(output, case.id, predictor.plan.file_ending)
        if wishes.records:
            begin_record(output, case.id)
        segment_slide(predictor, Path(case.images[0]), target, progress)
        return Found(np.zeros((0, 0, 0), np.int16), None, ready.inputs)
    if not wishes.probabilities:
        return predictor.compute(ready, None, wishes.uncertainty, progress)
    prepared, labels = ready.stages[-1], predictor.plan.outputs
    background = predictor.plan.labels[0].value if predictor.plan.regions else None
    chosen = [k for k, label in enumerate(labels) if not wishes.classes or label.name in wishes.classes]
    places = chosen if background is None else [k + 1 for k in chosen]  # regions leave 0 to the background
    height, axes = predictor.slab_height(prepared, wishes.uncertainty), predictor.configuration.axes
    before = prepared.box[0][0]
    with writing_probabilities(
        probabilities_file(output, case.id), prepared.geometry, [labels[k].name for k in chosen],
        [labels[k].value for k in chosen], kind=wishes.probabilities, complete=len(chosen) == len(labels),
        slab=(axes[0], height), background=background,
    ) as put:  # fmt: skip
        def put_slab(slab: Slab) -> None:
            start, stop = before + slab.window.start, before + slab.window.stop
            shares = slab.probabilities_KZYX
            found_KZYX = None if shares is None else shares.numpy()[chosen]
            _put_slices(put, prepared, axes, places, (start, stop), found_KZYX)

        found = predictor.compute(ready, put_slab, wishes.uncertainty, progress, height - before % height)
        whole = prepared.geometry.size_voxels[axes[0]]
        for start, stop in ((0, before), (prepared.box[0][1], whole)):
            for each in range(start, stop, height):
                _put_slices(put, prepared, axes, places, (each, min(each + height, stop)), None)
    return found


def _put_slices(
    put: Put, prepared: Prepared, axes: tuple[int, int, int], chosen: Sequence[int], at: tuple[int, int],
    shares_KZYX: np.ndarray | None,
) -> None:  # fmt: skip
    """Write slices of the transposed file; outside the crop, and everywhere for None, the background is certain."""
    size = [prepared.geometry.size_voxels[axis] for axis in axes]
    block = np.zeros((len(chosen), at[1] - at[0], *size[1:]), np.float16)
    if 0 in chosen:
        block[chosen.index(0)] = 1
    if shares_KZYX is not None:
        (y0, y1), (x0, x1) = prepared.box[1:]
        block[:, :, y0:y1, x0:x1] = shares_KZYX
    window = [slice(None)] * 3
    window[axes[0]] = slice(*at)
    put((slice(None), *window), block.transpose(0, *(1 + axis for axis in np.argsort(axes))))


# ------------------------------------------------------------------------------------------------ which cases


def _is_skip(on_error: str) -> bool:
    if on_error not in ("stop", "skip"):
        raise UserError(f"--on-error {on_error} is not known.", fix="Use stop or skip.")
    return on_error == "skip"


def _check_classes(wishes: Wishes, plan: Plan) -> None:
    names = [output.name for output in plan.outputs]
    if wishes.probabilities and wishes.probabilities not in KINDS:
        raise UserError(
            f"Probabilities cannot be saved as {wishes.probabilities!r}.", fix=f"Choose one of: {', '.join(KINDS)}."
        )
    if unknown := [name for name in wishes.classes if name not in names]:
        raise UserError(f"There is no class {', '.join(unknown)}.", fix=f"Choose among: {', '.join(names)}.")


def _part_of(cases: Sequence[Case], part: str | None) -> list[Case]:
    """Every n-th case, so that parts of a sorted folder are alike."""
    if part is None:
        return list(cases)
    number, _, of = part.partition("/")
    if not (number.isdigit() and of.isdigit() and 1 <= int(number) <= int(of)):
        raise UserError(f"--part {part} is no part.", fix="Write 3/10 for the third of ten.")
    return list(cases)[int(number) - 1 :: int(of)]


def _content(predictor: Predictor, wishes: Wishes) -> str:
    """What results depend on beside the image, as one word."""
    more = [wishes.probabilities, *wishes.classes, "uncertainty" if wishes.uncertainty else ""]
    return ",".join([predictor.content, *(each for each in more if each)])


# ------------------------------------------------------------------------------------------------ what is told


def _told(failure: Failure[Case]) -> str:
    """A failure that the run goes on after: a sentence for what a user can mend, else the traceback."""
    if isinstance(failure.error, UserError):
        return str(failure.error)
    return "".join(traceback.format_exception(failure.error)).strip()
