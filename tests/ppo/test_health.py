"""The monitor speaks of what is planted, once, and of nothing in a run that is well."""

import math
import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf import load_reward_model
from rlhf.ppo.health import CONCERNS, Health, longer_limit
from rlhf.reward.cloud import latent_cloud
from tests.ppo.test_ppo import DATA, make

WELL = {
    "ratio_first": 1.0, "kl": 1.0, "kl_k3": 1.0, "length": 20.0, "share_without_eos": 0.02, "distinct_2": 0.4, "entropy": 2.0,
    "explained_variance": 0.5, "clipped_rewards": 0.01, "reward_proxy": 0.0, "reward_gold": 0.2, "reward_deviation": 1.0,
    "nll_reference": 1.5, "disagreement": 0.3, "outside_cloud": 0.05, "outside_limit": 0.2,
}  # fmt: skip
ILL = {
    "ratio": {"ratio_first": 1.2},
    "negative KL": {"kl": -2.0},
    "length": {"length": 50.0, "share_without_eos": 0.3},
    "short": {"length": 3.0},
    "repetition": {"distinct_2": 0.1},
    "entropy": {"entropy": 0.1},
    "perplexity": {"nll_reference": 3.0},
    "critic": {"explained_variance": -0.3},
    "calibrated critic": {"explained_variance": -0.3, "value_slope": 0.0},
    "reward tail": {"clipped_rewards": 0.5},
    "disagreement": {"disagreement": 0.7},
    "cloud": {"outside_cloud": 0.4},
    "constant reward": {"reward_deviation": 0.0},
    "hacking": {"reward_proxy": 3.0, "reward_gold": -0.2},
}


def test_every_concern_is_planted_here() -> None:
    assert set(ILL) == {concern.name for concern in CONCERNS}


@pytest.mark.fault("edges of PPO")
@pytest.mark.parametrize("name", sorted(ILL))
def test_each_trouble_is_said_once_and_alone(name: str) -> None:
    health = Health()
    well = {
        **WELL,
        **({"reward_deviation": 0.0} if name == "constant reward" else {}),
        **({"value_slope": 0.5} if name == "calibrated critic" else {}),
    }  # what is constant is so from the start, and values are calibrated from the start
    assert health.look(dict(well)) == []
    for _ in range(10 if name != "constant reward" else 0):
        assert health.look(dict(well)) == []
    if name == "hacking":  # a trend, which a single rollout is not
        for _ in range(4):
            assert health.look({**WELL, **ILL[name]}) == []
    rollout = health.rollouts + 1
    new = health.look({**well, **ILL[name]})
    assert [sentence.split(":")[0] for sentence in new] == [f"ppo, rollout {rollout}"]
    assert health.raised == [name]
    assert health.look({**well, **ILL[name]}) == []
    assert health.sentences == new


def test_what_is_unknown_worries_nobody() -> None:
    health = Health()
    health.look({"kl": 1.0})
    assert health.look({"kl": -5.0}) == []


def test_a_run_stops_where_it_is_asked_to(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """Answers of eight random tokens do not end; that is said of the first rollout, before its update, and ends training."""
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments, stop_when_unhealthy=True, total_episodes=160)
    with pytest.warns(UserWarning, match="rollout 1: .* of the answers were cut at 8 tokens"):
        trainer.train()
    assert len(rows.rows) == 1
    assert trainer.stopped is not None
    assert 0 < rows.rows[0]["distinct_2"] <= 1


@pytest.mark.parametrize("far", [False, True])
def test_answers_that_leave_the_cloud_of_a_code_are_counted_and_said_once(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], far: bool
) -> None:
    """A cloud of this very policy's answers, and one elsewhere."""
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments, total_episodes=32)
    reward: Any = trainer.rewards.sources[0].function
    assert reward.cloud is None, "no bottleneck, nothing to leave"
    answers = trainer.sample([{"prompt": row["prompt"]} for row in DATA] * 6)
    prompts = [row["prompt"] for row in DATA] * 6
    features = reward.features(prompts, answers.texts, ended=answers.ended.tolist())
    code = torch.randn(16, features.shape[1], generator=torch.Generator().manual_seed(0))
    reward.cloud = latent_cloud(code, features + 100.0 if far else features)
    trainer.train()
    assert all(row["outside_limit"] == reward.cloud.most_outside(16) / 16 for row in rows.rows)
    said = [sentence for sentence in trainer.progress.health.sentences if "outside those of SFT" in sentence]
    if far:
        assert rows.rows[0]["outside_cloud"] == 1.0
        assert len(said) == 1
        assert "100% of the answers lie outside those of SFT in the reward model's code" in said[0]
    else:
        assert rows.rows[0]["outside_cloud"] <= 0.3
        assert not said


