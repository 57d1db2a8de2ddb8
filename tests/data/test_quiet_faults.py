"""What files say in other forms than ours, and what went wrong without a word: texts of conversations, speakers, pictures, sides."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from rlhf.data.conversations import conversation_keys
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.read import ReadReport
from rlhf.data.repeats import BOTH_ORDERS, REPEATED, TIE_BESIDE
from rlhf.data.rows import Pair, answer
from rlhf.data.sources import Source, read_pairs, read_sources, to_demonstrations, to_pairs
from rlhf.data.tidy import INTERLEAVED, PARSED, SPEAKERS_APART, UNLIKELY
from rlhf.files import read_jsonl, write_jsonl

ANSWERS = {"chosen": "yes", "rejected": "no"}
PAIR = {"prompt": "say it", **ANSWERS}
ASKED, BETTER, WORSE = "What is in the picture?", "A cat.", "A dog."


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def pairs_of(folder: Path, *rows: Any) -> tuple[list[Pair], ReadReport]:
    write_jsonl(folder / "x.jsonl", rows)
    reports: list[ReadReport] = []
    read = read_sources([Source(str(folder / "x.jsonl"))], to_pairs, reports, "pairs", 0)
    return [row.values for row in read.train], reports[0]


# ---- Conversations as text ----


@pytest.mark.fault("common layouts")
@pytest.mark.parametrize("names", [("role", "content"), ("from", "value")])
def test_conversations_that_pandas_wrote_into_a_table_are_conversations(tmp_path: Path, names: tuple[str, str]) -> None:
    speaker, text = names
    user, model = ("user", "assistant") if speaker == "role" else ("human", "gpt")
    question = {speaker: user, text: 'Who said "it\'s"?'}
    columns = {
        "chosen": [[question, {speaker: model, text: "He did."}]],
        "rejected": [[question, {speaker: model, text: "Nobody."}]],
    }
    pd.DataFrame(columns).to_csv(tmp_path / "pairs.csv", index=False)
    assert "[{'" in (tmp_path / "pairs.csv").read_text(), "what Python prints, and no JSON"
    rows, report = read_pairs(str(tmp_path / "pairs.csv"), split="train")
    assert [(row["prompt"][0]["content"], answer(row, "chosen"), answer(row, "rejected")) for row in rows] == [
        ('Who said "it\'s"?', "He did.", "Nobody.")
    ]
    assert report.noted[PARSED] == 1


@pytest.mark.fault("common layouts")
def test_arrays_that_pandas_wrote_into_a_table_are_refused(tmp_path: Path) -> None:
    """A parquet file's lists are arrays, which print without commas: nobody can read them back."""
    turns = [turn("user", "q"), turn("assistant", "a")]
    text = str(np.array(turns, dtype=object))
    with (tmp_path / "pairs.csv").open("w") as file:
        csv.writer(file).writerows([["prompt", "chosen", "rejected"], ["q", text, text + " "], ["q", "a", "b"]])
    rows, report = read_pairs(str(tmp_path / "pairs.csv"), split="train")
    assert len(rows) == 1
    assert report.dropped == {
        "chosen looks like the text of messages, and is neither JSON nor what Python prints of a list": 1
    }


@pytest.mark.fault("common layouts")
def test_lists_of_texts_are_the_turns_of_conversations(tmp_path: Path) -> None:
    lists = {"prompt": ["What?"], "chosen": ["This."], "rejected": ["That."]}
    rows, report = pairs_of(tmp_path, {name: json.dumps(texts) for name, texts in lists.items()})
    assert rows == [{"prompt": [turn("user", "What?")], "chosen": [turn("assistant", "This.")],
                     "rejected": [turn("assistant", "That.")]}]  # fmt: skip
    assert report.noted[INTERLEAVED] == 1
    several = {"prompt": ["What?", "And?"], "chosen": ["This.", "So."], "rejected": ["That.", "So."]}
    rows, report = pairs_of(tmp_path, {name: json.dumps(texts) for name, texts in several.items()})
    assert rows == []
    assert "part at turn 2" in next(iter(report.dropped)), "two conversations, not two answers"
    sorting = {"prompt": "[3, 1, 2]", "chosen": "[1, 2, 3]", "rejected": "[3, 2, 1]"}
    assert [answer(row, "chosen") for row in pairs_of(tmp_path, sorting)[0]] == ["[1, 2, 3]"]


