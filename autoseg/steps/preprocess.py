"""`autoseg preprocess`: every case on the grid and scale of the plan, once. What is there already is kept."""

import zlib
from dataclasses import dataclass
from pathlib import Path

from autoseg.cases.cache import key_of, read_mark, restamp, stamp_of, write
from autoseg.cases.exchange import refuse_not_finite
from autoseg.cases.inspect import content_of
from autoseg.cases.prepare import class_locations, prepare
from autoseg.cases.split import groups_on_both_sides, own_folds, splits_for
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Said, Started, Warned, silent
from autoseg.image.formats import read_image, read_labels
from autoseg.layout import Layout
from autoseg.parallel import allowed_cores, over_cases
from autoseg.records import Case, Configuration, Dataset, Plan, Splits
from autoseg.store import load, remove_unfinished, save


@dataclass(frozen=True, slots=True)
class Work:
    """One case for one worker: the configurations it is not preprocessed for, each with its cache folder."""

    case: Case
    plan: Plan
    targets: tuple[tuple[Configuration, Path], ...]


def preprocess(
    run: Path, *, configuration: str | None = None, workers: int | None = None, report: Report = silent
) -> None:
    """Fill the caches of a planned run, and write `splits.json` unless there is one.

    A case is read once for all configurations. A case whose files and plan are as before is not touched, so a killed
    run continues where it was.

    Args:
        run: folder with dataset.json and plan.json.
        configuration: name of the only one to prepare; None prepares all.
        workers: processes; None takes all allowed cores.

    Raises:
        UserError: nothing is planned, no such configuration, a file that cannot be read, or splits with unknown cases.
    """
    layout = Layout(run)
    dataset, plan = load(layout.dataset, Dataset), load(layout.plan, Plan)
    chosen = chosen_configurations(plan, configuration)
    keep_or_make_splits(layout, dataset, report)
    targets = [(each, layout.cache(each.name)) for each in chosen]
    for folder in (run, *(folder for _, folder in targets)):
        remove_unfinished(folder)
    what = f"preprocess {', '.join(each.name for each in chosen)}"
    report(Started(what, of=len(dataset.cases)))
    every = (Work(case, plan, tuple(t for t in targets if not _is_untouched(case, plan, *t))) for case in dataset.cases)
    work = [each for each in every if each.targets]
    done = len(dataset.cases) - len(work)
    if done:
        report(Advanced(what, done=done, of=len(dataset.cases), note="already there"))
    for each, _ in over_cases(
        preprocess_case, work, workers or allowed_cores(), _name_of, head_start_seconds=1.0, preload=("blosc2",)
    ):
        done += 1
        report(Advanced(what, done=done, of=len(dataset.cases), note=each.case.id))
    report(Finished(what))


def preprocess_case(work: Work) -> None:
    """Read one case and write it for every configuration that lacks it."""
    case, plan = work.case, work.plan
    stamp, content = stamp_of(case), content_of(case, plan.labels, plan.ignore_value)
    targets = []
    for configuration, folder in work.targets:
        key, mark = key_of(content, plan, configuration), read_mark(folder, case.id)
        if mark is not None and mark.key == key:
            restamp(folder, mark, stamp)  # the files were touched but hold the same
        else:
            targets.append((configuration, folder, key))
    if not targets:
        return
    volume = read_image(case.images)
    refuse_not_finite(volume, " ".join(case.images))  # a file may have changed since it was checked
    labels_ZYX = read_labels(case.label)[0] if case.label is not None else None
    for configuration, folder, key in targets:
        prepared = prepare(volume, labels_ZYX, plan, configuration, case.id)
        found = prepared.labels_ZYX
        locations = {} if found is None else class_locations(found, plan.classes, seed=zlib.crc32(case.id.encode()))
        write(
            folder,
            case.id,
            prepared,
            locations,
            key,
            patch_voxels=configuration.patch_voxels,
            content=content,
            stamp=stamp,
        )


def chosen_configurations(plan: Plan, name: str | None) -> tuple[Configuration, ...]:
    """All configurations, or the one called `name`. Raises UserError that lists the valid names."""
    chosen = tuple(each for each in plan.configurations if name in (None, each.name))
    if not chosen:
        names = ", ".join(each.name for each in plan.configurations)
        raise UserError(f"The plan has no configuration {name!r}.", fix=f"Choose one of: {names}.")
    return chosen


def keep_or_make_splits(layout: Layout, dataset: Dataset, report: Report = silent) -> Splits:
    """The splits of the run; where there are none, the data set's own folds or new ones, which are saved.

    Raises UserError when they name a case that the data set does not have; warns of cases that no fold uses, and of
    groups that are on both sides.
    """
    if not layout.splits.is_file():
        splits = splits_for(dataset)
        save(layout.splits, splits)
        own = own_folds(dataset)
        how = f", those of {own}" if own else " by group" if splits.grouped else ""
        report(Said(f"{len(dataset.cases)} cases are split into {len(splits.folds)} folds{how}."))
    splits = load(layout.splits, Splits)
    used = {each for fold in splits.folds for each in (*fold.train, *fold.validation)}
    ids = {case.id for case in dataset.cases}
    if unknown := sorted(used - ids):
        raise UserError(
            f"{layout.splits}: it names {len(unknown)} case(s) that the data set does not have, e.g. {unknown[0]}.",
            fix="Correct it, or remove it to have it made anew.",
        )
    if unused := sorted({case.id for case in dataset.cases if case.label is not None} - used):
        report(Warned(f"{layout.splits}: {len(unused)} labelled case(s) are in no fold, e.g. {unused[0]}."))
    for number, fold in enumerate(splits.folds):
        if both := groups_on_both_sides(fold, dataset.cases):
            what = f"fold {number} validates on groups that it learns from, e.g. {min(both)}"
            report(Warned(f"{layout.splits}: {what}. Remove the file to have it made anew."))
            break
    return splits


def _is_untouched(case: Case, plan: Plan, configuration: Configuration, folder: Path) -> bool:
    """Whether the cache is current, told without reading the case: its files look as they did when it was written."""
    mark = read_mark(folder, case.id)
    return mark is not None and mark.key == key_of(mark.content, plan, configuration) and mark.stamp == stamp_of(case)


def _name_of(work: Work) -> str:
    return work.case.id
