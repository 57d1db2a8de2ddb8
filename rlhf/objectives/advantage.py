"""From a score at the end of an answer to an advantage for each of its tokens."""

import torch
from torch import Tensor


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, *, kl_coef: float) -> Tensor:
    """Return the reward of each token: the KL penalty everywhere, the score at the last token of the answer.

        r_t = -β k1_t + [t is the last token] · score

    The row sum is score - β Σ_t k1_t. An answer without tokens gets no reward at all.

    Args:
        scores: [b] one score an answer.
        kl: [b, t] k1 of the sampled tokens, nats.
        mask: [b, t] 1 on the tokens of the answer (its end-of-sequence token included), right-padded.
        kl_coef: β ≥ 0, score units per nat.

    Returns:
        [b, t]; 0 outside the mask.

    Reference: arXiv:2203.02155 sec. 3.5; details 15 and 1 of Huang et al. 2023.

    >>> token_rewards(torch.tensor([2.0]), torch.tensor([[0.5, 1.0, 9.0]]), torch.tensor([[1, 1, 0]]), kl_coef=0.1)
    tensor([[-0.0500,  1.9000,  0.0000]])
    """
    mask = mask.to(scores.dtype)
    position = torch.arange(mask.shape[1], device=mask.device)
    is_last = (position == mask.sum(dim=1, keepdim=True) - 1) & mask.bool()
    penalty = torch.where(mask.bool(), -kl_coef * kl, torch.zeros_like(kl))
    return penalty + is_last * scores[:, None]


def generalized_advantage(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Estimate generalised advantages over one answer a row.

        δ_t = r_t + γ V_{t+1} - V_t,    V after the last token = 0
        A_t = Σ_k (γλ)^k δ_{t+k},       return_t = A_t + V_t

    λ = 0 gives the one-step error, λ = 1 the Monte-Carlo return minus the value. Padding changes nothing.

    Args:
        rewards: [b, t].
        values: [b, t] V(s_t), the value before token t was chosen, in score units.
        mask: [b, t] 1 on the answer's tokens, right-padded.
        gamma, lam: in [0, 1].

    Returns:
        advantages [b, t] and returns [b, t], 0 outside the mask.

    Reference: arXiv:1506.02438 eq. 16.

    >>> generalized_advantage(torch.tensor([[0.0, 1.0]]), torch.zeros(1, 2), torch.ones(1, 2), lam=0.5)[0]
    tensor([[0.5000, 1.0000]])
    """
    values = torch.where(mask.bool(), values, torch.zeros_like(values))
    rewards = torch.where(mask.bool(), rewards, torch.zeros_like(rewards))
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0]) if values.shape[1] else values.sum(dim=1)
    value_next = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * value_next - values[:, t]
        running = delta + gamma * lam * running
        value_next = values[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def nearest_line(values_variance: Tensor, returns_variance: Tensor, sum_variance: Tensor) -> Tensor:
    """Return the slope of the line that takes a critic's values nearest to the returns, in squared error, within [0, 1].

        a = Cov[V, R] / Var[V],    Cov[V, R] = ½ (Var[V + R] - Var[V] - Var[R])

    The line is a · V + (E[R] - a · E[V]). 1 is a critic on the scale of the returns; 0 one that knows nothing of them or is worse
    than a constant, in whose place stands the mean return. 0 where the values are constant.

    Args:
        values_variance, returns_variance, sum_variance: Var[V], Var[R] and Var[V + R] over the same tokens, score units squared;
            R the Monte-Carlo returns (λ = 1), which owe nothing to V.

    Reference: the coefficient of a control variate; Greensmith, Bartlett and Baxter, JMLR 5 (2004), on baselines and critics.

    >>> values, returns = torch.tensor([0.0, 2.0]), torch.tensor([5.0, 6.0])
    >>> nearest_line(*(x.var(correction=0) for x in (values, returns, values + returns)))
    tensor(0.5000)
    """
    covariance = 0.5 * (sum_variance - values_variance - returns_variance)
    slope = torch.where(values_variance <= 1e-12, torch.zeros_like(covariance), covariance / values_variance)
    return slope.clamp(0.0, 1.0)