@pytest.mark.fault("common layouts")
@pytest.mark.parametrize("is_text", [True, False])
def test_the_speakers_of_helpsteer_are_turns(tmp_path: Path, is_text: bool) -> None:
    told = "Hi\n<extra_id_1>Assistant\nHello! How can I help?\n<extra_id_1>User\nTell a joke."
    prompt: Any = told if is_text else [turn("user", told)]
    rated = [{"prompt": prompt, "response": text, "helpfulness": i} for i, text in enumerate(("No.", "Knock knock."))]
    (row,), report = pairs_of(tmp_path, *rated)
    assert row["prompt"] == [
        turn("user", "Hi"),
        turn("assistant", "Hello! How can I help?"),
        turn("user", "Tell a joke."),
    ]
    assert report.noted[SPEAKERS_APART] == 2
    (row,), _ = pairs_of(tmp_path, {**PAIR, "prompt": "Hi\n<extra_id_1>Assistant\n"})
    assert row["prompt"] == [turn("user", "Hi")], "an open turn is the answer's"
    (row,), _ = pairs_of(tmp_path, {**PAIR, "prompt": "What does <extra_id_1>User mean?"})
    assert row["prompt"] == [turn("user", "What does <extra_id_1>User mean?")]


@pytest.mark.fault("common layouts")
def test_a_transcript_without_blank_lines_has_its_turns(tmp_path: Path) -> None:
    head = "Human: hi\nAssistant: hello\nHuman: more?\nAssistant:"
    (row,), _ = pairs_of(tmp_path, {"prompt": head, "chosen": "yes", "rejected": "no"})
    assert row["prompt"] == [turn("user", "hi"), turn("assistant", "hello"), turn("user", "more?")]
    loose = "\n\nHuman: he wrote\nAssistant: no\n\nAssistant:"
    (row,), _ = pairs_of(tmp_path, {"prompt": loose, "chosen": "yes", "rejected": "no"})
    assert row["prompt"] == [turn("user", "he wrote\nAssistant: no")], "one line of a turn, where blank lines part them"


# ---- What no model here reads ----


@pytest.mark.fault("common layouts")
@pytest.mark.parametrize(
    "row",
    [
        {"image": "cat.png", "question": ASKED, "chosen": BETTER, "rejected": WORSE},
        {"images": [{"path": "cat.png"}], "prompt": f"<image>{ASKED}", "chosen": BETTER, "rejected": WORSE},
        {"audio": {"path": "cat.wav"}, "prompt": ASKED, "chosen": BETTER, "rejected": WORSE},
    ],
)
def test_questions_about_pictures_are_left_out_and_counted(tmp_path: Path, row: dict[str, Any]) -> None:
    name = next(iter(row))
    text = {key: value for key, value in row.items() if key != name}
    rows, report = pairs_of(tmp_path, row, {**text, name: None, "chosen": "A cow."})
    assert [answer(kept, "chosen") for kept in rows] == ["A cow."]
    assert report.dropped == {
        f"it has `{name}`, and the models here read text alone (`columns` beside the source reads it so)": 1
    }


# ---- Whose label, and how sure ----


@pytest.mark.fault("labels of several people")
@pytest.mark.parametrize("name", [7, 7.0, "7"])
def test_a_number_is_the_name_of_an_annotator(tmp_path: Path, name: Any) -> None:
    row = {**PAIR, "annotator": name}
    turned = {**row, "chosen": "no", "rejected": "yes", "annotator": 8}
    rows, report = read_pairs(write(tmp_path / "x.jsonl", row, turned), split="train")
    assert [kept.get("annotator") for kept in rows] == ["7", "8"]
    assert report.dropped == {}


