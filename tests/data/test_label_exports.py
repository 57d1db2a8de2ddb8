"""What labelling tools export comes back with the same pairs and labels."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.label_files import OTHER_ANSWERS, export_questions, read_verdicts
from rlhf.data.labels import Question, is_asked_in_this_order, tally
from rlhf.data.read import ReadReport
from rlhf.data.sources import read_pairs
from tests.data.five_questions import FIVE, control


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([control("safety", "second"), control("preference", "first")], "first"),
        ([control("preference", "second"), control("safety", "first")], "second"),
        ([control("safety", "first"), control("preference", selected="right")], "second"),
        ([control("better", "second")], "second"),
        ([control(None, "tie")], "tie"),
        ([control("rating"), control("better", "first")], "first"),
        ([control("safety", "second"), control("better", "first")], "several choices"),
        ([control("safety", "unsafe"), control("better", "first")], "several choices"),
        ([control("preference", "first", "second")], "several choices"),
        ([control("safety", "first"), control("preference")], "no label yet"),
        ([], "no label yet"),
    ],
)
def test_a_task_with_several_controls(tmp_path: Path, results: list[Any], expected: str) -> None:
    (task,) = export_questions(FIVE[:1], "label-studio")
    task["annotations"] = [{"completed_by": 7, "result": results}]
    (tmp_path / "studio.json").write_text(json.dumps([task]))
    verdicts, refused = read_verdicts(str(tmp_path / "studio.json"))
    assert [v.label for v in verdicts] + [r["reason"].split(";")[0] for r in refused] == [expected]


def test_where_one_task_names_the_control_no_other_is_asked(tmp_path: Path) -> None:
    tasks = export_questions(FIVE[:2], "label-studio")
    tasks[0]["annotations"] = [{"result": [control("safety", "first")]}]
    tasks[1]["annotations"] = [{"result": [control("safety", "first"), control("preference", "second")]}]
    (tmp_path / "studio.json").write_text(json.dumps(tasks))
    verdicts, refused = read_verdicts(str(tmp_path / "studio.json"))
    assert [(v.id, v.label) for v in verdicts] == [(FIVE[1].id, "second")]
    assert [r["reason"] for r in refused] == ["no label yet"]


def test_numbers_in_an_export_are_read_by_the_whole_file_too(tmp_path: Path) -> None:
    records = export_questions(FIVE[:2], "argilla")
    for value, record in enumerate(records):
        record["responses"] = {"preference": [{"value": value, "user_id": "u"}]}
    (tmp_path / "argilla.json").write_text(json.dumps(records))
    assert [v.label for v in read_verdicts(str(tmp_path / "argilla.json"))[0]] == ["first", "second"]


# What the tools wrote for the exported questions: label-studio-sdk 2.1.2 (`Converter`, a Pairwise control between `first` and
# `second`) and argilla 2.8.0 (`records.to_json`, `to_list(flatten=True)`), run offline on 2026-11-27, here with other texts.
def studio_task(i: int, task: dict[str, Any], side: str) -> dict[str, Any]:
    result = {
        "id": "x",
        "from_name": "preference",
        "to_name": "first,second",
        "type": "pairwise",
        "origin": "manual",
        "value": {"selected": "left" if side == "first" else "right"},
    }
    annotation = {"id": i, "completed_by": {"id": 1, "email": "a@x.org"}, "result": [result], "was_cancelled": False}
    return {
        "id": 10 + i,
        **task,
        "annotations": [annotation | {"ground_truth": False, "lead_time": 3.2}],
        "predictions": [],
    }


def studio_table(i: int, task: dict[str, Any], side: str) -> str:
    data, choice = task["data"], "left" if side == "first" else "right"
    cells = [
        i,
        "a@x.org",
        data["first"],
        data["id"],
        3.2,
        f'[{{""selected"":""{choice}""}}]',
        data["prompt"],
        data["second"],
    ]
    return ",".join(f'"{cell}"' for cell in cells)


def argilla_record(record: dict[str, Any], side: str) -> dict[str, Any]:
    responses = {"preference": [{"value": side, "user_id": "00000000-0000-0000-0000-000000000007"}]}
    return {**record, "suggestions": {}, "responses": responses, "vectors": {}, "status": "pending", "_server_id": None}


def argilla_flat(record: dict[str, Any], side: str) -> dict[str, Any]:
    other = "second" if side == "first" else "first"
    return {
        "id": record["id"],
        "status": "pending",
        **record["fields"],
        "round": 2,
        "preference.responses": [other, side],
        "preference.responses.users": ["u8", "u7"],
        "preference.responses.status": ["discarded", "submitted"],
        "preference.suggestion": None,
    }


@pytest.mark.parametrize("form", ["studio", "argilla"])
def test_an_export_of_which_a_part_is_labelled(tmp_path: Path, form: str) -> None:
    """Tasks that nobody opened stand in the file as they were exported, or with an empty list of answers."""
    if form == "studio":
        tasks = export_questions(FIVE, "label-studio")
        rows = [studio_task(0, tasks[0], "first"), *tasks[1:4], {**tasks[4], "annotations": []}]
    else:
        records = export_questions(FIVE, "argilla")
        rows = [argilla_record(records[0], "first"), *records[1:4], {**records[4], "responses": {}}]
    (tmp_path / "part.json").write_text(json.dumps(rows))
    verdicts, refused = read_verdicts(str(tmp_path / "part.json"))
    assert [(v.id, v.label) for v in verdicts] == [(FIVE[0].id, "first")]
    assert [(r["row"], r["reason"], r["id"]) for r in refused] == [
        (i + 1, "no label yet", FIVE[i].id) for i in range(1, 5)
    ]
    (tmp_path / "none.json").write_text(json.dumps(rows[1:4]))
    verdicts, refused = read_verdicts(str(tmp_path / "none.json"))
    assert (verdicts, {r["reason"] for r in refused}) == ([], {"no label yet"})


@pytest.mark.parametrize("form", ["studio", "studio table", "argilla", "argilla flat"])
def test_exports_of_the_tools_come_back_with_the_same_pairs_and_labels(tmp_path: Path, form: str) -> None:
    sides = ["first", "second", "second", "first", "second"]
    tasks, records = export_questions(FIVE, "label-studio"), export_questions(FIVE, "argilla")
    file = tmp_path / ("export.csv" if form == "studio table" else "export.json")
    if form == "studio table":
        head = "annotation_id,annotator,first,id,lead_time,preference,prompt,second"
        file.write_text(
            "\n".join([head, *(studio_table(i, t, s) for i, (t, s) in enumerate(zip(tasks, sides, strict=True)))])
        )
    elif form == "studio":
        file.write_text(json.dumps([studio_task(i, t, s) for i, (t, s) in enumerate(zip(tasks, sides, strict=True))]))
    else:
        write = argilla_record if form == "argilla" else argilla_flat
        file.write_text(json.dumps([write(record, side) for record, side in zip(records, sides, strict=True)]))
    verdicts, refused = read_verdicts(str(file))
    expected = [f"{'yes' if side == 'first' else 'no'} {i}" for i, side in enumerate(sides)]
    pairs = tally(FIVE, verdicts).rows
    assert [row["chosen"][0]["content"] for row in pairs] == expected
    assert [row["prompt"] for row in pairs] == [q.prompt for q in FIVE]
    assert refused == []
    as_data, _ = read_pairs(str(file))
    assert [row["chosen"][0]["content"] for row in as_data] == expected, "the same file as data of a recipe"


def test_label_studios_short_json_has_no_ids_of_ours(tmp_path: Path) -> None:
    row = {"id": 11, "annotation_id": 1, "preference": [{"selected": "left"}], "annotator": "a", "first": "yes"}
    (tmp_path / "min.json").write_text(json.dumps([row]))
    verdicts, refused = read_verdicts(str(tmp_path / "min.json"))
    assert verdicts == []
    assert "JSON-MIN puts its own in its place; export as JSON" in refused[0]["reason"]


def as_other_folder(question: Question) -> Question:
    """The question of another folder: of the same id, with the other answer first."""
    return question.as_shown(first=question.second)


@pytest.mark.fault("direction of labels")
@pytest.mark.parametrize("form", ["plain", "studio", "studio table", "argilla", "argilla flat"])
def test_a_verdict_means_the_answer_that_its_row_shows(tmp_path: Path, form: str) -> None:
    """Annotators saw the pairs of another folder; of two questions the sides are the other way round there."""
    sides = ["first", "second", "second", "first", "tie"]
    there = [as_other_folder(q) if number in (1, 3, 4) else q for number, q in enumerate(FIVE)]
    tasks, records = export_questions(there, "label-studio"), export_questions(there, "argilla")
    tasks[0]["data"]["first"] += " \r\n"  # spaces and ends of lines are a tool's business
    file = tmp_path / ("export.csv" if form == "studio table" else "export.json")
    pairs: Any = list(zip(tasks if "studio" in form else records, sides, strict=True))
    if form == "plain":
        rows: Any = [
            {**r, "label": s, "annotator": "a"} for r, s in zip(export_questions(there, "plain"), sides, strict=True)
        ]
    elif form == "studio table":
        head = "annotation_id,annotator,first,id,lead_time,preference,prompt,second"
        file.write_text("\n".join([head, *(studio_table(i, t, s) for i, (t, s) in enumerate(pairs))]), newline="")
    elif form == "studio":
        rows = [studio_task(i, t, s) for i, (t, s) in enumerate(pairs)]
    else:
        rows = [(argilla_record if form == "argilla" else argilla_flat)(r, s) for r, s in pairs]
    if form != "studio table":
        file.write_text(json.dumps(rows))
    report = ReadReport(str(file))
    verdicts, refused = read_verdicts(str(file), report, {q.id: q for q in FIVE})
    assert refused == []
    without_ties = 4 if form.startswith("studio") else 5  # the two sides are all that such a control has
    expected = ["first", "first", "second", "second", "tie"]
    labels = [v.label for v in verdicts if v.label != "skip"]  # Argilla's flat export has one that was discarded, too
    assert labels[:without_ties] == expected[:without_ties]
    assert sum(report.noted.values()) == (3 if form.startswith("studio") else 2)


def test_a_row_that_shows_other_answers_says_nothing(tmp_path: Path) -> None:
    rows = [{**row, "label": "first", "annotator": "a"} for row in export_questions(FIVE[:3], "plain")]
    rows[1]["second"] = "perhaps"
    del rows[2]["first"], rows[2]["second"]
    (tmp_path / "in.json").write_text(json.dumps(rows))
    verdicts, refused = read_verdicts(str(tmp_path / "in.json"), asked={q.id: q for q in FIVE})
    assert [v.id for v in verdicts] == [FIVE[0].id, FIVE[2].id], "without texts it goes by the id"
    assert [(row["row"], row["reason"]) for row in refused] == [(2, OTHER_ANSWERS)]


def test_the_first_answer_is_drawn_by_the_question() -> None:
    drawn = [is_asked_in_this_order(f"q{i}", "yes", "no") for i in range(400)]
    assert all(is_asked_in_this_order(f"q{i}", "no", "yes") != one for i, one in enumerate(drawn))
    assert 160 < sum(drawn) < 240, "200 and four deviations of 10"
