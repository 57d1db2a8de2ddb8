"""Reports on pairs and rankings, and the published benchmarks' arithmetic, on cases worked out by hand."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.data.rankings import Answer, Ranking
from rlhf.evaluation.benchmarks import REWARD_BENCH, reward_bench, reward_bench_2, ties_score
from rlhf.evaluation.pairs import ScoredPairs, compare, pair_report, ranking_report, score_pairs


class Lengths:
    """Scores an answer by its length, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, prompts: Sequence[Any], responses: Sequence[str]) -> torch.Tensor:
        self.asked += len(responses)
        return torch.tensor([float(len(text)) for text in responses])


def row(prompt: str, chosen: str, rejected: str, **extras: Any) -> dict[str, Any]:
    sides = {name: [{"role": "assistant", "content": t}] for name, t in (("chosen", chosen), ("rejected", rejected))}
    return {"prompt": [{"role": "user", "content": prompt}], **sides, **extras}


def scored(chosen: list[float], rejected: list[float], rows: list[dict[str, Any]]) -> ScoredPairs:
    return ScoredPairs(rows, [r["prompt"][0]["content"] for r in rows], np.array(chosen), np.array(rejected))


ROWS = [row("a", "aaaaa", "bbbb"), row("b", "aaaaa", "bbbbbb"), row("c", "aaaaa", "bbbbb"), row("d", "aaaaa", "b" * 9)]


def test_pair_report() -> None:
    report = pair_report(
        scored([2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 1.0, 0.0], ROWS), gold_differences=[1.0, -1.0, 0.5, 0.0]
    )
    assert report["accuracy"] == 0.5, "a tie is wrong"
    assert report["ties"] == 1
    assert report["length_baseline"] == (1 + 0 + 0.5 + 0) / 4
    assert report["accuracy_length_controlled"] == (1 / 1 + 1 / 2) / 2
    assert report["accuracy_true"] == pytest.approx(2 / 3), (
        "right where the label is wrong; equal true rewards don't count"
    )
    assert sum(entry["n"] for entry in report["by_length"]) == 4
    assert report["by_length"][0]["low"] == -4


def test_strict_ties_as_in_rewardbench() -> None:
    """A model that gives every answer the same score orders nothing: 0, not one half."""
    report = pair_report(scored([1.0] * 4, [1.0] * 4, ROWS))
    assert (report["accuracy"], report["ties"], report["temperature"]) == (0.0, 4, None)
    assert report["brier"] == 0.25
    assert report["nll"] == pytest.approx(math.log(2))


def test_breakdowns_where_rows_name_them() -> None:
    rows = [{**r, "subset": "x" if i < 2 else "y", "margin": float(1 + i % 2)} for i, r in enumerate(ROWS)]
    by = pair_report(scored([2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0], rows))["by"]
    assert {name: (entry["n"], entry["accuracy"]) for name, entry in by["subset"].items()} == {
        "x": (2, 0.5),
        "y": (2, 1.0),
    }
    assert list(by["difficulty"]) == ["margin 1", "margin 2"]
    assert by["difficulty"]["margin 1"]["accuracy"] == 1.0
    assert "source" not in by
    many = [row(str(i), "aa", "b", rating_gap=float(i)) for i in range(40)]
    difficulty = pair_report(scored([1.0] * 40, [0.0] * 40, many))["by"]["difficulty"]
    assert [entry["n"] for entry in difficulty.values()] == [10, 10, 10, 10], "many values in quarters, hardest first"


def test_an_answer_in_several_pairs_is_scored_once() -> None:
    scorer = Lengths()
    rows = [row("a", "xxx", "x"), row("a", "xxx", "xx"), row("a", "xx", "x"), row("b", "xxx", "x")]
    result = score_pairs(scorer, rows)
    assert scorer.asked == 5, "three answers to a, two to b"
    assert result.scores_chosen.tolist() == [3, 3, 2, 3]
    assert result.scores_rejected.tolist() == [1, 2, 1, 1]


def test_two_models_on_the_same_pairs() -> None:
    good, poor = scored([1.0] * 4, [0.0] * 4, ROWS), scored([0.0] * 4, [1.0] * 4, ROWS)
    assert compare(good, poor)["difference"] == 1.0
    assert compare(good, poor)["p_value"] == pytest.approx(2 / 16, abs=0.01), "all four signs agree: 2 of 16"


