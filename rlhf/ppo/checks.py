"""What PPO checks about itself at every rollout and update: the formulas are `rlhf.invariants`, the models are the trainer's."""

import warnings
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rlhf.invariants.checks import Check
from rlhf.invariants.ratio import LARGEST, check_ratio, largest_ratio_deviation
from rlhf.invariants.reference import (
    ANSWER_TOKENS,
    FIXED_WITHIN,
    PROMPT_TOKENS,
    ROWS,
    START_WITHIN,
    check_fixed,
    check_start,
    golden_rows,
    mean_difference,
)
from rlhf.invariants.sampler import (
    ROUNDING,
    MomentSums,
    check_counts,
    check_sampler,
    count_sums,
    rounding_bias,
    sampled_counts,
    sampler_z,
    surprise_sums,
)
from rlhf.models.generate import encode_prompts, pad_left
from rlhf.models.logprobs import response_logprobs
from rlhf.ppo.state import GoldenBatch

if TYPE_CHECKING:
    from rlhf.ppo.rollout import Experience, MicroBatch
    from rlhf.ppo.trainer import PPOTrainer


ROUNDED_ROWS = 4  # of a rollout, on each process, that the policy reads once more without autocast


def coarsest_dtype(trainer: "PPOTrainer", *, autocast: bool = True) -> torch.dtype:
    """Return the type with the fewest digits that the policy computes in: autocast's, or its weights' (4-bit ones: 16).

    Args:
        autocast: whether autocast is on; FSDP computes in its type either way.
    """
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    mixed = trainer.accelerator.mixed_precision if autocast or trainer.is_fsdp_enabled else "no"
    if mixed == "fp16":
        return torch.float16
    if mixed == "bf16" or getattr(policy, "is_loaded_in_4bit", False):
        return torch.bfloat16
    if policy.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return torch.float16  # TF32 has as many digits
    dtype: torch.dtype = policy.dtype
    return dtype


def check_sampling(trainer: "PPOTrainer", experience: "Experience") -> None:
    """Require "sampler true" and "token counts true" of a rollout and of all rollouts so far as one, and log both z.

    All processes are taken together. Each rollout looks four times, so a run of n rollouts looks 4 n times. Where an engine
    samples whose difference is weighted away (vLLM), the checks are recorded, with one warning each, and nothing stops.

    Raises:
        InvariantError: the tokens were not sampled from the policy; nothing was updated.
    """
    # 1. The sums of this rollout and of the run.
    outputs, mask, progress = experience.outputs, experience.response_mask, trainer.progress
    reduce = partial(trainer.accelerator.reduce, reduction="sum")
    moments = surprise_sums(outputs.logprobs, outputs.entropy, outputs.variance, outputs.third, mask)
    token_ids, expected = experience.input_ids[:, -mask.shape[1] :], experience.expected_counts
    sampled = sampled_counts(token_ids, mask, expected.shape[1])
    surprise, counts = MomentSums(*reduce(moments).tolist()), count_sums(reduce(sampled), reduce(expected))
    progress.surprise, progress.counts = progress.surprise.plus(surprise), progress.counts.plus(counts)
    trainer.metrics.count("sampler_z", sampler_z(surprise), 1)
    trainer.metrics.count("token_counts_z", sampler_z(counts), 1)

    # 2. All looks. Where autocast rounds what is used and not what was sampled, the surprise may be off by what that was
    #    measured to cost.
    tests, rounding = 4 * max(1, int(trainer.args.num_train_epochs)), ROUNDING[coarsest_dtype(trainer)]
    allowed = max(rounding, rounding_bias(*_autocast_rounding(trainer, experience)))
    for sums in (surprise, progress.surprise):
        _require_of_sampler(trainer, check_sampler(sums, tests=tests, rounding=allowed))
    for sums in (counts, progress.counts):
        _require_of_sampler(trainer, check_counts(sums, tests=tests, rounding=rounding))


@torch.no_grad()
def _autocast_rounding(trainer: "PPOTrainer", experience: "Experience") -> tuple[float, float]:
    """Return Σ (log π with autocast - log π without)², nats², and its tokens: of a few answers of every rollout so far.

    Both are 0 where there is no autocast, and under FSDP, which samples in the same type.
    """
    if trainer.accelerator.mixed_precision == "no" or trainer.is_fsdp_enabled or trainer.vllm is not None:
        return trainer.progress.rounding  # FlashAttention needs autocast over float32, and could not have sampled
    ids, attention, mask = (
        x[:ROUNDED_ROWS] for x in (experience.input_ids, experience.attention_mask, experience.response_mask)
    )
    policy = trainer.accelerator.unwrap_model(trainer.model).policy
    with torch.autocast(ids.device.type, enabled=False):
        exact = response_logprobs(policy, ids, attention, mask.shape[1], trainer.args.temperature)
    difference = (experience.outputs.logprobs[:ROUNDED_ROWS] - exact)[mask.bool()].double()
    counted = [difference.square().sum().item(), float(len(difference)), float(len(ids))]
    square, tokens, rows = trainer.accelerator.reduce(
        torch.tensor(counted, device=ids.device), reduction="sum"
    ).tolist()
    trainer.metrics.count("kl_rounding", square, rows)
    before = trainer.progress.rounding
    trainer.progress.rounding = (before[0] + square, before[1] + tokens)
    return trainer.progress.rounding


