"""Scores as they are optimised, and what a log says of them."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlhf.ppo.config import PPOConfig
from rlhf.ppo.rollout import Experience
from rlhf.ppo.state import PPOState

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer


def shape_scores(scores: Tensor, ended: Tensor, args: PPOConfig, state: PPOState) -> Tensor:
    """Return scores as they are optimised, [b]: normalised by their history where asked for, clipped, end penalty applied."""
    if args.running_reward_norm:
        mean, std = state.reward_scale
        scores = (scores - mean) / std
    if args.reward_clip is not None:
        scores = scores.clamp(-args.reward_clip, args.reward_clip)
    if args.missing_eos_penalty is not None:
        scores = scores - args.missing_eos_penalty * (~ended).to(scores.dtype)
    return scores


def count_rewards(trainer: "PPOTrainer", experience: Experience) -> None:
    """Count the rewards that are optimised, before the KL, and the scores at their bound; by the history as it is now."""
    args, scores = trainer.args, experience.scores
    shaped = shape_scores(scores, experience.ended, args, trainer.progress)
    without_penalty = shape_scores(scores, torch.ones_like(experience.ended), args, trainer.progress)
    at_clip = None if args.reward_clip is None else without_penalty.abs() >= args.reward_clip
    trainer.metrics.count_optimised(shaped + experience.dense.sum(dim=1), at_clip)
