"""Networks that nnU-Net trained, as ours: architectures, checkpoints, weights.

Understood are `PlainConvUNet` and `ResidualEncoderUNet` of dynamic_network_architectures (Isensee et al., nnU-Net,
Nature Methods 2021, and nnU-Net Revisited, MICCAI 2024). Stages of their decoder count from the coarsest, levels here
from the finest. Nothing in a checkpoint is run: it is read as tensors and plain values.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from autoseg.errors import UserError
from autoseg.network.unet import UNet
from autoseg.records import NetworkSpec

KINDS = {"PlainConvUNet": "plain", "ResidualEncoderUNet": "residual"}
NORMS = {"InstanceNorm": "instance", "BatchNorm": "batch"}
BLOCKS = {"BasicBlockD": "basic", "BottleneckD": "bottleneck"}
SLOPE, EPSILON = 0.01, 1e-5
"""Of leaky ReLU and of the norms; with others the outputs would differ."""
PREFIXES = re.compile(r"^(?:module\.|_orig_mod\.)+")
"""What torch puts in front of the names when a network was distributed or compiled."""
AGAIN = re.compile(r"\.all_modules\.|^decoder\.encoder\.")
"""Second names of weights that have another one."""
UNREAD = (
    "numpy.dtype", "numpy.ndarray", "numpy._core.multiarray.scalar", "numpy.core.multiarray.scalar",
    "numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.dtypes.Float64DType",
    "numpy.dtypes.Float32DType", "numpy.dtypes.Int64DType", "numpy.dtypes.BoolDType", "numpy.float64", "numpy.float32",
    "pathlib.Path", "pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath",
)  # fmt: skip
"""What a checkpoint's log and settings are made of; something empty takes their place while the weights are read."""


@dataclass(frozen=True)
class Checkpoint:
    """Weights under nnU-Net's names, and the patch axes that its predictions may be mirrored along."""

    weights: dict[str, Tensor]
    mirror_axes: tuple[int, ...] = ()


