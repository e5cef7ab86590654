"""Every loss by name, how its options are read, and deep supervision.

Legend: B batch, K class (0 = background), Z Y X voxels (2D: Y X).
A loss takes logits (B, K, Z, Y, X) or (B, K, Y, X) in any floating type and target (B, Z, Y, X) or (B, Y, X) of integer
class indices, -1 = ignore, and returns a scalar in float32 (float64 for float64 logits).
A spec names a loss and its options: "dice_ce" or "dice_focal:gamma=2,alpha=0.25"; several numbers are joined by "/".
Class weights are such numbers, or the name of the rule that makes them of the data: see `with_weights`.
To add a loss: write the function in one of the `losses_*` files and one line in `LOSSES`.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network.label_kinds import One, of_classes, of_regions
from autoseg.network.losses_combined import (
    dice_boundary,
    dice_ce,
    dice_cldice,
    dice_focal,
    dice_topk,
    dice_weighted_ce,
)
from autoseg.network.losses_pixel import CLASS_WEIGHTS, ce, focal, topk_ce, weighted_ce
from autoseg.network.losses_region import boundary, cldice, dice, focal_tversky, generalized_dice, tversky
from autoseg.network.losses_sums import Reduce, alone
from autoseg.records import Configuration

Value = float | int | bool | str | tuple[float, ...]
Supervised = Callable[..., Tensor]
"""Of logits (list, highest resolution first, or one tensor), target, and perhaps a table of what was annotated."""

# ------------------------------------------------------------------------------------------------ specs


@dataclass(frozen=True)
class LossSpec:
    """A loss by name with the options that differ from their defaults."""

    name: str
    options: dict[str, Value] = field(default_factory=dict)


def parse(spec: str) -> LossSpec:
    """Read "name" or "name:option=value,option=value".

    Raises UserError with the valid names, options or range when one is wrong.
    """
    name, _, rest = spec.strip().partition(":")
    if name not in LOSSES:
        raise UserError(f"There is no loss '{name}'.", fix=f"Choose one of {', '.join(LOSSES)}.")
    known = options_of(name)
    options: dict[str, Value] = {}
    for part in rest.split(",") if rest.strip() else []:
        option, equals, text = (each.strip() for each in part.partition("="))
        if option not in known or not equals:
            raise UserError(
                f"Loss {name} does not understand '{part.strip()}'.",
                fix=f"Options are written name=value; it has {_listed(known)}." if known else "It has no options.",
            )
        options[option] = _value(name, option, text, known[option])
    return LossSpec(name, options)


def options_of(name: str) -> dict[str, Value | None]:
    """Options that a spec may set for the loss `name`, with their defaults."""
    parameters = inspect.signature(LOSSES[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in NOT_IN_SPECS}


def check(spec: str, outputs: Sequence[str], has_regions: bool = False) -> None:
    """Raise UserError for a spec that is wrong, or whose class weights are not one per output.

    Args:
        outputs: names of the classes, background first; or of the regions.
    """
    weights = parse(spec).options.get("class_weights")
    if isinstance(weights, tuple) and len(weights) != len(outputs):
        kind = "regions" if has_regions else "classes"
        raise UserError(
            f"Loss {spec}: class_weights has {len(weights)} number(s), but there are {len(outputs)} {kind}.",
            fix=f"Give one for each of {', '.join(outputs)}, joined by /, or one of {', '.join(CLASS_WEIGHTS)}.",
        )


def with_weights(spec: str, counts: Sequence[Sequence[int]], has_regions: bool = False) -> str:
    """The spec with numbers in place of a rule for class weights; "weighted" losses that name none take `USUAL_RULE`.

    Args:
        counts: the voxels of every class, background first; or (outside, inside) of every region, whose weight then is
            that of a voxel inside, if one outside counts 1.
    """
    parsed = parse(spec)
    rule = parsed.options.get("class_weights", USUAL_RULE if parsed.name in WEIGHTED else None)
    if not isinstance(rule, str):
        return spec
    if not has_regions:
        weights = CLASS_WEIGHTS[rule](counts[0])
    else:
        pairs = (CLASS_WEIGHTS[rule](pair) for pair in counts)
        weights = tuple(within / around if around else 1.0 for around, within in pairs)
    text = "/".join(f"{min(weight, RANGES['class_weights'][1]):.4g}" for weight in weights)
    others = [part for part in spec.partition(":")[2].split(",") if part.strip() and "class_weights" not in part]
    return f"{parsed.name}:{','.join([*others, f'class_weights={text}'])}"


def _value(name: str, option: str, text: str, default: Value | None) -> Value:
    low, high = RANGES_OF.get((name, option), RANGES[option])
    wanted = "yes or no" if isinstance(default, bool) else f"a number from {low:g} to {high:g}"
    if default is None:
        wanted = f"one number per class from {low:g} to {high:g}, joined by /, or one of {', '.join(CLASS_WEIGHTS)}"
    wrong = UserError(f"Loss {name}: {option}={text} is not possible.", fix=f"Give {wanted}.")
    if isinstance(default, bool):
        if text.lower() not in YES_NO:
            raise wrong
        return YES_NO[text.lower()]
    if text in CLASS_WEIGHTS and default is None:
        return text
    try:
        numbers = tuple(float(each) for each in text.split("/"))
    except ValueError:
        raise wrong from None
    if not all(low <= each <= high for each in numbers):  # also refuses nan
        raise wrong
    if default is None:
        return numbers
    if len(numbers) != 1 or (isinstance(default, int) and numbers[0] % 1):
        raise wrong
    return int(numbers[0]) if isinstance(default, int) else numbers[0]


def _listed(known: dict[str, Value | None]) -> str:
    several = f"one number per class, joined by /, or {', '.join(CLASS_WEIGHTS)}"
    shown = {option: several if d is None else d for option, d in known.items()}
    return ", ".join(f"{option} ({default})" for option, default in shown.items())


# ------------------------------------------------------------------------------------------------ deep supervision


def build(
    spec: str,
    *,
    batch_dice: bool,
    reduce: Reduce = alone,
    regions: Sequence[Sequence[int]] = (),
) -> Supervised:
    """The loss of all outputs of a network: sum_i w_i loss(logits_i, target_i), computed in full precision.

    Weights as in `supervision_weights`; targets of lower outputs are picked at the nearest voxel. Outputs of weight 0
    are not touched, so the layer behind them gets no gradient.

    Args:
        spec: see `parse`.
        batch_dice: overlap is summed over the batch before it is divided; for losses that know it.
        reduce: adds a tensor over the processes that share a batch, with gradient.
        regions: label indices that each output is made of, where outputs are regions that may overlap; class weights
            are then one per region. See network/label_kinds.py.
    Returns a function of (logits: list, highest resolution first, or one tensor; target (B, Z, Y, X) or (B, Y, X);
    where some classes or regions were not annotated in some samples, a bool table (B, K) that says which were).
    A rule for class weights that `with_weights` has not replaced counts as none.
    """
    parsed = parse(spec)
    function = LOSSES[parsed.name]
    known = inspect.signature(function).parameters
    plan = {"batch_dice": batch_dice, "reduce": reduce}
    given = {name: value for name, value in parsed.options.items() if not isinstance(value, str)}
    options: dict[str, object] = {**{name: value for name, value in plan.items() if name in known}, **given}
    one = _one(function, options, regions)

    def supervised(logits: list[Tensor] | Tensor, target: Tensor, annotated_BK: Tensor | None = None) -> Tensor:
        outputs = [logits] if isinstance(logits, Tensor) else logits
        total = torch.zeros((), device=target.device)
        with torch.autocast(target.device.type, enabled=False):
            for output, weight in zip(outputs, supervision_weights(len(outputs)), strict=True):
                if weight > 0:
                    total = total + weight * one(output, shrunk(target, tuple(output.shape[2:])), annotated_BK)
        return total

    return supervised


def loss_of(
    configuration: Configuration, regions: Sequence[Sequence[int]] = (), reduce: Reduce = alone
) -> Supervised:
    """What the network of a configuration is trained with; see `build`."""
    spec, batch_dice = configuration.train.loss, configuration.batch_dice
    return build(spec, batch_dice=batch_dice, reduce=reduce, regions=regions)


def _one(
    function: Callable[..., Tensor], options: dict[str, object], regions: Sequence[Sequence[int]]
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The loss of one output of the network."""
    if not regions:
        return partial(of_classes, partial(function, **options))
    weights = options.pop("class_weights", None)
    if isinstance(weights, Sequence) and len(weights) != len(regions):
        raise UserError(f"class_weights has {len(weights)} numbers, but there are {len(regions)} regions.")

    def loss_of(number: int) -> One:
        own = {"class_weights": (1.0, weights[number])} if isinstance(weights, Sequence) else {}
        return partial(function, **options, **own)

    return partial(of_regions, loss_of, regions)


