"""Edges of what other people's code, judges and tools return: how long they may take, what counts, which form it is."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import functions
from rlhf.data.functions import _as_numbers, load_function
from rlhf.data.label_files import read_verdicts, short_task_entries
from rlhf.data.labels import Question, Verdict, all_alike, shows_second_on_the_left
from rlhf.data.llm_judge import LanguageModelJudge
from rlhf.data.rows import Messages, user_turn
from rlhf.errors import UserError


def function_of(folder: Path, body: str) -> Any:
    (folder / "f.py").write_text(f"def f(prompts, completions):\n    return {body}\n")
    return load_function(f"{folder}/f.py:f", key="k")


def test_a_function_has_minutes_for_a_call_and_seconds_for_each_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    allowed: list[float] = []

    @contextmanager
    def watched(key: str, reference: str, *, seconds: float) -> Iterator[None]:
        allowed.append(seconds)
        yield

    monkeypatch.setattr(functions, "foreign_code", watched)
    function = function_of(tmp_path, "[1.0] * len(prompts)")
    function(["a"], ["b"]), function(["a"] * 3, ["b"] * 3)
    assert allowed == [600.0, 610.0, 630.0], "to import it, for one answer, for three"


def test_one_value_that_is_too_large_among_others_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it returned 2 numbers, of which 1e\+16 is the first that is unusable"):
        function_of(tmp_path, "[1.0, 1e16]")(["a", "b"], ["c", "d"])
    with pytest.raises(UserError, match=r"it returned 2 numbers\."):
        function_of(tmp_path, "[1.0, 2.0]")(["a"], ["c"])


@pytest.mark.parametrize("returned", [{1: 2}, {1, 2}, 3, "12", b"12", ["1", 2], [1, "2"]])
def test_mappings_sets_texts_and_single_numbers_are_no_row_of_numbers(returned: object) -> None:
    assert _as_numbers(returned) is None


def test_a_function_stands_in_a_file_of_python(tmp_path: Path) -> None:
    (tmp_path / "f.txt").write_text("f = len")
    with pytest.raises(UserError, match=r"its name must end in \.py"):
        load_function(f"{tmp_path}/f.txt:f", key="k")


TASK = {"data": {"id": "t"}, "annotations": [{"result": [], "completed_by": 1}]}
RECORD = {"id": "r", "fields": {}, "responses": {"preference": [{"value": "first"}]}}
SHORT_TASK = {"id": "s", "annotation_id": 1, "preference": "left"}
PLAIN = {"id": "q", "label": "second", "annotator": "ann"}


@pytest.mark.parametrize("other", [TASK, RECORD, SHORT_TASK], ids=["task", "record", "short task"])
@pytest.mark.parametrize("is_first", [True, False])
def test_a_file_is_a_tools_only_if_all_its_rows_are(tmp_path: Path, other: dict[str, Any], is_first: bool) -> None:
    rows = [PLAIN, other] if is_first else [other, PLAIN]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    verdicts, refused = read_verdicts(str(tmp_path / "x.jsonl"))
    assert [(verdict.id, verdict.label, verdict.annotator) for verdict in verdicts] == [("q", "second", "ann")]
    assert len(refused) == 1


def test_sides_are_where_earlier_versions_showed_them() -> None:
    """A person who goes on after an update sees a question as before."""
    shown = [shows_second_on_the_left("ann", f"r1-{i}") for i in range(12)]
    assert shown == [bool(int(digit)) for digit in "100110100010"]


def judge_that_says(monkeypatch: pytest.MonkeyPatch, text: str, **more: Any) -> tuple[LanguageModelJudge, list[Any]]:
    asked: list[Any] = []

    def post(url: str, body: Any, **options: Any) -> Any:
        asked.append((body, options["timeout"]))
        return {"choices": [{"message": {"content": text}}]}

    monkeypatch.setattr("rlhf.data.llm_judge.post_json", post)
    return LanguageModelJudge("http://127.0.0.1:1", "m", **more), asked


QUESTION = Question("r1-1", 1, user_turn("why"), "one", "two")


def test_a_judge_is_asked_twice_and_told_how_to_end(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, asked = judge_that_says(monkeypatch, "hard to say")
    assert judge.label(QUESTION) == "skip"
    assert (judge.sent, judge.unreadable, judge.order_decided) == (2, 2, 0)
    texts = [body["messages"][0]["content"] for body, _ in asked]
    assert all(text.endswith("end with exactly one of [[A]], [[B]], or [[C]] for a tie.") for text in texts)
    assert [text.index("one\n") < text.index("two\n") for text in texts] == [True, False]
    assert {timeout for _, timeout in asked} == {120.0}


def test_a_judge_reads_who_said_what(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, asked = judge_that_says(monkeypatch, "[[A]]")
    turns = [("system", "Answer in French."), ("user", "Hi"), ("assistant", "Salut!"), ("user", "A joke")]
    prompt: Messages = [{"role": role, "content": text} for role, text in turns]
    judge.label(Question("r1-2", 1, prompt, "one", "two"))
    judge.label(QUESTION)
    requests = [body["messages"][0]["content"].split("[Request]\n")[1].split("\n\n[Answer A]")[0] for body, _ in asked]
    assert requests[0] == "system: Answer in French.\n\nuser: Hi\n\nassistant: Salut!\n\nuser: A joke"
    assert requests[2] == "why", "one turn needs no speaker"


@pytest.mark.parametrize(("budget", "questions"), [(None, 3), (0, 0), (1, 0), (2, 1), (3, 1), (4, 2)])
def test_a_question_needs_two_requests_of_the_budget(
    monkeypatch: pytest.MonkeyPatch, budget: int | None, questions: int
) -> None:
    judge, _ = judge_that_says(monkeypatch, "[[A]]", budget=budget)
    asked = 0
    while judge.can_ask() and asked < 3:
        assert judge.label(QUESTION) == "tie", "the first in both orders"
        asked += 1
    assert (asked, judge.sent, judge.order_decided) == (questions, 2 * questions, questions)


def test_the_last_verdict_of_a_judge_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    judge, _ = judge_that_says(monkeypatch, "[[A]] or [[B]]? I say [[C]]")
    assert (judge.label(QUESTION), judge.unreadable) == ("tie", 0)


def test_whose_a_short_tasks_label_is() -> None:
    entries = [entry for more in ({"annotator": 7}, {}) for entry in short_task_entries(1, {**SHORT_TASK, **more})]
    assert [entry.annotator for entry in entries] == ["7", "unnamed"]  # type: ignore[union-attr]


def test_a_label_that_says_nothing_is_shown_where_there_is_one(tmp_path: Path) -> None:
    rows = [{**PLAIN, "label": ""}, {**PLAIN, "label": "perhaps"}]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_verdicts(str(tmp_path / "x.jsonl"))[1] == [
        {"row": 1, "reason": "no label yet", "id": "q"},
        {"row": 2, "reason": "unknown label", "id": "q", "label": "perhaps"},
    ]


@pytest.mark.parametrize(
    ("labels", "is_said"),
    [
        (["first"] * 7, False),
        (["first"] * 8, True),
        (["first"] * 8 + ["second"], False),
        (["tie"] * 8 + ["skip"], True),
    ],
)
def test_labels_that_are_all_alike_are_said_where_there_are_enough(labels: list[str], is_said: bool) -> None:
    assert (all_alike([Verdict(str(i), label, "ann") for i, label in enumerate(labels)]) is not None) == is_said
