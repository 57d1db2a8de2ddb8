"""Published benchmarks: their arithmetic on cases worked out by hand, their files by their columns, what is refused."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlhf.data.sources import Source
from rlhf.errors import UserError
from rlhf.evaluation.benchmark_files import choose_split, named_split, read_benchmark
from rlhf.evaluation.benchmarks import (
    REWARD_BENCH,
    REWARD_BENCH_2,
    Arithmetic,
    Item,
    best_of_k,
    figure_values,
    ppe_correctness,
    reward_bench,
    reward_bench_2,
    rm_bench,
    style_matrices,
)


def item(prompt: str, labels: list[float], *, subset: str = "", identity: str = "", answers: Any = None) -> Item:
    right = [i for i, label in enumerate(labels) if label]
    wrong = [i for i, label in enumerate(labels) if not label]
    pairs = [(i, j) for i in right for j in wrong]
    texts = answers or [f"answer {i}" for i in range(len(labels))]
    return Item([{"role": "user", "content": prompt}], texts, labels, pairs, subset=subset, identity=identity)


def values(arithmetic: Arithmetic, scores: list[list[float]]) -> dict[str, float]:
    outcomes = arithmetic.outcomes([np.array(x) for x in scores])
    return {name: entry["value"] for name, entry in figure_values(arithmetic, outcomes).items()}


# ---- RewardBench ----


def test_rewardbench_sections() -> None:
    """Reasoning weighs math as much as all code (984 of 1,968), however many rows of it the file has."""
    assert REWARD_BENCH["Reasoning"]["math-prm"] == 984 == 6 * 164
    assert {section: sum(w.values()) for section, w in REWARD_BENCH.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }
    counts = {name: 3 if name == "math-prm" else 2 for weights in REWARD_BENCH.values() for name in weights}
    items = [item(f"{name} {i}", [1, 0], subset=name) for name, count in counts.items() for i in range(count)]
    arithmetic = reward_bench(items)
    scores = [[0.0, 1.0] if x.subset == "math-prm" else [1.0, 0.0] for x in items]
    assert values(arithmetic, scores) == pytest.approx(
        {"Chat": 1, "Chat Hard": 1, "Safety": 1, "Reasoning": 0.5, "Overall": 3.5 / 4}
    )
    scores = [[1.0, 1.0] if x.subset == "llmbar-natural" else [1.0, 0.0] for x in items]
    assert values(arithmetic, scores)["Chat Hard"] == pytest.approx(356 / 456), "ties are wrong, 100 of 456"
    half = [[1.0, 0.0] if x.subset != "hep-go" or x.prompt[0]["content"].endswith("0") else [0.0, 1.0] for x in items]
    assert values(arithmetic, half)["Reasoning"] == pytest.approx((1968 - 82) / 1968)


# ---- RewardBench 2 ----

FILL = [item(name, [1, 0, 0, 0], subset=name) for name in REWARD_BENCH_2[:-1]]
FILL_SCORES = [[1.0, 0.0, 0.0, 0.0]] * len(FILL)


@pytest.mark.parametrize(
    ("tied", "ref", "expected"),
    [
        # right answers 5.0-5.2 above wrong ones at 1: gap 4 > spread 0.2; the reference's gap is 3: tanh(14) = 1
        ([5.0, 5.1, 5.2, 1.0, 0.0], [4.0, 1.0, 0.0], 0.3 + 0.3 + 0.2 + 0.2 + 0.01),
        # the reference's gap 0.1 is smaller than the spread 0.2: together, but not far apart
        ([5.0, 5.1, 5.2, 1.0, 0.0], [1.1, 1.0, 0.0], 0.3 + 0.3 + 0.2 + 0.01 * math.tanh(0.5 - 1)),
        # spread 3 is larger than the gap 1: right, but not together
        ([5.0, 8.0, 6.0, 4.0, 0.0], [9.0, 1.0, 0.0], 0.6 + 0.01 * math.tanh(1 / 3 - 1)),
        # worst right equals best wrong: a tie is wrong; gap 0, spread 1, so tanh(-1)
        ([1.0, 2.0, 2.0, 1.0, 0.0], [1.0, 0.0, 0.0], 0.3 + 0.01 * math.tanh(-1)),
        # spread 0 with a positive gap: tanh(inf) = 1
        ([2.0, 2.0, 2.0, 1.0, 0.0], [2.0, 0.0, 0.0], 1.01),
        # everything equal: 0/0 counts nothing
        ([1.0] * 5, [1.0] * 3, 0.0),
    ],
)
def test_rewardbench_2_ties(tied: list[float], ref: list[float], expected: float) -> None:
    items = [
        *FILL,
        item("t", [1, 1, 1, 0, 0], subset="Ties", identity="tied:1"),
        item("r", [1, 0, 0], subset="Ties", identity="ref:1"),
    ]
    got = values(reward_bench_2(items), [*FILL_SCORES, tied, ref])
    assert got["Ties"] == pytest.approx(expected)
    assert got["Overall"] == pytest.approx((5 + expected) / 6), "the unweighted mean of the six domains"


def test_rewardbench_2_margins_are_over_prompts_with_both_forms() -> None:
    items = [
        *FILL,
        item("t1", [1, 1, 0], subset="Ties", identity="tied:1"),
        item("r1", [1, 0], subset="Ties", identity="ref:1"),
        item("t2", [1, 1, 0], subset="Ties", identity="tied:2"),  # without a reference
    ]
    got = values(reward_bench_2(items), [*FILL_SCORES, [2, 2, 0], [1, 0], [0, 0, 1]])
    assert got["Ties"] == pytest.approx(0.3 * 0.5 + 0.3 + 0.2 + 0.2 + 0.01)


def test_best_of_4_shares_a_tie() -> None:
    """RewardBench 2's own code gives 1 / k where k answers share the highest score and the right one is among them."""
    labels = np.array([1, 0, 0, 0])
    assert [best_of_k(np.array(x), labels) for x in ([3, 2, 1, 0], [3, 3, 1, 0], [2, 2, 2, 2], [1, 3, 0, 0])] == [
        1,
        0.5,
        0.25,
        0,
    ]


