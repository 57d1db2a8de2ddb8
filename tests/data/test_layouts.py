"""The registry of layouts: which one a row has, what follows from little, and that adding one is an entry and a function."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rlhf.data import layouts
from rlhf.data.canonical import pair
from rlhf.data.label_files import Answered
from rlhf.data.layouts import LAYOUTS, annotated, arena, find_layout, pku, shp, summaries
from rlhf.data.layouts.layout import Layout
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.read import BadRow, ReadReport
from rlhf.data.rows import Compare, Pair, answer, assistant_turn, completion, user_turn
from rlhf.data.sources import Source, read_pairs, read_sources, to_demonstrations
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from tests.data.layout_rows import ROWS, TABLE, canonical, turn

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


def read(file: Path, **stated: Any) -> tuple[list[Any], list[str]]:
    rows, report = read_pairs(Source(str(file), **stated))
    return list(rows), report.sentences()


@pytest.mark.parametrize("name", TABLE)
def test_every_layout_becomes_its_canonical_rows(tmp_path: Path, name: str) -> None:
    row, expected = TABLE[name]
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, [row(i) for i in ROWS])
    rows, sentences = read(file)
    assert rows == [expected(i) for i in ROWS]
    assert f"{file} (pairs): 6 of 6 rows kept." in sentences


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("PKU-SafeRLHF", 'read as PKU-SafeRLHF: `better_response_id` 0: the first is better: chosen = "yes 0"'),
        ("summarize-from-feedback", '`choice` 0: the first is better: chosen = "yes 0"'),
        ("WebGPT", 'read as WebGPT: `score_0, score_1` 0.5 and -0.25: the first is better: chosen = "yes 0"'),
        ("arena, ties", "`winner` tie: a tie, kept with confidence 0.5"),
        ("SHP", 'read as SHP: `labels` 1: the first is better: chosen = "yes 0"'),
        ("Orca DPO pairs", "read as pair under other names: `system`, `question`, `chosen`, `rejected`"),
        ("Label Studio, pairwise", "read as Label Studio: `preference` first: the first is better"),
    ],
)
def test_the_layout_and_its_direction_are_said(tmp_path: Path, name: str, sentence: str) -> None:
    write_jsonl(tmp_path / "rows.jsonl", [TABLE[name][0](i) for i in ROWS])
    assert any(sentence in line for line in read(tmp_path / "rows.jsonl")[1])


@pytest.mark.parametrize(
    ("name", "module", "function", "wrong"),
    [
        ("PKU-SafeRLHF", pku, "better_of", lambda value, column: "first" if value else "second"),
        ("summarize-from-feedback", summaries, "better_of", lambda value, column: "first" if value == 1 else "second"),
        ("SHP", shp, "better_of", lambda value, column: "first" if value else "second"),
        ("arena", arena, "named_side", lambda winner: {"model_a": "second", "model_b": "first"}.get(winner)),
        ("arena, ties", arena, "_better", lambda winner: "first"),
        ("Label Studio, pairwise", annotated, "named_side", lambda word: "second" if word in ("left", "answer2") else "first"),
        ("Argilla, records flat", annotated, "record_entries", lambda number, record: iter([
            Answered(0, "", label, user) for label, user in zip(
                record["preference.responses"], record["preference.responses.users"], strict=True)])),
    ],
)  # fmt: skip
def test_a_label_read_wrongly_would_be_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, module: Any, function: str, wrong: Any
) -> None:
    monkeypatch.setattr(module, function, wrong)
    if name == "Argilla, records flat":  # the layout holds the function that asks for the entries by name
        monkeypatch.setattr(annotated, "record_entries", wrong)
    with pytest.raises((AssertionError, UserError)):
        test_every_layout_becomes_its_canonical_rows(tmp_path, name)


def test_the_safer_response_is_a_key(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pku.jsonl", [TABLE["PKU-SafeRLHF"][0](i) for i in ROWS])
    rows, _ = read(tmp_path / "pku.jsonl", label="safer_response_id")
    assert [answer(row, "chosen") for row in rows] == [f"no {i}" for i in ROWS], "as planted: the safer one says no"
    with pytest.raises(UserError, match="no label of PKU-SafeRLHF; it has better_response_id and safer_response_id"):
        read(tmp_path / "pku.jsonl", label="kinder_response_id")
    write_jsonl(tmp_path / "plain.jsonl", [PAIR])
    with pytest.raises(UserError, match="take the key out"):
        read(tmp_path / "plain.jsonl", label="safer_response_id")


def mt_bench(number: int, last: str) -> list[dict[str, str]]:
    return [
        turn("user", f"say {number}"),
        turn("assistant", f"{last} one"),
        turn("user", "and?"),
        turn("assistant", last),
    ]


@pytest.mark.parametrize("compare", ["answers", "conversations"])
def test_a_verdict_on_the_first_turn_says_nothing_of_the_second(compare: Compare, tmp_path: Path) -> None:
    """MT-Bench's human judgments: each pair of two-turn conversations is judged after its first and after its second answer."""
    rows = [
        {"conversation_a": mt_bench(i, "a"), "conversation_b": mt_bench(i, "b"), "winner": winner, "turn": number}
        for i in range(20)
        for number, winner in (((1, 1.0, "1")[i % 3], "model_a"), (2, "model_b"))
    ]
    write_jsonl(tmp_path / "judgments.jsonl", rows)
    pairs, report = read_pairs(str(tmp_path / "judgments.jsonl"), compare=compare)
    first = [pair for pair in pairs if len(pair["prompt"]) + len(pair["chosen"]) == 2]
    assert len(first) == 20
    assert {pair["chosen"][-1]["content"] for pair in first} == {"a one"}
    whole = [pair for pair in pairs if pair not in first]
    if compare == "answers":  # they part at their first answer
        assert (whole, sum(report.dropped.values())) == ([], 20)
    else:
        assert {pair["chosen"][-1]["content"] for pair in whole} == {"b"}


