"""Any accepted row into the canonical one: conversations, TRL's format.

Pairs: `prompt` (messages), `chosen`, `rejected` (one assistant message each), and optionally `margin`, `confidence`,
`weight`, `annotator`, `source`, `subset`, `agree`; a `soft_label` is read as `confidence`; those of a ranking also have
`group` and `rating_gap` (in the source's own unit). Demonstrations: `prompt`, `completion`. Prompts: `prompt`.
"""

import math
from typing import Any

from rlhf.data.read import BadRow
from rlhf.data.rows import Messages

ROLES = ("system", "user", "assistant")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
EXTRAS = ("annotator", "source", "subset", "id")
LONG_PROMPT = 20_000
NUMBERS = {"margin": (-math.inf, math.inf), "confidence": (0.0, 1.0), "weight": (0.0, math.inf)}


def pair(row: dict[str, Any]) -> dict[str, Any]:
    """A canonical pair from a conversational or plain pair, with or without explicit prompt, or an HH transcript pair.

    Raises:
        BadRow: with the reason.
    """
    for name in ("chosen", "rejected"):
        if row.get(name) is None:
            raise BadRow(f"no {name!r} field")
    chosen, rejected = row["chosen"], row["rejected"]
    if row.get("prompt") is not None:
        prompt = messages(row["prompt"], "prompt")
        chosen, rejected = _answer(chosen, "chosen"), _answer(rejected, "rejected")
        if isinstance(row["prompt"], str):  # an open "Assistant:" in the prompt leaves its blank to the answer
            for side in (chosen, rejected):
                side[0]["content"] = side[0]["content"].strip()
    else:
        chosen, rejected = _conversation(chosen, "chosen"), _conversation(rejected, "rejected")
        common = 0
        while common < min(len(chosen), len(rejected)) - 1 and chosen[common] == rejected[common]:
            common += 1
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
        if len(chosen) != 1 or len(rejected) != 1:
            raise BadRow("chosen and rejected have no common prompt followed by one answer each")
    check_prompt(prompt)
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        if side[0]["role"] != "assistant":
            raise BadRow(f"{name} is not an assistant's answer")
        check_answer(side[0]["content"], name)
    if chosen[0]["content"].strip() == rejected[0]["content"].strip():
        raise BadRow("chosen and rejected are the same")
    canonical: dict[str, Any] = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    for name, (low, high) in NUMBERS.items():
        value = row.get(name, row.get("soft_label") if name == "confidence" else None)
        if value is not None:
            canonical[name] = _number(value, name, low, high)
    return canonical | extras_of(row)


def extras_of(row: dict[str, Any]) -> dict[str, Any]:
    """What a row says about where it comes from and how sure its label is, kept as it is."""
    extras = {name: row[name] for name in EXTRAS if isinstance(row.get(name), str)}
    if isinstance(row.get("agree"), int | float) and not isinstance(row["agree"], bool):
        extras["agree"] = row["agree"]
    return extras


def oddities(canonical: dict[str, Any]) -> list[str]:
    """What is unusual about a row that is kept all the same."""
    prompt = canonical["prompt"]
    found = []
    if sum(len(message["content"]) for message in prompt) > LONG_PROMPT:
        found.append(f"its prompt has more than {LONG_PROMPT} characters")
    if sum(message["role"] == "system" for message in prompt) > 1:
        found.append("it has more than one system turn")
    return found


def demonstration(row: dict[str, Any]) -> dict[str, Any]:
    """A canonical demonstration from `messages`, from `prompt` and `completion`, or from a pair's chosen side.

    Raises:
        BadRow: with the reason.
    """
    if row.get("messages") is not None:
        turns = messages(row["messages"], "messages")
    elif row.get("completion") is not None and row.get("prompt") is not None:
        turns = messages(row["prompt"], "prompt") + _answer(row["completion"], "completion")
    elif row.get("chosen") is not None:
        canonical = pair(row)
        turns = canonical["prompt"] + canonical["chosen"]
    else:
        raise BadRow("neither 'messages' nor 'prompt' and 'completion'")
    if not turns or turns[-1]["role"] != "assistant":
        raise BadRow("the last turn is not an assistant's answer")
    check_answer(turns[-1]["content"], "the answer")
    check_prompt(turns[:-1])
    return {"prompt": turns[:-1], "completion": turns[-1:]}


