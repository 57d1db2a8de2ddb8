"""Questions and verdicts as files: plain rows, and the JSON of Label Studio and Argilla for people who label there."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from rlhf.data.direction import code_of, named_side, numbered_sides, shown_codes
from rlhf.data.labels import Question, Verdict
from rlhf.data.read import ReadReport, read_rows
from rlhf.errors import UserError

Format = Literal["plain", "label-studio", "argilla"]
ExportedRow = Mapping[str, Any]  # foreign JSON: a task of Label Studio, a record of Argilla
NumberedRow = tuple[int, Any]  # a row as it was read, with its number
CONTROL = "preference"  # the question's name in what is exported for Label Studio and Argilla
# What people write for no side; `rlhf.data.direction` has the words for the first and the second.
OTHER_WORDS = {"tie": "tie", "c": "tie", "=": "tie", "equal": "tie", "skip": "skip"}


class Answered(NamedTuple):
    """What an annotator wrote about a question, before anybody knows what it means in its file.

    Attributes:
        row: of the file.
        label: as it stands there; None where there is none.
    """

    row: int
    id: str
    label: object
    annotator: str
    seconds: float | None = None


class Unusable(NamedTuple):
    """A row of a file, or one annotator's part of it, that says nothing, with the reason."""

    row: int
    reason: str
    id: str | None = None


Entry = Answered | Unusable


def export_questions(questions: Sequence[Question], form: Format) -> list[dict[str, Any]]:
    """Return questions as rows of one of the formats; whoever answers them sees no score and no source.

    | form | a row | where the answer goes |
    |---|---|---|
    | plain | id, prompt, first, second | the same row with `label` and `annotator` |
    | label-studio | a task whose `data` has id, prompt, first, second | its `annotations` (pairwise or choices) |
    | argilla | a record with `fields` prompt, first, second | its `responses` to the question `preference` |
    """
    rows: list[dict[str, Any]] = []
    for question in questions:
        prompt = "\n\n".join(f"{message['role']}: {message['content']}" for message in question.prompt)
        texts = {"prompt": prompt, "first": question.first, "second": question.second}
        match form:
            case "plain":
                rows.append({"id": question.id, **texts, "label": "", "annotator": ""})
            case "label-studio":
                rows.append({"data": {"id": question.id, **texts}})
            case "argilla":
                rows.append({"id": question.id, "fields": texts, "metadata": {"round": question.round}})
    return rows


def read_verdicts(path: str, report: ReadReport | None = None) -> tuple[list[Verdict], list[dict[str, Any]]]:
    """Read the verdicts in a file: rows {id, label, annotator, seconds}, or an export of Label Studio or Argilla.

    `label` is first, second, tie or skip; a, A or 1 mean the first, and so on. Where a file holds the numbers 0 and 1 only, 0
    means the first and 1 the second; beside 1 and 2, 0 is a tie.

    Args:
        report: told which number means what, and which lines can't be read.

    Returns:
        the verdicts, and the rows that are none, each with its reason.

    Raises:
        UserError: the file is not there or holds no rows.
    """
    report = ReadReport(path) if report is None else report
    entries = list(_entries(list(read_rows(path, report))))
    meaning = _meanings([entry.label for entry in entries if isinstance(entry, Answered)])
    verdicts, refused = [], list[dict[str, Any]]()
    for entry in entries:
        if isinstance(entry, Unusable):
            refused.append({"row": entry.row, "reason": entry.reason} | ({} if entry.id is None else {"id": entry.id}))
        elif code_of(entry.label) not in meaning:
            reason = "no label yet" if _is_blank(entry.label) else "unknown label"
            label = {} if reason == "no label yet" else {"label": entry.label}
            refused.append({"row": entry.row, "reason": reason, "id": entry.id, **label})
        else:
            verdicts.append(Verdict(entry.id, meaning[code_of(entry.label)], entry.annotator, entry.seconds))
    if (sentence := _number_sentence(meaning)) is not None:
        report.direct("label", sentence)
    if not verdicts and not refused:
        raise UserError(f"{path}: no rows; expected lines with id, label and annotator.")
    return verdicts, refused


