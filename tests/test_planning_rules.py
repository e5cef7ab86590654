"""The small rules: spacing, axes, shape, normalization, batch, augmentation, awareness, checks."""

from math import pi, prod

import pytest
from fingerprints import alike, case, fingerprint

from autoseg.errors import UserError
from autoseg.image.normalize import NORMALIZATIONS
from autoseg.planning import awareness
from autoseg.planning.batch import batch_cap, choose_norm
from autoseg.planning.checks import check_fingerprint
from autoseg.planning.normalization import KNOWN, RULES, choose_masks, choose_normalization, warnings_of
from autoseg.planning.spacing import (
    asked_spacing,
    choose_axes,
    choose_spacing,
    coarser,
    median_shape,
    percentile,
    transposed,
    warn_of_spacings,
)
from autoseg.planning.train import (
    AXIAL,
    choose_augment,
    choose_sampling,
    choose_train,
    orientations_of,
    sided_labels,
    tubes,
    warn_of_mixed,
)
from autoseg.records import PatientAxes3, Region


def test_target_spacing_is_the_median_per_axis() -> None:
    spacings = [(3.0, 0.5, 0.6), (2.0, 0.7, 0.7), (2.5, 0.9, 0.5)]
    cases = [case(shape=(200, 300, 300), spacing=each) for each in spacings]
    assert choose_spacing(fingerprint(cases))[0] == (2.5, 0.7, 0.6)


def test_a_thick_and_short_axis_takes_the_tenth_percentile() -> None:
    cases = [case(shape=(20, 300, 300), spacing=(z, 1.0, 1.0)) for z in (2.0, 4.0, 5.0, 5.0, 6.0)]
    spacing, choice = choose_spacing(fingerprint(cases))
    assert spacing == pytest.approx((2.8, 1.0, 1.0))
    assert "on axis Z the 10th percentile instead of the median 5 mm" in choice.because


def test_the_tenth_percentile_does_not_get_finer_than_the_other_axes() -> None:
    cases = [case(shape=(20, 300, 300), spacing=(z, 1.0, 1.0)) for z in (0.5, 0.5, 5.0, 5.0, 6.0)]
    spacing, choice = choose_spacing(fingerprint(cases))
    assert spacing == pytest.approx((1.00001, 1.0, 1.0), abs=1e-9)
    assert "that of the next coarsest axis (the 10th percentile, 0.5 mm, is finer still)" in choice.because


def test_a_thick_but_long_axis_keeps_the_median() -> None:
    cases = [case(shape=(150, 300, 300), spacing=(z, 1.0, 1.0)) for z in (2.0, 4.0, 5.0, 5.0, 6.0)]
    assert choose_spacing(fingerprint(cases))[0][0] == 5.0


def test_percentile_is_that_of_numpy() -> None:
    np = pytest.importorskip("numpy")
    values = [3.0, 1.0, 2.0, 8.0, 5.5, 4.0]
    assert percentile(values, 10) == pytest.approx(np.percentile(values, 10))


def test_the_coarsest_axis_comes_first() -> None:
    assert choose_axes((0.8, 0.8, 3.0), 3)[0] == (2, 0, 1)
    assert choose_axes((0.8, 3.0, 0.8), 3)[0] == (1, 0, 2)
    assert choose_axes((1.0, 1.0, 1.0), 3)[0] == (0, 1, 2)
    assert choose_axes((1.0, 2.0, 3.0), 2)[0] == (0, 1, 2)
    assert transposed(("z", "y", "x"), (2, 0, 1)) == ("x", "z", "y")


