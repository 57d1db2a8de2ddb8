"""Scores for lines of JSON: a line in, a line out, in order, whatever is wrong with some of them."""

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

from rlhf.data.canonical import messages
from rlhf.data.read import BadRow
from rlhf.reward.load import RewardModel

BATCH = 256


def score_lines(reward: RewardModel, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """The object of each line plus `score`, its raw scalar; a line that can't be scored gives `{"error": …}` in its place.

    Args:
        lines: each `{"prompt": …, "response": …}` (the prompt text or messages) or `{"messages": […]}`, whose last turn is
            scored. Blank lines are errors too, so that line n of the output is line n of the input.
    """
    remaining = iter(lines)
    while batch := list(islice(remaining, BATCH)):  # itertools.batched came with Python 3.12
        rows = [_parse(line) for line in batch]
        good = [row for row in rows if "error" not in row]
        prompts, responses = [row.pop("_prompt") for row in good], [row.pop("_response") for row in good]
        for row, score in zip(good, reward.score(prompts, responses).tolist() if good else [], strict=True):
            row["score"] = score
        yield from rows


def _parse(line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        if row.get("messages") is not None:
            turns = messages(row["messages"], "messages")
            if len(turns) < 2 or turns[-1]["role"] != "assistant":
                raise BadRow("messages must end with an assistant's answer to something")
            prompt, response = turns[:-1], turns[-1]["content"]
        elif row.get("prompt") is not None and isinstance(row.get("response"), str):
            prompt, response = messages(row["prompt"], "prompt"), row["response"]
        else:
            raise BadRow("neither 'prompt' and 'response' nor 'messages'")
    except json.JSONDecodeError as error:
        return {"error": f"not valid JSON: {error}"}
    except BadRow as reason:
        return {"error": str(reason)}
    return {**row, "_prompt": prompt, "_response": response}
