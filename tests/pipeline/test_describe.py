"""`rlhf data`: what it says of a file, and what it writes; and the same sources in `evaluate`."""

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf.cli import app
from rlhf.data.read import BadRow
from rlhf.data.sources import Source, read_pairs
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from rlhf.pipeline.describe import describe_data, visible
from rlhf.pipeline.evaluate import evaluate_models
from rlhf.recipe import load_source

SHP = [
    {"history": f"say {i}", "human_ref_A": "yes", "human_ref_B": "no", "labels": 1, "score_A": 3, "score_B": 1}
    for i in range(4)
]


def described(source: Source, **options: Any) -> list[str]:
    said: list[str] = []
    describe_data(source, **{"model": None, "out": None, **options}, say=said.append)
    return said


def test_a_file_is_shown_as_it_is_read(base_folder: Path, tokenizer: Any, tmp_path: Path) -> None:
    file, out = tmp_path / "shp.jsonl", tmp_path / "out.jsonl"
    write_jsonl(file, [*SHP, {**SHP[0], "labels": 7}])
    said = described(Source(str(file)), model=str(base_folder), out=out)
    assert said[0] == f"{file}: columns history, human_ref_A, human_ref_B, labels, score_A, score_B"
    assert said[1].startswith("layout: SHP (`history`, ")
    assert 'read as SHP: `labels` 1: the first is better: chosen = "yes"' in said
    assert f"{file} (pairs): 4 of 5 rows kept." in said
    assert "  1 left out: labels is 7, neither 0 nor 1 (row 5)" in said
    assert "--- row 1 · rating_gap 2.0" in said
    assert sum(line.startswith("--- row") for line in said) == 3
    end = tokenizer.eos_token
    assert f"chosen: yes⟦{end}⟧" in said
    prompt = next(line for line in said if line.startswith("prompt: "))
    assert "say 0" in prompt
    most = len(tokenizer("yes", add_special_tokens=False)["input_ids"])
    assert f"chosen: {most} tokens in the middle, 95 % up to {most}, the longest {most}" in said
    assert said[-1] == f"{out}: 4 pairs"
    assert list(read_pairs(str(out))[0]) == read_jsonl(out) == list(read_pairs(str(file))[0])
    with pytest.raises(UserError, match="is there already"):
        described(Source(str(file)), out=out)


def test_what_it_writes_can_be_trained_on_where_some_pairs_are_ties(tmp_path: Path) -> None:
    """A layout gives a confidence to ties alone. Where people left some out themselves, nothing is filled in."""
    rows = [
        {
            f"conversation_{x}": [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{x} {i}"}]
            for x in "ab"
        }
        | {"winner": winner}
        for i, winner in enumerate(["model_a", "tie", "model_b"])
    ]
    write_jsonl(tmp_path / "arena.jsonl", rows)
    described(Source(str(tmp_path / "arena.jsonl")), out=tmp_path / "out.jsonl")
    assert [row["confidence"] for row in read_jsonl(tmp_path / "out.jsonl")] == [1.0, 0.5, 1.0]
    own = [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"prompt": "d", "chosen": "e", "rejected": "f", "confidence": 0.9},
    ]
    write_jsonl(tmp_path / "own.jsonl", own)
    described(Source(str(tmp_path / "own.jsonl")), out=tmp_path / "own-out.jsonl")
    assert ["confidence" in row for row in read_jsonl(tmp_path / "own-out.jsonl")] == [False, True]


def test_pairs_of_which_none_can_be_used_are_no_silent_demonstrations(base_folder: Path, tmp_path: Path) -> None:
    def turns(first: str, last: str) -> list[dict[str, str]]:
        texts = [("user", "say"), ("assistant", first), ("user", "more"), ("assistant", last)]
        return [{"role": role, "content": text} for role, text in texts]

    file = tmp_path / "parted.jsonl"
    write_jsonl(file, [{"chosen": turns("red", "yes"), "rejected": turns("blue", "no")}])
    said = described(Source(str(file)))
    assert said[1].endswith("read as demonstrations")
    assert said[2] == f"{file} (pairs): 0 of 1 rows kept."
    assert "part at turn 2" in said[3]
    said = described(Source(str(file)), compare_as="conversations")
    assert said[1].endswith("read as pairs")
    assert "chosen: assistant: red\n\nuser: more\n\nassistant: yes" in said
    shown = next(
        line
        for line in described(Source(str(file)), compare_as="conversations", model=str(base_folder))
        if line.startswith("rejected: ")
    )
    assert all(word in shown for word in ("blue", "more", "no"))


def test_special_tokens_are_told_from_words(tokenizer: Any) -> None:
    ids = [*tokenizer("say")["input_ids"], tokenizer.eos_token_id, *tokenizer("yes")["input_ids"]]
    assert visible(tokenizer, ids) == f"say⟦{tokenizer.eos_token}⟧yes"


