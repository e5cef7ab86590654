"""The U-Net, plain or with a residual encoder, in 2D and 3D, exactly as a `NetworkSpec` describes it.

Legend: B batch, C channel, K class, Z Y X voxels.

Names in the state dict: `encoder.<stage>.<block>.…`, `up.<level>.…`, `decoder.<level>.<block>.…`, `head.<level>.…`;
level 0 is the finest. A plain block is `conv`, `norm`; a residual one `conv1`, `norm1`, `conv2`, `norm2` and, where
channels change, `skip`, `skip_norm`. Convolutions that a norm follows carry no bias: the norm would subtract it.

Sources: Ronneberger et al., U-Net, MICCAI 2015; Isensee et al., nnU-Net, Nature Methods 2021 (topology, norm,
nonlinearity, deep supervision); He et al., Deep residual learning, CVPR 2016, and Isensee et al., nnU-Net Revisited,
MICCAI 2024 (residual encoder); Ulyanov et al., Instance normalization, 2016.
"""

import torch
from torch import Tensor, nn

from autoseg.records import NetworkSpec

CONVOLUTIONS: dict[int, type[nn.Module]] = {2: nn.Conv2d, 3: nn.Conv3d}
UPSAMPLINGS: dict[int, type[nn.Module]] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOLINGS: dict[int, type[nn.Module]] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
DROPOUTS: dict[int, type[nn.Module]] = {2: nn.Dropout2d, 3: nn.Dropout3d}
SLOPE = 0.01
GROUPS = 16


def _convolve(
    spec: NetworkSpec, channels: int, features: int, kernel: tuple[int, ...], stride: tuple[int, ...]
) -> nn.Module:
    padding = tuple((size - 1) // 2 for size in kernel)
    return CONVOLUTIONS[spec.dimension](channels, features, kernel, stride, padding, bias=False)


def _norm(spec: NetworkSpec, features: int) -> nn.Module:
    return NORMS[spec.norm](spec.dimension, features)


class PlainBlock(nn.Module):
    """Convolution, norm, leaky ReLU."""

    def __init__(
        self, spec: NetworkSpec, channels: int, features: int, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        self.conv = _convolve(spec, channels, features, kernel, stride)
        self.norm = _norm(spec, features)
        self.drop = DROPOUTS[spec.dimension](spec.dropout) if spec.dropout else nn.Identity()
        # not in place: behind instance norm, which returns a view, autograd would copy the whole tensor
        self.act = nn.LeakyReLU(SLOPE)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.norm(self.drop(self.conv(x))))


class ResidualBlock(nn.Module):
    """Two convolutions and a shortcut that is pooled where the block strides and projected where channels change."""

    def __init__(
        self, spec: NetworkSpec, channels: int, features: int, kernel: tuple[int, ...], stride: tuple[int, ...]
    ) -> None:
        super().__init__()
        ones = (1,) * spec.dimension
        self.conv1 = _convolve(spec, channels, features, kernel, stride)
        self.norm1 = _norm(spec, features)
        self.conv2 = _convolve(spec, features, features, kernel, ones)
        self.norm2 = _norm(spec, features)
        self.drop = DROPOUTS[spec.dimension](spec.dropout) if spec.dropout else nn.Identity()
        self.act = nn.LeakyReLU(SLOPE)
        self.pool = POOLINGS[spec.dimension](stride, stride) if max(stride) > 1 else nn.Identity()
        projects = channels != features
        self.skip = _convolve(spec, channels, features, ones, ones) if projects else nn.Identity()
        self.skip_norm = _norm(spec, features) if projects else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        shortcut = self.skip_norm(self.skip(self.pool(x)))
        inner = self.act(self.norm1(self.drop(self.conv1(x))))
        return self.act(self.norm2(self.conv2(inner)) + shortcut)


class UNet(nn.Module):
    """Encoder, decoder and one 1x1 head per decoder level.

    Input (B, C, [Z,] Y, X) with axes divisible by `spec.divisors`. In training mode with deep supervision the output is
    a list of logits (B, K, ...), finest first, one per decoder level; otherwise the finest logits alone.
    """

    def __init__(self, spec: NetworkSpec) -> None:
        super().__init__()
        self.spec = spec
        block = BLOCKS[spec.kind]
        ones = (1,) * spec.dimension
        channels = spec.in_channels
        self.stem: nn.Module = nn.Identity()
        if spec.kind == "residual":
            self.stem = PlainBlock(spec, channels, spec.features[0], spec.kernels[0], ones)
            channels = spec.features[0]
        self.encoder = nn.ModuleList()
        for features, kernel, stride, blocks in zip(
            spec.features, spec.kernels, spec.strides, spec.encoder_blocks, strict=True
        ):
            stage = [block(spec, channels, features, kernel, stride)]
            stage += [block(spec, features, features, kernel, ones) for _ in range(blocks - 1)]
            self.encoder.append(nn.Sequential(*stage))
            channels = features
        self.up, self.decoder, self.head = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for level, blocks in enumerate(spec.decoder_blocks):
            features, below, stride = spec.features[level], spec.features[level + 1], spec.strides[level + 1]
            kernel = spec.kernels[level]
            self.up.append(UPSAMPLINGS[spec.dimension](below, features, stride, stride))
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
            x = self.decoder[level](torch.cat((self.up[level](x), skips[level]), 1))
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
            nn.init.zeros_(module.norm2.get_parameter("weight"))
    return network


def _instance(dimension: int, features: int) -> nn.Module:
    return {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dimension](features, affine=True)


def _batch(dimension: int, features: int) -> nn.Module:
    return {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}[dimension](features)


def _group(dimension: int, features: int) -> nn.Module:
    return nn.GroupNorm(next(g for g in range(min(GROUPS, features), 0, -1) if features % g == 0), features)


NORMS = {"instance": _instance, "batch": _batch, "group": _group}
BLOCKS = {"plain": PlainBlock, "residual": ResidualBlock}
