"""The rows that everything after the readers works on, as types; and what is asked of them everywhere."""

import hashlib
from typing import Literal, NotRequired, TypedDict

Side = Literal["chosen", "rejected"]


class Message(TypedDict):
    """One turn of a conversation: `role` is system, user or assistant."""

    role: str
    content: str


Messages = list[Message]
Prompt = str | Messages


class Pair(TypedDict):
    """A canonical preference pair, TRL's conversational format.

    `prompt` ends with the turn to be answered; `chosen` and `rejected` are one assistant message each. The columns that
    follow stand only where a file or a vote gave them: `margin` in nats, `confidence` P(chosen is better) in [0, 1],
    `weight` ≥ 0, `group` the ranking that a pair was made of, `rating_gap` in the source's own unit.
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: NotRequired[float]
    confidence: NotRequired[float]
    weight: NotRequired[float]
    group: NotRequired[str]
    rating_gap: NotRequired[float]
    agree: NotRequired[float]
    annotator: NotRequired[str]
    source: NotRequired[str]
    subset: NotRequired[str]
    id: NotRequired[str]


class Demonstration(TypedDict):
    """A canonical demonstration: a prompt, and one assistant message that answers it."""

    prompt: Messages
    completion: Messages


def answer(row: Pair, side: Side) -> str:
    """Return the text of one side's answer.

    >>> pair: Pair = {"prompt": [], "chosen": [{"role": "assistant", "content": "yes"}], "rejected": []}
    >>> answer(pair, "chosen")
    'yes'
    """
    return row[side][0]["content"]


def completion(row: Demonstration) -> str:
    """Return the text of a demonstration's answer."""
    return row["completion"][0]["content"]


def prompt_key(prompt: Prompt) -> str:
    """Return the identity of a prompt, a sha256: prompts that differ in blanks and case only are one prompt.

    A string is a single user turn.

    >>> prompt_key([{"role": "user", "content": "Hi  there"}]) == prompt_key("hi there ")
    True
    """
    turns = [Message(role="user", content=prompt)] if isinstance(prompt, str) else prompt
    text = "\x1f".join(f"{turn['role']}\x1e{' '.join(turn['content'].split()).casefold()}" for turn in turns)
    return hashlib.sha256(text.encode()).hexdigest()
