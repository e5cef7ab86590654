"""From scores on the network's grid to labels on the image's grid, slab by slab.

Resampling is linear and separable: one matrix per axis. Scores come as blocks of slices, so that not even those on the
network's grid have to be in memory together, and the result is made slab by slab, in tiles that stay in the processor's
cache. Inside a tile the classes come one after the other and only the best score so far is kept. Interpolated values
lie between the smallest and the largest they are made of, so a class whose largest score in a tile is below the
smallest of another cannot win there and is left out: the labels are the same, the time is not.
Legend: K class, Z Y X voxels; the first axis of both grids is the one along which blocks and slabs come.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

SLAB_VOXELS = 4_000_000
"""Voxels of a slab of the result; of one with probabilities, times an eighth of the classes."""
TILE_EDGE = 128
TILE_VOXELS = 131_072
"""On CPUs a tile's score, best score and label fit the second-level cache; GPUs take whole slabs."""

Matrices = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Per axis Z Y X the operator (new, old), or None where the axis keeps its size."""


@dataclass(frozen=True)
class Wanted:
    """What to make beside labels: probabilities of all classes, and how unsure the network is.

    With `mutual` the last score is no class but mutual information in nats (see `sliding.Scorer`).
    `activation` is "softmax" for classes, or "sigmoid" for regions that may overlap: then `paints` holds the label
    index of each, painted in their order where the region is likelier than not.
    """

    are_logits: bool
    probabilities: bool = False
    uncertainty: bool = False
    mutual: bool = False
    activation: str = "softmax"
    paints: tuple[int, ...] = ()

    @property
    def threshold(self) -> float:
        """Score above which a region is there."""
        return 0.0 if self.are_logits else 0.5


@dataclass(frozen=True)
class Slab:
    """Slices `window` of the result, all on the host.

    Args:
        labels_ZYX: int16 index of the largest score.
        probabilities_KZYX: float32, or None.
        entropy_ZYX: of the probabilities, as a share of its largest value log K (0..1), or None.
        mutual_ZYX: mutual information between label and ensemble member, on the same scale, or None.
    """

    window: slice
    labels_ZYX: Tensor
    probabilities_KZYX: Tensor | None = None
    entropy_ZYX: Tensor | None = None
    mutual_ZYX: Tensor | None = None


def slabs(
    blocks: Iterable[Tensor], old_shape: Sequence[int], matrices: Matrices, wanted: Wanted, first_height: int = 0
) -> Iterator[Slab]:
    """Make the result slab by slab while the scores come in.

    Args:
        blocks: consecutive slices of the scores, (K, z, Y, X) each, on any device; a block may be overwritten after the
            next one is asked for.
        old_shape: Z Y X of all blocks together.
        matrices: linear or nearest operators of the axes, on the host.
        first_height: slices of the first slab, where the others should begin at certain places; 0 for the usual number.
    """
    held = _Held(iter(blocks))
    shape = new_shape(old_shape, matrices)
    classes, device = held.peek()
    height = slab_height(shape, classes, wanted)
    along_z, along_y, along_x = (None if each is None else each.to(device) for each in matrices)
    spans = _spans(along_z, old_shape[0])
    make = _dense_slab if wanted.probabilities or wanted.uncertainty else _label_slab
    start = 0
    with _mapping(device) as over_tiles:
        while start < shape[0]:
            stop = min(shape[0], start + (first_height if start == 0 and first_height else height))
            first, last = _reach(spans, start, stop)
            part = _Part(held.rows(first, last), (along_z, along_y, along_x), first, slice(start, stop), shape)
            slab = make(part, wanted, over_tiles)
            del part
            yield slab
            start = stop


def slab_height(shape: Sequence[int], classes: int, wanted: Wanted) -> int:
    """Slices of the result that are made together."""
    share = -(-classes // 8) if wanted.probabilities or wanted.uncertainty else 1
    return max(1, SLAB_VOXELS // max(1, shape[1] * shape[2] * share))


def new_shape(old_shape: Sequence[int], matrices: Sequence[Tensor | None]) -> tuple[int, int, int]:
    """Z Y X of the result."""
    z, y, x = (
        old if matrix is None else matrix.shape[0] for old, matrix in zip(old_shape, matrices, strict=True)
    )
    return z, y, x


# ------------------------------------------------------------------------------------------------ slabs

_Tile = tuple[tuple[slice, ...], Matrices, tuple[slice, slice, slice]]
"""Place in the slab, operators, and the old voxels that they read."""

_Map = Callable[[Callable[[_Tile], object], Iterable[_Tile]], Iterable[object]]


@dataclass(frozen=True)
class _Part:
    """One slab to be made: the consecutive blocks it needs, which begin at old slice `first`."""

    parts: Sequence[Tensor]
    matrices: Matrices
    first: int
    window: slice
    shape: Sequence[int]

    @property
    def size(self) -> tuple[int, int, int]:
        """Z Y X of the slab."""
        return self.window.stop - self.window.start, self.shape[1], self.shape[2]

    def tiles(self) -> Iterator[_Tile]:
        """The tiles of the slab: small on a CPU, everything on a GPU."""
        along_z, along_y, along_x = self.matrices
        on_host = self.parts[0].device.type == "cpu"
        edge = TILE_EDGE if on_host else max(self.shape[1:])
        plane = min(edge, self.shape[1]) * min(edge, self.shape[2])
        depth = max(1, TILE_VOXELS // plane) if on_host else self.size[0]
        pieces_y = [_piece(along_y, y, min(y + edge, self.shape[1])) for y in range(0, self.shape[1], edge)]
        pieces_x = [_piece(along_x, x, min(x + edge, self.shape[2])) for x in range(0, self.shape[2], edge)]
        for z in range(self.window.start, self.window.stop, depth):
            stop = min(z + depth, self.window.stop)
            _, rows_z, low_z = _piece(along_z, z, stop, self.first)
            for place_y, rows_y, low_y in pieces_y:
                for place_x, rows_x, low_x in pieces_x:
                    place = (slice(z - self.window.start, stop - self.window.start), place_y, place_x)
                    yield place, (rows_z, rows_y, rows_x), (low_z, low_y, low_x)


def _label_slab(part: _Part, wanted: Wanted, over_tiles: _Map) -> Slab:
    """Labels of a slab, tile by tile."""
    labels = torch.empty(part.size, dtype=torch.int16)
    convex = all(_is_convex(each) for each in part.matrices)

    def make(tile: _Tile) -> None:
        place, rows, low = tile
        scores = _gathered(part.parts, *low)
        if wanted.paints:
            found = painted(torch.stack([resampled(each, rows) for each in scores]), wanted)
        else:
            found = _best(scores, _candidates(scores) if convex else range(len(scores)), rows)
        labels[place] = found.cpu()

    for _ in over_tiles(make, part.tiles()):
        pass
    return Slab(part.window, labels)


@contextmanager
def _mapping(device: torch.device) -> Iterator[_Map]:
    """A map over tiles: on a CPU in threads, one tile each, because sharing out such small products costs more."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield pool.map
    finally:
        torch.set_num_threads(threads)  # the number of other threads to come; each has its own


