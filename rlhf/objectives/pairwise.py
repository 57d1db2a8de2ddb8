"""Losses on a pair of rewards. One general form covers most of the literature; the rest are its special cases."""

import math

import torch
from torch import Tensor


def bradley_terry(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the negative log-likelihood that `chosen` beats `rejected`.

        loss = -log σ(d) = log(1 + e^{-d}),    d = chosen - rejected

    log 2 at d = 0; gradient with respect to d is -σ(-d), which tends to -1 for the worst pairs, so they go on teaching
    (an ε inside the logarithm would silence them). One stable function: finite for |d| up to the largest float.

    Args:
        chosen, rejected: [b] raw scores.

    Returns:
        [b] nats per pair, unreduced.

    Reference: arXiv:2401.06080 eq. 2.

    >>> bradley_terry(torch.tensor([0.0, 2.0]), torch.tensor([0.0, 0.0]))
    tensor([0.6931, 0.1269])
    """
    return torch.nn.functional.softplus(rejected - chosen)


def pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    *,
    margin: Tensor | float = 0.0,
    confidence: Tensor | float = 1.0,
    weight: Tensor | float = 1.0,
    flip_rate: Tensor | float = 0.0,
) -> Tensor:
    """Return the weighted cross-entropy of a margin-shifted Bradley-Terry preference against a soft label.

        loss = w · [ -p log q(d, m) - (1 - p) log q(-d, -m) ],    d = chosen - rejected
        q(d, m) = (1 - ε) σ(d - m) + ε σ(-d - m)

    With ε = 0, as in all that follows, it is w · [ bradley_terry(d - m) + (1 - p) (d - m) ]. ε > 0 is the likelihood of
    labels of which a share ε is flipped at random ("forward correction"): bounded by -log ε, so a label that the model
    is sure is wrong stops teaching, where Bradley-Terry pulls on it hardest and smoothing pulls on every sure pair. A
    label that is flipped has its margin on the other side, so a wide margin teaches more, with ε as without. With an ε
    for each pair and no margin, a label with ε = 1/2 teaches nothing, and one with more teaches the other order.

    Special cases: Bradley-Terry (m=0, p=1, w=1); Llama-2 margin (m from ratings); adaptive margin (m = mean strength
    of a vote); label smoothing (p = 1 - α everywhere); soft labels (p per pair); flipped label (p = 0, m of the other
    sign); scaled Bradley-Terry (w = rating gap). The minimum over d is w·H(p), reached at d = logit(p) + m, so an
    uncertain pair stops pushing.

    Args:
        chosen, rejected: [b] raw scores.
        margin: [b] or a number, nats, any sign; a constant (no gradient flows into it).
        confidence: [b] or a number, P(chosen is better), in [0, 1].
        weight: [b] or a number, ≥ 0. Weights are not renormalised.
        flip_rate: ε in [0, 0.5), of all labels; or [b] of each, P(label is wrong), in (0, 1).

    Returns:
        [b] nats per pair, unreduced.

    Reference: arXiv:2401.06080 eq. 5 and eq. 6 (eq. 6 prints the margin outside the logarithm, where it would have no
    gradient; meant, and here, is inside, as in arXiv:2307.09288 eq. 2). ε: Patrini et al., arXiv:1609.03683, Theorem 2.

    >>> pair_loss(torch.zeros(1), torch.zeros(1), confidence=0.3)
    tensor([0.6931])
    """
    if isinstance(flip_rate, Tensor) or flip_rate > 0:
        difference = chosen - rejected
        agree, contradict = (
            log_flipped(difference, flip_rate, margin),
            log_flipped(-difference, flip_rate, -margin),
        )
        return -weight * (confidence * agree + (1.0 - confidence) * contradict)
    shifted = chosen - margin
    surplus = shifted - rejected
    return weight * (bradley_terry(shifted, rejected) + (1.0 - confidence) * surplus)


def log_flipped(difference: Tensor, flip_rate: Tensor | float, margin: Tensor | float = 0.0) -> Tensor:
    """Return the log-probability of a label under Bradley-Terry when a share ε of labels is flipped, [b] nats.

        log q(d, m) = log( (1 - ε) σ(d - m) + ε σ(-d - m) ),    from log ε at d = -∞ to log(1 - ε) at d = ∞

    Its derivative at d = 0 is (1 - 2ε) σ(m). Special case: ε = 1/2 without a margin is log 1/2 whatever d is.

    Args:
        difference: [b] d.
        flip_rate: ε in (0, 0.5); or [b] of each label, in (0, 1).
        margin: [b] or a number, m nats: by how much at least the better answer is better, whichever that is.

    Reference: arXiv:1609.03683 (Theorem 2, two classes).

    >>> log_flipped(torch.tensor([0.0, -100.0]), 0.25).exp()
    tensor([0.5000, 0.2500])
    >>> log_flipped(torch.tensor([9.0, -100.0]), torch.tensor([0.5, 0.75])).exp()
    tensor([0.5000, 0.7500])
    """
    kept = torch.nn.functional.logsigmoid(difference - margin)
    flipped = torch.nn.functional.logsigmoid(-difference - margin)
    if isinstance(flip_rate, Tensor):
        return torch.logaddexp(kept + torch.log1p(-flip_rate), flipped + flip_rate.log())
    assert 0 < flip_rate < 0.5, "a flip rate in (0, 0.5)"
    return torch.logaddexp(kept + math.log1p(-flip_rate), flipped + math.log(flip_rate))
