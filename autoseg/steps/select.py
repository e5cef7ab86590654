"""`autoseg select`: which configuration or pair is best; `predict` uses it.

A pair's probabilities are averaged: the networks of each fold segment its validation cases again. The pairs' label maps
stay in `RUN/ensembles`, so that post-processing can be learned from them and scores can be compared.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from autoseg import store
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.image.labels import label_maps, some
from autoseg.layout import Layout, ModelLayout, is_student, prediction_file, probabilities_file
from autoseg.records import Case, CaseScore, Dataset
from autoseg.scoring import overlap, statistics
from autoseg.scoring.selection import Candidate, Selection
from autoseg.steps.ensemble import ensemble_runs
from autoseg.steps.evaluate import Scoring, score_pairs, scoring_of, summary
from autoseg.steps.predicting.combine import mean_of_probabilities
from autoseg.steps.predicting.learned import rules_learned_on
from autoseg.steps.predicting.members import trained_configurations
from autoseg.steps.predicting.pairs import check_grids, not_validated, pair_of, validated_folds
from autoseg.steps.predicting.staging import staged

if TYPE_CHECKING:
    from autoseg.steps.predict import Predictor

Files = Mapping[str, Path]


def select(
    run: Path,
    *,
    configurations: Sequence[str] | None = None,
    pairs: bool = True,
    device: str | None = None,
    workers: int | None = None,
    report: Report = silent,
) -> Selection:
    """Find the best configuration or pair by mean foreground Dice over the validation cases, and save that choice.

    Args:
        run: run folder with validation predictions of at least one configuration.
        configurations: which to try; None takes all that have validation predictions, but no students: these are often
            trained for fewer folds, and their teachers may have seen the cases.
        pairs: also try every two of them together, which segments the validation cases again. What was combined before
            is kept while the networks are older.
        device: for segmenting. workers: processes that score; None takes all allowed cores.

    Raises:
        UserError: nothing is validated, a named configuration is not, or there is no fold that all have.
    """
    layout, dataset = Layout(run), store.load(Layout(run).dataset, Dataset)
    names, folds = _comparable(run, configurations, report)
    cases = {case.id: case for case in dataset.cases if case.label is not None}
    maps: dict[tuple[str, ...], Files] = {(name,): _maps(layout, name, folds) for name in names}
    common = sorted(set.intersection(*(set(files) for files in maps.values())) & set(cases))
    if not common:
        raise UserError(f"{run}: no validation case is predicted by all of {', '.join(names)}.")
    if pairs and len(names) > 1:
        validated = {fold: _maps(layout, names[0], [fold]) for fold in folds}
        held_out = {fold: [case for case in common if case in files] for fold, files in validated.items()}
        for fold in folds:
            drop_older(layout, names, fold, held_out[fold])
        for fold in folds:
            combine_fold(run, names, fold, {case: cases[case] for case in held_out[fold]}, device, report)
        maps |= {pair: _maps(layout, "+".join(pair), folds) for pair in combinations(names, 2)}
    scoring = scoring_of(dataset, surface=False)
    scored: dict[tuple[str, ...], tuple[CaseScore, ...]] = {}
    for members, files in maps.items():
        paired = [pair_of(cases[case], files[case]) for case in common]
        check_grids(paired)
        scored[members] = score_pairs(paired, scoring, workers, report)
    chosen = choose(scored, scoring, tuple(fold.removeprefix("fold_") for fold in folds))
    store.save(layout.selection, chosen)
    report(Said(chosen.because))
    return chosen


def predict_pair(
    run: Path,
    images: Path,
    output: Path,
    *,
    folds: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    save_probabilities: bool = False,
    rules: bool = True,
    mirroring: bool = True,
    resume: bool = False,
    device: str | None = None,
    report: Report = silent,
) -> tuple[Path, ...]:
    """`predict` with the configurations that were selected; arguments and errors as there (`rules`: `postprocess`)."""
    chosen = store.load(Layout(run).selection, Selection)
    learned = rules_learned_on(run, "+".join(chosen.members), report) if rules else None
    return ensemble_runs(
        [run], images, output, configurations=chosen.members, folds=folds, seeds=seeds, rules=learned,
        save_probabilities=save_probabilities, mirroring=mirroring, resume=resume, device=device, report=report,
    )  # fmt: skip


def choose(
    scored: Mapping[tuple[str, ...], tuple[CaseScore, ...]], scoring: Scoring, folds: tuple[str, ...]
) -> Selection:
    """The members with the highest mean foreground Dice (of equal ones the fewest), with all candidates and reasons."""
    dice = {members: summary(cases, scoring.classes, "", "") for members, cases in scored.items()}
    mean = {members: each.foreground_mean["dice"] for members, each in dice.items()}
    ranked = sorted(mean, key=lambda members: (-(mean[members] or 0.0), len(members)))
    best, single = ranked[0], next(members for members in ranked if len(members) == 1)
    per_case = {members: _foreground(cases) for members, cases in scored.items()}
    candidates = []
    for members in ranked:
        differences = per_case[best] - per_case[members]
        differences = differences[~np.isnan(differences)]
        tested = members != best and differences.size >= statistics.FEWEST
        p_value = statistics.wilcoxon(differences) if tested else None
        candidates.append(
            Candidate(members=members, dice=mean[members], per_class=dice[members].mean["dice"], p_value=p_value)
        )
    count = len(scored[best])
    because = f"{candidates[0].name} has the highest mean Dice, {mean[best] or 0.0:.4f} on {count} validation cases"
    for other in candidates[1:]:
        chance = "" if other.p_value is None else f", p = {other.p_value:.2g}"
        because += f"; {other.name} has {other.dice or 0.0:.4f}{chance}"
    return Selection(
        members=best, single=single[0], folds=folds, cases=count, candidates=tuple(candidates), because=f"{because}."
    )


def drop_older(layout: Layout, names: Sequence[str], fold: str, cases: Sequence[str]) -> None:
    """Remove the pairs' label maps that older networks made: a fold that lacks cases is not scored in the meantime."""
    for targets in _missing(layout, names, fold, cases).values():
        for target in targets.values():
            target.unlink(missing_ok=True)


