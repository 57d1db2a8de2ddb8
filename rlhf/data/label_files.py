"""Questions and verdicts as files: plain rows, and the JSON of Label Studio and Argilla for people who label there."""

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

from rlhf.data.labels import Question, Verdict
from rlhf.data.read import ReadReport, read_rows
from rlhf.data.sides import code_of, named_side, number_of, numbered_sides, shown_codes
from rlhf.errors import UserError

Format = Literal["plain", "label-studio", "argilla"]
ExportedRow = Mapping[str, Any]  # foreign JSON: a task of Label Studio, a record of Argilla
NumberedRow = tuple[int, Any]  # a row as it was read, with its number
CONTROL = "preference"  # the question's name in what is exported for Label Studio and Argilla
UNNAMED = "unnamed"  # whoever left no name
LONGEST_NAME = 200  # characters of an annotator's name
LONGEST_SECONDS = 86_400.0  # a day: nobody looks longer at one pair
# What people write for no side; `rlhf.data.sides` has the words for the first and the second.
OTHER_SIDE = {"first": "second", "second": "first"}
OTHER_ANSWERS = "its `first` and `second` are not the answers that were asked about; without them it goes by its id"
NOT_ASKED: Mapping[str, Question] = {}
OTHER_WORDS = {"tie": "tie", "c": "tie", "=": "tie", "equal": "tie", "skip": "skip"}


class Answered(NamedTuple):
    """What an annotator wrote about a question, before anybody knows what it means in its file.

    Attributes:
        row: of the file.
        label: as it stands there; None where there is none.
        shown: the first and the second answer as the row has them; None where it has none.
    """

    row: int
    id: str
    label: object
    annotator: str
    seconds: float | None = None
    shown: tuple[str, str] | None = None


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


def read_verdicts(
    path: str, report: ReadReport | None = None, asked: Mapping[str, Question] = NOT_ASKED
) -> tuple[list[Verdict], list[dict[str, Any]]]:
    """Read the verdicts in a file: rows {id, label, annotator, seconds}, or an export of Label Studio or Argilla.

    `label` is first, second, tie or skip; a or A means the first, and so on. Where a file holds the numbers 0 and 1, 0 means the
    first and 1 the second; 1 beside 2 means the first, and 0 beside them a tie. Other numbers, and a 0 or a 1 alone, are no label.

    Of one annotator's verdicts on a question the last one counts, and a skip never does beside another verdict. Several verdicts
    on a question without an annotator's name may be one person's or several people's: none of them counts.

    Of Label Studio: its JSON, or with our ids its CSV and TSV. Of Argilla: `to_json`, `to_list`, or a data set of `to_datasets`.

    Args:
        report: told which number means what, which lines can't be read, and which verdicts were turned.
        asked: the questions by their ids. A pair has the same id in every folder and not always the same answer first, so a row
            that shows the answers the other way round has its verdict turned, and one that shows other answers has none.

    Returns:
        the verdicts, and the rows that are none, each with its reason.

    Raises:
        UserError: the file is not there or holds no rows.
    """
    report = ReadReport(path) if report is None else report
    entries = [_readable(entry) for entry in _entries(list(read_rows(path, report)))]
    labels = [entry.label for entry in entries if isinstance(entry, Answered)]
    meaning, numbers = _meanings(labels), _numbers(labels)
    decided, refused = list[tuple[int, Verdict]](), list[dict[str, Any]]()
    for entry in entries:
        if isinstance(entry, Unusable):
            refused.append({"row": entry.row, "reason": entry.reason} | ({} if entry.id is None else {"id": entry.id}))
        elif _is_blank(entry.label):
            refused.append({"row": entry.row, "reason": "no label yet", "id": entry.id})
        elif code_of(entry.label) not in meaning:
            reason = _unknown(entry.label, numbers)
            refused.append({"row": entry.row, "reason": reason, "id": entry.id, "label": entry.label})
        elif (turned := _is_turned(entry, asked.get(entry.id))) is None:
            refused.append({"row": entry.row, "reason": OTHER_ANSWERS, "id": entry.id, "label": entry.label})
        else:
            label = meaning[code_of(entry.label)]
            if turned and label in OTHER_SIDE:
                label = OTHER_SIDE[label]
                report.note(entry.row, "shows the two answers the other way round, and is read so")
            decided.append((entry.row, Verdict(entry.id, label, entry.annotator, entry.seconds)))
    verdicts, replaced = _one_each(decided)
    refused += replaced
    if (sentence := _number_sentence(meaning)) is not None:
        report.direct("label", sentence)
    if not verdicts and not refused:
        raise UserError(f"{path}: no rows; expected lines with id, label and annotator.")
    return verdicts, refused


