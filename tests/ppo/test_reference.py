"""The reference, and the roles on the policy's base, stay what they were, whatever of the policy is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf import PPOConfig, PPOTrainer, load_reward_model
from rlhf.errors import UserError
from rlhf.invariants.checks import InvariantError
from rlhf.models.load import find_source, load_policy, model_settings
from rlhf.models.logprobs import response_logprobs
from rlhf.models.save import save_model
from tests.conftest import PROMPTS
from tests.ppo.conftest import LORA
from tests.ppo.test_ppo import make

DATA = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
WHOLE: dict[str, dict[str, Any]] = {
    "head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "embedding": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "both": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
    "LoRA on the embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9, 40]}},
    "DoRA": {"target_modules": ["q_proj"], "use_dora": True},
}
IDS = torch.randint(5, 120, (4, 20), generator=torch.Generator().manual_seed(3))


def moved(model: Any, seed: int, scale: float = 0.1) -> None:
    """Move everything that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * torch.randn(parameter.shape, generator=generator))


def policy_of(base: Path, settings: dict[str, Any], *, after_sft: bool) -> PeftModel:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, task_type="CAUSAL_LM", **settings)
    )
    if after_sft:
        moved(model, 1)
    return model


def said(model: Any) -> Tensor:
    with torch.no_grad():
        return response_logprobs(model.eval(), IDS, torch.ones_like(IDS), 8, 1.0)


def reference_of(trainer: PPOTrainer) -> Tensor:
    trainer.reference.model.eval()
    return trainer.reference.logprobs(IDS, torch.ones_like(IDS), 8, 1.0)


@pytest.mark.parametrize("after_sft", [False, True], ids=["fresh", "after SFT"])
@pytest.mark.parametrize("name", WHOLE)
def test_the_four_roles_stay_apart(
    name: str, after_sft: bool, base_folder: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any],
    tmp_path: Path,
) -> None:  # fmt: skip
    """On one base: PPO moves all that the policy trains; reference, reward and critic give what they gave."""
    policy = policy_of(base_folder, WHOLE[name], after_sft=after_sft)
    start = said(policy) if after_sft else said(AutoModelForCausalLM.from_pretrained(base_folder))
    settings = {**cpu_arguments, "learning_rate": 3e-3, "total_episodes": 24, "save_strategy": "epoch"}
    args = PPOConfig(**settings, per_device_train_batch_size=8, max_completion_length=8, num_ppo_epochs=2)
    trainer = PPOTrainer(
        policy, str(reward_adapter), args, DATA, processing_class=tokenizer, adapter_was_trained=after_sft
    )
    assert trainer.model.shares_backbone
    assert torch.equal(reference_of(trainer), start) or name == "DoRA"
    torch.testing.assert_close(reference_of(trainer), start, atol=1e-5, rtol=0)
    answers = ["yes", "no no", "apple"]
    expected = load_reward_model(reward_adapter).score(PROMPTS[:3], answers)
    critic = trainer.model.critic

    def valued() -> Tensor:
        with torch.no_grad(), critic.active():
            return critic.token_scores(IDS, torch.ones_like(IDS))

    trainer.train()
    assert trainer.checks.entries["policy is reference at start"]["held"]
    assert trainer.checks.entries["reference fixed"]["statistic"] == 0
    assert not torch.allclose(said(trainer.model.policy), start, atol=1e-2), "the policy has moved"
    torch.testing.assert_close(reference_of(trainer), start, atol=1e-5, rtol=0)
    torch.testing.assert_close(trainer.rewards.sources[0].function.score(PROMPTS[:3], answers), expected)
    before = valued()
    with torch.no_grad():
        for parameter in trainer.model.role_parameters("policy"):
            parameter.add_(0.1)
    assert torch.equal(valued(), before), "the critic reads nothing of the policy's"
    torch.testing.assert_close(reference_of(trainer), start, atol=1e-5, rtol=0)
    torch.testing.assert_close(trainer.rewards.sources[0].function.score(PROMPTS[:3], answers), expected)


