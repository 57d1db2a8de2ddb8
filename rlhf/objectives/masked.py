"""Sums, moments and whitening under a mask, built so that several processes can share one mean and one variance."""

import torch
from torch import Tensor


def masked_sums(values: Tensor, mask: Tensor) -> Tensor:
    """Return count, sum and sum of squares of the entries under the mask, in float64; sums of ranks add up.

    Returns:
        [3] float64: count, Σx, Σx².

    >>> masked_sums(torch.tensor([1.0, 3.0, 9.0]), torch.tensor([1, 1, 0]))
    tensor([ 2.,  4., 10.], dtype=torch.float64)
    """
    kept = torch.where(mask.bool(), values, torch.zeros_like(values)).double()
    return torch.stack([mask.sum().double(), kept.sum(), (kept * kept).sum()])


def mean_and_variance(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and population variance (1/n) from `masked_sums`, possibly added up over processes.

    >>> mean_and_variance(torch.tensor([2.0, 4.0, 10.0], dtype=torch.float64))
    (tensor(2., dtype=torch.float64), tensor(1., dtype=torch.float64))
    """
    count = sums[0].clamp(min=1)
    mean = sums[1] / count
    variance = (sums[2] / count - mean * mean).clamp(min=0)
    return mean, variance


def whiten(
    values: Tensor, mask: Tensor, *, mean: Tensor | None = None, variance: Tensor | None = None, epsilon: float = 1e-8
) -> Tensor:
    """Shift and scale so that the entries under the mask have mean 0 and variance 1.

        whitened = (x - mean) / sqrt(variance + ε)

    Entries outside the mask become 0. A constant row becomes 0 (ε keeps the division finite), so equal advantages
    give no gradient. Whitening is invariant to x → a·x + b with a > 0 (up to ε).

    Args:
        values: any shape.
        mask: same shape, 0 or 1.
        mean, variance: moments over all processes; computed from `values` where absent.

    Reference: arXiv:2403.17031, detail 15 (advantages are whitened over the batch, population variance).

    >>> whiten(torch.tensor([1.0, 3.0, 7.0]), torch.tensor([1, 1, 0]))
    tensor([-1.,  1.,  0.])
    """
    if mean is None or variance is None:
        mean, variance = mean_and_variance(masked_sums(values, mask))
    # Differences from a constant batch are rounding noise: 1e-8 of the mean's square is below float32 resolution.
    noise = 1e-12 * mean * mean
    scaled = (values.double() - mean) / torch.sqrt(variance + noise + epsilon)
    return torch.where(mask.bool(), scaled, torch.zeros_like(scaled)).to(values.dtype)
