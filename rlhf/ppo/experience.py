"""The first half of PPO, read from top to bottom: sample answers, score them, run every role, work out what a token was worth.

The second half, the update, is `PPOTrainer.training_step` and the losses below it.
"""

import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rlhf.data.rows import Prompt
from rlhf.errors import TrainingError
from rlhf.invariants.sampler import halves_of_rows
from rlhf.models.batching import run_batches
from rlhf.models.generate import Completions, has_hidden_tokens
from rlhf.models.logprobs import ExpectedCounts
from rlhf.models.text import plain
from rlhf.objectives.advantage import generalized_advantage, nearest_line, token_rewards
from rlhf.objectives.kl import kl_k1
from rlhf.objectives.masked import whiten
from rlhf.objectives.ppo import explained_variance, truncated_importance
from rlhf.ppo.checks import check_policy_is_reference, check_sampling, hold_reference
from rlhf.ppo.processes import mean_and_variance_of_all, moments_of_all, run_or_stop_all
from rlhf.ppo.reporting import count_cut_texts, note_cuts, warn_of_cut_answers, warn_of_unread_answers
from rlhf.ppo.rewards import Scores, texts_for
from rlhf.ppo.roles import TokenOutputs
from rlhf.ppo.rollout import Experience, PromptRow, Rollout, Sample, used_columns
from rlhf.ppo.scores import count_rewards, shape_scores
from rlhf.ppo.token_rewards import own_token_rewards
from rlhf.ppo.verdict_reward import OPPONENT
from rlhf.reward.load import RewardModel

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer


@torch.no_grad()
def make_rollout(trainer: "PPOTrainer", rows: Sequence[PromptRow]) -> Rollout:
    """Return one batch of experience with an advantage for every token, whitened over all processes.

    Raises:
        InvariantError: the answers were not sampled from the policy, or the reference is not what it is taken for.
    """
    # 1. Experience, with a reference that has followed so far; the history of rewards grows by it before it is used.
    args, accelerator = trainer.args, trainer.accelerator
    hold_reference(trainer)
    experience = run_or_stop_all(accelerator, trainer.experience, rows)
    check_policy_is_reference(trainer, experience)
    check_sampling(trainer, experience)
    warn_of_cut_answers(trainer, experience.ended)
    warn_of_unread_answers(trainer)
    mask, values = experience.response_mask, experience.outputs.values
    if args.running_reward_norm:
        count, mean, variance = moments_of_all(accelerator, experience.scores)
        trainer.progress.see_rewards(count, mean, variance * count)

    # 2. A reward for every token: the score at the answer's last one, the rewards of single tokens, the KL.
    count_rewards(trainer, experience)
    scores = shape_scores(experience.scores, experience.ended, args, trainer.progress)
    kl_coef = trainer.progress.kl_coef if args.kl_estimator == "k1" else 0.0
    rewards = token_rewards(scores, experience.kl, mask, kl_coef=kl_coef) + experience.dense

    # 3. Advantages, whitened over all processes.
    baseline = _calibrated(trainer, values, rewards, mask) if args.calibrate_values else values
    advantages, returns = generalized_advantage(rewards, baseline, mask, gamma=args.gamma, lam=args.lam)
    _, returns_variance = mean_and_variance_of_all(accelerator, returns, mask)
    _, residual_variance = mean_and_variance_of_all(accelerator, returns - values, mask)
    trainer.metrics.count("explained_variance", explained_variance(returns_variance, residual_variance), 1)
    if args.whiten_advantages:
        advantage_mean, advantage_variance = mean_and_variance_of_all(accelerator, advantages, mask)
        advantages = whiten(advantages, mask, mean=advantage_mean, variance=advantage_variance)
    _end_sampling(trainer, experience)
    return Rollout(
        experience.input_ids,
        experience.attention_mask,
        mask,
        experience.outputs.logprobs,
        experience.logprobs_reference,
        values,
        advantages,
        returns,
        experience.sampler_weights,
    )


def _calibrated(trainer: "PPOTrainer", values: Tensor, rewards: Tensor, mask: Tensor) -> Tensor:
    """Return the critic's values on the line that takes them nearest to what this rollout's answers got, [b, r].

    A critic that starts as a reward model was never asked about beginnings of answers. Of a language model it is often worse than
    a constant for many rollouts, and advantages are then mostly its errors.
    """
    zeros, accelerator = torch.zeros_like(values), trainer.accelerator
    returns, _ = generalized_advantage(rewards, zeros, mask, gamma=trainer.args.gamma, lam=1.0)
    mean, variance = mean_and_variance_of_all(accelerator, values, mask)
    returns_mean, returns_variance = mean_and_variance_of_all(accelerator, returns, mask)
    _, sum_variance = mean_and_variance_of_all(accelerator, values + returns, mask)
    slope = nearest_line(variance, returns_variance, sum_variance)
    trainer.metrics.count("value_slope", slope, 1)
    return torch.where(mask.bool(), slope * (values - mean) + returns_mean, zeros)