# ---- RM-Bench ----


def test_rm_bench_printed_matrix() -> None:
    """The matrix that RM-Bench prints for FsfairX on its chat part: easy 93.26, normal 72.13, hard 18.58."""
    rows = 183
    right = np.array([[153, 7, 4], [182, 121, 91], [183, 147, 122]])
    items = [item(f"{i}", [1, 1, 1, 0, 0, 0]) for i in range(rows)]
    outcomes = (np.arange(rows)[:, None, None] < right).astype(float).reshape(-1)
    printed = [[83.61, 3.83, 2.19], [99.45, 66.12, 49.73], [100.00, 80.33, 66.67]]
    assert np.round(100 * np.array(style_matrices(items, outcomes)["all"]), 2).tolist() == printed
    got = {name: round(100 * entry["value"], 2) for name, entry in figure_values(rm_bench(items), outcomes).items()}
    assert got == {"easy": 93.26, "normal": 72.13, "hard": 18.58, "Overall": round((93.26 + 72.13 + 18.58) / 3, 2)}


def test_rm_bench_is_the_mean_of_its_domains() -> None:
    """A model that likes style: easy right, hard wrong; domains count alike, however many rows they have."""
    style = [1.0, 2.0, 3.0, 1.0, 2.0, 3.0]
    items = [item(f"{d} {i}", [1, 1, 1, 0, 0, 0], subset=d) for d, n in (("chat", 3), ("math", 1)) for i in range(n)]
    items += [item(d, [1, 1, 1, 0, 0, 0], subset=d) for d in ("code", "safety")]
    got = values(rm_bench(items), [style] * 3 + [[3, 3, 3, 0, 0, 0]] * 3)
    assert (got["chat easy"], got["chat normal"], got["chat hard"]) == pytest.approx((1, 0, 0))
    assert (got["chat"], got["math"], got["easy"], got["normal"], got["hard"]) == pytest.approx(
        (1 / 3, 1, 1, 0.75, 0.75)
    )
    assert got["Overall"] == pytest.approx((1 / 3 + 3) / 4)


# ---- PPE ----


def test_ppe_correctness() -> None:
    first = Item([{"role": "user", "content": "a"}], ["w", "x", "y", "z"], [1, 0, 0, 1], [(0, 1), (3, 2)])
    second = Item([{"role": "user", "content": "b"}], ["w", "x"], [0, 1], [(1, 0)])
    got = values(ppe_correctness([first, second]), [[2.0, 3.0, 0.0, 3.0], [0.0, 1.0]])
    assert got["pairs"] == pytest.approx(2 / 3)
    assert got["best of K"] == pytest.approx((0.5 + 1) / 2), "two of the first share the highest score, one is right"


# ---- Files ----

