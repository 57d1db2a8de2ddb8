"""A file's own columns under our names: by a mapping that a person gives, or because the file is of a public layout."""

import difflib
import math
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import NamedTuple

from rlhf.data.canonical import RATINGS, rating_gap
from rlhf.data.layouts import PUBLIC, find_layout
from rlhf.data.layouts.layout import BESIDE, Layout
from rlhf.data.messages import texts_in
from rlhf.data.rankings import PREFERENCES, RESPONSES
from rlhf.data.read import BadRow, ReadReport
from rlhf.data.rows import CRITIQUES, Pair
from rlhf.data.tables import as_number
from rlhf.errors import UserError

# What a column may be called here, and which of these are numbers.
ANSWER_COLUMNS = ("prompt", "chosen", "rejected", "response_1", "response_2", "preference", "messages", "completion")
PICTURES = ("image", "images", "video", "videos", "audio", "audios")
TEXT_COLUMNS = (*ANSWER_COLUMNS, *CRITIQUES)
NUMBER_COLUMNS = ("margin", "confidence", "weight", "agree", "chosen_rating", "rejected_rating", "preference_strength")
ANSWERS = ("chosen", "rejected", "messages", "completion", "response_1", "response_2")
# What may be a part of the prompt, and stands beside it in many files; the first are joined to it by some layouts.
JOINED = ("question", "instruction", "input", "query", "history")
PARTS = ("context", "input", "history", "passage", "document")
# What a label may have beside it, and under which name a pair has it where it is read.
OF_LABELS = {
    **{name: name for name in ("margin", "confidence", "weight", *CRITIQUES)},
    **{name: "rating_gap" for names in RATINGS for name in names},
    "soft_label": "confidence",
}
UNREAD_OF_LABEL = "`{}` beside these answers is not read"
UNREAD_PART = (
    "`{}` beside the prompt is not read; if it is a part of the prompt, join the two in the file, or name another column by "
    "`columns`"
)


class NamedRow(NamedTuple):
    """A row under our names, and its number in its file.

    Attributes:
        layout: the public layout that it had; None if it had none.
        meaning: what its label says; None where the columns' names say it.
        is_tie: its label calls the answers equal.
        makes_confidence: its `confidence` comes from the layout, and may be missing beside it.
        parts: its columns of `PARTS` and `OF_LABELS`, which a layout may have read or not.
    """

    number: int
    row: object
    layout: Layout | None = None
    meaning: str | None = None
    is_tie: bool = False
    makes_confidence: bool = False
    parts: Mapping[str, object] = {}


def named_rows(
    rows: Sequence[tuple[int, object]],
    source: str,
    report: ReadReport,
    *,
    columns: Mapping[str, str] | None = None,
    label: str | None = None,
) -> list[NamedRow]:
    """Return the rows of a whole file under our names; count those that can't be used in the report.

    Args:
        source: the file's name, for the sentence of a refusal.
        columns: our name → a column of the file, dots leading into nested ones and lists (`info.post`, `answers.0.text`).
        label: the column that says which answer is better, where a layout has several.

    Raises:
        UserError: a column that no row has, or a name that is none of ours; rows of two layouts; a label that there is not.
    """
    if not columns:
        rows = _without_pictures(rows, report)
    if columns:
        rows = _mapped(rows, source, report, columns)
    layout = None if columns and any(name in columns for name in ANSWERS) else _public_layout(rows, source)
    if label is not None and (layout is None or label not in layout.labels):
        raise UserError(_unknown_label(source, label, layout))
    if layout is None:
        return [NamedRow(number, row, parts=_parts(row)) for number, row in rows]
    named = []
    for number, row in rows:
        if not isinstance(row, Mapping) or not layout.has(row):
            lacks = layout.lacks(row) if isinstance(row, Mapping) else []
            column = f": no {lacks[0]!r}" if lacks else ""
            report.drop(number, f"not of the file's layout, {layout.name}{column}")
            continue
        try:
            plain = layout.plain(row, label)
        except BadRow as reason:
            report.drop(number, str(reason))
            continue
        makes = "confidence" not in row and (layout.compares is not None or "status" in row)
        read = {} if plain.meaning is not None else _columns_read(row, plain.columns)
        sentence = _sentence(layout, plain.meaning, read)
        if layout.direction is not None and plain.columns.get("chosen") is not None:
            sentence = f"{sentence}; {layout.direction}"
        named.append(NamedRow(number, plain.columns, layout, sentence, plain.is_tie, makes, _parts(row)))
    return named


