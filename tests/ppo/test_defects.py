"""The 23 defects of TRL's last PPO trainer (1.12): for each, the test that it is not here; those without one elsewhere are below."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf import RewardModel
from rlhf._trl import BaseTrainer
from rlhf.errors import UserError
from rlhf.models.load import load_scorer, load_tokenizer
from tests.ppo.test_ppo import make

DEFECTS = {
    "D1 no resume": "ppo.test_ppo:test_resumed_run_equals_the_uninterrupted_one_bit_for_bit",
    "D2 the critic is thrown away": "ppo.test_backbone:test_a_resumed_run_ends_bit_for_bit_and_the_critic_is_an_ordinary_adapter",
    "D3 num_mini_batches makes no steps": "ppo.test_ppo:test_mini_batches_are_optimizer_steps",
    "D4 max_grad_norm ignored": "ppo.test_defects:test_max_grad_norm_is_obeyed_for_policy_and_critic_apart",
    "D5 a step per micro-batch at the end of the data": "ppo.test_defects:test_the_end_of_the_data_changes_no_step",
    "D6 accumulation changes weights": "ppo.test_ppo:test_accumulation_does_not_change_the_update",
    "D7 whitening per rank": "pipeline.test_two_processes:test_two_processes_make_the_step_of_one",
    "D8 masks from pad ids": "ppo.test_defects:test_an_answer_full_of_padding_ids_is_an_answer",
    "D9 score after the end": "objectives.test_closed_forms:test_token_rewards_sum_and_place",
    "D10 one end token": "models.test_generate:test_mask_after_end_with_several_end_ids",
    "D11 never stops": "ppo.test_defects:test_sampling_stops_where_answers_end",
    "D12 logits of the prompt": "ppo.test_defects:test_only_answers_have_logits",
    "D13 a full critic beside a LoRA policy": "ppo.test_backbone:test_shared_and_separate_roles_make_the_same_run",
    "D14 one tokenizer for all": "ppo.test_defects:test_the_reward_model_may_have_another_tokenizer",
    "D15 rewards must be modules": "ppo.test_options:test_async_functions_and_functions_of_tokens",
    "D16 no conversations": "ppo.test_ppo:test_reward_columns_reach_the_function",
    "D17 evaluation ignored": "ppo.test_ppo:test_evaluation_during_training_runs_between_rollouts",
    "D18 no vLLM": "ppo.test_vllm:test_an_engine_that_is_the_policy_changes_nothing",
    "D19 FSDP half works": "ppo.test_defects:test_sharding_that_goes_wrong_is_refused_in_a_sentence",
    "D20 diagnostics over padding": "ppo.test_defects:test_padding_is_in_no_diagnostic",
    "D21 k3 inside the reward": "ppo.test_options:test_k2_has_the_gradient_of_the_kl_by_enumeration",
    "D22 ratio is not 1 at step 0": "ppo.test_ppo:test_at_step_0_the_policy_is_the_reference",
    "D23 no critic warm-up, adaptive KL, clipping": "ppo.test_options:test_a_warm_up_trains_the_critic_alone",
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_every_defect_has_its_test(defect: str) -> None:
    module, _, name = DEFECTS[defect].partition(":")
    assert callable(getattr(importlib.import_module(f"tests.{module}"), name))


def test_max_grad_norm_is_obeyed_for_policy_and_critic_apart(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, max_grad_norm=1e-3)
    batch = trainer.rollout(trainer.prompts_of(0)).rows(torch.arange(8))
    trainer.training_step(trainer.model, batch, batch["response_mask"].sum())
    norm = trainer._clip_grad_norm(trainer.model)
    assert norm > 1e-2, "or there is nothing to clip"
    for part in (trainer.model.policy, trainer.model.critic):
        found = torch.nn.utils.get_total_norm([p.grad for p in part.parameters() if p.grad is not None])
        assert found.item() == pytest.approx(1e-3, rel=1e-3)


def test_the_end_of_the_data_changes_no_step(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """36 prompts, rollouts of 16: the third crosses the end of the data, and is a rollout like the others."""
    trainer, rows = make(
        base_folder, str(reward_folder), cpu_arguments, gradient_accumulation_steps=2, num_mini_batches=1
    )
    assert len(trainer.train_dataset) == 36
    trainer.train()
    assert [row["step"] for row in rows.rows] == [2, 4, 6]
    assert [row["episodes"] for row in rows.rows] == [16, 32, 48]


def test_an_answer_full_of_padding_ids_is_an_answer(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Masks are carried, never compared with an id: the same tokens under the same mask, whatever the ids."""
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments)
    pad, sample = trainer.processing_class.pad_token_id, trainer.sample

    def full_of_padding(rows: Any) -> Any:
        found = sample(rows)
        found.response_ids[:, :3] = pad
        return found

    monkeypatch.setattr(
        "rlhf.ppo.experience.check_sampling", lambda *_: None
    )  # these were not sampled, and it would say so
    trainer.sample = full_of_padding  # type: ignore[method-assign]
    rollout = trainer.rollout(trainer.prompts_of(0))
    width = rollout.response_mask.shape[1]
    assert (rollout.input_ids[:, -width:][:, :3] == pad).all()
    assert rollout.response_mask[:, :3].all()
    assert (rollout.logprobs_old[:, :3] != 0).all(), "they have log-probabilities like any token"


