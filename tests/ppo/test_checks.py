"""What PPO checks about itself: quiet on a run as it should be, stopped before the update on every planted fault."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.invariants.checks import InvariantError
from rlhf.models.generate import generate
from rlhf.ppo.state import PPOState
from tests.ppo.test_ppo import make

LARGE = {"per_device_train_batch_size": 64, "max_completion_length": 24, "num_mini_batches": 1, "num_ppo_epochs": 1}


def weights(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_a_run_records_its_checks_and_resumes_their_sums(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**cpu_arguments, "save_strategy": "epoch", "output_dir": str(tmp_path)}
    whole, rows = make(base_folder, str(reward_folder), settings)
    whole.train()
    entry = whole.checks.entries["sampler true"]
    assert entry["held"]
    assert entry["times"] == 2 * 3, "each of three rollouts, and each time all so far"
    assert all(abs(row["sampler_z"]) < 4 for row in rows.rows)
    resumed, _ = make(base_folder, str(reward_folder), settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.progress.surprise == whole.progress.surprise
    assert resumed.progress.tokens == whole.progress.tokens
    assert resumed.checks.entries == whole.checks.entries
    values = json.loads((tmp_path / "checkpoint-8" / "ppo_state.json").read_text())
    for name in ("checks", "surprise", "tokens"):
        del values[name]
    (tmp_path / "ppo_state.json").write_text(json.dumps(values))
    assert PPOState.load(tmp_path).checks.entries == {}, "a checkpoint from before there were checks"


@pytest.mark.parametrize("fault", ["temperature", "top_p", "min_p", "suppressed", "weights"])
def test_a_sampler_that_is_not_the_policy_is_stopped_before_the_update(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, **LARGE, total_episodes=64)
    policy, before = trainer.model.policy, weights(trainer)
    if fault == "temperature":
        monkeypatch.setattr(
            "rlhf.ppo.trainer.generate", lambda *a, temperature, **k: generate(*a, temperature=0.8, **k)
        )
    elif fault == "weights":
        other = type(policy)(policy.config).eval()
        monkeypatch.setattr(trainer, "generate", lambda _, rows, own=trainer.generate: own(other, rows))
    else:
        ids = torch.arange(5, 37)[:, None]
        likely = torch.softmax(policy(ids).logits[:, -1], dim=-1).mean(dim=0).topk(60).indices.tolist()
        narrow = {"top_p": {"top_p": 0.9}, "min_p": {"min_p": 0.1}, "suppressed": {"suppress_tokens": likely}}
        own = policy.generate

        def narrowed(*arguments: Any, generation_config: Any, **named: Any) -> Any:
            generation_config.update(**narrow[fault])
            return own(*arguments, generation_config=generation_config, **named)

        monkeypatch.setattr(policy, "generate", narrowed)
    with pytest.raises(InvariantError, match=r"'sampler true' failed: .*nothing was updated"):
        trainer.train()
    after = weights(trainer)
    assert all(torch.equal(after[name], weight) for name, weight in before.items())
    assert not trainer.checks.entries["sampler true"]["held"]
