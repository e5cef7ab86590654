"""Networks that the installed nnU-Net trained, loaded here: the same logits?

Run: python bench/nnunet_weights.py --peer PEER/bin/python [--steps 5] [--record tests/nnunet_outputs.json]
The peer's interpreter runs this file too (`--write`): its own trainer builds plain and residual networks in 2D and 3D
from plans, takes a few training steps on made-up images, saves its checkpoint, and predicts one image. Then autoseg
loads the model folders and predicts the same image. Prints one JSON line per network with the largest
difference of any logit on any level, and ends with an error where one is above 1e-5 (both in fp32 on the CPU).
`--record` has the peer write what the tests compare with: see `tests/test_nnunet.py`.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

MOST = 1e-5
NORM = {"eps": 1e-5, "affine": True}


def architecture(
    kind: str, dimension: int, features: list[int], blocks: list[int], decoder: list[int], **more: Any
) -> dict[str, Any]:
    """An architecture entry as nnU-Net's planner writes it; the first axis is halved once less in 3D."""
    stages = len(features)
    strides = [[1] * dimension, [2] * dimension] + [[1] + [2] * (dimension - 1)] * (stages - 2)
    kernels = [[1] + [3] * (dimension - 1)] + [[3] * dimension] * (stages - 1)
    arguments = {
        "n_stages": stages, "features_per_stage": features, "conv_op": f"torch.nn.modules.conv.Conv{dimension}d",
        "kernel_sizes": kernels, "strides": strides,
        "n_conv_per_stage" if kind == "PlainConvUNet" else "n_blocks_per_stage": blocks,
        "n_conv_per_stage_decoder": decoder, "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimension}d", "norm_op_kwargs": NORM,
        "dropout_op": None, "dropout_op_kwargs": None, "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    return {
        "network_class_name": f"dynamic_network_architectures.architectures.unet.{kind}",
        "arch_kwargs": arguments | more,
        "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"] + ["block"] * ("block" in more),
    }


def small() -> dict[str, dict]:
    """Networks for the tests: all that differs, with few channels."""
    bottleneck = {
        "block": "dynamic_network_architectures.building_blocks.residual.BottleneckD", "bottleneck_channels": [2, 3, 4],
    }  # fmt: skip
    features = [4, 6, 8]
    return {
        "plain 3D": architecture("PlainConvUNet", 3, features, [2, 1, 2], [2, 1]),
        "plain 2D": architecture("PlainConvUNet", 2, features, [1, 2, 1], [1, 2]),
        "plain 2D, batch norm, no biases, dropout": architecture(
            "PlainConvUNet", 2, features, [2, 2, 2], [2, 2], conv_bias=False,
            norm_op="torch.nn.modules.batchnorm.BatchNorm2d", dropout_op="torch.nn.Dropout2d",
            dropout_op_kwargs={"p": 0.2},
        ),
        "residual 3D": architecture("ResidualEncoderUNet", 3, features, [1, 2, 1], [1, 1]),
        "residual 2D": architecture("ResidualEncoderUNet", 2, [4, 4, 8], [2, 1, 2], [1, 2]),
        "residual 3D, bottlenecks": architecture("ResidualEncoderUNet", 3, features, [1, 2, 2], [1, 1], **bottleneck),
    }


def large() -> dict[str, dict]:
    """Networks as nnU-Net plans them: default and residual preset M, 2D and 3D."""
    three, two = [32, 64, 128, 256, 320], [32, 64, 128, 256, 512, 512]
    return {
        "plain_3d": architecture("PlainConvUNet", 3, three, [2] * 5, [2] * 4),
        "plain_2d": architecture("PlainConvUNet", 2, two, [2] * 6, [2] * 5),
        "residual_3d": architecture("ResidualEncoderUNet", 3, three, [1, 3, 4, 6, 6], [1] * 4),
        "residual_2d": architecture("ResidualEncoderUNet", 2, two, [1, 3, 4, 6, 6, 6], [1] * 5),
    }


def filled(shape: tuple[int, ...], number: int, name: str) -> Any:
    """The formula of tests/test_nnunet.py: what fills weight `number` of the list, or an image."""
    import torch

    values = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + number).reshape(shape).float()
    if name.endswith("running_var"):
        return 1.5 + values
    if len(shape) > 1:
        return values * math.sqrt(4.0 / math.prod(shape[1:]))
    return 1.0 + 0.5 * values if name.endswith("weight") else 0.3 * values


# ------------------------------------------------------------------------------------------------ the peer's side


def record(path: Path) -> None:
    """Have nnU-Net's networks predict with weights made by `filled`, and write names, shapes and some logits."""
    import torch
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    recorded = {}
    for title, entry in small().items():
        dimension = 3 if "3D" in title else 2
        network = get_network_from_plans(
            entry["network_class_name"], entry["arch_kwargs"], entry["_kw_requires_import"], 2, 3, deep_supervision=True
        ).eval()
        shapes = {name: list(tensor.shape) for name, tensor in network.state_dict().items()}
        first: dict[int, Any] = {}  # some tensors have several names: the first one decides
        for number, (name, tensor) in enumerate(network.state_dict().items()):
            values = filled(tuple(tensor.shape), number, name) if tensor.shape else torch.tensor(number)
            tensor.copy_(first.setdefault(tensor.data_ptr(), values))
        image = [1, 2, *(8, 16, 16)[-dimension:]]
        with torch.no_grad():
            levels = network(filled(tuple(image), 5, "image.values"))
        recorded[title] = {
            "architecture": entry, "in_channels": 2, "classes": 3, "weights": shapes, "image": image,
            "logits": [thinned(each) for each in levels],
        }  # fmt: skip
    path.write_text(json.dumps(recorded, separators=(",", ":")) + "\n")


