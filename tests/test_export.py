"""network/export.py: slab by slab gives what resampling everything at once gives."""

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autoseg.image.resample import axis_matrix
from autoseg.network import export
from autoseg.network.export import Matrices, Wanted, slabs

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


def labels_of(scores_KZYX: Tensor, matrices: Matrices) -> Tensor:
    made = slabs([scores_KZYX], scores_KZYX.shape[1:], matrices, Wanted(are_logits=True))
    return torch.cat([each.labels_ZYX for each in made])


def probabilities_of(scores_KZYX: Tensor, matrices: Matrices, are_logits: bool) -> Tensor:
    made = slabs([scores_KZYX], scores_KZYX.shape[1:], matrices, Wanted(are_logits, probabilities=True))
    return torch.cat([each.probabilities_KZYX for each in made if each.probabilities_KZYX is not None], 1)


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


@SLABS
@NEW
@pytest.mark.parametrize("cuts", [(7,), (1, 1, 1, 1, 1, 1, 1), (3, 2, 2)], ids=str)
def test_scores_may_come_in_blocks_that_are_overwritten(
    new: Shape, slab_voxels: int, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    scores, buffer = scores_of(), torch.empty(4, 7, *OLD[1:])

    def blocks() -> Iterator[Tensor]:
        start = 0
        for rows in cuts:
            block = buffer[:, :rows]
            block.copy_(scores[:, start : start + rows])
            yield block
            buffer.fill_(float("nan"))
            start += rows

    found = torch.cat([each.labels_ZYX for each in slabs(blocks(), OLD, matrices_of(OLD, new), Wanted(True))])
    assert torch.equal(found, labels_of(scores, matrices_of(OLD, new)))


@pytest.mark.parametrize("edge", [3, 5, 128])
def test_tiles_and_classes_that_cannot_win_change_nothing(edge: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TILE_EDGE", edge)
    monkeypatch.setattr(export, "TILE_VOXELS", 3 * edge**2)
    tried = []
    whole = export._candidates
    monkeypatch.setattr(export, "_candidates", lambda tile: tried.append(list(whole(tile))) or tried[-1])
    place = torch.arange(9.0).reshape(9, 1)
    scores = torch.stack([-((place - k) ** 2) for k in range(0, 9, 2)]).unsqueeze(1).expand(5, 7, 9, 11) + scores_of(5)
    new = (13, 21, 30)
    labels = labels_of(scores, matrices_of(OLD, new))
    assert torch.equal(labels, at_once(scores, new).argmax(0).to(torch.int16))
    assert (min(map(len, tried)) < 5) == (edge < 128)


def test_a_cubic_operator_overshoots_so_no_class_is_left_out() -> None:
    """Between two high samples a spline rises above both, here above a constant class that is larger than either."""
    scores = torch.zeros(2, 1, 1, 8)
    scores[0, ..., 3:5] = 1.0
    scores[1] = 1.02
    matrix = torch.from_numpy(axis_matrix(8, 32, 3).copy())
    expected = (scores @ matrix.T).argmax(0)
    assert (expected == 0).any()
    assert torch.equal(labels_of(scores, (None, None, matrix)), expected.to(torch.int16))


@SLABS
def test_entropy_is_one_where_all_classes_are_alike_and_nothing_where_one_is_sure(
    slab_voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    logits = torch.zeros(4, 2, 2, 2)
    logits[2, 1] = 100.0
    wanted = Wanted(True, uncertainty=True)
    entropy = torch.cat([each.entropy_ZYX for each in slabs([logits], (2, 2, 2), (None, None, None), wanted)])
    torch.testing.assert_close(entropy, torch.tensor([1.0, 0.0]).reshape(2, 1, 1).expand(2, 2, 2))


def test_mutual_information_is_what_the_members_do_not_share() -> None:
    """Two members, sure of different classes in the first voxel and both undecided in the second."""
    members = torch.tensor([[[1.0, 0.5], [0.0, 0.5]], [[0.0, 0.5], [1.0, 0.5]]]).reshape(2, 2, 1, 1, 2)
    mean = members.mean(0)
    mutual = torch.xlogy(members, members).sum(1).mean(0) - torch.xlogy(mean, mean).sum(0)
    scores = torch.cat((mean, mutual[None]))
    wanted = Wanted(False, uncertainty=True, mutual=True)
    [slab] = slabs([scores], (1, 1, 2), (None, None, None), wanted)
    assert slab.entropy_ZYX is not None
    assert slab.mutual_ZYX is not None
    torch.testing.assert_close(slab.entropy_ZYX.flatten(), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(slab.mutual_ZYX.flatten(), torch.tensor([1.0, 0.0]))


def test_members_that_agree_share_everything_also_between_voxels() -> None:
    """Two members, both sure of one class and then of the other: between the voxels the mean is undecided, not they."""
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]]).reshape(3, 1, 1, 2)
    matrix = torch.from_numpy(axis_matrix(2, 4, 1).copy())
    [slab] = slabs([scores], (1, 1, 4), (None, None, matrix), Wanted(False, uncertainty=True, mutual=True))
    assert slab.entropy_ZYX is not None
    assert slab.mutual_ZYX is not None
    assert slab.entropy_ZYX.max() > 0.5
    assert slab.mutual_ZYX.max() == 0


def test_regions_are_painted_over_each_other_in_their_order() -> None:
    logits = torch.tensor([[1.0, 1.0, -1.0, -1.0], [-1.0, 2.0, 0.5, -1.0]]).reshape(2, 1, 1, 4)
    wanted = Wanted(True, activation="sigmoid", paints=(5, 2))
    [slab] = slabs([logits], (1, 1, 4), (None, None, None), wanted)
    assert slab.labels_ZYX.flatten().tolist() == [5, 2, 2, 0]
    [slab] = slabs([logits.sigmoid()], (1, 1, 4), (None, None, None), Wanted(False, True, paints=(5, 2)))
    assert slab.labels_ZYX.flatten().tolist() == [5, 2, 2, 0]


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
    assert (tuple(found.shape), found.dtype) == ((4, *new), torch.float32)
    torch.testing.assert_close(found, at_once(scores, new).softmax(0))
    torch.testing.assert_close(found.sum(0), torch.ones(new))


@SLABS
def test_probabilities_stay_probabilities(slab_voxels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    shares, new = scores_of().softmax(0), (13, 15, 6)
    found = probabilities_of(shares, matrices_of(OLD, new), are_logits=False)
    torch.testing.assert_close(found, at_once(shares, new))
    torch.testing.assert_close(found.sum(0), torch.ones(new))


def test_without_operators_probabilities_are_kept_as_they_are() -> None:
    shares = scores_of().softmax(0)
    assert torch.equal(probabilities_of(shares, (None, None, None), are_logits=False), shares)


@SLABS
def test_no_slab_is_larger_than_allowed_and_the_first_may_be_lower(
    slab_voxels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "SLAB_VOXELS", slab_voxels)
    matrices = matrices_of(OLD, (20, 15, 16))
    made = list(slabs([scores_of(2)], OLD, matrices, Wanted(True), first_height=1))
    assert all(each.labels_ZYX.numel() <= max(slab_voxels, 15 * 16) for each in made)
    assert made[0].window == slice(0, 1)
    assert [each.window.start for each in made[1:]] == [each.window.stop for each in made[:-1]]
    assert made[-1].window.stop == 20


def test_threads_to_come_are_as_many_as_before_when_slabs_are_left_early() -> None:
    before, found = torch.get_num_threads(), list[int]()
    torch.set_num_threads(2)
    try:
        scores = scores_of()
        made = slabs([scores], scores.shape[1:], (None, None, None), Wanted(are_logits=True), first_height=1)
        next(made)
        made.close()
        other = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        other.start()
        other.join()
        assert found == [2]
    finally:
        torch.set_num_threads(before)
