"""JSON lines end at the newline and nowhere else; a write is whole or not there; digests don't depend on order."""

import hashlib
import json
from pathlib import Path

import pytest

from rlhf.files import digest, file_digest, json_lines, read_jsonl, write_jsonl, write_text

# Where `str.splitlines` cuts, found by asking it.
SEPARATORS = [chr(code) for code in range(0x110000) if len(f"a{chr(code)}b".splitlines()) > 1] + ["\r\n"]


def test_the_separators_are_those_that_python_documents() -> None:
    assert SEPARATORS == ["\n", "\v", "\f", "\r", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029", "\r\n"]


@pytest.mark.parametrize("separator", SEPARATORS, ids=ascii)
def test_texts_survive_every_separator(tmp_path: Path, separator: str) -> None:
    rows = [{"text": f"a{separator}b", f"key{separator}": 1}, {"text": separator}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    assert (tmp_path / "x.jsonl").read_bytes().count(b"\n") == 2
    assert read_jsonl(tmp_path / "x.jsonl") == rows


@pytest.mark.parametrize("separator", [s for s in SEPARATORS if ord(s[0]) >= 0x20], ids=ascii)
def test_separators_stand_in_the_file_as_they_are(tmp_path: Path, separator: str) -> None:
    """JSON allows them unescaped in a text, so other programs write them so too."""
    assert separator in json_lines([{"text": separator}])


def test_lines_of_other_programs(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\r\n{"a":\r2}\n{"a": 3}')
    assert read_jsonl(tmp_path / "x.jsonl") == [{"a": 1}, {"a": 2}, {"a": 3}]
    (tmp_path / "empty.jsonl").write_bytes(b"")
    assert read_jsonl(tmp_path / "empty.jsonl") == []
    (tmp_path / "cut.jsonl").write_bytes(b'{"a": 1}\n{"a"')
    with pytest.raises(json.JSONDecodeError):
        read_jsonl(tmp_path / "cut.jsonl")


def test_a_write_replaces_the_file_and_leaves_nothing_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    write_text(file, "old")
    write_text(file, "new é")
    assert file.read_text(encoding="utf-8") == "new é"
    assert list(tmp_path.iterdir()) == [file]


def test_digests(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1, "b": [3]})
    (tmp_path / "x").write_bytes(b"abc")
    assert file_digest(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


def test_no_module_splits_json_lines_by_itself() -> None:
    """`splitlines` is for messages of errors, of which one line is shown, and for nothing that is read from a file."""
    for file in (Path(__file__).parents[1] / "rlhf").rglob("*.py"):
        for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), start=1):
            if "splitlines()" in line:
                assert "str(error)" in line, f"{file.name}:{number}"


def test_a_write_that_fails_leaves_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "folder", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
