"""A rate from few labels of people and many of a judge: prediction-powered inference, for one look and for any number of looks.

Of every row a judge says how likely it is a win, f in [0, 1]; of some rows, drawn at random, a person says it too, y in [0, 1]
(a tie is 1/2). People are right and few; the judge may be wrong in any way and still make the interval narrower, never wrong.
"""

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as students_t

CONFIDENCE = 0.95
FEWEST = 3  # labels below which a deviation is no estimate
GRID = 2001  # rates that are tried, at least
MOST_EXACT = 5000  # rows; of more, half a step of these rates is less than anybody looks at
BET = 0.5  # of what a bet may lose at most
FEW_FOR_WEIGHT = 10.0  # the judge's weight is drawn to 0 as if so many labels had shown that it knows nothing
Array = NDArray[np.float64]


class Rate(NamedTuple):
    """A rate, the ends of its 95 % interval, and the weight that the judge has in it, in [0, 1]."""

    mean: float
    low: float
    high: float
    judge_weight: float


class Prompts(NamedTuple):
    """Which prompt each row is of: rows of one prompt are not independent."""

    labelled: Sequence[Hashable]
    alone: Sequence[Hashable]


def human_rate(human: Sequence[float], prompts: Prompts | None = None) -> Rate:
    """Return the rate by people alone, with Student's interval.

    Args:
        prompts: as in `powered_rate`.

    >>> human_rate([1.0, 0.0, 1.0, 0.0]).mean
    0.5
    """
    labels = np.asarray(human, dtype=float)
    clusters = range(len(labels)) if prompts is None else prompts.labelled
    squares, count = _squares_by_prompt((labels - labels.mean()) / len(labels), clusters), effective_count(clusters)
    variance = squares * count / (count - 1) if count > 1 else math.inf
    return _with_interval(float(labels.mean()), variance, count - 1, 0.0)


def powered_rate(
    human: Sequence[float], judge: Sequence[float], judge_alone: Sequence[float], prompts: Prompts | None = None
) -> Rate:
    """Return the rate of rows like these: what the judge says of all, corrected by what people say of some. For one look.

        θ = λ · mean f(alone) + mean r,   r = y - λ f,   λ = Cov(y, f) / ( (1 + n/N) Var f ), in [0, 1]
        Var θ = λ² Var(f) / N + Var(r) / n
        Var(r) = ( Σ ( r - mean r )² + λ ( 0 - λ f⁺ - mean r )² + λ ( 1 - λ f⁻ - mean r )² ) / ( n - 1 + 2 λ )

    The last two squares are of two labels that contradict the judge, each counted λ times: a loss where it says f⁺, the mean of
    its verdicts from their mean up, and a win where it says f⁻, the mean of those below. Without them a judge that is wrong in
    one of 25 rows, and by chance in none of the first 20 labels, would be believed outright: the interval then held the truth 57
    times of 100.

    Special cases: a judge who knows nothing has λ = 0 and leaves the rate of people alone; one that is always right has λ near
    1 and makes it that of n + N labels, once n is large. The interval is Student's with n - 2 degrees of freedom, as λ is fitted
    too.

    Where several rows are of one prompt, prompts are what is drawn. Each adds to θ - its mean the sum, over its rows, of
    λ ( f - mean f ) / N and ( r - mean r ) / n; the variance is the sum of the squares of these, the two labels more with them,
    times C / ( C - 1 + 2 λ ) of C prompts with labels, and the degrees of freedom are C - 2.

    Args:
        human, judge: [n] what both say of the rows that people labelled, n ≥ 3.
        judge_alone: [N] what the judge says of all other rows.
        prompts: of these rows; None if every row has one of its own.

    Reference: PPI++, arXiv:2311.01453, eq. 2 and section 6 (power tuning for a mean); arXiv:2301.09633. The two labels more are
    ours, after Agresti and Coull (1998).

    >>> powered_rate([1.0, 0.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5], [0.9]).mean
    0.5
    """
    labels, verdicts, alone = (np.asarray(values, dtype=float) for values in (human, judge, judge_alone))
    n, rows = len(labels), len(alone)
    assert n >= FEWEST, "a deviation needs three labels"
    all_verdicts = np.concatenate([verdicts, alone])
    spread = float(all_verdicts.var(ddof=1))
    weight = 0.0
    if rows and spread > 0:
        weight = min(1.0, max(0.0, float(np.cov(labels, verdicts)[0, 1]) / ((1 + n / rows) * spread)))
    rest = labels - weight * verdicts
    mean = float(rest.mean()) + (weight * float(alone.mean()) if rows else 0.0)
    contradicted = 0.0
    if weight > 0:  # so the verdicts differ, and some lie below their mean
        is_up = all_verdicts >= all_verdicts.mean()
        up, down = float(all_verdicts[is_up].mean()), float(all_verdicts[~is_up].mean())
        contradicting = np.array([0.0 - weight * up, 1.0 - weight * down])
        contradicted = weight * float(((contradicting - rest.mean()) ** 2).sum())
    if prompts is None or len({*prompts.labelled, *prompts.alone}) == n + rows:
        of_rest = (float(((rest - rest.mean()) ** 2).sum()) + contradicted) / (n - 1 + 2 * weight)
        return _with_interval(mean, of_rest / n + (weight**2 * spread / rows if rows else 0.0), n - 2, weight)
    parts = [(rest - rest.mean()) / n, weight * (alone - alone.mean()) / rows if rows else alone]
    squares = _squares_by_prompt(np.concatenate(parts), [*prompts.labelled, *prompts.alone]) + contradicted / n**2
    count = effective_count(prompts.labelled)
    variance = squares * count / (count - 1 + 2 * weight) if count > FEWEST - 1 else math.inf
    return _with_interval(mean, variance, count - 2, weight)


