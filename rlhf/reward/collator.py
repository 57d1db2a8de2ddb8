"""`PairCollator`: rows of pairs as a batch, each answer by itself or packed behind the prompt that it shares."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.functional import pad

from rlhf._trl import DataCollatorForPreference
from rlhf.models.batching import pad_batch
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
            batch = {**self.answers(groups), "pairs": torch.tensor(pairs)}
        else:
            names = ("chosen_ids", "rejected_ids")
            batch = super().torch_call([{name: row[name] for name in names} for row in examples])
        return batch | self.column_values(examples)

    def answers(self, groups: Sequence[Sequence[Sequence[int]]]) -> dict[str, Any]:
        """Return the answers of groups, one group's after another's: packed, with `shared`; else padded, each in a row."""
        if self.shared:
            options = {"pad_token_id": self.pad_token_id, "pad_to_multiple_of": self.pad_to_multiple_of}
            return dict(vars(pack(groups, **options, long_row=self.long_row)))
        ids, mask = pad_batch([ids for group in groups for ids in group], pad_token_id=self.pad_token_id)
        missing = -ids.shape[1] % (self.pad_to_multiple_of or 1)
        return {
            "input_ids": pad(ids, (0, missing), value=self.pad_token_id),
            "attention_mask": pad(mask, (0, missing)),
        }

    def column_values(self, examples: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Return the columns that the loss reads and these rows have, [b] float each."""
        columns = [name for name in self.columns if name in examples[0]]
        return {name: torch.tensor([row[name] for row in examples], dtype=torch.float) for name in columns}


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
