"""What once went wrong in PPO without a word, or after hours."""

import math
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rlhf import PPOConfig, PPOTrainer, load_reward_model
from rlhf.data.rows import user_turn
from rlhf.models.generate import encode_prompts
from rlhf.models.load import load_policy, model_settings
from rlhf.models.save import save_model
from rlhf.models.text import encode_answers
from rlhf.ppo.reporting import evaluate
from rlhf.ppo.roles import make_reference
from rlhf.reward.load import save_reward_model
from tests.conftest import PROMPTS, WORDS
from tests.ppo.test_ppo import DATA, make

QUIET = {"total_episodes": 16, "num_ppo_epochs": 1, "num_mini_batches": 1}


def args_of(arguments: dict[str, Any], **more: Any) -> PPOConfig:
    return PPOConfig(**{"per_device_train_batch_size": 8, "max_completion_length": 8, **QUIET, **arguments, **more})


# ---- Weights of 16 bits round away what PPO teaches ----


def test_a_checkpoint_in_bfloat16_is_trained_in_float32(
    base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """As nearly all checkpoints of a hub are; at the default rate a step is below half of what bfloat16 can tell apart."""
    for name, folder in (("policy", base_folder), ("reward", reward_folder)):
        if name == "policy":
            save_model(AutoModelForCausalLM.from_pretrained(folder).bfloat16(), tokenizer, tmp_path / name)
        else:
            coarse = load_reward_model(folder).model.bfloat16()
            samples = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
            save_reward_model(tmp_path / name, coarse, tokenizer, samples=samples)
    args = args_of(cpu_arguments, learning_rate=3e-6, max_completion_length=8)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = PPOTrainer(str(tmp_path / "policy"), str(tmp_path / "reward"), args, DATA)
    assert not [w for w in caught if "rounded away" in str(w.message)]
    assert load_reward_model(tmp_path / "reward").model.dtype == torch.bfloat16, (
        "scores stay as they are computed elsewhere"
    )
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    assert {weight.dtype for weight in before.values()} == {torch.float32}
    trainer.train()
    for role in ("policy.", "critic."):
        changed = [
            (weight != before[name]).double().mean().item()
            for name, weight in trainer.model.named_parameters()
            if name.startswith(role)
        ]
        assert np.mean(changed) > 0.8, role


def test_weights_of_16_bits_that_somebody_hands_over_are_said(
    base_folder: Path, reward_folder: Path, tokenizer: Any, cpu_arguments: dict[str, Any]
) -> None:
    model = AutoModelForCausalLM.from_pretrained(base_folder).bfloat16()
    with pytest.warns(UserWarning, match="the policy's trained weights are bfloat16, in which most steps"):
        PPOTrainer(
            model,
            str(reward_folder),
            args_of({**cpu_arguments, "learning_rate": 1e-6}),
            DATA,
            processing_class=tokenizer,
        )


def test_no_clipping_is_no_multiplication_by_zero(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer, _ = make(base_folder, str(reward_folder), {**cpu_arguments, "max_grad_norm": 0.0})
    before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
    trainer.update(trainer.rollout(trainer.prompts_of(0)))
    assert sum(not torch.equal(weight, before[name]) for name, weight in trainer.model.named_parameters()) > 10


# ---- The reference of a later round ----


def test_a_whole_reference_takes_the_weights_of_an_sft_adapter(base_folder: Path, sft_adapter: Path) -> None:
    """SFT by LoRA, PPO without: in round two the reference is SFT's policy, and its folder holds an adapter."""
    policy = load_policy(base_folder, model_settings({}))
    reference = make_reference(policy, adapter_was_trained=False)
    reference.load(sft_adapter)
    expected = load_policy(sft_adapter, model_settings({})).state_dict()
    found = reference.model.state_dict()
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert not torch.equal(
        found["model.layers.0.mlp.up_proj.weight"], policy.state_dict()["model.layers.0.mlp.up_proj.weight"]
    )


# ---- What a log says ----


def test_the_log_counts_the_rewards_that_are_optimised(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """Scores of 50 to 56 are far beyond a clip of 5 until their history has normalised them, as it has when they are used."""
    critic = load_reward_model(reward_folder).model.requires_grad_(True)

    def far(completions: list[Any], **_: Any) -> list[float]:
        return [50.0 + i % 7 for i in range(len(completions))]

    trainer, rows = make(
        base_folder, far, cpu_arguments, **QUIET, critic=critic, running_reward_norm=True, reward_clip=5.0,
        missing_eos_penalty=None,
    )  # fmt: skip
    trainer.train()
    assert rows.rows[0]["clipped_rewards"] == 0
    assert abs(rows.rows[0]["reward"]) < 0.2, "normalised by the scores it is the mean of"


@pytest.mark.parametrize("kind", ["lists", "tensors", "arrays"])
def test_rewards_of_single_tokens_are_logged_and_have_a_baseline(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], kind: str
) -> None:
    critic = load_reward_model(reward_folder).model.requires_grad_(True)
    put = {"lists": list, "tensors": torch.tensor, "arrays": np.array}[kind]

    def one_a_token(completion_ids: list[list[int]], **_: Any) -> list[Any]:
        return [put([1.0] * len(ids)) for ids in completion_ids]

    def of_answers(completion_ids: list[list[int]], **_: Any) -> Any:
        scores = [float(len(ids)) for ids in completion_ids]
        return scores if kind == "lists" else put(scores)

    means = {}
    for name, function in (("tokens", one_a_token), ("answers", of_answers)):
        settings = {**QUIET, "missing_eos_penalty": None, "baseline_samples": 2, "reward_clip": None}
        trainer, rows = make(base_folder, function, cpu_arguments, critic=critic, **settings)
        trainer.train()
        means[name] = rows.rows[0]["reward"]
        assert abs(means[name]) < 4, "the reference's answers are as long as the policy's, which is taken off"
    assert means["tokens"] == pytest.approx(means["answers"], abs=1e-5)


# ---- Settings that would end in an error, or be ignored ----


@pytest.mark.fault("refused after hours")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"fp16": True, "use_cpu": False}, "fp16 scales and clips all gradients as one"),
        ({"neftune_noise_alpha": 5.0}, "are for demonstrations"),
        ({"label_smoothing_factor": 0.1}, "are for demonstrations"),
        ({"max_steps": 10}, "give total_episodes in its place"),
        ({"cliprange_dual": 0.0}, "cliprange_dual=0.0 must be above 1"),
    ],
)
def test_what_rollouts_have_not_is_refused_at_once(
    cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], said: str
) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.__post_init__", lambda _: None)  # fp16 wants a GPU there
    with pytest.raises(ValueError, match=said):
        PPOConfig(**{**cpu_arguments, **settings})


