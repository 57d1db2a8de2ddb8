"""Edges of layouts: which rows have one, what a missing column makes of them, which texts become the prompt."""

from typing import Any

import pytest

from rlhf.data.canonical import LONG_PROMPT, oddities
from rlhf.data.columns import named_rows
from rlhf.data.direction import Direction
from rlhf.data.label_files import Answered
from rlhf.data.layouts.annotated import _compared, _comparison, _side
from rlhf.data.layouts.layout import better_of, has_column, number
from rlhf.data.layouts.named_prompts import alpaca, has_named_prompt, is_alpaca, named_prompt
from rlhf.data.layouts.sharegpt import conversation, has_conversations
from rlhf.data.layouts.shp import comparison as shp
from rlhf.data.layouts.summaries import comparison as summaries
from rlhf.data.layouts.webgpt import comparison as webgpt
from rlhf.data.rankings import is_rated
from rlhf.data.ratings import _entries
from rlhf.data.read import BadRow, ReadReport, _row
from rlhf.data.rows import prompt_key
from rlhf.data.sides import shown_codes
from rlhf.errors import UserError

PLAIN: dict[str, Any] = {"chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"question": "q", **PLAIN}, True),
        ({"instruction": "q", **PLAIN}, True),
        ({"input": ["q"], **PLAIN}, True),
        ({"query": "q", "chosen_response": "a", "rejected_response": "b"}, True),
        ({"prompt": "q", "chosen_response": "a", "rejected_response": "b"}, True),
        ({"prompt": "q", **PLAIN}, False),
        ({"question": "", **PLAIN}, False),
        ({"question": 3, **PLAIN}, False),
        ({"question": "q", "chosen": "a", "rejected": None}, False),
        ({"question": "q", "messages": [], **PLAIN}, False),
        ({"question": "q", "responses": [], **PLAIN}, False),
        ({"question": "q", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "x"}, False),
        ({"question": "q", "chosen": [{"role": "assistant"}], "rejected": []}, True),
        ({"question": "q", "chosen": [{}, {}], "rejected": []}, False),
        ([{"question": "q"}], False),
    ],
)
def test_rows_whose_prompt_has_another_name(row: object, expected: bool) -> None:
    assert has_named_prompt(row) == expected


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "a", "input": "b"}, "a\nb"),
        ({"instruction": "a", "input": " "}, "a"),
        ({"instruction": "a", "input": ["b"]}, "a"),
        ({"question": "a", "input": "b"}, "a"),
        ({"input": "b"}, "b"),
        ({"prompt": "p", "instruction": "a"}, "p"),
        (
            {"instruction": "c", "history": [["a", "b"]]},
            [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
                {"role": "user", "content": "c"},
            ],
        ),
    ],
)
def test_which_texts_are_the_prompt(row: dict[str, Any], prompt: object) -> None:
    assert named_prompt({**row, **PLAIN})["prompt"] == prompt


@pytest.mark.parametrize("history", ["ab", [["a"]], [["a", "b"], ["c", "d", "e"]], ["ab"], [3]])
def test_a_history_is_a_list_of_questions_with_answers(history: object) -> None:
    with pytest.raises(BadRow, match="history is not a list of"):
        named_prompt({"instruction": "c", "history": history, **PLAIN})


def test_ratings_and_what_stands_beside_are_kept() -> None:
    row = {
        "question": "q",
        "chosen_rating": 3,
        "rejected_score": 1,
        "rejected_rating": None,
        "id": "7",
        "x": 1,
        **PLAIN,
    }
    assert named_prompt(row) == {"prompt": "q", "chosen_rating": 3, "rejected_score": 1, "id": "7", **PLAIN}


@pytest.mark.parametrize(
    ("more", "expected"),
    [({"output": "b"}, True), ({"output": None}, True), ({}, False), *(({"output": "b", name: "x"}, False) for name in ("prompt", "messages", "completion", "chosen", "responses"))],
)  # fmt: skip
def test_instructions_with_outputs(more: dict[str, Any], expected: bool) -> None:
    assert is_alpaca({"instruction": "a", **more}) == expected
    assert not is_alpaca({"instruction": 3, **more})


def test_an_output_is_a_text_or_two() -> None:
    assert alpaca({"instruction": "a", "output": "b"}) == {"prompt": "a", "completion": "b"}
    pair = alpaca({"instruction": "a", "output": ["b", "c"], "id": 3})
    assert pair == {"prompt": "a", "chosen": "b", "rejected": "c", "id": 3}
    for output in (["b"], ["b", "c", "d"], []):
        with pytest.raises(BadRow, match="output is neither a text nor two"):
            alpaca({"instruction": "a", "output": output})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"conversations": []}, True), ({"messages": [], "chosen": {}}, True), ({"messages": [], "chosen": "x"}, False),
        ({"messages": "x", "chosen": {}}, False), ({"conversations": [], "prompt": "x"}, False), ({"conversations": "x"}, False), ([], False),
    ],
)  # fmt: skip
def test_conversations_with_their_answers_beside(row: object, expected: bool) -> None:
    assert has_conversations(row) == expected


