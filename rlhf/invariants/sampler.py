"""Sampler true: were the tokens of a rollout drawn from the distribution whose log-probabilities are used?

For a token a_t drawn from π_t, the surprise -log π_t(a_t) has the entropy H_t as its mean, the variance
Var_t = Σ_a π_t(a) (-log π_t(a) - H_t)² and the third central moment M_t = Σ_a π_t(a) (-log π_t(a) - H_t)³, all three
from the same logits. The deviations from the mean are a martingale difference sequence, whatever the prompts and the
lengths, so their sum over a rollout, divided by √Σ Var_t, is close to standard normal:

    z = Σ_t (-log π_t(a_t) - H_t) / √(Σ_t Var_t)

A second statistic looks at which tokens they are. D_A(v) = (how often v was sampled) - Σ_t π_t(v) over the answers of the even
rows, D_B the same over the odd ones. Given the even rows, the sum over the odd rows' tokens of D_A(a_t) - E_π[D_A] = D_A · D_B
is a martingale too, of a variance of at most Σ_v E_B(v) D_A(v)², with E_B(v) = Σ_t π_t(v):

    z = Σ_v D_A(v) D_B(v) / √(Σ_v E_B(v) D_A(v)²)

Tokens that are sampled too seldom, or too often, in both halves make it large: suppressed tokens, a penalty on repetition, also
where π is almost uniform and its surprise tells nothing.

What the first sees: a sampler that is narrower or wider than π (temperature, top-k, top-p, min-p, suppressed tokens, another
engine's drift, another dtype, other weights). What it cannot see, and the second can: a sampler that moves mass between tokens of
equal probability. What neither sees: one that moves mass now towards a token and now away from it, at the same mean surprise;
and where π is nearly certain of every token (Σ Var_t small) both see little.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from scipy.stats import gamma
from torch import Tensor

from rlhf.invariants.checks import Check

NAME = "sampler true"
COUNTS_NAME = "token counts true"
LARGEST_SKEWNESS = 1.0  # up to it, the gamma quantiles are right
NO_SKEWNESS = 1e-4  # below, the gamma quantiles are the normal ones to 1e-3 and lose digits
FALSE_ALARMS_PER_RUN = 1e-4  # one true sampler in ten thousand runs is stopped
# Nats a token by which the mean of -log π(a) - H may be off where sampling and the later forward round otherwise. Measured on the
# same tokens (random Llamas and GPT-2s of 2 to 24 layers, logits up to 5): bfloat16 against float32 below 1e-4; times ten.
ROUNDING = {torch.float64: 1e-5, torch.float32: 1e-5, torch.float16: 3e-4, torch.bfloat16: 1e-3}
# Of larger logits and more layers it is more, and of the order of the squared difference σ² of a token's log-probabilities:
# measured 0.6 σ² (random Llamas, σ from 0.1 to 0.4).
BIAS_OF_SQUARE = 2.0
SENTENCE = (
    "The sampled tokens were not drawn from the distribution whose log-probabilities are used; nothing was updated. Likely "
    "causes: another temperature at sampling; a truncation such as top-k, top-p, min-p or suppressed tokens; other weights or "
    "another dtype in the engine that samples; dropout that is on in one of the two passes. Sample at ppo.temperature from the "
    "whole distribution, with the weights that are trained."
)


COUNTS_SENTENCE = (
    "Some tokens were sampled more often, or less often, than the policy has them; nothing was updated. Likely causes: suppressed "
    "or forbidden tokens; a penalty on repetition; a processor of logits that is on in sampling only; other weights in the engine "
    "that samples. Sample at ppo.temperature from the whole distribution, with the weights that are trained."
)


class MomentSums(NamedTuple):
    """Sums over the tokens of one rollout, or of several: what a statistic is made of. They add up.

    Attributes:
        deviation: Σ (x - E[x]) of what is looked at, the surprise in nats or D_A in tokens.
        variance: Σ Var[x].
        third: Σ of the third central moments.
        size: what a relative error of the probabilities is multiplied by in `deviation`: tokens, or Σ_v |D_A(v)| E_B(v).
    """

    deviation: float = 0.0
    variance: float = 0.0
    third: float = 0.0
    size: float = 0.0

    def plus(self, other: "MomentSums") -> "MomentSums":
        """Return the sums over both."""
        return MomentSums(*(one + another for one, another in zip(self, other, strict=True)))


def surprise_sums(logprobs: Tensor, entropy: Tensor, variance: Tensor, third: Tensor, mask: Tensor) -> Tensor:
    """Return the sums of the surprise over the sampled tokens, [4] in float64, in the order of `MomentSums`.

    Args:
        logprobs: [b, r] log π of the sampled tokens, nats, at the sampling temperature.
        entropy, variance, third: [b, r] moments of the surprise under π, nats, nats², nats³.
        mask: [b, r] 1 on sampled tokens.
    """
    keep = mask.bool()
    columns = [-logprobs - entropy, variance, third, torch.ones_like(logprobs)]
    return torch.stack([torch.where(keep, column, torch.zeros_like(column)).double().sum() for column in columns])


def halves_of_rows(mask: Tensor) -> Tensor:
    """Return the places of the even rows and those of the odd rows, [b, 2, r], from those of all rows [b, r]."""
    halves = torch.zeros(len(mask), 2, mask.shape[1], device=mask.device)
    halves[0::2, 0], halves[1::2, 1] = mask[0::2].float(), mask[1::2].float()
    return halves


def sampled_counts(token_ids: Tensor, mask: Tensor, vocabulary: int) -> Tensor:
    """Return how often each token was sampled in the even rows and in the odd ones, [2, vocabulary] in float64.

    Args:
        token_ids: [b, r].
        mask: [b, r] 1 on sampled tokens.
    """
    keep = mask.bool()
    counts = [torch.bincount(token_ids[half::2][keep[half::2]], minlength=vocabulary) for half in (0, 1)]
    return torch.stack(counts).double()


def count_sums(sampled: Tensor, expected: Tensor) -> MomentSums:
    """Return the sums of the second statistic: D_A at the tokens of the odd rows.

    Variance and third moment are those about 0, which are no smaller than the variance about E[D_A], so that z is rather too
    small than too large.

    Args:
        sampled, expected: [2, v] counts in the even rows and in the odd ones.
    """
    (excess_even, excess_odd), expected_odd = sampled - expected, expected[1]
    columns = (
        excess_even * excess_odd,
        excess_even**2 * expected_odd,
        excess_even**3 * expected_odd,
        excess_even.abs() * expected_odd,
    )
    return MomentSums(*(column.sum().item() for column in columns))


def sampler_z(sums: MomentSums) -> float:
    """Return z, in standard errors; 0 where π is certain of every token.

    >>> sampler_z(MomentSums(3.0, 9.0, 0.0))
    1.0
    """
    return sums.deviation / math.sqrt(sums.variance) if sums.variance > 0 else 0.0


def sampler_bounds(
    sums: MomentSums, *, tests: int, false_alarms: float = FALSE_ALARMS_PER_RUN, rounding: float = 0.0
) -> tuple[float, float]:
    """Return the lowest and highest z that a true sampler shows, so that so few runs are stopped wrongly.

    With α false alarms a run and N tests in it, each side of each test has α / 2N (Bonferroni). The surprise is skewed, the
    more so the surer a policy is of its tokens and the fewer they are, so the quantiles are those of the gamma distribution
    that is shifted and scaled to mean 0, variance 1 and the skewness γ = Σ M / (Σ Var)^(3/2) (Pearson's type III): to first
    order b + γ (b² - 1) / 6 with b the normal one (Cornish and Fisher). Simulated with 16 to 1,024 tokens and γ up to 1, the
    shares beyond them were those asked for (10⁻³ and 10⁻⁴). Above |γ| = 1 a handful of rare tokens decides z, no quantile
    is sure, and Cantelli's inequality stands in: ± √(2N / α - 1), which holds whatever the distribution.

    Args:
        tests: how often a run looks, N ≥ 1.
        false_alarms: share α of runs with a true sampler that are stopped.
        rounding: relative error of a token's probability because sampling and the later forward round otherwise; for
            the surprise, nats by which the mean of -log π(a) - H may be off.

    >>> low, high = sampler_bounds(MomentSums(0.0, 100.0, 0.0), tests=50)
    >>> round(low, 2), round(high, 2)
    (-4.75, 4.75)
    """
    share = false_alarms / (2 * tests)
    skewness = sums.third / sums.variance**1.5 if sums.variance > 0 else 0.0
    allowance = rounding * sums.size / math.sqrt(sums.variance) if sums.variance > 0 else 0.0
    if abs(skewness) < NO_SKEWNESS:
        high = NormalDist().inv_cdf(1 - share)
        low = -high
    elif abs(skewness) <= LARGEST_SKEWNESS:
        shape = 4 / skewness**2
        ends = [(float(x) - shape) / math.sqrt(shape) for x in (gamma.ppf(share, shape), gamma.isf(share, shape))]
        low, high = ends if skewness > 0 else (-ends[1], -ends[0])
    else:
        high = math.sqrt(1 / share - 1)
        low = -high
    return low - allowance, high + allowance


def rounding_bias(square: float, tokens: float) -> float:
    """Return by how many nats a token the mean of -log π(a) - H may be off, by the differences that rounding was seen to make.

    Args:
        square: Σ (log π of one precision - log π of the other)² over sampled tokens, nats².
        tokens: how many; 0 where none was looked at.

    >>> rounding_bias(0.5, 50.0), rounding_bias(0.0, 0.0)
    (0.02, 0.0)
    """
    return BIAS_OF_SQUARE * square / tokens if tokens > 0 else 0.0


def check_sampler(sums: MomentSums, *, tests: int, rounding: float = 0.0) -> Check:
    """Return the check "sampler true" of one rollout, or of several as one; arguments as in `sampler_bounds`."""
    low, high = sampler_bounds(sums, tests=tests, rounding=rounding)
    return Check(NAME, sampler_z(sums), high, "standard errors", SENTENCE, low=low)


def check_counts(sums: MomentSums, *, tests: int, rounding: float = 0.0) -> Check:
    """Return the check "token counts true" of one rollout, or of several as one; arguments as in `sampler_bounds`.

    Faults make z large, never small, so only the upper bound counts.
    """
    _, high = sampler_bounds(sums, tests=tests, rounding=rounding)
    return Check(COUNTS_NAME, sampler_z(sums), high, "standard errors", COUNTS_SENTENCE)
