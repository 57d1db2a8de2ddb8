"""Adapters that PiSSA, OLoRA and their like begin by changing the base: policy and reference stay what was handed over."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rlhf import PPOConfig, PPOTrainer
from rlhf.errors import UserError
from rlhf.models.logprobs import response_logprobs
from tests.conftest import PROMPTS

DATA = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])


def logprobs(model: Any) -> torch.Tensor:
    ids = torch.randint(5, 290, (8, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return response_logprobs(model.eval(), ids, torch.ones_like(ids), 20, 1.0)


def reference_logprobs(trainer: PPOTrainer) -> torch.Tensor:
    with trainer.reference.acting() as model:
        return logprobs(model)


def make(model: Any, reward: Path, tokenizer: Any, arguments: dict[str, Any], **more: Any) -> PPOTrainer:
    args = PPOConfig(
        **{**arguments, "per_device_train_batch_size": 8, "total_episodes": 16, "max_completion_length": 8}
    )
    return PPOTrainer(model, str(reward), args, DATA, processing_class=tokenizer, **more)


def trained(base: Path, beginning: Any) -> Any:
    """A model with an adapter that adds something, as SFT leaves one."""
    torch.manual_seed(0)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=beginning, task_type="CAUSAL_LM")
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), settings)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("beginning", [True, "pissa", "olora"])
def test_making_a_trainer_changes_no_policy(
    beginning: Any, base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    """The reference's place on the base was made as the policy's had been, which moved the policy by 1.5 nats a token."""
    model = trained(base_folder, beginning)
    before = logprobs(model)
    trainer = make(model, reward_folder, tokenizer, cpu_arguments)
    assert (logprobs(trainer.model.policy) - before).abs().max() < 1e-5
    assert (reference_logprobs(trainer) - before).abs().max() < 1e-5


@pytest.mark.parametrize("beginning", ["pissa", "olora", False])
def test_a_fresh_adapter_begins_at_the_model(
    beginning: Any, base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=beginning)
    with pytest.raises(UserError, match=f"init_lora_weights={beginning!r} does not begin at the model"):
        make(
            AutoModelForCausalLM.from_pretrained(base_folder),
            reward_folder,
            tokenizer,
            cpu_arguments,
            peft_config=settings,
        )


@pytest.mark.parametrize("beginning", ["gaussian", True])
def test_others_do(
    beginning: Any, base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder)
    before = logprobs(model)
    settings = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=beginning)
    trainer = make(model, reward_folder, tokenizer, cpu_arguments, peft_config=settings)
    assert (logprobs(trainer.model.policy) - before).abs().max() < 1e-5
    assert (reference_logprobs(trainer) - before).abs().max() < 1e-5


def test_a_reward_adapter_does_not_share_such_a_base(
    base_folder: Path, reward_adapter: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    """It was trained on the base as it was before."""
    model = trained(base_folder, "pissa")
    before = logprobs(model)
    with pytest.warns(UserWarning, match="began by changing the base"):
        trainer = make(model, reward_adapter, tokenizer, cpu_arguments)
    assert (logprobs(trainer.model.policy) - before).abs().max() < 1e-5