def test_a_conversation_with_one_answer_is_no_demonstration() -> None:
    assert conversation({"conversations": ["a"], "messages": ["b"]}) == {"messages": ["a"]}
    assert conversation({"messages": ["b"]}) == {"messages": ["b"]}
    for more in ({"chosen": "x"}, {"rejected": "x"}):
        assert conversation({"messages": ["b"], **more}) == {"prompt": ["b"], "chosen": None, "rejected": None, **more}


@pytest.mark.parametrize(
    ("labels", "scores", "gap"),
    [(1, (5, 2), 3.0), (0, (2, 5), 3.0), (1, (2, 5), -3.0), (0, (5, None), None), (1, (None, 2), None)],
)
def test_scores_of_readers_are_the_gap_where_both_are_there(labels: int, scores: Any, gap: float | None) -> None:
    row = {
        "history": "h",
        "human_ref_A": "a",
        "human_ref_B": "b",
        "labels": labels,
        "score_A": scores[0],
        "score_B": scores[1],
    }
    found = shp(row, "")
    assert found.better == ("first" if labels == 1 else "second")
    assert found.beside.get("rating_gap") == gap


@pytest.mark.parametrize(("first", "second", "better"), [(0.5, 0.1, "first"), (-1, 1, "second"), (0, 0, "tie")])
def test_the_higher_score_is_better(first: float, second: float, better: str) -> None:
    row = {"question": {"full_text": "q"}, "answer_0": "a", "answer_1": "b", "score_0": first, "score_1": str(second)}
    found = webgpt(row, "")
    assert (found.better, found.beside) == (better, {"rating_gap": pytest.approx(abs(first - second))})
    assert found.label == ("score_0, score_1", f"{first:g} and {second:g}")


def test_a_summarys_task_is_written_as_trl_does() -> None:
    row = {"summaries": [{"text": "a"}, {"text": "b"}], "choice": 1, "worker": "w"}
    post = {"post": "p", "subreddit": "s", "title": "t"}
    found = summaries({**row, "info": post}, "")
    assert found.prompt == "SUBREDDIT: r/s\n\nTITLE: t\n\nPOST: p\n\nTL;DR:"
    assert (found.first, found.second, found.better, found.beside) == ("a", "b", "second", {"annotator": "w"})
    assert summaries({**row, "info": {"article": "p", "title": ""}}, "").prompt == "ARTICLE: p\n\nTL;DR:"
    for wrong in ("ab", [{"text": "a"}], [{"text": "a"}, "b"], [{}, {}, {}]):
        with pytest.raises(BadRow, match="summaries are not two mappings"):
            summaries({**row, "info": post, "summaries": wrong}, "")


@pytest.mark.parametrize(
    ("labels", "better", "confidence"),
    [
        (["first"], "first", None), (["second"], "second", None), (["tie"], "tie", 0.5), (["first", "second"], "tie", 0.5),
        (["first", "tie"], "first", 0.75), (["second", "tie"], "second", 0.75), (["first", "first", "second"], "first", 2 / 3),
        (["skip", "second"], "second", None), ([None, "first"], "first", None), (["", "first"], "first", None),
    ],
)  # fmt: skip
def test_every_annotator_has_one_vote(labels: list[Any], better: str, confidence: float | None) -> None:
    entries = [Answered(0, "", label, f"ann {i}") for i, label in enumerate(labels)]
    found = _comparison({"question": "q", "first": "a", "second": "b"}, ("first", "second"), entries)
    assert found.better == better
    assert found.beside.get("confidence") == (None if confidence is None else pytest.approx(confidence))


def test_the_later_of_an_annotators_labels_counts() -> None:
    entries = [Answered(0, "", label, "ann") for label in ("second", "first")]
    found = _comparison({"prompt": "q", "a": "x", "b": "y"}, ("a", "b"), entries)
    assert (found.better, found.beside) == ("first", {"annotator": "ann"})
    with pytest.raises(BadRow, match="nobody has labelled it yet"):
        _comparison({"prompt": "q", "a": "x", "b": "y"}, ("a", "b"), [])
    with pytest.raises(BadRow, match="no prompt"):
        _comparison({"prompt": "", "a": "x", "b": "y"}, ("a", "b"), entries)


def test_annotators_without_a_name_have_a_vote_each() -> None:
    entries = [Answered(0, "", label, "unnamed") for label in ("second", "skip", "first", "second")]
    split = _comparison({"prompt": "q", "a": "x", "b": "y"}, ("a", "b"), [*entries, Answered(0, "", "second", "ann")])
    assert split.better == "second"
    assert split.beside == {"annotator": "ann, unnamed 1, unnamed 2, unnamed 3", "confidence": 0.75}
    one = _comparison({"prompt": "q", "a": "x", "b": "y"}, ("a", "b"), entries[:2])
    assert (one.better, one.beside) == ("second", {"annotator": "unnamed"})


