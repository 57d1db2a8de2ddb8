"""Demonstrations as ids: an answer is trained behind the very ids that sampling begins with."""

from collections.abc import Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Messages, Prompt, has_ended
from rlhf.models.generate import answer_starts, asked_texts
from rlhf.models.templates import end_texts, frame, without_ends
from rlhf.models.text import answer_text, encode, encode_answers
from rlhf.models.typed import as_words

ANCHOR = "\n"  # stands before a text that goes on, so that no tokenizer writes the blank that it puts before a text's first word


def encode_demonstrations(
    batch: Mapping[str, Sequence[Messages]], tokenizer: PreTrainedTokenizerBase
) -> dict[str, list[list[int]]]:
    """Return the columns that TRL's SFT makes of conversations: `input_ids`, and `completion_mask` with 1 on the answer.

    Typed special tokens are words.

    Args:
        batch: `prompt`, and `completion`, one assistant message each.
    """
    answers = [completion[-1]["content"] for completion in batch["completion"]]
    ended = [has_ended(completion) for completion in batch["completion"]]
    rows, starts = encode_behind_prompts(tokenizer, batch["prompt"], answers, ended)
    masks = [[0] * start + [1] * (len(row) - start) for start, row in zip(starts, rows, strict=True)]
    return {"input_ids": rows, "completion_mask": masks}


def encode_behind_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str], ended: Sequence[bool]
) -> tuple[list[list[int]], list[int]]:
    r"""Return the ids of prompts with their answers, and where each answer begins; one that was cut off has no end token.

    A prompt that ends in a blank, or for some tokenizers in two newlines, melts with the answer's first word where the two are
    one text. Sampling begins behind the prompt's own ids, so these stand here, and the answer's ids behind them.

    Where the template writes another text behind the prompt than it asks with (`rlhf.models.thoughts` says so), the ids are
    those of the whole text, and the answer begins where the two part.
    """
    rows, _ = encode_answers(tokenizer, prompts, answers, ended=ended)
    starts = answer_starts(tokenizer, prompts, rows)
    asked = asked_texts(tokenizer, prompts)
    conversational = not isinstance(prompts[0], str)
    prompt_rows = encode(tokenizer, asked, conversational=conversational)
    ends = frame(tokenizer).ends if conversational else end_texts(tokenizer)
    for i, prompt_row in enumerate(prompt_rows):
        if starts[i] == len(prompt_row):
            continue
        prompt = prompts[i]
        words = as_words(tokenizer, without_ends(answers[i], ends))
        asked_with = prompt if isinstance(prompt, str) else as_words(tokenizer, prompt)
        whole = answer_text(tokenizer, asked_with, words, ended=ended[i])
        if whole.startswith(asked[i]):
            rows[i] = [*prompt_row, *_continuation(tokenizer, whole[len(asked[i]) :])]
            starts[i] = len(prompt_row)
    return rows, starts


def _continuation(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text that goes on behind another."""
    anchored, anchor = encode(tokenizer, [ANCHOR + text, ANCHOR], conversational=True)
    if anchored[: len(anchor)] == anchor:
        return anchored[len(anchor) :]
    (alone,) = encode(tokenizer, [text], conversational=True)
    return alone
