"""Sliding-window inference: overlapping tiles, weighted by a Gaussian, mirrored.

Tiles are mirrored along the axes that training mirrored. Scores leave as soon as no further tile can change them, in
blocks of slices, so that only as many slices are held as a patch is thick. Legend: B tiles, N slices that a 2D network
sees one by one, C channel, K score, Z Y X voxels.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from autoseg.errors import UserError
from autoseg.network.accumulators import Place, zeros
from autoseg.network.device import Device
from autoseg.network.export import activated, entropy_nats

OVERLAP = 0.5
SIGMA_SHARE = 1 / 8
SLICES_PER_PASS = 8

Progress = Callable[[int, int], None]
"""(tiles done, of) -> None; what it raises ends the prediction."""


@dataclass(frozen=True)
class Tiling:
    """How tiles are laid and computed.

    Args:
        mirror_axes: patch axes; the mean over all their subsets is taken.
        overlap: share of a patch that neighbours have in common at least.
        samples: tiles and mirrorings of them that go through the network together.
        place: where sums are kept.
    """

    patch_voxels: tuple[int, ...]
    mirror_axes: tuple[int, ...] = ()
    overlap: float = OVERLAP
    samples: int = 1
    place: Place = "ram"


@dataclass(frozen=True)
class Scorer:
    """What is summed up: logits of one network, or the mean probabilities of several, tile by tile.

    Args:
        networks: in eval mode, on `device`; each takes (B, C, *patch) and returns (B, K, *patch).
        probabilities: mean probabilities also of a single network.
        mutual: a further score beside the classes, in nats: the entropy of the members' mean less their mean entropy,
            tile by tile. To interpolate or average both first would count what lies between classes as contradiction.
        activation: "softmax" for classes, "sigmoid" for regions.
    """

    networks: Sequence[nn.Module]
    classes: int
    device: Device
    probabilities: bool = False
    mutual: bool = False
    activation: str = "softmax"

    @property
    def are_logits(self) -> bool:
        return len(self.networks) == 1 and not self.probabilities

    @property
    def channels(self) -> int:
        """Scores per voxel."""
        return self.classes + self.mutual

    @torch.inference_mode()
    def __call__(self, batch: Tensor, flips: Sequence[tuple[int, ...]], samples: int) -> Tensor:
        """Scores of a batch of tiles, (B, channels, *patch) float32."""
        means = (mirrored_mean(each, batch, flips, self.device, samples) for each in self.networks)
        if self.are_logits:
            return next(means)
        total = entropy = None
        for logits in means:
            shares = activated(logits, self.activation, 1)
            if self.mutual:
                own = entropy_nats(shares.transpose(0, 1), self.activation)
                entropy = own if entropy is None else entropy + own
            total = shares if total is None else total.add_(shares)
        if total is None:
            raise ValueError("at least one network is needed")
        total /= len(self.networks)
        if entropy is None:
            return total
        together = entropy_nats(total.transpose(0, 1), self.activation)
        return torch.cat((total, (together - entropy / len(self.networks)).unsqueeze(1)), 1)


def tile_starts(size: int, patch: int, overlap: float = OVERLAP) -> tuple[int, ...]:
    """First voxels of the tiles along one axis: evenly spread, neighbours sharing `overlap` of a patch or more.

    Where that is no whole number of voxels, some share half a voxel less.
    """
    if size <= patch:
        return (0,)
    count = math.ceil((size - patch) / max(1.0, patch * (1 - overlap))) + 1
    return tuple(round(i * (size - patch) / (count - 1)) for i in range(count))


def gaussian(patch_voxels: Sequence[int]) -> Tensor:
    """Weights of a tile's voxels, (Z, Y, X) or (Y, X) float32: sigma an eighth of the patch, 1 at the centre.

    Source: Isensee et al., nnU-Net 2021. The product of the axes' weights, so it never becomes 0 in float32 here.
    """
    weights = torch.ones(())
    for size in patch_voxels:
        offset = torch.arange(size, dtype=torch.float32) - (size - 1) / 2
        axis = torch.exp(-0.5 * (offset / max(size * SIGMA_SHARE, 1e-6)) ** 2)
        weights = weights.unsqueeze(-1) * axis
    return (weights / weights.max()).clamp_min(1e-7)


def mirrorings(mirror_axes: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Every subset of the patch axes to mirror, the empty one first."""
    return tuple(
        subset for count in range(len(mirror_axes) + 1) for subset in itertools.combinations(mirror_axes, count)
    )


