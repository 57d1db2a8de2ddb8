"""Lines of JSON and their scores: a line in, a line out, whatever a line holds. The scores themselves: `test_parity.py`."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from jinja2 import TemplateError

from rlhf.data.rows import Prompt
from rlhf.errors import UserError
from rlhf.models.load import model_settings
from rlhf.reward.model import RewardModel
from rlhf.reward.score_jsonl import BATCH, score_lines
from tests.models.test_tools import call
from tests.unit_scale import build_reward_model


class Lengths:
    """Scores an answer by its length."""

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> torch.Tensor:
        return torch.tensor([float(len(text)) for text in responses])


def test_every_line_has_its_place() -> None:
    lines = [
        json.dumps({"prompt": "a", "response": "xx", "id": 7}),
        "",
        "[1]",
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xxx"}]}),
        json.dumps({"messages": [{"role": "user", "content": "a"}]}),
        json.dumps({"prompt": "a"}),
        json.dumps({"prompt": "a", "response": "x", "score": 9, "error": "an older one"}),
    ]
    rows = list(score_lines(Lengths(), lines))
    assert rows[0] == {"prompt": "a", "response": "xx", "id": 7, "score": 2.0}
    assert rows[1]["error"].startswith("not valid JSON")
    assert rows[2] == {"error": "not a JSON object"}
    assert rows[3]["score"] == 3.0
    assert rows[4] == {"error": "messages must end with an assistant's answer to something"}
    assert rows[5] == {"error": "neither 'prompt' and 'response' nor 'messages'"}
    assert rows[6] == {"prompt": "a", "response": "x", "score": 1.0, "error": "an older one"}


def test_sampled_answers_are_scored_as_their_file_has_them() -> None:
    """PPO's and evaluation's `samples.jsonl` say `completion`; a `response` beside it is the answer."""
    sample = {"prompt": [{"role": "user", "content": "a"}], "completion": "xxxx", "proxy": 0.5, "ended": True}
    lines = [sample, {"prompt": "a", "completion": "xxx", "response": "x"}, {"prompt": "a", "completion": ["x"]}]
    rows = list(score_lines(Lengths(), map(json.dumps, lines)))
    assert rows[0] == {**sample, "score": 4.0}
    assert rows[1]["score"] == 1.0
    assert rows[2] == {"error": "'completion' is a list, and must be a text"}


def test_more_lines_than_a_batch() -> None:
    lines = [json.dumps({"prompt": "a", "response": "x" * (i % 5)}) if i % 7 else "?" for i in range(2 * BATCH + 3)]
    rows = list(score_lines(Lengths(), lines))
    assert [row.get("score") for row in rows] == [float(i % 5) if i % 7 else None for i in range(len(lines))]


class Particular(Lengths):
    """Refuses a batch that holds a text it can't read, as a template, a tokenizer or a network may."""

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> torch.Tensor:
        for text in responses:
            if text in ERRORS:
                raise ERRORS[text]
        return torch.tensor([float("nan") if text == "nan" else float(len(text)) for text in responses])


ERRORS = {
    "template": TemplateError("roles must alternate"),
    "value": ValueError("no\nway"),
    "type": TypeError(""),
    "user": UserError("not this one"),
}


def test_a_line_that_cannot_be_scored_is_the_only_one_without_a_score() -> None:
    texts = ["aa", "template", "bbb", "value", "type", "user", "nan", "c"]
    rows = list(score_lines(Particular(), [json.dumps({"prompt": "a", "response": text}) for text in texts]))
    assert [row.get("score") for row in rows] == [2.0, None, 3.0, None, None, None, None, 1.0]
    assert rows[1] == {"error": "the chat template refuses these turns: roles must alternate"}
    assert rows[3] == {"error": "can't be scored: no"}
    assert rows[4] == {"error": "can't be scored: TypeError"}
    assert rows[5] == {"error": "can't be scored: not this one"}
    assert "not a finite number" in rows[6]["error"]


def test_odd_lines() -> None:
    good = json.dumps({"prompt": "a", "response": "xx"})
    surrogate = '{"prompt": "a", "response": "x", "id": "\\ud800"}'
    lines = [
        "\ufeff" + good, surrogate, surrogate.replace('"id"', '"x"').replace("response", "prompt2"), '{"prompt": NaN}',
        '{"prompt": "a", "response": "x", "weight": -Infinity}', "[" * 100_000, good.replace("xx", "x\u2028y"), good,
    ]  # fmt: skip
    rows = list(score_lines(Lengths(), lines))
    assert [row.get("score") for row in rows] == [2.0, None, None, None, None, None, 3.0, 2.0]
    assert rows[1] == {"error": "a lone surrogate, which is no text"}
    assert rows[3] == {"error": "not valid JSON: NaN"}
    assert rows[4] == {"error": "not valid JSON: -Infinity"}
    assert rows[5] == {"error": "nested deeper than 200 levels"}
    "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows).encode()


