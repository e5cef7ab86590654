"""Whole plans from made-up fingerprints, with a measure that only counts."""

from functools import cache
from math import prod

import pytest
from fingerprints import GB, alike, budget, case, counting, fingerprint

from autoseg.errors import UserError
from autoseg.events import Advanced, Warned
from autoseg.planning.checks import check_plan
from autoseg.planning.plan import make_plan
from autoseg.records import Configuration, Plan
from autoseg.store import load, save

HIPPOCAMPUS = {"shape": (36, 50, 35), "spacing": (1.0, 1.0, 1.0)}
LIVER = {"shape": (432, 512, 512), "spacing": (1.0, 0.77, 0.77)}
PROSTATE = {"shape": (20, 320, 320), "spacing": (3.6, 0.625, 0.625)}
SAGITTAL = {"shape": (320, 320, 20), "spacing": (0.625, 0.625, 3.6)}


def planned_anew(memory: float, count: int, preset: str = "standard", seen: list | None = None, **arguments) -> Plan:
    return make_plan(fingerprint(alike(count, **arguments)), budget(memory), counting(seen), preset=preset)


@cache
def planned(memory: float, count: int, preset: str = "standard", **arguments) -> Plan:
    """Each plan is made once: large ones take a second, and records cannot be changed."""
    return planned_anew(memory, count, preset, **arguments)


def by_name(plan: Plan) -> dict[str, Configuration]:
    return {configuration.name: configuration for configuration in plan.configurations}


def choice(plan: Plan, field: str):
    (found,) = [each for each in plan.choices if each.field == field]
    return found


def test_slices_that_cannot_be_halved_are_left_out_with_a_reason() -> None:
    plan = planned(8, 20, shape=(64, 7, 7), spacing=(1.0, 1.0, 1.0))
    assert list(by_name(plan)) == ["3d"]
    assert choice(plan, "2d").because == "slices of 7 x 7 voxels cannot be halved even once; volumes can."
    check_plan(plan)
    with pytest.raises(UserError, match="too few to be halved even once"):
        planned(8, 20, shape=(7, 7, 7), spacing=(1.0, 1.0, 1.0))


def test_small_volumes_get_2d_and_3d_with_two_readings_in_all() -> None:
    seen: list[Configuration] = []
    plan = planned_anew(8, 200, seen=seen, **HIPPOCAMPUS)
    found = by_name(plan)
    assert list(found) == ["2d", "3d"]
    assert (found["3d"].patch_voxels, found["3d"].batch_size) == ((40, 56, 40), 7)
    assert (found["2d"].patch_voxels, found["2d"].batch_size) == ((56, 40), 281)
    assert found["2d"].spacing_mm == (None, 1.0, 1.0)
    assert (found["2d"].batch_dice, found["3d"].batch_dice) == (True, False)
    assert choice(plan, "3d.batch_dice").because.startswith("no low-resolution configuration exists")
    rotation = choice(plan, "3d.train.augment.rotation_rad").because
    assert rotation == "nnU-Net's range where no side of the patch is over 3 times the first."
    assert len(seen) == 2


def test_a_low_resolution_is_planned_with_patches_that_are_quick_enough() -> None:
    """A CPU's patches are small because steps cost time, not because of memory; they see as little of the volume."""
    slow = budget(64).model_copy(update={"device": "cpu", "precision": "fp32"})
    plan = make_plan(fingerprint(alike(20, shape=(115, 320, 232), spacing=(1.37, 1.25, 1.25))), slow, counting())
    found = by_name(plan)
    assert prod(found["3d"].patch_voxels) < 0.25 * prod(found["3d"].median_shape_voxels)
    assert list(found) == ["2d", "3d", "3d_lowres", "3d_cascade"]
    assert found["3d"].batch_dice