@pytest.mark.parametrize("name", ["head", "both", "LoRA on the embedding"])
def test_a_reference_from_another_folder_is_that_folders_policy(
    name: str, base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """Round two: the policy of round one, measured to SFT; nothing claims that they are the same."""
    sft, policy = (policy_of(base_folder, WHOLE[name], after_sft=True) for _ in range(2))
    moved(policy, 2)
    save_model(sft, tokenizer, tmp_path / "sft")
    assert find_source(tmp_path / "sft").adapter is not None
    args = PPOConfig(**cpu_arguments, total_episodes=8, per_device_train_batch_size=8, max_completion_length=8)
    trainer = PPOTrainer(policy, str(reward_folder), args, DATA, processing_class=tokenizer)
    trainer.reference.load(tmp_path / "sft")
    assert torch.equal(reference_of(trainer), said(load_policy(tmp_path / "sft", model_settings(LORA))))
    trainer.train()
    assert trainer.checks.entries["reference fixed"]["held"]
    assert "policy is reference at start" not in trainer.checks.entries
    with pytest.raises(UserError, match="does not fit the reference, which also has"):
        trainer.reference.load(
            _saved(policy_of(base_folder, {"target_modules": ["k_proj"]}, after_sft=True), tokenizer, tmp_path)
        )


def _saved(model: PeftModel, tokenizer: Any, folder: Path) -> Path:
    save_model(model, tokenizer, folder / "other")
    return folder / "other"


def test_weights_of_the_base_that_are_trained_are_refused(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tokenizer: Any
) -> None:
    policy = policy_of(base_folder, {"target_modules": ["q_proj"]}, after_sft=True)
    for name, parameter in policy.named_parameters():
        if "norm" in name:
            parameter.requires_grad_(True)
    with pytest.raises(
        UserError, match=r"5 weights of the base are trained beside the adapter, first .*norm.* bias='none'"
    ):
        PPOTrainer(policy, str(reward_folder), PPOConfig(**cpu_arguments), DATA, processing_class=tokenizer)


@pytest.mark.parametrize("when", ["at a checkpoint", "at the end", "after a resume"])
def test_a_reference_that_moves_is_found(
    when: str, base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    settings = {
        **cpu_arguments,
        "output_dir": str(tmp_path),
        "save_strategy": "no" if when == "at the end" else "epoch",
    }
    trainer, _ = make(base_folder, str(reward_folder), settings)

    def move(one: PPOTrainer) -> None:
        with torch.no_grad():
            one.reference.model.lm_head.weight.mul_(1.01)

    if when == "after a resume":
        trainer.train()
        resumed, rows = make(base_folder, str(reward_folder), settings)
        move(resumed)
        with pytest.raises(InvariantError, match="'reference fixed' failed"):
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
        assert rows.rows == []
        return
    trainer.rollout(trainer.prompts_of(0))
    move(trainer)
    trainer.progress.episodes = 1  # not the start any more
    with pytest.raises(InvariantError, match=r"'reference fixed' failed: .* KL and its penalty are measured to"):
        trainer.train()
    assert not list(tmp_path.glob("checkpoint-*/model.safetensors"))


def test_a_policy_that_is_not_its_reference_is_found_before_the_update(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer, rows = make(base_folder, str(reward_folder), cpu_arguments)
    with torch.no_grad():
        trainer.reference.model.model.embed_tokens.weight.add_(1e-3)
    with pytest.raises(InvariantError, match=r"'policy is reference at start' failed: .*leaves out a part"):
        trainer.train()
    assert rows.rows == []


def test_a_reference_that_follows_is_taken_anew_after_each_step(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    settings = {**cpu_arguments, "output_dir": str(tmp_path), "save_strategy": "epoch", "reference_mixup": 0.5}
    trainer, _ = make(base_folder, str(reward_folder), settings)
    trainer.train()
    assert trainer.checks.entries["reference fixed"]["statistic"] == 0
    resumed, _ = make(base_folder, str(reward_folder), settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert resumed.checks.entries["reference fixed"]["held"]
