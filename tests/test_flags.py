"""Cases that a person should look at."""

from pathlib import Path

import pytest

from autoseg.cases.predicted import Predicted
from autoseg.events import Event, Warned
from autoseg.layout import flagged_file, prediction_record
from autoseg.steps.predicting.flags import flag, flag_limit
from autoseg.store import save


def test_a_record_that_cannot_be_read_is_told_and_left_out(tmp_path: Path) -> None:
    record = Predicted(case="a", inputs=(), model="m", written="", uncertainty=0.5)
    save(prediction_record(tmp_path, "a"), record)
    prediction_record(tmp_path, "b").write_bytes(b"")
    said: list[Event] = []
    flag(tmp_path, said.append)
    assert flagged_file(tmp_path).read_text().splitlines()[1:] == ["a,0.5000,no"]
    (warned,) = said
    assert isinstance(warned, Warned)
    assert "b.json: not valid JSON" in warned.text
    assert warned.text.endswith("b is not in flagged.csv.")


def test_cases_are_flagged_where_networks_are_unusually_unsure() -> None:
    assert flag_limit([0.1, 0.1, 0.1, 0.9]) == float("inf")
    assert flag_limit([0.10, 0.11, 0.12, 0.13, 0.9]) == pytest.approx(0.12 + 3 * 1.4826 * 0.01)
    assert flag_limit([0.2] * 5) == 0.2


def test_the_table_lists_the_most_uncertain_case_first_and_says_which_are_flagged(tmp_path: Path) -> None:
    numbers = {"a": 0.12, "b": 0.9, "c": 0.10, "d": 0.13, "e": 0.16, "f": 0.11, "g": None}
    for name, number in numbers.items():
        record = Predicted(case=name, inputs=(), model="m", written=f"{name}.nii.gz", uncertainty=number)
        save(prediction_record(tmp_path, name), record)
    said: list[Event] = []
    flag(tmp_path, said.append)
    # the median is 0.125 and the median deviation 0.02, so 0.214 is the limit
    assert flagged_file(tmp_path).read_text().splitlines() == [
        "case,uncertainty,flagged", "b,0.9000,yes", "e,0.1600,no", "d,0.1300,no", "a,0.1200,no", "f,0.1100,no",
        "c,0.1000,no",
    ]  # fmt: skip
    [warned] = said
    assert isinstance(warned, Warned)
    assert "Look at b:" in warned.text
