"""network/unet.py: shapes, names, weights at the start, and the same number of weights as planning counts on paper."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from autoseg.network import unet
from autoseg.network.device import cpu_convolves_bf16
from autoseg.planning import cost
from autoseg.records import NetworkSpec


def a_spec(dimension: int = 3, **changes: Any) -> NetworkSpec:
    """Three stages with 4, 6 and 8 features; `changes` replace fields."""
    fields = {
        "in_channels": 2,
        "classes": 3,
        "features": (4, 6, 8),
        "strides": ((1,) * dimension, (2,) * dimension, (2,) * dimension),
        "kernels": ((3,) * dimension,) * 3,
        "encoder_blocks": (1, 2, 1),
        "decoder_blocks": (2, 1),
    }
    return NetworkSpec.model_validate(fields | changes | {"dimension": dimension})


THICK_SLICES = {
    "strides": ((1, 1, 1), (1, 2, 2), (2, 2, 1)),
    "kernels": ((1, 3, 3), (3, 3, 3), (3, 5, 3)),
}
SPECS = {
    "plain 3D": a_spec(),
    "plain 2D": a_spec(2),
    "residual 3D": a_spec(kind="residual"),
    "residual 2D": a_spec(2, kind="residual", encoder_blocks=(2, 1, 2), features=(4, 4, 8)),
    "thick slices": a_spec(**THICK_SLICES),
    "thick slices, residual": a_spec(kind="residual", **THICK_SLICES),
    "batch norm": a_spec(norm="batch"),
    "group norm": a_spec(2, norm="group", kind="residual"),
    "no deep supervision": a_spec(deep_supervision=False),
    "dropout": a_spec(dropout=0.3),
    "bottlenecks": a_spec(kind="residual", block="bottleneck", squeeze_excitation=4, dropout=0.1),
    "bottlenecks of a given width, 2D": a_spec(2, kind="residual", block="bottleneck", bottleneck_features=(2, 3, 5)),
    "stochastic depth": a_spec(2, kind="residual", stochastic_depth=0.2, encoder_blocks=(2, 2, 2)),
    "linear upsampling": a_spec(upsampling="linear", **THICK_SLICES),
    "linear upsampling, 2D, residual": a_spec(2, kind="residual", upsampling="linear", squeeze_excitation=16),
    "biases": a_spec(kind="residual", bias=True, block="bottleneck"),
    "two stages": a_spec(
        2, features=(4, 8), strides=((1, 1), (2, 2)), kernels=((3, 3),) * 2, encoder_blocks=(1, 1), decoder_blocks=(1,)
    ),
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def patch_of(spec: NetworkSpec) -> tuple[int, ...]:
    """A patch of 8 in the first axis and 16 in the others."""
    return (8, 16, 16)[-spec.dimension :]


def an_image(spec: NetworkSpec) -> torch.Tensor:
    shape = (2, spec.in_channels, *patch_of(spec))
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def sizes_of_levels(spec: NetworkSpec) -> list[tuple[int, ...]]:
    sizes, size = [], patch_of(spec)
    for stride in spec.strides[:-1]:
        size = tuple(n // s for n, s in zip(size, stride, strict=True))
        sizes.append(size)
    return sizes


@EVERY
def test_learning_puts_out_every_level_and_predicting_the_finest_alone(spec: NetworkSpec) -> None:
    network, image = unet.build(spec), an_image(spec)
    learned = network.train()(image)
    if spec.deep_supervision:
        assert [tuple(each.shape) for each in learned] == [(2, 3, *size) for size in sizes_of_levels(spec)]
    else:
        assert learned.shape == (2, 3, *patch_of(spec))
    predicted = network.eval()(image)
    assert isinstance(predicted, torch.Tensor)
    assert predicted.shape == (2, 3, *patch_of(spec))
    assert torch.isfinite(predicted).all()


@pytest.mark.parametrize("name", ["plain 3D", "residual 2D", "thick slices", "group norm"])
def test_predicting_computes_what_the_finest_level_of_learning_computes(name: str) -> None:
    network, image = unet.build(SPECS[name]), an_image(SPECS[name])
    torch.testing.assert_close(network.train()(image)[0], network.eval()(image))


@EVERY
def test_there_are_as_many_weights_as_planning_counts(spec: NetworkSpec) -> None:
    assert sum(weight.numel() for weight in unet.build(spec).parameters()) == cost.parameters(spec)


@EVERY
def test_every_weight_takes_part_in_learning(spec: NetworkSpec) -> None:
    torch.manual_seed(1)  # with stochastic depth other seeds leave a block out of every sample
    network = unet.build(spec).train()
    with torch.no_grad():  # residual blocks start with a norm of zero, which holds back what is before it
        for weight in network.parameters():
            weight.add_(torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    outputs = network(an_image(spec))
    sum((each**2).sum() for each in (outputs if isinstance(outputs, list) else [outputs])).backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []
    idle = [name for name, weight in network.named_parameters() if weight.grad is not None and not weight.grad.any()]
    # the norm behind it subtracts such a bias: nothing but rounding is left of its gradient, or not even that
    assert [name for name in idle if not (spec.bias and ".conv" in name and name.endswith(".bias"))] == []


@EVERY
def test_a_convolution_has_a_bias_only_where_no_norm_follows(spec: NetworkSpec) -> None:
    kinds = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    convolutions = {n: m for n, m in unet.build(spec).named_modules() if isinstance(m, kinds)}
    convolutions = {name: module for name, module in convolutions.items() if ".squeeze." not in name}
    with_bias = {name.split(".")[0] for name, module in convolutions.items() if module.bias is not None}
    without = {name.split(".")[0] for name, module in convolutions.items() if module.bias is None}
    parts = {"encoder", "decoder"} | ({"stem"} if spec.kind == "residual" else set())
    if spec.bias:
        assert with_bias == {"up", "head"} | parts
        assert all(module.bias is None for name, module in convolutions.items() if name.endswith(".skip"))
    else:
        assert with_bias == {"up", "head"}
        assert without == parts


def test_kernels_and_strides_are_those_of_the_plan() -> None:
    network = unet.build(SPECS["thick slices"])
    first = [network.get_submodule(f"encoder.{stage}.0.conv") for stage in range(3)]
    assert [each.kernel_size for each in first] == [(1, 3, 3), (3, 3, 3), (3, 5, 3)]
    assert [each.stride for each in first] == [(1, 1, 1), (1, 2, 2), (2, 2, 1)]
    assert network.get_submodule("encoder.1.1.conv").stride == (1, 1, 1)
    assert [network.get_submodule(f"up.{level}").stride for level in (0, 1)] == [(1, 2, 2), (2, 2, 1)]
    assert network.get_submodule("decoder.0.0.conv").kernel_size == (1, 3, 3)


def test_a_slice_is_not_seen_by_its_neighbours_where_kernels_are_flat() -> None:
    strides, kernels = ((1, 1, 1), (1, 2, 2), (1, 2, 2)), ((1, 3, 3),) * 3
    network = unet.build(a_spec(strides=strides, kernels=kernels, norm="batch")).eval()
    image = an_image(a_spec())
    changed = image.clone()
    changed[:, :, 3] += 1.0
    difference = (network(image) - network(changed)).abs().amax((0, 1, 3, 4))
    assert difference[3] > 0
    assert difference[[0, 1, 2, 4, 5, 6, 7]].max() == 0


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("channels", [4, 8])
def test_a_residual_block_starts_as_its_shortcut(stride: int, channels: int) -> None:
    spec = a_spec(2, kind="residual", features=(channels, 8, 8), strides=((1, 1), (stride, stride), (1, 1)))
    block = unet.build(spec).get_submodule("encoder.1.0")
    x = torch.randn(2, channels, 8, 8, generator=torch.Generator().manual_seed(0))
    shortcut = nn.functional.avg_pool2d(x, stride) if stride > 1 else x
    if channels != 8:
        shortcut = nn.functional.conv2d(shortcut, block.get_parameter("skip.weight"))
        shortcut = nn.functional.instance_norm(shortcut)
    torch.testing.assert_close(block(x), nn.functional.leaky_relu(shortcut, 0.01))


def test_a_shortcut_is_projected_only_where_channels_change() -> None:
    names = set(unet.build(a_spec(kind="residual", features=(4, 4, 8))).state_dict())
    assert {name.split(".skip")[0] for name in names if ".skip." in name} == {"encoder.2.0"}


def test_weights_start_with_the_spread_of_he() -> None:
    spec = a_spec(2, features=(16, 32, 32), kind="residual")
    weight = unet.build(spec).get_parameter("encoder.2.0.conv1.weight")
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (1 + 0.01**2) / (32 * 9)), rel=0.05)
    biases = [w for name, w in unet.build(spec).named_parameters() if name.startswith(("up", "head")) and w.ndim == 1]
    assert len(biases) == 4
    assert not any(bias.any() for bias in biases)


def test_the_same_seed_gives_the_same_weights_and_another_seed_others() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return torch.cat([each.flatten() for each in unet.build(SPECS["plain 2D"]).parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_names_in_the_file_tell_part_level_and_block() -> None:
    names = set(unet.build(SPECS["plain 3D"]).state_dict())
    assert {name.split(".")[0] for name in names} == {"encoder", "up", "decoder", "head"}
    assert {"encoder.1.1.conv.weight", "encoder.1.1.norm.bias", "up.0.weight", "head.1.bias"} <= names


@pytest.mark.parametrize(("features", "groups"), [(32, 16), (20, 10), (7, 7), (17, 1)])
def test_group_norm_takes_the_largest_number_of_groups_that_divides(features: int, groups: int) -> None:
    norm = unet.NORMS["group"](3, features)
    assert isinstance(norm, nn.GroupNorm)
    assert norm.num_groups == groups


def test_dropout_varies_learning_and_leaves_prediction_alone() -> None:
    network, image = unet.build(SPECS["dropout"]), an_image(SPECS["dropout"])
    torch.manual_seed(0)
    network.train()
    assert not torch.equal(network(image)[0], network(image)[0])
    network.eval()
    assert torch.equal(network(image), network(image))


def test_without_deep_supervision_only_the_finest_level_has_a_head() -> None:
    network = unet.build(SPECS["no deep supervision"])
    assert len(network.head) == 1
    assert network.head[0].in_channels == 4


# ------------------------------------------------------------------------------------------------ what may be added


def test_a_bottleneck_starts_as_its_shortcut_and_strides_in_the_middle() -> None:
    spec = SPECS["bottlenecks"]
    block = unet.build(spec).get_submodule("encoder.1.0")
    sizes = [(m.in_channels, m.out_channels, m.kernel_size, m.stride) for m in (block.conv1, block.conv2, block.conv3)]
    one, two, three = (1, 1, 1), (2, 2, 2), (3, 3, 3)
    assert sizes == [(4, 1, one, one), (1, 1, three, two), (1, 6, one, one)]
    x = torch.randn(2, 4, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    shortcut = nn.functional.conv3d(nn.functional.avg_pool3d(x, 2), block.get_parameter("skip.weight"))
    torch.testing.assert_close(block(x), nn.functional.leaky_relu(nn.functional.instance_norm(shortcut), 0.01))


def test_bottlenecks_are_as_wide_as_asked_else_a_quarter() -> None:
    assert SPECS["bottlenecks of a given width, 2D"].inner_features == (2, 3, 5)
    assert a_spec(kind="residual", block="bottleneck", features=(3, 8, 320)).inner_features == (1, 2, 80)
    network = unet.build(SPECS["bottlenecks of a given width, 2D"])
    assert [network.get_submodule(f"encoder.{stage}.0.conv2").out_channels for stage in range(3)] == [2, 3, 5]


def test_squeeze_excitation_weighs_channels_by_their_means_alone() -> None:
    squeeze = unet.Squeeze(a_spec(2), 6, 2)
    x = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))
    weights = squeeze(x) / x
    gate = torch.sigmoid(squeeze.up(nn.functional.leaky_relu(squeeze.down(x.mean((2, 3))[:, :, None, None]), 0.01)))
    torch.testing.assert_close(weights, gate.expand_as(x))
    assert weights.std() > 0.01
    shuffled = x.flatten(2)[:, :, torch.randperm(16)].view_as(x)
    torch.testing.assert_close(squeeze(shuffled) / shuffled, weights)


def test_stochastic_depth_leaves_samples_out_at_its_chance_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    left_out = unet.LeaveOut(0.25).train()(torch.ones(4000, 1, 2, 2))
    kept = left_out.flatten(1).amax(1)
    assert left_out.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert torch.equal(left_out.flatten(1).amin(1), kept)
    assert (kept == 0).float().mean().item() == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 4000))
    assert torch.equal(unet.LeaveOut(0.25).eval()(torch.ones(2, 1)), torch.ones(2, 1))


def test_stochastic_depth_grows_with_depth_up_to_the_last_block() -> None:
    network = unet.build(SPECS["stochastic depth"])
    chances = [module.chance for module in network.modules() if isinstance(module, unet.LeaveOut)]
    assert chances == pytest.approx([0.2 * number / 6 for number in range(1, 7)])


@pytest.mark.parametrize("name", ["linear upsampling", "linear upsampling, 2D, residual"])
def test_linear_upsampling_is_interpolation_followed_by_a_convolution(name: str) -> None:
    spec = SPECS[name]
    up = unet.build(spec).get_submodule("up.1")
    x = torch.randn(1, 8, *patch_of(spec))
    mode = "trilinear" if spec.dimension == 3 else "bilinear"
    factor = tuple(float(each) for each in spec.strides[2])
    larger = nn.functional.interpolate(x, scale_factor=factor, mode=mode, align_corners=False)
    torch.testing.assert_close(up(x), up.conv(larger), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change", [{"block": "bottleneck"}, {"stochastic_depth": 0.1}, {"squeeze_excitation": 16}]
)  # fmt: skip
def test_a_plain_network_with_what_only_residual_ones_have_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"{next(iter(change))}: only a network of kind residual"):
        a_spec(**change)
    with pytest.raises(ValidationError, match="bottleneck_features needs 3 entries or none, has 2"):
        a_spec(kind="residual", bottleneck_features=(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dimension", [2, 3])
@pytest.mark.parametrize("how", ["forward", "formula"])
def test_instance_norm_is_torchs_and_keeps_channels_last(how: str, dimension: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    layout = torch.channels_last_3d if dimension == 3 else torch.channels_last
    x = 3 * torch.randn(2, 5, *(6, 7, 8)[:dimension]) + 1
    x = x.to(dtype).contiguous(memory_format=layout).requires_grad_()
    norm = unet.InstanceNorm(5)
    compute = getattr(norm, how)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    found = compute(x)
    gradient = torch.randn(found.shape).to(dtype).contiguous(memory_format=layout)
    of_found = torch.autograd.grad(found, (x, norm.weight, norm.bias), gradient)
    exact = [each.detach().double().requires_grad_() for each in (x, norm.weight, norm.bias)]
    expected = nn.functional.instance_norm(exact[0], weight=exact[1], bias=exact[2])
    of_expected = torch.autograd.grad(expected, exact, gradient.double())
    assert found.dtype == dtype
    assert found.is_contiguous(memory_format=layout)
    close = 1e-4 if dtype == torch.float32 else 2e-2
    for one, other in zip((found, *of_found), (expected, *of_expected), strict=True):
        torch.testing.assert_close(one.double(), other, atol=close, rtol=close)
    norm.eval()
    torch.testing.assert_close(compute(x).double(), expected, atol=close, rtol=close)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "autocast"])
@pytest.mark.parametrize("dimension", [2, 3])
def test_a_transposed_convolution_that_learns_on_a_cpu_has_the_gradients_of_torchs(
    dimension: int, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if precision != "fp32" and not cpu_convolves_bf16():
        pytest.skip("this CPU has no convolutions in bf16, and torch's own leave the layout")
    torch.manual_seed(0)
    up = unet.build(a_spec(dimension)).get_submodule("up.1")
    nn.init.normal_(up.get_parameter("bias"))
    layout = torch.channels_last_3d if dimension == 3 else torch.channels_last
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(2, 8, *(6, 8, 10)[:dimension]).to(dtype).contiguous(memory_format=layout).requires_grad_()
    up = up.to(dtype)
    wanted = (x, up.get_parameter("weight"), up.get_parameter("bias"))

    def with_gradients(compute: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
            found = compute(x)
        gradient = torch.randn(found.shape, generator=torch.Generator().manual_seed(1)).to(found.dtype)
        return (found, *torch.autograd.grad(found, wanted, gradient.contiguous(memory_format=layout)))

    expected = with_gradients(up)
    monkeypatch.setattr(up, "forward", lambda x: (_ for _ in ()).throw(RuntimeError("torch's own")))
    found = with_gradients(lambda x: unet._raised(up, x))
    assert torch.equal(found[0], expected[0])
    assert found[0].is_contiguous(memory_format=layout)
    close = 1e-5 if precision == "fp32" else 2e-2
    for one, other, leaf in zip(found[1:], expected[1:], wanted, strict=True):
        assert one.dtype == leaf.dtype
        torch.testing.assert_close(one, other, atol=close * float(other.abs().max()), rtol=close)
    with pytest.raises(RuntimeError, match="torch's own"):
        unet._raised(up, x.detach().clone(memory_format=torch.contiguous_format))
    with pytest.raises(RuntimeError, match="torch's own"):
        unet._raised(up.eval(), x)


@pytest.mark.parametrize(
    "kind", [{"kind": "plain"}, {"kind": "residual"}, {"kind": "residual", "block": "bottleneck"}], ids=str
)
def test_a_voxel_sees_what_planning_counts(kind: dict[str, Any]) -> None:
    spec = a_spec(2, norm="batch", kernels=((3, 3), (3, 5), (3, 3)), **kind)
    network = unet.build(spec).eval()
    with torch.no_grad():
        for weight in network.parameters():
            weight.copy_(torch.rand_like(weight) + 0.1)  # nothing cancels
    image = torch.zeros(1, 2, 96, 96, requires_grad=True)
    x = network.stem(image)
    for stage, expected in zip(network.encoder, cost.receptive_fields(spec), strict=True):
        x = stage(x)
        gradient = torch.autograd.grad(x[0, 0, x.shape[2] // 2, x.shape[3] // 2], image, retain_graph=True)[0][0, 0]
        seen = gradient.nonzero()
        assert tuple((seen.amax(0) - seen.amin(0) + 1).tolist()) == expected


def test_specs_saved_before_these_fields_existed_give_the_same_network() -> None:
    fields = a_spec(kind="residual").model_dump()
    new = ("block", "bottleneck_features", "stochastic_depth", "squeeze_excitation", "upsampling", "bias")
    assert NetworkSpec.model_validate({name: value for name, value in fields.items() if name not in new}) == a_spec(
        kind="residual"
    )
    names = set(unet.build(a_spec(kind="residual")).state_dict())
    assert not [name for name in names if "conv3" in name or "squeeze" in name or "conv1.bias" in name]
