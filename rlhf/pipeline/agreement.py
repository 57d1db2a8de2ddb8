"""After an evaluation: its KL beside the last one that PPO logged, where both are measured to the same reference."""

import warnings
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf.files import read_jsonl
from rlhf.invariants.agreement import kl_agrees
from rlhf.invariants.checks import CheckBook
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.store import METRICS
from rlhf.ppo.config import PPOConfig

FEWEST_ANSWERS = 8


def compare_kl(context: StageContext, samples: Sequence[Mapping[str, Any]], book: CheckBook) -> None:
    """Enter the check, and note it where it does not hold; say why where the two can't be compared.

    Args:
        samples: the evaluation's answers, each with its `kl` in nats: the first to every prompt, then the second, and so on.
    """
    policy = context.parent("policy")
    logged = [row["kl"] for row in read_jsonl(policy / METRICS) if "kl" in row] if (policy / METRICS).is_file() else []
    last_rollout = [row["kl"] for row in read_jsonl(policy / "samples.jsonl")]
    prompts = len(samples) // context.recipe.evaluate.answers
    # The answers to one prompt are alike, so a prompt with several is one observation: their mean.
    evaluated = [fmean(row["kl"] for row in samples[prompt::prompts]) for prompt in range(prompts)]
    reason = _why_not(context)
    if len(logged) < 2 or min(len(last_rollout), len(evaluated)) < FEWEST_ANSWERS:
        reason = (
            reason or "two logged rollouts, and eight answers of the last one and prompts of the evaluation are needed"
        )
    if reason is not None:
        context.say(f"evaluate: its KL is not compared with PPO's: {reason}.")
        return
    check = kl_agrees(logged, last_rollout, evaluated)
    book.record(check)
    if not check.held:
        warnings.warn(f"evaluate: {check.message()}", stacklevel=2)


def _why_not(context: StageContext) -> str | None:
    """Return why PPO's KL is another one than the evaluation's, which is to the start; None where it is not."""
    recipe = context.recipe
    settings = recipe.ppo.trl_settings()
    ppo, evaluation = settings.get("temperature", PPOConfig.temperature), recipe.sampling.temperature
    if ppo != evaluation:
        return f"PPO samples at a temperature of {ppo:g}, the evaluation at {evaluation:g}"
    if settings.get("reference_mixup", 0.0) > 0:
        return "ppo.reference_mixup moves the reference"
    if context.round > 1 and recipe.rounds.start == "previous" and recipe.rounds.reference == "previous":
        return f"PPO's reference is the policy of the round before, the evaluation's is {context.start_name}"
    return None
