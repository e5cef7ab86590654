"""Tables and drawings of a plan."""

from pathlib import Path

from fingerprints import alike, budget, counting, fingerprint

from autoseg.planning.cost import layers, parameters, receptive_fields, training_operations
from autoseg.planning.edit import edit
from autoseg.planning.explain import (
    LONG_SECONDS,
    choice_table,
    drawing,
    duration,
    long_trainings,
    seconds_per_epoch,
    tables,
)
from autoseg.planning.plan import make_plan
from autoseg.records import NetworkSpec, Plan
from autoseg.store import load

PLAN = make_plan(fingerprint(alike(200)), budget(8), counting())
SPEC = NetworkSpec(
    dimension=2,
    in_channels=1,
    classes=2,
    features=(4, 8),
    strides=((1, 1), (2, 2)),
    kernels=((3, 3), (3, 3)),
    encoder_blocks=(1, 1),
    decoder_blocks=(1,),
    deep_supervision=False,
)


def test_tables_have_a_row_per_choice_configuration_and_reading() -> None:
    choices, costs, attempts = tables(PLAN)
    assert len(choices.rows) == len(PLAN.choices)
    assert [row[0] for row in costs.rows] == ["2d", "3d"]
    assert len(attempts.rows) == sum(len(c.memory.attempts) for c in PLAN.configurations)
    for table in (choices, costs, attempts):
        assert all(len(row) == len(table.headings) for row in table.rows)


def test_no_row_of_a_plan_as_it_was_made_is_marked_as_edited() -> None:
    files = sorted((Path(__file__).parent.parent / "plans").glob("*/plan-8GB.json"))
    rows = [(file.parent.name, *row) for file in files for row in choice_table(load(file, Plan)).rows]
    assert len(rows) > 300
    assert [row for row in rows if "edited" in row[2]] == []


def test_rows_that_the_plan_does_not_hold_any_more_say_what_it_holds() -> None:
    train = {"epochs": 7, "loss": "ce", "augment": {"rotation_rad": [0.5, 0.0, 0.0], "mirror_axes": [2]}}
    content = PLAN.model_dump(mode="json")
    volumes = content["configurations"][1]
    volumes["train"] |= train | {"augment": volumes["train"]["augment"] | train["augment"]}
    volumes |= {"patch_voxels": [48, 64, 40], "spacing_mm": [2.0, 1.0, 1.0], "batch_dice": True}
    rows = {field: value for field, value, _ in choice_table(Plan.model_validate(content)).rows}
    assert {field: value.partition(" (edited: ")[2] for field, value in rows.items() if "edited" in value} == {
        "train.epochs": "now 7 of 250 steps in 3d)",
        "data.imbalance": "now ce, 2 of 7 in 3d)",
        "spacing_mm": "now 2 x 1 x 1 mm in 3d)",
        "3d.patch_voxels": "now 48 x 64 x 40)",
        "3d.batch_dice": "now yes)",
        "3d.train.augment.rotation_rad": "now 29 0 0 degrees at most)",
        "3d.train.augment.mirror_axes": "now X of the files)",
    }


def test_a_plan_that_contradicts_itself_can_still_be_shown() -> None:
    content = PLAN.model_dump(mode="json")
    content["configurations"][1] |= {"axes": [0, 0, 7]}
    content["configurations"][1]["train"]["augment"]["mirror_axes"] = [0, 5]
    assert choice_table(Plan.model_validate(content)).rows


def test_rows_of_an_edit_field_by_field_are_not_marked() -> None:
    changes = ["3d.patch_voxels=48,64,40", "3d.train.learning_rate=3e-3", "3d.train.augment.mirror_axes=[]"]
    changes += ["3d.train.augment.rotation_rad=0.5,0,0", "2d.batch_dice=false", "2d.train.loss=dice_focal:gamma=1"]
    rows = {field: value for field, value, _ in choice_table(edit(PLAN, changes)).rows}
    marked = [field for field, value in rows.items() if "edited" in value]
    assert marked == ["data.imbalance", "train.optimizer"]
    assert rows["train.optimizer"].endswith("(edited: now adamw, learning rate 0.003, weight decay 0.01 in 3d)")


def test_the_drawing_has_a_line_per_stage() -> None:
    configuration = PLAN.configurations[1]
    head, columns, *stages = drawing(configuration)
    assert "plain U-Net" in head
    assert columns.startswith("stage")
    assert len(stages) == len(configuration.network.features)
    assert "40 x 56 x 40" in stages[0]
    assert "bottom" in stages[-1]
    assert "5 x 7 x 5" in stages[-1]
    assert stages[-1].count("#") > stages[0].count("#") > 0


def test_parameters_and_operations_are_those_counted_by_hand() -> None:
    weights = 1 * 4 * 9 + 8 + 4 * 8 * 9 + 16  # two encoder convolutions with their norms
    weights += 8 * 4 * 4 + 4 + 8 * 4 * 9 + 8 + 4 * 2 + 2  # up, decoder, head
    assert parameters(SPEC) == weights
    forward = 2 * (1 * 4 * 9 * 64 + 4 * 8 * 9 * 16 + 8 * 4 * 64 + 8 * 4 * 9 * 64 + 4 * 2 * 64)
    assert training_operations(SPEC, (8, 8), 5) == 3 * 5 * forward
    assert [layer.part for layer in layers(SPEC, (8, 8))] == ["encoder", "encoder", "up", "decoder", "head"]


def test_the_receptive_field_grows_with_kernels_and_strides() -> None:
    assert receptive_fields(SPEC) == ((3, 3), (5, 5))
    deeper = SPEC.model_copy(update={"encoder_blocks": (2, 2)})
    assert receptive_fields(deeper) == ((5, 5), (11, 11))


def test_durations_are_short() -> None:
    assert [duration(s) for s in (45.2, 720, 12_240, 610_000)] == ["45 s", "12 min", "3.4 h", "7 days"]


def test_trainings_of_days_are_named_with_what_shortens_them() -> None:
    seconds = [each.train.epochs * seconds_per_epoch(each, PLAN.budget) for each in PLAN.configurations]
    assert max(seconds) < LONG_SECONDS
    assert long_trainings(PLAN) == ()
    longest = PLAN.configurations[seconds.index(max(seconds))]
    times = 1 + int(LONG_SECONDS / max(seconds))
    slow = longest.model_copy(update={
        "train": longest.train.model_copy(update={"epochs": times * longest.train.epochs})
    })  # fmt: skip
    others = [each for each in PLAN.configurations if each is not longest]
    (said,) = long_trainings(PLAN.model_copy(update={"configurations": (*others, slow)}))
    assert said.startswith(f"{longest.name}: the planned {slow.train.epochs} epochs take about 2 days.")
    assert "--memory" in said
    on_cpu = PLAN.model_copy(update={"budget": PLAN.budget.model_copy(update={"device": "cpu"})})
    assert not any("--memory" in each for each in long_trainings(on_cpu))
    assert len(long_trainings(on_cpu)) >= 1


def test_an_epoch_takes_longer_on_a_cpu_and_longer_still_without_bf16() -> None:
    configuration, total = PLAN.configurations[1], budget(8)
    cpu = total.model_copy(update={"device": "cpu", "precision": "bf16"})
    slow = cpu.model_copy(update={"precision": "fp32"})
    card, half, single = (seconds_per_epoch(configuration, each) for each in (total, cpu, slow))
    assert half > 10 * card
    assert 2 * half < single < 5 * half
