"""What labels are worth: information counted out over both labels and orders, and the variance of estimates from many labels."""

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from rlhf.objectives.worth import worth_on_close_pairs, worth_on_sure_pairs

RATES = [0.0, 0.05, 0.1, 0.25, 0.4, 0.5]


@pytest.mark.parametrize("rate", RATES)
def test_sure_pairs_by_counting_out_the_mutual_information(rate: float) -> None:
    """Order and label, each one of two; the order is as often this as that."""
    joint = np.array([[1 - rate, rate], [rate, 1 - rate]]) / 2
    independent = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
    bits = sum(p * np.log2(p / q) for p, q in zip(joint.flat, independent.flat, strict=True) if p > 0)
    assert worth_on_sure_pairs(rate) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize("rate", RATES)
def test_close_pairs_by_the_expected_squared_slope_of_the_log_likelihood(rate: float) -> None:
    def information(rate: float, step: float = 1e-5) -> float:
        """E (∂ log P(label) / ∂d)² at d = 0, by differences."""
        total = 0.0
        for sign in (1, -1):
            p = [rate + (1 - 2 * rate) / (1 + np.exp(-sign * d)) for d in (-step, 0.0, step)]
            total += p[1] * ((np.log(p[2]) - np.log(p[0])) / (2 * step)) ** 2
        return total

    assert worth_on_close_pairs(rate) == pytest.approx(information(rate) / information(0.0), abs=1e-8)


def test_sure_pairs_are_worth_less_and_more_flips_are_worth_less() -> None:
    rates = np.linspace(0.01, 0.49, 25)
    sure, close = [worth_on_sure_pairs(r) for r in rates], [worth_on_close_pairs(r) for r in rates]
    assert all(a < b for a, b in zip(sure, close, strict=True))
    assert sure == sorted(sure, reverse=True)
    assert close == sorted(close, reverse=True)


def test_as_many_clean_labels_estimate_a_slope_as_well() -> None:
    """The variance of the fitted slope of d = s·x on close pairs, from noisy labels and from a quarter as many clean ones."""
    rng = np.random.default_rng(0)

    def fitted(count: int, rate: float) -> float:
        x = 0.2 * rng.normal(size=count)
        q = rate + (1 - 2 * rate) / (1 + np.exp(-x))
        sign = np.where(rng.random(count) < q, 1, -1)

        def loss(slope: float) -> float:
            return float(-np.log(rate + (1 - 2 * rate) / (1 + np.exp(-slope * sign * x))).sum())

        return float(minimize_scalar(loss, bounds=(-8, 10), method="bounded").x)

    noisy = np.var([fitted(2000, 0.25) for _ in range(400)])
    clean = np.var([fitted(round(2000 * worth_on_close_pairs(0.25)), 0.0) for _ in range(400)])
    assert clean / noisy == pytest.approx(
        1, abs=0.3
    )  # each variance is known to 7 %, their ratio to 10 %; three times that
