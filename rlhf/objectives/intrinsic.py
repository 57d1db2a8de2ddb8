"""Intrinsic rewards, which ask nobody: how sure the policy is of its tokens, and how unlikely they were to the reference."""

import math

import torch
from torch import Tensor


def self_certainty(log_softmax: Tensor) -> Tensor:
    """Return how far a distribution is from the uniform one, at every place.

        KL(U || π) = Σ_v (1/V) log( (1/V) / π(v) ) = -log V - (1/V) Σ_v log π(v)

    0 where all tokens are equally likely; it has no upper bound, and grows with every token that becomes impossible. It looks
    at the distribution and not at the token that was drawn: what PPO can raise is how sure the policy is of what follows.

    Args:
        log_softmax: [..., V] log π of every token, nats.

    Returns:
        [...] nats, 0 or more.

    Reference: arXiv:2505.19590 eq. 4 (its mean over an answer's tokens: `mean_over_tokens`).

    >>> self_certainty(torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log())
    tensor([0.0000, 0.5108])
    """
    return (-math.log(log_softmax.shape[-1]) - log_softmax.mean(dim=-1)).clamp(min=0)


def novelty(logprobs_reference: Tensor) -> Tensor:
    """Return how unlikely each token was to the reference: -log π_ref(a), nats.

    With weight c beside the weight β of the KL the optimum is the reference at another temperature:

        argmax_π E_π[ -c log π_ref ] - β KL(π || π_ref)  =  π_ref^(1 - c/β) / Z

    c = β: uniform, c < β: flatter than the reference, c > β: the reference turned upside down. Here c is the weight of a token:
    `novelty_coef` weighs the mean over an answer's T tokens, beside a KL that is their sum, so c is a T-th of it.

    Args:
        logprobs_reference: [b, r] nats.

    >>> novelty(torch.tensor([0.5, 0.25]).log())
    tensor([0.6931, 1.3863])
    """
    return -logprobs_reference


def mean_over_tokens(values: Tensor, mask: Tensor) -> Tensor:
    """Return the mean of values over each answer's tokens, [b]: a reward of whole answers, to stand at their last token.

    A mean, for a sum of numbers above 0 would pay for length. It must not be spread over the tokens either: a token's share
    would depend on how long the answer becomes, and PPO credits a token with what comes after it alone, so going on would be
    paid and ending would not. An answer without tokens gets 0.

    Args:
        values: [b, r].
        mask: [b, r] 1 on the answer's tokens.

    >>> mean_over_tokens(torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[1, 1, 0]]))
    tensor([2.])
    """
    kept = torch.where(mask.bool(), values, torch.zeros_like(values))
    return kept.sum(dim=1) / mask.sum(dim=1).clamp(min=1)
