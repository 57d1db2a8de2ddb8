"""Training rows whose prompt or conversation is on a test side that was given: refused, dropped, or told of."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import Messages, PromptRow, prefix_keys
from rlhf.data.sources import Row, keep_only
from rlhf.errors import UserError

Leakage: TypeAlias = Literal["refuse", "drop", "allow"]
# Rows by what they are: pairs, prompts, demonstrations; or by file.
Parts: TypeAlias = Mapping[str, Sequence[Row[PromptRow]]]
LEAK = "its prompt is on the test side that was given"
SAME_CONVERSATION = "another prompt of its conversation is on the test side that was given"


class JudgedConversations:
    """The conversations of a test side, by which training rows of any file are known that are of one of them.

    What a conversation is depends on what else is in its file (`conversation_keys`): a question under many system turns, or behind
    an opening that many share, is a conversation of its own there, and in another file it is not. So a row of another file is of
    a test conversation where any beginning of its prompt is, with its system turn or without. Whether a system turn is part of a
    conversation the test side's own file says, and all files together which openings are templates.

    Args:
        names: the conversations, as their own files name them.
        test: rows of the test side, of these and of other conversations.
        parts: the training rows.
    """

    def __init__(self, names: set[str], test: Sequence[Row[Any]], parts: Parts):
        self.names, test = names, [row for row in test if row.conversation in names]
        others = [row for rows in parts.values() for row in rows]
        self.reports: dict[str, set[int]] = {}
        if len({id(row.report) for row in (*test, *others)}) > 1:
            keys = conversation_keys([_from_user_on(row.values["prompt"]) for row in (*test, *others)])
            for row, without_system in zip(test, keys, strict=False):
                has_system = row.conversation not in prefix_keys(_from_user_on(row.values["prompt"]))
                key = row.conversation if has_system else without_system
                self.reports.setdefault(key, set()).add(id(row.report))

    def hold(self, row: Row[Any]) -> bool:
        """Return whether a training row is of one of these conversations."""
        if row.conversation in self.names:
            return True
        beginnings = _beginnings(row.values["prompt"]) if self.reports else []
        return any(self.reports.get(key, set()) - {id(row.report)} for key in beginnings)


def _beginnings(prompt: Messages) -> list[str]:
    """Return the keys of all beginnings of a prompt, with its system turn and from the user's first turn on."""
    without_system = _from_user_on(prompt)
    return [*prefix_keys(prompt), *(prefix_keys(without_system) if len(without_system) < len(prompt) else ())]


def _from_user_on(prompt: Messages) -> Messages:
    return prompt[next((i for i, turn in enumerate(prompt) if turn["role"] == "user"), 0) :]


def without_leaks(
    parts: Parts, test: Sequence[Row[Any]], leakage: Leakage, *, held_out: set[str], derived: Sequence[str] = ()
) -> Parts:
    """Return the training rows, without those that leak where they are to be dropped.

    A row leaks whose prompt is a given test prompt. Another prompt of a test conversation may have its answer in what is tested,
    or be answered there; that is told of, and dropped with the others.

    Args:
        parts: the training rows.
        test: the given test side, prompts and pairs.
        held_out: conversations of which nothing is left on the training side already.
        derived: parts that repeat the prompts of others, and are not counted beside them.

    Raises:
        UserError: rows leak, and leakage is "refuse".
    """
    given = {row.key for row in test}
    conversations = JudgedConversations({row.conversation for row in test} - held_out, test, parts)
    leaks = {name: [row for row in rows if row.key in given] for name, rows in parts.items()}
    others = {
        name: [row for row in rows if row.key not in given and conversations.hold(row)] for name, rows in parts.items()
    }
    if leakage == "drop":
        kept: dict[str, Sequence[Row[PromptRow]]] = {}
        for name, rows in parts.items():
            rest = keep_only(rows, [row for row in rows if row.key not in given], LEAK)
            kept[name] = keep_only(rest, [row for row in rest if not conversations.hold(row)], SAME_CONVERSATION)
        return kept
    leaks = {name: rows for name, rows in leaks.items() if rows and name not in derived}
    if leaks and leakage == "refuse":
        first, count = next(iter(leaks.values()))[0], sum(map(len, leaks.values()))
        raise UserError(
            f"data: {count} training rows ({', '.join(f'{len(rows)} of {name}' for name, rows in leaks.items())}) have a prompt "
            f"that is also on the given test side, first {first.report.source}, row {first.number}; results on it would be too "
            "good. Take them out, or set data.leakage: drop (they are left out of training) or allow."
        )
    for reason, leaking in ((LEAK, leaks), (SAME_CONVERSATION, others)):
        for row in (row for rows in leaking.values() for row in rows):
            row.report.note(row.number, f"trained on, though {reason}")
    return parts