@pytest.mark.parametrize(
    ("asked", "dimension", "message"),
    [
        ((1.0, 1.0), 3, r"--spacing 1,1: 3 numbers above zero are needed for these 3D images. Write Z,Y,X"),
        ((1.0, 0.0, 1.0), 3, "--spacing 1,0,1: 3 numbers above zero"),
        ((1.0, float("nan"), 1.0), 3, "--spacing 1,nan,1: 3 numbers above zero"),
        ((1.0, float("inf"), 1.0), 3, "--spacing 1,inf,1: 3 numbers above zero"),
        ((1.0, 1.0, 1.0), 2, "2 numbers above zero are needed for these 2D images. Write Y,X"),
        ((1e-6, 1.0, 1.0), 3, r"--spacing 1e-06,1,1: the median image would have 6.3e\+10 voxels"),
    ],
)
def test_a_spacing_that_cannot_be_is_refused(asked: tuple, dimension: int, message: str) -> None:
    cases = alike(3, shape=(36 if dimension == 3 else 1, 50, 35))
    with pytest.raises(UserError, match=message):
        asked_spacing(fingerprint(cases, dimension=dimension), asked)


def test_of_several_coarsest_axes_none_is_called_the_coarsest() -> None:
    assert "axis Y of the files is one of the coarsest with 1 mm" in choose_axes((0.5, 1.0, 1.0), 3)[1].because
    assert "axis Z of the files is the coarsest with 3 mm" in choose_axes((3.0, 1.0, 1.0), 3)[1].because


def test_slices_of_2d_data_have_the_median_thickness() -> None:
    cases = [case(shape=(1, 300, 300), spacing=(z, 1.0, 1.0)) for z in (2.0, 4.0, 5.0, 5.0, 6.0)]
    spacing, choice = choose_spacing(fingerprint(cases, dimension=2))
    assert spacing == (5.0, 1.0, 1.0)
    assert "Z counts for nothing" in choice.because


@pytest.mark.parametrize(
    ("own", "dimension", "message"),
    [
        ([(5.0, 1.0, 1.0)] * 12 + [(1.0, 1.0, 5.0)] * 8, 3, "Z in 12, X in 8 of 20 cases"),
        ([(1.0, 1.0, 1.0)] * 3 + [(0.001, 0.001, 0.001)], 3, "case_003: a spacing such as 0.001 x 0.001 x 0.001 mm"),
        ([(5.0, 1.0, 1.0)] * 3 + [(5.0, 10.0, 10.0)], 2, "case_003: a spacing such as 5 x 10 x 10 mm"),
        ([(5.0, 1.0, 1.0)] * 3 + [(0.5, 1.0, 1.0), (1.0, 0.5, 0.5)], 3, ""),
        ([(5.0, 1.0, 1.0)] * 3 + [(0.005, 1.0, 1.0)], 2, ""),
    ],
)
def test_spacings_that_do_not_belong_together_are_warned_of(own: list, dimension: int, message: str) -> None:
    cases = [case(f"case_{n:03d}", spacing=each) for n, each in enumerate(own)]
    found = fingerprint(cases, dimension=dimension)
    warnings = warn_of_spacings(found, choose_spacing(found)[0])
    assert len(warnings) == bool(message)
    assert message in "".join(warnings)


def test_classes_and_regions_that_one_case_or_none_has_are_warned_of() -> None:
    cases = [*alike(3, class_voxels=(9000, 500, 0)), case("odd", class_voxels=(9000, 0, 7))]
    [alone] = awareness.warn_of_rare(fingerprint(cases))
    assert alone.startswith("posterior occurs in odd alone: the fold that validates on it learns nothing of posterior")
    [none] = awareness.warn_of_rare(fingerprint(cases[:3]))
    assert none == "posterior occurs in no case, so nothing can be learned of it."
    assert awareness.warn_of_rare(fingerprint(alike(1))) == ()
    whole = Region(name="whole", labels=(1, 2), paint=1)
    assert awareness.warn_of_rare(fingerprint(cases).model_copy(update={"regions": (whole,)})) == ()


def test_median_shape_is_that_after_resampling_with_halves_rounded_up() -> None:
    cases = [case(shape=(10, 100, 100), spacing=(2.0, 1.0, 1.0)), case(shape=(31, 80, 81), spacing=(1.0, 1.0, 1.0))]
    assert median_shape(cases, (1.0, 1.0, 1.0)) == (26, 90, 91)


def test_low_resolution_first_coarsens_the_fine_axes() -> None:
    assert coarser((3.0, 1.0, 1.0)) == pytest.approx((3.0, 1.03, 1.03))
    assert coarser((3.0, 1.6, 1.6)) == pytest.approx((3.09, 1.648, 1.648))


