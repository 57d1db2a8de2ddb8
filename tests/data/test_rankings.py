"""Every published form of a ranking into the same pairs; mixtures; leakage."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from rlhf.data.layouts import find_layout
from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.rankings import Answer, Ranking, comparisons, group_rated, rated_answers
from rlhf.data.read import BadRow, ReadReport
from rlhf.data.rows import Messages, completion
from rlhf.data.sources import Source, read_pairs, read_sources, to_demonstrations
from rlhf.errors import UserError

USER = [{"role": "user", "content": "Hi"}]
SHARED = Path(__file__).parents[3] / "shared" / "data"


def node(text: str, role: str, *replies: dict[str, Any], **facts: Any) -> dict[str, Any]:
    return {"text": text, "role": role, "replies": list(replies), **facts}


TREE = node(
    "Hi",
    "prompter",
    node("good", "assistant", rank=0),
    node(
        "bad",
        "assistant",
        node("More?", "prompter", node("sure", "assistant", rank=0), node("never", "assistant", rank=1)),
        rank=2,
    ),
    node("fair", "assistant", rank=1),
    node("spam", "assistant", deleted=True, rank=0),
    node("unranked", "assistant"),
)


def rankings(row: Any) -> list[Ranking]:
    return find_layout(row).read_rankings(row)


def best_answers(row: Any) -> list[tuple[Messages, str]]:
    return [(d["prompt"], completion(d)) for d in find_layout(row).read_demonstrations(row)]


def order(row: Any) -> list[tuple[str, str, str, float]]:
    return sorted(
        (
            pair["prompt"][-1]["content"],
            pair["chosen"][0]["content"],
            pair["rejected"][0]["content"],
            pair["rating_gap"],
        )
        for ranking in rankings(row)
        for pair in comparisons(ranking)
    )


THREE = [("Hi", "fair", "bad", 1.0), ("Hi", "good", "bad", 2.0), ("Hi", "good", "fair", 1.0)]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": USER, "responses": [{"content": "bad", "score": 0}, {"content": "good", "score": 2}, {"content": "fair", "score": 1}]},
        {"prompt": "Hi", "answers": [{"answer": "good", "rank": 1}, {"answer": "bad", "rank": 3}, {"answer": "fair", "rank": 2}]},
        {"instruction": "Hi", "completions": [{"response": "good", "overall_score": 9}, {"response": "bad", "overall_score": 7}, {"response": "fair", "overall_score": 8}]},
        [{"text": "Hi", "role": "prompter"}, *({"text": text, "role": "assistant"} for text in ("good", "fair", "bad"))],
    ],
    ids=["k-wise", "ranks", "scores", "flat list, best first"],
)  # fmt: skip
def test_every_form_of_a_ranking(row: Any) -> None:
    assert find_layout(row).rankings is not None
    assert order(row) == THREE


def test_a_tree_gives_the_rankings_of_all_its_turns() -> None:
    """Deleted and unranked answers take no part; a deeper turn has the whole thread as its prompt."""
    assert order({"prompt": TREE, "message_tree_id": "x"}) == [*THREE, ("More?", "sure", "never", 1.0)]
    assert order(TREE) == order({"prompt": TREE})
    deeper = next(r for r in rankings(TREE) if r.prompt[-1]["content"] == "More?")
    assert [turn["role"] for turn in deeper.prompt] == ["user", "assistant", "user"]
    assert best_answers(TREE)[0] == (USER, "good")
    assert best_answers(node("Hi", "prompter", node("only", "assistant"))) == [(USER, "only")]


@pytest.mark.parametrize(("strength", "chosen"), [(2, "b"), (-3, "a")])
def test_signed_strength(strength: int, chosen: str) -> None:
    for row in (
        {"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": strength},
        {"context": USER, "response1": "a", "response2": "b", "overall_preference": strength},
    ):
        (pair,) = comparisons(rankings(row)[0])
        assert pair["chosen"][0]["content"] == chosen
        assert pair["rating_gap"] == abs(strength)


def test_several_right_answers() -> None:
    pairs = comparisons(rankings({"prompt": "Hi", "chosen": ["a", "b"], "rejected": ["x", "y", "z"]})[0])
    assert len(pairs) == 6
    assert {pair["chosen"][0]["content"] for pair in pairs} == {"a", "b"}
    assert len({pair["group"] for pair in pairs}) == 1


def test_equal_scores_are_no_pair() -> None:
    scores = [("a", 1.0), ("b", 1.0), ("c", 0.0)]
    row = {"prompt": "Hi", "responses": [{"content": c, "score": s} for c, s in scores]}
    assert [(p, c, r) for p, c, r, _ in order(row)] == [("Hi", "a", "c"), ("Hi", "b", "c")]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Hi", "responses": [{"content": "a", "score": 1}]}, "no two answers of different rank"),
        ({"prompt": "Hi", "responses": [{"content": "a"}, {"content": "b", "score": 1}]}, "neither score nor rank"),
        ({"prompt": "Hi", "responses": [{"content": "a", "rank": 1}, {"content": "b", "score": 2}]}, "others a rank alone"),
        ({"prompt": "Hi", "responses": ["a", "b"]}, "no mapping with text and score"),
        ({"prompt": "Hi", "responses": [{"content": " ", "score": 0}, {"content": "b", "score": 1}]}, "an answer is empty"),
        ({"prompt": "Hi", "responses": [{"content": "a", "score": float("nan")}, {"content": "b", "score": 1}]}, "not a finite"),
        ({"prompt": "Hi", "response_1": "a", "response_2": "b", "preference_strength": 0}, "strength 0"),
        ({"prompt": "Hi", "response_1": "a", "response_2": "b"}, "without a preference"),
        ([{"text": "Hi", "role": "prompter"}, {"text": "a", "role": "assistant"}], "two answers or more"),
        ([{"text": "a", "role": "assistant"}, {"text": "b", "role": "assistant"}], "the prompt is empty"),
        ([{"text": "Hi", "role": "critic"}], "known role"),
    ],
)  # fmt: skip
def test_every_bad_ranking_has_its_reason(row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        rankings(row)


def test_rated_answers_are_compared_with_those_of_their_prompt() -> None:
    rows = [
        {"prompt": "Hi", "response": "a", "helpfulness": 4, "verbosity": 1},
        {"prompt": "hi ", "response": "b", "helpfulness": 2},
        {"prompt": "Other", "response": "c", "helpfulness": 3},
        {"messages": [*USER, {"role": "assistant", "content": "d"}], "attributes": [{"helpfulness": 0}]},
    ]
    rated = [answer for row in rows for answer in rated_answers(row)]
    (ranking,) = group_rated(rated)
    assert ranking.answers == [Answer("a", 4.0), Answer("b", 2.0), Answer("d", 0.0)]
    with pytest.raises(BadRow, match="without 'helpfulness'"):
        rated_answers({"prompt": "Hi", "response": "a", "attributes": {"verbosity": 1}})


def test_one_text_that_was_rated_twice_has_nothing_to_be_compared_with(tmp_path: Path) -> None:
    twice = [{"prompt": "Hi", "response": text, "helpfulness": good} for text, good in (("a", 1), ("a ", 3))]
    rated = [{"prompt": "Rate", "response": r, "helpfulness": h} for r, h in (("good", 4), ("poor", 1))]
    pairs, report = read_pairs(write(tmp_path / "x.jsonl", [*twice, *rated]).source)
    assert [pair["prompt"][-1]["content"] for pair in pairs] == ["Rate"]
    assert report.noted["rated answers have no other answer to their prompt to be compared with"] == 2


# ---- From files ----


def write(path: Path, rows: Sequence[Any]) -> Source:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Source(str(path))


def many(count: int, name: str = "p") -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {i // 2}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(count)]


def read(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


OTHER = [{"prompt": "other", "chosen": "a", "rejected": "b"}]


def test_all_forms_in_one_file(tmp_path: Path) -> None:
    flat = [{"text": "Hey", "role": "prompter"}, {"text": "x", "role": "assistant"}, {"text": "y", "role": "assistant"}]
    rated = [{"prompt": "Rate", "response": r, "helpfulness": h} for r, h in (("good", 4), ("poor", 1))]
    rows = [TREE, flat, *rated, {"prompt": "Pair", "chosen": "a", "rejected": "b"}, {"prompt": "bad"}]
    pairs, report = read_pairs(write(tmp_path / "x.jsonl", rows).source)
    assert [pair["prompt"][-1]["content"] for pair in pairs] == ["Hi"] * 3 + ["More?", "Hey", "Pair", "Rate"]
    assert (report.rows, report.kept) == (6, 5), "the rated answers are one ranking, made of both rows"
    assert report.dropped == {"no 'chosen' field": 1}


def test_a_mixture_with_fraction_and_caps(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.jsonl", many(400, "a")), write(tmp_path / "b.jsonl", many(100, "b"))
    test = write(tmp_path / "t.jsonl", OTHER)
    sources = DataSources(
        preferences=[Source(first.source, fraction=0.25), Source(second.source, max_rows=10)],
        test=[test],
        max_pairs_per_prompt=1,
    )
    facts = prepare_data(tmp_path / "out", sources, seed=0)
    kept = [row["prompt"][0]["content"] for row in read(tmp_path / "out", "pairs")]
    assert len(kept) == len(set(kept)), "one pair of each prompt"
    assert 30 <= sum(name.startswith("a") for name in kept) <= 70  # 200 prompts, a quarter, three deviations
    reasons = [report["dropped"] for report in facts["read"]]
    assert reasons[0]["outside the fraction 0.25"] % 2 == 0, "both rows of a prompt go together"
    assert reasons[1]["over max_rows 10"] == 90
    again = prepare_data(tmp_path / "again", sources, seed=0)
    assert again["rows"] == facts["rows"]
    assert read(tmp_path / "again", "pairs") == read(tmp_path / "out", "pairs")


def test_long_conversations_are_left_out_of_everything_and_counted(tmp_path: Path) -> None:
    """A prompt of 6 characters with answers of 1 and 4: ten in all, the longer answer counted on whichever side it is."""
    sizes = ("abcd", "e"), ("e", "abcd"), ("abcde", "e")
    pairs = [{"prompt": f"ask {i}{j}", "chosen": c, "rejected": r} for i in range(3) for j, (c, r) in enumerate(sizes)]
    demonstrations = [{"prompt": "do it!", "completion": "abcd"}, {"prompt": "do it?", "completion": "abcde"}]
    test = [
        {"prompt": "test 1", "chosen": "abcd", "rejected": "b"},
        {"prompt": "test 22", "chosen": "abcd", "rejected": "b"},
    ]
    prompts = [{"prompt": f"{i:010}"} for i in range(20)] + [{"prompt": "0123456789a"}]
    sources = DataSources(
        preferences=[write(tmp_path / "p.jsonl", pairs)],
        sft=[write(tmp_path / "s.jsonl", demonstrations)],
        test=[write(tmp_path / "t.jsonl", test)],
        prompts=[write(tmp_path / "q.jsonl", prompts)],
        test_fraction=0.3,
        max_characters=10,
    )
    facts = prepare_data(tmp_path / "out", sources, seed=0)
    sizes_kept = {len(row["chosen"][-1]["content"]) for row in read(tmp_path / "out", "pairs")}
    assert sizes_kept == {1, 4}
    counts = {"sft": 1, "pairs": 6, "test_pairs": 1}
    assert {name: facts["rows"][name] for name in counts} == counts
    assert facts["rows"]["prompts"] + facts["rows"]["test_prompts"] == 20
    assert sum(report["dropped"].get("over data.max_characters=10", 0) for report in facts["read"]) == 3 + 1 + 1 + 1


@pytest.mark.fault("duplicates and leakage")
def test_leakage_is_refused_dropped_or_allowed(tmp_path: Path) -> None:
    """The file's own test side shares a prompt with its training side, and demonstrations share another."""
    pairs = write(tmp_path / "p.jsonl", many(40))
    test = write(tmp_path / "t.jsonl", [{"prompt": "P  3", "chosen": "a", "rejected": "b"}, *OTHER])
    sft = write(tmp_path / "s.jsonl", [{"prompt": "other", "completion": "x"}, {"prompt": "mine", "completion": "y"}])

    def prepared(leakage: Any) -> dict[str, Any]:
        sources = DataSources(preferences=[pairs], test=[test], sft=[sft], leakage=leakage)
        return prepare_data(tmp_path / leakage, sources, seed=0)

    with pytest.raises(UserError) as error:
        prepared("refuse")
    sentence = str(error.value)
    assert "3 training rows (2 of pairs, 1 of demonstrations)" in sentence
    assert "row 7" in sentence
    assert "data.leakage: drop" in sentence
    assert not (tmp_path / "refuse").exists()
    assert prepared("drop")["rows"] == {"sft": 1, "pairs": 38, "test_pairs": 2, "prompts": 19, "test_prompts": 2}
    allowed = prepared("allow")
    assert allowed["rows"]["pairs"] == 40
    assert any("trained on, though its prompt is on the test side" in s for s in allowed["sentences"])


