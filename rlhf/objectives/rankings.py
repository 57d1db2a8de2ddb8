"""Losses on a ranking: the rewards of K answers to one prompt, and which of them is ranked above which.

A ranking is given as comparisons: `beats[i, j]` says that answer i is ranked above answer j. Answers that are tied, or that
nobody compared, beat each other in no direction. Each answer is then a choice among itself and the answers that it beats:

    l_i = -log( e^{r_i} / (e^{r_i} + Σ_{j: i beats j} e^{r_j}) )

By Luce's axiom that is the probability of the choice whichever other answers there are, so a tie says nothing, rather than
that both rewards are equal. An answer that beats none has l_i = 0.
"""

import torch
from torch import Tensor


def choice_losses(rewards: Tensor, beats: Tensor) -> Tensor:
    """Return the negative log-probability that each answer is chosen over all that it beats, l_i above.

        l_i = log(1 + Σ_{j: i beats j} e^{r_j - r_i})

    Args:
        rewards: [g, K] raw scores of the answers of g rankings; what stands in the place of an answer that is not there
            changes nothing, if it beats none and none beats it.
        beats: [g, K, K] bool.

    Returns:
        [g, K] nats, at least 0.

    >>> choice_losses(torch.zeros(1, 2), torch.tensor([[[False, True], [False, False]]]))
    tensor([[0.6931, 0.0000]])
    """
    itself = torch.eye(rewards.shape[1], dtype=torch.bool, device=rewards.device)
    options = rewards[:, None, :].masked_fill(~(beats | itself), -torch.inf)
    return torch.logsumexp(options, dim=2) - rewards


def plackett_luce(rewards: Tensor, beats: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """Return the negative log-likelihood of whole rankings: the best is chosen first, then the best of the rest, and so on.

        loss = w · Σ_i l_i;   without ties  e^{-loss} = Π_k e^{r_(k)} / Σ_{m ≥ k} e^{r_(m)},   r_(1) of the best

    Special cases: K = 2 is Bradley-Terry; all tied is 0, with no gradient; equal rewards log K!. The probabilities of all K!
    rankings of the same answers sum to 1. It is the likelihood of a ranking, so it grows with K as its information does.

    Args:
        rewards, beats: as in `choice_losses`.
        weight: [g] or a number, ≥ 0. Weights are not renormalised.

    Returns:
        [g] nats per ranking, unreduced.

    Reference: arXiv:2301.11270 (MLE_K); Plackett 1975.

    >>> order = torch.ones(3, 3).triu(1).bool()[None]
    >>> plackett_luce(torch.tensor([[2.0, 1.0, 0.0]]), order)
    tensor([0.7209])
    """
    return weight * choice_losses(rewards, beats).sum(dim=1)


def top_one(rewards: Tensor, beats: Tensor, *, weight: Tensor | float = 1.0) -> Tensor:
    """Return the negative log-probability that the best of K answers is chosen, whatever the order of the others.

        loss = w · mean of l_i over the best

    The first factor of Plackett-Luce. The best is the answer that beats all others, or those that are tied above all others;
    of comparisons that are not complete, those that beat some and lose to none. K = 2 is Bradley-Terry; all tied is 0;
    equal rewards log K.

    Args:
        rewards, beats: as in `choice_losses`.
        weight: [g] or a number, ≥ 0.

    Returns:
        [g] nats per ranking, unreduced.

    Reference: arXiv:2301.11270, the first choice alone.

    >>> order = torch.ones(3, 3).triu(1).bool()[None]
    >>> top_one(torch.tensor([[2.0, 1.0, 0.0]]), order)
    tensor([0.4076])
    """
    best = is_best(beats)
    return weight * (choice_losses(rewards, beats) * best).sum(dim=1) / best.sum(dim=1).clamp(min=1)


def is_best(beats: Tensor) -> Tensor:
    """Tell which answers of each ranking lose the least, of those that beat another, [g, K] bool; beats: [g, K, K] bool.

    Of an order these are its first. Where some comparisons are left out, most wins minus losses would take another answer.

    >>> is_best(torch.tensor([[[False, False, True], [False, False, True], [False, False, False]]]))
    tensor([[ True,  True, False]])
    >>> chain = torch.zeros(1, 4, 4, dtype=torch.bool)  # 0 beats 1, which beats 2 and 3
    >>> chain[0, 0, 1] = chain[0, 1, 2] = chain[0, 1, 3] = True
    >>> is_best(chain)
    tensor([[ True, False, False, False]])
    """
    wins, losses = beats.sum(dim=2), beats.sum(dim=1)
    of_winners = losses.masked_fill(wins == 0, beats.shape[1])
    return (of_winners == of_winners.amin(dim=1, keepdim=True)) & (wins > 0)
