"""network/nnunet.py: architectures, checkpoints and weights of nnU-Net's networks, against outputs nnU-Net gave.

`tests/nnunet_outputs.json` was written by `bench/nnunet_weights.py` with the installed peer: the names and shapes of
its weights and some of its logits, where weights and images are made by a formula that both sides compute (`filled`).
"""

import io
import json
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autoseg import store
from autoseg.errors import UserError
from autoseg.network import nnunet
from autoseg.network.export import slabs
from autoseg.network.unet import UNet
from autoseg.records import Plan
from autoseg.steps.import_nnunet import import_nnunet
from autoseg.steps.predict import Predictor

RECORDED = json.loads((Path(__file__).parent / "nnunet_outputs.json").read_text())
PLAIN = RECORDED["plain 3D"]


def filled(shape: tuple[int, ...], number: int, name: str) -> Tensor:
    """Numbers between -1 and 1 that shape and position in the list decide; scaled to keep what flows through alike."""
    values = torch.sin(torch.arange(math.prod(shape), dtype=torch.float64) * 1.7 + number).reshape(shape).float()
    if name.endswith("running_var"):
        return 1.5 + values
    if len(shape) > 1:
        return values * math.sqrt(4.0 / math.prod(shape[1:]))
    return 1.0 + 0.5 * values if name.endswith("weight") else 0.3 * values


def weights_of(recorded: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: filled(tuple(shape), number, name) if shape else torch.tensor(number)
        for number, (name, shape) in enumerate(recorded["weights"].items())
    }


def spec_of(recorded: dict[str, Any]) -> Any:
    return nnunet.spec_from_nnunet(recorded["architecture"], recorded["in_channels"], recorded["classes"])


@pytest.mark.parametrize("name", RECORDED)
def test_weights_of_the_peer_give_the_logits_that_the_peer_gave(name: str) -> None:
    recorded = RECORDED[name]
    network = UNet(spec_of(recorded))
    network.load_state_dict(nnunet.weights_from_nnunet(weights_of(recorded), network.spec))
    image = filled(tuple(recorded["image"]), 5, "image.values")
    for module in network.modules():  # every level puts out its logits only in training; norms and dropout must not
        module.training = module is network
    with torch.no_grad():
        levels = network(image)
    assert len(levels) == len(recorded["logits"])
    for logits, expected in zip(levels, recorded["logits"], strict=True):
        assert list(logits.shape) == expected["shape"]
        assert logits.abs().max() > 0.1
        found = logits.flatten()[:: expected["every"]]
        torch.testing.assert_close(found, torch.tensor(expected["values"]), rtol=0, atol=1e-5)


def test_the_peers_own_networks_give_the_same_logits_where_they_are_installed() -> None:
    unets = pytest.importorskip(
        "dynamic_network_architectures.architectures.unet",
        reason="nnU-Net's networks are not installed; they would bring timm and torchvision, so the tests do without",
    )
    for name, recorded in RECORDED.items():
        kind, arguments = recorded["architecture"]["network_class_name"].rsplit(".", 1)[1], {}
        for key, value in recorded["architecture"]["arch_kwargs"].items():
            arguments[key] = _located(value) if key in recorded["architecture"]["_kw_requires_import"] else value
        theirs = getattr(unets, kind)(recorded["in_channels"], num_classes=recorded["classes"], **arguments).eval()
        ours = UNet(spec_of(recorded)).eval()
        ours.load_state_dict(nnunet.weights_from_nnunet(theirs.state_dict(), ours.spec))
        image = torch.randn(recorded["image"])
        with torch.no_grad():
            torch.testing.assert_close(ours(image), theirs(image), rtol=0, atol=1e-5, msg=name)


def _located(dotted: str | None) -> Any:
    import pydoc

    return None if dotted is None else pydoc.locate(dotted)


# ------------------------------------------------------------------------------------------------ names and shapes


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_names_of_distributed_and_compiled_networks_are_the_same_weights(prefix: str) -> None:
    weights, spec = weights_of(PLAIN), spec_of(PLAIN)
    wanted = nnunet.weights_from_nnunet(weights, spec)
    found = nnunet.weights_from_nnunet({prefix + name: tensor for name, tensor in weights.items()}, spec)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_without_deep_supervision_only_the_finest_head_is_taken() -> None:
    spec = spec_of(PLAIN).model_copy(update={"deep_supervision": False})
    found = nnunet.weights_from_nnunet(weights_of(PLAIN), spec)
    last = max(int(name.split(".")[2]) for name in PLAIN["weights"] if name.startswith("decoder.seg_layers"))
    assert {name for name in found if name.startswith("head")} == {"head.0.weight", "head.0.bias"}
    assert torch.equal(found["head.0.weight"], weights_of(PLAIN)[f"decoder.seg_layers.{last}.weight"])


