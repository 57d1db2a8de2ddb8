"""Scores for JSON lines: a line in, a line out, in order, whatever is wrong with some of them."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from rlhf.data.limits import MOST_LINE, TOO_DEEP, TOO_LONG, is_too_deep
from rlhf.data.messages import ended_of, messages
from rlhf.data.read import BadRow
from rlhf.data.rows import Prompt, has_ended, has_tools, user_turn
from rlhf.data.tidy import with_system_turn
from rlhf.errors import TrainingError, UserError
from rlhf.models.score import Scorer
from rlhf.models.text import last_turn
from rlhf.models.tools import ToolTemplate
from rlhf.reward.model import RewardModel

BATCH = 256
MOST_DIGITS = 40  # of a number, in a message


class _Line(NamedTuple):
    """A line that can be scored: its object, the prompt and the response in it, and whether the response came to its end."""

    row: dict[str, Any]
    prompt: Prompt
    response: str
    ended: bool


def score_lines(reward: Scorer, lines: Iterable[str | None]) -> Iterator[dict[str, Any]]:
    """Yield the object of each line plus `score`, its raw scalar; `{"error": …}` in place of a line that can't be scored.

    An object whose text was too long for the model, and lost its beginning, has `"cut": true` too; no other one has.

    Args:
        lines: each `{"prompt": …, "response": …}` (the prompt text or messages) or `{"messages": […]}`, whose last turn is
            scored, with `system` beside them or not. `completion` is a second name of `response`, that of sampled answers. Blank
            lines are errors too, so that line n of the output is line n of the input; so is None, a line that was too long to be
            read (`bounded_lines`).
    """
    for batch in _batches(lines):
        parsed = [_parse(line, reward) for line in batch]
        good = [line for line in parsed if isinstance(line, _Line)]
        model = reward if isinstance(reward, RewardModel) else None
        cut_before = 0 if model is None else model.cut
        scores = iter(_scores(reward, good))
        for line in parsed:
            score = next(scores) if isinstance(line, _Line) else line
            if isinstance(line, _Line) and isinstance(score, float):
                is_cut = (
                    model is not None
                    and model.cut > cut_before
                    and model.is_cut(line.prompt, line.response, line.ended)
                )
                yield _scored(line.row, score, is_cut=is_cut)
            else:
                yield {"error": score}


def _scored(row: dict[str, Any], score: float, *, is_cut: bool) -> dict[str, Any]:
    """Return an object with its score; `cut` of an earlier model, which read less, is not of this one."""
    others = {name: value for name, value in row.items() if name != "cut" or value is not True}
    return {**others, "score": score, **({"cut": True} if is_cut else {})}


def _batches(lines: Iterable[str | None]) -> Iterator[list[str | None]]:
    """Cut lines into batches of at most `BATCH`, and of no more letters than one line may have, or one line more."""
    batch: list[str | None] = []
    letters = 0
    for line in lines:
        batch.append(line)
        letters += len(line or "")
        if len(batch) == BATCH or letters > MOST_LINE:
            yield batch
            batch, letters = [], 0
    if batch:
        yield batch


def _scores(reward: Scorer, lines: Sequence[_Line]) -> list[float | str]:
    """Return each line's score, or why it has none; where one line fails, all of its batch are scored one by one."""
    if not lines:
        return []
    model = reward if isinstance(reward, RewardModel) else None
    counts = [] if model is None else model.counts()
    try:
        prompts, responses = [line.prompt for line in lines], [line.response for line in lines]
        scores = reward.score(prompts, responses, ended=[line.ended for line in lines]).tolist()
    except TemplateError as error:
        reason = f"the chat template refuses these turns: {error}"
    except (UserError, TrainingError, ValueError, TypeError, LookupError, RuntimeError) as error:
        reason = f"can't be scored: {str(error) or type(error).__name__}".splitlines()[0]
    else:
        return [x if math.isfinite(x) else f"the score is not a finite number ({x})" for x in scores]
    if len(lines) == 1:
        return [reason]
    if model is not None:
        model.count_from(counts)  # one by one they are counted again
    return [_scores(reward, [line])[0] for line in lines]


