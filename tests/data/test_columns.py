"""A mapping of columns, for files of no known layout."""

from pathlib import Path
from typing import Any

import pytest

from rlhf.data.rows import answer
from rlhf.data.sources import Source, read_pairs
from rlhf.errors import UserError
from rlhf.files import write_jsonl

ROWS = [
    {"q": {"text": f"say {i}"}, "outs": [{"t": f"no {i}"}, {"t": f"yes {i}"}], "agreed": "0.75", "who": "ann"}
    for i in range(4)
]
COLUMNS = {
    "prompt": "q.text",
    "chosen": "outs.1.t",
    "rejected": "outs.0.t",
    "confidence": "agreed",
    "annotator": "who",
}


def read(tmp_path: Path, rows: list[Any], columns: dict[str, str]) -> tuple[list[Any], Any]:
    write_jsonl(tmp_path / "x.jsonl", rows)
    read_rows, report = read_pairs(Source(str(tmp_path / "x.jsonl"), columns=columns))
    return list(read_rows), report


def test_paths_lead_into_nested_columns_and_lists(tmp_path: Path) -> None:
    rows, report = read(tmp_path, ROWS, COLUMNS)
    assert rows[0] == {
        "prompt": [{"role": "user", "content": "say 0"}],
        "chosen": [{"role": "assistant", "content": "yes 0"}],
        "rejected": [{"role": "assistant", "content": "no 0"}],
        "confidence": 0.75,
        "annotator": "ann",
    }
    assert any("read by the columns that were named: `q.text` as prompt" in line for line in report.sentences())


def test_a_mapping_may_swap_columns_and_name_two_responses(tmp_path: Path) -> None:
    swapped = [{"prompt": "a", "chosen": "no", "rejected": "yes"}]
    assert answer(read(tmp_path, swapped, {"chosen": "rejected", "rejected": "chosen"})[0][0], "chosen") == "yes"
    two = [{"p": "a", "x": "no", "y": "yes", "best": "y"}, {"p": "b", "x": "yes", "y": "no", "best": "x"}]
    columns = {"prompt": "p", "response_1": "x", "response_2": "y", "preference": "best"}
    write_jsonl(tmp_path / "x.jsonl", two)
    stated: Any = {"x": "first", "y": "second"}
    rows, _ = read_pairs(Source(str(tmp_path / "x.jsonl"), columns=columns, preference=stated))
    assert [answer(row, "chosen") for row in rows] == ["yes", "yes"]
    responses = [{"question": "a", "response_1": "yes", "response_2": "no"}]
    columns = {"prompt": "question", "chosen": "response_1", "rejected": "response_2"}
    assert answer(read(tmp_path, responses, columns)[0][0], "chosen") == "yes"


def test_what_a_mapping_names_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        read(tmp_path, ROWS, {**COLUMNS, "prompt": "q.txt", "chosne": "who"})
    assert error.value.problems == [
        f"{tmp_path}/x.jsonl: row 1 has no column 'q.txt', which columns.prompt names; it has q, outs, agreed, who.",
        f"{tmp_path}/x.jsonl: columns: 'chosne' is no column here; did you mean 'chosen'?",
    ]
    _, report = read(tmp_path, [*ROWS, {"q": {}, "outs": [], "agreed": 1, "who": "bob"}], COLUMNS)
    assert report.dropped == {"no column 'q.text'": 1}


TWO = [{"response_1": "good", "response_2": "bad", "preference": 1 + i % 2} for i in range(6)]


@pytest.mark.parametrize("values", [(1, 2), ("first", "second"), (-2, 3)])
@pytest.mark.parametrize("name", ["prompt", "context", "question", "instruction", "input", "query"])
def test_two_responses_may_have_their_prompt_under_any_name(tmp_path: Path, name: str, values: tuple[Any, Any]) -> None:
    rows = [{name: f"q {i}", **row, "preference": values[i % 2]} for i, row in enumerate(TWO)]
    write_jsonl(tmp_path / "x.jsonl", rows)
    pairs, report = read_pairs(str(tmp_path / "x.jsonl"))
    assert [row["prompt"][0]["content"] for row in pairs] == [f"q {i}" for i in range(6)]
    assert [answer(row, "chosen") for row in pairs] == ["good", "bad"] * 3
    assert (report.rows, report.kept) == (6, 6)


def test_two_responses_without_a_prompt_are_counted(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", TWO)
    with pytest.raises(UserError, match=r"6 left out: no 'prompt' field"):
        read_pairs(str(tmp_path / "x.jsonl"))
    equal = {"prompt": "a", "responses": [{"content": "x", "score": 1}, {"content": "x", "score": 2}]}
    write_jsonl(tmp_path / "x.jsonl", [equal])
    with pytest.raises(UserError, match=r"1 left out: holds no two different answers of which one is better"):
        read_pairs(str(tmp_path / "x.jsonl"))


def test_a_preference_is_not_passed_over(tmp_path: Path) -> None:
    """Where the file says row by row which response is better, none is the chosen one in all of them."""
    rows = [{"question": f"q {i}", **row} for i, row in enumerate(TWO)]
    with pytest.raises(UserError, match="but `preference` says in each row which of the two is better; leave"):
        read(tmp_path, rows, {"prompt": "question", "chosen": "response_1", "rejected": "response_2"})
    pairs, _ = read(tmp_path, rows, {"prompt": "question"})
    assert [answer(row, "chosen") for row in pairs] == ["good", "bad"] * 3
    named = [{"q": f"q {i}", "yes": "y", "no": "n", "strength": 3} for i in range(3)]
    _, report = read(tmp_path, named, {"prompt": "q", "chosen": "yes", "rejected": "no"})
    assert report.directions["columns"].endswith("; `strength` beside them is not read")
