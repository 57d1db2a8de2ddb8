"""Closed forms of MetaRM: bounds, ties, a case by hand, finite differences of L(θ + η ∇J)."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from rlhf.objectives import meta
from rlhf.objectives.pairwise import pair_loss


def test_the_spread_lies_within_its_bounds_and_starts_dead_at_ties() -> None:
    for k in (2, 5, 8):
        ties = torch.zeros(1, k, requires_grad=True)
        spread = meta.reward_spread(ties)
        torch.testing.assert_close(spread, torch.tensor([(k - 1) / (2 * k)]))
        spread.sum().backward()
        assert ties.grad is not None
        assert ties.grad.abs().max() == 0.0, "nothing says which answer should be higher"
        far = meta.reward_spread(1e4 * torch.arange(k)[None].double())
        torch.testing.assert_close(far, torch.tensor([(k - 1) / k], dtype=torch.double))


def test_the_spread_by_hand_and_its_invariances() -> None:
    """k = 3, rewards 0, 1, 3: 2/9 (σ(1) + σ(3) + σ(2))."""
    rewards = torch.tensor([[0.0, 1.0, 3.0]], dtype=torch.double)
    expected = 2 / 9 * sum(1 / (1 + math.exp(-d)) for d in (1, 3, 2))
    torch.testing.assert_close(meta.reward_spread(rewards), torch.tensor([expected], dtype=torch.double))
    torch.testing.assert_close(meta.reward_spread(rewards + 7), meta.reward_spread(rewards))
    torch.testing.assert_close(meta.reward_spread(rewards[:, [2, 0, 1]]), meta.reward_spread(rewards))


def test_two_parameters_by_hand() -> None:
    """r(y) = θ·y. Two answers (1, 0) and (0, 1): J = σ(|θ₁ - θ₂|) / 2, so ∇J = σ'(d) sign(d) (1, -1) / 2 at d = θ₁ - θ₂.

    The step of L = softplus(-θ₁) at θ' = θ + η ∇J is (-σ(-θ'₁), 0).
    """
    theta = torch.tensor([0.8, 0.3], dtype=torch.double, requires_grad=True)
    answers = torch.eye(2, dtype=torch.double)
    (gradient,) = torch.autograd.grad(meta.reward_spread((answers @ theta)[None]).sum(), [theta])
    s = 1 / (1 + math.exp(-0.5))
    torch.testing.assert_close(gradient, 0.5 * s * (1 - s) * torch.tensor([1.0, -1.0], dtype=torch.double))
    (step,) = meta.ascent([gradient], step=2.0)
    there = (theta + step).detach().requires_grad_()
    zero = torch.zeros(1, dtype=torch.double)
    (found,) = torch.autograd.grad(pair_loss(there[:1], zero).sum(), [there])
    first = 0.8 + 2.0 * 0.5 * s * (1 - s)
    torch.testing.assert_close(found, torch.tensor([-1 / (1 + math.exp(first)), 0.0], dtype=torch.double))


def test_first_order_gradient_against_finite_differences() -> None:
    """The gradient of L at θ' is the derivative of δ ↦ L(θ + η ∇J(θ) + δ) at 0, and L(θ') - L(θ) → η ∇L·∇J."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator, dtype=torch.double)
    sampled = torch.randn(5, 4, generator=generator, dtype=torch.double)
    theta = torch.randn(4, generator=generator, dtype=torch.double)

    def loss(at: Tensor) -> Tensor:
        return pair_loss(torch.tanh(features[:3]) @ at, torch.tanh(features[3:]) @ at).mean()

    def gradient(of: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
        at = at.clone().requires_grad_()
        return torch.autograd.grad(of(at), [at])[0]

    uphill = gradient(lambda at: meta.reward_spread((torch.tanh(sampled) @ at)[None]).sum(), theta)
    there = theta + meta.ascent([uphill], step=0.7)[0]
    exact = gradient(loss, there)
    step = 1e-6
    numeric = torch.stack(
        [(loss(there + step * e) - loss(there - step * e)) / (2 * step) for e in torch.eye(4, dtype=torch.double)]
    )
    torch.testing.assert_close(exact, numeric, atol=1e-8, rtol=0)
    small = 1e-5
    change = (loss(theta + small * uphill) - loss(theta)) / small
    torch.testing.assert_close(change, gradient(loss, theta) @ uphill, atol=1e-5, rtol=0)


def test_the_normalised_step_has_its_length_over_all_parameters() -> None:
    gradients = [torch.tensor([[3.0, 0.0]]), torch.tensor([4.0])]
    steps = meta.ascent(gradients, step=0.5, norm=5.0)
    torch.testing.assert_close(steps, [torch.tensor([[0.3, 0.0]]), torch.tensor([0.4])])
    assert [s.abs().max().item() for s in meta.ascent([torch.zeros(2)], step=1.0, norm=0.0)] == [0.0]


def without_the_absolute_value(rewards: Tensor) -> Tensor:
    k = rewards.shape[1]
    first, second = torch.triu_indices(k, k, offset=1)
    return 2 / k**2 * torch.sigmoid(rewards[:, first] - rewards[:, second]).sum(dim=1)


def mean_over_pairs(rewards: Tensor) -> Tensor:
    k = rewards.shape[1]
    return meta_spread(rewards) * k / (k - 1)


def downhill(gradients: Any, *, step: float, norm: float | None = None) -> list[Tensor]:
    return [-s for s in meta_ascent(gradients, step=step, norm=norm)]


def normalised_each(gradients: Any, *, step: float, norm: float | None = None) -> list[Tensor]:
    return [step * g if norm is None else step * g / g.norm().clamp(min=1e-12) for g in gradients]


meta_spread, meta_ascent = meta.reward_spread, meta.ascent
MUTANTS: list[tuple[str, Callable[..., Any], Callable[[], None]]] = [
    ("reward_spread", without_the_absolute_value, test_the_spread_by_hand_and_its_invariances),
    ("reward_spread", mean_over_pairs, test_the_spread_lies_within_its_bounds_and_starts_dead_at_ties),
    ("ascent", downhill, test_two_parameters_by_hand),
    ("ascent", normalised_each, test_the_normalised_step_has_its_length_over_all_parameters),
]


@pytest.mark.parametrize(("name", "mutant", "test"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS])
def test_the_tests_reject(
    name: str, mutant: Callable[..., Any], test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    test()
    monkeypatch.setattr(meta, name, mutant)
    with pytest.raises(AssertionError):
        test()