def score_blocks(
    scorer: Scorer, image_CZYX: Tensor, tiling: Tiling, progress: Progress | None = None
) -> Iterator[Tensor]:
    """Scores of a preprocessed image, in consecutive blocks of slices (K, z, Y, X) float32, wherever the sums are.

    A block may be overwritten after the next one is asked for.

    Args:
        image_CZYX: float32 on the host. A network with a 2D patch sees it slice by slice.
    """
    padded, inside = _padded(image_CZYX, tiling.patch_voxels)
    axes = len(tiling.patch_voxels)
    kept = [slice(start, start + size) for start, size in zip(inside, image_CZYX.shape[-axes:], strict=True)]
    size = tuple(padded.shape[-axes:])
    if axes == 3:
        blocks = row_blocks(scorer, lambda window: padded[(slice(None), *window)].unsqueeze(0), size, tiling, progress)
        for start, block_NKZYX in blocks:
            rows = slice(max(kept[0].start - start, 0), max(kept[0].stop - start, 0))
            if (block_KZYX := block_NKZYX[0, :, rows, kept[1], kept[2]]).numel():
                yield block_KZYX
        return
    groups = range(0, padded.shape[1], SLICES_PER_PASS)
    for number, first in enumerate(groups):
        slices_NCYX = padded[:, first : first + SLICES_PER_PASS].transpose(0, 1)
        scores_KNYX = _whole_slices(scorer, slices_NCYX, tiling, _share_of(progress, number, len(groups)))
        yield scores_KNYX[:, :, kept[0], kept[1]]


def _whole_slices(scorer: Scorer, slices_NCYX: Tensor, tiling: Tiling, progress: Progress | None) -> Tensor:
    """All rows of a few slices: (K, N, Y, X)."""
    everything = slice(None)
    blocks = row_blocks(
        scorer, lambda window: slices_NCYX[(everything, everything, *window)], tuple(slices_NCYX.shape[2:]), tiling,
        progress, len(slices_NCYX),
    )  # fmt: skip
    scores_KNYX = None
    for start, block_NKYX in blocks:
        if scores_KNYX is None:
            whole = (scorer.channels, len(slices_NCYX), *slices_NCYX.shape[2:])
            scores_KNYX = zeros(whole, tiling.place, block_NKYX.device)
        scores_KNYX[:, :, start : start + block_NKYX.shape[2]] = block_NKYX.transpose(0, 1)
    if scores_KNYX is None:
        raise ValueError("a slice has at least one row")
    return scores_KNYX


def row_blocks(
    scorer: Scorer,
    tile_of: Callable[[tuple[slice, ...]], Tensor],
    size: tuple[int, ...],
    tiling: Tiling,
    progress: Progress | None = None,
    slices: int = 1,
) -> Iterator[tuple[int, Tensor]]:
    """Scores along the first patch axis as they become final: (first row, (N, K, rows, ...) float32).

    A tile that is the same everywhere is computed once for each set of values; its result does not depend on where it
    lies. A block is overwritten after the next one is asked for.

    Args:
        tile_of: window of the patch axes -> (N, C, *patch) float32 on the host.
        size: of the patch axes; no axis is shorter than the patch.
        slices: N.

    Raises:
        UserError: scores are not finite.
    """
    patch, device = tiling.patch_voxels, scorer.device.torch_device
    starts = [tile_starts(length, edge, tiling.overlap) for length, edge in zip(size, patch, strict=True)]
    corners = list(itertools.product(*starts[1:]))
    total = zeros((slices, scorer.channels, patch[0], *size[1:]), tiling.place, device)
    norm = torch.zeros((patch[0], *size[1:]), device=total.device)
    weights = gaussian(patch).to(device)
    weights_there = weights.to(total.device)
    known = _Constant(scorer, tiling, weights)
    done = 0
    for top, following in zip(starts[0], [*starts[0][1:], size[0]], strict=True):
        windows = [_window((top, *corner), patch) for corner in corners]
        for window, scores in _scored(scorer, windows, tile_of, tiling, weights, known):
            place = (slice(None), *window[1:])
            total[(slice(None), slice(None), *place)] += scores.to(total.device)
            norm[place] += weights_there
            done += 1
            if progress is not None:
                progress(done, len(corners) * len(starts[0]))
        rows = following - top
        total[:, :, :rows] /= norm[:rows]
        _refuse_not_finite(total[:, :, :rows], scorer.device)
        yield top, total[:, :, :rows]
        for sums in (total.unbind(0) if following < size[0] else ()):
            _shift(sums.transpose(0, 1), rows)
        _shift(norm, rows)


def _refuse_not_finite(block: Tensor, device: Device) -> None:
    """Raise UserError where a score is NaN or infinite: no class would win, which looks like background."""
    if not bool(block.sum().isfinite()):  # as every sum with such a score; a block is waited for, not a tile
        elsewhere = "" if device.precision == "fp32" else ", or another device (--device cpu)"
        raise UserError(
            f"the network's scores are NaN or infinite, computed in {device.precision}.",
            fix=f"Try an image without extreme values{elsewhere}; else the network is broken: train it anew.",
        )


