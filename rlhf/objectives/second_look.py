"""Which labels are worth a second look, and what is known of a pair after it.

A pair's label, a vote of reward models and the verdicts of experts are several observations of one thing: which answer is
better. Bayes adds their log-odds. Throughout, p = P(chosen is better), so 1 - p is the probability that the label is wrong.
"""

import math

import torch
from torch import Tensor

from rlhf.objectives.selection import greedy_design, weighted_covariance

SHARES = 201  # points of the grid of `shared_error`
DOUBTED = 9  # its prior (1 - h)^9: a tenth of the pairs, before there are verdicts
BISECTIONS = 60
SUREST = 1e-15  # at 1 no verdict could change anything
BY_CHANCE = 0.025  # what a lower end of 95 % leaves to chance


def log_odds_of_verdicts(agree: Tensor, contradict: Tensor, *, error_rate: float) -> Tensor:
    """Return what verdicts say about a label, [n] nats: (a - c) log((1 - e) / e).

    Of a pair's verdicts, a agree with the label and c contradict it; each is wrong with probability e, independently of the
    label and of the others. A verdict that calls the answers equal says nothing about which is better and adds 0.

    Args:
        agree, contradict: [n] counts.
        error_rate: e in (0, 0.5].

    >>> log_odds_of_verdicts(torch.tensor([1, 0, 1]), torch.tensor([0, 2, 1]), error_rate=0.05)
    tensor([ 2.9444, -5.8889,  0.0000])
    """
    assert 0 < error_rate <= 0.5, "an error rate in (0, 0.5]"
    return (agree - contradict) * math.log((1 - error_rate) / error_rate)


def posterior_of_observations(strength: Tensor, verdicts: Tensor, *, flip_rate: float, scale: float = 1.0) -> Tensor:
    """Return P(chosen is better) given a label, an independent vote and verdicts, [n].

        p = σ( b d + log((1 - ε) / ε) + Σ_v ± log((1 - e) / e) )

    Special cases: no verdict is `posterior_confidence`; neither vote nor verdict is 1 - ε; label and one verdict that
    contradicts it, both equally reliable, is 1/2. ε = 0 (a label that cannot be wrong) would silence every verdict, so it
    is refused.

    Args:
        strength: [n] d, mean out-of-fold difference of rewards, nats.
        verdicts: [n] log-odds of the verdicts, nats (`log_odds_of_verdicts`); 0 where there are none.
        flip_rate: ε in (0, 0.5], the share of wrong labels.
        scale: b, what a nat of the vote is worth.

    >>> posterior_of_observations(torch.zeros(2), torch.tensor([0.0, math.log(1 / 3)]), flip_rate=0.25)
    tensor([0.7500, 0.5000])
    """
    assert 0 < flip_rate <= 0.5, "a flip rate in (0, 0.5]"
    return torch.sigmoid(scale * strength + math.log((1 - flip_rate) / flip_rate) + verdicts)


def shared_error(right: Tensor, verdicts: Tensor) -> float:
    """Return the share h of pairs on which label and vote together say nothing, by what verdicts say of them, in [0, 1].

        h = ∫ h p(h | verdicts) dh,    p(h | verdicts) ∝ (1 - h)^9 Π_i ( r_i v_i + (1 - r_i) (1 - v_i) )
        r_i = (1 - h) p_i + h / 2,    v_i = σ(verdicts_i)

    p takes label and vote to err independently. Voters learn from labels: where these follow what is no part of the reward, such
    as length, both are wrong of the same pairs, p is sure there, and experts contradict it more often than p allows. Which pairs
    were asked about may depend on p. Special cases: many verdicts as p foretells them are about 0; many that contradict half of
    the surest pairs near 1; none are 0. The prior keeps a few verdicts from deciding: with one contradiction of a sure pair the
    likeliest h is 1.

    Args:
        right: [n] p = P(label is right) by label and vote.
        verdicts: [n] log-odds of the verdicts, nats; 0 where there are none.

    >>> sure = torch.full((400,), 0.999)
    >>> round(shared_error(sure, torch.tensor([3.0, -3.0] * 200)), 1), shared_error(sure[:0], sure[:0])
    (0.8, 0.0)
    """
    if not verdicts.any():
        return 0.0
    p, confirmed = right.double(), torch.sigmoid(verdicts.double())
    shares = torch.linspace(0, 1, SHARES, dtype=torch.float64)
    believed = (1 - shares[:, None]) * p + shares[:, None] / 2
    likelihood = (believed * confirmed + (1 - believed) * (1 - confirmed)).log().sum(dim=1)
    prior = DOUBTED * torch.log1p(-shares)
    return (torch.softmax(likelihood + prior, dim=0) @ shares).item()


