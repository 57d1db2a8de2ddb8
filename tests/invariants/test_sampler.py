"""Sampler true: quiet over hundreds of true rollouts and over policies that are nearly sure, loud for every other sampler."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import gamma
from torch import Tensor

from rlhf.invariants.checks import CheckBook, InvariantError
from rlhf.invariants.sampler import (
    MomentSums,
    check_counts,
    check_sampler,
    count_sums,
    halves_of_rows,
    sampled_counts,
    sampler_bounds,
    sampler_z,
    surprise_sums,
)
from rlhf.models.logprobs import ExpectedCounts, token_logprobs, token_surprise

ROLLOUTS, ANSWERS, LENGTH, VOCABULARY = 400, 16, 12, 300


def sums_of(logits: Tensor, tokens: Tensor) -> MomentSums:
    """Sums of tokens [b, r] under the policy with these logits [b, r + 1, v]."""
    surprise = token_surprise(logits, tokens.shape[1])
    sums = surprise_sums(token_logprobs(logits, tokens), *surprise[:3], torch.ones_like(tokens))
    return MomentSums(*sums.tolist())


def drawn(logits: Tensor, generator: torch.Generator) -> Tensor:
    rows = torch.softmax(logits[:, :-1].double(), dim=-1).flatten(0, 1)
    return torch.multinomial(rows, 1, generator=generator).view(len(logits), -1)


def test_hundreds_of_true_rollouts_are_standard_normal() -> None:
    generator = torch.Generator().manual_seed(0)
    z = []
    for _ in range(ROLLOUTS):
        logits = 3 * torch.randn(ANSWERS, LENGTH + 1, VOCABULARY, generator=generator)
        sums = sums_of(logits, drawn(logits, generator))
        z.append(sampler_z(sums))
        assert check_sampler(sums, tests=2 * ROLLOUTS).held
    assert np.mean(z) == pytest.approx(0, abs=4 / math.sqrt(ROLLOUTS))
    assert np.std(z) == pytest.approx(1, abs=0.12)
    for share in (0.05, 0.25, 0.75, 0.95):
        assert np.mean(np.array(z) < NormalDist().inv_cdf(share)) == pytest.approx(share, abs=0.07)


def narrower(logits: Tensor, keep: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits of a sampler that keeps some tokens only, by their probabilities."""
    return logits.masked_fill(~keep(torch.softmax(logits, dim=-1)), -math.inf)


def in_top_p(probabilities: Tensor, share: float = 0.9) -> Tensor:
    ordered, places = probabilities.sort(dim=-1, descending=True)
    kept = ordered.cumsum(dim=-1) - ordered < share
    return torch.zeros_like(kept).scatter(-1, places, kept)


SAMPLERS: dict[str, Callable[[Tensor], Tensor]] = {
    "temperature 0.9": lambda logits: logits / 0.9,
    "temperature 1.1": lambda logits: logits / 1.1,
    "top-p 0.9": lambda logits: narrower(logits, in_top_p),
    "min-p 0.05": lambda logits: narrower(logits, lambda p: p >= 0.05 * p.amax(dim=-1, keepdim=True)),
    "top-k 50": lambda logits: narrower(logits, lambda p: p >= p.topk(50, dim=-1).values[..., -1:]),
    "suppressed tokens": lambda logits: narrower(logits, lambda p: torch.arange(VOCABULARY).expand_as(p) % 3 > 0),
    "other weights": lambda logits: logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(9)),
}


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_other_sampler_is_stopped_with_its_causes(name: str) -> None:
    """By 64 answers of 48 tokens, the size of a rollout."""
    generator = torch.Generator().manual_seed(1)
    logits = 3 * torch.randn(64, 49, VOCABULARY, generator=generator)
    sums = sums_of(logits, drawn(SAMPLERS[name](logits), generator))
    with pytest.raises(InvariantError, match=r"'sampler true' failed: .* temperature .* top-k.* engine .* dropout"):
        CheckBook().require(check_sampler(sums, tests=100))


@pytest.mark.parametrize("scale", [1.0, 6.0, 15.0, 25.0, 40.0])
def test_a_policy_that_is_nearly_sure_of_few_tokens_raises_no_alarm(scale: float) -> None:
    """Few sure tokens make z skewed; 10,000 rollouts each at one false alarm in a thousand: 10 or fewer are expected a side."""
    generator = np.random.default_rng(int(scale))
    tokens, rollouts = 16, 10_000
    logits = generator.normal(size=(tokens, 100)) * scale
    log_p = logits - logits.max(1, keepdims=True)
    log_p -= np.log(np.exp(log_p).sum(1, keepdims=True))
    p = np.exp(log_p)
    deviation = -log_p - (p * -log_p).sum(1, keepdims=True)
    variance, third = (p * deviation**2).sum(), (p * deviation**3).sum()
    total = sum(
        deviation[t, generator.choice(100, size=rollouts, p=p[t] / p[t].sum())] for t in range(tokens)
    ) / math.sqrt(variance)
    low, high = sampler_bounds(MomentSums(0.0, variance, third), tests=1, false_alarms=2e-3)
    assert low < 0 < high
    assert np.sum(total < low) <= 24
    assert np.sum(total > high) <= 24


