"""Adapters for the tests of PPO on one base: what a LoRA SFT leaves, and a LoRA reward model on the same base."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.models.load import load_policy, model_settings
from rlhf.models.save import save_model
from rlhf.reward.load import save_reward_model
from tests.conftest import PROMPTS, WORDS
from tests.unit_scale import build_reward_model

LORA = {"use_peft": True, "lora_r": 4, "lora_target_modules": ["all-linear"]}


def moved(model: Any, seed: int = 0) -> Any:
    """An adapter as training leaves it: no factor is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture(scope="package")
def sft_adapter(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA SFT: an adapter with every weight moved."""
    folder = tmp_path_factory.mktemp("sft")
    torch.manual_seed(0)
    save_model(moved(load_policy(base_folder, model_settings(LORA))), tokenizer, folder)
    return folder


@pytest.fixture(scope="package")
def reward_adapter(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reward-adapter")
    torch.manual_seed(1)
    model = moved(build_reward_model(base_folder, model_settings(LORA), pad_token_id=tokenizer.pad_token_id), seed=1)
    samples = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
    save_reward_model(folder, model, tokenizer, samples=samples)
    return folder
