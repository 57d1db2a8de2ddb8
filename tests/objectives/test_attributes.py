"""Attribute regression in closed form, with twins that must be noticed."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.attributes import attribute_regression, weighted_score

NAN = math.nan
PREDICTED = [[1.0, 5.0, -2.0], [0.0, 0.0, 3.0], [4.0, 4.0, 4.0]]
RATINGS = [[3.0, NAN, 0.0], [NAN, NAN, 1.0], [NAN, NAN, NAN]]
EXPECTED = [(4.0 + 4.0) / 2, 4.0, 0.0]
GRADIENT = [[-2.0, 0.0, -2.0], [0.0, 0.0, 4.0], [0.0, 0.0, 0.0]]


def check(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Written out by hand: the mean of an answer's rated attributes; a masked one has a gradient of exactly 0."""
    predicted = torch.tensor(PREDICTED, requires_grad=True)
    losses = loss(predicted, torch.tensor(RATINGS))
    assert losses.tolist() == EXPECTED
    losses.sum().backward()
    assert predicted.grad is not None
    assert predicted.grad.tolist() == GRADIENT


def test_masked_attributes_have_no_gradient() -> None:
    check(attribute_regression)


def over_all_attributes(predicted: Tensor, ratings: Tensor) -> Tensor:
    """Divided by k: an answer with few ratings counts less."""
    return ((predicted - ratings).nan_to_num() ** 2).mean(dim=1)


def masked_with_zero(predicted: Tensor, ratings: Tensor) -> Tensor:
    """A missing rating taken for the lowest one."""
    return ((predicted - ratings.nan_to_num()) ** 2).mean(dim=1)


def summed(predicted: Tensor, ratings: Tensor) -> Tensor:
    return torch.where(ratings.isnan(), 0.0, (predicted - ratings.nan_to_num()) ** 2).sum(dim=1)


def masked_after_the_square(predicted: Tensor, ratings: Tensor) -> Tensor:
    """The value is right and the gradient is NaN: it passes through what is masked."""
    rated = ~ratings.isnan()
    squares = torch.where(rated, (predicted - ratings) ** 2, torch.zeros_like(predicted))
    return squares.sum(dim=1) / rated.sum(dim=1).clamp(min=1)


@pytest.mark.parametrize(
    "twin", [over_all_attributes, masked_with_zero, summed, masked_after_the_square], ids=lambda f: f.__name__
)
def test_a_broken_mask_would_be_noticed(twin: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check(twin)


def test_gradient_descent_finds_a_planted_linear_map() -> None:
    """Ratings are a linear map of features, a third of them masked: least squares has the map as its only minimum."""
    generator = torch.Generator().manual_seed(0)
    features, planted = torch.randn(200, 6, generator=generator), torch.randn(6, 4, generator=generator)
    ratings = features @ planted
    ratings[torch.rand(200, 4, generator=generator) < 1 / 3] = NAN
    head = torch.zeros(6, 4, requires_grad=True)
    optimizer = torch.optim.LBFGS([head], max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = attribute_regression(features @ head, ratings).mean()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(head.detach(), planted, atol=1e-3, rtol=1e-3)


def test_the_weighted_score() -> None:
    assert weighted_score(torch.tensor(PREDICTED), torch.tensor([1.0, 0.5, -1.0])).tolist() == [5.5, -3.0, 2.0]
