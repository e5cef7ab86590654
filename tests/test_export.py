"""network/export.py: slab by slab gives what resampling everything at once gives."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoseg.image.resample import axis_matrix
from autoseg.network import export
from autoseg.network.export import Matrices, labels_of, probabilities_of, resampled_slab

Shape = tuple[int, int, int]
OLD: Shape = (7, 9, 11)
SLABS = pytest.mark.parametrize("slab_voxels", [1, 500, 4_000_000])
NEW = pytest.mark.parametrize(
    "new", [(13, 15, 17), (4, 5, 6), (7, 20, 11), (20, 9, 11), (7, 9, 30), (3, 9, 25), (7, 9, 11), (1, 1, 1)], ids=str
)


def scores_of(classes: int = 4, shape: Shape = OLD) -> Tensor:
    return torch.randn((classes, *shape), generator=torch.Generator().manual_seed(0))


def matrices_of(old: Sequence[int], new: Sequence[int], orders: Sequence[int] = (1, 1, 1)) -> Matrices:
    z, y, x = (
        None if o == n else torch.from_numpy(axis_matrix(o, n, order).copy())
        for o, n, order in zip(old, new, orders, strict=True)
    )
    return z, y, x


def at_once(scores_KZYX: Tensor, new: Shape) -> Tensor:
    """Torch's own linear interpolation of all classes together."""
    return nn.functional.interpolate(scores_KZYX[None].float(), new, mode="trilinear", align_corners=False)[0]


@SLABS
@NEW
def test_labels_are_the_argmax_of_everything_resampled(
    new: Shape, slab_voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    scores = scores_of()
    labels = labels_of(scores, matrices_of(OLD, new))
    assert (tuple(labels.shape), labels.dtype) == (new, torch.int16)
    assert torch.equal(labels, at_once(scores, new).argmax(0).to(torch.int16))


@SLABS
def test_any_operators_are_applied_along_their_axes(slab_voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearest along a thick first axis, cubic and linear along the others."""
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    scores, new = scores_of(), (16, 5, 23)
    z, y, x = matrices_of(OLD, new, (0, 3, 1))
    assert z is not None
    assert y is not None
    assert x is not None
    expected = np.einsum("az,by,cx,kzyx->kabc", z.double(), y.double(), x.double(), scores.double(), optimize=True)
    np.testing.assert_array_equal(labels_of(scores, (z, y, x)).numpy(), expected.argmax(0))


@NEW
def test_a_slab_is_that_part_of_the_whole(new: Shape) -> None:
    scores, matrices = scores_of(1), matrices_of(OLD, new)
    window = slice(new[0] // 3, new[0] // 3 + max(1, new[0] // 2))
    torch.testing.assert_close(resampled_slab(scores[0], matrices, window), at_once(scores, new)[0, window])


def test_without_operators_labels_are_the_plain_argmax() -> None:
    scores = scores_of(5)
    assert torch.equal(labels_of(scores, (None, None, None)), scores.argmax(0).to(torch.int16))


def test_equal_scores_go_to_the_first_class() -> None:
    scores = torch.tensor([0.0, 2.0, 2.0, 1.0]).reshape(4, 1, 1, 1).expand(4, *OLD)
    assert (labels_of(scores, matrices_of(OLD, (9, 9, 9))) == 1).all()


def test_there_may_be_more_classes_than_a_byte_counts() -> None:
    scores = torch.zeros(300, 2, 2, 2)
    scores[299], scores[3, 0] = 1.0, 2.0
    labels = labels_of(scores, (None, None, None))
    assert (labels[0] == 3).all()
    assert (labels[1] == 299).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened_before_it_is_resampled(dtype: torch.dtype) -> None:
    scores, matrices = scores_of().to(dtype), matrices_of(OLD, (13, 15, 17))
    assert torch.equal(labels_of(scores, matrices), labels_of(scores.float(), matrices))


@SLABS
@NEW
def test_probabilities_of_logits_are_the_softmax_of_everything_resampled(
    new: Shape, slab_voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    scores = 3 * scores_of()
    found = probabilities_of(scores, matrices_of(OLD, new), are_logits=True)
    assert (tuple(found.shape), found.dtype) == ((4, *new), torch.float16)
    torch.testing.assert_close(found.float(), at_once(scores, new).softmax(0), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(found.float().sum(0), torch.ones(new), rtol=0, atol=2e-3)


@SLABS
def test_probabilities_stay_probabilities(slab_voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    shares, new = scores_of().softmax(0), (13, 15, 6)
    found = probabilities_of(shares, matrices_of(OLD, new), are_logits=False)
    torch.testing.assert_close(found.float(), at_once(shares, new), rtol=2e-3, atol=2e-4)
    torch.testing.assert_close(found.float().sum(0), torch.ones(new), rtol=0, atol=2e-3)


def test_without_operators_probabilities_are_kept_as_they_are() -> None:
    shares = scores_of().softmax(0)
    assert torch.equal(probabilities_of(shares, (None, None, None), are_logits=False), shares.half())


@SLABS
def test_no_slab_of_a_class_is_larger_than_allowed(slab_voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    whole = export.resampled_slab
    heights = []

    def remember(scores_ZYX: Tensor, matrices: Matrices, window: slice) -> Tensor:
        slab = whole(scores_ZYX, matrices, window)
        heights.append(len(slab))
        assert slab.numel() <= max(slab_voxels, slab[0].numel())
        return slab

    monkeypatch.setattr(export, "resampled_slab", remember)
    labels_of(scores_of(2), matrices_of(OLD, (20, 15, 16)))
    assert sum(heights) == 2 * 20
