"""Attribute regression: a head that predicts how an answer is rated in each of k attributes, and the one score made of them."""

import torch
from torch import Tensor


def attribute_regression(predicted: Tensor, ratings: Tensor) -> Tensor:
    """Return the mean squared error of an answer's predicted attributes, over those that were rated.

        loss = 1/|A| · Σ_{a ∈ A} (r̂_a - r_a)²,    A the attributes in which this answer was rated

    An attribute without a rating has no gradient; an answer that was rated in none has loss 0. Each answer counts once, in
    however many attributes it was rated.

    Args:
        predicted: [b, k] r̂.
        ratings: [b, k] in the same unit; NaN where nobody rated.

    Returns:
        [b] squared units of the ratings, unreduced.

    Reference: arXiv:2406.08673 section 3.1.

    >>> attribute_regression(torch.tensor([[1.0, 5.0]]), torch.tensor([[3.0, float("nan")]]))
    tensor([4.])
    """
    is_rated = ~ratings.isnan()
    errors = torch.where(is_rated, predicted - ratings.nan_to_num(), torch.zeros_like(predicted))
    return (errors**2).sum(dim=1) / is_rated.sum(dim=1).clamp(min=1)


def weighted_score(predicted: Tensor, weights: Tensor) -> Tensor:
    """Return the score of an answer from its attributes: Σ_a w_a r̂_a, [..., k] and [k] → [...].

    >>> weighted_score(torch.tensor([[3.0, 2.0]]), torch.tensor([1.0, -0.5]))
    tensor([2.])
    """
    return predicted @ weights