def _entries(rows: Sequence[NumberedRow]) -> Iterator[Entry]:
    """Yield what each annotator wrote, in any of the forms; a task or record that nobody answered has no label yet."""
    form: Callable[[int, Any], Iterable[Entry]]
    begun = [row for _, row in rows if not is_untouched(row)]
    if begun and all(is_task(row) for row in begun):
        form = partial(task_entries, is_named=any(is_control_named(task) for task in begun))
    elif begun and all(is_record(row) for row in begun):
        form = record_entries
    elif begun and all(is_short_task(row) for row in begun):
        form = short_task_entries
    else:
        form = _plain
    for number, row in rows:
        try:
            entries, shown = [] if is_untouched(row) else list(form(number, row)), _shown(row)
        except (AttributeError, KeyError, TypeError, ValueError):  # foreign JSON: anything may stand anywhere
            yield Unusable(number, "not as its tool writes it")
        else:
            if not entries:
                yield Answered(number, _question_of(row), None, UNNAMED)
            yield from (e._replace(shown=shown) if isinstance(e, Answered) else e for e in entries)


def _shown(row: Any) -> tuple[str, str] | None:
    """Return the first and the second answer of a row in any of the forms; None where it does not have both."""
    holders = (row, row.get("data"), row.get("fields")) if isinstance(row, dict) else ()
    for holder in holders:
        if isinstance(holder, dict):
            first, second = holder.get("first"), holder.get("second")
            if isinstance(first, str) and isinstance(second, str):
                return first, second
    return None


def _is_turned(entry: Answered, question: Question | None) -> bool | None:
    """Tell whether a row shows the answers of its question the other way round; None: it shows others.

    Tools change spaces and ends of lines, so these don't count.
    """
    if question is None or entry.shown is None:
        return False
    shown, asked = (
        tuple(" ".join(text.split()) for text in texts) for texts in (entry.shown, (question.first, question.second))
    )
    return False if shown == asked else True if shown == asked[::-1] else None


def _readable(entry: Entry) -> Entry:
    """Return what an annotator wrote, or why a book can't hold it."""
    if isinstance(entry, Unusable):
        return entry
    if not entry.id:
        return Unusable(entry.row, "no id")
    if not _is_text(entry.id) or not _is_text(entry.annotator):
        return Unusable(entry.row, "its id or its annotator is no text")
    if len(entry.annotator) > LONGEST_NAME:
        return Unusable(entry.row, f"the annotator's name is longer than {LONGEST_NAME} characters", entry.id)
    return entry


def _one_each(decided: Sequence[tuple[int, Verdict]]) -> tuple[list[Verdict], list[dict[str, Any]]]:
    """Return one verdict of every annotator on a question, and the rows of the others, each with its reason."""
    given: dict[tuple[str, str], list[tuple[int, Verdict]]] = {}
    for row, verdict in decided:
        given.setdefault((verdict.id, verdict.annotator), []).append((row, verdict))
    verdicts, replaced = list[Verdict](), list[dict[str, Any]]()
    for (_, annotator), rows in given.items():
        votes = [one for one in rows if one[1].label != "skip"]
        if annotator == UNNAMED and len(votes) > 1:
            last, reason = None, "without a name beside another one on the same pair (fill in `annotator`)"
        else:
            last, reason = (votes or rows)[-1], "superseded by another verdict of the same annotator"
            verdicts.append(last[1])
        others = (one for one in rows if one is not last)
        replaced += [{"row": row, "reason": reason, "id": v.id, "label": v.label} for row, v in others]
    return verdicts, replaced


