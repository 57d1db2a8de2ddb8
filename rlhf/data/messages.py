"""Conversations in every form that files have them in, into messages with role and content.

| form | where it is from |
|---|---|
| a text | one turn of the user |
| a text that begins with "Human:" | a transcript of hh-rlhf |
| a user's text with lines `<extra_id_1>Assistant` and `<extra_id_1>User` | several turns of HelpSteer |
| a message or a list of them, with `role` and `content` | OpenAI, transformers, TRL |
| the same with `from` and `value` | ShareGPT, LlamaFactory |
| `content` as a list of parts, `{"type": "text", "text": …}` | OpenAI |
| `tool_calls`, and turns of the role `tool` | OpenAI, transformers |
| turns from `function_call` and `observation` | LlamaFactory |
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.read import BadRow
from rlhf.data.rows import Message, Messages, user_turn

ROLES = ("system", "user", "assistant", "tool")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
# Speakers as ShareGPT and LlamaFactory name them, and the older name of OpenAI for a tool.
SPEAKERS = {
    "human": "user",
    "gpt": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
}
# A line between two turns of HelpSteer; and between two turns of a transcript that has no blank lines.
SPEAKER_LINE = re.compile(r"\s*\n<extra_id_1>(User|Assistant)\n")
TIGHT = re.compile(r"\n(?=(?:Human|Assistant):)")
TEXT_PARTS = ("text", "input_text", "output_text")


def ended_of(row: Mapping[Any, Any]) -> bool:
    """Return whether an answer came to its end, by the `ended` beside it; one that says nothing did.

    >>> ended_of({}), ended_of({"ended": None}), ended_of({"ended": False}), ended_of({"ended": "false"})
    (True, True, False, False)

    Raises:
        BadRow: it is neither true nor false; of a table both may be words.
    """
    value = row.get("ended")
    if isinstance(value, str):
        value = {"true": True, "false": False, "": None}.get(value.strip().lower(), value)
    if value is not None and not isinstance(value, bool):
        raise BadRow(f"'ended' is {value!r}, and must be true or false")
    return value is not False


def messages(value: object, name: str) -> Messages:
    """Return the messages that a value holds in one of the forms above.

    Args:
        name: what the value is, for messages: "prompt".

    Raises:
        BadRow: another type, an unknown role, a content that is no text.
    """
    if isinstance(value, str):
        if value.lstrip().startswith(HUMAN.strip()):
            turns = transcript(value)
            is_open = name == "prompt" and turns[-1] == {"role": "assistant", "content": ""}
            return turns[:-1] if is_open else turns
        return _speakers_apart(user_turn(value))
    if isinstance(value, Mapping):
        value = [value]
    if not isinstance(value, list):
        raise BadRow(f"{name} is neither text nor messages")
    turns = _speakers_apart([_message(entry, name) for entry in value])
    for turn in turns if name == "prompt" else turns[:-1]:
        turn.pop("ended", None)  # of what was answered since it says nothing
    return turns


def texts_in(value: object) -> list[str]:
    """Return the texts of a text, of messages, or of lists of them; none of anything else.

    >>> texts_in([["Hi", "Ho"], [{"role": "user", "content": "And?"}], 3])
    ['Hi', 'Ho', 'And?']
    """
    if isinstance(value, list):
        return [text for entry in value for text in texts_in(entry)]
    try:
        return [turn["content"] for turn in messages(value, "prompt")]
    except BadRow:
        return []


def has_speaker_lines(value: object) -> bool:
    """Return whether a prompt, a text or messages, has several of HelpSteer's turns in one text of the user."""
    turns = value if isinstance(value, list) else [{"role": "user", "content": value}]
    contents = [turn.get("content") for turn in turns if isinstance(turn, Mapping) and turn.get("role") == "user"]
    return any(isinstance(content, str) and SPEAKER_LINE.search(content) for content in contents)


def _speakers_apart(turns: Messages) -> Messages:
    """Return the turns, those of the user that hold HelpSteer's lines of speakers split there."""
    if not has_speaker_lines(turns):
        return turns
    result: Messages = []
    for turn in turns:
        if turn["role"] != "user":
            result.append(turn)
            continue
        first, *rest = SPEAKER_LINE.split(turn["content"])
        result.append({"role": "user", "content": first})
        for speaker, text in zip(rest[::2], rest[1::2], strict=True):
            result.append({"role": speaker.lower(), "content": text})
    is_open = result[-1]["role"] == "assistant" and not result[-1]["content"].strip()
    return result[:-1] if is_open else result


