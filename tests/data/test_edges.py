"""Edges of reading: where two conversations part, what is cut, counted, looked at, and what is no number."""

import io
import json
import math
import random
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf.data import limits
from rlhf.data.canonical import BadRow, _split
from rlhf.data.direction import example
from rlhf.data.label_files import Answered, _readable
from rlhf.data.labels import Question
from rlhf.data.limits import open_text, read_whole
from rlhf.data.lines import _lines_of
from rlhf.data.llm_judge import LanguageModelJudge
from rlhf.data.prepare import _check_columns, _check_critiques, _per_prompt, _write
from rlhf.data.rankings import is_rated
from rlhf.data.ratings import RatingReader, RatingScale, _numbers
from rlhf.data.read import ReadReport
from rlhf.data.sources import Row, Source, read_rankings
from rlhf.data.tables import local_files
from rlhf.data.tidy import _is_apart
from rlhf.errors import UserError


def turns(text: str) -> Any:
    """One turn a letter pair: u1 is the user's, a1 the assistant's."""
    roles = {"u": "user", "a": "assistant"}
    return [{"role": roles[turn[0]], "content": turn} for turn in text.split()]


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("u1 a1", "u1 a2", "u1"),
        ("u1 a1 u2 a2", "u1 a1 u2 a3", "u1 a1 u2"),
        (
            "u1 a1 a2",
            "u1 a1 a3 u2 a4",
            "u1",
        ),  # only one side goes on: the prompt ends with the user's turn all the same
        ("u1 a1 a3 u2 a4", "u1 a1 a2", "u1"),
    ],
)
def test_two_conversations_part_behind_a_turn_of_the_user(chosen: str, rejected: str, prompt: str) -> None:
    shared, better, worse = _split(turns(chosen), turns(rejected))
    assert shared == turns(prompt)
    assert (shared + better, shared + worse) == (turns(chosen), turns(rejected))


def test_conversations_that_share_no_turn_of_the_user_are_no_pair() -> None:
    with pytest.raises(BadRow, match="part at turn 2 and share no turn of the user"):
        _split(turns("a1 a2"), turns("a1 a3 u2 a4"))


@pytest.mark.parametrize(
    ("length", "shown"), [(59, "x" * 59), (60, "x" * 60), (61, "x" * 59 + "…"), (900, "x" * 59 + "…")]
)
def test_an_example_is_at_most_sixty_characters(length: int, shown: str) -> None:
    assert example("first", "x" * length) == f'first: chosen = "{shown}"'


