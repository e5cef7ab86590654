"""The network that learns from an ensemble: its teachers', with fewer channels.

It has the same grid, patch and depth.
"""

from collections.abc import Callable
from typing import Literal

from autoseg.errors import UserError
from autoseg.planning.cost import parameters, training_operations
from autoseg.planning.topology import choose_features
from autoseg.records import Choice, Configuration, Memory

FEWEST_FEATURES = 4


def choose_student(
    teacher: Configuration,
    size: str,
    measure: Callable[[Configuration], int],
    source: Literal["measured", "simulated", "assumed"],
) -> tuple[Configuration, Choice]:
    """The student of a configuration, and why it is as it is.

    Args:
        size: of `SIZES`.
        measure: bytes that one training step of a configuration needs, from `source`.

    Raises UserError for another size, with the valid ones.
    """
    if size not in SIZES:
        raise UserError(f"There is no student {size!r}.", fix=f"Choose one of {', '.join(SIZES)}.")
    spec = teacher.network
    base = max(min(FEWEST_FEATURES, spec.features[0]), spec.features[0] // SIZES[size])
    features = spec.features if SIZES[size] == 1 else choose_features(len(spec.features), spec.dimension, base)
    network = spec.model_copy(update={"features": features})
    student = teacher.model_copy(update={"name": f"{teacher.name}_student_{size}", "network": network})
    memory = Memory(source=source, peak_bytes=measure(student))
    student = student.model_copy(update={"memory": memory})
    cost = training_operations(network, teacher.patch_voxels, 1) / training_operations(spec, teacher.patch_voxels, 1)
    because = (
        f"{features[0]} channels in the first stage instead of {spec.features[0]}: {parameters(network) / 1e6:.3g} "
        f"million parameters instead of {parameters(spec) / 1e6:.3g}, and {100 * cost:.2g} % of the operations."
    )
    field = f"{student.name}.network.features"
    return student, Choice(field=field, value=" ".join(map(str, features)), because=because)


SIZES = {"standard": 1, "small": 2, "tiny": 4}
"""Name -> by what the channels of the teacher are divided; operations shrink by its square."""
