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
