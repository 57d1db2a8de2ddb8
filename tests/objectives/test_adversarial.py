"""The discriminator against scikit-learn's logistic regression, two Gaussians whose log-ratio is known, and mutants."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from rlhf.objectives import adversarial
from rlhf.objectives.adversarial import Discriminator

RANDOM = torch.Generator().manual_seed(0)


def drawn(count: int, mean: float, width: int = 3) -> torch.Tensor:
    return torch.randn(count, width, generator=RANDOM) + mean * torch.arange(1, width + 1) / width


@pytest.mark.parametrize("ridge", [0.1, 10.0])
def test_it_is_the_weighted_ridge_regression_of_scikit_learn(ridge: float) -> None:
    demonstrations, answers = drawn(30, 0.8), drawn(90, 0.0)
    found = adversarial.fit_discriminator(demonstrations, answers, ridge=ridge)
    rows = torch.cat([demonstrations, answers]).double().numpy()
    standard = (rows - rows.mean(axis=0)) / rows.std(axis=0)
    # C sums losses where the formula takes means: half of each side, times the number of rows.
    weights = np.repeat([0.5 / 30, 0.5 / 90], [30, 90]) * 120
    model = LogisticRegression(C=1 / ridge, tol=1e-10, max_iter=10_000)
    model.fit(standard, np.repeat([1, 0], [30, 90]), sample_weight=weights)
    np.testing.assert_allclose(found.log_odds(answers).numpy(), model.decision_function(standard[30:]), atol=2e-5)


def test_gaussians_have_their_log_ratio() -> None:
    """N(μ, 1) against N(0, 1): log p / q = μ x - μ²/2, whatever the numbers of rows; within 0.1 at 40,000 draws."""
    mean = 0.7
    demonstrations, answers = drawn(10_000, mean, 1), drawn(30_000, 0.0, 1)
    found = adversarial.fit_discriminator(demonstrations, answers)
    points = torch.linspace(-2, 2, 9)[:, None]
    torch.testing.assert_close(found.log_odds(points), mean * points[:, 0] - mean**2 / 2, atol=0.1, rtol=0)


def test_a_policy_that_is_its_demonstrations_gets_nothing() -> None:
    same = drawn(50, 0.3)
    found = adversarial.fit_discriminator(same, torch.cat([same, same]))
    torch.testing.assert_close(found.log_odds(same), torch.zeros(50), atol=1e-6, rtol=0)


def test_sides_that_are_apart_and_features_that_never_change_stay_finite() -> None:
    apart = torch.tensor([[5.0, 1.0], [6.0, 1.0]])
    found = adversarial.fit_discriminator(apart, -apart + torch.tensor([0.0, 2.0]))
    log_odds = found.log_odds(torch.cat([apart, -apart]))
    assert log_odds.isfinite().all()
    assert log_odds[:2].min() > 0 > log_odds[2:].max()


def turned(demonstrations: torch.Tensor, answers: torch.Tensor, *, ridge: float = 1.0) -> Discriminator:
    return ORIGINAL(answers, demonstrations, ridge=ridge)


def by_rows(demonstrations: torch.Tensor, answers: torch.Tensor, *, ridge: float = 1.0) -> Discriminator:
    """Rows weigh the same, so the larger side is believed before anything is seen."""
    found = ORIGINAL(demonstrations, answers, ridge=ridge)
    return found._replace(bias=found.bias + np.log(len(demonstrations) / len(answers)))


ORIGINAL = adversarial.fit_discriminator


@pytest.mark.parametrize("mutant", [turned, by_rows])
def test_the_tests_reject(mutant: Callable[..., Discriminator], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adversarial, "fit_discriminator", mutant)
    for test in (
        test_gaussians_have_their_log_ratio,
        lambda: test_it_is_the_weighted_ridge_regression_of_scikit_learn(0.1),
    ):
        with pytest.raises(AssertionError):
            test()
