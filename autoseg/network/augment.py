"""Varies training patches: turns, scales, mirrors, adds noise, on the device.

Chance is drawn first (`draw`), the effect repeats (`apply`).
Legend: B batch, C channel, Z Y X voxels (2D: Y X), D number of spatial axes, N voxels of one channel.
Kinds, order, chances and strengths are those of nnU-Net's default trainer (Isensee et al. 2021); bending is the U-Net's
elastic deformation (Ronneberger et al. 2015) by cubic B-splines (Rueckert et al. 1999). What a sample gets is known on
the host before anything runs, so only the samples that a transform hits are worked on, all of them at once.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network import intensity, movement
from autoseg.network.device import sent_together
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

    # small arrays: numpy takes a third of torch's time for them
    def uniform(*shape: int, of: tuple[float, float] = (0.0, 1.0)) -> np.ndarray:
        return of[0] + (of[1] - of[0]) * torch.rand(shape, generator=generator).numpy()

    def happens(chance: float, *shape: int) -> np.ndarray:
        return torch.rand(shape, generator=generator).numpy() < chance

    def where(hit: np.ndarray, value: np.ndarray) -> np.ndarray:
        return np.where(hit, value, np.float32(1.0))

    def around_one(of: tuple[float, float], chance: float) -> np.ndarray:
        """(B, C) factors, half of them below and half above 1, in the samples that are hit."""
        below = happens(0.5, batch, channels)
        smaller, larger = uniform(batch, channels, of=(of[0], 1.0)), uniform(batch, channels, of=(1.0, of[1]))
        return where(happens(chance, batch, 1), np.where(below, smaller, larger))

    angles = 3 if dimension == 3 else 1
    limits_rad = np.array(spec.rotation_rad[:angles], np.float32)
    turn_BA = (2 * uniform(batch, angles) - 1) * limits_rad * happens(spec.rotation_chance, batch, 1)
    scale_B = where(happens(spec.scale_chance, batch), uniform(batch, of=spec.scale_range))
    matrix_BDD = _matrices(turn_BA, scale_B, dimension, spec.turn_in_plane_only)
    mirrored = np.array([axis in spec.mirror_axes for axis in range(dimension)])
    coarse = uniform(batch, channels, of=LOW_RESOLUTION_SCALE)
    in_plane_only = spec.turn_in_plane_only and dimension == 3
    moved_B = (matrix_BDD != np.eye(dimension)).any((1, 2))
    bend_BDP = None
    if spec.elastic_chance > 0:
        bend_BDP = _bending(patch_voxels[1:] if in_plane_only else patch_voxels, batch, generator)
        bent_B = happens(spec.elastic_chance, batch)
        bend_BDP[torch.from_numpy(~bent_B)] = 0.0
        moved_B |= bent_B
    found = {
        "matrix_BDD": matrix_BDD,
        "moved_B": moved_B,
        "noise_sigma_B": uniform(batch, of=NOISE_SIGMA) * happens(spec.noise_chance, batch),
        "noise_seed_B": torch.randint(0, 2**62, (batch,), generator=generator).numpy(),
        "blur_sigma_BCD": uniform(batch, channels, dimension, of=BLUR_SIGMA_VOXELS)
        * (happens(spec.blur_chance, batch, 1) & happens(CHANNEL_CHANCE, batch, channels))[:, :, None],
        "brightness_BC": around_one(BRIGHTNESS, spec.brightness_chance),
        "contrast_BC": around_one(CONTRAST, spec.contrast_chance),
        "low_resolution_BC": where(
            happens(spec.low_resolution_chance, batch, 1) & happens(CHANNEL_CHANCE, batch, channels), coarse
        ),
        "gamma_inverted_BC": around_one(GAMMA, spec.gamma_inverted_chance),
        "gamma_BC": around_one(GAMMA, spec.gamma_chance),
        "mirror_BD": happens(0.5, batch, dimension) & mirrored,
    }
    tensors = {name: torch.from_numpy(array) for name, array in found.items()}
    return Drawn(**tensors, in_plane_only=in_plane_only, bend_BDP=bend_BDP)


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


def _matrices(turn_BA: np.ndarray, scale_B: np.ndarray, dimension: int, in_plane_only: bool) -> np.ndarray:
    """(B, D, D): one rotation per plane, one after the other, times the scale."""
    batch = len(turn_BA)
    total = np.tile(np.eye(dimension, dtype=np.float32), (batch, 1, 1))
    for angle, first, second in _planes(dimension, in_plane_only):
        turn = np.tile(np.eye(dimension, dtype=np.float32), (batch, 1, 1))
        turn[:, first, first] = turn[:, second, second] = np.cos(turn_BA[:, angle])
        turn[:, second, first] = np.sin(turn_BA[:, angle])
        turn[:, first, second] = -turn[:, second, first]
        total = total @ turn
    scale_BD = np.repeat(scale_B[:, None], dimension, 1)
    if in_plane_only and dimension == 3:
        scale_BD[:, 0] = 1.0
    return total * scale_BD[:, None]


def _bending(patch_voxels: Sequence[int], batch: int, generator: torch.Generator) -> Tensor:
    """(B, D, *points): by how many voxels the control points move; they lie at all ends of cells and one beyond."""
    cells = [round(BEND_CELLS * size / min(patch_voxels)) for size in patch_voxels]
    shift = torch.rand((batch, len(cells), *(count + 3 for count in cells)), generator=generator)
    for axis, (size, count) in enumerate(zip(patch_voxels, cells, strict=True)):
        shift[:, axis].sub_(0.5).mul_(2 * BEND_SHARE * size / count)
    return shift


# ------------------------------------------------------------------------------------------------ effect


def apply(
    image: Tensor, labels: Tensor, drawn: Drawn, patch_voxels: Sequence[int], classes: int | None = None,
    outside: int = 0,
) -> tuple[Tensor, Tensor]:
    """Do what was drawn. Nothing random is left: equal input and `drawn` give equal output on the same device.

    Moved samples are read through one map, the image linearly with 0 outside, the others are centre-cropped.
    Ignored voxels (-1) move along.

    Args:
        image: (B, C, Z, Y, X) or (B, C, Y, X), the patch or larger.
        labels: (B, Z, Y, X) or (B, Y, X) int16, as large as the image.
        classes: number of classes, background included. Labels of moved samples are interpolated linearly per class if
            there are at most `movement.LINEAR_LABELS`; nearest if there are more or `classes` is None.
        outside: label of what lies outside the image: background, or -1 (ignored).
    Returns image (B, C, *patch) float32 and labels (B, *patch) int16; the inputs stay as they are.
    """
    patch = tuple(patch_voxels)
    if any(have < want for have, want in zip(image.shape[2:], patch, strict=True)):
        raise UserError(f"The input {tuple(image.shape[2:])} is smaller than the patch {patch}.")
    image = image.float()
    there = sent_together(_needed(drawn, image.shape[2:], patch), image.device)
    result = _centre(image, patch).clone(memory_format=torch.contiguous_format)
    result_labels = _centre(labels, patch).clone(memory_format=torch.contiguous_format)
    if MOVED in there:
        moved, grid = there[MOVED], movement.grid(there, patch[drawn.in_plane_only :])
        moved_image = _centre_fixed(image[moved], patch, drawn)
        moved_labels = _centre_fixed(labels[moved].unsqueeze(1), patch, drawn)
        result[moved], result_labels[moved] = movement.read_with_labels(
            moved_image, moved_labels, grid, drawn.in_plane_only, classes, outside
        )
    _add_noise(result, drawn)
    rows_RN = result.flatten(0, 1)  # a view: one row per sample and channel
    for name, change in CHANGES.items():
        if name in there:
            rows, values = there[name], there[name + VALUES]
            if change is intensity.coarsen:  # whose sizes the host has to know
                values = drawn.low_resolution_BC.flatten()
                values = values[values != 1]
                change = intensity.coarsen_in_plane if drawn.in_plane_only else change
            rows_RN[rows] = change(rows_RN[rows], values)
    _mirror(result, there, 2)
    _mirror(result_labels, there, 1)
    return result, result_labels


def move(values: Tensor, drawn: Drawn, patch_voxels: Sequence[int]) -> Tensor:
    """Values (B, C, ...) that lie like an image but are none: moved and mirrored as `apply` does, and not changed."""
    patch, values = tuple(patch_voxels), values.float()
    there = sent_together(_needed(drawn, values.shape[2:], patch), values.device)
    result = _centre(values, patch).clone(memory_format=torch.contiguous_format)
    if MOVED in there:
        moved, grid = there[MOVED], movement.grid(there, patch[drawn.in_plane_only :])
        moved_values = _centre_fixed(values[moved], patch, drawn)
        result[moved] = movement.read(moved_values, grid, drawn.in_plane_only, "bilinear")
    _mirror(result, there, 2)
    return result


MOVED, MIRROR, VALUES = "moved", "mirror_", "_values"
"""Names, or beginnings and ends of names, of what `_needed` returns beside the places of what is moved."""
CHANGES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "blur_sigma_BCD": intensity.blur,
    "brightness_BC": intensity.brighten,
    "contrast_BC": intensity.contrast,
    "low_resolution_BC": intensity.coarsen,
    "gamma_inverted_BC": intensity.gamma_inverted,
    "gamma_BC": intensity.gamma,
}
"""By the fields of `Drawn` that say whom they hit and how much, in the order in which they happen."""


def _needed(drawn: Drawn, size: Sequence[int], patch: tuple[int, ...]) -> dict[str, np.ndarray]:
    """What the device has to know: which rows every transform hits, none where it hits nothing, and its parameters."""
    needed: dict[str, np.ndarray] = {}

    def hits(name: str, hit: np.ndarray) -> np.ndarray:
        rows = hit.nonzero()[0]
        if len(rows):
            needed[name] = rows
        return rows

    moved, first = hits(MOVED, drawn.moved_B.numpy()), int(drawn.in_plane_only)
    if len(moved):
        matrix_MDD = drawn.matrix_BDD.numpy()[moved, first:, first:]
        bend_MDP = None if drawn.bend_BDP is None else drawn.bend_BDP.numpy()[moved]
        needed |= movement.places_of(matrix_MDD, bend_MDP, size[first:], patch[first:])
    for name, change in CHANGES.items():
        array, blurs = getattr(drawn, name).flatten(0, 1).numpy(), change is intensity.blur
        rows = hits(name, (array != 0).all(1) if blurs else array != 1)
        if len(rows):
            needed[name + VALUES] = intensity.blur_weights(array[rows]) if blurs else array[rows]
    for axis, hit in enumerate(drawn.mirror_BD.numpy().T):
        hits(f"{MIRROR}{axis}", hit)
    return needed


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


def _add_noise(image: Tensor, drawn: Drawn) -> None:
    for sample in drawn.noise_sigma_B.nonzero().flatten().tolist():
        chance = torch.Generator(image.device).manual_seed(int(drawn.noise_seed_B[sample]))
        noise = torch.randn(image.shape[1:], generator=chance, device=image.device)
        image[sample].add_(noise, alpha=float(drawn.noise_sigma_B[sample]))


def _mirror(tensor: Tensor, there: Mapping[str, Tensor], first_axis: int) -> None:
    for axis in range(tensor.ndim - first_axis):
        rows = there.get(f"{MIRROR}{axis}")
        if rows is not None:
            tensor[rows] = tensor[rows].flip(first_axis + axis)
