"""What a report says of data, plan, trainings and what was decided afterwards.

Pure functions from records to HTML; they read no file.
"""

import statistics
from collections.abc import Sequence

import numpy as np

from autoseg.pages.markup import Html, facts, heading, listing, paragraph, preformatted, table
from autoseg.planning import explain
from autoseg.planning.wording import device, gigabytes, millimetres, percent, some, voxels
from autoseg.records import Dataset, Fingerprint, Intensities, Plan, Postprocessing, Run
from autoseg.scoring import overlap
from autoseg.scoring.selection import Selection
from autoseg.steps.postprocess import describe

FEW_CLASSES = 6
"""So many are named with their Dice in the row of a training, of more the lowest ones."""


# ------------------------------------------------------------------------------------------------ the data


def of_data(plan: Plan, dataset: Dataset | None, seen: Fingerprint | None) -> list[Html]:
    """Data set and fingerprint; the plan says what it knows where these are not there."""
    parts = [facts(_about(plan, dataset))]
    if dataset is None:
        parts.append(paragraph("The run has no dataset.json: which cases there are is not known.", "missing"))
    elif dataset.left_out:
        parts += [paragraph("Left out by --skip-bad:"), listing(f"{e.id}: {e.problem}" for e in dataset.left_out)]
    if seen is None:
        parts.append(paragraph("The run has no fingerprint.json: shapes and volumes are not known.", "missing"))
        parts.append(_label_table(plan))
    else:
        parts += [facts(_shapes(seen)), _class_table(seen)]
    if plan.regions:
        names = {label.value: label.name for label in plan.labels}
        rows = [(e.name, ", ".join(names[value] for value in e.labels), str(e.paint)) for e in plan.regions]
        parts.append(table("Regions", ("region", "labels", "value in predictions"), rows))
    parts.append(_intensity_table(plan.channels, seen.intensities if seen else plan.intensities))
    return parts


def _about(plan: Plan, dataset: Dataset | None) -> dict[str, str]:
    about = {"Data set": plan.dataset, "Images": f"{plan.dimension}D, {plan.file_ending}"}
    if dataset is not None:
        drawn = sum(case.label is not None for case in dataset.cases)
        without = "all" if drawn == len(dataset.cases) else str(drawn)
        about["Cases"] = f"{len(dataset.cases)}, {without} with a label map"
        groups = {case.group for case in dataset.cases if case.group}
        about["Groups"] = f"{len(groups)} (cases of one group stay in one fold)" if groups else ""
        partly = sum(case.annotated is not None for case in dataset.cases)
        about["Partly annotated"] = f"{partly} cases" if partly else ""
    about["Channels"] = ", ".join(plan.channels)
    about["Classes"] = str(len(plan.labels) - 1)
    about["Ignored value"] = "" if plan.ignore_value is None else str(plan.ignore_value)
    return about


def _shapes(seen: Fingerprint) -> dict[str, str]:
    """Medians over the cases with their ranges, axis by axis."""
    shapes = np.array([case.full_shape_voxels for case in seen.cases])
    spacings = np.array([case.spacing_mm for case in seen.cases])
    kept = statistics.median(case.crop_share for case in seen.cases)
    (shape, smallest, largest), (spacing, finest, coarsest) = (
        [fold(values, axis=0).tolist() for fold in (np.median, np.min, np.max)] for values in (shapes, spacings)
    )
    shapes_from = f"{voxels(smallest)} to {voxels(largest)}" if smallest != largest else "all alike"
    spacings_from = f"{millimetres(finest)} to {millimetres(coarsest)}" if finest != coarsest else "all alike"
    median = " x ".join(f"{size:g}" for size in shape)
    return {
        "Median shape, Z Y X": f"{median} voxels ({shapes_from})",
        "Median spacing, Z Y X": f"{millimetres(spacing)} ({spacings_from})",
        "Left after cropping": f"{percent(kept)} of the voxels (median)",
    }


def _label_table(plan: Plan) -> Html:
    rows = [(label.name, str(label.value)) for label in plan.labels[1:]]
    return table("Classes", ("class", "value in files"), rows)


def _class_table(seen: Fingerprint) -> Html:
    """Shares of the cropped image and volumes of every foreground class, over the cases that have it."""
    rows = [(label.name, str(label.value), *_volumes(seen, k)) for k, label in enumerate(seen.labels) if k]
    volume = ("volume, median", "lowest", "highest") if seen.dimension == 3 else ()
    share = ("share of the image, median", "lowest", "highest")
    headings = ("class", "value in files", "cases that have it", *share, *volume)
    return table("Classes in the cases that have them", headings, rows)


def _volumes(seen: Fingerprint, k: int) -> tuple[str, ...]:
    having = [case for case in seen.cases if case.class_voxels[k]]
    shares = [case.class_voxels[k] / float(np.prod(case.shape_voxels)) for case in having]
    millilitres = [case.class_mm3[k] / 1000 for case in having]
    counted = (str(len(having)), *_three([percent(share) for share in _spread(shares)]))
    return (*counted, *_three([f"{ml:.3g} ml" for ml in _spread(millilitres)])) if seen.dimension == 3 else counted


def _spread(values: Sequence[float]) -> list[float]:
    return [statistics.median(values), min(values), max(values)] if values else []


def _three(words: Sequence[str]) -> tuple[str, ...]:
    return tuple(words) or ("-",) * 3