@pytest.mark.parametrize("number", [2, 3, 0, None, "first", 1.5, True, [1]])
def test_the_arenas_count_of_turns_cuts_nothing(number: object) -> None:
    row = {"conversation_a": mt_bench(0, "a"), "conversation_b": mt_bench(0, "b"), "winner": "model_a", "turn": number}
    compared = arena.comparison(row, "winner")
    assert (compared.first, compared.second) == (row["conversation_a"], row["conversation_b"])


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("PKU-SafeRLHF", {"better_response_id": 2}, "better_response_id is 2, neither 0 nor 1"),
        ("PKU-SafeRLHF", {"better_response_id": None}, "better_response_id is missing, neither 0 nor 1"),
        ("summarize-from-feedback", {"choice": True}, "choice is True, neither 0 nor 1"),
        ("summarize-from-feedback", {"summaries": [{"text": "a"}]}, "summaries are not two mappings with text"),
        ("summarize-from-feedback", {"info": {}}, "info holds neither a post nor an article"),
        ("WebGPT", {"score_1": None}, "score_1 is not a finite number"),
        ("arena", {"winner": "model_c"}, "winner is 'model_c', neither model_a, model_b nor a tie"),
        ("SHP", {"labels": -1}, "labels is -1, neither 0 nor 1"),
        ("Label Studio, pairwise", {"annotations": []}, "nobody has labelled it yet"),
        ("Argilla, records", {"fields": {"prompt": "p", "a": "x"}}, "which two fields hold the answers is not clear; "
         "name them, such as first and second"),
        ("content as parts", {"prompt": [turn("user", [{"type": "image_url", "image_url": {"url": "u"}}])]},
         "a message of prompt holds a part of type 'image_url', which is no text"),
    ],
)  # fmt: skip
def test_a_bad_row_costs_itself_and_says_why(tmp_path: Path, name: str, change: Any, reason: str) -> None:
    rows = [TABLE[name][0](i) for i in ROWS]
    rows[3] |= change
    write_jsonl(tmp_path / "rows.jsonl", rows)
    kept, report = read_pairs(str(tmp_path / "rows.jsonl"))
    assert report.dropped == {reason: 1}
    assert report.examples[reason] == [4]
    assert list(kept) == [TABLE[name][1](i) for i in ROWS if i != 3]


