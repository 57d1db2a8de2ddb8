"""Limits of what is read: one sentence with row and reason, in a moment, whatever a file holds."""

import gzip
import io
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data import limits
from rlhf.data.label_files import read_verdicts
from rlhf.data.limits import MOST_LEVELS, bounded_lines, is_too_deep
from rlhf.data.read import ReadReport, is_local, read_rows
from rlhf.data.sources import read_pair_rows
from rlhf.errors import UserError
from rlhf.reward.score_jsonl import score_lines

GOOD = json.dumps({"prompt": "a", "chosen": "yes", "rejected": "no"})


def nested(levels: int) -> str:
    """A pair in which so many levels stand within each other, the row itself included."""
    return GOOD[:-1] + ', "more": ' + "[" * (levels - 1) + "]" * (levels - 1) + "}"


def read(file: Path) -> tuple[list[tuple[int, Any]], dict[str, int], dict[str, list[int]]]:
    report = ReadReport(str(file))
    return list(read_rows(str(file), report)), report.dropped, report.examples


def write(file: Path, content: bytes) -> Path:
    file.write_bytes(gzip.compress(content) if file.name.endswith(".gz") else content)
    return file


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_line_that_is_too_long_costs_its_row(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_LINE", 1000)
    exact = GOOD + " " * (1000 - len(GOOD) - 1)
    lines = [GOOD, GOOD + " " * 3_000_000, exact, exact + " ", GOOD]
    rows, dropped, examples = read(write(tmp_path / name, "\n".join(lines).encode()))
    assert [number for number, _ in rows] == [1, 3, 5]
    assert dropped == {"longer than 64 MiB": 2}
    assert examples["longer than 64 MiB"] == [2, 4]


def test_the_rest_of_a_long_line_is_never_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MOST_LINE", 1000)
    asked: list[int] = []

    class Endless(io.BytesIO):
        def readline(self, most: int | None = -1, /) -> bytes:
            asked.append(most or -1)
            return super().readline(most)

    assert list(bounded_lines(Endless(b"x" * 3 * 2**20 + b"\nab\nc").readline)) == [None, b"ab\n", b"c"]
    assert max(asked) <= 2**20
    assert min(asked) > 0


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_levels_are_counted(tmp_path: Path, name: str) -> None:
    """200 are read, 201 cost their row; so many that Python itself gives up cost no more, or in one list the file."""
    texts = [nested(MOST_LEVELS), nested(MOST_LEVELS + 1), GOOD]
    join = "[{}]".format(",".join(texts)) if name == "x.json" else "\n".join(texts)
    rows, dropped, examples = read(write(tmp_path / name, join.encode()))
    assert [number for number, _ in rows] == [1, 3]
    assert (dropped, examples) == ({"nested deeper than 200 levels": 1}, {"nested deeper than 200 levels": [2]})
    deepest = nested(100_000)
    file = write(tmp_path / name, (f"[{deepest}]" if name == "x.json" else f"{GOOD}\n{deepest}").encode())
    if name == "x.json":
        with pytest.raises(UserError, match=r"x\.json: nested deeper than 200 levels"):
            read(file)
    else:
        assert read(file)[1:] == ({"nested deeper than 200 levels": 1}, {"nested deeper than 200 levels": [2]})


def test_depth_of_values() -> None:
    value: Any = "leaf"
    for levels in range(1, MOST_LEVELS + 2):
        value = [value] if levels % 2 else {"x": value, "y": 1}
        assert is_too_deep(value) == (levels > MOST_LEVELS)


@pytest.mark.fault("bombs and tags")
@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json.gz"])
def test_a_bomb_is_refused_before_it_is_unpacked(tmp_path: Path, name: str) -> None:
    file = write(tmp_path / name, (GOOD + "\n").encode() + b" " * 60_000_000)
    begin = time.perf_counter()
    with pytest.raises(UserError, match=r"unpacks to more than 200 times its size") as refused:
        read(file)
    assert time.perf_counter() - begin < 5
    assert len(refused.value.problems) == 1
    if name == "x.jsonl.gz":
        assert "row 2:" in str(refused.value)


def test_a_small_file_may_be_dense_and_a_large_one_like_texts(tmp_path: Path) -> None:
    rows, _, _ = read(write(tmp_path / "small.jsonl.gz", (GOOD + " " * 100_000 + "\n").encode() * 30))
    assert len(rows) == 30
    words = [json.dumps({"prompt": f"{i:x}" * 40, "chosen": "yes", "rejected": "no"}) for i in range(100_000)]
    content = "\n".join(words).encode()
    assert len(content) > limits.RATIO_FROM
    assert len(read(write(tmp_path / "large.jsonl.gz", content))[0]) == 100_000


def packed_elsewhere(folder: Path) -> Path:
    file = folder / "x.jsonl"
    file.write_bytes(gzip.compress(GOOD.encode()))
    return file


def cut_off(folder: Path) -> Path:
    file = folder / "x.jsonl.gz"
    file.write_bytes(gzip.compress("\n".join([GOOD] * 5).encode())[:-10])
    return file


def damaged(folder: Path) -> Path:
    file = folder / "x.jsonl.gz"
    content = bytearray(gzip.compress(b"".join(bytes([x % 251]) for x in range(1, 251)) * 50))
    content[30] ^= 255
    file.write_bytes(bytes(content))
    return file


NO_TEXT: dict[str, tuple[Callable[[Path], Path], str]] = {
    "binary": (
        lambda folder: write(folder / "x.jsonl", b"\x7fELF\x02\n\x01\0\0" * 99),
        r"row 2: no text: it holds a zero",
    ),
    "binary list": (
        lambda folder: write(folder / "x.json", b"PK\x03\x04\0" * 99),
        r"row 1: no text: it holds a zero byte",
    ),
    "UTF-16": (lambda folder: write(folder / "x.jsonl", GOOD.encode("utf-16")), r"row 1: no text: .* UTF-16"),
    "packed under another name": (packed_elsewhere, r"row 1: this is a gzip file; let its name end in \.gz"),
    "not packed": (
        lambda folder: ((folder / "x.jsonl.gz").write_text(GOOD) and folder / "x.jsonl.gz") or folder,
        r"row 1: the compressed file is cut off or damaged \(Not a gzipped file",
    ),
    "cut off": (cut_off, r"row \d+: the compressed file is cut off or damaged"),
    "damaged": (damaged, r"row \d+: the compressed file is cut off or damaged"),
    "no parquet": (lambda folder: write(folder / "x.parquet", b"x" * 99), r"row 1: no parquet file, or a damaged one"),
}


@pytest.mark.parametrize("kind", NO_TEXT)
def test_a_file_that_is_no_text_is_one_sentence(tmp_path: Path, kind: str) -> None:
    make, said = NO_TEXT[kind]
    file = make(tmp_path)
    for reader in (read_pair_rows, read_verdicts):
        with pytest.raises(UserError, match=said) as refused:
            reader(str(file))
        assert len(refused.value.problems) == 1
        assert file.name in str(refused.value)


def test_a_number_of_too_many_digits_costs_its_row(tmp_path: Path) -> None:
    digits = "9" * (sys.get_int_max_str_digits() + 1)
    _, dropped, _ = read(write(tmp_path / "x.jsonl", f'{GOOD}\n{{"prompt": {digits}}}'.encode()))
    assert dropped == {"not valid JSON": 1}


class OnesReward:
    def score(self, prompts: Any, responses: Any, **_: Any) -> torch.Tensor:
        return torch.ones(len(responses))


def test_scoring_keeps_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that is too long, too deep or no number has its error in its place; batches don't grow with their lines."""
    monkeypatch.setattr(limits, "MOST_LINE", 2000)
    row = json.dumps({"prompt": "a", "response": "b"})
    deep = [row[:-1] + ', "more": ' + "[" * n + "]" * n + "}" for n in (MOST_LEVELS, 900)]
    lines = [row, row + " " * 3000, *deep, row[:-1] + ', "n": ' + "9" * 1900 + "}", row]
    scored = list(score_lines(OnesReward(), bounded_lines(io.StringIO("\n".join(lines)).readline)))
    assert [entry.get("error", "score") for entry in scored] == [
        "score",
        "longer than 64 MiB",
        "nested deeper than 200 levels",
        "nested deeper than 200 levels",
        "score",
        "score",
    ]
    digits = row[:-1] + ', "n": ' + "9" * 5000 + "}"
    assert "not valid JSON: Exceeds the limit" in next(score_lines(OnesReward(), [digits]))["error"]


def test_batches_of_long_lines_are_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlhf.reward.score_jsonl.MOST_LINE", 1000)
    sizes: list[int] = []

    class Counted(OnesReward):
        def score(self, prompts: Any, responses: Any, **_: Any) -> torch.Tensor:
            sizes.append(len(responses))
            return super().score(prompts, responses)

    row = json.dumps({"prompt": "a", "response": "b" * 600})
    assert len(list(score_lines(Counted(), [row] * 5))) == 5
    assert sizes == [2, 2, 1]


@pytest.mark.parametrize(
    "name",
    ["pairs.csv", "./pairs", "/nowhere/pairs", "~/nowhere", "../org/name", "a/b/c", "pairs.jsonl", "X.JSONL", "p.zip"],
)
def test_what_looks_like_a_file_is_never_looked_up_on_the_hub(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def ask(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("datasets.load_dataset", ask)
    assert is_local(name)
    with pytest.raises(UserError, match="no such file") as refused:
        list(read_rows(name, ReadReport(name)))
    assert len(refused.value.problems) == 1


def test_names_of_the_hub_are_names_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert not any(is_local(name) for name in ("org/name", "imdb", "org/name-1.5b", "org/data.v2"))
    (tmp_path / "imdb").write_text("x")
    assert is_local("imdb"), "it is there"
    with pytest.raises(UserError, match="this one can't"):
        list(read_rows("imdb", ReadReport("imdb")))