def test_a_weight_that_is_missing_too_much_or_of_another_shape_is_named() -> None:
    weights, spec = weights_of(PLAIN), spec_of(PLAIN)
    name = "encoder.stages.1.0.convs.0.conv.weight"
    with pytest.raises(UserError, match=r"lack encoder\.1\.0\.conv\.weight"):
        nnunet.weights_from_nnunet({n: t for n, t in weights.items() if n != name}, spec)
    with pytest.raises(UserError, match=r"encoder\.1\.0\.conv\.weight has shape"):
        nnunet.weights_from_nnunet(weights | {name: torch.zeros(1)}, spec)
    with pytest.raises(UserError, match=r"encoder\.stages\.7\.attention\.weight has no counterpart"):
        nnunet.weights_from_nnunet(weights | {"encoder.stages.7.attention.weight": torch.zeros(1)}, spec)
    with pytest.raises(UserError, match=r"encoder\.7\.0\.conv\.weight and 0 more have no place"):
        nnunet.weights_from_nnunet(weights | {"encoder.stages.7.0.convs.0.conv.weight": torch.zeros(1)}, spec)


# ------------------------------------------------------------------------------------------------ architectures


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("nonlin", "torch.nn.ReLU"), ("norm_op", None), ("norm_op_kwargs", {"eps": 1e-3, "affine": True}),
        ("norm_op_kwargs", {"eps": 1e-5}), ("nonlin_kwargs", {"negative_slope": 0.2}), ("nonlin_first", True),
        ("conv_op", "torch.nn.Conv1d"), ("dropout_op", "torch.nn.AlphaDropout"), ("stem_channels", 3),
        ("block", "some.OtherBlock"), ("strides", [[2, 2, 2]] * 3),
    ],
)  # fmt: skip
def test_what_our_network_would_compute_otherwise_is_refused_with_what_is_known(field: str, value: Any) -> None:
    architecture = PLAIN["architecture"]
    changed = architecture | {"arch_kwargs": architecture["arch_kwargs"] | {field: value}}
    with pytest.raises(UserError, match=r"has no counterpart here\. .*Known are"):
        nnunet.spec_from_nnunet(changed, 1, 2)


def test_another_architecture_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UserError, match=r"'Primus' is not known here. .*PlainConvUNet and ResidualEncoderUNet"):
        nnunet.spec_from_nnunet({"network_class_name": "some.where.Primus", "arch_kwargs": {}}, 1, 2)


def test_one_number_stands_for_all_stages_and_axes() -> None:
    arguments = PLAIN["architecture"]["arch_kwargs"] | {"kernel_sizes": 3, "n_conv_per_stage": 2}
    spec = nnunet.spec_from_nnunet({"network_class_name": "PlainConvUNet", "arch_kwargs": arguments}, 1, 2)
    assert spec.kernels == ((3, 3, 3),) * 3
    assert spec.encoder_blocks == (2, 2, 2)


def test_plans_before_2_5_and_inherited_configurations_are_understood() -> None:
    old = {
        "UNet_class_name": "PlainConvUNet", "UNet_base_num_features": 8, "unet_max_num_features": 12,
        "n_conv_per_stage_encoder": [2, 1, 2], "n_conv_per_stage_decoder": [2, 1], "patch_size": [16, 16],
        "conv_kernel_sizes": [[3, 3]] * 3, "pool_op_kernel_sizes": [[1, 1], [2, 2], [2, 2]],
        "num_pool_per_axis": [2, 2],
    }  # fmt: skip
    plans = {"configurations": {"2d": old, "2d_wide": {"inherits_from": "2d", "UNet_base_num_features": 10}}}
    spec = nnunet.spec_from_nnunet(nnunet.architecture_of(plans, "2d"), 1, 2)
    assert (spec.features, spec.encoder_blocks, spec.decoder_blocks) == ((8, 12, 12), (2, 1, 2), (1, 2))
    assert (spec.dimension, spec.norm, spec.bias) == (2, "instance", True)
    wide = nnunet.spec_from_nnunet(nnunet.architecture_of(plans, "2d_wide"), 1, 2)
    assert wide == spec.model_copy(update={"features": (10, 12, 12)})
    with pytest.raises(UserError, match=r"no configuration '3d'.*2d, 2d_wide"):
        nnunet.architecture_of(plans, "3d")
    with pytest.raises(UserError, match="names no architecture"):
        nnunet.architecture_of({"configurations": {"2d": {}}}, "2d")


# ------------------------------------------------------------------------------------------------ checkpoints