def _is_text(value: str) -> bool:
    """Return whether a text can be written: JSON may hold halves of characters."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _plain(number: int, row: object) -> Iterator[Entry]:
    if not isinstance(row, dict) or not isinstance(row.get("id"), str):
        yield Unusable(number, "no id")
        return
    yield Answered(number, row["id"], row.get("label"), name_of(row.get("annotator")), _seconds(row.get("seconds")))


def name_of(annotator: object) -> str:
    """Return an annotator's name as it is kept: a text, `UNNAMED` where there is none."""
    return UNNAMED if _is_blank(annotator) else str(annotator)


def is_task(row: object) -> bool:
    """Return whether a row is a task of Label Studio's JSON export."""
    return isinstance(row, dict) and isinstance(row.get("annotations"), list) and isinstance(row.get("data"), dict)


def is_untouched(row: object) -> bool:
    """Return whether a row is a task or a record as `export_questions` wrote it, to which no tool added anything yet.

    >>> is_untouched({"data": {"id": "7"}}), is_untouched({"data": {"id": "7"}, "annotations": []})
    (True, False)
    """
    if not isinstance(row, dict) or "label" in row:
        return False
    is_open_task = isinstance(row.get("data"), dict) and "annotations" not in row
    return is_open_task or (isinstance(row.get("fields"), dict) and "responses" not in row)


def _question_of(row: Mapping[str, Any]) -> str:
    """Return the id of the question that a task or a record shows; empty where it has none."""
    question = (row["data"] if isinstance(row.get("data"), dict) else row).get("id")
    return "" if question is None else str(question)


def is_control_named(task: ExportedRow) -> bool:
    """Return whether a task has a control with our name, so that no other control is asked."""
    annotations = [annotation for annotation in task["annotations"] if isinstance(annotation, dict)]
    results = [annotation["result"] for annotation in annotations if isinstance(annotation.get("result"), list)]
    return any(isinstance(r, dict) and r.get("from_name") == CONTROL for of_one in results for r in of_one)


def task_entries(number: int, task: ExportedRow, *, is_named: bool) -> Iterator[Entry]:
    """Yield the annotations of a task.

    Args:
        is_named: only the control with our name is asked.
    """
    question = str(task["data"].get("id", ""))
    for annotation in task["annotations"]:
        person = annotation.get("completed_by")
        annotator = name_of((person.get("email") or person.get("id")) if isinstance(person, dict) else person)
        if annotation.get("was_cancelled"):
            yield Answered(number, question, "skip", annotator, _seconds(annotation.get("lead_time")))
            continue
        results = [r for r in annotation.get("result") or [] if not is_named or r.get("from_name") == CONTROL]
        choices = [choice for result in results for choice in _choices(result.get("value", {}))]
        if len({json.dumps(choice) for choice in choices}) > 1:
            yield Unusable(number, f"several choices; name the control of the preference {CONTROL!r}", question)
        else:
            label = choices[0] if choices else None
            yield Answered(number, question, label, annotator, _seconds(annotation.get("lead_time")))


def is_short_task(row: object) -> bool:
    """Return whether a row is an annotation of Label Studio's JSON-MIN, CSV or TSV export."""
    return isinstance(row, dict) and "annotation_id" in row and CONTROL in row


def short_task_entries(number: int, row: ExportedRow) -> Iterator[Entry]:
    """Yield the one annotation of a row; its `id` is the question's in CSV and TSV, and Label Studio's own in JSON-MIN."""
    if not isinstance(row.get("id"), str):
        yield Unusable(number, "no id of ours: Label Studio's JSON-MIN puts its own in its place; export as JSON")
        return
    label = short_label(row)
    yield Answered(number, row["id"], label, name_of(row.get("annotator")), _seconds(row.get("lead_time")))


def short_label(row: ExportedRow) -> object:
    """Return what was chosen in a row of Label Studio's short exports: a word, or `[{"selected": …}]`, in a table as JSON."""
    value = row[CONTROL]
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = json.loads(value)
        except ValueError:
            return value
    values = value if isinstance(value, list) else [value]
    choices = [choice for entry in values for choice in (_choices(entry) if isinstance(entry, dict) else [entry])]
    return choices[0] if len(choices) == 1 else None


