"""What the user asks of a training, and how the plan is fitted to it."""

import gc
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import pi
from pathlib import Path

import torch
from pydantic import ValidationError

from autoseg.errors import UserError
from autoseg.network import losses, sampling, simulate
from autoseg.network.device import Device
from autoseg.network.label_kinds import Labelling
from autoseg.network.pieces import ran_out, too_little_memory
from autoseg.planning.batch import choose_norm
from autoseg.records import Configuration, Dataset, Fingerprint, Plan, Run, TrainSpec

STEPS_WANTED = 15_000
"""With a time limit the batch shrinks until about this many steps fit: fewer, however large, teach less
(docs/decisions/quality-per-minute.md)."""
LARGEST_DECAY = 1e-3
"""Share of a weight that AdamW's weight decay may take away in one step."""
REPORTS_WANTED = 40
"""With a time limit an epoch is paced so that there are about this many."""
LEAST_BATCH = 2
DRAWN = "Patches were drawn"
"""How the note begins that says what patches were drawn for."""
DECAYS, SEES = "Weight decay", "About"
"""How the notes begin that say what a training's length has changed."""


@dataclass(frozen=True)
class Options:
    """What the user asked for beside the plan; None means: as planned, or as the training that is resumed had it.

    init: run folder or model folder whose weights to begin with. freeze: "encoder" leaves those weights as they are.
    of_seconds: what two stages of a cascade share, of which `max_seconds` is a half; nobody asks for it by itself.
    """

    epochs: int | None = None
    max_seconds: float | None = None
    loss: str | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    precision: str | None = None
    deterministic: bool | None = None
    init: str | None = None
    freeze: str | None = None
    sampling: str | None = None
    of_seconds: float | None = None


@dataclass(frozen=True)
class Machine:
    """What a training may use of this machine; changes nothing in what it computes.

    cache_bytes: preprocessed cases are kept in memory up to this; None: a share of what is free. tensorboard: also
    write the history for TensorBoard.
    """

    device: str | None = None
    workers: int | None = None
    cache_bytes: int | None = None
    tensorboard: bool = False


def with_options(planned: Configuration, asked: Options) -> Configuration:
    """The planned configuration with the options of this training put in. Raises UserError for impossible values."""
    if asked.learning_rate is not None and asked.learning_rate <= 0:
        raise UserError(f"--lr {asked.learning_rate:g} is no learning rate.", fix="Give a number above 0.")
    update: dict[str, object] = {}
    for field in ("epochs", "loss", "learning_rate"):
        if (value := getattr(asked, field)) is not None:
            update[field] = value
    if asked.sampling is not None:
        update |= sampling.parse(asked.sampling)
    if asked.max_seconds is not None and not asked.max_seconds > 0:
        raise UserError(f"max_seconds {asked.max_seconds}: the time has to be above 0.")
    fields = planned.model_dump()
    fields["train"] |= update
    fields["batch_size"] = planned.batch_size if asked.batch_size is None else asked.batch_size
    try:
        return Configuration.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{first['loc'][-1]} {first['input']}: {first['msg']}.") from error


def fit_to_time(
    configuration: Configuration, asked: Options, seconds: float, least: int = LEAST_BATCH
) -> tuple[Configuration, str]:
    """Shrink the batch, unless it was asked for, until enough steps fit; and pace the epochs. Returns a note or "".

    Args:
        seconds: of one training step per sample.
        least: samples that a batch needs at least.
    """
    limit = asked.max_seconds or 0.0
    batch, note = configuration.batch_size, ""
    if asked.batch_size is None and limit / (seconds * batch) < STEPS_WANTED:
        fitting = max(LEAST_BATCH, least, int(limit / STEPS_WANTED / seconds))
        if fitting < batch:
            note = (
                f"Batch size {fitting} instead of {batch}: a sample takes {seconds:.2f} s, and {limit:.0f} s shall "
                f"hold about {STEPS_WANTED} steps."
            )
            batch = fitting
    pace = int(limit / (seconds * batch) / REPORTS_WANTED)
    steps = min(max(pace, 2), configuration.train.steps_per_epoch)
    train_spec = configuration.train.model_copy(update={"steps_per_epoch": steps})
    return configuration.model_copy(update={"batch_size": batch, "train": train_spec}), note


