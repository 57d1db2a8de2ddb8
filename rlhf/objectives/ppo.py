"""The clipped losses of proximal policy optimisation, per token and unreduced, and the numbers that describe them."""

import torch
from torch import Tensor


def clipped_policy(
    logprobs: Tensor,
    logprobs_old: Tensor,
    advantages: Tensor,
    *,
    cliprange: float,
    cliprange_dual: float | None = None,
) -> Tensor:
    """Return the pessimistic surrogate loss: the worse of the plain and the clipped importance-weighted advantage.

        loss = max( -A ρ,  -A clip(ρ, 1 - ε, 1 + ε) ),    ρ = exp(log π - log π_old)

    ρ = 1 gives -A with gradient -A with respect to log π. Beyond the clip on the improving side the gradient is 0;
    on the other side it is not, so a token that went wrong is pulled back. Never below the unclipped loss. The
    log-ratio is clamped to ±20 (e^20 ≈ 5e8), which keeps the loss of a single extreme token finite.

    With a dual clip c > 1 the loss of a bad token (A < 0) is at most -A c: however probable it has become, one token
    can't dominate the step.

    Args:
        logprobs, logprobs_old, advantages: [b, t].
        cliprange: ε in (0, 1).
        cliprange_dual: c, or None for none (arXiv:1912.09729 eq. 5: 3).

    Returns:
        [b, t] unreduced.

    Reference: arXiv:1707.06347 eq. 7.

    >>> clipped_policy(torch.zeros(1), torch.zeros(1), torch.tensor([2.0]), cliprange=0.2)
    tensor([-2.])
    """
    ratio = torch.exp((logprobs - logprobs_old).clamp(-20.0, 20.0))
    clipped = ratio.clamp(1.0 - cliprange, 1.0 + cliprange)
    losses = torch.maximum(-advantages * ratio, -advantages * clipped)
    if cliprange_dual is None:
        return losses
    return torch.where(advantages < 0, torch.minimum(losses, -advantages * cliprange_dual), losses)


def truncated_importance(logprobs: Tensor, logprobs_sampler: Tensor, *, limit: float) -> Tensor:
    """Weigh tokens that another engine sampled: min(π / μ, C), without gradient.

    1 where the engine is the policy. Truncated from above alone, which bounds the variance and leaves a small bias.

    Args:
        logprobs: [b, t] of the policy that the engine should have been, nats.
        logprobs_sampler: [b, t] of the engine, μ.
        limit: C ≥ 1.

    Reference: truncated importance sampling (Ionides 2008), as verl's and TRL's correction for vLLM.

    >>> truncated_importance(torch.tensor([-1.0, -1.0]), torch.tensor([-1.0, -5.0]), limit=2.0)
    tensor([1., 2.])
    """
    weight: Tensor = (logprobs - logprobs_sampler).detach().exp().clamp(max=limit)
    return weight


def clipped_value(values: Tensor, values_old: Tensor, returns: Tensor, *, cliprange: float | None) -> Tensor:
    """Return the squared error of the value, where a step of more than `cliprange` away from the old value earns nothing.

        loss = ½ max( (V - R)²,  (clip(V, V_old ± c) - R)² )

    Args:
        values, values_old, returns: [b, t], score units.
        cliprange: c > 0 in score units, or None for the plain squared error.

    Returns:
        [b, t] unreduced, score units squared.

    Reference: details 17 of Huang et al. 2023; arXiv:2307.04964 keeps it in PPO-max.

    >>> clipped_value(torch.tensor([1.0]), torch.tensor([0.0]), torch.tensor([1.0]), cliprange=0.2)
    tensor([0.3200])
    """
    error = (values - returns) ** 2
    if cliprange is None:
        return 0.5 * error
    clipped = values_old + (values - values_old).clamp(-cliprange, cliprange)
    return 0.5 * torch.maximum(error, (clipped - returns) ** 2)


def clipped_share(logprobs: Tensor, logprobs_old: Tensor, *, cliprange: float) -> Tensor:
    """Mark with 1 where the ratio lies outside [1 - ε, 1 + ε], else 0; the masked mean is the clip fraction.

    >>> clipped_share(torch.tensor([0.0, 0.5]), torch.zeros(2), cliprange=0.2)
    tensor([0., 1.])
    """
    ratio = torch.exp(logprobs - logprobs_old)
    return ((ratio - 1.0).abs() > cliprange).to(logprobs.dtype)


def explained_variance(returns_variance: Tensor, residual_variance: Tensor) -> Tensor:
    """Return the share of the variance of the returns that the values explain: 1 - Var[R - V] / Var[R].

    1 is a perfect critic, 0 a constant one, below 0 a critic worse than a constant. 0 where the returns are constant.

    >>> explained_variance(torch.tensor(2.0), torch.tensor(0.5))
    tensor(0.7500)
    """
    constant = returns_variance <= 1e-12
    return torch.where(constant, torch.zeros_like(returns_variance), 1.0 - residual_variance / returns_variance)
