"""What `summary.json` says of the checks of all stages; the link to the best policy."""

from pathlib import Path

import pytest

from rlhf.invariants.checks import CheckEntry
from rlhf.pipeline.summary import _link_best, joined_checks


def entry(statistic: float, *, bound: float = 1.0, low: float | None = None, times: int = 1) -> CheckEntry:
    held = statistic <= bound and (low is None or statistic >= low)
    return CheckEntry(statistic=statistic, low=low, bound=bound, unit="u", held=held, times=times, sentence="Because.")


def test_of_each_check_the_worst_of_all_stages_stands_in_the_summary() -> None:
    joined = joined_checks(
        {
            "round-0/sft": {"a": entry(0.2, times=3)},
            "round-1/ppo": {"a": entry(0.7, times=2), "b": entry(-3.9, low=-4.0, bound=4.0)},
            "round-2/ppo": {"a": entry(0.1), "b": entry(2.0, low=-4.0, bound=4.0)},
        }
    )
    assert joined["a"] == {
        "statistic": 0.7, "low": None, "bound": 1.0, "unit": "u", "held": True, "times": 6, "stage": "round-1/ppo"
    }  # fmt: skip
    assert (joined["b"]["statistic"], joined["b"]["stage"], joined["b"]["times"]) == (-3.9, "round-1/ppo", 2)


def test_a_check_that_did_not_hold_stands_before_all_that_did() -> None:
    joined = joined_checks({"x": {"a": entry(2.0)}, "y": {"a": entry(0.999)}, "z": {"a": entry(3.0)}})
    assert (joined["a"]["held"], joined["a"]["stage"]) == (False, "x")


def test_a_statistic_that_is_not_finite_is_null() -> None:
    assert joined_checks({"x": {"a": entry(float("nan"))}})["a"]["statistic"] is None


def test_a_copy_of_the_best_policy_is_not_taken_for_the_link(tmp_path: Path) -> None:
    """`scp -r`, zip and object stores make folders of links."""
    for number in (1, 2):
        (tmp_path / f"round-{number}/ppo/model").mkdir(parents=True)
        _link_best(tmp_path, number)
        assert (tmp_path / "best").resolve() == tmp_path / f"round-{number}/ppo/model"
    (tmp_path / "best").unlink()
    (tmp_path / "best").mkdir()
    with pytest.warns(
        UserWarning, match="a folder and no link, as copies of a run have it, so it keeps an older policy"
    ):
        _link_best(tmp_path, 2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "round-1", "round-2"], (
        "nothing is deleted, or left"
    )