def _entries(rows: Sequence[NumberedRow]) -> Iterator[Entry]:
    """Yield what each annotator wrote, in any of the three forms."""
    if rows and all(isinstance(row, dict) and "annotations" in row and "data" in row for _, row in rows):
        is_named = any(result.get("from_name") == CONTROL for _, task in rows for result in _results(task))
        form: Callable[[int, Any], Iterable[Entry]] = partial(_label_studio, is_named=is_named)
    elif rows and all(isinstance(row, dict) and "responses" in row and "fields" in row for _, row in rows):
        form = _argilla
    else:
        form = _plain
    for number, row in rows:
        yield from form(number, row)


def _plain(number: int, row: object) -> Iterator[Entry]:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        yield Unusable(number, "no id")
        return
    annotator = str(row.get("annotator") or "unnamed")
    yield Answered(number, row["id"], row.get("label"), annotator, _seconds(row.get("seconds")))


def _label_studio(number: int, task: ExportedRow, *, is_named: bool) -> Iterator[Entry]:
    """Yield the annotations of a task.

    Args:
        is_named: the export has a control with our name, so that no other control is asked.
    """
    question = str(task["data"].get("id", ""))
    for annotation in task["annotations"]:
        annotator = annotation.get("completed_by", "unnamed")
        annotator = annotator.get("email", "unnamed") if isinstance(annotator, dict) else str(annotator)
        if annotation.get("was_cancelled"):
            yield Answered(number, question, "skip", annotator, _seconds(annotation.get("lead_time")))
            continue
        results = [r for r in annotation.get("result", []) if not is_named or r.get("from_name") == CONTROL]
        choices = _choices(results)
        if len({json.dumps(choice) for choice in choices}) > 1:
            yield Unusable(number, f"several choices; name the control of the preference {CONTROL!r}", question)
        else:
            label = choices[0] if choices else None
            yield Answered(number, question, label, annotator, _seconds(annotation.get("lead_time")))


def _results(task: ExportedRow) -> Iterator[ExportedRow]:
    for annotation in task["annotations"]:
        yield from annotation.get("result", [])


def _choices(results: Sequence[ExportedRow]) -> list[object]:
    """Return what was chosen at the controls of an annotation."""
    choices: list[object] = []
    for result in results:
        value = result.get("value", {})
        if value.get("selected"):
            choices.append(value["selected"])
        choices += value.get("choices") or []
    return choices


def _argilla(number: int, record: ExportedRow) -> Iterator[Entry]:
    for response in record["responses"].get(CONTROL, []):
        yield Answered(number, str(record["id"]), response.get("value"), str(response.get("user_id", "unnamed")))


def _meanings(labels: Sequence[object]) -> dict[str, str]:
    """Return what each label of a whole file means, by its code; labels that mean nothing are left out.

    A 1 without a 0 is the first, as on the labelling page; a 0 alone, or beside numbers other than 1 and 2, says nothing.
    """
    codes = {code_of(label) for label in labels if not isinstance(label, bool) and not _is_blank(label)}
    numbers = {code for code in codes if code.isdigit()}
    meaning: dict[str, str] = {code: side for code in codes if (side := named_side(code)) is not None}
    meaning |= {code: word for code, word in OTHER_WORDS.items() if code in codes}
    if numbers == {"0", "1"}:
        return meaning | {"0": "first", "1": "second"}
    numbered = numbered_sides(numbers)
    if numbered is None and "0" not in numbers:
        numbered = {"1": "first", "2": "second"}
    return meaning | {code: side for code, side in (numbered or {}).items() if code in numbers}


def _number_sentence(meaning: Mapping[str, str]) -> str | None:
    """Say what a file's numbers mean; None where it has none."""
    words = {"first": "the first is better", "second": "the second is better", "tie": "a tie"}
    numbers = sorted(code for code in meaning if code.isdigit())
    meanings = "; ".join(f"{code}: {words[meaning[code]]}" for code in numbers)
    return f"`label` holds {shown_codes(numbers)}; {meanings}" if numbers else None


def _is_blank(label: object) -> bool:
    return label is None or (isinstance(label, str) and not label.strip())


def _seconds(value: Any) -> float | None:
    try:
        return float(value)
    except (TypeError, ValueError):
        return None
