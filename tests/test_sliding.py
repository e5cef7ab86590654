"""network/sliding.py: tiles cover the image, and their weighted mean is what a plain double loop computes."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from autoseg.errors import UserError
from autoseg.network import accumulators, unet
from autoseg.network.accumulators import (
    Place,
    Room,
    accumulator_bytes,
    choose_place,
    described,
    free_ram_bytes,
    room_of,
)
from autoseg.network.device import Device
from autoseg.network.less_memory import sums_bytes
from autoseg.network.memory import allowed_ram_bytes
from autoseg.network.sliding import OVERLAP, Scorer, Tiling, gaussian, mirrorings, score_blocks, tile_starts
from autoseg.records import NetworkSpec

CPU = Device(torch.device("cpu"), "fp32")


def predict_logits(
    network: nn.Module, image_CZYX: Tensor, patch: tuple[int, ...], classes: int, device: Device,
    mirror_axes: tuple[int, ...] = (), progress: Callable[[int, int], None] | None = None, overlap: float = OVERLAP,
) -> Tensor:  # fmt: skip
    """Logits of a whole image, (K, Z, Y, X): the blocks one behind the other."""
    blocks = score_blocks(Scorer([network], classes, device), image_CZYX, Tiling(patch, mirror_axes, overlap), progress)
    return torch.cat([block.clone() for block in blocks], 1)


class Stub(nn.Module):
    """A network that is a function; remembers the shapes and the first images it was shown."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function
        self.seen: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.clone())
        return self.function(x)


def pointwise(x: Tensor) -> Tensor:
    """Three classes, every voxel for itself."""
    return torch.cat((x[:, :1], 2 * x[:, :1] - 1, x[:, :1] ** 2), 1)


def mean_of_tile(x: Tensor) -> Tensor:
    """Two classes; every voxel says what the whole tile is like, so that weights show in the result."""
    mean = x.flatten(2).mean(2).sum(1).reshape(-1, *(1,) * (x.ndim - 1))
    return torch.cat((mean, -mean), 1).expand(-1, -1, *x.shape[2:])