@pytest.mark.parametrize(
    ("channel", "expected"),
    [
        ("CT", "ct"), ("ct", "ct"), ("CT_venous", "ct"), ("CT image", "ct"), ("MRI", "zscore"), ("T1w", "zscore"),
        ("t1gd", "zscore"), ("FLAIR", "zscore"), ("ADC", "zscore"), ("LGE MRI", "zscore"), ("PET", "zscore"),
        ("red", "zscore"), ("R", "zscore"), ("channel_0", "zscore"), ("image", "zscore"), ("0", "zscore"),
        ("nonorm", "none"), ("noNormalization", "none"), ("rescale_to_0_1", "rescale_0_1"), ("rgb_to_0_1", "rgb_0_1"),
        ("z-score", "zscore"), ("zscore", "zscore"), ("cine-MRI", "zscore"), ("PET/MR", "zscore"), ("X-ray", "zscore"),
    ],
)  # fmt: skip
def test_normalization_follows_the_channel_name(channel: str, expected: str) -> None:
    (found,), (choice,) = choose_normalization([channel])
    assert found == choice.value == expected
    assert len(choice.because) > 10


@pytest.mark.parametrize("channel", ["Tmax", "CBF", "arterial", "mod0", "normal", ""])
def test_an_unknown_channel_is_z_scored_with_a_warning(channel: str) -> None:
    found, choices = choose_normalization(["CT", channel])
    assert found == ("ct", "zscore")
    assert "knows no modality" in choices[1].because
    (warning,) = warnings_of(["CT", channel])
    assert f"Channel {channel!r}: autoseg knows no modality" in warning
    assert warnings_of(["CT", "0", "PET/MR"]) == ()


@pytest.mark.parametrize("channel", ["rgb_to_0_255", "noNorm2", "rescale", "PET-CT", "CT/MR"])
def test_an_ambiguous_or_misspelt_channel_type_is_refused(channel: str) -> None:
    with pytest.raises(UserError, match="Channel 1 is called") as caught:
        choose_normalization(["CT", channel])
    assert "zscore" in caught.value.fix


def test_every_rule_leads_to_a_normalization_that_exists() -> None:
    assert {name for name, _ in RULES.values()} <= set(NORMALIZATIONS)
    assert set(RULES) == set(KNOWN)


def test_only_z_scores_of_widely_cropped_images_use_the_mask() -> None:
    wide = [case(shape=(50, 50, 50), full_shape=(70, 60, 50))]
    tight = [case(shape=(50, 50, 50), full_shape=(60, 50, 50))]
    assert choose_masks(wide, ("zscore", "ct"))[0] == (True, False)
    assert choose_masks(tight, ("zscore", "ct"))[0] == (False, False)


def test_a_batch_holds_at_most_five_percent_of_the_voxels_but_two_samples() -> None:
    assert batch_cap(200 * 36 * 50 * 35, (40, 56, 40)) == 7
    assert batch_cap(1000, (40, 56, 40)) == 2


def test_batch_norm_needs_a_large_batch() -> None:
    assert [choose_norm(size) for size in (2, 31, 32, 281)] == ["instance", "instance", "batch", "batch"]


def test_left_right_pairs_are_found_by_name() -> None:
    names = ["left hippocampus", "right hippocampus", "kidney_l", "kidney_r", "LeftLung", "RightLung", "liver"]
    assert sided_labels(names) == tuple(("left-right", name) for name in names[:-1])
    assert sided_labels(["left atrium", "vertebra_L", "r", "liver"]) == ()
    halves = [("left-right", "lh_cortex"), ("left-right", "rh_cortex")]
    assert sided_labels(["lh_cortex", "rh_cortex", "rh_other"]) == tuple(halves)
    lobes = [f"lung_{height}_lobe_{side}" for height in ("upper", "lower") for side in ("left", "right")]
    assert sided_labels(lobes) == tuple((axis, name) for name in lobes for axis in ("left-right", "head-foot"))
    assert sided_labels(["Anterior", "Posterior"]) == (("front-back", "Anterior"), ("front-back", "Posterior"))