def combine_fold(
    run: Path, names: Sequence[str], fold: str, cases: Mapping[str, Case], device: str | None, report: Report
) -> None:
    """Write the label maps of every pair of configurations for the validation cases of one fold."""
    layout = Layout(run)
    missing = _missing(layout, names, fold, tuple(cases))
    wanted = [case for case in cases if any(case in each for each in missing.values())]
    predictors: dict[str, Predictor] = {}
    what = f"pairs of {fold}"
    report(Started(what, len(wanted)))
    for done, case in enumerate(wanted, 1):
        with staged(layout.ensembles / case) as staging:
            used = {name for pair, waiting in missing.items() if case in waiting for name in pair}
            files = {name: _probabilities(run, name, fold, cases[case], staging, predictors, device) for name in used}
            for pair, waiting in missing.items():
                if case in waiting:
                    mean_of_probabilities([files[name] for name in pair], (0.5, 0.5), waiting[case])
        report(Advanced(what, done, len(wanted), case))
    report(Finished(what))


# ------------------------------------------------------------------------------------------------ parts


def _comparable(
    run: Path, configurations: Sequence[str] | None, report: Report
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Configurations to try, and the folds that all of them have validated."""
    found = {name: validated_folds(run, name) for name in trained_configurations(run)}
    names = tuple(configurations or (name for name, folds in found.items() if folds and not is_student(name)))
    without = [name for name in names if not found.get(name)]
    if without or not names:
        raise not_validated(run, some(without) or "any configuration")
    folds = tuple(fold for fold in found[names[0]] if all(fold in found[name] for name in names))
    if not folds:
        each = "; ".join(f"{name}: {', '.join(found[name])}" for name in names)
        raise UserError(f"{run}: no fold is trained for all configurations ({each}).", fix="Train the same folds.")
    if any(len(found[name]) > len(folds) for name in names):
        report(Warned(f"Only the folds that all configurations have are compared: {', '.join(folds)}."))
    return names, folds


def _probabilities(
    run: Path, name: str, fold: str, case: Case, staging: Path, predictors: "dict[str, Predictor]", device: str | None
) -> Path:
    """The probabilities of a validation case that its fold's network gives."""
    from autoseg.steps.predict import Predictor, segment_cases

    if name not in predictors:
        predictors[name] = Predictor(
            run, configuration=name, folds=[fold.removeprefix("fold_")], seeds=[0], device=device, postprocess=False
        )
    segment_cases(predictors[name], [case], staging / name, True, silent)
    return probabilities_file(staging / name, case.id)


def _validation(layout: Layout, name: str, fold: str) -> Path:
    return ModelLayout(layout.cross_validation(name) / fold).validation


def _maps(layout: Layout, name: str, folds: Sequence[str]) -> Files:
    return {case: path for fold in folds for case, path in label_maps(_validation(layout, name, fold)).items()}


def _missing(
    layout: Layout, names: Sequence[str], fold: str, cases: Sequence[str]
) -> dict[tuple[str, str], dict[str, Path]]:
    """By pair and case, the label maps that are not there or older than the networks that would make them.

    A map has the ending of the one of the pair's first configuration.
    """
    maps = {name: _maps(layout, name, [fold]) for name in names}
    found: dict[tuple[str, str], dict[str, Path]] = {}
    for pair in combinations(names, 2):
        folder = _validation(layout, "+".join(pair), fold)
        weights = [ModelLayout(layout.configuration(name) / fold).weights for name in pair]
        newest = max(path.stat().st_mtime if path.is_file() else float("inf") for path in weights)
        targets = {
            case: prediction_file(folder, case, maps[pair[0]][case].name.removeprefix(case)) for case in cases
        }
        found[pair] = {
            case: path for case, path in targets.items() if not path.is_file() or path.stat().st_mtime < newest
        }
    return found


def _foreground(cases: Sequence[CaseScore]) -> np.ndarray:
    """Mean Dice over the foreground labels per case, NaN where none is defined."""
    means = [overlap.mean(case.values["dice"]) for case in cases]
    return np.array([np.nan if mean is None else mean for mean in means], float)
