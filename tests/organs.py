"""Label maps of an organ with lesions, and rules about them, for tests of post-processing."""

import numpy as np

from autoseg.records import Label, Rule

LABELS = (Label(name="background", value=0), Label(name="organ", value=10), Label(name="lesion", value=20))


def rule(action: str, label: str | None = "organ", **more) -> Rule:
    return Rule(label=label, action=action, dice_before=0.0, dice_after=0.0, **more)


def organ_map(lesions: int = 2) -> np.ndarray:
    """Index map: an organ of 216 voxels with a lesion of 8 voxels in it, and `lesions` - 1 further ones of 4."""
    labels = np.zeros((10, 24, 24), np.int16)
    labels[2:8, 2:8, 2:8] = 1
    labels[3:5, 3:5, 3:5] = 2
    for n in range(lesions - 1):
        labels[6, 4 + 2 * n, 4:8] = 2
    return labels


def with_crumbs(labels: np.ndarray, seed: int, sizes=(3, 5, 8)) -> np.ndarray:
    """The same map with false organ components far from the true one."""
    chance = np.random.default_rng(seed)
    noisy = labels.copy()
    for n, size in enumerate(sizes):
        z, y = int(chance.integers(0, 10)), 12 + 3 * n
        noisy[z, y, 12 : 12 + size] = 1
    return noisy
