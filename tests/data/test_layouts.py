"""The registry of layouts: which one a row has, what follows from little, and that adding one is an entry and a function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import layouts
from rlhf.data.canonical import pair
from rlhf.data.layouts import LAYOUTS, Layout, find_layout
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.read import BadRow
from rlhf.data.rows import Pair, answer, assistant_turn, completion, user_turn
from rlhf.data.sources import Source, read_pairs
from rlhf.files import read_jsonl, write_jsonl

TREE = {"text": "Hi", "role": "prompter", "replies": [{"text": "yes", "role": "assistant", "rank": 0}]}
PAIR = {"prompt": "Hi", "chosen": "yes", "rejected": "no"}


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("flat ranked list", [{"text": "Hi", "role": "prompter"}]),
        ("OASST tree", TREE),
        ("OASST tree", {"prompt": TREE, **{key: value for key, value in PAIR.items() if key != "prompt"}}),
        ("signed strength", {"prompt": "Hi", "response_1": "a", "response_2": "b"}),
        ("several right answers", {"prompt": "Hi", "chosen": ["a"], "rejected": ["b"], "responses": []}),
        ("K-wise row", {"prompt": "Hi", "responses": []}),
        ("K-wise row", {"prompt": "Hi", "completions": [], "response": "a", "helpfulness": 1}),
        ("rated answers", {"prompt": "Hi", "response": "a", "helpfulness": 1}),
        ("rated answers", {"messages": [], "attributes": []}),
        ("pair or conversation", {**PAIR, "response": "a", "helpfulness": 1}),
        ("pair or conversation", PAIR),
        ("pair or conversation", {"chosen": [], "rejected": []}),
        ("pair or conversation", {}),
    ],
)
def test_a_row_has_the_first_layout_that_matches(name: str, row: Any) -> None:
    assert find_layout(row).name == name


def test_every_layout_says_what_it_holds_in_one_way() -> None:
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)
    for layout in LAYOUTS:
        kinds = (layout.compares, layout.renames, layout.pairs, layout.rankings, layout.ratings)
        ways = [kind is not None for kind in kinds]
        assert sum(ways) == 1, layout.name


def question_good_bad(row: Mapping[str, object]) -> list[Pair]:
    return [pair({"prompt": row["question"], "chosen": row["good"], "rejected": row["bad"]})]


def test_a_new_layout_is_an_entry_and_a_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From pairs alone follow demonstrations and prompts; a bad row has its reason."""
    toy = Layout(
        "question",
        "`question`, `good`, `bad`",
        matches=lambda row: {"question", "good", "bad"} <= row.keys(),
        pairs=question_good_bad,
    )
    monkeypatch.setattr(layouts, "LAYOUTS", (LAYOUTS[0], toy, *LAYOUTS[1:]))
    rows = [{"question": f"Q{i}", "good": "yes", "bad": "no"} for i in range(50)]
    file = tmp_path / "toy.jsonl"
    write_jsonl(file, [*rows, {"question": "Q", "good": "same", "bad": "same"}, {"question": "Q", "good": "no bad"}])
    pairs, report = read_pairs(str(file))
    assert [answer(row, "chosen") for row in pairs] == ["yes"] * 50
    assert report.dropped == {"chosen and rejected are the same": 1, "no 'chosen' field": 1}


def test_what_a_layout_does_not_say_follows() -> None:
    layout = Layout("question", "", matches=lambda row: True, pairs=question_good_bad)
    row = {"question": "Hi", "good": "yes", "bad": "no"}
    assert layout.read_rankings(row) == []
    assert layout.read_demonstrations(row) == [{"prompt": user_turn("Hi"), "completion": assistant_turn("yes")}]
    assert layout.read_prompts(row) == [{"prompt": user_turn("Hi")}]


def test_a_ranking_gives_its_best_answer_and_its_prompt() -> None:
    row = {"prompt": "Hi", "responses": [{"content": "b", "score": 0}, {"content": "a", "score": 1}]}
    layout = find_layout(row)
    (demonstration,) = layout.read_demonstrations(row)
    assert completion(demonstration) == "a"
    assert layout.read_prompts(row) == [{"prompt": user_turn("Hi")}]


def test_rated_answers_are_no_pairs_by_themselves() -> None:
    row = {"prompt": "Hi", "response": "a", "helpfulness": 1}
    assert find_layout(row).read_pairs(row) == []
    with pytest.raises(BadRow, match="neither 'messages'"):
        find_layout(row).read_demonstrations(row)


def test_rated_answers_without_text_are_counted(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    write_jsonl(file, [PAIR, {"prompt": "Hi", "messages": None, "attributes": {"helpfulness": 1}}])
    _, report = read_pairs(str(file))
    assert report.dropped == {"the answer has no text": 1}


def test_texts_with_every_separator_are_prepared_whole(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d\x1ce"
    write_jsonl(tmp_path / "p.jsonl", [{**PAIR, "prompt": f"{text} {i}", "chosen": text} for i in range(40)])
    source = Source(str(tmp_path / "p.jsonl"))
    facts = prepare_data(tmp_path / "out", DataSources(sft=[source], preferences=[source]), seed=0)
    rows: list[Pair] = read_jsonl(tmp_path / "out" / "pairs.jsonl")
    assert len(rows) == facts["rows"]["pairs"]
    assert {answer(row, "chosen") for row in rows} == {text}
