"""Per-token estimators of KL(policy || reference) from samples of the policy (J. Schulman, "Approximating KL")."""

import torch
from torch import Tensor


def kl_k1(logprobs_policy: Tensor, logprobs_reference: Tensor) -> Tensor:
    """Return the unbiased estimator of either sign: k1 = log π(a) - log π_ref(a), a ~ π.

    Its sum over a sequence is the one to put into the reward: the gradient of the expected sum is that of the true
    sequence KL. Σ_a π(a) k1(a) = KL(π || π_ref) exactly.

    Args:
        logprobs_policy, logprobs_reference: any one shape, nats, of the same sampled tokens.

    Returns:
        same shape, nats per token.

    >>> kl_k1(torch.tensor([-1.0]), torch.tensor([-1.5]))
    tensor([0.5000])
    """
    return logprobs_policy - logprobs_reference


def kl_k2(logprobs_policy: Tensor, logprobs_reference: Tensor) -> Tensor:
    """Return half the squared log-ratio: k2 = ½ (log π(a) - log π_ref(a))², a ~ π. Biased as a value, right as a loss.

    Its gradient, (log π - log π_ref) ∇ log π, has the gradient of KL(π || π_ref) as its mean; k3's has not.

    >>> kl_k2(torch.tensor([-1.0]), torch.tensor([-2.0]))
    tensor([0.5000])
    """
    return 0.5 * (logprobs_policy - logprobs_reference) ** 2


def kl_k3(logprobs_policy: Tensor, logprobs_reference: Tensor) -> Tensor:
    """Return the unbiased estimator that is never negative: k3 = r - 1 - log r, r = π_ref(a) / π(a), a ~ π.

    A good number to log (small variance near r = 1). Not for use inside the reward: being non-negative token by
    token, it biases the reward's gradient.

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0]))
    tensor([0.])
    """
    log_ratio = logprobs_reference - logprobs_policy
    return torch.expm1(log_ratio) - log_ratio


def adapted_kl_coef(kl_coef: float, kl: float, *, target: float, horizon: int, episodes: int) -> float:
    """Adapt the weight of the KL by a proportional controller.

        β ← β (1 + clip(KL / target - 1, ±0.2) · min(episodes / horizon, 1))

    (arXiv:1909.08593 section 2.2, without the bound.) KL on target: β stays. KL at twice the target or more, and as many
    episodes as the horizon: β grows by a fifth. More it never does at once: it would end below 0.

    Args:
        kl, target: nats an answer.
        episodes: answers since the last call.

    >>> round(adapted_kl_coef(0.1, 12.0, target=6.0, horizon=10_000, episodes=1_000), 4)
    0.102
    >>> round(adapted_kl_coef(0.1, 0.0, target=6.0, horizon=64, episodes=512), 4)
    0.08
    """
    error = min(0.2, max(-0.2, kl / target - 1))
    return kl_coef * (1 + error * min(episodes / horizon, 1.0))
