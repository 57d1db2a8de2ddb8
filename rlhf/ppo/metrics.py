"""Numbers for people: sums over answers and tokens, taken as means over all processes when something is logged."""

from collections.abc import Mapping, Sequence

import torch
from accelerate import Accelerator
from torch import Tensor

from rlhf.models.generate import Completions
from rlhf.objectives.kl import kl_k3
from rlhf.objectives.ppo import clipped_share
from rlhf.ppo.rollout import Experience, MicroBatch, distinct_pairs


class RolloutMetrics:
    """Means of whatever is counted between two logs. Counting waits for nobody; taking is done by all processes together.

    Metrics of a rollout (means over its answers or answer tokens, on all processes): `episodes`; `reward_proxy`,
    the raw score; `reward_gold`; `reward`, what was optimised, before the KL; `kl`, Σ_t k1 in nats an answer, and
    `kl_k3`, the same by the estimator that is never negative (far apart means trouble); `kl_rounding`, nats an answer, about
    what autocast's rounding alone adds to `kl_k3`, where it is on; `entropy`, nats a token;
    `nll_reference`, nats a token, of which the reference's perplexity is the exponential; `sampler_difference`,
    |log π − log π_vLLM|, nats a token, where vLLM samples; `sampler_z` and `token_counts_z`, standard errors of two
    statistics that are 0 where tokens are sampled from the policy (`rlhf.invariants.sampler`); `kl_coef`; `policy_loss`,
    `value_loss`; `ptx_loss` of demonstrations, nats a token, where they are mixed in; `clip_fraction`; `approx_kl`,
    ½ (log ratio)², nats a token;
    `ratio_first`, the mean ratio of the first minibatch (1 if nothing is wrong); `explained_variance` of the critic
    before its update; `value_slope`, of the line that its values are laid on, where they are calibrated; `distinct_2`,
    different pairs of neighbouring tokens among all; `clipped_rewards`, the share at `reward_clip`; `self_certainty`,
    nats a token, where it is rewarded; `disagreement` of an ensemble's members, deviations of a score; `outside_cloud`,
    the share of answers beyond SFT's in the code of a bottleneck's reward model, and `outside_limit`, above which that
    is no chance; `length`, tokens an answer; `share_without_eos`; `special_tokens`, the share of answers with some before
    their end; `prompts_cut`, the share of prompts that fill all the room there is; `rewards_cut`, the share of texts, prompt
    and answer, that the reward models read without their beginning; `grad_norm` of the policy, 0 while the critic warms up, and
    `grad_norm_critic`.
    """

    def __init__(self, accelerator: Accelerator):
        self.accelerator = accelerator
        self._sums: dict[str, list[float]] = {}

    def count(self, name: str, total: Tensor | float, count: Tensor | float) -> None:
        """Add to the sum and to the number of a metric."""
        entry = self._sums.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def take(self) -> dict[str, float]:
        """Return the means of everything counted since the last call, over all processes."""
        names = sorted(self._sums)
        table = torch.tensor([self._sums[name] for name in names], dtype=torch.float64, device=self.accelerator.device)
        self._sums.clear()
        if not names:
            return {}
        table = self.accelerator.reduce(table, reduction="sum")
        return {name: (row[0] / row[1]).item() for name, row in zip(names, table, strict=True) if row[1] > 0}

    def count_experience(
        self,
        experience: Experience,
        completions: Completions,
        *,
        raw: Tensor,
        disagreement: Tensor | None,
        longest_prompt: int | None,
        monitored: Mapping[str, Sequence[float]],
    ) -> None:
        """Count everything that a log says of sampled answers.

        Args:
            raw: [b] score of the first source.
            disagreement: [b] between the members of an ensemble, if there is one.
            longest_prompt: tokens a prompt may have.
            monitored: what the monitoring functions say, by name.
        """
        mask, rows = experience.response_mask, len(raw)
        logprobs, entropy = experience.outputs.logprobs, experience.outputs.entropy

        def masked(values: Tensor) -> Tensor:
            return torch.where(mask.bool(), values, torch.zeros_like(values)).sum()

        # 1. Of answers.
        self.count("reward_proxy", raw.sum(), rows)
        deviation = raw.std(correction=0)
        if deviation == 0:  # then others decide, if there are any
            deviation = (experience.scores + experience.dense.sum(dim=1)).std(correction=0)
        self.count("reward_deviation", rows * deviation, rows)
        self.count("kl", masked(experience.kl), rows)
        self.count("kl_k3", masked(kl_k3(logprobs, experience.logprobs_reference)), rows)
        self.count("length", mask.sum(), rows)
        self.count("share_without_eos", (~completions.ended).sum(), rows)
        if longest_prompt is not None:
            self.count("prompts_cut", (completions.prompt_mask.sum(dim=1) >= longest_prompt).sum(), rows)
        if disagreement is not None:
            self.count("disagreement", disagreement.sum(), rows)
        for name, values in monitored.items():
            self.count(f"reward_{name}", sum(values), len(values))

        # 2. Of tokens.
        self.count("entropy", (entropy * mask).sum(), mask.sum())
        self.count("nll_reference", -masked(experience.logprobs_reference), mask.sum())
        self.count("distinct_2", *distinct_pairs(completions.response_ids, mask))
        if completions.logprobs_sampler is not None:
            self.count("sampler_difference", masked((logprobs - completions.logprobs_sampler).abs()), mask.sum())

    def count_optimised(self, rewards: Tensor, at_clip: Tensor | None) -> None:
        """Count what is optimised of sampled answers.

        Args:
            rewards: [b] scores as they are shaped, and the rewards of single tokens, without the KL.
            at_clip: [b] which scores were cut to the bound, if there is one.
        """
        self.count("reward", rewards.sum(), len(rewards))
        if at_clip is not None:
            self.count("clipped_rewards", at_clip.sum(), len(rewards))

    @torch.no_grad()
    def count_update(
        self, losses: Tensor, logprobs: Tensor, batch: MicroBatch, *, cliprange: float, is_first: bool
    ) -> None:
        """Count what a log says of the policy in one micro-batch of its update.

        Args:
            losses: [b, r] the policy's clipped losses.
            logprobs: [b, r] of the policy as it is now, nats.
            is_first: whether the rollout's first minibatch is seen, where the ratio must be 1.
        """
        mask = batch["response_mask"].to(losses.dtype)
        log_ratio, tokens = (logprobs - batch["logprobs_old"]) * mask, mask.sum()
        self.count("policy_loss", (losses * mask).sum(), tokens)
        self.count("approx_kl", 0.5 * (log_ratio**2).sum(), tokens)
        self.count(
            "clip_fraction", (clipped_share(logprobs, batch["logprobs_old"], cliprange=cliprange) * mask).sum(), tokens
        )
        if is_first:
            self.count("ratio_first", (log_ratio.exp() * mask).sum(), tokens)