def _shift(sums: Tensor, rows: int) -> None:
    """Move the sums up by `rows` of the first axis, piece by piece so that no piece overlaps itself; zeros follow."""
    kept = len(sums) - rows
    for start in range(0, kept, rows):
        stop = min(start + rows, kept)
        sums[start:stop] = sums[start + rows : stop + rows]
    sums[max(kept, 0) :] = 0


def _scored(
    scorer: Scorer,
    windows: Sequence[tuple[slice, ...]],
    tile_of: Callable[[tuple[slice, ...]], Tensor],
    tiling: Tiling,
    weights: Tensor,
    known: "_Constant",
) -> Iterator[tuple[tuple[slice, ...], Tensor]]:
    """Windows with their weighted scores (N, K, *patch), several windows in one pass where the device has room."""
    flips = mirrorings(tiling.mirror_axes)
    waiting: list[tuple[tuple[slice, ...], Tensor]] = []
    for number, window in enumerate(windows):
        tile = tile_of(window)
        if (scores := known.of(tile)) is not None:
            yield window, scores
        else:
            waiting.append((window, tile))
        full = len(waiting) * len(tile) * len(flips) >= tiling.samples
        if waiting and (full or number == len(windows) - 1):
            batch = torch.cat([each for _, each in waiting]).to(weights.device, non_blocking=weights.is_cuda)
            found = scorer(batch, flips, tiling.samples) * weights
            yield from ((place, part) for (place, _), part in zip(waiting, found.split(len(tile)), strict=True))
            waiting = []


class _Constant:
    """The scores of the last tile that was the same everywhere."""

    def __init__(self, scorer: Scorer, tiling: Tiling, weights: Tensor) -> None:
        self.scorer, self.tiling, self.weights = scorer, tiling, weights
        self.values: tuple[float, ...] = ()
        self.scores: Tensor | None = None

    def of(self, tile: Tensor) -> Tensor | None:
        """Weighted scores, or None where the tile is not constant."""
        flat = tile.flatten(2)
        first = flat[:, :, :1]
        # most tiles differ within a few voxels
        if not torch.equal(flat[:, :, :64], first.expand_as(flat[:, :, :64])) or not bool((flat == first).all()):
            return None
        values = tuple(first.flatten().tolist())
        if self.scores is None or values != self.values:
            flips = mirrorings(self.tiling.mirror_axes)
            found = self.scorer(tile.to(self.weights.device), flips, self.tiling.samples)
            self.values, self.scores = values, found * self.weights
        return self.scores


def mirrored_mean(
    network: nn.Module, batch: Tensor, flips: Sequence[tuple[int, ...]], device: Device, samples: int = 1
) -> Tensor:
    """Mean logits over the mirrorings, mirrored back, float32; as many in one pass as `samples` allows."""
    together = max(1, samples // len(batch))
    total: Tensor | None = None
    for start in range(0, len(flips), together):
        group = [[axis + 2 for axis in flip] for flip in flips[start : start + together]]
        turned = [batch.flip(axes) if axes else batch for axes in group]
        with device.autocast():
            found = network(torch.cat(turned) if len(turned) > 1 else turned[0])
        for axes, logits in zip(group, found.split(len(batch)), strict=True):
            back = (logits.flip(axes) if axes else logits).float()
            total = back if total is None else total + back
    if total is None:
        raise ValueError("there is always the unmirrored pass")
    return total / len(flips)


def _padded(image_CZYX: Tensor, patch_voxels: Sequence[int]) -> tuple[Tensor, tuple[int, ...]]:
    """The image with zeros around where it is smaller than the patch, and where the image starts in it."""
    size = image_CZYX.shape[-len(patch_voxels) :]
    missing = [max(0, patch - have) for patch, have in zip(patch_voxels, size, strict=True)]
    before = tuple(each // 2 for each in missing)
    pads = [pad for m, b in zip(reversed(missing), reversed(before), strict=True) for pad in (b, m - b)]
    return (nn.functional.pad(image_CZYX, pads) if any(missing) else image_CZYX), before


def _window(corner: Sequence[int], patch: Sequence[int]) -> tuple[slice, ...]:
    return tuple(slice(start, start + edge) for start, edge in zip(corner, patch, strict=True))


def _share_of(progress: Progress | None, number: int, of: int) -> Progress | None:
    """Progress of one of several equal parts as progress of the whole."""
    if progress is None:
        return None
    return lambda done, tiles: progress(number * tiles + done, of * tiles)