def least_wrong(contradicted: int, answered: int, *, error_rate: float) -> int:
    """Return how many of the labels that experts judged are wrong at least, at 97.5 % confidence.

        the smallest w with P( Binomial(m - w, e) ≥ c - w ) > 0.025

    c of m labels are contradicted; were w of them wrong and all of these contradicted, errors of experts would have to explain
    the rest. It takes no vote and no model of the labels, so it holds also where these err as the votes do. Special cases: none
    contradicted is 0; e near 0 is c.

    Args:
        contradicted, answered: c and m.
        error_rate: e in (0, 0.5].

    >>> least_wrong(20, 40, error_rate=0.05), least_wrong(2, 40, error_rate=0.05)
    (16, 0)
    """
    e = torch.tensor(error_rate, dtype=torch.float64)
    for wrong in range(contradicted):
        right = torch.tensor(answered - wrong, dtype=torch.float64)
        errors = torch.arange(contradicted - wrong, answered - wrong + 1, dtype=torch.float64)
        ways = torch.lgamma(right + 1) - torch.lgamma(errors + 1) - torch.lgamma(right - errors + 1)
        by_errors = (ways + errors * e.log() + (right - errors) * torch.log1p(-e)).exp().sum()
        if by_errors > BY_CHANCE:
            return wrong
    return contradicted


def with_least_wrong(right: Tensor, wrong: float) -> Tensor:
    """Return the nearest probabilities by which so many labels, or more, are expected to be wrong, [n].

        p'_i = σ( log(p_i / (1 - p_i)) - λ ),    λ ≥ 0 the least with Σ_i (1 - p'_i) ≥ w

    Of all p' with this sum they have the least relative entropy to p. Special cases: p itself, where Σ (1 - p) ≥ w already; all
    0 where w = n.

    Args:
        right: [n] p = P(label is right).
        wrong: w in [0, n], a number of labels.

    >>> with_least_wrong(torch.tensor([0.5, 0.9]), 1.0), with_least_wrong(torch.tensor([0.5, 0.9]), 0.3)
    (tensor([0.2500, 0.7500]), tensor([0.5000, 0.9000]))
    """
    if (1 - right).sum() >= wrong:
        return right
    odds = torch.logit(right.double(), eps=SUREST)
    least, most = 0.0, 100.0
    for _ in range(BISECTIONS):
        middle = (least + most) / 2
        enough = torch.sigmoid(middle - odds).sum() >= wrong
        least, most = (least, middle) if enough else (middle, most)
    return torch.sigmoid(odds - most).to(right)


def with_verdicts(right: Tensor, verdicts: Tensor) -> Tensor:
    """Return P(chosen is better) once there are verdicts, [n]: σ( log( p / (1 - p) ) + verdicts ).

    Args:
        right: [n] p, by all that is known but the verdicts.
        verdicts: [n] log-odds of the verdicts, nats; 0 where there are none.

    >>> with_verdicts(torch.tensor([0.95]), torch.tensor([-math.log(19)]))
    tensor([0.5000])
    """
    return torch.sigmoid(torch.logit(right.double(), eps=SUREST) + verdicts.double()).to(right)


def expected_change(right: Tensor, *, error_rate: Tensor | float) -> Tensor:
    """Return the variance of p over the two verdicts that an expert may give, [n]: how far a second look moves it.

        Var p' = ( p (1 - p) (1 - 2e) )² / ( q (1 - q) ),    q = p (1 - e) + (1 - p) e

    q is the probability that the verdict agrees with the label. With d the pair's reward difference, ∂p/∂d = p (1 - p), so this
    is (∂q/∂d)² / (q (1 - q)): Fisher's information about d in the verdict, given the label. A label is such a verdict too: its
    information is that of p = σ(d), e = ε. With e = 0 it is p (1 - p): P(wrong) times P(right), since
    a label that is surely wrong is flipped by the vote already and needs no expert. 0 where p is 0 or 1, or e = 1/2; at
    most 1/4.

    Args:
        right: [n] p.
        error_rate: e in [0, 0.5], of the expert; a number, or one for each.

    >>> expected_change(torch.tensor([0.5, 0.9, 1.0]), error_rate=0.0)
    tensor([0.2500, 0.0900, 0.0000])
    """
    agrees = right * (1 - error_rate) + (1 - right) * error_rate
    moved = right * (1 - right) * (1 - 2 * error_rate)
    return moved**2 / (agrees * (1 - agrees)).clamp(min=torch.finfo(right.dtype).tiny)


