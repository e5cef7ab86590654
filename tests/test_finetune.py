"""steps/training/finetune.py: what another network's weights give, by names of channels and classes; what is frozen."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from planned import a_configuration, a_network, a_planned_run
from safetensors.numpy import load_file, save_file
from synthetic import write_dataset
from torch import Tensor

from autoseg.errors import UserError
from autoseg.events import Event, Trained, Warned
from autoseg.layout import Layout
from autoseg.network import unet
from autoseg.network.distributed import ALONE
from autoseg.records import AugmentSpec, Configuration, Dataset, NetworkSpec, Plan, Region, Run, TrainSpec
from autoseg.steps.train import train
from autoseg.steps.training.finetune import Donor, Names, donor_of, freeze, load_donor, names_of, short_list, take_over
from autoseg.steps.training.options import Machine, Options
from autoseg.steps.training.work import look_up
from autoseg.store import load, save


def tiny(**changes: object) -> Configuration:
    spec = TrainSpec(
        epochs=2, steps_per_epoch=2, warmup_steps=1, average_decay=0.9, augment=AugmentSpec(rotation_rad=(0.5,) * 3)
    )
    return a_configuration(network=a_network(), train=spec, **changes)


def network(seed: int, **changes: object) -> unet.UNet:
    torch.manual_seed(seed)
    built = unet.build(NetworkSpec.model_validate(a_network().model_dump() | changes))
    for name, weight in built.named_parameters():
        if name.startswith("head."):  # no zeros: every row must be told from another
            torch.nn.init.normal_(weight)
    return built


def weights(of: torch.nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in of.state_dict().items()}


def test_everything_is_taken_where_everything_fits() -> None:
    ours, theirs, names = network(0), network(1), Names(("T1",), ("background", "a", "b"))
    assert take_over(ours, names, Donor(Path("x"), weights(theirs), names)) == ()
    assert all(torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items())


@pytest.mark.parametrize("kind", ["plain", "residual"])
def test_channels_are_taken_by_name_and_unknown_ones_are_the_mean(kind: str) -> None:
    ours, theirs = network(0, in_channels=3, kind=kind), network(1, in_channels=2, kind=kind)
    name = "stem.conv.weight" if kind == "residual" else "encoder.0.0.conv.weight"
    labels = ("background", "a", "b")
    donor = Donor(Path("x"), weights(theirs), Names(("T1", "T2"), labels))
    assert take_over(ours, Names(("T2", "FLAIR", "T1"), labels), donor) == ()
    found, given = ours.state_dict()[name], theirs.state_dict()[name]
    for channel, expected in enumerate((given[:, 1], given.mean(1), given[:, 0])):
        torch.testing.assert_close(found[:, channel], expected)


def test_classes_are_taken_by_name_and_new_ones_stay_fresh() -> None:
    ours, theirs = network(0, classes=4), network(1)
    before = weights(ours)
    donor = Donor(Path("x"), weights(theirs), Names(("T1",), ("background", "liver", "spleen")))
    take_over(ours, Names(("T1",), ("nothing", "spleen", "kidney", "liver")), donor)
    for name in ("head.0.weight", "head.0.bias"):
        found, given = ours.state_dict()[name], theirs.state_dict()[name]
        assert torch.equal(found[[0, 1, 3]], given[[0, 2, 1]])
        assert torch.equal(found[2], before[name][2])


def test_regions_are_taken_by_name_and_classes_are_no_regions() -> None:
    ours, theirs = network(0), network(1)
    before, regions = weights(ours), ("whole", "core", "inner")
    donor = Donor(Path("x"), weights(theirs), Names(("T1",), regions, are_regions=True))
    fresh = take_over(ours, Names(("T1",), ("core", "whole", "rim"), are_regions=True), donor)
    assert fresh == ()
    found, given = ours.state_dict()["head.0.weight"], theirs.state_dict()["head.0.weight"]
    assert torch.equal(found[:2], given[[1, 0]])
    assert torch.equal(found[2], before["head.0.weight"][2])
    fresh = take_over(network(0), Names(("T1",), ("background", "core", "whole")), donor)
    assert set(fresh) == {"head.0.weight", "head.0.bias"}


def test_without_names_only_equal_shapes_are_taken() -> None:
    ours, theirs = network(0, classes=4), network(1)
    fresh = take_over(ours, Names(("T1",), ("background", "a", "b", "c")), Donor(Path("x"), weights(theirs), Names()))
    assert set(fresh) == {"head.0.weight", "head.0.bias"}


def test_other_features_leave_their_tensors_fresh_and_nothing_at_all_is_refused() -> None:
    names = Names(("T1",), ("background", "a", "b"))
    ours = network(0, features=(4, 16))
    fresh = take_over(ours, names, Donor(Path("x"), weights(network(1)), names))
    assert set(fresh) == {
        "encoder.1.0.conv.weight", "encoder.1.0.norm.weight", "encoder.1.0.norm.bias", "up.0.weight",
    }  # fmt: skip
    assert short_list(("a", "b", "c", "d", "e", "f", "g")) == "a, b, c, d, e and 2 more"
    with pytest.raises(UserError, match="nothing of it fits"):
        take_over(network(0, features=(5, 7)), names, Donor(Path("x"), weights(network(1)), names))


def test_only_what_is_known_can_be_frozen() -> None:
    ours = network(0)
    freeze(ours, "encoder")
    frozen = {name.split(".")[0] for name, weight in ours.named_parameters() if not weight.requires_grad}
    assert frozen == {"encoder"}
    assert any(weight.requires_grad for weight in ours.parameters())
    with pytest.raises(UserError, match="--freeze decoder: only encoder"):
        freeze(ours, "decoder")


def test_a_cascade_also_sees_what_was_found_before() -> None:
    assert names_of(("CT",), ("background", "a", "b"), True).inputs == ("CT", "previous a", "previous b")


# ------------------------------------------------------------------------------------------------ as a command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a trained run "old", and a planned one "new" whose labels have another order and name."""
    place = tmp_path_factory.mktemp("finetune")
    old = a_planned_run(place / "old", write_dataset(place / "data", cases=4, shape=(8, 10, 12)), tiny())
    train(old, epochs=1, device="cpu", workers=1)
    shutil.copytree(old, place / "new", ignore=shutil.ignore_patterns("models"))
    return place


