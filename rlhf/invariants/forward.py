"""Forward: a policy gives a text the same log-probabilities alone and beside longer texts."""

import torch
from torch import Tensor

from rlhf.invariants.checks import Check
from rlhf.invariants.reference import FIXED_WITHIN

ALONE = "policy alone = in a batch"


def batched_forward(alone: Tensor, together: Tensor, *, dtype: torch.dtype) -> Check:
    """Compare the log-probabilities of tokens, each text in a forward of its own, with those of one padded batch.

    Another layout of a batch moves them as rounding does, so the bound is the one that was measured for "reference fixed": a
    mean of 10⁻⁴ nats a token in float32, 0.01 in float16, 0.05 in bfloat16.

    Args:
        alone, together: [n] of the same tokens, nats.
        dtype: in which the model computes.
    """
    sentence = (
        "The model gives a text other log-probabilities beside longer texts than alone, so what PPO compares depends on who meets "
        "in a batch. Likely causes: attention that sees padding, positions that count it (the model's architecture, or "
        "attn_implementation), a layer that mixes the rows of a batch."
    )
    difference = (alone - together).abs().mean().item()
    return Check(ALONE, difference, FIXED_WITHIN[dtype], "nats a token", sentence)