SECTIONS = [
    {"prompt": f"{name}?", "chosen": "yes", "rejected": "no", "subset": name, "id": i}
    for i, name in enumerate(name for weights in REWARD_BENCH.values() for name in weights)
]
DOMAINS = [
    {"id": str(i), "prompt": name, "chosen": ["good"], "rejected": ["bad", "worse", "worst"], "subset": name}
    for i, name in enumerate(REWARD_BENCH_2[:-1])
] + [
    {"id": "ref:0", "prompt": "a colour", "chosen": ["red"], "rejected": ["dog"], "subset": "Ties"},
    {"id": "tied:0", "prompt": "colours", "chosen": ["red", "blue"], "rejected": ["dog"], "subset": "Ties"},
]
STYLED = [
    {"id": str(i), "prompt": d, "chosen": ["a", "aa", "**aa**"], "rejected": ["b", "bb", "**bb**"], "domain": d}
    for i, d in enumerate(("chat", "code", "math", "safety-refuse", "safety-response"))
]
PPE_VOTES = [
    {
        "question_id": str(i),
        "prompt": f"q{i}",
        "response_1": "one",
        "response_2": "two",
        "winner": winner,
        "if_prompt": i == 0,
    }
    for i, winner in enumerate(("model_a", "model_b", "tie", "tie (bothbad)"))
]
PPE_VERIFIED = [
    {
        "prompt": "2 + 2",
        "response_1": "4",
        "response_2": "5",
        "response_3": "four",
        "scores": [True, False, True],
        "sampled_conflict_pairs": [[1, 0], [2, 1]],
    }
]
JUDGE = [
    {"question": "q", "response_A": "a", "response_B": "b", "label": "B>A", "source": "mmlu-pro-law"},
    {"question": "r", "response_A": "a", "response_B": "b", "label": "A>B", "source": "livecodebench"},
]
LLMBAR = [{"input": "q", "output_1": "a", "output_2": "b", "label": 2}]


def write(path: Path, rows: Any) -> str:
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(json.dumps(rows) if path.suffix == ".json" else lines, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("rows", "name", "figures"),
    [
        (SECTIONS, "RewardBench", ["Chat", "Chat Hard", "Safety", "Reasoning", "Overall"]),
        (DOMAINS, "RewardBench 2", [*REWARD_BENCH_2, "Overall"]),
        (
            STYLED[:1],
            "RM-Bench",
            ["chat easy", "chat normal", "chat hard", "chat", "easy", "normal", "hard", "Overall"],
        ),
        (
            [{**{k: v for k, v in STYLED[0].items() if k != "domain"}, "subset": "alpacaeval"}],
            "RM-Bench",
            ["easy", "normal", "hard", "Overall"],
        ),
        (PPE_VOTES, "PPE human preference", ["instruction following", "Overall"]),
        (PPE_VERIFIED, "PPE correctness", ["pairs", "best of K"]),
        (JUDGE, "JudgeBench", ["knowledge", "coding", "Overall"]),
        (LLMBAR, "LLMBar", ["Overall"]),
    ],
)
def test_files_are_recognised_by_their_columns(tmp_path: Path, rows: Any, name: str, figures: list[str]) -> None:
    benchmark = read_benchmark(write(tmp_path / "file.json", rows))
    assert benchmark is not None
    assert benchmark.name == name
    assert f"read as {name}, for it has the columns" in benchmark.sentence
    assert list(benchmark.arithmetic.figures) == figures
    assert {round(float(weights.sum()), 9) for weights in benchmark.arithmetic.figures.values()} <= {
        1,
        1.01,
        round(6.01 / 6, 9),
    }


def test_the_better_answer_of_each_format_comes_first(tmp_path: Path) -> None:
    def best(rows: Any) -> list[list[tuple[str, str]]]:
        benchmark = read_benchmark(write(tmp_path / "file.jsonl", rows))
        assert benchmark is not None
        return [[(x.answers[better], x.answers[worse]) for better, worse in x.pairs] for x in benchmark.items]

    assert best(PPE_VOTES) == [[("one", "two")], [("two", "one")]]
    assert best(PPE_VERIFIED) == [[("4", "5"), ("four", "5")]]
    assert best(JUDGE) == [[("b", "a")], [("a", "b")]]
    assert best(LLMBAR) == [[("b", "a")]]
    assert best(STYLED)[0][:4] == [("a", "b"), ("a", "bb"), ("a", "**bb**"), ("aa", "b")]
    assert best(DOMAINS)[-1] == [("red", "dog"), ("blue", "dog")]
    votes = read_benchmark(write(tmp_path / "file.jsonl", PPE_VOTES))
    assert votes is not None
    assert votes.report.dropped == {"a tie of the voter, which has no better answer": 2}


def test_safety_is_one_domain(tmp_path: Path) -> None:
    benchmark = read_benchmark(write(tmp_path / "file.json", STYLED))
    assert benchmark is not None
    assert [x.subset for x in benchmark.items] == ["chat", "code", "math", "safety", "safety"]


