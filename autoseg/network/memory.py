"""The memory to plan for, and how much of it one training step needs.

That is measured on the device, or simulated. A budget names what one process may hold on a device in all: tensors, the
allocator's slack, workspaces and the CUDA context. `measurer(budget)` returns a function with the same meaning, so the
planner compares like with like.
"""

import gc
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import pynvml
import torch

from autoseg.errors import UserError
from autoseg.network import simulate as simulation
from autoseg.network.device import Device, native_precision, pick, set_up
from autoseg.network.label_kinds import Labelling
from autoseg.network.pieces import ran_out
from autoseg.network.simulate import Reading
from autoseg.records import Budget, Configuration

MIB, GIB = 2**20, 2**30
UNITS = {"MB": MIB, "MIB": MIB, "M": MIB, "GB": GIB, "GIB": GIB, "G": GIB, "TB": 1024 * GIB, "TIB": 1024 * GIB}
"""Cards are named in powers of two: an "11 GB" card has 11 x 2^30 bytes, so GB and GiB mean the same here."""

RESERVE_BYTES = 256 * MIB
"""Left free on every card: what a desktop, ECC and the driver take between planning and training."""
CONTEXT_BYTES = 640 * MIB
"""A process' CUDA context and kernels, which torch does not count; on an H100 (torch 2.11, CUDA 13) nearly the same for
networks of every size (docs/benchmarks.md). Others tell of 287 to 667 MB (pytorch PR #86509, #107667)."""
CUBLAS_BYTES = 8 * MIB
"""Workspace of cuBLAS, from the caching allocator (pytorch #95668)."""
MARGIN = 0.08
"""Copies inside kernels (contiguous gradients) and rounding that the simulation does not see. With it 24 networks on an
H100 held 0.6 to 8 % less than is counted (`python bench/memory.py --device cuda`)."""
CPU_HEAP = 1.66
"""Resident bytes per live byte on a CPU: glibc cannot use every freed block again. 1.39 to 1.66 after five steps in
fp32, with and without device.keep_freed_memory, for 40x56x40, 16x64x64 and 128x128 (glibc 2.36); the largest counts."""
CPU_MOST_BYTES = 8 * GIB
"""Budget of a CPU when nothing is asked for: this, or half of the memory the process may use if that is less."""
UNKNOWN_RAM_BYTES = 2 * CPU_MOST_BYTES
"""Where the system does not say how much there is."""
CGROUPS, OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
WARM_STEPS = 2
MEASURED_STEPS = 2

Source = Literal["measured", "simulated"]


# ------------------------------------------------------------------------------------------------ the budget


