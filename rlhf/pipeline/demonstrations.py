"""How long demonstrations are as SFT reads them, each in a row of its own or packed with others."""

from typing import NamedTuple

from datasets import Dataset

IGNORED = -100  # the label of a token that nothing is learnt of


class ReadLengths(NamedTuple):
    """What is read of demonstrations.

    Attributes:
        tokens: of each piece, in the order of the rows: a demonstration, or what packing made of it.
        without_answer: pieces of which nothing is learnt, as a prompt alone fills them.
    """

    tokens: list[int]
    without_answer: int


def read_lengths(dataset: Dataset) -> ReadLengths:
    """Return the lengths of what TRL made of demonstrations.

    Args:
        dataset: the trainer's, with `input_ids`, `labels` and, where rows are packed, `seq_lengths`.
    """
    tokens: list[int] = []
    without_answer = 0
    for row in dataset:
        begin = 0
        for length in row.get("seq_lengths") or [len(row["input_ids"])]:
            tokens.append(length)
            without_answer += all(label == IGNORED for label in row["labels"][begin : begin + length])
            begin += length
    return ReadLengths(tokens, without_answer)