def effective_count(prompts: Sequence[Hashable]) -> float:
    """Return of how many prompts with equally many rows these rows are worth: ( Σ n_c )² / Σ n_c².

    So many independent rows have a mean as uncertain as theirs, where the rows of a prompt are all alike (Kish 1965).

    Special cases: rows of prompts of their own count one each, prompts of one size too; a large one among many small ones takes
    away almost all.

    >>> effective_count(range(9)), effective_count("aabbcc"), round(effective_count([*range(50), *["large"] * 50]), 2)
    (9.0, 3.0, 3.92)
    """
    counts = Counter(prompts).values()
    return sum(counts) ** 2 / sum(count**2 for count in counts)


def _squares_by_prompt(parts: Array, prompts: Sequence[Hashable]) -> float:
    """Return Σ ( Σ parts of one prompt )²."""
    sums: dict[Hashable, float] = {}
    for part, prompt in zip(parts.tolist(), prompts, strict=True):
        sums[prompt] = sums.get(prompt, 0.0) + part
    return sum(total**2 for total in sums.values())


def _with_interval(mean: float, variance: float, freedom: float, weight: float) -> Rate:
    if math.isinf(variance):  # of too few prompts nothing is known
        return Rate(min(1.0, max(0.0, mean)), 0.0, 1.0, weight)
    half = float(students_t.ppf((1 + CONFIDENCE) / 2, freedom)) * math.sqrt(variance)
    low, high = max(0.0, mean - half), min(1.0, mean + half)
    return Rate(min(1.0, max(0.0, mean)), min(low, 1.0), max(high, 0.0), weight)


