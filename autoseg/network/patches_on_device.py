"""Patches of cases that lie on the training device, cut there. Nothing is moved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from autoseg.network.patches import Box, Place, window


@dataclass(frozen=True)
class OnDevice:
    """A case on the device: image (C, Z, Y, X) float32 and labels (Z, Y, X) int16; a `Source` for those who read it."""

    image_CZYX: Tensor
    labels_ZYX: Tensor
    locations: Mapping[int, np.ndarray]

    @property
    def shape(self) -> tuple[int, int, int]:
        z, y, x = self.labels_ZYX.shape
        return z, y, x

    def read(self, box: Box) -> tuple[np.ndarray, np.ndarray]:
        slices = tuple(slice(start, stop) for start, stop in box)
        return self.image_CZYX[(slice(None), *slices)].cpu().numpy(), self.labels_ZYX[slices].cpu().numpy()


def gather_on_device(
    sources: Sequence[OnDevice], places: Sequence[Place], patch_voxels: tuple[int, ...],
    enlarged_voxels: tuple[int, ...], moved: Sequence[bool], outside: int = 0,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`patches.gather` for cases on the device: the same arguments and the same numbers, as tensors there."""
    size = enlarged_voxels if any(moved) else patch_voxels
    flat = len(patch_voxels) == 2
    lead = (1,) if flat else ()
    first = sources[places[0].case]
    labels_BZYX = first.labels_ZYX.new_full((len(places), *lead, *size), outside)
    image_BCZYX = first.image_CZYX.new_zeros((len(places), len(first.image_CZYX), *lead, *size))
    for sample, place in enumerate(places):
        source = sources[place.case]
        box, (into_z, into_y, into_x) = window(place, source.shape, patch_voxels, size, moved[sample])
        slices = tuple(slice(start, stop) for start, stop in box)
        image_BCZYX[sample, :, into_z, into_y, into_x] = source.image_CZYX[(slice(None), *slices)]
        labels_BZYX[sample, into_z, into_y, into_x] = source.labels_ZYX[slices]
    return (image_BCZYX[:, :, 0], labels_BZYX[:, 0]) if flat else (image_BCZYX, labels_BZYX)
