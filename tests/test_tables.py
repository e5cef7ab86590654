"""What is shown of the results of the steps."""

import pytest

from autoseg import tables
from autoseg.records import CaseScore, Postprocessing, Rule, Scores
from autoseg.scoring.comparison import Comparison, Difference


def scores() -> Scores:
    cases = (CaseScore(id="a", values={"dice": (0.5, None)}),)
    return Scores(
        prediction="p", reference="r", labels=("left [1]", "right"), policy="empty cases are left out", cases=cases,
        mean={"dice": (0.5, None)}, foreground_mean={"dice": 0.5},
    )  # fmt: skip


def test_scores_are_shown_per_class_with_a_dash_where_undefined(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(scores())
    text = capsys.readouterr().out
    rows = [line.split() for line in text.splitlines()]
    assert any("left" in row and "[1]" in row and "0.5000" in row for row in rows)
    assert any("right" in row and "-" in row for row in rows)
    assert "cases of p, and" in text


def test_learned_rules_are_shown_with_their_gain(capsys: pytest.CaptureFixture[str]) -> None:
    rule = Rule(label=None, action="keep_largest", dice_before=0.8, dice_after=0.9)
    tables.show(Postprocessing(learned_on="3d", cases=4, rules=(rule,)))
    assert "0.8000 -> 0.9000" in capsys.readouterr().out


def test_a_comparison_shows_differences_and_its_conclusion(capsys: pytest.CaptureFixture[str]) -> None:
    one = Difference(
        first="a", second="b", metric="dice", label="left", cases=9, mean_first=0.9, mean_second=0.8, difference=0.1,
        low=0.05, high=0.15, p_wilcoxon_holm=0.004, better="a",
    )  # fmt: skip
    found = Comparison(
        methods=("a", "b"), labels=("left",), metrics=("dice",), cases=9, level=0.95, conclusion="a beats b.",
        ranking=("a", "b"), rank_shares=((1.0, 0.0), (0.0, 1.0)), differences=(one,),
    )  # fmt: skip
    tables.show(found)
    text = capsys.readouterr().out
    assert all(words in text for words in ("a - b", "+0.1000", "+0.0500 to +0.1500", "0.004", "a beats b."))


def test_no_rule_is_said_in_words(capsys: pytest.CaptureFixture[str]) -> None:
    tables.show(Postprocessing(learned_on="3d", cases=4))
    assert "No rule" in capsys.readouterr().out
