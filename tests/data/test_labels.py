"""Verdicts become pairs: every way in which a label file can be wrong is counted, and nothing counts twice."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from sklearn.metrics import cohen_kappa_score

from rlhf.data.label_files import UNNAMED, export_questions, read_verdicts
from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Verdict, agreement, tally
from rlhf.data.read import ReadReport
from rlhf.errors import UserError
from rlhf.serve.desk import OTHER_UNNAMED, import_from
from tests.data.five_questions import FIVE, control, question


def test_pairs_say_what_annotators_said() -> None:
    a, b, c, d, e = (q.id for q in FIVE)
    verdicts = [
        Verdict(a, "first", "ann"), Verdict(a, "first", "bob"),
        Verdict(b, "second", "ann"),
        Verdict(c, "tie", "ann"),
        Verdict(d, "first", "ann"), Verdict(d, "second", "bob"), Verdict(d, "second", "cy"),
        Verdict(e, "skip", "ann"),
    ]  # fmt: skip
    found = tally(FIVE, verdicts)
    assert [(row["chosen"][0]["content"], row.get("confidence")) for row in found.rows] == [
        ("yes 0", None), ("no 1", None), ("yes 2", 0.5), ("no 3", pytest.approx(2 / 3)),
    ]  # fmt: skip
    assert found.rows[3]["annotator"] == "ann, bob, cy"
    expected = {"labelled": 4, "skipped": 1, "unlabelled": 0, "tied": 1, "contested": 1, "verdicts": 8, "superseded": 0}
    assert found.counts == expected


def test_annotators_who_say_how_sure_they_are_are_believed() -> None:
    a, b, c = (q.id for q in FIVE[:3])
    verdicts = [
        Verdict(a, "first", "m", confidence=0.8),
        Verdict(b, "second", "m", confidence=0.7), Verdict(b, "first", "ann"),
        Verdict(c, "second", "m", confidence=0.9), Verdict(c, "tie", "ann"),
    ]  # fmt: skip
    found = tally(FIVE, verdicts)
    assert [(row["chosen"][0]["content"], row.get("confidence")) for row in found.rows] == [
        ("yes 0", 0.8), ("yes 1", pytest.approx(0.65)), ("no 2", pytest.approx(0.7)),
    ]  # fmt: skip


@pytest.mark.fault("labels of a round")
def test_what_cannot_count_is_put_aside_with_its_reason() -> None:
    old = question(0, round_number=1)
    verdicts = [
        Verdict(FIVE[0].id, "first", "ann"),
        Verdict(FIVE[0].id, "second", "ann"),  # changed her mind: the last word counts
        Verdict(old.id, "first", "ann"),
        Verdict("r2-0000000000000000", "first", "ann"),
        Verdict("nonsense", "first", "bob"),
    ]
    found = tally(FIVE, verdicts)
    assert [row["chosen"][0]["content"] for row in found.rows] == ["no 0"]
    assert found.counts["quarantined: of another round"] == 1
    assert found.counts["quarantined: unknown id"] == 2
    assert found.counts["superseded"] == 1
    assert found.counts["unlabelled"] == 4
    assert [row["reason"] for row in found.quarantine] == ["of another round", "unknown id", "unknown id"]
    assert tally(FIVE, []).rows == []


def test_kappa_is_scikit_learns() -> None:
    mine = ["first", "first", "second", "tie", "second", "first", "tie", "second"]
    theirs = ["first", "second", "second", "tie", "first", "first", "first", "second"]
    verdicts = [Verdict(str(i), label, "a") for i, label in enumerate(mine)]
    verdicts += [Verdict(str(i), label, "b") for i, label in enumerate(theirs)]
    verdicts += [Verdict("x", "skip", "a"), Verdict("x", "first", "b")]
    (pair,) = agreement(verdicts)["pairs"]
    assert pair["kappa"] == pytest.approx(cohen_kappa_score(mine, theirs))
    assert pair["questions"] == 8
    same = [Verdict("1", "first", name) for name in "ab"]
    assert agreement(same)["pairs"][0]["kappa"] is None, "chance explains everything"


def test_files_of_three_forms_come_back(tmp_path: Path) -> None:
    file = tmp_path / "labels.jsonl"
    plain: list[dict[str, Any]] = export_questions(FIVE, "plain")
    assert set(plain[0]) == {"id", "prompt", "first", "second", "label", "annotator"}, "blind: no score, no source"
    plain[0] |= {"label": "A", "annotator": "ann"}
    plain[1] |= {"label": "right"}
    plain[2] |= {"label": "both"}
    file.write_text("".join(json.dumps(row) + "\n" for row in plain) + '{"label": "A"}\n')
    verdicts, refused = read_verdicts(str(file))
    assert [(v.id, v.label, v.annotator) for v in verdicts] == [
        (FIVE[0].id, "first", "ann"),
        (FIVE[1].id, "second", "unnamed"),
    ]
    assert [row["reason"] for row in refused] == ["unknown label", "no label yet", "no label yet", "no id"]

    tasks = export_questions(FIVE[:2], "label-studio")
    tasks[0]["annotations"] = [
        {"completed_by": 7, "lead_time": 4.2, "result": [{"type": "pairwise", "value": {"selected": "right"}}]},
        {"completed_by": {"email": "b@x.org"}, "result": [{"type": "choices", "value": {"choices": ["tie"]}}]},
    ]
    tasks[1]["annotations"] = [{"completed_by": 7, "was_cancelled": True, "result": []}]
    studio = tmp_path / "studio.json"
    studio.write_text(json.dumps(tasks))
    verdicts, refused = read_verdicts(str(studio))
    assert verdicts == [
        Verdict(FIVE[0].id, "second", "7", 4.2),
        Verdict(FIVE[0].id, "tie", "b@x.org"),
        Verdict(FIVE[1].id, "skip", "7"),
    ]
    assert refused == []

    records = export_questions(FIVE[:1], "argilla")
    records[0]["responses"] = {"preference": [{"value": "first", "user_id": "u1"}, {"value": "?", "user_id": "u2"}]}
    argilla = tmp_path / "argilla.json"
    argilla.write_text(json.dumps(records))
    verdicts, refused = read_verdicts(str(argilla))
    assert verdicts == [Verdict(FIVE[0].id, "first", "u1")]
    assert [row["reason"] for row in refused] == ["unknown label"]
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(UserError, match="no rows"):
        read_verdicts(str(tmp_path / "empty.jsonl"))


def labelled(folder: Path, labels: Sequence[Any]) -> tuple[list[str], list[str], list[str]]:
    """Write a label a question, and return the verdicts by question, the reasons of what is none, and what is said."""
    rows = [{"id": f"q{i}", "label": label, "annotator": "a"} for i, label in enumerate(labels)]
    (folder / "labels.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = ReadReport("labels")
    verdicts, refused = read_verdicts(str(folder / "labels.jsonl"), report)
    assert len(verdicts) + len(refused) == len(labels)
    by_id = {v.id: v.label for v in verdicts}
    return (
        [by_id.get(f"q{i}", "-") for i in range(len(labels))],
        [r["reason"] for r in refused],
        list(report.directions.values()),
    )


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0, 1, 0, 1], "first second first second"),
        (["0", "1", "0"], "first second first"),
        ([0.0, 1.0, None], "first second -"),
        ([0, 1, "tie", "skip"], "first second tie skip"),
        ([1, 2, 1], "first second first"),
        (["1", "2", "="], "first second tie"),
        ([1, 2, 0], "first second tie"),
        ([2, 0], "second tie"),
        ([1, 1], "- -"),
        ([1, "skip", "first"], "- skip first"),
        ([2, 1, 3], "- - -"),
        ([-1, 0, 1, 1, -1], "- - - - -"),
        ([0, 0.5, 1], "- - -"),
        (["1", "-1", "first"], "- - first"),
        ([0, 0], "- -"),
        ([0, 1, 3], "- - -"),
        ([True, False], "- -"),
        (["A", "b", "c"], "first second tie"),
        (["left", "RIGHT", "equal", ""], "first second tie -"),
        (["response_1", "model_b", "First "], "first second first"),
        (["both", "?"], "- -"),
    ],
    ids=str,
)
def test_labels_are_read_by_the_whole_file(tmp_path: Path, labels: list[Any], expected: str) -> None:
    verdicts, reasons, _ = labelled(tmp_path, labels)
    assert verdicts == expected.split()
    blank = sum(label is None or label == "" for label in labels)
    assert reasons.count("no label yet") == blank
    assert sum(reason.startswith(("unknown label", "unknown number")) for reason in reasons) == len(reasons) - blank


def test_numbers_that_may_mean_anything_are_shown_with_what_to_write(tmp_path: Path) -> None:
    _, reasons, said = labelled(tmp_path, [-1, 0, 1, "perhaps"])
    sentence = "unknown number (`label` holds {-1, 0, 1}: write first, second or tie)"
    assert (reasons, said) == ([sentence] * 3 + ["unknown label"], [])


def test_what_the_numbers_of_a_label_file_mean_is_said(tmp_path: Path) -> None:
    said = labelled(tmp_path, [1, 0])[2]
    assert said == ["`label` holds {0, 1}; 0: the first is better; 1: the second is better"]
    assert labelled(tmp_path, [2, 0, 1])[2][0].startswith("`label` holds {0, 1, 2}; 0: a tie; 1: the first")
    assert labelled(tmp_path, ["first", "B"])[2] == [], "words say it themselves"


def test_an_import_says_it_with_an_example(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text("rounds: {annotators_per_pair: 1}\n")
    LabelBook(tmp_path / "labels.sqlite").ask(FIVE)
    lines = [json.dumps({"id": q.id, "label": i % 2, "annotator": "a"}) for i, q in enumerate(FIVE)]
    (tmp_path / "in.jsonl").write_text("\n".join([*lines, "{broken"]) + "\n")
    said: list[str] = []
    assert import_from(tmp_path, tmp_path / "in.jsonl", say=said.append) == {"taken": 5}
    verdicts = {v.id: v.label for v in LabelBook(tmp_path / "labels.sqlite").verdicts(2)}
    assert [verdicts[q.id] for q in FIVE] == ["first", "second", "first", "second", "first"]
    assert said == [
        f'{tmp_path / "in.jsonl"}: `label` holds {{0, 1}}; 0: the first is better; 1: the second is better: chosen = "yes 0"',
        f"{tmp_path / 'in.jsonl'}: 1 lines left out: not valid JSON (line 6).",
    ]


def imported(folder: Path, *files: list[dict[str, Any]]) -> tuple[list[dict[str, int]], dict[tuple[int, str], str]]:
    """Import files of plain rows one after the other; return what each count was, and the book's labels."""
    (folder / "recipe.yaml").write_text("rounds: {annotators_per_pair: 3}\n")
    LabelBook(folder / "labels.sqlite").ask(FIVE)
    counts = []
    for rows in files:
        (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        counts.append(import_from(folder, folder / "in.jsonl"))
    names = {q.id: number for number, q in enumerate(FIVE)}
    verdicts = LabelBook(folder / "labels.sqlite").verdicts(2)
    return counts, {(names[v.id], v.annotator): v.label for v in verdicts}


def row_of(number: int, label: str, **more: Any) -> dict[str, Any]:
    return {"id": FIVE[number].id, "label": label, **more}


UNNAMED_BESIDE = "without a name beside another one on the same pair (fill in `annotator`)"
SUPERSEDED = "superseded by another verdict of the same annotator"


def test_several_verdicts_without_a_name_never_become_one(tmp_path: Path) -> None:
    rows = [row_of(0, label, annotator="") for label in ("first", "second", "first")]
    rows += [row_of(1, "second", annotator=" "), row_of(1, "skip"), row_of(0, "second", annotator="ann")]
    counts, labels = imported(tmp_path, rows)
    assert counts == [{"taken": 2, UNNAMED_BESIDE: 3, SUPERSEDED: 1}]
    assert labels == {(1, "unnamed"): "second", (0, "ann"): "second"}


def test_one_annotators_verdicts_on_a_question_count_once_and_it_is_said(tmp_path: Path) -> None:
    rows = [
        row_of(0, "first", annotator="ann"),
        row_of(0, "second", annotator="ann"),
        row_of(1, "tie", annotator="ann"),
    ]
    again = [row_of(0, "tie", annotator="ann"), row_of(2, "first", annotator="ann")]
    counts, labels = imported(tmp_path, rows, again)
    in_place = "of them in place of an earlier verdict of the same annotator"
    assert counts == [{"taken": 2, SUPERSEDED: 1}, {"taken": 2, in_place: 1}]
    assert labels == {(0, "ann"): "tie", (1, "ann"): "tie", (2, "ann"): "first"}


def test_two_files_without_names_may_be_two_people(tmp_path: Path) -> None:
    first = [row_of(0, "first"), row_of(1, "second"), row_of(2, "skip")]
    second = [row_of(0, "second"), row_of(1, "second"), row_of(2, "tie"), row_of(3, "first")]
    counts, labels = imported(tmp_path, first, second)
    again = "of them in place of an earlier verdict of the same annotator"
    assert counts == [{"taken": 3}, {"taken": 3, again: 2, OTHER_UNNAMED: 1}]
    assert labels == {(0, UNNAMED): "first", (1, UNNAMED): "second", (2, UNNAMED): "tie", (3, UNNAMED): "first"}
    (aside,) = [json.loads(line) for line in (tmp_path / "quarantine-in.jsonl").read_text().splitlines()]
    assert (aside["label"], aside["id"]) == ("second", FIVE[0].id)


def test_a_skip_never_replaces_a_verdict_of_an_earlier_file(tmp_path: Path) -> None:
    earlier = [row_of(0, "first", annotator="ann"), row_of(1, "skip", annotator="ann")]
    skips = [row_of(i, "skip", annotator="ann") for i in range(3)]
    counts, labels = imported(tmp_path, earlier, skips)
    stays = "skips beside an earlier verdict of the same annotator, which stays"
    assert counts[1] == {"taken": 2, "of them in place of an earlier verdict of the same annotator": 1, stays: 1}
    assert labels == {(0, "ann"): "first", (1, "ann"): "skip", (2, "ann"): "skip"}


@pytest.mark.parametrize("is_first", [True, False])
def test_a_skip_never_replaces_a_verdict_of_its_file(tmp_path: Path, is_first: bool) -> None:
    (task,) = export_questions(FIVE[:1], "label-studio")
    real: dict[str, Any] = {"completed_by": 7, "result": [control("preference", "second")]}
    annotations = [real, {"completed_by": 7, "was_cancelled": True, "result": []}]
    task["annotations"] = annotations if is_first else annotations[::-1]
    (tmp_path / "studio.json").write_text(json.dumps([task]))
    verdicts, refused = read_verdicts(str(tmp_path / "studio.json"))
    assert verdicts == [Verdict(FIVE[0].id, "second", "7")]
    assert refused == [{"row": 1, "reason": SUPERSEDED, "id": FIVE[0].id, "label": "skip"}]


def test_a_name_of_nobody_is_no_name(tmp_path: Path) -> None:
    (record,) = export_questions(FIVE[:1], "argilla")
    record["responses"] = {"preference": [{"value": "first", "user_id": None}, {"value": "second", "user_id": None}]}
    (tmp_path / "argilla.json").write_text(json.dumps([record]))
    verdicts, refused = read_verdicts(str(tmp_path / "argilla.json"))
    assert verdicts == []
    assert [row["reason"] for row in refused] == [UNNAMED_BESIDE] * 2
    (task,) = export_questions(FIVE[:1], "label-studio")
    task["annotations"] = [{"completed_by": {"id": i}, "result": [control("preference", "first")]} for i in (3, 4)]
    (tmp_path / "studio.json").write_text(json.dumps([task]))
    assert [v.annotator for v in read_verdicts(str(tmp_path / "studio.json"))[0]] == ["3", "4"]
