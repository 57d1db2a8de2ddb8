"""Losses of rankings: closed forms, a likelihood written independently, invariances, and twins that must be noticed."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives import rankings
from rlhf.objectives.pairwise import bradley_terry
from rlhf.objectives.rankings import choice_losses, is_best, plackett_luce, top_one

Loss = Callable[..., Tensor]


def beats_of(scores: list[list[float]]) -> Tensor:
    """Who beats whom by scores, [g, K, K]."""
    values = torch.tensor(scores)
    return values[:, :, None] > values[:, None, :]


def likelihood(rewards: list[float], order: tuple[int, ...]) -> float:
    """Plackett-Luce's probability of an order, best first, with plain numbers."""
    weights = [math.exp(rewards[i]) for i in order]
    return math.prod(weight / sum(weights[k:]) for k, weight in enumerate(weights))


REWARDS = [0.3, -1.2, 2.0, 0.7]


def check_permutations(loss: Loss) -> None:
    """The probabilities of all orders are those written above, and sum to 1."""
    total = 0.0
    for order in itertools.permutations(range(4)):
        scores = [float(-order.index(i)) for i in range(4)]
        probability = math.exp(-loss(torch.tensor([REWARDS]), beats_of([scores])).item())
        assert probability == pytest.approx(likelihood(REWARDS, order), rel=1e-5)
        total += probability
    assert total == pytest.approx(1, abs=1e-5)


def check_choices(loss: Loss) -> None:
    """Of the K answers each may be the best: K probabilities that sum to 1, whatever the order of the rest."""
    softmax = torch.tensor(REWARDS).softmax(dim=0)
    for best in range(4):
        scores = [9.0 if i == best else float(i) for i in range(4)]
        assert loss(torch.tensor([REWARDS]), beats_of([scores])).neg().exp().item() == pytest.approx(
            softmax[best].item(), rel=1e-5
        )


def check_two(loss: Loss) -> None:
    """Two answers are Bradley-Terry, the gradient included, far from 0 too."""
    chosen, rejected = torch.tensor([0.3, -4.0, 50.0]), torch.tensor([1.0, -4.0, -50.0])
    rewards = torch.stack([chosen, rejected], dim=1).requires_grad_()
    losses = loss(rewards, beats_of([[1.0, 0.0]] * 3))
    expected = bradley_terry(chosen.requires_grad_(), rejected.requires_grad_())
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    assert rewards.grad is not None
    torch.testing.assert_close(rewards.grad, torch.stack([chosen.grad, rejected.grad], dim=1))  # type: ignore[list-item]


def check_weight(loss: Loss) -> None:
    rewards, beats = torch.tensor([REWARDS, REWARDS]), beats_of([[3.0, 1.0, 2.0, 0.0]] * 2)
    losses = loss(rewards, beats, weight=torch.tensor([1.0, 2.5]))
    assert losses[1].item() == pytest.approx(2.5 * losses[0].item())


def check_ties(loss: Loss) -> None:
    """All tied: 0 and no gradient. Two tied above a third: neither pulls on the other."""
    rewards = torch.tensor([REWARDS], requires_grad=True)
    losses = loss(rewards, beats_of([[1.0] * 4]))
    losses.sum().backward()
    assert losses.item() == 0
    assert rewards.grad is not None
    assert not rewards.grad.any()
    tied = torch.tensor([[0.3, -1.2, 2.0]], requires_grad=True)
    loss(tied, beats_of([[1.0, 1.0, 0.0]])).sum().backward()
    alone = torch.tensor([[0.3, 2.0]], requires_grad=True)
    loss(alone, beats_of([[1.0, 0.0]])).sum().backward()
    assert tied.grad is not None
    assert alone.grad is not None
    share = 0.5 if loss is top_one else 1.0  # of the choice of the best, the mean over the tied ones
    assert tied.grad[0, 0].item() == pytest.approx(share * alone.grad[0, 0].item())


def test_whole_rankings() -> None:
    check_permutations(plackett_luce)
    check_two(plackett_luce)
    check_weight(plackett_luce)
    check_ties(plackett_luce)


def test_the_choice_of_the_best() -> None:
    check_choices(top_one)
    check_two(top_one)
    check_weight(top_one)
    check_ties(top_one)


def test_numbers_of_the_reference() -> None:
    """Scores (2, 1, 0) in their order: 0.721, and 0.251 for the mean over all pairs (measured there)."""
    rewards, beats = torch.tensor([[2.0, 1.0, 0.0]]), beats_of([[2.0, 1.0, 0.0]])
    assert plackett_luce(rewards, beats).item() == pytest.approx(0.721, abs=5e-4)
    pairs = bradley_terry(rewards[0, [0, 0, 1]], rewards[0, [1, 2, 2]])
    assert pairs.mean().item() == pytest.approx(0.251, abs=5e-4)
    assert plackett_luce(torch.zeros(1, 5), beats_of([[5.0, 4.0, 3.0, 2.0, 1.0]])).item() == pytest.approx(
        math.log(math.factorial(5))
    )