def a_model_folder(folder: Path, configuration: str = "3d_fullres", **more: Any) -> Path:
    """What nnU-Net leaves behind, with NumPy numbers in its log."""
    model = folder / f"nnUNetTrainer__nnUNetPlans__{configuration}"
    (model / "fold_0").mkdir(parents=True)
    spread = {"mean": 50.0, "std": 20.0, "median": 50.0, "min": 0.0, "max": 100.0}
    spread |= {"percentile_00_5": 0.5, "percentile_99_5": 99.5}
    plans = {
        "dataset_name": "Dataset001_Any", "transpose_forward": [1, 0, 2],
        "original_median_shape_after_transp": [8, 16, 16],
        "foreground_intensity_properties_per_channel": {"0": spread, "1": spread},
        "configurations": {configuration: {
            "architecture": PLAIN["architecture"], "patch_size": [8, 16, 16], "batch_size": 2,
            "spacing": [2.0, 1.0, 0.5], "median_image_size_in_voxels": [8.0, 16.0, 16.0],
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"], "use_mask_for_norm": [False, False],
            "resampling_fn_data_kwargs": {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None},
        }},
    }  # fmt: skip
    labels = {"background": 0} | {f"class {k}": k for k in range(1, PLAIN["classes"])}
    dataset = {"channel_names": {str(c): "MRI" for c in range(PLAIN["in_channels"])}, "labels": labels}
    dataset["file_ending"] = ".nii.gz"
    (model / "plans.json").write_text(json.dumps(plans))
    (model / "dataset.json").write_text(json.dumps(dataset))
    log = {"mean_fg_dice": [np.float64(0.5), np.float32(0.25)], "ema": np.arange(3.0)}
    checkpoint = {"network_weights": weights_of(PLAIN), "logging": log, "_best_ema": np.float64(0.5)} | more
    torch.save(checkpoint, model / "fold_0" / "checkpoint_final.pth")
    return model


def test_an_imported_model_predicts_what_the_peer_predicts_with_its_own_grid_and_mirroring(tmp_path: Path) -> None:
    folder = a_model_folder(tmp_path, inference_allowed_mirroring_axes=(0, 2))
    made = import_nnunet(folder, tmp_path / "run")
    planned = made.configurations[0]
    assert (planned.name, planned.patch_voxels, planned.axes) == ("3d", (8, 16, 16), (1, 0, 2))
    assert (planned.spacing_mm, planned.normalization) == ((2.0, 1.0, 0.5), ("ct", "zscore"))
    assert planned.train.augment.mirror_axes == (0, 2)
    assert [(label.name, label.value) for label in made.labels] == [("background", 0), ("class 1", 1), ("class 2", 2)]
    assert made.intensities[0].percentile_99_5 == 99.5
    predictor = Predictor(tmp_path / "run", device="cpu", mirroring=False)
    image, expected = filled(tuple(PLAIN["image"]), 5, "image.values"), PLAIN["logits"][0]
    with torch.no_grad():
        found = predictor._networks[0](image).flatten()[:: expected["every"]]
    torch.testing.assert_close(found, torch.tensor(expected["values"]), rtol=0, atol=1e-5)
    assert predictor(image[0].numpy(), (1.0, 2.0, 0.5)).shape == (8, 16, 16)


def test_regions_are_imported_with_what_they_paint(tmp_path: Path) -> None:
    folder = a_model_folder(tmp_path)
    labels = {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "inner": 3}
    content = json.loads((folder / "dataset.json").read_text()) | {"labels": labels, "regions_class_order": [1, 2, 3]}
    (folder / "dataset.json").write_text(json.dumps(content))
    made = import_nnunet(folder, tmp_path / "run")
    assert [(each.name, each.labels, each.paint) for each in made.regions] == [
        ("whole", (1, 2, 3), 1), ("core", (2, 3), 2), ("inner", (3,), 3),
    ]  # fmt: skip
    image = filled(tuple(PLAIN["image"]), 5, "image.values")
    predictor = Predictor(tmp_path / "run", device="cpu", mirroring=False)
    with torch.no_grad():
        logits_KZYX = predictor._networks[0](image)[0]
    painted = np.zeros((8, 16, 16), int)
    for value, logits_ZYX in enumerate(logits_KZYX, 1):
        painted[logits_ZYX.numpy() > 0] = value
    scores = predictor.scorer(predictor.wanted(False, False))
    assert (scores.activation, scores.channels) == ("sigmoid", 3)
    [slab] = slabs([logits_KZYX], (8, 16, 16), (None, None, None), predictor.wanted(False, False))
    assert np.array_equal(slab.labels_ZYX, painted)


