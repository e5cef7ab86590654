"""Bringing intensities to a common scale, channel by channel. Input and output float32; the input is not changed.

Axes: C channel, Z Y X voxels. A mask marks the voxels that count: statistics come from them, all others become 0.
Source of "zscore" and "ct": Isensee et al., nnU-Net, Nature Methods 2021.
"""

from collections.abc import Callable, Sequence

import numpy as np

from autoseg.errors import UserError
from autoseg.records import Intensities

Normalization = Callable[[np.ndarray, np.ndarray | None, Intensities], np.ndarray]
"""(channel_ZYX float32, mask_ZYX bool or None, foreground intensities of the data set) -> channel_ZYX float32."""

ROW_VOXELS = 2**16
RESOLUTION = 1e-6
"""A spread below this share of the mean is rounding of float32 values: the channel is constant."""
SMALLEST = float(np.finfo(np.float32).tiny)
"""A spread below the smallest normal float32 is none: one over it would be infinite. Units may be as small as m^2/s."""
SMALLEST_SQUARES = 1e-30
"""Below this sum, squares in single precision may have lost their small ones."""


def normalize(
    image_CZYX: np.ndarray,
    mask_ZYX: np.ndarray | None,
    schemes: Sequence[str],
    use_mask: Sequence[bool],
    intensities: Sequence[Intensities],
) -> np.ndarray:
    """Apply `schemes[c]` to channel c, within `mask_ZYX` where `use_mask[c]`.

    Returns a new float32 array of the same shape. A constant channel becomes 0, never NaN.
    Raises UserError for an unknown scheme, or when there is not one entry per channel.
    """
    channels = len(image_CZYX)
    for name, given in (("schemes", schemes), ("mask choices", use_mask), ("intensities", intensities)):
        if len(given) != channels:
            raise UserError(f"The image has {channels} channel(s), but the plan has {len(given)} {name}.")
    normalized = [
        find(scheme)(np.asarray(channel_ZYX, np.float32), mask_ZYX if masked else None, stats)
        for channel_ZYX, scheme, masked, stats in zip(image_CZYX, schemes, use_mask, intensities, strict=True)
    ]
    return normalized[0][None] if channels == 1 else np.stack(normalized)


def find(scheme: str) -> Normalization:
    """The function called `scheme`. Raises UserError that lists the valid names."""
    if scheme not in NORMALIZATIONS:
        raise UserError(f"There is no normalization {scheme!r}.", fix=f"Choose one of: {', '.join(NORMALIZATIONS)}.")
    return NORMALIZATIONS[scheme]


def zscore(channel_ZYX: np.ndarray, mask_ZYX: np.ndarray | None, intensities: Intensities) -> np.ndarray:
    """Subtract the image's own mean and divide by its own standard deviation."""
    mean, std = _mean_and_std(channel_ZYX if mask_ZYX is None else channel_ZYX[mask_ZYX])
    if is_constant(mean, std):
        return np.zeros_like(channel_ZYX)
    return _zero_outside(_shift_and_scale(channel_ZYX, mean, 1 / std), mask_ZYX)


def ct(channel_ZYX: np.ndarray, mask_ZYX: np.ndarray | None, intensities: Intensities) -> np.ndarray:
    """Clip to the data set's foreground percentiles 0.5 and 99.5, then use its foreground mean and deviation.

    0 where that deviation is none.
    """
    clipped_ZYX = np.clip(channel_ZYX, np.float32(intensities.percentile_00_5), np.float32(intensities.percentile_99_5))
    scale = 0.0 if is_constant(intensities.mean, intensities.std) else 1 / intensities.std
    return _zero_outside(_shift_and_scale(clipped_ZYX, intensities.mean, scale, out=clipped_ZYX), mask_ZYX)


