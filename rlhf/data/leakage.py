"""Training rows whose prompt or conversation is on a test side that was given: refused, dropped, or told of."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeAlias

from rlhf.data.rows import PromptRow
from rlhf.data.sources import Row, keep_only
from rlhf.errors import UserError

Leakage: TypeAlias = Literal["refuse", "drop", "allow"]
# Rows by what they are: pairs, prompts, demonstrations; or by file.
Parts: TypeAlias = Mapping[str, Sequence[Row[PromptRow]]]
LEAK = "its prompt is on the test side that was given"
SAME_CONVERSATION = "another prompt of its conversation is on the test side that was given"


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
    conversations = {row.conversation for row in test} - held_out
    leaks = {name: [row for row in rows if row.key in given] for name, rows in parts.items()}
    others = {
        name: [row for row in rows if row.key not in given and row.conversation in conversations]
        for name, rows in parts.items()
    }
    if leakage == "drop":
        kept: dict[str, Sequence[Row[PromptRow]]] = {}
        for name, rows in parts.items():
            rest = keep_only(rows, [row for row in rows if row.key not in given], LEAK)
            kept[name] = keep_only(
                rest, [row for row in rest if row.conversation not in conversations], SAME_CONVERSATION
            )
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
