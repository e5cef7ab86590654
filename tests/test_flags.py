"""Cases that a person should look at."""

from pathlib import Path

from autoseg.cases.predicted import Predicted
from autoseg.events import Event, Warned
from autoseg.layout import flagged_file, prediction_record
from autoseg.steps.flags import flag, flag_limit
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
    assert flag_limit([0.1, 0.1, 0.9]) == float("inf")
    assert 0.15 < flag_limit([0.10, 0.11, 0.12, 0.13, 0.9]) < 0.9
