"""What batches drawn from some rows are like: their mean shape, their longest row, and when their answers end."""

import math
import random
import statistics
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from rlhf.cost.sizes import PairTokens
from rlhf.cost.slices import Shape
from rlhf.models.generate import STRETCH
from rlhf.models.packing import balanced_rows

BATCHES = 200  # drawn to learn what a batch is like


class Scoring(NamedTuple):
    """Cost of scoring some texts: seconds, and the bytes of the largest batch beside the weights."""

    seconds: float
    bytes: float


class PairBatch(NamedTuple):
    """What a reward model reads in one step.

    Attributes:
        shape: of all views, with padding.
        texts: how many different ones there are.
        tokens: of these, read once, without padding.
        elements: pairs or rankings.
    """

    shape: Shape
    texts: int
    tokens: int
    elements: int


def elements_by_length(pairs: Sequence[PairTokens], *, are_rankings: bool) -> list[list[PairTokens]]:
    """Return the pairs of each element that is trained on, a pair or a ranking, the longest first and groups together.

    >>> long, short, other = PairTokens(1, 9, 2, "a"), PairTokens(1, 2, 2, "a"), PairTokens(1, 5, 5)
    >>> elements_by_length([short, other, long], are_rankings=False) == [[short], [long], [other]]
    True
    >>> elements_by_length([short, other, long], are_rankings=True) == [[short, long], [other]]
    True
    """
    groups: dict[tuple[str, Hashable], list[PairTokens]] = {}
    for number, pair in enumerate(pairs):
        groups.setdefault(("row", number) if pair.group is None else ("group", pair.group), []).append(pair)
    longest_first = sorted(groups.values(), key=lambda group: -max(max(pair.chosen, pair.rejected) for pair in group))
    return longest_first if are_rankings else [[pair] for group in longest_first for pair in group]


def different_texts(pairs: Sequence[PairTokens]) -> list[list[list[int]]]:
    """Return the different texts of each group in some pairs; in place of their ids, 0 for what they share and one for each answer.

    >>> different_texts([PairTokens(1, 3, 2, "g", (0, 1)), PairTokens(1, 3, 4, "g", (0, 2)), PairTokens(0, 1, 1)])
    [[[0, 1, 1], [0, 2], [0, 3, 3, 3]], [[1], [2]]]
    """
    groups: dict[tuple[str, Hashable], dict[int, list[int]]] = {}
    for number, pair in enumerate(pairs):
        texts = groups.setdefault(("row", number) if pair.group is None else ("group", pair.group), {})
        for place, length in zip(pair.places, (pair.chosen, pair.rejected), strict=True):
            texts[place] = [0] * pair.shared + [place + 1] * (length - pair.shared)
    return [list(texts.values()) for texts in groups.values()]


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


def unpadded_shapes(
    prompts: Sequence[int], answers: Sequence[int], texts: int, *, long_row: int, limit: int
) -> tuple[Shape, Shape]:
    """Return the mean shape of batches of so many texts, laid out in rows without padding, and the largest if no answer ends.

    The logits of a row are its share of those of the batch.

    Args:
        prompts, answers: tokens of each; a text is one of either.
        texts: in a batch.
        long_row: the row length at which attention costs as much as all else in a layer.
        limit: tokens of an answer that does not end.

    >>> unpadded_shapes([10], [6], 8, long_row=384, limit=9)
    (Shape(rows=8, length=16, answer=6), Shape(rows=8, length=19, answer=9))
    """
    rng = random.Random(0)

    def shape(drawn: Sequence[int]) -> Shape:
        lengths = [prompt + answer for prompt, answer in zip(rng.choices(prompts, k=texts), drawn, strict=True)]
        rows = balanced_rows(lengths, long_row, widest=1)
        width = max(sum(lengths[text] for text in row) for row in rows)
        return Shape(len(rows), width, math.ceil(sum(drawn) / len(rows)))

    mean = mean_shape([shape(rng.choices(answers, k=texts)) for _ in range(BATCHES)])
    answer = math.ceil(texts * statistics.mean(answers) / mean.rows)
    unending = [shape([limit] * texts) for _ in range(BATCHES)]
    return Shape(mean.rows, mean.length, answer), max(unending, key=lambda one: one.rows * one.length)
