"""How each channel's intensities are normalized, chosen by the channel's name. Source of the rules: nnU-Net."""

import re
from collections.abc import Sequence
from math import prod
from statistics import median

from autoseg.errors import UserError
from autoseg.planning.wording import percent, some
from autoseg.records import CaseStats, Choice

MASK_BELOW_SHARE = 0.75
"""Cropping that leaves less than this share of the volume means a wide empty border: z-scores then ignore it."""


def choose_normalization(channels: Sequence[str]) -> tuple[tuple[str, ...], tuple[Choice, ...]]:
    """One normalization name per channel; a name that is not known means z-scores, as in nnU-Net.

    Raises UserError for a name that may mean two normalizations, or that is nearly one of EXPLICIT.
    """
    found = [_of(index, name) for index, name in enumerate(channels)]
    return tuple(name for name, _ in found), tuple(choice for _, choice in found)


def warnings_of(channels: Sequence[str]) -> tuple[str, ...]:
    """One sentence where channel names are not known, none where all are."""
    unknown = [repr(name) for name in channels if not _kinds(name)]
    if not unknown:
        return ()
    return (
        f"Channel {some(unknown)}: autoseg knows no modality by that name and z-scores each image by its own mean and "
        "std. If it is CT, call it CT in dataset.json.",
    )


def choose_masks(cases: Sequence[CaseStats], normalization: Sequence[str]) -> tuple[tuple[bool, ...], Choice]:
    """True for z-scored channels when the nonzero region fills less than 3/4 of the typical image."""
    kept = median(min(1.0, prod(c.shape_voxels) / prod(c.full_shape_voxels)) for c in cases)
    masks = tuple(kept < MASK_BELOW_SHARE and name == "zscore" for name in normalization)
    because = (
        f"cropping to the nonzero region keeps {percent(kept)} of the median image; below {percent(MASK_BELOW_SHARE)} "
        "the mean and std of z-scored channels are taken inside that region only."
    )
    return masks, Choice(
        field="mask_for_normalization", value=" ".join("yes" if m else "no" for m in masks), because=because
    )


def _of(index: int, channel: str) -> tuple[str, Choice]:
    kinds = _kinds(channel)
    meant = {RULES[kind][0] for kind in kinds}
    if len(meant) > 1 or (not kinds and re.search(LIKE_EXPLICIT, _plain(channel))):
        meaning = f"could mean {' or '.join(sorted(kinds))}" if kinds else "is no normalization autoseg knows"
        raise UserError(
            f"Channel {index} is called {channel!r}, which {meaning}.",
            fix=f"Name it in dataset.json by its modality (CT, MRI, PET, ...) or by one of {', '.join(EXPLICIT)}.",
        )
    normalization, because = RULES[min(kinds)] if kinds else UNKNOWN
    because = f"channel {channel!r}: {because}"
    return normalization, Choice(field=f"normalization.{index}", value=normalization, because=because)


def _kinds(channel: str) -> set[str]:
    """The keys of KNOWN that a channel name may mean: by the whole name, else by its words; "unnamed" only if alone."""
    name = _plain(channel)
    by_name = {kind for kind, known in KNOWN.items() if name in known.split()}
    if by_name:
        return by_name
    if re.search(LIKE_EXPLICIT, name):
        return set()
    words = [word for word in re.split(r"[^a-z0-9]+", name) if word]
    kinds = {kind for kind, known in KNOWN.items() if set(words) & set(known.split())}
    kinds |= {kind for kind, pattern in PATTERNS.items() if any(re.fullmatch(pattern, word) for word in words)}
    return kinds - {"unnamed"} or kinds


def _plain(channel: str) -> str:
    return re.sub(r"[\s_-]+", "_", channel.strip().lower())


EXPLICIT = ("zscore", "nonorm", "rescale_to_0_1", "rgb_to_0_1")
"""Channel names that ask for a normalization instead of naming a modality."""

LIKE_EXPLICIT = r"no_?norm|z_?score|rescale|_to_\d"
"""What tells that a name was meant as one of EXPLICIT, though it is none."""

KNOWN: dict[str, str] = {
    "zscore": "zscore z_score",
    "nonorm": "nonorm nonormalization no_normalization none",
    "rescale_to_0_1": "rescale_to_0_1 rescale_0_1",
    "rgb_to_0_1": "rgb_to_0_1 rgb_0_1",
    "CT": "ct cta cect ncct cbct hu",
    "MRI": "mr mri mra flair dwi adc dce dsc pd pdw pdfs swi lge cine bold asl fmri mprage space tse gre stir dixon "
    "water fat fa md cest qsm r1 r2 trufi bssfp hbv",
    "other modality": "pet spect suv nm us ultrasound echo xray x_ray dx cr mg mammography mammogram oct octa fundus "
    "photo photograph endoscopy dermoscopy microscopy em sem tem fluorescence brightfield phase histology dapi "
    "gfp rfp cy3 cy5 hoechst red green blue r g b rgb hue saturation value gray grey grayscale greyscale "
    "luminance infrared nir optical satellite radar depth probability",
    "unnamed": "image img channel modality input intensity volume scan series picture data raw unknown",
}
"""Kind of channel -> names and words that mean it (lower case; blanks and dashes as underscores)."""

PATTERNS: dict[str, str] = {"MRI": r"t[12]\w*|b\d+", "unnamed": r"(image|img|channel|ch|c|modality|m|input|frame)?\d+"}
"""Kind of channel -> words that mean it, as a regular expression."""

RULES: dict[str, tuple[str, str]] = {
    "zscore": ("zscore", "the name asks for it."),
    "nonorm": ("none", "the name asks for it."),
    "rescale_to_0_1": ("rescale_0_1", "the name asks for it."),
    "rgb_to_0_1": ("rgb_0_1", "the name asks for it."),
    "CT": (
        "ct",
        "CT numbers mean the same in every image, so one clipping range and one mean and std serve all of them.",
    ),
    "MRI": ("zscore", "MRI intensities have no unit, so each image is brought to mean 0 and std 1."),
    "other modality": ("zscore", "its intensities have no fixed unit, so each image is brought to mean 0 and std 1."),
    "unnamed": (
        "zscore",
        "the name tells no modality, so each image is brought to mean 0 and std 1; call it CT if it is one.",
    ),
}
"""Kind of channel -> normalization and why."""

UNKNOWN = (
    "zscore",
    "autoseg knows no modality by that name, so each image is brought to mean 0 and std 1, as nnU-Net does; call it CT "
    "if it is one.",
)
"""The normalization of a channel whose name means none of KNOWN, and why."""
