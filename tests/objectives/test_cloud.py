"""The cloud's border and how many may lie beyond it: against scipy, and against clouds that are drawn, whatever their shape."""

import numpy as np
import pytest
import torch
from scipy.stats import betabinom
from torch import Tensor

from rlhf.objectives.cloud import Cloud, border, distance, fit_cloud, most_outside

SHARE, FALSE_ALARMS = 0.05, 1e-2


def test_distances_are_mahalanobis_with_a_shrunk_covariance() -> None:
    points = torch.from_numpy(np.random.default_rng(0).normal(size=(60, 4)) @ np.diag([1.0, 5.0, 0.2, 1.0]) + 3)
    cloud, half = fit_cloud(points), points[:30].numpy()
    covariance = np.cov(half.T, bias=True)
    shrunk = 0.9 * covariance + 0.1 * np.trace(covariance) / 4 * np.eye(4)
    centred = points.numpy() - half.mean(axis=0)
    expected = np.sqrt(np.einsum("ni,ij,nj->n", centred, np.linalg.inv(shrunk), centred))
    assert distance(cloud, points).numpy() == pytest.approx(expected, rel=1e-8)
    assert cloud.distances.numpy() == pytest.approx(np.sort(expected[30:]), rel=1e-8), "of the other half alone"


@pytest.mark.parametrize(("known", "new"), [(128, 128), (128, 8), (128, 2), (40, 64), (19, 64)])
def test_more_than_the_limit_is_as_rare_as_promised(known: int, new: int) -> None:
    k = int(np.ceil((1 - SHARE) * (known + 1) - 1e-9))
    law = betabinom(new, known + 1 - k, k)
    limit = most_outside(known, new, share=SHARE, false_alarms=FALSE_ALARMS)
    assert law.sf(limit) <= FALSE_ALARMS < law.sf(limit - 1), "P(X > limit), and one less would be too few"


def test_too_few_known_points_have_no_border() -> None:
    few = Cloud(torch.zeros(2), torch.eye(2), torch.arange(10.0))
    assert border(few, share=SHARE).item() == float("inf")
    assert most_outside(10, 50, share=SHARE, false_alarms=FALSE_ALARMS) == 50, "so nothing is news"
    assert border(few, share=0.1).item() == 9.0, "the tenth of ten: one new point in eleven lies beyond"


def cauchy(rng: np.random.Generator, count: int) -> Tensor:
    """A cloud with no variance at all, in five dimensions of which two say the same."""
    points = rng.standard_cauchy(size=(count, 5))
    points[:, 4] = points[:, 3]
    return torch.from_numpy(points)


def alarms(limit: int, move: float, draws: int = 400) -> tuple[float, float]:
    """How often more new points than the limit lie beyond the border, and their mean share."""
    rng, rings, shares = np.random.default_rng(1), 0, 0.0
    for _ in range(draws):
        cloud = fit_cloud(cauchy(rng, 80))
        outside = distance(cloud, cauchy(rng, 64) + move) > border(cloud, share=SHARE)
        rings += int(outside.sum() > limit)
        shares += outside.double().mean().item()
    return rings / draws, shares / draws


def test_false_alarms_are_as_rare_as_promised_in_a_cloud_of_any_shape() -> None:
    """400 clouds: 0.05 of points beyond, and at 0.05 a false alarm (so that it can be counted) within four standard errors."""
    limit = most_outside(40, 64, share=SHARE, false_alarms=0.05)
    rate, share = alarms(limit, move=0.0)
    assert rate <= 0.05 + 4 * (0.05 * 0.95 / 400) ** 0.5
    assert share == pytest.approx(2 / 41, abs=0.01), "the second largest of 40: two in 41 lie beyond"


def test_a_limit_that_takes_the_border_for_known_rings_too_often() -> None:
    """A plain binomial of 0.05 forgets that the border itself was measured."""
    from scipy.stats import binom

    assert alarms(int(binom.isf(0.05, 64, SHARE)), move=0.0)[0] > 0.1


def test_answers_that_leave_are_seen() -> None:
    limit = most_outside(40, 64, share=SHARE, false_alarms=1e-4)
    assert alarms(limit, move=300.0, draws=40)[0] > 0.9
