"""Rows out of files and hub datasets, one at a time, so that one bad line costs one line."""

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.data.limits import TOO_DEEP, TOO_LONG, is_too_deep, numbered_lines, open_text, read_whole
from rlhf.data.tables import (
    TABLES,
    folder_rows,
    is_folder,
    is_folder_of_files,
    is_pattern,
    matched_files,
    table_rows,
)
from rlhf.errors import UserError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", *TABLES)
# What ends so is meant as a file, whether or not it can be read.
FILE_SUFFIXES = (
    *SUFFIXES, ".txt", ".gz", ".zip", ".bz2", ".xz", ".zst", ".tar", ".arrow", ".feather", ".ndjson", ".xlsx",
    ".yaml", ".yml", ".db", ".sqlite",
)  # fmt: skip
EXAMPLES_KEPT = 5


@dataclass
class ReadReport:
    """The rows that a reader kept and dropped, with the first rows of each reason (1-based lines for text files).

    `noted` counts what is unusual about rows that were kept, or about parts of them that were not. `directions` says by layout
    or column which answer is taken for the better one, with the first row as an example; those of `evident` need not be told
    to a person, for the columns' names say it. `last` is the highest number of a row that was seen.
    """

    source: str
    rows: int = 0
    kept: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[int]] = field(default_factory=dict)
    directions: dict[str, str] = field(default_factory=dict)
    evident: set[str] = field(default_factory=set)
    last: int = 0

    def drop(self, row: int, reason: str) -> None:
        """Count a row that is left out."""
        self.last = max(self.last, row)
        self.dropped[reason] = self.dropped.get(reason, 0) + 1
        self._example(row, reason)

    def note(self, row: int, remark: str, *, count: int = 1) -> None:
        """Count something unusual about a row that is kept."""
        self.noted[remark] = self.noted.get(remark, 0) + count
        self._example(row, remark)

    def direct(self, name: str, sentence: str, *, evident: bool = False) -> None:
        """Record which answer of a layout or column is taken for the better one; the first sentence stays."""
        if name not in self.directions:
            self.directions[name] = sentence
            if evident:
                self.evident.add(name)

    def add(self, part: "ReadReport", before: int) -> None:
        """Take over what was counted in one of several files, whose rows come behind `before` others."""
        self.rows += part.rows
        for reason, count in part.dropped.items():
            self.dropped[reason] = self.dropped.get(reason, 0) + count
            for row in part.examples[reason]:
                self._example(before + row, reason)

    def _example(self, row: int, reason: str) -> None:
        rows = self.examples.setdefault(reason, [])
        if len(rows) < EXAMPLES_KEPT and row not in rows:
            rows.append(row)

    def as_dict(self) -> dict[str, Any]:
        """Return the counts as the stage's manifest has them."""
        return {
            "source": self.source,
            "rows": self.rows,
            "kept": self.kept,
            "dropped": self.dropped,
            "noted": self.noted,
            "examples": self.examples,
            "directions": list(self.directions.values()),
        }

    def sentences(self) -> list[str]:
        """Return the counts as sentences for a person."""
        lines = [f"{self.source}: {self.kept} of {self.rows} rows kept."]
        lines += [f"  {sentence}" for name, sentence in self.directions.items() if name not in self.evident]
        for counts, verb in ((self.dropped, "left out"), (self.noted, "noted")):
            for reason, count in sorted(counts.items(), key=lambda item: -item[1]):
                shown = self.examples[reason]
                more = ", …" if len(shown) == EXAMPLES_KEPT and count > len(shown) else ""
                lines.append(f"  {count} {verb}: {reason} (row {', '.join(map(str, shown))}{more})")
        return lines


class BadRow(Exception):
    """A row that cannot be used, with the reason."""


def read_rows(
    source: str, report: ReadReport, *, split: str = "train", config: str | None = None, is_named: bool = False
) -> Iterator[tuple[int, Any]]:
    """Read the rows of a source, each with its number; count unreadable lines in the report.

    A row is an object, or a list of messages (a ranked list). A byte order mark at the head of a line or file is no part of it.
    Numbers begin at 1. Several files are read as one, in the order of their names: the numbers run on.

    Args:
        source: a path ending in one of `SUFFIXES`, a pattern that such paths match, a folder that `datasets` saved or reads, or
            a hub dataset id.
        split: of a folder or hub dataset.
        config: of a hub dataset, or a folder of data files.
        is_named: the split was asked for by name, and does not merely say what the rows are for.

    Raises:
        UserError: no such file or split, or a folder or hub dataset that cannot be had.
    """
    if not is_local(source):
        yield from _hub_rows(source, config, split, report)
        return
    if (config is not None and not is_folder_of_files(source)) or (is_named and not is_folder(source)):
        raise UserError(f"{source}: a local file has no config and no split; take them out.")
    if is_pattern(source):
        yield from _matched_rows(source, report)
        return
    if is_folder(source):
        for number, row in enumerate(folder_rows(source, split, config=config, is_named=is_named), start=1):
            report.rows += 1
            yield number, row
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{source}: no such file.")
    if not source.endswith(SUFFIXES):
        raise UserError(f"{source}: files that end in {', '.join(SUFFIXES)} can be read; this one can't.")
    name = path.name
    if name.endswith(".parquet"):
        yield from _parquet(path, report)
    elif name.endswith(TABLES):
        yield from _table(path, report)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path, report)
    else:
        yield from _json_array(path, report)