@pytest.mark.parametrize(
    ("names", "axis"),
    [
        ("leftkidney rightkidney", "left-right"), ("LKidney RKidney", "left-right"), ("x_LLung x_RLung", "left-right"),
        ("LEFTLUNG RIGHTLUNG", "left-right"), ("kidneyL kidneyR", "left-right"), ("lung_sup lung_inf", "head-foot"),
        ("top bottom", "head-foot"), ("frontteeth backteeth", "front-back"),
        ("LV RV", ""), ("LRNode RLNode", ""), ("leftover leftovers", ""),
    ],
)  # fmt: skip
def test_sides_are_found_in_names_without_a_separator(names: str, axis: str) -> None:
    assert sided_labels(names.split()) == tuple((axis, name) for name in names.split() if axis)


SAGITTAL: PatientAxes3 = (("left-right",), ("head-foot",), ("front-back",))
LUNGS = sided_labels(["left lung", "right lung"])


def test_labels_with_sides_switch_off_mirroring_along_x_only() -> None:
    sided = LUNGS
    assert choose_augment((64, 64, 64), (0, 1, 2), ())[0].mirror_axes == (0, 1, 2)
    assert choose_augment((64, 64, 64), (0, 1, 2), sided)[0].mirror_axes == (0, 1)
    assert choose_augment((64, 64, 64), (2, 0, 1), sided)[0].mirror_axes == (1, 2)
    assert choose_augment((64, 64), (0, 1, 2), sided)[0].mirror_axes == (0,)
    assert choose_augment((64, 64), (2, 0, 1), sided)[0].mirror_axes == (0, 1)
    _, (_, choice) = choose_augment((64, 64, 64), (2, 0, 1), sided)
    assert choice.value == "Z Y of the files"
    assert "left lung" in choice.because


@pytest.mark.parametrize(
    ("lie", "axes", "mirrored", "says"),
    [
        ([SAGITTAL] * 3, (0, 1, 2), (1, 2), "mirroring along Z, which is left-right in these files,"),
        ([SAGITTAL] * 3, (2, 0, 1), (0, 2), "mirroring along Z, which is left-right in these files,"),
        ([AXIAL] * 3, (0, 1, 2), (0, 1), "mirroring along X, which is left-right in these files,"),
        ([None] * 3, (0, 1, 2), (0, 1), "mirroring along X, taken to run that way,"),
        ([AXIAL, SAGITTAL, AXIAL], (0, 1, 2), (1,), "mirroring along X, which is left-right in 2 of 3 cases,"),
        ([None, SAGITTAL], (0, 1, 2), (1,), "mirroring along Z, which is left-right in 1 of 2 cases,"),
        (
            [(("head-foot",), ("front-back", "left-right"), ("left-right", "front-back"))], (0, 1, 2), (0,),
            "mirroring along Y, which is partly left-right in these files,",
        ),
    ],
)  # fmt: skip
def test_mirroring_is_off_along_the_file_axes_that_labels_tell_sides_of(
    lie: list[PatientAxes3 | None], axes: tuple[int, int, int], mirrored: tuple[int, ...], says: str
) -> None:
    orientations = orientations_of([case().model_copy(update={"patient_axes": each}) for each in lie])
    augment, (_, choice) = choose_augment((64, 64, 64), axes, LUNGS, orientations)
    assert augment.mirror_axes == mirrored
    assert says in choice.because


def test_slices_across_the_sides_are_mirrored_both_ways() -> None:
    """The two axes of a sagittal slice are Y and X of its file."""
    augment, (_, choice) = choose_augment((64, 64), (0, 1, 2), LUNGS, [(SAGITTAL, 4)])
    assert augment.mirror_axes == (0, 1)
    assert "along no axis of these slices" in choice.because


