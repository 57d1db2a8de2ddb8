"""Every accepted format into the same canonical rows; every refused row counted with its reason; splits by prompt."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.canonical import demonstration, pair, prompt_only
from rlhf.data.messages import transcript
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.read import BadRow, ReadReport, read_rows
from rlhf.data.rows import answer, prompt_key
from rlhf.data.sources import Source, read_pair_rows, read_pairs
from rlhf.errors import UserError

USER = [{"role": "user", "content": "Hi"}]
YES, NO = [{"role": "assistant", "content": "yes"}], [{"role": "assistant", "content": "no"}]
CANONICAL = {"prompt": USER, "chosen": YES, "rejected": NO}


@pytest.mark.parametrize(
    "row",
    [
        CANONICAL,
        {"prompt": "Hi", "chosen": "yes", "rejected": "no"},
        {"chosen": USER + YES, "rejected": USER + NO},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: yes", "rejected": "\n\nHuman: Hi\n\nAssistant: no"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": " yes", "rejected": " no"},
    ],
    ids=["conversational", "plain", "implicit prompt", "transcript", "transcript prompt"],
)
def test_every_pair_format(row: dict[str, Any]) -> None:
    assert pair(row) == CANONICAL


def test_transcripts_join_turns_of_one_speaker() -> None:
    text = "\n\nHuman: a\n\nHuman: b\n\nAssistant: c\n\nmore\n\nHuman: d"
    assert transcript(text) == [
        {"role": "user", "content": "a\n\nb"},
        {"role": "assistant", "content": "c\n\nmore"},
        {"role": "user", "content": "d"},
    ]


@pytest.mark.fault("identical pair", "empty or missing text", "margin out of range")
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"rejected": None}, "no 'rejected' field"),
        ({"chosen": [{"role": "assistant", "content": "  "}]}, "chosen is empty"),
        ({"chosen": [{"role": "assistant", "content": None}]}, "has no text"),
        ({"chosen": [{"role": "assistant", "content": "no "}]}, "are the same"),
        ({"chosen": ["yes"]}, "not a list of messages"),
        ({"prompt": []}, "prompt is empty"),
        ({"prompt": USER + YES}, "does not end with a user's turn"),
        ({"prompt": [{"role": "critic", "content": "x"}]}, "unknown role"),
        ({"margin": float("nan")}, "margin is not a finite number"),
        ({"margin": "large"}, "margin is not a number"),
        ({"margin": 10**400}, "margin is not a finite number"),  # JSON's whole numbers have no end, and floats have
        ({"weight": 10**400}, "weight is not a finite number of 0 or more"),
        ({"confidence": 1.7}, "confidence is not a finite number in"),
        ({"weight": -1.0}, "weight is not a finite number of 0 or more"),
        ({"soft_label": 1.7}, r"confidence is not a finite number in \[0, 1\]"),
        ({"chosen": [{"role": "assistant", "content": "\ud83d"}]}, "lone surrogate"),
    ],
)
def test_every_bad_pair_has_its_reason(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        pair({**CANONICAL, **change})


def test_odd_but_valid_text_survives() -> None:
    text = "שלום 👩‍👩‍👧 \x00\x07 é"
    assert pair({**CANONICAL, "chosen": [{"role": "assistant", "content": text}]})["chosen"][0]["content"] == text


def test_demonstrations_and_prompts() -> None:
    expected = {"prompt": USER, "completion": YES}
    assert demonstration({"messages": USER + YES}) == expected
    assert demonstration({"prompt": "Hi", "completion": "yes"}) == expected
    assert demonstration(CANONICAL) == expected
    assert (
        prompt_only({"prompt": "Hi"})
        == prompt_only({"messages": USER + YES})
        == prompt_only(CANONICAL)
        == {"prompt": USER}
    )
    with pytest.raises(BadRow, match="last turn is not an assistant"):
        demonstration({"messages": USER})


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz", "x.json", "x.json.gz", "x.parquet"])
def test_every_file_format(tmp_path: Path, name: str) -> None:
    rows = [{"a": 1}, {"a": 2}]
    text = json.dumps(rows) if ".json" in name and "jsonl" not in name else "".join(json.dumps(r) + "\n" for r in rows)
    file = tmp_path / name
    if name.endswith(".parquet"):
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), file)
    elif name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    report = ReadReport(name)
    assert list(read_rows(str(file), report)) == [(1, {"a": 1}), (2, {"a": 2})]
    assert report.rows == 2


@pytest.mark.fault("empty or missing text")
def test_one_bad_line_costs_one_line(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    file.write_bytes(b'{"a": 1}\n{"a": \n\xff\xfe\n[1]\n\n{"a": 2}\n')
    report = ReadReport("x")
    assert [number for number, _ in read_rows(str(file), report)] == [1, 6]
    assert report.dropped == {"not valid JSON": 1, "not UTF-8 text": 1, "not a JSON object": 1}
    assert report.examples == {"not valid JSON": [2], "not UTF-8 text": [3], "not a JSON object": [4]}


def write(path: Path, rows: Sequence[Any]) -> list[Source]:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [Source(str(path))]


def many_pairs(count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"Question {i // 2}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_split_is_by_prompt_and_nothing_leaks(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.jsonl", many_pairs(400))
    sft = write(tmp_path / "s.jsonl", [{"prompt": f"question  {i}", "completion": "yes"} for i in range(200)])
    facts = prepare_data(tmp_path / "out", DataSources(sft=sft, preferences=pairs, test_fraction=0.2), seed=0)
    keys = {name: {prompt_key(row["prompt"]) for row in read(tmp_path / "out", name)} for name in facts["rows"]}
    assert 20 <= len(keys["test_pairs"]) <= 60  # 200 prompts, 20 %, five standard deviations
    assert facts["rows"]["pairs"] + facts["rows"]["test_pairs"] == 400
    for name in ("sft", "pairs", "prompts"):
        assert not keys[name] & keys["test_pairs"], name  # "question  3" and "Question 3" are one prompt
        assert not keys[name] & keys["test_prompts"], name


def test_marked_test_rows_are_the_test_side(tmp_path: Path) -> None:
    rows = [{**row, "split": "test" if i < 40 else "train"} for i, row in enumerate(many_pairs(200))]
    pairs = write(tmp_path / "p.jsonl", rows)
    facts = prepare_data(tmp_path / "out", DataSources(sft=pairs, preferences=pairs), seed=0)
    assert facts["rows"] == {"sft": 160, "pairs": 160, "test_pairs": 40, "prompts": 80, "test_prompts": 20}


@pytest.mark.fault("duplicates and leakage")
def test_duplicates_and_contradictions_are_counted(tmp_path: Path) -> None:
    rows = many_pairs(100)
    swapped = {"prompt": rows[0]["prompt"], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    pairs = write(tmp_path / "p.jsonl", [*rows, swapped, rows[5], rows[5]])
    test = write(tmp_path / "t.jsonl", [{"prompt": "other", "chosen": "a", "rejected": "b"}])
    facts = prepare_data(tmp_path / "out", DataSources(sft=pairs, preferences=pairs, test=test), seed=0)
    assert facts["rows"]["pairs"] == 99
    assert facts["read"][0]["dropped"] == {"stands in both orders": 2, "repeats another pair": 2}


@pytest.mark.fault("margin out of range")
def test_a_column_that_only_some_pairs_have_is_refused(tmp_path: Path) -> None:
    rows = many_pairs(100)
    rows[3]["margin"] = 0.5
    pairs = write(tmp_path / "p.jsonl", rows)
    test = write(tmp_path / "t.jsonl", [{"prompt": "other", "chosen": "a", "rejected": "b"}])
    with pytest.raises(UserError, match="99 of 100 pairs have no 'margin'"):
        prepare_data(tmp_path / "out", DataSources(sft=pairs, preferences=pairs, test=test), seed=0)


@pytest.mark.fault("empty or missing text")
def test_nothing_left_says_why(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.jsonl", [{"prompt": "a", "chosen": "same", "rejected": "same"}])
    with pytest.raises(UserError) as error:
        prepare_data(tmp_path / "out", DataSources(sft=pairs, preferences=pairs), seed=0)
    assert "chosen and rejected are the same (row 1)" in str(error.value)


def test_the_hub_is_asked_for_what_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked = []

    def load(name: str, split: str) -> Any:
        asked.append((name, split))
        rows = [
            {
                "chosen": f"\n\nHuman: {split} {i}\n\nAssistant: yes",
                "rejected": f"\n\nHuman: {split} {i}\n\nAssistant: no",
            }
            for i in range(5)
        ]
        return datasets.Dataset.from_list(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    facts = prepare_data(
        tmp_path / "out", DataSources(sft=[Source("org/demos")], preferences=[Source("org/pairs")]), seed=0
    )
    assert ("org/pairs", "train") in asked
    assert ("org/pairs", "test") in asked, "a hub dataset's own test split is the test side"
    assert facts["rows"] == {"sft": 5, "pairs": 5, "test_pairs": 5, "prompts": 5, "test_prompts": 5}


def test_labels_of_one_pair_by_different_annotators_are_all_kept(tmp_path: Path) -> None:
    """Also those that disagree; a repeat by the same annotator, and what she says both ways, are left out. Test sides hold each
    pair once, as most annotators have it."""
    a_then_b = {"prompt": "p", "chosen": "a", "rejected": "b"}
    b_then_a = {"prompt": "p", "chosen": "b", "rejected": "a"}
    rows = [
        {**a_then_b, "annotator": "ann"},
        {**a_then_b, "annotator": "bob"},
        {**b_then_a, "annotator": "cy"},
        {**a_then_b, "annotator": "ann"},
        {**a_then_b, "annotator": "dee"},
        {**b_then_a, "annotator": "dee"},
    ]
    file = tmp_path / "several.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    read, report = read_pair_rows(str(file))
    assert [row.values["annotator"] for row in read] == ["ann", "bob", "cy"]
    assert report.dropped == {"repeats another pair": 1, "stands in both orders": 2}
    ((pair,), report) = read_pairs(str(file))
    assert answer(pair, "chosen") == "a", "two to one; dee says nothing"
    assert report.dropped == {"most annotators of this pair say the opposite": 2, "repeats another pair": 3}
