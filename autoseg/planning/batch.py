"""How many samples a batch may hold, and the norm layer that suits it. A batch is limited whatever the memory."""

from collections.abc import Sequence
from math import prod
from typing import Literal

from autoseg.planning.search import SMALLEST_BATCH
from autoseg.planning.wording import percent
from autoseg.records import Choice

LARGEST_SHARE_OF_DATA = 0.05
BATCH_NORM_FROM = 32


def batch_cap(dataset_voxels: int, patch_voxels: Sequence[int]) -> int:
    """Most samples per batch: together about 5 % of the data set's voxels, but at least 2."""
    return max(SMALLEST_BATCH, round(_patches_in_share(dataset_voxels, patch_voxels)))


def _patches_in_share(dataset_voxels: int, patch_voxels: Sequence[int]) -> float:
    return LARGEST_SHARE_OF_DATA * dataset_voxels / prod(patch_voxels)


def choose_norm(batch_size: int) -> Literal["instance", "batch"]:
    """Batch statistics from 32 samples on, else each sample's own."""
    return "batch" if batch_size >= BATCH_NORM_FROM else "instance"


def describe_norm(batch_size: int) -> Choice:
    """The normalization layer as a choice with its source."""
    source = "Wu & He, Group Normalization, 2018: batch norm is at its best from 16 samples per device and worse below"
    if choose_norm(batch_size) == "batch":
        because = f"{batch_size} samples give reliable batch statistics, also when two devices share them ({source})."
    else:
        because = f"{batch_size} samples are too few for batch statistics, used from {BATCH_NORM_FROM} on ({source})."
    return Choice(field="network.norm", value=choose_norm(batch_size), because=because)


def describe_cap(dataset_voxels: int, patch_voxels: Sequence[int], preset: str) -> str:
    """The most samples that the data set allows, as a clause."""
    share = f"{percent(LARGEST_SHARE_OF_DATA)} of the data set's {dataset_voxels:.3g} voxels"
    held = _patches_in_share(dataset_voxels, patch_voxels)
    if round(held) < SMALLEST_BATCH:
        return f"{share} come to {held:.2g} patches, and a batch has at least {SMALLEST_BATCH}"
    clause = f"a batch may hold about {share}: {batch_cap(dataset_voxels, patch_voxels)}"
    if preset != "standard":
        clause += " (nnU-Net lifts this for its residual presets, but the sets it published them on never reach it)"
    return clause
