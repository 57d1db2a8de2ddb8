"""What an audit keeps of a file: the file's own rows and columns, whatever its layout."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.rows import answer
from rlhf.data.sources import Source, read_pair_rows, read_pairs
from rlhf.pipeline.cleaned import write_cleaned

PKU = [
    {"prompt": f"é {i}", "response_0": "yes", "response_1": "no", "better_response_id": 0, "own": {"k": i}}
    for i in range(6)
]
ARENA = [
    {
        "winner": "model_a",
        "conversation_a": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "yes"}],
        "conversation_b": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": "no"}],
        "language": "English",
    }
    for i in range(6)
]
KWISE = [
    {"prompt": f"{i}", "responses": [{"content": text, "score": s} for s, text in enumerate("abc")], "own": i}
    for i in range(4)
]


def lines(rows: list[Any]) -> list[bytes]:
    """Return rows as lines that no writer of ours would write: with blanks and escapes of their own."""
    return [json.dumps(row, separators=(" ,", ":  "), ensure_ascii=True).encode() + b" \r\n" for row in rows]


@pytest.mark.parametrize("rows", [PKU, ARENA], ids=["PKU", "arena"])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
def test_rows_that_are_kept_are_kept_byte_for_byte(tmp_path: Path, rows: list[Any], name: str) -> None:
    own = lines(rows)
    content = b"\n{broken\n" + b"".join(own)
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else b"\xef\xbb\xbf" + content)
    source = Source(str(tmp_path / name))
    read, _ = read_pair_rows(source)
    counts = write_cleaned(tmp_path / "cleaned.jsonl", source, read, [read[1], read[4]])
    assert (tmp_path / "cleaned.jsonl").read_bytes() == b"".join(own[i] for i in (0, 2, 3, 5))
    assert counts == {"rows": 4, "pairs": 0, "left_out": 3}
    kept, report = read_pairs(str(tmp_path / "cleaned.jsonl"))
    assert list(kept) == [read[i].values for i in (0, 2, 3, 5)], "read again, the same pairs"
    assert report.kept == 4


def test_a_ranking_loses_only_its_suspicious_pairs(tmp_path: Path) -> None:
    own = lines(KWISE)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(own))
    source = Source(str(tmp_path / "rows.jsonl"))
    read, _ = read_pair_rows(source)
    suspicious = next(row for row in read if row.number == 2)
    counts = write_cleaned(tmp_path / "cleaned.jsonl", source, read, [suspicious])
    assert counts == {"rows": 3, "pairs": 2, "left_out": 0}
    written = (tmp_path / "cleaned.jsonl").read_bytes().splitlines(keepends=True)
    assert [written[i] for i in (0, 3, 4)] == [own[i] for i in (0, 2, 3)]
    assert [json.loads(line) for line in written[1:3]] == [
        r.values for r in read if r.number == 2 and r is not suspicious
    ]


def test_rows_that_are_compared_with_one_another_stay_together(tmp_path: Path) -> None:
    rated = [{"prompt": f"{i // 2}", "response": f"r{i}", "helpfulness": i % 2, "own": i} for i in range(8)]
    own = lines(rated)
    (tmp_path / "rows.jsonl").write_bytes(b"".join(own))
    source = Source(str(tmp_path / "rows.jsonl"))
    read, _ = read_pair_rows(source)
    write_cleaned(tmp_path / "cleaned.jsonl", source, read, [read[1]])
    assert (tmp_path / "cleaned.jsonl").read_bytes() == b"".join(own[i] for i in (0, 1, 4, 5, 6, 7))


def test_tables_and_patterns_keep_their_columns(tmp_path: Path) -> None:
    for name, first in (("a", 0), ("b", 2)):
        text = "".join(f"p{i},yes,no,{i}\n" for i in range(first, first + 2))
        (tmp_path / f"{name}.csv").write_text("question,chosen,rejected,own\n" + text)
    source = Source(str(tmp_path / "*.csv"))
    read, _ = read_pair_rows(source)
    write_cleaned(tmp_path / "cleaned.jsonl", source, read, [read[1]])
    rows = [json.loads(line) for line in (tmp_path / "cleaned.jsonl").read_text().splitlines()]
    assert rows == [{"question": f"p{i}", "chosen": "yes", "rejected": "no", "own": f"{i}"} for i in (0, 2, 3)]
    assert [answer(row, "chosen") for row in read_pairs(str(tmp_path / "cleaned.jsonl"))[0]] == ["yes"] * 3
