"""Means with intervals, calibration and baselines. Rows of one prompt are not independent, so prompts are resampled."""

import math
from collections.abc import Callable, Hashable, Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.stats import beta, rankdata, t

RESAMPLES = 2000
SIGN_FLIPS = 20_000
CELLS_AT_ONCE = 4_000_000
TAIL = 0.025  # on either side of a 95 % interval
POINT = 1e-12  # a narrower interval is none: all clusters are alike
NORMAL_END = 1.959964  # standard errors, of many clusters
Array = NDArray[np.float64]


class PairedDifference(TypedDict):
    """Mean difference of two models on the same rows, its 95 % interval, and the p-value of a sign-flip test.

    The interval is None where all rows are of one cluster, since nothing then says how far another cluster would lie.
    """

    difference: float
    difference_ci: list[float] | None
    p_value: float


def clustered_mean(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> tuple[float, list[float] | None]:
    """Return a mean and its 95 % bootstrap interval, resampling whole clusters (prompts).

    Args:
        values: one number a row.
        clusters: which rows belong together; None if every row stands alone.

    Returns:
        the mean, and [low, high]; None in place of these where there is only one cluster.

    >>> clustered_mean([1.0, 1.0, 1.0])
    (1.0, [1.0, 1.0])
    """
    numbers = np.asarray(values, dtype=float)
    assert numbers.size, "a mean needs at least one value"
    columns = np.stack([numbers, np.ones_like(numbers)], axis=1)
    return clustered_statistic(columns, clusters, lambda sums: sums[..., 0] / sums[..., 1], seed=seed)


def clustered_share(
    values: Sequence[float], clusters: Sequence[Hashable] | None = None, *, seed: int = 0
) -> tuple[float, list[float]]:
    """Return the mean of numbers from 0 to 1 and its 95 % interval, which stays in that range and is never a point.

    As `clustered_mean`; where all clusters have the same mean, which no bootstrap gets away from, the exact interval of as many
    independent rows as there are clusters (Clopper and Pearson).

    >>> [round(end, 6) for end in clustered_share([0.0] * 9)[1]] == [0.0, round(1 - 0.025 ** (1 / 9), 6)]
    True
    >>> clustered_share([1.0, 0.0], ["one conversation"] * 2)
    (0.5, [0.0, 1.0])
    """
    mean, interval = clustered_mean(values, clusters, seed=seed)
    return mean, share_interval(mean, interval, len(values) if clusters is None else len(set(clusters)))


def share_interval(share: float, interval: Sequence[float] | None, clusters: int) -> list[float]:
    """Return a bootstrap's interval of a share, kept from 0 to 1; the exact one of so many rows where it is a point or absent.

    Args:
        interval: of the bootstrap; None where there was one cluster.
        clusters: how many there were.
    """
    if interval is None and 0 < share < 1:
        return [0.0, 1.0]
    if interval is None or interval[1] - interval[0] < POINT:
        wins = share * clusters
        low = 0.0 if share <= 0 else float(beta.ppf(TAIL, wins, clusters - wins + 1))
        high = 1.0 if share >= 1 else float(beta.ppf(1 - TAIL, wins + 1, clusters - wins))
        return [low, high]
    return [max(0.0, interval[0]), min(1.0, interval[1])]


def clustered_statistic(
    columns: Array, clusters: Sequence[Hashable] | None, statistic: Callable[[Array], Array], *, seed: int = 0
) -> tuple[float, list[float] | None]:
    """Return a function of sums over rows, and its 95 % interval when clusters are drawn with replacement.

    The ends are percentiles of a bootstrap, set further from the estimate by the factor

        t_{0.975, n - 1} / 1.96 · sqrt(n / (n - 1))

    of n clusters: resamples of few clusters spread less than such clusters do, and how far they spread is then not well known
    (Hesterberg, arXiv:1411.5279, section 5.3, there as other percentiles). It is 1.6 for n = 5 and 1.01 for n = 150.

    Args:
        columns: [n, k] numbers to be summed.
        statistic: from sums [..., k] to values [...]; not a number where a resample does not determine it.

    Returns:
        the value, and [low, high]; None in place of these where there is only one cluster.
    """
    index = np.arange(len(columns)) if clusters is None else _cluster_numbers(clusters)
    sums = np.stack([np.bincount(index, weights=column) for column in columns.T], axis=1)
    count = len(sums)
    rng = np.random.default_rng(seed)
    values = np.empty(RESAMPLES)
    rows = max(1, CELLS_AT_ONCE // count)
    with np.errstate(invalid="ignore", divide="ignore"):
        for start in range(0, RESAMPLES, rows):
            draws = rng.integers(0, count, size=(min(rows, RESAMPLES - start), count))
            resampled = np.stack([column[draws].sum(axis=1) for column in sums.T], axis=1)
            values[start : start + rows] = statistic(resampled)
        estimate = float(statistic(sums.sum(axis=0)))
    if count == 1:
        return estimate, None
    ends = np.nanpercentile(values, [100 * TAIL, 100 * (1 - TAIL)])
    wider = float(t.ppf(1 - TAIL, count - 1)) / NORMAL_END * math.sqrt(count / (count - 1))
    low, high = (estimate + wider * (ends - estimate)).tolist()
    return estimate, [low, high]


def paired_difference(
    first: Sequence[float],
    second: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
    *,
    span: float | None = None,
    seed: int = 0,
) -> PairedDifference:
    """Test whether one of two models is better on the same rows.

    `difference` is mean(first) - mean(second) with its clustered interval. `p_value` is that of a two-sided sign-flip
    test: if the models were equal, a prompt's summed difference would as often be positive as negative. With 0/1 values
    and no repeated prompt it is McNemar's exact test, up to the draws.

    Args:
        span: how far apart two values can lie; None: as far as these do.

    >>> [round(paired_difference([1.0] * n, [0.0] * n)["difference_ci"][0], 2) for n in (5, 6)]  # p = 0.06 and 0.03
    [-0.04, 0.08]
    """
    ones, others = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    differences = ones - others
    mean, interval = clustered_mean(differences.tolist(), clusters, seed=seed)
    index = np.arange(len(differences)) if clusters is None else _cluster_numbers(clusters)
    apart = float(np.ptp(np.concatenate([ones, others]))) if span is None else span
    interval = difference_interval(mean, interval, int(index.max()) + 1, span=apart)
    sums = np.bincount(index, weights=differences)
    sums = sums[sums != 0]
    rng = np.random.default_rng(seed)
    extreme = 0
    rows = max(1, CELLS_AT_ONCE // max(1, len(sums)))
    for start in range(0, SIGN_FLIPS, rows):
        signs = rng.integers(0, 2, size=(min(rows, SIGN_FLIPS - start), len(sums))) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9).sum())
    return {"difference": mean, "difference_ci": interval, "p_value": (extreme + 1) / (SIGN_FLIPS + 1)}


def expected_calibration_error(probabilities: Sequence[float], outcomes: Sequence[float], *, bins: int = 10) -> float:
    """Return the mean distance between stated probability and observed frequency, over equally wide bins.

        ECE = Σ_bins (n_bin / n) |mean outcome - mean probability|

    >>> expected_calibration_error([0.8, 0.8, 0.8, 0.8, 0.8], [1, 1, 1, 1, 0])
    0.0
    """
    table = calibration_table(probabilities, outcomes, bins=bins)
    total = sum(row["n"] * abs(row["frequency"] - row["probability"]) for row in table)
    return round(total / len(probabilities), 12)


def calibration_table(
    probabilities: Sequence[float], outcomes: Sequence[float], *, bins: int = 10
) -> list[dict[str, float]]:
    """Return mean stated `probability` and observed `frequency` of each equally wide bin that holds anything, and its `n`."""
    stated, observed = np.asarray(probabilities, dtype=float), np.asarray(outcomes, dtype=float)
    index = np.minimum((stated * bins).astype(int), bins - 1)
    return [
        {
            "probability": float(stated[member].mean()),
            "frequency": float(observed[member].mean()),
            "n": int(member.sum()),
        }
        for b in range(bins)
        if (member := index == b).any()
    ]


def brier_score(differences: Sequence[float], labels: Sequence[float] | float = 1.0) -> float:
    """Return the mean squared distance between σ(d) and the label, over its two outcomes: c σ(-d)² + (1 - c) σ(d)².

    0 is best for sure labels, 0.25 is that of d = 0.

    Args:
        labels: [n] c, the probability that the first side of the pair is better; 1 for labels that are sure.

    >>> brier_score([0.0, 0.0]), brier_score([0.0], [0.5])
    (0.25, 0.25)
    """
    values, sure = np.asarray(differences, dtype=float), np.asarray(labels, dtype=float)
    return float((sure * _sigmoid(-values) ** 2 + (1 - sure) * _sigmoid(values) ** 2).mean())


def pair_nll(
    differences: Sequence[float] | Array, temperature: float = 1.0, labels: Sequence[float] | Array | float = 1.0
) -> float:
    """Return the mean of -c log σ(d / T) - (1 - c) log σ(-d / T), nats a pair; log 2 for a model that knows nothing.

    Args:
        labels: [n] c, as in `brier_score`.

    >>> round(pair_nll([0.0]), 4)
    0.6931
    """
    scaled, sure = np.asarray(differences, dtype=float) / temperature, np.asarray(labels, dtype=float)
    return float((sure * np.logaddexp(0.0, -scaled) + (1 - sure) * np.logaddexp(0.0, scaled)).mean())


def best_temperature(differences: Sequence[float], labels: Sequence[float] | float = 1.0) -> float | None:
    """Return the T for which σ(d / T) fits the labels best, on the very pairs it describes; above 1 the model is too sure.

    Args:
        labels: [n] c, as in `brier_score`.

    Returns:
        T; None where no finite T above 0 fits: no label speaks against the model, or it is no better than chance.
    """
    values = np.asarray(differences, dtype=float)
    sure = np.broadcast_to(np.asarray(labels, dtype=float), values.shape)
    is_against = ((values < 0) & (sure > 0)) | ((values > 0) & (sure < 1))
    if not is_against.any() or ((2 * sure - 1) * values).sum() <= 0:
        return None
    scale = float(np.abs(values).mean())
    minimum = minimize_scalar(
        lambda log_t: pair_nll(values, scale * math.exp(log_t), sure), bounds=(-20, 20), method="bounded"
    )
    return scale * math.exp(minimum.x)


def difference_interval(
    difference: float, interval: Sequence[float] | None, clusters: int, *, span: float
) -> list[float] | None:
    """Return a bootstrap's interval of a mean difference, kept within ± span; where it is a point, (1 - u) d ± u · span.

    Where all of n clusters have one and the same difference d, no bootstrap gets away from it. Then up to a share
    u = 1 - 0.025^(1/n) of other clusters may differ (Clopper and Pearson), by as much as values lie apart.

    Args:
        interval: of the bootstrap; None where there was one cluster.
        clusters: how many there were.
        span: how far apart two values can lie.
    """
    if interval is None:
        return None
    if interval[1] - interval[0] < POINT:
        others = 1 - TAIL ** (1 / clusters)
        middle, reach = (1 - others) * difference, others * span
        return [middle - reach, middle + reach]
    return [max(-span, interval[0]), min(span, interval[1])]


def length_controlled_accuracy(
    right: Sequence[float], length_differences: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float | None, list[float] | None]:
    """Return the accuracy if the labels had no length preference.

    It is the mean of the accuracies where the chosen answer is longer and where it is shorter. A model that looks at length
    alone has exactly 0.5. Pairs of equal length don't count.

    The interval is the wider, at each end, of two: a bootstrap of clusters, which knows what the kinds have in common, and that of
    two independent shares (as `unpaired_difference`), which knows how few pairs the rarer kind has: one pair decides half of the
    value.

    Returns:
        the value and its interval; None where one of the two kinds is missing.

    >>> value, (low, high) = length_controlled_accuracy([1.0, 0.0, 1.0, 1.0, 1.0], [5, 5, 5, 5, -5])
    >>> value, round(low, 2), high
    (0.875, 0.26, 1.0)
    """
    outcome, lengths = np.asarray(right, dtype=float), np.asarray(length_differences, dtype=float)
    longer, shorter = (lengths > 0).astype(float), (lengths < 0).astype(float)
    if not longer.any() or not shorter.any():
        return None, None
    columns = np.stack([outcome * longer, longer, outcome * shorter, shorter], axis=1)
    value, interval = clustered_statistic(
        columns, clusters, lambda sums: (sums[..., 0] / sums[..., 1] + sums[..., 2] / sums[..., 3]) / 2
    )
    if interval is None:
        return value, None
    names = range(len(outcome)) if clusters is None else clusters
    shares = [
        clustered_share(
            outcome[kind > 0].tolist(), [name for name, is_kind in zip(names, kind, strict=True) if is_kind]
        )
        for kind in (longer, shorter)
    ]
    below = math.hypot(*(share - low for share, (low, _) in shares)) / 2
    above = math.hypot(*(high - share for share, (_, high) in shares)) / 2
    return value, [max(0.0, min(interval[0], value - below)), min(1.0, max(interval[1], value + above))]


def auroc(values: Sequence[float], positives: Sequence[bool]) -> float:
    """Return the probability that a positive has a higher value than a negative, ties half.

    >>> auroc([0.1, 0.4, 0.4, 0.9], [False, False, True, True])
    0.875
    """
    ranks, positive = rankdata(values), np.asarray(positives, dtype=bool)
    count = int(positive.sum())
    assert 0 < count < len(positive), "both kinds must occur"
    return float((ranks[positive].sum() - count * (count + 1) / 2) / (count * (len(positive) - count)))


def unpaired_difference(first: Sequence[float], second: Sequence[float]) -> tuple[float, float, float]:
    """Return the difference of two independent estimates, each (estimate, low, high), and its interval of the same confidence.

        low = d - sqrt( (e1 - low1)² + (high2 - e2)² ),   high = d + sqrt( (high1 - e1)² + (e2 - low2)² ),   d = e1 - e2

    Intervals that are lopsided, as those of shares near 1 are, make a lopsided one (Newcombe, Statistics in Medicine 17 (1998),
    method 10).

    >>> unpaired_difference((0.5, 0.2, 0.9), (0.5, 0.5, 0.9))
    (0.0, -0.5, 0.4)
    """
    (one, low_one, high_one), (two, low_two, high_two) = first, second
    difference = one - two
    low = difference - math.hypot(one - low_one, high_two - two)
    return difference, low, difference + math.hypot(high_one - one, two - low_two)


def win_rate(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[Hashable] | None = None
) -> tuple[float, list[float]]:
    """Return how often `first` is better than `second` on the same prompts, ties half, with its interval.

    Args:
        clusters: which prompts belong together; None if every one stands alone.

    >>> win_rate([1.0, 0.0], [0.0, 0.0])[0]
    0.75
    """
    values, others = np.asarray(first, dtype=float), np.asarray(second, dtype=float)
    return clustered_share(((values > others) + 0.5 * (values == others)).tolist(), clusters)


def _cluster_numbers(clusters: Sequence[Hashable]) -> NDArray[np.int64]:
    ids: dict[Hashable, int] = {}
    return np.array([ids.setdefault(cluster, len(ids)) for cluster in clusters])


def _sigmoid(values: Array) -> Array:
    return np.exp(-np.logaddexp(0.0, -values))
