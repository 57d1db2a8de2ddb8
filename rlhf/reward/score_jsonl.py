"""Scores for JSON lines: a line in, a line out, in order, whatever is wrong with some of them."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from rlhf.data.canonical import messages
from rlhf.data.read import BadRow
from rlhf.data.rows import Messages, completion
from rlhf.models.score import Scorer

BATCH = 256


class _Line(NamedTuple):
    """A line that can be scored: its object, and the prompt and the response in it."""

    row: dict[str, Any]
    prompt: Messages
    response: str


def score_lines(reward: Scorer, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the object of each line plus `score`, its raw scalar; `{"error": …}` in place of a line that can't be scored.

    Args:
        lines: each `{"prompt": …, "response": …}` (the prompt text or messages) or `{"messages": […]}`, whose last turn is
            scored. Blank lines are errors too, so that line n of the output is line n of the input.
    """
    remaining = iter(lines)
    while batch := list(islice(remaining, BATCH)):  # itertools.batched came with Python 3.12
        parsed = [_parse(line) for line in batch]
        good = [line for line in parsed if isinstance(line, _Line)]
        scores = iter(reward.score([x.prompt for x in good], [x.response for x in good]).tolist() if good else [])
        for line in parsed:
            yield {**line.row, "score": next(scores)} if isinstance(line, _Line) else {"error": line}


def _parse(line: str) -> _Line | str:
    """Parse a line; one that can't be scored gives the reason instead."""
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        if row.get("messages") is not None:
            turns = messages(row["messages"], "messages")
            if len(turns) < 2 or turns[-1]["role"] != "assistant":
                raise BadRow("messages must end with an assistant's answer to something")
            prompt = turns[:-1]
            response = completion({"prompt": prompt, "completion": turns[-1:]})
        elif row.get("prompt") is not None and isinstance(row.get("response"), str):
            prompt, response = messages(row["prompt"], "prompt"), row["response"]
        else:
            raise BadRow("neither 'prompt' and 'response' nor 'messages'")
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error}"
    except BadRow as reason:
        return str(reason)
    return _Line(row, prompt, response)
