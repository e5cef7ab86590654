"""What a network costs, counted on paper: parameters, operations, elements.

The receptive field of every convolution is counted as well. The count is the prior of the memory search (search.py) and
the network's drawing (explain.py); it runs no network.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

from autoseg.records import NetworkSpec


@dataclass(frozen=True, slots=True)
class Layer:
    """One convolution for one sample: where it is, its weights, and the size of its output in voxels."""

    part: str
    stage: int
    in_channels: int
    out_channels: int
    kernel: tuple[int, ...]
    size_voxels: tuple[int, ...]
    norm: bool = True
    transposed: bool = False
    bias: bool = False

    @property
    def elements(self) -> int:
        return self.out_channels * prod(self.size_voxels)

    @property
    def parameters(self) -> int:
        weights = self.in_channels * self.out_channels * prod(self.kernel)
        return weights + self.out_channels * (2 * self.norm + self.bias)  # scale and shift of the norm, and a bias

    @property
    def operations(self) -> int:
        """Multiplications and additions of one forward pass; a transposed one touches each output voxel once."""
        per_voxel = self.in_channels * self.out_channels * (1 if self.transposed else prod(self.kernel))
        return 2 * per_voxel * prod(self.size_voxels)


def sizes_per_stage(spec: NetworkSpec, patch_voxels: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Voxels of the feature maps of every stage."""
    size, sizes = tuple(patch_voxels), []
    for stride in spec.strides:
        size = tuple(-(-n // s) for n, s in zip(size, stride, strict=True))
        sizes.append(size)
    return tuple(sizes)


def layers(spec: NetworkSpec, patch_voxels: Sequence[int]) -> tuple[Layer, ...]:
    """Every convolution of the network, in the order of the forward pass."""
    sizes = sizes_per_stage(spec, patch_voxels)
    encoder = _residual_encoder(spec, sizes) if spec.kind == "residual" else _plain_encoder(spec, sizes)
    return (*encoder, *_decoder(spec, sizes))


def elements(spec: NetworkSpec, patch_voxels: Sequence[int]) -> int:
    """Numbers that all convolutions put out for one sample; the step's memory is nearly proportional to it."""
    return sum(each.elements for each in layers(spec, patch_voxels))


def parameters(spec: NetworkSpec) -> int:
    """Trainable numbers of the network."""
    return sum(each.parameters for each in layers(spec, spec.divisors))


def training_operations(spec: NetworkSpec, patch_voxels: Sequence[int], batch_size: int) -> int:
    """Operations of one training step: forward, and backward at twice the forward's."""
    return 3 * batch_size * sum(each.operations for each in layers(spec, patch_voxels))


def receptive_fields(spec: NetworkSpec) -> tuple[tuple[int, ...], ...]:
    """Voxels of the patch that one voxel of each encoder stage sees, per axis."""
    seen, jump, fields = [1] * spec.dimension, [1] * spec.dimension, []
    for stage, (stride, kernel) in enumerate(zip(spec.strides, spec.kernels, strict=True)):
        two = spec.kind == "residual" and spec.block == "basic"  # a bottleneck has one that is wider than a voxel
        convolutions = spec.encoder_blocks[stage] * (2 if two else 1)
        convolutions += spec.kind == "residual" and stage == 0  # the stem
        for a in range(spec.dimension):
            seen[a] += (kernel[a] - 1) * jump[a]
            jump[a] *= stride[a]
            seen[a] += (kernel[a] - 1) * jump[a] * (convolutions - 1)
        fields.append(tuple(seen))
    return tuple(fields)


def _plain_encoder(spec: NetworkSpec, sizes: Sequence[tuple[int, ...]]) -> Iterator[Layer]:
    channels = spec.in_channels
    for stage, size in enumerate(sizes):
        for _ in range(spec.encoder_blocks[stage]):
            yield Layer("encoder", stage, channels, spec.features[stage], spec.kernels[stage], size, bias=spec.bias)
            channels = spec.features[stage]


def _residual_encoder(spec: NetworkSpec, sizes: Sequence[tuple[int, ...]]) -> Iterator[Layer]:
    channels = spec.features[0]
    yield Layer("stem", 0, spec.in_channels, channels, spec.kernels[0], sizes[0], bias=spec.bias)
    for stage, size in enumerate(sizes):
        before = sizes[max(0, stage - 1)]
        for block in range(spec.encoder_blocks[stage]):
            yield from _residual_block(spec, stage, channels, size if block else before, size)
            channels = spec.features[stage]


def _residual_block(
    spec: NetworkSpec, stage: int, channels: int, before: tuple[int, ...], size: tuple[int, ...]
) -> Iterator[Layer]:
    """The convolutions of a block, which gets maps of size `before` and puts out maps of `size`."""
    features, inner, kernel = spec.features[stage], spec.inner_features[stage], spec.kernels[stage]
    ones, bias = (1,) * spec.dimension, spec.bias
    if spec.block == "bottleneck":
        yield Layer("encoder", stage, channels, inner, ones, before, bias=bias)
        yield Layer("encoder", stage, inner, inner, kernel, size, bias=bias)
        yield Layer("encoder", stage, inner, features, ones, size, bias=bias)
    else:
        yield Layer("encoder", stage, channels, features, kernel, size, bias=bias)
        yield Layer("encoder", stage, features, features, kernel, size, bias=bias)
    if squeezed := spec.squeezed_features[stage]:
        yield Layer("encoder", stage, features, squeezed, ones, ones, norm=False, bias=True)
        yield Layer("encoder", stage, squeezed, features, ones, ones, norm=False, bias=True)
    if channels != features:
        yield Layer("encoder", stage, channels, features, ones, size)


def _decoder(spec: NetworkSpec, sizes: Sequence[tuple[int, ...]]) -> Iterator[Layer]:
    ones = (1,) * spec.dimension
    for stage in reversed(range(len(sizes) - 1)):
        below, features, size = spec.features[stage + 1], spec.features[stage], sizes[stage]
        if spec.upsampling == "linear":
            yield Layer("up", stage, below, features, ones, sizes[stage + 1], norm=False, bias=True)
        else:
            stride = spec.strides[stage + 1]
            yield Layer("up", stage, below, features, stride, size, norm=False, transposed=True, bias=True)
        channels = 2 * features
        for _ in range(spec.decoder_blocks[stage]):
            yield Layer("decoder", stage, channels, features, spec.kernels[stage], size, bias=spec.bias)
            channels = features
        if stage == 0 or spec.deep_supervision:
            yield Layer("head", stage, features, spec.classes, ones, size, norm=False, bias=True)
