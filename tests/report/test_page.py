"""What the page says in words follows from more than the scatter of rollouts."""

import random
from typing import Any

import pytest

from rlhf.report.page import _follows, _overoptimised, _training_curves, verdict


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
        ([2.0, 2.3, 2.6], [0.50, 0.60, 0.40], 0.03, "The reward was over-optimised: from the second to the last"),
        ([2.0, 2.3, 2.6], [0.50, 0.60, 0.40], 0.30, "No over-optimisation is seen"),
        # Hacked in the first third, after which the proxy has nothing left to gain.
        ([1.0, 4.0, 3.99], [0.60, 0.10, 0.10], 0.03, "The reward was over-optimised: from the first to the last"),
        ([2.0, 2.3, 2.0], [0.50, 0.60, 0.40], 0.03, "The true reward fell from 0."),
        # A proxy that only scatters did not rise, whichever third came out higher.
        ([2.0, 2.0, 2.01], [0.50, 0.60, 0.40], 0.05, "The true reward fell from 0."),
    ],
)
def test_a_fall_is_one_only_beyond_the_scatter_of_rollouts(
    proxy: list[float], gold: list[float], scatter: float, said: str
) -> None:
    assert _overoptimised(training(proxy, gold, scatter)).startswith(said)


def test_nothing_is_said_of_what_is_not_known() -> None:
    assert "can't be said without a true reward" in _overoptimised([{"reward_proxy": 1.0}] * 9)
    assert "5 logged rollouts are too few" in _overoptimised(training([1.0], [1.0], 0.1)[:5])


@pytest.mark.usefixtures("drawn")
def test_the_axis_names_what_the_kl_is_measured_to() -> None:
    """Of a round that follows the one before, PPO's KL and that of best of n are of two things, and not drawn on one axis."""
    ppo: Any = [{"episodes": 32 * i, "kl": float(i), "reward_proxy": 1.0 * i, "reward_gold": 0.1 * i} for i in range(3)]
    evaluation = {"best_of_n": [{"kl": 1.0, "by_reward": 0.5, "by_gold": 0.6}]}
    for follows, axis in ((False, "KL to SFT"), (True, "KL to the policy of the round before")):
        figures = {title: (note, svg) for title, note, svg in _training_curves(ppo, evaluation, "SFT", follows=follows)}
        note, svg = figures["Reward against KL"]
        assert axis in svg
        assert ("best of n" in svg) is ("best of n" in note) is (not follows)
    manifest: Any = {"parents": {"policy": {}}, "settings": {"reference": "previous"}}
    assert _follows({"round-2/ppo": manifest}, "round-2/ppo")
    assert not _follows({"round-2/ppo": {**manifest, "settings": {"reference": "sft"}}}, "round-2/ppo")
    assert not _follows({"round-1/ppo": {**manifest, "parents": {}}}, "round-1/ppo")


def test_a_tie_is_no_win_and_a_length_rule_is_beaten_by_a_paired_test() -> None:
    policy = {"proxy": 1.0, "gold": 0.1, "kl": 2.0, "win_rate": 0.55, "win_rate_ci": [0.54, 0.56]}
    policy |= {"win_tie_lose": [0.1, 0.9, 0.0], "gold_change": 0.1, "gold_change_ci": [0.08, 0.12]}
    reward = {"accuracy": 0.7, "accuracy_ci": [0.576, 0.824], "length_baseline": 0.56, "over_length": 0.14}
    for interval, beats in (
        ([-0.05, 0.33], "does not clearly beat"),
        ([0.01, 0.27], "beats"),
        (None, "labelled; judging by"),
    ):
        entry = {"round": 1, "policy": policy, "reward": {**reward, "over_length_ci": interval}}
        summary: Any = {
            "rounds": [entry],
            "sft": {"gold": 0.0, "proxy": 0.0},
            "evaluated_prompts": 512,
            "seconds": {"sft": 1.0},
        }
        first, _, of_reward = verdict(summary, [])
        assert (
            "the policy wins 10% of its comparisons with SFT on 512 held-out prompts, ties 90% and loses 0% (win rate 0.55 ["
            in first
        )
        assert beats in of_reward
        assert ("on the same pairs" in of_reward) == (interval is not None)
