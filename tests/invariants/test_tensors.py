"""Nothing lost between what a stage saved and what the next one loads: adapters of every kind, whole modules, whole models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.invariants.tensors import nothing_lost
from rlhf.models.load import load_policy, model_settings
from rlhf.models.save import save_model
from tests.unit_scale import build_reward_model

KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "embed_tokens": {"lora_modules_to_save": ["embed_tokens"]},
    "lm_head": {"lora_modules_to_save": ["lm_head"]},
    "both": {"lora_modules_to_save": ["embed_tokens", "lm_head"]},
    "norm and dora": {"lora_modules_to_save": ["norm"], "use_dora": True},
    "factors on embeddings": {"lora_target_modules": ["q_proj", "embed_tokens"]},
    "factors on the head": {"lora_target_modules": ["q_proj", "lm_head"]},
    "whole": {"use_peft": False},
}


@pytest.fixture
def trained(base_folder: Path, tokenizer: Any, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """Save a policy of which everything trainable was moved."""
    torch.manual_seed(0)
    settings = {"use_peft": True, "lora_r": 4, **KINDS[request.param]}
    policy = load_policy(base_folder, model_settings(settings))
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    save_model(policy, tokenizer, tmp_path / "sft")
    return tmp_path / "sft"


@pytest.mark.parametrize("use_peft", [True, False], ids=["adapter", "merged"])
@pytest.mark.parametrize("trained", KINDS, indirect=True)
def test_policy_and_reward_model_start_from_all_that_was_trained(trained: Path, tokenizer: Any, use_peft: bool) -> None:
    config = model_settings({"use_peft": use_peft, "lora_r": 4})
    policy = load_policy(trained, config)
    reward = build_reward_model(trained, config, pad_token_id=tokenizer.pad_token_id)
    for model in (policy, reward):
        check = nothing_lost(trained, model)
        assert check.held, check.sentence
    # The same hidden states: what was merged too.
    ids = torch.tensor([tokenizer("list red apple").input_ids])
    inner, inner_reward = (model.base_model.model if use_peft else model for model in (policy, reward))
    if trained_by_adapter(trained) and "lm_head" not in (trained / "adapter_config.json").read_text():
        with torch.no_grad():
            expected, hidden = (model.eval().model(ids).last_hidden_state for model in (inner, inner_reward))
        assert torch.allclose(expected, hidden, atol=1e-5)


def trained_by_adapter(folder: Path) -> bool:
    return (folder / "adapter_config.json").is_file()


@pytest.mark.parametrize("trained", ["embed_tokens", "dora", "whole", "factors on embeddings"], indirect=True)
def test_a_tensor_that_is_another_is_named(trained: Path, tokenizer: Any) -> None:
    (file,) = trained.glob("*model.safetensors")
    model = build_reward_model(trained, model_settings({"use_peft": True}), pad_token_id=tokenizer.pad_token_id)
    weights = load_file(file)
    name = next(n for n in weights if "layers.1" in n)
    weights[name][..., -1] += 1e-3
    save_file(weights, file, metadata={"format": "pt"})
    check = nothing_lost(trained, model)
    assert (check.held, check.statistic) == (False, 1.0)
    assert name.removeprefix("base_model.model.") in check.sentence


@pytest.mark.parametrize("trained", ["embed_tokens"], indirect=True)
def test_a_module_that_the_next_stage_reads_from_the_base_is_named(
    trained: Path, base_folder: Path, tokenizer: Any
) -> None:
    """The fault of issue 25: the reward model began with the base's embedding."""
    model = build_reward_model(trained, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    untrained = load_file(base_folder / "model.safetensors")["model.embed_tokens.weight"]
    model.get_input_embeddings().weight.data.copy_(untrained)
    check = nothing_lost(trained, model)
    assert not check.held
    assert "model.embed_tokens.weight" in check.sentence


@pytest.mark.parametrize("trained", ["whole"], indirect=True)
def test_another_type_is_no_loss(trained: Path) -> None:
    assert nothing_lost(trained, load_policy(trained, model_settings({"dtype": "bfloat16"}))).held
    assert nothing_lost(trained, load_policy(trained, model_settings({"use_peft": True}))).held


@pytest.mark.parametrize("trained", ["whole"], indirect=True)
def test_what_is_rounded_around_4_bit_weights_is_no_loss_and_another_number_is(trained: Path, tokenizer: Any) -> None:
    """QLoRA goes on from a whole SFT model in float32: its norms and embeddings pass through the compute type."""
    settings = model_settings({"use_peft": True, "load_in_4bit": True, "lora_r": 4})
    policy = load_policy(trained, settings)
    reward = build_reward_model(trained, settings, pad_token_id=tokenizer.pad_token_id)
    for model in (policy, reward):
        check = nothing_lost(trained, model)
        assert check.held, check.sentence
    policy.get_input_embeddings().weight.data[5, 0] += 0.05
    check = nothing_lost(trained, policy)
    assert (check.statistic, check.held) == (1.0, False)


def test_a_folder_without_weights_has_lost_them(base_folder: Path, tmp_path: Path) -> None:
    model = load_policy(base_folder, model_settings({}))
    check = nothing_lost(tmp_path, model)
    assert not check.held
    assert "any weight, as no *.safetensors is there" in check.sentence