# ---- Texts longer than the model reads ----


def test_a_prompt_that_is_cut_keeps_its_begin_token(tokenizer: Any) -> None:
    """As every other reader of it does; a model that was trained behind a begin token writes far worse without."""
    import copy

    begins = copy.deepcopy(tokenizer)
    begins.bos_token = WORDS[0]
    begins.chat_template = "{{ bos_token }} " + begins.chat_template
    prompt = user_turn(" ".join(WORDS * 4))
    (whole,) = encode_prompts(begins, [prompt], max_prompt_length=None)
    (cut,) = encode_prompts(begins, [prompt], max_prompt_length=12)
    assert whole[0] == begins.bos_token_id
    assert cut == [whole[0], *whole[-11:]]
    (scored,), _ = encode_answers(begins, [prompt], [""], ended=[False], max_length=12)
    assert scored[0] == whole[0]


def test_demonstrations_fit_the_context(tokenizer: Any, reward_folder: Path, cpu_arguments: dict[str, Any]) -> None:
    """With learned positions a longer one ends training at the step in which it is drawn."""
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, n_layer=1, n_head=2,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    demonstration = {"prompt": user_turn(" ".join(WORDS * 8)), "completion": [{"role": "assistant", "content": "yes"}]}
    trainer = PPOTrainer(
        GPT2LMHeadModel(config), str(reward_folder), args_of(cpu_arguments, max_prompt_length=None, ptx_coef=0.1), DATA,
        processing_class=tokenizer, ptx_dataset=Dataset.from_list([demonstration] * 4),
    )  # fmt: skip
    assert trainer.longest_prompt == 56
    assert max(len(row) for row in trainer.demonstrations.rows) <= 64
    trainer.train()


# ---- Evaluation ----


@pytest.mark.parametrize("prompts", [9, 11])
def test_an_evaluation_whose_last_batch_is_small_tells_nothing_apart(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], prompts: int
) -> None:
    demonstrations = [
        {"prompt": prompt, "completion": [{"role": "assistant", "content": "yes"}]} for prompt in PROMPTS[:12]
    ]
    trainer, _ = make(
        base_folder, str(reward_folder), cpu_arguments, **QUIET, adversarial_coef=0.1, per_device_eval_batch_size=8,
        ptx_dataset=Dataset.from_list(demonstrations), eval_dataset=DATA.select(range(prompts)),
    )  # fmt: skip
    assert math.isfinite(trainer.evaluate()["eval_reward"])


@pytest.mark.parametrize(("served", "shares"), [(True, [5, 5]), (False, [6, 5])])
def test_processes_that_ask_one_vllm_server_ask_for_equally_many_answers(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], served: bool, shares: list[int]
) -> None:
    """It deals the answers out by equal shares: else they would go to other prompts, or a process would wait for ever."""
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, **QUIET, per_device_eval_batch_size=4)
    asked: list[list[int]] = []
    for rank in range(2):
        sizes: list[int] = []
        pretended: Any = SimpleNamespace(
            accelerator=SimpleNamespace(num_processes=2, process_index=rank, is_main_process=rank == 0),
            args=SimpleNamespace(per_device_eval_batch_size=4, use_vllm=served, vllm_mode="server", reward_clip=None),
            metrics=None, latest_samples=None, progress=trainer.progress,
            experience=lambda rows, sizes=sizes: sizes.append(len(rows)) or ENOUGH,
        )  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("rlhf.ppo.reporting.RolloutMetrics", lambda _: SimpleNamespace(take=dict))
                patch.setattr("rlhf.ppo.reporting.count_rewards", lambda *_: None)
                evaluate(pretended, DATA.select(range(11)))
        said = [w for w in caught if "1 of 11 evaluation prompts are left out" in str(w.message)]
        assert bool(said) == (served and rank == 0)
        asked.append(sizes)
    assert [sum(sizes) for sizes in asked] == shares
    assert not served or asked[0] == asked[1]


ENOUGH = object()
