"""Plain pairs, conversations, HH transcripts, demonstrations and prompts into canonical rows (`rlhf.data.rows`).

Beside its answers a pair may have `margin`, `confidence` (or `soft_label`), `weight`, ratings of both answers
(`chosen_rating`, `rejected_rating`), critiques of both (`critique_chosen`, `critique_rejected`), `annotator`, `source`,
`subset`, `id` and `agree`.
"""

import json
import math
import sys
from collections.abc import Mapping
from typing import Any, Literal, cast

from rlhf.data.messages import ended_of, messages
from rlhf.data.read import BadRow
from rlhf.data.rows import (
    CRITIQUES,
    TIE,
    Demonstration,
    Extras,
    Message,
    Messages,
    Pair,
    PromptRow,
    assistant_turn,
    group_key,
)

EXTRAS: tuple[Literal["annotator", "source", "subset", "id"], ...] = ("annotator", "source", "subset", "id")
LIKED = ("label", "kto_tag")  # of unpaired preferences (KTO): whether the answer is a good one
LEARNT = ("train", "training")  # in a message: whether it is one to learn (axolotl)
LONG_PROMPT = 20_000
# Columns with a rating of each answer, as published: the chosen one's and the rejected one's.
RATINGS = tuple(
    (form.format("chosen", word), form.format("rejected", word))
    for word in ("rating", "score", "avg_rating")
    for form in ("{0}_{1}", "{1}_{0}", "{0}-{1}")
)
BOUNDS: dict[Literal["margin", "confidence", "weight"], tuple[float, float]] = {
    "margin": (-math.inf, math.inf),
    "confidence": (0.0, 1.0),
    "weight": (0.0, math.inf),
}


def pair(row: Mapping[str, object]) -> Pair:
    """Return the canonical pair of a conversational or plain pair, with or without a prompt, or of two HH transcripts.

    Raises:
        BadRow: with the reason.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise BadRow(f"no {name!r} field")
    if row.get("prompt") is None:
        prompt, chosen, rejected = _split(
            _conversation(row["chosen"], "chosen"), _conversation(row["rejected"], "rejected")
        )
    else:
        prompt = messages(row["prompt"], "prompt")
        chosen, rejected = _answer(row["chosen"], "chosen"), _answer(row["rejected"], "rejected")
        if isinstance(row["prompt"], str):  # an open "Assistant:" in the prompt leaves its blank to the answer
            for side in (chosen, rejected):
                side[0]["content"] = side[0]["content"].strip()
        if len(chosen) > 1 or len(rejected) > 1:
            prompt, chosen, rejected = _split(prompt + chosen, prompt + rejected)
    check_prompt(prompt)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[0]["role"] != "assistant" or side[-1]["role"] != "assistant":
            raise BadRow(f"{name} is not an assistant's answer")
        _check_answer_turn(side[-1], name)
        for turn in side[:-1]:
            _check_encodable(turn["content"])
    if [_said(turn) for turn in chosen] == [_said(turn) for turn in rejected]:
        raise BadRow("chosen and rejected are the same")
    canonical: Pair = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    canonical |= _label_columns(row)
    gap = rating_gap(row)
    if gap is not None:
        canonical["rating_gap"] = gap
    canonical |= critiques(row)
    if row.get("group") == group_key(prompt):  # ours; another file's column of this name means something else
        canonical["group"] = group_key(prompt)
    return {**canonical, **extras_of(row)}


def _label_columns(row: Mapping[str, object]) -> Pair:
    """Return `margin`, `confidence` (or `soft_label`) and `weight` where a row has them.

    Raises:
        BadRow: one is no number, or outside of its bounds.
    """
    columns: Pair = cast(Pair, {})
    for column, (low, high) in BOUNDS.items():
        value = row.get(column)
        if value is None and column == "confidence":
            value = row.get("soft_label")
        if value is not None:
            columns[column] = _number(value, column, low, high)
    return columns


def rating_gap(row: Mapping[str, object]) -> float | None:
    """Return how much higher the chosen answer is rated than the rejected one, in the file's unit; None without ratings.

    Below 0 the ratings contradict the label. A canonical row has it already.

    >>> rating_gap({"chosen_rating": 5, "rejected_rating": 2})
    3.0
    """
    given = row.get("rating_gap")
    if not isinstance(given, str) and (gap := _rating(given)) is not None:
        return gap
    for names in RATINGS:
        values = [row.get(name) for name in names]
        numbers = [number for value in values if (number := _rating(value)) is not None]
        if len(numbers) == len(names):
            return numbers[0] - numbers[1]
    return None


def _rating(value: object) -> float | None:
    """Return a rating, which may be a text; None if it is no finite number."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):  # a whole number may have any number of digits
        return None
    return number if math.isfinite(number) else None


