"""Turns the content of an older record into that of the next version. So no run has to be made anew."""

from collections.abc import Callable


def _movement_of_plan(plan: dict) -> dict:
    return plan | {"configurations": [_movement(each) for each in plan.get("configurations", [])]}


def _movement_of_run(run: dict) -> dict:
    found = {name: run[name] for name in ("configuration", "planned") if run.get(name) is not None}
    return run | {name: _movement(each) for name, each in found.items()}


def _without_cases(run: dict) -> dict:
    """What a network learned from was not written down."""
    return run | {"cases": None}


def _movement(configuration: dict) -> dict:
    """More movement had its chance under another name, and lasted ten times as long as mirroring was left out."""
    train = configuration.get("train", {})
    augment = dict(train.get("augment", {}))
    if "unmirrored_move_chance" in augment:
        augment["extra_movement_chance"] = augment.pop("unmirrored_move_chance")
    if "mirror_from_patches" in augment and "extra_movement_to_patches" not in augment:
        augment["extra_movement_to_patches"] = 10 * augment["mirror_from_patches"]
    return configuration | {"train": train | {"augment": augment}}


def _without_patient_axes(fields: dict) -> dict:
    """Nobody wrote down how the files lie in the patient: the field stays None, and X is taken for left-right."""
    return fields


UPGRADES: dict[tuple[str, int], Callable[[dict], dict]] = {
    ("plan", 1): _movement_of_plan,
    ("run", 1): _movement_of_run,
    ("run", 2): _without_cases,
    ("study", 1): _movement_of_run,
    ("casestats", 1): _without_patient_axes,
    ("fingerprint", 1): _without_patient_axes,
}
"""(record name, old version) -> the function for the step to the next version."""