def counts_of(logits: Tensor, tokens: Tensor, mask: Tensor | None = None) -> MomentSums:
    """Sums of the second statistic of tokens [b, r] under the policy with these logits [b, r + 1, v]."""
    mask = torch.ones_like(tokens) if mask is None else mask
    expected = torch.zeros(2, logits.shape[-1], dtype=torch.float64)
    token_surprise(logits, tokens.shape[1], expected=ExpectedCounts(halves_of_rows(mask), expected))
    return count_sums(sampled_counts(tokens, mask, logits.shape[-1]), expected)


def test_counts_are_those_of_a_loop_over_the_tokens() -> None:
    generator = torch.Generator().manual_seed(3)
    logits, tokens = torch.randn(5, 4, 7, generator=generator), torch.randint(7, (5, 3), generator=generator)
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 1], [1, 0, 0]])
    excess, expected = np.zeros((2, 7)), np.zeros((2, 7))
    for row, place in mask.nonzero().tolist():
        expected[row % 2] += torch.softmax(logits[row, place], dim=-1).double().numpy()
        excess[row % 2, tokens[row, place]] += 1
    excess -= expected
    even, odd = excess
    wanted = (
        (even * odd).sum(),
        (even**2 * expected[1]).sum(),
        (even**3 * expected[1]).sum(),
        (abs(even) * expected[1]).sum(),
    )
    assert counts_of(logits, tokens, mask) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.3, 1.0, 3.0, 6.0])
def test_counts_of_true_rollouts_raise_no_alarm(scale: float) -> None:
    """400 rollouts of policies between uniform and nearly sure; one false alarm in a hundred is asked for: 4 expected, 12 allowed.

    Twelve or more of 400 happen once in a thousand. The variance is bounded from above, so z is no wider than the normal.
    """
    generator = torch.Generator().manual_seed(int(10 * scale))
    z, beyond = [], 0
    for _ in range(ROLLOUTS):
        logits = scale * torch.randn(ANSWERS, LENGTH + 1, VOCABULARY, generator=generator)
        sums = counts_of(logits, drawn(logits, generator))
        z.append(sampler_z(sums))
        beyond += z[-1] > sampler_bounds(sums, tests=1, false_alarms=2e-2)[1]
    assert np.mean(z) == pytest.approx(0, abs=4 / math.sqrt(ROLLOUTS))
    assert np.std(z) < 1.15
    assert beyond < 12


@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0])
def test_suppressed_tokens_of_an_almost_uniform_policy_are_counted(scale: float) -> None:
    """The surprise cannot tell: what is left out is as likely as what is taken."""
    generator = torch.Generator().manual_seed(1)
    logits = scale * torch.randn(64, 49, VOCABULARY, generator=generator)
    left = torch.arange(VOCABULARY) < 111
    tokens = drawn(logits.masked_fill(left, -math.inf), generator)
    if scale < 1:
        assert check_sampler(sums_of(logits, tokens), tests=100).held
    check = check_counts(counts_of(logits, tokens), tests=100)
    assert check.statistic > 10
    with pytest.raises(InvariantError, match=r"'token counts true' failed: .* suppressed .* repetition"):
        CheckBook().require(check)


def test_a_penalty_on_repetition_is_counted() -> None:
    """Every token is used once an answer, by a policy that would take its favourite one five times."""
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(VOCABULARY, generator=generator).expand(64, 49, -1)
    once = torch.multinomial(torch.softmax(logits[:, 0], dim=-1), 48, generator=generator)
    assert not check_counts(counts_of(logits, once), tests=100).held


def test_bounds_follow_the_number_of_looks_the_skewness_and_the_rounding() -> None:
    plain = MomentSums(0.0, 100.0, 0.0, size=1.0)
    for tests in (1, 2, 400):
        expected = NormalDist().inv_cdf(1 - 1e-4 / (2 * tests))
        assert sampler_bounds(plain, tests=tests) == pytest.approx((-expected, expected))
    low, high = sampler_bounds(MomentSums(0.0, 1.0, 0.5), tests=1)
    shape = 4 / 0.5**2
    assert high == pytest.approx((gamma.isf(5e-5, shape) - shape) / math.sqrt(shape))
    assert sampler_bounds(MomentSums(0.0, 1.0, -0.5), tests=1) == pytest.approx((-high, -low)), "reflected"
    for third in (1.5, -80.0):
        low, high = sampler_bounds(MomentSums(0.0, 1.0, third), tests=1)
        assert 1 / (1 + high**2) == pytest.approx(5e-5), "Cantelli"
        assert low == -high
    wider = sampler_bounds(plain, tests=1, rounding=5.0)
    assert wider == pytest.approx(
        tuple(x + sign * 0.5 for x, sign in zip(sampler_bounds(plain, tests=1), (-1, 1), strict=True))
    )
    assert check_sampler(MomentSums(0.0, 0.0, 0.0), tests=1).held, "a policy that is certain of every token"
    assert not check_sampler(MomentSums(math.nan, 1.0, 0.0), tests=1).held


def test_only_sampled_tokens_count() -> None:
    logits = torch.randn(2, 4, 9)
    tokens = torch.randint(9, (2, 3))
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    columns: Any = (token_logprobs(logits, tokens), *token_surprise(logits, 3)[:3])
    poisoned = [torch.where(mask.bool(), column, torch.full_like(column, math.nan)) for column in columns]
    torch.testing.assert_close(surprise_sums(*poisoned, mask), surprise_sums(*columns, mask))
