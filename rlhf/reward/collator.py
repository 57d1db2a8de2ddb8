"""`PairCollator`: rows of pairs as a batch, each answer by itself or packed behind the prompt that it shares."""

from dataclasses import dataclass
from typing import Any

import torch

from rlhf._trl import DataCollatorForPreference
from rlhf.models.packing import pack
from rlhf.recipe.objectives import PAIR_COLUMNS


@dataclass
class PairCollator(DataCollatorForPreference):
    """TRL's collator, carrying every column that the loss reads and not only `margin`.

    With `shared`, both answers of a pair lie in one row, and so do all answers of the pairs of one `group`, each once
    (`rlhf.models.packing`).
    """

    shared: bool = False
    long_row: int | None = None
    columns: tuple[str, ...] = tuple(PAIR_COLUMNS)

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pad to `input_ids` [2b, t] (chosen above rejected) and `attention_mask`, or pack; and a float [b] per column.

        Packed batches also hold `pairs` [b, 2]: which answers are the chosen and the rejected one of each pair.
        """
        if self.shared:
            groups, pairs = _answers(examples)
            packed = pack(
                groups,
                pad_token_id=self.pad_token_id,
                pad_to_multiple_of=self.pad_to_multiple_of,
                long_row=self.long_row,
            )
            batch = {**vars(packed), "pairs": torch.tensor(pairs)}
        else:
            names = ("chosen_ids", "rejected_ids")
            batch = super().torch_call([{name: row[name] for name in names} for row in examples])
        for column in self.columns:
            if column in examples[0]:
                batch[column] = torch.tensor([row[column] for row in examples], dtype=torch.float)
        return batch


def _answers(examples: list[dict[str, Any]]) -> tuple[list[list[list[int]]], list[list[int]]]:
    """Collect the different answers of each group, and for each pair the places of its two among all answers."""
    groups: dict[tuple[str, object], dict[tuple[int, ...], int]] = {}
    members = []
    for number, row in enumerate(examples):
        key = ("row", number) if row.get("group") is None else ("group", row["group"])
        answers = groups.setdefault(key, {})
        sides = [tuple(row["chosen_ids"]), tuple(row["rejected_ids"])]
        members.append((key, [answers.setdefault(side, len(answers)) for side in sides]))
    starts, count = {}, 0
    for key, answers in groups.items():
        starts[key] = count
        count += len(answers)
    pairs = [[starts[key] + place for place in places] for key, places in members]
    return [[list(answer) for answer in answers] for answers in groups.values()], pairs
