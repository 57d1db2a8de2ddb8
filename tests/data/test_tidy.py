"""What stands around the texts of a row: repeated prompts, JSON texts, a system column, reasoning, ratings, a byte order mark."""

import codecs
import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.read import ReadReport
from rlhf.data.rows import Pair, answer, completion
from rlhf.data.sources import Source, read_pair_rows, read_sources, to_demonstrations, to_pairs, to_prompts
from rlhf.data.tidy import BEGINS, NO_SYSTEM, OTHER_SYSTEM, PARSED, REPEATED, SYSTEM
from rlhf.files import read_jsonl, write_jsonl

N = 6


def pairs_of(folder: Path, rows: Sequence[Any]) -> tuple[list[Pair], ReadReport]:
    write_jsonl(folder / "x.jsonl", rows)
    reports: list[ReadReport] = []
    read = read_sources([Source(str(folder / "x.jsonl"))], to_pairs, reports, "pairs", 0)
    return [row.values for row in read.train], reports[0]


def expect(pairs: Sequence[Pair], *, system: str | None = None, prompt: str = "say") -> None:
    head = [] if system is None else [{"role": "system", "content": system}]
    prompts = [[{**turn, "content": turn["content"].strip()} for turn in row["prompt"]] for row in pairs]
    assert prompts == [[*head, {"role": "user", "content": f"{prompt} {i}"}] for i in range(N)]
    assert [answer(row, "chosen") for row in pairs] == [f"yes {i}" for i in range(N)]
    assert [answer(row, "rejected") for row in pairs] == [f"no {i}" for i in range(N)]


def human(i: int) -> str:
    return f"\n\nHuman: say {i}\n\nAssistant:"


def turns(i: int, text: str, *more: dict[str, str]) -> list[dict[str, str]]:
    return [*more, {"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{text} {i}"}]


REPEATS = {
    "HH transcripts": lambda i, text: (human(i), f"{human(i)} {text} {i}"),
    "transcripts behind a plain prompt": lambda i, text: (f"say {i}", f"{human(i)} {text} {i}"),
    "plain texts": lambda i, text: (f"say {i}\n", f"say {i}\n{text} {i}"),
    "plain texts, blanks apart": lambda i, text: (f" say {i}", f"say {i} {text} {i}"),
    "messages": lambda i, text: ([{"role": "user", "content": f"say {i}"}], turns(i, text)),
    "messages behind a plain prompt": lambda i, text: (f"say {i}", turns(i, text)),
    "a plain text in messages": lambda i, text: (
        f"say {i}",
        [{"role": "assistant", "content": f"say {i}\n{text} {i}"}],
    ),
    "JSON text behind a plain prompt": lambda i, text: (f"say {i}", json.dumps(turns(i, text))),
}


@pytest.mark.parametrize("shape", REPEATS.values(), ids=REPEATS)
def test_a_prompt_at_the_head_of_both_answers_is_taken_off_counted_and_said(tmp_path: Path, shape: Any) -> None:
    rows = [
        {"prompt": shape(i, "yes")[0], "chosen": shape(i, "yes")[1], "rejected": shape(i, "no")[1]} for i in range(N)
    ]
    pairs, report = pairs_of(tmp_path, rows)
    expect(pairs)
    assert report.noted[REPEATED] == N
    assert any(f"{N} noted: {REPEATED} (row 1, 2, 3, 4, 5, …)" in line for line in report.sentences())
    reports: list[ReadReport] = []
    source = [Source(str(tmp_path / "x.jsonl"))]
    demonstrations = read_sources(source, to_demonstrations, reports, "", 0).train
    assert [completion(row.values) for row in demonstrations] == [f"yes {i}" for i in range(N)]
    assert [row.values for row in read_sources(source, to_prompts, reports, "", 0).train] == [
        {"prompt": row["prompt"]} for row in pairs
    ]


def test_a_system_turn_at_the_head_of_both_conversations_joins_the_prompt(tmp_path: Path) -> None:
    system = {"role": "system", "content": "be brief"}
    rows = [
        {"prompt": f"say {i}", "chosen": turns(i, "yes", system), "rejected": turns(i, "no", system)} for i in range(N)
    ]
    expect(pairs_of(tmp_path, rows)[0], system="be brief")


