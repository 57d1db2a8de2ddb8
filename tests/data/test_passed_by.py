"""What rows say in places that were passed by: their label, their weight, who rated them, what else belongs to the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.read import ReadReport
from rlhf.data.rows import answer, assistant_turn, user_turn
from rlhf.data.sources import Convert, Source, read_sources, to_pairs
from rlhf.data.tidy import PARSED
from rlhf.files import write_jsonl


def rows_of(folder: Path, *rows: Any, convert: Convert[Any] = to_pairs) -> tuple[list[Any], ReadReport]:
    write_jsonl(folder / "x.jsonl", rows)
    reports: list[ReadReport] = []
    read = read_sources([Source(str(folder / "x.jsonl"))], convert, reports, "rows", 0)
    return [row.values for row in read.train], reports[0]


# ---- Two responses ----


@pytest.mark.parametrize("says", [{"preference": "A"}, {"preference_strength": -1}])
@pytest.mark.parametrize("names", [("response_1", "response_2"), ("response1", "response2")])
def test_two_responses_that_are_the_text_of_messages_are_messages(
    tmp_path: Path, names: tuple[str, str], says: dict[str, Any]
) -> None:
    texts = [json.dumps(assistant_turn("yes", ended=False)), json.dumps(assistant_turn("no"))]
    (row,), report = rows_of(tmp_path, {"prompt": "say it", **dict(zip(names, texts, strict=True)), **says})
    assert (row["chosen"], row["rejected"]) == (assistant_turn("yes", ended=False), assistant_turn("no"))
    assert report.noted[PARSED] == 1
    (row,), report = rows_of(tmp_path, {"prompt": "say it", names[0]: texts[0], names[1]: "no", **says})
    assert (answer(row, "chosen"), PARSED in report.noted) == (texts[0], False)  # of two answers both, or neither


def test_a_response_of_several_messages_is_none(tmp_path: Path) -> None:
    row = {"prompt": "q", "response_1": user_turn("q") + assistant_turn("a"), "response_2": "b", "preference": "A"}
    assert rows_of(tmp_path, row)[1].dropped == {"a response is not a single answer": 1}
