"""Ridge, freedom of length and the gated score in closed form, with twins that must be noticed."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from torch import Tensor

from rlhf.objectives.gated import Ridge, gated_score, length_multiple, ridge, spearman

GENERATOR = np.random.default_rng(0)
FEATURES = GENERATOR.normal(size=(40, 6)) * [1, 2, 3, 0.5, 1, 1] + 5
RATINGS = FEATURES @ [1.0, -2.0, 0.5, 0.0, 3.0, 0.0] + GENERATOR.normal(size=40)


def solved(features: np.ndarray, ratings: np.ndarray, alpha: float, unit: float) -> tuple[np.ndarray, float]:
    """The normal equations with a free intercept, as one system in numpy: a column of ones that nothing shrinks."""
    n, h = features.shape
    x = np.hstack([features, np.ones((n, 1))])
    penalty = np.diag([n * alpha * unit] * h + [0.0])
    solution = np.linalg.solve(x.T @ x + penalty, x.T @ ratings)
    return solution[:h], solution[h]


def check_ridge(fit: Callable[..., Ridge]) -> None:
    unit = FEATURES.var(axis=0).mean()
    for alpha in (1e-3, 0.1, 10.0):
        found = fit(torch.from_numpy(FEATURES), torch.from_numpy(RATINGS), [alpha])
        weight, intercept = solved(FEATURES, RATINGS, alpha, unit)
        assert found.weight.numpy() == pytest.approx(weight, rel=1e-8, abs=1e-10)
        assert found.intercept.item() == pytest.approx(intercept, rel=1e-8)


def test_ridge_is_the_solution_of_its_normal_equations() -> None:
    check_ridge(ridge)


def test_ridge_through_the_origin_is_noticed() -> None:
    def without_intercept(features: Tensor, ratings: Tensor, penalties: list[float]) -> Ridge:
        unit = (features - features.mean(dim=0)).pow(2).mean()
        gram = features.T @ features / len(features) + penalties[0] * unit * torch.eye(features.shape[1])
        weight = torch.linalg.solve(gram, features.T @ ratings / len(features))
        return Ridge(weight, torch.zeros(()), penalties[0], 0.0)

    with pytest.raises(AssertionError):
        check_ridge(without_intercept)


def test_the_error_of_a_row_that_is_left_out_is_that_of_a_fit_without_it() -> None:
    """Against forty fits, with the penalty of the whole set (whose unit and count are the formula's)."""
    alpha, unit, n = 0.1, FEATURES.var(axis=0).mean(), len(RATINGS)
    errors = []
    for i in range(n):
        rest = np.arange(n) != i
        weight, intercept = solved(FEATURES[rest], RATINGS[rest], alpha * n / (n - 1), unit)
        errors.append(RATINGS[i] - FEATURES[i] @ weight - intercept)
    found = ridge(torch.from_numpy(FEATURES), torch.from_numpy(RATINGS), [alpha])
    assert found.left_out_error == pytest.approx(np.mean(np.square(errors)), rel=1e-8)


def test_the_penalty_is_the_one_with_the_smallest_error() -> None:
    noise = torch.from_numpy(GENERATOR.normal(size=40))
    assert ridge(torch.from_numpy(FEATURES), torch.from_numpy(RATINGS)).penalty <= 1e-2, "a line through all of it"
    assert ridge(torch.from_numpy(FEATURES), noise).penalty == 10.0, "nothing to be learnt"


def test_rank_correlation_is_that_of_scipy_with_ties() -> None:
    first, second = GENERATOR.integers(0, 5, 50), GENERATOR.integers(0, 4, 50)
    expected = spearmanr(first, second).statistic
    assert spearman(torch.from_numpy(first), torch.from_numpy(second)) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("taste", [3.0, -3.0, 0.2])
def test_an_attribute_freed_of_length_does_not_follow_it(taste: float) -> None:
    """Quality and a taste for length, and a length attribute that is only half right about length."""
    generator = np.random.default_rng(1)
    lengths = generator.integers(3, 60, 500)
    scores = generator.normal(size=500) + taste * np.log(lengths)
    length_scores = np.log(lengths) + 0.3 * generator.normal(size=500)
    columns = [torch.from_numpy(x) for x in (scores, length_scores, lengths)]
    multiple = length_multiple(*columns)
    assert multiple is not None
    assert np.sign(multiple) == np.sign(taste)
    freed = scores - multiple * length_scores
    assert abs(spearmanr(scores, lengths).statistic) > 0.1
    assert abs(spearmanr(freed, lengths).statistic) < 1e-3, "one step of 500 ranks"


def test_there_is_no_multiple_where_the_length_attribute_knows_nothing_of_length() -> None:
    lengths = torch.arange(50.0)
    assert length_multiple(lengths, torch.zeros(50), lengths) is None
    assert length_multiple(lengths, -lengths, lengths) is None
    assert length_multiple(torch.zeros(50), lengths, lengths) == 0.0, "an attribute that says nothing needs nothing"


def test_the_score_is_the_weighted_sum_and_grows_with_every_attribute() -> None:
    attributes = torch.tensor([[1.0, 2.0, 4.0], [0.0, -1.0, 1.0]], requires_grad=True)
    weights = torch.tensor([[0.5, 0.25, 0.25], [0.0, 1.0, 0.0]])
    scores = gated_score(attributes, weights)
    assert scores.tolist() == [2.0, -1.0]
    scores.sum().backward()
    assert attributes.grad is not None
    assert attributes.grad.tolist() == weights.tolist()
