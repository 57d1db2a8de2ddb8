"""Labels of several annotators, and rows of several sources: what once went wrong with them without a word."""

from pathlib import Path

import pytest

from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.ratings import RatingScale
from rlhf.data.repeats import BOTH_ORDERS, OUTVOTED, REPEATED
from rlhf.data.rows import answer
from rlhf.data.sources import Source, read_pairs
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl

ANSWERS = {"chosen": "yes", "rejected": "no"}
PAIR = {"prompt": "say it", **ANSWERS}


# ---- Several annotators ----


@pytest.mark.fault("common layouts")
def test_pairs_on_which_annotators_disagree_are_judged_by_most_of_them(tmp_path: Path) -> None:
    """Only pairs on which all agreed were left to judge by, which are the easy ones."""
    turned = {"prompt": PAIR["prompt"], "chosen": PAIR["rejected"], "rejected": PAIR["chosen"]}
    by = lambda row, name: {**row, **({} if name is None else {"annotator": name})}  # noqa: E731
    for rows, kept, reasons in (
        ([by(turned, "a"), by(PAIR, "b"), by(PAIR, "c")], ["yes"], {OUTVOTED: 1, REPEATED: 1}),
        ([by(PAIR, "a"), by(turned, "b"), by(turned, "c"), by(turned, "d")], ["no"], {OUTVOTED: 1, REPEATED: 2}),
        ([by(PAIR, "a"), by(turned, "b")], [], {BOTH_ORDERS: 2}),
        ([by(PAIR, "a"), by(turned, "a"), by(turned, "b")], ["no"], {OUTVOTED: 1, REPEATED: 1}),
        ([by(PAIR, None), by(PAIR, None), by(turned, None)], [], {BOTH_ORDERS: 3}),
        ([by(PAIR, "a"), by(turned, None), by(turned, None)], [], {BOTH_ORDERS: 3}),
        ([by(PAIR, "a"), by(PAIR, "b"), by(turned, "c"), by(PAIR, None)], ["yes"], {OUTVOTED: 1, REPEATED: 2}),
    ):
        write_jsonl(tmp_path / "crowd.jsonl", rows)
        if not kept:
            with pytest.raises(UserError, match="holds no usable pair"):
                read_pairs(str(tmp_path / "crowd.jsonl"), split="test")
            continue
        pairs, report = read_pairs(str(tmp_path / "crowd.jsonl"), split="test")
        assert [answer(row, "chosen") for row in pairs] == kept
        assert report.dropped == reasons
        assert len(read_pairs(str(tmp_path / "crowd.jsonl"), split="train")[0]) >= 1


@pytest.mark.fault("common layouts")
def test_ratings_and_pairs_of_a_row_have_one_prompt(tmp_path: Path) -> None:
    """`instruction` and `input` are two parts of it; the ratings had lost the second, and with it the hold-out."""
    rows = [
        {
            "instruction": "Translate.",
            "input": f"Guten Tag {i}",
            "responses": [
                {"text": "Good day", "score": 2, "attributes": {"helpfulness": 4}},
                {"text": "Good bye", "score": 1, "attributes": {"helpfulness": 1}},
            ],
        }
        for i in range(20)
    ]
    write_jsonl(tmp_path / "k.jsonl", rows)
    scale = RatingScale(("helpfulness",), 0.0, 4.0)
    prepare_data(tmp_path / "d", DataSources(preferences=[Source(str(tmp_path / "k.jsonl"))], ratings=scale), seed=0)
    prompts = {
        name: {row["prompt"][0]["content"] for row in read_jsonl(tmp_path / f"d/{name}.jsonl")}
        for name in ("pairs", "test_pairs", "ratings")
    }
    assert prompts["ratings"] == prompts["pairs"]
    assert not prompts["ratings"] & prompts["test_pairs"]
    assert all("Guten Tag" in prompt for prompt in prompts["ratings"])


# ---- Several sources ----


@pytest.mark.fault("common layouts")
def test_the_first_rows_are_of_all_sources(tmp_path: Path) -> None:
    """Policies are evaluated on the first prompts of the test side, and scores get their scale on the first prompts: of a
    mixture they were of its first source alone."""
    for name in ("a", "b"):
        rows = [{"prompt": f"{name} {i}", "chosen": "yes", "rejected": "no"} for i in range(600)]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    both = [Source(str(tmp_path / f"{name}.jsonl")) for name in ("a", "b")]
    for folder in ("x", "y"):
        prepare_data(tmp_path / folder, DataSources(preferences=both, test_fraction=0.3), seed=0)
    for name in ("prompts", "test_prompts", "pairs", "test_pairs"):
        rows = read_jsonl(tmp_path / f"x/{name}.jsonl")
        first = [row["prompt"][0]["content"][0] for row in rows[:100]]
        assert 25 < first.count("a") < 75, "five deviations of 100 draws"
        assert rows == read_jsonl(tmp_path / f"y/{name}.jsonl"), "by the seed"
    more = [{"prompt": f"a {i}", "chosen": "yes", "rejected": "no"} for i in range(600)]
    test = [Source(str(tmp_path / "a.jsonl"))]
    write_jsonl(tmp_path / "c.jsonl", [{**row, "prompt": f"c {i}"} for i, row in enumerate(more)])
    files = []
    for seed, most in ((0, None), (0, 100), (1, None)):
        sources = DataSources(preferences=[Source(str(tmp_path / "c.jsonl"))], test=test, max_pairs=most)
        prepare_data(tmp_path / f"{seed}{most}", sources, seed=seed)
        files.append([(tmp_path / f"{seed}{most}/{name}.jsonl").read_text() for name in ("test_pairs", "test_prompts")])
    assert files[0] == files[1] == files[2], (
        "runs that differ in seed or training pairs are evaluated on the same prompts"
    )
    assert files[0][0].splitlines() != sorted(files[0][0].splitlines())
    prepare_data(tmp_path / "z", DataSources(preferences=both, test_fraction=0.3, shuffle=False), seed=0)
    for name in ("prompts", "test_pairs"):
        shuffled, sorted_rows = read_jsonl(tmp_path / f"x/{name}.jsonl"), read_jsonl(tmp_path / f"z/{name}.jsonl")
        assert sorted(map(str, shuffled)) == sorted(map(str, sorted_rows))


def test_annotators_of_two_sources_with_one_name_are_said(tmp_path: Path) -> None:
    """Worker 7 of two tools: one error rate would be fitted for two people."""
    for name, workers in (("a", (1, 2, 3)), ("b", (3, 4)), ("c", (9,))):
        rows = [{"prompt": f"{name} {i}", **ANSWERS, "annotator": w} for i in range(30) for w in workers]
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    sources = [Source(str(tmp_path / f"{name}.jsonl")) for name in "abc"]
    said = prepare_data(tmp_path / "d", DataSources(preferences=sources), seed=0)["sentences"]
    assert [line for line in said if "earlier source" in line] == [
        line for line in said if "1 names of" in line and "b.jsonl stand in an earlier source too (3)" in line
    ]
    assert sum("earlier source" in line for line in said) == 1
