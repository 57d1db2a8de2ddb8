"""Scores for JSON lines: a line in, a line out, in order, whatever is wrong with some of them."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from jinja2 import TemplateError

from rlhf.data.messages import messages
from rlhf.data.read import BadRow
from rlhf.data.rows import Prompt, completion, user_turn
from rlhf.errors import TrainingError, UserError
from rlhf.models.score import Scorer
from rlhf.reward.model import RewardModel

BATCH = 256


class _Line(NamedTuple):
    """A line that can be scored: its object, and the prompt and the response in it."""

    row: dict[str, Any]
    prompt: Prompt
    response: str


def score_lines(reward: Scorer, lines: Iterable[str]) -> Iterator[dict[str, Any]]:
    """Yield the object of each line plus `score`, its raw scalar; `{"error": …}` in place of a line that can't be scored.

    Args:
        lines: each `{"prompt": …, "response": …}` (the prompt text or messages) or `{"messages": […]}`, whose last turn is
            scored. Blank lines are errors too, so that line n of the output is line n of the input.
    """
    remaining = iter(lines)
    while batch := list(islice(remaining, BATCH)):  # itertools.batched came with Python 3.12
        parsed = [_parse(line, reward) for line in batch]
        good = [line for line in parsed if isinstance(line, _Line)]
        scores = iter(_scores(reward, good))
        for line in parsed:
            score = next(scores) if isinstance(line, _Line) else line
            if isinstance(line, _Line) and isinstance(score, float):
                yield {**line.row, "score": score}
            else:
                yield {"error": score}


def _scores(reward: Scorer, lines: Sequence[_Line]) -> list[float | str]:
    """Return each line's score, or why it has none; where one line fails, all of its batch are scored one by one."""
    if not lines:
        return []
    try:
        scores = reward.score([line.prompt for line in lines], [line.response for line in lines]).tolist()
    except TemplateError as error:
        reason = f"the chat template refuses these turns: {error}"
    except (UserError, TrainingError, ValueError, TypeError, LookupError, RuntimeError) as error:
        reason = f"can't be scored: {str(error) or type(error).__name__}".splitlines()[0]
    else:
        return [x if math.isfinite(x) else f"the score is not a finite number ({x})" for x in scores]
    return [reason] if len(lines) == 1 else [_scores(reward, [line])[0] for line in lines]


def _parse(line: str, reward: Scorer) -> _Line | str:
    """Parse a line; one that can't be scored gives the reason instead."""
    try:
        row = json.loads(line.removeprefix("\ufeff"), parse_constant=_refuse_constant)
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        json.dumps(row, ensure_ascii=False).encode()
        if row.get("messages") is not None:
            turns = messages(row["messages"], "messages")
            if len(turns) < 2 or turns[-1]["role"] != "assistant":
                raise BadRow("messages must end with an assistant's answer to something")
            response = completion({"prompt": turns[:-1], "completion": turns[-1:]})
            prompt: Prompt = turns[:-1]
        elif row.get("prompt") is not None and isinstance(row.get("response"), str):
            prompt, response = _prompt(row["prompt"], reward), row["response"]
        else:
            raise BadRow("neither 'prompt' and 'response' nor 'messages'")
    except json.JSONDecodeError as error:
        return f"not valid JSON: {error}"
    except UnicodeEncodeError:
        return "a lone surrogate, which is no text"
    except RecursionError:
        return "not valid JSON: nested too deeply"
    except BadRow as reason:
        return str(reason)
    return _Line(row, prompt, response)


def _prompt(prompt: object, reward: Scorer) -> Prompt:
    """Return a line's prompt as messages, or as the string that it is where the reward model's template has rendered it.

    A transcript "Human: … Assistant: …" is messages, but for one with end tokens in it: no person writes those.

    Raises:
        BadRow: it is neither text nor messages.
    """
    turns = messages(prompt, "prompt")
    if not isinstance(prompt, str) or not isinstance(reward, RewardModel) or not reward.is_rendered(prompt):
        return turns
    is_transcript = turns != user_turn(prompt) and reward.tokenizer.eos_token not in prompt
    return turns if is_transcript else prompt


def _refuse_constant(name: str) -> None:
    """Refuse NaN and infinities, which JSON does not have."""
    raise BadRow(f"not valid JSON: {name}")
