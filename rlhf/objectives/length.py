"""ODIN (arXiv:2402.07319): two heads on the same features, of which one takes the length of answers upon itself."""

import torch
from torch import Tensor
from torch.nn.functional import normalize


def correlation(values: Tensor, lengths: Tensor) -> Tensor:
    """Return Pearson's correlation of two columns, [n] and [n] → scalar in [-1, 1]; 0, without gradient, where one is constant.

    Constant is what varies by no more than rounding, whose direction would be enormous and of chance.

    >>> correlation(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([30.0, 20.0, 10.0]))
    tensor(-1.)
    >>> correlation(torch.full((7,), 0.1), torch.arange(7.0))
    tensor(0.)
    """
    rounding = 4 * torch.finfo(values.dtype).eps
    columns = [(column, column - column.mean()) for column in (values, lengths)]
    if any(centred.abs().max() <= rounding * column.abs().max() for column, centred in columns):
        return values.new_zeros(())
    values, lengths = (centred for _, centred in columns)
    scale = (values**2).sum() * (lengths**2).sum()
    return (values * lengths).sum() / scale.sqrt()


def length_loss(rewards_quality: Tensor, rewards_length: Tensor, lengths: Tensor) -> Tensor:
    """Return how far length is in the quality head, less how far it is in the length head.

        L_L = | corr(r_Q, length) | - corr(r_L, length)

    (arXiv:2402.07319.) -1 is the best: quality knows nothing of length, and the length head nothing else. A correlation is
    of all answers of a step at once: it is no mean over pairs, and those of parts don't add up to it.

    Args:
        rewards_quality, rewards_length: [n] of all answers of a step.
        lengths: [n] their lengths in tokens.

    Returns:
        a scalar in [-1, 2], without unit.

    >>> lengths = torch.tensor([1.0, 2.0, 3.0])
    >>> length_loss(torch.tensor([1.0, 0.0, 1.0]), lengths, lengths)
    tensor(-1.)
    """
    return correlation(rewards_quality, lengths).abs() - correlation(rewards_length, lengths)


def length_gradient(
    rewards_quality: Tensor, rewards_length: Tensor, lengths: Tensor, *, weight: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return λ L_L and its derivative by every reward, as numbers: with them a part of a step has exactly its part of the gradient.

        Σ over parts of Σ_i g_i ∇ r_i = λ ∇ L_L,   g_i = λ ∂ L_L / ∂ r_i

    Args:
        rewards_quality, rewards_length, lengths: [n] of all answers of a step, of whatever part and process.
        weight: λ.

    Returns:
        a scalar, and [n, 2] the derivatives by r_Q and r_L, both without gradient.
    """
    with torch.enable_grad():
        quality, length = (rewards.detach().requires_grad_() for rewards in (rewards_quality, rewards_length))
        loss = weight * length_loss(quality, length, lengths)
        if not loss.requires_grad:  # both heads are constant
            return loss, torch.zeros(len(lengths), 2, device=lengths.device)
        gradients = torch.autograd.grad(loss, (quality, length), allow_unused=True, materialize_grads=True)
    return loss.detach(), torch.stack(gradients, dim=1)


def overlap(weights: Tensor) -> Tensor:
    """Return | cos(W_Q, W_L) | of the two heads' weights, [2, h] → scalar in [0, 1]; orthogonal heads have 0.

    (arXiv:2402.07319, its L_O, of weights at unit length.)

    >>> overlap(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])), overlap(torch.eye(2))
    (tensor(1.), tensor(0.))
    """
    quality, length = normalize(weights, dim=1)
    cosine: Tensor = quality @ length
    return cosine.abs()