def architecture_of(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """`network_class_name` and `arch_kwargs` of a configuration in nnU-Net's plans, also those written before 2.5."""
    entry = inherited(plans, configuration)
    if "architecture" in entry:
        return dict(entry["architecture"])
    if "UNet_class_name" not in entry:
        raise UserError(f"Configuration {configuration} of these plans names no architecture.")
    dimension, stages = len(entry["patch_size"]), len(entry["n_conv_per_stage_encoder"])
    base, most = entry["UNet_base_num_features"], entry["unet_max_num_features"]
    blocks = "n_conv_per_stage" if entry["UNet_class_name"] == "PlainConvUNet" else "n_blocks_per_stage"
    arguments = {
        "n_stages": stages, "features_per_stage": [min(base * 2**s, most) for s in range(stages)],
        "conv_op": f"torch.nn.Conv{dimension}d", "kernel_sizes": entry["conv_kernel_sizes"],
        "strides": entry["pool_op_kernel_sizes"], blocks: entry["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": entry["n_conv_per_stage_decoder"], "conv_bias": True,
        "norm_op": f"torch.nn.InstanceNorm{dimension}d", "norm_op_kwargs": {"eps": EPSILON, "affine": True},
        "dropout_op": None, "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    return {"network_class_name": entry["UNet_class_name"], "arch_kwargs": arguments}


def spec_from_nnunet(architecture: Mapping[str, Any], in_channels: int, classes: int) -> NetworkSpec:
    """Our spec of an architecture entry of nnU-Net's plans (`network_class_name` or `arch_class_name`, `arch_kwargs`).

    `classes` counts the outputs. Raises UserError that names what our U-Net has no counterpart for.
    """
    name = str(architecture.get("network_class_name", architecture.get("arch_class_name", ""))).rsplit(".", 1)[-1]
    arguments = architecture.get("arch_kwargs", {})
    if name not in KINDS:
        raise UserError(f"The architecture {name!r} is not known here.", fix=f"Known are {' and '.join(KINDS)}.")
    kind = KINDS[name]
    stages, dimension = int(arguments["n_stages"]), int(_last(arguments["conv_op"])[-2])
    _refuse_others(arguments, dimension, name)
    blocks = _each(arguments["n_conv_per_stage" if kind == "plain" else "n_blocks_per_stage"], stages)
    inner = arguments.get("bottleneck_channels")
    bottleneck = BLOCKS[_last(arguments.get("block") or "BasicBlockD")] == "bottleneck"
    dropout = (arguments.get("dropout_op_kwargs") or {}).get("p", 0.5) if arguments.get("dropout_op") else 0.0
    return NetworkSpec.model_validate({
        "kind": kind, "dimension": dimension, "in_channels": in_channels, "classes": classes,
        "features": _each(arguments["features_per_stage"], stages),
        "strides": [_each(stride, dimension) for stride in _each(arguments["strides"], stages)],
        "kernels": [_each(kernel, dimension) for kernel in _each(arguments["kernel_sizes"], stages)],
        "encoder_blocks": blocks,
        "decoder_blocks": _each(arguments["n_conv_per_stage_decoder"], stages - 1)[::-1],
        "norm": NORMS[_last(arguments["norm_op"])[:-2]], "bias": bool(arguments.get("conv_bias", False)),
        "dropout": dropout, "deep_supervision": True, "block": "bottleneck" if bottleneck else "basic",
        "bottleneck_features": _each(inner, stages) if bottleneck else (),
    })  # fmt: skip


def weights_from_nnunet(weights: Mapping[str, Tensor], spec: NetworkSpec) -> dict[str, Tensor]:
    """A state dict of `UNet(spec)` with the weights of nnU-Net's network; the tensors are shared, not copied.

    Plain and residual encoders, basic and bottleneck blocks, every norm, with and without biases, 2D and 3D. Names from
    distributed and compiled networks are accepted. Raises UserError that names the first weight that does not fit.
    """
    ours: dict[str, Tensor] = {}
    levels = len(spec.decoder_blocks)
    for name, tensor in weights.items():
        plain = PREFIXES.sub("", name)
        if AGAIN.search(plain):
            continue
        renamed = _renamed(plain, levels)
        if renamed is None:
            raise UserError(f"The weight {name} has no counterpart here.", fix=f"Known are {' and '.join(KINDS)}.")
        if spec.deep_supervision or not re.match(r"head\.[1-9]", renamed):
            ours[renamed] = tensor
    with torch.device("meta"):
        wanted = UNet(spec).state_dict()
    for name, tensor in wanted.items():
        if re.fullmatch(r"up\.\d+\.bias", name) and name not in ours:
            ours[name] = torch.zeros(tensor.shape)  # ours always has one there
        if name not in ours:
            raise UserError(f"The weights lack {name}, which this network has.")
        if ours[name].shape != tensor.shape:
            found, needed = tuple(ours[name].shape), tuple(tensor.shape)
            raise UserError(f"The weight {name} has shape {found}, this network needs {needed}.")
    if spare := sorted(set(ours) - set(wanted)):
        raise UserError(f"The weight {spare[0]} and {len(spare) - 1} more have no place in this network.")
    return ours


def read_checkpoint(path: Path) -> Checkpoint:
    """A checkpoint that nnU-Net wrote. Nothing in the file is run.

    Raises UserError when the file is missing, damaged, holds no weights, or holds an object that would have to be run.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
    parts = [name.rsplit(".", 1) for name in UNREAD]
    empty: list[Any] = [type(name, (_Unread,), {"__module__": module}) for module, name in parts]
    try:
        with torch.serialization.safe_globals(empty):
            found = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"the object {named[1]}" if named else "something beside tensors and plain values"
        raise UserError(
            f"{path}: this checkpoint holds {what}, which could run code when it is read, so it is refused.",
            fix="Have its owner save `network_weights` alone.",
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: this is no checkpoint that can be read ({why}).") from error
    weights = found.get("network_weights") if isinstance(found, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(each, Tensor) for each in weights.values()):
        raise UserError(f"{path}: there are no `network_weights` in this file.", fix="Give a checkpoint of nnU-Net v2.")
    return Checkpoint(weights, tuple(found.get("inference_allowed_mirroring_axes") or ()))


class _Unread:
    """Takes the place of what is not needed: it is built from anything and keeps nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, _: object) -> None:
        pass


def _renamed(name: str, levels: int) -> str | None:
    """Our name of a weight, or None. `levels` of the decoder count from the other end."""
    for pattern, renamed in RENAMED:
        if found := pattern.fullmatch(name):
            parts = dict(found.groupdict())
            if "coarse" in parts:
                parts["level"] = str(levels - 1 - int(parts["coarse"]))
            return renamed.format(**parts)
    return None


def inherited(plans: Mapping[str, Any], configuration: str) -> dict[str, Any]:
    """A configuration with what it takes over from the one it names."""
    if configuration not in plans.get("configurations", {}):
        known = ", ".join(plans.get("configurations", {})) or "none"
        raise UserError(f"These plans have no configuration {configuration!r}.", fix=f"They have: {known}.")
    entry = dict(plans["configurations"][configuration])
    parent = entry.pop("inherits_from", None)
    return entry if parent is None else inherited(plans, parent) | entry


def _refuse_others(arguments: Mapping[str, Any], dimension: int, name: str) -> None:
    """Raise UserError for a setting with which our network would compute something else."""
    norm = arguments.get("norm_op_kwargs") or {}
    allowed = {
        "conv_op": (_last(arguments["conv_op"]), ("Conv2d", "Conv3d")),
        "norm_op": (_last(arguments.get("norm_op")), tuple(f"{each}{dimension}d" for each in NORMS)),
        "nonlin": (_last(arguments.get("nonlin")), ("LeakyReLU",)),
        "negative_slope": ((arguments.get("nonlin_kwargs") or {}).get("negative_slope", SLOPE), (SLOPE,)),
        "eps": (norm.get("eps", EPSILON), (EPSILON,)),
        "affine": (norm.get("affine", _last(arguments.get("norm_op")).startswith("Batch")), (True,)),
        "nonlin_first": (bool(arguments.get("nonlin_first", False)), (False,)),
        "block": (_last(arguments.get("block") or "BasicBlockD"), tuple(BLOCKS)),
        "dropout_op": (_last(arguments.get("dropout_op")), ("None", f"Dropout{dimension}d")),
        "stem_channels": (arguments.get("stem_channels"), (None, _each(arguments["features_per_stage"], 1)[0])),
        "strides": (_each(_each(arguments["strides"], 1)[0], dimension), ((1,) * dimension,)),
    }
    for field, (value, known) in allowed.items():
        if value not in known:
            choices = ", ".join(map(str, known))
            raise UserError(f"{name} with {field} {value} has no counterpart here.", fix=f"Known are {choices}.")


def _last(dotted: object) -> str:
    """The class name of a dotted one; "None" for None."""
    return str(dotted).rsplit(".", 1)[-1]


def _each(value: Any, count: int) -> tuple[Any, ...]:
    """One entry per stage or axis: nnU-Net takes a single number for all of them too."""
    return tuple(value) if isinstance(value, (list, tuple)) else (value,) * count


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file of nnU-Net; raises UserError when there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file.", fix="Give nnU-Net's folder of one trained configuration.") from error
    except ValueError as error:
        raise UserError(f"{path}: this is no JSON ({error}).") from error


_BLOCK = r"encoder\.stages\.(?P<stage>\d+)\.blocks\.(?P<block>\d+)\."
RENAMED = tuple(
    (re.compile(theirs), ours)
    for theirs, ours in (
        (r"encoder\.stages\.(?P<stage>\d+)\.0\.convs\.(?P<block>\d+)\.(?P<rest>.+)", "encoder.{stage}.{block}.{rest}"),
        (r"encoder\.stem\.convs\.0\.(?P<rest>.+)", "stem.{rest}"),
        (_BLOCK + r"conv(?P<n>[123])\.(?P<what>conv|norm)\.(?P<rest>.+)", "encoder.{stage}.{block}.{what}{n}.{rest}"),
        (_BLOCK + r"skip\.[01]\.conv\.(?P<rest>.+)", "encoder.{stage}.{block}.skip.{rest}"),
        (_BLOCK + r"skip\.[01]\.norm\.(?P<rest>.+)", "encoder.{stage}.{block}.skip_norm.{rest}"),
        (r"decoder\.transpconvs\.(?P<coarse>\d+)\.(?P<rest>.+)", "up.{level}.{rest}"),
        (r"decoder\.stages\.(?P<coarse>\d+)\.convs\.(?P<block>\d+)\.(?P<rest>.+)", "decoder.{level}.{block}.{rest}"),
        (r"decoder\.seg_layers\.(?P<coarse>\d+)\.(?P<rest>.+)", "head.{level}.{rest}"),
    )
)
"""Their name and ours of every weight."""
