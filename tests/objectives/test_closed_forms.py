"""Every formula against a closed form, an enumeration, or the plain definition; never against itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.objectives.advantage import generalized_advantage, token_rewards
from rlhf.objectives.kl import kl_k1, kl_k2, kl_k3
from rlhf.objectives.masked import masked_sums, mean_and_variance, whiten
from rlhf.objectives.pairwise import bradley_terry, pair_loss
from rlhf.objectives.ppo import clipped_policy, clipped_share, clipped_value, explained_variance

D = torch.tensor([-30.0, -3.0, -0.5, 0.0, 0.5, 3.0, 30.0], dtype=torch.float64)
ZERO = torch.zeros_like(D)


# ---- Pairs ----


def test_bradley_terry_equals_binary_cross_entropy() -> None:
    expected = torch.nn.functional.binary_cross_entropy_with_logits(D, torch.ones_like(D), reduction="none")
    torch.testing.assert_close(bradley_terry(D, ZERO), expected)
    assert bradley_terry(ZERO, ZERO)[0].item() == pytest.approx(math.log(2))


def test_bradley_terry_antisymmetry_and_gradient() -> None:
    torch.testing.assert_close(bradley_terry(D, ZERO) - bradley_terry(-D, ZERO), -D)
    d = D.clone().requires_grad_()
    bradley_terry(d, ZERO).sum().backward()
    torch.testing.assert_close(d.grad, -torch.sigmoid(-D))
    assert d.grad[0].item() == pytest.approx(-1.0, abs=1e-9), "the worst pair teaches with full force"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extremes_stay_finite(dtype: torch.dtype) -> None:
    d = torch.tensor([-1e4, 1e4], dtype=dtype, requires_grad=True)
    loss = pair_loss(d, torch.zeros(2, dtype=dtype), margin=1.0, confidence=0.9)
    loss.sum().backward()
    assert torch.isfinite(loss).all()
    assert torch.isfinite(d.grad).all()


@pytest.mark.parametrize("confidence", [0.0, 0.2, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("margin", [-1.5, 0.0, 2.0])
def test_pair_loss_is_the_definition(confidence: float, margin: float) -> None:
    p = torch.sigmoid(D[1:-1] - margin)  # the ends would need more digits than the naive logarithm has
    expected = -confidence * torch.log(p) - (1 - confidence) * torch.log(1 - p)
    torch.testing.assert_close(pair_loss(D[1:-1], ZERO[1:-1], margin=margin, confidence=confidence), expected)


def test_minimum_lies_at_logit_plus_margin_with_the_entropy_as_value() -> None:
    confidence, margin = 0.8, 0.7
    best = math.log(confidence / (1 - confidence)) + margin
    d = torch.tensor([best], dtype=torch.float64, requires_grad=True)
    loss = pair_loss(d, torch.zeros(1, dtype=torch.float64), margin=margin, confidence=confidence)
    loss.sum().backward()
    entropy = -confidence * math.log(confidence) - (1 - confidence) * math.log(1 - confidence)
    assert loss.item() == pytest.approx(entropy)
    assert d.grad.item() == pytest.approx(0.0, abs=1e-12)


def test_flip_is_the_swapped_pair_with_the_margin_negated() -> None:
    m = torch.linspace(-1, 1, len(D), dtype=torch.float64)
    torch.testing.assert_close(pair_loss(D, ZERO, margin=m, confidence=0.0), pair_loss(ZERO, D, margin=-m))


@pytest.mark.parametrize("epsilon", [0.05, 0.25, 0.45])
def test_the_likelihood_of_flipped_labels(epsilon: float) -> None:
    """Against the definition; its bounds; its gradient, which lets go of labels that the model is sure are wrong."""
    q = (1 - epsilon) * torch.sigmoid(D) + epsilon * torch.sigmoid(-D)
    torch.testing.assert_close(pair_loss(D, ZERO, flip_rate=epsilon), -q.log())
    agree = (1 - epsilon) * torch.sigmoid(D - 0.5) + epsilon * torch.sigmoid(-D - 0.5)
    contradict = (1 - epsilon) * torch.sigmoid(0.5 - D) + epsilon * torch.sigmoid(D + 0.5)
    torch.testing.assert_close(
        pair_loss(D, ZERO, flip_rate=epsilon, confidence=0.3, weight=2.0, margin=0.5),
        -2 * (0.3 * agree.log() + 0.7 * contradict.log()),
    )
    torch.testing.assert_close(
        pair_loss(D, ZERO, flip_rate=epsilon, confidence=0.3, margin=0.5),
        pair_loss(ZERO, D, flip_rate=epsilon, confidence=0.7, margin=-0.5),
    )
    far = torch.tensor([-1e4, 1e4], dtype=torch.float64)
    assert pair_loss(far, torch.zeros(2), flip_rate=epsilon).tolist() == pytest.approx(
        [-math.log(epsilon), -math.log(1 - epsilon)]
    )
    d = D.clone().requires_grad_()
    pair_loss(d, ZERO, flip_rate=epsilon).sum().backward()
    s = torch.sigmoid(D)
    torch.testing.assert_close(d.grad, -(1 - 2 * epsilon) * s * (1 - s) / q)
    assert d.grad[0].abs() < 1e-10, "Bradley-Terry has 1 here"


@pytest.mark.parametrize("rate", [0.2, torch.tensor([0.2], dtype=torch.float64)])
def test_a_wide_margin_teaches_the_most_where_labels_may_be_flipped(rate: float | torch.Tensor) -> None:
    """A model that knows nothing yet must not take a margin of 6 for a label that it is sure is wrong.

    The gradient was -0.3, -0.119, -0.0014: of three right labels with margins and a wrong one without, the wrong one won.
    """
    found = []
    for margin in (0.0, 3.0, 6.0):
        d = torch.zeros(1, dtype=torch.float64, requires_grad=True)
        pair_loss(d, torch.zeros(1, dtype=torch.float64), margin=margin, flip_rate=rate).sum().backward()
        assert d.grad is not None
        found.append(d.grad.item())
    assert found == pytest.approx([-0.6 / (1 + math.exp(-margin)) for margin in (0.0, 3.0, 6.0)])


@pytest.mark.parametrize("epsilon", [0.5, 0.7])
def test_labels_that_say_nothing_or_the_opposite_have_no_likelihood(epsilon: float) -> None:
    with pytest.raises(AssertionError, match="a flip rate in"):
        pair_loss(D, ZERO, flip_rate=epsilon)


def test_every_label_may_have_a_rate_of_its_own() -> None:
    """As the one rate where all are equal; 1/2 teaches nothing; 1 - ε is the other label; certainty either way has no nan."""
    rates = torch.linspace(0.01, 0.99, len(D), dtype=torch.float64)
    q = (1 - rates) * torch.sigmoid(D) + rates * torch.sigmoid(-D)
    torch.testing.assert_close(pair_loss(D, ZERO, flip_rate=rates), -q.log())
    torch.testing.assert_close(pair_loss(D, ZERO, flip_rate=1 - rates), pair_loss(-D, ZERO, flip_rate=rates))
    torch.testing.assert_close(
        pair_loss(D, ZERO, flip_rate=torch.full_like(D, 0.25)), pair_loss(D, ZERO, flip_rate=0.25)
    )
    d = D.clone().requires_grad_()
    pair_loss(d, ZERO, flip_rate=torch.full_like(D, 0.5)).sum().backward()
    assert d.grad.abs().max() < 1e-15
    for rate, sign in ((0.0, 1), (1.0, -1)):
        d = D.clone().requires_grad_()
        pair_loss(d, ZERO, flip_rate=torch.full_like(D, rate)).sum().backward()
        torch.testing.assert_close(d.grad, -sign * torch.sigmoid(-sign * D))


def test_flipped_likelihood_has_its_minimum_at_the_truth() -> None:
    """Labels drawn by σ(d) and then flipped with ε: the expected loss is least at d; Bradley-Terry's is not."""
    truth, epsilon = 1.5, 0.2
    p_label = (1 - epsilon) / (1 + math.exp(-truth)) + epsilon / (1 + math.exp(truth))
    d = torch.linspace(-1, 4, 5001, dtype=torch.float64)
    zero = torch.zeros_like(d)
    expected = pair_loss(d, zero, confidence=p_label, flip_rate=epsilon)
    assert d[expected.argmin()].item() == pytest.approx(truth, abs=2e-3)
    assert d[pair_loss(d, zero, confidence=p_label).argmin()].item() < 1.0