def test_large_volumes_also_get_a_low_resolution_and_a_cascade() -> None:
    seen: list[Configuration] = []
    plan = planned_anew(8, 100, seen=seen, **LIVER)
    found = by_name(plan)
    assert list(found) == ["2d", "3d", "3d_lowres", "3d_cascade"]
    full, low, cascade = found["3d"], found["3d_lowres"], found["3d_cascade"]
    assert prod(full.patch_voxels) < 0.25 * prod(full.median_shape_voxels)
    assert prod(low.patch_voxels) >= 0.25 * prod(low.median_shape_voxels)
    assert all(a > b for a, b in zip(low.spacing_mm, full.spacing_mm, strict=True))
    assert low.spacing_mm[0] / low.spacing_mm[1] == pytest.approx(full.spacing_mm[0] / full.spacing_mm[1])
    assert (full.batch_dice, low.batch_dice, cascade.batch_dice) == (True, False, True)
    assert choice(plan, "3d_lowres.batch_dice").because.startswith("patches see at least a quarter of the image")
    assert (cascade.previous, cascade.network.in_channels, cascade.spacing_mm) == ("3d_lowres", 1 + 2, full.spacing_mm)
    assert (low.previous, low.network.in_channels) == (None, 1)
    assert len(seen) <= 12


def test_the_low_resolution_is_the_finest_whose_patch_covers_a_quarter() -> None:
    low = by_name(planned(8, 100, **LIVER))["3d_lowres"]
    finer = prod(low.median_shape_voxels) * 1.03**3
    assert prod(low.patch_voxels) < 0.25 * finer * 1.02


def test_no_low_resolution_when_it_would_save_less_than_half() -> None:
    plan = planned(8, 100, shape=(190, 230, 230), spacing=(1.0, 1.0, 1.0))
    full = by_name(plan)["3d"]
    assert prod(full.patch_voxels) < 0.25 * prod(full.median_shape_voxels)
    assert list(by_name(plan)) == ["2d", "3d"]
    assert choice(plan, "configurations.3d_lowres").value == "no"
    assert "more than half" in choice(plan, "configurations.3d_lowres").because


def test_no_low_resolution_where_coarser_grids_get_too_small_for_a_network() -> None:
    plan = planned(2, 20, shape=(300, 12, 300), spacing=(3.0, 0.5, 1.2))
    assert list(by_name(plan)) == ["2d", "3d"]
    because = choice(plan, "configurations.3d_lowres").because
    assert because.endswith("but coarser grids get too small for a network before that changes.")


def test_a_spacing_that_was_asked_for_is_planned_with_its_reason() -> None:
    plan = make_plan(fingerprint(alike(20, shape=(36, 50, 35))), budget(8), counting(), spacing_mm=(1.0, 0.5, 2.0))
    slices, volumes = plan.configurations
    assert (volumes.axes, volumes.spacing_mm, slices.spacing_mm) == ((2, 0, 1), (2.0, 1.0, 0.5), (None, 1.0, 0.5))
    assert volumes.median_shape_voxels == (18, 36, 100)
    told = choice(plan, "spacing_mm")
    assert told.value == "1 x 0.5 x 2 mm"
    assert told.because.startswith("asked for by the user. From the data it would be 1 x 1 x 1 mm: the median over 20")
    flat = fingerprint(alike(20, shape=(1, 64, 64), spacing=(5.0, 1.0, 1.0)), dimension=2)
    [configuration] = make_plan(flat, budget(8), counting(), spacing_mm=(2.0, 0.5)).configurations
    assert configuration.spacing_mm == (None, 2.0, 0.5)


def test_slices_of_different_thickness_count_as_one_slice_each() -> None:
    cases = [case(f"c{n}", shape=(1, 64, 64), spacing=(thickness, 1.0, 1.0)) for n, thickness in enumerate((3, 6, 6))]
    [configuration] = make_plan(fingerprint(cases, dimension=2), budget(8), counting()).configurations
    assert configuration.median_shape_voxels == (1, 64, 64)


def test_the_reason_of_a_batch_of_two_holds_for_small_data_sets() -> None:
    because = choice(planned(8, 2, **HIPPOCAMPUS), "3d.batch_size").because
    assert "come to 0.07 patches, and a batch has at least 2" in because
    because = choice(planned(8, 60, **HIPPOCAMPUS), "3d.batch_size").because
    assert because.startswith("a batch may hold about 5 % of the data set's 3.78e+06 voxels: 2.")


