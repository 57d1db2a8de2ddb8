"""Losses on a pair of rewards. One general form covers most of the literature; the rest are its special cases."""

import torch
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Negative log-likelihood that `chosen` beats `rejected`.

        loss = -log σ(d) = log(1 + e^{-d}),    d = chosen - rejected

    log 2 at d = 0; gradient with respect to d is -σ(-d), which tends to -1 for the worst pairs, so they go on teaching
    (an ε inside the logarithm would silence them). One stable function: finite for |d| up to the largest float.

    Args:
        chosen, rejected: [b] raw scores.

    Returns:
        [b] nats per pair, unreduced.

    Reference: arXiv:2401.06080 eq. 2.

    >>> bradley_terry(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor([0.6931, 0.1269])
    """
    return torch.nn.functional.softplus(rejected - chosen)


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    confidence: Tensor | float = 1.0,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Weighted cross-entropy of a margin-shifted Bradley-Terry preference against a soft label.

        loss = w · [ -p log σ(d - m) - (1 - p) log σ(-(d - m)) ],    d = chosen - rejected
             = w · [ bradley_terry(d - m) + (1 - p) (d - m) ]

    Special cases: Bradley-Terry (m=0, p=1, w=1); Llama-2 margin (m from ratings); adaptive margin (m = mean strength
    of a vote); label smoothing (p = 1 - α everywhere); soft labels (p per pair); flipped label (p = 0, m of the other
    sign); scaled Bradley-Terry (w = rating gap). The minimum over d is w·H(p), reached at d = logit(p) + m, so an
    uncertain pair stops pushing.

    Args:
        chosen, rejected: [b] raw scores.
        margin: [b] or a number, nats, any sign; a constant (no gradient flows into it).
        confidence: [b] or a number, P(chosen is better), in [0, 1].
        weight: [b] or a number, ≥ 0. Weights are not renormalised.

    Returns:
        [b] nats per pair, unreduced.

    Reference: arXiv:2401.06080 eq. 5 and eq. 6 (eq. 6 prints the margin outside the logarithm, where it would have no
    gradient; meant, and here, is inside, as in arXiv:2307.09288 eq. 2).

    >>> pair_loss(torch.zeros(1), torch.zeros(1), confidence=0.3)
    tensor([0.6931])
    """
    shifted = chosen - margin
    surplus = shifted - rejected
    return weight * (bradley_terry(shifted, rejected) + (1.0 - confidence) * surplus)
