"""Edges of single rows: what is an answer, a prompt, a tool call, a rating, a time; what a path leads to."""

import hashlib
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.data.canonical import _number, _said, demonstration, extras_of, oddities, pair, prompt_only
from rlhf.data.columns import _has, _value, named_rows
from rlhf.data.controls import REPEATED_AFTER, controls_expected, repeated
from rlhf.data.direction import _unstated
from rlhf.data.functions import foreign_code
from rlhf.data.label_files import _seconds, record_entries
from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Question, Verdict
from rlhf.data.layouts import find_layout
from rlhf.data.limits import Unreadable, numbered_lines, open_text
from rlhf.data.messages import _calls, messages, transcript
from rlhf.data.rankings import _answered_turns, is_right_and_wrong, rated_entries, right_and_wrong
from rlhf.data.ratings import _entries
from rlhf.data.read import BadRow, ReadReport
from rlhf.data.rows import asked, group_key, has_tools, parting_turn, prompt_key
from rlhf.data.sides import shown_codes
from rlhf.data.tidy import tidied
from rlhf.errors import UserError


def turns(text: str) -> Any:
    """One turn a letter pair: u1 is the user's, a1 the assistant's."""
    roles = {"u": "user", "a": "assistant", "t": "tool", "s": "system"}
    return [{"role": roles[turn[0]], "content": turn} for turn in text.split()]


def test_single_answers_leave_a_prompt_as_it_is() -> None:
    row = {"prompt": turns("u1 a1"), "chosen": turns("a2"), "rejected": turns("a3")}
    with pytest.raises(BadRow, match="the prompt does not end with a user's turn"):
        pair(row)
    longer = pair({**row, "prompt": turns("u1"), "rejected": turns("a3 u2 a4")})
    assert (longer["prompt"], longer["rejected"]) == (turns("u1"), turns("a3 u2 a4"))


def test_the_last_turn_of_a_long_conversation_is_the_answer() -> None:
    whole = turns("s1 u1 a1 u2 a2")
    assert demonstration({"messages": whole}) == {"prompt": whole[:-1], "completion": whole[-1:]}
    assert prompt_only({"messages": whole}) == {"prompt": whole[:-1]}
    assert prompt_only({"messages": whole[:-1]}) == {"prompt": whole[:-1]}
    assert prompt_only({"messages": turns("u1 t1")}) == {"prompt": turns("u1 t1")}


def test_calls_are_the_same_in_any_order_of_their_parts() -> None:
    calls: Any = [{"function": {"name": "f", "arguments": {}}, "type": "function"}]
    turned: Any = [{"type": "function", "function": {"arguments": {}, "name": "f"}}]
    one, other = ({"role": "assistant", "content": "x", "tool_calls": each} for each in (calls, turned))
    assert _said(one) == _said(other) != _said({"role": "assistant", "content": "x"})  # type: ignore[arg-type]


@pytest.mark.parametrize("call", [{"name": 3}, {"function": {}}, {"function": "f"}, "f", None])
def test_a_call_names_a_function(call: object) -> None:
    with pytest.raises(BadRow, match="a tool call of x names no function"):
        _calls([call], "x")


def test_calls_as_templates_read_them() -> None:
    expected = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    for arguments in ('{"a": 1}', {"a": 1}):
        assert _calls([{"name": "f", "arguments": arguments}], "x") == expected
    assert _calls([{"id": "7", "function": {"name": "f"}}], "x") == [
        {"id": "7", "type": "function", "function": {"name": "f", "arguments": {}}}
    ]
    assert "id" not in _calls([{"id": 7, "name": "f"}], "x")[0]


@pytest.mark.parametrize(
    "text", ["Human: hi\n\nAssistant: yo", "\n\nHuman: hi\n\nAssistant: yo", "\n \n Human: hi\n\nAssistant: yo"]
)
def test_a_transcript_may_lack_the_lines_before_it(text: str) -> None:
    assert transcript(text) == [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]


@pytest.mark.parametrize(
    ("row", "path", "value"),
    [
        ({"a.b": 1, "a": {"b": 2}}, "a.b", 1),
        ({"a": {"b": 2}}, "a.b", 2),
        ({"a": [3, 4]}, "a.1", 4),
        ({"a": [{"b": 5}]}, "a.0.b", 5),
        ({"a": None}, "a", None),
    ],
)
def test_a_path_leads_into_nested_columns(row: object, path: str, value: object) -> None:
    assert _has(row, path)
    assert _value(row, path) == value