def test_what_we_hold_out_ourselves_is_no_leakage(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.jsonl", many(200))
    sft = write(tmp_path / "s.jsonl", [{"prompt": f"p {i}", "completion": "x"} for i in range(100)])
    facts = prepare_data(tmp_path / "out", DataSources(preferences=[pairs], sft=[sft], test_fraction=0.2), seed=0)
    assert facts["rows"]["sft"] == facts["rows"]["pairs"] // 2 == facts["rows"]["prompts"]


@pytest.mark.fault("duplicates and leakage")
def test_repeats_on_the_test_side_are_counted_too(tmp_path: Path) -> None:
    pairs = write(tmp_path / "p.jsonl", many(20))
    swapped = {"prompt": "twice", "chosen": "b", "rejected": "a"}
    test = write(tmp_path / "t.jsonl", [*OTHER, *OTHER, swapped, {**swapped, "chosen": "a", "rejected": "b"}])
    facts = prepare_data(tmp_path / "out", DataSources(preferences=[pairs], test=[test]), seed=0)
    assert facts["read"][1]["dropped"] == {"repeats another pair": 1, "stands in both orders": 2}
    assert facts["rows"]["test_pairs"] == 1


@pytest.mark.fault("identical pair")
@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not part of the project")
def test_every_defect_of_the_dirty_file_is_named_and_the_odd_ones_kept() -> None:
    """The file names its own defects; each must be refused by its row, and the clean and merely odd rows survive."""
    _, report = read_pairs(str(SHARED / "dirty_pairs.jsonl"))
    refused = {row for reason in report.dropped for row in report.examples[reason]}
    kept_by_policy = {22, 32}  # a very long prompt, two system turns: kept, and noted
    expected = set()
    for number, line in enumerate((SHARED / "dirty_pairs.jsonl").open("rb"), start=1):
        defect = line.split(b'"defect": ')[1].split(b",")[0].strip(b'"').decode()
        if defect != "null" and not defect.startswith("valid_"):
            expected.add(number)
    assert refused == expected - kept_by_policy
    noted = {row for what in report.noted if "`split`" not in what for row in report.examples[what]}
    assert noted == kept_by_policy
    assert sum(count for what, count in report.noted.items() if what.startswith("read for judging")) > 5, (
        "it has a split"
    )


@pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not part of the project")
@pytest.mark.parametrize(
    ("name", "pairs"), [("kwise_oasst", 1247), ("kwise_gsm8k_solutions", 5697), ("kwise_summeval", 10609)]
)
def test_published_counts(name: str, pairs: int) -> None:
    with gzip.open(SHARED / f"{name}.jsonl.gz", "rb") as file:
        assert file.readline()
    assert len(read_pairs(str(SHARED / f"{name}.jsonl.gz"))[0]) == pairs


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_ranking_keeps_the_input_of_its_instruction(tmp_path: Path, system: str | None) -> None:
    """Beside a system column the instruction is two turns already, and the text to translate was left out."""
    answers = [{"text": "le chat", "score": 2}, {"text": "le chien", "score": 1}]
    row = {"instruction": "Translate to French:", "input": "the cat", "responses": answers}
    (tmp_path / "x.json").write_text(json.dumps([row if system is None else {**row, "system": system}]))
    (pair,), _ = read_pairs(str(tmp_path / "x.json"))
    question = {"role": "user", "content": "Translate to French:\nthe cat"}
    assert pair["prompt"] == ([] if system is None else [{"role": "system", "content": system}]) + [question]


def test_of_unpaired_preferences_the_good_answers_are_demonstrations(tmp_path: Path) -> None:
    rows = [
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": "2+2?", "completion": "five, you fool", "label": False},
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}], "kto_tag": False},
        {"prompt": "q", "completion": "a", "label": "greeting"},
    ]
    (tmp_path / "x.json").write_text(json.dumps(rows))
    reports: list[ReadReport] = []
    read = read_sources([Source(str(tmp_path / "x.json"))], to_demonstrations, reports, "demonstrations", 0)
    assert [row.values["completion"][0]["content"] for row in read.train] == ["4", "a"]
    assert reports[0].dropped == {"its label says that this answer is not one to learn": 2}
