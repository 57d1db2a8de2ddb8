"""Options of reward models that once did something else than they say, without a word."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import ElectraConfig, ElectraForSequenceClassification

from rlhf import BottleneckRewardTrainer, MarginRewardTrainer, PairRewardTrainer, TextRewardTrainer
from rlhf.models.heads import combine_labels
from rlhf.models.load import adapter_settings, load_policy, load_scorer, model_settings
from rlhf.models.save import save_model
from rlhf.pipeline.vote import VoteSetup
from rlhf.reward.experts import ExpertRewards, merge_experts
from rlhf.reward.gate import Gate
from rlhf.reward.gated import Attributes, GatedRewards
from tests.conftest import PROMPTS
from tests.reward.test_extras import arguments, make, rows
from tests.unit_scale import build_reward_model

LORA = {"use_peft": True, "lora_r": 4}


def changes(folder: Path) -> dict[str, torch.Tensor]:
    """What an adapter adds to each weight of the base."""
    model = load_scorer(folder)
    layers: Any = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    return {name: layer.get_delta_weight("default") for name, layer in layers.items()}


@pytest.mark.parametrize(
    "patterns", [{}, {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}], ids=["", "patterns"]
)
@pytest.mark.parametrize("weights", [[0.5, 0.5], [1.0, 1.0], [2.0, -0.5]])
def test_what_sft_learnt_is_once_in_merged_experts(
    base_folder: Path, tokenizer: Any, tmp_path: Path, weights: list[float], patterns: dict[str, Any]
) -> None:
    """Each expert holds SFT's adapter, so a plain sum of them holds it as often as the weights sum to.

    An adapter from elsewhere may have other ranks and factors in some layers.
    """

    def moved(model: Any, seed: int) -> Any:
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        return model

    sft, experts = tmp_path / "sft", [tmp_path / f"expert-{number}" for number in range(2)]
    adapter = adapter_settings(model_settings(LORA))
    for key, value in patterns.items():
        setattr(adapter, key, value)
    policy = get_peft_model(load_policy(base_folder, model_settings({})), adapter)
    save_model(moved(policy, 0), tokenizer, sft)
    for number, expert in enumerate(experts):
        model = build_reward_model(sft, model_settings(LORA), pad_token_id=tokenizer.pad_token_id)
        save_model(moved(model, number + 1), tokenizer, expert)
    save_model(build_reward_model(sft, model_settings(LORA), pad_token_id=0), tokenizer, tmp_path / "start")
    merge_experts(experts, weights, weights, tmp_path / "merged", start=sft)
    tokenizer.save_pretrained(tmp_path / "merged")
    start, one, other, merged = map(changes, (tmp_path / "start", *experts, tmp_path / "merged"))
    for name, value in merged.items():
        own = weights[0] * (one[name] - start[name]) + weights[1] * (other[name] - start[name])
        assert own.abs().max() > 1e-3
        torch.testing.assert_close(value, start[name] + own, atol=1e-6, rtol=1e-4)


def test_a_copy_of_gated_attributes_is_on_their_scale(base_folder: Path, tokenizer: Any) -> None:
    """At the mean weights a critic's values are the normalised scores, constants of the attributes included."""
    usual, offsets = torch.tensor([0.25, 0.75]), torch.tensor([3.0, 1.0])
    flat = Gate(torch.zeros(64), torch.ones(64), torch.zeros(2, 64), usual.log(), torch.tensor(1e9))
    model = build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id, labels=("a", "b"))
    reward = GatedRewards(model, tokenizer, Attributes(("a", "b"), offsets, flat, usual), conversational=True)
    prompts, answers = PROMPTS[:5], ["yes", "no cat", "red", "blue dog", "pear"]
    ids = reward.encode(prompts, answers, None)
    copied: Any = reward.copy_of_network().eval()
    with torch.no_grad():
        raw = torch.stack([copied(input_ids=torch.tensor([row])).logits[0, 0] for row in ids])
    mean, std = reward.scale_of_copy(0.4, 2.0)
    torch.testing.assert_close((raw - mean) / std, (reward.score(prompts, answers) - 0.4) / 2.0, atol=1e-5, rtol=1e-5)


def test_a_copy_of_an_expert_is_on_its_own_scale(tokenizer: Any) -> None:
    """The first expert stands for all: what it says, in its deviations, is taken for a score of theirs in theirs."""
    model: Any = torch.nn.Module()
    experts = ExpertRewards.__new__(ExpertRewards)
    experts.model, experts.scales = model, torch.tensor([[5.0, 3.0], [0.0, 1.0]])
    experts.mean, experts.std = 0.2, 0.8
    for scale in ((0.2, 0.8), (0.0, 1.0)):  # normalised, or as they are
        mean, std = experts.scale_of_copy(*scale)
        value = (5.0 + 2 * 3.0 - mean) / std  # two deviations above the expert's mean
        assert value == pytest.approx((0.2 + 2 * 0.8 - scale[0]) / scale[1])


