"""Verdicts in both orders: a planted preference under a planted bias, symmetry, and formulas that are nearly right."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives import verdicts
from rlhf.objectives.verdicts import TwoOrders, average_orders, first_is_better, turns_with_order

PREFERENCE = torch.tensor([-2.0, -0.3, 0.0, 0.1, 1.5])


def asked(preference: Tensor, bias: float) -> tuple[Tensor, Tensor]:
    """Log-odds of A as a judge gives them who adds a bias towards A to its preference, in both orders."""
    p_first_as_a = 1 / (1 + torch.exp(-(preference + bias)))
    p_second_as_a = 1 / (1 + torch.exp(-(-preference + bias)))
    return tuple(torch.log(p) - torch.log(1 - p) for p in (p_first_as_a, p_second_as_a))  # type: ignore[return-value]


@pytest.mark.parametrize("bias", [0.0, 0.7, -3.0])
def test_a_planted_bias_is_taken_out_whole(bias: float) -> None:
    orders = verdicts.average_orders(*asked(PREFERENCE.double(), bias))
    torch.testing.assert_close(orders.log_odds, PREFERENCE.double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(orders.bias, torch.full((5,), bias, dtype=torch.double), atol=1e-12, rtol=0)
    torch.testing.assert_close(first_is_better(orders), PREFERENCE.double().sigmoid(), atol=1e-12, rtol=0)


def test_swapped_answers_have_the_opposite_verdict_and_the_same_bias() -> None:
    forward, backward = asked(PREFERENCE, 0.7)
    orders, swapped = verdicts.average_orders(forward, backward), verdicts.average_orders(backward, forward)
    torch.testing.assert_close(swapped.log_odds, -orders.log_odds)
    torch.testing.assert_close(swapped.bias, orders.bias)
    torch.testing.assert_close(first_is_better(swapped), 1 - first_is_better(orders))


def test_a_verdict_turns_where_the_same_letter_is_said_twice() -> None:
    forward, backward = asked(PREFERENCE, 0.7)
    says_the_same = (forward > 0) == (backward > 0)
    assert turns_with_order(average_orders(forward, backward)).tolist() == says_the_same.tolist()
    assert says_the_same.tolist() == [False, True, True, True, False]
    assert not turns_with_order(TwoOrders(torch.zeros(1), torch.zeros(1))).any(), "no verdict turns nowhere"


def averaged_probabilities(first_as_a: Tensor, second_as_a: Tensor) -> TwoOrders:
    p = (first_as_a.sigmoid() + 1 - second_as_a.sigmoid()) / 2
    return TwoOrders(torch.logit(p), (first_as_a + second_as_a) / 2)


def order_forgotten(first_as_a: Tensor, second_as_a: Tensor) -> TwoOrders:
    return TwoOrders((first_as_a + second_as_a) / 2, (first_as_a - second_as_a) / 2)


def summed(first_as_a: Tensor, second_as_a: Tensor) -> TwoOrders:
    return TwoOrders(first_as_a - second_as_a, (first_as_a + second_as_a) / 2)


def one_order(first_as_a: Tensor, _: Tensor) -> TwoOrders:
    return TwoOrders(first_as_a, torch.zeros_like(first_as_a))


@pytest.mark.parametrize("mutant", [averaged_probabilities, order_forgotten, summed, one_order])
def test_the_test_rejects(mutant: Callable[..., TwoOrders], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verdicts, "average_orders", mutant)
    with pytest.raises(AssertionError):
        test_a_planted_bias_is_taken_out_whole(0.7)
