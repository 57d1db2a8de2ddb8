"""Two answers that people compared in Label Studio or Argilla, as these tools export them today.

Every annotator has one vote, a tie being half a vote for each answer. The better answer is that of the majority; where not
all agree, `confidence` is its share of the votes, as in `rlhf.data.labels.tally`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf.data.label_files import (
    CONTROL,
    OTHER_WORDS,
    UNNAMED,
    Answered,
    Entry,
    is_control_named,
    is_record,
    is_short_task,
    is_task,
    name_of,
    record_entries,
    short_label,
    task_entries,
)
from rlhf.data.layouts.layout import Comparison, Layout
from rlhf.data.read import BadRow
from rlhf.data.sides import Side, code_of, is_tie, named_side

PROMPTS = ("prompt", "question", "instruction", "input", "query", "context")


def task_comparison(task: Mapping[str, Any], label: str) -> Comparison:
    """Return what the annotators of a Label Studio task say; `left` and `right` are the names of the control's `toName`."""
    data = task["data"]
    names = _compared(task, data) or _answer_names(data)
    return _comparison(data, names, task_entries(0, task, is_named=is_control_named(task)))


def short_task_comparison(row: Mapping[str, Any], label: str) -> Comparison:
    """Return what the annotator of a row of Label Studio's JSON-MIN, CSV or TSV says."""
    fields = {name: value for name, value in row.items() if name != CONTROL}
    entry = Answered(0, "", short_label(row), name_of(row.get("annotator")))
    return _comparison(fields, _answer_names(fields), [entry])


def record_comparison(record: Mapping[str, Any], label: str) -> Comparison:
    """Return what the annotators of an Argilla record say: a label, or a ranking of its two answers."""
    fields = record.get("fields", record)
    return _comparison(fields, _answer_names(fields), record_entries(0, record))


def _comparison(fields: Mapping[str, Any], names: tuple[str, str], entries: Iterable[Entry]) -> Comparison:
    prompt = next((fields[name] for name in PROMPTS if fields.get(name)), None)
    if prompt is None:
        raise BadRow(f"no prompt ({', '.join(PROMPTS)})")
    votes = _votes(entries, names)
    if not votes:
        raise BadRow("nobody has labelled it yet")
    share = sum({"first": 1.0, "tie": 0.5, "second": 0.0}[side] for side in votes.values()) / len(votes)
    better: Side = "first" if share > 0.5 else "second" if share < 0.5 else "tie"
    beside: dict[str, object] = {"annotator": ", ".join(sorted(votes))}
    if 0 < share < 1:
        beside["confidence"] = max(share, 1 - share)
    first, second = (fields[name] for name in names)
    return Comparison(prompt, first, second, better, (CONTROL, better), beside)


def _votes(entries: Iterable[Entry], names: Sequence[str]) -> dict[str, Side]:
    """Return each annotator's last vote; those without a name are taken for different people, each with a number."""
    votes: dict[str, Side] = {}
    unnamed: list[Side] = []
    for entry in entries:
        if not isinstance(entry, Answered):
            raise BadRow(entry.reason)
        side = _side(entry.label, names)
        if side is not None and entry.annotator == UNNAMED:
            unnamed.append(side)
        elif side is not None:
            votes[entry.annotator] = side
    if len(unnamed) == 1:
        return votes | {UNNAMED: unnamed[0]}
    return votes | {f"{UNNAMED} {number}": side for number, side in enumerate(unnamed, start=1)}


def _side(label: object, names: Sequence[str]) -> Side | None:
    """Return which answer an annotator's label calls better; None where there is no label, or it was skipped.

    Raises:
        BadRow: the label names no side.
    """
    if isinstance(label, list) and all(isinstance(entry, Mapping) for entry in label):
        ranks = {entry.get("value"): entry.get("rank") for entry in label}
        places = [place for name in names if isinstance(place := ranks.get(name), int)]
        if len(places) != 2:
            raise BadRow(f"a ranking that does not name {names[0]} and {names[1]}")
        return "tie" if places[0] == places[1] else "first" if places[0] < places[1] else "second"
    code = code_of(label)
    if label is None or not code or OTHER_WORDS.get(code) == "skip":
        return None
    if code in names:
        return "first" if code == names[0] else "second"
    side = named_side(code)
    if side is None and not (is_tie(label) or OTHER_WORDS.get(code) == "tie"):
        raise BadRow(f"the label {label!r} names neither answer")
    return side or "tie"


def _compared(task: Mapping[str, Any], data: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the two names of a pairwise control's `toName`, if they are those of the task's data too."""
    for annotation in task["annotations"]:
        for result in annotation.get("result") or []:
            names = str(result.get("to_name", "")).replace(" ", "").split(",")
            if result.get("type") == "pairwise" and len(names) == 2 and all(name in data for name in names):
                return names[0], names[1]
    return None


def _answer_names(fields: Mapping[str, Any]) -> tuple[str, str]:
    sides = {side: [name for name in fields if named_side(name) == side] for side in ("first", "second")}
    if any(len(names) != 1 for names in sides.values()):
        raise BadRow("which two fields hold the answers is not clear; name them, such as first and second")
    return sides["first"][0], sides["second"][0]


ANNOTATED = (
    Layout(
        "Label Studio",
        "`data` with a prompt and two answers, and `annotations` (Pairwise or Choices), from the JSON export",
        matches=is_task,
        compares=task_comparison,
    ),
    Layout(
        "Label Studio, short",
        "`annotation_id` and `preference` beside a prompt and two answers, from the JSON-MIN, CSV and TSV exports",
        matches=is_short_task,
        compares=short_task_comparison,
    ),
    Layout(
        "Argilla",
        "`fields` with a prompt and two answers, and `responses` to the question `preference` (a label or a ranking); or flat",
        matches=is_record,
        compares=record_comparison,
    ),
)
