"""Where training patches are read from: the device, RAM, or the cache on disk."""

from math import prod

import torch

from autoseg.cases.cache import CachedCase, open_case
from autoseg.events import Said
from autoseg.network.augment import enlarged_patch
from autoseg.network.distributed import share
from autoseg.network.memory import GIB, allowed_ram_bytes
from autoseg.network.patches import InMemory, Source, WithPrevious
from autoseg.network.patches_on_device import OnDevice
from autoseg.records import Configuration
from autoseg.steps.training.cascade import previous_label_maps, previous_on_grid
from autoseg.steps.training.teachers import with_teachers
from autoseg.steps.training.work import Work

RAM_SHARE = 0.25
"""Preprocessed cases are kept in RAM while they need less than this share of it, unless a limit was asked for."""
DEVICE_SHARE = 0.25
"""Of what is free on a GPU, and never what the planned step and the batches around it need."""
BATCHES_ON_DEVICE = 3
"""Batches that take a GPU's memory beside the cases: one that is read, one augmented from it, and the last one."""


def sources_of(work: Work, configuration: Configuration) -> dict[str, Source]:
    """The cases to read patches from, by id: on the GPU if all fit, else in RAM up to the limit, the rest on disk.

    With the previous stage's channel in a cascade. In a team every process keeps its own; they share the limits.
    """
    names = (*work.cases.train, *work.cases.validation)
    opened = {name: open_case(work.layout.cache(configuration.name), name) for name in names}
    limit = _limit_bytes(work)
    need = sum(bytes_of(case) for case in opened.values())
    sources: dict[str, Source] = {}
    alone = configuration.previous is None and work.lesson is None
    if alone and need <= min(_device_bytes(work, configuration), limit):
        where = work.device.torch_device
        for name, case in opened.items():
            image_CZYX, labels_ZYX = case.read()
            image = torch.from_numpy(image_CZYX).to(where)
            sources[name] = OnDevice(image, torch.from_numpy(labels_ZYX).to(where), case.locations)
        work.report(Said(f"{need / GIB:.2f} GB of preprocessed cases are kept on {work.device.name}."))
        return sources
    sources = held(opened, limit)
    on_disk = [name for name in opened if sources[name] is opened[name]]
    if on_disk:
        work.report(Said(
            f"{len(on_disk)} of {len(opened)} preprocessed cases ({need / GIB:.1f} GB in all, {limit / GIB:.1f} GB may "
            "be kept in memory) are read from disk, patch by patch."
        ))  # fmt: skip
    if configuration.previous is not None:
        sources = _with_previous(work, configuration, opened, sources)
    if work.lesson is None:
        return sources
    return with_teachers(
        work.layout, work.plan, configuration, work.lesson, work.cases.train, sources, work.device, work.report
    )


def held(opened: dict[str, CachedCase], limit_bytes: float) -> dict[str, Source]:
    """The cases in their order in RAM while they fit into the limit, the others on disk."""
    sources: dict[str, Source] = {}
    for name, case in opened.items():
        limit_bytes -= bytes_of(case)
        sources[name] = InMemory(*case.read(), case.locations) if limit_bytes >= 0 else case
    return sources


def bytes_of(case: CachedCase) -> int:
    """Memory that a whole case takes: float32 image, int16 labels."""
    z, y, x = case.shape
    return z * y * x * (4 * case.channels + 2)


def usual_limit_bytes() -> float:
    """What preprocessed cases may take of RAM where nobody asked for another limit."""
    return RAM_SHARE * allowed_ram_bytes()


def _limit_bytes(work: Work) -> float:
    if work.machine.cache_bytes is not None:
        return work.machine.cache_bytes / work.team.size
    return usual_limit_bytes() / work.team.size


def _device_bytes(work: Work, configuration: Configuration) -> float:
    if not work.device.is_cuda:
        return 0.0
    free = torch.cuda.mem_get_info(work.device.torch_device)[0]
    coming = BATCHES_ON_DEVICE * _batch_bytes(work, configuration)
    return max(0.0, min(DEVICE_SHARE * free, free - configuration.memory.peak_bytes - coming))


def _batch_bytes(work: Work, configuration: Configuration) -> int:
    """Of this process' share of a batch before it is augmented: float32 images, int16 labels."""
    samples = len(share(work.team, range(configuration.batch_size)))
    voxels = prod(enlarged_patch(configuration.train.augment, configuration.patch_voxels))
    return samples * voxels * (4 * configuration.network.in_channels + 2)


def _with_previous(
    work: Work, configuration: Configuration, opened: dict[str, CachedCase], sources: dict[str, Source]
) -> dict[str, Source]:
    unlabelled = work.lesson.unlabelled if work.lesson else ()
    wanted = [case for case in (*work.dataset.cases, *unlabelled) if case.id in opened]
    maps = previous_label_maps(
        work.run, work.plan, configuration, work.fold, wanted, work.device.name, work.report, work.team
    )
    return {
        name: WithPrevious(source, previous_on_grid(maps[name], opened[name].mark, work.plan, configuration))
        for name, source in sources.items()
    }
