"""What is written of which sources: the files of a run, their test sides, and the rows that stand on no side."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from rlhf.data.lines import own_lines
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.ratings import RatingScale
from rlhf.data.read import ReadReport, read_rows
from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.files import read_jsonl


def source(file: Path, rows: Sequence[Any], **how: Any) -> list[Source]:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [Source(str(file), **how)]


def pairs(count: int, name: str = "q", **more: Any) -> list[dict[str, Any]]:
    return [{"prompt": f"{name}{i}", "chosen": "yes", "rejected": "no", **more} for i in range(count)]


def prompts_in(folder: Path, name: str) -> set[str]:
    lines = (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    return {json.loads(line)["prompt"][-1]["content"] for line in lines}


def test_without_pairs_there_are_prompts_and_test_pairs_only_where_given(tmp_path: Path) -> None:
    prompts = source(tmp_path / "p.jsonl", [{"prompt": f"q{i}"} for i in range(100)])
    facts = prepare_data(tmp_path / "a", DataSources(prompts=prompts), seed=0)
    assert set(facts["rows"]) == {"prompts", "test_prompts"}
    assert facts["rows"]["prompts"] + facts["rows"]["test_prompts"] == 100
    test = source(tmp_path / "t.jsonl", pairs(3, "t"))
    facts = prepare_data(tmp_path / "b", DataSources(prompts=prompts, test=test), seed=0)
    assert facts["rows"]["test_pairs"] == 3
    assert not (tmp_path / "b" / "pairs.jsonl").exists()


def test_ratings_of_held_out_prompts_are_not_trained_on(tmp_path: Path) -> None:
    rows = [{"prompt": f"q{i}", "response": f"yes {k}", "helpfulness": k} for i in range(100) for k in (1, 2)]
    rated = RatingScale(names=("helpfulness",), low=0, high=4)
    given = source(tmp_path / "r.jsonl", rows)
    facts = prepare_data(tmp_path / "a", DataSources(preferences=given, ratings=rated, test_fraction=0.3), seed=0)
    held_out = {f"q{i}" for i in range(100)} - prompts_in(tmp_path / "a", "ratings")
    assert 10 <= len(held_out) <= 50, "100 prompts, 0.3, four standard deviations"
    assert held_out == prompts_in(tmp_path / "a", "test_prompts") == prompts_in(tmp_path / "a", "test_pairs")
    assert facts["rows"]["ratings"] == 2 * (100 - len(held_out))
    assert (
        prompts_in(tmp_path / "a", "prompts")
        == prompts_in(tmp_path / "a", "ratings")
        == prompts_in(tmp_path / "a", "pairs")
    )
    alone = source(tmp_path / "s.jsonl", rows[::2])
    test = source(tmp_path / "t.jsonl", pairs(2, "t"))
    facts = prepare_data(tmp_path / "b", DataSources(preferences=alone, ratings=rated, test=test), seed=0)
    assert set(facts["rows"]) == {"ratings", "test_pairs", "prompts", "test_prompts"}, "one answer a prompt: no pairs"


def test_ratings_of_a_source_with_its_own_test_side_are_all_trained_on(tmp_path: Path) -> None:
    def answers(numbers: range) -> list[dict[str, Any]]:
        return [{"prompt": f"q{i}", "response": f"yes {k}", "helpfulness": k} for i in numbers for k in (1, 2)]

    parts = {"train": answers(range(60)), "test": answers(range(60, 80))}
    saved = DatasetDict({name: Dataset.from_list(rows) for name, rows in parts.items()})
    saved.save_to_disk(tmp_path / "saved")
    rated = RatingScale(names=("helpfulness",), low=0, high=4)
    other = source(tmp_path / "r.jsonl", [{**row, "prompt": f"other {row['prompt']}"} for row in answers(range(100))])
    given = DataSources(preferences=[Source(str(tmp_path / "saved")), *other], ratings=rated, test_fraction=0.3)
    prepare_data(tmp_path / "a", given, seed=0)
    for name in ("pairs", "ratings"):
        prompts = prompts_in(tmp_path / "a", name)
        assert {prompt for prompt in prompts if prompt.startswith("q")} == {f"q{i}" for i in range(60)}
        assert len({prompt for prompt in prompts if prompt.startswith("other")}) < 100, "held out by us"


@pytest.mark.parametrize("leakage", ["refuse", "drop", "allow"])
def test_rows_of_a_given_test_prompt(tmp_path: Path, leakage: Any) -> None:
    given = DataSources(
        sft=source(tmp_path / "s.jsonl", [{"prompt": f"q{i}", "completion": "x"} for i in (0, 50)]),
        preferences=source(tmp_path / "p.jsonl", pairs(10)),
        test=source(tmp_path / "t.jsonl", pairs(2)),
        leakage=leakage,
    )
    if leakage == "refuse":
        with pytest.raises(UserError, match=r"3 training rows \(2 of pairs, 1 of demonstrations\).*p\.jsonl.*row 1;"):
            prepare_data(tmp_path / "a", given, seed=0)
        assert not (tmp_path / "a").exists()
        return
    facts = prepare_data(tmp_path / "a", given, seed=0)
    kept = {"drop": (8, 1, 8), "allow": (10, 2, 10)}[leakage]
    assert tuple(facts["rows"][name] for name in ("pairs", "sft", "prompts")) == kept
    said = [read["noted"] for read in facts["read"] if read["noted"]]
    assert bool(said) == (leakage == "allow")


@pytest.mark.parametrize("leakage", ["refuse", "drop"])
def test_other_turns_of_a_given_test_conversation_and_other_system_turns(tmp_path: Path, leakage: Any) -> None:
    """The question under a system turn, and a turn that follows its answer: kept without a word on both sides."""

    def asked(i: int, *before: dict[str, str]) -> dict[str, Any]:
        return {"prompt": [*before, {"role": "user", "content": f"q{i}"}], **sides}

    sides = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "yes"), ("rejected", "no"))}
    follows = [*asked(1)["prompt"], *sides["chosen"], {"role": "user", "content": "sure?"}]
    test = [asked(0, {"role": "system", "content": "be nice"}), {"prompt": follows, **sides}]
    given = DataSources(
        preferences=source(tmp_path / "p.jsonl", [asked(i) for i in range(10)]),
        test=source(tmp_path / "t.jsonl", test),
        leakage=leakage,
    )
    facts = prepare_data(tmp_path / "a", given, seed=0)
    assert facts["rows"]["pairs"] == (8 if leakage == "drop" else 10)
    (sentence,) = [line for line in facts["sentences"] if "another prompt of its conversation" in line]
    assert sentence.strip().startswith("2 left out" if leakage == "drop" else "2 noted")


def test_our_own_split_keeps_a_question_under_several_system_turns_on_one_side(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": [{"role": "system", "content": s}, {"role": "user", "content": f"q{i}"}],
            "chosen": "a",
            "rejected": "b",
        }
        for i in range(40)
        for s in ("be nice", "be brief")
    ]
    rows = [{**row, **{n: [{"role": "assistant", "content": row[n]}] for n in ("chosen", "rejected")}} for row in rows]
    prepare_data(tmp_path / "a", DataSources(preferences=source(tmp_path / "p.jsonl", rows), test_fraction=0.3), seed=0)
    train, test = (
        {row["prompt"][-1]["content"] for row in read_jsonl(tmp_path / "a" / f"{name}.jsonl")}
        for name in ("pairs", "test_pairs")
    )
    assert test
    assert not train & test


def test_a_source_among_others_names_its_pairs(tmp_path: Path) -> None:
    both = source(tmp_path / "a.jsonl", pairs(20, "a")) + source(tmp_path / "b.jsonl", pairs(20, "b", source="own"))
    prepare_data(tmp_path / "both", DataSources(preferences=both), seed=0)
    rows = [json.loads(line) for line in (tmp_path / "both" / "pairs.jsonl").read_text().splitlines()]
    assert {(row["prompt"][0]["content"][0], row["source"]) for row in rows} == {("a", both[0].source), ("b", "own")}
    prepare_data(tmp_path / "one", DataSources(preferences=both[:1]), seed=0)
    assert '"source"' not in (tmp_path / "one" / "pairs.jsonl").read_text()


def test_a_source_with_a_test_side_holds_out_nothing_of_its_own(tmp_path: Path) -> None:
    marked = pairs(20, "a") + pairs(5, "t", split="test")
    both = source(tmp_path / "a.jsonl", marked) + source(tmp_path / "b.jsonl", pairs(100, "b"))
    prepare_data(tmp_path / "out", DataSources(preferences=both, test_fraction=0.3), seed=0)
    test, train = (prompts_in(tmp_path / "out", name) for name in ("test_pairs", "pairs"))
    assert {prompt for prompt in test if prompt[0] == "t"} == {f"t{i}" for i in range(5)}
    assert not {prompt for prompt in test if prompt[0] == "a"}
    assert 10 <= sum(prompt[0] == "b" for prompt in test) <= 50
    assert len(train) == 120 - sum(prompt[0] == "b" for prompt in test)


def test_marked_rows_give_way_to_a_test_side_that_is_given(tmp_path: Path) -> None:
    marked = source(tmp_path / "a.jsonl", pairs(20, "a") + pairs(5, "t", split="test"))
    given = DataSources(preferences=marked, test=source(tmp_path / "t.jsonl", pairs(3, "u")))
    facts = prepare_data(tmp_path / "out", given, seed=0)
    assert prompts_in(tmp_path / "out", "test_pairs") == {"u0", "u1", "u2"}
    assert facts["read"][0]["dropped"] == {"marked as test, but data.test is given": 5}
    assert facts["rows"]["pairs"] == 20


def test_a_conversation_may_have_so_many_characters_with_its_longest_answer(tmp_path: Path) -> None:
    rows = [
        {"prompt": "12345", "chosen": "a", "rejected": "12345"},
        {"prompt": "1234", "chosen": "123456", "rejected": "b"},
        {"prompt": "54321", "chosen": "123456", "rejected": "1"},
        {"prompt": "1234567", "chosen": "d", "rejected": "1234"},
    ]
    given = DataSources(
        preferences=source(tmp_path / "a.jsonl", rows),
        test=source(tmp_path / "t.jsonl", [*pairs(1, "t"), {"prompt": "t", "chosen": "1234567890", "rejected": "x"}]),
        max_characters=10,
    )
    facts = prepare_data(tmp_path / "out", given, seed=0)
    assert prompts_in(tmp_path / "out", "pairs") == {"12345", "1234"}
    assert prompts_in(tmp_path / "out", "test_pairs") == {"t0"}
    assert [read["dropped"] for read in facts["read"][:2]] == [
        {"over data.max_characters=10": 2},
        {"over data.max_characters=10": 1},
    ]


def test_a_saved_folder_has_its_own_test_split_and_rows_from_one(tmp_path: Path) -> None:
    folder = str(tmp_path / "saved")
    DatasetDict(
        train=Dataset.from_list(pairs(9, "a")), test=Dataset.from_list([*pairs(3, "t"), {"prompt": "x"}])
    ).save_to_disk(folder)
    prepare_data(tmp_path / "out", DataSources(preferences=[Source(folder)]), seed=0)
    assert prompts_in(tmp_path / "out", "test_pairs") == {"t0", "t1", "t2"}
    assert len(prompts_in(tmp_path / "out", "pairs")) == 9
    report = ReadReport("x")
    assert [number for number, _ in read_rows(folder, report, split="test")] == [1, 2, 3, 4]
    assert report.rows == 4
    capped = DataSources(preferences=[Source(folder, fraction=0.5, max_rows=2)])
    prepare_data(tmp_path / "capped", capped, seed=0)
    assert len(prompts_in(tmp_path / "capped", "test_pairs")) == 3, "the test side is never cut"
    named = DataSources(preferences=[Source(folder, split="test")], test_fraction=0.5)
    prepare_data(tmp_path / "named", named, seed=0)
    assert prompts_in(tmp_path / "named", "pairs") | prompts_in(tmp_path / "named", "test_pairs") == {"t0", "t1", "t2"}


def test_a_lists_rows_are_lines_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "x.json"
    file.write_text('[{"a": "é"},\n {"a": 2}]', encoding="utf-8")
    assert list(own_lines(Source(str(file)))) == [(1, '{"a": "é"}\n'.encode()), (2, b'{"a": 2}\n')]
