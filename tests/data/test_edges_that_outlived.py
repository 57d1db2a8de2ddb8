"""What deliberate faults in the code of data changed without any other test noticing."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.canonical import demonstration, pair
from rlhf.data.columns import named_rows
from rlhf.data.labels import Question, Verdict, tally
from rlhf.data.layouts import find_layout
from rlhf.data.layouts.annotated import _side, task_comparison
from rlhf.data.read import BadRow, ReadReport
from rlhf.data.read import read_rows as read_file
from rlhf.data.rows import assistant_turn, parting_turn, user_turn
from rlhf.data.sources import read_pairs
from rlhf.data.tidy import _parsed
from rlhf.errors import UserError

HALF = "\ud83d"  # half a character: JSON may hold it, no file in UTF-8 can


def conversation(*texts: str) -> Any:
    """Turns of a user and an assistant, who take turns."""
    return [(assistant_turn if i % 2 else user_turn)(text)[0] for i, text in enumerate(texts)]


@pytest.mark.parametrize("source", [None, "web"])
def test_a_labelled_pair_remembers_what_it_was_made_of(source: str | None) -> None:
    question = Question("r1-1", 1, user_turn("q"), "a", "b", source=source)
    (row,) = tally([question], [Verdict("r1-1", "second", "ann")]).rows
    assert row["chosen"] == assistant_turn("b")
    assert ("source" in row, row.get("source")) == (source is not None, source)


def test_a_pairwise_control_names_its_answers_in_any_order() -> None:
    """`toName` says which is on the left, whatever names like ours the data holds too."""
    result = {
        "type": "pairwise",
        "from_name": "preference",
        "to_name": "answer2,answer1",
        "value": {"selected": "left"},
    }
    data = {"prompt": "q", "answer1": "one", "answer2": "two"}
    task = {"data": data, "annotations": [{"result": [result]}]}
    assert find_layout(task).name == "Label Studio"
    compared = task_comparison(task, "")
    assert (compared.first, compared.second, compared.better) == ("two", "one", "first")


@pytest.mark.parametrize("label", ["=", "c", "tie", "equal"])
def test_words_for_a_tie_are_one(label: object) -> None:
    assert _side(label, ("first", "second")) == "tie"


def test_a_ranking_of_other_answers_names_those_that_it_lacks() -> None:
    ranking = [{"value": "first", "rank": 1}, {"value": "third", "rank": 2}]
    with pytest.raises(BadRow, match="a ranking that does not name first and second"):
        _side(ranking, ("first", "second"))


def test_a_bad_byte_far_behind_the_first_rows_has_the_number_of_its_row(tmp_path: Path) -> None:
    """Bytes are decoded by blocks, so the row is said that comes after the last one that was read whole."""
    file = tmp_path / "x.csv"
    block = 20_000
    file.write_bytes(b"prompt,chosen,rejected\n" + b"p,a,b\n" * block + b"p,a,\xff\n")
    read = 0
    with pytest.raises(UserError, match=r"x.csv: row \d+ is not UTF-8 text") as error:
        for number, _ in read_file(str(file), ReadReport("x.csv")):
            read = number
    assert f"row {read + 1} " in str(error.value)
    assert 0 < read <= block


def test_rows_of_a_table_are_counted_once(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("prompt,chosen,rejected\np,a,b\nq,a,b\n")
    rows, report = read_pairs(str(tmp_path / "x.csv"))
    assert (len(rows), report.rows, report.kept) == (2, 2, 2)


def test_rated_answers_without_another_are_noted_at_their_rows(tmp_path: Path) -> None:
    """All rows that a pair was made of are kept, not its first one alone."""
    helpfulness = {("p", "a"): 1, ("p", "b"): 2, ("alone", "c"): 3, ("p", "d"): 3, ("too", "e"): 1}
    rows = [{"prompt": p, "response": a, "helpfulness": rating} for (p, a), rating in helpfulness.items()]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, report = read_pairs(str(tmp_path / "x.jsonl"))
    note = "rated answers have no other answer to their prompt to be compared with"
    assert (report.noted[note], report.examples[note]) == (2, [3, 5])
    assert (report.rows, report.kept) == (5, 3)


def test_a_list_is_a_conversation_if_all_of_it_is() -> None:
    turns = conversation("hi", "ho")
    assert _parsed(json.dumps(turns), "chosen") == turns
    assert _parsed(json.dumps([*turns, "and so on"]), "chosen") is None
    assert _parsed(json.dumps([*turns, {"role": "pirate", "content": "arr"}]), "chosen") is None


def test_a_mapping_of_the_prompt_alone_leaves_the_answers_to_a_public_layout() -> None:
    row = {"question": "q", "chosen_response": "a", "rejected_response": "b"}
    layout = {**row, "prompt": row["question"]}
    (named,) = named_rows([(1, row)], "x.jsonl", ReadReport("x.jsonl"), columns={"prompt": "question"})
    assert find_layout(layout).name == (named.layout.name if named.layout else None)
    assert named.row == {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize("middle", [1, 2])
def test_every_turn_between_can_be_written(middle: int) -> None:
    texts = ["one", "two", "three", "four"]
    texts[middle] = HALF
    with pytest.raises(BadRow, match="a lone surrogate, which is no text"):
        pair(
            {
                "chosen": conversation("q", "a", *texts[:1]) + conversation(*texts)[1:],
                "rejected": conversation("q", "b"),
            }
        )


@pytest.mark.parametrize("turn", [0, 1, 2])
def test_every_turn_before_a_demonstration_can_be_written(turn: int) -> None:
    texts = ["one", "two", "three", "four"]
    texts[turn] = HALF
    with pytest.raises(BadRow, match="a lone surrogate, which is no text"):
        demonstration({"messages": conversation(*texts)})


@pytest.mark.parametrize("side", ["chosen", "rejected"])
def test_sides_part_early_whichever_is_the_longer(side: str) -> None:
    other = "rejected" if side == "chosen" else "chosen"
    row: Any = {"prompt": user_turn("q")}
    row[side], row[other] = assistant_turn("a") + user_turn("b"), assistant_turn("a")
    assert parting_turn(row) == 3
    row[side], row[other] = assistant_turn("a"), assistant_turn("b")
    assert parting_turn(row) is None
