"""Which patches a step learns from: places are drawn, then the patches are cut.

`draw_places` does the one, `gather` the other.
Every step has its own random numbers, made from the seed and the step's number, so a resumed training sees the patches
that an uninterrupted one sees and no random state needs to be saved.
Legend: B batch, C channel, Z Y X voxels (2D: Y X).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from autoseg.network.sampling import CHOOSE, Holders, holders
from autoseg.specs import forced_of

Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


class Source(Protocol):
    """A preprocessed case that can be read in part: image (C, Z, Y, X) float32 and label indices (Z, Y, X) int16."""

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def locations(self) -> Mapping[int, np.ndarray]:
        """Label index -> (n, 3) positions; the key -1 holds annotated voxels where some voxels are ignored."""
        ...

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray]: ...


@dataclass(frozen=True)
class InMemory:
    """A case held in RAM: cutting a patch is a slice."""

    image_CZYX: np.ndarray
    labels_ZYX: np.ndarray
    locations: Mapping[int, np.ndarray]

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.labels_ZYX.shape
        return z, y, x

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        slices = tuple(slice(start, stop) for start, stop in box)
        return self.image_CZYX[(slice(None), *slices)], self.labels_ZYX[slices]


@dataclass(frozen=True)
class WithPrevious:
    """A case of a cascade: what the previous stage found is one more channel, behind those of the image."""

    source: Source
    previous_ZYX: np.ndarray

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.source.shape

    @property
    def locations(self) -> Mapping[int, np.ndarray]:
        return self.source.locations

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        image_CZYX, labels_ZYX = self.source.read(box)
        previous_ZYX = self.previous_ZYX[tuple(slice(start, stop) for start, stop in box)]
        return np.concatenate((image_CZYX, previous_ZYX[None].astype(np.float32))), labels_ZYX


@dataclass(frozen=True)
class Sampling:
    """Size and mix of the batches. `patch_voxels` has two numbers for slices, three for volumes.

    `mode` is one of `sampling.CHOOSE`; `class_rates` has one entry per foreground class, or none where all are alike.
    """

    patch_voxels: tuple[int, ...]
    batch_size: int
    foreground_share: float
    seed: int
    mode: str = "foreground"
    class_rates: tuple[float, ...] = ()


@dataclass(frozen=True)
class Place:
    """The first voxel of a patch in case number `case`; may be negative where the case is smaller than the patch."""

    case: int
    corner_ZYX: tuple[int, int, int]
    forced_class: int | None


def generator_of(seed: int, step: int, purpose: int) -> np.random.Generator:
    """The random numbers of one step; `purpose` keeps training, validation and augmentation apart."""
    return np.random.default_rng((seed, step, purpose))


def draw_places(
    sources: Sequence[Source], sampling: Sampling, step: int, purpose: int = 0, held: Holders | None = None
) -> tuple[Place, ...]:
    """Draw one place per sample: first the case and perhaps a class, as the mode of sampling says, then the position.

    The last samples, as many as `forced_of` says, are centred on a voxel of a foreground class; the others lie
    uniformly inside the image (with an ignore label: around an annotated voxel).
    Source: nnU-Net's data loader (Isensee et al. 2021), except that forced patches are also clamped at the far end
    instead of hanging over it.

    Args:
        held: `sampling.holders(sources)`, for modes other than "foreground"; made here where it is not given.
    """
    chance = generator_of(sampling.seed, step, purpose)
    batch = sampling.batch_size
    forced_from = batch - forced_of(batch, sampling.foreground_share)
    if held is None:
        held = {} if sampling.mode == "foreground" else holders(sources)
    patch_zyx = (1,) * (3 - len(sampling.patch_voxels)) + sampling.patch_voxels
    choose, places = CHOOSE[sampling.mode], []
    for sample in range(batch):
        case, forced = choose(chance, sources, held, sampling.class_rates, sample >= forced_from)
        source = sources[case]
        around = source.locations.get(-1 if forced is None else forced)
        if around is not None and len(around):
            centre = around[chance.integers(len(around))]
            wanted = [int(c) - p // 2 for c, p in zip(centre, patch_zyx, strict=True)]
        else:
            wanted = [int(chance.integers(max(1, s - p + 1))) for s, p in zip(source.shape, patch_zyx, strict=True)]
        z, y, x = (_clamped(w, s, p) for w, s, p in zip(wanted, source.shape, patch_zyx, strict=True))
        places.append(Place(case, (z, y, x), forced))
    return tuple(places)


def gather(
    sources: Sequence[Source], places: Sequence[Place], patch_voxels: tuple[int, ...], enlarged_voxels: tuple[int, ...],
    moved: Sequence[bool], outside: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """Cut the patches: image (B, C, ...) float32, 0 outside the images, and labels (B, ...) int16, `outside` there.

    If any sample is moved by augmentation the arrays have the enlarged size, and only the moved samples are filled
    beyond the central patch; else they have the size of the patch.
    """
    size = enlarged_voxels if any(moved) else patch_voxels
    flat = len(patch_voxels) == 2
    lead = (1,) if flat else ()
    image_BCZYX: np.ndarray | None = None
    labels_BZYX = np.full((len(places), *lead, *size), outside, np.int16)
    for sample, place in enumerate(places):
        source = sources[place.case]
        box, (into_z, into_y, into_x) = window(place, source.shape, patch_voxels, size, moved[sample])
        image, labels = source.read(box)
        if image_BCZYX is None:
            image_BCZYX = np.zeros((len(places), len(image), *lead, *size), np.float32)
        image_BCZYX[sample, :, into_z, into_y, into_x] = image
        labels_BZYX[sample, into_z, into_y, into_x] = labels
    if image_BCZYX is None:
        raise ValueError("a batch needs at least one place")
    return (image_BCZYX[:, :, 0], labels_BZYX[:, 0]) if flat else (image_BCZYX, labels_BZYX)


def window(
    place: Place, limits: tuple[int, int, int], patch_voxels: tuple[int, ...], size_voxels: tuple[int, ...], moved: bool
) -> tuple[Box, tuple[slice, slice, slice]]:
    """What to read of a case with `limits` voxels, and where it goes in an array of `size_voxels` around the patch."""
    lead = (1,) * (3 - len(patch_voxels))
    box, into = [], []
    for corner, patch, full, limit in zip(
        place.corner_ZYX, (*lead, *patch_voxels), (*lead, *size_voxels), limits, strict=True
    ):
        margin = (full - patch) // 2
        first, last = (corner - margin, corner - margin + full) if moved else (corner, corner + patch)
        start, stop = max(0, first), min(limit, last)
        box.append((start, max(start, stop)))
        offset = start - (corner - margin)
        into.append(slice(offset, offset + max(0, stop - start)))
    return (box[0], box[1], box[2]), (into[0], into[1], into[2])


def _clamped(corner: int, size: int, patch: int) -> int:
    """Keep the patch inside the image, or centre the image in the patch where it is smaller."""
    return -((patch - size) // 2) if size <= patch else min(max(corner, 0), size - patch)
