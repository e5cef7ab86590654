"""Where the time of training steps goes, and how near they are to full speed.

Full speed is that of this machine's matrix products.
"""

import time
from dataclasses import dataclass

import torch

from autoseg.network.device import DTYPES, Device
from autoseg.network.pieces import ran_out

PARTS = ("augment", "forward", "backward", "step")
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
MATMUL_SECONDS = 0.15
"""For so long matrix products are timed; the fastest counts."""
LEAST_PRODUCTS = 3
USUAL_SHARE = 0.1
"""Share of the speed of matrix products that an eager training step reaches on a GPU, for estimates: 5 to 8 % on an
H100 (docs/benchmarks.md), more on slower cards."""
LAUNCH_SECONDS = 0.015
"""What the host of a GPU needs at least to launch the kernels of an eager step, however small its patch: 14 to 30 ms
were read (docs/benchmarks.md)."""


class Stopwatch:
    """Seconds of the parts of steps. On CUDA they are those of the device, and only `read` waits for it."""

    def __init__(self, device: Device) -> None:
        self._device = device
        self._last = 0.0
        self._seconds: dict[str, float] = {}
        self._event: torch.cuda.Event | None = None
        self._laps: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []
        self.start()

    def start(self) -> None:
        """What comes until the next lap counts from here."""
        self._last = time.perf_counter()
        if self._device.is_cuda:
            self._event = self._now()

    def lap(self, part: str) -> None:
        """What was done since the last lap belongs to `part`."""
        if self._device.is_cuda and self._event is not None:
            event = self._now()
            self._laps.append((part, self._event, event))
            self._event = event
            return
        now = time.perf_counter()
        self._seconds[part] = self._seconds.get(part, 0.0) + now - self._last
        self._last = now

    def read(self) -> dict[str, float]:
        """Seconds of every part since the last reading."""
        if self._laps:
            torch.cuda.synchronize(self._device.torch_device)
        for part, first, last in self._laps:
            self._seconds[part] = self._seconds.get(part, 0.0) + first.elapsed_time(last) / 1000
        found, self._seconds, self._laps = self._seconds, {}, []
        return found

    def _now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device.torch_device))
        return event


@dataclass(frozen=True)
class Capacity:
    """What a step is measured against: operations that one sample needs, and operations per second of matrix products.

    `operations_per_second` is 0 where the device cannot be timed.
    """

    operations_per_sample: float = 0.0
    operations_per_second: float = 0.0

    def share(self, samples: int, seconds: float) -> float:
        """Share (0..1) of the matrix products' speed that so many samples in so many seconds come to; NaN: unknown."""
        if not self.operations_per_second or seconds <= 0:
            return float("nan")
        return self.operations_per_sample * samples / seconds / self.operations_per_second

    def seconds(self, samples: int, steps: int) -> float | None:
        """About how long so many samples in so many eager steps take on a GPU; None: unknown.

        At `USUAL_SHARE` of the speed of matrix products, or as fast as the host launches the steps.
        """
        if not self.operations_per_second:
            return None
        computed = self.operations_per_sample * samples / (USUAL_SHARE * self.operations_per_second)
        return max(computed, steps * LAUNCH_SECONDS)


def matmul_rate(device: Device) -> float:
    """Operations per second of the fastest large matrix product on `device` in its precision; under half a second.

    0 where it cannot be timed, for want of memory too.
    """
    try:
        return _matmul_rate(device)
    except RuntimeError as error:
        if not ran_out(error):
            raise
        return 0.0


def _matmul_rate(device: Device) -> float:
    kind = device.torch_device.type
    if kind not in MATMUL_SIZE:
        return 0.0
    size, dtype = MATMUL_SIZE[kind], DTYPES[device.precision]
    # noise: a GPU that multiplies constants draws less power and runs faster than it ever does in a training
    chance = torch.Generator(device.torch_device).manual_seed(0)
    left = torch.randn(size, size, device=device.torch_device, generator=chance).to(dtype)
    right = left.flip(0)
    times: list[float] = []
    until = time.perf_counter() + MATMUL_SECONDS
    while len(times) < LEAST_PRODUCTS or time.perf_counter() < until:
        start = time.perf_counter()
        torch.mm(left, right)
        if device.is_cuda:
            torch.cuda.synchronize(device.torch_device)
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
