"""Rows and token lengths of a run's data, counted on its files."""

import random
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, cast

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Demonstration, Pair, Prompt, Side, answer, asked, completion
from rlhf.files import read_jsonl
from rlhf.models.text import answer_text, encode, prompt_text

COUNTED = 512  # rows whose tokens are counted, of each kind; all pairs of a group that is among them
FILES = ("sft", "pairs", "test_pairs", "prompts", "test_prompts", "ratings")
SIDES: tuple[Side, ...] = ("chosen", "rejected")


class PairTokens(NamedTuple):
    """Tokens of a pair.

    Attributes:
        shared: what its two texts begin with alike, and all others of its group.
        chosen, rejected: of each whole text.
        group: what pairs of answers to one prompt have in common, which are trained on together; None for a pair by itself.
        places: which of the different texts of its group are its two.
    """

    shared: int
    chosen: int
    rejected: int
    group: Hashable = None
    places: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Sizes:
    """Rows and token lengths of the data.

    Attributes:
        rows: by file: sft, pairs, test_pairs, prompts, test_prompts, ratings.
        prompts, answers, demonstrations: lengths in tokens, of a sample; a demonstration's is that of prompt and answer.
        pairs: of a sample; where nobody has compared answers yet, of as many with the longest ones.
        rankings, ranked_answers: how many rankings the pairs make, and how many answers these have together.
        notes: what is not known, in sentences.
    """

    rows: dict[str, int]
    prompts: list[int]
    answers: list[int]
    demonstrations: list[int]
    pairs: list[PairTokens] = field(default_factory=list)
    rankings: int = 0
    ranked_answers: int = 0
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
    sample = {name: _sample(every, rng) for name, every in rows.items()}
    pairs = cast(list[Pair], sample["pairs"])
    demonstrations = cast(list[Demonstration], sample["sft"])

    texts = [prompt_text(tokenizer, row["prompt"]) for row in sample["pairs"] or sample["prompts"]]
    prompts = [len(ids) for ids in encode(tokenizer, texts, conversational=True)]
    chosen, rejected = (
        _encoded(tokenizer, [asked(pair, side) for pair in pairs], [answer(pair, side) for pair in pairs])
        for side in SIDES
    )
    answers = [
        max(1, len(row) - prompt)
        for side in (chosen, rejected)
        for row, prompt in zip(side, prompts if side else [], strict=True)
    ]
    asked_of = [row["prompt"] for row in demonstrations]
    whole = _encoded(tokenizer, asked_of, [completion(row) for row in demonstrations])
    compared = _compared(pairs, chosen, rejected)
    unknown = [PairTokens(prompt, prompt + longest_answer, prompt + longest_answer) for prompt in prompts]
    note = f"No pairs yet: answers are taken to be {longest_answer} tokens long, so these are upper bounds."
    answers_of: dict[object, set[str]] = {}
    for number, pair in enumerate(cast(list[Pair], rows["pairs"])):
        answers_of.setdefault(_group(pair, number), set()).update(answer(pair, side) for side in SIDES)
    return Sizes(
        rows={name: len(every) for name, every in rows.items()},
        prompts=prompts,
        answers=answers or [longest_answer],
        demonstrations=[len(row) for row in whole],
        pairs=compared or unknown,
        rankings=len(answers_of),
        ranked_answers=sum(map(len, answers_of.values())),
        notes=[] if answers else [note],
    )


def _sample(rows: Sequence[Mapping[str, Any]], rng: random.Random) -> list[Mapping[str, Any]]:
    """Return some of the rows, with each all of its group."""
    groups: dict[tuple[str, Hashable], list[Mapping[str, Any]]] = {}
    for number, row in enumerate(rows):
        groups.setdefault(_group(row, number), []).append(row)
    sample: list[Mapping[str, Any]] = []
    for group in rng.sample(list(groups.values()), min(COUNTED, len(groups))):
        if len(sample) >= COUNTED:
            break
        sample += group
    return sample


def _group(row: Mapping[str, Any], number: int) -> tuple[str, Hashable]:
    """Return what a row has in common with others of its group; of a row without one, its number."""
    return ("row", number) if row.get("group") is None else ("group", row["group"])


def _compared(pairs: Sequence[Pair], chosen: Sequence[list[int]], rejected: Sequence[list[int]]) -> list[PairTokens]:
    """Return the tokens of pairs whose two texts have these token ids."""
    texts: dict[tuple[str, Hashable], dict[tuple[int, ...], int]] = {}  # different ones, by group
    for number, (pair, *sides) in enumerate(zip(pairs, chosen, rejected, strict=True)):
        of_group = texts.setdefault(_group(pair, number), {})
        for side in sides:
            of_group.setdefault(tuple(side), len(of_group))
    shared = {name: min(_alike(next(iter(group)), text) for text in group) for name, group in texts.items()}
    compared = []
    for number, (pair, c, r) in enumerate(zip(pairs, chosen, rejected, strict=True)):
        name = _group(pair, number)
        places = texts[name][tuple(c)], texts[name][tuple(r)]
        compared.append(PairTokens(shared[name], len(c), len(r), pair.get("group"), places))
    return compared


def _encoded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[list[int]]:
    """Return the token ids of each prompt with its answer."""
    texts = [answer_text(tokenizer, prompt, text) for prompt, text in zip(prompts, answers, strict=True)]
    return encode(tokenizer, texts, conversational=True) if texts else []


def _alike(one: Sequence[int], other: Sequence[int]) -> int:
    """Count the tokens that two texts begin with alike; each keeps one of its own, for its score.

    >>> _alike([5, 6, 7], [5, 6, 8]), _alike([5], [5, 6])
    (2, 0)
    """
    limit = min(len(one), len(other)) - 1
    return next((i for i in range(limit) if one[i] != other[i]), limit)