def an_image(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def a_unet(dimension: int) -> nn.Module:
    torch.manual_seed(0)
    spec = NetworkSpec(
        dimension=dimension, in_channels=2, classes=3, features=(4, 8), strides=((1,) * dimension, (2,) * dimension),
        kernels=((3,) * dimension,) * 2, encoder_blocks=(1, 1), decoder_blocks=(1,),
    )  # fmt: skip
    return unet.build(spec).eval()


# ------------------------------------------------------------------------------------------------ tiles and weights


@pytest.mark.parametrize("patch", [1, 2, 16, 17, 48, 96, 128])
@pytest.mark.parametrize("extra", [0, 1, 7, 16, 30, 100, 333])
def test_tiles_cover_the_axis_and_neighbours_share_half(patch: int, extra: int) -> None:
    size = patch + extra
    starts = tile_starts(size, patch)
    assert starts[0] == 0
    assert starts[-1] == size - patch
    assert list(starts) == sorted(set(starts))
    half = patch - patch // 2 if patch > 1 else 1  # an odd patch cannot be halved: a voxel less is shared at most
    assert all(second - first <= half for first, second in itertools.pairwise(starts))


@pytest.mark.parametrize(
    ("size", "patch", "starts"),
    [(10, 16, (0,)), (17, 16, (0, 1)), (24, 16, (0, 8)), (32, 16, (0, 8, 16)), (33, 16, (0, 6, 11, 17))],
)  # fmt: skip
def test_tiles_are_spread_evenly_and_no_more_than_needed(size: int, patch: int, starts: tuple[int, ...]) -> None:
    assert tile_starts(size, patch) == starts


def test_more_overlap_needs_more_tiles() -> None:
    assert len(tile_starts(64, 16, 0.0)) == 4
    assert len(tile_starts(64, 16, 0.5)) == 7
    assert len(tile_starts(64, 16, 0.75)) == 13


@pytest.mark.parametrize("patch", [(16,), (7, 16), (8, 5, 12), (1, 64, 64), (320, 320, 320)[:2], (160, 160, 160)])
def test_the_weights_are_positive_symmetric_and_largest_in_the_middle(patch: tuple[int, ...]) -> None:
    weights = gaussian(patch)
    assert weights.shape == patch
    assert weights.dtype == torch.float32
    assert weights.min() > 0
    assert weights.max() == 1
    for axis in range(len(patch)):
        torch.testing.assert_close(weights, weights.flip(axis))
        line = weights[tuple(slice(None) if a == axis else size // 2 for a, size in enumerate(patch))]
        assert (line.diff()[: patch[axis] // 2 - 1] > 0).all()


def test_the_weights_have_a_standard_deviation_of_an_eighth_of_the_patch() -> None:
    weights = gaussian((64,)).double()
    offset = torch.arange(64) - 31.5
    assert math.sqrt((weights * offset**2).sum() / weights.sum()) == pytest.approx(8.0, rel=0.01)


@pytest.mark.parametrize(("axes", "subsets"), [((), {()}), ((1,), {(), (1,)}), ((0, 2), {(), (0,), (2,), (0, 2)})])
def test_every_subset_of_the_axes_is_mirrored(axes: tuple[int, ...], subsets: set[tuple[int, ...]]) -> None:
    found = mirrorings(axes)
    assert found[0] == ()
    assert len(found) == len(subsets)
    assert set(found) == subsets


def test_three_axes_are_mirrored_in_eight_ways() -> None:
    assert len(set(mirrorings((0, 1, 2)))) == 8


# ------------------------------------------------------------------------------------------------ whole images


SHAPES = pytest.mark.parametrize(
    ("shape", "patch"),
    [((20, 17, 30), (8, 8, 16)), ((5, 9, 40), (8, 16, 16)), ((10, 20, 33), (16, 16)), ((3, 9, 9), (16, 16))],
)  # fmt: skip


@SHAPES
def test_a_constant_network_gives_its_constant(shape: tuple[int, ...], patch: tuple[int, ...]) -> None:
    values = torch.tensor([0.25, -3.0])
    network = Stub(lambda x: values.reshape(1, 2, *(1,) * len(patch)).expand(len(x), 2, *patch))
    logits = predict_logits(network, an_image(1, *shape), patch, 2, CPU, mirror_axes=(0, 1))
    assert (logits.shape, logits.dtype) == ((2, *shape), torch.float32)
    torch.testing.assert_close(logits, values.reshape(2, 1, 1, 1).expand(2, *shape))


@SHAPES
def test_a_pointwise_network_gives_what_it_gives_on_the_whole_image(
    shape: tuple[int, ...], patch: tuple[int, ...]
) -> None:
    image = an_image(1, *shape)
    network = Stub(pointwise)
    logits = predict_logits(network, image, patch, 3, CPU, mirror_axes=(0, 1))
    torch.testing.assert_close(logits, pointwise(image[None])[0], rtol=1e-4, atol=1e-5)
    assert {tuple(seen.shape[2:]) for seen in network.seen} == {patch}


@SHAPES
@pytest.mark.parametrize("place", ["device", "ram", "memory map"])
def test_how_many_tiles_share_a_pass_and_where_sums_lie_does_not_matter(
    shape: tuple[int, ...], patch: tuple[int, ...], place: Place
) -> None:
    image = an_image(1, *shape)
    one = predict_logits(Stub(mean_of_tile), image, patch, 2, CPU, mirror_axes=(0, 1))
    network = Stub(mean_of_tile)
    tiling = Tiling(patch, (0, 1), samples=11, place=place)
    blocks = [each.clone() for each in score_blocks(Scorer([network], 2, CPU), image, tiling)]
    torch.testing.assert_close(torch.cat(blocks, 1), one)
    assert 4 <= max(len(seen) for seen in network.seen) <= 11 * min(shape[0], 8)
    assert len(network.seen) < 4 * len(blocks) * 30


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("patch", [(4, 4, 4), (4, 4)])
def test_scores_that_are_no_numbers_are_refused_before_they_become_background(
    patch: tuple[int, ...], value: float
) -> None:
    network = Stub(lambda x: torch.cat((x, x.masked_fill(x > 2, value)), 1))
    image = an_image(1, 12, 8, 8).clamp(max=1)
    assert len(predict_logits(network, image, patch, 2, CPU)) == 2
    image[0, 11, 6, 6] = 3
    with pytest.raises(UserError, match=r"scores are NaN or infinite, computed in fp32\. .* train it anew"):
        predict_logits(network, image, patch, 2, CPU)


def test_only_as_many_slices_are_held_as_a_patch_is_thick() -> None:
    image, heights = an_image(1, 40, 9, 10), []
    for block in score_blocks(Scorer([Stub(pointwise)], 3, CPU), image, Tiling((8, 8, 8))):
        assert block.untyped_storage().nbytes() == 3 * 8 * 9 * 10 * 4
        heights.append(block.shape[1])
    assert sum(heights) == 40
    assert accumulator_bytes(3, (40, 9, 10), (8, 8, 8)) == (3 + 1) * 8 * 9 * 10 * 4


def test_the_whole_slices_of_a_2d_network_count_with_its_sums() -> None:
    """Rows leave in patches, but blocks hold every row of some slices: with Y far above the patch they are the most."""
    image = an_image(1, 10, 90, 9)
    tiling = Tiling((8, 8))
    blocks = score_blocks(Scorer([Stub(pointwise)], 3, CPU), image, tiling)
    largest = max(block.untyped_storage().nbytes() for block in blocks)
    assert largest == 3 * 8 * 90 * 9 * 4
    assert sums_bytes(tiling, 3, (10, 90, 9)) == largest + (3 * 8 + 1) * 8 * 9 * 4
    assert sums_bytes(tiling, 3, (1, 90, 9)) == (3 * 90 + (3 + 1) * 8) * 9 * 4
    assert sums_bytes(Tiling((8, 8, 8)), 2, (10, 90, 9)) == accumulator_bytes(2, (10, 90, 9), (8, 8, 8))


def test_what_the_allocator_holds_without_use_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("mem_get_info", (100, 900)), ("memory_reserved", 70), ("memory_allocated", 20)):
        monkeypatch.setattr(f"torch.cuda.{name}", lambda card, value=value: value)
    assert room_of(Device(torch.device("cuda", 0), "bf16")).device == 150
    assert room_of(CPU).device == 0


def test_tiles_that_are_the_same_everywhere_are_computed_once_with_the_same_result() -> None:
    image = an_image(2, 8, 40, 40)
    image[:, :, :, 8:] = torch.tensor([0.5, -1.0]).reshape(2, 1, 1, 1)
    network, calls = a_unet(3), []
    network.register_forward_hook(lambda *_: calls.append(1))
    found = predict_logits(network, image, (8, 16, 16), 3, CPU)
    skipping = len(calls)
    image[:, :, :, 8:] += 1e-7 * torch.randn(8, 40, 32, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(predict_logits(network, image, (8, 16, 16), 3, CPU), found, rtol=1e-4, atol=1e-4)
    assert skipping == 4 + 1  # of 4 x 4 tiles those of the first column, and one of the others
    assert len(calls) == skipping + 16


def test_several_networks_are_averaged_as_probabilities_in_one_set_of_sums() -> None:
    image, networks = an_image(2, 8, 16, 16), [a_unet(3), a_unet(3)]
    with torch.no_grad():
        for parameter in networks[1].parameters():
            parameter.mul_(-1.5)
        shares = torch.stack([network(image[None])[0].softmax(0) for network in networks])
    scorer = Scorer(networks, 3, CPU, mutual=True)
    [block] = score_blocks(scorer, image, Tiling((8, 16, 16)))
    assert not scorer.are_logits
    torch.testing.assert_close(block[:3], shares.mean(0), rtol=1e-4, atol=1e-5)
    mean = shares.mean(0)
    mutual = torch.xlogy(shares, shares).sum(1).mean(0) - torch.xlogy(mean, mean).sum(0)
    torch.testing.assert_close(block[3], mutual, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("needed", "room", "place"),
    [
        (10, Room(100, 100), "device"),
        (60, Room(100, 200), "ram"),
        (60, Room(0, 200), "ram"),
        (60, Room(0, 70), "memory map"),
    ],
)
def test_the_place_of_the_sums_follows_from_sizes(needed: int, room: Room, place: Place) -> None:
    assert choose_place(needed, room) == place
    assert "in a temporary file" in described("memory map", 2**30, CPU)


def test_free_memory_is_what_the_system_has_within_what_the_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert 2**20 < free_ram_bytes() <= allowed_ram_bytes()
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 17 kB\nMemAvailable:    2048 kB\n")
    for has, free in ((2**30, 2**21), (2**20, 2**20)):
        monkeypatch.setattr(accumulators, "machine_ram_bytes", lambda has=has: has)
        assert free_ram_bytes(tmp_path, tmp_path / "own", tmp_path / "meminfo") == free


@pytest.mark.parametrize("overlap", [0.5, 0.75])
def test_overlapping_tiles_are_averaged_with_their_weights(overlap: float) -> None:
    image, patch = an_image(2, 9, 14, 21), (8, 8, 12)
    total, norm = torch.zeros(2, 9, 14, 21), torch.zeros(9, 14, 21)
    starts = [tile_starts(size, p, overlap) for size, p in zip((9, 14, 21), patch, strict=True)]
    for z, y, x in itertools.product(*starts):
        window = (slice(z, z + 8), slice(y, y + 8), slice(x, x + 12))
        said = image[(slice(None), *window)].mean((1, 2, 3)).sum()
        total[(slice(None), *window)] += torch.stack((said, -said)).reshape(2, 1, 1, 1) * gaussian(patch)
        norm[window] += gaussian(patch)
    logits = predict_logits(Stub(mean_of_tile), image, patch, 2, CPU, overlap=overlap)
    torch.testing.assert_close(logits, total / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dimension", [2, 3])
def test_an_image_of_the_size_of_the_patch_is_evaluated_once_as_it_is(dimension: int) -> None:
    network, patch = a_unet(dimension), (8, 16, 16)[-dimension:]
    image = an_image(2, 8, 16, 16)
    calls: list[tuple[int, int]] = []
    logits = predict_logits(network, image, patch, 3, CPU, progress=lambda done, of: calls.append((done, of)))
    with torch.no_grad():
        direct = network(image.transpose(0, 1)).transpose(0, 1) if dimension == 2 else network(image[None])[0]
    torch.testing.assert_close(logits, direct, rtol=1e-4, atol=1e-5)
    assert calls == [(1, 1)]
    assert not logits.requires_grad


def test_an_image_smaller_than_the_patch_lies_in_the_middle_of_zeros() -> None:
    image, network = an_image(1, 3, 10, 20), Stub(pointwise)
    logits = predict_logits(network, image, (8, 16, 16), 3, CPU)
    assert logits.shape == (3, 3, 10, 20)
    assert len(network.seen) == 2
    tile = torch.tensor(network.seen[0][0, 0].tolist())
    assert torch.equal(tile[2:5, 3:13], image[0, :, :, :16])
    tile[2:5, 3:13] = 0
    assert not tile.any()


def test_mirrored_passes_are_mirrored_back_and_averaged() -> None:
    """A network that only knows the places in its patch: mirroring makes its answer symmetric along those axes."""
    ramp = torch.arange(8.0).reshape(8, 1, 1) + 10 * torch.arange(6.0).reshape(6, 1) + 100 * torch.arange(4.0)
    network = Stub(lambda x: ramp.expand(1, 2, 8, 6, 4))
    logits = predict_logits(network, an_image(1, 8, 6, 4), (8, 6, 4), 2, CPU, mirror_axes=(0, 2))
    expected = (3.5 + 10 * torch.arange(6.0).reshape(6, 1) + 150.0).expand(8, 6, 4)
    torch.testing.assert_close(logits[1], expected)
    assert len(network.seen) == 4
    for seen, flip in zip(network.seen, ((), (2,), (4,), (2, 4)), strict=True):
        assert torch.equal(seen, network.seen[0].flip(flip))


def test_mirroring_a_unet_is_the_mean_of_its_mirrored_answers() -> None:
    network, image = a_unet(2), an_image(2, 1, 16, 16)
    logits = predict_logits(network, image, (16, 16), 3, CPU, mirror_axes=(1,))
    with torch.no_grad():
        straight = network(image[:, 0][None])
        mirrored = network(image[:, 0][None].flip(3)).flip(3)
    assert not torch.allclose(straight, mirrored)
    torch.testing.assert_close(logits[:, 0], (straight + mirrored)[0] / 2, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("slices", [1, 8, 19])
def test_slices_of_a_2d_network_do_not_know_each_other(slices: int) -> None:
    network, image = a_unet(2), an_image(2, slices, 20, 16)
    together = predict_logits(network, image, (16, 16), 3, CPU)
    alone = [predict_logits(network, image[:, [z]], (16, 16), 3, CPU) for z in range(slices)]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-4, atol=1e-5)


def test_progress_counts_every_tile_once() -> None:
    calls: list[tuple[int, int]] = []
    predict_logits(
        Stub(pointwise), an_image(1, 10, 24, 24), (16, 16), 3, CPU, progress=lambda done, of: calls.append((done, of))
    )
    assert calls == [(number, 8) for number in range(1, 9)]  # 2 x 2 tiles for each of 2 batches of slices


def test_mixed_precision_reaches_the_network_and_ends_in_float32() -> None:
    kinds = []

    def remember(x: Tensor) -> Tensor:
        found = nn.functional.conv3d(x, torch.ones(2, 1, 1, 1, 1))
        kinds.append(found.dtype)
        return found

    logits = predict_logits(Stub(remember), an_image(1, 8, 8, 8), (8, 8, 8), 2, Device(torch.device("cpu"), "bf16"))
    assert kinds == [torch.bfloat16]
    assert logits.dtype == torch.float32
