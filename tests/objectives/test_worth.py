"""What labels are worth: against sums over both labels written out, and against the variance of estimates from many labels."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize_scalar

from rlhf.objectives.worth import clean_equivalent, label_information


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.25, 0.4])
def test_information_is_the_expected_squared_slope_of_the_log_likelihood(flip_rate: float) -> None:
    """E (∂ log P(label) / ∂d)² over both labels, by autograd."""
    difference = torch.linspace(-4, 4, 17, dtype=torch.float64, requires_grad=True)
    expected = torch.zeros(17, dtype=torch.float64)
    for sign in (1, -1):
        probability = flip_rate + (1 - 2 * flip_rate) * torch.sigmoid(sign * difference)
        (slope,) = torch.autograd.grad(probability.log().sum(), difference)
        expected += probability.detach() * slope.square()
    torch.testing.assert_close(label_information(difference.detach(), flip_rate), expected)


def test_the_ends() -> None:
    differences = torch.randn(500, generator=torch.Generator().manual_seed(0))
    assert clean_equivalent(differences, 0.0) == pytest.approx(500)
    assert clean_equivalent(differences, 0.5) == 0
    assert clean_equivalent(1e-3 * differences, 0.25) == pytest.approx(500 / 4, rel=1e-3)
    assert clean_equivalent(5 * differences, 0.25) < clean_equivalent(differences, 0.25) < 500 / 4
    rates = [clean_equivalent(differences, rate) for rate in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert rates == sorted(rates, reverse=True)


def test_as_many_clean_labels_estimate_a_slope_as_well() -> None:
    """The variance of the fitted slope of d = s·x, from noisy labels and from as many clean ones as say as much about it."""
    rng = np.random.default_rng(0)
    pairs, flip_rate = 2000, 0.25
    x = rng.normal(size=pairs)
    noisy_says, clean_says = (label_information(torch.tensor(x), rate).numpy() * x**2 for rate in (flip_rate, 0.0))
    worth = round(noisy_says.sum() / clean_says.mean())
    assert 300 < worth < 450

    def fitted(count: int, rate: float) -> float:
        chosen = rng.choice(pairs, count, replace=False)
        q = rate + (1 - 2 * rate) / (1 + np.exp(-x[chosen]))
        sign = np.where(rng.random(count) < q, 1, -1)

        def loss(slope: float) -> float:
            return float(-np.log(rate + (1 - 2 * rate) / (1 + np.exp(-slope * sign * x[chosen]))).sum())

        return float(minimize_scalar(loss, bounds=(-3, 6), method="bounded").x)

    noisy = np.var([fitted(pairs, flip_rate) for _ in range(400)])
    clean = np.var([fitted(worth, 0.0) for _ in range(400)])
    assert clean / noisy == pytest.approx(
        1, abs=0.3
    )  # each variance of 400 is known to 7 %, their ratio to 10 %; three times that
