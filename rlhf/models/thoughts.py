"""Thoughts: what a chat template makes of an answer "<think>…</think>…", and whether SFT trains where sampling begins."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from rlhf.data.rows import Message, Prompt
from rlhf.models.templates import rendered

SHOWN_BEFORE, SHOWN = 12, 36  # characters of a text before the place where two part, and in all


def thought_of(answer: str) -> str:
    r"""Return what an answer thinks before it says anything, without the marks; empty where it does not think.

    >>> thought_of("<think>\nA river.\n</think>\n\nThe Danube."), thought_of("The Danube.")
    ('A river.', '')
    """
    return answer.rpartition("</think>")[0].rpartition("<think>")[2].strip()


def lost_thoughts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[str]:
    """Return a sentence for a person if answers have thoughts and the chat template leaves them out."""
    return [
        f"{kind.words}: the chat template of {tokenizer.name_or_path} leaves <think>…</think> out, so no thought is trained or "
        "scored, and answers that differ in their thoughts alone are one text. Take a chat_template that keeps thoughts."
        for kind in _kinds(tokenizer, prompts, answers)
        if kind.thought and kind.whole.count(kind.thought) <= kind.asked.count(kind.thought)
    ]


def trained_unlike_sampled(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str]
) -> list[str]:
    """Return a sentence for each kind of answer that the chat template writes behind another text than the prompt that asks."""
    sentences = []
    for kind in _kinds(tokenizer, prompts, answers):
        if not kind.whole.startswith(kind.asked):
            pairs = zip(kind.asked, kind.whole, strict=False)
            parts = next((place for place, (a, b) in enumerate(pairs) if a != b), len(kind.whole))
            start = max(0, parts - SHOWN_BEFORE)
            sentences.append(
                f"{kind.words}: the chat template of {tokenizer.name_or_path} lets a prompt end in "
                f"{kind.asked[start:][-SHOWN:]!r}, and with the answer writes {kind.whole[start : start + SHOWN]!r} there. What is "
                "trained stands behind another text than what is sampled. Give the answers the form that the prompt begins, or "
                "take a chat_template that writes both alike."
            )
    return sentences


class _Kind(NamedTuple):
    """Answers that think, or that do not, and what the template makes of the first one."""

    words: str
    thought: str
    asked: str
    whole: str


def _kinds(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[_Kind]:
    """Yield the kinds of answers; those to strings, or in turns that the template refuses, are no matter of this module."""
    rows: dict[bool, list[int]] = {}
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        if not isinstance(prompt, str):
            rows.setdefault(bool(thought_of(answer)), []).append(row)
    for thinks, (first, *others) in rows.items():
        prompt, answer = prompts[first], answers[first]
        assert not isinstance(prompt, str)
        try:
            asked = rendered(tokenizer, prompt, asks=True)
            whole = rendered(tokenizer, [*prompt, Message(role="assistant", content=answer)])
        except (
            Exception
        ):  # a template may raise anything; `template_problems` says so, before SFT and rewards are trained
            continue
        words = f"{1 + len(others)} answers {'with' if thinks else 'without'} a thought (the first is row {first})"
        yield _Kind(words, thought_of(answer), asked, whole)
