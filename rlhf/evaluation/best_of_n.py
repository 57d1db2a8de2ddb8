"""The best of n samples: its KL, its reward, and how far a policy comes towards it."""

import math
from collections.abc import Hashable, Sequence

import numpy as np

from rlhf.statistics import POINT, Array, clustered_statistic


def best_of_n_kl(n: int) -> float:
    """Return the KL, in nats, of always taking the best of n samples from the sampling policy: log n - (n - 1)/n.

    With ties it is an upper bound.

    >>> round(best_of_n_kl(16), 4)
    1.8351
    """
    return math.log(n) - (n - 1) / n


def best_of_n_values(
    proxy: Sequence[Sequence[float] | Array], gold: Sequence[Sequence[float] | Array], n: int
) -> list[float]:
    """Return for each prompt the expected gold value of the sample that the proxy ranks best among n of its N samples.

        E_n = Σ_i C(i - 1, n - 1) / C(N, n) · gold_(i),  i = 1…N ascending in the proxy

    Unbiased over all subsets of size n (Nakano et al., arXiv:2112.09332, appendix I); equal proxies share their gold.

    Args:
        proxy, gold: [prompts, N].

    >>> best_of_n_values([[1.0, 2.0, 3.0]], [[0.0, 0.0, 1.0]], 2)
    [0.6666666666666666]
    """
    values = []
    for scores, golds in zip(np.asarray(proxy, dtype=float), np.asarray(gold, dtype=float), strict=True):
        total = len(scores)
        assert 1 <= n <= total, "n samples out of N"
        shared = np.array([golds[scores == score].mean() for score in scores])
        ascending = shared[np.argsort(scores, kind="stable")]
        weights = np.array([math.comb(i, n - 1) for i in range(total)], dtype=float) / math.comb(total, n)
        values.append(float((weights * ascending).sum()))
    return values


def gap_closed(
    values: Sequence[float],
    start: Sequence[float],
    best: Sequence[float],
    clusters: Sequence[Hashable] | None = None,
) -> tuple[float | None, list[float] | None]:
    """Return which part of the way from `start` to `best` the values go, and its 95 % interval.

        (mean values - mean start) / (mean best - mean start)

    Prompts, or clusters of them, are drawn with replacement, the three values of one together (a paired bootstrap): a hard prompt
    is hard for all three, and the same draw stands above and below the line. The delta method would need the same covariances and
    takes a ratio for normal, which it is not where the gap below the line is narrow.

    Args:
        values, start, best: [prompts] each; the best of several answers of which `start` is one, so that best ≥ start.
        clusters: which prompts belong together; None if every one stands alone.

    Returns:
        the ratio and its interval; None where there is no way to go, and no interval where there is only one cluster, or all that
        have a way to go went the same part of it, which no bootstrap gets away from.

    >>> gap_closed([1.0, 1.0], [0.0, 0.0], [2.0, 2.0])
    (0.5, None)
    """

    def ratio(sums: Array) -> Array:
        gap = sums[..., 2] - sums[..., 1]
        return np.where(gap > 0, (sums[..., 0] - sums[..., 1]) / gap, np.nan)

    columns = np.stack([np.asarray(column, dtype=float) for column in (values, start, best)], axis=1)
    value, low, high = (columns.sum(axis=0) / len(columns)).tolist()
    if not high > low:
        return None, None
    interval = clustered_statistic(columns, clusters, ratio)[1]
    is_point = interval is None or interval[1] - interval[0] < POINT
    return (value - low) / (high - low), None if is_point else interval