def test_cut_answers_are_told_of_before_the_first_update_however_rarely_is_logged(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """With the share, the limit, and the two keys with their present and new values; a resumed run does not say it again."""
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments, logging_strategy="no", missing_eos_penalty=0.5)
    trainer.create_optimizer_and_scheduler(num_training_steps=1)
    with pytest.warns(UserWarning, match="were cut") as warned:
        trainer.rollout(trainer.prompts_of(0))
    (sentence,) = [str(warning.message) for warning in warned if "were cut" in str(warning.message)]
    share = trainer.metrics.take()["share_without_eos"]
    assert share > 0.5
    assert sentence.startswith(f"ppo, rollout 1: {share:.0%} of the answers were cut at 8 tokens")
    assert f"ppo.max_completion_length from 8 to about {longer_limit(share, 8)}" in sentence
    assert "ppo.missing_eos_penalty from 0.5 to 1," in sentence
    assert rows.rows == []
    assert trainer.progress.health.sentences == [sentence]
    assert Health(**asdict(trainer.progress.health)).look_at_ends(1.0, rollout=2, limit=8, penalty=None) == []


def test_the_new_limit_cuts_a_fifth_of_answers_that_end_anywhere_alike() -> None:
    """Lengths drawn with one chance of ending at every token: 64 % are cut at 40 tokens, 20 % at the limit that is named."""
    rng = random.Random(0)
    lengths = [1 + int(math.log(1 - rng.random()) / math.log(1 - 0.0111)) for _ in range(20_000)]
    share = sum(length > 40 for length in lengths) / len(lengths)
    assert share == pytest.approx(0.64, abs=0.01)
    limit = longer_limit(share, 40)
    assert limit % 16 == 0
    assert 0.16 < sum(length > limit for length in lengths) / len(lengths) <= 0.2
    health = Health()
    assert health.look_at_ends(0.5, rollout=1, limit=40, penalty=None) == [], "half is not most"
    assert "set ppo.missing_eos_penalty to 1," in health.look_at_ends(share, rollout=3, limit=40, penalty=None)[0]


def raised_in(runs: int, rollouts: int, fall: float) -> float:
    """The share of runs with the alarm: the score rises steadily, the true reward scatters by 0.03 and falls by so much in all."""
    rng, raised = random.Random(0), 0
    for _ in range(runs):
        health = Health()
        for i in range(rollouts):
            gold = rng.gauss(0.7 - fall * i / rollouts, 0.03)
            health.look({"reward_proxy": 1 + 0.03 * i, "reward_gold": gold})
        raised += "hacking" in health.raised
    return raised / runs


@pytest.mark.parametrize("rollouts", [20, 100])
def test_a_true_reward_that_only_scatters_is_seldom_called_a_fall(rollouts: int) -> None:
    """Scores rise in every run, so that they do not keep the alarm back: it came in 7 of 100 runs of 20 rollouts, in 23 of 100.

    At 0.01, more than 7 of 200 come once in a thousand times.
    """
    assert raised_in(200, rollouts, 0.0) <= 7 / 200


def test_a_fall_is_called_one() -> None:
    """By five times what a rollout scatters, in 100 rollouts: always; the runs are independent, so 19 of 20 is no accident."""
    assert raised_in(20, 100, 0.15) >= 19 / 20


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_reward_that_says_one_thing_is_told_of(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], reward: float
) -> None:
    """It trained on the critic's noise, 3 nats away, and all that was said was that the critic explains nothing."""

    def constant(prompts: Any, completions: list[Any], **_: Any) -> list[float]:
        return [reward] * len(completions)

    critic = load_reward_model(reward_folder).model.requires_grad_(True)
    trainer, rows = make(base_folder, constant, cpu_arguments, critic=critic, total_episodes=48)
    with pytest.warns(UserWarning, match=f"the same score, {reward:.2f} now and {reward:.2f} at the start"):
        trainer.train()
    assert all(row["reward_deviation"] == 0 for row in rows.rows)


def test_a_reward_beside_one_that_says_one_thing_is_something_to_learn(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], recwarn: pytest.WarningsRecorder
) -> None:
    """The sum is what is optimised, and with `stop_when_unhealthy` the alarm would end training."""

    def constant(prompts: Any, completions: list[Any], **_: Any) -> list[float]:
        return [1.0] * len(completions)

    def words(prompts: Any, completions: list[Any], **_: Any) -> list[float]:
        return [float(len(completion[-1]["content"])) for completion in completions]

    critic = load_reward_model(reward_folder).model.requires_grad_(True)
    trainer, rows = make(base_folder, [constant, words], cpu_arguments, critic=critic, total_episodes=48)
    trainer.train()
    assert all(row["reward_deviation"] > 0 for row in rows.rows)
    assert not [warning for warning in recwarn if "the same score" in str(warning.message)]


def test_one_rollout_of_bad_luck_is_no_hacking() -> None:
    """Scores and true rewards that only scatter, the true one by its own standard error of 0.03."""
    rng, health = random.Random(0), Health()
    for _ in range(60):
        assert health.look({**WELL, "reward_proxy": rng.gauss(4.7, 0.1), "reward_gold": rng.gauss(0.7, 0.03)}) == []
