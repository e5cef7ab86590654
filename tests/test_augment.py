"""Augmentation: chance drawn apart from its effect, in 2D and 3D; labels follow the image."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import interpolate, ndimage, stats
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network import augment, movement
from autoseg.network.augment import Drawn, apply, draw, enlarged_patch, move
from autoseg.network.device import sent_together
from autoseg.records import AugmentSpec

NOTHING = {
    "rotation_chance": 0.0,
    "scale_chance": 0.0,
    "noise_chance": 0.0,
    "blur_chance": 0.0,
    "brightness_chance": 0.0,
    "contrast_chance": 0.0,
    "low_resolution_chance": 0.0,
    "gamma_inverted_chance": 0.0,
    "gamma_chance": 0.0,
}
PATCHES = [(12, 16), (8, 12, 10)]


def spec_for(patch: tuple[int, ...], **changes: object) -> AugmentSpec:
    return AugmentSpec(rotation_rad=(0.5,) * (3 if len(patch) == 3 else 1), **changes)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def still(patch: tuple[int, ...], batch: int = 2, channels: int = 2) -> Drawn:
    """A draw that changes nothing."""
    return draw(spec_for(patch, **NOTHING), batch, channels, patch, seeded())


def batch_of(shape: tuple[int, ...], batch: int = 2, channels: int = 2) -> tuple[Tensor, Tensor]:
    """Positive image noise and labels -1..2."""
    image = torch.rand(batch, channels, *shape, generator=seeded(1)) + 0.1
    return image, torch.randint(-1, 3, (batch, *shape), generator=seeded(2), dtype=torch.int16)


def ball(shape: tuple[int, ...]) -> Tensor:
    """(1, ...) int16: a class-2 ball with a class-1 half, off the centre."""
    places = np.meshgrid(*(np.arange(s) - (s - 1) / 2 for s in shape), indexing="ij")
    radius = np.sqrt(sum(p**2 for p in places))
    labels = np.where(radius < min(shape) * 0.33, np.where(places[-1] + places[0] > 1, 1, 2), 0)
    return torch.from_numpy(labels.astype(np.int16))[None]


# ------------------------------------------------------------------------------------------------ as a whole


@pytest.mark.parametrize("patch", PATCHES)
def test_with_all_chances_zero_a_batch_is_only_centre_cropped(patch: tuple[int, ...]) -> None:
    image, labels = batch_of(tuple(size + 3 for size in patch))
    before = image.clone()
    result, result_labels = apply(image, labels, still(patch), patch, classes=3)
    middle = tuple(slice(1, 1 + size) for size in patch)
    assert torch.equal(result, before[:, :, *middle])
    assert torch.equal(result_labels, labels[:, *middle])
    assert result_labels.dtype == torch.int16


@pytest.mark.parametrize("in_plane", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_the_effect_is_repeatable_and_leaves_its_input_alone(patch: tuple[int, ...], in_plane: bool) -> None:
    spec = spec_for(patch, mirror_axes=(0, 1), turn_in_plane_only=in_plane, elastic_chance=0.5)
    image, labels = batch_of(enlarged_patch(spec, patch), batch=16)
    before, labels_before = image.clone(), labels.clone()
    drawn = draw(spec, 16, 2, patch, seeded(3))
    first, again = apply(image, labels, drawn, patch, 3), apply(image, labels, drawn, patch, 3)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert torch.equal(image, before)
    assert torch.equal(labels, labels_before)
    assert first[0].shape == (16, 2, *patch)
    assert first[0].isfinite().all()
    assert set(first[1].unique().tolist()) <= {-1, 0, 1, 2}
    assert not torch.equal(first[0], apply(image, labels, draw(spec, 16, 2, patch, seeded(4)), patch, 3)[0])


@pytest.mark.parametrize("in_plane", [False, True])
@pytest.mark.parametrize("patch", PATCHES)
def test_what_lies_like_an_image_is_moved_like_one_and_not_changed(patch: tuple[int, ...], in_plane: bool) -> None:
    spec = spec_for(patch, mirror_axes=(0, 1), turn_in_plane_only=in_plane, elastic_chance=0.5)
    image, labels = batch_of(enlarged_patch(spec, patch), batch=16)
    drawn = draw(spec, 16, 2, patch, seeded(3))
    moved, mirrored = drawn.matrix_BDD, drawn.mirror_BD
    alone = replace(
        still(patch, 16), matrix_BDD=moved, moved_B=drawn.moved_B, mirror_BD=mirrored,
        in_plane_only=drawn.in_plane_only, bend_BDP=drawn.bend_BDP,
    )  # fmt: skip
    assert drawn.moved_B.any()
    assert mirrored.any()
    assert torch.equal(move(image, drawn, patch), apply(image, labels, alone, patch, 3)[0])


def test_the_generator_is_all_the_chance_there_is() -> None:
    spec = spec_for((8, 8, 8), mirror_axes=(0, 1, 2), elastic_chance=0.5)
    one, two = (draw(spec, 8, 2, (8, 8, 8), seeded(5)) for _ in range(2))
    torch.manual_seed(1)
    for name, value in vars(one).items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(getattr(two, name))), name


@pytest.mark.parametrize("patch", PATCHES)
def test_samples_do_not_influence_each_other(patch: tuple[int, ...]) -> None:
    spec = spec_for(patch, mirror_axes=(0, 1), elastic_chance=0.5)
    image, labels = batch_of(enlarged_patch(spec, patch), batch=12)
    drawn = draw(spec, 12, 2, patch, seeded(6))
    together = apply(image, labels, drawn, patch, 3)
    for i in range(12):
        own = Drawn(**{k: v[i : i + 1] if isinstance(v, Tensor) else v for k, v in vars(drawn).items()})
        alone = apply(image[i : i + 1], labels[i : i + 1], own, patch, 3)
        torch.testing.assert_close(alone[0], together[0][i : i + 1])
        assert torch.equal(alone[1], together[1][i : i + 1])


def test_chances_are_met() -> None:
    patch, many, channels = (6, 6, 6), 4000, 3
    spec = AugmentSpec(rotation_rad=(0.5, 0.4, 0.3), mirror_axes=(0, 2), elastic_chance=0.4)
    drawn = draw(spec, many, channels, patch, seeded(7))
    scaled = torch.linalg.det(drawn.matrix_BDD).sub(1).abs() > 1e-4
    turned = (drawn.matrix_BDD / torch.linalg.det(drawn.matrix_BDD).pow(1 / 3).view(-1, 1, 1) - torch.eye(3)).abs()
    seen = {
        "rotation": (turned.flatten(1).amax(1) > 1e-4, 0.2),
        "scale": (scaled, 0.2),
        "bending": ((drawn.bend_BDP != 0).flatten(1).all(1), 0.4),
        "moved": (drawn.moved_B, 1 - 0.8 * 0.8 * 0.6),
        "noise": (drawn.noise_sigma_B > 0, 0.1),
        "brightness": ((drawn.brightness_BC != 1).any(1), 0.15),
        "contrast": ((drawn.contrast_BC != 1).any(1), 0.15),
        "gamma inverted": ((drawn.gamma_inverted_BC != 1).any(1), 0.1),
        "gamma": ((drawn.gamma_BC != 1).any(1), 0.3),
        "blur, first channel": ((drawn.blur_sigma_BCD[:, 0] > 0).all(1), 0.2 * 0.5),
        "low resolution, first channel": (drawn.low_resolution_BC[:, 0] < 1, 0.25 * 0.5),
        "mirror 0": (drawn.mirror_BD[:, 0], 0.5),
        "mirror 2": (drawn.mirror_BD[:, 2], 0.5),
        "brighter": (drawn.brightness_BC[drawn.brightness_BC != 1] > 1, 0.5),
    }
    for what, (happened, chance) in seen.items():
        low, high = stats.binom.interval(0.9999, len(happened), chance)
        assert low <= happened.sum() <= high, what
    assert not drawn.mirror_BD[:, 1].any()


def test_strengths_stay_in_their_ranges() -> None:
    spec = AugmentSpec(rotation_rad=(0.5, 0.4, 0.3), elastic_chance=1.0)
    drawn = draw(spec, 2000, 2, (6, 6, 6), seeded(8))
    scale = torch.linalg.det(drawn.matrix_BDD).pow(1 / 3)
    for values, low, high in (
        (scale, 0.7, 1.4),
        (drawn.bend_BDP, -0.4 * 6 / 4, 0.4 * 6 / 4),
        (drawn.noise_sigma_B, 0, 0.1),
        (drawn.blur_sigma_BCD[drawn.blur_sigma_BCD > 0], 0.5, 1),
        (drawn.brightness_BC, 0.75, 1.25),
        (drawn.contrast_BC, 0.75, 1.25),
        (drawn.low_resolution_BC, 0.5, 1),
        (drawn.gamma_BC, 0.7, 1.5),
    ):
        assert low - 1e-4 <= values.min() < low + 0.05 * (high - low)
        assert high - 0.05 * (high - low) < values.max() <= high + 1e-4


@pytest.mark.parametrize("in_plane", [False, True])
@pytest.mark.parametrize(("patch", "axis", "plane"), [
    ((6, 6), 0, (0, 1)), ((6, 6, 6), 0, (1, 2)), ((6, 6, 6), 1, (0, 2)), ((6, 6, 6), 2, (0, 1)),
])  # fmt: skip
def test_angles_are_drawn_to_both_sides_up_to_the_limit_of_their_axis(
    patch: tuple[int, ...], axis: int, plane: tuple[int, int], in_plane: bool
) -> None:
    limits = [0.0] * (3 if len(patch) == 3 else 1)
    limits[axis] = 0.7
    spec = AugmentSpec(rotation_rad=tuple(limits), turn_in_plane_only=in_plane, **NOTHING | {"rotation_chance": 1.0})
    matrix_BDD = draw(spec, 1000, 1, patch, seeded(8)).matrix_BDD
    first, second = plane
    angle_B = torch.atan2(matrix_BDD[:, second, first], matrix_BDD[:, first, first])
    expected_BDD = torch.eye(len(patch)).repeat(1000, 1, 1)
    expected_BDD[:, first, first] = expected_BDD[:, second, second] = angle_B.cos()
    expected_BDD[:, second, first], expected_BDD[:, first, second] = angle_B.sin(), -angle_B.sin()
    torch.testing.assert_close(matrix_BDD, expected_BDD)
    if in_plane and len(patch) == 3 and axis != 0:
        assert angle_B.abs().max() == 0
        return
    assert -0.7 - 1e-5 <= angle_B.min() < -0.67
    assert 0.67 < angle_B.max() <= 0.7 + 1e-5
    assert stats.kstest(angle_B.numpy(), stats.uniform(-0.7, 1.4).cdf).pvalue > 1e-3


# ------------------------------------------------------------------------------------------------ movement


@pytest.mark.parametrize("classes", [3, None])
@pytest.mark.parametrize("in_plane", [False, True])
@pytest.mark.parametrize("patch", [(40, 44), (28, 32, 30)])
def test_labels_move_with_the_image(patch: tuple[int, ...], in_plane: bool, classes: int | None) -> None:
    moving = dict.fromkeys(("rotation_chance", "scale_chance", "elastic_chance"), 1.0)
    spec = spec_for(patch, **NOTHING | moving, turn_in_plane_only=in_plane)
    labels = ball(enlarged_patch(spec, patch)).repeat(4, *[1] * len(patch))
    image = labels.unsqueeze(1).float()
    moved, moved_labels = apply(image, labels, draw(spec, 4, 1, patch, seeded(9)), patch, classes)
    still_labels = apply(image, labels, still(patch, 4, 1), patch)[1]
    assert (moved_labels != still_labels).float().mean() > 0.02
    assert set(moved_labels.unique().tolist()) == {0, 1, 2}
    for label in (1, 2):
        inside = moved_labels == label
        sure = (moved[:, 0] - label).abs() < 0.02
        assert (sure & inside).sum() / inside.sum() > 0.4
    flat = (moved[:, 0] < 0.02) | (moved[:, 0] > 1.98)
    assert torch.equal(moved_labels[flat].float(), moved[:, 0][flat].round())
    ignoring = apply(image, labels, draw(spec, 4, 1, patch, seeded(9)), patch, classes, -1)[1]
    assert (ignoring == moved_labels)[ignoring >= 0].float().mean() > 0.999  # where two are as near either may win


def test_a_quarter_turn_is_rot90_and_lies_in_the_plane_of_its_axis() -> None:
    patch = (6, 6, 6)
    image, labels = batch_of(patch, batch=1)
    for axis, plane in ((0, (1, 2)), (1, (0, 2)), (2, (0, 1))):
        angles = np.zeros((1, 3), np.float32)
        angles[0, axis] = math.pi / 2
        matrix = torch.from_numpy(augment._matrices(angles, np.ones(1, np.float32), 3, False))
        drawn = replace(still(patch, 1), matrix_BDD=matrix, moved_B=torch.tensor([True]))
        result, result_labels = apply(image, labels, drawn, patch, 3)
        turned = torch.rot90(image, -1, [p + 2 for p in plane])
        torch.testing.assert_close(result, turned, atol=1e-4, rtol=0)
        assert torch.equal(result_labels, torch.rot90(labels, -1, [p + 1 for p in plane]))


def test_movement_equals_a_resampling_with_scipy() -> None:
    patch, size = (9, 11, 10), (13, 14, 15)
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=size), 1.5)
    drawn = draw(spec_for(patch, **NOTHING | {"rotation_chance": 1.0, "scale_chance": 1.0}), 1, 1, patch, seeded(11))
    result, _ = apply(torch.from_numpy(image)[None, None], torch.zeros(1, *size, dtype=torch.int16), drawn, patch)
    matrix = drawn.matrix_BDD[0].double().numpy()
    start = np.array([(s - p) // 2 for s, p in zip(size, patch, strict=True)])
    middle = (np.array(patch) - 1) / 2
    expected = ndimage.affine_transform(
        image, matrix, start + middle - matrix @ middle, patch, order=1, mode="grid-constant"
    )
    np.testing.assert_allclose(result[0, 0].numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("patch", [(36, 47), (20, 31, 24)])
def test_bending_equals_a_resampling_at_the_places_of_scipys_splines(patch: tuple[int, ...]) -> None:
    size = tuple(s + 5 for s in patch)
    image = ndimage.gaussian_filter(np.random.default_rng(0).normal(size=size), 1.5)
    chances = {"rotation_chance": 1.0, "scale_chance": 1.0, "elastic_chance": 1.0}
    drawn = draw(spec_for(patch, **NOTHING | chances), 1, 1, patch, seeded(11))
    result, _ = apply(torch.from_numpy(image)[None, None], torch.zeros(1, *size, dtype=torch.int16), drawn, patch)
    bend_DP = drawn.bend_BDP[0].numpy()
    shift_DV = bend_DP.astype(float)
    for axis, voxels in enumerate(patch):
        cells = bend_DP.shape[1 + axis] - 3
        spline = interpolate.BSpline(np.arange(-3, cells + 4), np.moveaxis(shift_DV, 1 + axis, 0), 3)
        shift_DV = np.moveaxis(spline((np.arange(voxels) + 0.5) * cells / voxels), 0, 1 + axis)
    assert 0.3 < shift_DV.std() < 4
    places = np.stack(np.meshgrid(*map(np.arange, patch), indexing="ij")) + shift_DV
    middle = np.reshape((np.array(patch) - 1) / 2, (-1, *[1] * len(patch)))
    start = np.reshape([(s - p) // 2 for s, p in zip(size, patch, strict=True)], middle.shape)
    turned = np.einsum("ij,j...->i...", drawn.matrix_BDD[0].double().numpy(), places - middle) + middle + start
    expected = ndimage.map_coordinates(image, turned, order=1, mode="grid-constant")
    np.testing.assert_allclose(result[0, 0].numpy(), expected, atol=1e-4)


def jacobians(bend_BDP: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Determinants of the slopes of places under a bend, (B, voxels): negative where it folds the patch."""
    matrices = np.eye(len(patch))[None].repeat(len(bend_BDP), 0)
    there = sent_together(movement.places_of(matrices, bend_BDP.numpy(), patch, patch), torch.device("cpu"))
    field_BDV = movement.between_points(bend_BDP, there).double()
    slopes = torch.stack(torch.gradient(field_BDV, dim=tuple(range(2, field_BDV.ndim))), 1).flatten(3)
    slopes = slopes + torch.eye(len(patch)).unsqueeze(-1)
    if len(patch) == 2:
        return slopes[:, 0, 0] * slopes[:, 1, 1] - slopes[:, 0, 1] * slopes[:, 1, 0]
    return (slopes[:, 0] * torch.linalg.cross(slopes[:, 1], slopes[:, 2], dim=1)).sum(1)


