"""What stands in a row beside or around its texts: brought into the place that the layouts read, and said.

Files repeat the prompt at the head of both answers, write conversations as JSON text, keep the system's turn in a column
of its own, or hold a model's reasoning beside its answer.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from rlhf.data.layouts.named_prompts import prompt_under_another_name
from rlhf.data.messages import ROLES, SPEAKERS, has_speaker_lines, messages
from rlhf.data.rankings import RESPONSES, is_k_wise, second_response
from rlhf.data.read import BadRow
from rlhf.data.rows import Message, Messages

PARSED = "read from the text of messages, in JSON or as Python prints it"
UNREADABLE = "{} looks like the text of messages, and is neither JSON nor what Python prints of a list"
INTERLEAVED = "read from JSON lists of texts, a turn each"
SPEAKERS_APART = "the prompt's turns were in one text, with lines <extra_id_1>User and <extra_id_1>Assistant between"
UNLIKELY = "`confidence` is below 0.5, so the answers change sides, and it becomes 1 - confidence"
REPEATED = "the prompt was repeated at the head of both answers, and is taken off"
BEGINS = "kept, though both answers begin with the prompt"
NAMED = "the prompt of two responses stands under another name (`question`, `instruction`, `input` or `query`)"
SYSTEM = "the `system` column became the system turn"
OTHER_SYSTEM = "the `system` column is left out: the conversation has a system turn of its own, of other words"
NO_SYSTEM = "the `system` column is left out: it holds no text"
TEXTS = ("prompt", "context", "messages", "chosen", "rejected", "completion", *RESPONSES)
# Two answers of one row: texts of messages both, or neither.
SIDES = (("chosen", "rejected"), ("response_1", "response_2"), ("response1", "response2"))
# The beginning of a text that must be messages: a known speaker, and what was said.
SPEAKER = re.compile(r"\s*\[\s*\{.{0,200}?['\"](?:role|from)['\"]\s*:\s*['\"](\w+)['\"]", re.DOTALL)
SAID = re.compile(r"['\"](?:content|value)['\"]\s*:")
REASONING = ("reasoning_content", "reasoning", "thinking")
# From this share of a file's pairs on, answers that begin with their prompt were written so by whoever made the file; below
# it, an answer merely begins with the words of a short question ("Hi": "Hi there").
REPEATED_SHARE = 0.5


class Tidied(NamedTuple):
    """A row as the layouts read it, what was done to it, each as a remark, and why nobody can read it."""

    row: object
    remarks: list[str]
    refused: str | None = None


def tidied(rows: Sequence[object]) -> list[Tidied]:
    """Return the rows of a whole file, tidied; a row that nothing is wrong with stays the object that it is."""
    results = [_tidy(row) if isinstance(row, Mapping) else Tidied(row, []) for row in rows]
    heads = [_repeated_text(result.row) for result in results]
    pairs = sum(isinstance(row, Mapping) and "chosen" in row and "prompt" in row for row in rows)
    is_habit = sum(head is not None for head in heads) >= REPEATED_SHARE * pairs
    for i, head in enumerate(heads):
        row, remarks, _ = results[i]
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
    if has_speaker_lines(row.get("prompt")):
        remarks.append(SPEAKERS_APART)
    steps = (
        (more_likely_first, UNLIKELY),
        (_name_prompt, NAMED),
        (_parse, PARSED),
        (_interleave, INTERLEAVED),
        (_cut_conversations, REPEATED),
        (with_system_turn, SYSTEM),
    )
    for step, remark in steps:
        try:
            changed = step(row)
        except UnreadableText as reason:
            return Tidied(row, remarks, str(reason))
        except BadRow:  # the layout that reads the row says what is wrong with it
            continue
        if changed is not None:
            row, remarks = changed, [*remarks, remark]
    unread = _unread_system(row)
    return Tidied(row, remarks if unread is None else [*remarks, unread])


# ---- A label that is more likely wrong than right ----


def more_likely_first(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the row with its sides changed where P(chosen is better) is below a half; whatever takes `chosen` for the better
    answer, an accuracy or a demonstration, would take the worse one.

    None where nothing changes: two responses have no sides yet, and are asked about again when they have.
    """
    name = "confidence" if row.get("confidence") is not None else "soft_label"
    value = row.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 0.5:
        return None
    if row.get("chosen") is None or row.get("rejected") is None or second_response(row) is not None:
        return None
    changed = {_other_side(key): content for key, content in row.items()}
    for signed in ("margin", "rating_gap"):
        if isinstance(gap := row.get(signed), int | float) and not isinstance(gap, bool):
            changed[signed] = -gap
    if isinstance(agree := row.get("agree"), int | float) and not isinstance(agree, bool) and 0 <= agree <= 1:
        changed["agree"] = 1 - agree
    return {**changed, name: 1 - value}


