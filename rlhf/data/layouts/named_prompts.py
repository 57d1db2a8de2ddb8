"""Pairs and demonstrations whose columns have other names: Orca's, Argilla's, and the Alpaca form of LlamaFactory."""

from collections.abc import Mapping

from rlhf.data.canonical import RATINGS
from rlhf.data.layouts.layout import Layout, beside, liked
from rlhf.data.messages import HUMAN
from rlhf.data.rankings import LISTS
from rlhf.data.read import BadRow
from rlhf.data.rows import CRITIQUES, TIE

PROMPTS = ("question", "instruction", "input", "query")
ANSWERS = (("chosen", "rejected"), ("chosen_response", "rejected_response"))
KEPT = (*(name for names in RATINGS for name in names), "rating_gap", *CRITIQUES)


def has_named_prompt(row: object) -> bool:
    """Return whether a row's prompt has another name and its answers stand alone, or its answers have other names."""
    if not isinstance(row, Mapping) or any(isinstance(row.get(name), list) for name in LISTS):
        return False
    answers = _answers(row)
    if answers is None or row.get("messages") is not None:
        return False
    if row.get("prompt") is not None:
        return answers != ANSWERS[0]
    return _prompt_name(row) is not None and not _is_conversation(row[answers[0]])


def named_prompt(row: Mapping[str, object]) -> Mapping[str, object]:
    """Return the row with its prompt and answers under our names; `instruction` and `input` are one text, as in Alpaca."""
    chosen, rejected = _answers(row) or ANSWERS[0]
    kept = beside(row) | {name: row[name] for name in KEPT if row.get(name) is not None}
    if row.get("status") == "tie":  # distilabel's second look at Orca's pairs
        kept["confidence"] = TIE
    return {**kept, "prompt": _prompt(row), "chosen": row[chosen], "rejected": row[rejected]}


def prompt_under_another_name(row: Mapping[str, object]) -> object:
    """Return the prompt of a row that has none under ours, with its `input` and `history`; None where there is none at all.

    Raises:
        BadRow: `history` is no list of [question, answer].
    """
    return None if _prompt_name(row) is None else _prompt(row)


def is_alpaca(row: object) -> bool:
    """Return whether a row is an instruction with its output, or with its two outputs, the better one first."""
    return (
        isinstance(row, Mapping)
        and isinstance(row.get("instruction"), str)
        and "output" in row
        and not any(row.get(name) is not None for name in ("prompt", "messages", "completion", "chosen", *LISTS))
    )


def alpaca(row: Mapping[str, object]) -> Mapping[str, object]:
    """Return the row as a demonstration, or as a pair where `output` is a list of two."""
    output, prompt = row["output"], _prompt(row)
    if not isinstance(output, list):
        return {**beside(row), **liked(row), "prompt": prompt, "completion": output}
    if len(output) != 2:
        raise BadRow("output is neither a text nor two texts, the better one first")
    return {**beside(row), "prompt": prompt, "chosen": output[0], "rejected": output[1]}


def _answers(row: Mapping[str, object]) -> tuple[str, str] | None:
    return next((names for names in ANSWERS if all(row.get(name) is not None for name in names)), None)


def _prompt_name(row: Mapping[str, object]) -> str | None:
    return next((name for name in PROMPTS if isinstance(row.get(name), str | list) and row[name]), None)


def _prompt(row: Mapping[str, object]) -> object:
    """Return a row's prompt: the turns of `history` first, question and answer by turns, as LlamaFactory has them."""
    if row.get("prompt") is not None:
        return row["prompt"]
    name = _prompt_name(row)
    prompt = None if name is None else row[name]
    more = row.get("input")
    if name == "instruction" and isinstance(prompt, str) and isinstance(more, str) and more.strip():
        prompt = f"{prompt}\n{more}"
    history = row.get("history")
    if not history:
        return prompt
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        raise BadRow("history is not a list of [question, answer]")
    turns = [
        {"role": role, "content": text}
        for turn in history
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return [*turns, {"role": "user", "content": prompt}]


def _is_conversation(answer: object) -> bool:
    """Tell whether an answer brings its prompt along."""
    if isinstance(answer, str):
        return answer.lstrip().startswith(HUMAN.strip())
    return isinstance(answer, list) and len(answer) > 1


NAMED_PROMPT = Layout(
    "pair under other names",
    "`question`, `instruction` (with `input`), `input` or `query`, beside `chosen` and `rejected`, or beside "
    "`chosen_response` and `rejected_response`; `system`, `history`, ratings (Orca, Argilla, Alpaca)",
    matches=has_named_prompt,
    renames=named_prompt,
)
ALPACA = Layout(
    "Alpaca",
    "`instruction` (with `input`, `system`, `history`) and `output`; an `output` of two texts is a pair, the better one first",
    matches=is_alpaca,
    renames=alpaca,
    direction="of two outputs the first is the better one",
)