def is_local(source: str) -> bool:
    """Return whether a source names files rather than a hub dataset: it is there, looks like a path, or ends as files do.

    What looks like a file is never looked up on the hub, where a misspelt name could be somebody else's data set.

    >>> is_local("pairs.csv"), is_local("./pairs"), is_local("a/b/c"), is_local("org/name")
    (True, True, True, False)
    """
    looks_like_path = source.startswith(("/", "./", "../", "~")) or source.count("/") > 1 or "\\" in source
    is_here = Path(source).expanduser().is_file() or is_folder(source)
    return is_here or is_pattern(source) or looks_like_path or source.lower().endswith(FILE_SUFFIXES)


def _parquet(path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
    import pyarrow
    import pyarrow.parquet as parquet

    number = 0
    try:
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                report.rows += 1
                yield number, row
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: row {number + 1}: no parquet file, or a damaged one ({error}).") from None


def _matched_rows(pattern: str, report: ReadReport) -> Iterator[tuple[int, Any]]:
    """Read all files that a pattern matches as one; say with which number each begins."""
    before = 0
    begins = []
    for file in matched_files(pattern):
        part = ReadReport(file)
        begins.append(f"{file} from {before + 1}")
        for number, row in read_rows(file, part):
            part.last = max(part.last, number)
            yield before + number, row
        report.add(part, before)
        before += part.last
    report.direct("files", f"{len(begins)} files, whose rows are numbered on: {', '.join(begins)}")


def _table(path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
    for number, row in enumerate(table_rows(path), start=1):
        report.rows += 1
        if isinstance(row, str):
            report.drop(number, row)
        else:
            yield number, row


def _json_lines(path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
    with open_text(path) as file:
        for number, line in numbered_lines(file, path):
            if line is not None and not line.removeprefix(codecs.BOM_UTF8).strip():
                continue
            report.rows += 1
            try:
                row = _parse(line)
            except BadRow as reason:
                report.drop(number, str(reason))
            else:
                yield number, row


def _parse(line: bytes | None) -> Any:
    """Return the row in a line.

    Raises:
        BadRow: there is none.
    """
    if line is None:
        raise BadRow(TOO_LONG)
    try:
        row = json.loads(line.removeprefix(codecs.BOM_UTF8).decode("utf-8"))
    except UnicodeDecodeError:
        raise BadRow("not UTF-8 text") from None
    except RecursionError:
        raise BadRow(TOO_DEEP) from None
    except ValueError:  # also a number of more digits than Python reads
        raise BadRow("not valid JSON") from None
    return _row(row)


def _row(value: object) -> Any:
    """Return what is a row: an object, or a list of messages.

    Raises:
        BadRow: it is neither, or has too many levels.
    """
    if is_too_deep(value):
        raise BadRow(TOO_DEEP)
    is_ranked = isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)
    if not isinstance(value, dict) and not is_ranked:
        raise BadRow("not a JSON object")
    return value


def _json_array(path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
    with open_text(path) as file:
        content = read_whole(file, path)
    try:
        rows = json.loads(content.decode("utf-8-sig"))
    except RecursionError:
        raise UserError(f"{path}: {TOO_DEEP}.") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); one object a line belongs into a .jsonl file.") from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold a list of objects.")
    for number, value in enumerate(rows, start=1):
        report.rows += 1
        try:
            row = _row(value)
        except BadRow as reason:
            report.drop(number, str(reason))
        else:
            yield number, row


def _hub_rows(source: str, config: str | None, split: str, report: ReadReport) -> Iterator[tuple[int, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset(*([source] if config is None else [source, config]), split=split)
    except Exception as error:
        name = f"{source}, config {config!r}" if config else source
        raise UserError(
            f"{name}: cannot load the {split!r} split from the hub ({type(error).__name__}: {str(error).splitlines()[0]}). "
            f"A local file must end in {', '.join(SUFFIXES)}."
        ) from error
    for number, row in enumerate(dataset, start=1):
        report.rows += 1
        yield number, row
