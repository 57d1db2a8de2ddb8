"""Demonstrations as SFT reads them, each in a row of its own or packed with others: how long they are, and whether they may be."""

import warnings
from typing import Any, NamedTuple

from datasets import Dataset
from peft import PeftModel
from trl import SFTTrainer

from rlhf.errors import UserError
from rlhf.models.unpadded import can_pack

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


def refuse_packing(trainer: SFTTrainer) -> None:
    """Refuse to train on demonstrations in one row where the decoder would read each behind the others.

    Raises:
        UserError: naming the setting that puts them there.
    """
    model: Any = trainer.model
    inner = model.base_model.model if isinstance(model, PeftModel) else model
    decoder = getattr(inner, inner.base_model_prefix)
    if not trainer.padding_free:
        return
    if "flash" in decoder.config._attn_implementation and model.device.type == "cpu":
        return  # weights that are sharded later on: their attention has no kernel here
    with warnings.catch_warnings():  # of what PPO does instead
        warnings.filterwarnings("ignore", message=".*texts in one row would see each other")
        if can_pack(decoder, model.device):
            return
    key = "packing" if trainer.args.packing else "padding_free"
    raise UserError(f"sft.{key}: in a {type(decoder).__name__} texts in one row would see each other; leave it out.")