@pytest.mark.parametrize("patch", [(40, 44), (28, 32, 30)])
def test_bending_never_folds_a_patch(patch: tuple[int, ...]) -> None:
    drawn = draw(spec_for(patch, **NOTHING | {"elastic_chance": 1.0}), 200, 1, patch, seeded(12))
    largest = augment.BEND_SHARE * (min(patch) / augment.BEND_CELLS)
    extreme = drawn.bend_BDP.sign() * largest
    for bend_BDP in (drawn.bend_BDP, extreme):
        found = torch.cat([jacobians(part, patch) for part in bend_BDP.split(5)])  # all at once need a gigabyte
        assert found.min() > 0
    assert (found - 1).abs().max() > 0.5


def test_bending_in_the_plane_bends_all_slices_alike() -> None:
    patch = (6, 20, 20)
    spec = spec_for(patch, **NOTHING | {"elastic_chance": 1.0}, turn_in_plane_only=True)
    image = torch.rand(2, 1, 1, *enlarged_patch(spec, patch)[1:], generator=seeded(1)).expand(-1, -1, 6, -1, -1)
    labels = torch.zeros(image.shape[:1] + image.shape[2:], dtype=torch.int16)
    result, _ = apply(image, labels, draw(spec, 2, 1, patch, seeded(12)), patch)
    assert torch.equal(result, result[:, :, :1].expand_as(result))
    assert not torch.allclose(result, augment._centre(image, patch), atol=0.05)


