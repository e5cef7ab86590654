"""Where the sums of the sliding window live, decided from sizes before anything is tried."""

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
from autoseg.network.memory import allowed_ram_bytes

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
    """What is free now on the device and in RAM."""
    free = torch.cuda.mem_get_info(device.torch_device)[0] if device.is_cuda else 0
    return Room(free, free_ram_bytes())


def free_ram_bytes() -> int:
    """What this process may still take: what the system calls available, within the limits of its cgroup."""
    info = Path("/proc/meminfo")
    for line in info.read_text().splitlines() if info.is_file() else ():
        if line.startswith("MemAvailable:"):
            return min(int(line.split()[1]) * 1024, allowed_ram_bytes())
    return allowed_ram_bytes()


def accumulator_bytes(channels: int, size: Sequence[int], patch_voxels: Sequence[int], slices: int = 1) -> int:
    """Bytes of the sums over an image of `size` (patch axes): as many rows as the patch has."""
    rows = min(patch_voxels[0], max(size[0], patch_voxels[0]))
    rest = prod(max(a, b) for a, b in zip(size[1:], patch_voxels[1:], strict=True))
    return 4 * rest * rows * (channels * slices + 1)


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
