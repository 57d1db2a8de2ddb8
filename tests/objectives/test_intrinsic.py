"""Self-certainty against torch's own KL, novelty against the optimum that it must have, and formulas that are nearly right."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from rlhf.models.logprobs import token_surprise
from rlhf.objectives import intrinsic
from rlhf.objectives.advantage import token_rewards

LOGITS = 3 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).double()


def test_self_certainty_is_the_kl_of_uniform_from_the_policy() -> None:
    log_softmax = LOGITS.log_softmax(dim=-1)
    uniform = torch.full_like(log_softmax, 1 / 7)
    expected = kl_div(log_softmax, uniform, reduction="none").sum(dim=-1)
    torch.testing.assert_close(intrinsic.self_certainty(log_softmax), expected)
    assert expected.min() > 0.1


def test_self_certainty_of_a_coin() -> None:
    for p in (0.5, 0.7, 0.99):
        found = intrinsic.self_certainty(torch.tensor([[p, 1 - p]], dtype=torch.double).log()).item()
        assert found == pytest.approx(-0.5 * math.log(2 * p) - 0.5 * math.log(2 * (1 - p)), abs=1e-12)
    assert intrinsic.self_certainty(torch.zeros(1, 4).log_softmax(-1)).item() == pytest.approx(0, abs=1e-6)


def test_the_policys_logits_give_it_at_the_sampling_temperature() -> None:
    found = token_surprise(LOGITS.float()[None], 4, temperature=0.5).certainty[0]
    torch.testing.assert_close(found, intrinsic.self_certainty((LOGITS[:4].float() / 0.5).log_softmax(dim=-1)))


@pytest.mark.parametrize("ratio", [0.5, 1.0, 2.0])
def test_novelty_has_its_optimum_at_the_reference_of_another_temperature(ratio: float) -> None:
    """J(π) = E_π[c · novelty] - β KL(π || π_ref) has gradient 0 at π_ref^(1 - c/β) / Z, and less anywhere else."""
    beta, reference = 0.3, LOGITS[0].log_softmax(dim=-1)
    optimum = ((1 - ratio) * reference).log_softmax(dim=-1)

    def objective(logits: Tensor) -> Tensor:
        policy = logits.log_softmax(dim=-1)
        reward = ratio * beta * intrinsic.novelty(reference)
        return (policy.exp() * (reward - beta * (policy - reference))).sum()

    logits = optimum.clone().requires_grad_()
    objective(logits).backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.zeros(7).double(), atol=1e-12, rtol=0)
    for row in LOGITS[1:]:
        assert objective(optimum + 0.1 * row) < objective(optimum)


def test_the_mean_is_over_the_answers_own_tokens() -> None:
    values = torch.tensor([[1.0, 3.0, 9.0], [2.0, float("nan"), 9.0], [5.0, 5.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]])
    assert intrinsic.mean_over_tokens(values, mask).tolist() == [2.0, 2.0, 0.0]
    twice = intrinsic.mean_over_tokens(values[:1, :2].repeat(1, 2), torch.ones(1, 4))
    assert twice.tolist() == [2.0], "twice as long is worth the same"


def test_a_mean_at_the_end_has_the_gradient_of_its_expectation_and_a_spread_one_has_not() -> None:
    """After a first token the policy ends (p) or goes on: dJ/dp against what reward-to-go credits the two choices with."""
    values, mask = torch.tensor([[4.0, 1.0, 0.0], [4.0, 1.5, 2.0]]), torch.tensor([[1, 1, 0], [1, 1, 1]])
    means = intrinsic.mean_over_tokens(values, mask)
    gradient = (means[0] - means[1]).item()  # of J = p · mean of the short answer + (1 - p) · mean of the long one
    at_end = token_rewards(means, torch.zeros(2, 3), mask, kl_coef=0.0)
    spread = values * mask / mask.sum(dim=1, keepdim=True)
    credited = {name: rewards[:, 1:].sum(dim=1) for name, rewards in (("end", at_end), ("spread", spread))}
    assert (credited["end"][0] - credited["end"][1]).item() == pytest.approx(gradient)
    assert gradient == pytest.approx(0.0, abs=1e-6)
    assert (credited["spread"][0] - credited["spread"][1]).item() < -0.5, "a spread mean pays for going on"


def reversed_kl(log_softmax: Tensor) -> Tensor:
    return math.log(log_softmax.shape[-1]) + (log_softmax.exp() * log_softmax).sum(dim=-1)


def without_the_size(log_softmax: Tensor) -> Tensor:
    return -log_softmax.mean(dim=-1)


def summed(log_softmax: Tensor) -> Tensor:
    return -math.log(log_softmax.shape[-1]) - log_softmax.sum(dim=-1)


def known(logprobs_reference: Tensor) -> Tensor:
    return logprobs_reference


def as_probability(logprobs_reference: Tensor) -> Tensor:
    return 1 - logprobs_reference.exp()


MUTANTS: list[tuple[str, Callable[..., Tensor], Callable[[], None]]] = [
    ("self_certainty", reversed_kl, test_self_certainty_is_the_kl_of_uniform_from_the_policy),
    ("self_certainty", without_the_size, test_self_certainty_of_a_coin),
    ("self_certainty", summed, test_self_certainty_is_the_kl_of_uniform_from_the_policy),
    ("novelty", known, lambda: test_novelty_has_its_optimum_at_the_reference_of_another_temperature(0.5)),
    ("novelty", as_probability, lambda: test_novelty_has_its_optimum_at_the_reference_of_another_temperature(1.0)),
]


@pytest.mark.parametrize(("name", "mutant", "test"), MUTANTS, ids=[mutant.__name__ for _, mutant, _ in MUTANTS])
def test_the_tests_reject(
    name: str, mutant: Callable[..., Tensor], test: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intrinsic, name, mutant)
    with pytest.raises(AssertionError):
        test()
