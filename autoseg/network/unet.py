"""The U-Net, plain or with a residual encoder, in 2D and 3D.

It is exactly as a `NetworkSpec` describes it.
Legend: B batch, C channel, K class, Z Y X voxels.

Names in the state dict: `stem.…`, `encoder.<stage>.<block>.…`, `up.<level>.…`, `decoder.<level>.<block>.…`,
`head.<level>.…`; level 0 is the finest. A plain block is `conv`, `norm`; a residual one `conv1`, `norm1`, `conv2`,
`norm2` (a bottleneck also `conv3`, `norm3`), where channels change `skip`, `skip_norm`, and with squeeze-excitation
`squeeze.down`, `squeeze.up`. An upsampling is one transposed convolution, or `conv` of size 1 followed by linear
interpolation. Convolutions that a norm follows carry no bias, which the norm would subtract, unless `bias` asks for it.

Sources: Ronneberger et al., U-Net, MICCAI 2015; Isensee et al., nnU-Net, Nature Methods 2021 (topology, norm,
nonlinearity, deep supervision); He et al., Deep residual learning, CVPR 2016, and Isensee et al., nnU-Net Revisited,
MICCAI 2024 (residual encoder); Ulyanov et al., Instance normalization, 2016; Huang et al., Stochastic depth, ECCV 2016;
Hu et al., Squeeze-and-excitation, CVPR 2018.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from autoseg.network.device import channels_last_format
from autoseg.records import NetworkSpec

CONVOLUTIONS: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
INTERPOLATIONS = {2: "bilinear", 3: "trilinear"}
POOLINGS: dict[int, type[nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
DROPOUTS: dict[int, type[nn.Module]] = {2: nn.Dropout2d, 3: nn.Dropout3d}
SLOPE = 0.01
EPSILON = 1e-5
GROUPS = 16


def _convolve(
    spec: NetworkSpec, channels: int, features: int, kernel: tuple[int, ...], stride: tuple[int, ...], bias: bool
) -> nn.Module:
    padding = tuple((size - 1) // 2 for size in kernel)
    return CONVOLUTIONS[spec.dimension](channels, features, kernel, stride, padding, bias=bias)


def _norm(spec: NetworkSpec, features: int) -> nn.Module:
    return NORMS[spec.norm](spec.dimension, features)


def _dropout(spec: NetworkSpec) -> nn.Module:
    return DROPOUTS[spec.dimension](spec.dropout) if spec.dropout else nn.Identity()


class InstanceNorm(nn.Module):
    """Instance norm with a weight and a bias per channel (Ulyanov et al.), on CPUs without leaving channels-last.

    torch's own always returns contiguous channels and reads the others slowly: with the leaky ReLU behind it takes
    three times as long, and the next convolution a sixth longer. A batch norm of a single sample is the same function
    and keeps the layout (docs/benchmarks.md). Its sums are less exact in fp32 (1e-5 against 1e-7), so evaluation in
    fp32 does without. Compilers get the formula, which they fuse in whatever layout the channels have.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return self.formula(x)
        if not self._sample_by_sample(x):
            return nn.functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=EPSILON)
        samples = [
            nn.functional.batch_norm(each, None, None, self.weight, self.bias, training=True, eps=EPSILON)
            for each in x.split(1)
        ]
        return samples[0] if len(samples) == 1 else torch.cat(samples)

    def formula(self, x: Tensor) -> Tensor:
        """The same, written out; sums are those of float32."""
        axes, per_channel = tuple(range(2, x.ndim)), (1, -1, *[1] * (x.ndim - 2))
        wide = x.float()
        variance, mean = torch.var_mean(wide, axes, correction=0, keepdim=True)
        scale = self.weight.view(per_channel) * torch.rsqrt(variance + EPSILON)
        return ((wide - mean) * scale + self.bias.view(per_channel)).to(x.dtype)

    def _sample_by_sample(self, x: Tensor) -> bool:
        if x.device.type != "cpu":
            return False
        layout = channels_last_format(x.ndim - 2)
        return x.is_contiguous(memory_format=layout) and (self.training or x.dtype != torch.float32)


class PlainBlock(nn.Module):
    """Convolution, norm, leaky ReLU."""

    def __init__(
        self, spec: NetworkSpec, channels: int, features: int, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.conv = _convolve(spec, channels, features, kernel, stride, spec.bias)
        self.norm = _norm(spec, features)
        self.drop = _dropout(spec)
        # not in place: torch's instance norm returns a view, and autograd would copy the whole tensor
        self.act = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.drop(self.conv(x))))


class Squeeze(nn.Module):
    """Squeeze-excitation: every channel weighted by a gate that sees the means of all channels (Hu et al., eq. 2-4)."""

    def __init__(self, spec: NetworkSpec, features: int, squeezed: int) -> None:
        super().__init__()
        self.down = CONVOLUTIONS[spec.dimension](features, squeezed, 1)
        self.up = CONVOLUTIONS[spec.dimension](squeezed, features, 1)
        self.act = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean(tuple(range(2, x.ndim)), keepdim=True)
        return x * torch.sigmoid(self.up(self.act(self.down(mean))))


