"""What a `Predictor` takes for an image: as a volume, and by name in errors.

Axes: C channel, Z Y X voxels.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk

from autoseg.errors import UserError
from autoseg.image.formats import read_image, volume_of
from autoseg.image.volume import Volume, plain_geometry

Image = np.ndarray | Volume | str | Path | Sequence[str | Path] | Any
"""An array, a `Volume`, a SimpleITK image, a file, or one file per channel."""


def as_volume(image: Image, spacing_mm: Sequence[float] = (1.0, 1.0, 1.0)) -> Volume:
    """Any image that a `Predictor` takes. Raises UserError for an array with other axes, or a file that is none."""
    if isinstance(image, Volume):
        return image
    if isinstance(image, (str, Path)):
        return read_image([Path(image)])
    if isinstance(image, sitk.Image):
        return volume_of(image)
    if isinstance(image, Sequence) and image and all(isinstance(each, (str, Path)) for each in image):
        return read_image([Path(each) for each in image])
    array_CZYX = np.asarray(image, np.float32)
    array_CZYX = array_CZYX[None] if array_CZYX.ndim == 3 else array_CZYX
    if array_CZYX.ndim != 4:
        raise UserError(f"An image needs axes (C, Z, Y, X) or (Z, Y, X), this has shape {array_CZYX.shape}.")
    z, y, x = (float(each) for each in spacing_mm)
    size = (array_CZYX.shape[1], array_CZYX.shape[2], array_CZYX.shape[3])
    return Volume(array_CZYX, plain_geometry(size, (z, y, x)))


def called(image: Image) -> str:
    """What an image is called in errors: by its file, or the first of them."""
    if isinstance(image, Sequence) and not isinstance(image, str) and image:
        image = image[0]
    return str(image) if isinstance(image, (str, Path)) else "the image"