def _choices(value: Mapping[str, Any]) -> list[object]:
    """Return what was chosen at a control: one side (pairwise), or choices."""
    chosen = [value["selected"]] if value.get("selected") else []
    choices = value.get("choices") or []
    if not isinstance(choices, list):
        raise TypeError(choices)
    return [*chosen, *choices]


def is_record(row: object) -> bool:
    """Return whether a row is a record of Argilla: nested (`to_json`, `to_list`), or flat (`to_list(flatten=True)`, a data set).

    >>> is_record({"fields": {}, "responses": []}), is_record({"fields": "maths", "responses": ["yes", "no"]})
    (True, False)
    """
    if not isinstance(row, dict):
        return False
    return ("responses" in row and isinstance(row.get("fields"), dict)) or f"{CONTROL}.responses" in row


def record_entries(number: int, record: ExportedRow) -> Iterator[Entry]:
    """Yield the responses to a record's question of our name; of a flat record, which says so, those that were submitted."""
    question = "" if record.get("id") is None else str(record["id"])
    if "fields" in record:
        responses = record["responses"] or {}
        if isinstance(responses, list):  # Argilla 1: a response a person, to all questions
            for response in responses:
                label = ((response.get("values") or {}).get(CONTROL) or {}).get("value")
                is_given = response.get("status", "submitted") == "submitted"
                yield Answered(number, question, label if is_given else "skip", name_of(response.get("user_id")))
            return
        for response in responses.get(CONTROL) or []:
            yield Answered(number, question, response.get("value"), name_of(response.get("user_id")))
        return
    labels = record[f"{CONTROL}.responses"] or []
    users = record.get(f"{CONTROL}.responses.users") or [None] * len(labels)
    states = record.get(f"{CONTROL}.responses.status") or ["submitted"] * len(labels)
    for label, user, state in zip(labels, users, states, strict=True):
        yield Answered(number, question, label if state == "submitted" else "skip", name_of(user))


def _meanings(labels: Sequence[object]) -> dict[str, str]:
    """Return what each label of a whole file means, by its code; labels that mean nothing are left out.

    A 0 or a 1 alone says nothing, for nobody knows whether the file counts from 0 or from 1. Neither does any number of a file
    that holds others too, such as -1 or 0.5: its codes may mean anything.
    """
    codes, numbers = _codes(labels), _numbers(labels)
    meaning: dict[str, str] = {code: side for code in codes if (side := named_side(code)) is not None}
    meaning |= {code: word for code, word in OTHER_WORDS.items() if code in codes}
    if numbers == {"0", "1"}:
        return meaning | {"0": "first", "1": "second"}
    return meaning | (numbered_sides(numbers) or {})


def _codes(labels: Iterable[object]) -> set[str]:
    return {code_of(label) for label in labels if not isinstance(label, bool) and not _is_blank(label)}


def _numbers(labels: Iterable[object]) -> set[str]:
    """Return the numbers among the labels of a file, as codes."""
    return {code for code in _codes(labels) if number_of(code) is not None}


def _unknown(label: object, numbers: Collection[str]) -> str:
    """Say why a label means nothing in a file that holds these numbers."""
    if isinstance(label, bool) or code_of(label) not in numbers:
        return "unknown label"
    return f"unknown number (`label` holds {shown_codes(numbers)}: write first, second or tie)"


def _number_sentence(meaning: Mapping[str, str]) -> str | None:
    """Say what a file's numbers mean; None where it has none."""
    words = {"first": "the first is better", "second": "the second is better", "tie": "a tie"}
    numbers = sorted(code for code in meaning if code.isdigit())
    meanings = "; ".join(f"{code}: {words[meaning[code]]}" for code in numbers)
    return f"`label` holds {shown_codes(numbers)}; {meanings}" if numbers else None


def _is_blank(label: object) -> bool:
    return label is None or (isinstance(label, str) and not label.strip())


def _seconds(value: Any) -> float | None:
    """Return a time that somebody can have taken, or None."""
    try:
        seconds = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return seconds if math.isfinite(seconds) and 0 <= seconds <= LONGEST_SECONDS else None
