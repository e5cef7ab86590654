"""Where the sums of the sliding window live: on the GPU, in RAM or in a file.

That is decided from sizes before anything is tried.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from autoseg.network.device import Device
from autoseg.network.memory import CGROUPS, OWN_CGROUP, bytes_in, cgroups, machine_ram_bytes

Place = Literal["device", "ram", "memory map"]
MOST_OF_DEVICE = 0.5
MOST_OF_RAM = 0.6
MOST_SAMPLES = 32
ACTIVATIONS_PER_FEATURE = 6
"""Tensors of the first stage's size that inference holds at its peak, skips of all stages included (an upper guess)."""


@dataclass(frozen=True)
class Room:
    """Bytes that are free; `device` is 0 without a GPU."""

    device: int
    ram: int


def room_of(device: Device) -> Room:
    """What is free now on the device, with what torch's allocator holds and does not use, and in RAM."""
    if not device.is_cuda:
        return Room(0, free_ram_bytes())
    card = device.torch_device
    unused = torch.cuda.memory_reserved(card) - torch.cuda.memory_allocated(card)
    return Room(torch.cuda.mem_get_info(card)[0] + unused, free_ram_bytes())


def free_ram_bytes(root: Path = CGROUPS, own: Path = OWN_CGROUP, info: Path = Path("/proc/meminfo")) -> int:
    """What this process may still take: what the system calls available, and what its cgroups have left."""
    free = [machine_ram_bytes()]
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    for group in cgroups(root, own):
        limit = bytes_in(group / "memory.max") or bytes_in(group / "memory.limit_in_bytes")
        if limit is not None:
            used = bytes_in(group / "memory.current") or bytes_in(group / "memory.usage_in_bytes") or 0
            free.append(max(0, limit - max(0, used - _droppable(group / "memory.stat"))))
    return min(free)


def _droppable(stat: Path) -> int:
    """Bytes of files in a cgroup's memory that nobody reads: they give way, so they count as free."""
    found = dict(line.split() for line in stat.read_text().splitlines()) if stat.is_file() else {}
    return int(found.get("total_inactive_file", found.get("inactive_file", 0)))


def accumulator_bytes(
    channels: int, size: Sequence[int], patch_voxels: Sequence[int], slices: int = 1, whole: bool = False
) -> int:
    """Bytes of the sums over an image of `size` (patch axes): as many rows as the patch has.

    With `whole` the finished rows of these slices are collected beside them, as `score_blocks` does for 2D networks.
    """
    rows = min(patch_voxels[0], max(size[0], patch_voxels[0]))
    padded = [max(a, b) for a, b in zip(size, patch_voxels, strict=True)]
    sums = 4 * prod(padded[1:]) * rows * (channels * slices + 1)
    return sums + (4 * channels * slices * prod(padded) if whole else 0)


def choose_place(needed_bytes: int, room: Room) -> Place:
    """The fastest place that holds the sums and leaves room for the network."""
    if needed_bytes <= MOST_OF_DEVICE * room.device:
        return "device"
    return "ram" if needed_bytes <= MOST_OF_RAM * room.ram else "memory map"


def samples_that_fit(
    patch_voxels: Sequence[int], features: int, classes: int, device: Device, room: Room, used_bytes: int
) -> int:
    """Tiles and mirrorings per pass: enough to keep a GPU busy; one on a CPU, where more are no faster."""
    if not device.is_cuda:
        return 1
    width = 2 if device.precision != "fp32" else 4
    each = prod(patch_voxels) * (ACTIVATIONS_PER_FEATURE * features * width + 3 * 4 * classes)
    return max(1, min(MOST_SAMPLES, int(MOST_OF_DEVICE * (room.device - used_bytes)) // each))


def zeros(shape: Sequence[int], place: Place, device: torch.device) -> Tensor:
    """Zeros float32 in that place; a memory map is a file without a name, gone with the tensor."""
    if place == "memory map":
        with tempfile.TemporaryFile() as file:
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=tuple(shape)))
    return torch.zeros(tuple(shape), device=device if place == "device" else "cpu")


def described(place: Place, needed_bytes: int, device: Device) -> str:
    """One line for the user."""
    where = {"device": device.name, "ram": "RAM", "memory map": "a temporary file on disk"}[place]
    return f"Sums of the sliding window: {needed_bytes / 2**30:.2g} GiB in {where}."