def _require_of_sampler(trainer: "PPOTrainer", check: Check) -> None:
    """Require a check of our own sampler; of vLLM's record it, and warn the first time that it does not hold."""
    if trainer.vllm is None:
        trainer.checks.require(check)
        return
    was_held = check.name not in trainer.checks.entries or trainer.checks.entries[check.name]["held"]
    trainer.checks.record(check)
    if was_held and not check.held and trainer.accelerator.is_main_process:
        warnings.warn(f"ppo: {check.message()} Its answers are weighted by π / π_vLLM instead.", stacklevel=2)


def check_first_ratio(trainer: "PPOTrainer", logprobs: Tensor, batch: "MicroBatch") -> None:
    """Require "ratio one" of a micro-batch of a rollout's first optimizer step, over all processes.

    Where somebody leaves dropout on (`disable_dropout=False`) the ratio is noise by intent, and nothing is checked.

    Args:
        logprobs: [b, r] of the policy as it is now, nats.

    Raises:
        InvariantError: a ratio is not 1; nothing was updated.
    """
    if not trainer.args.disable_dropout:
        return
    deviation = largest_ratio_deviation(logprobs, batch["logprobs_old"], batch["response_mask"])
    largest = trainer.accelerator.gather(deviation).max().item()
    trainer.checks.require(check_ratio(largest, coarsest_dtype(trainer)))


def hold_reference(trainer: "PPOTrainer") -> None:
    """Take the golden batch before the first rollout; after a resume require "reference fixed"; let a reference that moves move.

    Raises:
        InvariantError: the reference is another than before the resume, or has moved by itself since it was last moved.
    """
    args, progress = trainer.args, trainer.progress
    moves = args.reference_mixup > 0 and trainer.episodes > 0
    if progress.golden is not None and (moves or not progress.golden.is_of_this_process):
        require_reference(trainer)
    if moves:
        trainer.reference.approach(trainer.accelerator.unwrap_model(trainer.model).policy, args.reference_mixup)
    if progress.golden is None or moves:
        prompts = [row["prompt"] for row in trainer.train_dataset.select(range(min(ROWS, len(trainer.train_dataset))))]
        encoded = encode_prompts(trainer.processing_class, prompts, max_prompt_length=PROMPT_TOKENS)
        rows = golden_rows(encoded, trainer.accelerator.unwrap_model(trainer.model).config.get_text_config().vocab_size)
        logprobs = _golden_logprobs(trainer, rows).tolist()
        dtype = str(coarsest_dtype(trainer, autocast=_needs_autocast(trainer))).removeprefix("torch.")
        progress.golden = GoldenBatch(rows, logprobs, dtype, is_of_this_process=True)


def require_reference(trainer: "PPOTrainer") -> None:
    """Require "reference fixed", where a golden batch was taken.

    Raises:
        InvariantError: the reference is not what it was.
    """
    golden = trainer.progress.golden
    if golden is None:
        return
    now = _golden_logprobs(trainer, golden.rows)
    difference = mean_difference(now, torch.tensor(golden.logprobs))
    exact = golden.is_of_this_process and trainer.accelerator.device.type == "cpu"
    dtypes = coarsest_dtype(trainer, autocast=_needs_autocast(trainer)), getattr(torch, golden.dtype)
    trainer.checks.require(check_fixed(difference, max(dtypes, key=FIXED_WITHIN.__getitem__), exact=exact))


def _needs_autocast(trainer: "PPOTrainer") -> bool:
    """Tell whether the reference may not be read without autocast: FlashAttention takes 16 bits only."""
    config: Any = trainer.reference.model.config
    return "flash" in str(config._attn_implementation)


@torch.no_grad()
def _golden_logprobs(trainer: "PPOTrainer", rows: list[list[int]]) -> Tensor:
    """Return what the reference says of the golden batch's answers, [rows, ANSWER_TOKENS] on the CPU, in evaluation mode.

    Without autocast: a run that goes on in another precision finds them again, and what moves is not lost in rounding.
    """
    pad = trainer.processing_class.pad_token_id
    assert isinstance(pad, int), "check_tokenizer wants one"
    ids, mask = (x.to(trainer.accelerator.device) for x in pad_left(rows, pad))
    model = trainer.reference.model
    was_training = model.training
    model.eval()
    with trainer.accelerator.autocast() if _needs_autocast(trainer) else torch.autocast(ids.device.type, enabled=False):
        logprobs = trainer.reference.logprobs(ids, mask, ANSWER_TOKENS, 1.0)
    model.train(was_training)
    return logprobs.cpu()


def check_policy_is_reference(trainer: "PPOTrainer", experience: "Experience") -> None:
    """Require "policy is reference at start" of the first rollout, over all processes, where the two are meant to be the same.

    Raises:
        InvariantError: they are not; nothing was updated.
    """
    if trainer.episodes > 0 or not trainer.reference.is_policy:
        return
    mask = experience.response_mask.bool()
    difference = (experience.outputs.logprobs - experience.logprobs_reference).abs()[mask]
    largest = trainer.accelerator.gather(difference.max()).max().item()
    dtype = coarsest_dtype(trainer)
    adapters = getattr(trainer.reference.model, "peft_config", {})
    multiplies = any(getattr(config, "use_dora", False) for config in adapters.values())
    trainer.checks.require(check_start(largest, LARGEST[dtype] if multiplies else START_WITHIN[dtype]))
