"""Weights and training states as safetensors: nothing in such a file can run code. Each is one file, written whole."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from autoseg.errors import UserError
from autoseg.network.loop import TrainState
from autoseg.network.step import laid_out_like
from autoseg.store import is_disk_full, replacing

STATE_VERSION = 1
NUMBERS = (
    "step", "epoch", "seconds", "steps_per_epoch", "smoothed_dice", "best_dice", "skipped",
    "pieces", "precision", "troubled",
)  # fmt: skip


def save_weights(
    path: Path, network: nn.Module, average: list[Tensor] | None = None, mirror_axes: Sequence[int] | None = None
) -> None:
    """Write the weights of `network`, with its parameters replaced by `average` where one was kept.

    `mirror_axes` are those along which they saw patches mirrored; None leaves that to the record beside them.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    if average:
        names = [name for name, _ in network.named_parameters()]
        tensors |= {name: tensor.cpu().contiguous() for name, tensor in zip(names, average, strict=True)}
    # one entry: safetensors writes several in any order, and equal weights should be equal files
    about = {"autoseg": "weights"} if mirror_axes is None else {"mirror_axes": json.dumps(list(mirror_axes))}
    _write(path, tensors, about)


def read_mirror_axes(path: Path) -> tuple[int, ...] | None:
    """The axes along which these weights saw patches mirrored, None where the file does not say.

    Raises UserError as `load_weights`.
    """
    stored = _read_about(path).get("mirror_axes")
    return None if stored is None else tuple(json.loads(stored))


def load_weights(path: Path, network: nn.Module) -> None:
    """Read weights into `network`. Raises UserError when the file is missing, damaged or of another network."""
    tensors, _ = _read(path)
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(
            f"{path}: these weights do not belong to the network of this plan ({str(error).splitlines()[-1].strip()})."
        ) from error


def read_weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights by name, whatever network they belong to; raises UserError as `load_weights`."""
    return _read(path)[0]


def save_state(path: Path, state: TrainState) -> None:
    """Write all that a training needs to go on bit by bit: weights, optimizer, average, scaler, counters, history."""
    tensors: dict[str, Tensor] = {f"network.{n}": t for n, t in state.network.state_dict().items()}
    stored = state.optimizer.state_dict()
    for index, values in stored["state"].items():
        for name, value in values.items():
            if value is not None:
                tensors[f"optimizer.{index}.{name}"] = torch.as_tensor(value)
    tensors |= {f"average.{i}": tensor for i, tensor in enumerate(state.average)}
    tensors["random"] = torch.get_rng_state()
    if (where := _device_of(state.network)).type == "cuda":  # dropout draws there
        tensors["random_cuda"] = torch.cuda.get_rng_state(where)
    about = {
        "autoseg": "training state",
        "version": str(STATE_VERSION),
        "numbers": json.dumps({name: getattr(state, name) for name in NUMBERS}),
        "scaler": json.dumps(state.scaler.state_dict()),
        "history": json.dumps(state.history),
    }
    _write(path, {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, about)


def read_numbers(path: Path) -> dict[str, Any]:
    """The counters of a saved training state, without its tensors. Raises UserError as `load_state`."""
    about = _read_about(path)
    _check_version(path, about)
    return dict(json.loads(about["numbers"]))


def load_state(path: Path, state: TrainState) -> None:
    """Put a saved training state into `state`, which holds the same network and optimizer.

    Raises UserError when the file is missing, damaged, of another version or of another network.
    """
    tensors, about = _read(path)
    _check_version(path, about)
    network = {n.removeprefix("network."): t for n, t in tensors.items() if n.startswith("network.")}
    try:
        state.network.load_state_dict(network)
    except RuntimeError as error:
        raise UserError(
            f"{path}: this training used another network than the plan has now.",
            fix="Start anew with --restart, or bring the old plan back.",
        ) from error
    optimizer = state.optimizer.state_dict()
    weights = [weight for group in state.optimizer.param_groups for weight in group["params"]]
    entries: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, field = name.split(".", 2)
            entries.setdefault(int(index), {})[field] = laid_out_like(weights[int(index)], tensor)
    state.optimizer.load_state_dict({"state": entries, "param_groups": optimizer["param_groups"]})
    where = _device_of(state.network)
    averages = sum(name.startswith("average.") for name in tensors)
    kept = [tensors[f"average.{i}"].to(where) for i in range(averages)]
    state.average = [laid_out_like(*both) for both in zip(state.network.parameters(), kept, strict=bool(kept))]
    torch.set_rng_state(tensors["random"])
    if where.type == "cuda" and "random_cuda" in tensors:
        torch.cuda.set_rng_state(tensors["random_cuda"], where)
    for name, value in json.loads(about["numbers"]).items():
        setattr(state, name, value)
    if scaler := json.loads(about["scaler"]):  # empty where the training needed none: a scaler begins anew
        state.scaler.load_state_dict(scaler)
    state.history = json.loads(about["history"])


def _device_of(network: nn.Module) -> torch.device:
    return next(network.parameters()).device


def _check_version(path: Path, about: Mapping[str, str]) -> None:
    if about.get("version") != str(STATE_VERSION) or about.get("autoseg") != "training state":
        raise UserError(f"{path}: not a training state this version can continue.", fix="Start anew with --restart.")


def _damaged(path: Path, error: SafetensorError) -> UserError:
    return UserError(f"{path}: no valid safetensors file ({error}).", fix="Train again, or restore it.")


def _write(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    shared = {name: tensor.clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        try:
            save_file(shared, temporary, metadata=about)
        except SafetensorError as error:
            if is_disk_full(error):
                raise UserError(
                    f"{path}: the disk is full; the last checkpoint is intact.", fix="Free some space and resume."
                ) from error
            raise


def _read_about(path: Path) -> dict[str, str]:
    """What a file says beside its tensors."""
    if not path.is_file():
        raise UserError(f"{path}: no such file.", fix="Has this network been trained?")
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise _damaged(path, error) from error


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise UserError(f"{path}: no such file.", fix="Has this network been trained?")
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise _damaged(path, error) from error