def test_a_patch_that_is_only_bent_is_read_with_a_margin() -> None:
    patch = (40, 56, 40)
    only_bent = spec_for(patch, **NOTHING | {"elastic_chance": 0.1})
    assert enlarged_patch(spec_for(patch, **NOTHING), patch) == patch
    assert enlarged_patch(only_bent, patch) == (47, 65, 47)


def test_scales_above_one_make_objects_smaller() -> None:
    patch = (24, 24, 24)
    labels = ball(patch)
    matrix = 1.4 * torch.eye(3)[None]
    drawn = replace(still(patch, 1, 1), matrix_BDD=matrix, moved_B=torch.tensor([True]))
    shrunk = apply(labels[None].float(), labels, drawn, patch, 3)[1]
    assert (shrunk > 0).sum().item() == pytest.approx((labels > 0).sum().item() / 1.4**3, rel=0.1)


def test_outside_is_zero_and_background_while_ignored_voxels_move_along() -> None:
    patch = (16, 16)
    matrix = 2.0 * torch.eye(2)[None]
    drawn = replace(still(patch, 1, 1), matrix_BDD=matrix, moved_B=torch.tensor([True]))
    for classes, label in ((3, -1), (None, -1), (3, 0), (None, 0), (3, 2), (None, 2)):
        labels = torch.full((1, *patch), label, dtype=torch.int16)
        for outside in (0, -1):  # the latter where the data has an ignore label
            image, moved = apply(torch.ones(1, 1, *patch), labels, drawn, patch, classes, outside)
            assert torch.equal(moved[0, 4:12, 4:12], torch.full((8, 8), label, dtype=torch.int16))
            assert set(moved[0, :3].flatten().tolist()) == {outside}
            assert image[0, 0, :3].abs().max() == 0