def test_files_that_lie_in_different_ways_are_warned_of_where_labels_tell_it() -> None:
    mixed = [(AXIAL, 12), (SAGITTAL, 7), (None, 1)]
    [warning] = warn_of_mixed(LUNGS, mixed)
    assert "left-right is X in 13, Z in 7 of 20 cases" in warning
    assert "left lung, right lung tell left from right, so there is no mirroring along Z or X." in warning
    assert warn_of_mixed((), mixed) == warn_of_mixed(LUNGS, [(SAGITTAL, 7)]) == ()
    turned: PatientAxes3 = (("front-back",), ("head-foot",), ("left-right",))  # coronal: X still is left-right
    assert warn_of_mixed(LUNGS, [(AXIAL, 12), (turned, 7)]) == ()


def test_rotation_depends_on_the_shape_of_the_patch() -> None:
    cube, _ = choose_augment((64, 96, 96), (0, 1, 2), ())
    slab, _ = choose_augment((20, 64, 61), (0, 1, 2), ())
    square, _ = choose_augment((64, 96), (0, 1, 2), ())
    strip, _ = choose_augment((64, 97), (0, 1, 2), ())
    assert (cube.turn_in_plane_only, cube.rotation_rad) == (False, (pi / 6,) * 3)
    assert (slab.turn_in_plane_only, slab.rotation_rad) == (True, (pi, 0.0, 0.0))
    assert square.rotation_rad == (pi,)
    assert strip.rotation_rad == (pi / 12,)


def train():
    return choose_train(choose_augment((64, 64, 64), (0, 1, 2), ())[0])


def test_empty_cases_and_missing_classes_are_counted() -> None:
    cases = [*alike(3), case("nothing", class_voxels=(9, 0, 0)), case("half", class_voxels=(9, 4, 0))]
    choice = awareness.describe_empty(fingerprint(cases))
    assert choice.value == "1 of 5"
    assert "posterior in 2" in choice.because
    assert "anterior in 1" in choice.because
    assert "nothing" in choice.because


def test_a_class_that_few_cases_have_is_drawn_at_a_rate_of_its_own() -> None:
    cases = [*alike(19), *alike(1, class_voxels=(10_000, 500, 0))]
    assert choose_sampling(fingerprint(cases)) == "foreground"
    cases = [*alike(1), *alike(19, class_voxels=(10_000, 500, 0))]
    found = fingerprint(cases)
    assert choose_sampling(found) == "class_balanced"
    choice = awareness.describe_imbalance(found, choose_train(train().augment, choose_sampling(found)), {"3d": 2})
    assert choice.value.endswith("class_balanced")
    assert "of a case evenly" not in choice.because
    assert "In few cases: posterior (1 of 20)" in choice.because
    assert choose_sampling(fingerprint(cases[:10])) == "foreground"


def test_tubes_are_told_by_their_names() -> None:
    assert tubes(["hepatic_vessels", "Portal vein", "liver"]) == ("hepatic_vessels", "Portal vein")
    found = fingerprint(alike(4), classes=("vessel", "tumour"))
    assert "vessel: tubes" in awareness.describe_imbalance(found, train(), {"3d": 2}).because
    assert "tubes" not in awareness.describe_imbalance(fingerprint(alike(4)), train(), {"3d": 2}).because


def test_imbalance_is_told_with_the_rarest_class() -> None:
    cases = alike(4, class_voxels=(1_000_000, 100_000, 20))
    choice = awareness.describe_imbalance(fingerprint(cases), train(), {"2d": 12, "3d": 2})
    assert "posterior" in choice.because
    assert "5000 times" in choice.because
    even = awareness.describe_imbalance(fingerprint(alike(4)), train(), {"3d": 2})
    assert "times" not in even.because


def test_patches_on_foreground_are_told_as_they_are_drawn() -> None:
    """A batch of two has one of them whatever share is asked for, so a higher share is not advised there."""
    rare = fingerprint(alike(4, class_voxels=(1_000_000, 100_000, 20)))
    both = awareness.describe_imbalance(rare, train(), {"2d": 12, "3d": 2, "3d_lowres": 2})
    assert both.value == "dice_ce, patches on foreground: 4 of 12 (2d), 1 of 2 (3d, 3d_lowres)"
    assert "raise foreground_share in plan.json to 0.66, which puts 8 of 12 (2d) on foreground, or" in both.because
    small = awareness.describe_imbalance(rare, train(), {"3d": 2})
    assert "if its Dice stays low, compare losses" in small.because
    assert "foreground_share" not in small.because


