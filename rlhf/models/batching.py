"""Batches of rows of similar length, so that little is padding: the one loop behind scoring, sampling and features."""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from rlhf.progress import track

Result = TypeVar("Result")
TOKENS_TOGETHER = 2**13  # in a forward without gradients, so that memory stays bounded: 64 rows of 128


def batches_by_length(
    lengths: Sequence[int], batch_size: int, *, longest_first: bool = False, most_tokens: int | None = None
) -> list[list[int]]:
    """Sort rows by length and cut them into batches; rows of one length stay in their order.

    Args:
        lengths: of every row.
        batch_size: rows in a batch; some may have fewer.
        longest_first: start with the longest, so that what does not fit in memory fails at once.
        most_tokens: that a batch may have, padding counted; a row of its own may have more.

    Returns:
        the indices of each batch's rows.

    >>> batches_by_length([3, 1, 2, 1], 2)
    [[1, 3], [2, 0]]
    >>> batches_by_length([3, 1, 2, 1], 2, longest_first=True)
    [[0, 2], [1, 3]]
    >>> batches_by_length([9, 1, 2, 1], 3, most_tokens=4)
    [[1, 3], [2], [0]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=longest_first)
    batches: list[list[int]] = [[]]
    for row in order:
        longest = max(lengths[row], *(lengths[i] for i in batches[-1][:1]), 0)
        too_many = most_tokens is not None and longest * (len(batches[-1]) + 1) > most_tokens
        if len(batches[-1]) == batch_size or (batches[-1] and too_many):
            batches.append([])
        batches[-1].append(row)
    return batches if order else []


def pad_batch(rows: Sequence[Sequence[int]], *, pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Return token ids and attention mask [b, longest] of at least one row, padded on the right, on the CPU.

    >>> pad_batch([[5, 6], [7]], pad_token_id=0)
    (tensor([[5, 6],
            [7, 0]]), tensor([[1, 1],
            [1, 0]]))
    """
    ids = [torch.tensor(row, dtype=torch.long) for row in rows]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_value=pad_token_id)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, (torch.arange(padded.shape[1]) < lengths[:, None]).long()


def run_batches(
    function: Callable[[list[int]], Iterable[Result]], batches: Sequence[list[int]], *, label: str | None = None
) -> list[Result]:
    """Call a function on every batch and return what it gives for each row, in the order of the rows.

    Args:
        function: takes the indices of a batch's rows and returns a result for each of them.
        batches: indices of rows; together they name each row of 0, 1, …, n - 1 once.
        label: what people know this work by; shows how far it is.
    """
    results: dict[int, Result] = {}
    for batch in batches if label is None else track(batches, label):
        results.update(zip(batch, function(batch), strict=True))
    return [results[row] for row in range(len(results))]