def budget_for(memory: str | None = None, device: str | None = None) -> Budget:
    """The memory to plan for.

    Args:
        memory: such as "11GB" or "8000MB" (GB = GiB = 2^30 bytes, as cards are named); None: what `device` has free.
        device: "cuda:1", "cpu"; None with `memory`: a CUDA card of that size that need not be there; None without: the
            first GPU if there is one, else the CPU.

    Raises UserError for a size or device that makes no sense or is not there.
    """
    asked = None if memory is None else parse_bytes(memory)
    if asked is not None and device is None:
        return _budget("cuda", asked, asked - RESERVE_BYTES)
    chosen = pick(device).torch_device
    if chosen.type == "cuda":
        card = _card(chosen)
        total, driver = card.total_bytes, card.driver
        free = total - card.others_bytes
        what = f"{chosen} has {_text(free)} free of {_text(total)}"
    else:
        total, driver = allowed_ram_bytes(), ""
        free = total
        what = f"this machine allows {_text(free)}"
    if asked is not None and asked > total:
        raise UserError(
            f"--memory {memory}: {what}.",
            fix="Ask for less, or leave --device out to plan for a card that is not here.",
        )
    if chosen.type == "cuda":
        return _budget(str(chosen), total, min(free, asked or free) - RESERVE_BYTES, driver, native_precision(chosen))
    return _budget(str(chosen), total, asked or min(CPU_MOST_BYTES, total // 2), "", native_precision(chosen))


def parse_bytes(text: str, option: str = "--memory") -> int:
    """ "11GB" -> bytes; see `UNITS`. Raises UserError for anything without a unit, and for zero or less."""
    fix = "Write a positive number and a unit, such as 11GB or 8000MB (1GB = 2^30 bytes)."
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if match is None or match[2].upper() not in UNITS:
        raise UserError(f"{option} {text} is not an amount of memory.", fix=fix)
    size = int(float(match[1]) * UNITS[match[2].upper()])
    if size <= 0:
        raise UserError(f"{option} {text} is no memory at all.", fix=fix)
    return size


def allowed_ram_bytes(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> int:
    """Memory this process may use: the machine's, or the least limit of its cgroups (version 1 or 2) and theirs."""
    limits = [
        bytes_in(group / name) for group in cgroups(root, own) for name in ("memory.max", "memory.limit_in_bytes")
    ]
    return min([machine_ram_bytes(), *(limit for limit in limits if limit is not None)])


def cgroups(root: Path = CGROUPS, own: Path = OWN_CGROUP) -> tuple[Path, ...]:
    """Folders of the cgroups (version 1 or 2) that this process is in: a job's limit lies above its tasks."""
    places = [Path()]
    for line in own.read_text().splitlines() if own.is_file() else ():
        path = Path(line.split(":", 2)[-1].lstrip("/"))
        places += [path, *path.parents]
    folders = (folder for place in dict.fromkeys(places) for folder in (root / place, root / "memory" / place))
    return tuple(folder for folder in folders if folder.is_dir())


def bytes_in(file: Path) -> int | None:
    """The number that a file of the system holds; None where there is no file, or no limit."""
    text = file.read_text().strip() if file.is_file() else ""
    return int(text) if text.isdigit() else None


def machine_ram_bytes() -> int:
    """RAM of the machine; `UNKNOWN_RAM_BYTES` where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # such as on Windows, which has no sysconf
        return UNKNOWN_RAM_BYTES


def anywhere(budget: Budget) -> Budget:
    """The same device without its number: steps are simulated for it then, so it need not be here."""
    return budget.model_copy(update={"device": budget.device.partition(":")[0]})


def _budget(device: str, total: int, budget: int, driver: str = "", precision: str = "") -> Budget:
    if budget <= 0:
        name = "a CUDA card" if device == "cuda" else device
        raise UserError(
            f"{_text(total)} on {name} leaves nothing to train with after {_text(RESERVE_BYTES)} in reserve"
            " and what other processes hold.",
            fix="Free memory on the device or give more with --memory.",
        )
    return Budget(
        device=device, total_bytes=total, budget_bytes=budget, driver=driver, torch_version=str(torch.__version__),
        precision=precision,
    )  # fmt: skip


def _text(size: int) -> str:
    return f"{size / GIB:.2f} GB" if size >= GIB / 10 else f"{size / MIB:.3g} MB"


# ------------------------------------------------------------------------------------------------ bytes of a step


def measurer(
    budget: Budget, labelling: Labelling = Labelling()
) -> tuple[Callable[[Configuration], int], Source]:
    """The function that says how many bytes of `budget` one training step needs, and where its figures come from.

    A numbered CUDA device ("cuda:0") is measured; the CPU and a card that is not there ("cuda") are simulated.
    """
    kind, _, number = budget.device.partition(":")
    if kind == "cuda" and number:
        device = pick(budget.device)
        return lambda configuration: measure_on_device(configuration, device, labelling), "measured"
    device_type = "cuda" if kind == "cuda" else "cpu"
    precision = "bf16" if kind == "cuda" else native_precision(torch.device(kind))
    return lambda c: needed_bytes(simulation.replay(c, precision, device_type, labelling), device_type), "simulated"


def needed_bytes(simulated: Reading, device_type: str = "cuda") -> int:
    """What a device must hold for a step that was simulated.

    CUDA: what the caching allocator would reserve with workspaces, cuBLAS and the margin, and the context. CPU: live
    tensors with the copies its library makes, and what the heap keeps; the interpreter and the data come on top.
    """
    if device_type == "cpu":
        return int(simulated.peak_with_copies_bytes * CPU_HEAP)
    return int((simulated.reserved_bytes + CUBLAS_BYTES) * (1 + MARGIN)) + CONTEXT_BYTES


def compare(configuration: Configuration, device: Device, labelling: Labelling = Labelling()) -> tuple[int, int]:
    """(simulated, measured) bytes of one training step on a device that is there.

    CUDA: what the card must hold in all. CPU: torch's own count of live bytes; takes two real steps of this size.
    """
    device_type = device.torch_device.type
    reading = simulation.replay(configuration, device.precision, device_type, labelling)
    if device.is_cuda:
        return needed_bytes(reading, device_type), measure_on_device(configuration, device, labelling)
    return reading.peak_with_copies_bytes, simulation.real_cpu_peak(configuration, device.precision, labelling)


def measure_on_device(configuration: Configuration, device: Device, labelling: Labelling = Labelling()) -> int:
    """Bytes this process holds on a CUDA card while it trains: what its allocator reserves at most, and the context.

    A step that does not fit gives what the simulation says it needs, and in any case more than the card has: searches
    go on from such a number, where the card's size would tell them nothing. Memory of other processes is no part of
    it. The step runs eager; compiled, it is expected to need less.
    """
    card = device.torch_device
    try:
        return device_peaks(configuration, device, labelling=labelling)[1] + context_bytes(card)
    except RuntimeError as error:  # torch.OutOfMemoryError is one
        if not ran_out(error):
            raise
    _clean(card)  # until here the error held what the step had got
    beyond = torch.cuda.mem_get_info(card)[1] + CONTEXT_BYTES
    return max(beyond, needed_bytes(simulation.replay(configuration, device.precision, "cuda", labelling)))


def device_peaks(
    configuration: Configuration, device: Device, steps: int = MEASURED_STEPS, labelling: Labelling = Labelling()
) -> tuple[int, int]:
    """(allocated, reserved) bytes at the peak of `steps` warm training steps on a CUDA card, workspaces included.

    Warm-up steps search for algorithms and make the optimizer's state; their peak is forgotten. No memory stays.
    Raises torch.OutOfMemoryError, or a RuntimeError of CUDA's libraries (`pieces.ran_out`), when a step does not fit.
    """
    card = device.torch_device
    set_up(device)
    _clean(card)
    step = None
    try:
        step = simulation.make_step(configuration, device, labelling)
        for _ in range(WARM_STEPS):
            step.run()
        torch.cuda.synchronize(card)
        torch.cuda.empty_cache()  # what only the search for algorithms needed
        torch.cuda.reset_peak_memory_stats(card)
        for _ in range(steps):
            step.run()
        torch.cuda.synchronize(card)
        return torch.cuda.max_memory_allocated(card), torch.cuda.max_memory_reserved(card)
    finally:
        del step
        _clean(card)


def _clean(card: torch.device) -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(card)


# ------------------------------------------------------------------------------------------------ the card


class _Card(NamedTuple):
    """What a card's driver tells; `own_bytes` is None where it does not know this process."""

    total_bytes: int
    used_bytes: int
    own_bytes: int | None
    driver: str

    @property
    def others_bytes(self) -> int:
        return max(0, self.used_bytes - (self.own_bytes or 0))


def _card(card: torch.device) -> _Card:
    """Ask NVML; where it is missing, CUDA, which knows no processes.

    In a container the driver's process numbers are not ours: own_bytes is then what torch has reserved, so that our
    context counts as another's, on the safe side.
    """
    reserved = torch.cuda.memory_reserved(card)
    known = torch.cuda.get_device_properties(card)
    try:
        told = _ask_nvml(str(known.uuid))
    except pynvml.NVMLError:
        free, total = torch.cuda.mem_get_info(card)
        return _Card(total, total - free, reserved, "")
    told = told._replace(total_bytes=min(told.total_bytes, known.total_memory))  # NVML counts what CUDA never gives
    return told if told.own_bytes is not None else told._replace(own_bytes=reserved)


def _ask_nvml(uuid: str) -> _Card:
    pynvml.nvmlInit()
    try:
        # by UUID: CUDA_VISIBLE_DEVICES renumbers the cards for torch but not for NVML
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        processes = pynvml.nvmlDeviceGetComputeRunningProcesses(handle)
        own = next((p.usedGpuMemory for p in processes if p.pid == os.getpid()), None)
        return _Card(int(memory.total), int(memory.used), own, str(pynvml.nvmlSystemGetDriverVersion()))
    finally:
        pynvml.nvmlShutdown()


def context_bytes(card: torch.device) -> int:
    """What this process holds on the card beside torch's allocator; `CONTEXT_BYTES` where the driver does not tell."""
    try:
        own = _ask_nvml(str(torch.cuda.get_device_properties(card).uuid)).own_bytes
    except pynvml.NVMLError:
        own = None
    return CONTEXT_BYTES if own is None else max(0, own - torch.cuda.memory_reserved(card))