def test_a_zero_byte_is_found_far_behind_the_beginning(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n' * 1000 + b"\0")
    with pytest.raises(UserError, match="row 1001: no text: it holds a zero byte"):
        open_text(file)


def test_a_file_may_hold_as_much_as_is_allowed_and_no_byte_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MOST_FILE", 10)
    assert read_whole(io.BytesIO(b"x" * 10), tmp_path) == b"x" * 10
    with pytest.raises(UserError, match="one list of more than"):
        read_whole(io.BytesIO(b"x" * 11), tmp_path)


class Judge(LanguageModelJudge):
    """Says what it was told to say, for each order."""

    said: ClassVar[list[str | None]] = []

    def _ask(self, question: Question, first: str, second: str) -> str | None:
        return self.said[0 if first == question.first else 1]


@pytest.mark.parametrize(
    ("forward", "backward", "label"),
    [
        ("first", "second", "first"), ("second", "first", "second"), ("tie", "tie", "tie"), ("first", "first", "tie"),
        ("first", None, "skip"), (None, "first", "skip"), (None, "tie", "skip"), (None, None, "skip"),
    ],
)  # fmt: skip
def test_a_judge_that_gives_one_verdict_of_two_gives_none(
    monkeypatch: pytest.MonkeyPatch, forward: str | None, backward: str | None, label: str
) -> None:
    monkeypatch.setattr(Judge, "said", [forward, backward])
    judge = Judge("http://127.0.0.1:1", "m")
    assert judge.label(Question("id", 1, turns("u1"), "one", "two")) == label
    assert judge.order_decided == (forward == backward == "first")
    assert judge.one_order == ((forward is None) != (backward is None))


def test_a_judge_needs_a_key_only_where_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_TEST_KEY", "")
    with pytest.raises(UserError, match="RLHF_TEST_KEY is empty"):
        LanguageModelJudge("http://127.0.0.1:1", "m", key_variable="RLHF_TEST_KEY")
    monkeypatch.setenv("RLHF_TEST_KEY", "k")
    named = LanguageModelJudge("http://127.0.0.1:1", "m", key_variable="RLHF_TEST_KEY")
    assert named._headers == {"Authorization": "Bearer k"}
    assert LanguageModelJudge("http://127.0.0.1:1", "m")._headers == {}


def rows(*values: dict[str, Any], makes_confidence: bool = False) -> list[Any]:
    return [Row(row, i, ReadReport("x"), makes_confidence=makes_confidence) for i, row in enumerate(values)]


@pytest.mark.parametrize(
    ("pairs", "problem"),
    [
        (rows({"margin": 1.0}, {}), "1 of 2 pairs have no 'margin'"),
        (rows({"confidence": 1.0}, {}), "1 of 2 pairs have no 'confidence'"),
        (rows({"confidence": 0.5}, {}, makes_confidence=True), None),  # the layout's own: the others are certain
        (rows({"margin": 1.0}, {}, makes_confidence=True), "1 of 2 pairs have no 'margin'"),
        (rows({"confidence": 0.5}, {"confidence": 1.0}), None),
    ],
)
def test_a_column_that_only_some_pairs_have_is_refused(pairs: list[Any], problem: str | None) -> None:
    if problem is None:
        _check_columns(pairs)
        return
    with pytest.raises(UserError, match=problem):
        _check_columns(pairs)


def test_parts_are_written_below_folders_that_are_not_there_yet(tmp_path: Path) -> None:
    for _ in range(2):
        _write(tmp_path / "a" / "b", {"sft": rows({"x": 1})}, [])
    assert (tmp_path / "a" / "b" / "sft.jsonl").read_text(encoding="utf-8") == '{"x": 1}\n'


def test_only_finite_numbers_are_ratings() -> None:
    assert _numbers({"a": 3, "b": 0.5, "c": math.nan, "d": math.inf, "e": True, "f": "4", "g": None}) == {
        "a": 3.0,
        "b": 0.5,
    }
    assert _numbers(["a"]) == {}
    assert _numbers(None) == {}


def test_what_was_dropped_adds_up_over_files() -> None:
    whole, part = ReadReport("x"), ReadReport("y")
    for row in (1, 2):
        whole.drop(row, "empty")
    for row in (3, 4, 5):
        part.drop(row, "empty")
    whole.add(part, 100)
    assert whole.dropped == {"empty": 5}
    assert whole.examples == {"empty": [1, 2, 103, 104, 105]}


def test_a_pattern_of_two_stars_reaches_every_depth(tmp_path: Path) -> None:
    for place in ("a.jsonl", "b/c.jsonl", "b/d/e.jsonl"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text("{}\n", encoding="utf-8")
    found = [file.relative_to(tmp_path).as_posix() for file in local_files(str(tmp_path / "**" / "*.jsonl"))]
    assert found == ["a.jsonl", "b/c.jsonl", "b/d/e.jsonl"]


@pytest.mark.parametrize(
    ("head", "rest", "is_apart"),
    [("ab", "c", False), ("ab.", "c", True), (".ab", "c", False), ("ab", " c", True), ("ab", "  ", False)],
)
def test_an_answer_does_not_go_on_in_the_middle_of_a_word(head: str, rest: str, is_apart: bool) -> None:
    assert _is_apart(head, rest) == is_apart


def test_blank_lines_count_in_a_rows_number(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text('{"a": 1}\n\n{"a": 2}', encoding="utf-8")
    assert list(_lines_of(Source(str(file)), "train")) == [(1, b'{"a": 1}\n'), (3, b'{"a": 2}\n')]


@pytest.mark.parametrize(("letters", "is_readable"), [(200, True), (201, False)])
def test_a_name_may_have_two_hundred_characters(letters: int, is_readable: bool) -> None:
    entry = Answered(row=1, id="id", label="first", annotator="x" * letters)
    assert (_readable(entry) == entry) == is_readable


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": [], "attributes": []}, True),
        ({"messages": []}, False),
        ({"attributes": {}}, False),
        ({"response": "", "attributes": {}}, True),
        ({"response": ""}, False),
        ({"response": "", "attributes": {}, "chosen": ""}, False),
    ],
)
def test_which_rows_hold_rated_answers(row: dict[str, Any], expected: bool) -> None:
    assert is_rated(row) == expected


def test_the_last_row_is_the_furthest_that_was_dropped() -> None:
    report = ReadReport("x")
    for row in (5, 2, 7, 1):
        report.drop(row, "empty")
    assert report.last == 7


def test_of_a_prompt_so_many_pairs_are_kept_and_the_others_counted() -> None:
    report = ReadReport("x")
    pairs: list[Any] = [Row({"prompt": turns(f"u{i % 2}"), "chosen": [], "rejected": []}, i, report) for i in range(7)]
    kept = _per_prompt(pairs, 2, random.Random(0))
    assert [row.number % 2 for row in kept].count(0) == 2
    assert [row.number % 2 for row in kept].count(1) == 2
    assert [row.number for row in kept] == sorted(row.number for row in kept)
    assert report.dropped == {"over data.max_pairs_per_prompt 2": 3}
    assert _per_prompt(pairs, None, random.Random(0)) == pairs


def test_one_pair_with_critiques_is_enough() -> None:
    _check_critiques(rows({}, {"critique_chosen": "good", "critique_rejected": "bad"}))
    with pytest.raises(UserError, match="none of 2 pairs has critiques"):
        _check_critiques(rows({}, {}))


def test_a_ranking_of_two_is_a_pair_and_no_ranking(tmp_path: Path) -> None:
    answers = [{"content": f"answer {i}", "score": i} for i in range(3)]
    file = tmp_path / "x.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"p{k}", "responses": answers[:k]}) + "\n" for k in (2, 3)), encoding="utf-8"
    )
    assert [len(ranking.answers) for ranking in read_rankings(str(file))] == [3]


def test_an_attribute_that_nobody_rated_is_named() -> None:
    reader = RatingReader(RatingScale(names=("good", "kind"), low=0, high=4))
    reader.counts.update({"good": 3})
    with pytest.raises(UserError, match=r"nobody rated kind; what is rated in data\.preferences is good"):
        reader.check()
    reader.counts.update({"kind": 1})
    reader.check()


def test_a_judge_is_asked_without_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Any] = []

    def post(url: str, body: Any, **_: Any) -> Any:
        sent.append(body)
        return {"choices": [{"message": {"content": "A"}}]}

    monkeypatch.setattr("rlhf.data.llm_judge.post_json", post)
    judge = LanguageModelJudge("http://127.0.0.1:1", "m")
    judge.label(Question("id", 1, turns("u1"), "one", "two"))
    assert [body["temperature"] for body in sent] == [0, 0]
    assert (judge.sent, judge.unreadable) == (2, 2)
