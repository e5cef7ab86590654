"""Who a student learns from, and what these say of the cases.

That is computed once, and kept in 8 bits in the run's cache.
Axes: C channel, K class, Z Y X voxels of the preprocessed grid.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from torch import nn

from autoseg import store
from autoseg.cases.cache import StoredArray, is_whole_array, open_case, write_array
from autoseg.errors import UserError
from autoseg.events import Advanced, Finished, Report, Started, silent
from autoseg.layout import Layout, ModelLayout, teacher_file
from autoseg.network.accumulators import room_of
from autoseg.network.device import Device
from autoseg.network.distillation import LARGEST_LOGIT, from_8_bits, to_8_bits
from autoseg.network.less_memory import sums_bytes, tilings, until_it_fits
from autoseg.network.patches import Box, Source
from autoseg.network.sliding import Scorer, Tiling, score_blocks
from autoseg.records import Case, Configuration, Plan, Run
from autoseg.steps.predicting.members import same_plans
from autoseg.steps.predicting.models import (
    learned_from,
    load_network,
    mirror_axes_of,
    sees_otherwise,
    trained_models,
    unlike,
)
from autoseg.steps.predicting.predictor import one_hot


@dataclass(frozen=True)
class Lesson:
    """What a student learns beside the labels: from whom, how soft, and on which images without labels."""

    teachers: tuple[ModelLayout, ...]
    temperature: float
    labels_weight: float
    unlabelled: tuple[Case, ...] = ()


@dataclass(frozen=True)
class WithTeacher:
    """A case whose image has one more channel per class: what the teachers say, 0 where they say nothing.

    With `regions` one channel of ones stands before those of the regions.
    """

    source: Source
    stored: Any
    regions: bool = False
    lock: Lock = field(default_factory=Lock)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    @property
    def locations(self) -> Mapping[int, np.ndarray]:
        return self.source.locations

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        image_CZYX, labels_ZYX = self.source.read(box)
        with self.lock:  # a blosc2 array decompresses for one thread at a time
            said_KZYX = self.stored[(slice(None), *(slice(start, stop) for start, stop in box))]
        marked = (np.ones_like(image_CZYX[:1]),) if self.regions else ()
        return np.concatenate((image_CZYX, *marked, from_8_bits(said_KZYX))), labels_ZYX


# ------------------------------------------------------------------------------------------------ who


def teachers_named(run: Path, planned: Configuration, fold: str, named: Sequence[str]) -> tuple[ModelLayout, ...]:
    """The finished networks that `--from` names, each once.

    Args:
        named: "seeds" (all of this fold), "folds" (all that are trained), "fold_0..4", "fold_0.seed_1", the folder of a
            network, or another run whose configuration of this name has the same grid.

    Raises UserError for a name that leads to no finished network, or to one of other labels or preprocessed cases.
    """
    layout, found = Layout(run), list[ModelLayout]()
    for name in named:
        several = re.fullmatch(r"fold_(\d+)\.\.(\d+)", name)
        if name == "seeds":
            found += trained_models(layout, planned.name, [fold])
        elif name == "folds":
            found += trained_models(layout, planned.name)
        elif several:
            folds = [str(each) for each in range(int(several[1]), int(several[2]) + 1)]
            found += trained_models(layout, planned.name, folds)
        elif re.fullmatch(r"fold_\w+(\.seed_\d+)?", name):
            found.append(ModelLayout(layout.configuration(planned.name) / name))
        elif Layout(Path(name)).plan.is_file():
            found += trained_models(Layout(Path(name)), planned.name)
        else:
            found.append(ModelLayout(Path(name)))
    plan = store.load(layout.plan, Plan)
    teachers = tuple({model.root.resolve(): model for model in (_as_of_run(each, layout) for each in found)}.values())
    for model in teachers:
        _check(model, planned, plan)
    if not teachers:
        raise UserError("A student needs teachers.", fix="Name some: --from seeds, or --from fold_0..4.")
    above = dict.fromkeys(Path(*model.root.absolute().parts[:-3]) for model in teachers)
    runs = [run, *(each for each in above if Layout(each).plan.is_file())]
    same_plans([store.load(Layout(each).plan, Plan) for each in runs], [str(each) for each in runs])
    return teachers


def _as_of_run(model: ModelLayout, layout: Layout) -> ModelLayout:
    """A network of the run by the path it has there, whatever path it was named by."""
    folder, models = model.root.resolve(), layout.models.resolve()
    return ModelLayout(layout.models / folder.relative_to(models)) if folder.is_relative_to(models) else model


def _check(model: ModelLayout, planned: Configuration, plan: Plan) -> None:
    if not model.run.is_file() or not model.weights.is_file() or not store.load(model.run, Run).finished:
        raise UserError(
            f"{model.root} is no finished network.",
            fix="Name seeds, folds, fold_0..4, fold_0.seed_1, the folder of a network, or another run.",
        )
    learned = store.load(model.run, Run)
    differing = unlike(learned.configuration, planned) + ["intensities"] * sees_otherwise(learned, plan)
    for part in ("channels", "labels", "regions"):
        now = tuple(each if isinstance(each, str) else each.name for each in getattr(plan, part))
        differing += [part] if getattr(learned, part) not in ((), now) else []
    if differing:
        raise UserError(
            f"{model.root} cannot teach {planned.name}: {', '.join(differing)} differ.",
            fix="Take networks of the same configuration.",
        )


def who_saw(teachers: Sequence[ModelLayout], validation: Sequence[str]) -> tuple[ModelLayout, ...]:
    """The teachers that learned from a validation case of the student's: then its scores tell too much."""
    return tuple(model for model in teachers if set(validation) & set(learned_from(model)))