@torch.no_grad()
def gather_experience(trainer: "PPOTrainer", rows: Sequence[PromptRow]) -> Experience:
    """Sample answers to these prompts and run every role on them; no process waits for another.

    Raises:
        TrainingError: a reward or a log-probability is not finite; nothing has been updated then.
    """
    # 1. Sample answers and score them; text crosses to the reward functions, never ids.
    prompts = [row["prompt"] for row in rows]
    completions = trainer.sample(rows)
    if trainer.rewards.compares:
        rows = _with_opponents(trainer, rows)
    with count_cut_texts(trainer, len(rows)):
        scores = trainer.rewards(rows, completions)
    if trainer.args.baseline_samples > 0:
        scores = scores._replace(total=scores.total - _reference_baseline(trainer, rows))

    # 2. Log-probabilities and values by a full forward of the trained roles (not from the decoding pass: the
    #    ratio of the first minibatch must be 1), and of the reference.
    input_ids = torch.cat([completions.prompt_ids, completions.response_ids], dim=1)
    attention_mask = torch.cat([completions.prompt_mask, completions.response_mask], dim=1)
    mask = completions.response_mask
    outputs, logprobs_reference, expected_counts = _forward_in_parts(trainer, input_ids, attention_mask, mask)
    kl = kl_k1(outputs.logprobs, logprobs_reference)
    if not torch.isfinite(kl[mask.bool()]).all():
        raise TrainingError(
            "ppo: a log-probability of the policy or the reference is not finite; nothing was updated.",
            rows=[{"prompt": p, "completion": text} for p, text in zip(prompts, completions.texts, strict=True)],
        )
    own_rewards = own_token_rewards(trainer, rows, completions, outputs, logprobs_reference)
    weights = torch.ones_like(kl)
    if completions.logprobs_sampler is not None:
        limit = trainer.args.vllm_importance_sampling_clip_max
        weights = truncated_importance(outputs.logprobs, completions.logprobs_sampler, limit=limit)
    experience = Experience(
        input_ids,
        attention_mask,
        mask,
        scores.total,
        scores.per_token + own_rewards,
        completions.ended,
        kl,
        outputs,
        logprobs_reference,
        weights,
        expected_counts,
    )

    # 3. Numbers and samples for people.
    _report(trainer, prompts, completions, scores, experience)
    return experience


def _forward_in_parts(
    trainer: "PPOTrainer", input_ids: Tensor, attention_mask: Tensor, mask: Tensor
) -> tuple[TokenOutputs, Tensor, Tensor]:
    """Run policy, critic and reference, [b, r] each; rows of like length together, of which a decoder that can't pack gains.

    Returns:
        Outputs of policy and critic, the reference's log-probabilities, and the policy's expected counts of tokens in
        both halves of the answers, [2, v].
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    model.eval()
    halves = halves_of_rows(mask)
    vocabulary = model.config.get_text_config().vocab_size
    expected = torch.zeros(2, vocabulary, dtype=torch.float64, device=mask.device)

    def forward(rows: list[int]) -> Iterator[tuple[Tensor, ...]]:
        prompt, answer = used_columns(attention_mask[rows], mask[rows])
        ids, attention = (x[rows, prompt.start : answer.stop] for x in (input_ids, attention_mask))
        width = answer.stop - prompt.stop
        with trainer.accelerator.autocast():
            counts = ExpectedCounts(halves[rows, :, :width], expected)
            outputs = model(ids, attention, width, trainer.args.temperature, expected=counts)
            reference = trainer.reference.logprobs(ids, attention, width, trainer.args.temperature)
        return zip(*(nn.functional.pad(x, (0, mask.shape[1] - width)) for x in (*outputs, reference)), strict=True)

    # Not batches_by_length: torch puts rows of one length in another order, and sums depend on who meets in a batch.
    order = attention_mask.sum(dim=1).argsort()
    batches = [rows.tolist() for rows in order.split(trainer.args.per_device_train_batch_size)]
    *outputs, reference = (torch.stack(column) for column in zip(*run_batches(forward, batches), strict=True))
    return TokenOutputs(*outputs), reference, expected


def _with_opponents(trainer: "PPOTrainer", rows: Sequence[PromptRow]) -> list[PromptRow]:
    """Return rows with an answer of the reference to each prompt, for sources that compare two; a row's own one stays."""
    if OPPONENT in rows[0]:
        return list(rows)
    with trainer.reference.acting() as model:
        texts = trainer.generate(model, rows).texts
    return [cast(PromptRow, {**row, OPPONENT: text}) for row, text in zip(rows, texts, strict=True)]


