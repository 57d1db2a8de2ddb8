"""Preference strength by voting, and what it says about a label: flips, smoothing, soft labels.

Throughout, d > 0 means that a model agrees with the label: d = reward(chosen) - reward(rejected).
"""

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

SmoothingMask = Literal["negative", "all", "negative+strong"]
STRONG_FRACTION = 0.1
LOG_SCALE_DEVIATION = 2.0
CLOSEST = 1e-9  # probabilities are no closer to 0 and 1, where log-odds have no end
STRENGTH_COLUMNS = ("strength_mean", "strength_std", "strength_share", "strength_votes")  # of `VoteStrength`, in files


class VoteStrength(NamedTuple):
    """What M reward models say about n pairs.

    Attributes:
        mean: [n] mean difference of rewards, in the models' own unit (nats of Bradley-Terry).
        std: [n] population deviation over the models that voted.
        share: [n] share of the votes with d > 0, a vote of exactly 0 counting half.
        votes: [n] number of models that voted.
    """

    mean: Tensor
    std: Tensor
    share: Tensor
    votes: Tensor


def vote_strength(differences: Tensor) -> VoteStrength:
    """Return mean and deviation of the reward differences of an ensemble.

        μ_i = (1/M_i) Σ_m d_im,    σ_i = sqrt( (1/M_i) Σ_m (d_im - μ_i)² )

    Args:
        differences: [M, n]; not a number where a model has no vote on a pair (it was trained on it).

    Reference: arXiv:2401.06080 eq. 4 (population deviation, 1/M).

    >>> vote_strength(torch.tensor([[1.0, 2.0], [3.0, float("nan")]])).mean
    tensor([2., 2.])
    """
    voted = ~torch.isnan(differences)
    votes = voted.sum(dim=0)
    values = torch.where(voted, differences, torch.zeros_like(differences))
    mean = values.sum(dim=0) / votes
    deviations = torch.where(voted, differences - mean, torch.zeros_like(differences))
    std = ((deviations**2).sum(dim=0) / votes).sqrt()
    agrees = torch.where(voted, (values > 0).to(mean) + 0.5 * (values == 0).to(mean), torch.zeros_like(values))
    return VoteStrength(mean, std, agrees.sum(dim=0) / votes, votes)


def lowest_fraction(strength: Tensor, fraction: float) -> Tensor:
    """Mark the ⌊fraction · n⌋ pairs of lowest strength, [n] bool; of equal ones the first in order.

    >>> lowest_fraction(torch.tensor([0.3, -1.0, 0.3, 2.0]), 0.5)
    tensor([ True,  True, False, False])
    """
    count = math.floor(fraction * len(strength) + 1e-9)  # 0.29 * 100 is below 29
    lowest = torch.zeros(len(strength), dtype=torch.bool)
    lowest[torch.argsort(strength, stable=True)[:count]] = True
    return lowest


def flipped_strength(strength: Tensor, flips: Tensor) -> Tensor:
    """Return the strength after some pairs were flipped: μ → -μ there. An involution.

    >>> flipped_strength(torch.tensor([1.0, -2.0]), torch.tensor([False, True]))
    tensor([1., 2.])
    """
    return torch.where(flips, -strength, strength)


def smoothing_confidence(strength: Tensor, *, alpha: float = 0.2, mask: SmoothingMask = "negative") -> Tensor:
    """Return P(chosen is better) under label smoothing of some pairs: 1 - α there, 1 elsewhere, [n].

    Args:
        mask: `negative`: strength below 0 (the paper's text); `all`: every pair (what its Figure 8 looks like);
            `negative+strong`: also the strongest tenth (its Figure 6).

    Reference: arXiv:2401.06080 eq. 5; α = 0.2 is inferred from the loss its figures converge to, H(0.2) = 0.500.

    >>> smoothing_confidence(torch.tensor([-1.0, 1.0]))
    tensor([0.8000, 1.0000])
    """
    smoothed = torch.ones_like(strength, dtype=torch.bool) if mask == "all" else strength < 0
    if mask == "negative+strong":
        smoothed = smoothed | lowest_fraction(-strength, STRONG_FRACTION)
    return torch.where(smoothed, torch.full_like(strength, 1.0 - alpha), torch.ones_like(strength))


def scale_prior(scale: Tensor, differences: Tensor) -> Tensor:
    """Return the logarithm of the prior density of what a vote is worth, up to a constant, [s].

        log p(b) = -½ ( log( b mean |d| ) / 2 )²

    A usual vote is worth about a nat, and 1/50 to 50 nats with 95 %: so wide a prior decides only where labels hardly do. Votes in
    another unit have another b and the same b d.

    Args:
        scale: [s] b > 0.
        differences: [n] d.
    """
    usual = differences.double().abs().mean().clamp(min=CLOSEST**2)
    return -0.5 * ((scale * usual).log() / LOG_SCALE_DEVIATION) ** 2


def nearest_line(differences: Tensor, probability: Tensor, *, through_origin: bool = False) -> tuple[float, float]:
    """Return the constant c and the slope b for which σ(c + b d) is nearest to given probabilities.

        c, b = argmin Σ_i p_i (1 - p_i) ( log( p_i / (1 - p_i) ) - c - b d_i )²

    So a mean over many b and c becomes one that says nearly the same of each pair. Where all d are equal, b is 0.

    Args:
        differences: [n] d.
        probability: [n] p in [0, 1].
        through_origin: c is 0.

    >>> d = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    >>> [round(x, 6) for x in nearest_line(d, torch.sigmoid(0.5 + 3 * d))]
    [0.5, 3.0]
    """
    p = probability.double().clamp(CLOSEST, 1 - CLOSEST)
    weight, values, odds = p * (1 - p), differences.double(), torch.logit(p)
    weight = weight / weight.sum()
    center = torch.zeros(()) if through_origin else (weight * values).sum()
    height = torch.zeros(()) if through_origin else (weight * odds).sum()
    spread = (weight * (values - center) ** 2).sum()
    slope = (weight * (values - center) * (odds - height)).sum() / spread if spread > 0 else torch.zeros(())
    return (height - slope * center).item(), slope.item()


def posterior_confidence(strength: Tensor, *, flip_rate: float, scale: float = 1.0) -> Tensor:
    """Return P(chosen is better) given the label and an independent vote, [n].

    If a share ε of labels is wrong and the vote is calibrated, P(better | d) = σ(a d), Bayes gives

        p = σ( a d + log((1 - ε) / ε) )

    Special cases: no vote (d = 0) is constant smoothing with α = ε; a vote far below 0 flips the label; one far above
    leaves it. Only a vote of models that have not seen the pair's label is independent of it.

    Args:
        strength: [n] mean out-of-fold difference, in nats.
        flip_rate: ε in (0, 0.5].
        scale: a > 0.

    >>> posterior_confidence(torch.tensor([0.0, -3.0, 3.0]), flip_rate=0.25)
    tensor([0.7500, 0.1300, 0.9837])
    """
    assert 0 < flip_rate <= 0.5, "a flip rate in (0, 0.5]"
    return torch.sigmoid(scale * strength + math.log((1 - flip_rate) / flip_rate))