def supervision_weights(outputs: int) -> tuple[float, ...]:
    """1, 1/2, 1/4, ... of the outputs from the highest resolution down, scaled to a sum of 1.

    With three or more outputs the lowest counts nothing (Isensee et al. 2021).
    """
    weights = [0.5**i for i in range(outputs)]
    if outputs > 2:
        weights[-1] = 0.0
    return tuple(w / sum(weights) for w in weights)


def shrunk(target: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The target (B, ...) at the lower resolution `shape`, which divides its own: of each cell the voxel at or just
    after its middle.
    """
    steps = [old // new for old, new in zip(target.shape[1:], shape, strict=True)]
    return target[(slice(None), *(slice(step // 2, None, step) for step in steps))]


WEIGHTED = ("weighted_ce", "dice_weighted_ce")
USUAL_RULE = "median_frequency"
"""What class weights these losses take where the spec names none."""

NOT_IN_SPECS = ("reduce", "batch_dice")
"""Keyword arguments that the plan or the training sets, not the spec."""

YES_NO = {"yes": True, "true": True, "1": True, "no": False, "false": False, "0": False}

RANGES: dict[str, tuple[float, float]] = {
    "dice_weight": (0, 1000),
    "ce_weight": (0, 1000),
    "focal_weight": (0, 1000),
    "topk_weight": (0, 1000),
    "boundary_weight": (0, 1000),
    "cldice_weight": (0, 1000),
    "class_weights": (0, 1e6),
    "border": (0, 1000),
    "sigma": (0.1, 50),
    "gamma": (0, 10),
    "alpha": (0, 1),
    "beta": (0, 1),
    "k": (1e-4, 1),
    "smooth": (0, 1),
    "radius": (1, 256),
    "steps": (1, 50),
    "background": (0, 1),
    "squared": (0, 1),
}
"""Smallest and largest value of each option."""
RANGES_OF = {("focal_tversky", "gamma"): (0.1, 10.0)}
"""The same where a loss takes fewer: this one divides by it."""

LOSSES: dict[str, Callable[..., Tensor]] = {
    "dice_ce": dice_ce,
    "ce": ce,
    "weighted_ce": weighted_ce,
    "focal": focal,
    "topk_ce": topk_ce,
    "dice": dice,
    "generalized_dice": generalized_dice,
    "tversky": tversky,
    "focal_tversky": focal_tversky,
    "boundary": boundary,
    "cldice": cldice,
    "dice_focal": dice_focal,
    "dice_topk": dice_topk,
    "dice_weighted_ce": dice_weighted_ce,
    "dice_boundary": dice_boundary,
    "dice_cldice": dice_cldice,
}
