"""Text regularisation, length disentangling and the bottleneck in closed form, with twins that must be noticed."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlhf.objectives.bottleneck import kl_to_standard_normal, noisy_code
from rlhf.objectives.length import correlation, length_gradient, length_loss, overlap
from rlhf.objectives.text import mixed, text_loss

# ---- Text (GRM) ----


def check_text(loss: Callable[[Tensor], Tensor]) -> None:
    """A certain answer costs log 2, one of -10/β nats nearly 10; the slope is -β σ(-β log π)."""
    logprobs = torch.tensor([0.0, -7.0, -100.0], requires_grad=True)
    losses = loss(logprobs)
    assert losses.tolist() == pytest.approx([math.log(2), math.log(1 + math.exp(0.7)), 10.0], abs=1e-4)
    losses.sum().backward()
    assert logprobs.grad is not None
    expected = [-0.1 / (1 + math.exp(0.1 * x)) for x in (0.0, -7.0, -100.0)]
    assert logprobs.grad.tolist() == pytest.approx(expected, abs=1e-6)


def test_text_loss_and_its_slope() -> None:
    check_text(text_loss)
    assert mixed(torch.tensor([1.0]), torch.tensor([9.0]), share=0.0).item() == 1.0
    assert mixed(torch.tensor([1.0]), torch.tensor([9.0]), share=1.0).item() == 9.0


def unlikely_is_better(logprobs: Tensor) -> Tensor:
    return torch.nn.functional.softplus(0.1 * logprobs)


def without_the_sigmoid(logprobs: Tensor) -> Tensor:
    return -0.1 * logprobs


def beta_outside(logprobs: Tensor) -> Tensor:
    return 0.1 * torch.nn.functional.softplus(-logprobs)


@pytest.mark.parametrize("twin", [unlikely_is_better, without_the_sigmoid, beta_outside], ids=lambda f: f.__name__)
def test_another_text_loss_would_be_noticed(twin: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_text(twin)


# ---- Length (ODIN) ----

QUALITY = torch.tensor([0.3, -1.0, 2.0, 0.4, 0.1, -0.7], dtype=torch.float64)
LENGTH = torch.tensor([1.0, 0.2, 0.9, -0.4, 1.5, 0.0], dtype=torch.float64)
TOKENS = torch.tensor([10.0, 3.0, 12.0, 7.0, 7.0, 1.0], dtype=torch.float64)


def pearson(x: list[float], y: list[float]) -> float:
    """Written out, without torch."""
    mx, my = sum(x) / len(x), sum(y) / len(y)
    covariance = sum((a - mx) * (b - my) for a, b in zip(x, y, strict=True))
    return covariance / math.sqrt(sum((a - mx) ** 2 for a in x) * sum((b - my) ** 2 for b in y))


def check_length(loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    """|corr(r_Q, n)| - corr(r_L, n), also where quality falls with length; blind to the scale and origin of each head."""
    for sign in (1.0, -1.0):
        expected = abs(pearson(QUALITY.tolist(), TOKENS.tolist())) - pearson(LENGTH.tolist(), TOKENS.tolist())
        assert loss(sign * QUALITY, LENGTH, TOKENS).item() == pytest.approx(expected, abs=1e-12)
        assert loss(5 * sign * QUALITY + 3, 0.1 * LENGTH - 2, TOKENS).item() == pytest.approx(expected, abs=1e-9)


def test_length_loss() -> None:
    check_length(length_loss)
    assert length_loss(TOKENS, -TOKENS, TOKENS).item() == pytest.approx(2.0), "the worst"
    assert correlation(torch.ones(4), torch.arange(4.0)).item() == 0.0, "a constant has no correlation, and is no NaN"


def signed(quality: Tensor, length: Tensor, tokens: Tensor) -> Tensor:
    """Quality may become the opposite of length."""
    return correlation(quality, tokens) - correlation(length, tokens)


def both_away(quality: Tensor, length: Tensor, tokens: Tensor) -> Tensor:
    return correlation(quality, tokens).abs() + correlation(length, tokens)


def covariance(quality: Tensor, length: Tensor, tokens: Tensor) -> Tensor:
    def centred(x: Tensor, y: Tensor) -> Tensor:
        return ((x - x.mean()) * (y - y.mean())).mean()

    return centred(quality, tokens).abs() - centred(length, tokens)


@pytest.mark.parametrize("twin", [signed, both_away, covariance], ids=lambda f: f.__name__)
def test_another_length_loss_would_be_noticed(twin: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_length(twin)


def test_parts_with_the_derivatives_of_the_whole_have_its_gradient() -> None:
    """A linear model of two heads: Σ g_i r_i over the parts of a step gives λ ∇ L_L of the step, against finite differences."""
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    heads = torch.randn(4, 2, generator=generator, dtype=torch.float64, requires_grad=True)

    def whole(w: Tensor) -> Tensor:
        quality, length = (features @ w).unbind(dim=1)
        return 0.5 * length_loss(quality, length, TOKENS)

    quality, length = (features @ heads).unbind(dim=1)
    value, gradients = length_gradient(quality, length, TOKENS, weight=0.5)
    assert value.item() == pytest.approx(whole(heads).item(), abs=1e-12)
    assert not value.requires_grad
    assert not gradients.requires_grad
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        (gradients[part] * (features[part] @ heads)).sum().backward()
    assert heads.grad is not None
    for i in range(4):
        for j in range(2):
            step = torch.zeros_like(heads)
            step[i, j] = 1e-6
            with torch.no_grad():
                expected = (whole(heads + step) - whole(heads - step)).item() / 2e-6
            assert heads.grad[i, j].item() == pytest.approx(expected, abs=1e-7)
    value, gradients = length_gradient(torch.ones(3), torch.zeros(3), torch.arange(3.0))
    assert (value.item(), gradients.abs().sum().item()) == (0.0, 0.0)


def test_overlap_is_blind_to_sign_and_length() -> None:
    weights = torch.tensor([[3.0, 4.0], [-4.0, 3.0]])
    assert overlap(weights).item() == pytest.approx(0.0, abs=1e-7)
    assert overlap(torch.tensor([[3.0, 4.0], [-6.0, -8.0]])).item() == pytest.approx(1.0)
    assert overlap(torch.tensor([[1.0, 0.0], [1.0, 1.0]])).item() == pytest.approx(math.sqrt(0.5))


# ---- Bottleneck (InfoRM) ----


def check_kl(kl: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Against torch's own distributions: nothing for N(0, I), the sum over dimensions, opposite means not cancelling."""
    mean = torch.tensor([[0.0, 0.0, 0.0], [2.0, -2.0, 0.0], [0.3, 0.1, -0.5]])
    log_variance = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.7, -1.0, 0.2]])
    normal = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    torch.testing.assert_close(kl(mean, log_variance), expected)


