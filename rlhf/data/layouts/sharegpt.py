"""ShareGPT, and the forms of LlamaFactory that are built on it: the conversation in one column, its answers beside it."""

from collections.abc import Mapping

from rlhf.data.layouts.layout import Layout, beside, liked


def has_conversations(row: object) -> bool:
    """Return whether a row has `conversations`, or `messages` with one message beside them as the chosen answer."""
    if not isinstance(row, Mapping) or row.get("prompt") is not None:
        return False
    return isinstance(row.get("conversations"), list) or (
        isinstance(row.get("messages"), list) and isinstance(row.get("chosen"), Mapping)
    )


def conversation(row: Mapping[str, object]) -> Mapping[str, object]:
    """Return the conversation as the prompt of two answers, or as a demonstration where there are none."""
    name = "conversations" if isinstance(row.get("conversations"), list) else "messages"
    if row.get("chosen") is None and row.get("rejected") is None:
        return {**beside(row), **liked(row), "messages": row[name]}
    return {**beside(row), "prompt": row[name], "chosen": row.get("chosen"), "rejected": row.get("rejected")}


SHAREGPT = Layout(
    "ShareGPT",
    "`conversations` with `from` and `value` (or `messages`), beside them `chosen` and `rejected` (LlamaFactory) or nothing",
    matches=has_conversations,
    renames=conversation,
)
