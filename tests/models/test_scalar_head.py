"""The head of a model that is not trained yet: near 0, whatever the model, so that labels say what scores become."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.models import load
from rlhf.models.load import model_settings
from rlhf.models.scalar_head import last_layers, start_heads, stretch_heads
from rlhf.models.text import encode_answers
from rlhf.reward.frozen_trunk import Trunk, _heads
from tests.conftest import PROMPTS, WORDS

LORA = {"use_peft": True, "lora_r": 4}


class Head(nn.Module):
    """A classifier's last layer alone, of 4,095 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4095, 1, bias=False)


def test_a_new_head_is_drawn_with_deviation_1_over_d_plus_1() -> None:
    torch.manual_seed(0)
    model = Head()
    start_heads(model)
    states = torch.randn(1000, 4095)
    # The deviation of 4,095 draws is known to a part in √(2 · 4095), 1.1 %; four of these are allowed.
    assert model.score.weight.std().item() == pytest.approx(1 / 4096, rel=0.044)
    assert model.score(states).std().item() == pytest.approx(4096**-0.5, rel=0.15), "1/√(d+1) for states of unit scale"
    stretch_heads(model)
    assert model.score.weight.std().item() == pytest.approx(1 / 64, rel=0.044)
    assert model.score(states).std().item() == pytest.approx(1, rel=0.15), "stretched, scores have unit scale"


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize(("settings", "labels"), [({}, ["reward"]), (LORA, ["reward"]), ({}, ["quality", "length"])])
def test_new_models_begin_near_zero(
    kind: str, settings: dict[str, Any], labels: list[str], base_folder: Path, encoder_folder: Path, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    folder = base_folder if kind == "decoder" else encoder_folder
    model = load.build_reward_model(
        folder, model_settings(settings), pad_token_id=tokenizer.pad_token_id, labels=labels
    )
    heads = last_layers(model)
    assert heads
    for head in heads:
        # A handful of draws: none is four deviations from 0, and their mean square is no hundredth of what it should be.
        scale = head.weight * (head.in_features + 1)
        assert 0.1 < scale.square().mean().item() < 3, "N(0, 1/(d+1)²)"
    trained = [
        p for name, p in model.named_parameters() if p.requires_grad and ("score" in name or "classifier" in name)
    ]
    assert any(p.shape[0] == len(labels) for p in trained), "the head is trained, with LoRA too"


def test_a_head_of_several_layers_begins_near_zero_in_the_last_alone(encoder_folder: Path) -> None:
    """Two layers near 0 behind one another would give each other almost no gradient."""
    model = load.build_reward_model(encoder_folder, pad_token_id=0)
    width = model.config.hidden_size
    model.classifier = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    before = model.classifier[0].weight.clone()
    start_heads(model)
    assert torch.equal(model.classifier[0].weight, before)
    assert model.classifier[2].weight.std().item() < 3 / (width + 1)


def test_an_encoder_that_brings_a_trained_head_keeps_it(encoder_folder: Path, tmp_path: Path) -> None:
    trained = load.build_reward_model(encoder_folder, pad_token_id=0)
    torch.nn.init.normal_(trained.classifier.weight, std=2.0)
    shutil.copytree(encoder_folder, tmp_path, dirs_exist_ok=True)
    trained.save_pretrained(tmp_path)
    again = load.build_reward_model(tmp_path, pad_token_id=0)
    assert torch.equal(again.classifier.weight, trained.classifier.weight)


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
def test_voters_on_a_trunk_begin_near_zero_and_are_checked_at_unit_scale(
    kind: str, base_folder: Path, encoder_folder: Path, tokenizer: Any, tmp_path: Path
) -> None:
    """A member that computes something else is off by little where its head is near 0: the check has to see it all the same."""
    torch.manual_seed(0)
    folder = base_folder if kind == "decoder" else encoder_folder
    tokenizer = load.load_tokenizer(folder, conversational=True)
    trunk = Trunk(load.build_reward_model(folder, pad_token_id=tokenizer.pad_token_id), top_layers=1)
    answers = [" ".join(WORDS[i % 7 : i % 7 + 1 + i % 5]) for i in range(9)]
    sides = [encode_answers(tokenizer, PROMPTS[:8], texts)[0] for texts in (answers[:-1], answers[1:])]
    features = trunk.features(list(zip(*sides, strict=True)), tmp_path, pad_token_id=tokenizer.pad_token_id)
    member = trunk.member()
    width = last_layers(member.model)[0].in_features
    assert last_layers(member.model)[0].weight.abs().max().item() < 5 / (width + 1)
    trunk.check(features)
    spread = max(float(head.weight.std()) for head in _heads(trunk.model))
    assert spread > 2 / (width + 1), "it was stretched for the check"
    again = trunk.member()
    assert last_layers(again.model)[0].weight.abs().max().item() < 5 / (width + 1), "members begin near 0 after it too"