def with_suited_variation(
    configuration: Configuration, asked: Options, seconds: float | None, moves: bool = True
) -> tuple[Configuration, str]:
    """More movement in a training that sees few patches, and no mirroring where they are fewer still; and a note or "".

    Every mirrored axis doubles what the network has to learn; moved patches keep it from learning its cases by heart as
    well, for a while. It then predicts without mirroring, too. Where patches are turned to all sides their content has
    no direction, so that there is nothing more to learn: these are mirrored and moved as planned.

    Args:
        seconds: of one training step per sample; None where the training is not limited in time.
        moves: False leaves movement as it is, as for a study that may vary it.
    """
    train = configuration.train
    augment, patches = train.augment, float(train.epochs * train.steps_per_epoch * configuration.batch_size)
    if asked.max_seconds is not None and seconds is not None:
        patches = asked.max_seconds / seconds
    turned_to_all_sides = max(augment.rotation_rad, default=0.0) > pi / 2
    if turned_to_all_sides:
        return configuration, ""
    chance = augment.extra_movement_chance if moves and patches < augment.extra_movement_to_patches else 0.0
    mirrors = patches >= augment.mirror_from_patches
    update = {
        "mirror_axes": augment.mirror_axes if mirrors else (),
        "rotation_chance": max(chance, augment.rotation_chance), "scale_chance": max(chance, augment.scale_chance),
    }  # fmt: skip
    changed = augment.model_copy(update=update)
    if changed == augment:
        return configuration, ""
    said = [] if mirrors else ["no mirroring"]
    said += [f"{chance:.0%} of the patches turned and as many scaled"] if chance else []
    pays = f"mirroring pays from {augment.mirror_from_patches:,} on"
    note = f"{SEES} {patches:,.0f} patches are seen, so {', but '.join(said)}; {pays} (train.augment in the plan)."
    return configuration.model_copy(update={"train": train.model_copy(update={"augment": changed})}), note


def with_suited_decay(
    configuration: Configuration, planned: Configuration, asked: Options, seconds: float | None
) -> tuple[Configuration, str]:
    """As much weight decay over a shorter training as over the planned one, unless by SGD. Returns a note or "".

    AdamW and Muon shrink weights by learning rate x weight decay in every step (Loshchilov & Hutter 2019, equation 12),
    so what they do in all grows with the steps; how far back a network's weights remember should be a fixed share of
    the training (Wang & Aitchison 2024, How to set AdamW's weight decay as you scale model and dataset size). Figures:
    docs/decisions/quality-per-minute.md. One that goes on from other weights (`--init`) does not decay them more.

    Args:
        planned: the training whose length and learning rate the plan's weight decay is for.
        seconds: of one training step per sample; None where the training is not limited in time.
    """
    train, before = configuration.train, planned.train
    steps = float(train.epochs * train.steps_per_epoch)
    if asked.max_seconds is not None and seconds is not None:
        steps = asked.max_seconds / (seconds * configuration.batch_size)
    whole = before.learning_rate * before.weight_decay * before.epochs * before.steps_per_epoch
    per_step = whole / max(steps, 1.0)
    decay = min(per_step, LARGEST_DECAY) / train.learning_rate
    if train.optimizer == "sgd" or asked.init or decay <= train.weight_decay:
        return configuration, ""
    decay = float(f"{decay:.2g}")
    effect = f"about {steps:,.0f} steps do as much with it"
    if per_step > LARGEST_DECAY:
        effect = f"the most that is allowed, {100 * LARGEST_DECAY / per_step:.2g} % of the plan's in all"
    note = f"{DECAYS} {decay:g} instead of {train.weight_decay:g}: {effect}."
    return configuration.model_copy(update={"train": train.model_copy(update={"weight_decay": decay})}), note


def with_suited_norm(configuration: Configuration) -> tuple[Configuration, str]:
    """Instance norm instead of batch norm where the batch became too small for it, by the planner's own rule."""
    network = configuration.network
    if network.norm != "batch" or choose_norm(configuration.batch_size) == "batch":
        return configuration, ""
    note = f"Instance norm instead of batch norm: {configuration.batch_size} samples are too few for batch statistics."
    return configuration.model_copy(update={"network": network.model_copy(update={"norm": "instance"})}), note


def annotated_outputs(dataset: Dataset, plan: Plan) -> dict[str, tuple[bool, ...]]:
    """Per case of which only a part was drawn: for each output of the network, whether it was; the background always.

    Raises UserError for names that no output has, as after an edit.
    """
    names = [output.name for output in plan.outputs]
    found = {}
    for case in dataset.cases:
        if case.annotated is not None:
            if unknown := set(case.annotated) - set(names):
                fix = f"Choose among {', '.join(names)}."
                raise UserError(f"{case.id}: annotated is {sorted(unknown)[0]!r}, which nothing is called.", fix=fix)
            background = () if plan.regions else names[:1]
            found[case.id] = tuple(name in (*case.annotated, *background) for name in names)
    return found


def with_class_weights(
    configuration: Configuration, plan: Plan, fingerprint: Fingerprint | None
) -> tuple[Configuration, str]:
    """The loss with class weights made of the data's class shares, where it asks for a rule; and a note or "".

    Raises UserError where there is no fingerprint to make them of.
    """
    spec = configuration.train.loss
    has_regions = bool(plan.regions)
    if losses.with_weights(spec, [(1, 1)] * len(plan.regions or (1,)), has_regions) == spec:
        return configuration, ""
    if fingerprint is None:
        raise UserError(
            f"Loss {spec} makes its class weights of the fingerprint, which this run lacks.",
            fix="Give them as numbers: class_weights=1/2/..., background first.",
        )
    voxels = class_voxels(fingerprint)
    counts = [voxels]
    if plan.regions:
        within = [sum(voxels[k] for k in indices) for indices in plan.region_indices]
        counts = [(sum(voxels) - each, each) for each in within]
    weighted = losses.with_weights(spec, counts, has_regions)
    train = configuration.train.model_copy(update={"loss": weighted})
    return configuration.model_copy(update={"train": train}), f"Loss {weighted}: class weights from the class shares."