def _reference_baseline(trainer: "PPOTrainer", rows: Sequence[PromptRow]) -> Tensor:
    """Score the reference's own answers to these prompts, [b]: the mean of `baseline_samples` fresh ones each.

    It is subtracted from the reward (contrastive reward, arXiv:2403.07708): a prompt whose answers all score high
    teaches no more than another.
    """
    repeated = [row for row in rows for _ in range(trainer.args.baseline_samples)]
    with trainer.reference.acting() as model:
        completions = trainer.generate(model, repeated)
    scores = trainer.rewards(repeated, completions)
    return (scores.total + scores.per_token.sum(dim=1)).view(len(rows), -1).mean(dim=1)


def _report(
    trainer: "PPOTrainer",
    prompts: Sequence[Prompt],
    completions: Completions,
    scores: Scores,
    experience: Experience,
) -> None:
    """Count what a log says of sampled answers, and keep the answers as samples."""
    texts, ended = completions.texts, completions.ended
    readable = [plain(prompt) for prompt in prompts]
    monitored = {
        name: [float(x) for x in function(readable, list(texts))] for name, function in trainer.monitors.items()
    }
    trainer.metrics.count_experience(
        experience,
        completions,
        raw=scores.raw,
        disagreement=scores.disagreement,
        longest_prompt=trainer.longest_prompt,
        monitored=monitored,
    )
    hidden = has_hidden_tokens(trainer.processing_class, completions)
    trainer.metrics.count("special_tokens", hidden.sum(), len(hidden))
    _count_outside(trainer, prompts, completions)
    mask, kl = experience.response_mask.bool(), experience.kl
    kl_sequence = torch.where(mask, kl, torch.zeros_like(kl)).sum(dim=1)
    gold: Sequence[float | None] = monitored.get("gold", [None] * len(prompts))
    columns = (prompts, texts, scores.raw.tolist(), gold, kl_sequence.tolist(), ended.tolist())
    trainer.latest_samples = [Sample(*values) for values in zip(*columns, strict=True)]


def _count_outside(trainer: "PPOTrainer", prompts: Sequence[Prompt], completions: Completions) -> None:
    """Count the answers that lie beyond the cloud of SFT's in the code of the first reward model, where it has one."""
    reward = trainer.rewards.sources[0].function
    if not isinstance(reward, RewardModel) or reward.cloud is None:
        return
    texts = texts_for(reward, completions.texts, blank=completions.blank)
    features = reward.features(prompts, texts, ended=completions.ended.tolist())
    answers = len(prompts) * trainer.accelerator.num_processes
    trainer.metrics.count("outside_cloud", reward.cloud.is_outside(features).sum(), len(prompts))
    trainer.metrics.count("outside_limit", reward.cloud.most_outside(answers) / answers, 1)


def _end_sampling(trainer: "PPOTrainer", experience: Experience) -> None:
    """Count the episodes, and let the KL of this rollout decide the coefficient of the next, or the end."""
    args, mask = trainer.args, experience.response_mask.bool()
    kl_sequence = torch.where(mask, experience.kl, torch.zeros_like(experience.kl)).sum(dim=1)
    count, kl, _ = moments_of_all(trainer.accelerator, kl_sequence)
    trainer.progress.episodes += int(count)
    note_cuts(trainer)
    trainer.metrics.count("kl_coef", trainer.progress.kl_coef, 1)
    trainer.progress.kl_coef_learnt = trainer.progress.kl_coef
    if args.kl_target is not None and "policy" in trainer.trained_roles:  # while the critic warms up, the KL is 0
        trainer.progress.adapt(kl, target=args.kl_target, horizon=args.kl_horizon, episodes=int(count))
    if args.kl_limit is not None and kl > args.kl_limit:
        reason = (
            f"ppo: stopped after {trainer.episodes} episodes: the KL, {kl:.1f} nats an answer, is over "
            f"kl_limit={args.kl_limit:g}."
        )
        trainer.stop(reason)
        if trainer.accelerator.is_main_process:
            warnings.warn(reason, stacklevel=2)
