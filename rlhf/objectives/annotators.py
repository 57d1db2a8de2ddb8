"""How reliable the people are who label pairs: Dawid-Skene for pairs with ties, and with what is known of each pair before.

One answer of every pair is the better one: its first or its second. A label says "first" (sign 1), "second" (-1) or "tie" (0).
Annotator j is right with probability a_j in each label that is no tie, whichever answer is the better one and whatever others
say of the pair. A tie says nothing about which answer is better.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf.objectives.strength import nearest_line, scale_prior

MOST_SURE = 0.999  # an accuracy beyond this, or below 1 - this, is more than labels can show
PSEUDO_LABELS = 10.0
FIRST_GUESS = 0.75
STEPS, TOLERANCE = 1000, 1e-9
GRID, LABELS_AT_ONCE = 2001, 4096
ACCURACIES, SCALES = 51, 61
NEWTON_STEPS = 50


class PairLabels(NamedTuple):
    """Labels of some pairs, one or several each.

    Attributes:
        pair: [n] int64, which of the p pairs each label is about.
        annotator: [n] int64, who gave it.
        sign: [n] 1 where it says that the pair's first answer is better, -1 the second, 0 a tie.
        prior: [p] log-odds that the first answer is better before any label is read, nats; 0 where nothing is known.
    """

    pair: Tensor
    annotator: Tensor
    sign: Tensor
    prior: Tensor


def pair_log_odds(labels: PairLabels, accuracy: Tensor) -> Tensor:
    """Return the log-odds that a pair's first answer is the better one, given all its labels, [p] nats.

        L_p = λ_p + Σ_i s_i log( a_j(i) / (1 - a_j(i)) ),   i the labels of pair p

    Special cases: a label of a coin (a = 1/2) and a tie add nothing; two equally good annotators who disagree cancel.

    Args:
        accuracy: [annotators] a_j in (0, 1).

    Reference: Dawid and Skene, Applied Statistics 28 (1979), eq. 2.5, with one error rate a person.

    >>> labels = PairLabels(torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, -1.0]), torch.zeros(1))
    >>> pair_log_odds(labels, torch.tensor([0.9, 0.75])).sigmoid()
    tensor([0.7500])
    """
    evidence = labels.sign * torch.logit(accuracy)[labels.annotator]
    return labels.prior.index_add(0, labels.pair, evidence.to(labels.prior))


def others_log_odds(labels: PairLabels, accuracy: Tensor) -> Tensor:
    """Return the log-odds that each label is right by all that is known of its pair without this label, [n] nats; a tie has 0.

        o_i = s_i ( L_p(i) - s_i log( a / (1 - a) ) )

    Args:
        accuracy: [annotators] a_j in (0, 1).
    """
    evidence = labels.sign * torch.logit(accuracy)[labels.annotator].to(labels.prior)
    return labels.sign * (pair_log_odds(labels, accuracy)[labels.pair] - evidence)


def fit_accuracy(labels: PairLabels, annotators: int, *, pseudo_labels: float = PSEUDO_LABELS) -> Tensor:
    """Fit every annotator's accuracy by expectation maximisation, [annotators] in [0.001, 0.999].

        E: r_i = P(label i is right | all labels) = σ(s_i L_p(i))
        M: a_j = ( κ ā + Σ_i r_i ) / ( κ + n_j ),   i the n_j labels of j that are no tie;   ā the mean of r over all labels

    Every accuracy is drawn towards that of all labels, ā, as if κ more labels had been seen: few labels move it little, and an
    annotator of whom nothing is known has ā. κ = 0 is maximum likelihood. Where no pair has a prior, all depends on pairs with
    several labels, and it is taken that the annotators are right rather than wrong; of two annotators only the agreement is
    known then, and both get accuracies that explain it.

    Args:
        annotators: how many there are.
        pseudo_labels: κ ≥ 0.

    Reference: Dawid and Skene, Applied Statistics 28 (1979), section 2.

    >>> sure = PairLabels(torch.arange(4), torch.zeros(4, dtype=torch.long), torch.tensor([1.0, 1, 1, -1]), torch.full((4,), 30.0))
    >>> fit_accuracy(sure, 1)
    tensor([0.7500])
    """
    decided = labels.sign != 0
    counts = torch.zeros(annotators, dtype=labels.prior.dtype).index_add(0, labels.annotator, decided.to(labels.prior))
    accuracy = torch.full_like(counts, FIRST_GUESS)
    if not decided.any():
        return accuracy
    for _ in range(STEPS):
        right = torch.sigmoid(labels.sign * pair_log_odds(labels, accuracy)[labels.pair]) * decided
        mean = right.sum() / decided.sum()
        sums = torch.zeros_like(counts).index_add(0, labels.annotator, right.to(counts))
        total = counts + pseudo_labels
        updated = torch.where(total > 0, (pseudo_labels * mean + sums) / total, mean).clamp(1 - MOST_SURE, MOST_SURE)
        change, accuracy = (updated - accuracy).abs().max(), updated
        if change < TOLERANCE:
            break
    return accuracy


class Interval(NamedTuple):
    """An estimate and the ends of its interval."""

    best: float
    low: float
    high: float


def accuracy_interval(others: Tensor, clusters: Tensor | None = None, *, confidence: float = 0.95) -> Interval:
    """Return one annotator's accuracy by maximum likelihood, and its likelihood interval.

        ℓ(a) = Σ_i log( a σ(o_i) + (1 - a) σ(-o_i) ),   { a : 2 κ (max ℓ - ℓ(a)) ≤ χ²_1 }

    Labels of one cluster c, of G, are not independent; with the slopes g_i of their terms at the best a they count as

        κ = min( 1, Σ_i g_i² / ( G / (G - 1) · Σ_c ( Σ_{i in c} g_i )² ) ),   1 where every label is its own cluster

    Concave in a. Special cases: where the others are sure (o → ±∞) it is the interval of a share; where they know nothing
    (o = 0, or no label) it is [0, 1] around 1/2.

    Args:
        others: [n] log-odds that each of the annotator's labels is right, without it, nats (`others_log_odds`).
        clusters: [n] int64, equal for labels that are not independent; None where all are.
        confidence: of the interval.

    Reference: Chandler and Bate, Biometrika 94 (2007), the likelihood of independent labels adjusted for clusters.

    >>> accuracy_interval(torch.zeros(9))
    Interval(best=0.5, low=0.0, high=1.0)
    """
    grid = torch.linspace(0, 1, GRID, dtype=torch.float64)
    likelihood = torch.zeros_like(grid)
    for right in torch.split(torch.sigmoid(others.double()), LABELS_AT_ONCE):
        mixed = grid[:, None] * right + (1 - grid[:, None]) * (1 - right)
        likelihood += mixed.clamp(min=1e-300).log().sum(dim=1)
    quantile = torch.special.ndtri(torch.tensor((1 + confidence) / 2, dtype=torch.float64)) ** 2
    flat = bool(likelihood.max() - likelihood.min() < 1e-9)
    best = 0.5 if flat else grid[likelihood.argmax()].item()
    share = 1.0 if clusters is None or flat else _independent_share(others, clusters, best)
    inside = grid[2 * share * (likelihood.max() - likelihood) <= quantile]
    return Interval(best, inside.min().item(), inside.max().item())


def _independent_share(others: Tensor, clusters: Tensor, accuracy: float) -> float:
    """Return κ of `accuracy_interval`."""
    right = torch.sigmoid(others.double())
    slopes = (2 * right - 1) / (accuracy * right + (1 - accuracy) * (1 - right)).clamp(min=1e-12)
    sums, count = _sum_clusters(slopes[:, None], clusters)
    if count == len(others):
        return 1.0
    together = sums.square().sum() * count / max(1, count - 1)
    return 0.0 if count == 1 else min(1.0, (slopes.square().sum() / together).item())


def _sum_clusters(values: Tensor, clusters: Tensor) -> tuple[Tensor, int]:
    """Return the sums of rows over each cluster, [clusters, k], and how many clusters there are."""
    names, number = torch.unique(clusters, return_inverse=True)
    return values.new_zeros(len(names), values.shape[1]).index_add(0, number, values), len(names)


def most_accuracy(alike: float) -> float:
    """Return the largest accuracy of somebody who gives the same answer to a question asked twice with chance c, in [1/2, 1].

        a ≤ ( 1 + √max(0, 2c - 1) ) / 2

    With q_i the chance of a right answer to question i, c = E[q² + (1 - q)²] ≥ a² + (1 - a)², a = E[q] (Jensen). Equality where
    every question is as easy; a person who errs in the same questions every time agrees with themselves more often than that.

    Args:
        alike: c in [0, 1], without ties and for answers given anew each time.

    >>> round(most_accuracy(0.82), 6), most_accuracy(0.5)
    (0.9, 0.5)
    """
    return float((1 + max(0.0, 2 * alike - 1) ** 0.5) / 2)


class AccuracyFits(NamedTuple):
    """Log-likelihood of labels at each worth of a vote, on a grid of accuracies.

        ℓ_j(a, b) = Σ_i log( a σ(b d_i) + (1 - a) σ(-b d_i) ),   i the labels of annotator j

    Attributes:
        scales: [s] b, what a vote is worth.
        mean: [s] Σ_j log mean_a exp ℓ_j(a, b): every accuracy between 0 and 1 as likely as any.
    """

    scales: Tensor
    mean: Tensor


def fit_scales(differences: Tensor, annotator: Tensor, annotators: int) -> AccuracyFits:
    """Fit accuracies to votes at each worth of a vote.

    Args:
        differences: [n] votes on each label, above 0 where they agree with it.
        annotator: [n] int64, who gave it.
    """
    accuracies = torch.linspace(0, 1, ACCURACIES, dtype=torch.float64)[:, None]
    values = differences.double()
    scales = torch.logspace(-1.5, 2, SCALES, dtype=torch.float64) / values.abs().mean().clamp(min=1e-12)
    mean = []
    for scale in scales:
        right = torch.sigmoid(scale * values)
        likelihood = (accuracies * right + (1 - accuracies) * (1 - right)).clamp(min=1e-12).log()
        sums = torch.zeros(ACCURACIES, annotators, dtype=torch.float64).index_add(1, annotator, likelihood)
        mean.append((sums.logsumexp(dim=0) - math.log(ACCURACIES)).sum())
    return AccuracyFits(scales, torch.stack(mean))


def vote_worth(differences: Tensor, annotator: Tensor, annotators: int) -> float:
    """Return what a vote is worth, b in nats per unit, where every annotator has an accuracy of their own.

        b: σ(b d_i) ≈ Σ_b p(b | labels) σ(b d_i),   p(b | labels) ∝ p(b) Π_j mean_a exp ℓ_j(a, b)

    One accuracy for all can't explain that some labels are contradicted more often than others, and takes it for blunt votes. Of
    few labels the likeliest b may be a hundred times too large, and makes every label sure; the mean over all does not.

    Args:
        differences: [n] votes on each label, above 0 where they agree with it.
        annotator: [n] int64, who gave it.

    >>> sure, blunt = torch.full((40,), 4.0), torch.tensor([4.0, -4.0] * 20)
    >>> alone = vote_worth(torch.cat([sure, blunt]), torch.tensor([0] * 80), 1)
    >>> vote_worth(torch.cat([sure, blunt]), torch.tensor([0] * 40 + [1] * 40), 2) > 2 * alone
    True
    """
    fits = fit_scales(differences, annotator, annotators)
    posterior = torch.softmax(fits.mean + scale_prior(fits.scales, differences), dim=0)
    values = differences.double()
    agree = posterior @ torch.sigmoid(fits.scales[:, None] * values)
    return nearest_line(values, agree, through_origin=True)[1]


class Slopes(NamedTuple):
    """Coefficients of a logistic regression, [k], and their covariance, [k, k]."""

    slope: Tensor
    covariance: Tensor


def label_slopes(features: Tensor, clusters: Tensor | None = None, *, ridge: float = 1.0) -> Slopes:
    """Fit what moves an annotator's choice: P(chosen is chosen) = σ(x · w), x = features of chosen minus those of rejected.

        w = argmax Σ_i log σ(x_i · w) - (ridge / 2) |w|²,   covariance = H⁻¹ = ( Σ_i σ(x w) σ(-x w) x xᵀ + ridge I )⁻¹

    Where labels of a cluster are not independent, it is H⁻¹ + H⁻¹ E H⁻¹, with E what slopes g_i = σ(-x_i w) x_i of one cluster
    have in common, without its negative directions, and G the number of clusters:

        E = G / (G - 1) Σ_c ( Σ_{i in c} g_i ) ( Σ_{i in c} g_i )ᵀ - Σ_i g_i g_iᵀ

    No intercept: turned round, a pair has features and label of the other sign. The ridge is a standard normal prior on each
    slope, which keeps them finite where a feature decides every label.

    Args:
        features: [n, k] differences, each column scaled to usual size 1.
        clusters: [n] int64, equal for labels that are not independent; None where all are.
        ridge: > 0.

    >>> label_slopes(torch.tensor([[1.0], [-1.0]])).slope.abs() < 1e-6
    tensor([True])
    """
    x = features.double()
    slope = torch.zeros(x.shape[1], dtype=torch.float64)
    identity = ridge * torch.eye(x.shape[1], dtype=torch.float64)
    for _ in range(NEWTON_STEPS):
        chance = torch.sigmoid(-(x @ slope))
        information = (x * (chance * (1 - chance))[:, None]).T @ x + identity
        step = torch.linalg.solve(information, x.T @ chance - ridge * slope)
        slope = slope + step
        if step.abs().max() < TOLERANCE:
            break
    covariance = torch.linalg.inv(information)
    if clusters is not None and len(x):
        slopes = x * torch.sigmoid(-(x @ slope))[:, None]
        sums, count = _sum_clusters(slopes, clusters)
        if count < len(x):
            values, vectors = torch.linalg.eigh(sums.T @ sums * count / max(1, count - 1) - slopes.T @ slopes)
            covariance = covariance + covariance @ (vectors * values.clamp(min=0)) @ vectors.T @ covariance
    return Slopes(slope, covariance)
