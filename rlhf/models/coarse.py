"""Trained weights of 16 bits, in which steps of training are rounded away."""

import torch
from torch import nn


@torch.no_grad()
def coarse_weights(whose: str, network: nn.Module, learning_rate: float) -> str | None:
    """Return a sentence where most of a network's trained weights have 16 bits, in which steps of the learning rate are lost.

    AdamW moves a weight by about the learning rate. A 16-bit weight w takes that only if it is more than half of the distance to
    the next number, about 2⁻⁹ |w| in bfloat16: the root mean square of the weights stands for w.

    >>> layer = nn.Linear(4, 4).bfloat16()
    >>> coarse_weights("sft: the", layer, 1e-5)[:43], coarse_weights("sft: the", layer, 0.1)
    ('sft: the trained weights are bfloat16, in w', None)
    """
    trained = mostly_16_bits(network)
    if trained is None:
        return None
    count, dtype = sum(p.numel() for p in trained), trained[0].dtype
    size = (sum(p.float().square().sum().item() for p in trained) / count) ** 0.5
    if learning_rate > size * torch.finfo(dtype).eps / 4:
        return None
    return (
        f"{whose} trained weights are {str(dtype).removeprefix('torch.')}, in which most steps of the size of learning_rate="
        f"{learning_rate:g} are rounded away, so hardly anything is learnt. Load them in float32; `bf16: true` computes in "
        "bfloat16 all the same."
    )


def mostly_16_bits(network: nn.Module) -> list[nn.Parameter] | None:
    """Return the trained weights of 16 bits where they are most of a network's trained weights; else None."""
    every = [p for p in network.parameters() if p.requires_grad and p.is_floating_point()]
    trained = [p for p in every if p.itemsize == 2]
    return trained if 2 * sum(p.numel() for p in trained) > sum(p.numel() for p in every) else None
