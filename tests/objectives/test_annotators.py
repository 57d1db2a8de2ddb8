"""Dawid-Skene for pairs against plain numpy written here, closed forms, and planted truths."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import chi2

from rlhf.objectives.annotators import (
    PairLabels,
    accuracy_interval,
    fit_accuracy,
    label_slopes,
    others_log_odds,
    pair_log_odds,
)


def simulated(accuracies: list[float], pairs: int, *, share: float, seed: int, sharpness: float = 0.0) -> PairLabels:
    """Every annotator labels a share of the pairs; the prior is calibrated, and says nothing where its sharpness is 0."""
    rng = np.random.default_rng(seed)
    prior = sharpness * rng.standard_normal(pairs)
    truth = np.where(rng.random(pairs) < 1 / (1 + np.exp(-prior)), 1.0, -1.0)
    labels = [(p, j) for p in range(pairs) for j in range(len(accuracies)) if rng.random() < share]
    sign = [truth[p] if rng.random() < accuracies[j] else -truth[p] for p, j in labels]
    pair, annotator = (torch.tensor(column) for column in zip(*labels, strict=True))
    return PairLabels(pair, annotator, torch.tensor(sign), torch.tensor(prior))


def dawid_skene(labels: PairLabels, annotators: int, pseudo: float) -> np.ndarray:
    """The textbook's way: a posterior over two classes for each pair, multiplied up label by label; loops, no logarithms."""
    pair, annotator, sign = (x.tolist() for x in labels[:3])
    accuracy = np.full(annotators, 0.75)
    for _ in range(600):
        first = 1 / (1 + np.exp(-labels.prior.numpy()))
        posterior = np.stack([first, 1 - first], axis=1)
        for p, j, s in zip(pair, annotator, sign, strict=True):
            if s != 0:
                posterior[p] *= (accuracy[j], 1 - accuracy[j]) if s == 1 else (1 - accuracy[j], accuracy[j])
        posterior /= posterior.sum(axis=1, keepdims=True)
        right, counts = np.zeros(annotators), np.zeros(annotators)
        for p, j, s in zip(pair, annotator, sign, strict=True):
            if s != 0:
                right[j] += posterior[p, 0 if s == 1 else 1]
                counts[j] += 1
        accuracy = np.clip((pseudo * right.sum() / counts.sum() + right) / (pseudo + counts), 0.001, 0.999)
    return accuracy


@pytest.mark.parametrize(("share", "sharpness", "pseudo"), [(0.6, 0.0, 0.0), (0.3, 2.0, 10.0), (0.5, 1.0, 3.0)])
def test_the_fit_is_dawid_and_skenes(share: float, sharpness: float, pseudo: float) -> None:
    labels = simulated([0.9, 0.8, 0.7, 0.5, 0.3], 200, share=share, seed=1, sharpness=sharpness)
    sign = labels.sign.clone()
    sign[::7] = 0.0
    with_ties = labels._replace(sign=sign)
    fitted = fit_accuracy(with_ties, 5, pseudo_labels=pseudo)
    np.testing.assert_allclose(fitted.numpy(), dawid_skene(with_ties, 5, pseudo), atol=1e-5)


def test_ties_and_coins_say_nothing() -> None:
    labels = simulated([0.9, 0.7, 0.5], 50, share=1.0, seed=0)
    sign = torch.where(labels.annotator == 1, 0.0, labels.sign)
    accuracy = torch.tensor([0.9, 0.7, 0.5])
    alone = labels.annotator == 0
    only = PairLabels(labels.pair[alone], labels.annotator[alone], labels.sign[alone], labels.prior)
    expected = pair_log_odds(only, accuracy)
    torch.testing.assert_close(pair_log_odds(labels._replace(sign=sign), accuracy), expected, atol=1e-6, rtol=0)
    assert others_log_odds(labels._replace(sign=sign), accuracy)[labels.annotator == 1].abs().max() == 0
    assert fit_accuracy(labels._replace(sign=torch.zeros_like(sign)), 3).tolist() == [0.75] * 3, "nothing is known"


