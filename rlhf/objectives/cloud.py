"""When answers leave the cloud of those that a reward model knows (InfoRM's alarm): distances, and how many may lie outside."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

SHRINKAGE = 0.1  # of the covariance towards a multiple of the identity: there may be fewer points than dimensions


class Cloud(NamedTuple):
    """Where known points lie.

    Attributes:
        center: [d] their mean.
        whitening: [d, d] takes a point minus the center to unit covariance.
        distances: [m] of known points that the shape was not fitted to, ascending.
    """

    center: Tensor
    whitening: Tensor
    distances: Tensor


def fit_cloud(points: Tensor) -> Cloud:
    """Fit center and covariance to one half of known points, and measure the distances of the other half.

        D(z)² = (z - μ)' Σ⁻¹ (z - μ),    Σ = (1 - γ) S + γ (tr S / d) I

    (Mahalanobis; μ and S are mean and covariance, γ = 0.1.) The half that is only measured makes the distances comparable
    with those of new points, whatever the shape of the cloud.

    Args:
        points: [n, d], n ≥ 4, in random order.

    Reference: arXiv:2402.09345; its later version looks for outliers by the same distance.
    """
    fitted, measured = points.double().chunk(2)
    center = fitted.mean(dim=0)
    covariance = (fitted - center).T @ (fitted - center) / len(fitted)
    unit = covariance.diagonal().mean().clamp(min=1e-12)
    shrunk = (1 - SHRINKAGE) * covariance + SHRINKAGE * unit * torch.eye(len(center), dtype=torch.float64)
    values, directions = torch.linalg.eigh(shrunk)
    whitening = directions * values.rsqrt()
    cloud = Cloud(center, whitening, torch.zeros(0))
    return cloud._replace(distances=distance(cloud, measured).sort().values)


def distance(cloud: Cloud, points: Tensor) -> Tensor:
    """Return the Mahalanobis distance of points from a cloud, [n, d] → [n] float64, in deviations.

    >>> cloud = Cloud(torch.zeros(2), torch.eye(2) / 2, torch.zeros(0))
    >>> distance(cloud, torch.tensor([[6.0, 8.0]])).item()
    5.0
    """
    centred = points.double() - cloud.center.double()
    distances: Tensor = (centred @ cloud.whitening.double()).norm(dim=1)
    return distances


def border(cloud: Cloud, *, share: float) -> Tensor:
    """Return the distance beyond which a new point of the same kind lies with probability `share` at most, scalar.

    It is the k-th smallest of the m measured ones, k = ⌈(1 - share)(m + 1)⌉: of m + 1 exchangeable points each is as likely to
    be the farthest, whatever they are. Infinite where m is too small for that share.
    """
    place = math.ceil((1 - share) * (len(cloud.distances) + 1) - 1e-9)
    return cloud.distances[place - 1] if place <= len(cloud.distances) else torch.tensor(math.inf)


def most_outside(known: int, new: int, *, share: float, false_alarms: float) -> int:
    """Return how many of some new points may lie beyond the border before that is news.

        P(X ≥ x) = Σ_{i ≥ x} C(n, i) B(i + a, n - i + b) / B(a, b),    a = m + 1 - k,  b = k

    X, the number of n new points beyond the k-th of m known ones, has a beta-binomial distribution if all are exchangeable:
    that the border was measured too is counted, and nothing is assumed of the cloud's shape. It is the largest x - 1 for
    which that is rarer than `false_alarms`.

    Args:
        known: m.
        new: n.
        share: as for `border`.
        false_alarms: the probability that more lie outside although nothing has changed.

    >>> most_outside(128, 128, share=0.05, false_alarms=1e-4)
    24
    """
    b = math.ceil((1 - share) * (known + 1) - 1e-9)
    a = known + 1 - b
    if a < 1:
        return new
    i = torch.arange(new + 1, dtype=torch.float64)
    n = torch.tensor(float(new), dtype=torch.float64)
    choose = torch.lgamma(n + 1) - torch.lgamma(i + 1) - torch.lgamma(n - i + 1)
    beta = torch.lgamma(i + a) + torch.lgamma(n - i + b) - torch.lgamma(n + a + b)
    whole = math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)
    at_least = (choose + beta - whole).exp().flip(0).cumsum(dim=0).flip(0)
    rare = torch.nonzero(at_least <= false_alarms)[:, 0]
    return int(rare[0]) - 1 if len(rare) else new
