"""Ratio one: is the policy that is trained the one that sampled, before its first update by a rollout?

On the first optimizer step of a rollout nothing has been updated, so every token's ratio π_now(a) / π_old(a) is 1 up to
rounding: the two forwards differ in who meets in a batch and in padding alone. The statistic is the largest |ratio - 1| over
tokens, not a mean, in which dropout's noise would vanish.

The bounds follow from measurements: random Llamas and GPT-2s of 2 to 24 layers with logits up to 7, 64 answers of 48 tokens
forwarded twice in other batches with other padding. The largest |ratio - 1| was 8e-6 in float32 and 7e-2 in bfloat16 (0.06
under autocast): 10 and 1.4 times the distance ε between 1 and the next number, times the largest logit. Models in use have
logits up to about 100 (GPT-2), which gives 1e-4 in float32, and the bound is ten times that, since other devices add in
another order; 1.1 in bfloat16, bound 1; float16 is 8 times finer than bfloat16.

What it sees: dropout that is on, a sampler's policy that is not the trained one, weights that move between sampling and update.
What it cannot see: deviations that rounding in 16 bits could cause too.
"""

import torch
from torch import Tensor

from rlhf.invariants.checks import Check

NAME = "ratio one"
LARGEST = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.15, torch.bfloat16: 1.0}
SENTENCE = (
    "Before the first update of a rollout the policy gives its tokens other probabilities than when the rollout was made; nothing "
    "was updated. Likely causes: dropout that disable_dropout does not reach (look for *drop* in the model's configuration and "
    "set it to 0); a layer that acts otherwise in training; weights that something else changes in between; answers that "
    "influence each other in a batch."
)


def largest_ratio_deviation(logprobs: Tensor, logprobs_old: Tensor, mask: Tensor) -> Tensor:
    """Return the largest |π_now / π_old - 1| over the tokens under the mask, a scalar; 0 without tokens.

    >>> largest_ratio_deviation(torch.tensor([[0.0, -1.0]]), torch.tensor([[0.0, 7.0]]), torch.tensor([[1, 0]])).item()
    0.0
    """
    deviation = (logprobs - logprobs_old).detach().exp().sub(1).abs()
    return torch.where(mask.bool(), deviation, torch.zeros_like(deviation)).max()


def check_ratio(deviation: float, dtype: torch.dtype) -> Check:
    """Return the check "ratio one".

    Args:
        deviation: the largest |ratio - 1|.
        dtype: the coarsest that the policy computes in.
    """
    return Check(NAME, deviation, LARGEST[dtype], "largest |ratio - 1|", SENTENCE)
