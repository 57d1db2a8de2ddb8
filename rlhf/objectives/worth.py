"""What a label is worth when some are wrong, in clean labels: two answers, by how sure the order of a pair is.

A share ε of the labels is flipped at random. Where the order of a pair is sure, a clean label says one bit, and a noisy one what
a binary symmetric channel lets through:

    1 - H(ε),    H(ε) = -ε log2 ε - (1 - ε) log2 (1 - ε)

Where the two answers are about as good, q = ε + (1 - 2ε) σ(d) is the probability of the label, d the reward difference, and
Fisher's information about d at d = 0 is that of a clean label times

    (∂q/∂d)² / (q (1 - q)) / σ'(0) = (1 - 2ε)²

The first is the smaller one. At ε = 1/4 they are 0.19 and 0.25: 6,000 such labels are worth 1,132 to 1,500 clean ones.
"""

import math


def worth_on_sure_pairs(flip_rate: float) -> float:
    """Return how many clean labels a label is worth where pairs have a sure order: 1 - H(ε), the capacity of the channel.

    Args:
        flip_rate: ε in [0, 0.5].

    >>> round(worth_on_sure_pairs(0.25), 4), worth_on_sure_pairs(0.0), worth_on_sure_pairs(0.5)
    (0.1887, 1.0, 0.0)
    """
    return 1.0 + sum(share * math.log2(share) for share in (flip_rate, 1 - flip_rate) if share > 0)


def worth_on_close_pairs(flip_rate: float) -> float:
    """Return how many clean labels a label is worth where the two answers are about as good: (1 - 2ε)².

    Args:
        flip_rate: ε in [0, 0.5].

    >>> worth_on_close_pairs(0.25), worth_on_close_pairs(0.0), worth_on_close_pairs(0.5)
    (0.25, 1.0, 0.0)
    """
    return (1 - 2 * flip_rate) ** 2