@pytest.mark.parametrize(
    ("label", "side"),
    [
        ([{"value": "x", "rank": 1}, {"value": "y", "rank": 2}], "first"),
        ([{"value": "x", "rank": 2}, {"value": "y", "rank": 1}], "second"),
        ([{"value": "x", "rank": 1}, {"value": "y", "rank": 1}], "tie"),
        ("x", "first"), ("y", "second"), ("left", "first"), ("tie", "tie"), ("skip", None), (None, None),
    ],
)  # fmt: skip
def test_what_a_label_says(label: object, side: str | None) -> None:
    assert _side(label, ("x", "y")) == side


@pytest.mark.parametrize(
    "label",
    [
        [{"value": "x", "rank": 1}, "y"],
        [{"value": "x", "rank": 1}],
        [{"value": "x", "rank": 1}, {"value": "y"}],
        "perhaps",
        ["x", "y"],
    ],
)
def test_a_label_that_names_neither_is_refused(label: object) -> None:
    with pytest.raises(BadRow):
        _side(label, ("x", "y"))


def test_the_names_of_a_pairwise_control_are_fields_of_the_task() -> None:
    def task(**result: Any) -> dict[str, Any]:
        return {"annotations": [{"result": None}, {"result": [{}, {"type": "pairwise", "to_name": "x, y", **result}]}]}

    assert _compared(task(), {"x": 1, "y": 2}) == ("x", "y")
    assert _compared(task(), {"x": 1}) is None
    assert _compared(task(type="choices"), {"x": 1, "y": 2}) is None
    assert _compared(task(to_name="x,y,z"), {"x": 1, "y": 2, "z": 3}) is None


def test_columns_and_numbers() -> None:
    assert has_column({"a": {"b": None}}, "a.b")
    assert not has_column({"a": "b"}, "a.b")
    assert [better_of(value, "x") for value in (0, 1, "0", "1.0")] == ["first", "second", "first", "second"]
    for value in (None, 2, True, "a"):
        with pytest.raises(BadRow, match="neither 0 nor 1"):
            better_of(value, "x")
    assert [number(value, "x") for value in (1, 0.5, " 2 ")] == [1.0, 0.5, 2.0]
    for wrong in (True, "nan", float("inf"), None, [1], "x"):
        with pytest.raises(BadRow, match="x is not a finite number"):
            number(wrong, "x")


def test_a_scale_is_a_tie_at_nought() -> None:
    scale = Direction("preference", ("-1", "0", "1"), None)
    assert [scale.side(value) for value in (-0.1, 0, "0.0", 0.1, "x")] == ["first", "tie", "tie", "second", None]


def test_codes_are_shown_by_size_numbers_first() -> None:
    assert shown_codes(["b", "10", "9", "-1", "a"]) == "{-1, 9, 10, a, b}"


def test_a_list_is_a_row_where_all_in_it_are_objects() -> None:
    assert _row([{}, {}]) == [{}, {}]
    for wrong in ([{}, 3], [], [3], "x", None):
        with pytest.raises(BadRow, match="not a JSON object"):
            _row(wrong)


def test_a_prompt_with_calls_is_another_than_one_without() -> None:
    plain: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ""}]
    calls: Any = [plain[0], {**plain[1], "tool_calls": [{"function": {"name": "f"}}]}]
    assert len({prompt_key(prompt) for prompt in (plain, calls, [plain[0], {**calls[1], "tool_calls": []}])}) == 3


@pytest.mark.parametrize(("letters", "is_said"), [(LONG_PROMPT, False), (LONG_PROMPT + 1, True)])
def test_a_long_prompt_is_one_that_is_longer_than_the_limit(letters: int, is_said: bool) -> None:
    row: Any = {"prompt": [{"role": "user", "content": "x" * letters}], "completion": []}
    assert bool(oddities(row)) == is_said


def test_a_row_that_is_not_rated_is_none() -> None:
    assert not is_rated({"response": "a"})
    with pytest.raises(BadRow, match="no ratings of attributes"):
        _entries({"response": "a"})


def test_columns_of_public_layouts_can_be_named() -> None:
    report = ReadReport("x")
    rows = [(1, {"a": "q", "b": "x", "c": "y", "d": "model_a"})]
    found = named_rows(rows, "x", report, columns={"prompt": "a", "chosen": "b", "rejected": "c"}, label=None)
    assert [each.row for each in found] == [{"prompt": "q", "chosen": "x", "rejected": "y", "d": "model_a"}]
    pku = {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": "d"}
    assert named_rows(rows, "x", report, columns=pku, label=None)
    with pytest.raises(UserError, match="'winer' is no column here; did you mean 'winner'"):
        named_rows(rows, "x", report, columns={"winer": "d"}, label=None)


def test_rows_under_other_names_are_no_ties() -> None:
    report = ReadReport("x")
    (row,) = named_rows([(1, {"instruction": "a", "output": ["b", "c"]})], "x", report, columns=None, label=None)
    assert row.row == {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert not row.is_tie