def write(file: Path, *rows: Any) -> str:
    write_jsonl(file, rows)
    return str(file)


@pytest.mark.fault("direction of labels")
@pytest.mark.parametrize("name", ["confidence", "soft_label"])
def test_a_pair_whose_label_is_likely_wrong_is_read_as_the_other_one(tmp_path: Path, name: str) -> None:
    """Either way of writing one soft label is one pair; whoever takes the chosen answer for the better one is right."""
    beside = {
        "chosen_rating": 1,
        "rejected_rating": 4,
        "margin": -2.0,
        "critique_chosen": "bad",
        "critique_rejected": "good",
    }
    row = {**PAIR, **beside, name: 0.1}
    (turned,), report = pairs_of(tmp_path, row)
    other = {
        "chosen_rating": 4,
        "rejected_rating": 1,
        "margin": 2.0,
        "critique_chosen": "good",
        "critique_rejected": "bad",
    }
    (straight,), _ = pairs_of(tmp_path, {"prompt": "say it", "chosen": "no", "rejected": "yes", **other, name: 0.9})
    assert turned == straight
    assert (turned["confidence"], turned["rating_gap"]) == (0.9, 3.0)
    assert report.noted[UNLIKELY] == 1
    assert answer(pairs_of(tmp_path, {**PAIR, name: 0.5})[0][0], "chosen") == "yes"
    reports: list[ReadReport] = []
    write_jsonl(tmp_path / "x.jsonl", [row])
    (demonstration,) = read_sources([Source(str(tmp_path / "x.jsonl"))], to_demonstrations, reports, "", 0).train
    assert demonstration.values["completion"] == [turn("assistant", "no")]


@pytest.mark.fault("direction of labels")
def test_two_responses_whose_label_is_likely_wrong_change_sides(tmp_path: Path) -> None:
    row = {"prompt": "say it", "response_1": "yes", "response_2": "no", "preference": "second", "margin": -2.0}
    (turned,), report = pairs_of(tmp_path, {**row, "confidence": 0.25})
    assert (answer(turned, "chosen"), turned["confidence"], turned["margin"]) == ("yes", 0.75, 2.0)
    assert report.noted[UNLIKELY] == 1
    (straight,), report = pairs_of(tmp_path, {**row, "confidence": 0.75})
    assert (answer(straight, "chosen"), straight["confidence"], UNLIKELY in report.noted) == ("no", 0.75, False)


def test_nobody_learns_to_answer_from_a_tie(tmp_path: Path) -> None:
    reports: list[ReadReport] = []
    write_jsonl(tmp_path / "x.jsonl", [{**PAIR, "confidence": 0.5}])
    assert read_sources([Source(str(tmp_path / "x.jsonl"))], to_demonstrations, reports, "", 0).train == []
    assert reports[0].dropped == {"a tie, of which neither answer is one to learn": 1}


def test_an_empty_confidence_leaves_the_word_to_the_soft_label(tmp_path: Path) -> None:
    (row,), _ = pairs_of(tmp_path, {**PAIR, "confidence": None, "soft_label": 0.8})
    assert row["confidence"] == 0.8