def test_a_second_configuration_is_imported_beside_the_first(tmp_path: Path) -> None:
    run = tmp_path / "run"
    import_nnunet(a_model_folder(tmp_path), run)
    import_nnunet(a_model_folder(tmp_path, "3d_lowres"), run)
    made = import_nnunet(a_model_folder(tmp_path / "again"), run)
    assert [each.name for each in made.configurations] == ["3d_lowres", "3d"]
    assert [each.field for each in made.choices] == ["3d_lowres.network", "3d.network"]
    assert store.load(run / "plan.json", Plan) == made


def test_what_cannot_be_imported_is_said(tmp_path: Path) -> None:
    folder = a_model_folder(tmp_path)
    with pytest.raises(UserError, match=r"no fold has a checkpoint_best\.pth"):
        import_nnunet(folder, tmp_path / "run", checkpoint_name="checkpoint_best.pth")
    for file, changes, sentence in (
        ("dataset.json", {"labels": {"background": 0, "whole": [1, 2]}}, "whole need 'regions_class_order'"),
        ("plans.json", {"previous_stage": "3d_lowres"}, "second stage of a cascade"),
        ("plans.json", {"normalization_schemes": ["Own", "Own"]}, "Own is not known here. Known are ZScore"),
        ("plans.json", {"resampling_fn_data": "no_resampling_hack"}, "resampled by no_resampling_hack"),
        ("plans.json", {"resampling_fn_data_kwargs": {"force_separate_z": True}}, "resampled slices apart"),
    ):
        original = (folder / file).read_text()
        content = json.loads(original)
        (content if file == "dataset.json" else content["configurations"]["3d_fullres"]).update(changes)
        (folder / file).write_text(json.dumps(content))
        with pytest.raises(UserError, match=sentence):
            import_nnunet(folder, tmp_path / "run")
        (folder / file).write_text(original)
    plans = json.loads((folder / "plans.json").read_text())
    for reader in ("NibabelIOWithReorient", "SimpleITKIOWithReorient", "Tiff3DIO", "Own"):
        (folder / "plans.json").write_text(json.dumps(plans | {"image_reader_writer": reader}))
        with pytest.raises(UserError, match=rf"images by {reader}, which.* Known are SimpleITKIO, NibabelIO, Natural"):
            import_nnunet(folder, tmp_path / "run")
    (folder / "plans.json").write_text(json.dumps(plans))
    made = import_nnunet(folder, tmp_path / "run")
    store.save(tmp_path / "run" / "plan.json", made.model_copy(update={"preset": "standard"}))
    with pytest.raises(UserError, match="was planned here"):
        import_nnunet(folder, tmp_path / "run")
    store.save(tmp_path / "run" / "plan.json", made.model_copy(update={"channels": ("other",)}))
    with pytest.raises(UserError, match="another data set"):
        import_nnunet(folder, tmp_path / "run")


def test_linear_resampling_without_thick_axes_is_imported(tmp_path: Path) -> None:
    folder = a_model_folder(tmp_path)
    plans = json.loads((folder / "plans.json").read_text())
    how = {f"resampling_fn_{what}": "resample_torch_fornnunet" for what in ("data", "seg")}
    how |= {f"resampling_fn_{what}_kwargs": {"force_separate_z": False} for what in ("data", "seg")}
    plans["configurations"]["3d_fullres"].update(how)
    (folder / "plans.json").write_text(json.dumps(plans))
    dataset = json.loads((folder / "dataset.json").read_text())
    dataset["modality"] = dataset.pop("channel_names")
    (folder / "dataset.json").write_text(json.dumps(dataset))
    made = import_nnunet(folder, tmp_path / "run")
    resampling = made.configurations[0].resampling
    assert (resampling.image_order, resampling.label_order, resampling.anisotropy) == (1, 1, 1e9)
    assert made.channels == ("MRI", "MRI")


class _Harmful:
    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("ran"),)


def test_a_checkpoint_that_would_run_something_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="could run code when it is read"):
        import_nnunet(a_model_folder(tmp_path, trainer=_Harmful()), tmp_path / "run")
    assert not Path("ran").exists()


@pytest.mark.parametrize("content", [b"", b"no checkpoint", pickle.dumps([1, 2], protocol=2)])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "checkpoint_final.pth"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"checkpoint_final\.pth"):
        nnunet.read_checkpoint(path)


def test_a_missing_file_and_one_without_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        nnunet.read_checkpoint(tmp_path / "checkpoint_best.pth")
    with pytest.raises(UserError, match=r"plans\.json: no such file"):
        import_nnunet(tmp_path, tmp_path / "run")
    buffer = io.BytesIO()
    torch.save({"state_dict": {}}, buffer)
    (tmp_path / "other.pth").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="no `network_weights`"):
        nnunet.read_checkpoint(tmp_path / "other.pth")
