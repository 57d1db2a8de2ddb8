"""What PPO checks about itself at every rollout and update: the formulas are `rlhf.invariants`, the models are the trainer's."""

import warnings
from typing import TYPE_CHECKING

import torch

from rlhf.invariants.sampler import ROUNDING, SurpriseSums, check_sampler, sampler_z, surprise_sums

if TYPE_CHECKING:
    from rlhf.ppo.rollout import Experience
    from rlhf.ppo.trainer import PPOTrainer


def coarsest_dtype(trainer: "PPOTrainer") -> torch.dtype:
    """Return the type with the fewest digits that the policy computes in: autocast's, or its weights' (4-bit ones: 16)."""
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    if trainer.accelerator.mixed_precision == "fp16":
        return torch.float16
    if trainer.accelerator.mixed_precision == "bf16" or getattr(policy, "is_loaded_in_4bit", False):
        return torch.bfloat16
    if policy.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return torch.float16  # TF32 has as many digits
    dtype: torch.dtype = policy.dtype
    return dtype


def check_sampling(trainer: "PPOTrainer", experience: "Experience") -> None:
    """Require "sampler true" of a rollout and of all rollouts so far as one, over all processes, and log its z.

    Each rollout looks twice, so a run of n rollouts looks 2 n times. Where an engine samples whose difference is weighted
    away (vLLM), the check is recorded, with one warning, and nothing stops.

    Raises:
        InvariantError: the tokens were not sampled from the policy; nothing was updated.
    """
    # 1. The sums of this rollout and of the run.
    outputs, mask = experience.outputs, experience.response_mask
    local = surprise_sums(outputs.logprobs, outputs.entropy, outputs.variance, outputs.third, mask)
    table = torch.cat([local, mask.sum().to(local)[None]])
    *sums, tokens = trainer.accelerator.reduce(table, reduction="sum").tolist()
    rollout, progress = SurpriseSums(*sums), trainer.progress
    progress.see_surprise(rollout, int(tokens))
    trainer.metrics.count("sampler_z", sampler_z(rollout), 1)

    # 2. Both looks.
    tests, rounding = 2 * max(1, int(trainer.args.num_train_epochs)), ROUNDING[coarsest_dtype(trainer)]
    for total, count in ((rollout, tokens), (progress.surprise, progress.tokens)):
        check = check_sampler(total, tests=tests, rounding=rounding * count)
        if trainer.vllm is None:
            trainer.checks.require(check)
            continue
        was_held = check.name not in trainer.checks.entries or trainer.checks.entries[check.name]["held"]
        trainer.checks.record(check)
        if was_held and not check.held and trainer.accelerator.is_main_process:
            warnings.warn(f"ppo: {check.message()} Its answers are weighted by π / π_vLLM instead.", stacklevel=2)