class LeaveOut(nn.Module):
    """Stochastic depth: in training, sets a sample to zero with this chance and scales the others to the same mean."""

    def __init__(self, chance: float) -> None:
        super().__init__()
        self.chance = chance

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        kept = torch.rand((len(x),) + (1,) * (x.ndim - 1), device=x.device) >= self.chance
        return x * (kept / (1.0 - self.chance)).to(x.dtype)


class ResidualBlock(nn.Module):
    """Convolutions and a shortcut that is pooled where the block strides and projected where channels change.

    `leave_out` is the chance of stochastic depth. The last norm is `norm2`, or `norm3` in a bottleneck.
    """

    def __init__(
        self, spec: NetworkSpec, channels: int, stage: int, stride: tuple[int, ...], leave_out: float
    ) -> None:
        super().__init__()
        features, inner, kernel = spec.features[stage], spec.inner_features[stage], spec.kernels[stage]
        ones, wide = (1,) * spec.dimension, spec.block == "bottleneck"
        first, last = ((ones, ones), (ones, ones)) if wide else ((kernel, stride), (kernel, ones))
        self.conv1 = _convolve(spec, channels, inner, *first, spec.bias)
        self.norm1 = _norm(spec, inner)
        self.drop = _dropout(spec)
        if wide:
            self.conv2 = _convolve(spec, inner, inner, kernel, stride, spec.bias)
            self.norm2 = _norm(spec, inner)
            self.conv3 = _convolve(spec, inner, features, *last, spec.bias)
            self.norm3 = _norm(spec, features)
        else:
            self.conv2 = _convolve(spec, inner, features, *last, spec.bias)
            self.norm2 = _norm(spec, features)
        self.wide = wide
        squeezed = spec.squeezed_features[stage]
        self.squeeze = Squeeze(spec, features, squeezed) if squeezed else nn.Identity()
        self.leave_out = LeaveOut(leave_out) if leave_out else nn.Identity()
        self.act = nn.LeakyReLU(SLOPE)
        self.pool = POOLINGS[spec.dimension](stride, stride) if max(stride) > 1 else nn.Identity()
        projects = channels != features
        self.skip = _convolve(spec, channels, features, ones, ones, bias=False) if projects else nn.Identity()
        self.skip_norm = _norm(spec, features) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.skip_norm(self.skip(self.pool(x)))
        if self.wide:
            inner = self.act(self.norm1(self.conv1(x)))
            inner = self.act(self.norm2(self.drop(self.conv2(inner))))
            inner = self.norm3(self.conv3(inner))
        else:
            inner = self.act(self.norm1(self.drop(self.conv1(x))))
            inner = self.norm2(self.conv2(inner))
        return self.act(self.leave_out(self.squeeze(inner)) + shortcut)


class LinearUp(nn.Module):
    """Interpolation between voxels, and a convolution of size 1 that brings the channels to those of the level.

    The convolution comes first: both act on different axes and the interpolation's weights add up to 1, so the result
    is the same either way, and here it takes a fraction of the work and memory.
    """

    def __init__(self, spec: NetworkSpec, below: int, features: int, stride: tuple[int, ...]) -> None:
        super().__init__()
        self.conv = CONVOLUTIONS[spec.dimension](below, features, 1)
        self.stride = tuple(float(each) for each in stride)
        self.mode = INTERPOLATIONS[spec.dimension]

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        # a CPU's autocast interpolates in fp32; the level goes on in the precision it came in
        return nn.functional.interpolate(x, scale_factor=self.stride, mode=self.mode, align_corners=False).to(x.dtype)


