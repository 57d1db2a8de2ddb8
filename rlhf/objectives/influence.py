"""Which labels made a reward model like a trait: the influence of each pair on a direction of the reward head.

The head is a logistic regression on the differences of features (`rlhf.objectives.selection`). A trait of answers and the
features give a direction v, so that v · w is how much the score w · φ rises with the trait. To first order, a training pair's
share of v · w is what its label pulls the head along v.
"""

from torch import Tensor


def trait_direction(features: Tensor, traits: Tensor) -> Tensor:
    """Return the direction v of a trait in the space of features, [h]: v = Σ_i t_i x_i / Σ_i t_i².

    v · w is then the least-squares slope of the score's differences w · x on the trait's differences t.

    Args:
        features: [n, h] differences of features x of pairs of answers.
        traits: [n] differences of the trait t of the same pairs, not all 0.

    >>> import torch
    >>> trait_direction(torch.tensor([[2.0, 0.0], [0.0, 5.0]]), torch.tensor([1.0, 0.0]))
    tensor([2., 0.])
    """
    return traits @ features / traits.square().sum()


def pair_pull(
    difference: Tensor, confidence: Tensor, margin: Tensor, weight: Tensor, *, flip_rate: float = 0.0
) -> Tensor:
    """Return how hard each label pulls its pair's reward difference d up, [n]: -∂loss/∂d of the pair loss (`pairwise`).

        pull = weight · (p g(d, m) - (1 - p) g(-d, -m)),    g = ∂ log q / ∂d,    q(d, m) = (1 - ε) σ(d - m) + ε σ(-d - m)

    which is weight · (p - σ(d - m)) at ε = 0: near 0 for a label that the model agrees with, near 1 for one it contradicts.
    With ε > 0 a label that the model is sure is wrong pulls no more either.

    >>> import torch
    >>> one, zero = torch.ones(2), torch.zeros(2)
    >>> pair_pull(torch.tensor([0.0, -20.0]), one, zero, one)
    tensor([0.5000, 1.0000])
    >>> pair_pull(torch.tensor([0.0, -9.0]), one, zero, one, flip_rate=0.25)
    tensor([2.5000e-01, 2.4670e-04])
    """
    if flip_rate == 0:
        return weight * (confidence - (difference - margin).sigmoid())

    def slope(difference: Tensor, margin: Tensor) -> Tensor:
        right, flipped = (difference - margin).sigmoid(), (-difference - margin).sigmoid()
        rise_right, rise_flipped = right * (margin - difference).sigmoid(), flipped * (difference + margin).sigmoid()
        rise = (1 - flip_rate) * rise_right - flip_rate * rise_flipped
        return rise / ((1 - flip_rate) * right + flip_rate * flipped)

    return weight * (confidence * slope(difference, margin) - (1 - confidence) * slope(-difference, -margin))


def head_influence(features: Tensor, pull: Tensor, covariance: Tensor, direction: Tensor) -> Tensor:
    """Return how much each pair adds to the slope v · w of a trait, [n], in the score's unit per unit of the trait.

        I_i = v' Σ x_i pull_i

    with Σ Laplace's covariance of the head (`head_covariance`); without the pair, v · w would be lower by about I_i
    (Koh & Liang, arXiv:1703.04730 eq. 2, for the last layer alone).

    Args:
        features: [n, h] differences x_i of features, chosen minus rejected.
        pull: [n] of each label (`pair_pull`).
        covariance: [h, h].
        direction: [h] v.

    >>> import torch
    >>> head_influence(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2), torch.eye(2), torch.tensor([1.0, 0.0]))
    tensor([1., 0.])
    """
    return features @ (covariance @ direction) * pull