class Heard(Lengths):
    """Keeps what it is asked about."""

    def __init__(self) -> None:
        self.prompts: list[Prompt] = []

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], *, ended: Sequence[bool] | None = None
    ) -> torch.Tensor:
        self.prompts += prompts
        return super().score(prompts, responses)


def test_a_system_column_is_the_system_turn() -> None:
    """As wherever data are read: the same row has the same score in `rlhf score` and in `rlhf evaluate`."""
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "xx"}
    system = {"role": "system", "content": "be nice"}
    heard = Heard()
    rows: list[dict[str, object]] = [
        {"prompt": "a", "response": "xx", "system": "be nice"},
        {"prompt": [user], "response": "xx", "system": "be nice"},
        {"messages": [user, assistant], "system": "be nice"},
        {"messages": [system, user, assistant], "system": "be nice"},
        {"prompt": "a", "response": "xx", "system": " "},
        {"prompt": "a", "response": "xx", "system": None, "tools": []},
    ]
    scored = list(score_lines(heard, map(json.dumps, rows)))
    assert heard.prompts == [[system, user]] * 4 + [[user]] * 2
    assert scored == [{**row, "score": 2.0} for row in rows], "each as it was"


def test_tool_calls_are_what_the_template_writes_and_are_not_dropped(tokenizer: Any, base_folder: Path) -> None:
    """Two calls of other functions had one score, that of the empty text beside them."""
    called = copy.copy(tokenizer)
    called.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% for c in m.tool_calls or [] %}[{{ c.function.name }} "
        "{{ c.function.arguments | tojson }}]{% endfor %}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    reward = RewardModel(model.eval(), called, conversational=True)
    user = {"role": "user", "content": "in Rome?"}
    calls = [call(city=city) for city in ("Rome", "Oslo")]
    rows = [{"messages": [user, made]} for made in calls]
    rows += [{"prompt": [user, made, {"role": "tool", "content": "42"}], "response": "no"} for made in calls]
    scores = [line["score"] for line in score_lines(reward, map(json.dumps, rows))]
    assert len(set(scores)) == 4
    for row, score in zip(rows, scores, strict=True):
        turns = row.get("messages") or [*row["prompt"], {"role": "assistant", "content": row["response"]}]
        text = called.apply_chat_template(turns, tokenize=False)
        ids = called(text, return_tensors="pt", add_special_tokens=False).input_ids
        with torch.no_grad():
            assert model(ids).logits.item() == pytest.approx(score, abs=1e-4)
    reward.tokenizer = tokenizer
    (refused,) = score_lines(reward, [json.dumps(rows[0])])
    assert "has no place for" in refused["error"]
    (refused,) = score_lines(Lengths(), [json.dumps(rows[0])])
    assert refused["error"].startswith("tool calls: each of several models")


def test_what_stands_beside_or_is_of_another_type_is_named() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "xx"}]
    pair = {"prompt": "a", "response": "x"}
    errors = {
        "'tools' have no place here": {**pair, "tools": [{"name": "f"}]},
        "'system' is a number, and must be a text": {**pair, "system": 5},
        "'messages' beside 'response'": {**pair, "messages": turns},
        "'response' is a number, and must be a text": {**pair, "response": 5},
        "'response' is null, and": {**pair, "response": None},
        "'response' is true, and": {**pair, "response": True},
        "'response' is a list, and": {**pair, "response": turns[1:]},
        "'response' is an object, and": {**pair, "response": turns[1]},
        "'prompt' is null, and must be a text or messages": {**pair, "prompt": None},
        "neither 'prompt' and 'response' nor 'messages'": {"prompt": "a", "messages": None},
    }
    for sentence, row in errors.items():
        (scored,) = score_lines(Lengths(), [json.dumps(row)])
        assert scored["error"].startswith(sentence)
    (huge,) = score_lines(Lengths(), ['{"prompt": "a", "response": "x", "n": [-1e999]}'])
    assert huge == {"error": "the number -1e999 is too large"}, "it would be written as -Infinity, which is no JSON"
    (beside,) = score_lines(Lengths(), [json.dumps({"prompt": "a", "messages": turns, "n": 1e300})])
    assert beside["score"] == 2.0, "a prompt that the messages begin with is no second answer"
