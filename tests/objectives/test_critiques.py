"""Critique-out-Loud in closed form, with twins that must be noticed."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.critiques import critique_loss, gumbel, joint_loss, self_consistent


def check_critique_loss(loss: Callable[[Tensor, Tensor], Tensor]) -> None:
    """An even choice among v tokens costs log v however long the critiques are, a certain one nothing; each side counts half."""
    tokens = torch.tensor([[4.0, 4.0], [2.0, 8.0], [5.0, 1.0]])
    even = -math.log(7) * tokens
    assert loss(even, tokens).tolist() == pytest.approx([math.log(7)] * 3)
    logprobs = torch.tensor([[-6.0, 0.0], [0.0, -16.0], [-5.0, -3.0]], requires_grad=True)
    losses = loss(logprobs, tokens)
    assert losses.tolist() == pytest.approx([0.75, 1.0, 2.0])
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [pytest.approx(row) for row in (-0.5 / tokens).tolist()]


def test_critique_loss_and_its_slope() -> None:
    check_critique_loss(critique_loss)
    assert critique_loss(torch.zeros(1, 2), torch.zeros(1, 2)).item() == 0.0, "a critique of no token"


def likely_is_bad(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return (logprobs / tokens).mean(dim=-1)


def summed_over_tokens(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return -logprobs.mean(dim=-1)


def of_all_tokens(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return -logprobs.sum(dim=-1) / tokens.sum(dim=-1)


def summed_over_sides(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return -(logprobs / tokens).sum(dim=-1)


def of_the_chosen_alone(logprobs: Tensor, tokens: Tensor) -> Tensor:
    return -(logprobs / tokens)[:, 0]


TWINS = [likely_is_bad, summed_over_tokens, of_all_tokens, summed_over_sides, of_the_chosen_alone]


@pytest.mark.parametrize("twin", TWINS, ids=lambda f: f.__name__)
def test_another_critique_loss_would_be_noticed(twin: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_critique_loss(twin)


def test_without_weight_the_joint_loss_is_the_pair_loss() -> None:
    pair, written = torch.tensor([0.5, 2.0]), torch.tensor([3.0, 1.0])
    assert torch.equal(joint_loss(pair, written, weight=0.0), pair)
    assert joint_loss(pair, written, weight=2.0).tolist() == [6.5, 4.0]


def check_gumbel(noise: Callable[[Tensor], Tensor]) -> None:
    """The largest of noisy log-probabilities is a sample: 20,000 of them, each share within four standard deviations."""
    probabilities, count = torch.tensor([0.5, 0.3, 0.15, 0.05]), 20_000
    uniform = torch.rand(count, 4, generator=torch.Generator().manual_seed(0))
    drawn = (probabilities.log() + noise(uniform)).argmax(dim=1)
    shares = torch.bincount(drawn, minlength=4) / count
    allowed = 4 * (probabilities * (1 - probabilities) / count).sqrt()
    assert bool(((shares - probabilities).abs() < allowed).all()), shares


def test_the_largest_noisy_logprob_is_a_sample() -> None:
    check_gumbel(gumbel)
    assert gumbel(torch.tensor([0.0, 1.0])).isfinite().all(), "rand may draw 0"


def minimum_instead(uniform: Tensor) -> Tensor:
    return -gumbel(uniform)


def one_logarithm(uniform: Tensor) -> Tensor:
    return -uniform.log()


def normal(uniform: Tensor) -> Tensor:
    return torch.special.ndtri(uniform)


def no_noise(uniform: Tensor) -> Tensor:
    return torch.zeros_like(uniform)


@pytest.mark.parametrize("twin", [minimum_instead, one_logarithm, normal, no_noise], ids=lambda f: f.__name__)
def test_other_noise_would_be_noticed(twin: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_gumbel(twin)


def test_several_critiques_make_a_mean_for_each_answer() -> None:
    assert self_consistent(torch.tensor([[1.0, 5.0], [2.0, 5.0], [6.0, 5.0]])).tolist() == [3.0, 5.0]
    assert self_consistent(torch.tensor([[1.0, 5.0]])).tolist() == [1.0, 5.0]
