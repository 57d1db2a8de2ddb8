"""Per-token estimators of KL(policy || reference) from samples of the policy (J. Schulman, "Approximating KL")."""

import torch
from torch import Tensor


def kl_k1(logprobs_policy: Tensor, logprobs_reference: Tensor) -> Tensor:
    """Unbiased estimator, of either sign: k1 = log π(a) - log π_ref(a), a ~ π.

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


def kl_k3(logprobs_policy: Tensor, logprobs_reference: Tensor) -> Tensor:
    """Unbiased estimator that is never negative: k3 = r - 1 - log r, r = π_ref(a) / π(a), a ~ π.

    A good number to log (small variance near r = 1). Not for use inside the reward: being non-negative token by
    token, it biases the reward's gradient.

    >>> kl_k3(torch.tensor([-1.0]), torch.tensor([-1.0]))
    tensor([0.])
    """
    log_ratio = logprobs_reference - logprobs_policy
    return torch.expm1(log_ratio) - log_ratio
