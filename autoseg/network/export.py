"""From scores on the network's grid to label indices on the image's grid, without ever holding all classes there.

Resampling is linear and separable: one matrix per axis. The result is made slab by slab along Z; inside a slab the
classes come one after the other and only the best score so far is kept, so memory does not grow with their number.
Legend: K class, Z Y X voxels.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

SLAB_VOXELS = 4_000_000
"""Voxels of a slab of the result; a few float32 temporaries of this size exist at a time."""

Matrices = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Per axis Z Y X the operator (new, old), or None where the axis keeps its size."""


def labels_of(scores_KZYX: Tensor, matrices: Matrices) -> Tensor:
    """Index of the largest score on the new grid, (Z, Y, X) int16; the same as resampling everything and argmax.

    Args:
        scores_KZYX: logits or probabilities; half precision is widened slab by slab.
        matrices: linear or nearest operators of the axes.
    """
    shape = _new_shape(scores_KZYX, matrices)
    result = torch.empty(shape, dtype=torch.int16)
    for window in _slabs(shape):
        best, labels = None, None
        for k in range(len(scores_KZYX)):
            score = resampled_slab(scores_KZYX[k], matrices, window)
            if best is None or labels is None:
                best, labels = score, torch.zeros(score.shape, dtype=torch.int16, device=score.device)
                continue
            better = score > best
            labels[better] = k
            best = torch.maximum(best, score)
        if labels is not None:
            result[window] = labels.cpu()
    return result


def probabilities_of(scores_KZYX: Tensor, matrices: Matrices, are_logits: bool) -> Tensor:
    """Probabilities of all classes on the new grid, (K, Z, Y, X) float16 on the host.

    This does hold (classes x image), in half precision: it is what the caller asked to be saved.
    """
    shape = _new_shape(scores_KZYX, matrices)
    result = torch.empty((len(scores_KZYX), *shape), dtype=torch.float16)
    for window in _slabs(shape, len(scores_KZYX)):
        slab = torch.stack([resampled_slab(each, matrices, window) for each in scores_KZYX])
        result[:, window] = (slab.softmax(0) if are_logits else slab).half().cpu()
    return result


def resampled_slab(scores_ZYX: Tensor, matrices: Matrices, window: slice) -> Tensor:
    """One class on the new grid, only the slices in `window` of the new first axis: (z, Y, X) float32."""
    along_z, along_y, along_x = matrices
    if along_z is None:
        slab = scores_ZYX[window].float()
    else:
        rows = along_z[window]
        used = rows.abs().sum(0).nonzero().flatten()
        first, last = int(used[0]), int(used[-1]) + 1
        slab = torch.tensordot(rows[:, first:last], scores_ZYX[first:last].float(), dims=1)
    if along_y is not None:
        slab = torch.matmul(along_y, slab)
    if along_x is not None:
        slab = torch.matmul(slab, along_x.T)
    return slab


def _new_shape(scores_KZYX: Tensor, matrices: Sequence[Tensor | None]) -> tuple[int, int, int]:
    z, y, x = (
        old if matrix is None else matrix.shape[0] for old, matrix in zip(scores_KZYX.shape[1:], matrices, strict=True)
    )
    return z, y, x


def _slabs(shape: tuple[int, int, int], share: int = 1) -> Iterator[slice]:
    height = max(1, SLAB_VOXELS // max(1, shape[1] * shape[2] * share))
    for start in range(0, shape[0], height):
        yield slice(start, min(start + height, shape[0]))
