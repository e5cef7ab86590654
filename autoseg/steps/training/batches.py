"""Batches for training and validation: drawn, read ahead, moved and augmented.

Threads read ahead; a batch is moved to the device and augmented there.
"""

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn

from autoseg.network import augment
from autoseg.network.device import Device, laid_out_for_eager, layout
from autoseg.network.distributed import ALONE, Team, add_up, share
from autoseg.network.label_kinds import IGNORED, Outputs
from autoseg.network.loop import Batch
from autoseg.network.patches import Place, Sampling, Source, draw_places, gather, generator_of
from autoseg.network.patches_on_device import OnDevice, gather_on_device
from autoseg.network.pieces import by_parts
from autoseg.network.sampling import LAG_STEPS, Holders, hard_rates, holders
from autoseg.parallel import own_cores
from autoseg.records import Configuration

TRAINING, VALIDATION, AUGMENTATION = 0, 1, 2
"""Purposes that keep the random numbers of a step apart."""
VALIDATION_SHARE = 0.1
"""Validation batches per training batch of an epoch; a forward pass costs a third of a step."""

MOST_AHEAD = LAG_STEPS // 2
"""Steps that are read ahead at most."""

Read = tuple[Tensor, Tensor, augment.Drawn, Sequence[Place], "Counter[str]"]