@pytest.mark.parametrize(
    ("row", "path"),
    [({"a": "xby"}, "a.b"), ({"a": [1]}, "a.1"), ({"a": [1]}, "a.-1"), ({"a": 3}, "a.b"), ("ab", "a"), (None, "a")],
)
def test_a_path_leads_nowhere_else(row: object, path: str) -> None:
    assert not _has(row, path)


def test_a_rating_of_something_else_is_passed_over() -> None:
    rated = {"text": "yes", "attributes": {"good": 1}}
    row = {"prompt": "hi", "responses": ["attributes", rated, {"text": "no"}]}
    assert _entries(row) == [([{"role": "user", "content": "hi"}], "yes", True, {"good": 1})]
    with pytest.raises(BadRow, match="no ratings of attributes beside an answer"):
        _entries(["attributes"])


@pytest.mark.parametrize(
    ("value", "seconds"),
    [(0, 0.0), (0.5, 0.5), ("3", 3.0), (-0.1, None), ("nan", None), ("inf", None), (None, None), ([1], None)],
)
def test_a_time_is_not_below_zero(value: object, seconds: float | None) -> None:
    assert _seconds(value) == seconds


def test_the_first_line_that_can_not_be_read_is_the_first() -> None:
    class Broken:
        def readline(self, most: int) -> bytes:
            raise Unreadable("broken")

    with pytest.raises(UserError, match="x: row 1: broken"):
        list(numbered_lines(Broken(), Path("x")))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": turns("u1"), "chosen": turns("a1"), "rejected": turns("a2")}, False),
        ({"prompt": turns("u1 t1"), "chosen": turns("a1")}, True),
        ({"prompt": turns("u1"), "completion": [{"role": "assistant", "content": "", "tool_calls": []}]}, True),
        ({"prompt": turns("u1"), "rejected": turns("t1 a2")}, True),
        ({"prompt": "tool"}, False),
    ],
)
def test_a_tools_turn_or_a_call_are_tools(row: Any, expected: bool) -> None:
    assert has_tools(row) == expected


def test_each_sides_answer_stands_behind_its_own_turns() -> None:
    row: Any = {"prompt": turns("u1"), "chosen": turns("a1"), "rejected": turns("a2 u2 a3")}
    assert asked(row, "chosen") == turns("u1")
    assert asked(row, "rejected") == turns("u1 a2 u2")


@pytest.mark.parametrize(
    ("chosen", "rejected", "turn"),
    [
        ("a1", "a2", None),
        ("a1 u2 a2", "a1 u2 a3", 4),
        ("a1 u2 a2", "a3 u4 a4", 2),
        ("a1", "a1 u2 a2", 3),
        ("a1 u2 a2", "a1", 3),
        ("a1 u2 a2", "a3", 2),
        ("a1 a2", "a1 a3", 3),
        ("a1 a2", "a3 a2", 2),
    ],
)
def test_the_turn_at_which_two_sides_part(chosen: str, rejected: str, turn: int | None) -> None:
    row: Any = {"prompt": turns("u1"), "chosen": turns(chosen), "rejected": turns(rejected)}
    assert parting_turn(row) == turn
    assert parting_turn({"prompt": turns("u1")}) is None


def tree(role: str, text: str, *replies: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "text": text, "replies": list(replies), **more}


def test_a_tree_has_an_answered_turn_for_every_prompter_who_was_answered() -> None:
    second = tree("prompter", "u2", tree("assistant", "a3"))
    gone = tree("assistant", "gone", deleted=True, rank=0)
    root = tree(
        "prompter", "u1", tree("assistant", "a1", second, rank=1), gone, tree("assistant", "a2", tree("prompter", "u3"))
    )
    first, inner = _answered_turns(root)
    assert (first.prompt, [(x.content, x.score) for x in first.answers], first.first_reply.content) == (
        turns("u1"),
        [("a1", -1.0)],
        "a1",
    )
    assert (inner.prompt, inner.answers, inner.first_reply.content) == (turns("u1 a1 u2"), [], "a3")


def test_right_texts_are_above_wrong_ones() -> None:
    row = {"prompt": "q", "chosen": ["a", "b"], "rejected": ["c"]}
    (ranking,) = right_and_wrong(row)
    assert [(x.content, x.score) for x in ranking.answers] == [("a", 1.0), ("b", 1.0), ("c", 0.0)]
    assert is_right_and_wrong(row)
    assert not is_right_and_wrong({**row, "chosen": ["a", {"content": "b"}]})
    assert not is_right_and_wrong({**row, "rejected": []})