def test_what_the_others_say_leaves_the_label_itself_out() -> None:
    """By Bayes over the two truths, written out: two others, right with 0.9 and 0.6, say first and second; the prior is 0.7."""
    labels = PairLabels(
        torch.tensor([0, 0, 0]),
        torch.tensor([0, 1, 2]),
        torch.tensor([1.0, -1.0, -1.0]),
        torch.tensor([math.log(0.7 / 0.3)]),
    )
    first, second = 0.7 * 0.9 * (1 - 0.6), 0.3 * (1 - 0.9) * 0.6
    got = others_log_odds(labels, torch.tensor([0.9, 0.6, 0.8]))[2]
    assert got.sigmoid().item() == pytest.approx(second / (first + second), abs=1e-6), "oriented to what the label says"


def test_turning_pairs_round_changes_nothing() -> None:
    labels = simulated([0.9, 0.7, 0.4], 200, share=0.4, seed=3, sharpness=1.0)
    turned = torch.rand(200, generator=torch.Generator().manual_seed(0)) < 0.5
    side = torch.where(turned, -1.0, 1.0).double()
    other = labels._replace(sign=labels.sign * side[labels.pair], prior=labels.prior * side)
    torch.testing.assert_close(fit_accuracy(other, 3), fit_accuracy(labels, 3), atol=1e-7, rtol=0)


@pytest.mark.parametrize("sharpness", [0.0, 2.0])
def test_planted_accuracies_are_found(sharpness: float) -> None:
    """One of them is worse than a coin. By overlap alone, and by one label a pair and a prior."""
    planted = [0.95, 0.85, 0.75, 0.5, 0.25]
    labels = simulated(planted, 4000, share=0.2 if sharpness else 0.8, seed=5, sharpness=sharpness)
    np.testing.assert_allclose(fit_accuracy(labels, 5).numpy(), planted, atol=0.05 if sharpness else 0.02)


def test_few_labels_are_drawn_to_the_accuracy_of_all() -> None:
    sure = torch.full((101,), 40.0).double()
    sign = torch.cat([torch.ones(80), -torch.ones(21)]).double()
    annotator = torch.tensor([0] * 100 + [1])
    fitted = fit_accuracy(PairLabels(torch.arange(101), annotator, sign, sure), 2, pseudo_labels=10)
    mean = 80 / 101
    np.testing.assert_allclose(fitted.numpy(), [(10 * mean + 80) / 110, 10 * mean / 11], atol=1e-9)


def test_the_interval_is_that_of_the_likelihood() -> None:
    """Where all is sure it is a binomial's: 2 n KL(k/n || a) = χ² at both ends; where nothing is, it is [0, 1]."""
    n, k = 50, 40
    best, low, high = accuracy_interval(torch.cat([torch.full((k,), 60.0), torch.full((n - k,), -60.0)]))
    assert best == pytest.approx(k / n)

    def deviance(a: float) -> float:
        return 2 * (k * math.log(k / n / a) + (n - k) * math.log((1 - k / n) / (1 - a)))

    for end in (low, high):
        assert deviance(end) == pytest.approx(chi2.ppf(0.95, 1), abs=0.06), "within a step of the grid"
    assert accuracy_interval(torch.zeros(0)) == accuracy_interval(torch.zeros(7)) == (0.5, 0.0, 1.0)
    wider = accuracy_interval(torch.cat([torch.full((k,), 2.0), torch.full((n - k,), -2.0)]))
    assert wider.high - wider.low > 1.2 * (high - low), "unsure others make a wider interval"