def test_the_coarse_axis_comes_first_and_its_kernels_open_late() -> None:
    axial, sagittal = by_name(planned(8, 30, **PROSTATE)), by_name(planned(8, 30, **SAGITTAL))
    assert sagittal["3d"].axes == (2, 0, 1)
    assert axial["3d"].network == sagittal["3d"].network
    assert axial["3d"].patch_voxels == sagittal["3d"].patch_voxels == (20, 320, 256)
    assert axial["3d"].network.kernels[0] == (1, 3, 3)
    assert sagittal["2d"].median_shape_voxels == (20, 320, 320)


def test_flat_images_get_2d_only() -> None:
    arguments = {"dimension": 2, "channels": ("red", "green", "blue"), "classes": ("vessel",)}
    cases = alike(20, shape=(1, 584, 565), class_voxels=(300_000, 30_000))
    plan = make_plan(fingerprint(cases, **arguments), budget(8), counting(), file_ending=".png")
    assert list(by_name(plan)) == ["2d"]
    configuration = plan.configurations[0]
    assert configuration.network.in_channels == 3
    assert configuration.normalization == ("zscore",) * 3
    assert (plan.file_ending, plan.dimension) == (".png", 2)


def test_3d_is_skipped_when_the_median_image_is_one_slice_thick_after_cropping() -> None:
    cases = alike(5, shape=(1, 90, 90), full_shape=(12, 90, 90))
    plan = make_plan(fingerprint(cases), budget(8), counting())
    assert list(by_name(plan)) == ["2d"]
    assert "single slice" in choice(plan, "configurations").because


@pytest.mark.parametrize("memory", [4, 8, 11, 24, 80])
@pytest.mark.parametrize("preset", ["standard", "XL"])
def test_every_configuration_fits_and_uses_its_budget(memory: int, preset: str) -> None:
    measure = counting()
    for arguments in (HIPPOCAMPUS, LIVER, PROSTATE):
        plan = planned(memory, 60, preset, **arguments)
        for configuration in plan.configurations:
            assert configuration.memory.peak_bytes == measure(configuration) <= memory * GB
            assert configuration.batch_size >= 2
            assert configuration.memory.attempts
            assert sum(a.fits for a in configuration.memory.attempts) >= 1
            assert max(a.peak_bytes for a in configuration.memory.attempts if a.fits) == configuration.memory.peak_bytes


def test_more_memory_never_gives_a_smaller_patch() -> None:
    plans = [planned(memory, 60, "standard", **LIVER) for memory in (4, 6, 8, 11, 16, 24, 40, 80)]
    volumes = [prod(by_name(plan)["3d"].patch_voxels) for plan in plans]
    assert volumes == sorted(volumes)
    assert volumes[0] < volumes[-1]
    needs = []
    for plan in plans[:6]:
        _, _, larger = choice(plan, "3d.patch_voxels").because.partition("the next larger, ")
        patch = tuple(int(each) for each in larger.partition(",")[0].split(" x "))
        read = {each.patch_voxels for each in by_name(plan)["3d"].memory.attempts}
        needs.append((" needs " in larger, patch in read))
    assert set(needs) == {(True, True), (False, False)}


def test_presets_have_residual_encoders() -> None:
    spec = by_name(planned(24, 60, "L", **LIVER))["3d"].network
    assert spec.kind == "residual"
    assert spec.encoder_blocks[:4] == (1, 3, 4, 6)
    assert set(spec.decoder_blocks) == {1}
    with pytest.raises(UserError, match="no preset 'XXL'"):
        planned(24, 60, "XXL", **LIVER)


def test_a_budget_too_small_names_the_smallest_need() -> None:
    with pytest.raises(UserError, match=r"0.50 GB is too small for configuration 2d.*needs 0\.6") as caught:
        planned(0.5, 20, **LIVER)
    assert "--memory" in caught.value.fix


def test_images_too_small_for_a_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"only 7 x 7 voxels"):
        planned(8, 20, shape=(7, 7, 7), spacing=(1.0, 1.0, 1.0))