def prompt_only(row: dict[str, Any]) -> dict[str, Any]:
    """A canonical prompt from `prompt`, from `messages` without their last answer, or from a pair.

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


def messages(value: Any, name: str) -> Messages:
    """Messages from messages, from an HH transcript, or from a plain text (one user turn).

    Raises:
        BadRow: another type, an unknown role, a content that is no text.
    """
    if isinstance(value, str):
        if value.lstrip().startswith(HUMAN.strip()):
            turns = transcript(value)
            return turns[:-1] if turns[-1] == {"role": "assistant", "content": ""} and name == "prompt" else turns
        return [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise BadRow(f"{name} is neither text nor messages")
    turns = []
    for message in value:
        if not isinstance(message, dict) or "role" not in message or "content" not in message:
            raise BadRow(f"{name} is not a list of messages with role and content")
        if message["role"] not in ROLES:
            raise BadRow(f"unknown role {message['role']!r}")
        if not isinstance(message["content"], str):
            raise BadRow(f"a message of {name} has no text")
        turns.append({"role": message["role"], "content": message["content"]})
    return turns


def transcript(text: str) -> Messages:
    """Turns of an HH transcript ("\\n\\nHuman: … \\n\\nAssistant: …"), each stripped; two turns in a row of one speaker are joined.

    Raises:
        BadRow: the text does not begin with a human's turn.
    """
    text = text if text.startswith("\n\n") else "\n\n" + text.lstrip()
    if not text.startswith(HUMAN):
        raise BadRow("a transcript that does not begin with a human's turn")
    turns: Messages = []
    position = 0
    while position < len(text):
        is_human = text.startswith(HUMAN, position)
        start = position + len(HUMAN if is_human else ASSISTANT)
        following = [found for mark in (HUMAN, ASSISTANT) if (found := text.find(mark, start)) != -1]
        end = min(following, default=len(text))
        role, content = ("user" if is_human else "assistant"), text[start:end].strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append({"role": role, "content": content})
        position = end
    return turns


def _conversation(value: Any, name: str) -> Messages:
    turns = messages(value, name)
    if isinstance(value, str) and len(turns) == 1:
        raise BadRow("no 'prompt' field, and the answers are no conversations")
    return turns


def _answer(value: Any, name: str) -> Messages:
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    turns = messages(value, name)
    if len(turns) != 1:
        raise BadRow(f"{name} is not a single answer")
    return turns


def check_prompt(turns: Messages) -> None:
    """Refuse a prompt that nobody can answer.

    Raises:
        BadRow: empty, not ending with a user's turn, or no text.
    """
    if not turns:
        raise BadRow("the prompt is empty")
    if turns[-1]["role"] != "user":
        raise BadRow("the prompt does not end with a user's turn")
    if not turns[-1]["content"].strip():
        raise BadRow("the prompt's last turn is empty")
    for turn in turns:
        _check_encodable(turn["content"])


def check_answer(content: Any, name: str) -> None:
    """Refuse what is no answer.

    Raises:
        BadRow: another type, blank, or no text.
    """
    if not isinstance(content, str):
        raise BadRow(f"{name} has no text")
    if not content.strip():
        raise BadRow(f"{name} is empty")
    _check_encodable(content)


def _number(value: Any, name: str, low: float, high: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"{name} is not a number")
    if not math.isfinite(value) or not low <= value <= high:
        bounds = "" if low == -math.inf else f" of {low:g} or more" if high == math.inf else f" in [{low:g}, {high:g}]"
        raise BadRow(f"{name} is not a finite number{bounds}")
    return float(value)


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise BadRow("a lone surrogate, which is no text") from None