def critiques(row: Mapping[str, object]) -> Pair:
    """Return the critiques of both sides, blanks around them left out; nothing where either has none."""
    texts = [value.strip() if isinstance(value := row.get(name), str) else "" for name in CRITIQUES]
    for text in texts:
        _check_encodable(text)
    return cast(Pair, dict(zip(CRITIQUES, texts, strict=True)) if all(texts) else {})


def extras_of(row: Mapping[str, object]) -> Extras:
    """Return what a row says about where it comes from and how sure its label is."""
    extras: Extras = {}
    for name in EXTRAS:
        value = row.get(name)
        if isinstance(value, float) and value.is_integer():  # a column of numbers with a gap, as tables have it
            value = int(value)
        if isinstance(value, str | int) and not isinstance(value, bool):
            extras[name] = str(value)
    agree = row.get("agree")
    if isinstance(agree, int | float) and not isinstance(agree, bool):
        extras["agree"] = agree
    return extras


def of_all_pairs(row: Mapping[str, object]) -> Mapping[str, Any]:
    """Return what a row says of each pair of its answers alike."""
    weight = row.get("weight")
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        return extras_of(row)
    return {**extras_of(row), "weight": float(weight)}


def in_common(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the rows of two answers say alike, and the mean of their weights."""
    alike = {name: value for name, value in first.items() if second.get(name) == value}
    both = "weight" in first and "weight" in second
    return {**alike, "weight": (first["weight"] + second["weight"]) / 2} if both else alike


def oddities(canonical: PromptRow) -> list[str]:
    """Return what is unusual about a canonical row that is kept all the same, each as the end of a sentence."""
    prompt, values = canonical["prompt"], cast(Mapping[str, object], canonical)
    notes = []
    if isinstance(gap := values.get("rating_gap"), float) and gap <= 0:
        notes.append("its ratings contradict its label" if gap < 0 else "its two answers are rated alike")
    if sum(len(message["content"]) for message in prompt) > LONG_PROMPT:
        notes.append(f"its prompt has more than {LONG_PROMPT} characters")
    if sum(message["role"] == "system" for message in prompt) > 1:
        notes.append("it has more than one system turn")
    return notes


def demonstration(row: Mapping[str, object]) -> Demonstration:
    """Return the canonical demonstration in `messages`, in `prompt` and `completion`, or in a pair's chosen side.

    Of unpaired preferences the good answers alone are demonstrations.

    Raises:
        BadRow: with the reason.
    """
    if any(_is_false(row.get(name)) for name in LIKED):
        raise BadRow("its label says that this answer is not one to learn")
    if _is_left_out(row.get("messages") or row.get("completion")):
        raise BadRow("its last message says that it is not one to learn (`weight` 0, or `train` or `training` false)")
    if row.get("messages") is not None:
        turns = messages(row["messages"], "messages")
    elif row.get("completion") is not None and row.get("prompt") is not None:
        answer = _one_answer(row["completion"], "completion")
        if not ended_of(row):  # as in this pipeline's own samples.jsonl
            answer = [{**answer[0], "ended": False}]
        turns = messages(row["prompt"], "prompt") + answer
    elif row.get("chosen") is not None:
        canonical = pair(row)
        if canonical.get("confidence") == TIE:
            raise BadRow("a tie, of which neither answer is one to learn")
        turns = canonical["prompt"] + canonical["chosen"]
    else:
        raise BadRow("neither 'messages' nor 'prompt' and 'completion' (`columns` beside the source names others)")
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("the last turn is not an assistant's answer")
    _check_answer_turn(turns[-1], "the answer")
    check_prompt(turns[:-1])
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def _is_left_out(turns: object) -> bool:
    """Tell whether the last of some messages is marked as one to read and not to learn, as OpenAI and axolotl mark it."""
    last = turns[-1] if isinstance(turns, list) and turns else turns
    if not isinstance(last, Mapping):
        return False
    weight = last.get("weight")
    has_none = weight is not None and not isinstance(weight, str) and weight == 0
    return has_none or any(_is_false(last.get(name)) for name in LEARNT)


def _is_false(value: object) -> bool:
    """Tell whether a value is a truth value, and false; of a table both are words."""
    return value is False or (isinstance(value, str) and value.strip().lower() == "false")


def prompt_only(row: Mapping[str, object]) -> PromptRow:
    """Return the canonical prompt in `prompt`, in `messages` without their last answer, or in a pair.

    Raises:
        BadRow: with the reason.
    """
    if row.get("prompt") is not None:
        turns = messages(row["prompt"], "prompt")
    elif row.get("messages") is not None:
        turns = messages(row["messages"], "messages")
        turns = turns[:-1] if turns and turns[-1]["role"] == "assistant" else turns
    elif row.get("chosen") is not None:
        turns = pair(row)["prompt"]
    else:
        raise BadRow("neither 'prompt' nor 'messages'")
    check_prompt(turns)
    return {"prompt": turns}


def check_prompt(turns: Messages) -> None:
    """Refuse a prompt that nobody can answer.

    Raises:
        BadRow: empty, not ending with a user's turn or a tool's, or no text.
    """
    if not turns:
        raise BadRow("the prompt is empty")
    if turns[-1]["role"] not in ("user", "tool"):
        raise BadRow("the prompt does not end with a user's turn")
    if not turns[-1]["content"].strip():
        raise BadRow("the prompt's last turn is empty")
    for turn in turns:
        _check_encodable(turn["content"])


def check_answer(content: object, name: str) -> str:
    """Return an answer's text, or refuse what is no answer.

    Raises:
        BadRow: another type, blank, or no text.
    """
    if not isinstance(content, str):
        raise BadRow(f"{name} has no text")
    if not content.strip():
        raise BadRow(f"{name} is empty")
    _check_encodable(content)
    return content


def _check_answer_turn(turn: Message, name: str) -> None:
    """Refuse an answer that says nothing and calls no tool."""
    if not turn.get("tool_calls"):
        check_answer(turn["content"], name)


def _said(turn: Message) -> str:
    """Return all that tells two answers apart."""
    calls = turn.get("tool_calls")
    return turn["content"].strip() + (json.dumps(calls, sort_keys=True) if calls else "")


def _split(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Split two whole conversations into the turns that they share (the prompt) and the answer of each.

    Where they part before the last turn of one, the prompt ends with the last turn of the user that they share, and each side
    has several turns (`parting_turn`).
    """
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    if len(chosen) != shared + 1 or len(rejected) != shared + 1:
        part = shared + 1
        while shared > 0 and chosen[shared - 1]["role"] != "user":
            shared -= 1
        if shared == 0:
            raise BadRow(f"chosen and rejected part at turn {part} and share no turn of the user")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _conversation(value: object, name: str) -> Messages:
    turns = messages(value, name)
    if isinstance(value, str) and len(turns) == 1:
        raise BadRow("no 'prompt' field, and the answers are no conversations")
    return turns


def _answer(value: object, name: str) -> Messages:
    """Return one answer, or the turns of a conversation from an answer to another."""
    turns = [] if isinstance(value, str) else messages(value, name)
    is_longer = len(turns) > 1 and turns[0]["role"] == "assistant"
    return turns if is_longer else _one_answer(value, name)


def _one_answer(value: object, name: str) -> Messages:
    if isinstance(value, str):
        return assistant_turn(value)
    turns = messages(value, name)
    if len(turns) != 1:
        raise BadRow(f"{name} is not a single answer")
    return turns


def _number(value: object, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} is not a number")
    if not abs(value) <= sys.float_info.max or not low <= value <= high:
        bounds = "" if low == -math.inf else f" of {low:g} or more" if high == math.inf else f" in [{low:g}, {high:g}]"
        raise BadRow(f"{name} is not a finite number{bounds}")
    return float(value)


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("a lone surrogate, which is no text") from None
