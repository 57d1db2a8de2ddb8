"""What the page says in words follows from more than the scatter of rollouts."""

import random
from typing import Any

import pytest

from rlhf.report.page import _overoptimised


def training(proxy: list[float], gold: list[float], scatter: float) -> list[dict[str, Any]]:
    """Eight rollouts a third, normally scattered about these means."""
    rng = random.Random(0)
    return [
        {"reward_proxy": rng.gauss(p, scatter), "reward_gold": rng.gauss(g, scatter)}
        for p, g in zip(proxy, gold, strict=True)
        for _ in range(8)
    ]


@pytest.mark.parametrize(
    ("proxy", "gold", "scatter", "said"),
    [
        ([2.0, 2.3, 2.6], [0.60, 0.60, 0.60], 0.03, "No over-optimisation is seen"),
        ([2.0, 2.3, 2.6], [0.50, 0.60, 0.40], 0.03, "The reward was over-optimised: in the last third"),
        ([2.0, 2.3, 2.6], [0.50, 0.60, 0.40], 0.30, "No over-optimisation is seen"),
        ([2.0, 2.3, 2.0], [0.50, 0.60, 0.40], 0.03, "No over-optimisation is seen"),
    ],
)
def test_a_fall_is_one_only_beyond_the_scatter_of_rollouts(
    proxy: list[float], gold: list[float], scatter: float, said: str
) -> None:
    assert _overoptimised(training(proxy, gold, scatter)).startswith(said)


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert "can't be said without a true reward" in _overoptimised([{"reward_proxy": 1.0}] * 9)
    assert "5 logged rollouts are too few" in _overoptimised(training([1.0], [1.0], 0.1)[:5])
