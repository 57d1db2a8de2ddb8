"""Adapters: switched, checkpointed, merged, and refused on a base that is not theirs."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, PromptLearningConfig, PromptTuningConfig, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from transformers import AutoModelForCausalLM
from trl import ModelConfig, RewardConfig

from rlhf import PairRewardTrainer, load_reward_model
from rlhf.errors import UserError
from rlhf.models.adapters import LEARNT_PROMPTS
from rlhf.models.load import adapter_settings, find_source, load_policy, model_settings
from rlhf.models.logprobs import response_logprobs
from rlhf.models.save import save_model
from rlhf.ppo.roles import PolicyAndCritic, active_adapter, make_reference
from tests.conftest import PROMPTS
from tests.unit_scale import build_reward_model


def lora(base: Path, seed: int = 0, **extra: Any) -> PeftModel:
    torch.manual_seed(seed)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, task_type="CAUSAL_LM", target_modules="all-linear", **extra),
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


def test_switching_adapters_leaves_requires_grad_alone(base_folder: Path) -> None:
    model = lora(base_folder)
    model.add_adapter("reference", model.peft_config["default"])
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    ids = torch.arange(5, 15)[None]
    own = model(ids).logits
    with active_adapter(model, None):
        base = model(ids).logits
    with active_adapter(model, "reference"):
        reference = model(ids).logits
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}
    torch.testing.assert_close(model(ids).logits, own)
    torch.testing.assert_close(base, AutoModelForCausalLM.from_pretrained(base_folder)(ids).logits)
    assert not torch.allclose(own, base)
    torch.testing.assert_close(reference, base), "a fresh adapter changes nothing"


def test_the_reference_stays_where_sft_was(base_folder: Path) -> None:
    ids, mask = torch.arange(5, 17)[None], torch.ones(1, 12, dtype=torch.long)
    for trained in (True, False):
        model = lora(base_folder)
        reference = make_reference(model, adapter_was_trained=trained)
        if trained:
            expected = response_logprobs(model, ids, mask, 4, 1.0).detach()
        else:
            base = AutoModelForCausalLM.from_pretrained(base_folder)
            expected = response_logprobs(base, ids, mask, 4, 1.0).detach()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_" in name and ".default." in name:
                    parameter.add_(0.5)
        torch.testing.assert_close(reference.logprobs(ids, mask, 4, 1.0), expected)
        assert all(".default." in name for name, p in model.named_parameters() if p.requires_grad)


def test_checkpointing_gives_the_gradients_of_both_roles(base_folder: Path, tokenizer: Any) -> None:
    gradients = []
    for checkpointing in (False, True):
        policy = lora(base_folder)
        make_reference(policy, adapter_was_trained=True)
        torch.manual_seed(1)
        critic = build_reward_model(base_folder, model_settings({"use_peft": True, "lora_r": 4}), pad_token_id=0)
        for name, parameter in critic.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        container = PolicyAndCritic(policy, critic).train()
        if checkpointing:
            container.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        ids = torch.randint(5, 200, (2, 12), generator=torch.Generator().manual_seed(0))
        outputs = container(ids, torch.ones_like(ids), 5, 1.0)
        (outputs.logprobs.sum() + outputs.values.pow(2).sum()).backward()
        gradients.append({name: p.grad for name, p in container.named_parameters() if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    assert any("score" in name for name in gradients[0])
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradient, gradients[1][name], atol=1e-5, rtol=1e-4)


@pytest.fixture
def sft_adapter(base_folder: Path, tokenizer: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "sft"
    lora(base_folder).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_reward_model_on_an_sft_adapter_keeps_what_sft_learnt(
    base_folder: Path, sft_adapter: Path, tokenizer: Any, use_peft: bool
) -> None:
    assert find_source(sft_adapter).base == str(base_folder)
    settings = {"use_peft": True, "lora_r": 4} if use_peft else {}
    model = build_reward_model(sft_adapter, model_settings(settings), pad_token_id=tokenizer.pad_token_id)
    ids = torch.arange(5, 15)[None]
    policy = load_policy(sft_adapter, model_settings({"use_peft": True}))
    expected = policy.base_model.model.model(ids).last_hidden_state
    inner = model.base_model.model if use_peft else model
    torch.testing.assert_close(inner.model(ids).last_hidden_state, expected, atol=1e-5, rtol=1e-4)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any("score" in name for name in trainable)
    assert isinstance(model, PeftModel) == use_peft
    assert model.config.problem_type == "regression"


def test_merging_the_adapter_into_the_policy(sft_adapter: Path) -> None:
    ids = torch.arange(5, 15)[None]
    adapter = load_policy(sft_adapter, model_settings({"use_peft": True}), trainable=False)
    merged = load_policy(sft_adapter, model_settings({}))
    assert not isinstance(merged, PeftModel)
    torch.testing.assert_close(merged(ids).logits, adapter(ids).logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("whole", [[], ["embed_tokens"]], ids=["factors alone", "and a whole module"])
def test_a_model_that_is_trained_whole_after_a_lora_sft_trains_every_weight(
    base_folder: Path, tokenizer: Any, tmp_path: Path, cpu_arguments: dict[str, Any], pairs: Any, whole: list[str]
) -> None:
    """PEFT froze the base, and once the adapter was merged in nobody thawed it: of a reward model the head alone learnt."""
    lora(base_folder, modules_to_save=whole).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    policy = load_policy(tmp_path, model_settings({}))
    assert all(p.requires_grad for p in policy.parameters())
    model = build_reward_model(tmp_path, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    args = RewardConfig(**{**cpu_arguments, "optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 8})
    PairRewardTrainer(model, args, train_dataset=pairs.select(range(8)), processing_class=tokenizer).train()
    after = dict(model.named_parameters())
    assert [name for name, value in before.items() if torch.equal(after[name], value)] == []


@pytest.mark.parametrize("use_peft", [True, False])
def test_a_learnt_prompt_is_no_start_of_a_reward_model(
    base_folder: Path, tokenizer: Any, tmp_path: Path, use_peft: bool
) -> None:
    """Its prompt was dropped, and the reward model began at the bare base."""
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    settings = model_settings({"use_peft": True, "lora_r": 4} if use_peft else {})
    with pytest.raises(UserError, match="this adapter is a learnt prompt"):
        build_reward_model(tmp_path, settings, pad_token_id=tokenizer.pad_token_id)
    if not use_peft:
        with pytest.raises(UserError, match="this adapter is a learnt prompt"):
            load_policy(tmp_path, settings)


def test_every_kind_of_learnt_prompt_is_known() -> None:
    """Those of PEFT as it is installed, of which some are newer than the oldest version that is supported."""
    kinds = {
        str(k.value) for k, config in PEFT_TYPE_TO_CONFIG_MAPPING.items() if issubclass(config, PromptLearningConfig)
    }
    assert {"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"} <= kinds <= LEARNT_PROMPTS
    assert not {"LORA", "IA3"} & LEARNT_PROMPTS


def scalar_adapter(base: Path, tokenizer: Any, folder: Path) -> Any:
    """A LoRA reward model with every weight moved, saved with its card."""
    from rlhf.reward.load import save_reward_model

    torch.manual_seed(0)
    settings = model_settings({"use_peft": True, "lora_r": 4})
    model = build_reward_model(base, settings, pad_token_id=tokenizer.pad_token_id)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return save_reward_model(folder, model, tokenizer, samples=[(prompt, "yes") for prompt in PROMPTS])


@pytest.mark.fault("adapter of another base")
def test_an_adapter_on_another_base_of_the_same_shape_is_refused(
    base_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """The base is overwritten in place by one that differs in a single matrix, as merged fine-tuning leaves it."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(base_folder, base)
    scalar_adapter(base, tokenizer, tmp_path / "reward")
    policy = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, task_type="CAUSAL_LM"))
    save_model(policy, tokenizer, tmp_path / "policy")
    load_reward_model(tmp_path / "reward")
    load_policy(tmp_path / "policy", model_settings({}))

    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.add_(0.01)
    other.save_pretrained(base)
    for load in (
        lambda: load_reward_model(tmp_path / "reward"),
        lambda: load_policy(tmp_path / "policy", model_settings({"use_peft": True})),
        lambda: build_reward_model(tmp_path / "policy", pad_token_id=0),
    ):
        with pytest.raises(UserError, match="trained on another base"):
            load()
    shutil.rmtree(base)
    with pytest.raises(UserError, match="is not there any more"):
        load_reward_model(tmp_path / "reward")


@pytest.mark.parametrize(
    ("names", "adapted"),
    [
        (["q_proj"], {"q_proj"}),
        (["q_proj", "v_proj"], {"q_proj", "v_proj"}),
        ([".*(k|o)_proj"], {"k_proj", "o_proj"}),
        (["all-linear"], {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
    ],
)
def test_a_list_with_one_name_is_a_list(base_folder: Path, names: list[str], adapted: set[str]) -> None:
    settings = adapter_settings(ModelConfig(use_peft=True, lora_target_modules=names))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base_folder), settings)
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == adapted
