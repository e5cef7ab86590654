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


def test_the_median_shape_follows_a_spacing_set_by_hand() -> None:
    slices, volumes = (each.median_shape_voxels for each in PLAN.configurations)
    assert (slices, volumes) == ((36, 50, 35), (36, 50, 35))
    edited = edit(PLAN, ["2d.spacing_mm=null,0.5,1", "3d.spacing_mm=2,0.5,1"])
    assert [each.median_shape_voxels for each in edited.configurations] == [(36, 100, 35), (18, 100, 35)]
    [choice] = [each for each in edited.choices if each.field == "3d.median_shape_voxels"]
    assert choice.value == "18 x 100 x 35"
    assert choice.because == "what the images come to at 2 x 0.5 x 1 mm, set by hand."
    both = edit(PLAN, ["3d.spacing_mm=2,0.5,1", "3d.median_shape_voxels=9,9,9"])
    assert both.configurations[1].median_shape_voxels == (9, 9, 9)


def test_slices_of_2d_files_stay_the_first_axis() -> None:
    flat = make_plan(fingerprint(alike(20, shape=(1, 64, 64)), dimension=2), budget(8), counting())
    with pytest.raises(UserError, match=r"axes is \(1, 0, 2\), but the first has to be that of the slice"):
        edit(flat, ["2d.axes=1,0,2"])


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
        ("3d.median_shape_voxels=0,0,0", "median_shape_voxels.0: Input should be greater than 0", ""),
        ("3d.resampling.anisotropy=0", "resampling.anisotropy: Input should be greater than or equal to 1", ""),
        ("3d.network.strides=[[2,2,2],[2,2,2],[2,2,2],[1,1,1]]", r"strides begin with \(2, 2, 2\)", ""),
        ("3d.network.kernels=[[2,2,2],[3,3,3],[3,3,3],[3,3,3]]", r"kernels have \(2, 2, 2\), but only odd", ""),
        ("3d.network.decoder_blocks=0,2,2", "decoder_blocks.0: Input should be greater than 0", ""),
        ("3d.network.dropout=1", "network.dropout: Input should be less than 1", ""),
        ("3d.train.average_decay=1", "train.average_decay: Input should be less than 1", ""),
        ("3d.train.augment.rotation_rad=0.5", "rotation_rad has 1 angles for a patch with 3 axes", "three angles"),
        ("3d.train.augment.scale_range=1.4,0.7", r"scale_range is \(1.4, 0.7\)", ""),
        ("3d.spacing_mm=null,1,1", r"spacing_mm is \[null, 1.0, 1.0\], but a volume has three", "null in 2D"),
        ("2d.spacing_mm=1,1,1", "but slices are never resampled across", "null in 2D"),
        ("3d.spacing_mm=1e-9,1,1", "the median image would have 6.3e\\+13 voxels", "coarser"),
        ("3d.memory.peak_bytes=5", "is read, not set", "patch_voxels"),
        ("3d.previous=3d", "3d follows itself: 3d after 3d", ""),
    ],
)
def test_an_edit_that_makes_no_sense_is_refused(change: str, message: str, fix: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        edit(PLAN, [change])
    assert fix in caught.value.fix
