"""Potential-based shaping moves no optimum: two tokens of three words, every answer enumerated; and formulas that move it."""

from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import Tensor

from rlhf.objectives import shaping

WORDS, BETA = 3, 0.4
ANSWERS = torch.tensor(list(product(range(WORDS), repeat=2)))
RANDOM = torch.Generator().manual_seed(0)
SCORES = torch.randn(WORDS**2, generator=RANDOM).double()
REFERENCE = (
    torch.randn(1 + WORDS, WORDS, generator=RANDOM).double().log_softmax(dim=-1)
)  # at the start, behind each word
POTENTIALS = 2 * torch.randn(1 + WORDS, generator=RANDOM).double()
WHOLE = torch.ones(WORDS**2, 2)


def token_rewards(weight: float) -> Tensor:
    """Rewards of both tokens of every answer, [9, 2]: the score at the end, and the shaping of what each answer goes through."""
    before = torch.stack([POTENTIALS[0].expand(WORDS**2), POTENTIALS[1 + ANSWERS[:, 0]]], dim=1)
    sparse = torch.stack([torch.zeros_like(SCORES), SCORES], dim=1)
    return sparse + weight * shaping.shaping_rewards(before, WHOLE)


def best_policy(rewards: Tensor) -> Tensor:
    """The KL-regularised optimum as log-probabilities [4, 3], by backward induction from the rewards of tokens."""
    second = REFERENCE[1:] + rewards[:, 1].view(WORDS, WORDS) / BETA
    value = BETA * second.logsumexp(dim=-1)
    first = REFERENCE[0] + (rewards[::WORDS, 0] + value) / BETA
    return torch.cat([first[None], second]).log_softmax(dim=-1)


def test_the_optimum_stays_where_it_is() -> None:
    # By its definition: π* of a whole answer ∝ π_ref exp(score / β).
    whole = REFERENCE[0, ANSWERS[:, 0]] + REFERENCE[1 + ANSWERS[:, 0], ANSWERS[:, 1]] + SCORES / BETA
    for weight in (0.0, 1.0, 3.0):
        policy = best_policy(token_rewards(weight))
        found = policy[0, ANSWERS[:, 0]] + policy[1 + ANSWERS[:, 0], ANSWERS[:, 1]]
        torch.testing.assert_close(found, whole.log_softmax(dim=0), atol=1e-12, rtol=0)
        totals = token_rewards(weight).sum(dim=1)
        assert totals.argmax() == SCORES.argmax(), "without a KL too"


def test_the_expected_gradient_of_any_policy_stays_too() -> None:
    """Σ over all answers of π ∇log π(token) · what follows from it: shaping adds -Φ(s), which no token can change."""
    gradients = []
    for weight in (0.0, 1.0):
        logits = torch.randn(1 + WORDS, WORDS, generator=torch.Generator().manual_seed(1)).double().requires_grad_()
        policy = logits.log_softmax(dim=-1)
        logprobs = torch.stack([policy[0, ANSWERS[:, 0]], policy[1 + ANSWERS[:, 0], ANSWERS[:, 1]]], dim=1)
        rewards = token_rewards(weight)
        to_go = torch.stack([rewards.sum(dim=1), rewards[:, 1]], dim=1)
        probability = logprobs.sum(dim=1).exp().detach()
        (probability[:, None] * logprobs * to_go).sum().backward()
        gradients.append(logits.grad)
    torch.testing.assert_close(gradients[0], gradients[1], atol=1e-12, rtol=0)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_discounted_sums_and_padding(gamma: float) -> None:
    potentials = torch.tensor([[0.5, 2.0, -1.0, 7.0], [3.0, float("nan"), 1.0, 1.0], [4.0, 1.0, 1.0, 1.0]]).double()
    mask = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    rewards = shaping.shaping_rewards(potentials, mask, gamma=gamma)
    discounts = gamma ** torch.arange(4).double()
    torch.testing.assert_close((rewards * discounts).sum(dim=1), torch.tensor([-0.5, -3.0, 0.0]).double())
    assert (rewards[mask == 0] == 0).all()
    assert rewards[0, 0].item() == pytest.approx(gamma * 2.0 - 0.5)


def gain_alone(potentials: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    return gamma * torch.cat([potentials[:, 1:], torch.zeros_like(potentials[:, :1])], dim=1) * mask


def left_at_the_end(potentials: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    return (gamma * torch.cat([potentials[:, 1:], potentials[:, -1:]], dim=1) - potentials) * mask


def turned_round(potentials: Tensor, mask: Tensor, *, gamma: float = 1.0) -> Tensor:
    return (potentials - gamma * torch.cat([torch.zeros_like(potentials[:, :1]), potentials[:, :-1]], dim=1)) * mask


@pytest.mark.parametrize("mutant", [gain_alone, left_at_the_end, turned_round])
def test_the_test_rejects(mutant: Callable[..., Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shaping, "shaping_rewards", mutant)
    for test in (test_the_optimum_stays_where_it_is, test_the_expected_gradient_of_any_policy_stays_too):
        with pytest.raises(AssertionError):
            test()