def transcript(text: str) -> Messages:
    r"""Split an HH transcript ("\n\nHuman: … \n\nAssistant: …") into turns, each stripped; a speaker's turns in a row are joined.

    Raises:
        BadRow: the text does not begin with a human's turn.
    """
    text = text if text.startswith("\n\n") else "\n\n" + text.lstrip()
    if ASSISTANT not in text and HUMAN not in text[2:]:  # turns on lines of their own, without blank ones between
        text = "\n\n" + TIGHT.sub("\n\n", text[2:])
    if not text.startswith(HUMAN):
        raise BadRow("a transcript that does not begin with a human's turn")
    turns: Messages = []
    position = 0
    while position < len(text):
        is_human = text.startswith(HUMAN, position)
        start = position + len(HUMAN if is_human else ASSISTANT)
        next_turns = [place for mark in (HUMAN, ASSISTANT) if (place := text.find(mark, start)) != -1]
        end = min(next_turns, default=len(text))
        role, content = ("user" if is_human else "assistant"), text[start:end].strip()
        if turns and turns[-1]["role"] == role:
            turns[-1]["content"] += "\n\n" + content
        else:
            turns.append({"role": role, "content": content})
        position = end
    return turns


def _message(entry: object, name: str) -> Message:
    """Return one message, without what no model reads."""
    if not isinstance(entry, Mapping):
        raise BadRow(f"{name} is not a list of messages with role and content")
    speaker, content = entry.get("role", entry.get("from")), entry.get("content", entry.get("value"))
    calls = entry.get("tool_calls")
    if speaker is None or ("content" not in entry and "value" not in entry and not calls):
        raise BadRow(f"{name} is not a list of messages with role and content")
    role = SPEAKERS.get(str(speaker), speaker)
    if role not in ROLES:
        raise BadRow(f"unknown role {speaker!r}")
    if speaker == "function_call":
        calls, content = _called(content, name), ""
    text = "" if content is None and calls else _text(content, name)
    message = Message(role=role, content=text)
    if role == "assistant" and not ended_of(entry):
        message["ended"] = False
    if calls:
        message["tool_calls"] = _calls(calls, name)
    if role == "tool":
        if isinstance(tool := entry.get("name"), str):
            message["name"] = tool
        if isinstance(call := entry.get("tool_call_id"), str):
            message["tool_call_id"] = call
    return message


def _text(content: object, name: str) -> str:
    """Return the text of a message, whose content is one or a list of parts."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content or not all(isinstance(part, Mapping) for part in content):
        raise BadRow(f"a message of {name} has no text")
    texts = []
    for part in content:
        kind, text = part.get("type"), part.get("text")
        # Files saved as tables give every part the fields of all kinds, those of other kinds empty.
        if not isinstance(text, str) or (kind is not None and kind not in TEXT_PARTS):
            part_name = "a part" if kind is None else f"a part of type {kind!r}"
            raise BadRow(f"a message of {name} holds {part_name}, which is no text")
        texts.append(text)
    return "".join(texts)


def _calls(calls: object, name: str) -> list[dict[str, object]]:
    """Return tool calls in the form that chat templates read: the arguments as a mapping, not as JSON text."""
    if not isinstance(calls, list):
        raise BadRow(f"tool_calls of {name} is no list")
    result = []
    for call in calls:
        function = call.get("function", call) if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise BadRow(f"a tool call of {name} names no function")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except ValueError:
                raise BadRow(f"the arguments of a tool call of {name} are not valid JSON") from None
        identity = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
        result.append(
            {**identity, "type": "function", "function": {"name": function["name"], "arguments": arguments or {}}}
        )
    return result


def _called(content: object, name: str) -> list[object]:
    """Return the calls that LlamaFactory writes as JSON text: one, or a list of them."""
    try:
        calls = json.loads(content) if isinstance(content, str) else content
    except ValueError:
        raise BadRow(f"a function_call of {name} is not valid JSON") from None
    return calls if isinstance(calls, list) else [calls]
