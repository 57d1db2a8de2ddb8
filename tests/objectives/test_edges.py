"""Edges of the formulas: numbers that are taken where nobody gives one, limits, refusals, columns of 0, units."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.objectives.advantage import generalized_advantage, nearest_line
from rlhf.objectives.adversarial import fit_discriminator
from rlhf.objectives.annotators import fit_scales, label_slopes, vote_worth
from rlhf.objectives.assistance import assisted_accuracy, assisted_probability
from rlhf.objectives.bottleneck import kl_to_standard_normal
from rlhf.objectives.cloud import Cloud, border, fit_cloud, most_outside
from rlhf.objectives.contrastive import info_nce, swapped_prediction
from rlhf.objectives.critiques import gumbel
from rlhf.objectives.ensemble import combined
from rlhf.objectives.gated import length_multiple, ridge
from rlhf.objectives.kl import adapted_kl_coef
from rlhf.objectives.learning_curve import accuracy_after, fit_curves
from rlhf.objectives.length import length_gradient
from rlhf.objectives.masked import masked_sums, mean_and_variance, whiten
from rlhf.objectives.ppo import clipped_policy, clipped_share
from rlhf.objectives.rankings import is_best
from rlhf.objectives.second_look import log_odds_of_verdicts, posterior_of_observations, second_look
from rlhf.objectives.selection import greedy_design
from rlhf.objectives.text import mixed

GENERATOR = np.random.default_rng(0)


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


NUMBERS = torch.from_numpy(GENERATOR.normal(size=(6, 4)))
POSITIVE = NUMBERS.abs() + 0.1


@pytest.mark.parametrize(
    ("function", "arguments", "defaults"),
    [
        (generalized_advantage, (NUMBERS, POSITIVE, torch.ones(6, 4)), {"gamma": 1.0, "lam": 0.95}),
        (info_nce, (NUMBERS, POSITIVE), {"temperature": 0.05}),
        (swapped_prediction, (NUMBERS, POSITIVE, NUMBERS[:3]), {"temperature": 0.1, "epsilon": 0.05, "iterations": 3}),
        (length_gradient, (NUMBERS[:, 0], NUMBERS[:, 1], POSITIVE[:, 0]), {"weight": 1.0}),
        (partial(combined, rule="soft_min"), (NUMBERS,), {"strength": 0.5}),
        (whiten, (1e-4 * NUMBERS, torch.ones(6, 4)), {"epsilon": 1e-8}),
        (label_slopes, (NUMBERS,), {"ridge": 1.0}),
        (fit_discriminator, (NUMBERS, POSITIVE), {"ridge": 1.0}),
        (partial(posterior_of_observations, flip_rate=0.2), (NUMBERS[0], NUMBERS[1]), {"scale": 1.0}),
        (accuracy_after, (200.0, tensor(0.9), tensor(100.0)), {"power": 1.0}),
    ],
)
def test_the_numbers_of_the_papers_are_taken_where_nobody_gives_others(
    function: Callable[..., Any], arguments: tuple[Any, ...], defaults: dict[str, float]
) -> None:
    found, expected = function(*arguments), function(*arguments, **defaults)
    for one, other in zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True):
        assert torch.equal(one, other)
    for name, value in defaults.items():
        other = function(*arguments, **{**defaults, name: value + 1})
        assert not torch.equal(*(x[0] if isinstance(x, tuple) else x for x in (found, other))), f"{name} says something"


@pytest.mark.parametrize("rule", ["mean", "worst", "uncertainty", "soft_min"])
@pytest.mark.parametrize("strength", [0.3, 2.0])
def test_members_scores_are_combined_as_numpy_does_it(rule: str, strength: float) -> None:
    scores = GENERATOR.normal(size=(4, 3))
    expected = {
        "mean": scores.mean(axis=0),
        "worst": scores.min(axis=0),
        "uncertainty": scores.mean(axis=0) - strength * scores.var(axis=0),
        "soft_min": -strength * np.log(np.exp(-scores / strength).mean(axis=0)),
    }[rule]
    found = combined(torch.from_numpy(scores), rule, strength=strength)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)
    alike = torch.from_numpy(scores[:1]).expand(5, -1)
    np.testing.assert_allclose(combined(alike, rule, strength=strength).numpy(), scores[0], rtol=1e-12)


def test_soft_min_lies_between_the_mean_and_the_worst_and_reaches_both() -> None:
    scores = torch.from_numpy(GENERATOR.normal(size=(5, 20)))
    soft = combined(scores, "soft_min", strength=0.7)
    assert (soft > combined(scores, "worst")).all()
    assert (soft < combined(scores, "mean")).all()
    near_worst, near_mean = (combined(scores, "soft_min", strength=b) for b in (1e-4, 1e4))
    torch.testing.assert_close(near_worst, combined(scores, "worst"), atol=2e-4, rtol=0)
    expected = combined(scores, "mean") - scores.var(dim=0, correction=0) / (2 * 1e4)
    torch.testing.assert_close(near_mean, expected, atol=1e-8, rtol=0)
    with pytest.raises(ValueError, match="'median' is none of mean, worst, uncertainty, soft_min"):
        combined(scores, "median")


@pytest.mark.parametrize(
    ("kl", "coef"), [(6.0, 0.1), (6.6, 0.101), (12.0, 0.102), (60.0, 0.102), (5.4, 0.099), (0.0, 0.098)]
)
def test_the_weight_of_the_kl_moves_by_a_fifth_at_most(kl: float, coef: float) -> None:
    assert adapted_kl_coef(0.1, kl, target=6.0, horizon=1000, episodes=100) == pytest.approx(coef, rel=1e-9)


def test_a_line_to_the_returns_is_at_most_the_critic_itself() -> None:
    returns = tensor(0, 2, 4)

    def slope(values: Tensor) -> float:
        return nearest_line(*(x.var(correction=0) for x in (values, returns, values + returns))).item()

    assert slope(returns / 4) == 1.0
    assert slope(returns * 4) == pytest.approx(0.25)
    assert slope(-returns) == 0.0
    assert slope(tensor(3, 3, 3)) == 0.0


def test_an_answer_without_tokens_has_no_advantage() -> None:
    advantages, returns = generalized_advantage(torch.zeros(2, 0), torch.zeros(2, 0), torch.zeros(2, 0))
    assert advantages.shape == returns.shape == (2, 0)


def test_moments_are_taken_together_or_measured_together() -> None:
    values, mask = tensor(1, 3, 7), tensor(1, 1, 0)
    measured = whiten(values, mask)
    torch.testing.assert_close(whiten(values, mask, mean=tensor(9.0)[0]), measured)
    torch.testing.assert_close(whiten(values, mask, variance=tensor(9.0)[0]), measured)
    given = whiten(values, mask, mean=tensor(1.0)[0], variance=tensor(4.0)[0])
    torch.testing.assert_close(given, tensor(0, 1, 0))


def test_rounding_noise_around_a_large_value_is_not_blown_up() -> None:
    """Steps of float32 at 1,000 are 6e-5; with the ε of 1e-8 alone they would become 0.5 and more."""
    noise = torch.tensor([0.0, 1.0, 0.0, 1.0]) * 2**-14
    assert whiten(1000 + noise, torch.ones(4)).abs().max() < 0.05
    assert whiten(0.001 * torch.tensor([1.0, 2.0]), torch.ones(2)).abs().max() > 0.9, "a small difference is one"


def test_the_clip_share_looks_at_the_ratio() -> None:
    old = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    new = old + torch.tensor([0.19, 0.17, -0.23, -0.2]).to(old)
    assert clipped_share(new, old, cliprange=0.2).tolist() == [1.0, 0.0, 1.0, 0.0]


def test_a_log_ratio_counts_as_twenty_at_most() -> None:
    loss = clipped_policy(tensor(50.0), tensor(0.0), tensor(-1.0), cliprange=0.2)
    assert loss.item() == pytest.approx(math.exp(20))
    low = clipped_policy(tensor(-50.0), tensor(0.0), tensor(1.0), cliprange=0.2)
    assert low.item() == pytest.approx(-math.exp(-20))


@pytest.mark.parametrize("rate", [0.0, 1.0, 1.5, -0.1])
def test_a_critic_that_is_never_or_always_wrong_is_refused(rate: float) -> None:
    with pytest.raises(AssertionError, match="an error rate between 0 and 1"):
        assisted_probability(tensor(0.5), tensor(1), error_rate=rate)
    assert assisted_accuracy(tensor(0.6), error_rate=0.0, believed=0.5).item() == pytest.approx(0.6)


@pytest.mark.parametrize("rate", [0.0, 0.51, 1.0])
def test_labels_that_say_nothing_or_the_opposite_have_no_posterior(rate: float) -> None:
    with pytest.raises(AssertionError, match="a flip rate in"):
        posterior_of_observations(torch.zeros(1), torch.zeros(1), flip_rate=rate)
    half = posterior_of_observations(torch.zeros(1), torch.zeros(1), flip_rate=0.5)
    assert half.item() == 0.5


def test_a_feature_that_never_differs_stops_no_fit() -> None:
    x = torch.from_numpy(GENERATOR.normal(size=(60, 2)) + 1)
    alone = label_slopes(x)
    beside = label_slopes(torch.cat([torch.zeros(60, 1, dtype=torch.float64), x], dim=1))
    torch.testing.assert_close(beside.slope, torch.cat([tensor(0), alone.slope]), atol=1e-9, rtol=0)
    torch.testing.assert_close(beside.covariance[1:, 1:], alone.covariance)


def test_votes_in_another_unit_are_worth_as_much() -> None:
    votes = torch.from_numpy(GENERATOR.normal(size=200) + 1)
    annotator = torch.arange(200) % 4
    fits, larger = fit_scales(votes, annotator, 4), fit_scales(1e3 * votes, annotator, 4)
    torch.testing.assert_close(larger.scales, fits.scales / 1e3)
    torch.testing.assert_close(larger.mean, fits.mean)
    assert vote_worth(1e3 * votes, annotator, 4) == pytest.approx(vote_worth(votes, annotator, 4) / 1e3)
    assert fit_scales(torch.zeros(5), torch.zeros(5, dtype=torch.long), 1).scales.isfinite().all()


def test_a_code_is_one_for_each_answer_whatever_stands_before() -> None:
    mean = torch.from_numpy(GENERATOR.normal(size=(2, 3, 4)))
    whole = kl_to_standard_normal(mean, mean / 2)
    assert whole.shape == (2, 3)
    torch.testing.assert_close(whole[1], kl_to_standard_normal(mean[1], mean[1] / 2))


def test_a_cloud_without_extent_has_distances_that_are_numbers() -> None:
    cloud = fit_cloud(torch.ones(8, 3))
    assert cloud.distances.tolist() == [0.0] * 4
    assert cloud.whitening.isfinite().all()


@pytest.mark.parametrize(
    ("known", "new", "share", "false_alarms"), [(19, 5, 0.05, 0.9), (19, 3, 0.05, 1.0), (9, 4, 0.1, 1e-9)]
)
def test_how_many_outside_are_news_at_the_ends(known: int, new: int, share: float, false_alarms: float) -> None:
    """By counting out where each new point may fall among the known ones: C(n + m - place, …) by simulation is exact here."""
    from scipy.stats import betabinom

    k = math.ceil((1 - share) * (known + 1) - 1e-9)
    law = betabinom(new, known + 1 - k, k)
    expected = next((x - 1 for x in range(new + 1) if law.sf(x - 1) <= false_alarms), new)
    assert most_outside(known, new, share=share, false_alarms=false_alarms) == expected


def test_noise_is_finite_at_both_ends() -> None:
    for dtype in (torch.float32, torch.float64):
        assert gumbel(torch.tensor([0.0, 0.5, 1.0], dtype=dtype)).isfinite().all()


def test_the_best_lose_the_least_of_those_that_win() -> None:
    """Beside two that beat each other stands one that nothing beats; in a ring alone nobody is better than another."""
    beats = torch.zeros(1, 4, 4, dtype=torch.bool)
    for winner, loser in ((0, 1), (0, 2), (1, 0), (3, 1)):
        beats[0, winner, loser] = True
    # Wins 2, 1, 0, 1; losses 1, 2, 1, 0.
    assert is_best(beats).tolist() == [[False, False, False, True]]
    ring = torch.zeros(1, 4, 4, dtype=torch.bool)
    ring[0, 0, 1] = ring[0, 1, 2] = ring[0, 2, 0] = True
    assert is_best(ring).tolist() == [[True, True, True, False]]
    assert not is_best(torch.zeros(1, 2, 2, dtype=torch.bool)).any()


def test_features_are_scaled_to_a_mean_square_length_of_one() -> None:
    """In another unit, with as many directions more that never differ, the same pairs are chosen."""
    x = torch.from_numpy(GENERATOR.normal(size=(40, 3)))
    right = torch.from_numpy(GENERATOR.uniform(0.5, 1, size=40))
    chosen = second_look(x, torch.zeros(40).double(), right, 12, error_rate=0.05)
    scaled = torch.cat([1e3 * x, torch.zeros(40, 9).double()], dim=1)
    assert second_look(scaled.float(), torch.zeros(40), right.float(), 12, error_rate=0.05) == chosen


@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e3])
@pytest.mark.parametrize("taste", [2.0, -2.0, 500.0])
def test_a_multiple_is_found_in_any_unit_and_is_the_nearer_end(unit: float, taste: float) -> None:
    lengths = torch.arange(200.0).double()
    noise = torch.from_numpy(np.random.default_rng(3).normal(size=200))
    multiple = length_multiple(taste * lengths + noise, unit * lengths, lengths)
    assert multiple is not None
    assert multiple * unit == pytest.approx(taste, abs=0.005)


def test_the_penalties_that_are_tried_lie_between_a_ten_thousandth_and_ten() -> None:
    rng = np.random.default_rng(5)
    features = rng.normal(size=(30, 4))
    exact = torch.from_numpy(features @ rng.normal(size=4))
    assert ridge(torch.from_numpy(features), exact).penalty == 1e-4
    assert ridge(torch.from_numpy(features), torch.from_numpy(rng.normal(size=30))).penalty == 10.0


def test_half_of_what_is_known_may_lie_a_hundred_times_beyond_the_most_labels() -> None:
    sizes = tensor(100, 400)
    curves = fit_curves(sizes, tensor(0.6, 0.7), torch.eye(2, dtype=torch.float64), flip_rate=0.0)
    assert curves.half.min().item() == pytest.approx(4.0)
    assert curves.half.max().item() == pytest.approx(40_000.0)


def test_a_feature_that_never_changes_tells_nobody_apart() -> None:
    sides = [torch.from_numpy(GENERATOR.normal(size=(30, 2)) + shift) for shift in (0.4, -0.4)]
    alone, beside = (
        fit_discriminator(*each) for each in (sides, [torch.cat([torch.ones(30, 1), x], 1) for x in sides])
    )
    torch.testing.assert_close(beside.weights, torch.cat([tensor(0), alone.weights]), atol=1e-7, rtol=0)


def test_votes_that_all_agree_are_no_likelier_than_certain() -> None:
    fits = fit_scales(torch.full((20,), 3.0), torch.zeros(20, dtype=torch.long), 1)
    assert (fits.mean <= 0).all()


def test_two_losses_are_mixed_by_their_shares() -> None:
    assert mixed(tensor(2, 5), tensor(4, 1), share=0.25).tolist() == [2.5, 4.0]


@pytest.mark.parametrize("dual", [None, 3.0])
def test_the_clipped_loss_is_that_of_numpy_wherever_the_old_policy_was(dual: float | None) -> None:
    old, new, advantages = (
        -GENERATOR.exponential(size=400),
        -GENERATOR.exponential(size=400),
        GENERATOR.normal(size=400),
    )
    ratio = np.exp(new - old)
    expected = np.maximum(-advantages * ratio, -advantages * np.clip(ratio, 0.8, 1.2))
    if dual is not None:
        expected = np.where(advantages < 0, np.minimum(expected, -advantages * dual), expected)
    found = clipped_policy(*(torch.from_numpy(x) for x in (new, old, advantages)), cliprange=0.2, cliprange_dual=dual)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-12)


def test_a_ratio_on_the_border_is_inside() -> None:
    assert clipped_share(tensor(0.0), tensor(0.0), cliprange=0.0).item() == 0


def test_nothing_whitens_to_nothing() -> None:
    assert whiten(torch.zeros(4), torch.ones(4)).tolist() == [0.0] * 4


def test_one_head_that_is_constant_leaves_the_others_derivative() -> None:
    quality, lengths = tensor(1, 2, 4), tensor(5, 1, 3)
    loss, gradients = length_gradient(quality, torch.ones(3).double(), lengths)
    assert gradients.shape == (3, 2)
    assert (gradients[:, 1] == 0).all()
    assert (gradients[:, 0] != 0).any()
    assert loss.item() == pytest.approx(abs(np.corrcoef(quality.numpy(), lengths.numpy())[0, 1]))


@pytest.mark.parametrize("rate", [0.0, 0.51, 1.0])
def test_an_expert_who_is_wrong_more_often_than_right_is_refused(rate: float) -> None:
    with pytest.raises(AssertionError, match=r"an error rate in \(0, 0\.5\]"):
        log_odds_of_verdicts(tensor(1), tensor(0), error_rate=rate)
    assert log_odds_of_verdicts(tensor(1), tensor(0), error_rate=0.5).item() == 0


def test_the_posterior_of_two_measurements_is_a_normal_likelihood() -> None:
    sizes, measured = tensor(300, 900), np.array([0.71, 0.74])
    covariance = np.array([[0.02**2, 1e-4], [1e-4, 0.015**2]])
    curves = fit_curves(sizes, torch.from_numpy(measured), torch.from_numpy(covariance), flip_rate=0.1)
    rest = measured[:, None] - np.stack([curves.accuracies(n).numpy() for n in (300.0, 900.0)])
    expected = np.exp(-0.5 * np.einsum("ig,ij,jg->g", rest, np.linalg.inv(covariance), rest))
    np.testing.assert_allclose(curves.weight.numpy(), expected / expected.sum(), rtol=1e-6)


def test_one_value_has_no_variance_and_a_small_one_is_kept() -> None:
    mean, variance = mean_and_variance(masked_sums(tensor(5, 7), tensor(1, 0)))
    assert (mean.item(), variance.item()) == (5, 0)
    assert mean_and_variance(masked_sums(tensor(0.1, 0.3), tensor(1, 1)))[1].item() == pytest.approx(0.01)
    assert [x.item() for x in mean_and_variance(masked_sums(tensor(5), tensor(0)))] == [0, 0]


def test_the_border_of_nineteen_is_the_farthest_of_them() -> None:
    """0.95 of twenty is nineteen, also where floats make it a little more."""
    for known in (19, 39, 59, 99):
        cloud = Cloud(torch.zeros(1), torch.eye(1), torch.arange(float(known)))
        assert border(cloud, share=0.05).item() == round(0.95 * (known + 1)) - 1
    nine = Cloud(torch.zeros(1), torch.eye(1), torch.arange(9.0))
    assert (1 - 0.7) * 10 > 3
    assert border(nine, share=0.7).item() == 2.0


def test_a_long_greedy_choice_is_that_of_whole_inverses() -> None:
    x = torch.from_numpy(GENERATOR.normal(size=(40, 5)) @ GENERATOR.normal(size=(5, 5)))
    weight, precision = torch.from_numpy(GENERATOR.uniform(0.5, 8, size=40)), torch.eye(5).double()
    taken: list[int] = []
    for _ in range(15):
        gain = weight * torch.einsum("nh,hk,nk->n", x, torch.linalg.inv(precision), x)
        gain[taken] = -1.0
        taken.append(int(gain.argmax()))
        precision = precision + weight[taken[-1]] * torch.outer(x[taken[-1]], x[taken[-1]])
    assert greedy_design(x, weight, torch.eye(5).double(), 15) == taken


@pytest.mark.parametrize("episodes", [1, 64, 512, 10**6])
def test_the_weight_of_the_kl_is_never_below_zero(episodes: int) -> None:
    coefficient = 0.1
    for kl in (0.0, 0.0, 9.0, 0.0):
        after = adapted_kl_coef(coefficient, kl, target=6.0, horizon=64, episodes=episodes)
        assert 0.8 * coefficient - 1e-12 <= after <= 1.2 * coefficient + 1e-12
        coefficient = after
