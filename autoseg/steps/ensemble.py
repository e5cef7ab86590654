"""`autoseg ensemble`: one prediction out of several folders or trained networks.

Where all folders hold probabilities their mean is taken (unweighted unless asked otherwise), else the label maps vote.
Networks may work on different grids (2D and 3D of one run, two runs): they meet on the grid of the image.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoseg import store
from autoseg.cases.exchange import input_file, keep_record, refuse_folder_of_images, refuse_loss
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.layout import agreement_file, prediction_file, probabilities_file
from autoseg.records import Case, Postprocessing
from autoseg.scoring.comparison import Agreeing, Agreement
from autoseg.steps.postprocess import apply_to_file
from autoseg.steps.predicting.combine import METHODS, Overlaps, dice_of
from autoseg.steps.predicting.members import (
    Member,
    check,
    ending_for,
    member_of,
    members_of_runs,
    same_cases,
    same_plans,
    shares_of,
)
from autoseg.steps.predicting.pairs import Pair
from autoseg.steps.predicting.staging import publish, staged

if TYPE_CHECKING:
    from autoseg.steps.predicting.predictor import Predictor


def ensemble(
    predictions: Sequence[Path],
    output: Path,
    *,
    weights: Sequence[float] | None = None,
    method: str | None = None,
    save_probabilities: bool = False,
    report: Report = silent,
) -> tuple[Path, ...]:
    """Combine prediction folders into one; returns the label maps written.

    How well the members agree is announced and written as `agreement.json`.

    Args:
        predictions: two or more folders with the same cases, classes and grids.
        output: folder for the label maps. Files appear in it only when all cases are done.
        weights: one per folder, not negative; None weighs all alike.
        method: "mean" of probabilities, "vote" (ties: the label of the first of the tied folders) or "staple" (Warfield
            2004, undecided voxels by vote); None takes the mean where all folders hold probabilities, else the vote.
        save_probabilities: also write the mean probabilities (with "mean").

    Raises:
        UserError: folders differ in cases, classes or grids, or probabilities do not sum to one; nothing is written.
    """
    members = [member_of(folder) for folder in predictions]
    if len(members) < 2:
        raise UserError("An ensemble needs at least two prediction folders.")
    shares = shares_of(weights, len(members))
    method = _method(method, members, report)
    _refuse_method(method, save_probabilities)
    files = [member.probabilities if method == "mean" else member.maps for member in members]
    cases = same_cases(members, files)
    check(members, files, cases, method == "mean")
    for member in members:
        refuse_folder_of_images(member.folder, output, "predictions to combine")
    targets = [prediction_file(output, case, ending_for(members, case)) for case in cases]
    refuse_loss(output, targets, [path for own in files for path in own.values()])
    what, found = "Ensembling", []
    report(Started(what, len(cases)))
    with staged(output) as staging:
        for done, case in enumerate(cases, 1):
            target = prediction_file(staging, case, ending_for(members, case))
            found.append(METHODS[method]([each[case] for each in files], shares, target, save_probabilities))
            report(Advanced(what, done, len(cases), case))
        written = publish(staging, output)
    report(Finished(what))
    say_agreement([str(member.folder) for member in members], found, output, report)
    return written


def ensemble_runs(
    runs: Sequence[Path],
    images: Path,
    output: Path,
    *,
    configurations: Sequence[str] | None = None,
    folds: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    weights: Sequence[float] | None = None,
    method: str = "mean",
    save_probabilities: bool = False,
    rules: Postprocessing | None = None,
    mirroring: bool = True,
    resume: bool = False,
    device: str | None = None,
    report: Report = silent,
) -> tuple[Path, ...]:
    """Segment images with networks of several runs or configurations, each on its own grid; returns the label maps.

    Args:
        runs: run folders of the same channels and labels.
        images, folds, seeds, mirroring, device: as for `predict`, for each member.
        output: folder for the label maps, each written when it is done.
        configurations: of every run; None takes what `predict` would take of each of several runs, and all that are
            trained of a single one, but no students, which know nothing that their teachers do not.
        weights: one per member, in the order runs x configurations.
        method, save_probabilities: as for `ensemble`.
        rules: post-processing of the result.
        resume: leave out cases whose files and networks are those of the label map that is there; agreement is then
            that of the others.

    Raises:
        UserError: fewer than two members, one that is not trained, or other channels or labels; nothing is written.
    """
    from autoseg.cases.listing import list_images
    from autoseg.steps.predict import Predictor, done_cases, refuse_loss_in_prediction
    from autoseg.steps.predicting.slides import refuse_slides

    refuse_folder_of_images(images, output)
    members = members_of_runs(runs, configurations)
    shares = shares_of(weights, len(members))
    _refuse_method(method, save_probabilities)
    predictors = [
        Predictor(
            run, configuration=name, folds=folds, seeds=seeds, device=device, mirroring=mirroring, postprocess=False
        )
        for run, name in members
    ]
    names = [f"{run}:{name}" for run, name in members]
    plan = same_plans([each.plan for each in predictors], names)
    for name, each in zip(names, predictors, strict=True):
        report(Said(f"{name}: mean of {', '.join(each.members)}."))
    cases, found = list_images(images, len(plan.channels)), []
    refuse_slides(cases)
    refuse_loss_in_prediction(runs, cases, output, plan.file_ending)
    model = _content(predictors, method, shares, rules, save_probabilities)
    written = done_cases(cases, output, model, save_probabilities, report) if resume else {}
    todo = [case for case in cases if case.id not in written]
    what = "Ensembling"
    report(Started(what, len(todo)))
    with staged(output) as staging:
        for done, case in enumerate(todo, 1):
            inputs = tuple(input_file(Path(path)) for path in case.images)
            files = _of_members(predictors, case, staging, method == "mean", report)
            target = prediction_file(staging / "out", case.id, plan.file_ending)
            found.append(METHODS[method](files, shares, target, save_probabilities))
            if rules is not None:
                apply_to_file(Pair(case.id, target, target), rules.rules, plan.labels)
            for number in range(len(predictors)):
                shutil.rmtree(staging / str(number))
            [written[case.id]] = publish(staging / "out", output)
            keep_record(output, case.id, model, inputs, written[case.id])
            report(Advanced(what, done, len(todo), case.id))
    report(Finished(what))
    if found:
        say_agreement(names, found, output, report)
    return tuple(written[case.id] for case in cases)


def _content(
    predictors: Sequence["Predictor"], method: str, shares: Sequence[float], rules: Postprocessing | None,
    probabilities: bool,
) -> str:  # fmt: skip
    """What results depend on beside the image, as one word."""
    chosen = [] if rules is None else [rule.model_dump(mode="json") for rule in rules.rules]
    options = json.dumps({"method": method, "shares": list(shares), "rules": chosen, "probabilities": probabilities})
    return ",".join((*(each.content for each in predictors), options))


def _of_members(
    predictors: Sequence["Predictor"], case: Case, staging: Path, probabilities: bool, report: Report
) -> list[Path]:
    """What each member finds in a case, written below `staging` in folders 0, 1, ...: probabilities or a label map."""
    from autoseg.steps.predict import segment_cases

    files = []
    for number, each in enumerate(predictors):
        [path] = segment_cases(each, [case], staging / str(number), probabilities, silent, about_tiles=report)
        files.append(probabilities_file(path.parent, case.id) if probabilities else path)
    return files


def say_agreement(members: Sequence[str], found: Sequence[Overlaps], output: Path, report: Report) -> Agreement:
    """Announce and save the mean Dice over cases of every two members, and of each with the ensemble."""
    names = (*members, "ensemble")
    labels = tuple(dict.fromkeys(label for one in found for label in one.names))
    dice = {label: np.full((len(found), len(names), len(names)), np.nan) for label in labels}
    for case, one in enumerate(found):
        for label, dice_MM in zip(one.names, np.moveaxis(dice_of(one), 2, 0), strict=True):
            dice[label][case] = dice_MM
    pairs = tuple(
        _agreeing(names[m], names[n], {label: values[:, m, n] for label, values in dice.items()})
        for n in range(1, len(names))
        for m in range(n)
    )
    agreement = Agreement(members=tuple(members), labels=labels, cases=len(found), pairs=pairs)
    for pair in pairs:
        if pair.dice is None:
            continue
        each = ", ".join(f"{k} {d:.4f}" for k, d in zip(labels, pair.per_label, strict=True) if d is not None)
        verb = "agrees with the ensemble" if pair.second == "ensemble" else f"and {pair.second} agree"
        report(Said(f"{pair.first} {verb}: Dice {pair.dice:.4f} over {len(found)} cases ({each})."))
    store.save(agreement_file(output), agreement)
    return agreement


def _agreeing(first: str, second: str, dice: Mapping[str, np.ndarray]) -> Agreeing:
    means = [None if np.isnan(values).all() else float(np.nanmean(values)) for values in dice.values()]
    defined = [mean for mean in means if mean is not None]
    overall = float(np.mean(defined)) if defined else None
    return Agreeing(first=first, second=second, dice=overall, per_label=tuple(means))


def _refuse_method(method: str, save_probabilities: bool) -> None:
    if method not in METHODS:
        raise UserError(f"Unknown method {method!r}.", fix=f"Known: {', '.join(METHODS)}.")
    if save_probabilities and method != "mean":
        raise UserError(
            f"There are no probabilities to save: the method is {method}.",
            fix="Average probabilities (--method mean, of folders that hold some), or leave --save-probabilities out.",
        )


def _method(wanted: str | None, members: Sequence[Member], report: Report) -> str:
    """The method to use: the one asked for if it is possible, else the best there are files for."""
    if wanted is not None and wanted not in METHODS:
        raise UserError(f"Unknown method {wanted!r}.", fix=f"Known: {', '.join(METHODS)}.")
    without = [member.folder for member in members if not member.probabilities]
    if wanted == "mean" and without:
        raise UserError(
            f"{without[0]}: there are no probabilities in this folder.", fix="Predict it with --save-probabilities."
        )
    if wanted is None and without and len(without) < len(members):
        report(Warned(f"{without[0]} holds no probabilities, so the label maps of all folders vote."))
    return wanted or ("vote" if without else "mean")
