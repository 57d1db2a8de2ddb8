"""Experts on one base: each scores as it does alone, weights and gate do what they say, averaging is exact."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf import load_reward_model
from rlhf.errors import UserError
from rlhf.models.load import load_scorer, model_settings
from rlhf.models.save import save_model
from rlhf.models.scalar_head import make_exact, score_head
from rlhf.reward.experts import ExpertRewards, merge_experts, open_experts, save_experts
from rlhf.reward.gate import Gate, fit_gate
from rlhf.reward.load import calibrate_reward_model
from rlhf.reward.model import RewardModel
from tests.conftest import PROMPTS
from tests.unit_scale import build_reward_model

ANSWERS = ["yes", "no", "apple", "dog dog", "red blue", "pear"]
SCALES = torch.tensor([[0.5, 2.0], [-1.0, 0.5]])


@pytest.fixture
def folder(base_folder: Path, tokenizer: Any, tmp_path: Path) -> Path:
    """Two LoRA experts with every weight moved."""
    for number in range(2):
        torch.manual_seed(number)
        model = build_reward_model(
            base_folder, model_settings({"use_peft": True, "lora_r": 4}), pad_token_id=tokenizer.pad_token_id
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        save_model(model, tokenizer, tmp_path / f"expert-{number}")
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def alone(folder: Path, tokenizer: Any, number: int) -> Tensor:
    model = load_scorer(folder / f"expert-{number}")
    return RewardModel(model, tokenizer, conversational=True).score(PROMPTS[:6], ANSWERS)


def test_each_expert_scores_as_it_does_alone_and_weights_add_up(folder: Path, tokenizer: Any) -> None:
    save_experts(folder, ["a", "b"], SCALES, weights=[0.25, 0.75], gate=None)
    experts = open_experts(folder, tokenizer, conversational=True)
    raw = torch.stack([alone(folder, tokenizer, number) for number in range(2)], dim=1)
    assert (raw[:, 0] - raw[:, 1]).abs().min() > 1e-3, "two different experts"
    each = (raw - SCALES[:, 0]) / SCALES[:, 1]
    torch.testing.assert_close(experts.score_each(PROMPTS[:6], ANSWERS), each, atol=1e-5, rtol=1e-5)
    expected = 0.25 * each[:, 0] + 0.75 * each[:, 1]
    torch.testing.assert_close(experts.score(PROMPTS[:6], ANSWERS), expected, atol=1e-5, rtol=1e-5)
    order = [3, 0, 5, 1, 4, 2]
    shuffled = experts.score([PROMPTS[i] for i in order], [ANSWERS[i] for i in order])
    torch.testing.assert_close(shuffled, expected[order], atol=1e-5, rtol=1e-5)


def test_every_head_is_exact_on_a_base_of_16_bits(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    """The first expert's was, and all others' were rounded to eight bits."""
    base = tmp_path / "base"
    AutoModelForCausalLM.from_pretrained(base_folder, dtype=torch.bfloat16).save_pretrained(base)
    tokenizer.save_pretrained(base)
    heads = []
    for number in range(2):
        torch.manual_seed(number)
        settings = model_settings({"use_peft": True, "lora_r": 4, "dtype": "bfloat16"})
        model = build_reward_model(base, settings, pad_token_id=tokenizer.pad_token_id)
        head: Any = score_head(model)
        make_exact(head)
        torch.nn.init.normal_(head.weight)
        heads.append(head.weight.detach().clone())
        save_model(model, tokenizer, tmp_path / f"expert-{number}")
    save_experts(tmp_path, ["a", "b"], SCALES, weights=[0.25, 0.75], gate=None)
    experts = open_experts(tmp_path, tokenizer, conversational=True)
    for name, expected in zip(("default", "expert-1"), heads, strict=True):
        experts.model.set_adapter(name)
        assert torch.equal(score_head(experts.model).weight, expected)


def test_saved_experts_are_a_reward_model_like_any_other(folder: Path, tokenizer: Any) -> None:
    """`load_reward_model` checks them on their probe, and finds a changed expert."""
    gate = Gate(torch.zeros(64), torch.ones(64), torch.randn(2, 64) / 8, torch.zeros(2), torch.tensor(1e9))
    save_experts(folder, ["a", "b"], SCALES, weights=None, gate=gate)
    saved = calibrate_reward_model(folder, samples=list(zip(PROMPTS[:6], ANSWERS, strict=True)))
    again = load_reward_model(folder)
    assert isinstance(again, ExpertRewards)
    assert again.names == ["a", "b"]
    torch.testing.assert_close(again.score(PROMPTS[:6], ANSWERS), saved.score(PROMPTS[:6], ANSWERS), atol=1e-6, rtol=0)
    weights = again.weights_of(PROMPTS[:6])
    torch.testing.assert_close(weights.sum(dim=1), torch.ones(6))
    assert weights[:, 0].std() > 0.01, "the gate looks at the prompt"

    swapped = folder / "expert-1" / "adapter_model.safetensors"
    swapped.write_bytes((folder / "expert-0" / "adapter_model.safetensors").read_bytes())
    with pytest.raises(Exception, match="does not give the scores it was saved with"):
        load_reward_model(folder)


def test_a_gate_sees_the_prompt_and_never_the_answer(folder: Path, tokenizer: Any) -> None:
    save_experts(folder, ["a", "b"], SCALES, weights=[1.0, 0.0], gate=None)
    experts = open_experts(folder, tokenizer, conversational=True)
    features = experts.prompt_features(PROMPTS[:6])
    experts.prompt_features(["word " * 5000])
    assert experts.cut == 0, "it is counted where its answers are read"
    assert features.shape == (6, 64)
    base = experts.model.base_model.model.model  # type: ignore[union-attr]
    ids = experts.encode(PROMPTS[:1], [""], [False])[0]
    with torch.no_grad(), experts.model.disable_adapter():  # type: ignore[operator]
        hidden = base(input_ids=torch.tensor([ids])).last_hidden_state[0]  # type: ignore[operator]
    torch.testing.assert_close(features[0], hidden.mean(dim=0), atol=1e-5, rtol=1e-4)


def test_features_of_several_heads_are_refused(folder: Path, tokenizer: Any) -> None:
    save_experts(folder, ["a", "b"], SCALES, weights=[0.5, 0.5], gate=None)
    experts = open_experts(folder, tokenizer, conversational=True)
    with pytest.raises(UserError, match="no single linear head"):
        experts.features(PROMPTS[:6], ANSWERS)


def planted(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts of two hidden kinds, of which each expert knows one: it is right there, and guesses elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.randint(0, 2, (n,), generator=generator)
    features = torch.randn(n, 5, generator=generator)
    features[:, 2] += 4.0 * kind
    differences = torch.randn(n, 2, generator=generator)
    differences[torch.arange(n), kind] = differences[torch.arange(n), kind].abs()
    return features, differences, kind


def test_the_gate_finds_who_knows_what_without_being_told() -> None:
    features, differences, _ = planted(2000, seed=0)
    gate, _ = fit_gate(features, differences)
    features, differences, kind = planted(2000, seed=1)
    weights, is_unfamiliar = gate(features)
    right = weights[torch.arange(2000), kind]
    assert right.mean() > 0.85
    mixed = (weights * differences).sum(dim=1) > 0
    equal = differences.mean(dim=1) > 0
    assert mixed.double().mean() > equal.double().mean() + 0.1
    assert is_unfamiliar.sum() <= 20, "99.9 % of the training prompts are familiar, so about two of these are not"


def test_the_gate_reads_how_likely_a_label_is_right_and_what_it_counts() -> None:
    """Labels that are held for wrong teach the other side; pairs without weight teach nothing."""
    features, differences, _ = planted(2000, seed=0)
    gate, sharpness = fit_gate(features, differences)
    turned = torch.arange(2000) % 3 == 0
    signs = torch.where(turned, -1.0, 1.0)
    doubted, _ = fit_gate(features, signs[:, None] * differences, confidence=(~turned).float())
    torch.testing.assert_close(doubted(features)[0], gate(features)[0], atol=0.02, rtol=0)
    wrong = torch.cat([differences, -differences])
    twice = torch.cat([features, features])
    weighed, sharp = fit_gate(twice, wrong, weight=torch.cat([torch.full((2000,), 2.0), torch.zeros(2000)]))
    torch.testing.assert_close(weighed(features)[0], gate(features)[0], atol=0.02, rtol=0)
    assert sharp == pytest.approx(sharpness, rel=0.05)


def test_prompts_of_another_world_are_counted_and_said(folder: Path, tokenizer: Any) -> None:
    gate = Gate(torch.zeros(64), torch.ones(64), torch.zeros(2, 64), torch.zeros(2), torch.tensor(1e-3))
    save_experts(folder, ["a", "b"], SCALES, weights=None, gate=gate)
    experts = open_experts(folder, tokenizer, conversational=True)
    with experts.uncounted():  # as the texts on a card are read, of which nobody asked
        experts.score(PROMPTS[:3], ANSWERS[:3])
    assert experts.cuts("E") == []
    with pytest.warns(UserWarning, match="3 of the first 3 prompts are unlike any that the gate was fitted on"):
        experts.score(PROMPTS[:3], ANSWERS[:3])
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        experts.score(PROMPTS[:3], ANSWERS[:3])
    assert experts.cuts("E") == [
        "E: 6 of 6 prompts are unlike any that its gate was fitted on; they were scored with weights that nothing vouches for."
    ]
    other = open_experts(folder, tokenizer, conversational=True)
    other.count_from(experts.counts())  # as PPO's checkpoints keep them
    assert other.cuts("E") == experts.cuts("E")


def test_averaging_is_exact(folder: Path, tokenizer: Any, base_folder: Path, tmp_path: Path) -> None:
    """The merged adapter's change of every base weight is the weighted sum of the experts' changes."""
    merge_experts([folder / "expert-0", folder / "expert-1"], [0.3, 0.7], [2.0, -1.0], folder / "merged")
    tokenizer.save_pretrained(folder / "merged")
    models: list[Any] = [load_scorer(folder / name) for name in ("expert-0", "expert-1", "merged")]
    first, second, merged = ({n: m for n, m in model.named_modules() if hasattr(m, "lora_A")} for model in models)
    assert len(merged) == 4, "queries and values of two layers"
    for name in merged:
        expected = 0.3 * first[name].get_delta_weight("default") + 0.7 * second[name].get_delta_weight("default")
        torch.testing.assert_close(merged[name].get_delta_weight("default"), expected, atol=1e-6, rtol=1e-4)
    heads = [model.base_model.model.score.modules_to_save["default"].weight for model in models]
    torch.testing.assert_close(heads[2], 2.0 * heads[0] - heads[1])
