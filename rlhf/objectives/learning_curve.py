"""How accuracy grows with labels, and what a measured part of that curve says of the rest.

Take the true reward difference of a pair and a model's difference as jointly normal around 0, with correlation ρ. Their signs
agree with probability (Sheppard 1899)

    a = 1/2 + arcsin(ρ) / π

A linear model that learns from n labels with a normal prior knows the share n / (n + k) of the variance, k being the labels
after which half is known; with directions of very different strength it is flatter, and where pairs have a sure order it is
steeper, so a power γ is left open. Of the true differences the model can express the share c²:

    ρ(n)² = c² / (1 + (k / n)^γ)

Wrong labels make k larger and leave c as it is: fewer clean labels that say as much lie on the same curve.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LIMITS, HALVES = 100, 120  # points of the grid
POWERS = (0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
WIDEST = 100.0  # k lies within this factor of the most labels that were measured
# Deviation of the accuracy between two trainings of one model on the same labels, measured in the lab.
TRAINING_SPREAD = 0.01


def accuracy_of_correlation(correlation: Tensor) -> Tensor:
    """Return how often two centred normal variables with this correlation have one sign: 1/2 + arcsin(ρ) / π.

    >>> accuracy_of_correlation(torch.tensor([0.0, 0.5, 1.0]))
    tensor([0.5000, 0.6667, 1.0000])
    """
    return 0.5 + torch.arcsin(correlation) / math.pi


def accuracy_after(labels: Tensor | float, limit: Tensor, half: Tensor, power: Tensor | float = 1.0) -> Tensor:
    """Return the accuracy of a model trained on some labels: ρ² = c² / (1 + (k / n)^γ), c = sin(π (limit - 1/2)).

    Special cases: few labels tend to 1/2, ever more to the limit; limit 1, γ = 1 and n = k is 3/4.

    Args:
        labels: n > 0.
        limit: accuracy with all labels that there could be, in [1/2, 1].
        half: k > 0, in labels.
        power: γ > 0.

    >>> accuracy_after(100.0, torch.tensor(1.0), torch.tensor(100.0))
    tensor(0.7500)
    """
    ceiling = torch.sin(math.pi * (limit - 0.5))
    return accuracy_of_correlation(ceiling * (1 + (half / labels) ** power) ** -0.5)


class Curves(NamedTuple):
    """A posterior over learning curves, on a grid of g points.

    Attributes:
        weight: [g], sums to 1.
        limit: [g] accuracy with all labels that there could be.
        half: [g] k, labels.
        power: [g] γ.
        flip_rate: [g] the share of wrong labels by which the accuracies were measured.
    """

    weight: Tensor
    limit: Tensor
    half: Tensor
    power: Tensor
    flip_rate: Tensor

    def accuracies(self, labels: Tensor | float) -> Tensor:
        """Return the accuracy after some labels by each curve, [g]; labels are a number, or one for each curve."""
        return accuracy_after(labels, self.limit, self.half, self.power)


def fit_curves(sizes: Tensor, accuracies: Tensor, covariance: Tensor, *, flip_rate: float) -> Curves:
    """Return the posterior over curves, given accuracies measured at some sizes.

    The likelihood is normal; the limit is uniform in [1/2, 1], log k uniform, γ uniform over `POWERS`.

    Args:
        sizes: [s] labels that the models were trained on.
        accuracies: [s].
        covariance: [s, s] of their errors.
        flip_rate: the share of wrong labels that the accuracies allow for.
    """
    double = torch.float64
    most = math.log10(sizes.max().item())
    limits = 0.5 + 0.5 * (torch.arange(LIMITS, dtype=double) + 0.5) / LIMITS
    halves = torch.logspace(most - math.log10(WIDEST), most + math.log10(WIDEST), HALVES, dtype=double)
    grid = torch.meshgrid(limits, halves, torch.tensor(POWERS, dtype=double), indexing="ij")
    limit, half, power = (axis.flatten() for axis in grid)
    rest = accuracies.double()[:, None] - accuracy_after(sizes.double()[:, None], limit, half, power)
    log_likelihood = -0.5 * (rest * torch.linalg.solve(covariance.double(), rest)).sum(dim=0)
    return Curves(torch.softmax(log_likelihood, dim=0), limit, half, power, torch.full_like(limit, flip_rate))


def mix_curves(parts: Sequence[Curves], shares: Tensor) -> Curves:
    """Return one posterior of several, which count by their shares.

    Args:
        shares: [p], sums to 1.
    """
    weights = torch.cat([share * part.weight for share, part in zip(shares, parts, strict=True)])
    return Curves(weights, *(torch.cat(columns) for columns in list(zip(*parts, strict=True))[1:]))


class Expected(NamedTuple):
    """A figure, and where it lies with 95 %, by mean and deviation."""

    mean: float
    low: float
    high: float


def expect(weight: Tensor, values: Tensor, *, spread: float = 0.0) -> Expected:
    """Return the mean of a figure over a posterior, and its interval: 1.96 deviations on both sides.

    Args:
        weight, values: [g] of each point of the posterior.
        spread: deviation of what comes on top, such as a training's luck.

    >>> [round(x, 2) for x in expect(torch.tensor([0.5, 0.5]), torch.tensor([0.0, 2.0]))]
    [1.0, -0.96, 2.96]
    """
    mean = (weight * values).sum()
    deviation = ((weight * (values - mean) ** 2).sum() + spread**2).sqrt()
    return Expected(mean.item(), (mean - 1.96 * deviation).item(), (mean + 1.96 * deviation).item())


def expect_accuracy(curves: Curves, labels: Tensor | float) -> Expected:
    """Return the accuracy to expect of one model trained on some labels, a training's luck in its interval.

    Args:
        labels: a number, or one for each curve, [g].
    """
    mean, low, high = expect(curves.weight, curves.accuracies(labels), spread=TRAINING_SPREAD)
    return Expected(mean, max(low, 0.5), min(high, 1.0))
