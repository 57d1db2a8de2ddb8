"""Broken twins of our formulas, each an error found in a public codebase or one step from it: the tests must reject every one."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from rlhf.objectives.masked import masked_sums, mean_and_variance
from tests.objectives import test_closed_forms as tests


def sign_flipped(chosen: Tensor, rejected: Tensor) -> Tensor:
    return softplus(chosen - rejected)


def epsilon_inside_the_log(chosen: Tensor, rejected: Tensor) -> Tensor:
    return -torch.log(torch.sigmoid(chosen - rejected) + 1e-5)


def summed_before_the_sigmoid(chosen: Tensor, rejected: Tensor, **_: Any) -> Tensor:
    return softplus(rejected.sum() - chosen.sum()).expand_as(chosen)


def margin_outside_the_log(
    chosen: Tensor, rejected: Tensor, margin: Any = 0.0, confidence: Any = 1.0, weight: Any = 1.0
) -> Tensor:
    return weight * (softplus(rejected - chosen) + (1 - confidence) * (chosen - rejected)) + margin


def flip_without_margin_sign(
    chosen: Tensor, rejected: Tensor, margin: Any = 0.0, confidence: Any = 1.0, weight: Any = 1.0
) -> Tensor:
    d = chosen - rejected
    return weight * (-confidence * logsigmoid(d - margin) - (1 - confidence) * logsigmoid(-d - margin))


def smoothing_for_flips(
    chosen: Tensor, rejected: Tensor, *, flip_rate: float = 0.0, confidence: Any = 1.0, **_: Any
) -> Tensor:
    """The mean of the losses where the loss of the mean is meant: pulls on every label, however wrong."""
    p = confidence * (1 - flip_rate) + (1 - confidence) * flip_rate
    return -p * logsigmoid(chosen - rejected) - (1 - p) * logsigmoid(rejected - chosen)


def kl_reversed(logprobs_policy: Tensor, logprobs_reference: Tensor) -> Tensor:
    return logprobs_reference - logprobs_policy


def k3_reversed(logprobs_policy: Tensor, logprobs_reference: Tensor) -> Tensor:
    log_ratio = logprobs_policy - logprobs_reference
    return torch.expm1(log_ratio) - log_ratio


def mean_added_back(values: Tensor, mask: Tensor, **_: Any) -> Tensor:
    mean, variance = mean_and_variance(masked_sums(values, mask))
    white = (values.double() - mean) / torch.sqrt(variance + 1e-8) + mean
    return torch.where(mask.bool(), white, torch.zeros_like(white)).to(values.dtype)


def score_after_the_end(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    position = torch.arange(mask.shape[1])
    return (-kl_coef * kl * mask) + (position == mask.sum(1, keepdim=True)) * scores[:, None]


def gae_over_padding(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    advantages = torch.stack([tests.naive_gae(r, v, gamma, lam) for r, v in zip(rewards, values, strict=True)])
    return advantages * mask, (advantages + values) * mask


def clip_takes_the_better(logprobs: Tensor, logprobs_old: Tensor, advantages: Tensor, *, cliprange: float) -> Tensor:
    ratio = (logprobs - logprobs_old).exp()
    return torch.minimum(-advantages * ratio, -advantages * ratio.clamp(1 - cliprange, 1 + cliprange))


def value_clip_takes_the_better(
    values: Tensor, values_old: Tensor, returns: Tensor, *, cliprange: float | None
) -> Tensor:
    clipped = values_old + (values - values_old).clamp(-(cliprange or math.inf), cliprange or math.inf)
    return 0.5 * torch.minimum((values - returns) ** 2, (clipped - returns) ** 2)


MUTANTS: list[tuple[str, Callable[..., Any], Callable[[], None]]] = [
    ("bradley_terry", sign_flipped, tests.test_bradley_terry_equals_binary_cross_entropy),
    ("bradley_terry", epsilon_inside_the_log, tests.test_bradley_terry_antisymmetry_and_gradient),
    ("pair_loss", summed_before_the_sigmoid, lambda: tests.test_pair_loss_is_the_definition(1.0, 0.0)),
    ("pair_loss", margin_outside_the_log, tests.test_margin_reaches_the_gradient),
    ("pair_loss", flip_without_margin_sign, tests.test_flip_is_the_swapped_pair_with_the_margin_negated),
    ("pair_loss", smoothing_for_flips, lambda: tests.test_the_likelihood_of_flipped_labels(0.25)),
    ("pair_loss", smoothing_for_flips, tests.test_flipped_likelihood_has_its_minimum_at_the_truth),
    ("kl_k1", kl_reversed, tests.test_kl_estimators_are_unbiased_by_enumeration),
    ("kl_k3", k3_reversed, tests.test_kl_estimators_are_unbiased_by_enumeration),
    ("whiten", mean_added_back, tests.test_whitening_has_mean_0_and_variance_1_under_the_mask),
    ("token_rewards", score_after_the_end, tests.test_token_rewards_sum_and_place),
    (
        "generalized_advantage",
        gae_over_padding,
        lambda: tests.test_gae_is_the_double_sum_and_ignores_padding(1.0, 0.95),
    ),
    ("clipped_policy", clip_takes_the_better, tests.test_clipped_policy_values_and_gradients),
    ("clipped_value", value_clip_takes_the_better, tests.test_clipped_value),
]


@pytest.mark.parametrize(("name", "mutant", "test"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS])
def test_the_tests_reject(
    name: str, mutant: Callable[..., Any], test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    test()
    monkeypatch.setattr(tests, name, mutant)
    with pytest.raises(AssertionError):
        test()
