"""What stands in a row beside or around its texts: brought into the place that the layouts read, and said.

Files repeat the prompt at the head of both answers, write conversations as JSON text, keep the system's turn in a column
of its own, or hold a model's reasoning beside its answer.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rlhf.data.messages import ROLES, messages
from rlhf.data.rankings import is_k_wise, second_response
from rlhf.data.read import BadRow
from rlhf.data.rows import Message, Messages

PARSED = "read from the JSON text of messages"
REPEATED = "the prompt was repeated at the head of both answers, and is taken off"
BEGINS = "kept, though both answers begin with the prompt"
SYSTEM = "the `system` column became the system turn"
TEXTS = ("prompt", "messages", "chosen", "rejected", "completion")
REASONING = ("reasoning_content", "reasoning", "thinking")
# From this share of a file's pairs on, answers that begin with their prompt were written so by whoever made the file; below
# it, an answer merely begins with the words of a short question ("Hi": "Hi there").
REPEATED_SHARE = 0.5


class Tidied(NamedTuple):
    """A row as the layouts read it, and what was done to it, each as a remark."""

    row: object
    remarks: list[str]


def tidied(rows: Sequence[object]) -> list[Tidied]:
    """Return the rows of a whole file, tidied; a row that nothing is wrong with stays the object that it is."""
    results = [_tidy(row) if isinstance(row, Mapping) else Tidied(row, []) for row in rows]
    heads = [_repeated_text(result.row) for result in results]
    pairs = sum(isinstance(row, Mapping) and "chosen" in row and "prompt" in row for row in rows)
    is_habit = sum(head is not None for head in heads) >= REPEATED_SHARE * pairs
    for i, head in enumerate(heads):
        row, remarks = results[i]
        if head is not None and isinstance(row, Mapping):
            results[i] = (
                Tidied(_without_head(row, head), [*remarks, REPEATED]) if is_habit else Tidied(row, [*remarks, BEGINS])
            )
    return results


def _tidy(row: Mapping[str, object]) -> Tidied:
    """Return one row with its conversations parsed, the prompt in one place and the system's turn at its head."""
    remarks: list[str] = []
    reasoning = sorted({name for message in _all_messages(row) for name in REASONING if message.get(name)})
    remarks += [f"`{name}` beside an answer is left out: no canonical row has a place for it" for name in reasoning]
    for step, remark in ((_parse, PARSED), (_cut_conversations, REPEATED), (_add_system_turn, SYSTEM)):
        try:
            changed = step(row)
        except BadRow:  # the layout that reads the row says what is wrong with it
            continue
        if changed is not None:
            row, remarks = changed, [*remarks, remark]
    return Tidied(row, remarks)


# ---- Conversations as JSON text ----


def _parse(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the row with messages where it has their JSON text; of two answers, both must be such texts."""
    parsed = {name: turns for name in TEXTS if (turns := _parsed(row.get(name))) is not None}
    if ("chosen" in parsed) != ("rejected" in parsed):
        parsed = {name: turns for name, turns in parsed.items() if name not in ("chosen", "rejected")}
    return {**row, **parsed} if parsed else None


def _parsed(text: object) -> list[object] | None:
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return None
    try:
        turns = json.loads(text)
    except (ValueError, RecursionError):
        return None
    is_conversation = bool(turns) and all(
        isinstance(turn, dict) and turn.get("role") in ROLES and isinstance(turn.get("content"), str) for turn in turns
    )
    return turns if is_conversation else None


# ---- The prompt at the head of both answers ----


def _cut_conversations(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the row with its answers alone where both are whole conversations that begin with the prompt.

    A system turn with which both begin, and the prompt does not, joins the prompt.
    """
    if row.get("prompt") is None:
        return None
    chosen, rejected = _conversation(row.get("chosen")), _conversation(row.get("rejected"))
    if chosen is None or rejected is None:
        return None
    prompt, head = messages(row["prompt"], "prompt"), chosen[:-1]
    if not prompt or _stripped(head) != _stripped(rejected[:-1]):
        return None
    if head[0]["role"] == "system" and prompt[0]["role"] != "system":
        prompt = [head[0], *prompt]
    if _stripped(head) != _stripped(prompt):
        return None
    return {**row, "prompt": prompt, "chosen": chosen[-1:], "rejected": rejected[-1:]}


def _conversation(value: object) -> Messages | None:
    """Return an answer's messages, if they are two or more and the last is the assistant's; else None."""
    if not isinstance(value, str | list):
        return None
    turns = messages(value, "an answer")
    return turns if len(turns) > 1 and turns[-1]["role"] == "assistant" else None


def _stripped(turns: Messages) -> list[tuple[str, str]]:
    return [(turn["role"], turn["content"].strip()) for turn in turns]


def _repeated_text(row: object) -> str | None:
    """Return the prompt's text, if both answers begin with it and go on."""
    if not isinstance(row, Mapping):
        return None
    head, chosen, rejected = (_text(row.get(name)) for name in ("prompt", "chosen", "rejected"))
    if not head or chosen is None or rejected is None:
        return None
    repeated = all(
        text.lstrip().startswith(head) and _is_apart(head, text.lstrip()[len(head) :]) for text in (chosen, rejected)
    )
    return head if repeated else None


def _is_apart(head: str, rest: str) -> bool:
    """Tell whether an answer goes on after the prompt, and not in the middle of a word."""
    return bool(rest.strip()) and not (head[-1].isalnum() and rest[0].isalnum())


def _text(value: object) -> str | None:
    """Return the text of a plain text or of the last of some messages, without blanks around it."""
    if isinstance(value, list) and value and isinstance(value[-1], Mapping):
        value = value[-1].get("content")
    return value.strip() if isinstance(value, str) else None


def _without_head(row: Mapping[str, object], head: str) -> Mapping[str, object]:
    changed = dict(row)
    for side in ("chosen", "rejected"):
        value = row[side]
        if isinstance(value, str):
            changed[side] = value.lstrip()[len(head) :].strip()
        elif isinstance(value, list):
            rest = value[-1]["content"].lstrip()[len(head) :].strip()
            changed[side] = [*value[:-1], {**value[-1], "content": rest}]
    return changed


# ---- The system's turn; reasoning ----


def _add_system_turn(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the row with its `system` column as the first turn of its prompt or conversations, which have none yet."""
    system = row.get("system")
    if not isinstance(system, str) or not system.strip():
        return None
    turn = Message(role="system", content=system)
    prompt = next((name for name in _prompt_names(row) if row.get(name) is not None), None)
    changed: dict[str, object] = {}
    for name in ("messages", "chosen", "rejected") if prompt is None else (prompt,):
        value = row.get(name)
        turns = messages(value, name) if isinstance(value, str | list) else []
        is_answer_alone = prompt is None and isinstance(value, str) and len(turns) == 1
        if turns and turns[0]["role"] != "system" and not is_answer_alone:
            changed[name] = [turn, *turns]
    if not changed:
        return None
    if isinstance(
        row.get("prompt"), str
    ):  # as beside any prompt that is a text, blanks around an answer are no part of it
        for side in ("chosen", "rejected"):
            if isinstance(text := row.get(side), str):
                changed[side] = text.strip()
    return {**row, **changed}


def _prompt_names(row: Mapping[str, object]) -> Sequence[str]:
    if is_k_wise(row):
        return ("prompt", "instruction")
    return ("prompt",) if second_response(row) is None else ("prompt", "context")


def _all_messages(row: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    for name in TEXTS:
        value = row.get(name)
        if isinstance(value, list):
            yield from (message for message in value if isinstance(message, Mapping))
