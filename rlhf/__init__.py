"""A full RLHF pipeline on TRL: SFT, reward models for noisy preferences, PPO. The public names load when first used."""

from importlib import import_module
from typing import Any

_NAMES = {
    "PPOConfig": "rlhf.ppo.config",
    "PPOTrainer": "rlhf.ppo.trainer",
    "PairRewardTrainer": "rlhf.reward.trainer",
    "AdaptiveMarginRewardTrainer": "rlhf.reward.declared",
    "LabelFlipRewardTrainer": "rlhf.reward.declared",
    "MarginRewardTrainer": "rlhf.reward.declared",
    "SoftLabelRewardTrainer": "rlhf.reward.declared",
    "VotedRewardTrainer": "rlhf.reward.declared",
    "LabelSmoothingRewardTrainer": "rlhf.reward.declared",
    "ContrastiveRewardTrainer": "rlhf.reward.contrastive",
    "TextRewardTrainer": "rlhf.reward.text",
    "CritiqueRewardTrainer": "rlhf.reward.critiques",
    "LengthRewardTrainer": "rlhf.reward.length",
    "BottleneckRewardTrainer": "rlhf.reward.bottleneck",
    "MetaRewardTrainer": "rlhf.reward.meta",
    "AttributeRewardTrainer": "rlhf.reward.attributes",
    "GatedRewardTrainer": "rlhf.reward.attributes",
    "RankingRewardTrainer": "rlhf.reward.rankings",
    "RewardModel": "rlhf.reward.model",
    "build_reward_model": "rlhf.models.load",
    "generate": "rlhf.models.generate",
    "load_reward_model": "rlhf.reward.load",
    "save_reward_model": "rlhf.reward.load",
    "load_recipe": "rlhf.recipe",
    "OBJECTIVES": "rlhf.recipe.objectives",
    "Objective": "rlhf.recipe.objectives",
}
__all__ = sorted([*_NAMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from rlhf.versions import version_of

        return version_of("rlhf-pipeline")
    if name not in _NAMES:
        raise AttributeError(f"module 'rlhf' has no attribute {name!r}")
    return getattr(import_module(_NAMES[name]), name)
