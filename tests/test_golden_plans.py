"""Every reference plan in plans/ is what the rules make of its fingerprint today.

The bytes come from the plan's own readings, so no step is simulated here. A changed rule shows up as a diff of the
JSON, or as a question for a reading that the plan does not hold; `make plans` then makes the plans anew.
"""

import difflib
from pathlib import Path

import pytest

from autoseg.planning.plan import make_plan
from autoseg.planning.search import NewReadingAsked, recorded
from autoseg.records import Fingerprint, Plan
from autoseg.store import dump, load

PLANS = Path(__file__).parent.parent / "plans"
NOT_COMPARED = {"autoseg_version"}
NAMES = ("hippocampus", "drive", "ct", *(f"msd-{task:02d}" for task in range(1, 11)))
MEMORIES = ("8GB", "11GB", "24GB", "80GB")


def planned_again(fingerprint: Fingerprint, golden: Plan) -> Plan:
    source = golden.configurations[0].memory.source
    return make_plan(fingerprint, golden.budget, recorded(golden), source=source, preset=golden.preset)


def differences(golden: Plan, now: Plan) -> str:
    old, new = (dump(plan.model_dump(mode="json", exclude=NOT_COMPARED)).splitlines() for plan in (golden, now))
    return "\n".join(difflib.unified_diff(old, new, "reference", "now", lineterm="", n=2))


@pytest.mark.parametrize(
    "file", sorted(PLANS.glob("*/plan-*.json")), ids=lambda file: f"{file.parent.name}-{file.stem}"
)
def test_the_rules_still_make_the_reference_plan(file: Path) -> None:
    golden = load(file, Plan)
    fingerprint = load(file.with_name("fingerprint.json"), Fingerprint)
    found = differences(golden, planned_again(fingerprint, golden))
    assert not found, f"{file.parent.name}/{file.name} differs:\n{found}"


def test_all_data_sets_have_all_reference_plans() -> None:
    folders = {folder.name for folder in PLANS.iterdir() if folder.is_dir()}
    for name in NAMES:
        matching = [folder for folder in folders if folder == name or folder.startswith(f"{name}-")]
        assert len(matching) == 1, f"plans/ has {matching} for {name}"
        for memory in MEMORIES:
            assert (PLANS / matching[0] / f"plan-{memory}.json").is_file(), f"{matching[0]} has no plan for {memory}"


def test_fingerprints_name_their_source_and_stay_small() -> None:
    for file in PLANS.glob("*/fingerprint.json"):
        fingerprint = load(file, Fingerprint)
        assert len(fingerprint.source) > 20, file
        assert file.stat().st_size < 300_000, file
        assert not any(case.intensity_sample for case in fingerprint.cases), file


def test_no_reference_plan_exceeds_its_budget_or_repeats_a_reading() -> None:
    for file in PLANS.glob("*/plan-*.json"):
        golden = load(file, Plan)
        for configuration in golden.configurations:
            assert configuration.memory.peak_bytes <= golden.budget.budget_bytes, file
            readings = [(a.patch_voxels, a.batch_size) for a in configuration.memory.attempts]
            assert len(readings) == len(set(readings)), file
            assert 1 <= len(readings) <= 8, file


def test_a_changed_rule_fails_with_a_readable_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load(PLANS / "hippocampus" / "plan-8GB.json", Plan)
    fingerprint = load(PLANS / "hippocampus" / "fingerprint.json", Fingerprint)
    monkeypatch.setattr("autoseg.planning.train.IN_PLANE_BEYOND", 1.0)
    found = differences(golden, planned_again(fingerprint, golden))
    assert any(line.startswith("-") and "turn_in_plane_only" in line for line in found.splitlines())


def test_a_rule_that_needs_new_readings_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    golden = load(PLANS / "hippocampus" / "plan-8GB.json", Plan)
    fingerprint = load(PLANS / "hippocampus" / "fingerprint.json", Fingerprint)
    monkeypatch.setattr("autoseg.planning.batch.LARGEST_SHARE_OF_DATA", 0.1)
    with pytest.raises(NewReadingAsked, match="make plans"):
        planned_again(fingerprint, golden)
