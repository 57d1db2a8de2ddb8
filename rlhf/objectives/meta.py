"""MetaRM's meta-objective (arXiv:2405.00438): how well rewards tell apart the answers that today's policy gives."""

import torch
from torch import Tensor


def reward_spread(rewards: Tensor) -> Tensor:
    """Return the difference loss J of MetaRM.

        J = (2 / k²) Σ_{i<j} σ(|r_i - r_j|)

    (arXiv:2405.00438 eq. 4; the normaliser is the paper's, so J is (k - 1) / k of the mean over pairs.) All rewards alike:
    (k - 1) / (2k), and its gradient is exactly 0 there. Shifts of all rewards and their order change nothing.

    Args:
        rewards: [m, k] of k answers to each of m prompts.

    Returns:
        [m], in [(k - 1) / (2k), (k - 1) / k).

    >>> reward_spread(torch.zeros(1, 5))
    tensor([0.4000])
    """
    k = rewards.shape[1]
    first, second = torch.triu_indices(k, k, offset=1, device=rewards.device)
    return 2 / k**2 * torch.sigmoid((rewards[:, first] - rewards[:, second]).abs()).sum(dim=1)


def ascent(gradients: list[Tensor], *, step: float, norm: float | None = None) -> list[Tensor]:
    """Return the step that is added to each parameter to ascend: η ∇J, or η ∇J / ‖∇J‖ over all parameters together.

    The paper's step is the plain one with η = 5e-6, which moves next to nothing; normalised, η is the length of the step
    (as in sharpness-aware minimisation, arXiv:2010.01412 eq. 2). A gradient of 0 moves nothing.

    Args:
        gradients: ∇J, for each parameter or for this process's part of it.
        step: η.
        norm: ‖∇J‖ over all parameters, of all processes; None for the plain step.

    >>> ascent([torch.tensor([3.0]), torch.tensor([4.0])], step=1.0, norm=5.0)
    [tensor([0.6000]), tensor([0.8000])]
    """
    if norm is not None:
        step = 0.0 if norm == 0 else step / norm
    return [step * gradient for gradient in gradients]