def test_demonstrations_and_prompts_are_told_from_pairs(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "sft.jsonl", [{"prompt": "a", "completion": "yes"}])
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    assert described(Source(str(tmp_path / "sft.jsonl")))[1].endswith("read as demonstrations")
    assert described(Source(str(tmp_path / "prompts.jsonl")))[1].endswith("read as prompts")
    write_jsonl(tmp_path / "nothing.jsonl", [{"x": "a"}])
    with pytest.raises(
        UserError,
        match=r"holds no usable row.*\n(.*\n)*.*--columns prompt=…,chosen=…,rejected=…; .* --columns prompt=…,completion=… \(",
    ):
        described(Source(str(tmp_path / "nothing.jsonl")))
    write_jsonl(tmp_path / "nothing.jsonl", [{"x": "a", "response_1": "b", "response_2": "c", "better": 1}])
    with pytest.raises(UserError, match=r"say which is which: --columns prompt=…,preference=…; "):
        described(Source(str(tmp_path / "nothing.jsonl")))


def test_prompts_beside_which_something_else_stands(tmp_path: Path) -> None:
    """Answers under names that nobody knows are named, for a file of prompts alone is read from them without an error."""
    file = tmp_path / "rated.jsonl"
    write_jsonl(file, [{"prompt": "2 + 2?", "response": "four", "rating": 3, "id": "a"}])
    (sentence,) = [line for line in described(Source(str(file))) if line.startswith("Of each row")]
    assert "the prompt alone is read, and not `response`, `rating`." in sentence
    assert "--columns completion=response;" in sentence
    named = described(Source(str(file), columns={"completion": "response"}))
    assert not [line for line in named if line.startswith("Of each row")]
    assert "completion: four" in named

    write_jsonl(file, [{"prompt": "2 + 2?", "out_a": "four", "out_b": "five", "better": "out_a"}])
    (sentence,) = [line for line in described(Source(str(file))) if line.startswith("Of each row")]
    assert "not `out_a`, `out_b`, `better`." in sentence
    assert "--columns completion=…;" in sentence

    write_jsonl(file, [{"prompt": "2 + 2?", "id": "a", "split": "train", "place": 3, "system": "Count."}])
    assert not [line for line in described(Source(str(file))) if line.startswith("Of each row")]


def test_rows_that_the_model_cannot_write_are_not_written(
    base_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    file, out = tmp_path / "tools.jsonl", tmp_path / "out.jsonl"
    write_jsonl(file, [{"messages": turns}, {"messages": [turns[0], {"role": "assistant", "content": "four"}]}])

    def refused(template: Any, row: Any) -> Any:
        raise BadRow("this template writes no tool calls")

    monkeypatch.setattr("rlhf.models.tools.ToolTemplate.__call__", refused)
    said = described(Source(str(file)), model=str(base_folder), out=out)
    assert f"{file} (demonstrations): 1 of 2 rows kept." in said
    assert said[-1] == f"{out}: 1 demonstrations"
    assert len(read_jsonl(out)) == 1
    described(Source(str(file)), out=tmp_path / "all.jsonl")
    assert len(read_jsonl(tmp_path / "all.jsonl")) == 2, "where no model is given, all rows are"


def test_sources_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"q": "a", "good": "yes", "bad": "no"}]
    write_jsonl(tmp_path / "x.jsonl", rows)
    columns = "prompt=q,chosen=good,rejected=bad"
    app(["data", str(tmp_path / "x.jsonl"), "--columns", columns], standalone_mode=False)
    assert "chosen: yes" in capsys.readouterr().out
    entry = load_source("{source: org/x, config: helpful-base, split: train}")
    assert (entry.source, entry.config, entry.split) == ("org/x", "helpful-base", "train")
    for text, given, sentence in (
        ("{source: x, colums: {}}", None, "colums: extra inputs are not permitted"),
        ("{source: [", None, "is no mapping in YAML"),
        ("x.jsonl", "prompt", "write ours=theirs"),
    ):
        with pytest.raises(UserError, match=sentence):
            load_source(text, columns=given)


def test_evaluate_takes_all_of_it(reward_folder: Path, tmp_path: Path) -> None:
    """Public layouts, tables, mappings, ties; the accuracy is of decided pairs only."""
    talk = [[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}] for text in ("yes", "no")]
    arena = [{"winner": winner, "conversation_a": talk[0], "conversation_b": talk[1]} for winner in ("model_a", "tie")]
    arena[1]["conversation_b"] = [*talk[1][:1], {"role": "assistant", "content": "maybe"}]
    write_jsonl(tmp_path / "arena.jsonl", arena)
    (tmp_path / "table.csv").write_text("q,good,bad\na,yes,no\n")
    mapped = Source(str(tmp_path / "table.csv"), columns={"prompt": "q", "chosen": "good", "rejected": "bad"})
    said: list[str] = []
    result = evaluate_models(
        [str(reward_folder)], [str(tmp_path / "arena.jsonl"), mapped], tmp_path / "e.json", say=said.append
    )
    assert {name: entry["n"] for name, entry in result["data"].items()} == {"arena": 1, "table": 1}
    assert result["data"]["arena"]["accuracy"] == result["data"]["table"]["accuracy"], "the same pair"
    assert any("1 left out: ties, which nothing can be right about" in line for line in said)
    assert json.loads((tmp_path / "e.json").read_text())["data"]["arena"]["read"]["kept"] == 1