def _piece(matrix: Tensor | None, start: int, stop: int, first: int = 0) -> tuple[slice, Tensor | None, slice]:
    """New voxels, the part of the operator that makes them, and the old voxels it reads (counted from `first`)."""
    place = slice(start, stop)
    if matrix is None:
        return place, None, slice(start - first, stop - first)
    rows = matrix[place]
    used = rows.abs().amax(0).nonzero().flatten()
    low, high = int(used[0]), int(used[-1]) + 1
    return place, rows[:, low:high], slice(low - first, high - first)


def _gathered(parts: Sequence[Tensor], rows: slice, low_y: slice, low_x: slice) -> Tensor:
    """The old voxels of a tile out of consecutive parts: (K, z, y, x) float32."""
    pieces, offset = [], 0
    for part in parts:
        start, stop = max(rows.start - offset, 0), min(rows.stop - offset, part.shape[1])
        if start < stop:
            pieces.append(part[:, start:stop, low_y, low_x].float())
        offset += part.shape[1]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


def _candidates(tile_KZYX: Tensor) -> Sequence[int]:
    """Classes that can be the largest somewhere between the voxels of the tile."""
    flat = tile_KZYX.flatten(1)
    low, high = flat.amin(1), flat.amax(1)  # aminmax takes twenty times as long on a CPU
    return (high >= low.max()).nonzero().flatten().tolist() or range(len(flat))  # none where there are NaN