def unread_parts(parts: Mapping[str, object], texts: Iterable[str]) -> list[str]:
    """Return the names of those columns that hold a text which stands in none of the texts of a row's prompts."""
    asked = _words(texts) if parts else ""
    return [name for name, value in parts.items() if any(_words([text]) not in asked for text in texts_in(value))]


def unread_of_labels(parts: Mapping[str, object], pairs: Sequence[Pair]) -> list[str]:
    """Return the names of those columns of `OF_LABELS` that none of a row's pairs has; one rating alone is none."""
    has_ratings = rating_gap(parts) is not None
    known = {name: read_as for name, read_as in OF_LABELS.items() if has_ratings or read_as != "rating_gap"}
    return [name for name, read_as in known.items() if name in parts and not any(read_as in pair for pair in pairs)]


def _parts(row: object) -> dict[str, object]:
    if not isinstance(row, Mapping):
        return {}
    return {name: row[name] for name in (*PARTS, *OF_LABELS) if not _is_empty(row.get(name))}


def _words(texts: Iterable[str]) -> str:
    return " ".join(" ".join(texts).split())


def _without_pictures(rows: Sequence[tuple[int, object]], report: ReadReport) -> list[tuple[int, object]]:
    """Leave out the rows that ask about what no model here sees or hears; their labels could only be noise."""
    kept = []
    for number, row in rows:
        beside = [name for name in PICTURES if isinstance(row, Mapping) and not _is_empty(row.get(name))]
        if beside:
            report.drop(
                number,
                f"it has `{beside[0]}`, and the models here read text alone (`columns` beside the source reads it so)",
            )
        else:
            kept.append((number, row))
    return kept


def _is_empty(value: object) -> bool:
    if isinstance(value, str):
        return value.strip().lower() in ("", "none", "nan", "null")
    is_gap = isinstance(value, float) and math.isnan(value)
    return value is None or value is False or is_gap or (isinstance(value, list | Mapping) and not value)


# ---- A mapping ----


def _mapped(
    rows: Sequence[tuple[int, object]], source: str, report: ReadReport, columns: Mapping[str, str]
) -> list[tuple[int, object]]:
    """Return the rows with the columns that a mapping names under our names; they are no longer there under their own."""
    known = {*TEXT_COLUMNS, *NUMBER_COLUMNS, *BESIDE, *(name for names in RATINGS for name in names)}
    known |= {path for layout in PUBLIC for path in layout.columns if "." not in path}
    problems = []
    for name, path in columns.items():
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f"; did you mean {close[0]!r}?" if close else "."
            problems.append(f"{source}: columns: {name!r} is no column here{hint}")
        elif rows and not any(_has(row, path) for _, row in rows):
            number, first = rows[0]
            names = ", ".join(first) if isinstance(first, Mapping) else "no columns"
            problems.append(
                f"{source}: row {number} has no column {path!r}, which columns.{name} names; it has {names}."
            )
    taken = {path.partition(".")[0] for path in columns.values()}
    unread = _unread_preferences(rows, columns, taken)
    if unread and {columns.get("chosen"), columns.get("rejected")} & {*RESPONSES}:
        problems.append(
            f"{source}: columns: a response is named as `chosen` or `rejected`, but `{unread[0]}` says in each row which of the "
            "two is better; leave `chosen` and `rejected` out."
        )
    if problems:
        raise UserError(problems)
    mapped: list[tuple[int, object]] = []
    for number, row in rows:
        missing = next((path for path in columns.values() if not _has(row, path)), None)
        if not isinstance(row, Mapping) or missing is not None:
            report.drop(number, f"no column {missing!r}")
            continue
        values = {name: _value(row, path) for name, path in columns.items()}
        values = {name: as_number(value) if name in NUMBER_COLUMNS else value for name, value in values.items()}
        mapped.append((number, {**{name: value for name, value in row.items() if name not in taken}, **values}))
    shown = ", ".join(f"`{path}` as {name}" for name, path in columns.items())
    beside = f"; `{unread[0]}` beside them is not read" if unread and "chosen" in columns else ""
    report.direct("columns", f"read by the columns that were named: {shown}{beside}")
    return mapped


