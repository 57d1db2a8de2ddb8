"""InfoRM (arXiv:2402.09345): a reward that is read from a noisy code of the answer, and pays for what the code says."""

import torch
from torch import Tensor


def kl_to_standard_normal(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Return how much a code says of an answer: the KL of N(μ, diag σ²) from N(0, I).

        KL = ½ Σ_i (μ_i² + σ_i² - 1 - log σ_i²)

    (arXiv:2402.09345.) It is the sum over the code's dimensions, which the paper's public code does not take: that one
    averages μ and log σ² over them first, so opposite means cancel. A code N(0, I) says nothing: 0.

    Args:
        mean, log_variance: [n, d] μ and log σ².

    Returns:
        [n] nats, ≥ 0.

    >>> kl_to_standard_normal(torch.tensor([[0.0, 0.0], [1.0, -1.0]]), torch.zeros(2, 2))
    tensor([0., 1.])
    """
    return (mean**2 + log_variance.exp() - 1 - log_variance).sum(dim=-1) / 2


def noisy_code(mean: Tensor, log_variance: Tensor) -> Tensor:
    """Draw a code from N(μ, diag σ²) so that gradients reach both: z = μ + σ ε, [n, d]."""
    return mean + (log_variance / 2).exp() * torch.randn_like(mean)
