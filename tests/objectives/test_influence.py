"""Influence on the head is what leaving a pair out does, found by leaving each out."""

import numpy as np
import pytest
import torch
from scipy.optimize import minimize

from rlhf.objectives.influence import head_influence, pair_pull, trait_direction
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.selection import head_covariance

WIDTH, RIDGE = 4, 1.0


def fitted(features: np.ndarray) -> np.ndarray:
    """The head that a ridge of one and Bradley-Terry give, by scipy's minimiser."""
    return minimize(
        lambda w: np.log1p(np.exp(-features @ w)).sum() + RIDGE * w @ w / 2, np.zeros(WIDTH), method="BFGS", tol=1e-10
    ).x


@pytest.mark.parametrize(("pairs", "alike"), [(80, 0.995), (320, 0.9995)])
def test_influence_is_what_leaving_the_pair_out_does(pairs: int, alike: float) -> None:
    """To first order: what is left out of a formula in first order falls with the number of pairs."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(pairs, WIDTH)) + 0.4
    traits = features[:, 1] + 0.3 * rng.normal(size=pairs)
    direction = trait_direction(torch.tensor(features), torch.tensor(traits))
    head = fitted(features)
    slope = float(traits @ (features @ head) / (traits @ traits))
    assert float(direction @ torch.tensor(head)) == pytest.approx(slope), "that of least squares through 0"
    differences = torch.tensor(features @ head)
    one, zero = torch.ones(pairs), torch.zeros(pairs)
    covariance = head_covariance(torch.tensor(features).float(), differences.float(), ridge=RIDGE).double()
    pull = pair_pull(differences, one, zero, one)
    influence = head_influence(torch.tensor(features), pull, covariance, direction).numpy()
    without = [float(direction @ torch.tensor(head - fitted(np.delete(features, i, axis=0)))) for i in range(pairs)]
    assert np.corrcoef(influence, without)[0, 1] > alike
    np.testing.assert_allclose(influence, without, atol=15 / pairs * np.abs(without).max())


def test_the_pull_is_the_gradient_of_the_pair_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(20, generator=generator, dtype=torch.float64, requires_grad=True)
    confidence, margin, weight = (torch.rand(20, generator=generator, dtype=torch.float64) for _ in range(3))
    loss = pair_loss(difference, torch.zeros(20), confidence=confidence, margin=margin, weight=weight)
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    torch.testing.assert_close(pair_pull(difference.detach(), confidence, margin, weight), -gradient)


@pytest.mark.parametrize("flip_rate", [0.0, 0.1, 0.4])
def test_a_labels_pull_is_the_gradient_of_its_loss(flip_rate: float) -> None:
    generator = torch.Generator().manual_seed(1)
    difference = (4 * torch.randn(50, generator=generator, dtype=torch.float64)).requires_grad_()
    confidence, margin = torch.rand(50, generator=generator).double(), torch.randn(50, generator=generator).double()
    weight = torch.rand(50, generator=generator).double()
    loss = pair_loss(
        difference,
        torch.zeros_like(difference),
        margin=margin,
        confidence=confidence,
        weight=weight,
        flip_rate=flip_rate,
    )
    (gradient,) = torch.autograd.grad(loss.sum(), difference)
    pull = pair_pull(difference.detach(), confidence, margin, weight, flip_rate=flip_rate)
    torch.testing.assert_close(pull, -gradient, atol=1e-10, rtol=1e-8)
