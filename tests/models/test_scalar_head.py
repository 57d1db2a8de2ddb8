"""The head of a model that is not trained yet: near 0 with LoRA, of unit scale where all weights are trained."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from rlhf.models import load
from rlhf.models.load import model_settings
from rlhf.models.scalar_head import last_layers, start_near_zero

LORA = model_settings({"use_peft": True, "lora_r": 4})


class Head(nn.Module):
    """A classifier's last layer alone, of 4,095 inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(4095, 1, bias=False)


def test_a_head_near_zero_is_drawn_with_deviation_1_over_d_plus_1() -> None:
    torch.manual_seed(0)
    model = Head()
    start_near_zero(model)
    # The deviation of 4,095 draws is known to a part in √(2 · 4095), 1.1 %; four of these are allowed.
    assert model.score.weight.std().item() == pytest.approx(1 / 4096, rel=0.044)
    scores = model.score(torch.randn(1000, 4095))
    assert scores.std().item() == pytest.approx(1 / 64, rel=0.15), "1/√(d+1) for states of unit scale"


@pytest.mark.parametrize("kind", ["decoder", "encoder"])
@pytest.mark.parametrize("labels", [["reward"], ["quality", "length"]])
def test_models_with_lora_begin_near_zero(
    kind: str, labels: list[str], base_folder: Path, encoder_folder: Path, tokenizer: Any
) -> None:
    torch.manual_seed(0)
    folder = base_folder if kind == "decoder" else encoder_folder
    model = load.build_reward_model(folder, LORA, pad_token_id=tokenizer.pad_token_id, labels=labels)
    heads = last_layers(model)
    assert heads
    for head in heads:
        # Of at least 32 draws the mean square is within four of its deviations, √(2/32), of what it should be.
        scale = head.weight * (head.in_features + 1)
        assert 0.1 < scale.square().mean().item() < 2, "N(0, 1/(d+1)²)"
    trained = [
        p for name, p in model.named_parameters() if p.requires_grad and ("score" in name or "classifier" in name)
    ]
    assert any(p.shape[0] == len(labels) for p in trained), "the head is trained with the adapter"


def test_models_of_which_all_weights_are_trained_begin_at_unit_scale(base_folder: Path, tokenizer: Any) -> None:
    torch.manual_seed(0)
    head = load.build_reward_model(base_folder, pad_token_id=tokenizer.pad_token_id).score
    assert 0.1 < head.weight.square().mean().item() * (head.in_features + 1) < 2, "N(0, 1/(d+1))"


def test_a_head_of_several_layers_begins_near_zero_in_the_last_alone(encoder_folder: Path) -> None:
    """Two layers near 0 behind one another would give each other almost no gradient."""
    model = load.build_reward_model(encoder_folder, pad_token_id=0)
    width = model.config.hidden_size
    model.classifier = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1))
    before = model.classifier[0].weight.clone()
    start_near_zero(model)
    assert torch.equal(model.classifier[0].weight, before)
    assert model.classifier[2].weight.std().item() < 3 / (width + 1)


def test_an_encoder_that_brings_a_trained_head_keeps_it(encoder_folder: Path, tmp_path: Path) -> None:
    trained = load.build_reward_model(encoder_folder, pad_token_id=0)
    torch.nn.init.normal_(trained.classifier.weight, std=2.0)
    shutil.copytree(encoder_folder, tmp_path, dirs_exist_ok=True)
    trained.save_pretrained(tmp_path)
    for head in last_layers(load.build_reward_model(tmp_path, LORA, pad_token_id=0)):
        assert torch.equal(head.weight, trained.classifier.weight)
