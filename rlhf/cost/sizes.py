"""Rows and token lengths of a run's data, counted on its files."""

import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Demonstration, Pair, Prompt, Side, answer, asked, completion
from rlhf.files import read_jsonl
from rlhf.models.text import answer_text, encode, prompt_text

COUNTED = 512  # rows whose tokens are counted, of each kind
FILES = ("sft", "pairs", "test_pairs", "prompts", "test_prompts")
SIDES: tuple[Side, ...] = ("chosen", "rejected")


@dataclass(frozen=True)
class Sizes:
    """Rows and token lengths of the data.

    Attributes:
        rows: by file: sft, pairs, test_pairs, prompts, test_prompts.
        prompts, answers, demonstrations: lengths in tokens, of a sample; a demonstration's is that of prompt and answer.
        notes: what is not known, in sentences.
    """

    rows: dict[str, int]
    prompts: list[int]
    answers: list[int]
    demonstrations: list[int]
    notes: list[str] = field(default_factory=list)


def count_sizes(data: Path, tokenizer: PreTrainedTokenizerBase, *, longest_answer: int) -> Sizes:
    """Count the rows of every data file, and the tokens of up to 512 rows of each.

    Args:
        data: the folder of canonical files (`sft.jsonl`, `pairs.jsonl`, …); a file that is not there has no rows.
        longest_answer: the length in tokens that answers are taken to have where nobody has written any yet.
    """
    paths = {name: data / f"{name}.jsonl" for name in FILES}
    rows = {name: read_jsonl(path) if path.is_file() else [] for name, path in paths.items()}
    rng = random.Random(0)
    sample = {name: rng.sample(every, min(COUNTED, len(every))) for name, every in rows.items()}
    pairs = cast(list[Pair], sample["pairs"])
    demonstrations = cast(list[Demonstration], sample["sft"])

    texts = [prompt_text(tokenizer, row["prompt"]) for row in sample["pairs"] or sample["prompts"]]
    prompts = [len(ids) for ids in encode(tokenizer, texts, conversational=True)]
    answers = []
    for side in SIDES:
        whole = _lengths(tokenizer, [asked(pair, side) for pair in pairs], [answer(pair, side) for pair in pairs])
        answers += [max(1, length - prompt) for length, prompt in zip(whole, prompts, strict=False)]
    note = f"No pairs yet: answers are taken to be {longest_answer} tokens long, so these are upper bounds."
    return Sizes(
        rows={name: len(every) for name, every in rows.items()},
        prompts=prompts,
        answers=answers or [longest_answer],
        demonstrations=_lengths(
            tokenizer, [row["prompt"] for row in demonstrations], [completion(row) for row in demonstrations]
        ),
        notes=[] if answers else [note],
    )


def _lengths(tokenizer: PreTrainedTokenizerBase, prompts: list[Prompt], answers: list[str]) -> list[int]:
    """Return the number of tokens of each prompt with its answer."""
    texts = [answer_text(tokenizer, prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
    return [len(ids) for ids in encode(tokenizer, texts, conversational=True)] if texts else []