def test_a_prompt_of_a_pair_or_of_nothing() -> None:
    assert prompt_only({"chosen": "\n\nHuman: u\n\nAssistant: a", "rejected": "\n\nHuman: u\n\nAssistant: b"}) == {
        "prompt": [{"role": "user", "content": "u"}]
    }
    with pytest.raises(BadRow, match="neither 'prompt' nor 'messages'"):
        prompt_only({"rejected": "x"})


@pytest.mark.parametrize("more", [{}, {"tool_calls": []}, {"tool_calls": None}])
def test_a_message_without_content_calls_a_tool_or_is_none(more: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="x is not a list of messages with role and content"):
        messages([{"role": "assistant", **more}], "x")


def test_a_book_keeps_controls_of_other_rounds_apart(tmp_path: Path) -> None:
    def question(number: int, round_number: int) -> Question:
        return Question(f"r{round_number}-{number}", round_number, turns("u1"), "one", "two")

    book = LabelBook(tmp_path / "labels.sqlite")
    book.ask([question(1, 1), question(1, 2)])
    for ordinary in (question(1, 1), question(1, 2)):
        book.record([Verdict(ordinary.id, "first", "ann")])
        again = repeated(ordinary)
        book.record_control(again, Verdict(again.question.id, "first", "ann"))
    assert book.history("ann", 1).repeated == ["r1-1"]
    assert book.history("ann", 2).repeated == ["r2-1"]


def test_a_zero_byte_in_the_first_line_is_in_the_first_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": "\0"}\n')
    with pytest.raises(UserError, match="row 1: no text"):
        open_text(tmp_path / "x.jsonl")


def test_a_zero_byte_behind_an_empty_first_line_is_in_the_second_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b"\n\0")
    with pytest.raises(UserError, match="row 2: no text"):
        open_text(tmp_path / "x.jsonl")


def test_calls_in_another_order_of_their_parts_are_the_same_prompt() -> None:
    first: Any = [{"role": "assistant", "content": "", "tool_calls": [{"a": 1, "b": 2}]}]
    second: Any = [{"role": "assistant", "content": "", "tool_calls": [{"b": 2, "a": 1}]}]
    assert prompt_key(first) == prompt_key(second)


@pytest.mark.parametrize("attributes", [[{"helpfulness": 1}], [{"helpfulness": 1}] * 3, {"helpfulness": 1}, None, "ab"])
def test_every_answer_of_a_conversation_has_its_ratings(attributes: object) -> None:
    with pytest.raises(BadRow, match="attributes is not one mapping for each"):
        rated_entries({"messages": turns("u1 a1 u2 a2"), "attributes": attributes})


def test_an_unknown_direction_shows_its_ends_numbers_first() -> None:
    assert "{10: first, good: second}" in str(_unstated("p", ["good", "10"], "x"))


def test_repeats_begin_when_enough_lies_behind() -> None:
    expected = [controls_expected("ann", REPEATED_AFTER + 1 + more, 0, repeat=1.0) for more in (-9, 0, 1, 5)]
    assert expected == [0, 0, 1, 5]


@pytest.mark.parametrize(("is_available", "is_initialized"), [(True, False), (False, True)])
def test_a_device_that_nobody_uses_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, is_available: bool, is_initialized: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: is_available)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: is_initialized)
    touched: list[str] = []
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: touched.append("read"))
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", lambda _: touched.append("put back"))
    with foreign_code("key", "f.py:f", seconds=9):
        pass
    assert touched == []


def test_a_devices_random_numbers_are_put_back(monkeypatch: pytest.MonkeyPatch) -> None:
    put: list[Any] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: ["state"])
    monkeypatch.setattr(torch.cuda, "set_rng_state_all", put.append)
    random.seed(1), np.random.seed(1)
    with pytest.raises(KeyError, match="mine"), foreign_code("key", "f.py:f", seconds=9):
        raise KeyError("mine")
    assert put == [["state"]]


def test_a_record_of_responses_without_names_or_states() -> None:
    row = {"id": "q", "preference.responses": ["first", "second"]}
    entries = list(record_entries(3, row))
    assert [(entry.label, entry.annotator) for entry in entries] == [("first", "unnamed"), ("second", "unnamed")]  # type: ignore[union-attr]
    row |= {"preference.responses.status": ["draft", "submitted"], "preference.responses.users": ["ann", "bob"]}
    entries = list(record_entries(3, row))
    assert [(entry.label, entry.annotator) for entry in entries] == [("skip", "ann"), ("second", "bob")]  # type: ignore[union-attr]