class Batches:
    """Where batches come from. A context manager: its reading threads end with the block.

    Args:
        channels: of the image; a cascade reads one more, the previous stage's labels, and makes them one-hot.
        classes: background included.
        workers: reading threads; None takes the allowed cores, at most 8.
        class_rates: of the foreground classes (`sampling.rates_of`), for the modes of sampling that have rates.
        team: the processes that share every batch. All draw the whole batch, and each reads and augments its samples.
        teachers: the last channels of the training cases are what teachers say, one per class, or one that is 1 and one
            per region; the labels of a batch then hold them, moved like the image, see network/distillation.py.
        regions: label indices of each output of the network, where these are regions.
        annotated: per case of which somebody drew only a part, whether that holds each output.
        compiled: the batches are for a compiled network.
        ignores: outside an image nothing is learned, as where nobody annotated: few marks would be lost in background.
    """

    def __init__(
        self, configuration: Configuration, seed: int, channels: int, classes: int, device: Device,
        workers: int | None, team: Team = ALONE, class_rates: tuple[float, ...] = (), teachers: bool = False,
        regions: tuple[tuple[int, ...], ...] = (), annotated: Mapping[str, tuple[bool, ...]] | None = None,
        compiled: bool = False, ignores: bool = False,
    ) -> None:  # fmt: skip
        train = configuration.train
        self._patch = configuration.patch_voxels
        self._enlarged = augment.enlarged_patch(train.augment, self._patch)
        self._fitted = False
        self._spec = train.augment
        self._validation = Sampling(self._patch, configuration.batch_size, train.foreground_share, seed)
        self._sampling = replace(self._validation, mode=train.sampling, class_rates=class_rates)
        self._held: Holders = {}
        self._cases_with: dict[str, frozenset[int]] = {}
        self._drawn: Counter[str] = Counter()
        self._validation_parts = 1
        self._channels, self._classes, self._cascade = channels, classes, configuration.previous is not None
        self._outputs, self._annotated = Outputs(classes, regions), annotated or {}
        self._device, self._team = device, team
        self._outside = IGNORED if ignores else 0
        self._said = (1 + len(regions) if regions else classes) if teachers else 0
        self._format = layout(configuration.dimension, device, compiled)
        self._eager_format = layout(configuration.dimension, device)
        self._ahead = min(MOST_AHEAD, workers or own_cores())
        self._threads = ThreadPoolExecutor(self._ahead)
        self._coming: deque[tuple[int, Future[Read]]] = deque()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._threads.shutdown(wait=True, cancel_futures=True)

    def draw(
        self, sources: Sequence[Source], ids: Sequence[str], step: int, history: Sequence[Mapping[str, float]] = ()
    ) -> Batch:
        """The augmented training batch of a step; the next ones are read meanwhile.

        `history` holds the rows of the epochs so far, whose Dice mode `hard` follows.
        """
        start, waited = time.perf_counter(), 0.0
        if all(isinstance(source, OnDevice) for source in sources):
            # only launches kernels: a thread that did it meanwhile would stand in the way of the step's
            self._prepare(sources)
            image, labels, drawn, places, drawn_for = self._read(sources, step, self._sampling_at(step, history))
        else:
            image, labels, drawn, places, drawn_for = self._next(sources, step, history)
            waited = time.perf_counter() - start
        moved_image, moved_labels = self._to_device(image), self._to_device(labels)
        previous = said = None
        if self._said:
            moved_image, said = moved_image[:, : -self._said], moved_image[:, -self._said :]
        if self._cascade:
            moved_image, previous = moved_image[:, :-1], moved_image[:, -1].to(torch.int16)
        result, result_labels = augment.apply(
            moved_image, moved_labels, drawn, self._patch, self._classes, self._outside
        )
        if previous is not None:
            nothing = torch.zeros_like(moved_image[:, :1])
            _, stage = augment.apply(nothing, previous, _only_moved(drawn), self._patch, self._classes)
            result = torch.cat((result, _one_hot(stage, self._classes)), 1)
        if said is not None:
            said = augment.move(said, drawn, self._patch)
            result_labels = torch.cat((result_labels.unsqueeze(1).float(), said), 1)
        cases = tuple(ids[place.case] for place in places)
        annotated_BK = self._annotated_in(share(self._team, cases))
        result = result.contiguous(memory_format=self._format)
        self._drawn += drawn_for  # last: a batch for which memory runs out is asked for once more
        spent = time.perf_counter() - start - waited
        return Batch(result, result_labels, cases, waited, spent, annotated_BK)

    def go_eager(self) -> None:
        """From now on the batches are for a network that is not compiled."""
        self._format = self._eager_format

    def _annotated_in(self, cases: Sequence[str]) -> Tensor | None:
        """(B, K) bool: what was drawn in these cases; None where nothing was left out in any case of the data set."""
        if not self._annotated:
            return None
        everything = (True,) * (self._outputs.foreground + (not self._outputs.regions))
        rows = [self._annotated.get(case, everything) for case in cases]
        return self._to_device(np.array(rows))

    @torch.no_grad()
    def validation_dice(
        self, network: nn.Module, sources: Sequence[Source], steps: int, device: Device | None = None,
        ids: Sequence[str] = (),
    ) -> list[float]:  # fmt: skip
        """Dice per foreground class (or region) over patches of unseen cases, pooled; NaN for one in none of them.

        Pooled over patches, so it is no substitute for the scores of whole images; it steers the best checkpoint. The
        patches are the same in every epoch; a team shares them. `device` may say another precision, `ids` which cases
        these are, where some were annotated in part.
        """
        totals = torch.zeros(3, self._outputs.foreground, device=self._device.torch_device)
        forward: Callable[[Tensor], Tensor] = network
        if self._eager_format != self._format:
            forward = laid_out_for_eager(network, len(self._patch), self._device)
        for number in share(self._team, range(max(1, round(steps * VALIDATION_SHARE)))):
            places = draw_places(sources, self._validation, number, VALIDATION)
            image, labels = gather(sources, places, self._patch, self._patch, [False] * len(places), self._outside)
            inputs, target = self._to_device(image)[:, : self._channels + self._cascade], self._to_device(labels)
            if self._cascade:
                inputs = torch.cat((inputs[:, :-1], _one_hot(inputs[:, -1].to(torch.int16), self._classes)), 1)
            annotated_BK = self._annotated_in([ids[place.case] for place in places]) if ids else None

            def counted(
                part: slice, inputs: Tensor = inputs, target: Tensor = target, annotated: Tensor | None = annotated_BK
            ) -> Tensor:
                with (device or self._device).autocast():
                    logits = forward(inputs[part].contiguous(memory_format=self._eager_format))
                masks = self._outputs.masks(logits, target[part], None if annotated is None else annotated[part])
                counts = [((found & true).sum(), found.sum(), true.sum()) for found, true in masks]
                return torch.stack([torch.stack(each) for each in counts], 1)

            parts, self._validation_parts = by_parts(
                counted, len(inputs), self._validation_parts, self._device.torch_device
            )
            totals += torch.stack(parts).sum(0)
        both, found_sum, true_sum = add_up(self._team, totals).cpu()
        dice = torch.where(true_sum > 0, 2 * both / (found_sum + true_sum), torch.nan)
        return [float(value) for value in dice]

    def drawn_shares(self) -> dict[str, float]:
        """What the samples since the last call were drawn for: shares that are centred on class k (`drawn_<k>`) or lie
        anywhere (`drawn_free`), and in mode `case_balanced` of those from a case that has class k (`case_with_<k>`).
        """
        drawn, total = self._drawn, max(1, self._drawn["samples"])
        self._drawn = Counter()
        names = ["drawn_free", *(f"drawn_{k}" for k in range(1, self._classes))]
        return {name: drawn[name] / total for name in (*names, *self._cases_with)}

    def _drawn_for(self, places: Sequence[Place]) -> "Counter[str]":
        counts = Counter({"samples": len(places)})
        for place in places:
            counts["drawn_free" if place.forced_class is None else f"drawn_{place.forced_class}"] += 1
            counts.update(name for name, cases in self._cases_with.items() if place.case in cases)
        return counts

    def _prepare(self, sources: Sequence[Source]) -> None:
        """What is worked out once, with the first batch."""
        if self._sampling.mode != "foreground" and not self._held:
            self._held = holders(sources)
            if self._sampling.mode == "case_balanced":
                self._cases_with = {f"case_with_{k}": frozenset(cases) for k, cases in self._held.items() if k > 0}
        if not self._fitted:
            self._enlarged, self._fitted = _within_reach(self._enlarged, self._patch, sources), True

    def _sampling_at(self, step: int, history: Sequence[Mapping[str, float]]) -> Sampling:
        if self._sampling.mode != "hard":
            return self._sampling
        return replace(self._sampling, class_rates=hard_rates(history, step, self._classes))

    def _next(self, sources: Sequence[Source], step: int, history: Sequence[Mapping[str, float]]) -> Read:
        self._prepare(sources)
        if not self._coming or self._coming[0][0] != step:
            for _, unused in self._coming:
                unused.cancel()
            self._coming.clear()
        first = self._coming[-1][0] + 1 if self._coming else step
        for number in range(first, step + self._ahead + 1):
            sampling = self._sampling_at(number, history)
            self._coming.append((number, self._threads.submit(self._read, sources, number, sampling)))
        return self._coming.popleft()[1].result()

    def _read(self, sources: Sequence[Source], step: int, sampling: Sampling) -> Read:
        whole = draw_places(sources, sampling, step, TRAINING, self._held)
        drawn_for = self._drawn_for(whole)
        seed = int(generator_of(self._sampling.seed, step, AUGMENTATION).integers(2**62))
        chance = torch.Generator().manual_seed(seed)
        drawn = augment.draw(self._spec, len(whole), self._channels, self._patch, chance)
        places = share(self._team, whole)
        if self._team.size > 1:
            drawn = augment.some(drawn, share(self._team, range(len(whole))))
        moved = drawn.moved_B.tolist()
        on_device = [source for source in sources if isinstance(source, OnDevice)]
        if len(on_device) == len(sources):
            image, labels = gather_on_device(on_device, places, self._patch, self._enlarged, moved, self._outside)
            return image, labels, drawn, whole, drawn_for
        both = gather(sources, places, self._patch, self._enlarged, moved, self._outside)
        image, labels = (self._pinned(each) for each in both)
        return image, labels, drawn, whole, drawn_for

    def _pinned(self, array: np.ndarray) -> Tensor:
        """On the host, in memory that a GPU reads while the host goes on."""
        tensor = torch.from_numpy(array)
        return tensor.pin_memory() if self._device.is_cuda else tensor

    def _to_device(self, array: np.ndarray | Tensor) -> Tensor:
        tensor = array if isinstance(array, Tensor) else self._pinned(array)
        return tensor.to(self._device.torch_device, non_blocking=self._device.is_cuda)


