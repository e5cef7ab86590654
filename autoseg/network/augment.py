"""Varies training patches on the device that trains: chance is drawn first (`draw`), the effect repeats (`apply`).

Legend: B batch, C channel, Z Y X voxels (2D: Y X), D number of spatial axes, N voxels of one channel.
Kinds, order, chances and strengths are those of nnU-Net's default trainer (Isensee et al. 2021); bending is the U-Net's
elastic deformation (Ronneberger et al. 2015) by cubic B-splines (Rueckert et al. 1999). What a sample gets is known on
the host before anything runs, so only the samples that a transform hits are worked on, all of them at once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network import intensity
from autoseg.records import AugmentSpec

NOISE_SIGMA = (0.0, 0.1)
BLUR_SIGMA_VOXELS = (0.5, intensity.LARGEST_BLUR_VOXELS)
BRIGHTNESS = (0.75, 1.25)
CONTRAST = (0.75, 1.25)
LOW_RESOLUTION_SCALE = (0.5, 1.0)
GAMMA = (0.7, 1.5)
CHANNEL_CHANCE = 0.5
"""Chance of each channel to be blurred or coarsened once its sample is chosen."""
BEND_CELLS = 4
"""Cells of the control grid along the shortest axis that is bent; about as long along the others."""
BEND_SHARE = 0.4
"""How far a control point moves at most along each axis, in cells: a patch never folds (Choi & Lee 2000)."""
MARGIN_SCALE = 0.85
"""The enlarged patch covers scaling down to 1 / 0.85; farther out zeros come in, which is rare."""
LINEAR_LABELS = 4
"""Up to this many classes labels are interpolated linearly; with more that would cost more than the image does."""


@dataclass(frozen=True)
class Drawn:
    """What happens to each sample; all tensors on the host. A value that changes nothing means: not this sample.

    matrix_BDD: from voxel offsets of the result to those of the input, both from the centre; identity where not moved.
    moved_B: whether the sample is rotated, scaled or bent, so that it needs more than the final patch.
    bend_BDP: how far each control point of the axes that are moved is shifted (0), in voxels of the result; P are the
    points per axis. It comes before the matrix. None: nothing is bent.
    noise_sigma_B (0) with noise_seed_B. blur_sigma_BCD in voxels (0). brightness_BC, contrast_BC, low_resolution_BC,
    gamma_inverted_BC, gamma_BC (1). mirror_BD: flip along this axis.
    in_plane_only: neither movement nor low resolution touch axis 0.
    """

    matrix_BDD: Tensor
    moved_B: Tensor
    noise_sigma_B: Tensor
    noise_seed_B: Tensor
    blur_sigma_BCD: Tensor
    brightness_BC: Tensor
    contrast_BC: Tensor
    low_resolution_BC: Tensor
    gamma_inverted_BC: Tensor
    gamma_BC: Tensor
    mirror_BD: Tensor
    in_plane_only: bool = False
    bend_BDP: Tensor | None = None


# ------------------------------------------------------------------------------------------------ chance


def draw(
    spec: AugmentSpec, batch: int, channels: int, patch_voxels: Sequence[int], generator: torch.Generator
) -> Drawn:
    """Decide what happens to each of `batch` samples.

    Args:
        generator: on the host; its state is all the chance there is.
    Raises UserError when the spec does not fit the dimension of the patch.
    """
    dimension = len(patch_voxels)
    _check(spec, dimension)

    def uniform(*shape: int, of: tuple[float, float] = (0.0, 1.0)) -> Tensor:
        return of[0] + (of[1] - of[0]) * torch.rand(shape, generator=generator)

    def happens(chance: float, *shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) < chance

    def around_one(of: tuple[float, float], chance: float) -> Tensor:
        """(B, C) factors, half of them below and half above 1, in the samples that are hit."""
        below = happens(0.5, batch, channels)
        smaller, larger = uniform(batch, channels, of=(of[0], 1.0)), uniform(batch, channels, of=(1.0, of[1]))
        return torch.where(happens(chance, batch, 1), torch.where(below, smaller, larger), 1.0)

    angles = 3 if dimension == 3 else 1
    limits_rad = torch.tensor(spec.rotation_rad[:angles])
    turn_BA = (2 * uniform(batch, angles) - 1) * limits_rad * happens(spec.rotation_chance, batch, 1)
    scale_B = torch.where(happens(spec.scale_chance, batch), uniform(batch, of=spec.scale_range), 1.0)
    matrix_BDD = _matrices(turn_BA, scale_B, dimension, spec.turn_in_plane_only)
    mirrored = torch.tensor([axis in spec.mirror_axes for axis in range(dimension)])
    coarse = uniform(batch, channels, of=LOW_RESOLUTION_SCALE)
    in_plane_only = spec.turn_in_plane_only and dimension == 3
    moved_B = (matrix_BDD != torch.eye(dimension)).flatten(1).any(1)
    bend_BDP = None
    if spec.elastic_chance > 0:
        bend_BDP = _bending(patch_voxels[1:] if in_plane_only else patch_voxels, batch, generator)
        bent_B = happens(spec.elastic_chance, batch)
        bend_BDP[~bent_B] = 0.0
        moved_B |= bent_B
    return Drawn(
        matrix_BDD=matrix_BDD,
        moved_B=moved_B,
        noise_sigma_B=uniform(batch, of=NOISE_SIGMA) * happens(spec.noise_chance, batch),
        noise_seed_B=torch.randint(0, 2**62, (batch,), generator=generator),
        blur_sigma_BCD=uniform(batch, channels, dimension, of=BLUR_SIGMA_VOXELS)
        * (happens(spec.blur_chance, batch, 1) & happens(CHANNEL_CHANCE, batch, channels)).unsqueeze(-1),
        brightness_BC=around_one(BRIGHTNESS, spec.brightness_chance),
        contrast_BC=around_one(CONTRAST, spec.contrast_chance),
        low_resolution_BC=torch.where(
            happens(spec.low_resolution_chance, batch, 1) & happens(CHANNEL_CHANCE, batch, channels), coarse, 1.0
        ),
        gamma_inverted_BC=around_one(GAMMA, spec.gamma_inverted_chance),
        gamma_BC=around_one(GAMMA, spec.gamma_chance),
        mirror_BD=happens(0.5, batch, dimension) & mirrored,
        in_plane_only=in_plane_only,
        bend_BDP=bend_BDP,
    )


def some(drawn: Drawn, samples: Sequence[int]) -> Drawn:
    """What happens to these samples of the batch, in this order."""
    rows = torch.tensor(list(samples))
    chosen: dict[str, Any] = {name: value[rows] for name, value in vars(drawn).items() if isinstance(value, Tensor)}
    return replace(drawn, **chosen)


def enlarged_patch(spec: AugmentSpec, patch_voxels: Sequence[int]) -> tuple[int, ...]:
    """Voxels to read so that a rotated, scaled and bent sample rarely reaches beyond them (nnU-Net's rule).

    Per axis the largest extent of the patch turned by the largest angle (at most 90 degrees) about one axis, / 0.85.
    Equal to the patch if the spec never moves a sample; axis 0 is not enlarged when turning stays in the plane.
    """
    dimension = len(patch_voxels)
    _check(spec, dimension)
    extent = [float(size) for size in patch_voxels]
    if spec.rotation_chance > 0:
        for axis, first, second in _planes(dimension, spec.turn_in_plane_only):
            angle = min(abs(spec.rotation_rad[axis]), math.pi / 2)
            for one, other in ((first, second), (second, first)):
                turned = patch_voxels[one] * math.cos(angle) + patch_voxels[other] * math.sin(angle)
                extent[one] = max(extent[one], turned)
    elif spec.scale_chance == 0 and spec.elastic_chance == 0:
        return tuple(patch_voxels)
    fixed = 1 if spec.turn_in_plane_only and dimension == 3 else 0
    return (*patch_voxels[:fixed], *(int(size / MARGIN_SCALE + 1e-6) for size in extent[fixed:]))


def _check(spec: AugmentSpec, dimension: int) -> None:
    if dimension not in (2, 3) or len(spec.rotation_rad) < (3 if dimension == 3 else 1):
        raise UserError(
            f"augment.rotation_rad has {len(spec.rotation_rad)} angles for a patch with {dimension} axes.",
            fix="Give three angles (Z Y X) in 3D and one in 2D.",
        )
    if any(not 0 <= axis < dimension for axis in spec.mirror_axes):
        raise UserError(
            f"augment.mirror_axes {spec.mirror_axes} names an axis the patch does not have.",
            fix=f"Choose among {tuple(range(dimension))}.",
        )


def _planes(dimension: int, in_plane_only: bool) -> tuple[tuple[int, int, int], ...]:
    """(index of the angle, first and second axis of the plane it turns)."""
    if dimension == 2:
        return ((0, 0, 1),)
    return ((0, 1, 2),) if in_plane_only else ((0, 1, 2), (1, 0, 2), (2, 0, 1))


def _matrices(turn_BA: Tensor, scale_B: Tensor, dimension: int, in_plane_only: bool) -> Tensor:
    """(B, D, D): one rotation per plane, one after the other, times the scale."""
    batch = turn_BA.shape[0]
    total = torch.eye(dimension).expand(batch, dimension, dimension)
    for angle, first, second in _planes(dimension, in_plane_only):
        turn = torch.eye(dimension).repeat(batch, 1, 1)
        turn[:, first, first] = turn[:, second, second] = torch.cos(turn_BA[:, angle])
        turn[:, first, second] = -torch.sin(turn_BA[:, angle])
        turn[:, second, first] = torch.sin(turn_BA[:, angle])
        total = total @ turn
    scale_BD = scale_B.unsqueeze(1).repeat(1, dimension)
    if in_plane_only and dimension == 3:
        scale_BD[:, 0] = 1.0
    return total * scale_BD.unsqueeze(1)


def _bending(patch_voxels: Sequence[int], batch: int, generator: torch.Generator) -> Tensor:
    """(B, D, *points): by how many voxels the control points move; they lie at all ends of cells and one beyond."""
    cells = [round(BEND_CELLS * size / min(patch_voxels)) for size in patch_voxels]
    shift = torch.rand((batch, len(cells), *(count + 3 for count in cells)), generator=generator)
    for axis, (size, count) in enumerate(zip(patch_voxels, cells, strict=True)):
        shift[:, axis].sub_(0.5).mul_(2 * BEND_SHARE * size / count)
    return shift


# ------------------------------------------------------------------------------------------------ effect


def apply(
    image: Tensor, labels: Tensor, drawn: Drawn, patch_voxels: Sequence[int], classes: int | None = None
) -> tuple[Tensor, Tensor]:
    """Do what was drawn. Nothing random is left: equal input and `drawn` give equal output on the same device.

    Moved samples are read through one map, the image linearly with 0 outside, the others are centre-cropped.
    Labels outside are 0 (background); ignored voxels (-1) move along.

    Args:
        image: (B, C, Z, Y, X) or (B, C, Y, X), the patch or larger.
        labels: (B, Z, Y, X) or (B, Y, X) int16, as large as the image.
        classes: number of classes, background included. Labels of moved samples are interpolated linearly per class if
            there are at most `LINEAR_LABELS`; nearest if there are more or `classes` is None.
    Returns image (B, C, *patch) float32 and labels (B, *patch) int16; the inputs stay as they are.
    """
    patch = tuple(patch_voxels)
    if any(have < want for have, want in zip(image.shape[2:], patch, strict=True)):
        raise UserError(f"The input {tuple(image.shape[2:])} is smaller than the patch {patch}.")
    image = image.float()
    result = _centre(image, patch).clone(memory_format=torch.contiguous_format)
    result_labels = _centre(labels, patch).clone(memory_format=torch.contiguous_format)
    moved = intensity.places(drawn.moved_B, image.device)
    if moved is not None:
        grid = _grid(drawn, image.shape[2:], patch, image.device)
        moved_image = _centre_fixed(image[moved], patch, drawn)
        moved_labels = _centre_fixed(labels[moved].unsqueeze(1), patch, drawn)
        result[moved], result_labels[moved] = _moved(moved_image, moved_labels, grid, drawn.in_plane_only, classes)
    _add_noise(result, drawn)
    rows_RN = result.flatten(0, 1)  # a view: one row per sample and channel
    for change, values in (
        (intensity.blur, drawn.blur_sigma_BCD.flatten(0, 1)),
        (intensity.brighten, drawn.brightness_BC.flatten()),
        (intensity.contrast, drawn.contrast_BC.flatten()),
        (intensity.coarsen_in_plane if drawn.in_plane_only else intensity.coarsen, drawn.low_resolution_BC.flatten()),
        (intensity.gamma_inverted, drawn.gamma_inverted_BC.flatten()),
        (intensity.gamma, drawn.gamma_BC.flatten()),
    ):
        intensity.change_rows(rows_RN, values, change)
    _mirror(result, drawn.mirror_BD, 2)
    _mirror(result_labels, drawn.mirror_BD, 1)
    return result, result_labels


def move(values: Tensor, drawn: Drawn, patch_voxels: Sequence[int]) -> Tensor:
    """Values (B, C, ...) that lie like an image but are none: moved and mirrored as `apply` does, and not changed."""
    patch, values = tuple(patch_voxels), values.float()
    result = _centre(values, patch).clone(memory_format=torch.contiguous_format)
    moved = intensity.places(drawn.moved_B, values.device)
    if moved is not None:
        grid = _grid(drawn, values.shape[2:], patch, values.device)
        result[moved] = _sample(_centre_fixed(values[moved], patch, drawn), grid, drawn.in_plane_only, "bilinear")
    _mirror(result, drawn.mirror_BD, 2)
    return result


def _centre(tensor: Tensor, patch: tuple[int, ...]) -> Tensor:
    """View of the central `patch` of the last axes."""
    for axis, size in zip(range(-len(patch), 0), patch, strict=True):
        tensor = tensor.narrow(axis, (tensor.shape[axis] - size) // 2, size)
    return tensor


def _centre_fixed(tensor: Tensor, patch: tuple[int, ...], drawn: Drawn) -> Tensor:
    """Centre-crop axis 0 where movement leaves it alone."""
    if not drawn.in_plane_only:
        return tensor
    return _centre(tensor, (patch[0], *tensor.shape[-2:]))


def _grid(drawn: Drawn, size: Sequence[int], patch: tuple[int, ...], device: torch.device) -> Tensor:
    """Sampling places of the moved samples for `grid_sample` (align_corners False): (M, *patch, D), last axis first.

    In units of half the axis length; shifted so that the identity is exactly the centre crop also when one of
    the two sizes is odd.
    """
    first = 1 if drawn.in_plane_only else 0
    matrix = drawn.matrix_BDD[drawn.moved_B][:, first:, first:].double()
    old = torch.tensor(size[first:], dtype=torch.float64)
    new = torch.tensor(patch[first:], dtype=torch.float64)
    shift = torch.div(old - new, 2, rounding_mode="floor") + (new - old) / 2
    theta = torch.cat([matrix * new / old.unsqueeze(1), (2 * shift / old).expand(len(matrix), -1).unsqueeze(-1)], dim=2)
    flipped = torch.cat([theta[:, :, :-1].flip(1, 2), theta[:, :, -1:].flip(1)], dim=2)
    shape = [len(matrix), 1, *patch[first:]]
    grid = F.affine_grid(intensity.sent(flipped.float(), device), shape, align_corners=False)
    if drawn.bend_BDP is None:
        return grid
    bend_MDP = drawn.bend_BDP[drawn.moved_B].double()
    in_grid_MDP = torch.einsum("mij,mj...->mi...", theta[:, :, :-1] * 2 / new, bend_MDP).flip(1).float()
    return grid + _between_points(intensity.sent(in_grid_MDP, device), patch[first:]).movedim(1, -1)


def _between_points(values: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Values (M, D, *points) of a control grid at each voxel of the patch, (M, D, *patch), by cubic B-splines."""
    for size in patch:
        points = values.shape[2]
        place = (torch.arange(size) + 0.5) * (points - 3) / size
        away = (place.unsqueeze(1) - torch.arange(-1, points - 1)).abs()
        weights = torch.where(away < 1, 2 / 3 - away**2 + away**3 / 2, (2 - away).clamp(min=0) ** 3 / 6)
        weights = intensity.sent(weights.to(values.dtype), values.device)
        values = torch.tensordot(values, weights, dims=([2], [1]))  # the new axis comes last
    return values


def _moved(
    image: Tensor, labels: Tensor, grid: Tensor, in_plane_only: bool, classes: int | None
) -> tuple[Tensor, Tensor]:
    """(M, C, ...) image and (M, 1, ...) labels at the grid, labels (M, ...) background outside; see `apply`.

    Labels that are interpolated linearly are sampled as further channels of the image: places are worked out once.
    """
    if classes is None or classes > LINEAR_LABELS:  # labels below 2^24 are exact in float32
        found = _sample(labels.float(), grid, in_plane_only, "nearest")
        return _sample(image, grid, in_plane_only, "bilinear"), found.squeeze(1).to(labels.dtype)
    names = torch.arange(1, classes, device=labels.device, dtype=labels.dtype)
    if labels.device.type != "cpu" or bool((labels < 0).any()):  # a GPU would wait for the answer
        names = F.pad(names, (0, 1), value=-1)
    hot = labels == names.view(1, -1, *[1] * (labels.ndim - 2))
    sampled = _sample(torch.cat((image, hot.float()), 1), grid, in_plane_only, "bilinear")
    image, shares = sampled.split((image.shape[1], len(names)), 1)
    best, place = shares.max(1)
    label = place.to(labels.dtype).add_(1)
    if len(names) == classes:
        label.masked_fill_(label == classes, -1)
    return image, label.masked_fill_(1 - shares.sum(1) >= best, 0)


def _sample(values: Tensor, grid: Tensor, in_plane_only: bool, mode: str) -> Tensor:
    """(M, C, Z, Y, X) or (M, C, Y, X) at the grid, 0 outside. In-plane grids have no Z: it is folded into channels."""
    if in_plane_only:
        return _read_at(values.flatten(1, 2), grid, mode).unflatten(1, values.shape[1:3])
    threads = torch.get_num_threads()
    if values.device.type != "cpu" or values.ndim == 4 or len(values) % threads == 0:
        return _read_at(values, grid, mode)
    # a CPU gives each volume to one thread, so each becomes as many as there are threads, thinner ones
    parts = next(parts for parts in range(threads, 0, -1) if grid.shape[1] % parts == 0)
    found = [
        _read_at(one.expand(parts, *one.shape), places.unflatten(0, (parts, -1)), mode).transpose(0, 1).flatten(1, 2)
        for one, places in zip(values, grid, strict=True)
    ]
    return torch.stack(found)


def _read_at(values: Tensor, grid: Tensor, mode: str) -> Tensor:
    return F.grid_sample(values, grid, mode=mode, padding_mode="zeros", align_corners=False)


def _add_noise(image: Tensor, drawn: Drawn) -> None:
    for sample in drawn.noise_sigma_B.nonzero().flatten().tolist():
        chance = torch.Generator(image.device).manual_seed(int(drawn.noise_seed_B[sample]))
        noise = torch.randn(image.shape[1:], generator=chance, device=image.device)
        image[sample].add_(noise, alpha=float(drawn.noise_sigma_B[sample]))


def _mirror(tensor: Tensor, mirror_BD: Tensor, first_axis: int) -> None:
    for axis in range(mirror_BD.shape[1]):
        rows = intensity.places(mirror_BD[:, axis], tensor.device)
        if rows is not None:
            tensor[rows] = tensor[rows].flip(first_axis + axis)
