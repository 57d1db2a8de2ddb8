"""Reward models whose scores have about unit scale: those of a new head are near 0, where a fault would be too small to see."""

from typing import Any

from rlhf.models import load
from rlhf.models.scalar_head import stretch_heads


def build_reward_model(*arguments: Any, **settings: Any) -> Any:
    """Build a model with a new head, as `rlhf.build_reward_model` does, and stretch its scores to about unit scale."""
    model = load.build_reward_model(*arguments, **settings)
    stretch_heads(model)
    return model
