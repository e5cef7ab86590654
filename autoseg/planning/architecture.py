"""The network of a configuration by preset: a plain or residual-encoder U-Net.

Source: nnU-Net (plain, 2 convolutions per stage) and its residual presets M, L, XL (Isensee et al., "nnU-Net
Revisited", 2024: encoder blocks 1 3 4 6 6 6.., one convolution per decoder stage, planned for 8, 24 and 40 GB).
"""

from dataclasses import dataclass
from math import inf
from typing import Literal

from autoseg.errors import UserError
from autoseg.planning.batch import choose_norm
from autoseg.planning.topology import Topology, choose_features
from autoseg.planning.wording import voxels
from autoseg.records import Choice, NetworkSpec

PLAIN_BLOCKS = 2
BASE_FEATURES = 32
BASE_FEATURES_SLOW = 16
"""On every CPU: a quarter of the work, so four times as many samples in a given time."""
RESIDUAL_BLOCKS = (1, 3, 4, 6, 6, 6, 6, 6, 6, 6)


@dataclass(frozen=True, slots=True)
class Preset:
    """A kind of network, and the memory in GB (2**30 bytes) it is meant for when the user names none."""

    kind: Literal["plain", "residual"]
    memory_gb: int
    because: str


def preset_named(name: str) -> Preset:
    """The preset, or a UserError that lists the valid ones."""
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}.", fix=f"Choose one of {', '.join(PRESETS)}.")
    return PRESETS[name]


def network_spec(
    kind: Literal["plain", "residual"],
    in_channels: int,
    classes: int,
    topology: Topology,
    batch_size: int,
    base_features: int = BASE_FEATURES,
) -> NetworkSpec:
    """The U-Net for a topology. Of two stages only the finest has an output, so there is no deep supervision."""
    stages, dimension = topology.stages, len(topology.patch_voxels)
    residual = kind == "residual"
    encoder = tuple(RESIDUAL_BLOCKS[min(s, 9)] for s in range(stages)) if residual else (PLAIN_BLOCKS,) * stages
    return NetworkSpec(
        kind=kind,
        dimension=3 if dimension == 3 else 2,
        in_channels=in_channels,
        classes=classes,
        features=choose_features(stages, dimension, base_features),
        strides=topology.strides,
        kernels=topology.kernels,
        encoder_blocks=encoder,
        decoder_blocks=(1 if residual else PLAIN_BLOCKS,) * (stages - 1),
        norm=choose_norm(batch_size),
        deep_supervision=stages > 2,
    )


def choose_base_features(device: str) -> int:
    """Channels of the first stage: 32 as in nnU-Net, but 16 on a CPU, where three times the steps are worth more."""
    return BASE_FEATURES_SLOW if device == "cpu" else BASE_FEATURES


def most_operations(device: str, precision: str) -> float:
    """FLOP that a step at batch 2 may cost: about a second of two cores on CPUs, no limit on GPUs."""
    return MOST_OPERATIONS_ON_CPU.get(precision, inf) if device == "cpu" else inf


def describe_network(spec: NetworkSpec, patch_voxels: tuple[int, ...]) -> tuple[Choice, ...]:
    """Stages, kernels and features as choices."""
    halvings = tuple(d.bit_length() - 1 for d in spec.divisors)
    bottom = tuple(p // d for p, d in zip(patch_voxels, spec.divisors, strict=True))
    thin = [stage for stage, kernel in enumerate(spec.kernels) if 1 in kernel]
    kernels = "3 on every axis, since the spacings agree within a factor of two."
    if thin:
        kernels = (
            f"stage {', '.join(map(str, thin))}: 1 along axes whose spacing is still at least twice the finest there."
        )
    base = spec.features[0]
    slow = "" if base == BASE_FEATURES else (
        " instead of 32 on a CPU: a quarter of the work, and steps are what training lacks there"
    )
    most = 320 if spec.dimension == 3 else 512
    return (
        Choice(
            field="network.strides",
            value=" ".join(voxels(s).replace(" ", "") for s in spec.strides),
            because=f"{len(spec.strides)} stages: axes are halved {halvings} times, finest first, down to "
            f"{voxels(bottom)} voxels; an edge is never halved below 4.",
        ),
        Choice(
            field="network.kernels", value=" ".join(voxels(k).replace(" ", "") for k in spec.kernels), because=kernels
        ),
        Choice(
            field="network.features",
            value=" ".join(map(str, spec.features)),
            because=f"{base} channels{slow}, doubled with every halving, at most {most} in {spec.dimension}D.",
        ),
    )


MOST_OPERATIONS_ON_CPU = {"fp32": 1e11, "bf16": 5e11}
"""By precision; training on two cores was measured at 0.1 to 0.2 TFLOP/s in fp32 and about 0.5 in bf16."""

PRESETS: dict[str, Preset] = {
    "standard": Preset("plain", 8, "a plain U-Net, two convolutions per stage: the published nnU-Net."),
    "M": Preset("residual", 8, "a residual-encoder U-Net, meant for 8 GB."),
    "L": Preset("residual", 24, "a residual-encoder U-Net, meant for 24 GB: the best published compromise."),
    "XL": Preset("residual", 40, "a residual-encoder U-Net, meant for 40 GB."),
}
