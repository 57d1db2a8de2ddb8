"""What rows say in places that were passed by: their label, their weight, who rated them, what else belongs to the prompt."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.columns import UNREAD_PART
from rlhf.data.lines import own_lines
from rlhf.data.read import ReadReport
from rlhf.data.repeats import REPEATED
from rlhf.data.rows import answer, assistant_turn, user_turn
from rlhf.data.sources import (
    EARLIER_ANSWERS,
    Convert,
    Source,
    read_pairs,
    read_sources,
    to_demonstrations,
    to_pairs,
    to_prompts,
)
from rlhf.data.tables import local_files
from rlhf.data.tidy import PARSED
from rlhf.errors import UserError
from rlhf.files import write_jsonl
from rlhf.reward.rankings import ranking_rows


def rows_of(folder: Path, *rows: Any, convert: Convert[Any] = to_pairs) -> tuple[list[Any], ReadReport]:
    write_jsonl(folder / "x.jsonl", rows)
    reports: list[ReadReport] = []
    read = read_sources([Source(str(folder / "x.jsonl"))], convert, reports, "rows", 0)
    return [row.values for row in read.train], reports[0]


# ---- Two responses ----


@pytest.mark.parametrize("says", [{"preference": "A"}, {"preference_strength": -1}])
@pytest.mark.parametrize("names", [("response_1", "response_2"), ("response1", "response2")])
def test_two_responses_that_are_the_text_of_messages_are_messages(
    tmp_path: Path, names: tuple[str, str], says: dict[str, Any]
) -> None:
    texts = [json.dumps(assistant_turn("yes", ended=False)), json.dumps(assistant_turn("no"))]
    (row,), report = rows_of(tmp_path, {"prompt": "say it", **dict(zip(names, texts, strict=True)), **says})
    assert (row["chosen"], row["rejected"]) == (assistant_turn("yes", ended=False), assistant_turn("no"))
    assert report.noted[PARSED] == 1
    (row,), report = rows_of(tmp_path, {"prompt": "say it", names[0]: texts[0], names[1]: "no", **says})
    assert (answer(row, "chosen"), PARSED in report.noted) == (texts[0], False)  # of two answers both, or neither


def test_a_response_of_several_messages_is_none(tmp_path: Path) -> None:
    row = {"prompt": "q", "response_1": user_turn("q") + assistant_turn("a"), "response_2": "b", "preference": "A"}
    assert rows_of(tmp_path, row)[1].dropped == {"a response is not a single answer": 1}


# ---- One answer ----

NOT_TO_LEARN = "its last message says that it is not one to learn (`weight` 0, or `train` or `training` false)"


@pytest.mark.parametrize("mark", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"training": "false"}])
def test_nobody_learns_an_answer_whose_message_says_so(tmp_path: Path, mark: dict[str, Any]) -> None:
    bad = [{**assistant_turn("bad")[0], **mark}]
    good = [{**assistant_turn("good")[0], "weight": 1, "train": True, "training": None}]
    rows = [
        {"messages": user_turn("q") + bad},
        {"messages": json.dumps(user_turn("q") + bad)},
        {"prompt": "q", "completion": bad},
        {"messages": user_turn("q") + bad + user_turn("r") + good},
    ]
    read, report = rows_of(tmp_path, *rows, convert=to_demonstrations)
    assert [row["completion"] for row in read] == [assistant_turn("good")]
    assert report.dropped == {NOT_TO_LEARN: 3}


@pytest.mark.parametrize("mark", [{"label": False}, {"kto_tag": False}, {"label": "False"}])
@pytest.mark.parametrize(
    "row",
    [
        {"messages": user_turn("q") + assistant_turn("bad")},
        {"instruction": "q", "output": "bad"},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "bad"}]},
    ],
    ids=["messages", "Alpaca", "ShareGPT"],
)
def test_a_label_of_one_answer_is_read_in_every_layout(
    tmp_path: Path, row: dict[str, Any], mark: dict[str, Any]
) -> None:
    assert rows_of(tmp_path, {**row, **mark}, convert=to_demonstrations)[1].dropped == {
        "its label says that this answer is not one to learn": 1
    }
    ((kept,), report) = rows_of(tmp_path, {**row, **dict.fromkeys(mark, True)}, convert=to_demonstrations)
    assert (kept["completion"], report.dropped) == (assistant_turn("bad"), {})


@pytest.mark.parametrize(
    ("row", "learnt", "before"),
    [
        ({"messages": user_turn("a") + assistant_turn("b")}, ["b"], 0),
        ({"messages": [t for text in "abc" for t in user_turn(text) + assistant_turn(text)]}, ["c"], 2),
        ({"messages": [t for text in "aaa" for t in user_turn("q") + assistant_turn("yes")]}, ["yes"], 2),
        ({"prompt": user_turn("a") + assistant_turn("b") + user_turn("c"), "chosen": "d", "rejected": "e"}, ["d"], 1),
        (
            {"role": "prompter", "text": "a", "replies": [{"role": "assistant", "text": "b", "replies": [
                {"role": "prompter", "text": "c", "replies": [{"role": "assistant", "text": "d"}]}]}]},
            ["b", "d"],
            0,
        ),
    ],
)  # fmt: skip
def test_answers_before_the_last_are_counted(
    tmp_path: Path, row: dict[str, Any], learnt: list[str], before: int
) -> None:
    read, report = rows_of(tmp_path, row, convert=to_demonstrations)
    assert [demonstration["completion"][0]["content"] for demonstration in read] == learnt
    assert report.noted == ({EARLIER_ANSWERS: before} if before else {})
    assert EARLIER_ANSWERS not in rows_of(tmp_path, row, convert=to_prompts)[1].noted


# ---- Prompts that are one for the split, and two for people ----


@pytest.mark.parametrize(
    ("prompt", "other"),
    [("Is ABC upper case?", "is abc upper case?"), ("if a:\n    b()\nc()", "if a:\n    b()\n    c()")],
)
def test_prompts_of_other_case_or_blanks_are_apart(tmp_path: Path, prompt: str, other: str) -> None:
    rankings = [
        {"prompt": text, "responses": [{"text": a, "score": 2}, {"text": b, "score": 1}]}
        for text, a, b in ((prompt, "yes", "no"), (other, "no", "yes"), (f"{prompt} ", "sure", "no"))
    ]
    pairs, _ = rows_of(tmp_path, *rankings)
    assert len({pair["group"] for pair in pairs}) == 1
    made = ranking_rows(pairs)
    assert [row["prompt"] for row in made] == [user_turn(prompt), user_turn(other)]
    assert [[response["content"] for response in row["responses"]] for row in made] == [
        [assistant_turn("yes"), assistant_turn("no"), assistant_turn("sure")],
        [assistant_turn("no"), assistant_turn("yes")],
    ]
    assert [row["beats"] for row in made] == [[[0, 1], [2, 1]], [[0, 1]]]
    plain = [
        {"prompt": text, "chosen": a, "rejected": b} for text, a, b in ((prompt, "yes", "no"), (other, "no", "yes"))
    ]
    write_jsonl(tmp_path / "x.jsonl", [*plain, {**plain[0], "prompt": f"{prompt} "}])
    kept, report = read_pairs(str(tmp_path / "x.jsonl"))
    assert ([row["prompt"] for row in kept], report.dropped) == ([user_turn(prompt), user_turn(other)], {REPEATED: 1})


# ---- Rated answers ----


def test_rated_answers_are_compared_within_one_annotator(tmp_path: Path) -> None:
    """Two of one mind, each on a scale of their own: the strict one's good answer is below the kind one's poor one."""
    ratings = {
        ("strict", "good"): 1,
        ("strict", "poor"): 0,
        ("kind", "good"): 4,
        ("kind", "poor"): 3,
        ("once", "good"): 2,
    }
    rows = [
        {"prompt": "q", "response": text, "helpfulness": value, "annotator": name}
        for (name, text), value in ratings.items()
    ]
    pairs, report = rows_of(tmp_path, *rows)
    assert [(row["annotator"], answer(row, "chosen"), row["rating_gap"]) for row in pairs] == [
        ("strict", "good", 1.0),
        ("kind", "good", 1.0),
    ]
    assert report.noted == {
        "pairs made of rated answers": 2,
        "rated answers have no other answer to their prompt to be compared with": 1,
    }
    kept, report = read_pairs(str(tmp_path / "x.jsonl"))
    assert ([answer(row, "chosen") for row in kept], report.dropped) == (["good"], {REPEATED: 1})


def test_what_stands_beside_two_rated_answers_stands_beside_their_pair(tmp_path: Path) -> None:
    beside = {"source": "S", "subset": "math", "annotator": 7, "agree": 0.5}
    rows = [
        {"prompt": "q", "response": text, "helpfulness": value, "weight": weight, "id": text, **beside}
        for text, value, weight in (("good", 4, 3.0), ("poor", 1, 1.0))
    ]
    (row,), _ = rows_of(tmp_path, *rows)
    assert {name: row[name] for name in (*beside, "weight")} == {**beside, "annotator": "7", "weight": 2.0}
    assert "id" not in row  # they say two
    (row,), _ = rows_of(tmp_path, rows[0], {**rows[1], "weight": None, "subset": "art"})
    assert (row["source"], "weight" in row, "subset" in row) == ("S", False, False)


# ---- Parts of the prompt beside it ----

PAIR = {"chosen": "Homer", "rejected": "Virgil"}
RESPONSES = {"response_1": "Homer", "response_2": "Virgil", "preference": "A"}
SCORED = {"responses": [{"text": "Homer", "score": 2}, {"text": "Virgil", "score": 1}]}
ILIAD = "The Iliad was written\nby Homer."


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"question": "Who?", "context": ILIAD, **PAIR}, ["context"]),
        ({"question": "Who?", "input": ILIAD, **PAIR}, ["input"]),
        ({"instruction": "Who?", "input": ILIAD, **PAIR}, []),
        ({"prompt": "Who?", "history": [["When?", "Long ago."]], "input": ILIAD, **PAIR}, ["input", "history"]),
        ({"prompt": "Who?", "context": ILIAD, **RESPONSES}, ["context"]),
        ({"context": ILIAD, **RESPONSES}, []),
        ({"context": json.dumps(user_turn(ILIAD)), **RESPONSES}, []),
        ({"context": f"\n\nHuman: {ILIAD}\n\nAssistant:", **RESPONSES}, []),
        ({"prompt": f"Read: {ILIAD.replace(chr(10), ' ')} Who?", "passage": ILIAD, **PAIR}, []),
        ({"prompt": "Who?", "document": ILIAD, **SCORED}, ["document"]),
        ({"prompt": "Who?", "input": "", "context": None, "history": [], **SCORED}, []),
        ({"prompt": "Who?", "context": {"id": 7}, **PAIR}, []),
        ({"prompt": "Who?", "passage": ILIAD, "response": "Homer", "helpfulness": 4}, ["passage"]),
    ],
)
def test_parts_of_a_prompt_that_nobody_reads_are_counted(
    tmp_path: Path, row: dict[str, Any], unread: list[str]
) -> None:
    _, report = rows_of(tmp_path, row)
    assert {note: report.noted[note] for note in report.noted if "beside the prompt" in note} == {
        UNREAD_PART.format(name): 1 for name in unread
    }


def test_a_demonstration_says_what_of_its_prompt_was_not_read(tmp_path: Path) -> None:
    row = {"prompt": "Summarise the text.", "context": "A long text.", "completion": "Short."}
    assert rows_of(tmp_path, row, row, convert=to_demonstrations)[1].noted == {UNREAD_PART.format("context"): 2}


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ({"question": "Who?", "context": ILIAD, "topic": 3, **PAIR, "id": 5}, "`question`, `chosen`, `rejected`, `id`"),
        ({"instruction": "Who?", "input": ILIAD, **PAIR}, "`instruction`, `input`, `chosen`, `rejected`"),
        (
            {"question": "Who?", "history": [["When?", "Long ago."]], **PAIR},
            "`question`, `history`, `chosen`, `rejected`",
        ),
        ({"instruction": "Who?", "input": "", "output": "Homer", "ended": False}, "`instruction`, `output`"),
    ],
)
def test_the_sentence_names_the_columns_that_were_read(tmp_path: Path, row: dict[str, Any], names: str) -> None:
    (sentence,) = rows_of(tmp_path, row, convert=to_demonstrations)[1].directions.values()
    assert sentence.split(": ")[1] == names


# ---- Names ----


def test_a_file_whose_name_has_brackets_comes_before_a_pattern(tmp_path: Path) -> None:
    for name in ("data1", "data[1]"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": name, "chosen": "a", "rejected": "b"}])
    for source, expected in (("data[1].jsonl", "data[1]"), ("data[2-9]*.jsonl", None), ("data[[]1].jsonl", "data[1]")):
        if expected is None:
            with pytest.raises(UserError, match="no file matches"):
                read_pairs(str(tmp_path / source))
            continue
        (row,), _ = read_pairs(str(tmp_path / source))
        assert row["prompt"] == user_turn(expected)
    assert local_files(str(tmp_path / "data[1].jsonl")) == [tmp_path / "data[1].jsonl"]
    assert [number for number, _ in own_lines(Source(str(tmp_path / "data[1].jsonl")))] == [1]


# ---- Words for a side ----


@pytest.mark.parametrize("winner", ["both_bad", "both_good", "Both_Bad"])
def test_the_arenas_newer_words_for_a_tie_are_ties(tmp_path: Path, winner: str) -> None:
    sides = {f"conversation_{side}": user_turn("q") + assistant_turn(side) for side in "ab"}
    (row,), report = rows_of(tmp_path, {**sides, "winner": winner})
    assert (row["confidence"], report.dropped) == (0.5, {})


def test_two_outputs_are_a_pair_and_that_is_said(tmp_path: Path) -> None:
    """Natural instructions has references there, of which none is better."""
    rows = [{"instruction": "Name a fruit.", "output": output} for output in ("plum", ["apple", "pear"])]
    _, report = rows_of(tmp_path, *rows, convert=to_demonstrations)
    read = "read as Alpaca: `instruction`, `output`"
    assert list(report.directions.values()) == [
        read,
        f'{read}; of two outputs the first is the better one: chosen = "apple"',
    ]


@pytest.mark.parametrize(
    ("answers", "label"),
    [
        (
            {"response_0": "zero", "response_1": "one", "better_response_id": 1},
            "read as PKU-SafeRLHF: `better_response_id` 1",
        ),
        ({"response_1": "zero", "response_2": "one", "preference": "second"}, "`preference` second of {second}"),
    ],
)
def test_a_pair_that_changed_sides_says_so(tmp_path: Path, answers: dict[str, Any], label: str) -> None:
    rows = [{"prompt": "q", **answers, "confidence": confidence, "agree": 0.25} for confidence in (0.25, 0.75)]
    pairs, report = rows_of(tmp_path, *rows)
    assert [(answer(row, "chosen"), row["confidence"], row["agree"]) for row in pairs] == [
        ("zero", 0.75, 0.75),
        ("one", 0.75, 0.25),
    ]
    changed = ", but its `confidence` is below 0.5, so the answers changed sides"
    assert list(report.directions.values()) == [
        f'{label}: the second is better{changed}: chosen = "zero"',
        f'{label}: the second is better: chosen = "one"',
    ]


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        (
            {"prompt": "a", "response_1": "b", "response_2": "c", "preference_strength": 2, "confidence": 0.9},
            "confidence",
        ),
        ({"prompt": "a", "responses": [{"text": "b", "rank": 1}, {"text": "c", "rank": 2}], "margin": 1.5}, "margin"),
        (
            {
                "prompt": "a",
                "response_0": "b",
                "response_1": "c",
                "better_response_id": 0,
                "chosen_rating": 5,
                "rejected_rating": 1,
            },
            "chosen_rating",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "confidence": 0.9, "margin": 1, "weight": 2}, None),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "soft_label": 0.9, "score_chosen": 5, "score_rejected": 1},
            None,
        ),
        (
            {
                "prompt": "a",
                "response_0": "b",
                "response_1": "c",
                "better_response_id": 0,
                "confidence": 0.9,
                "weight": 2,
            },
            None,
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "confidence": None, "chosen_rating": 3}, None),
    ],
)
def test_what_stands_beside_a_label_and_is_not_read_is_said(
    row: dict[str, Any], unread: str | None, tmp_path: Path
) -> None:
    write_jsonl(tmp_path / "p.jsonl", [{**row, "prompt": f"{row['prompt']} {i}"} for i in range(3)])
    pairs, report = read_pairs(str(tmp_path / "p.jsonl"))
    assert len(pairs) == 3
    said = {reason: count for reason, count in report.noted.items() if "beside these answers" in reason}
    expected = {} if unread is None else {f"`{unread}` beside these answers is not read": 3}
    assert {reason: count for reason, count in said.items() if unread is None or unread in reason} == expected
