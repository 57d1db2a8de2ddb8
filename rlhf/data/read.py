"""Rows out of files and hub datasets, one at a time, so that one bad line costs one line."""

import codecs
import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, cast

from rlhf.data.tables import TABLES, is_pattern, is_saved, matched_files, saved_rows, table_rows
from rlhf.errors import UserError

SUFFIXES = (".json", ".jsonl", ".json.gz", ".jsonl.gz", ".parquet", *TABLES)
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
    Several files are read as one, in the order of their names: the numbers run on.

    Args:
        source: a path ending in one of `SUFFIXES`, a pattern that such paths match, a folder that `datasets` saved, or a hub
            dataset id.
        split: of a saved folder or hub dataset.
        config: of a hub dataset.
        is_named: the split was asked for by name, and does not merely say what the rows are for.

    Raises:
        UserError: no such file or split, or a hub dataset that cannot be had.
    """
    if not is_local(source):
        yield from _hub_rows(source, config, split, report)
        return
    if config is not None or (is_named and not is_saved(source)):
        raise UserError(f"{source}: a local file has no config and no split; take them out.")
    if is_pattern(source):
        yield from _matched_rows(source, report)
        return
    if is_saved(source):
        for number, row in enumerate(saved_rows(source, split, is_named=is_named), start=1):
            report.rows += 1
            yield number, row
        return
    path = Path(source).expanduser()
    if not path.is_file():
        raise UserError(f"{source}: no such file.")
    name = path.name
    if name.endswith(".parquet"):
        import pyarrow.parquet as parquet

        number = 0
        for batch in parquet.ParquetFile(path).iter_batches():
            for row in batch.to_pylist():
                number += 1
                report.rows += 1
                yield number, row
    elif name.endswith(TABLES):
        yield from _table(path, report)
    elif name.endswith((".jsonl", ".jsonl.gz")):
        yield from _json_lines(path, report)
    else:
        yield from _json_array(path, report)


def is_local(source: str) -> bool:
    """Return whether a source names a file, several or a saved folder rather than a hub dataset."""
    return source.endswith(SUFFIXES) or is_pattern(source) or is_saved(source)


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


def _open(path: Path) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.name.endswith(".gz") else path.open("rb")


def _json_lines(path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(codecs.BOM_UTF8)
            if not line.strip():
                continue
            report.rows += 1
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                report.drop(number, "not UTF-8 text")
            except json.JSONDecodeError:
                report.drop(number, "not valid JSON")
            else:
                if _is_row(row):
                    yield number, row
                else:
                    report.drop(number, "not a JSON object")


def _json_array(path: Path, report: ReadReport) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        try:
            rows = json.loads(file.read().decode("utf-8-sig"))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise UserError(
                f"{path}: not valid JSON ({error}); one object a line belongs into a .jsonl file."
            ) from None
    if not isinstance(rows, list):
        raise UserError(f"{path}: a .json file must hold a list of objects.")
    for number, row in enumerate(rows, start=1):
        report.rows += 1
        if _is_row(row):
            yield number, row
        else:
            report.drop(number, "not a JSON object")


def _is_row(value: object) -> bool:
    return isinstance(value, dict) or (
        isinstance(value, list) and bool(value) and all(isinstance(x, dict) for x in value)
    )


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
    for number, row in enumerate(dataset):
        report.rows += 1
        yield number, row
