"""Reports on pairs and rankings, and the published benchmarks' arithmetic, on cases worked out by hand."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from rlhf.data.rankings import Answer, Ranking
from rlhf.evaluation.pairs import (
    ScoredPairs,
    _binned,
    compare,
    pair_report,
    ranking_report,
    score_answers,
    score_pairs,
    score_rankings,
)
from rlhf.models.text import plain
from rlhf.statistics import clustered_mean


class Lengths:
    """Scores an answer by its length, and counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0

    def score(self, prompts: Sequence[Any], responses: Sequence[str], *, ended: Sequence[bool]) -> torch.Tensor:
        assert all(ended)
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


def test_intervals_draw_whole_conversations() -> None:
    """Six turns of a conversation that agree are one observation: as many as a sixth of the pairs, and the same accuracy."""
    opening = [[{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "a"}] for i in range(30)]
    turns = [
        [
            *opening[i],
            *({"role": r, "content": f"{k}"} for r in ("user", "assistant")),
            {"role": "user", "content": f"{k}"},
        ]
        for i in range(30)
        for k in range(6)
    ]
    rows = [{**row("", "aa", "b"), "prompt": turn} for turn in turns]
    right = [float(i % 3 > 0) for i in range(30) for _ in range(6)]
    pairs = ScoredPairs(rows, [str(i) for i in range(180)], np.array(right), np.full(180, 0.5))
    report, alone = pair_report(pairs), clustered_mean(right[::6])
    assert len(set(pairs.clusters)) == 30
    assert report["accuracy"] == pytest.approx(2 / 3)
    assert report["accuracy_ci"] == pytest.approx(alone[1], abs=1e-12)
    low, high = clustered_mean(right)[1]
    assert high - low < 0.5 * (alone[1][1] - alone[1][0]), "by pairs it would be narrower by the root of six"
    assert compare(pairs, pairs)["difference"] == 0


def test_strict_ties_as_in_rewardbench() -> None:
    """A model that gives every answer the same score orders nothing: 0, not one half."""
    report = pair_report(scored([1.0] * 4, [1.0] * 4, ROWS))
    assert (report["accuracy"], report["ties"], report["temperature"]) == (0.0, 4, None)
    assert report["brier"] == 0.25
    assert report["nll"] == pytest.approx(math.log(2))


def test_labels_that_are_not_sure_count_as_both_outcomes() -> None:
    """Scores whose σ(d) is the label are calibrated, and twice those are too sure; both had looked the other way round."""
    labels = np.linspace(0.55, 0.95, 200)
    rows = [row(f"q{i}", "aaaaa", "bbbb", confidence=float(label)) for i, label in enumerate(labels)]
    differences = np.log(labels / (1 - labels))
    report, too_sure = (pair_report(ScoredPairs(rows, ["q"] * 200, k * differences, np.zeros(200))) for k in (1, 2))
    assert report["soft_labels"] == 200
    assert report["ece"] == pytest.approx(0, abs=1e-9)
    assert report["temperature"] == pytest.approx(1, abs=1e-3)
    assert too_sure["temperature"] == pytest.approx(2, abs=2e-3)
    entropy = -(labels * np.log(labels) + (1 - labels) * np.log(1 - labels)).mean()
    assert report["nll"] == pytest.approx(entropy) == pytest.approx(too_sure["nll_at_temperature"])
    assert report["brier"] == pytest.approx((labels * (1 - labels)).mean())
    for name in ("ece", "nll", "brier"):
        assert too_sure[name] > report[name] + 0.01
    certain = pair_report(scored([2.0, 0.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0], ROWS))
    assert certain["soft_labels"] == 0
    assert certain["calibration"][0] == {"probability": 0.5, "frequency": 0.5, "n": 1}, "a tie is a coin at 0.5"