def ranking(prompt: str, *answers: tuple[str, float], **extras: Any) -> Ranking:
    return Ranking([{"role": "user", "content": prompt}], [Answer(*answer) for answer in answers], extras)


def test_ranking_report() -> None:
    report = ranking_report(
        Lengths(),
        [
            ranking("a", ("xxx", 2.0), ("xx", 1.0), ("x", 0.0)),  # perfectly ordered
            ranking("b", ("x", 2.0), ("xx", 1.0), ("xxx", 0.0)),  # the wrong way round
            ranking("c", ("xx", 1.0), ("yy", 0.0), ("x", 0.0)),  # the best ties with another: wrong
        ],
    )
    assert report["best_of_k"] == pytest.approx(1 / 3)
    assert report["best_of_k_by_chance"] == pytest.approx(1 / 3)
    assert report["tau_b"] == pytest.approx((1 - 1 + 0.5) / 3)
    curve = {entry["n"]: entry for entry in report["best_of_n"]}
    assert set(curve) == {1, 2}
    assert curve[1]["by_model"] == pytest.approx((1 + 1 + 1 / 3) / 3), "choosing among one is the mean"
    # Pairs: a → 2, 2, 1; b → 1, 0, 0; c → (xx, yy) and the like share ½.
    assert curve[2]["by_model"] == pytest.approx((5 / 3 + 1 / 3 + 1 / 2) / 3)
    assert curve[2]["kl"] == pytest.approx(math.log(2) - 0.5)


def test_rewardbench_sections() -> None:
    """Every subset right but math: Reasoning weighs math as much as all code (984 of 1,968)."""
    assert REWARD_BENCH["Reasoning"]["math-prm"] == 984 == 6 * 164
    assert {section: sum(w.values()) for section, w in REWARD_BENCH.items()} == {
        "Chat": 358,
        "Chat Hard": 456,
        "Safety": 740,
        "Reasoning": 1968,
    }
    subsets = {name: (n, 1.0) for weights in REWARD_BENCH.values() for name, n in weights.items()}
    subsets["math-prm"] = (447, 0.0)
    scores = reward_bench(subsets)
    assert scores is not None
    assert scores["Reasoning"] == 0.5
    assert scores["Overall"] == pytest.approx(3.5 / 4)
    subsets["llmbar-natural"] = (100, 0.0)
    weighted = reward_bench(subsets)
    assert weighted is not None
    assert weighted["Chat Hard"] == pytest.approx(356 / 456)
    del subsets["donotanswer"]
    assert reward_bench(subsets) is None


RIGHT3, ONE = np.array([1, 1, 1, 0, 0]), np.array([1, 0, 0])


@pytest.mark.parametrize(
    ("tied", "ref", "expected"),
    [
        # right answers 5.0-5.2 above wrong ones at 1: gap 4 > spread 0.2; the reference's gap is 3: tanh(14) = 1
        ([5.0, 5.1, 5.2, 1.0, 0.0], [4.0, 1.0, 0.0], 0.3 + 0.3 + 0.2 + 0.2 + 0.01),
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
    rows = [("tied:1", np.array(tied), RIGHT3), ("ref:1", np.array(ref), ONE)]
    assert ties_score(rows) == pytest.approx(expected)


def test_rewardbench_2_is_the_mean_of_its_domains() -> None:
    rows = [
        ("Math", "1", np.array([2.0, 1.0, 0.0, 0.0]), np.array([1, 0, 0, 0])),
        ("Math", "2", np.array([1.0, 1.0, 0.0, 0.0]), np.array([1, 0, 0, 0])),  # a tie with a wrong answer
        ("Ties", "tied:1", np.array([2.0, 2.0, 2.0, 1.0, 0.0]), RIGHT3),
        ("Ties", "ref:1", np.array([2.0, 0.0, 0.0]), ONE),
    ]
    assert reward_bench_2(rows) == {"Math": 0.5, "Ties": pytest.approx(1.01), "Overall": pytest.approx(1.51 / 2)}
    assert reward_bench_2(rows[:2]) is None
