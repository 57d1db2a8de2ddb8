"""What SFT says of demonstrations that are packed into rows."""

from datasets import Dataset
from trl import pack_dataset

from rlhf.pipeline.demonstrations import read_lengths

LENGTHS, PROMPTS = [5, 3, 9, 2, 4], [1, 2, 8, 1, 3]
ROWS = Dataset.from_list(
    [
        {"input_ids": list(range(length)), "labels": [-100] * prompt + [1] * (length - prompt)}
        for length, prompt in zip(LENGTHS, PROMPTS, strict=True)
    ]
)


def test_demonstrations_are_counted_and_not_their_rows() -> None:
    alone = read_lengths(ROWS)
    assert (alone.tokens, alone.without_answer) == (LENGTHS, 0)
    packed = pack_dataset(ROWS, 8, "bfd")
    assert len(packed) < len(ROWS)
    read = read_lengths(packed)
    assert sorted(read.tokens) == sorted(min(length, 8) for length in LENGTHS)
    assert read.without_answer == 1, "the third one's prompt alone fills a row"