def _parse(line: str | None, reward: Scorer) -> _Line | str:
    """Parse a line; one that can't be scored gives the reason instead."""
    if line is None:
        return TOO_LONG
    try:
        row = json.loads(line.removeprefix("\ufeff"), parse_constant=_refuse_constant, parse_float=_finite)
        if not isinstance(row, dict):
            raise BadRow("not a JSON object")
        if is_too_deep(row):
            raise BadRow(TOO_DEEP)
        json.dumps(row, ensure_ascii=False).encode()
        prompt, response, ended = _asked_and_answered(row, reward)
    except UnicodeEncodeError:
        return "a lone surrogate, which is no text"
    except RecursionError:
        return TOO_DEEP
    except BadRow as reason:
        return str(reason)
    except ValueError as error:  # a number of more digits than Python reads
        return f"not valid JSON: {error}"
    return _Line(row, prompt, response, ended)


def _asked_and_answered(row: dict[str, Any], reward: Scorer) -> tuple[Prompt, str, bool]:
    """Return the prompt and the response of a line, its `system` as the first turn, as wherever data are read; and whether the
    response came to its end, as all do that do not say `ended: false`, the object or the last message.

    Raises:
        BadRow: they are not there, not in one form, or of another type; something stands beside that has no place here.
    """
    if row.get("tools"):
        raise BadRow(
            "'tools' have no place here; write what the model read of them into a system turn, or leave them out"
        )
    ended = ended_of(row)
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise BadRow(f"'system' is {_type(system)}, and must be a text")
    if row.get("messages") is not None:
        if row.get("response") is not None:
            raise BadRow("'messages' beside 'response': two answers; leave one of them out")
        changed = with_system_turn({"messages": row["messages"], "system": system})
        turns = messages((changed or row)["messages"], "messages")
        if len(turns) < 2 or turns[-1]["role"] != "assistant":
            raise BadRow("messages must end with an assistant's answer to something")
        whole = _without_calls({"prompt": turns[:-1], "completion": turns[-1:]}, reward)
        return whole["prompt"], last_turn(whole["completion"]), ended and has_ended(turns)
    name = "completion" if "completion" in row and "response" not in row else "response"
    if "prompt" not in row or name not in row:
        raise BadRow("neither 'prompt' and 'response' nor 'messages'")
    if not isinstance(row[name], str):
        raise BadRow(f"'{name}' is {_type(row[name])}, and must be a text")
    if not isinstance(row["prompt"], str | list | dict):
        raise BadRow(f"'prompt' is {_type(row['prompt'])}, and must be a text or messages")
    prompt = _prompt(row["prompt"], reward)
    if system and system.strip() and isinstance(prompt, str):
        raise BadRow("'system' beside a prompt that a chat template has rendered; leave it out, or send messages")
    changed = with_system_turn({"prompt": prompt, "system": system})
    if changed is not None:
        prompt = messages(changed["prompt"], "prompt")
    if not isinstance(prompt, str):
        prompt = _without_calls({"prompt": prompt}, reward)["prompt"]
    return prompt, row[name], ended


def _without_calls(row: dict[str, Any], reward: Scorer) -> dict[str, Any]:
    """Return turns as texts, tool calls in them as the model's template writes them, and as it was trained.

    Raises:
        BadRow: the template has no place for them, or nothing says which template would write them.
    """
    if not has_tools(row):
        return row
    if not isinstance(reward, RewardModel):
        raise BadRow("tool calls: each of several models may write them in another way; score with one model")
    return ToolTemplate(lambda: reward.tokenizer, "the reward model")(row)


def _type(value: object) -> str:
    """Return what a value of JSON is, as people call it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    names = {list: "a list", dict: "an object"}
    return next((name for kind, name in names.items() if isinstance(value, kind)), "a number")


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


def _finite(digits: str) -> float:
    """Return a number, or refuse one that is too large for a float: it would be written as Infinity, which is no JSON."""
    if math.isfinite(number := float(digits)):
        return number
    raise BadRow(f"the number {digits[:MOST_DIGITS]} is too large")