@pytest.mark.parametrize(("more", "makes"), [({}, True), ({"confidence": 0.7}, False)])
def test_a_confidence_that_a_row_brings_is_not_the_layouts(more: dict[str, Any], makes: bool) -> None:
    row = {"conversation_a": turns("u1 a1"), "conversation_b": turns("u1 a2"), "winner": "model_a", **more}
    named = named_rows([(1, row)], "x", ReadReport("x"), columns=None, label=None)
    assert [each.makes_confidence for each in named] == [makes]


def test_agreement_is_a_number_and_no_truth_value() -> None:
    assert extras_of({"agree": 0.7, "annotator": "ann", "id": 3}) == {"agree": 0.7, "annotator": "ann", "id": "3"}
    assert extras_of({"agree": True}) == extras_of({"agree": "0.7"}) == {}


@pytest.mark.parametrize(
    ("gap", "said"),
    [(0.5, []), (0.0, ["its two answers are rated alike"]), (-0.5, ["its ratings contradict its label"])],
)
def test_ratings_that_contradict_a_label_or_say_nothing_are_noted(gap: float, said: list[str]) -> None:
    assert oddities({"prompt": turns("u1"), "rating_gap": gap}) == said  # type: ignore[typeddict-unknown-key]


def test_conversations_of_which_one_ends_with_the_user_are_no_pair() -> None:
    with pytest.raises(BadRow, match="chosen is not an assistant's answer"):
        pair({"chosen": turns("u1 a1 u2"), "rejected": turns("u1 a1 u2 a2")})


def test_a_tools_turn_that_both_sides_share_belongs_to_the_prompt() -> None:
    call = {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    shared: Any = [*turns("u1"), call, {"role": "tool", "content": "7"}]
    row = pair({"chosen": [*shared, *turns("a1")], "rejected": [*shared, *turns("a2")]})
    assert [turn["role"] for turn in row["prompt"]] == ["user", "assistant", "tool"]
    assert (row["chosen"], row["rejected"]) == (turns("a1"), turns("a2"))


@pytest.mark.parametrize(
    ("low", "high", "bounds"),
    [(-math.inf, math.inf, ""), (0.0, math.inf, " of 0 or more"), (0.0, 1.0, r" in \[0, 1\]")],
)
def test_a_number_that_is_none_is_told_its_bounds(low: float, high: float, bounds: str) -> None:
    for value in (math.inf, math.nan):
        with pytest.raises(BadRow, match=f"^x is not a finite number{bounds}$"):
            _number(value, "x", low, high)


def test_the_last_of_several_answers_is_the_demonstration() -> None:
    row = {"prompt": turns("u1"), "chosen": turns("a1 u2 a2"), "rejected": turns("a3")}
    (found,) = find_layout(row).read_demonstrations(row)
    assert found == {"prompt": turns("u1 a1 u2"), "completion": turns("a2")}


def test_parts_among_texts_are_no_text() -> None:
    with pytest.raises(BadRow, match="a message of p has no text"):
        messages([{"role": "user", "content": [{"type": "text", "text": "a"}, "b"]}], "p")


def test_pairs_of_one_prompt_have_sixteen_letters_in_common() -> None:
    assert len(group_key("a prompt")) == 16
    assert prompt_key("a prompt").startswith(group_key("a prompt"))


@pytest.mark.parametrize(("count", "shown"), [(7, "{1, 2, 3, 4, 5, 6, 7}"), (8, "{1, 2, …, 8}")])
def test_of_many_values_the_ends_are_shown(count: int, shown: str) -> None:
    assert shown_codes([str(i + 1) for i in reversed(range(count))]) == shown


def test_a_plain_pairs_confidence_is_its_own() -> None:
    (row,) = named_rows([(1, {"prompt": "a", "chosen": "b", "rejected": "c"})], "x", ReadReport("x"))
    assert (row.layout, row.is_tie, row.makes_confidence) == (None, False, False)


def test_the_key_of_a_prompt_is_that_of_earlier_versions() -> None:
    """Test sides, votes and labels of older folders are found by it."""
    assert prompt_key("Hi  There ") == hashlib.sha256(b"user\x1ehi there").hexdigest()


def test_zero_is_the_smallest_of_the_values_that_are_shown() -> None:
    assert shown_codes(["0.5", "0", "x"]) == "{0, 0.5, x}"


def test_an_answer_that_is_no_conversation_leaves_a_row_as_it_is() -> None:
    whole = turns("u1 a1")
    row = {"prompt": "u1", "chosen": whole, "rejected": "no"}
    assert [each.row for each in tidied([row])] == [row]
