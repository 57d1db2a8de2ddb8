"""Reward models whose scores have about unit scale: with LoRA a new head is near 0, where a fault would be too small to see."""

from typing import Any

import torch
from peft import PeftModel

from rlhf.models import load
from rlhf.models.scalar_head import last_layers


def build_reward_model(*arguments: Any, **settings: Any) -> Any:
    """Build a model with a new head, as `rlhf.build_reward_model` does; the scores of one with LoRA are stretched."""
    model = load.build_reward_model(*arguments, **settings)
    if isinstance(model, PeftModel):
        with torch.no_grad():
            for head in last_layers(model):
                head.weight.mul_((head.in_features + 1) ** 0.5)
    return model
