"""Models, batches and targets meet on one device, also where that is not the CPU; no accelerator is needed to see it."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn
from transformers import AutoModelForCausalLM
from trl import RewardConfig

from rlhf import (
    ContrastiveRewardTrainer,
    MetaRewardTrainer,
    PairRewardTrainer,
    PPOConfig,
    PPOTrainer,
    load_reward_model,
)
from rlhf.models.load import load_policy, model_settings
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.run import run as run_recipe
from rlhf.pipeline.vote import vote
from rlhf.ppo.backbone import AdapterScorer
from rlhf.recipe import load_recipe
from rlhf.reward import load as reward_load
from rlhf.reward import model as reward_model
from rlhf.reward.frozen_trunk import Trunk
from rlhf.reward.load import save_reward_model
from rlhf.reward.model import RewardModel
from tests.conftest import PROMPTS, WORDS
from tests.pretended import ACCELERATOR, MixedDevices, place, pretended_accelerator
from tests.unit_scale import build_reward_model

DATA = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])


@pytest.fixture(autouse=True)
def _accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with pretended_accelerator(monkeypatch):
        yield


def everything_is_there(model: nn.Module) -> bool:
    return all(place(tensor) == ACCELERATOR for tensor in (*model.parameters(), *model.buffers()))


def test_the_pretence_fails_where_an_accelerator_does() -> None:
    here, there = torch.ones(3), torch.ones(3, device=ACCELERATOR)
    linear = nn.Linear(3, 2).to(ACCELERATOR)
    assert everything_is_there(linear)
    assert linear(there).device == ACCELERATOR
    mixed = (
        lambda: here + there,
        lambda: linear(here),
        lambda: torch.cat([here, there]),
        lambda: nn.functional.embedding(torch.tensor([1]), torch.ones(3, 2, device=ACCELERATOR)),
        lambda: here[torch.tensor([0, 1], device=ACCELERATOR)],
        lambda: here.__setitem__([0, 1], there[:2]),
        lambda: there.numpy(),
        lambda: np.asarray(there),
    )
    for wrong in mixed:
        with pytest.raises(MixedDevices):
            wrong()
    # What is allowed there: single numbers, indices of the CPU, copies.
    assert (there * torch.tensor(2.0)).device == ACCELERATOR
    assert there[torch.tensor([0, 1])].device == ACCELERATOR
    there[:2] = here[:2]
    there.copy_(here)
    assert there.cpu().numpy().sum() == 3
    linear(there).sum().backward()
    torch.testing.assert_close(linear.weight.grad, torch.ones(2, 3, device=ACCELERATOR))  # which compares devices too


@pytest.mark.parametrize("share", [True, False], ids=["shared", "plain"])
@pytest.mark.parametrize("trainer", [PairRewardTrainer, ContrastiveRewardTrainer, MetaRewardTrainer])
def test_reward_trainers(
    base_folder: Path,
    tokenizer: Any,
    pairs: Dataset,
    cpu_arguments: dict[str, Any],
    tmp_path: Path,
    trainer: Any,
    share: bool,
) -> None:
    extra: dict[str, Any] = {"share_prompts": share}
    if trainer is ContrastiveRewardTrainer:
        extra["extra"] = "swav"
    if trainer is MetaRewardTrainer:
        extra["meta_samples"] = [
            {"prompt": prompt, "responses": ["yes", "no", "please dog"], "ended": [True] * 3} for prompt in PROMPTS[:8]
        ]
    model: Any = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(
        **{**cpu_arguments, "output_dir": str(tmp_path), "per_device_train_batch_size": 8, "eval_strategy": "epoch"}
    )
    trained = trainer(model, args, train_dataset=pairs, eval_dataset=pairs, processing_class=tokenizer, **extra)
    trained.train()
    assert everything_is_there(trained.model)
    scores = RewardModel(trained.model.eval(), tokenizer, conversational=True).score(PROMPTS[:3], ["yes", "no", "dog"])
    assert place(scores) == torch.device("cpu")


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("trunk", [None, 1], ids=["independent", "trunk"])
def test_votes(
    base_folder: Path,
    encoder_folder: Path,
    pairs: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    trunk: int | None,
    kind: str,
) -> None:
    made, kept = Trunk.member, []

    def member(self: Trunk) -> Any:
        kept.append(made(self))
        return kept[-1]

    monkeypatch.setattr(Trunk, "member", member)
    rows = [{**row, "confidence": 0.9} for row in pairs.to_list()]
    settings = {"learning_rate": 1e-3, "per_device_train_batch_size": 8, "save_strategy": "no"}
    strength, *_ = vote(
        base_folder if kind == "decoder" else encoder_folder, rows, settings, tmp_path, members=2, folds=2,
        in_sample=False, trunk=trunk, flip_rate=0.1, seed=0, say=lambda _: None,
    )  # fmt: skip
    assert len(kept) == (0 if trunk is None else 3), "one is the check's"
    assert all(everything_is_there(one.model) for one in kept), "members are trained where the trainers train"
    assert place(strength.mean) == torch.device("cpu")


@pytest.mark.parametrize("shared", [False, True], ids=["separate", "backbone"])
def test_ppo(
    base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path, shared: bool
) -> None:
    """A rollout and its updates, an evaluation, a checkpoint and a run that goes on from it."""
    reward: Any = str(reward_folder)
    if shared:
        lora = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}
        model = build_reward_model(base_folder, model_settings(lora), pad_token_id=tokenizer.pad_token_id)
        samples = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
        save_reward_model(tmp_path / "reward", model, tokenizer, samples=samples)
        reward = str(tmp_path / "reward")

    def made() -> PPOTrainer:
        torch.manual_seed(0)
        policy: Any = AutoModelForCausalLM.from_pretrained(base_folder)
        if shared:
            policy = load_policy(base_folder, model_settings(lora))
        arguments = {
            "per_device_train_batch_size": 8, "num_mini_batches": 2, "total_episodes": 32, "max_completion_length": 8,
            "save_strategy": "epoch", "eval_strategy": "epoch", "cliprange_dual": 3.0, "kl_estimator": "k3",
        }  # fmt: skip
        args = PPOConfig(**{**cpu_arguments, **arguments, "output_dir": str(tmp_path / "ppo")})
        return PPOTrainer(policy, reward, args, DATA, DATA.select(range(4)), processing_class=tokenizer)

    trainer = made()
    trainer.train()
    container: Any = trainer.accelerator.unwrap_model(trainer.model)
    assert container.shares_backbone == shared
    assert everything_is_there(container)
    again = made()
    first = min((tmp_path / "ppo").glob("checkpoint-*"), key=lambda folder: int(folder.name.partition("-")[2]))
    again.train(resume_from_checkpoint=str(first))
    for name, parameter in container.named_parameters():
        assert torch.equal(parameter, again.accelerator.unwrap_model(again.model).get_parameter(name)), name


def test_a_loaded_reward_model_lives_where_it_was_asked_to(reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder, device=ACCELERATOR)
    assert everything_is_there(reward.model)
    assert reward.score(PROMPTS[:2], ["yes", "no"]).device == torch.device("cpu")
    assert reward.features(PROMPTS[:2], ["yes", "no"]).device == torch.device("cpu")


RECIPE = """
name: small
lab: {demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 50, num_train_epochs: 1, use_peft: true, lora_r: 4}
vote: {members: 2, folds: 2}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 30, objective: posterior, members: 2, use_peft: true, lora_r: 4}
ppo: {total_episodes: 16, per_device_train_batch_size: 8, num_ppo_epochs: 1, max_completion_length: 12, use_peft: true, lora_r: 4}
rounds: {count: 2, prompts: 16, labels: 24, select: information}
evaluate: {prompts: 8}
"""


def test_a_whole_run_of_two_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what lies between the trainers: sampling, selecting, scoring, judging. No trainer lives to its first log."""
    monkeypatch.setattr(StageContext, "device", property(lambda _: str(ACCELERATOR)))
    put_by_default, score_rows, scored = reward_load._place, reward_model.score_rows, []

    def seen(model: nn.Module, *arguments: Any, **keys: Any) -> torch.Tensor:
        is_on_backbone = isinstance(model, AdapterScorer)  # checked on its probe before the trainer moves both
        scored.append(is_on_backbone or everything_is_there(model))
        return score_rows(model, *arguments, **keys)

    def put_there(model: Any, device: Any, *, load_in_4bit: bool) -> Any:
        # An accelerator that is there is the default.
        return put_by_default(model, device or ACCELERATOR, load_in_4bit=load_in_4bit)

    monkeypatch.setattr(reward_model, "score_rows", seen)
    monkeypatch.setattr(reward_load, "_place", put_there)
    (tmp_path / "r.yaml").write_text(RECIPE)
    run_recipe(load_recipe(tmp_path / "r.yaml"), tmp_path / "run", say=lambda _: None)
    assert (tmp_path / "run/summary.json").is_file()
    assert scored, "and nothing scores elsewhere"
    assert all(scored)
