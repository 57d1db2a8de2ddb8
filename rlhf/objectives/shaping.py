"""Potential-based shaping: rewards on the way that move no optimum."""

import torch
from torch import Tensor


def shaping_rewards(potentials: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    """Return the shaping reward of each token: what the potential gained by it.

        F_t = γ Φ(s_{t+1}) - Φ(s_t),    Φ after the last token = 0

    Special case γ = 1: a row's sum is -Φ(s_0), which depends on the prompt alone, so the best policy stays the best one, with
    a KL beside or without. With the score at the end, r_T = score, and Φ(s) the score of an answer's beginning, each token's
    reward is the score that it gained: dense rewards from a reward model. A shaped critic is V - Φ, so a critic that starts
    at Φ already knows what shaping would tell it (Wiewiora 2003).

    Args:
        potentials: [b, r] Φ before each token was chosen, score units.
        mask: [b, r] 1 on the answer's tokens, right-padded.

    Returns:
        [b, r]; 0 outside the mask.

    Reference: Ng, Harada and Russell, ICML 1999, theorem 1; a potential of 0 at the end: Grześ 2017.

    >>> shaping_rewards(torch.tensor([[0.5, 2.0, 7.0]]), torch.tensor([[1, 1, 0]]))
    tensor([[ 1.5000, -2.0000,  0.0000]])
    """
    kept = torch.where(mask.bool(), potentials, torch.zeros_like(potentials))
    after = torch.cat([kept[:, 1:], torch.zeros_like(kept[:, :1])], dim=1)
    return gamma * after - kept