def _best(tile_KZYX: Tensor, chosen: Sequence[int], rows: Matrices) -> Tensor:
    """Index of the largest interpolated score among the chosen classes, which ascend: (z, y, x)."""
    if len(chosen) == 1:
        size = new_shape(tile_KZYX.shape[1:], rows)
        return torch.full(size, chosen[0], dtype=torch.int16, device=tile_KZYX.device)
    if tile_KZYX.device.type == "cpu":
        return torch.from_numpy(_best_on_host(tile_KZYX, chosen, rows))
    best = resampled(tile_KZYX[chosen[0]], rows).clone(memory_format=torch.contiguous_format)
    kind = torch.uint8 if chosen[-1] < 256 else torch.int16
    labels = torch.full(best.shape, chosen[0], dtype=kind, device=best.device)
    better = torch.empty(best.shape, dtype=torch.bool, device=best.device)
    index = torch.empty_like(labels)
    for k in chosen[1:]:
        score = resampled(tile_KZYX[k], rows)
        torch.gt(score, best, out=better)
        torch.maximum(score, best, out=best)
        index.copy_(better).mul_(k)
        torch.maximum(labels, index, out=labels)
    return labels


def _best_on_host(tile_KZYX: Tensor, chosen: Sequence[int], rows: Matrices) -> np.ndarray:
    """The same with NumPy, whose comparison of floats is 15 times faster than torch's on a CPU."""
    best = resampled(tile_KZYX[chosen[0]], rows).numpy().copy()
    kind = np.uint8 if chosen[-1] < 256 else np.int16
    labels, index = np.full(best.shape, chosen[0], kind), np.empty(best.shape, kind)
    better = np.empty(best.shape, bool)
    for k in chosen[1:]:
        score = resampled(tile_KZYX[k], rows).numpy()
        np.greater(score, best, out=better)
        np.maximum(score, best, out=best)
        # indices ascend, so that the last one that was better is the largest: bytes at full vector width
        np.multiply(better.view(np.uint8) if kind is np.uint8 else better, kind(k), out=index)
        np.maximum(labels, index, out=labels)
    return labels


def _dense_slab(part: _Part, wanted: Wanted, over_tiles: _Map) -> Slab:
    """The same with all classes of the slab at hand."""
    scores = torch.empty((len(part.parts[0]), *part.size), device=part.parts[0].device)

    def make(tile: _Tile) -> None:
        place, rows, low = tile
        for k, low_ZYX in enumerate(_gathered(part.parts, *low)):
            scores[k][place] = resampled(low_ZYX, rows)

    for _ in over_tiles(make, part.tiles()):
        pass
    shared = scores[-1] if wanted.mutual else None
    scores = scores[:-1] if wanted.mutual else scores
    best = painted(scores, wanted) if wanted.paints else scores.max(0).indices  # argmax is ten times as slow on a CPU
    labels = best.to(torch.int16).cpu()
    probabilities = activated(scores, wanted.activation, 0) if wanted.are_logits else scores
    entropy = mutual = None
    if wanted.uncertainty:
        nats, largest = entropy_nats(probabilities, wanted.activation), largest_entropy(len(scores), wanted.activation)
        entropy = (nats / largest).cpu()
        mutual = None if shared is None else (torch.minimum(shared.clamp_min(0), nats) / largest).cpu()
    return Slab(part.window, labels, probabilities.cpu() if wanted.probabilities else None, entropy, mutual)