def thinned(logits: Any) -> dict[str, Any]:
    every = max(1, logits.numel() // 24)
    return {"shape": list(logits.shape), "every": every, "values": logits.flatten()[::every].tolist()}


def write(work: Path, steps: int) -> None:
    """Have nnU-Net's own trainer make, train and save every network of `large`, and predict one image with it."""
    for variable, folder in (("nnUNet_raw", "raw"), ("nnUNet_preprocessed", "pre"), ("nnUNet_results", "res")):
        os.environ[variable] = str(work / folder)
    import torch
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    labels = {"background": 0, "first": 1, "second": 2}
    dataset = {"channel_names": {"0": "T1", "1": "T2"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    for name, entry in large().items():
        dimension = 3 if "3d" in name else 2
        patch = [16, 32, 32] if dimension == 3 else [64, 64]
        plans = plans_with(name, entry, patch)
        folder = work / "pre" / "Dataset001_Any" / name
        folder.mkdir(parents=True)
        (folder / "case.b2nd").touch()
        torch.manual_seed(1)
        one = nnUNetTrainer(plans | {"continue_training": False}, name, 0, dataset, device=torch.device("cpu"))
        one.initialize()
        one.inference_allowed_mirroring_axes = tuple(range(dimension))
        one.network.train()
        losses = []
        for _ in range(steps):
            data = torch.randn(2, 2, *patch)
            labels_B1 = (data[:, :1] > 0.5).float() + (data[:, 1:] > 1.0).float()
            scales = one._get_deep_supervision_scales()
            target = [torch.nn.functional.interpolate(labels_B1, scale_factor=each, mode="nearest") for each in scales]
            losses.append(float(one.train_step({"data": data, "target": target})["loss"]))
        one.logger.log("train_losses", sum(losses) / len(losses), 0)
        model = work / "res" / "Dataset001_Any" / f"nnUNetTrainer__nnUNetPlans__{name}"
        one.save_checkpoint(str(model / "fold_0" / "checkpoint_final.pth"))
        (model / "plans.json").write_text(json.dumps(plans))
        (model / "dataset.json").write_text(json.dumps(dataset))
        image = torch.randn(1, 2, *patch)
        one.network.eval()
        with torch.no_grad():
            levels = one.network(image)
        torch.save({"image": image, "levels": list(levels), "losses": losses}, model / "logits.pt")


def plans_with(name: str, entry: dict, patch: list[int]) -> dict[str, Any]:
    """The fields of a plans file that nnU-Net's trainer reads."""
    strides = entry["arch_kwargs"]["strides"]
    return {
        "dataset_name": "Dataset001_Any", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "label_manager": "LabelManager",
        "configurations": {name: {
            "data_identifier": name, "batch_size": 2, "patch_size": patch, "batch_dice": False, "architecture": entry,
            "pool_op_kernel_sizes": strides,
        }},
    }  # fmt: skip


# ------------------------------------------------------------------------------------------------ our side


def compare(work: Path) -> float:
    """Load what the peer left behind; the largest difference of any logit."""
    import torch

    from autoseg.network.nnunet import (
        architecture_of,
        read_checkpoint,
        read_json,
        spec_from_nnunet,
        weights_from_nnunet,
    )
    from autoseg.network.unet import UNet

    worst = 0.0
    for name in large():
        folder = work / "res" / "Dataset001_Any" / f"nnUNetTrainer__nnUNetPlans__{name}"
        theirs = torch.load(folder / "logits.pt", weights_only=True)
        spec = spec_from_nnunet(architecture_of(read_json(folder / "plans.json"), name), in_channels=2, classes=3)
        network, checkpoint = UNet(spec).eval(), folder / "fold_0" / "checkpoint_final.pth"
        network.load_state_dict(weights_from_nnunet(read_checkpoint(checkpoint).weights, spec))
        network.training = True  # puts out every level; the norms inside do not differ
        with torch.no_grad():
            levels = network(theirs["image"])
        differences = [float((a - b).abs().max()) for a, b in zip(levels, theirs["levels"], strict=True)]
        sizes = [float(each.abs().max()) for each in theirs["levels"]]
        worst = max(worst, *differences)
        figures = {"largest_difference": max(differences), "largest_logit": max(sizes), "losses": theirs["losses"]}
        print(json.dumps({"network": name, "levels": len(levels), **figures}), flush=True)
    return worst


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="an interpreter that has nnunetv2")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--record", type=Path)
    parser.add_argument("--write", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.write:
        record(given.record) if given.record else write(given.write, given.steps)
        sys.stdout.flush()
        os._exit(0)  # the peer's background workers outlive a normal exit
    if given.peer is None:
        print("left out: name an interpreter that has nnunetv2, --peer PEER/bin/python")
        return
    with tempfile.TemporaryDirectory() as folder:
        work = [str(given.peer), __file__, "--write", folder, "--steps", str(given.steps)]
        quiet = subprocess.DEVNULL
        if given.record:
            subprocess.run([*work, "--record", str(given.record.resolve())], check=True, stdout=quiet)
        subprocess.run(work, check=True, stdout=quiet)
        worst = compare(Path(folder))
    if worst > MOST:
        sys.exit(f"largest difference {worst:.2g} is above {MOST:g}")


if __name__ == "__main__":
    main()
