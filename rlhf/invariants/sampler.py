"""Sampler true: were the tokens of a rollout drawn from the distribution whose log-probabilities are used?

For a token a_t drawn from π_t, the surprise -log π_t(a_t) has the entropy H_t as its mean, the variance
Var_t = Σ_a π_t(a) (-log π_t(a) - H_t)² and the third central moment M_t = Σ_a π_t(a) (-log π_t(a) - H_t)³, all three
from the same logits. The deviations from the mean are a martingale difference sequence, whatever the prompts and the
lengths, so their sum over a rollout, divided by √Σ Var_t, is close to standard normal:

    z = Σ_t (-log π_t(a_t) - H_t) / √(Σ_t Var_t)

What it sees: a sampler that is narrower or wider than π (temperature, top-k, top-p, min-p, suppressed tokens, another
engine's drift, another dtype, other weights). What it cannot see: a sampler that moves mass between tokens of equal
probability, or that follows π's entropy while it prefers tokens of the same mean surprise; and where π is nearly certain
of every token (Σ Var_t small) it sees little.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

FALSE_ALARMS_PER_RUN = 1e-4  # one true sampler in ten thousand runs is stopped


class SurpriseSums(NamedTuple):
    """Sums over the tokens of one rollout, or of several: what the statistic is made of. They add up.

    Attributes:
        deviation: Σ (-log π(a) - H), nats.
        variance: Σ Var, nats².
        third: Σ M, nats³.
    """

    deviation: float
    variance: float
    third: float


def surprise_sums(logprobs: Tensor, entropy: Tensor, variance: Tensor, third: Tensor, mask: Tensor) -> Tensor:
    """Return the three sums of `SurpriseSums` over the sampled tokens, [3] in float64.

    Args:
        logprobs: [b, r] log π of the sampled tokens, nats, at the sampling temperature.
        entropy, variance, third: [b, r] moments of the surprise under π, nats, nats², nats³.
        mask: [b, r] 1 on sampled tokens.
    """
    keep = mask.bool()
    columns = [-logprobs - entropy, variance, third]
    return torch.stack([torch.where(keep, column, torch.zeros_like(column)).double().sum() for column in columns])


def sampler_z(sums: SurpriseSums) -> float:
    """Return z, in standard errors; 0 where π is certain of every token.

    >>> sampler_z(SurpriseSums(3.0, 9.0, 0.0))
    1.0
    """
    return sums.deviation / math.sqrt(sums.variance) if sums.variance > 0 else 0.0


def sampler_bounds(
    sums: SurpriseSums, *, tests: int, false_alarms: float = FALSE_ALARMS_PER_RUN
) -> tuple[float, float]:
    """Return the lowest and highest z that a true sampler shows, so that so few runs are stopped wrongly.

    With α false alarms a run and N tests in it, each side of each test has α / 2N (Bonferroni), b = Φ⁻¹(1 - α / 2N). The
    surprise is skewed to the right, so the quantiles are shifted by the skewness γ = Σ M / (Σ Var)^(3/2) (Cornish and
    Fisher's expansion, first term): low = -b + γ (b² - 1) / 6, high = b + γ (b² - 1) / 6.

    Args:
        tests: how often a run looks, N ≥ 1.
        false_alarms: share α of runs with a true sampler that are stopped.

    >>> low, high = sampler_bounds(SurpriseSums(0.0, 100.0, 0.0), tests=50)
    >>> round(low, 2), round(high, 2)
    (-4.75, 4.75)
    """
    b = NormalDist().inv_cdf(1 - false_alarms / (2 * tests))
    skewness = sums.third / sums.variance**1.5 if sums.variance > 0 else 0.0
    shift = skewness * (b * b - 1) / 6
    return -b + shift, b + shift
