"""The rows of a source as they stand in it, for files that keep them: byte for byte, where a row is a line."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path

from rlhf.data.read import ReadReport, read_rows
from rlhf.data.sources import Source
from rlhf.data.tables import is_pattern, matched_files

BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def own_lines(source: Source, *, split: str = "train") -> Iterator[tuple[int, bytes]]:
    r"""Yield each row of a source with its number, as a line of JSON that ends in "\n": its own bytes in .jsonl files.

    The numbers are those of `read_rows`. A row of a list, a table or a saved folder becomes a line with all its columns.
    """
    if not is_pattern(source.source):
        yield from _lines_of(source, split)
        return
    before = 0
    for file in matched_files(source.source):
        last = 0
        for number, line in _lines_of(Source(file), split):
            last = number
            yield before + number, line
        before += last


def _lines_of(source: Source, split: str) -> Iterator[tuple[int, bytes]]:
    path = Path(source.source).expanduser()
    if path.name.endswith((".jsonl", ".jsonl.gz")) and path.is_file():
        with gzip.open(path) if path.name.endswith(".gz") else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(BYTE_ORDER_MARK)
                if line.strip():
                    yield number, line if line.endswith(b"\n") else line + b"\n"
        return
    split, is_named = source.split or split, source.split is not None
    rows = read_rows(source.source, ReadReport(""), split=split, config=source.config, is_named=is_named)
    for number, row in rows:
        yield number, json.dumps(row, ensure_ascii=False, default=str).encode() + b"\n"
