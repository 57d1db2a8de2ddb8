"""The rows that everything after the readers works on, as types; and what is asked of them everywhere."""

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NotRequired, TypedDict, cast

Side = Literal["chosen", "rejected"]
SIDES: tuple[Side, Side] = ("chosen", "rejected")
# What of two sides is compared: answers to one prompt, or whole conversations, which may part before their last turn.
Compare = Literal["answers", "conversations"]
PARTED = (
    "chosen and rejected part at turn {}, before the last; whole conversations are compared by data.compare: conversations "
    "(--compare conversations)"
)
CRITIQUES = ("critique_chosen", "critique_rejected")  # the columns with what is good and bad about each side
CUT = "\x1ecut"  # behind an answer that was cut off, in what it is known by
TIE = 0.5  # the confidence of a pair whose answers were called equal


class Message(TypedDict):
    """One turn of a conversation: `role` is system, user, assistant or tool.

    `tool_calls` are the assistant's, as chat templates read them: `{type, id, function: {name, arguments}}`; `name` and
    `tool_call_id` say which tool answers which of them. `ended` is False where an answer was cut off before its end.
    """

    role: str
    content: str
    tool_calls: NotRequired[list[dict[str, object]]]
    name: NotRequired[str]
    tool_call_id: NotRequired[str]
    ended: NotRequired[bool]


Messages = list[Message]
Prompt = str | Messages


class PromptRow(TypedDict):
    """A canonical prompt: messages that end with the turn to be answered."""

    prompt: Messages


class Extras(TypedDict, total=False):
    """What a file may say about where a pair comes from and how sure its label is, kept as it stands there.

    `agree` is the share of annotators who agree with the label.
    """

    annotator: str
    source: str
    subset: str
    id: str
    agree: float


class Pair(Extras):
    """A canonical preference pair, TRL's conversational format.

    `prompt` ends with the turn to be answered; `chosen` and `rejected` are one assistant message each, or, where whole
    conversations are compared, all turns from the one that answers the prompt to an assistant's last. The columns that follow
    stand only where a file, annotators or a vote gave them: `margin` in nats, `confidence` P(chosen is better) in [0, 1],
    `weight` ≥ 0, `group` the ranking that a pair was made of, `rating_gap` in the source's own unit, `critique_…` what is good
    and bad about each side, `round` in which it was labelled, and the mean and deviation of the rewards' differences over a
    vote's members (`strength_…`).
    """

    prompt: Messages
    chosen: Messages
    rejected: Messages
    margin: NotRequired[float]
    confidence: NotRequired[float]
    weight: NotRequired[float]
    group: NotRequired[str]
    rating_gap: NotRequired[float]
    critique_chosen: NotRequired[str]
    critique_rejected: NotRequired[str]
    round: NotRequired[int]
    strength_mean: NotRequired[float]
    strength_std: NotRequired[float]
    strength_votes: NotRequired[int]


class Demonstration(TypedDict):
    """A canonical demonstration: a prompt, and one assistant message that answers it."""

    prompt: Messages
    completion: Messages


class Rated(Demonstration, Extras):
    """An answer with its ratings by attribute, in the source's own unit; one that nobody gave is not there."""

    attributes: dict[str, float]


def user_turn(text: str) -> Messages:
    """Return a text as a conversation of one turn of the user."""
    return [Message(role="user", content=text)]


def assistant_turn(text: str, *, ended: bool = True) -> Messages:
    """Return an answer's text as the one message that it is in a canonical row; only one that was cut off says so."""
    message = Message(role="assistant", content=text)
    return [message] if ended else [{**message, "ended": False}]


def has_ended(completion: str | Messages) -> bool:
    """Return whether an answer came to its end: all did but those whose last turn says `ended: false`.

    >>> has_ended("yes"), has_ended(assistant_turn("yes")), has_ended(assistant_turn("ye", ended=False))
    (True, True, False)
    """
    return isinstance(completion, str) or completion[-1].get("ended") is not False


def answer(row: Pair, side: Side) -> str:
    """Return the text of one side's answer: of its last turn, where it has several.

    >>> pair: Pair = {"prompt": [], "chosen": [{"role": "assistant", "content": "yes"}], "rejected": []}
    >>> answer(pair, "chosen")
    'yes'
    """
    return row[side][-1]["content"]


def asked(row: Pair, side: Side) -> Messages:
    """Return the conversation that one side's answer ends: the prompt, and that side's own turns before its last."""
    return [*row["prompt"], *row[side][:-1]]


def told(row: Pair, side: Side) -> str:
    """Return all that one side says after the prompt, for people: its answer, or its turns, each with who speaks."""
    turns = row[side]
    return answer(row, side) if len(turns) == 1 else "\n\n".join(f"{x['role']}: {x['content']}" for x in turns)


