"""Cases that a person should look at."""

from autoseg.steps.flags import flag_limit


def test_cases_are_flagged_where_networks_are_unusually_unsure() -> None:
    assert flag_limit([0.1, 0.1, 0.9]) == float("inf")
    assert 0.15 < flag_limit([0.10, 0.11, 0.12, 0.13, 0.9]) < 0.9
