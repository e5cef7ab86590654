"""`autoseg plan`: look at the data once, decide everything, and write down why."""

import threading
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from autoseg.cases.discover import discover
from autoseg.cases.exchange import files_of_cases
from autoseg.cases.inspect import fingerprint_of, inspect
from autoseg.cases.split import splits_for
from autoseg.errors import UserError
from autoseg.events import Finished, Report, Said, Started, Warned, silent
from autoseg.layout import Layout
from autoseg.parallel import allowed_cores
from autoseg.planning.architecture import preset_named
from autoseg.planning.checks import check_plan
from autoseg.planning.edit import edit
from autoseg.planning.explain import long_trainings
from autoseg.planning.plan import make_plan
from autoseg.planning.search import SMALLEST_BATCH
from autoseg.planning.wording import GIGABYTE, gigabytes
from autoseg.records import Budget, Choice, Configuration, Dataset, Fingerprint, Memory, Plan, indices_in
from autoseg.store import load, record_name, refuse_unwritable, remove_unfinished, save, save_together

if TYPE_CHECKING:  # brings torch
    from autoseg.network.label_kinds import Labelling

OTHER_RUN = "Choose another folder: -o RUN."


def plan(
    data: Path,
    run: Path,
    *,
    memory: str | None = None,
    device: str | None = None,
    preset: str = "standard",
    spacing_mm: Sequence[float] | None = None,
    workers: int | None = None,
    skip_bad: bool = False,
    report: Report = silent,
) -> Plan:
    """Check and fingerprint the data set in `data`, plan for the memory at hand, and save all three records in `run`.

    Args:
        data: a Decathlon folder, an nnU-Net raw folder, or a folder with images/ and labels/.
        run: the run folder to make or to continue.
        memory: e.g. "11GB", the card to plan for; None: the free memory of `device`, or half of the RAM, at most 8 GB,
            where there is no card.
        device: e.g. "cuda:1" or "cpu"; None: the first card, if any.
        preset: "standard", "M", "L" or "XL".
        spacing_mm: Z Y X of the files, or Y X for 2D images; None: chosen from the data.
        workers: processes that read images; None: one per core.
        skip_bad: leave out cases with problems instead of stopping.
        report: receives progress.

    Raises:
        UserError: the data cannot be learned from, `run` is a data set or a folder of its files, or the memory is too
            small; see cases/inspect.py and planning/.
    """
    layout = Layout(run)
    preset_named(preset)
    _refuse_to_overwrite(data, layout)
    refuse_unwritable(run)
    if memory is not None or device is not None:
        _budget(memory, device, preset)  # refuses what makes no sense before files are read, which may take long
    import_early = threading.Thread(target=_import_what_planning_takes, daemon=True)
    import_early.start()  # three seconds of imports; the workers read images meanwhile
    workers = workers or allowed_cores()
    found = discover(data, workers, report)
    _refuse_among_files(layout, found)
    dataset, stats = inspect(found, layout.case_stats, workers, report, skip_bad)
    if not layout.splits.is_file():
        _warn_of_folds(dataset, report)
    fingerprint = fingerprint_of(dataset, stats)
    import_early.join()
    if _has_moved(layout, dataset, fingerprint) and not (memory or device or preset != "standard" or spacing_mm):
        report(Said("These are the cases that were planned for, in another place: the plan stays as it is."))
        save(layout.dataset, dataset)
        return checked(run)
    planned = _plan_for(fingerprint, memory, device, preset, spacing_mm, dataset.file_ending, report, dataset)
    _warn_of_trained_models(layout, planned, report)
    remove_unfinished(run)
    save_together(((layout.dataset, dataset), (layout.fingerprint, fingerprint), (layout.plan, planned)))
    return planned


def from_fingerprint(
    fingerprint_file: Path,
    output: Path | None = None,
    *,
    memory: str | None = None,
    device: str | None = None,
    preset: str = "standard",
    spacing_mm: Sequence[float] | None = None,
    file_ending: str = ".nii.gz",
    report: Report = silent,
) -> Plan:
    """Plan without data from a saved fingerprint; `output`, if given, is the run folder that receives both records."""
    fingerprint = load(fingerprint_file, Fingerprint)
    planned = _plan_for(fingerprint, memory, device, preset, spacing_mm, file_ending, report)
    if output is not None:
        _warn_of_trained_models(Layout(output), planned, report)
        save_together(((Layout(output).fingerprint, fingerprint), (Layout(output).plan, planned)))
    return planned