def test_margin_reaches_the_gradient() -> None:
    """Eq. 6 as printed in arXiv:2401.06080 puts the margin outside the logarithm, where it would do nothing."""
    d = D.clone().requires_grad_()
    pair_loss(d, ZERO, margin=1.0).sum().backward()
    torch.testing.assert_close(d.grad, -torch.sigmoid(-(D - 1.0)))


PAIR_LOSSES = {
    "bradley_terry": bradley_terry,
    "margin": lambda c, r: pair_loss(c, r, margin=0.5),
    "soft": lambda c, r: pair_loss(c, r, confidence=0.7),
    "weighted": lambda c, r: pair_loss(c, r, weight=2.0, confidence=0.9, margin=-1.0),
}


@pytest.mark.parametrize("loss", PAIR_LOSSES.values(), ids=PAIR_LOSSES.keys())
@settings(derandomize=True, max_examples=30, deadline=None)
@given(values=st.lists(st.tuples(*[st.floats(-20, 20)] * 2), min_size=2, max_size=6), shift=st.floats(-5, 5))
def test_contract_of_a_pair_loss(loss: object, values: list[tuple[float, float]], shift: float) -> None:
    chosen, rejected = torch.tensor(values, dtype=torch.float64).T
    together = loss(chosen, rejected)
    assert together.shape == chosen.shape
    torch.testing.assert_close(
        together, torch.cat([loss(c[None], r[None]) for c, r in zip(chosen, rejected, strict=True)])
    )
    torch.testing.assert_close(loss(chosen + shift, rejected + shift), together)
    c, r = chosen.clone().requires_grad_(), rejected.clone().requires_grad_()
    loss(c, r).sum().backward()
    torch.testing.assert_close(c.grad, -r.grad)


