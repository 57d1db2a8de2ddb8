"""Edges of files: compressed, saved in splits, marked in parts, tables of few columns; what their reports say."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from rlhf.data.canonical import _split, critiques, oddities
from rlhf.data.canonical import pair as canonical_pair
from rlhf.data.columns import NamedRow, _sentence
from rlhf.data.controls import Gold, History, _draw, gold_questions, next_control
from rlhf.data.direction import _unstated
from rlhf.data.functions import LARGEST, load_function
from rlhf.data.label_files import read_verdicts, record_entries
from rlhf.data.labels import Question, Verdict
from rlhf.data.layouts import find_layout
from rlhf.data.limits import _Unpacked
from rlhf.data.lines import own_lines
from rlhf.data.messages import messages
from rlhf.data.prepare import DataSources, _unique, prepare_data
from rlhf.data.ratings import RatingScale
from rlhf.data.read import EXAMPLES_KEPT, BadRow, ReadReport, read_rows
from rlhf.data.rows import assistant_turn, label_digest, pair_digest, user_turn
from rlhf.data.sources import Line, Row, Source, deduplicated, read_pair_rows, to_demonstrations
from rlhf.data.tables import matched_files
from rlhf.data.tidy import _without_head, tidied
from rlhf.errors import UserError
from tests.data.layout_rows import TABLE


def write(file: Path, rows: list[Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(file)


def pairs(count: int, name: str = "q", **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}", "chosen": "yes", "rejected": "no", **more} for i in range(count)]


def test_rows_that_are_marked_as_test_are_pairs_like_the_others(tmp_path: Path) -> None:
    file = write(tmp_path / "x.jsonl", pairs(3) + pairs(2, "t", split="test"))
    rows, report = read_pair_rows(file)
    assert [row.is_test for row in rows] == [False] * 3 + [True] * 2
    assert (report.rows, report.kept) == (5, 5)


def test_a_test_side_that_is_given_is_taken_whole_whatever_its_rows_are_marked(tmp_path: Path) -> None:
    test = [Source(write(tmp_path / "t.jsonl", pairs(2, "t", split="test") + pairs(3, "u", split="train")))]
    given = [Source(write(tmp_path / "x.jsonl", pairs(9)))]
    prompts = [Source(write(tmp_path / "p.jsonl", [{"prompt": "v", "split": "test"}, {"prompt": "w"}]))]
    facts = prepare_data(tmp_path / "out", DataSources(preferences=given, test=test, test_prompts=prompts), seed=0)
    assert (facts["rows"]["test_pairs"], facts["rows"]["test_prompts"]) == (5, 2)


def test_labels_of_different_people_are_kept_for_training_alone(tmp_path: Path) -> None:
    rows = [{**pairs(1)[0], "annotator": name} for name in ("ann", "bob", "ann")]
    file = write(tmp_path / "x.jsonl", rows)
    assert len(read_pair_rows(file, split="train")[0]) == 2
    assert len(read_pair_rows(file, split="test")[0]) == 1
    test = [Source(write(tmp_path / "t.jsonl", pairs(1, "t")))]
    prepare_data(tmp_path / "out", DataSources(preferences=[Source(file)], test=test), seed=0)
    assert len((tmp_path / "out/pairs.jsonl").read_text().splitlines()) == 2


def test_a_row_brings_its_own_confidence_unless_the_layout_makes_it() -> None:
    report = ReadReport("x")
    assert not Line(1, {}, False).makes_confidence
    assert not Row({"prompt": user_turn("a")}, 1, report).makes_confidence
    assert not NamedRow(1, {}).makes_confidence
    assert not NamedRow(1, {}).is_tie
    assert not Row({"prompt": user_turn("a")}, 1, report).is_test


def test_a_ranking_says_which_demonstration_is_its_best() -> None:
    report = ReadReport("x")
    ranked = {"prompt": "q", "responses": [{"content": "a", "score": 1}, {"content": "b", "score": 2}]}
    rows = list(to_demonstrations([Line(1, ranked, False)], report))
    assert rows[0].values["completion"] == assistant_turn("b")
    assert [sentence for sentence in report.directions.values() if "the highest score" in sentence]
    plain = ReadReport("y")
    list(to_demonstrations([Line(1, {"prompt": "q", "completion": "a"}, False)], plain))
    assert plain.directions == {}


def test_critiques_stand_on_both_sides_or_on_none() -> None:
    assert critiques({"critique_chosen": " good ", "critique_rejected": "bad"}) == {
        "critique_chosen": "good",
        "critique_rejected": "bad",
    }
    for row in (
        {"critique_chosen": "good"},
        {"critique_chosen": "good", "critique_rejected": " "},
        {"critique_chosen": 3, "critique_rejected": "x"},
    ):
        assert critiques(row) == {}


def test_the_turn_that_is_said_is_the_one_where_they_part() -> None:
    one: Any = [{"role": "assistant", "content": text} for text in ("a", "b", "c")]
    other: Any = [one[0], one[2]]
    with pytest.raises(BadRow, match="part at turn 2 and share"):
        _split(one, other)


@pytest.mark.parametrize(("columns", "more"), [(7, ""), (8, ""), (9, ", …")])
def test_eight_columns_are_named(columns: int, more: str) -> None:
    row = {f"c{i}": 1 for i in range(columns)}
    shown = ", ".join(f"`c{i}`" for i in range(min(columns, 8)))
    assert _sentence(find_layout({"prompt": "a"}), None, row).endswith(f": {shown}{more}")


@pytest.mark.parametrize(("count", "more"), [(EXAMPLES_KEPT, ""), (EXAMPLES_KEPT + 1, ", …"), (1, "")])
def test_more_rows_than_are_shown_are_hinted_at(count: int, more: str) -> None:
    report = ReadReport("x")
    assert (report.rows, report.kept, report.last) == (0, 0, 0)
    for row in range(1, count + 1):
        report.drop(row, "empty")
    shown = ", ".join(str(row) for row in range(1, min(count, EXAMPLES_KEPT) + 1))
    assert report.sentences()[1] == f"  {count} left out: empty (row {shown}{more})"
    report.note(1, "odd", count=7)
    assert report.sentences()[-1] == "  7 noted: odd (row 1)", "one row, seven times"


def test_values_that_say_nothing_are_shown_with_a_way_out() -> None:
    assert "{x: first}}" in str(_unstated("p", ["x"], "s"))
    assert "{1: first, 7: second}}" in str(_unstated("p", ["1", "7"], "s"))


QUESTIONS = [Question(f"id{i}", 2, user_turn(f"q{i}"), "good", "bad") for i in range(20)]


def test_gold_comes_in_everybodys_own_order() -> None:
    gold = [Gold(question, "first") for question in QUESTIONS]
    verdicts = [Verdict(f"v{i}", "first", "ann") for i in range(300)]
    control = next_control("ann", History(verdicts, [], []), gold, {}, repeat=0)
    assert control is not None
    assert control.of == min((one.question.id for one in gold), key=lambda name: _draw("ann", name))


def test_a_gold_answers_side_is_the_pairs_own_whenever_it_is_asked() -> None:
    row: Any = {"prompt": user_turn("a"), "chosen": assistant_turn("good"), "rejected": assistant_turn("bad")}
    swapped: Any = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    (one,), (other,) = gold_questions([row], [], 2), gold_questions([swapped], [], 2)
    assert one.question == other.question
    assert {one.label, other.label} == {"first", "second"}


def test_refused_rows_name_their_question_where_they_have_one(tmp_path: Path) -> None:
    rows = [
        {"id": "q", "label": "first", "annotator": "a"},
        {"label": "first", "annotator": "a"},
        {"id": "r", "label": "perhaps", "annotator": "a"},
    ]
    verdicts, refused = read_verdicts(write(tmp_path / "x.jsonl", rows))
    assert [verdict.id for verdict in verdicts] == ["q"]
    assert [("id" in row, row["row"]) for row in refused] == [(False, 2), (True, 3)]


def test_records_without_an_id_have_an_empty_one() -> None:
    (entry,) = record_entries(4, {"fields": {}, "responses": {"preference": [{"value": "first"}]}})
    assert (entry.row, entry.id, entry.annotator) == (4, "", "unnamed")  # type: ignore[union-attr]


def test_an_unpacked_file_is_closed_once_and_for_all(tmp_path: Path) -> None:
    (tmp_path / "x.gz").write_bytes(gzip.compress(b"abc"))
    file = _Unpacked(tmp_path / "x.gz")
    assert file._count == 0
    assert file.read(2) == b"ab"
    assert file._count == 2
    packed = file._packed
    file.close()
    file.close()
    assert packed.closed


def test_a_transcript_that_ends_open_is_a_prompt_without_an_answer() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant:"
    assert [turn["content"] for turn in messages(text, "prompt")] == ["a", "b", "c"]
    assert [turn["content"] for turn in messages(text, "chosen")] == ["a", "b", "c", ""]
    assert [turn["content"] for turn in messages(text + " d", "prompt")] == ["a", "b", "c", "d"]


def test_a_tools_turn_keeps_its_names_and_no_other_turn_does() -> None:
    more = {"name": "f", "tool_call_id": "7"}
    tool, user = messages([{"role": "tool", "content": "x", **more}, {"role": "user", "content": "y", **more}], "p")
    assert tool == {"role": "tool", "content": "x", **more}
    assert user == {"role": "user", "content": "y"}
    (call,) = messages([{"role": "assistant", "content": None, "tool_calls": [{"name": "f"}]}], "p")
    assert call["content"] == ""


def test_patterns_reach_below_folders_and_match_files_alone(tmp_path: Path) -> None:
    (tmp_path / "a/b.jsonl").mkdir(parents=True)
    for name in ("a/c.jsonl", "d.jsonl"):
        write(tmp_path / name, pairs(1))
    assert matched_files(f"{tmp_path}/**/*.jsonl") == [f"{tmp_path}/a/c.jsonl", f"{tmp_path}/d.jsonl"]
    with pytest.raises(UserError, match="no file matches"):
        matched_files(f"{tmp_path}/*.csv")


def test_a_folder_of_one_split_is_read_whole_and_one_of_two_by_name(tmp_path: Path) -> None:
    first, second = Dataset.from_list(pairs(2, "a")), Dataset.from_list(pairs(3, "b"))
    DatasetDict(only=first).save_to_disk(str(tmp_path / "one"))
    DatasetDict(left=first, right=second).save_to_disk(str(tmp_path / "two"))
    assert len(list(read_rows(str(tmp_path / "one"), ReadReport("x"), split="train"))) == 2
    assert len(list(read_rows(str(tmp_path / "two"), ReadReport("x"), split="right", is_named=True))) == 3
    for folder, is_named in (("one", True), ("two", False)):
        with pytest.raises(UserError, match="has no split 'train'"):
            list(read_rows(str(tmp_path / folder), ReadReport("x"), split="train", is_named=is_named))


def test_lists_among_the_rows_are_no_pairs_that_repeat_their_prompt() -> None:
    repeating = {"prompt": "hello there", "chosen": "hello there yes", "rejected": "hello there no"}
    others: list[Any] = [["prompt", "chosen"], {"prompt": "a"}, {"chosen": "b"}]
    (row, *_), *rest = tidied([repeating, *others * 3])
    assert row == {"prompt": "hello there", "chosen": "yes", "rejected": "no"}
    assert [each.row for each in rest] == others * 3


def test_the_head_is_taken_off_the_last_turn() -> None:
    first = {"role": "assistant", "content": "head one"}
    changed = _without_head(
        {"prompt": "p", "chosen": [first, {"role": "assistant", "content": " head two"}], "rejected": " headless "},
        "head",
    )
    assert changed["chosen"] == [first, {"role": "assistant", "content": "two"}]
    assert changed["rejected"] == "less"


def test_half_of_the_pairs_make_a_habit_of_it() -> None:
    repeating = {"prompt": "hello there", "chosen": "hello there yes", "rejected": "hello there no"}
    other = {"prompt": "a", "chosen": "b", "rejected": "c"}
    assert tidied([repeating, other])[0].row == {**repeating, "chosen": "yes", "rejected": "no"}
    assert tidied([repeating, other, other])[0].row == repeating


def test_rows_behind_an_empty_file_are_counted_from_one(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("")
    write(tmp_path / "b.jsonl", [{"x": 1}])
    write(tmp_path / "c.jsonl", [{"x": 2}, {"x": 3}])
    numbers = [number for number, _ in own_lines(Source(f"{tmp_path}/*.jsonl"))]
    assert numbers == [1, 2, 3]


def test_test_pairs_of_a_source_among_others_name_it_too(tmp_path: Path) -> None:
    one = Source(write(tmp_path / "a.jsonl", pairs(4, "a") + pairs(2, "t", split="test")))
    other = Source(write(tmp_path / "b.jsonl", pairs(4, "b") + pairs(2, "u", split="test")))
    prepare_data(tmp_path / "out", DataSources(preferences=[one, other]), seed=0)
    rows = [json.loads(line) for line in (tmp_path / "out/test_pairs.jsonl").read_text().splitlines()]
    assert sorted(row["source"] for row in rows) == [one.source] * 2 + [other.source] * 2


def test_a_value_of_a_function_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "f.py").write_text("def f(p, c):\n    return [float(c[0])]\n")
    function = load_function(f"{tmp_path}/f.py:f", key="k")
    assert function(["a"], [repr(LARGEST)]) == [LARGEST]
    with pytest.raises(UserError, match="k: "):
        function(["a"], [repr(2 * LARGEST)])


@pytest.mark.parametrize("with_test", [True, False])
def test_ratings_beside_a_test_side_are_all_trained_on(tmp_path: Path, with_test: bool) -> None:
    rows = [{"prompt": f"q{i}", "response": f"a{k}", "helpfulness": k} for i in range(40) for k in (0, 1)]
    marked = [{**row, "prompt": "t", "split": "test"} for row in rows[:2]]
    test = [Source(write(tmp_path / "t.jsonl", pairs(1, "u")))] if with_test else []
    given = DataSources(
        preferences=[Source(write(tmp_path / "r.jsonl", rows + ([] if with_test else marked)))],
        test=test,
        ratings=RatingScale(names=("helpfulness",), low=0, high=4),
        test_fraction=0.5,
    )
    facts = prepare_data(tmp_path / "out", given, seed=0)
    assert (facts["rows"]["ratings"], facts["rows"]["test_pairs"]) == (80, 1)


def test_names_of_pairs_and_labels_have_twenty_four_letters() -> None:
    row: Any = {"prompt": user_turn("a"), "chosen": assistant_turn("b"), "rejected": assistant_turn("c")}
    turned: Any = {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
    assert len(label_digest(row)) == len(pair_digest(row)) == 24
    assert pair_digest(row) == pair_digest(turned)
    assert label_digest(row) != label_digest(turned)


def test_a_side_that_begins_or_ends_with_the_user_is_no_answer() -> None:
    good: Any = {
        "prompt": user_turn("a"),
        "chosen": assistant_turn("b"),
        "rejected": [*assistant_turn("c"), *user_turn("d"), *assistant_turn("e")],
    }
    assert canonical_pair(good)["chosen"] == assistant_turn("b")
    for wrong in ([*assistant_turn("c"), *user_turn("d")], user_turn("d")):
        with pytest.raises(BadRow, match="is not an assistant's answer"):
            canonical_pair({**good, "rejected": wrong})


def test_a_conversation_may_be_the_beginning_of_the_other() -> None:
    short: Any = [*user_turn("a"), *assistant_turn("b")]
    longer: Any = [*short, *user_turn("c"), *assistant_turn("d")]
    assert _split(short, longer) == (user_turn("a"), assistant_turn("b"), longer[1:])


@pytest.mark.parametrize(("systems", "is_said"), [(0, False), (1, False), (2, True)])
def test_several_system_turns_are_said(systems: int, is_said: bool) -> None:
    row: Any = {
        "prompt": [{"role": "system", "content": "s"}] * systems + user_turn("a"),
        "completion": assistant_turn("b"),
    }
    assert ("it has more than one system turn" in oddities(row)) == is_said


def test_a_part_of_no_kind_is_text_where_it_has_one() -> None:
    parts = [{"text": "a"}, {"type": "text", "text": "b"}]
    assert messages([{"role": "user", "content": parts}], "p")[0]["content"] == "ab"
    with pytest.raises(BadRow, match="a part of type 'image'"):
        messages([{"role": "user", "content": [*parts, {"type": "image", "text": "x"}]}], "p")


def test_dropped_rows_of_several_files_are_numbered_on(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", [{"x": 1}, {"x": 2}])
    (tmp_path / "b.jsonl").write_text('{"x": 3}\nno json\n{"x": 5}\n')
    report = ReadReport("x")
    assert [number for number, _ in read_rows(f"{tmp_path}/*.jsonl", report)] == [1, 2, 3, 5]
    assert (report.dropped, report.examples) == ({"not valid JSON": 1}, {"not valid JSON": [4]})
    assert report.rows == 5


def test_a_saved_folders_lines_are_those_of_the_split_that_is_named(tmp_path: Path) -> None:
    DatasetDict(train=Dataset.from_list(pairs(2)), right=Dataset.from_list(pairs(3))).save_to_disk(str(tmp_path / "x"))
    assert len(list(own_lines(Source(str(tmp_path / "x"), split="right")))) == 3
    assert len(list(own_lines(Source(str(tmp_path / "x"))))) == 2


def test_prompts_keep_their_order_where_they_stand_once() -> None:
    report = ReadReport("x")
    rows: list[Row[Any]] = [Row({"prompt": user_turn(name)}, i, report) for i, name in enumerate("cab")]
    assert [row.number for row in _unique(rows)] == [0, 1, 2]


def test_the_commonest_reason_is_said_first() -> None:
    report = ReadReport("x")
    for row, reason in enumerate(("rare", "common", "common"), start=1):
        report.drop(row, reason)
    assert [sentence.split()[3] for sentence in report.sentences()[1:]] == ["common", "rare"]


def test_whose_label_it_is_counts_only_where_that_is_asked_for() -> None:
    def rows() -> list[Row[Any]]:
        report = ReadReport("x")
        sides = (("yes", "no", "ann"), ("no", "yes", "bob"), ("yes", "no", "ann"))
        return [
            Row(
                {
                    "prompt": user_turn("a"),
                    "chosen": assistant_turn(chosen),
                    "rejected": assistant_turn(rejected),
                    "annotator": annotator,
                },
                number,
                report,
            )
            for number, (chosen, rejected, annotator) in enumerate(sides)
        ]

    assert deduplicated(rows()) == []
    assert [row.number for row in deduplicated(rows(), by_annotator=True)] == [0, 1]


def test_of_three_layouts_the_first_two_are_named(tmp_path: Path) -> None:
    rows = [TABLE[name][0](0) for name in ("SHP", "PKU-SafeRLHF", "WebGPT")]
    with pytest.raises(UserError, match=r"row 1 is of the layout SHP .*, row 2 of the layout PKU-SafeRLHF"):
        read_pair_rows(write(tmp_path / "x.jsonl", rows))


def test_a_repeat_is_everybodys_own_too() -> None:
    verdicts = [Verdict(question.id, "first", "ann") for question in QUESTIONS]
    history = History([*verdicts, *(Verdict(f"v{i}", "first", "ann") for i in range(100))], [], [])
    control = next_control("ann", history, [], {question.id: question for question in QUESTIONS}, repeat=1.0)
    assert control is not None
    assert control.of == min((question.id for question in QUESTIONS), key=lambda name: _draw("ann", name))
