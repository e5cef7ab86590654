"""The network of a configuration and the variation of its patches, as records."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from autoseg.record import BelowOne, Positive, Record, Share

RESIDUAL_ONLY = ("block", "bottleneck_features", "stochastic_depth", "squeeze_excitation")


class NetworkSpec(Record):
    """A U-Net. Stage s halves the axes where `strides[s]` is 2 and convolves with `kernels[s]`, giving `features[s]`.

    All per-stage tuples have the same length, two at least; `decoder_blocks` has one entry less. `strides[0]` is all
    ones, sizes of kernels are odd.
    What only a residual encoder has: `block` (two convolutions, or a wide one between two of size 1 with
    `bottleneck_features` channels, a quarter of the features where that is empty), `stochastic_depth` (chance that the
    last block is left out for a sample; it rises linearly with depth) and `squeeze_excitation` (the factor by which
    channels are squeezed; 0 for none). `bias` gives the convolutions in front of norms a bias, as nnU-Net's have.
    """

    kind: Literal["plain", "residual"] = "plain"
    dimension: Literal[2, 3]
    in_channels: Positive
    classes: Positive
    features: Annotated[tuple[Positive, ...], Field(min_length=2)]
    strides: tuple[tuple[Positive, ...], ...]
    kernels: tuple[tuple[Positive, ...], ...]
    encoder_blocks: tuple[Positive, ...]
    decoder_blocks: tuple[Positive, ...]
    norm: Literal["instance", "batch", "group"] = "instance"
    deep_supervision: bool = True
    dropout: BelowOne = 0.0
    block: Literal["basic", "bottleneck"] = "basic"
    bottleneck_features: tuple[Positive, ...] = ()
    stochastic_depth: BelowOne = 0.0
    squeeze_excitation: Annotated[int, Field(ge=0)] = 0
    upsampling: Literal["transposed", "linear"] = "transposed"
    bias: bool = False

    @model_validator(mode="after")
    def _can_be_built(self) -> "NetworkSpec":
        stages = len(self.features)
        for name in ("strides", "kernels", "encoder_blocks"):
            if len(getattr(self, name)) != stages:
                raise ValueError(f"{name} has {len(getattr(self, name))} entries, features has {stages}")
        if len(self.decoder_blocks) != stages - 1:
            raise ValueError(f"decoder_blocks needs {stages - 1} entries, has {len(self.decoder_blocks)}")
        if any(len(each) != self.dimension for each in (*self.strides, *self.kernels)):
            raise ValueError(f"strides and kernels need {self.dimension} numbers per stage")
        if max(self.strides[0]) > 1:
            raise ValueError(f"strides begin with {self.strides[0]}, but the first stage has the size of the patch")
        if even := [kernel for kernel in self.kernels if any(size % 2 == 0 for size in kernel)]:
            raise ValueError(f"kernels have {even[0]}, but only odd sizes have a voxel in the middle")
        if len(self.bottleneck_features) not in (0, stages):
            raise ValueError(f"bottleneck_features needs {stages} entries or none, has {len(self.bottleneck_features)}")
        if self.kind == "plain":
            wrong = [name for name in RESIDUAL_ONLY if getattr(self, name) != NetworkSpec.model_fields[name].default]
            if wrong:
                raise ValueError(f"{', '.join(wrong)}: only a network of kind residual has that")
        return self

    @property
    def inner_features(self) -> tuple[int, ...]:
        """Channels inside the residual blocks of every stage."""
        if self.block == "basic":
            return self.features
        return self.bottleneck_features or tuple(max(1, features // 4) for features in self.features)

    @property
    def squeezed_features(self) -> tuple[int, ...]:
        """Channels between the two convolutions of squeeze-excitation in every stage, 0 without it."""
        factor = self.squeeze_excitation
        return tuple(max(1, features // factor) if factor else 0 for features in self.features)

    @property
    def divisors(self) -> tuple[int, ...]:
        """What each patch axis must be divisible by: the product of that axis' strides."""
        products = [1] * self.dimension
        for stride in self.strides:
            products = [p * s for p, s in zip(products, stride, strict=True)]
        return tuple(products)


class AugmentSpec(Record):
    """How strongly patches are varied. Chances are per sample; ranges are those of nnU-Net's default trainer.

    `rotation_rad` is the largest angle per axis (Z Y X; in 2D only the first counts, turning in the plane).
    `mirror_axes` are patch axes; prediction mirrors along the same ones. A training that sees fewer patches than
    `mirror_from_patches` mirrors along none, one of fewer than `extra_movement_to_patches` turns and scales each patch
    with at least `extra_movement_chance`; both only where patches are not turned to all sides anyway
    (docs/decisions/mirroring.md). `elastic_chance`, not among nnU-Net's, is that of patches to be bent.
    """

    rotation_rad: tuple[float, ...]
    rotation_chance: Share = 0.2
    scale_range: tuple[float, float] = (0.7, 1.4)
    scale_chance: Share = 0.2
    elastic_chance: Share = 0.0
    noise_chance: Share = 0.1
    blur_chance: Share = 0.2
    brightness_chance: Share = 0.15
    contrast_chance: Share = 0.15
    low_resolution_chance: Share = 0.25
    gamma_inverted_chance: Share = 0.1
    gamma_chance: Share = 0.3
    mirror_axes: tuple[int, ...] = ()
    mirror_from_patches: Annotated[int, Field(ge=0)] = 20_000
    extra_movement_chance: Share = 0.6
    extra_movement_to_patches: Annotated[int, Field(ge=0)] = 200_000
    turn_in_plane_only: bool = False

    @model_validator(mode="after")
    def _scales(self) -> "AugmentSpec":
        smallest, largest = self.scale_range
        if not 0 < smallest <= largest:
            raise ValueError(f"scale_range is {self.scale_range}: the smallest and the largest factor, above 0")
        return self


def forced_of(batch_size: int, foreground_share: float) -> int:
    """How many patches of a batch are on foreground: whole ones, and at least one where the share is above 0."""
    return batch_size - min(batch_size - 1, round(batch_size * (1 - foreground_share))) if foreground_share > 0 else 0