# ---- KL ----


def test_kl_estimators_are_unbiased_by_enumeration() -> None:
    generator = torch.Generator().manual_seed(0)
    policy, reference = (torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(0) for _ in range(2))
    truth = (policy.exp() * (policy - reference)).sum()
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close((policy.exp() * estimator(policy, reference)).sum(), truth)
    assert (kl_k3(policy, reference) >= 0).all()
    assert not torch.isclose(truth, (reference.exp() * (reference - policy)).sum()), "the direction matters"


# ---- Rewards and advantages ----


def test_token_rewards_sum_and_place() -> None:
    kl = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    scores = torch.tensor([2.0, -1.0, 5.0], dtype=torch.float64)
    rewards = token_rewards(scores, kl, mask, kl_coef=0.3)
    torch.testing.assert_close(rewards[:2].sum(1), scores[:2] - 0.3 * (kl * mask)[:2].sum(1))
    assert rewards[1, 1].item() == pytest.approx(-1.0 - 0.3 * kl[1, 1].item()), "at the last token, not after it"
    assert (rewards[2] == 0).all(), "an empty answer earns nothing"
    padded = token_rewards(scores, torch.cat([kl, kl], 1), torch.cat([mask, mask * 0], 1), kl_coef=0.3)
    torch.testing.assert_close(padded[:, :5], rewards)


def naive_gae(rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float) -> torch.Tensor:
    """The double sum itself, one row without padding."""
    length = len(rewards)
    v = torch.cat([values, torch.zeros(1, dtype=values.dtype)])
    deltas = rewards + gamma * v[1:] - v[:-1]
    return torch.stack([sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, length)) for t in range(length)])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (1.0, 1.0), (1.0, 0.0)])
def test_gae_is_the_double_sum_and_ignores_padding(gamma: float, lam: float) -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(3, 6, generator=generator, dtype=torch.float64) for _ in range(2))
    lengths = [6, 3, 1]
    mask = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths])
    advantages, returns = generalized_advantage(rewards, values, mask, gamma=gamma, lam=lam)
    for row, n in enumerate(lengths):
        torch.testing.assert_close(advantages[row, :n], naive_gae(rewards[row, :n], values[row, :n], gamma, lam))
        assert (advantages[row, n:] == 0).all()
    torch.testing.assert_close(returns, advantages + values * mask)


def test_gae_with_lambda_one_is_monte_carlo() -> None:
    rewards, values = (
        torch.randn(2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64),
        torch.ones(2, 5, dtype=torch.float64),
    )
    _, returns = generalized_advantage(rewards, values, torch.ones(2, 5), lam=1.0)
    torch.testing.assert_close(returns, rewards.flip(1).cumsum(1).flip(1))


# ---- Masks and whitening ----


def test_whitening_has_mean_0_and_variance_1_under_the_mask() -> None:
    values = 5 + 3 * torch.randn(8, 9, generator=torch.Generator().manual_seed(0))
    mask = (torch.rand(8, 9, generator=torch.Generator().manual_seed(1)) > 0.4).long()
    values = torch.where(mask.bool(), values, torch.full_like(values, math.nan))
    white = whiten(values, mask)
    kept = white[mask.bool()]
    assert kept.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert kept.var(correction=0).item() == pytest.approx(1.0, abs=1e-5)
    assert (white[~mask.bool()] == 0).all()


def test_whitening_by_sums_of_parts_is_whitening_of_the_whole() -> None:
    """Two processes that add their sums see one mean and one variance."""
    values, mask = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4)
    mean, variance = mean_and_variance(masked_sums(values[:2], mask[:2]) + masked_sums(values[2:], mask[2:]))
    parts = torch.cat(
        [whiten(part, torch.ones_like(part), mean=mean, variance=variance) for part in (values[:2], values[2:])]
    )
    torch.testing.assert_close(parts, whiten(values, mask))


