"""Critique-out-Loud (arXiv:2408.11791): a reward model first writes what it thinks of an answer, then gives its score."""

import torch
from torch import Tensor


def critique_loss(logprobs: Tensor, tokens: Tensor) -> Tensor:
    """Return how unlikely the critiques of a pair's two answers are to the model that must write them.

        l = - 1/2 Σ_{s ∈ {chosen, rejected}} 1/T_s Σ_{t ≤ T_s} log π(c_t | x, y_s, c_{<t})

    (arXiv:2408.11791 section 3, L_LM; there the mean is over all tokens of a batch, here each critique counts the same, so that
    the loss is one of a pair.) Critiques that are certain: 0. An even choice among v tokens: log v. What stands before a
    critique is no part of it.

    Args:
        logprobs: [b, 2] log π of the whole critiques, nats, ≤ 0.
        tokens: [b, 2] how many tokens each has, its end included; a critique of none counts as 0.

    Returns:
        [b] nats per token, ≥ 0, unreduced.

    >>> critique_loss(torch.tensor([[-2.0, -9.0]]), torch.tensor([[2.0, 3.0]]))
    tensor([2.])
    """
    return -(logprobs / tokens.clamp(min=1)).mean(dim=-1)


def joint_loss(losses: Tensor, critique_losses: Tensor, *, weight: float) -> Tensor:
    """Return l_pair + λ l_critique of each pair, [b] and [b] → [b] nats (arXiv:2408.11791); λ = 0 is the pair loss.

    >>> joint_loss(torch.tensor([1.0]), torch.tensor([2.0]), weight=1.25)
    tensor([3.5000])
    """
    return losses + weight * critique_losses


def gumbel(uniform: Tensor) -> Tensor:
    """Return noise under which the largest of noisy log-probabilities is a sample: -log(-log u), elementwise.

        P(argmax_i (log p_i + g_i) = j) = p_j,   g_i = -log(-log u_i),   u_i uniform in (0, 1), independent

    So a sample is a function of its noise: whatever else is sampled at the same time does not change it.

    Args:
        uniform: any shape, in [0, 1]; the ends are moved inside.

    Reference: the Gumbel-max trick, arXiv:1411.0030 section 2.

    >>> gumbel(torch.tensor([0.5]))
    tensor([0.3665])
    """
    tiny = torch.finfo(uniform.dtype).tiny
    return -(-uniform.clamp(min=tiny, max=1 - torch.finfo(uniform.dtype).eps / 2).log()).log()


def self_consistent(scores: Tensor) -> Tensor:
    """Return the mean score over the critiques of each answer, [k, n] → [n] (arXiv:2408.11791 section 4.3).

    It estimates r(x, y) = E_{c ~ π(·|x, y)} r(x, y, c), with a variance of 1/k of that of one critique.

    >>> self_consistent(torch.tensor([[1.0, 0.0], [3.0, 0.0]]))
    tensor([2., 0.])
    """
    return scores.mean(dim=0)