def _within_reach(enlarged: tuple[int, ...], patch: tuple[int, ...], sources: Sequence[Source]) -> tuple[int, ...]:
    """The enlarged patch, but the patch itself on axes where every image lies inside it: beyond are only zeros."""
    largest = np.max([source.shape[3 - len(patch) :] for source in sources], axis=0)
    return tuple(own if size <= own else wide for wide, own, size in zip(enlarged, patch, largest, strict=True))


def _one_hot(labels: Tensor, classes: int) -> Tensor:
    """(B, ...) label indices to (B, K - 1, ...) float32, one channel per foreground class."""
    return torch.stack([labels == k for k in range(1, classes)], 1).float()


def _only_moved(drawn: augment.Drawn) -> augment.Drawn:
    """The same movement and mirroring of labels without any change of the one channel that lies beside them."""
    one_BC = torch.ones_like(drawn.brightness_BC[:, :1])
    return replace(
        drawn,
        noise_sigma_B=torch.zeros_like(drawn.noise_sigma_B),
        blur_sigma_BCD=torch.zeros_like(drawn.blur_sigma_BCD[:, :1]),
        brightness_BC=one_BC,
        contrast_BC=one_BC,
        low_resolution_BC=one_BC,
        gamma_inverted_BC=one_BC,
        gamma_BC=one_BC,
    )