def test_tiny_structures_warn_and_propose_a_spacing_that_makes_them_large_enough() -> None:
    cases = alike(3, spacing=(3.0, 1.0, 1.0), class_voxels=(9000, 500, 12), component_voxels=(9000, 500, 4))
    cases = [each.model_copy(update={"class_components": (1, 1, 3)}) for each in cases]
    choice, warnings = awareness.describe_tiny(fingerprint(cases), (3.0, 1.0, 1.0))
    assert choice.value == "posterior"
    assert len(warnings) == 1
    proposed = [float(each) for each in warnings[0].split("--spacing ")[1].split(", which")[0].split(",")]
    assert 4 * 3.0 / prod(proposed) == pytest.approx(27, rel=0.01)
    assert proposed[0] == pytest.approx(proposed[1], rel=0.5)


def test_large_structures_and_specks_beside_them_do_not_warn() -> None:
    choice, warnings = awareness.describe_tiny(fingerprint(alike(3)), (1.0, 1.0, 1.0))
    assert (choice.value, warnings) == ("none", ())
    vessels = alike(3, shape=(1, 500, 500), class_voxels=(9000, 60_000), component_voxels=(9000, 3), components=(1, 80))
    choice, warnings = awareness.describe_tiny(fingerprint(vessels, dimension=2, classes=("vessel",)), (1.0, 1.0, 1.0))
    assert (choice.value, warnings) == ("none", ())
    assert "specks" in choice.because


def test_tiny_structures_in_2d_keep_the_slice_axis() -> None:
    dots = alike(3, shape=(1, 500, 500), class_voxels=(9000, 30), component_voxels=(9000, 1), components=(1, 30))
    _, (warning,) = awareness.describe_tiny(fingerprint(dots, dimension=2, classes=("dot",)), (1.0, 1.0, 1.0))
    assert "plan with --spacing 0.3333,0.3333, which gives 9." in warning
    thick = [each.model_copy(update={"spacing_mm": (9.0, 1.0, 1.0)}) for each in dots]
    assert awareness.describe_tiny(fingerprint(thick, dimension=2, classes=("dot",)), (1.0, 1.0, 1.0))[1] == (warning,)


@pytest.mark.parametrize("spacing", [(0.0, 1.0, 1.0), (1.0, -1.0, 1.0)])
def test_spacing_of_zero_or_less_is_refused(spacing: tuple[float, float, float]) -> None:
    with pytest.raises(UserError, match="broken: the voxel spacing is"):
        check_fingerprint(fingerprint([*alike(2), case("broken", spacing=spacing)]))


def test_single_slices_in_a_3d_data_set_are_refused() -> None:
    with pytest.raises(UserError, match="3D, but all images have a single slice"):
        check_fingerprint(fingerprint(alike(2, shape=(1, 50, 50))))
    with pytest.raises(UserError, match=r"3D, but 1 of 3 images have a single slice: flat"):
        check_fingerprint(fingerprint([*alike(2), case("flat", shape=(1, 50, 50))]))
    with pytest.raises(UserError, match=r"all images have a single slice.*Save them .* along the third axis \(Z\)"):
        check_fingerprint(fingerprint(alike(2, shape=(50, 50, 1))))
    with pytest.raises(UserError, match=r"1 of 3 images have a single slice: flat.*move them out"):
        check_fingerprint(fingerprint([*alike(2), case("flat", shape=(50, 1, 50))]))


def test_volumes_in_a_2d_data_set_are_refused() -> None:
    with pytest.raises(UserError, match="2D, but 1 of 3 images have several slices: deep"):
        check_fingerprint(fingerprint([*alike(2, shape=(1, 50, 50)), case("deep", shape=(5, 50, 50))], dimension=2))


def test_a_case_with_other_classes_than_the_data_set_is_refused() -> None:
    with pytest.raises(UserError, match="counts 2 classes"):
        check_fingerprint(fingerprint(alike(1, class_voxels=(5, 5))))