def _intensity_table(channels: Sequence[str], intensities: Sequence[Intensities]) -> Html:
    if not intensities:
        return paragraph("Intensities are not recorded.", "missing")
    fields = ("mean", "std", "median", "minimum", "percentile_00_5", "percentile_99_5", "maximum")
    rows = [
        (name, *(f"{getattr(each, field):.4g}" for field in fields))
        for name, each in zip(channels, intensities, strict=False)
    ]
    headings = ("channel", "mean", "standard deviation", "median", "minimum", "0.5 %", "99.5 %", "maximum")
    return table("Intensities of the foreground, as in the files", headings, rows)


# ------------------------------------------------------------------------------------------------ the plan


def of_plan(plan: Plan, written: str) -> list[Html]:
    """The networks, every decision with its reason, every reading, and a drawing of each network."""
    budget = plan.budget
    is_known = plan.preset != "imported"  # nnU-Net's plans say nothing of a card
    whole = f" of {gigabytes(budget.total_bytes)}" if budget.total_bytes != budget.budget_bytes else ""
    about = {
        "Written": f"{written}, by autoseg {plan.autoseg_version}",
        "Preset": plan.preset,
        "Planned for": f"{device(budget.device)}, {gigabytes(budget.budget_bytes)}{whole}" if is_known else "",
        "torch": budget.torch_version,
        "Driver": budget.driver,
    }
    kinds = (explain.grid_table, explain.cost_table, explain.choice_table, explain.attempt_table)
    shown = [of(plan) for of in kinds]
    tables = [table(each.title, each.headings, each.rows) for each in shown if each.rows]
    drawings = [preformatted(explain.drawing(configuration)) for configuration in plan.configurations]
    return [facts(about), *tables, heading("Networks, stage by stage"), *drawings]


# ------------------------------------------------------------------------------------------------ the trainings


def training_table(trainings: Sequence[tuple[Run, str]], classes: Sequence[str]) -> Html:
    """One row per network: what it used, and how it ended; beside each record when its file was written.

    `classes` are names of the foreground classes; a training's Dice is of these in order.
    """
    rows = [(*_row(run, classes), ended) for run, ended in trainings]
    headings = (
        "configuration", "fold", "seed", "state", "steps", "time", "device", "precision", "cases learned from",
        "validated", "mean Dice", "Dice per class", "autoseg, torch", "record written",
    )  # fmt: skip
    return table("Trained networks", headings, rows)


def numbers_of(classes: Sequence[str]) -> str:
    """What the numbers of classes in pictures of curves stand for."""
    if len(classes) > FEW_CLASSES:
        return "In the pictures classes have numbers, in the order in which they stand above under Data."
    return f"In the pictures {', '.join(f'class {k} is {name}' for k, name in enumerate(classes, 1))}."


def _row(run: Run, classes: Sequence[str]) -> tuple[str, ...]:
    mean = overlap.mean(run.validation_dice)
    learned, validated = ("-", "-") if run.cases is None else (len(run.cases.train), len(run.cases.validation))
    return (
        run.configuration.name, run.fold, str(run.seed), "finished" if run.finished else "not finished",
        f"{run.steps:,}" if run.steps else "-", explain.duration(run.seconds) if run.seconds else "-",
        f"{run.device}{f' x {run.processes}' if run.processes > 1 else ''}" or "-",
        f"{run.precision}{', compiled' if run.compiled else ''}" or "-", str(learned), str(validated),
        "-" if mean is None else f"{mean:.4f}", _per_class(run.validation_dice, classes),
        f"{run.autoseg_version}, {run.torch_version}",
    )  # fmt: skip


def _per_class(dice: Sequence[float | None], classes: Sequence[str]) -> str:
    """Every class with its Dice, or of many the lowest ones."""
    names = classes if len(classes) == len(dice) else [f"class {k}" for k in range(1, len(dice) + 1)]
    known = [(value, name) for value, name in zip(dice, names, strict=True) if value is not None]
    if len(known) > FEW_CLASSES:
        return f"lowest: {some([f'{name} {value:.4f}' for value, name in sorted(known)])}"
    return ", ".join(f"{name} {value:.4f}" for value, name in known) or "-"


# ------------------------------------------------------------------------------------------------ afterwards


def of_selection(chosen: Selection | None) -> list[Html]:
    """What `predict` uses, and what else was tried."""
    if chosen is None:
        return [paragraph("No configuration or pair was selected: autoseg select has not been run.", "missing")]
    rows = [
        (each.name, *("-" if v is None else f"{v:.{n}g}" for v, n in ((each.dice, 4), (each.p_value, 2))))
        for each in chosen.candidates
    ]
    title = f"Candidates on {chosen.cases} validation cases of folds {', '.join(chosen.folds)}"
    return [
        paragraph(f"{chosen.because} predict uses {'+'.join(chosen.members)}."),
        table(title, ("candidate", "mean Dice", "p against the best"), rows),
    ]


def of_rules(learned: Postprocessing | None) -> list[Html]:
    """The rules that post-processing applies, in words."""
    if learned is None:
        return [paragraph("No post-processing was learned: autoseg postprocess has not been run.", "missing")]
    where = f"the {learned.cases} validation cases of {learned.learned_on}"
    if not learned.rules:
        return [paragraph(f"No rule raised the mean Dice on {where}; predictions stay as they are.")]
    return [paragraph(f"Learned on {where}:"), listing(describe(rule) for rule in learned.rules)]