def _unread_preferences(rows: Sequence[tuple[int, object]], columns: Mapping[str, str], taken: Set[str]) -> list[str]:
    """Return the columns that say which of two responses is better, and that a mapping leaves aside."""
    if "preference" in columns:
        return []
    return [x for x in PREFERENCES if x not in taken and any(isinstance(row, Mapping) and x in row for _, row in rows)]


def _has(row: object, path: str) -> bool:
    try:
        _value(row, path)
    except KeyError:
        return False
    return True


def _value(row: object, path: str) -> object:
    """Return the value at a path; a column that has dots in its own name comes first."""
    if isinstance(row, Mapping) and path in row:
        return row[path]
    for name in path.split("."):
        if isinstance(row, Mapping) and name in row:
            row = row[name]
        elif isinstance(row, list) and name.isdigit() and int(name) < len(row):
            row = row[int(name)]
        else:
            raise KeyError(path)
    return row


# ---- A public layout ----


def _public_layout(rows: Sequence[tuple[int, object]], source: str) -> Layout | None:
    """Return the public layout of a file; None if it has none.

    Raises:
        UserError: rows of it stand beside rows of another layout.
    """
    first_rows: dict[str, tuple[int, Layout]] = {}
    for number, row in rows:
        layout = find_layout(row)
        is_anything = layout.pairs is not None and isinstance(row, Mapping) and row.get("chosen") is None
        if not is_anything and layout.name not in first_rows:
            first_rows[layout.name] = (number, layout)
    public = [entry for entry in first_rows.values() if entry[1].is_public]
    if public and len(first_rows) > 1:
        (number, layout), (other_number, other) = sorted(first_rows.values(), key=lambda entry: entry[0])[:2]
        raise UserError(
            f"{source}: row {number} is of the layout {_by(layout, other)}, row {other_number} of the layout "
            f"{_by(other, layout)}; a file has one layout, so split it."
        )
    return public[0][1] if public else None


def _by(layout: Layout, other: Layout) -> str:
    """Name a layout by a column that the other one has not."""
    columns = [column for column in layout.columns if column not in other.columns]
    return f"{layout.name} (by its column {columns[-1]!r})" if columns else layout.name


def _sentence(layout: Layout, meaning: str | None, read: Mapping[str, object]) -> str:
    """Say as what a row is read: `read as PKU-SafeRLHF: `better_response_id` 0: the first is better`."""
    if meaning is None:
        names = list(read)
        meaning = ", ".join(f"`{name}`" for name in names[:8]) + (", …" if len(names) > 8 else "")
    return f"read as {layout.name}: {meaning}"


def _columns_read(row: Mapping[str, object], plain: Mapping[str, object]) -> dict[str, object]:
    """Return the columns of a row that are in what a layout made of it, those that it joined in its prompt too."""
    joined = {name: row[name] for name in JOINED if not _is_empty(row.get(name))}
    read = joined.keys() - set(unread_parts(joined, texts_in(plain.get("prompt"))))
    values = [value for value in plain.values() if value is not None]
    lists = {
        name for name, value in row.items() if isinstance(value, list) and value and all(x in values for x in value)
    }
    return {name: value for name, value in row.items() if value in values or name in read | lists}


def _unknown_label(source: str, label: str, layout: Layout | None) -> str:
    if layout is None or not layout.labels:
        name = "it is of none of the layouts" if layout is None else f"{layout.name} is no layout"
        return f"{source}: `label: {label}` is stated for it, but {name} that have several labels; take the key out."
    return f"{source}: `label: {label}` is no label of {layout.name}; it has {' and '.join(layout.labels)}."
