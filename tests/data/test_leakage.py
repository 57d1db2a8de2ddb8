"""What is held out of one file is in no other: one question under few system turns here and many there, one opening likewise."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.sources import Source
from rlhf.files import read_jsonl


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def system(number: int) -> dict[str, Any]:
    return {"role": "system", "content": f"You are helper {number}."}


def write(file: Path, rows: list[Any]) -> Source:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(file))


def pairs(*before: dict[str, Any], count: int = 60) -> list[Any]:
    return [
        {"prompt": [*before, user(f"question {i}?")], "chosen": f"good {i}", "rejected": f"bad {i}"}
        for i in range(count)
    ]


def demonstrations(systems: int) -> list[Any]:
    """Every question of `pairs` under so many system turns, with its chosen answer."""
    return [
        {"messages": [system(s), user(f"question {i}?"), assistant(f"good {i}")]}
        for i in range(60)
        for s in range(systems)
    ]


@pytest.mark.parametrize("systems", [10, 12])
@pytest.mark.parametrize("before", [(), (system(3),)], ids=["plain", "one of the system turns"])
def test_no_demonstration_answers_a_question_that_is_held_out(
    tmp_path: Path, systems: int, before: tuple[dict[str, Any], ...]
) -> None:
    """Beyond ten system turns a question counted as a template in the file of demonstrations, and 96 of 720 told the answer."""
    preferences, sft = write(tmp_path / "p.jsonl", pairs(*before)), write(tmp_path / "s.jsonl", demonstrations(systems))
    facts = prepare_data(tmp_path / "out", DataSources(preferences=[preferences], sft=[sft], test_fraction=0.2), seed=0)
    held = {row["prompt"][-1]["content"] for row in read_jsonl(tmp_path / "out/test_pairs.jsonl")}
    assert len(held) == facts["rows"]["test_pairs"] == 8
    left = [row["prompt"][-1]["content"] for row in read_jsonl(tmp_path / "out/sft.jsonl")]
    assert len(left) == (60 - 8) * systems
    assert held.isdisjoint(left)
    assert f"{8 * systems} left out: held out" in "\n".join(facts["sentences"])


def test_an_opening_that_many_chats_share_is_no_reason_to_lose_them(tmp_path: Path) -> None:
    """Three continuations of a greeting in the pairs, twelve in the chats: those with a held-out question go, and no others."""
    hello = [user("Hi"), assistant("Hello! How can I help?")]
    preferences = write(tmp_path / "p.jsonl", [*pairs(*hello, count=3), *pairs()[3:23]])
    chats = [
        [*hello, user(f"question {i}?"), assistant(f"good {i}"), user("Why?"), assistant("So.")] for i in range(12)
    ]
    sft = write(tmp_path / "s.jsonl", [{"messages": chat} for chat in chats])
    asked = 0
    for seed in range(12):
        sources = DataSources(preferences=[preferences], sft=[sft], test_fraction=0.2)
        prepare_data(tmp_path / f"{seed}", sources, seed=seed)
        test = [row["prompt"] for row in read_jsonl(tmp_path / f"{seed}/test_pairs.jsonl")]
        held = {prompt[-1]["content"] for prompt in test if len(prompt) == 3}
        left = [row["prompt"][2]["content"] for row in read_jsonl(tmp_path / f"{seed}/sft.jsonl")]
        assert sorted(left) == sorted({f"question {i}?" for i in range(12)} - held), seed
        asked += len(held)
    assert asked > 0


def test_within_one_file_its_own_rule_decides(tmp_path: Path) -> None:
    """A question under twelve system turns is a template there, so each has its own part; one of them plain is no reason to lose all."""
    rows = [
        {"prompt": [*before, user(f"task {i}")], "chosen": f"good {i} {s}", "rejected": "bad"}
        for i in range(10)
        for s, before in enumerate([[], *([system(n)] for n in range(12))])
    ]
    source = write(tmp_path / "p.jsonl", rows)
    facts = prepare_data(tmp_path / "out", DataSources(preferences=[source], test_fraction=0.2), seed=0)["rows"]
    assert facts["pairs"] + facts["test_pairs"] == 130


def test_a_given_test_side_leaks_by_conversation_too(tmp_path: Path) -> None:
    """Another turn of a conversation under many system turns is told of, or dropped."""
    preferences = write(tmp_path / "p.jsonl", [
        {"prompt": [system(s), user("question 0?"), assistant("good 0"), user("And?")], "chosen": "a", "rejected": "b"}
        for s in range(12)
    ] + pairs()[10:])  # fmt: skip
    test = write(tmp_path / "t.jsonl", pairs()[:2])
    sources = DataSources(preferences=[preferences], test=[test], leakage="drop")
    assert prepare_data(tmp_path / "drop", sources, seed=0)["rows"]["pairs"] == 50
    told = prepare_data(tmp_path / "told", DataSources(preferences=[preferences], test=[test]), seed=0)
    assert told["rows"]["pairs"] == 62
    assert any("12" in s and "trained on, though another prompt of its conversation" in s for s in told["sentences"])