def test_a_model_is_above_the_length_rule_by_a_paired_test() -> None:
    """50 pairs: 35 right where the rule has 28, and where both are right or wrong nothing is to be learnt."""
    rows = [row(f"q{i}", "a" * (5 if i < 28 else 3), "bbbb") for i in range(50)]
    together = [float(i < 20 or 28 <= i < 43) for i in range(50)]  # on 8 pairs the rule alone is right, on 15 the model
    report = pair_report(scored(together, [0.5] * 50, rows))
    assert (report["accuracy"], report["length_baseline"]) == (0.7, 0.56)
    low, high = report["length_baseline_ci"]
    assert (high + low) / 2 == pytest.approx(0.56, abs=0.03)
    assert (high - low) / 2 == pytest.approx(1.96 * math.sqrt(0.56 * 0.44 / 50), rel=0.1), "of one share of 50 pairs"
    assert report["over_length"] == pytest.approx(0.14)
    low, high = report["over_length_ci"]
    error = math.sqrt((23 / 50 - 0.14**2) / 50)
    assert (low, high) == pytest.approx((0.14 - 1.96 * error, 0.14 + 1.96 * error), abs=0.03)
    assert low < 0, "an accuracy of 0.7 ± 0.12 held against 0.56 as a known number would be above it"
    shorter = pair_report(scored([1.0] * 50, [0.0] * 50, [row(f"q{i}", "a", "bbbb") for i in range(50)]))
    assert shorter["over_length"] == 0, "'shorter wins' is a rule too"
    assert shorter["over_length_ci"][0] < 0 < shorter["over_length_ci"][1], (
        "fifty pairs alike don't prove all others are"
    )


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


def ranking(prompt: str, *answers: tuple[str, float]) -> Ranking:
    return Ranking([{"role": "user", "content": prompt}], [Answer(*answer) for answer in answers])


def test_ranking_report() -> None:
    rankings = [
        ranking("a", ("xxx", 2.0), ("xx", 1.0), ("x", 0.0)),  # perfectly ordered
        ranking("b", ("x", 2.0), ("xx", 1.0), ("xxx", 0.0)),  # the wrong way round
        ranking("c", ("xx", 1.0), ("yy", 0.0), ("x", 0.0)),  # the best ties with another: wrong
    ]
    scores = score_rankings(Lengths(), rankings)
    assert [values.tolist() for values in scores] == [[3, 2, 1], [1, 2, 3], [2, 2, 1]]
    report = ranking_report(
        [[ranked.score for ranked in r.answers] for r in rankings], scores, [r.prompt for r in rankings]
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


def test_rankings_of_one_conversation_are_one_draw() -> None:
    """As in pairs: the same rankings eight times, or turns of one tree, make no narrower an interval."""
    rng = np.random.default_rng(0)
    labels, scores = [[1.0, 0.0, 0.0]] * 60, [np.array([score, 0.5, 0.2]) for score in rng.random(60)]
    first = [{"role": "user", "content": f"q {i}"} for i in range(60)]
    later = [{"role": "assistant", "content": "and?"}, {"role": "user", "content": "go on"}]
    once = ranking_report(labels, scores, [[turn] for turn in first])
    often = ranking_report(labels * 8, scores * 8, [[turn] for turn in first] * 8)
    tree = ranking_report(labels * 2, scores * 2, [[turn, *more] for more in ([], later) for turn in first])
    assert once["best_of_k_ci"] == often["best_of_k_ci"] == tree["best_of_k_ci"]
    one = ranking_report(labels, scores, [first[:1]] * 60)
    assert one["best_of_k_ci"] == [0.0, 1.0], "one conversation says nothing about others"


def test_conversations_that_only_look_alike_are_scored_each(tokenizer: Any) -> None:
    """As text for people they are one; and one text, ended and cut off, is two answers."""
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    alike: list[Any] = [turns, [{"role": "user", "content": plain(turns)}], plain(turns)]
    asked: list[tuple[Any, str, bool]] = []

    class Recorder:
        def score(self, prompts: Sequence[Any], responses: Sequence[str], *, ended: Sequence[bool]) -> torch.Tensor:
            asked.extend(zip(prompts, responses, ended, strict=True))
            return torch.arange(len(asked) - len(prompts), len(asked)).float()

    scores = score_answers(
        Recorder(), [*((prompt, "yes") for prompt in alike), (turns, "yes"), (turns, "yes")], ended=[True] * 4 + [False]
    )
    assert len(asked) == 4
    assert len(set(scores.tolist())) == 4
    assert scores[0] == scores[3]


def test_quarters_of_close_numbers_stay_four() -> None:
    scored = _binned("margin", np.array([1000.1 + i / 20 for i in range(40)]))
    assert len(scored.order) == 4
    assert Counter(scored.labels) == dict.fromkeys(scored.order, 10)


def test_a_ranking_that_is_scored_all_alike_has_no_correlation() -> None:
    labels, scores = [[1.0, 2.0, 3.0]] * 4, [np.array([1.0, 2.0, 3.0])] + [np.array([5.0, 5.0, 5.0])] * 3
    report = ranking_report(labels, scores, [f"q{i}" for i in range(4)])
    assert report["tau_b"] == pytest.approx(1 / 4), "nothing is left out"
