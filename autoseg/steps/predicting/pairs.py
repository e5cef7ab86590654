"""Which prediction belongs to which reference, in two folders or in a run.

In a run they are those of its cross-validation.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from autoseg import store
from autoseg.cases.description import read_label_names, read_regions
from autoseg.errors import UserError
from autoseg.image.formats import read_geometry, stem_of
from autoseg.image.labels import grid_difference, is_label_map, label_maps, some
from autoseg.layout import Layout, ModelLayout
from autoseg.records import Case, Dataset, Run
from autoseg.scoring.selection import selected


@dataclass(frozen=True)
class Pair:
    """One case to be scored: the predicted label map and its reference.

    `annotated` names the labels that somebody drew in this reference; None is all of them.
    """

    id: str
    prediction: Path
    reference: Path
    annotated: tuple[str, ...] | None = None


def pair_up(
    predictions: Path, references: Path, known: Dataset | None = None, cases: Sequence[str] | None = None
) -> tuple[Pair, ...]:
    """Pair the label maps of two places by case id; `known` names the references when they are a run's data set.

    Raises:
        UserError: a case is on one side only (with `cases`: a named case is missing).
    """
    predicted, drawn = label_maps(predictions), dict[str, tuple[str, ...] | None]()
    if known is not None and (references.is_file() or Layout(references).dataset.is_file()) and known.cases:
        referred = {case.id: Path(case.label) for case in known.cases if case.label is not None}
        drawn = {case.id: case.annotated for case in known.cases}
    else:
        referred = label_maps(references)
    if cases is not None and not cases:
        raise UserError("No case is named.", fix="Name some: --cases case_01,case_02; or leave --cases out.")
    wanted = set(predicted) | set(referred) if cases is None else set(cases)
    for here, there, place in ((predicted, references, predictions), (referred, predictions, references)):
        missing = sorted(wanted - set(here))
        if missing:
            known_there = wanted if cases is not None else predicted if here is referred else referred
            raise UserError(
                f"{place} has no label map for {len(missing)} of {len(known_there)} cases that "
                f"{'are asked for' if cases is not None else f'{there} has'}: {some(missing)}.",
                fix="Compare folders with the same cases, or name those to score: --cases.",
            )
    return tuple(Pair(case, predicted[case], referred[case], drawn.get(case)) for case in sorted(wanted))


def validation_pairs(
    run: Path, dataset: Dataset, configuration: str | None = None
) -> tuple[str, tuple[Pair, ...]]:
    """The configuration and its validation predictions of all folds (unnamed seed), paired with the references.

    `configuration` None takes the only one there is, else the selected one (`steps/select.py`).
    """
    layout = Layout(run)
    if configuration is None:
        found = predicted_names(run)
        chosen = selected(run)
        best = "+".join(chosen.members) if chosen else ""
        if len(found) > 1 and best not in found:
            raise UserError(
                f"{run}: several configurations have validation predictions: {', '.join(found)}.",
                fix="Name one with --configuration.",
            )
        configuration = best if best in found else next(iter(found), None)
    predictions: dict[str, Path] = {}
    for fold in validated_folds(run, configuration) if configuration else ():
        predictions.update(label_maps(ModelLayout(layout.cross_validation(str(configuration)) / fold).validation))
    if not predictions or configuration is None:
        raise not_validated(run, configuration or "any configuration")
    cases = {case.id: case for case in dataset.cases if case.label is not None}
    missing = sorted(set(predictions) - set(cases))
    if missing:
        raise UserError(f"{run}: predicted cases without a reference in dataset.json: {some(missing)}.")
    pairs = [pair_of(cases[case], path) for case, path in sorted(predictions.items())]
    return configuration, tuple(pairs)


def not_validated(run: Path, wanted: str) -> UserError:
    """What is missing where a configuration has no predictions of validation cases, with those that have some."""
    there = some(predicted_names(run))
    fix = "Train at least one fold first: autoseg train." if not there else f"There are some of: {there}."
    return UserError(f"{run}: there are no validation predictions of {wanted}.", fix=fix)


def predicted_names(run: Path) -> tuple[str, ...]:
    """Configurations, then pairs of them, that have predictions of validation cases."""
    layout = Layout(run)
    folders = (*sorted(layout.models.glob("*")), *sorted(layout.ensembles.glob("*+*")))
    return tuple(each.name for each in folders if validated_folds(run, each.name))


def validated_folds(run: Path, name: str) -> tuple[str, ...]:
    """Folders of the folds (unnamed seed) whose validation cases are all predicted, such as "fold_0".

    A training that is still under way, or was stopped in validation, is none; nor is a fold of a pair that lacks a case
    which both of its configurations have.
    """
    folders = sorted(Layout(run).cross_validation(name).glob("fold_*"))
    own = [each for each in folders if ".seed_" not in each.name and each.name != "fold_all"]
    return tuple(each.name for each in own if _is_validated(Layout(run), name, ModelLayout(each)))


def _is_validated(layout: Layout, name: str, model: ModelLayout) -> bool:
    ended = not model.run.is_file() or store.load(model.run, Run).finished
    found, members = _cases_in(model.validation), name.split("+")
    wanted = found
    if len(members) > 1:
        folders = [layout.configuration(each) / model.root.name for each in members]
        wanted = set.intersection(*(_cases_in(ModelLayout(each).validation) for each in folders))
    return ended and bool(found) and wanted <= found


def _cases_in(folder: Path) -> set[str]:
    return {stem_of(path) for path in folder.glob("*") if is_label_map(path)}


def pair_of(case: Case, prediction: Path) -> Pair:
    """A case of a data set with its predicted label map; where only some labels were drawn, these."""
    return Pair(case.id, prediction, Path(str(case.label)), case.annotated)


def check_grids(pairs: Sequence[Pair]) -> None:
    """Raise UserError naming every pair whose two files do not lie on the same grid; reads only headers."""
    wrong = []
    for pair in pairs:
        difference = grid_difference(read_geometry(pair.prediction), read_geometry(pair.reference))
        if difference:
            wrong.append(f"{pair.id} ({difference})")
    if wrong:
        raise UserError(
            f"{len(wrong)} of {len(pairs)} predictions do not lie on their reference's grid: {some(wrong)}.",
            fix="Predict from the images that belong to these references.",
        )


def dataset_near(references: Path) -> Dataset | None:
    """The labels of a data set: of a run, or of a `dataset.json` in or beside the folder of references.

    Reads autoseg's own file and, as training does, those of the Decathlon and of nnU-Net (of which only labels are
    taken). None when there is no such file.
    """
    if references.is_file() and references.suffix.lower() != ".json":
        raise UserError(f"{references}: this is a file, not a folder.", fix="Name the folder of the label maps.")
    places = [references] if references.is_file() else [Layout(references).dataset, Layout(references.parent).dataset]
    for path in places:
        if not path.is_file():
            continue
        try:
            content = json.loads(path.read_text())
        except ValueError as error:
            raise UserError(f"{path}: not valid JSON ({error}).", fix="Mend or remove the file.") from error
        if isinstance(content, dict) and "autoseg" in content:
            return store.parse(content, Dataset, str(path))
        if isinstance(content, dict) and isinstance(content.get("labels"), dict):
            labels, ignore = read_label_names(content, str(path))
            regions, name = read_regions(content, str(path)), path.parent.name
            return Dataset(name=name, dimension=3, channels=("",), labels=labels, regions=regions, ignore_value=ignore)
    return None
