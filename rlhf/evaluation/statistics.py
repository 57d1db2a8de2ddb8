"""Means with intervals, calibration and baselines. Rows of one prompt are not independent, so prompts are resampled."""

import math
from collections.abc import Hashable, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> tuple[float, list[float]]:
    """Mean and 95 % percentile bootstrap interval, resampling whole clusters (prompts).

    Args:
        values: one number a row.
        clusters: which rows belong together; None if every row stands alone.

    Returns:
        the mean, and [low, high].

    >>> clustered_mean([1.0, 1.0, 1.0])
    (1.0, [1.0, 1.0])
    """
    numbers = np.asarray(values, dtype=float)
    assert numbers.size, "a mean needs at least one value"
    if clusters is None:
        index = np.arange(numbers.size)
    else:
        ids: dict[Hashable, int] = {}
        index = np.array([ids.setdefault(cluster, len(ids)) for cluster in clusters])
    sums, counts = np.bincount(index, weights=numbers), np.bincount(index).astype(float)
    rng = np.random.default_rng(seed)
    draws = rng.integers(0, sums.size, size=(RESAMPLES, sums.size)) if sums.size <= 5000 else None
    if draws is not None:
        means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    else:  # the same draw as weights, without a table of RESAMPLES x clusters
        means = np.empty(RESAMPLES)
        for i in range(RESAMPLES):
            draw = rng.integers(0, sums.size, size=sums.size)
            means[i] = sums[draw].sum() / counts[draw].sum()
    low, high = np.percentile(means, [2.5, 97.5])
    return float(numbers.mean()), [float(low), float(high)]


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[float], *, bins: int = 10) -> float:
    """Mean distance between stated probability and observed frequency, over equally wide bins.

        ECE = Σ_bins (n_bin / n) |mean outcome - mean probability|

    >>> expected_calibration_error([0.8, 0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1, 0])
    0.0
    """
    stated, seen = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    index = np.minimum((stated * bins).astype(int), bins - 1)
    total = sum(abs(float((seen[index == b] - stated[index == b]).sum())) for b in range(bins))
    return round(total / stated.size, 12)


def pair_report(
    scores_chosen: Sequence[float],
    scores_rejected: Sequence[float],
    *,
    prompts: Sequence[Hashable],
    lengths_chosen: Sequence[int],
    lengths_rejected: Sequence[int],
    gold_differences: Sequence[float] | None = None,
) -> dict[str, Any]:
    """How well scores order labelled pairs.

    `accuracy` counts ties as wrong (strict inequality, as RewardBench does) and says how many there were.
    `length_baseline` is the accuracy of "the longer answer wins", ties half. The predicted side has probability
    σ|d|, and `ece` compares that with how often it agrees with the label. `accuracy_true` compares with the sign of
    the true reward's difference, pairs without a difference left out.
    """
    chosen, rejected = np.asarray(scores_chosen, dtype=float), np.asarray(scores_rejected, dtype=float)
    right = chosen > rejected
    accuracy, interval = clustered_mean(right.astype(float).tolist(), prompts)
    lengths = np.asarray(lengths_chosen, dtype=float) - np.asarray(lengths_rejected, dtype=float)
    confidence = 1 / (1 + np.exp(-np.minimum(np.abs(chosen - rejected), 50.0)))
    report: dict[str, Any] = {
        "n": int(right.size),
        "accuracy": accuracy,
        "accuracy_ci": interval,
        "ties": int((chosen == rejected).sum()),
        "ece": expected_calibration_error(confidence.tolist(), right.astype(float).tolist()),
        "length_baseline": float(((lengths > 0) + 0.5 * (lengths == 0)).mean()),
        "accuracy_true": None,
        "accuracy_true_ci": None,
    }
    if gold_differences is not None:
        gold = np.asarray(gold_differences, dtype=float)
        decided = gold != 0
        if decided.any():
            agrees = (np.sign(chosen - rejected) == np.sign(gold))[decided]
            kept = [prompt for prompt, keep in zip(prompts, decided, strict=True) if keep]
            report["accuracy_true"], report["accuracy_true_ci"] = clustered_mean(agrees.astype(float).tolist(), kept)
    return report


def best_of_n_kl(n: int) -> float:
    """KL from the sampling policy of always taking the best of n samples: log n - (n - 1)/n nats (an upper bound with ties).

    >>> round(best_of_n_kl(16), 4)
    1.8351
    """
    return math.log(n) - (n - 1) / n


def win_rate(first: Sequence[float], second: Sequence[float]) -> tuple[float, list[float]]:
    """How often `first` is better than `second` on the same prompts, ties half, with its interval.

    >>> win_rate([1.0, 0.0], [0.0, 0.0])[0]
    0.75
    """
    ours, theirs = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    return clustered_mean(((ours > theirs) + 0.5 * (ours == theirs)).tolist())
