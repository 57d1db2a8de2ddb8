"""Forward: a policy gives a text the same log-probabilities alone, beside longer texts, and a second time."""

import torch
from torch import Tensor

from rlhf.invariants.checks import Check

ALONE, TWICE = "policy alone = in a batch", "policy the same twice"
# Mean difference in nats a token. Another layout of a batch moves it by what rounding moves it; a model that sees padding, or
# counts positions over it, by 0.01 to 3. Measured on Llama, GPT-2, OPT and Bloom, see recipes/results/checks.md.
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4, torch.float16: 0.01, torch.bfloat16: 0.05}


def batched_forward(alone: Tensor, together: Tensor, *, dtype: torch.dtype) -> Check:
    """Compare the log-probabilities of tokens, each text in a forward of its own, with those of one padded batch.

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
    return Check(ALONE, difference, TOLERANCE.get(dtype, 0.05), "nats a token", sentence)


def repeated_forward(first: Tensor, second: Tensor, *, dtype: torch.dtype) -> Check:
    """Compare the log-probabilities of one batch with those of the same batch again, as the model is trained.

    Args:
        first, second: [n] of the same tokens, nats.
        dtype: in which the model computes.
    """
    sentence = (
        "The model as it is trained gives the same text other log-probabilities a second time, so the ratio of PPO is not 1 before "
        "anything was learnt. Likely causes: a dropout that disable_dropout does not reach (set attention_dropout, "
        "resid_pdrop, … to 0 in the model's config.json), or a layer that draws random numbers, such as a noisy router."
    )
    difference = (first - second).abs().mean().item()
    return Check(TWICE, difference, TOLERANCE.get(dtype, 0.05), "nats a token", sentence)