def test_turning_in_the_plane_never_mixes_slices() -> None:
    patch = (6, 20, 20)
    spec = spec_for(patch, **NOTHING | {"rotation_chance": 1.0, "scale_chance": 1.0}, turn_in_plane_only=True)
    assert enlarged_patch(spec, patch)[0] == 6
    image = torch.arange(1.0, 7).view(1, 1, 6, 1, 1).expand(3, 1, *enlarged_patch(spec, patch)).contiguous()
    drawn = draw(spec, 3, 1, patch, seeded(12))
    result, _ = apply(image, torch.zeros(image.shape[:1] + image.shape[2:], dtype=torch.int16), drawn, patch)
    inner = result[:, 0, :, 8:12, 8:12]
    torch.testing.assert_close(inner, torch.arange(1.0, 7).view(1, 6, 1, 1).expand(inner.shape))
    assert (drawn.matrix_BDD[:, 0] == torch.tensor([1.0, 0, 0])).all()


def test_the_enlarged_patch_covers_the_largest_turn() -> None:
    assert enlarged_patch(AugmentSpec(rotation_rad=(math.pi / 6,) * 3), (128, 128, 128)) == (205, 205, 205)
    assert enlarged_patch(AugmentSpec(rotation_rad=(math.pi,)), (512, 448)) == (602, 602)
    assert enlarged_patch(AugmentSpec(rotation_rad=(math.pi, 0, 0), turn_in_plane_only=True), (16, 320, 256)) == (
        16,
        376,
        376,
    )
    assert enlarged_patch(spec_for((8, 8, 8), rotation_chance=0, scale_chance=0), (8, 8, 8)) == (8, 8, 8)


