"""Verdicts of a language model on two answers, asked in both orders: what they say of the answers, and what of the order."""

from typing import NamedTuple

import torch
from torch import Tensor


class TwoOrders(NamedTuple):
    """What a model says of n pairs of answers when each pair is asked about in both orders.

    Attributes:
        log_odds: [n] that the first answer is the better one, nats, without the bias.
        bias: [n] towards whichever answer stands as A, nats.
    """

    log_odds: Tensor
    bias: Tensor


def average_orders(log_odds_first_as_a: Tensor, log_odds_second_as_a: Tensor) -> TwoOrders:
    """Split the verdicts of both orders into the preference for an answer and the bias for a position.

        ℓ_12 = log p(A) - log p(B) with the first answer as A,    ℓ_21 = the same with the second answer as A
        L = (ℓ_12 - ℓ_21) / 2,    b = (ℓ_12 + ℓ_21) / 2,    P(first is better) = σ(L)

    If the model adds one bias to its preference in both orders, ℓ_12 = L + b and ℓ_21 = -L + b, this is exact. Special
    cases: swapped answers have -L and the same b; a model that looks at the position alone has L = 0, so P = 1/2.

    Args:
        log_odds_first_as_a, log_odds_second_as_a: [n] nats.

    Reference: both orders against position bias, arXiv:2306.05685 section 3.4; here log-odds are averaged, which keeps the
    size of a preference, where verdicts that differ would be ties.

    >>> average_orders(torch.tensor([3.0]), torch.tensor([1.0]))
    TwoOrders(log_odds=tensor([1.]), bias=tensor([2.]))
    """
    log_odds = (log_odds_first_as_a - log_odds_second_as_a) / 2
    bias = (log_odds_first_as_a + log_odds_second_as_a) / 2
    return TwoOrders(log_odds, bias)


def turns_with_order(orders: TwoOrders) -> Tensor:
    """Mark the pairs whose verdict turns with the order, [n] bool: the model says the same letter twice.

    That is where the bias is larger than the preference: sign ℓ_12 = sign ℓ_21 ⇔ |b| > |L|.

    >>> turns_with_order(TwoOrders(torch.tensor([1.0, -2.0]), torch.tensor([2.0, 0.5])))
    tensor([ True, False])
    """
    return orders.bias.abs() > orders.log_odds.abs()


def first_is_better(orders: TwoOrders) -> Tensor:
    """Return P(first answer is better) = σ(L), [n].

    >>> first_is_better(TwoOrders(torch.tensor([0.0]), torch.tensor([5.0])))
    tensor([0.5000])
    """
    return torch.sigmoid(orders.log_odds)
