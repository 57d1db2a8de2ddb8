"""What batches drawn from some rows are like: their mean shape, their longest row, and when their answers end."""

import random
import statistics
from collections.abc import Sequence
from typing import NamedTuple

from rlhf.cost.slices import Shape
from rlhf.models.generate import STRETCH

BATCHES = 200  # drawn to learn what a batch is like


class Scoring(NamedTuple):
    """Cost of scoring some texts: seconds, and the bytes of the largest batch beside the weights."""

    seconds: float
    bytes: float


def mean_shape(shapes: Sequence[Shape]) -> Shape:
    """Return the shape with the mean number of tokens of some, its rows about as long as those of most of their tokens.

    >>> mean_shape([Shape(4, 10, 0), Shape(2, 20, 0)])
    Shape(rows=3, length=13, answer=0)
    """
    tokens = [shape.rows * shape.length for shape in shapes]
    typical = sum(n * shape.length for n, shape in zip(tokens, shapes, strict=True)) / sum(tokens)
    mean = statistics.mean(tokens)
    rows = max(1, round(mean / typical))
    return Shape(rows, round(mean / rows), 0)


def longest_of(lengths: Sequence[int], rows: int) -> int:
    """Estimate the longest of so many rows, drawn from lengths: a mean over 200 batches, and what a padded batch is as long as."""
    rng = random.Random(0)
    return round(statistics.mean(max(rng.choices(lengths, k=rows)) for _ in range(BATCHES)))


def stretches_of(lengths: Sequence[int], rows: int) -> list[tuple[float, float]]:
    """Estimate in which steps answers are written: of each stretch its tokens, and how many rows are still at work.

    Means over 200 batches of so many rows, drawn from lengths; rows that have ended leave the batch between stretches.

    >>> stretches_of([20], 3)
    [(16.0, 3.0), (4.0, 3.0)]
    """
    rng = random.Random(0)
    batches = [rng.choices(lengths, k=rows) for _ in range(BATCHES)]
    stretches = []
    for begin in range(0, max(lengths), STRETCH):
        left = [[length - begin for length in batch if length > begin] for batch in batches]
        at_work = [len(batch) for batch in left if batch]
        if at_work:
            tokens = sum(min(STRETCH, max(batch)) for batch in left if batch) / BATCHES
            stretches.append((tokens, statistics.mean(map(float, at_work))))
    return stretches
