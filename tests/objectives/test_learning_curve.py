"""Learning curves: Sheppard's formula by simulation, special cases, and planted curves found again with honest intervals."""

import math

import numpy as np
import pytest
import torch

from rlhf.objectives.learning_curve import (
    TRAINING_SPREAD,
    Curves,
    accuracy_after,
    accuracy_of_correlation,
    expect,
    expect_accuracy,
    fit_curves,
    mix_curves,
)

SIZES = torch.tensor([100.0, 200.0, 400.0, 800.0])


@pytest.mark.parametrize("correlation", [0.0, 0.3, 0.8, -0.5])
def test_signs_of_correlated_normals_agree_as_sheppard_says(correlation: float) -> None:
    """100,000 draws: 4 deviations of a share are 0.0064."""
    rng = np.random.default_rng(0)
    x, z = rng.normal(size=(2, 100_000))
    y = correlation * x + math.sqrt(1 - correlation**2) * z
    measured = np.mean(np.sign(x) == np.sign(y))
    assert accuracy_of_correlation(torch.tensor(correlation)).item() == pytest.approx(measured, abs=0.0064)


def test_special_cases_of_the_curve() -> None:
    one, k = torch.tensor(1.0, dtype=torch.float64), torch.tensor(100.0, dtype=torch.float64)
    assert accuracy_after(1e-12, one, k).item() == pytest.approx(0.5, abs=1e-4)
    assert accuracy_after(1e12, torch.tensor(0.83, dtype=torch.float64), k).item() == pytest.approx(0.83, abs=1e-6)
    for power in (0.6, 1.0, 2.0):
        assert accuracy_after(100.0, one, k, power).item() == pytest.approx(0.75), "half is known after k, whatever γ"
    # Half of the labels wrong by a factor w in worth: n of them lie where w n clean ones do.
    assert accuracy_after(400.0, one, 4 * k) == accuracy_after(100.0, one, k)
    rising = accuracy_after(SIZES.double(), torch.tensor(0.9), k, 1.5)
    assert (rising.diff() > 0).all()


def test_an_exact_curve_is_found_again() -> None:
    truth = accuracy_after(SIZES.double(), torch.tensor(0.9), torch.tensor(150.0), 1.0)
    curves = fit_curves(SIZES, truth, torch.eye(4, dtype=torch.float64) * 1e-8, flip_rate=0.25)
    assert curves.weight.sum().item() == pytest.approx(1)
    for labels in (400.0, 1600.0, 3200.0):
        expected = accuracy_after(labels, torch.tensor(0.9), torch.tensor(150.0), 1.0).item()
        assert expect(curves.weight, curves.accuracies(labels)).mean == pytest.approx(expected, abs=0.004)
    assert (curves.flip_rate == 0.25).all()


def test_intervals_hold_the_truth_and_know_what_is_far() -> None:
    """24 planted curves measured with errors that go together: 95 % intervals of the mean hold it at 0.8 or more (binomial)."""
    generator = torch.Generator().manual_seed(0)
    covariance = 0.015**2 * (0.3 * torch.ones(4, 4) + 0.7 * torch.eye(4)).double()
    root = torch.linalg.cholesky(covariance)
    held, widths = 0, []
    for _ in range(24):
        limit, half, power = (
            0.7 + 0.28 * torch.rand(1, generator=generator),
            10 ** (1.5 + torch.rand(1, generator=generator)),
            1.0,
        )
        seen = accuracy_after(SIZES.double(), limit, half, power) + root @ torch.randn(4, generator=generator).double()
        curves = fit_curves(SIZES, seen, covariance, flip_rate=0.0)
        near, far = (expect_accuracy(curves, labels) for labels in (1000.0, 8000.0))
        held += near.low <= accuracy_after(1000.0, limit, half, power).item() <= near.high
        widths.append((near.high - near.low, far.high - far.low))
    assert held >= 20
    assert np.mean([far > near for near, far in widths]) > 0.9, "what is far from all measurements is less sure"


def test_errors_that_go_together_leave_the_gain_known() -> None:
    """Accuracies of the same pairs err alike: their level is unsure, what more labels add is less so."""
    truth = accuracy_after(SIZES.double(), torch.tensor(0.85), torch.tensor(150.0))
    deviations = []
    for shared in (0.0, 0.95):
        covariance = 0.02**2 * (shared * torch.ones(4, 4) + (1 - shared) * torch.eye(4)).double()
        curves = fit_curves(SIZES, truth, covariance, flip_rate=0.0)
        gain = expect(curves.weight, curves.accuracies(800.0) - curves.accuracies(100.0))
        deviations.append(gain.high - gain.mean)
    assert deviations[1] < 0.5 * deviations[0]


def test_a_mixture_is_the_mean_of_its_parts() -> None:
    parts = [
        fit_curves(SIZES, torch.full((4,), level), torch.eye(4) * 1e-4, flip_rate=rate)
        for level, rate in ((0.7, 0.1), (0.8, 0.3))
    ]
    mixed = mix_curves(parts, torch.tensor([0.25, 0.75], dtype=torch.float64))
    means = [expect(part.weight, part.accuracies(800.0)).mean for part in parts]
    assert expect(mixed.weight, mixed.accuracies(800.0)).mean == pytest.approx(0.25 * means[0] + 0.75 * means[1])
    assert expect(mixed.weight, mixed.flip_rate).mean == pytest.approx(0.25)


def test_luck_widens_an_interval_and_no_accuracy_is_beyond_one() -> None:
    sure = fit_curves(SIZES, torch.full((4,), 0.999), torch.eye(4) * 1e-8, flip_rate=0.0)
    mean, low, high = expect_accuracy(sure, 800.0)
    assert high == 1.0
    assert mean - low >= 1.96 * TRAINING_SPREAD - 1e-9


def test_the_grid_of_limits_lies_evenly_between_chance_and_certainty() -> None:
    curves = fit_curves(torch.tensor([10.0]), torch.tensor([0.7]), torch.eye(1), flip_rate=0.0)
    limits = curves.limit.unique()
    assert 0.5 < limits.min() < limits.max() < 1
    assert limits.mean().item() == pytest.approx(0.75)
    assert (limits.min() - 0.5).item() == pytest.approx((1 - limits.max()).item())


def test_an_expected_accuracy_keeps_its_lower_end_where_that_is_above_chance() -> None:
    """A point of certainty at 0.8, and the luck of a training: 1.96 deviations below; nothing is expected below chance."""
    one = torch.ones(1, dtype=torch.float64)
    sure = Curves(one, 0.8 * one, 1e-9 * one, one, 0 * one)
    assert expect_accuracy(sure, 100.0).low == pytest.approx(0.8 - 1.96 * TRAINING_SPREAD, abs=1e-6)
    blind = Curves(one, 0.5 * one, one, one, 0 * one)
    assert expect_accuracy(blind, 100.0).low == 0.5