def test_left_and_right_labels_switch_mirroring_off_and_say_so() -> None:
    cases = alike(20, class_voxels=(9000, 500, 500), **HIPPOCAMPUS)
    plan = make_plan(fingerprint(cases, classes=("hippocampus_left", "hippocampus_right")), budget(8), counting())
    assert by_name(plan)["3d"].train.augment.mirror_axes == (0, 1)
    assert by_name(plan)["2d"].train.augment.mirror_axes == (0,)
    assert "hippocampus_left" in choice(plan, "3d.train.augment.mirror_axes").because


def test_every_decision_has_a_value_and_a_reason() -> None:
    plan = planned(8, 100, **LIVER)
    fields = [each.field for each in plan.choices]
    assert len(fields) == len(set(fields))
    wanted = ["patch_voxels", "batch_size", "network.strides", "network.norm", "batch_dice", "memory"]
    for configuration in plan.configurations:
        assert {f"{configuration.name}.{each}" for each in wanted} <= set(fields)
    assert {"spacing_mm", "axes", "normalization.0", "data.imbalance", "data.tiny_structures"} <= set(fields)
    for each in plan.choices:
        assert each.value
        assert each.because.endswith(".")
        assert len(each.because) > 15
    assert choice(plan, "3d.patch_voxels").value == " x ".join(map(str, by_name(plan)["3d"].patch_voxels))


def test_the_reason_for_a_shrunk_patch_names_the_next_larger_one() -> None:
    plan = planned(8, 100, **LIVER)
    because = choice(plan, "3d.patch_voxels").because
    assert "the next larger" in because
    assert "needs" in because


def test_readings_and_warnings_are_announced() -> None:
    events: list = []
    cases = alike(9, class_voxels=(9000, 500, 6), component_voxels=(9000, 500, 2), components=(1, 1, 3))
    make_plan(fingerprint(cases, channels=("Tmax",)), budget(8), counting(), report=events.append)
    assert [e for e in events if isinstance(e, Advanced) and e.what == "measuring 3d"]
    assert [e for e in events if isinstance(e, Warned) and "posterior" in e.text]
    assert [e for e in events if isinstance(e, Warned) and "'Tmax'" in e.text]


def test_a_plan_survives_saving_and_the_same_input_gives_the_same_plan(tmp_path) -> None:
    plan = planned(8, 100, **LIVER)
    save(tmp_path / "plan.json", plan)
    assert load(tmp_path / "plan.json", Plan) == plan == planned_anew(8, 100, **LIVER)


def test_images_of_different_size_share_one_plan() -> None:
    cases = [case(f"c{n}", shape=(30 + n, 60 + n, 50 + n), spacing=(2.0, 1.0, 1.0 + 0.01 * n)) for n in range(21)]
    plan = make_plan(fingerprint(cases), budget(8), counting())
    assert by_name(plan)["3d"].spacing_mm == (2.0, 1.0, pytest.approx(1.1))


def edited(plan: Plan, **update) -> Plan:
    first = plan.configurations[0]
    return plan.model_copy(update={"configurations": (first.model_copy(update=update), *plan.configurations[1:])})


def test_a_sound_plan_passes_the_checks() -> None:
    check_plan(planned(8, 100, **LIVER))


@pytest.mark.parametrize(
    ("update", "message"),
    [
        ({"normalization": ("magic",)}, "no normalization 'magic'"),
        ({"normalization": ("zscore", "zscore")}, "2 entries for 1 channels"),
        ({"previous": "4d"}, "follows '4d'"),
        ({"spacing_mm": (None, 0.0, 1.0)}, "above zero"),
        ({"name": "3d"}, "same name"),
        ({"patch_voxels": (56, 8)}, "single voxel on the last axis"),
    ],
)
def test_an_edited_plan_that_contradicts_itself_is_refused(update: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_plan(edited(planned(8, 200, **HIPPOCAMPUS), **update))


def test_an_edited_patch_that_the_strides_do_not_divide_is_refused_with_the_nearest(tmp_path) -> None:
    plan = planned(8, 200, **HIPPOCAMPUS)
    save(tmp_path / "plan.json", plan)
    text = (tmp_path / "plan.json").read_text().replace("[40, 56, 40]", "[40, 60, 40]")
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(UserError, match=r"\(40, 56, 40\) and \(40, 64, 40\)"):
        load(tmp_path / "plan.json", Plan)