@pytest.fixture
def new(runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("autoseg.steps.training.learn.draw_curves", lambda path, history: None)
    shutil.copytree(runs / "new", tmp_path / "new")
    return tmp_path / "new"


def test_frozen_weights_stay_those_of_the_other_run_also_after_a_stop(runs: Path, new: Path) -> None:
    given = load_file(Layout(runs / "old").model("3d", "0").weights)

    def stop(event: Event) -> None:
        if isinstance(event, Trained):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(new, init=str(runs / "old"), freeze="encoder", device="cpu", workers=1, report=stop)
    model = Layout(new).model("3d", "0")
    said: list[Event] = []
    record = train(
        new, init=str(runs / "old"), freeze="encoder", resume="auto", device="cpu", workers=1, report=said.append
    )
    assert not [event for event in said if isinstance(event, Warned)]
    assert (record.init, record.freeze, record.fresh, record.finished) == (str(runs / "old"), "encoder", (), True)
    record = train(new, resume="extend", epochs=3, device="cpu", workers=1)
    assert record.steps == 6
    found = load_file(model.weights)
    same = {name: np.array_equal(found[name], given[name]) for name in found}
    assert all(equal for name, equal in same.items() if name.startswith("encoder."))
    assert not any(equal for name, equal in same.items() if name.endswith(".conv.weight") and "decoder" in name)
    with pytest.raises(UserError, match="this training began with"):
        train(new, resume="yes", init=str(runs), device="cpu")


def test_what_cannot_be_begun_with_is_refused_before_anything_is_written(runs: Path, new: Path) -> None:
    before = sorted(new.rglob("*"))
    for options, message in (
        ({"init": str(new)}, "3d is not trained there \\(trained: nothing\\)"),
        ({"freeze": "encoder"}, "random ones here"),
    ):
        with pytest.raises(UserError, match=message):
            train(new, device="cpu", **options)  # type: ignore[arg-type]
    assert sorted(new.rglob("*")) == before
    plan = load(Layout(new).plan, Plan)
    wider = a_network().model_copy(update={"features": (4, 12)})
    changed = plan.configurations[0].model_copy(update={"network": wider})
    save(Layout(new).plan, plan.model_copy(update={"configurations": (changed,)}))
    with pytest.raises(UserError, match=r"--freeze encoder: 3 of its tensors .*random: encoder\.1\.0\.conv\.weight"):
        train(new, device="cpu", init=str(runs / "old"), freeze="encoder")
    dataset = load(Layout(new).dataset, Dataset)
    partly = dataset.cases[0].model_copy(update={"annotated": ("tumour",)})
    save(Layout(new).dataset, dataset.model_copy(update={"cases": (partly, *dataset.cases[1:])}))
    with pytest.raises(UserError, match="annotated is 'tumour', which nothing is called"):
        train(new, device="cpu")
    assert sorted(new.rglob("*")) == before
    own = Layout(runs / "old").model("3d", "0")
    with pytest.raises(UserError, match="the network to be trained"):
        donor_of(str(runs / "old"), "3d", "0", 0, own)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "old", "freeze": "encodr"}, "--freeze encodr: only encoder"),
        ({"init": "torn"}, "no valid safetensors file"),
        ({"init": "other"}, "nothing of it fits"),
        ({"tensorboard": True}, "TensorBoard is not installed"),
    ],
)
def test_what_cannot_be_begun_deletes_nothing_of_what_was_to_be_overwritten(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object], message: str
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    model = Layout(runs / "old").model("3d", "0")
    shutil.copytree(model.root, tmp_path / "old")
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "weights.safetensors").write_bytes(model.weights.read_bytes()[:100])
    (tmp_path / "other").mkdir()
    save_file({"other.weight": np.zeros((1, 1, 1, 1, 1))}, tmp_path / "other" / "weights.safetensors")
    before = sorted(model.root.rglob("*"))
    if "init" in options:
        options = options | {"init": str(tmp_path / str(options["init"]))}
    with pytest.raises(UserError, match=message):
        train(runs / "old", resume="restart", device="cpu", workers=1, **options)  # type: ignore[arg-type]
    assert sorted(model.root.rglob("*")) == before