def checked(run: Path) -> Plan:
    """The plan of a run, edited or not; raises UserError where it contradicts itself or names what does not exist."""
    planned = load(Layout(run).plan, Plan)
    check_plan(planned)
    return planned


def edited(run: Path, changes: Sequence[str], report: Report = silent) -> Plan:
    """Change fields of a run's plan, such as "3d.patch_voxels=48,64,48", read what steps need now, and save it.

    Raises UserError for changes that a plan cannot have; see planning/edit.py. More memory than the budget only warns.
    """
    layout = Layout(run)
    before = load(layout.plan, Plan)
    dataset = load(layout.dataset, Dataset) if layout.dataset.is_file() else None  # none where planned without data
    after = edit(before, changes)
    old = {each.name: _of_memory(each) for each in before.configurations}
    configurations = tuple(
        each if _of_memory(each) == old.get(each.name)
        else _read_again(each, before.budget, labelling_of(after, dataset), report)
        for each in after.configurations
    )  # fmt: skip
    told = {f"{each.name}.memory": each.memory for each in configurations if each not in after.configurations}
    choices = tuple(
        Choice(field=each.field, value=gigabytes(told[each.field].peak_bytes), because="simulated after the edit.")
        if each.field in told else each
        for each in after.choices
    )  # fmt: skip
    after = after.model_copy(update={"configurations": configurations, "choices": choices})
    _warn_of_trained_models(layout, after, report)
    save(layout.plan, after)
    return after


def _of_memory(configuration: Configuration) -> tuple[object, ...]:
    """What the memory of a training step depends on."""
    train = configuration.train
    kept = train.optimizer, train.average_decay > 0, train.loss, configuration.batch_dice
    return configuration.network, configuration.patch_voxels, configuration.batch_size, *kept


def labelling_of(described: Plan | Fingerprint, dataset: Dataset | None) -> "Labelling":
    """What the loss of a training has to know of this data, for the memory and time of a step."""
    from autoseg.network.label_kinds import Labelling

    in_part = dataset is not None and any(case.annotated is not None for case in dataset.cases)
    return Labelling(indices_in(described.regions, described.labels), in_part)


def _read_again(
    configuration: Configuration, budget: Budget, labelling: "Labelling", report: Report
) -> Configuration:
    """The configuration with the memory that its step needs, simulated for the device of the plan."""
    from autoseg.network.memory import anywhere, measurer

    measure, source = measurer(anywhere(budget), labelling)
    peak = measure(configuration)
    if peak > budget.budget_bytes:
        needs = f"needs {gigabytes(peak)}, more than the budget of {gigabytes(budget.budget_bytes)}"
        report(Warned(f"Configuration {configuration.name} as edited {needs}."))
    return configuration.model_copy(update={"memory": Memory(source=source, peak_bytes=peak)})


def _import_what_planning_takes() -> None:
    import_module("autoseg.network.memory")
    import_module("torch._dynamo.config")  # fake tensors import all of the compiler for its settings


def _refuse_to_overwrite(data: Path, layout: Layout) -> None:
    """Raise UserError where the run's dataset.json would lie among the data or replace that of a data set."""
    known = layout.dataset.is_file() and record_name(layout.dataset) != Dataset.__name__.lower()
    if known or layout.root.resolve() == data.resolve():
        raise UserError(
            f"{layout.root}: this folder holds a data set, whose dataset.json the run would overwrite.",
            fix=OTHER_RUN,
        )


def _refuse_among_files(layout: Layout, dataset: Dataset) -> None:
    """Raise UserError where the run would lie in a folder of images or label maps, among these."""
    if layout.root.resolve() in {Path(file).parent.resolve() for file in files_of_cases(dataset.cases)}:
        raise UserError(f"{layout.root}: images or label maps of the data lie there.", fix=OTHER_RUN)


