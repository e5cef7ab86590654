"""How the tiles of an image are computed, also where a GPU runs out of memory.

As fast as memory allows, and with less of it where it runs out.
"""

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from autoseg.errors import UserError
from autoseg.events import Report, Warned
from autoseg.network.accumulators import Room, accumulator_bytes, choose_place, samples_that_fit
from autoseg.network.device import Device
from autoseg.network.pieces import ON_THE_HOST, ran_out
from autoseg.network.sliding import SLICES_PER_PASS, Tiling

Result = TypeVar("Result")


def tilings(
    tiling: Tiling, needed_bytes: int, features: int, channels: int, device: Device, room: Room
) -> tuple[Tiling, ...]:
    """The same tiles, the fastest way first, then what takes less of a GPU: one tile at a time, sums in RAM or on disk.

    Args:
        needed_bytes: of the sums, see `accumulator_bytes`. features: of the network's first stage. channels: scores.
    """
    place = choose_place(needed_bytes, room)
    used = needed_bytes if place == "device" else 0
    samples = samples_that_fit(tiling.patch_voxels, features, channels, device, room, used)
    fastest = replace(tiling, samples=samples, place=place)
    single = replace(fastest, samples=1)
    on_host = replace(single, place=choose_place(needed_bytes, replace(room, device=0)))
    return tuple(dict.fromkeys((fastest, single, on_host)))


def sums_bytes(tiling: Tiling, channels: int, size_ZYX: Sequence[int]) -> int:
    """Bytes of the sums of `score_blocks` over an image, which a network with a 2D patch sees some slices at a time."""
    axes = len(tiling.patch_voxels)
    slices = 1 if axes == 3 else min(SLICES_PER_PASS, size_ZYX[0])
    return accumulator_bytes(channels, size_ZYX[-axes:], tiling.patch_voxels, slices, whole=axes == 2)


def until_it_fits(
    tried: Sequence[Tiling], compute: Callable[[Tiling], Result], device: Device, report: Report
) -> Result:
    """`compute` with the first of these ways for which there is enough memory; each attempt begins anew.

    Raises:
        UserError: there is not enough for any. MemoryError: RAM ran out.
    """
    for number, tiling in enumerate(tried):
        try:
            return compute(tiling)
        except RuntimeError as error:  # torch.OutOfMemoryError is one
            if ON_THE_HOST in str(error):
                raise MemoryError(str(error)) from error
            if not ran_out(error):
                raise
        gc.collect()  # until here the error held what the attempt had got
        torch.cuda.empty_cache()
        if number + 1 < len(tried):
            report(Warned(f"Memory of {device.name} ran out; once more {_described(tried[number + 1])}."))
    raise UserError(
        f"memory of {device.name} ran out, even one tile at a time.",
        fix="End other programs on it, or take another: --device cpu.",
    )


def _described(tiling: Tiling) -> str:
    where = {"device": "", "ram": " and sums in RAM", "memory map": " and sums on disk"}[tiling.place]
    return f"with one tile at a time{where}"