def test_weights_that_know_the_validation_cases_are_warned_of(runs: Path, new: Path) -> None:
    def warned(run: Path, fold: str) -> list[str]:
        said: list[Event] = []
        asked = Options(init=str(runs / "old"))
        look_up(run, None, fold, 1, "no", asked, Machine("cpu"), ALONE, said.append)
        return [event.text for event in said if isinstance(event, Warned) and event.text.startswith("--init")]

    assert warned(runs / "old", "0") == warned(new, "0") == []
    (own,), (other,) = warned(runs / "old", "1"), warned(new, "1")
    assert re.search(r"fold_0 learned from 1 of the 1 validation cases \(case_\d+\): scores there are better", own)
    assert "cases that are named like 1 of the 1 validation cases" in other


def test_an_old_record_without_names_takes_them_from_its_plan(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "old", tmp_path / "old")
    model = Layout(tmp_path / "old").model("3d", "0")
    known = load_donor(model).names
    assert known.outputs == ("background", "large", "small")
    save(model.run, load(model.run, Run).model_copy(update={"channels": (), "labels": ()}))
    assert load_donor(model).names == known
    plan = load(Layout(tmp_path / "old").plan, Plan)
    regions = tuple(Region(name=name, labels=(plan.labels[1].value,), paint=7) for name in ("whole", "core", "inner"))
    save(Layout(tmp_path / "old").plan, plan.model_copy(update={"regions": regions}))
    save(model.run, load(model.run, Run).model_copy(update={"labels": ("background", "a", "b", "c")}))
    assert load_donor(model).names.outputs == ("whole", "core", "inner")
    assert load_donor(model).names.are_regions