def none(channel_ZYX: np.ndarray, mask_ZYX: np.ndarray | None, intensities: Intensities) -> np.ndarray:
    """Leave the intensities as they are."""
    return _zero_outside(channel_ZYX.copy(), mask_ZYX)


def rescale_0_1(channel_ZYX: np.ndarray, mask_ZYX: np.ndarray | None, intensities: Intensities) -> np.ndarray:
    """Map the image's own minimum to 0 and its maximum to 1."""
    counted = channel_ZYX if mask_ZYX is None else channel_ZYX[mask_ZYX]
    low, high = (float(counted.min()), float(counted.max())) if counted.size else (0.0, 0.0)
    if low == high:
        return np.zeros_like(channel_ZYX)
    return _zero_outside(_shift_and_scale(channel_ZYX, low, 1 / max(high - low, SMALLEST)), mask_ZYX)


def rgb_0_1(channel_ZYX: np.ndarray, mask_ZYX: np.ndarray | None, intensities: Intensities) -> np.ndarray:
    """Divide 8-bit colours by 255. Raises UserError when a value lies outside 0..255."""
    low, high = float(channel_ZYX.min()), float(channel_ZYX.max())
    if low < 0 or high > 255:
        raise UserError(
            f"rgb_0_1 needs intensities from 0 to 255, but found {low:g} to {high:g}.",
            fix="Use the normalization rescale_0_1 or zscore for this channel.",
        )
    return _zero_outside(_shift_and_scale(channel_ZYX, 0.0, 1 / 255), mask_ZYX)


def _mean_and_std(values: np.ndarray) -> tuple[float, float]:
    """Mean and standard deviation in double precision without a double precision copy; (0, 0) for no values."""
    if not values.size:
        return 0.0, 0.0
    rows = np.array_split(values.reshape(-1), values.size // ROW_VOXELS + 1)  # a row at a time stays in the cache
    mean = sum(float(row.sum(dtype=np.float64)) for row in rows) / values.size
    squares = sum(squares_about(row, mean) for row in rows)
    rounding = mean - float(np.float32(mean))
    return mean, max(squares / values.size - rounding**2, 0.0) ** 0.5


def squares_about(row: np.ndarray, mean: float) -> float:
    """Sum of the squares of float32 values less the mean as float32; in double precision where that overflows, or
    where the squares are so small that float32 loses them."""
    with np.errstate(over="ignore", invalid="ignore"):
        centred = row - np.float32(mean)
        squares = float(np.dot(centred, centred))
    if SMALLEST_SQUARES < squares < np.inf or not centred.any():
        return squares
    wide = row.astype(np.float64) - float(np.float32(mean))
    return float(np.dot(wide, wide))


def is_constant(mean: float, std: float) -> bool:
    """Whether a channel with this mean and standard deviation is constant, but for rounding."""
    return std <= max(RESOLUTION * abs(mean), SMALLEST)


def _shift_and_scale(channel_ZYX: np.ndarray, shift: float, scale: float, out: np.ndarray | None = None) -> np.ndarray:
    """(channel - shift) * scale, into `out` or a new array."""
    shifted_ZYX = np.subtract(channel_ZYX, np.float32(shift), out=out)
    shifted_ZYX *= np.float32(scale)
    return shifted_ZYX


def shifter(shift: float, scale: float) -> Callable[[np.ndarray], np.ndarray]:
    """(pixels - shift) * scale as a function, for whoever normalizes an image part by part."""
    return lambda pixels: _shift_and_scale(pixels, shift, scale)


def _zero_outside(channel_ZYX: np.ndarray, mask_ZYX: np.ndarray | None) -> np.ndarray:
    if mask_ZYX is not None:
        channel_ZYX[~mask_ZYX] = 0
    return channel_ZYX


NORMALIZATIONS: dict[str, Normalization] = {
    "zscore": zscore,
    "ct": ct,
    "none": none,
    "rescale_0_1": rescale_0_1,
    "rgb_0_1": rgb_0_1,
}