def class_voxels(fingerprint: Fingerprint) -> tuple[int, ...]:
    """Voxels of every label index in all cases, background first."""
    return tuple(sum(case.class_voxels[k] for case in fingerprint.cases) for k in range(len(fingerprint.labels)))


def class_rates(train: TrainSpec, plan: Plan) -> tuple[float, ...]:
    """The rate at which every foreground class of the plan is drawn; raises UserError for rates that are none."""
    return sampling.rates_of(train, [label.name for label in plan.labels[1:]])


def with_drawn_shares(record: Run, history: Sequence[Mapping[str, float | None]], plan: Plan) -> tuple[str, ...]:
    """The notes of a training with one more: what its patches were really drawn for, over all epochs."""
    notes = tuple(note for note in record.notes if not note.startswith(DRAWN))
    ends = [row["step"] or 0.0 for row in history]
    steps = [end - before for before, end in zip([0.0, *ends], ends, strict=False)]
    rows = [(row, count) for row, count in zip(history, steps, strict=True) if "drawn_free" in row]
    if not rows:
        return notes
    total = sum(count for _, count in rows)

    def shares(prefix: str) -> str:
        each = [sum((row.get(f"{prefix}{k}") or 0.0) * n for row, n in rows) / total for k in range(1, plan.classes)]
        return ", ".join(f"{label.name} {share:.1%}" for label, share in zip(plan.labels[1:], each, strict=True))

    free = sum((row["drawn_free"] or 0.0) * count for row, count in rows) / total
    note = f"{DRAWN} ({record.configuration.train.sampling}): centred on {shares('drawn_')}; anywhere {free:.1%}"
    if record.configuration.train.sampling == "case_balanced":
        note += f"; from cases with {shares('case_with_')}"
    return (*notes, f"{note}.")


def seconds_per_sample(configuration: Configuration, device: Device, labelling: Labelling = Labelling()) -> float:
    """Seconds of one training step per sample, timed on a network of its own.

    With the whole batch on a GPU, where a small one takes as long, or what of it fits (the training splits it); and
    with as few samples as may be on a CPU. Raises UserError where not even one fits.
    """
    batch = configuration.batch_size if device.is_cuda else min(LEAST_BATCH, configuration.batch_size)
    while True:
        try:
            return _seconds_of_step(configuration.model_copy(update={"batch_size": batch}), device, labelling) / batch
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if not ran_out(error):
                raise
            if batch == 1:
                raise too_little_memory(device.name, error) from error
        batch //= 2  # here, not above: the exception still holds every tensor of the failed step
        if device.is_cuda:
            torch.cuda.empty_cache()


def _seconds_of_step(configuration: Configuration, device: Device, labelling: Labelling) -> float:
    """The shortest of three training steps, whose memory is given back."""
    one, times = None, []
    try:
        one = simulate.make_step(configuration, device, labelling)
        for _ in range(3):
            start = time.perf_counter()
            float(one.run())
            times.append(time.perf_counter() - start)
        return min(times)
    finally:
        del one
        gc.collect()
        if device.is_cuda:
            torch.cuda.empty_cache()


def resume_command(
    run: Path, configuration: str, fold: str, seed: int, resume: str = "yes", asked: Options | None = None,
    seeds: int = 1, machine: Machine = Machine(),
) -> str:  # fmt: skip
    """The command that goes on; a training that has begun knows its options, one that has not needs them again."""
    words = ["autoseg", "train", str(run), "-c", configuration, "-f", fold]
    words += ["--seed", str(seed)] if seed else []
    words += ["--seeds", str(seeds)] if seeds > 1 else []
    for field, option in OPTIONS.items():
        if asked is not None and (value := getattr(asked, field)) is not None:
            shown = [] if value is True else [f"{value:.12g}" if isinstance(value, float) else str(value)]
            words += [option, *shown]
    words += ["--device", machine.device] if machine.device else []
    words += ["--tensorboard"] if machine.tensorboard else []
    return shlex.join([*words, "--resume", *([] if resume == "yes" else [resume])])


OPTIONS = {
    "epochs": "--epochs", "max_seconds": "--max-time", "loss": "--loss", "batch_size": "--batch-size",
    "learning_rate": "--lr", "precision": "--precision", "deterministic": "--deterministic", "init": "--init",
    "freeze": "--freeze", "sampling": "--sampling",
}  # fmt: skip
"""Field of `Options` -> its option on the command line."""