def test_a_tie_gives_way_to_a_decision_and_is_itself_in_both_orders(tmp_path: Path) -> None:
    tie = {**PAIR, "confidence": 0.5}
    turned = {"prompt": "say it", "chosen": "no", "rejected": "yes"}
    for rows, expected, dropped in (
        ([tie, {**turned, "confidence": 1.0}], ["no"], {TIE_BESIDE: 1}),
        ([{**turned, "confidence": 1.0}, tie], ["no"], {TIE_BESIDE: 1}),
        ([tie, {**turned, "confidence": 0.5}], ["yes"], {REPEATED: 1}),
        ([tie, {**turned, "confidence": 1.0}, {**PAIR, "confidence": 1.0}], [], {TIE_BESIDE: 1, BOTH_ORDERS: 2}),
    ):
        more = {"prompt": "another", "chosen": "a", "rejected": "b", "confidence": 1.0}
        kept, report = read_pairs(write(tmp_path / "x.jsonl", *rows, more))
        assert [answer(row, "chosen") for row in kept] == [*expected, "a"]
        assert report.dropped == dropped


# ---- What stands beside ----


@pytest.mark.parametrize(
    ("answers", "kept"),
    [
        ({"response_1": "no", "response_2": "yes", "preference_strength": 2}, {"weight": 3.0}),
        ({"response_1": "no", "response_2": "yes", "preference": "second"}, {"weight": 3.0, "confidence": 0.7}),
        ({"responses": [{"text": "no", "score": 1}, {"text": "yes", "score": 2}]}, {"weight": 3.0}),
        ({"chosen": ["yes"], "rejected": ["no"]}, {"weight": 3.0}),
    ],
)
def test_a_weight_survives_every_layout(tmp_path: Path, answers: dict[str, Any], kept: dict[str, float]) -> None:
    (row,), _ = pairs_of(tmp_path, {"prompt": "say it", **answers, "weight": 3.0, "confidence": 0.7})
    assert answer(row, "chosen") == "yes"
    assert {name: row.get(name) for name in kept} == kept


@pytest.mark.parametrize("names", [("rating_chosen", "rating_rejected"), ("score_chosen", "score_rejected")])
def test_ratings_beside_a_question_and_ratings_as_texts_are_read(tmp_path: Path, names: tuple[str, str]) -> None:
    row = {"question": "q", "chosen": "a", "rejected": "b", names[0]: "5", names[1]: 2}
    assert pairs_of(tmp_path, row)[0][0]["rating_gap"] == 3.0


def test_the_input_of_a_ranking_is_part_of_its_prompt(tmp_path: Path) -> None:
    row = {
        "instruction": "Translate.",
        "input": "chat",
        "responses": [{"text": t, "score": s} for t, s in (("a", 1), ("b", 2))],
    }
    assert pairs_of(tmp_path, row)[0][0]["prompt"] == [turn("user", "Translate.\nchat")]


def test_a_tie_that_distilabel_found_is_one(tmp_path: Path) -> None:
    row = {"input": "q", "chosen": "a", "rejected": "b"}
    rows, _ = pairs_of(tmp_path, {**row, "status": "tie"}, {**row, "input": "r", "status": "unchanged"})
    assert [kept.get("confidence") for kept in rows] == [0.5, None]


# ---- Parts of a file, and of a conversation ----