def painted(scores_KZYX: Tensor, wanted: Wanted) -> Tensor:
    """Label indices of regions, the later ones over the earlier: (z, y, x) int16."""
    labels = torch.zeros(scores_KZYX.shape[1:], dtype=torch.int16, device=scores_KZYX.device)
    for score, paint in zip(scores_KZYX, wanted.paints, strict=True):
        labels.masked_fill_(score > wanted.threshold, paint)
    return labels


def activated(logits: Tensor, activation: str, axis: int) -> Tensor:
    """Probabilities of logits; `axis` is that of the classes."""
    return logits.sigmoid() if activation == "sigmoid" else logits.softmax(axis)


def entropy_nats(probabilities_KZYX: Tensor, activation: str = "softmax") -> Tensor:
    """Entropy over the first axis, in nats; of regions the sum of each one's own."""
    total = torch.zeros_like(probabilities_KZYX[0])
    for each in probabilities_KZYX:
        total -= torch.xlogy(each, each)
        if activation == "sigmoid":
            total -= torch.xlogy(1 - each, 1 - each)
    return total.clamp_min_(0)


def largest_entropy(classes: int, activation: str = "softmax") -> float:
    """What `entropy_nats` is at most."""
    return classes * math.log(2) if activation == "sigmoid" else math.log(classes)


def resampled(scores_ZYX: Tensor, rows: Matrices) -> Tensor:
    """One class on the new grid: (z, y, x), the type of the input."""
    along_z, along_y, along_x = rows
    if along_z is not None:
        scores_ZYX = torch.matmul(along_z, scores_ZYX.flatten(1)).view(len(along_z), *scores_ZYX.shape[1:])
    if along_y is not None:
        scores_ZYX = torch.matmul(along_y, scores_ZYX)
    if along_x is not None:
        scores_ZYX = torch.matmul(scores_ZYX, along_x.T)
    return scores_ZYX


def _is_convex(matrix: Tensor | None) -> bool:
    """Whether every new value is a weighted mean of old ones; not so for cubic splines."""
    if matrix is None:
        return True
    return bool((matrix >= 0).all()) and bool(((matrix.sum(1) - 1).abs() < 1e-4).all())


def _spans(matrix: Tensor | None, old: int) -> Tensor:
    """First and one past the last old slice that each new slice is made of: (new, 2)."""
    if matrix is None:
        first = torch.arange(old)
        return torch.stack((first, first + 1), 1)
    used = (matrix != 0).to(torch.uint8).cpu()
    return torch.stack((used.argmax(1), matrix.shape[1] - used.flip(1).argmax(1)), 1)


def _reach(spans: Tensor, start: int, stop: int) -> tuple[int, int]:
    return int(spans[start:stop, 0].min()), int(spans[start:stop, 1].max())


class _Held:
    """The slices of the incoming blocks that are still needed."""

    def __init__(self, blocks: Iterator[Tensor]) -> None:
        self.blocks, self.parts, self.first = blocks, list[Tensor](), 0
        self.stop = 0

    def peek(self) -> tuple[int, torch.device]:
        """Number of classes and device of the blocks."""
        self._more()
        return len(self.parts[0]), self.parts[0].device

    def rows(self, first: int, last: int) -> list[Tensor]:
        """Consecutive parts whose slices begin at `first` and reach `last` or further; older slices are let go."""
        self._drop(first)
        while self.stop < last:
            # the block at hand may be overwritten by the one to come
            self.parts = [each.clone() for each in self.parts]
            self._more()
            self._drop(first)
        return self.parts

    def _more(self) -> None:
        block = next(self.blocks)
        self.parts.append(block)
        self.stop += block.shape[1]

    def _drop(self, first: int) -> None:
        while self.parts and self.first < first:
            whole = self.parts[0].shape[1]
            surplus = min(first - self.first, whole)
            self.first += surplus
            if surplus == whole:
                self.parts.pop(0)
            else:
                self.parts[0] = self.parts[0][:, surplus:]