def test_kl_of_a_code() -> None:
    check_kl(kl_to_standard_normal)


def of_averages(mean: Tensor, log_variance: Tensor) -> Tensor:
    """The paper's public code."""
    return kl_to_standard_normal(mean.mean(dim=1, keepdim=True), log_variance.mean(dim=1, keepdim=True))


def reversed_kl(mean: Tensor, log_variance: Tensor) -> Tensor:
    return ((1 + mean**2) / log_variance.exp() - 1 + log_variance).sum(dim=1) / 2


def deviation_for_variance(mean: Tensor, log_variance: Tensor) -> Tensor:
    return kl_to_standard_normal(mean, 2 * log_variance)


@pytest.mark.parametrize("twin", [of_averages, reversed_kl, deviation_for_variance], ids=lambda f: f.__name__)
def test_another_kl_would_be_noticed(twin: Callable[[Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(AssertionError):
        check_kl(twin)


def test_codes_are_drawn_with_their_variance() -> None:
    """40,000 draws: mean and variance within five standard errors; gradients reach both."""
    torch.manual_seed(0)
    mean = torch.full((40_000, 1), 1.5, requires_grad=True)
    log_variance = torch.full((40_000, 1), math.log(0.25), requires_grad=True)
    code = noisy_code(mean, log_variance)
    assert code.mean().item() == pytest.approx(1.5, abs=5 * 0.5 / 200)
    assert code.var().item() == pytest.approx(0.25, abs=5 * 0.25 * math.sqrt(2) / 200)
    code.sum().backward()
    assert mean.grad is not None
    assert log_variance.grad is not None
    torch.testing.assert_close(log_variance.grad, (code.detach() - 1.5) / 2)
