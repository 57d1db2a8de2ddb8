"""One score of several reward models: how much to believe them where they disagree."""

import math

import torch
from torch import Tensor


def combined(scores: Tensor, rule: str, *, strength: float = 0.5) -> Tensor:
    """Combine the scores of several members into one.

    | rule | score | source |
    |---|---|---|
    | `mean` | (1/k) Σ R_i | arXiv:2310.02743 |
    | `worst` | min_i R_i | its WCO |
    | `uncertainty` | mean - λ Var, with 1/k | its UWO; λ is `strength` |
    | `soft_min` | -b log (1/k) Σ exp(-R_i / b) | arXiv:2606.09073; b is `strength` |

    Soft-min is the mean for b → ∞ and the worst for b → 0; at large b it is mean - Var / (2b). All are the members' score
    where they agree. Members must be on one scale: pairwise losses leave each its own origin and unit.

    Args:
        scores: [k, n], normalised.
        strength: λ ≥ 0 or b > 0.

    Returns:
        [n].

    >>> combined(torch.tensor([[1.0], [1.2], [2.6]]), "uncertainty", strength=0.5)
    tensor([1.3467])
    """
    match rule:
        case "mean":
            return scores.mean(dim=0)
        case "worst":
            return scores.amin(dim=0)
        case "uncertainty":
            return scores.mean(dim=0) - strength * scores.var(dim=0, correction=0)
        case "soft_min":
            return -strength * (torch.logsumexp(-scores / strength, dim=0) - math.log(len(scores)))
    raise ValueError(f"{rule!r} is none of mean, worst, uncertainty, soft_min")