def test_ordinary_data_are_none(tmp_path: Path) -> None:
    pairs = [{"prompt": "a", "chosen": "yes", "rejected": "no", "subset": "mine"}]
    several = [{"prompt": "a", "chosen": ["yes"], "rejected": ["no", "never"], "subset": "mine"}]
    three = [{"prompt": "a", "chosen": ["x", "y", "z"], "rejected": ["u", "v", "w"]}]
    ranked = [{"prompt": "a", "responses": [{"content": "x", "score": 1}, {"content": "y", "score": 0}]}]
    assert [read_benchmark(write(tmp_path / "file.jsonl", rows)) for rows in (pairs, several, three, ranked)] == [
        None
    ] * 4


@pytest.mark.parametrize(
    ("rows", "sentences"),
    [
        (SECTIONS[2:], [r"RewardBench: no rows of 2 of its 23 subsets \(alpacaeval-easy, alpacaeval-length\)"]),
        ([*SECTIONS, {**SECTIONS[0], "subset": "math-prn"}], ["unknown subset 'math-prn'; did you mean 'math-prm'?"]),
        ([*SECTIONS, {**SECTIONS[0], "rejected": None}], ["row 24: no rejected answer. Its figures need every row"]),
        (
            [{k: v for k, v in SECTIONS[0].items() if k != "rejected"}, {**SECTIONS[1], "chosen": ""}, *SECTIONS[3:]],
            ["row 1: no rejected answer", r"no rows of 2 of its 23 subsets \(alpacaeval-easy, alpacaeval-hard\)"],
        ),
        (DOMAINS[:-2], [r"RewardBench 2: no rows of 1 of its 6 subsets \(Ties\)"]),
        (
            [*DOMAINS, {**DOMAINS[-1], "id": "7"}],
            ["row 8: the `id` of a row of the Ties subset is ref:… or tied:…, not 7"],
        ),
        ([*DOMAINS, {**DOMAINS[0], "rejected": []}], ["row 8: no rejected answer"]),
        (STYLED[:2], [r"RM-Bench: no rows of 2 of its 4 subsets \(math, safety\)"]),
        ([*STYLED, {**STYLED[0], "domain": "poems"}], ["unknown subset 'poems'"]),
        ([*STYLED, {**STYLED[0], "chosen": ["a"]}], ["row 6: 1 chosen and 3 rejected answers, not 3 of each"]),
        ([*PPE_VOTES, {**PPE_VOTES[0], "winner": "none"}], ["row 5: `winner` is 'none'"]),
        ([{**PPE_VERIFIED[0], "sampled_conflict_pairs": [[0, 2]]}], ["names 0 and 2, which are no right and wrong"]),
        ([*JUDGE, {**JUDGE[0], "label": "A"}], ["row 3: `label` is 'A', neither A>B nor B>A"]),
        ([*LLMBAR, {**LLMBAR[0], "label": 0}], ["row 2: `label` is 0, neither 1 nor 2"]),
    ],
)
def test_a_file_that_is_not_whole_is_refused(tmp_path: Path, rows: Any, sentences: list[str]) -> None:
    with pytest.raises(UserError) as refusal:
        read_benchmark(write(tmp_path / "rb.jsonl", rows))
    assert len(refusal.value.problems) == len(sentences)
    for problem, sentence in zip(refusal.value.problems, sentences, strict=True):
        assert sentence.replace("\\", "") in problem
        assert "rb.jsonl: " in problem


def test_splits_of_the_hub(tmp_path: Path) -> None:
    """`datasets` itself says which splits there are: here of a folder with RewardBench's names, as on the hub."""
    folder = tmp_path / "reward-bench"
    folder.mkdir()
    write(folder / "filtered.jsonl", SECTIONS)
    write(folder / "raw.jsonl", SECTIONS[:1])
    splits = "".join(f"  - split: {name}\n    path: {name}.jsonl\n" for name in ("raw", "filtered"))
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")
    assert choose_split(str(folder)) == (str(folder), "filtered")
    assert choose_split(f"{folder}:raw") == (str(folder), "raw")
    assert named_split(Source(f"{folder}:raw")) == Source(str(folder), split="raw")
    assert choose_split("file.jsonl") == ("file.jsonl", "test")
    (folder / "README.md").write_text((folder / "README.md").read_text().replace("split: filtered", "split: claude"))
    with pytest.raises(UserError, match=r"it has the splits raw, claude; name one, such as .*reward-bench:raw"):
        choose_split(str(folder))