def verdicts_in_labels(right: Tensor, better: Tensor, *, error_rate: float, flip_rate: Tensor | float) -> Tensor:
    """Return how many more labels say as much about the reward as verdicts do: Σ_i Var p'_i / mean_j Var c'_j.

    Both are Fisher's information about the reward difference of a pair, at the difference that is believed: Var p' that of a
    verdict on a pair with a label, Var c' that of a noisy label on a pair without one. Most new pairs have a sure order, where a
    noisy label says little; a look is at those in doubt, so one verdict may do what ten labels do.

    Special cases: where votes say nothing, c = 1/2 and p = 1 - ε, it is Σ_i 4 Var p'_i / (1 - 2ε)²; ε = 0 is 0.

    Args:
        right: [..., k] p of the pairs that are looked at.
        better: [..., n] c = P(one answer is better) of pairs like the new ones, without their labels.
        error_rate: e in [0, 0.5), of the expert.
        flip_rate: ε in [0, 0.5), of the labels; a number, or [..., 1].

    >>> verdicts_in_labels(torch.full((3,), 0.75), torch.full((9,), 0.5), error_rate=0.0, flip_rate=0.25)
    tensor(9.)
    """
    of_verdicts = expected_change(right, error_rate=error_rate).sum(dim=-1)
    return of_verdicts / expected_change(better, error_rate=flip_rate).mean(dim=-1)


def worth_in_sure_labels(right: Tensor) -> Tensor:
    """Return how many sure labels each label is worth, [n]: (2p - 1)².

    A label that is right with probability p is a sure one through a channel that flips it with probability 1 - p. Where the
    reward model has no opinion yet, such a channel passes (2p - 1)² of the Fisher information of a sure label. A second look
    is expected to add 4 Var p'.

    >>> worth_in_sure_labels(torch.tensor([1.0, 0.75, 0.5]))
    tensor([1.0000, 0.2500, 0.0000])
    """
    return (2 * right - 1) ** 2


def second_look(
    features: Tensor,
    differences: Tensor,
    right: Tensor,
    count: int,
    *,
    error_rate: float,
    is_open: Tensor | None = None,
) -> list[int]:
    """Choose the pairs whose second look is expected to teach a reward head most, one after the other.

        gain_i = Var p'_i · x_i' Σ x_i,    Σ^-1 = Σ_j (2p_j - 1)² σ'(d_j) x_j x_j' + I

    The first factor is Fisher's information about d_i in the verdict (`expected_change`), the second what is not known of d_i:
    Laplace's variance of a logistic head along x. Σ shrinks along every pair that is taken as if it were relabelled, so a second
    pair like it gains less: the batch is diverse (greedy D-optimal design).

    Args:
        features: [n, h] what the head reads, chosen minus rejected; scaled here so that their mean square length is 1.
        differences: [n] chosen minus rejected reward on the scale of P(better) = σ(d), nats.
        right: [n] p.
        count: how many are wanted.
        error_rate: e in [0, 0.5], of the expert.
        is_open: [n] which pairs may be chosen; the others only are in Σ. None if all may.

    Returns:
        `count` indices, or as many as are open, in the order taken.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    >>> second_look(x, torch.zeros(3), torch.tensor([0.5, 0.5, 0.6]), 2, error_rate=0.0)
    [0, 2]
    """
    scaled = features / features.square().sum(dim=1).mean().sqrt().clamp(min=torch.finfo(features.dtype).tiny)
    p = torch.sigmoid(differences)
    covariance = weighted_covariance(scaled, worth_in_sure_labels(right) * p * (1 - p))
    adds = expected_change(right, error_rate=error_rate)
    candidates = torch.arange(len(right)) if is_open is None else is_open.nonzero().flatten()
    order = greedy_design(scaled[candidates], adds[candidates], covariance, count)
    chosen: list[int] = candidates[order].tolist()
    return chosen