# ------------------------------------------------------------------------------------------------ what they say


def with_teachers(
    layout: Layout, plan: Plan, configuration: Configuration, lesson: Lesson, names: Sequence[str],
    sources: Mapping[str, Source], device: Device, report: Report,
) -> dict[str, Source]:  # fmt: skip
    """The sources, those of `names` with the channels of the teachers; what is missing of these is computed first."""
    folder = layout.teachers(configuration.name, _key(lesson.teachers))
    cache = layout.cache(configuration.name)
    files = {name: teacher_file(folder, name, open_case(cache, name).mark.key) for name in names}
    missing = [name for name in names if not is_whole_array(files[name])]
    what = f"{len(lesson.teachers)} teachers look at"
    if missing:
        store.remove_unfinished(folder)
        networks = [load_network(model, device) for model in lesson.teachers]
        report(Started(what, len(names)))
        for number, name in enumerate(missing, len(names) - len(missing) + 1):
            image_CZYX = _input(sources[name], configuration, plan.classes)
            said_KZYX = said_of_case(networks, image_CZYX, lesson, device, bool(plan.regions), report)
            chunk = (1, *(1,) * (3 - len(configuration.patch_voxels)), *configuration.patch_voxels)
            write_array(files[name], said_KZYX, chunk)
            report(Advanced(what, number, len(names), name))
        report(Finished(what))
    return {
        name: WithTeacher(source, StoredArray(files[name]), bool(plan.regions)) if name in files else source
        for name, source in sources.items()
    }


def said_of_case(
    networks: Sequence[nn.Module], image_CZYX: np.ndarray, lesson: Lesson, device: Device, regions: bool = False,
    report: Report = silent,
) -> np.ndarray:  # fmt: skip
    """The teachers' mean probabilities of a preprocessed case as `to_8_bits` stores them, (K, Z, Y, X) uint8.

    Mirrored and averaged as in prediction, block by block: only where teachers have other patches or mirrorings is the
    sum of the whole image held.
    """
    alike: dict[Tiling, list[nn.Module]] = {}
    for network, model in zip(networks, lesson.teachers, strict=True):
        used = store.load(model.run, Run).configuration
        tiling = Tiling(used.patch_voxels, mirror_axes_of(model))
        alike.setdefault(tiling, []).append(network)
    network_spec = store.load(lesson.teachers[0].run, Run).configuration.network
    classes, features = network_spec.classes, network_spec.features[0]
    shape = (classes, *image_CZYX.shape[1:])
    said, total = np.empty(shape, np.uint8), np.zeros(shape, np.float32) if len(alike) > 1 else None
    for tiling, some in alike.items():
        scorer = Scorer(some, classes, device, probabilities=True, activation="sigmoid" if regions else "softmax")
        needed = sums_bytes(tiling, classes, shape[1:])
        ways = tilings(tiling, needed, features, classes, device, room_of(device))
        before = None if total is None else total.copy()
        share = len(some) / len(networks)
        until_it_fits(ways, partial(_listen, scorer, image_CZYX, said, total, before, share), device, report)
    if total is not None:
        for z in range(shape[1]):
            said[:, z] = to_8_bits(total[:, z])
    return said


def _listen(
    scorer: Scorer, image_CZYX: np.ndarray, said: np.ndarray, total: np.ndarray | None, before: np.ndarray | None,
    share: float, way: Tiling,
) -> None:  # fmt: skip
    """Fill `said`, or `total` with a share of the scores on top of what it was `before`, block by block."""
    start = 0
    for block in score_blocks(scorer, torch.from_numpy(image_CZYX), way):
        rows = slice(start, start := start + block.shape[1])
        if total is None or before is None:
            said[:, rows] = to_8_bits(block.cpu().numpy())
        else:
            total[:, rows] = before[:, rows] + block.cpu().numpy() * share


def _input(source: Source, configuration: Configuration, classes: int) -> np.ndarray:
    """What the network sees of a whole case; in a cascade with the previous stage's labels as one channel per class."""
    z, y, x = source.shape
    image_CZYX, _ = source.read(((0, z), (0, y), (0, x)))
    if configuration.previous is None:
        return image_CZYX
    previous_ZYX = image_CZYX[-1].astype(np.int16)
    return np.concatenate((image_CZYX[:-1], one_hot(previous_ZYX, classes)))


def _key(teachers: Sequence[ModelLayout]) -> str:
    """Changes with the teachers' weights, whatever their names and order."""
    content = sorted(hashlib.blake2b(model.weights.read_bytes(), digest_size=8).hexdigest() for model in teachers)
    return hashlib.blake2b(f"{LARGEST_LOGIT}{''.join(content)}".encode(), digest_size=8).hexdigest()