def test_a_row_without_the_files_columns_names_the_column(tmp_path: Path) -> None:
    rows = [TABLE["SHP"][0](i) for i in ROWS]
    del rows[2]["human_ref_B"]
    write_jsonl(tmp_path / "rows.jsonl", rows)
    _, report = read_pairs(str(tmp_path / "rows.jsonl"))
    assert report.dropped == {"not of the file's layout, SHP: no 'human_ref_B'": 1}


def test_two_layouts_in_one_file_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "mixed.jsonl"
    write_jsonl(file, [TABLE["SHP"][0](0), {}, TABLE["PKU-SafeRLHF"][0](1)])
    with pytest.raises(UserError) as error:
        read(file)
    assert str(error.value) == (
        f"{file}: row 1 is of the layout SHP (by its column 'labels'), row 3 of the layout PKU-SafeRLHF (by its column "
        "'better_response_id'); a file has one layout, so split it."
    )


def test_annotators_who_disagree_give_a_confidence(tmp_path: Path) -> None:
    row = TABLE["Argilla, records"][0](0)
    votes = ["first", "second", "first", "tie"]
    row["responses"] = {"preference": [{"value": vote, "user_id": f"u{i}"} for i, vote in enumerate(votes)]}
    write_jsonl(tmp_path / "rows.jsonl", [row])
    assert read(tmp_path / "rows.jsonl")[0] == [canonical(0, id="0", annotator="u0, u1, u2, u3", confidence=0.625)]


def test_demonstrations_of_sharegpt_and_alpaca(tmp_path: Path) -> None:
    talked = [{"from": "human", "value": "say 1"}, {"from": "gpt", "value": "yes"}]
    write_jsonl(tmp_path / "sharegpt.jsonl", [{"conversations": talked}])
    write_jsonl(tmp_path / "alpaca.jsonl", [{"instruction": "say 1", "input": "", "output": "yes"}])
    for file in ("sharegpt", "alpaca"):
        reports: list[ReadReport] = []
        read_rows = read_sources([Source(str(tmp_path / f"{file}.jsonl"))], to_demonstrations, reports, "x", 0)
        assert [row.values for row in read_rows.train] == [
            {"prompt": user_turn("say 1"), "completion": assistant_turn("yes")}
        ]
        assert any("read as" in sentence for sentence in reports[0].sentences())


def test_ties_are_trained_on_and_never_tested_on(tmp_path: Path) -> None:
    """Beside pairs without a confidence they are no reason to refuse; no test pair is a tie."""
    write_jsonl(tmp_path / "arena.jsonl", [TABLE["arena, ties" if i % 2 else "arena"][0](i) for i in range(60)])
    write_jsonl(tmp_path / "pku.jsonl", [TABLE["PKU-SafeRLHF"][0](i) for i in range(60, 120)])
    sources = [Source(str(tmp_path / name)) for name in ("arena.jsonl", "pku.jsonl")]
    facts = prepare_data(tmp_path / "out", DataSources(sft=sources, preferences=sources), seed=0)
    rows = read_jsonl(tmp_path / "out/pairs.jsonl")
    assert sum(row.get("confidence") == 0.5 for row in rows) > 20
    assert all(row.get("confidence", 0.5) == 0.5 for row in rows)
    test_rows = read_jsonl(tmp_path / "out/test_pairs.jsonl")
    assert test_rows
    assert all("confidence" not in row for row in test_rows)
    dropped = facts["read"][0]["dropped"]
    assert dropped["a tie, which nothing can be tested on"] >= 1