# ------------------------------------------------------------------------------------------------ mirror


@pytest.mark.parametrize("patch", PATCHES)
def test_only_allowed_axes_are_mirrored_with_their_labels(patch: tuple[int, ...]) -> None:
    image, labels = batch_of(patch, batch=12)
    drawn = draw(spec_for(patch, **NOTHING, mirror_axes=(1,)), 12, 2, patch, seeded(13))
    result, result_labels = apply(image, labels, drawn, patch)
    flips = drawn.mirror_BD[:, 1]
    assert 0 < flips.sum() < 12
    for i, flipped in enumerate(flips.tolist()):
        assert torch.equal(result[i], image[i].flip(2) if flipped else image[i])
        assert torch.equal(result_labels[i], labels[i].flip(1) if flipped else labels[i])


# ------------------------------------------------------------------------------------------------ intensities


def only(patch: tuple[int, ...], **values: Tensor) -> Drawn:
    """Two samples with two channels; nothing happens but `values`."""
    return replace(still(patch), **values)


def halves(value: float, neutral: float = 1.0) -> Tensor:
    """(B, C): `value` for channel 1 of sample 0, nothing elsewhere."""
    return torch.tensor([[neutral, value], [neutral, neutral]])


@pytest.mark.parametrize("patch", PATCHES)
@pytest.mark.parametrize("name", ["brightness_BC", "contrast_BC", "low_resolution_BC", "gamma_inverted_BC", "gamma_BC"])
def test_only_the_drawn_channel_of_the_drawn_sample_changes(name: str, patch: tuple[int, ...]) -> None:
    image, labels = batch_of(patch)
    result, result_labels = apply(image, labels, only(patch, **{name: halves(0.8)}), patch)
    changed = (result != image).flatten(2).any(-1)
    assert torch.equal(changed, torch.tensor([[False, True], [False, False]]))
    assert torch.equal(result_labels, labels)


