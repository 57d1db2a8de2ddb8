"""Questions and verdicts as files: plain rows, and the JSON of Label Studio and Argilla for people who label there."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from rlhf.data.labels import Question, Verdict
from rlhf.data.read import ReadReport, read_rows
from rlhf.errors import UserError

Format = Literal["plain", "label-studio", "argilla"]
ExportedRow = Mapping[str, Any]  # foreign JSON: a task of Label Studio, a record of Argilla
NumberedRow = tuple[int, Any]  # a row as it was read, with its number
# What people write for the four verdicts.
SPELLINGS = {
    "first": ("first", "a", "1", "left"),
    "second": ("second", "b", "2", "right"),
    "tie": ("tie", "c", "=", "equal"),
    "skip": ("skip",),
}
LABELS = {word: verdict for verdict, words in SPELLINGS.items() for word in words}


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


def read_verdicts(path: str) -> tuple[list[Verdict], list[dict[str, Any]]]:
    """Read the verdicts in a file: rows {id, label, annotator, seconds}, or an export of Label Studio or Argilla.

    `label` is first, second, tie or skip; a, A or 1 mean the first, and so on.

    Returns:
        the verdicts, and the rows that are none, each with its reason.

    Raises:
        UserError: the file is not there or holds no rows.
    """
    rows = list(read_rows(path, ReadReport(path)))
    exported = exported_verdicts(rows)
    if exported is not None:
        return exported
    verdicts, refused = [], []
    for number, row in rows:
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            refused.append({"row": number, "reason": "no id"})
            continue
        word = str(row.get("label") or "").strip().lower()
        if not word:
            refused.append({"row": number, "reason": "no label yet", "id": row["id"]})
        elif word not in LABELS:
            refused.append({"row": number, "reason": "unknown label", "id": row["id"], "label": row["label"]})
        else:
            seconds = row.get("seconds")
            annotator = str(row.get("annotator") or "unnamed")
            verdicts.append(
                Verdict(row["id"], LABELS[word], annotator, float(seconds) if seconds is not None else None)
            )
    if not verdicts and not refused:
        raise UserError(f"{path}: no rows; expected lines with id, label and annotator.")
    return verdicts, refused


def exported_verdicts(rows: Sequence[NumberedRow]) -> tuple[list[Verdict], list[dict[str, Any]]] | None:
    """Read the verdicts in an export of Label Studio or Argilla; return None where the rows are of neither kind.

    Returns:
        the verdicts, and what is none, each with its row and reason.
    """
    if rows and all(isinstance(row, dict) and "annotations" in row and "data" in row for _, row in rows):
        return _collect(rows, _label_studio)
    if rows and all(isinstance(row, dict) and "responses" in row and "fields" in row for _, row in rows):
        return _collect(rows, _argilla)
    return None


def _collect(
    rows: Sequence[NumberedRow], read: Callable[[Any], Iterable[Verdict | str]]
) -> tuple[list[Verdict], list[dict[str, Any]]]:
    verdicts: list[Verdict] = []
    refused: list[dict[str, Any]] = []
    for number, row in rows:
        for verdict in read(row):
            if isinstance(verdict, Verdict):
                verdicts.append(verdict)
            else:
                refused.append({"row": number, "reason": verdict})
    return verdicts, refused


def _label_studio(task: ExportedRow) -> Iterable[Verdict | str]:
    question = str(task["data"].get("id", ""))
    for annotation in task["annotations"]:
        if annotation.get("was_cancelled"):
            label: str | None = "skip"
        else:
            values = [result.get("value", {}) for result in annotation.get("result", [])]
            chosen = [v.get("selected") or (v.get("choices") or [None])[0] for v in values]
            word = str(chosen[0]).lower() if chosen and chosen[0] else ""
            label = LABELS.get(word)
        annotator = annotation.get("completed_by", "unnamed")
        annotator = annotator.get("email", "unnamed") if isinstance(annotator, dict) else str(annotator)
        yield Verdict(question, label, annotator, annotation.get("lead_time")) if label else "unknown label"


def _argilla(record: ExportedRow) -> Iterable[Verdict | str]:
    for response in record["responses"].get("preference", []):
        label = LABELS.get(str(response.get("value", "")).lower())
        annotator = str(response.get("user_id", "unnamed"))
        yield Verdict(str(record["id"]), label, annotator) if label else "unknown label"
