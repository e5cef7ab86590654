"""Plans changed by hand, field by field."""

import pytest
from fingerprints import alike, budget, counting, fingerprint

from autoseg.errors import UserError
from autoseg.planning.edit import edit
from autoseg.planning.plan import make_plan

PLAN = make_plan(fingerprint(alike(200)), budget(8), counting())


def test_an_edit_changes_its_field_and_says_what_it_was() -> None:
    edited = edit(PLAN, ["3d.patch_voxels=48,64,40", "2d.train.loss=ce", "3d.train.augment.mirror_axes=[]"])
    slices, volumes = edited.configurations
    assert volumes.patch_voxels == (48, 64, 40)
    assert volumes.train.augment.mirror_axes == ()
    assert (slices.train.loss, volumes.train.loss) == ("ce", "dice_ce")
    choices = {choice.field: choice for choice in edited.choices}
    assert len(choices) == len(edited.choices)
    assert choices["3d.patch_voxels"].value == "48,64,40"
    assert choices["3d.patch_voxels"].because == "set by hand; it was [40, 56, 40]."
    assert choices["2d.train.loss"].because == 'set by hand; it was "dice_ce".'
    assert PLAN.configurations[1].patch_voxels == (40, 56, 40)


def test_an_edit_takes_the_place_of_what_was_said_for_all_where_there_is_one_configuration() -> None:
    flat = make_plan(fingerprint(alike(20, shape=(1, 64, 64)), dimension=2), budget(8), counting())
    fields = [choice.field for choice in edit(flat, ["2d.train.epochs=9"]).choices]
    assert ("train.epochs" in fields, "2d.train.epochs" in fields) == (False, True)
    assert "train.epochs" in [choice.field for choice in edit(PLAN, ["2d.train.epochs=9"]).choices]


@pytest.mark.parametrize(
    ("change", "message", "fix"),
    [
        ("3d.patch_voxels=40,57,44", r"the nearest that work are \(40, 56, 40\) and \(40, 64, 48\)", ""),
        ("3d.patch_voxels", "a field and its value are needed", "3d.patch_voxels=48,64,48"),
        ("4d.patch_voxels=8,8,8", "begin with a configuration", "Choose one of 2d, 3d"),
        ("3d=8", "begin with a configuration", "Choose one of 2d, 3d"),
        ("3d.patch=8,8,8", "there is no field 'patch'", "patch_voxels"),
        ("3d.batch_size.x=8", "there is no field 'x'", ""),
        ("3d.batch_size=0", "batch_size: Input should be greater than or equal to 1", ""),
        ("3d.batch_size=many", "batch_size: Input should be a valid integer", ""),
        ("3d.network.strides=[[1,1,1],[0,2,2],[2,2,2],[1,1,1]]", "strides.1.0: Input should be greater than 0", ""),
        ("3d.network.features=-1,2,3,4", "features.0: Input should be greater than 0", ""),
        ("3d.name=../x", r"a configuration called '\.\./x'", "without /"),
        ("3d.train.loss=dice_cee", "There is no loss 'dice_cee'", "dice_ce"),
        ('3d.train.class_rates=[["nobody",0.5]]', "there is no class 'nobody'", "The classes are"),
        ("3d.axes=0,0,1", r"axes is \(0, 0, 1\)", "in the order"),
        ("2d.train.augment.mirror_axes=2", r"mirror_axes is \(2,\), but the patch has 2 axes", "0, 1"),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(change: str, message: str, fix: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        edit(PLAN, [change])
    assert fix in caught.value.fix
