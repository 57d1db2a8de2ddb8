"""Which comparisons are worth a label: how much a Bayesian view of the reward head expects to learn from each.

The head of a reward model is a logistic regression on the difference x = φ(first) - φ(second) of its features. Laplace's
approximation at the trained head gives every pair's reward difference d a mean μ and a variance s² = x' Σ x, with

    Σ = (Σ_i p_i (1 - p_i) x_i x_i' + λ I)^-1

over the pairs that were labelled so far. With few labels in a direction, s is large there.
"""

import torch
from torch import Tensor


def head_covariance(features: Tensor, differences: Tensor, *, ridge: float = 1.0) -> Tensor:
    """Return Laplace's covariance of the head, [h, h], after labels on pairs with these feature differences [n, h].

    Args:
        differences: [n] μ of these pairs, nats.
        ridge: λ, the precision of the prior.

    >>> head_covariance(torch.zeros(3, 2), torch.zeros(3))
    tensor([[1., 0.],
            [0., 1.]])
    """
    p = torch.sigmoid(differences)
    return weighted_covariance(features, p * (1 - p), ridge=ridge)


def weighted_covariance(features: Tensor, weight: Tensor, *, ridge: float = 1.0) -> Tensor:
    """Return (Σ_i w_i x_i x_i' + λ I)^-1, [h, h]: the head's covariance after labels that say w_i about their direction.

    Args:
        features: [n, h] x.
        weight: [n] w ≥ 0.
        ridge: λ, the precision of the prior.

    >>> weighted_covariance(torch.tensor([[1.0, 0.0]]), torch.tensor([3.0]))
    tensor([[0.2500, 0.0000],
            [0.0000, 1.0000]])
    """
    precision = (features * weight[:, None]).T @ features + ridge * torch.eye(features.shape[1])
    covariance: Tensor = torch.linalg.inv(precision)
    return covariance


def difference_std(features: Tensor, covariance: Tensor) -> Tensor:
    """Return the deviation s of each pair's reward difference, [n], nats: √(x' Σ x)."""
    variance: Tensor = ((features @ covariance) * features).sum(dim=1)
    return variance.clamp(min=0).sqrt()


def expected_information(mean: Tensor, std: Tensor) -> Tensor:
    """Return what a label is expected to say about the reward model, [n], nats: H(E σ(d)) - E H(σ(d)) with d ~ N(μ, s²).

    The expectations are sums over a grid of ±6 s, exact to 1e-4 for s up to 10. At most log 2; 0 where s = 0.
    Reference: BALD, arXiv:1112.5745 eq. 1.

    >>> expected_information(torch.tensor([0.0, 0.0]), torch.tensor([0.0, 1.0]))
    tensor([0.0000, 0.0937])
    """
    grid = torch.linspace(-6, 6, 241, dtype=mean.dtype)
    mass = torch.softmax(-(grid**2) / 2, dim=0)
    p = torch.sigmoid(mean[:, None] + std[:, None] * grid)
    information: Tensor = _entropy(p @ mass) - _entropy(p) @ mass
    return information.clamp(min=0)


def _entropy(p: Tensor) -> Tensor:
    entropy: Tensor = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))
    return entropy


def most_diverse(features: Tensor, differences: Tensor, covariance: Tensor, count: int) -> list[int]:
    """Choose pairs that together say most: greedily the largest p(1 - p) x' Σ x, Σ updated as if each were labelled (D-optimal).

    A pair like one that was taken has little left to say, so the choice is diverse.

    Args:
        features, differences: [n, h] and [n] of the candidates.

    Returns:
        `count` indices in the order taken.
    """
    p = torch.sigmoid(differences)
    return greedy_design(features, p * (1 - p), covariance, count)


def greedy_design(features: Tensor, weight: Tensor, covariance: Tensor, count: int) -> list[int]:
    """Choose rows greedily by the largest w x' Σ x, Σ updated as if each choice were observed with weight w.

    Args:
        features: [n, h] of the candidates.
        weight: [n] w ≥ 0, what an observation of each says about its direction.
        covariance: [h, h] Σ before the first choice.

    Returns:
        `count` indices, or n, in the order taken.

    >>> greedy_design(torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.9]]), torch.ones(3), torch.eye(2), 2)
    [0, 2]
    """
    sigma, taken = covariance.clone(), list[int]()
    variance = (features @ sigma * features).sum(dim=1)
    for _ in range(min(count, len(features))):
        gain = weight * variance
        gain[taken] = -1.0
        best = int(gain.argmax())
        taken.append(best)
        # Sherman-Morrison: Σ - w Σx x'Σ / (1 + w x'Σx); the variances follow without forming the matrix products again.
        direction = sigma @ features[best]
        scale = weight[best] / (1 + weight[best] * variance[best])
        sigma = sigma - scale * torch.outer(direction, direction)
        variance = (variance - scale * (features @ direction) ** 2).clamp(min=0)
    return taken