def rate_at_any_look(
    human: Sequence[float], judge: Sequence[float], judge_alone: Sequence[float], *, confidence: float = CONFIDENCE
) -> list[tuple[float, float]]:
    """Return an interval for the rate of all n + N rows after every label of people; all of them hold together.

    So whoever looks after every label, and stops when the answer is clear, is wrong no more often than they say.

    For each candidate θ somebody bets, before each label is read, that the labels are higher, and somebody that they are lower:

        K±_t(θ) = Π_s ( 1 ± η_s ( z_s - m_s(θ) ) ),   z_s = y_s - λ_s ( f_s - f̄_s )
        m_s(θ) = ( M θ - Σ_{r<s} y_r ) / ( M - s + 1 ),   M = n + N

    f̄_s is the judge's mean over the M - s + 1 rows that have no label before label s, so E[z_s | before] = m_s(θ) for the true
    θ, whatever the judge is. Stakes η_s and weight λ_s are chosen from labels before s. By Ville's inequality the true θ lets
    ( K⁺ + K⁻ ) / 2 ever reach 1/α with probability at most α; candidates that do are out.

    Args:
        human, judge: [n] in the order in which they were labelled, which must be drawn at random from all rows.
        judge_alone: [N] the judge on the rows without a label.

    Returns:
        [n] (low, high), nested: each lies in the one before. Not a number from where no rate is left: the labels are no random
        draw in this order, but for a chance of 1 - confidence.

    Reference: Waudby-Smith and Ramdas, arXiv:2010.09686, theorem 3 (hedged capital) and section 5 (without replacement).
    """
    labels, verdicts = np.asarray(human, dtype=float), np.asarray(judge, dtype=float)
    remaining, rows = float(verdicts.sum() + np.sum(judge_alone)), len(verdicts) + len(judge_alone)
    spread = float(np.concatenate([verdicts, np.asarray(judge_alone, dtype=float)]).var())
    candidates = _candidates(rows, len(labels))
    between = (
        0.0 if (len(candidates) - 1) % (2 * rows) == 0 else candidates[1] / 2
    )  # how far the rate may be from the nearest
    higher, lower = np.ones_like(candidates), np.ones_like(candidates)
    is_in = np.ones(len(candidates), dtype=bool)
    corrected = np.empty(len(labels))
    intervals: list[tuple[float, float]] = []
    for s in range(len(labels)):
        # 1. Before the label: what each candidate expects, the judge's weight, the stakes.
        left = rows - s
        mean_left = remaining / left
        expected = (rows * candidates - labels[:s].sum()) / left
        slack = 0.5 * candidates[1] * rows / left  # half a step of the candidates: the true rate may lie between two
        is_in &= (expected >= -slack) & (expected <= 1 + slack)  # some labels of the rest would be outside [0, 1]
        expected = np.clip(expected, 0, 1)
        weight = _weight_so_far(labels[:s], verdicts[:s], spread)
        lowest, highest = -weight * (1 - mean_left), 1 + weight * mean_left
        stake = _stake(corrected[:s], confidence)
        up = np.minimum(stake, BET / np.maximum(expected - lowest, 1e-12))
        down = np.minimum(stake, BET / np.maximum(highest - expected, 1e-12))

        # 2. The label.
        value = labels[s] - weight * (verdicts[s] - mean_left)
        higher *= 1 + up * (value - expected)
        lower *= 1 - down * (value - expected)
        corrected[s] = value
        remaining -= verdicts[s]

        # 3. Who is left. The true rate is among them but for a chance of α.
        is_in &= (higher + lower) / 2 < 1 / (1 - confidence)
        inside = candidates[is_in]
        ends = (
            (max(0.0, inside.min() - between), min(1.0, inside.max() + between))
            if len(inside)
            else (math.nan, math.nan)
        )
        intervals.append((float(ends[0]), float(ends[1])))
    return intervals


def _candidates(rows: int, labelled: int) -> Array:
    """Return rates from 0 to 1; where most of few rows are labelled, all that whole and half labels of so many can have."""
    steps = GRID - 1
    if 2 * labelled > rows and rows <= MOST_EXACT:
        steps = 2 * rows * math.ceil(steps / (2 * rows))
    return np.linspace(0, 1, steps + 1)


def _weight_so_far(labels: Array, verdicts: Array, spread: float) -> float:
    """Return the judge's weight by the labels so far, drawn to 0 while they are few."""
    if len(labels) < FEWEST or spread == 0:
        return 0.0
    covariance = float(((labels - labels.mean()) * (verdicts - verdicts.mean())).sum()) / (len(labels) + FEW_FOR_WEIGHT)
    return min(1.0, max(0.0, covariance / spread))


def _stake(corrected: Array, confidence: float) -> float:
    """Return the predictable stake: sqrt( 2 log(2/α) / ( v t log(1 + t) ) ), v the variance so far, a quarter to begin with."""
    count = len(corrected)
    mean = (0.5 + corrected.sum()) / (count + 1)
    variance = (0.25 + ((corrected - mean) ** 2).sum()) / (count + 1)
    time = count + 1
    return math.sqrt(2 * math.log(2 / (1 - confidence)) / (variance * time * math.log(1 + time)))
