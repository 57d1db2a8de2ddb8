"""The section "What this run checked", and its line at the terminal."""

from typing import Any

import pytest

from rlhf.report.checks import check_rows, checks_line
from rlhf.report.render import render


def summary(**held: bool) -> Any:
    rows = {
        name.replace("_", " "): {
            "statistic": 0.5, "low": None, "bound": 1.0, "unit": "nats", "held": yes, "times": 2, "stage": "round-1/ppo"
        }
        for name, yes in held.items()
    }  # fmt: skip
    return {"checks": rows}


def test_one_line_says_how_many_held_and_names_the_others() -> None:
    assert checks_line({}) is None  # type: ignore[arg-type]
    assert checks_line(summary(ratio_one=True)) == "1 check held"
    assert checks_line(summary(ratio_one=True, sampler_true=True)) == "2 checks held"
    assert checks_line(summary(ratio_one=True, sampler_true=False)) == "1 check held, 1 did not: sampler true"


def test_a_row_says_what_was_measured_what_is_allowed_and_why_it_did_not_hold() -> None:
    facts: Any = {"round-1/ppo": {"checks": {"sampler true": {"sentence": "Look at the temperature."}}}}
    first, second = check_rows(summary(ratio_one=True, sampler_true=False), facts)
    assert (first["statistic"], first["allowed"], first["sentence"]) == ("0.5", "at most 1", None)
    assert second["sentence"] == "Look at the temperature."


@pytest.mark.parametrize("checks", [True, False])
def test_the_section_is_on_the_page_where_something_was_checked(checks: bool) -> None:
    rows = check_rows(summary(ratio_one=True), {}) if checks else []
    page = render(
        "page.html.jinja",
        summary={"recipe": "x", "seed": 0, "seconds": {}},
        verdict=[], tiles=[], data=[], lineage=[], differences=[],
        checks=rows,
        checks_line="1 check held",
    )  # fmt: skip
    assert ("What this run checked" in page) == checks
    assert ("ratio one" in page) == checks
