"""Losses against NumPy references written from the equations, their gradients, and the specs that choose them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network import losses, losses_sums
from autoseg.network.distance import distance_to
from autoseg.network.losses_pixel import CLASS_WEIGHTS
from autoseg.network.losses_region import soft_skeleton

SHAPES = [(6, 7), (4, 6, 5)]
KEEP = {"class_weights": (0.5, 1.0, 3.0)}


def sample(shape: tuple[int, ...], seed: int = 0, batch: int = 2, ignored: float = 0.1) -> tuple[Tensor, Tensor]:
    """(B, 3, ...) float64 logits and (B, ...) int64 target with blobs of two classes and some ignored voxels."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 1.5, (batch, 3, *shape))
    target = np.zeros((batch, *shape), dtype=np.int64)
    target[:, : shape[0] // 2, 1:4] = 1
    target[:, 1:3, 3:] = 2
    target[rng.random(target.shape) < ignored] = -1
    return torch.from_numpy(logits), torch.from_numpy(target)


# -------------------------------------------------------------------- references, one class and sample at a time


def softmax(logits: np.ndarray) -> np.ndarray:
    lifted = np.exp(logits - logits.max(1, keepdims=True))
    return lifted / lifted.sum(1, keepdims=True)


def true_p(p: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Probability of the true class and the class of every annotated voxel."""
    places = np.argwhere(g >= 0)
    picked = np.array([p[(b, g[(b, *rest)], *rest)] for b, *rest in places])
    return picked, g[g >= 0]


def per_region(p: np.ndarray, g: np.ndarray, value: Callable[..., float], batch: bool, classes: range) -> float:
    groups = [(p, g)] if batch else [(p[b : b + 1], g[b : b + 1]) for b in range(len(p))]
    found = [value(some_p[:, k][some_g >= 0], (some_g == k)[some_g >= 0]) for some_p, some_g in groups for k in classes]
    return float(np.mean(found))


def ref_dice(p: np.ndarray, g: np.ndarray, batch: bool = False, squared: bool = False, first: int = 1) -> float:
    def value(q: np.ndarray, t: np.ndarray) -> float:
        return 1 - (2 * (q * t).sum() + 1e-5) / ((q**2 if squared else q).sum() + t.sum() + 1e-5)

    return per_region(p, g, value, batch, range(first, 3))


def ref_tversky(p: np.ndarray, g: np.ndarray, power: float = 1.0) -> float:
    def value(q: np.ndarray, t: np.ndarray) -> float:
        hit, false, missed = (q * t).sum(), (q * ~t).sum(), ((1 - q) * t).sum()
        return (1 - (hit + 1e-5) / (hit + 0.3 * false + 0.7 * missed + 1e-5)) ** power

    return per_region(p, g, value, False, range(1, 3))


def ref_generalized(p: np.ndarray, g: np.ndarray) -> float:
    found = []
    for q, t in zip(p, g, strict=True):
        hot = np.stack([t == k for k in range(3)]).astype(float)
        volume = hot.sum((*range(1, hot.ndim),))
        weight = np.array([1 / v**2 if v else 0 for v in volume])
        weight /= (weight * volume).max()
        q = q * (t >= 0)
        top = sum(w * (a * b).sum() for w, a, b in zip(weight, q, hot, strict=True))
        bottom = sum(w * (a.sum() + b.sum()) for w, a, b in zip(weight, q, hot, strict=True))
        found.append(1 - (2 * top + 1e-5) / (bottom + 1e-5))
    return float(np.mean(found))


def ref_weights(g: np.ndarray, border: float = 10.0, sigma: float = 3.0) -> np.ndarray:
    weight = np.ones(g.shape)
    for b, t in enumerate(g):
        edge = np.zeros(t.shape, bool)
        for place in np.ndindex(t.shape):
            for axis in range(t.ndim):
                for step in (-1, 1):
                    other = list(place)
                    other[axis] += step
                    if 0 <= other[axis] < t.shape[axis]:
                        a, c = t[place], t[tuple(other)]
                        edge[place] |= a != c and a >= 0 and c >= 0
        far = ndimage.distance_transform_edt(~edge)
        weight[b] += border * np.exp(-(far**2) / (2 * sigma**2)) * (far < 3 * sigma + 1)
    return weight


def ref_weighted_ce(p: np.ndarray, g: np.ndarray) -> float:
    picked, classes = true_p(p, g)
    weight = ref_weights(g)[g >= 0] * np.array(KEEP["class_weights"])[classes]
    return float((weight * -np.log(picked)).sum() / weight.sum())


def ref_focal(p: np.ndarray, g: np.ndarray, gamma: float = 2.0, alpha: float = 0.25) -> float:
    picked, classes = true_p(p, g)
    factor = np.where(classes > 0, alpha, 1 - alpha) * np.array(KEEP["class_weights"])[classes]
    return float((factor * (1 - picked) ** gamma * -np.log(picked)).mean())


def ref_topk(p: np.ndarray, g: np.ndarray, k: float = 0.1) -> float:
    values = np.sort(-np.log(true_p(p, g)[0]))[::-1]
    return float(values[: math.ceil(len(values) * k)].mean())


def ref_boundary(p: np.ndarray, g: np.ndarray) -> float:
    total = 0.0
    for q, t in zip(p, g, strict=True):
        for k in (1, 2):
            inside = t == k
            out, deep = ndimage.distance_transform_edt(~inside), ndimage.distance_transform_edt(inside)
            total += (q[k] * np.where(inside, 1 - deep, out))[t >= 0].sum()
    return total / (2 * (g >= 0).sum())


def ref_skeleton(x: np.ndarray, steps: int = 3) -> np.ndarray:
    cross = ndimage.generate_binary_structure(x.ndim, 1)

    def erode(a: np.ndarray) -> np.ndarray:
        return ndimage.minimum_filter(a, footprint=cross, mode="nearest")

    def top(a: np.ndarray) -> np.ndarray:
        return np.maximum(a - ndimage.maximum_filter(erode(a), size=3, mode="nearest"), 0)

    spine = top(x)
    for _ in range(steps):
        x = erode(x)
        spine = spine + np.maximum(top(x) - spine * top(x), 0)
    return spine


def ref_cldice(p: np.ndarray, g: np.ndarray) -> float:
    found = []
    for q, t in zip(p, g, strict=True):
        for k in (1, 2):
            a, b = q[k] * (t >= 0), (t == k).astype(float)
            s, r = ref_skeleton(a), ref_skeleton(b)
            precision, recall = ((s * b).sum() + 1e-5) / (s.sum() + 1e-5), ((r * a).sum() + 1e-5) / (r.sum() + 1e-5)
            found.append(1 - 2 * precision * recall / (precision + recall))
    return float(np.mean(found))


def ref_ce(p: np.ndarray, g: np.ndarray) -> float:
    return float(-np.log(true_p(p, g)[0]).mean())


WEIGHTED = {"class_weights": KEEP["class_weights"]}
REFERENCES: dict[str, tuple[dict, Callable[[np.ndarray, np.ndarray], float]]] = {
    "ce": ({}, ref_ce),
    "weighted_ce": (WEIGHTED, ref_weighted_ce),
    "focal": (WEIGHTED | {"alpha": 0.25}, ref_focal),
    "topk_ce": ({}, ref_topk),
    "dice": ({}, ref_dice),
    "generalized_dice": ({}, ref_generalized),
    "tversky": ({}, ref_tversky),
    "focal_tversky": ({}, lambda p, g: ref_tversky(p, g, 0.75)),
    "boundary": ({}, ref_boundary),
    "cldice": ({}, ref_cldice),
    "dice_ce": ({"ce_weight": 2.0}, lambda p, g: ref_dice(p, g) + 2 * ref_ce(p, g)),
    "dice_focal": (WEIGHTED | {"alpha": 0.25}, lambda p, g: ref_dice(p, g) + ref_focal(p, g)),
    "dice_topk": ({"dice_weight": 0.5}, lambda p, g: 0.5 * ref_dice(p, g) + ref_topk(p, g)),
    "dice_weighted_ce": (WEIGHTED, lambda p, g: ref_dice(p, g) + ref_weighted_ce(p, g)),
    "dice_boundary": ({}, lambda p, g: ref_dice(p, g) + 0.01 * ref_boundary(p, g)),
    "dice_cldice": ({}, lambda p, g: 0.5 * ref_dice(p, g) + 0.5 * ref_cldice(p, g)),
}


def test_every_loss_has_a_reference() -> None:
    assert set(REFERENCES) == set(losses.LOSSES)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", losses.LOSSES)
def test_value_equals_the_float64_reference(name: str, shape: tuple[int, ...]) -> None:
    logits, target = sample(shape)
    options, reference = REFERENCES[name]
    expected = reference(softmax(logits.numpy()), target.numpy())
    value = losses.LOSSES[name](logits, target, **options)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(expected, abs=1e-6)
    narrow = losses.LOSSES[name](logits.float(), target.to(torch.int16), **options)
    assert narrow.dtype == torch.float32
    assert narrow.item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("squared", [False, True])
@pytest.mark.parametrize("background", [False, True])
def test_dice_options_equal_the_reference(batch: bool, squared: bool, background: bool) -> None:
    logits, target = sample((4, 6, 5))
    expected = ref_dice(softmax(logits.numpy()), target.numpy(), batch, squared, 0 if background else 1)
    value = losses.LOSSES["dice"](logits, target, batch_dice=batch, squared=squared, background=background)
    assert value.item() == pytest.approx(expected, abs=1e-9)


def test_cross_entropy_equals_torch() -> None:
    logits, target = sample((4, 6, 5))
    expected = F.cross_entropy(logits, target, ignore_index=-1)
    assert losses.LOSSES["ce"](logits, target).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", losses.LOSSES)
def test_gradient_equals_finite_differences(name: str, shape: tuple[int, ...]) -> None:
    logits, target = sample(tuple(min(size, 5) for size in shape), batch=1)
    options, _ = REFERENCES[name]
    function = losses.LOSSES[name]
    assert torch.autograd.gradcheck(lambda z: function(z, target, **options), logits.requires_grad_(), fast_mode=True)


def test_one_lean_pass_equals_the_plain_formula_in_any_number_of_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, target = sample((4, 6, 5))
    weight = torch.rand(target.shape, dtype=torch.float64)
    for square in (False, True):
        results = []
        for piece in (1 << 20, 6 * 17):
            monkeypatch.setitem(losses_sums.PIECE, "cpu", piece)
            z = logits.clone().requires_grad_()
            sums = losses_sums.class_sums(z, target, square=square, weight=weight)
            sum((s * (i + 1)).square().sum() for i, s in enumerate(sums)).backward()
            results.append((*sums, z.grad))
        z = logits.clone().requires_grad_()
        plain = losses_sums._plain_sums(*losses_sums.flat(z, target), square, weight.flatten(1))
        sum((s * (i + 1)).square().sum() for i, s in enumerate(plain)).backward()
        for result in results:
            for got, expected in zip(result, (*plain, z.grad), strict=True):
                torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def hard_targets(shape: tuple[int, ...]) -> dict[str, Tensor]:
    empty = torch.zeros(2, *shape, dtype=torch.int16)
    one = empty.clone()
    one.view(2, -1)[:, 7] = 2
    random = torch.randint(-1, 3, (2, *shape)).short()
    return {"random": random, "empty": empty, "all ignored": empty - 1, "one voxel": one}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", losses.LOSSES)
def test_gradients_stay_finite_in_half_precision_at_extreme_logits(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for shape in SHAPES:
        for what, target in hard_targets(shape).items():
            logits = (100.0 * torch.randint(0, 2, (2, 3, *shape)) - 50).to(dtype).requires_grad_()
            value = losses.build(name, batch_dice=False)([logits], target)
            value.backward()
            assert value.dtype == torch.float32
            assert value.isfinite(), what
            assert logits.grad is not None
            assert logits.grad.isfinite().all(), what
            assert logits.grad.dtype == dtype
            if what == "all ignored":
                assert logits.grad.abs().max() == 0
                assert value.item() == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", [name for name in losses.LOSSES if "smooth" in losses.options_of(name)])
def test_without_smoothing_values_and_gradients_stay_finite(name: str) -> None:
    torch.manual_seed(0)
    background = ",background=no" if "background" in losses.options_of(name) else ""
    for what, target in hard_targets((4, 6, 5)).items():
        logits = torch.randn(2, 3, 4, 6, 5, requires_grad=True)
        value = losses.build(f"{name}:smooth=0{background}", batch_dice=False)(logits, target)
        value.backward()
        assert value.isfinite(), what
        assert logits.grad is not None
        assert logits.grad.isfinite().all(), what


@pytest.mark.parametrize("name", losses.LOSSES)
def test_twenty_steps_of_descent_reach_the_target(name: str) -> None:
    _, target = sample((4, 6, 5), ignored=0.0)
    logits = torch.zeros(2, 3, 4, 6, 5, requires_grad=True)
    perfect = 100.0 * F.one_hot(target, 3).movedim(-1, 1).float()
    function = losses.LOSSES[name]
    start, least = function(logits, target).item(), function(perfect, target).item()
    steps = torch.optim.Adam([logits], lr=1.0)
    for _ in range(20):
        steps.zero_grad()
        function(logits, target).backward()
        steps.step()
    end = function(logits, target).item()
    slow = "cldice" in name  # the slope reaches only the skeleton and what bounds it
    assert start > least
    assert end - least < (0.15 if slow else 0.05) * (start - least)


@pytest.mark.parametrize("name", [n for n in losses.LOSSES if "topk" not in n])
@pytest.mark.parametrize("batch_dice", [False, True])
def test_two_processes_that_add_their_sums_equal_one(name: str, batch_dice: bool) -> None:
    logits, target = sample((4, 6, 5), batch=3)
    whole = logits.clone().requires_grad_()
    expected = losses.build(name, batch_dice=batch_dice)(whole, target)
    expected.backward()
    seen: dict[int, list[Tensor]] = {0: [], 1: []}

    def note(into: list[Tensor]) -> Callable[[Tensor], Tensor]:
        def reduce(own: Tensor) -> Tensor:
            into.append(own.detach())
            return own

        return reduce

    def plus(others: list[Tensor]) -> Callable[[Tensor], Tensor]:
        left = iter(others)
        return lambda own: own + next(left)

    parts = [slice(0, 1), slice(1, 3)]  # uneven on purpose
    for i, part in enumerate(parts):
        losses.build(name, batch_dice=batch_dice, reduce=note(seen[i]))(logits[part], target[part])
    for i, part in enumerate(parts):
        own = logits[part].clone().requires_grad_()
        value = losses.build(name, batch_dice=batch_dice, reduce=plus(seen[1 - i]))(own, target[part])
        value.backward()
        assert value.item() == pytest.approx(expected.item(), rel=1e-6)
        assert whole.grad is not None
        torch.testing.assert_close(own.grad, whole.grad[part])


# ------------------------------------------------------------------------------------------------ deep supervision


def test_supervision_weights_halve_and_drop_the_lowest_only_when_there_are_three() -> None:
    assert losses.supervision_weights(1) == (1.0,)
    assert losses.supervision_weights(2) == pytest.approx((2 / 3, 1 / 3))
    assert losses.supervision_weights(4) == pytest.approx((4 / 7, 2 / 7, 1 / 7, 0))


@pytest.mark.parametrize("small", [(4, 6, 5), (2, 3, 5), (4, 2, 1), (1, 1, 1)])
def test_targets_shrink_like_nearest_exact(small: tuple[int, ...]) -> None:
    target = torch.randint(-1, 3, (2, 4, 6, 5)).short()
    expected = F.interpolate(target[:, None].float(), small, mode="nearest-exact")[:, 0].short()
    assert torch.equal(losses.shrunk(target, small), expected)


def test_deep_supervision_is_the_weighted_sum_and_leaves_the_lowest_output_alone() -> None:
    logits, target = sample((4, 6, 4))
    outputs = [F.interpolate(logits, size).requires_grad_() for size in ((4, 6, 4), (2, 3, 2), (1, 3, 1))]
    value = losses.build("dice_ce", batch_dice=True)(outputs, target)
    high, low = (losses.LOSSES["dice_ce"](z, losses.shrunk(target, z.shape[2:]), batch_dice=True) for z in outputs[:2])
    assert value.item() == pytest.approx((2 / 3 * high + 1 / 3 * low).item())
    value.backward()
    assert outputs[2].grad is None
    assert outputs[1].grad is not None


def test_autocast_does_not_lower_the_precision() -> None:
    logits, target = sample((4, 6, 5))
    for name in losses.LOSSES:
        loss = losses.build(name, batch_dice=False)
        expected = loss(logits.float(), target)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(loss(logits.float(), target), expected), name


def test_the_default_loss_is_traced_without_a_graph_break() -> None:
    logits, target = sample((4, 6, 5))
    loss = losses.build("dice_ce", batch_dice=False)
    traced = torch.compile(loss, backend="eager", fullgraph=True)
    outputs = [logits.float(), logits.float()[:, :, ::2, ::2]]
    assert traced(outputs, target).item() == pytest.approx(loss(outputs, target).item(), rel=1e-6)


# ------------------------------------------------------------------------------------------------ parts


def test_distance_is_euclidean_up_to_the_radius() -> None:
    mask = torch.rand(2, 9, 11, 10) < 0.01
    mask[:, 4, 5, 5] = True
    expected = np.stack([ndimage.distance_transform_edt(~each) for each in mask.numpy()])
    for radius in (3, 30):
        np.testing.assert_allclose(distance_to(mask, radius).numpy(), expected.clip(max=radius), atol=1e-5)
    assert (distance_to(torch.zeros_like(mask), 3) == 3).all()


def test_skeleton_of_a_bar_is_its_centre_line() -> None:
    bar = torch.zeros(1, 1, 9, 20)
    bar[:, :, 3:6, 2:18] = 1
    spine = soft_skeleton(bar, 3)
    assert spine[0, 0, 4, 4:16].min() == 1
    assert spine[0, 0, [3, 5], 4:16].max() == 0


def test_class_weights_rise_with_rarity_and_are_zero_for_absent_classes() -> None:
    for rule in CLASS_WEIGHTS.values():
        weights = rule((90_000, 9_000, 1_000, 0))
        assert 0 < weights[0] <= weights[1] <= weights[2]
        assert weights[0] < weights[2]
        assert weights[3] == 0
    assert CLASS_WEIGHTS["median_frequency"]((100, 10, 1)) == pytest.approx((0.1, 1.0, 10.0))
    assert CLASS_WEIGHTS["inverse_share"]((4, 1)) == pytest.approx((0.4, 1.6))


# ------------------------------------------------------------------------------------------------ specs


def test_specs_are_read_with_their_types() -> None:
    assert losses.parse("dice_ce") == losses.LossSpec("dice_ce", {})
    assert losses.parse("dice_focal:gamma=1.5, alpha=0.25").options == {"gamma": 1.5, "alpha": 0.25}
    assert losses.parse("dice:squared=yes,background=no").options == {"squared": True, "background": False}
    assert losses.parse("weighted_ce:class_weights=1/2/0.5").options == {"class_weights": (1.0, 2.0, 0.5)}
    steps = losses.parse("cldice:steps=5").options["steps"]
    assert steps == 5
    assert isinstance(steps, int)


def test_rules_for_class_weights_become_numbers_of_the_data() -> None:
    assert losses.parse("focal:class_weights=inverse_share").options == {"class_weights": "inverse_share"}
    counts = [(100, 10, 1, 0)]
    assert losses.with_weights("weighted_ce", counts) == "weighted_ce:class_weights=0.1/1/10/0"
    spec = losses.with_weights("dice_weighted_ce:class_weights=inverse_share,border=0", [(4, 1)])
    assert spec == "dice_weighted_ce:border=0,class_weights=0.4/1.6"
    assert losses.parse(spec).options == {"border": 0.0, "class_weights": (0.4, 1.6)}
    assert losses.with_weights("focal:class_weights=effective_number", [(10**6, 10)]).startswith("focal:class_weights=")
    for same in ("dice_ce", "focal:gamma=1", "weighted_ce:class_weights=1/2/3", "dice:squared=yes"):
        assert losses.with_weights(same, counts) == same
    of_one = losses.parse(losses.with_weights("weighted_ce:class_weights=inverse_share", [(4, 1)], has_regions=True))
    assert len(of_one.options["class_weights"]) == 1
    of_regions = losses.with_weights("weighted_ce:class_weights=inverse_share", [(4, 1), (9, 3)], has_regions=True)
    assert of_regions == "weighted_ce:class_weights=4/3"
    assert losses.parse(losses.with_weights("weighted_ce", [(10**9, 10**9, 1)])).options  # within what may be read


@pytest.mark.parametrize("spec", ["weighted_ce:class_weights=1/2/3/4", "dice_focal:gamma=1,class_weights=2"])
def test_class_weights_of_other_classes_are_refused_with_the_classes(spec: str) -> None:
    with pytest.raises(UserError, match=r"there are 3 classes.*background, liver, tumour.*median_frequency"):
        losses.check(spec, ["background", "liver", "tumour"])
    losses.check("weighted_ce:class_weights=1/2/3", ["background", "liver", "tumour"])
    losses.check("weighted_ce:class_weights=inverse_share", ["background", "liver", "tumour"])


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("weighted_ce:class_weights=seldom", "inverse_share, median_frequency, effective_number"),
        ("weighted_ce:class_weights=-1/2", "from 0 to 1e"),
        ("dicee", "dice_ce, ce, weighted_ce"),
        ("", "dice_ce"),
        ("focal:gama=2", "gamma"),
        ("focal:gamma", "gamma"),
        ("focal:gamma=-1", "from 0 to 10"),
        ("focal:gamma=nan", "from 0 to 10"),
        ("focal:gamma=two", "number"),
        ("focal:gamma=1/2", "number"),
        ("dice:squared=maybe", "yes or no"),
        ("cldice:steps=2.5", "number"),
        ("ce:gamma=1", "no options"),
        ("dice:batch_dice=yes", "background"),
    ],
)
def test_a_wrong_spec_names_the_choices(spec: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        losses.parse(spec)


def test_every_option_of_every_loss_has_a_range() -> None:
    for name in losses.LOSSES:
        assert set(losses.options_of(name)) <= set(losses.RANGES), name
        for option, default in losses.options_of(name).items():
            if isinstance(default, float) and default != -1.0:
                low, high = losses.RANGES[option]
                assert low <= default <= high, (name, option)


def test_class_weights_must_match_the_classes() -> None:
    logits, target = sample((6, 7))
    with pytest.raises(UserError, match=r"2 numbers.*3 classes"):
        losses.build("weighted_ce:class_weights=1/2", batch_dice=False)(logits, target)
    spec = losses.build("weighted_ce:class_weights=1/2/3", batch_dice=False)(logits, target)
    assert spec.item() == pytest.approx(losses.LOSSES["weighted_ce"](logits, target, class_weights=(1, 2, 3)).item())
