"""Post-processing of a label map: which components go, which holes are filled.

Axes: Z Y X voxels. What rules there are: `records.Rule`. How they are learned: `steps/postprocess.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from autoseg.errors import UserError
from autoseg.image.components import drop_small, drop_volume, fill_holes, keep_largest, label_components, slabs
from autoseg.records import Label, Rule


@dataclass(frozen=True)
class CaseParts:
    """What learning keeps of a case: its predicted components, and the reference volume per class.

    All sizes are in voxels. `parent` is the index of the joined-foreground component that holds the component.
    `counted` and `true` leave out voxels nobody annotated; `true` are those where the reference has the same label.
    `drawn` says of each foreground class whether somebody drew it in this reference; None is all.
    """

    id: str
    voxel_mm3: float
    label_of: np.ndarray
    sizes: np.ndarray
    counted: np.ndarray
    true: np.ndarray
    parent: np.ndarray
    joint_sizes: np.ndarray
    reference: np.ndarray
    drawn: np.ndarray | None = None


def case_parts(
    case: str,
    prediction_ZYX: np.ndarray,
    reference_ZYX: np.ndarray,
    classes: int,
    voxel_mm3: float = 1.0,
    connectivity: int = 1,
) -> CaseParts:
    """Number the components of a prediction (label indices) and count their true voxels; see `CaseParts`."""
    found = label_components(prediction_ZYX, connectivity)
    joint = label_components(prediction_ZYX > 0, connectivity)
    length = found.sizes_voxels.size + 1
    counted, true = np.zeros(length, np.int64), np.zeros(length, np.int64)
    parent, reference = np.zeros(length, np.int64), np.zeros(classes, np.int64)
    for slab in slabs(prediction_ZYX.shape):
        numbers, referred = found.numbers_ZYX[slab], reference_ZYX[slab]
        counted += np.bincount(numbers[referred >= 0], minlength=length)
        true += np.bincount(numbers[referred == prediction_ZYX[slab]], minlength=length)
        parent[numbers] = joint.numbers_ZYX[slab]
        reference += np.bincount(referred[referred >= 0], minlength=classes)
    return CaseParts(
        id=case,
        voxel_mm3=voxel_mm3,
        label_of=found.label_of,
        sizes=found.sizes_voxels,
        counted=counted[1:],
        true=true[1:],
        parent=parent[1:] - 1,
        joint_sizes=joint.sizes_voxels,
        reference=reference[1:],
    )


def apply_rules(
    labels_ZYX: np.ndarray,
    rules: Sequence[Rule],
    labels: tuple[Label, ...],
    spacing_mm: tuple[float, float, float],
) -> np.ndarray:
    """Apply rules one after the other to a map of label indices; removed voxels become background (0).

    Args:
        labels_ZYX: integer label indices, (Z, Y, X); left as it is.
        labels: the names the rules speak of, background first.
        spacing_mm: Z Y X, for rules about volumes in mm3.

    Returns:
        a new map of the same type and shape.
    """
    result_ZYX = labels_ZYX.copy()
    voxel_mm3 = float(np.prod(spacing_mm))
    waiting: list[Rule] = []
    for rule in rules:
        if rule.label is None or rule.action == "fill_holes":
            _drop_per_label(result_ZYX, waiting, labels, voxel_mm3)
            waiting = []
            _apply_one(result_ZYX, rule, labels, voxel_mm3)
            continue
        if any(each.label == rule.label or each.connectivity != rule.connectivity for each in waiting):
            _drop_per_label(result_ZYX, waiting, labels, voxel_mm3)
            waiting = []
        waiting.append(rule)
    _drop_per_label(result_ZYX, waiting, labels, voxel_mm3)
    return result_ZYX


def survives(sizes_voxels: np.ndarray, rule: Rule, voxel_mm3: float) -> np.ndarray:
    """Which of the components of one mask a size rule leaves: bool per component."""
    if not sizes_voxels.size:
        return np.zeros(0, bool)
    if rule.action == "drop_small":
        return sizes_voxels >= rule.fraction * sizes_voxels.max()
    if rule.action == "keep_largest":
        return np.arange(sizes_voxels.size) == np.argmax(sizes_voxels)
    if rule.action == "drop_volume":
        return sizes_voxels * voxel_mm3 >= rule.minimum_mm3
    raise UserError(f"{rule.action} is no rule about sizes.")


def _apply_one(labels_ZYX: np.ndarray, rule: Rule, labels: tuple[Label, ...], voxel_mm3: float) -> None:
    """Apply one rule in place: to the joined foreground, or holes of one label."""
    if rule.label is None:
        foreground = labels_ZYX > 0
        if rule.action == "fill_holes":
            raise UserError("fill_holes needs a label: the joined foreground cannot say which label fills a hole.")
        kept = {
            "drop_small": lambda: drop_small(foreground, rule.fraction, rule.connectivity),
            "keep_largest": lambda: keep_largest(foreground, rule.connectivity),
            "drop_volume": lambda: drop_volume(foreground, rule.minimum_mm3 / voxel_mm3, rule.connectivity),
        }[rule.action]()
        labels_ZYX[foreground & ~kept] = 0
        return
    index = index_of(rule.label, labels)
    labels_ZYX[fill_holes(labels_ZYX == index) & (labels_ZYX == 0)] = index


def _drop_per_label(
    labels_ZYX: np.ndarray, rules: Sequence[Rule], labels: tuple[Label, ...], voxel_mm3: float
) -> None:
    """Apply size rules of different labels in place, all in one numbering of the components."""
    if not rules:
        return
    concerned = np.zeros(len(labels), labels_ZYX.dtype)
    for rule in rules:
        concerned[index_of(rule.label, labels)] = index_of(rule.label, labels)
    found = label_components(concerned[np.maximum(labels_ZYX, 0)], rules[0].connectivity)
    dropped = np.zeros(found.sizes_voxels.size + 1, bool)
    for rule in rules:
        own = np.flatnonzero(found.label_of == index_of(rule.label, labels))
        dropped[own + 1] = ~survives(found.sizes_voxels[own], rule, voxel_mm3)
    for slab in slabs(labels_ZYX.shape):
        labels_ZYX[slab][dropped[found.numbers_ZYX[slab]]] = 0


def index_of(name: str | None, labels: tuple[Label, ...]) -> int:
    """The index of the label a rule names. Raises UserError when there is no such label."""
    for index, label in enumerate(labels):
        if label.name == name:
            return index
    raise UserError(
        f"A post-processing rule is about {name!r}, which is no label of this data set.",
        fix=f"Labels: {', '.join(label.name for label in labels)}.",
    )
