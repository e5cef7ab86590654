"""Sliding-window inference: overlapping tiles, weighted by a Gaussian, mirrored along the axes that training mirrored.

Legend: B batch, C channel, K class, Z Y X voxels.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from autoseg.network.device import Device

OVERLAP = 0.5
SIGMA_SHARE = 1 / 8
SLICES_PER_PASS = 8


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


@torch.inference_mode()
def predict_logits(
    network: nn.Module,
    image_CZYX: Tensor,
    patch_voxels: tuple[int, ...],
    classes: int,
    device: Device,
    mirror_axes: Sequence[int] = (),
    progress: Callable[[int, int], None] | None = None,
    overlap: float = OVERLAP,
) -> Tensor:
    """Logits of a whole preprocessed image.

    Args:
        network: in eval mode, on `device`; takes (B, C, *patch) and returns (B, K, *patch).
        image_CZYX: float32 on the host. A network with a 2D patch sees it slice by slice.
        mirror_axes: patch axes; the mean over all their subsets is taken.
        progress: called with (tiles done, of).

    Returns:
        (K, Z, Y, X) float32 on the host.
    """
    flat = len(patch_voxels) == 2
    size = image_CZYX.shape[2:] if flat else image_CZYX.shape[1:]
    padded, inside = _padded(image_CZYX, patch_voxels)
    padded_size = padded.shape[-len(patch_voxels) :]
    weights = gaussian(patch_voxels).to(device.torch_device)
    total = torch.zeros((classes, *padded.shape[1:]), dtype=torch.float32)
    norm = torch.zeros(padded_size, dtype=torch.float32)
    tiles = list(_tiles(padded.shape[1:], padded_size, patch_voxels, overlap))
    flips = mirrorings(mirror_axes)
    for number, (depth, corner) in enumerate(tiles):
        window = tuple(slice(start, start + patch) for start, patch in zip(corner, patch_voxels, strict=True))
        where: tuple[slice, ...] = (slice(None), depth, *window) if flat else (slice(None), *window)
        tile = padded[where]
        batch = (tile.transpose(0, 1) if flat else tile.unsqueeze(0)).to(device.torch_device)
        logits = _mirrored_mean(network, batch, flips, device) * weights
        result = logits.transpose(0, 1) if flat else logits[0]
        total[where] += result.cpu()
        if not flat or depth.start == 0:
            norm[window] += weights.cpu()
        if progress is not None:
            progress(number + 1, len(tiles))
    total /= norm
    for axis, (start, length) in enumerate(zip(inside, size, strict=True), start=total.ndim - len(size)):
        total = total.narrow(axis, start, length)
    return total


def _mirrored_mean(network: nn.Module, batch: Tensor, flips: Sequence[tuple[int, ...]], device: Device) -> Tensor:
    total: Tensor | None = None
    for flip in flips:
        axes = [axis + 2 for axis in flip]
        with device.autocast():
            logits = network(batch.flip(axes) if axes else batch)
        logits = (logits.flip(axes) if axes else logits).float()
        total = logits if total is None else total + logits
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


def _tiles(
    shape_zyx: Sequence[int], size: Sequence[int], patch: Sequence[int], overlap: float
) -> Iterator[tuple[slice, tuple[int, ...]]]:
    """Every tile as (slices of the first axis, corner); volumes have no slices to choose."""
    corners = list(itertools.product(*(tile_starts(s, p, overlap) for s, p in zip(size, patch, strict=True))))
    if len(patch) == 3:
        for corner in corners:
            yield slice(None), corner
        return
    for first in range(0, shape_zyx[0], SLICES_PER_PASS):
        for corner in corners:
            yield slice(first, min(first + SLICES_PER_PASS, shape_zyx[0])), corner