def test_brightness_and_contrast_follow_their_formulas() -> None:
    patch = (8, 12, 10)
    image, labels = batch_of(patch)
    old = image[0, 1]
    bright = apply(image, labels, only(patch, brightness_BC=halves(1.2)), patch)[0][0, 1]
    torch.testing.assert_close(bright, old * 1.2)
    contrast = apply(image, labels, only(patch, contrast_BC=halves(1.2)), patch)[0][0, 1]
    torch.testing.assert_close(contrast, ((old - old.mean()) * 1.2 + old.mean()).clamp(old.min(), old.max()))


@pytest.mark.parametrize("name", ["gamma_BC", "gamma_inverted_BC"])
def test_gamma_bends_the_range_and_restores_mean_and_deviation(name: str) -> None:
    patch = (8, 12, 10)
    image, labels = batch_of(patch)
    new, old = apply(image, labels, only(patch, **{name: halves(1.4)}), patch)[0][0, 1], image[0, 1]
    assert new.mean().item() == pytest.approx(old.mean().item(), abs=1e-5)
    assert new.std().item() == pytest.approx(old.std().item(), rel=1e-4)
    assert torch.equal(new.flatten().argsort(), old.flatten().argsort())
    skew = stats.skew(new.flatten().numpy()) - stats.skew(old.flatten().numpy())
    assert skew > 0.1 if name == "gamma_BC" else skew < -0.1


def test_blur_equals_scipy_per_axis() -> None:
    patch = (8, 12, 10)
    image, labels = batch_of(patch)
    sigma = torch.zeros(2, 2, 3)
    sigma[0, 1] = torch.tensor([0.5, 0.7, 0.9])
    result = apply(image, labels, only(patch, blur_sigma_BCD=sigma), patch)[0]
    expected = ndimage.gaussian_filter(image[0, 1].numpy(), (0.5, 0.7, 0.9), mode="nearest", radius=3)
    np.testing.assert_allclose(result[0, 1].numpy(), expected, atol=1e-5)
    assert torch.equal(result[1], image[1])
    assert torch.equal(result[0, 0], image[0, 0])


