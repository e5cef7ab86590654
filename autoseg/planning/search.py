"""The largest patch, then the largest batch, whose step fits the budget.

Few readings are taken. A reading is the peak memory of one training step, taken by a function from outside (`measure`);
this file knows neither CUDA nor fake tensors. Each reading is made once, and what was read predicts what was not: the
step's peak is nearly a fixed part (weights, gradients, optimizer state) plus a part proportional to the elements of the
feature maps.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import floor, log

from autoseg.events import Advanced, Report, silent
from autoseg.planning.cost import elements, parameters
from autoseg.planning.wording import gigabytes, voxels
from autoseg.records import Attempt, Configuration, NetworkSpec, Plan

Patch = tuple[int, ...]
Measure = Callable[[Configuration], int]
"""Bytes that one training step of the configuration needs at its peak; above the budget if it did not fit at all."""
Draft = Callable[[Patch, int], Configuration]
"""The full configuration that belongs to a patch and a batch size."""

SMALLEST_BATCH = 2
BYTES_PER_PARAMETER = 16
"""Weight, gradient and the two moments of AdamW, fp32."""
CONTEXT_BYTES = 640 * 2**20
"""What a CUDA process holds beside its tensors; part of every reading for a card."""
PRIOR_BYTES_PER_ELEMENT = 6.5
"""A plain U-Net on 128^3, batch 2, bf16, reserves 6.9 GiB with workspaces; the first reading replaces this."""
SURELY_FITS = 0.5
"""Below this share of the budget, by prediction, the largest patch is tried at once with the largest batch."""
CLOSE_ENOUGH = 0.05
"""A batch is not raised further when less than this share of it could be gained."""
SURELY_TOO_LARGE = 1.15
"""Above this share of the budget, by prediction from a neighbouring patch, a patch counts as too large unread."""


@dataclass(slots=True)
class Readings:
    """What was measured so far for one configuration, and the memory to stay below."""

    name: str
    measure: Measure
    budget_bytes: int
    report: Report = silent
    context_bytes: int = 0
    taken: dict[tuple[NetworkSpec, Patch, int], Attempt] = field(default_factory=dict)

    def take(self, configuration: Configuration) -> Attempt:
        """Measure one step, or return the reading made before."""
        key = (configuration.network, configuration.patch_voxels, configuration.batch_size)
        if key not in self.taken:
            peak = self.measure(configuration)
            self.taken[key] = Attempt(
                patch_voxels=configuration.patch_voxels,
                batch_size=configuration.batch_size,
                peak_bytes=peak,
                fits=peak <= self.budget_bytes,
            )
            note = f"{voxels(configuration.patch_voxels)}, batch {configuration.batch_size}: {gigabytes(peak)}"
            self.report(Advanced(f"measuring {self.name}", done=len(self.taken), of=0, note=note))
        return self.taken[key]

    def predict(self, configuration: Configuration) -> float:
        """Bytes expected for a configuration, from the reading with the most similar number of elements.

        Readings that fit come first: one that did not may have failed before its peak.
        """
        spec, batch = configuration.network, configuration.batch_size
        wanted = elements(spec, configuration.patch_voxels) * batch
        near, gap = PRIOR_BYTES_PER_ELEMENT, float("inf")
        some_fit = any(attempt.fits for attempt in self.taken.values())
        for (read_spec, patch, read_batch), attempt in self.taken.items():
            if some_fit and not attempt.fits:
                continue
            read = elements(read_spec, patch) * read_batch
            if abs(log(read / wanted)) < gap:
                near = max(0.1, (attempt.peak_bytes - self.fixed(read_spec)) / read)
                gap = abs(log(read / wanted))
        return self.fixed(spec) + near * wanted

    def fixed(self, spec: NetworkSpec) -> int:
        """Bytes that do not grow with patch and batch."""
        return self.context_bytes + BYTES_PER_PARAMETER * parameters(spec)

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        return tuple(self.taken.values())


@dataclass(frozen=True, slots=True)
class Fit:
    """The patch and batch size found; `too_large` is the next larger patch, if there is one, with its bytes at batch 2,
    and whether these were read or predicted."""

    patch_voxels: Patch
    batch_size: int
    peak_bytes: int
    too_large: tuple[Patch, float, bool] | None
    batch_cap: int


def fit(chain: Sequence[Patch], cap: Callable[[Patch], int], draft: Draft, readings: Readings) -> Fit | None:
    """Search `chain` (largest patch first) at batch 2, then raise the batch up to `cap(patch)`.

    Returns None when even the smallest patch does not fit; its reading is then the last one taken.
    """
    first, most = chain[0], cap(chain[0])
    if most > SMALLEST_BATCH and readings.predict(draft(first, most)) <= SURELY_FITS * readings.budget_bytes:
        attempt = readings.take(draft(first, most))
        if attempt.fits:
            return Fit(first, most, attempt.peak_bytes, None, most)
    index = largest_patch(chain, draft, readings)
    if index is None:
        return None
    patch = chain[index]
    batch, attempt = largest_batch(patch, cap(patch), draft, readings)
    too_large = _need(chain[index - 1], draft, readings) if index else None
    return Fit(patch, batch, attempt.peak_bytes, too_large, cap(patch))


def once(measure: Measure) -> Measure:
    """`measure`, which answers from memory when another configuration had the same network, patch and batch."""
    known: dict[tuple[NetworkSpec, Patch, int], int] = {}

    def remembering(configuration: Configuration) -> int:
        key = (configuration.network, configuration.patch_voxels, configuration.batch_size)
        if key not in known:
            known[key] = measure(configuration)
        return known[key]

    return remembering


class NewReadingAsked(LookupError):
    """The rules ask for a training step whose memory a saved plan does not know."""


def recorded(plan: Plan) -> Measure:
    """A measure that looks readings up in a saved plan; raises NewReadingAsked for any other step."""
    readings = {
        (configuration.name, attempt.patch_voxels, attempt.batch_size): attempt.peak_bytes
        for configuration in plan.configurations
        for attempt in configuration.memory.attempts
    }

    def measure(configuration: Configuration) -> int:
        key = (configuration.name, configuration.patch_voxels, configuration.batch_size)
        if key not in readings:
            raise NewReadingAsked(f"{key} is not among the plan's readings: run `make plans` and review the diff")
        return readings[key]

    return measure


def largest_patch(chain: Sequence[Patch], draft: Draft, readings: Readings) -> int | None:
    """Index of the first patch of `chain` that fits at batch 2; the one before it was read or predicted too large."""
    too_large, fits = -1, len(chain)
    rounds = 0
    while fits - too_large > 1:
        rounds += 1
        guess = _first_predicted_to_fit(chain, too_large + 1, fits, draft, readings)
        if guess == fits and fits < len(chain):
            before = readings.predict(draft(chain[fits - 1], SMALLEST_BATCH))
            if before > SURELY_TOO_LARGE * readings.budget_bytes:
                break
        guess = min(guess, fits - 1)
        if rounds > 4:
            guess = (too_large + fits) // 2
        if readings.take(draft(chain[guess], SMALLEST_BATCH)).fits:
            fits = guess
        else:
            too_large = guess
    return fits if fits < len(chain) else None


def largest_batch(patch: Patch, cap: int, draft: Draft, readings: Readings) -> tuple[int, Attempt]:
    """The largest batch size up to `cap` that fits, or at most 5 % less, and its reading; 2 is known to fit.

    Two readings give slope and offset of the line that the next guess lies on; the answer itself is always a reading.
    """
    fixed = readings.fixed(draft(patch, SMALLEST_BATCH).network)
    seen: dict[int, Attempt] = {SMALLEST_BATCH: readings.take(draft(patch, SMALLEST_BATCH))}
    largest, beyond = SMALLEST_BATCH, max(cap, SMALLEST_BATCH) + 1
    while beyond - largest > 1:
        line, is_read = _line(seen, fixed, readings.budget_bytes)
        if line(largest + 1) > readings.budget_bytes * (1.0 if is_read else SURELY_TOO_LARGE):
            break
        guess = max(largest + 1, floor((readings.budget_bytes - line(0)) / (line(1) - line(0))))
        if guess >= beyond:
            guess = beyond - 1 if beyond > cap else (largest + beyond) // 2
        if min(guess, beyond - 1) - largest < CLOSE_ENOUGH * largest and len(seen) > 1:
            break
        seen[guess] = readings.take(draft(patch, guess))
        if seen[guess].fits:
            largest = guess
        else:
            beyond = guess
    return largest, seen[largest]


def _first_predicted_to_fit(chain: Sequence[Patch], low: int, high: int, draft: Draft, readings: Readings) -> int:
    """First index in low..high-1 whose prediction fits, else `high`; predictions fall along the chain."""
    while low < high:
        middle = (low + high) // 2
        if readings.predict(draft(chain[middle], SMALLEST_BATCH)) <= readings.budget_bytes:
            high = middle
        else:
            low = middle + 1
    return low


def _line(seen: dict[int, Attempt], fixed: int, budget_bytes: int) -> tuple[Callable[[int], float], bool]:
    """Bytes over batch size, and whether two readings support it: through the two largest that fit, else through one
    and the smallest that did not, else through one and the fixed part at batch 0.

    A reading of more than twice the budget is no reading: the step may have failed before its peak.
    """
    points = sorted((batch, attempt.peak_bytes) for batch, attempt in seen.items() if attempt.fits)[-2:]
    too_large = sorted(
        (batch, a.peak_bytes) for batch, a in seen.items() if budget_bytes < a.peak_bytes <= 2 * budget_bytes
    )
    points = sorted([*points, *too_large[:1]] if len(points) == 1 else points)
    is_read = len(points) == 2
    (batch_a, bytes_a), (batch_b, bytes_b) = points if is_read else ((0, fixed), points[0])
    slope = max(1.0, (bytes_b - bytes_a) / (batch_b - batch_a))
    return lambda batch: bytes_b + slope * (batch - batch_b), is_read


def _need(patch: Patch, draft: Draft, readings: Readings) -> tuple[Patch, float, bool]:
    configuration = draft(patch, SMALLEST_BATCH)
    known = readings.taken.get((configuration.network, patch, SMALLEST_BATCH))
    return (patch, known.peak_bytes, True) if known else (patch, readings.predict(configuration), False)
