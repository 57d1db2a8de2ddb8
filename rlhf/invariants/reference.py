"""Is the reference of the KL what it is taken for: the policy at the start, and the same model until the end?

Reference fixed: its log-probabilities on a golden batch, taken before the first rollout, are found again at every checkpoint
and at the end. The batch is a few prompts, each followed by tokens drawn from the whole vocabulary, so that embeddings and head
are read at many places, and it is read without autocast. On a CPU, in the process that took them, they are the same bit for
bit (bound 0). On a device, or after a resume, the mean difference is at most that of rounding in the weights' type: measured at
5e-4 nats a token in bfloat16 with logits up to 7, it grows with the logits, and models in use have logits up to about 100, so
0.05 is allowed; float16 has 8 times finer digits (0.01), float32 65,536 times (1e-4 leaves room for sums in another order).

Policy is reference at start: before the first update the two are the same model under two names, or a base with and without an
adapter that adds exact zeros, so per token they differ by 1e-5 nats at most in float32 (0 where both run one after the other
on the same batch). An adapter that multiplies (DoRA) rounds, and is allowed what "ratio one" is.

What they see: whatever moves with the policy (modules trained as a whole, biases, embeddings that both read), a copy that
left something out, another reference after a resume. What they cannot see: embeddings of tokens that are in no golden row.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf.invariants.checks import Check

FIXED, START = "reference fixed", "policy is reference at start"
ROWS, PROMPT_TOKENS, ANSWER_TOKENS = 4, 64, 16
FIXED_WITHIN = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}
START_WITHIN = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 0.01, torch.bfloat16: 0.1}
FIXED_SENTENCE = (
    "The reference is not the model that it was before PPO, so KL and its penalty are measured to something that moves. Likely "
    "causes: weights on the base that are trained beside the adapter (bias, modules_to_save), a reference that shares "
    "modules with the policy, another folder after a resume. Train adapters alone, or give PPO a full model."
)
START_SENTENCE = (
    "Before the first update the policy and its reference give the same tokens different probabilities; nothing was updated. "
    "Likely causes: the reference's copy leaves out a part of what SFT trained (embeddings, modules_to_save), dropout that is on, "
    "an adapter that is not fresh although adapter_was_trained=False. Merge the adapter into its base and start again from that."
)


def golden_rows(prompts: Sequence[Sequence[int]], vocabulary: int) -> list[list[int]]:
    """Return the golden batch: the ends of a few prompts, each with `ANSWER_TOKENS` tokens from a generator of its own.

    >>> [len(row) for row in golden_rows([[5, 6], [7] * 100], 10)]
    [18, 80]
    """
    generator = torch.Generator().manual_seed(0)
    answers = torch.randint(vocabulary, (ROWS, ANSWER_TOKENS), generator=generator).tolist()
    return [[*prompt[-PROMPT_TOKENS:], *answer] for prompt, answer in zip(prompts, answers, strict=False)]


def mean_difference(one: Tensor, other: Tensor) -> float:
    """Return the mean |one - other| in nats a token; equal infinities differ by 0."""
    return torch.where(one == other, torch.zeros_like(one), (one - other).abs()).double().mean().item()


def check_fixed(difference: float, dtype: torch.dtype, *, exact: bool) -> Check:
    """Return the check "reference fixed".

    Args:
        difference: mean over the golden batch's answer tokens, nats.
        dtype: the coarsest that the reference computes in.
        exact: whether it must be the same bit for bit.
    """
    return Check(FIXED, difference, 0.0 if exact else FIXED_WITHIN[dtype], "nats a token", FIXED_SENTENCE)


def check_start(difference: float, bound: float) -> Check:
    """Return the check "policy is reference at start" of the largest difference of a token's log-probabilities, nats."""
    return Check(START, difference, bound, "nats a token", START_SENTENCE)