@pytest.mark.parametrize("trainer", [PairRewardTrainer, TextRewardTrainer, BottleneckRewardTrainer])
def test_a_pair_without_weight_teaches_no_term(base_folder: Any, tokenizer: Any, trainer: Any) -> None:
    """Its loss is 0, with centring and the term of its trainer in it; twice the weight is twice the loss."""
    data = [{**row, "weight": weight} for row, weight in zip(rows(4), (1.0, 0.0, 2.0, 0.0), strict=True)]
    made = make(trainer, base_folder, tokenizer, data, {"args": arguments(center_rewards_coefficient=0.5)})
    own, seen = made.losses, []

    def losses(scored: Any, columns: Any, inputs: Any) -> torch.Tensor:
        ones = {**columns, "weight": torch.ones_like(columns["weight"])}
        torch.manual_seed(0)  # of a bottleneck's noise
        without = own(scored, ones, inputs)
        torch.manual_seed(0)
        found: torch.Tensor = own(scored, columns, inputs)
        seen.append((columns["weight"], without.detach(), found.detach()))
        return found

    made.losses = losses
    made.train()
    ((weights, without, found),) = seen
    assert sorted(weights.tolist()) == [0, 0, 1, 2]
    assert without.min() > 1e-3
    torch.testing.assert_close(found, weights * without)


def test_a_tie_has_no_margin_in_python(base_folder: Any, tokenizer: Any) -> None:
    data = [{**row, "margin": 2.0, "confidence": p} for row, p in zip(rows(4), (1.0, 0.5, 1.0, 0.5), strict=True)]
    trainer = make(MarginRewardTrainer, base_folder, tokenizer, data)
    assert trainer.train_dataset["margin"] == [2.0, 0.0, 2.0, 0.0]


def test_a_margin_of_a_label_that_is_probably_wrong_belongs_to_the_other_order() -> None:
    """The loss takes it for what the better answer, whichever that is, is better by."""
    setup = VoteSetup.__new__(VoteSetup)
    object.__setattr__(setup, "rows", [{**row, "margin": 2.0} for row in rows(3)])
    object.__setattr__(setup, "wrong", [0.0, 0.5, 0.95])
    assert [row["margin"] for row in setup.training_rows()] == [2.0, 0.0, pytest.approx(1.8)]


def test_a_head_with_an_inner_layer_of_as_many_outputs_keeps_it() -> None:
    """ELECTRA's inner layer is as wide as its hidden states, here as there are labels."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "embedding_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    model = ElectraForSequenceClassification(ElectraConfig(**sizes, num_hidden_layers=1, vocab_size=20, num_labels=8))
    model.eval()
    ids, weights = torch.tensor([[1, 2, 3]]), torch.randn(8)
    with torch.no_grad():
        expected = model(input_ids=ids).logits @ weights
        combine_labels(model, weights)
        torch.testing.assert_close(model(input_ids=ids).logits[0], expected)


def test_the_best_checkpoint_gives_all_that_it_holds(base_folder: Any, tokenizer: Any, tmp_path: Path) -> None:
    """A head of one step behind the decoder of another is a score that was never trained."""
    settings = {
        "output_dir": str(tmp_path), "per_device_train_batch_size": 4, "eval_strategy": "steps", "eval_steps": 1,
        "save_strategy": "steps", "save_steps": 1, "load_best_model_at_end": True, "learning_rate": 3.0,
        "metric_for_best_model": "eval_loss", "greater_is_better": False,
    }  # fmt: skip
    more = {"args": arguments(**settings), "eval_dataset": Dataset.from_list(rows(4))}
    trainer = make(BottleneckRewardTrainer, base_folder, tokenizer, rows(12), more)
    decoders = []
    evaluated = trainer.evaluate

    def evaluate(*given: Any, **named: Any) -> Any:
        decoders.append(trainer.decoder.detach().clone())
        return evaluated(*given, **named)

    trainer.evaluate = evaluate
    trainer.train()
    best = int(trainer.state.best_model_checkpoint.rpartition("-")[2])
    assert best < trainer.state.max_steps, "the last one would show nothing"
    assert not torch.equal(decoders[best - 1], decoders[-1])
    assert torch.equal(trainer.decoder, decoders[best - 1])