def test_low_resolution_loses_detail_but_keeps_constant_images_and_in_plane_axis_0() -> None:
    patch = (8, 12, 10)
    image, labels = batch_of(patch)
    coarse = apply(image, labels, only(patch, low_resolution_BC=halves(0.5)), patch)[0][0, 1]
    assert coarse.std() < 0.8 * image[0, 1].std()
    ramp = torch.rand(8, generator=seeded()).view(1, 1, 8, 1, 1).expand(2, 2, *patch)
    drawn = replace(only(patch, low_resolution_BC=halves(0.5)), in_plane_only=True)
    torch.testing.assert_close(apply(ramp, labels, drawn, patch)[0], ramp.contiguous())


@pytest.mark.parametrize("in_plane", [False, True])
def test_low_resolution_is_the_nearest_voxel_down_and_linear_up(in_plane: bool) -> None:
    patch, small = (8, 12, 10), (8 if in_plane else 5, 7, 6)
    image, labels = batch_of(patch)
    drawn = replace(only(patch, low_resolution_BC=halves(0.6)), in_plane_only=in_plane)
    expected = image[:1, 1:]
    for axis, (size, count) in enumerate(zip(patch, small, strict=True), 2):
        expected = expected.index_select(axis, ((torch.arange(count) + 0.5) * size / count).floor().long())
    expected = F.interpolate(expected, patch, mode="trilinear", align_corners=False)
    torch.testing.assert_close(apply(image, labels, drawn, patch)[0][:1, 1:], expected)


@pytest.mark.parametrize("patch", PATCHES)
def test_intensities_change_in_the_order_of_the_default_trainer(patch: tuple[int, ...]) -> None:
    image, labels = batch_of(patch)
    sigma = torch.full((2, 2, len(patch)), 0.8)
    flips = torch.zeros(2, len(patch), dtype=torch.bool)
    flips[0, 1] = True
    every = {
        "noise_sigma_B": torch.tensor([0.1, 0.08]), "blur_sigma_BCD": sigma, "brightness_BC": halves(1.2),
        "contrast_BC": halves(1.25), "low_resolution_BC": halves(0.6), "gamma_inverted_BC": halves(1.4),
        "gamma_BC": halves(0.7), "mirror_BD": flips,
    }  # fmt: skip
    expected = image
    for name, values in every.items():
        before = expected
        expected = apply(before, labels, only(patch, **{name: values}), patch)[0]
        assert not torch.equal(before, expected), name
    torch.testing.assert_close(apply(image, labels, only(patch, **every), patch)[0], expected)


def test_noise_has_the_drawn_deviation_in_all_channels() -> None:
    patch = (20, 20, 20)
    image, labels = torch.zeros(2, 2, *patch), torch.zeros(2, *patch, dtype=torch.int16)
    noisy = apply(image, labels, only(patch, noise_sigma_B=torch.tensor([0.0, 0.08])), patch)[0]
    assert noisy[0].abs().max() == 0
    for channel in noisy[1]:
        assert channel.std().item() == pytest.approx(0.08, rel=0.05)
    assert not torch.equal(noisy[1, 0], noisy[1, 1])


def test_constant_images_stay_finite() -> None:
    patch = (8, 12, 10)
    image, labels = torch.full((2, 2, *patch), 3.0), torch.zeros(2, *patch, dtype=torch.int16)
    drawn = only(patch, gamma_BC=halves(0.8), gamma_inverted_BC=halves(1.2), contrast_BC=halves(1.2))
    torch.testing.assert_close(apply(image, labels, drawn, patch)[0], image)


# ------------------------------------------------------------------------------------------------ errors


def test_specs_that_do_not_fit_the_patch_are_refused() -> None:
    with pytest.raises(UserError, match="three angles"):
        draw(AugmentSpec(rotation_rad=(0.5,)), 1, 1, (8, 8, 8), seeded())
    with pytest.raises(UserError, match="mirror_axes"):
        draw(AugmentSpec(rotation_rad=(0.5,), mirror_axes=(2,)), 1, 1, (8, 8), seeded())
    with pytest.raises(UserError, match="smaller than the patch"):
        apply(*batch_of((7, 12, 10)), still((8, 12, 10)), (8, 12, 10))