def test_a_constant_batch_whitens_to_zero() -> None:
    white = whiten(torch.full((4, 4), 123.456), torch.ones(4, 4))
    assert white.abs().max().item() < 1e-3
    assert torch.isfinite(whiten(torch.ones(1, 1), torch.ones(1, 1))).all()
    assert torch.isfinite(whiten(torch.ones(1, 1), torch.zeros(1, 1))).all()


# ---- PPO losses ----


def test_clipped_policy_values_and_gradients() -> None:
    logratio = torch.tensor([0.0, 0.5, 0.5, -0.5, -0.5], dtype=torch.float64, requires_grad=True)
    advantage = torch.tensor([2.0, 1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    loss = clipped_policy(logratio, torch.zeros(5, dtype=torch.float64), advantage, cliprange=0.2)
    up, down = math.exp(0.5), math.exp(-0.5)
    expected = torch.tensor([-2.0, -1.2, up, -down, 0.8], dtype=torch.float64)
    torch.testing.assert_close(loss.detach(), expected)
    assert (loss >= -advantage * logratio.exp() - 1e-12).all(), "never below the unclipped loss"
    loss.sum().backward()
    # No pull beyond the clip on the improving side, full pull back on the other.
    torch.testing.assert_close(logratio.grad, torch.tensor([-2.0, 0.0, up, -down, 0.0], dtype=torch.float64))


def test_clipped_value() -> None:
    value = torch.tensor([0.0, 1.0, -1.0], requires_grad=True)
    loss = clipped_value(value, torch.zeros(3), torch.ones(3), cliprange=0.2)
    torch.testing.assert_close(loss.detach(), torch.tensor([0.5, 0.5 * 0.8**2, 0.5 * 4.0]))
    loss.sum().backward()
    torch.testing.assert_close(value.grad, torch.tensor([-1.0, 0.0, -2.0]))
    torch.testing.assert_close(
        clipped_value(value, torch.zeros(3), torch.ones(3), cliprange=None), 0.5 * (value - 1) ** 2
    )


def test_the_value_clip_is_around_the_old_value() -> None:
    """Moving values, old values and returns together changes nothing; a step within the clip is never cut."""
    generator = torch.Generator().manual_seed(0)
    value, old, returns = torch.randn(3, 200, generator=generator, dtype=torch.float64)
    loss = clipped_value(value, old, returns, cliprange=0.2)
    torch.testing.assert_close(clipped_value(value + 7, old + 7, returns + 7, cliprange=0.2), loss)
    near = (value - old).abs() <= 0.2
    torch.testing.assert_close(loss[near], 0.5 * (value - returns)[near] ** 2)
    cut = 0.5 * torch.maximum((value - returns) ** 2, (old + 0.2 * (value - old).sign() - returns) ** 2)
    torch.testing.assert_close(loss[~near], cut[~near])
    assert 0 < near.sum() < 200


def test_k2_is_half_the_square_of_the_log_ratio() -> None:
    ratio = torch.tensor([-2.0, -0.5, 0.0, 3.0])
    torch.testing.assert_close(kl_k2(ratio - 1, torch.full((4,), -1.0)), torch.tensor([2.0, 0.125, 0.0, 4.5]))


@pytest.mark.parametrize("advantage", [-3.0, -0.5, 0.0, 0.5, 3.0])
def test_a_dual_clip_bounds_the_loss_of_bad_tokens_and_leaves_good_ones(advantage: float) -> None:
    ratios = torch.tensor([0.1, 0.9, 1.0, 1.1, 5.0, 50.0], dtype=torch.float64)
    old, advantages = torch.zeros_like(ratios), torch.full_like(ratios, advantage)
    plain = clipped_policy(ratios.log(), old, advantages, cliprange=0.2)
    dual = clipped_policy(ratios.log(), old, advantages, cliprange=0.2, cliprange_dual=3.0)
    torch.testing.assert_close(dual, plain.clamp(max=-3 * advantage) if advantage < 0 else plain)


def test_clip_share_and_explained_variance() -> None:
    share = clipped_share(torch.tensor([0.0, 0.1, 0.3, -0.3]), torch.zeros(4), cliprange=0.2)
    assert share.tolist() == [0.0, 0.0, 1.0, 1.0]
    assert explained_variance(torch.tensor(4.0), torch.tensor(1.0)).item() == 0.75
    assert explained_variance(torch.tensor(0.0), torch.tensor(1.0)).item() == 0.0
    for scale in (1e-6, 1e6):
        share = explained_variance(torch.tensor(4.0 * scale), torch.tensor(1.0 * scale))
        assert share.item() == pytest.approx(0.75), "in whatever unit rewards are"