def test_answers_that_only_begin_like_their_prompt_stay(tmp_path: Path) -> None:
    """In a minority of rows it is the answer's wording, and not the file's habit."""
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(N)]
    rows[0] = {"prompt": "Hi", "chosen": "Hi there", "rejected": "Hi, and bye"}
    pairs, report = pairs_of(tmp_path, rows)
    assert answer(pairs[0], "chosen") == "Hi there"
    assert report.noted == {BEGINS: 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "car", "chosen": "carpet", "rejected": "cargo"},
        {"prompt": "Hi", "chosen": "Hi there", "rejected": "bye"},
        {"prompt": "Hi", "chosen": "Hi", "rejected": "Hi there"},
        {"prompt": "Hi", "chosen": '[{"role": "user", "content": "x"}]', "rejected": "no"},
        {"prompt": "Hi", "chosen": '[{"role": "critic", "content": "x"}]', "rejected": "[1, 2]"},
        {"prompt": "Hi", "chosen": "[", "rejected": "[]"},
        {"prompt": "Hi", "chosen": "yes", "rejected": "no", "system": " "},
        {"prompt": "Hi", "chosen": "yes", "rejected": "no", "system": None},
    ],
)
def test_healthy_texts_stay_as_they_are(tmp_path: Path, row: dict[str, Any]) -> None:
    (pair,), report = pairs_of(tmp_path, [row])
    assert (answer(pair, "chosen"), answer(pair, "rejected")) == (row["chosen"], row["rejected"])
    assert pair["prompt"] == [{"role": "user", "content": row["prompt"]}]
    assert report.noted == {}


def test_conversations_that_part_before_the_last_turn_are_left_out(tmp_path: Path) -> None:
    rows = [{"prompt": "say 0", "chosen": turns(0, "yes"), "rejected": turns(1, "no")}]
    pairs, report = pairs_of(tmp_path, rows)
    assert pairs == []
    assert report.dropped == {"chosen is not a single answer": 1}


@pytest.mark.parametrize("with_prompt", [True, False])
def test_json_texts_are_parsed_and_said(tmp_path: Path, with_prompt: bool) -> None:
    rows: list[Any] = [
        {"chosen": json.dumps(turns(i, "yes")), "rejected": json.dumps(turns(i, "no"))} for i in range(N)
    ]
    if with_prompt:
        rows = [{**row, "prompt": json.dumps([{"role": "user", "content": f"say {i}"}])} for i, row in enumerate(rows)]
    pairs, report = pairs_of(tmp_path, rows)
    expect(pairs)
    assert report.noted[PARSED] == N


def test_demonstrations_as_json_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "x.jsonl", [{"messages": json.dumps(turns(0, "yes")), "system": "be brief"}])
    reports: list[ReadReport] = []
    (row,) = read_sources([Source(str(tmp_path / "x.jsonl"))], to_demonstrations, reports, "", 0).train
    assert completion(row.values) == "yes 0"
    assert row.values["prompt"][0] == {"role": "system", "content": "be brief"}
    assert reports[0].noted == {PARSED: 1, SYSTEM: 1}


SYSTEMS = {
    "plain": lambda i: {"prompt": f"say {i}", "chosen": f" yes {i}", "rejected": f"no {i}\n"},
    "messages": lambda i: {"prompt": turns(i, "")[:1], "chosen": turns(i, "yes")[1:], "rejected": turns(i, "no")[1:]},
    "whole conversations": lambda i: {"chosen": turns(i, "yes"), "rejected": turns(i, "no")},
    "transcripts": lambda i: {"chosen": f"{human(i)} yes {i}", "rejected": f"{human(i)} no {i}"},
    "two responses": lambda i: {
        "context": f"say {i}",
        "response_1": f"no {i}",
        "response_2": f"yes {i}",
        "preference": 2,
    },
    "K-wise": lambda i: {
        "instruction": f"say {i}",
        "responses": [{"content": f"{w} {i}", "score": s} for w, s in (("no", 0), ("yes", 1))],
    },
    "several right answers": lambda i: {"prompt": f"say {i}", "chosen": [f"yes {i}"], "rejected": [f"no {i}"]},
}


@pytest.mark.parametrize("shape", SYSTEMS.values(), ids=SYSTEMS)
def test_a_system_column_becomes_the_system_turn(tmp_path: Path, shape: Any) -> None:
    pairs, report = pairs_of(tmp_path, [{"system": "be brief", **shape(i)} for i in range(N)])
    expect(pairs, system="be brief")
    assert report.noted[SYSTEM] == N