class _Transposed(torch.autograd.Function):
    """A transposed convolution whose bias has a gradient of its own: oneDNN's takes longer than all else of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, stride: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.stride = stride
        function = nn.functional.conv_transpose3d if x.ndim == 5 else nn.functional.conv_transpose2d
        return function(x, weight, bias, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, weight = ctx.saved_tensors
        none, one = [0] * len(ctx.stride), [1] * len(ctx.stride)
        wanted = [ctx.needs_input_grad[0], True, False]
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            gradient, x, weight, None, ctx.stride, none, one, True, none, 1, wanted
        )
        rows = gradient.movedim(1, -1).reshape(-1, gradient.shape[1])
        # torch's sum over half-precision rows is five times as slow as this product
        of_bias = rows.sum(0) if rows.dtype == torch.float32 else (rows.new_ones(1, len(rows)) @ rows)[0]
        return of_x, of_weight, of_bias, None


def _raised(up: nn.Module, x: Tensor) -> Tensor:
    """An upsampling; a transposed convolution that learns on a CPU, channels last, by way of `_Transposed`."""
    layout = channels_last_format(x.ndim - 2)
    plain = torch.compiler.is_compiling() or x.device.type != "cpu" or not x.is_contiguous(memory_format=layout)
    if plain or not up.training or not isinstance(up, (nn.ConvTranspose2d, nn.ConvTranspose3d)):
        return up(x)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    weight, bias = up.weight.to(dtype), up.get_parameter("bias").to(dtype)
    return _Transposed.apply(x.to(dtype), weight, bias, up.stride)


class UNet(nn.Module):
    """Encoder, decoder and one 1x1 head per decoder level.

    Input (B, C, [Z,] Y, X) with axes divisible by `spec.divisors`. In training mode with deep supervision the output is
    a list of logits (B, K, ...), finest first, one per decoder level; otherwise the finest logits alone.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        ones = (1,) * spec.dimension
        self.stem: nn.Module = nn.Identity()
        if spec.kind == "residual":
            self.stem = PlainBlock(spec, spec.in_channels, spec.features[0], spec.kernels[0], ones)
        self.encoder = ENCODERS[spec.kind](spec)
        self.up, self.decoder, self.head = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, blocks in enumerate(spec.decoder_blocks):
            features, below, stride = spec.features[level], spec.features[level + 1], spec.strides[level + 1]
            kernel = spec.kernels[level]
            self.up.append(UPSAMPLINGS[spec.upsampling](spec, below, features, stride))
            stage = [PlainBlock(spec, 2 * features, features, kernel, ones)]
            stage += [PlainBlock(spec, features, features, kernel, ones) for _ in range(blocks - 1)]
            self.decoder.append(nn.Sequential(*stage))
            self.head.append(CONVOLUTIONS[spec.dimension](features, spec.classes, 1))
        if not spec.deep_supervision:
            self.head = nn.ModuleList([self.head[0]])

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        skips = []
        x = self.stem(x)
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        outputs = []
        every_level = self.training and self.spec.deep_supervision
        for level in reversed(range(len(self.decoder))):
            x = self.decoder[level](torch.cat((_raised(self.up[level], x), skips[level]), 1))
            if level == 0 or every_level:
                outputs.append(self.head[level](x))
        return outputs[::-1] if every_level else outputs[-1]


def build(spec: NetworkSpec) -> UNet:
    """Make the network with fresh weights (He et al. 2015, for leaky ReLU 0.01), drawn from torch's global generator.

    The last norm of every residual block starts at zero, so that each block starts as its shortcut.
    """
    network = UNet(spec)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            nn.init.kaiming_normal_(module.weight, a=SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        if isinstance(module, ResidualBlock):
            last = module.norm3 if module.wide else module.norm2
            nn.init.zeros_(last.get_parameter("weight"))
    return network


def _plain_encoder(spec: NetworkSpec) -> nn.ModuleList:
    ones, channels, stages = (1,) * spec.dimension, spec.in_channels, nn.ModuleList()
    for features, kernel, stride, blocks in zip(
        spec.features, spec.kernels, spec.strides, spec.encoder_blocks, strict=True
    ):
        stage = [PlainBlock(spec, channels, features, kernel, stride)]
        stage += [PlainBlock(spec, features, features, kernel, ones) for _ in range(blocks - 1)]
        stages.append(nn.Sequential(*stage))
        channels = features
    return stages


def _residual_encoder(spec: NetworkSpec) -> nn.ModuleList:
    ones, channels, stages, number = (1,) * spec.dimension, spec.features[0], nn.ModuleList(), 0
    for stage, blocks in enumerate(spec.encoder_blocks):
        sequence = nn.Sequential()
        for block in range(blocks):
            number += 1
            leave_out = spec.stochastic_depth * number / sum(spec.encoder_blocks)
            sequence.append(ResidualBlock(spec, channels, stage, ones if block else spec.strides[stage], leave_out))
            channels = spec.features[stage]
        stages.append(sequence)
    return stages


def _transposed(spec: NetworkSpec, below: int, features: int, stride: tuple[int, ...]) -> nn.Module:
    return TRANSPOSED[spec.dimension](below, features, stride, stride)


def _instance(dimension: int, features: int) -> nn.Module:
    return InstanceNorm(features)


def _batch(dimension: int, features: int) -> nn.Module:
    return {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimension](features)


def _group(dimension: int, features: int) -> nn.Module:
    return nn.GroupNorm(next(g for g in range(min(GROUPS, features), 0, -1) if features % g == 0), features)


NORMS = {"instance": _instance, "batch": _batch, "group": _group}
ENCODERS = {"plain": _plain_encoder, "residual": _residual_encoder}
UPSAMPLINGS: dict[str, Callable[[NetworkSpec, int, int, tuple[int, ...]], nn.Module]] = {
    "transposed": _transposed,
    "linear": LinearUp,
}
