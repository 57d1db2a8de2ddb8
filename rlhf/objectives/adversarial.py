"""A discriminator of demonstrations against a policy's own answers, on frozen features."""

from typing import NamedTuple

import torch
from torch import Tensor

NEWTON_STEPS, TOLERANCE = 50, 1e-9


class Discriminator(NamedTuple):
    """A logistic regression: log-odds that features are a demonstration's.

    Attributes:
        weights: [h].
        bias: [].
        center, scale: [h] by which features are standardised first.
    """

    weights: Tensor
    bias: Tensor
    center: Tensor
    scale: Tensor

    def log_odds(self, features: Tensor) -> Tensor:
        """Return the log-odds that answers are demonstrations, [n] nats: log D - log(1 - D)."""
        standard = (features.double() - self.center) / self.scale
        return (standard @ self.weights + self.bias).float()


def fit_discriminator(demonstrations: Tensor, answers: Tensor, *, ridge: float = 1.0) -> Discriminator:
    """Fit log-odds w·x + a that features x are a demonstration's and not the policy's, by Newton's method.

        min_w,a  ½ mean_demonstrations softplus(-(w·x + a)) + ½ mean_answers softplus(w·x + a) + ridge / (2 n) |w|²

    n is the number of all rows. The two sides weigh the same, however many rows they have, so a policy whose answers are
    demonstrations has log-odds of 0. With features that suffice, the log-odds are log p_demonstrations(y) / p_policy(y) (GAIL's
    optimal discriminator), whose expected value under the policy is -KL(policy || demonstrations).

    Args:
        demonstrations: [m, h].
        answers: [n, h] of the policy.
        ridge: above 0, so that sides that can be told apart without an error keep finite log-odds.

    Reference: arXiv:1606.03476 section 4 (GAIL); the reward log D - log(1 - D): arXiv:1710.11248 eq. 4 (AIRL).

    >>> found = fit_discriminator(torch.tensor([[1.0], [2.0]]), torch.tensor([[-1.0], [-2.0]]))
    >>> found.log_odds(torch.tensor([[1.5], [-1.5]])).sign().tolist()
    [1.0, -1.0]
    """
    # 1. Standardised features with a column of ones; the sign and the weight of each row.
    rows = torch.cat([demonstrations, answers]).double()
    center, scale = rows.mean(dim=0), rows.std(dim=0, correction=0).clamp(min=1e-6)
    inputs = torch.cat([(rows - center) / scale, torch.ones_like(rows[:, :1])], dim=1)
    sign = torch.cat([torch.ones(len(demonstrations)), -torch.ones(len(answers))]).to(inputs)
    weight = torch.where(sign > 0, 0.5 / len(demonstrations), 0.5 / len(answers))
    penalty = torch.full_like(inputs[0], ridge / len(rows))
    penalty[-1] = 0.0

    # 2. Newton's steps on a convex loss.
    solution = torch.zeros_like(penalty)
    for _ in range(NEWTON_STEPS):
        wrong = torch.sigmoid(-sign * (inputs @ solution))
        gradient = penalty * solution - inputs.T @ (weight * sign * wrong)
        curvature = (inputs * (weight * wrong * (1 - wrong))[:, None]).T @ inputs + torch.diag(penalty + 1e-12)
        step = torch.linalg.solve(curvature, gradient)
        solution = solution - step
        if step.abs().max() < TOLERANCE:
            break
    return Discriminator(solution[:-1], solution[-1], center, scale)
