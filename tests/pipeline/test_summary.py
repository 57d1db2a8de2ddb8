"""What `summary.json` says of the checks of all stages."""

from rlhf.invariants.checks import CheckEntry
from rlhf.pipeline.summary import joined_checks


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
