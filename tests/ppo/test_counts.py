"""How much PPO does: whole rollouts, a policy that is trained in some of them, every row of a loop of one's own; a resumed run."""

import warnings
from pathlib import Path
from typing import Any

import pytest

from rlhf import load_reward_model
from rlhf.errors import UserError
from rlhf.ppo.batches import steps_of
from tests.ppo.test_ppo import make


def test_episodes_are_whole_rollouts_and_more_than_asked_for_is_said(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """40 of 16 each were 32, and 56 were 64, without a word."""
    for asked, sampled in ((16, 16), (17, 32), (40, 48)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, total_episodes=asked)
        assert trainer.args.num_train_epochs * 16 == sampled
        told = [str(w.message) for w in caught if "whole rollouts" in str(w.message)]
        expected = f"ppo: {sampled} answers are sampled in place of total_episodes={asked}: {sampled // 16} whole rollouts of 16."
        assert told == ([] if asked == sampled else [expected])


def test_a_warmup_of_the_whole_run_is_refused(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="critic_warmup=3 is no less than the 3 rollouts of the run"):
        make(base_folder, str(reward_folder), cpu_arguments, critic_warmup=3, total_episodes=48)
    with pytest.raises(UserError, match="the policy would never be trained"):
        make(base_folder, str(reward_folder), cpu_arguments, critic_warmup=9, total_episodes=None, num_train_epochs=1)


def test_a_loop_of_its_own_trains_on_every_row(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """Of 32 rows, where a rollout of the settings has 16, half were left out."""
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments)
    rows = [*trainer.prompts_of(0), *trainer.prompts_of(1)]
    rollout = trainer.rollout(rows)
    trained = [
        row.tolist() for step in steps_of(rollout, trainer.args, 0) for batch in step for row in batch["input_ids"]
    ]
    assert len(trained) == trainer.args.num_ppo_epochs * 32
    assert trainer.update(rollout)["episodes"] == 32
    with pytest.raises(UserError, match="a rollout of 5 rows is no whole number of num_mini_batches=2 minibatches"):
        trainer.update(trainer.rollout(rows[:5]))


def test_a_resumed_run_takes_the_coefficient_that_it_is_given(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """Only a target moves it; without one the checkpoint's had stayed, and an alarm's advice to raise it did nothing."""
    settings = {**cpu_arguments, "save_strategy": "epoch"}
    trainer, _ = make(base_folder, str(reward_folder), settings, kl_coef=0.05, kl_limit=1e-9)
    with pytest.warns(UserWarning, match="kl_limit"):
        trainer.train()
    checkpoint = str(Path(cpu_arguments["output_dir"]) / f"checkpoint-{trainer.state.global_step}")
    for target, expected in ((None, 5.0), (3.0, 0.05)):
        resumed, rows = make(base_folder, str(reward_folder), settings, kl_coef=5.0, kl_target=target, kl_horizon=10**9)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert rows.rows[-1]["kl_coef"] == pytest.approx(expected)


def test_a_checkpoint_lies_between_two_rollouts_of_the_settings_too(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """With six steps a rollout in place of four, the Trainer looked for a sampler in the middle of one: AttributeError."""
    settings = {**cpu_arguments, "save_strategy": "epoch"}
    trainer, _ = make(base_folder, str(reward_folder), settings, total_episodes=16)
    trainer.train()
    other, _ = make(base_folder, str(reward_folder), settings, total_episodes=32, num_ppo_epochs=3)
    with pytest.raises(
        UserError, match="with 4 optimizer steps a rollout, where num_ppo_epochs and num_mini_batches now make 6"
    ):
        other.train(resume_from_checkpoint=True)


def test_the_monitor_names_rollouts_and_not_logs(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """A log for every second rollout; the reward is constant, which shows at the second log, of rollout 4."""
    trainer, _ = make(
        base_folder,
        lambda completions, **_: [1.0] * len(completions),
        {**cpu_arguments, "logging_strategy": "steps", "logging_steps": 8},
        critic=load_reward_model(reward_folder).model.requires_grad_(True),
        total_episodes=64,
    )
    with pytest.warns(UserWarning, match="ppo, rollout 4: the reward gives all answers"):
        trainer.train()


def test_a_monitor_needs_something_to_look_at(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="logging_strategy='no' leaves nothing to look at"):
        make(base_folder, str(reward_folder), cpu_arguments, stop_when_unhealthy=True, logging_strategy="no")