def _other_side(key: str) -> str:
    """Return a column's name with `chosen` and `rejected` in each other's place."""
    sides = {"chosen": "rejected", "rejected": "chosen"}
    return re.sub("chosen|rejected", lambda side: sides[side[0]], key)


# ---- The prompt of two responses ----


def _name_prompt(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return a row of two responses with its prompt under our name, as other pairs may have it under another one."""
    if second_response(row) is None or row.get("prompt") is not None or row.get("context") is not None:
        return None
    prompt = prompt_under_another_name(row)
    return None if prompt is None else {**row, "prompt": prompt}


# ---- Conversations as text ----


class UnreadableText(BadRow):
    """A text that was meant to be messages, which no layout could tell from words."""


def _parse(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the row with messages where it has their text; of two answers, both must be such texts.

    Raises:
        UnreadableText: a text that must have been messages once, as those of arrays that pandas wrote.
    """
    parsed = {name: turns for name in TEXTS if (turns := _parsed(row.get(name), name)) is not None}
    for sides in SIDES:
        if sum(name in parsed for name in sides) == 1:
            parsed = {name: turns for name, turns in parsed.items() if name not in sides}
    return {**row, **parsed} if parsed else None


def _parsed(text: object, name: str) -> list[object] | None:
    """Return the messages in a text; None where it is words, or JSON of something else."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return None
    for read in (json.loads, ast.literal_eval):
        try:
            turns = read(text)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
        is_conversation = isinstance(turns, list) and bool(turns) and all(_is_turn(turn) for turn in turns)
        return turns if is_conversation else None
    speaker = SPEAKER.match(text)
    if speaker is not None and speaker[1] in (*ROLES, *SPEAKERS) and SAID.search(text):
        raise UnreadableText(UNREADABLE.format(name))
    return None


def _is_turn(turn: object) -> bool:
    if not isinstance(turn, dict):
        return False
    is_ours = turn.get("role") in ROLES and ("content" in turn or "tool_calls" in turn)
    return is_ours or (turn.get("from") in (*ROLES, *SPEAKERS) and "value" in turn)


def _interleave(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the row with conversations in place of JSON lists of as many texts: the prompt's are the user's turns."""
    lists = {name: _texts_in(row.get(name)) for name in ("prompt", "chosen", "rejected")}
    asked, chosen, rejected = lists.values()
    if not asked or not chosen or not rejected or not len(asked) == len(chosen) == len(rejected):
        return None
    if set(asked) & {*chosen, *rejected}:  # a list to be sorted or filtered
        return None
    sides = {
        side: [
            Message(role=role, content=text)
            for turn in zip(asked, answers, strict=True)
            for role, text in zip(("user", "assistant"), turn, strict=True)
        ]
        for side, answers in (("chosen", chosen), ("rejected", rejected))
    }
    return {name: value for name, value in row.items() if name != "prompt"} | sides


def _texts_in(text: object) -> list[str]:
    """Return the texts of a JSON list of texts; none where it is no such list."""
    if not isinstance(text, str) or not text.lstrip().startswith("["):
        return []
    try:
        texts = json.loads(text)
    except (ValueError, RecursionError):
        return []
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else []


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


def with_system_turn(row: Mapping[str, object]) -> Mapping[str, object] | None:
    """Return the row with its `system` column as the first turn of its prompt or conversations, which have none yet.

    None where there is nothing to add. Two sides beside a prompt that is a text lose the blanks around them.

    Raises:
        BadRow: the prompt or conversation is none.
    """
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


def _unread_system(row: Mapping[str, object]) -> str | None:
    """Return why the `system` column of a tidied row is not read, or None."""
    system = row.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return None
    if not isinstance(system, str):
        return NO_SYSTEM
    conversations = (row.get(name) for name in ("messages", "chosen", "rejected", *_prompt_names(row)))
    firsts = [turns[0] for turns in conversations if isinstance(turns, list) and turns and isinstance(turns[0], dict)]
    turns = [first.get("content") for first in firsts if first.get("role") == "system"]
    return OTHER_SYSTEM if turns and system not in turns else None


def _prompt_names(row: Mapping[str, object]) -> Sequence[str]:
    if is_k_wise(row):
        return ("prompt", "instruction")
    return ("prompt",) if second_response(row) is None else ("prompt", "context")


def _all_messages(row: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    for name in TEXTS:
        value = row.get(name)
        if isinstance(value, list):
            yield from (message for message in value if isinstance(message, Mapping))
