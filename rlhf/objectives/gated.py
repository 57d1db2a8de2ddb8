"""ArmoRM (arXiv:2406.12845): attributes by ridge regression, freed of length, and weighed by what the prompt asks for."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.objectives.length import correlation

# What is tried as a penalty, in units of the features' mean variance.
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
DOUBLINGS, HALVINGS = 30, 60


class Ridge(NamedTuple):
    """A linear prediction, features · weight + intercept.

    Attributes:
        weight: [h] float64.
        intercept: [] float64.
        penalty: α, as it was chosen.
        left_out_error: the mean squared error of every row, predicted from all others.
    """

    weight: Tensor
    intercept: Tensor
    penalty: float
    left_out_error: float


def ridge(features: Tensor, ratings: Tensor, penalties: Sequence[float] = PENALTIES) -> Ridge:
    """Fit ratings by a ridge regression, at the penalty under which rows are predicted best from all others.

        min_w,b  1/n Σ_i (w·x_i + b - r_i)² + α v |w|²,   so   (X'X / n + α v I) w = X'(r - r̄) / n,   b = r̄ - w·x̄

    X are the features minus their mean x̄, v is their mean variance, so α has no unit; b is free. The error of a row that is
    left out needs no second fit: e_i / (1 - h_i), h_i = 1/n + x_i' (X'X + n α v I)⁻¹ x_i.

    Args:
        features: [n, h], n ≥ 2.
        ratings: [n].
        penalties: α > 0, one or several.

    Reference: arXiv:2406.12845 section 3.1.

    >>> fit = ridge(torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 3.0, 5.0]), [1e-9])
    >>> round(fit.weight.item(), 6), round(fit.intercept.item(), 6)
    (2.0, 1.0)
    """
    features, ratings = features.double(), ratings.double()
    count = len(features)
    mean_features, mean_rating = features.mean(dim=0), ratings.mean()
    centred = features - mean_features
    variances, directions = torch.linalg.eigh(centred.T @ centred / count)
    unit = variances.mean().clamp(min=1e-30)
    along = centred @ directions
    moments = along.T @ (ratings - mean_rating) / count
    fits = []
    for penalty in penalties:
        shrunk = 1 / (variances.clamp(min=0) + penalty * unit)
        leverage = (along**2 @ shrunk + 1) / count
        errors = (ratings - mean_rating - along @ (shrunk * moments)) / (1 - leverage).clamp(min=1e-9)
        weight = directions @ (shrunk * moments)
        fits.append(Ridge(weight, mean_rating - weight @ mean_features, penalty, (errors**2).mean().item()))
    return min(fits, key=lambda fit: fit.left_out_error)


def spearman(first: Tensor, second: Tensor) -> float:
    """Return the rank correlation of two columns, [n] and [n], in [-1, 1]; equal values share their mean rank.

    >>> spearman(torch.tensor([1.0, 10.0, 100.0]), torch.tensor([3.0, 2.0, 1.0]))
    -1.0
    """
    return correlation(_ranks(first), _ranks(second)).item()


def _ranks(values: Tensor) -> Tensor:
    """Return the rank of each value, [n] float64, from 1; the mean rank where several are equal."""
    _, places, counts = torch.unique(values, return_inverse=True, return_counts=True)
    ranks: Tensor = (counts.cumsum(dim=0) - (counts - 1) / 2).double()
    return ranks[places]


def length_multiple(scores: Tensor, length_scores: Tensor, lengths: Tensor) -> float | None:
    """Return how much of a length attribute must be taken off an attribute so that its ranks don't follow length.

        λ with  Spearman(r - λ r_length, length) = 0

    It is negative where the attribute falls with length. The correlation is a step function of λ, so it reaches 0 up to a
    step.

    Args:
        scores: [n] r, of one attribute.
        length_scores: [n] r_length.
        lengths: [n] what is measured, in tokens.

    Returns:
        λ, in units of r by units of r_length; None where no multiple does it, for r_length does not rise with length.

    Reference: arXiv:2406.12845 section 3.2, whose grid of λ is between 0 and 0.95; here λ is searched by bisection.

    >>> lengths = torch.arange(9.0)
    >>> round(length_multiple(2 * lengths + torch.tensor([0.1, -0.1, 0.1] * 3), lengths, lengths), 2)
    2.0
    """
    scores, length_scores = scores.double(), length_scores.double()
    before = spearman(scores, lengths)
    if before == 0:
        return 0.0
    sign = 1.0 if before > 0 else -1.0

    def left(multiple: float) -> float:
        return sign * spearman(scores - sign * multiple * length_scores, lengths)

    low, high = 0.0, (scores.std() / length_scores.std().clamp(min=1e-12)).item() or 1.0
    for _ in range(DOUBLINGS):
        if left(high) <= 0:
            break
        low, high = high, 2 * high
    else:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if left(middle) > 0 else (low, middle)
    return sign * min((low, high), key=lambda multiple: abs(left(multiple)))


def gated_score(attributes: Tensor, weights: Tensor) -> Tensor:
    """Return the score of answers: Σ_a g_a(prompt) r'_a, [n, k] and [n, k] → [n].

    Args:
        attributes: [n, k] r', freed of length; a fault has its sign changed.
        weights: [n, k] g, at least 0; of one prompt they sum to 1.

    Reference: arXiv:2406.12845 equation 2.

    >>> gated_score(torch.tensor([[4.0, 2.0]]), torch.tensor([[0.75, 0.25]]))
    tensor([3.5000])
    """
    return (weights * attributes).sum(dim=-1)