def test_a_system_turn_that_is_there_stays(tmp_path: Path) -> None:
    rows = [
        {"system": "other", "prompt": turns(i, "", {"role": "system", "content": "be brief"})[:2], "chosen": f"yes {i}", "rejected": f"no {i}"}
        for i in range(N)
    ]  # fmt: skip
    pairs, report = pairs_of(tmp_path, rows)
    expect(pairs, system="be brief")
    assert report.noted == {OTHER_SYSTEM: N}, "its column goes unread, which is said"
    pairs, report = pairs_of(tmp_path, [row | {"system": "be brief"} for row in rows])
    expect(pairs, system="be brief")
    assert report.noted == {}
    pairs, report = pairs_of(tmp_path, [row | {"system": {"tone": "brief"}} for row in rows])
    assert report.noted == {NO_SYSTEM: N}


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_is_counted_and_said(tmp_path: Path, name: str) -> None:
    rows = [
        {side: [{"role": "assistant", name: "because", "content": f"{text} {i}"}] for side, text in (("chosen", "yes"), ("rejected", "no"))}
        | {"prompt": f"say {i}"}
        for i in range(N)
    ]  # fmt: skip
    rows[0]["rejected"][0][name] = None  # type: ignore[index]
    pairs, report = pairs_of(tmp_path, rows)
    expect(pairs)
    assert report.noted == {f"`{name}` beside an answer is left out: no canonical row has a place for it": N}


RATING_COLUMNS = [
    ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"), ("chosen-rating", "rejected-rating"),
    ("chosen_score", "rejected_score"), ("score_chosen", "score_rejected"), ("chosen-score", "rejected-score"),
]  # fmt: skip


@pytest.mark.parametrize("columns", RATING_COLUMNS, ids=lambda columns: columns[0])
def test_ratings_against_the_label_and_ties_are_counted(tmp_path: Path, columns: tuple[str, str]) -> None:
    ratings = [(5, 2), (4, 1), (3, 3), (2, 4), (4.5, 1), (None, 3)]
    rows = [
        {"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}", columns[0]: a, columns[1]: b}
        for i, (a, b) in enumerate(ratings)
    ]
    pairs, report = pairs_of(tmp_path, rows)
    expect(pairs)
    assert [row.get("rating_gap") for row in pairs] == [3.0, 3.0, 0.0, -2.0, 3.5, None]
    assert report.noted == {
        "kept, though its two answers are rated alike": 1,
        "kept, though its ratings contradict its label": 1,
    }
    assert report.examples["kept, though its ratings contradict its label"] == [4]


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz"])
def test_a_byte_order_mark_costs_no_row(tmp_path: Path, name: str) -> None:
    rows = [{"prompt": f"say {i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(N)]
    text = json.dumps(rows) if "jsonl" not in name else "".join(json.dumps(row) + "\n" for row in rows)
    raw = codecs.BOM_UTF8 + text.encode()
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    pairs, report = read_pair_rows(str(tmp_path / name))
    expect([row.values for row in pairs])
    assert (report.rows, report.dropped) == (N, {})


def test_the_facts_and_sentences_of_the_data_stage_say_it(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"say {i}\n", "chosen": f"say {i}\nyes {i}", "rejected": f"say {i}\nno {i}", "system": "s"}
        for i in range(40)
    ]
    write_jsonl(tmp_path / "x.jsonl", rows)
    source = [Source(str(tmp_path / "x.jsonl"))]
    facts = prepare_data(tmp_path / "out", DataSources(sft=source, preferences=source), seed=0)
    assert facts["read"][0]["noted"] == {REPEATED: 40, SYSTEM: 40}
    assert facts["read"][0]["directions"] == ['`chosen` and `rejected`: chosen = "yes 0"']
    assert any(REPEATED in sentence for sentence in facts["sentences"])
    assert not any("chosen = " in sentence for sentence in facts["sentences"]), "the columns' names say it"
    row: Pair = read_jsonl(tmp_path / "out" / "pairs.jsonl")[0]
    assert row["prompt"][0] == {"role": "system", "content": "s"}
    assert answer(row, "chosen").startswith("yes")
