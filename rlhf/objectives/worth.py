"""What labels are worth when some are wrong: Fisher's information about the reward difference that they label.

A pair whose reward difference is d is labelled "chosen is better" with probability q = ε + (1 - 2ε) σ(d), where a share ε of the
labels is flipped at random. What one label says about d is then

    I(d, ε) = (∂q/∂d)² / (q (1 - q)) = (1 - 2ε)² σ'(d)² / (q (1 - q)),    σ'(d) = σ(d) (1 - σ(d))

With ε = 0 it is σ'(d). Near d = 0 a flipped label is worth (1 - 2ε)² of a clean one, a quarter at ε = 1/4; on pairs with a sure
order it is worth less, since there flips are most of what is seen.
"""

from torch import Tensor


def label_information(difference: Tensor, flip_rate: float) -> Tensor:
    """Return what a label says about each reward difference, [n], per nat squared: I(d, ε).

    Args:
        difference: [n] d, nats.
        flip_rate: ε in [0, 0.5].

    >>> import torch
    >>> label_information(torch.zeros(1), 0.0), label_information(torch.zeros(1), 0.25)
    (tensor([0.2500]), tensor([0.0625]))
    """
    sure = difference.sigmoid()
    slope = sure * (1 - sure)
    seen = flip_rate + (1 - 2 * flip_rate) * sure
    return (1 - 2 * flip_rate) ** 2 * slope.square() / (seen * (1 - seen)).clamp(min=1e-12)


def clean_equivalent(difference: Tensor, flip_rate: float) -> float:
    """Return how many clean labels on such pairs say as much as these labels do: Σ_i I(d_i, ε) / mean_i I(d_i, 0).

    It is n for clean labels, n (1 - 2ε)² on pairs near 0, and 0 for coins.

    Args:
        difference: [n] d of the labelled pairs, nats.
        flip_rate: ε in [0, 0.5].

    >>> import torch
    >>> clean_equivalent(torch.zeros(6000), 0.25)
    1500.0
    """
    whole = label_information(difference.double(), flip_rate).sum()
    return float(whole / label_information(difference.double(), 0.0).mean())