@pytest.mark.parametrize("loss", [plackett_luce, top_one])
def test_a_shift_of_all_rewards_and_places_that_are_empty_change_nothing(loss: Loss) -> None:
    rewards, beats = torch.tensor([REWARDS]), beats_of([[3.0, 1.0, 2.0, 1.0]])
    expected = loss(rewards, beats)
    torch.testing.assert_close(loss(rewards + 7.0, beats), expected)
    padded = torch.cat([rewards, torch.tensor([[99.0, -5.0]])], dim=1).requires_grad_()
    wider = torch.zeros(1, 6, 6, dtype=torch.bool)
    wider[:, :4, :4] = beats
    losses = loss(padded, wider)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert padded.grad is not None
    assert padded.grad[0, 4:].tolist() == [0.0, 0.0]


def test_the_gradient_of_a_ranking_is_that_of_a_formula_written_otherwise() -> None:
    """By logcumsumexp over the sorted rewards, as the literature writes it."""
    generator = torch.Generator().manual_seed(0)
    rewards = torch.randn(6, 7, generator=generator)
    order = torch.stack([torch.randperm(7, generator=generator) for _ in range(6)])
    scores = -order.argsort(dim=1).float()
    ours, theirs = rewards.clone().requires_grad_(), rewards.clone().requires_grad_()
    losses = plackett_luce(ours, scores[:, :, None] > scores[:, None, :])
    by_place = theirs.gather(1, order)
    expected = (by_place.flip(1).logcumsumexp(dim=1).flip(1) - by_place).sum(dim=1)
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    expected.sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_what_nobody_compared_says_nothing() -> None:
    """a > b and c > d alone are two pairs, in one ranking or in two; of a circle of three every answer is a best one."""
    beats = torch.zeros(1, 4, 4, dtype=torch.bool)
    beats[0, 0, 1] = beats[0, 2, 3] = True
    rewards = torch.tensor([REWARDS])
    expected = bradley_terry(rewards[:, [0, 2]], rewards[:, [1, 3]]).sum(dim=1)
    torch.testing.assert_close(plackett_luce(rewards, beats), expected)
    circle = torch.zeros(1, 3, 3, dtype=torch.bool)
    circle[0, 0, 1] = circle[0, 1, 2] = circle[0, 2, 0] = True
    assert is_best(circle).all()
    assert top_one(torch.zeros(1, 3), circle).item() == pytest.approx(math.log(2))


# ---- Twins that must be noticed ----


def ties_as_equals(rewards: Tensor, beats: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """Breslow's: a tied answer competes with its equals too, which teaches that their rewards are the same."""
    options = rewards[:, None, :].masked_fill(beats.mT, -torch.inf)
    return weight * (torch.logsumexp(options, dim=2) - rewards).sum(dim=1)


def everyone_at_every_place(rewards: Tensor, beats: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """Nobody is taken out once they are chosen."""
    return weight * ((torch.logsumexp(rewards, dim=1, keepdim=True) - rewards) * beats.any(dim=2)).sum(dim=1)


def upside_down(rewards: Tensor, beats: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    return plackett_luce(rewards, beats.mT, weight=weight)


def all_pairs(rewards: Tensor, beats: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """Every pair by itself, where the ranking is meant."""
    return weight * (bradley_terry(rewards[:, :, None], rewards[:, None, :]) * beats).sum(dim=(1, 2))


def weight_forgotten(rewards: Tensor, beats: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    return plackett_luce(rewards, beats)


@pytest.mark.parametrize(
    "twin",
    [ties_as_equals, everyone_at_every_place, upside_down, all_pairs, weight_forgotten],
    ids=lambda f: f.__name__,
)
def test_a_broken_ranking_would_be_noticed(twin: Loss) -> None:
    with pytest.raises(AssertionError):
        for check in (check_permutations, check_two, check_weight, check_ties):
            check(twin)


def last_of_all(beats: Tensor) -> Tensor:
    return is_best(beats.mT)


def any_winner(beats: Tensor) -> Tensor:
    return beats.any(dim=2)


@pytest.mark.parametrize("twin", [last_of_all, any_winner], ids=lambda f: f.__name__)
def test_a_broken_choice_would_be_noticed(twin: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rankings, "is_best", twin)
    with pytest.raises(AssertionError):
        for check in (check_choices, check_two):
            check(top_one)


def test_an_answer_that_beats_none_has_no_loss() -> None:
    losses = choice_losses(torch.tensor([REWARDS]), beats_of([[0.0, 0.0, 1.0, 0.0]]))
    assert losses[0, [0, 1, 3]].tolist() == [0.0, 0.0, 0.0]
    assert losses[0, 2].item() == pytest.approx(math.log(sum(math.exp(r - 2.0) for r in REWARDS)))