def test_the_interval_covers() -> None:
    """400 annotators of accuracy 0.8 with 60 labels each, judged by a calibrated prior as sharp as a vote in the lab."""
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        prior = 3.0 * rng.standard_normal(60)
        truth = rng.random(60) < 1 / (1 + np.exp(-prior))
        right = rng.random(60) < 0.8
        interval = accuracy_interval(torch.tensor(np.where(truth == right, prior, -prior)))
        covered += interval.low <= 0.8 <= interval.high
    assert 0.92 <= covered / 400 <= 0.985, "95 % within three standard errors, 0.011 each"


@pytest.mark.parametrize(("answers", "prompts"), [(6, 12), (8, 10)])
def test_pairs_of_one_ranking_are_not_counted_as_independent(answers: int, prompts: int) -> None:
    """Somebody who ranks by the true reward and noise: the interval holds how often they are right in 93 % of draws or more."""
    rng = np.random.default_rng(7)
    first, second = np.triu_indices(answers, 1)
    prompt = torch.arange(prompts).repeat_interleave(len(first))
    drawn = []
    for _ in range(300):
        truth = rng.standard_normal((prompts, answers))
        ranked = truth + 0.8 * rng.standard_normal((prompts, answers))
        is_right = ((truth[:, first] > truth[:, second]) == (ranked[:, first] > ranked[:, second])).ravel()
        drawn.append(torch.tensor(np.where(is_right, 7.0, -7.0)))
    share = torch.cat(drawn).sign().mean().item() / 2 + 0.5
    alone, clustered = (
        np.mean([low <= share <= high for _, low, high in (accuracy_interval(x, *of) for x in drawn)])
        for of in ([], [prompt])
    )
    assert alone < 0.92 < 0.93 <= clustered


def test_labels_of_their_own_cluster_are_independent_and_one_cluster_tells_nothing() -> None:
    others = torch.tensor([4.0, -4.0, 4.0, 1.0, 4.0])
    assert accuracy_interval(others, torch.arange(5)) == accuracy_interval(others)
    assert accuracy_interval(others, torch.zeros(5, dtype=torch.long))[1:] == (0.0, 1.0)
    x = torch.randn(40, 2, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(label_slopes(x, torch.arange(40)).covariance, label_slopes(x).covariance)
    repeated, of = x.repeat_interleave(6, dim=0), torch.arange(40).repeat_interleave(6)
    ratio = label_slopes(repeated, of).covariance.diagonal() / label_slopes(repeated).covariance.diagonal()
    assert (ratio > 4).all(), "six times the same label is one label"
    sixfold = accuracy_interval(others.repeat_interleave(6), torch.arange(5).repeat_interleave(6))
    assert sixfold.high - sixfold.low > accuracy_interval(others).high - accuracy_interval(others).low - 0.01


def test_slopes_are_a_logistic_regressions() -> None:
    """The optimum and the curvature there, by scipy on the same penalised likelihood, written in numpy."""
    rng = np.random.default_rng(2)
    x = rng.standard_normal((80, 3))
    x *= np.where(rng.random((80, 1)) < 1 / (1 + np.exp(-x @ np.array([[1.0], [-2.0], [0.0]]))), 1, -1)

    def penalised(w: np.ndarray) -> float:
        return np.logaddexp(0, -x @ w).sum() + 0.5 * 0.7 * (w**2).sum()

    expected = minimize(penalised, np.zeros(3), tol=1e-12).x
    slope, covariance = label_slopes(torch.tensor(x), ridge=0.7)
    np.testing.assert_allclose(slope.numpy(), expected, atol=1e-5)
    step, identity = 1e-4, np.eye(3)
    hessian = np.array(
        [
            [
                sum(a * b * penalised(expected + step * (a * identity[i] + b * identity[j])) for a in (1, -1) for b in (1, -1))
                / (4 * step**2)
                for j in range(3)
            ]
            for i in range(3)
        ]
    )  # fmt: skip
    np.testing.assert_allclose(covariance.numpy(), np.linalg.inv(hessian), rtol=1e-3)
    separated = label_slopes(torch.ones(30, 1)).slope.item()
    assert 1 < separated < 5, "a feature that decides every label has a finite slope"