def _plan_for(
    fingerprint: Fingerprint, memory: str | None, device: str | None, preset: str,
    spacing_mm: Sequence[float] | None, file_ending: str, report: Report, dataset: Dataset | None = None,
) -> Plan:
    from autoseg.network.device import pick, slow_convolutions
    from autoseg.network.memory import measurer

    report(Started("planning"))
    budget, labelling = _budget(memory, device, preset), labelling_of(fingerprint, dataset)
    measure, source = measurer(budget, labelling)
    if source == "measured" and (warning := slow_convolutions(pick(budget.device))):
        report(Warned(warning))
    planned = make_plan(
        fingerprint, budget, measure, source=source, preset=preset, file_ending=file_ending, spacing_mm=spacing_mm,
        report=report,
    )  # fmt: skip
    report(Finished("planning"))
    for sentence in long_trainings(planned):
        report(Said(sentence))
    if memory is not None and device is not None:
        _check_simulation(planned, labelling, report)
    return planned


def _budget(memory: str | None, device: str | None, preset: str) -> Budget:
    """The memory named by the user; else the card's, of which a residual preset takes no more than it is meant for."""
    from autoseg.network.memory import budget_for

    budget, chosen = budget_for(memory, device), preset_named(preset)
    if memory is None and preset != "standard" and budget.device.startswith("cuda"):
        return budget.model_copy(update={"budget_bytes": min(budget.budget_bytes, chosen.memory_gb * GIGABYTE)})
    return budget


def _check_simulation(planned: Plan, labelling: "Labelling", report: Report) -> None:
    """Say how far the simulation is from the measurement, for each configuration planned for a device that is here.

    On a CPU a batch of two is enough to tell: memory grows in step with the batch, and a full one may take minutes.
    """
    from autoseg.network.device import pick
    from autoseg.network.memory import compare

    device = pick(planned.budget.device)
    if device.torch_device.type not in ("cuda", "cpu"):
        return
    for configuration in planned.configurations:
        batch = configuration.batch_size if device.is_cuda else min(SMALLEST_BATCH, configuration.batch_size)
        simulated, measured = compare(configuration.model_copy(update={"batch_size": batch}), device, labelling)
        error = 100 * (simulated - measured) / measured
        text = f"simulated {gigabytes(simulated)}, measured {gigabytes(measured)}: {error:+.1f} %"
        report(Said(f"{configuration.name} at batch {batch}: {text}"))


def _warn_of_folds(dataset: Dataset, report: Report) -> None:
    """Say at once what `train` would refuse: cases that cannot be split in two, or folds that do not fit them."""
    try:
        splits_for(dataset)
    except UserError as error:
        report(Warned(f"{error} Until then nothing can be trained."))


def _has_moved(layout: Layout, dataset: Dataset, fingerprint: Fingerprint) -> bool:
    """Whether the run was planned for the same cases, whose files lay elsewhere."""
    if not all(path.is_file() for path in (layout.plan, layout.dataset, layout.fingerprint)):
        return False
    before = load(layout.dataset, Dataset)
    elsewhere = [case.images for case in before.cases] != [case.images for case in dataset.cases]
    return elsewhere and load(layout.fingerprint, Fingerprint) == fingerprint


def _warn_of_trained_models(layout: Layout, planned: Plan, report: Report) -> None:
    """Say so when an older plan, by which networks were trained, is about to be replaced by another."""
    if not layout.plan.is_file():
        return
    before = load(layout.plan, Plan)
    known, rescaled = {each.name: each for each in before.configurations}, before.intensities != planned.intensities
    others = any(getattr(before, name) != getattr(planned, name) for name in ("channels", "labels", "regions"))
    changed = [
        each.name for each in planned.configurations
        if others or each.name not in known or known[each.name].model_copy(update={"memory": each.memory}) != each
        or (rescaled and "ct" in each.normalization)
    ]  # fmt: skip
    trained = [name for name in changed if layout.configuration(name).is_dir()]
    if trained:
        report(Warned(f"The plan changes, but {', '.join(trained)} was trained by the old one: train again."))
    names = {each.name for each in planned.configurations}
    dropped = [name for name in known if name not in names and layout.configuration(name).is_dir()]
    if dropped:
        report(Warned(f"The new plan is without {', '.join(dropped)}, of which there are trained networks: they stay."))