def test_rows_for_validation_are_said(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": part, "split": part} for part in ("train", "test", "validation")]
    kept, report = pairs_of(tmp_path, *rows)
    assert [row["prompt"][0]["content"] for row in kept] == ["train", "validation"]
    assert report.noted["read for training, though its `split` is validation"] == 1


@pytest.mark.fault("duplicates and leakage")
def test_the_turns_of_a_conversation_stay_on_one_side(tmp_path: Path) -> None:
    """A later turn's prompt has the earlier turn's answer in it, mostly the better one."""
    rows = []
    for i in range(120):
        first = turn("user", f"question {i}")
        later = [first, turn("assistant", f"good {i}"), turn("user", "and then?")]
        rows.append({"prompt": [first], "chosen": f"good {i}", "rejected": f"bad {i}"})
        rows.append({"prompt": later, "chosen": f"more {i}", "rejected": f"less {i}"})
    source = Source(write(tmp_path / "x.jsonl", *rows))
    prepare_data(tmp_path / "out", DataSources(preferences=[source], test_fraction=0.2), seed=3)
    train, test = (read_jsonl(tmp_path / "out" / f"{name}.jsonl") for name in ("pairs", "test_pairs"))
    assert len(train) + len(test) == 240
    assert len(test) > 20
    keys = conversation_keys([row["prompt"] for row in [*train, *test]])
    assert not {*keys[: len(train)]} & {*keys[len(train) :]}
    said = {message["content"] for row in train for message in row["prompt"]}
    assert not said & {answer(row, side) for row in test for side in ("chosen", "rejected")}


def test_an_opening_that_all_prompts_share_is_no_conversation(tmp_path: Path) -> None:
    """A few-shot head as turns, or a greeting: the questions behind it are as many conversations."""
    head = [turn("user", "One and one?"), turn("assistant", "Two."), turn("user", "Say OK."), turn("assistant", "OK")]
    rows = [
        {"prompt": [*head, turn("user", f"question {i}")], "chosen": f"a {i}", "rejected": f"b {i}"} for i in range(200)
    ]
    source = Source(write(tmp_path / "x.jsonl", *rows))
    facts = prepare_data(tmp_path / "out", DataSources(preferences=[source], test_fraction=0.1), seed=0)
    assert 8 < facts["rows"]["test_pairs"] < 36
    assert facts["rows"]["pairs"] + facts["rows"]["test_pairs"] == 200
    system = turn("system", "Be brief.")
    assert len(set(conversation_keys([[system, turn("user", f"{i}")] for i in range(30)]))) == 30


@pytest.mark.fault("common layouts")
@pytest.mark.parametrize(
    "texts",
    [
        ('[{"from": "Paris", "to": "Rome"}]', '[{"from": "Rome", "to": "Paris"}]'),
        ('[{"value": 3}]', '[{"value": 3'),
        ("[{'content': 1}]", "[{'content': 2}] or so"),
        ('["a", "b"]', '["b", "a"]'),
    ],
)
def test_answers_that_are_json_stay_what_they_are(tmp_path: Path, texts: tuple[str, str]) -> None:
    (row,), _ = pairs_of(tmp_path, {"prompt": '["b", "a"]', "chosen": texts[0], "rejected": texts[1]})
    assert (answer(row, "chosen"), answer(row, "rejected")) == texts
    numbered = [{"id": 1, **turn("user", "q")}, {"id": 2, **turn("assistant", "a")}]
    other = [*numbered[:1], {"id": 2, **turn("assistant", "b")}]
    (row,), _ = pairs_of(tmp_path, {"chosen": json.dumps(numbered), "rejected": json.dumps(other)})
    assert (row["prompt"], answer(row, "chosen")) == ([turn("user", "q")], "a")


@pytest.mark.parametrize("beside", [{"confidence": 4}, {"confidence": "high"}, {"margin": [1, 2]}, {"weight": "low"}])
def test_what_means_something_else_beside_a_ranking_costs_no_row(tmp_path: Path, beside: dict[str, Any]) -> None:
    """An annotator's confidence from 1 to 5, say."""
    signed = {"prompt": "p", "response_1": "a", "response_2": "b", "preference_strength": -2, **beside}
    listed = {"prompt": "q", "responses": [{"text": "a", "score": 1}, {"text": "b", "score": 2}], **beside}
    rows, _ = pairs_of(tmp_path, signed, listed)
    assert len(rows) == 2
    assert not any(name in row for row in rows for name in ("confidence", "margin", "weight"))


@pytest.mark.parametrize("value", [False, float("nan"), "", "None"])
def test_a_column_for_pictures_may_be_empty(tmp_path: Path, value: Any) -> None:
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({**PAIR, "image": value}))
    assert len(read_pairs(str(file))[0]) == 1
    full = Source(str(file), columns={"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"})
    file.write_text(json.dumps({**PAIR, "image": "a.png"}))
    assert len(read_pairs(full)[0]) == 1, "whoever names the columns knows them"