def sure_where_unsaid(pairs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return pairs as a file is to hold them: with a confidence in each if any has one, 1 where none was given.

    Only for pairs of which those without one are known to be certain.

    >>> sure_where_unsaid([{"chosen": "a"}, {"chosen": "b", "confidence": 0.5}])
    [{'chosen': 'a', 'confidence': 1.0}, {'chosen': 'b', 'confidence': 0.5}]
    >>> sure_where_unsaid([{"chosen": "a"}])
    [{'chosen': 'a'}]
    """
    if not any("confidence" in row for row in pairs):
        return [dict(row) for row in pairs]
    return [{**row, "confidence": row.get("confidence", 1.0)} for row in pairs]


def parting_turn(row: PromptRow) -> int | None:
    """Return the turn, counted from 1, at which the sides of a pair part, if that is before the last of one; else None.

    >>> pair: Pair = {"prompt": [], "chosen": user_turn("a") + assistant_turn("b"), "rejected": user_turn("a")}
    >>> parting_turn(pair)
    2
    """
    sides = cast(Mapping[str, Messages], row)
    chosen, rejected = sides.get("chosen", []), sides.get("rejected", [])
    if len(chosen) <= 1 and len(rejected) <= 1:
        return None
    shorter = min(len(chosen), len(rejected))
    shared = next((i for i in range(shorter) if chosen[i] != rejected[i]), shorter)
    return len(row["prompt"]) + shared + 1


def completion(row: Demonstration) -> str:
    """Return the text of a demonstration's answer."""
    return row["completion"][0]["content"]


def prompt_key(prompt: Prompt) -> str:
    r"""Return the identity of a prompt, a sha256: prompts that differ in blanks, case and Unicode's forms of a letter are one.

    A string is a single user turn.

    >>> prompt_key([{"role": "user", "content": "Hi  there"}]) == prompt_key("hi there ")
    True
    >>> prompt_key("Caf\u00e9?") == prompt_key("Cafe\u0301?")
    True
    """
    return prefix_keys(user_turn(prompt) if isinstance(prompt, str) else prompt)[-1]


def prefix_keys(turns: Messages) -> list[str]:
    """Return the identity of each beginning of a conversation, from its first turn alone to the whole, as `prompt_key` has it.

    >>> turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    >>> prefix_keys(turns) == [prompt_key(turns[:1]), prompt_key(turns)]
    True
    """
    text, calls, keys, has_calls = hashlib.sha256(), list[object](), list[str](), False
    for i, turn in enumerate(turns):
        content = unicodedata.normalize("NFC", " ".join(turn["content"].split()).casefold())
        words = f"{turn['role']}\x1e{content}"
        text.update((f"\x1f{words}" if i else words).encode())
        calls.append(turn.get("tool_calls"))
        has_calls |= "tool_calls" in turn
        whole = text.copy()
        if has_calls:
            whole.update(json.dumps(calls, sort_keys=True).encode())
        keys.append(whole.hexdigest())
    return keys or [text.hexdigest()]


def wording(prompt: Messages) -> str:
    r"""Return what a prompt says word by word: unlike in `prompt_key`, case and blanks inside a turn are part of it.

    >>> wording(user_turn("if a:\n  b")) == wording(user_turn("if a:\nb")), wording(user_turn("a ")) == wording(user_turn("a"))
    (False, True)
    """
    return json.dumps(
        [[turn["role"], turn["content"].strip(), turn.get("tool_calls")] for turn in prompt], sort_keys=True
    )


def group_key(prompt: Prompt) -> str:
    """Return what the pairs of several answers to one prompt have in common (`Pair.group`): the start of the prompt's key."""
    return prompt_key(prompt)[:16]


def pair_digest(row: Pair) -> str:
    """Return what identifies a pair, whichever of its answers is called the chosen one: 24 characters of a sha256."""
    return answers_digest(row["prompt"], (marked(row, "chosen"), marked(row, "rejected")))


def marked(row: Pair, side: Side) -> str:
    """Return all that one side says, as what it is known by: one text, ended and cut off, is two answers."""
    return told(row, side) if has_ended(row[side]) else told(row, side) + CUT


def answers_digest(prompt: Prompt, answers: Sequence[str]) -> str:
    """Return what identifies some answers to a prompt, in any order: 24 characters of a sha256."""
    text = "\x1f".join((prompt_key(prompt), *sorted(answers)))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def label_digest(row: Pair) -> str:
    """Return what identifies a label, the pair and which of its answers is called the chosen one: 24 characters of a sha256."""
    text = "\x1f".join((prompt_key(row["prompt"]), marked(row, "chosen"), marked(row, "rejected")))
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def has_tools(row: Mapping[str, object]) -> bool:
    """Return whether a canonical row holds a tool call or a tool's turn, which not every chat template can write."""
    parts = (row.get(name) for name in ("prompt", "chosen", "rejected", "completion"))
    turns = (turn for part in parts if isinstance(part, list) for turn in part)
    return any(turn["role"] == "tool" or "tool_calls" in turn for turn in turns)
