"""The rows of a source as the layouts read them: under our names, tidied, two responses as a pair."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf.data.columns import named_rows
from rlhf.data.direction import directions, has_two_responses
from rlhf.data.layouts.layout import Layout
from rlhf.data.rankings import preference_of
from rlhf.data.read import BadRow, ReadReport, read_rows
from rlhf.data.tidy import UNLIKELY, more_likely_first, tidied

if TYPE_CHECKING:
    from rlhf.data.sources import Source

FOR_VALIDATION = ("validation", "valid", "val", "dev", "eval")


class Line(NamedTuple):
    """A row as the layouts read it, its number in its file, and whether the file itself calls it a test row.

    Attributes:
        direction: the column or layout that says which of its answers is better, and a sentence that says how; None where its
            layout does.
        makes_confidence: `confidence` comes from the layout, and may be missing in the rows beside.
        parts: its columns that may be parts of the prompt or say more of the label, whether or not a layout read them.
    """

    number: int
    row: Any
    is_test: bool
    direction: tuple[str, str] | None = None
    makes_confidence: bool = False
    parts: Mapping[str, object] = {}


def lines_of(source: "Source", report: ReadReport, split: str) -> Iterator[Line]:
    """Read a whole file, and yield its rows as the layouts read them: under our names, tidied, two responses as a pair.

    Raises:
        UserError: nobody can know which of two responses is better; what the source says of the file is not so.
    """
    # 1. Read; give the columns our names.
    split, is_named = source.split or split, source.split is not None
    numbered = list(read_rows(source.source, report, split=split, config=source.config, is_named=is_named))
    named = named_rows(numbered, source.source, report, columns=source.columns, label=source.label)

    # 2. Tidy; decide what two responses and a preference say.
    rows = tidied([entry.row for entry in named])
    by_column = directions((row for row, *_ in rows), source.source, source.preference)
    has_test_rows = any(isinstance(row, dict) and str(row.get("split")).lower() == "test" for row, *_ in rows)
    for entry, (row, remarks, refused) in zip(named, rows, strict=True):
        if refused is not None:
            report.drop(entry.number, refused)
            continue
        for remark in remarks:
            report.note(entry.number, remark)
        if isinstance(row, dict) and row.get("tools"):
            report.note(entry.number, "`tools` beside a conversation is left out: no canonical row has a place for it")
        part = str(row.get("split") or "").lower() if isinstance(row, dict) else ""
        if split == "train" and part in FOR_VALIDATION:
            report.note(entry.number, f"read for training, though its `split` is {part}")
        if split == "test" and part == "train" and has_test_rows:
            report.note(entry.number, "read for judging, though its `split` is train and other rows' is test")
        # What was the text of messages is compared as messages.
        parts = {name: row.get(name, value) if isinstance(row, dict) else value for name, value in entry.parts.items()}
        is_test = part == "test" and split == "train"
        if entry.layout is not None and entry.meaning is not None:
            direction = (_name(entry.layout, row, is_tie=entry.is_tie), entry.meaning)
            direction = _changed(*direction) if UNLIKELY in remarks else direction
            yield Line(entry.number, row, is_test, direction, entry.makes_confidence, entry.parts)
            continue
        if not has_two_responses(row) or (preference := preference_of(row)) is None:
            yield Line(entry.number, row, is_test, parts=parts)
            continue
        column, value = preference
        try:
            pair = by_column[column].as_pair(row)
        except BadRow as reason:
            report.drop(entry.number, str(reason))
            continue
        likelier, direction = more_likely_first(pair), (column, by_column[column].sentence(value))
        if likelier is not None:
            report.note(entry.number, UNLIKELY)
            direction = _changed(*direction)
        yield Line(entry.number, likelier or pair, is_test, direction, parts=parts)


def _changed(name: str, sentence: str) -> tuple[str, str]:
    """Return the name and the sentence of rows whose answers changed sides, whose chosen answer is the other one."""
    return f"{name}, sides changed", f"{sentence}, but its `confidence` is below 0.5, so the answers changed sides"


def _name(layout: Layout, row: Any, *, is_tie: bool) -> str:
    """Return under which name the sentence of a public layout's rows is said once: ties and pairs have one of their own."""
    is_pair = layout.direction is not None and row.get("chosen") is not None
    return f"{layout.name}, ties" if is_tie else f"{layout.name}, pairs" if is_pair else layout.name