def test_sampling_stops_where_answers_end(
    base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """A policy that always says the end token at once: one token an answer, not max_completion_length."""
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments, max_completion_length=64)
    eos = trainer.processing_class.eos_token_id
    head = trainer.model.policy.get_output_embeddings()
    head.register_forward_hook(lambda _, __, out: out.index_fill(-1, torch.tensor([eos]), 1e4))
    found = trainer.sample(trainer.prompts_of(0)[:4])
    assert found.response_ids.shape[1] == 1
    assert found.ended.all()


def test_only_answers_have_logits(base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]) -> None:
    trainer, _ = make(base_folder, str(reward_folder), cpu_arguments)
    places: list[int] = []
    head = trainer.model.policy.get_output_embeddings()
    rollout = trainer.rollout(trainer.prompts_of(0))
    batch = rollout.rows(torch.arange(8))
    head.register_forward_hook(lambda _, __, out: places.append(out.shape[:-1].numel()))
    trainer.training_step(trainer.model, batch, batch["response_mask"].sum())
    assert places == [batch["response_mask"].sum()]
    assert batch["attention_mask"].sum() > places[0]


@pytest.mark.fault("another tokenizer")
def test_the_reward_model_may_have_another_tokenizer(
    base_folder: Path, encoder_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    """A word-level encoder scores what a byte-level policy says; the critic, on the policy's tokens, is given."""
    torch.manual_seed(0)
    encoder = AutoModelForSequenceClassification.from_pretrained(encoder_folder, num_labels=1).eval()
    reward = RewardModel(encoder, load_tokenizer(encoder_folder, conversational=True), conversational=True)
    critic = load_scorer(reward_folder).requires_grad_(True)
    trainer, rows = make(base_folder, reward, cpu_arguments, critic=critic, total_episodes=16)
    trainer.train()
    texts = [sample.completion for sample in trainer.latest_samples]
    prompts = [sample.prompt for sample in trainer.latest_samples]
    ended = [sample.ended for sample in trainer.latest_samples]
    expected = reward.score(prompts, texts, ended=ended)
    assert [sample.proxy for sample in trainer.latest_samples] == pytest.approx(expected.tolist(), abs=1e-5)
    assert len(rows.rows) == 1


@pytest.mark.parametrize(
    ("sharding", "settings", "sentence"),
    [
        ("is_deepspeed_enabled", {}, "ppo: DeepSpeed is not supported.*take FSDP2"),
        ("is_fsdp_enabled", {"reference_mixup": 0.1}, "reference_mixup does not work with FSDP yet"),
    ],
)
def test_sharding_that_goes_wrong_is_refused_in_a_sentence(
    sharding: str,
    settings: dict[str, Any],
    sentence: str,
    base_folder: Path,
    reward_folder: Path,
    cpu_arguments: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of what FSDP2 does right the proof is `tests/distributed`."""
    begin = BaseTrainer.__init__

    def sharded(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        setattr(self, sharding, True)

    monkeypatch.setattr(BaseTrainer, "__init__", sharded)
    with pytest.raises(UserError, match=sentence):
        make(base_folder, str(reward_folder), cpu_arguments, **settings)


def test_padding_is_in_no_diagnostic(base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]) -> None:
    """Answers of one token among longer ones: what lies under the padding is poisoned, and no number of the log moves."""
    found = []
    for poison in (0.0, 1e6):
        trainer, rows = make(
            base_folder, str(reward_folder), cpu_arguments, total_episodes=16, num_mini_batches=1, num_ppo_epochs=1,
            per_device_train_batch_size=16,
        )  # fmt: skip
        sample, training_step = trainer.sample, trainer.training_step

        def short(rows: Any, sample: Any = sample) -> Any:
            completions = sample(rows)
            completions.response_mask[::2, 1:] = 0
            return completions

        def poisoned(model: Any, inputs: Any, tokens: Any, step: Any = training_step, value: float = poison) -> Any:
            outside = inputs["response_mask"] == 0
            for name in ("logprobs_old", "advantages", "returns", "values_old"):
                inputs[name] = inputs[name].masked_fill(outside, value)
            return step(model, inputs, tokens)

        trainer.sample, trainer.training_step = short, poisoned  # type: ignore[method-assign]
        trainer.train()
        found.append(rows.rows[0])
    clean, poisoned_row = found
    for key in (
        "loss",
        "policy_loss",
        "value_loss",
        "approx_kl",
        "clip_fraction",
        "ratio_first",
        "entropy",
        "grad_norm",
        "kl",
    ):
        assert poisoned_row[key] == clean[key], key
    assert clean["length"] < 5
