"""Rewards that PPO makes itself: shaping by the reward model, self-certainty, novelty, a discriminator of demonstrations."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from rlhf.models.generate import Completions, texts_of
from rlhf.objectives.advantage import token_rewards
from rlhf.objectives.adversarial import fit_discriminator
from rlhf.objectives.intrinsic import mean_over_tokens, novelty
from rlhf.objectives.shaping import shaping_rewards
from rlhf.ppo.rewards import texts_for
from rlhf.ppo.roles import TokenOutputs
from rlhf.ppo.rollout import PromptRow
from rlhf.reward.load import RewardModel

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer


FEWEST_TOLD_APART = 4  # answers: each half of them teaches what tells the other


def own_token_rewards(
    trainer: "PPOTrainer",
    rows: Sequence[PromptRow],
    completions: Completions,
    outputs: TokenOutputs,
    logprobs_reference: Tensor,
) -> Tensor:
    """Return what the settings ask for beside the sources' rewards, [b, r]: 0 where that is nothing."""
    # 1. Of whole answers, at their last tokens.
    args, mask = trainer.args, completions.response_mask
    at_end = torch.zeros(len(mask), device=mask.device)
    if args.self_certainty_coef > 0:
        certainty = mean_over_tokens(outputs.certainty, mask)
        trainer.metrics.count("self_certainty", certainty.sum(), len(mask))
        at_end += args.self_certainty_coef * certainty
    if args.novelty_coef > 0:
        at_end += args.novelty_coef * mean_over_tokens(novelty(logprobs_reference), mask)
    if args.adversarial_coef > 0:
        at_end += args.adversarial_coef * _like_demonstrations(trainer, rows, completions).to(mask.device)
    rewards = token_rewards(at_end, torch.zeros_like(logprobs_reference), mask, kl_coef=0.0)

    # 2. Of single tokens.
    if args.shaping_coef > 0:
        rewards += args.shaping_coef * shaping_rewards(_potentials(trainer, rows, completions), mask, gamma=args.gamma)
    return rewards


def _potentials(trainer: "PPOTrainer", rows: Sequence[PromptRow], completions: Completions) -> Tensor:
    """Return the potential before each token, [b, r]: the first reward model's score of the answer so far, on its own scale.

    It is taken every `shaping_tokens` tokens, of the answer as far as it had come, without an end, and stays from there to the
    next one.
    """
    # 1. The answers' beginnings.
    step, mask = trainer.args.shaping_tokens, completions.response_mask
    lengths = mask.sum(dim=1).tolist()
    places = [(row, start) for row, length in enumerate(lengths) for start in range(0, length, step)]
    beginnings = [completions.response_ids[row, :start].tolist() for row, start in places]
    prompts = [rows[row]["prompt"] for row, _ in places]
    sampled = texts_of(trainer.processing_class, beginnings, conversational=not isinstance(prompts[0], str))

    # 2. Their scores, each from its place to the next.
    reward = cast(RewardModel, trainer.rewards.sources[0].function)
    texts = texts_for(reward, sampled, blank=completions.blank)
    mean, std = trainer.rewards.scale
    with reward.uncounted():  # beginnings of answers are no answers
        scores = (reward.score(prompts, texts, ended=[False] * len(texts)) - mean) / std
    potentials = torch.zeros(mask.shape)
    for (row, start), score in zip(places, scores.tolist(), strict=True):
        potentials[row, start : start + step] = score
    return potentials.to(mask.device)


def _like_demonstrations(trainer: "PPOTrainer", rows: Sequence[PromptRow], completions: Completions) -> Tensor:
    """Return the log-odds that each answer is a demonstration and none of the policy's, [b] nats, float32 on the CPU.

    The discriminator is fitted anew in every rollout, to as many demonstrations as there are answers, on the features that the
    first reward model's head reads. Of two halves each is scored by what the other half taught, so no answer is told apart by
    itself.
    """
    if len(rows) < FEWEST_TOLD_APART:  # the last batch of an evaluation may hold one answer
        return torch.zeros(len(rows))

    # 1. Features of both sides.
    reward = cast(RewardModel, trainer.rewards.sources[0].function)
    assert trainer.demonstrations is not None, "set up for adversarial_coef"
    prompts, texts, ended = zip(*trainer.demonstrations.draw_texts(len(rows)), strict=True)
    demonstrations = reward.features(prompts, texts, ended=ended)
    texts_read = texts_for(reward, completions.texts, blank=completions.blank)
    answers = reward.features([row["prompt"] for row in rows], texts_read, ended=completions.ended.tolist())

    # 2. One half's discriminator for the other.
    log_odds = torch.zeros(len(rows))
    for half in (0, 1):
        fitted = fit_discriminator(demonstrations[1 - half :: 2], answers[1 - half :: 2])
        log_odds[half::2] = fitted.log_odds(answers[half::2])
    return log_odds
