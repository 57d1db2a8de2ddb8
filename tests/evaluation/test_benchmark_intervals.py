"""Intervals of a benchmark's figures, paired differences of two models, and length rules on the same rows."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest

from rlhf.evaluation.benchmarks import (
    Arithmetic,
    by_pairs,
    figure_values,
    length_scores,
    reward_bench,
)
from rlhf.statistics import clustered_share
from tests.evaluation.test_benchmarks import item


def test_intervals_resample_prompts_and_differences_are_paired() -> None:
    rng = np.random.default_rng(0)
    items = [item(f"{i // 2}", [1, 0]) for i in range(400)]
    arithmetic = by_pairs(items)
    shared = rng.normal(size=200).repeat(2) + 0.3
    better = arithmetic.outcomes(list(np.stack([shared + 0.2, np.zeros(400)], axis=1)))
    base = arithmetic.outcomes(list(np.stack([shared, np.zeros(400)], axis=1)))
    (value,) = figure_values(arithmetic, base).values()
    share = base.mean()
    wide = 2 * 1.96 * math.sqrt(share * (1 - share) / 200)
    assert value["ci"][1] - value["ci"][0] == pytest.approx(wide, rel=0.15), "200 prompts, not 400 rows"
    (gap,) = figure_values(arithmetic, better - base, are_differences=True).values()
    assert gap["value"] == pytest.approx(better.mean() - base.mean())
    assert gap["ci"][0] > 0
    assert gap["ci"][1] - gap["ci"][0] < wide / 2, "the same rows: much of the noise is gone"


def test_an_interval_of_a_share_is_one() -> None:
    """Never a point, and from 0 to 1, as `accuracy_ci` of the same rows."""
    arithmetic = by_pairs([item(f"{i}", [1, 0]) for i in range(9)])
    for right in (0.0, 1.0):
        got = figure_values(arithmetic, np.full(9, right))["Overall"]
        assert got["value"] == pytest.approx(right)
        assert got["ci"] == pytest.approx(clustered_share([right] * 9)[1])
    (few,) = figure_values(by_pairs([item(f"{i}", [1, 0]) for i in range(4)]), np.array([1.0, 0, 0, 0])).values()
    assert few["ci"][0] >= 0
    assert few["ci"][1] <= 1
    one = by_pairs([item("0", [1, 0]) for _ in range(4)])
    assert figure_values(one, np.array([1.0, 0, 0, 0]))["Overall"]["ci"] == [0, 1]
    assert figure_values(one, np.array([1.0, 0, 0, 0]), are_differences=True)["Overall"]["ci"] is None


def test_a_mean_of_sections_has_no_scatter_of_their_sizes() -> None:
    """The distances of the sections' own intervals, a quarter each, squared and summed; sections that differ add nothing."""
    sizes, rights = {"Chat": 200, "Chat Hard": 100, "Safety": 300, "Reasoning": 400}, (1.0, 0.0, 0.6, 0.9)
    names = {"Chat": "mt-bench-easy", "Chat Hard": "mt-bench-hard", "Safety": "donotanswer", "Reasoning": "hep-go"}
    items, outcomes = [], []
    for (section, count), right in zip(sizes.items(), rights, strict=True):
        items += [item(f"{section} {i}", [1, 0], subset=names[section]) for i in range(count)]
        outcomes += [float(i < right * count) for i in range(count)]
    arithmetic = reward_bench(items)
    # One subset of each section is there, so each of these has all of the section's weight.
    whole = {name: w / w.sum() for name, w in arithmetic.figures.items() if name != "Overall"}
    figures = {**whole, "Overall": np.mean(list(whole.values()), axis=0)}
    got = figure_values(replace(arithmetic, figures=figures), np.array(outcomes))["Overall"]
    assert got["value"] == pytest.approx(np.mean(rights))
    starts = np.cumsum([0, *sizes.values()])
    alone = [clustered_share(outcomes[a:b]) for a, b in itertools.pairwise(starts)]
    below, above = (math.hypot(*((share - ends[end]) / 4 for share, ends in alone)) for end in (0, 1))
    assert got["ci"] == pytest.approx([got["value"] - below, got["value"] + above], abs=0.001)
    pooled = figure_values(replace(arithmetic, figures=figures, strata=()), np.array(outcomes))["Overall"]
    assert pooled["ci"][1] - pooled["ci"][0] > 1.3 * (above + below), "as it was, with the sizes of sections drawn too"


def test_a_section_of_few_rows_is_known_no_better_than_by_these() -> None:
    """Three rows that are all right don't prove a section: its own exact interval counts with its weight, 0.5."""
    weights = np.array([0.5 / 3] * 3 + [0.5 / 100] * 100)
    names = [str(i) for i in range(103)]
    arithmetic = Arithmetic(lambda _: weights, names, {"f": weights}, ["few"] * 3 + ["many"] * 100)
    right = np.array([1.0] * 3 + [1.0] * 90 + [0.0] * 10)
    got = figure_values(arithmetic, right)["f"]
    assert got["value"] == pytest.approx(0.95)
    few, many = clustered_share([1.0] * 3)[1], clustered_share(right[3:].tolist())[1]
    below = math.hypot(0.5 * (1 - few[0]), 0.5 * (0.9 - many[0]))
    assert got["ci"] == pytest.approx([0.95 - below, 0.95 + 0.5 * (many[1] - 0.9)], abs=0.01)
    gap = figure_values(arithmetic, np.array([1.0] * 3 + [0.0] * 100), are_differences=True)["f"]
    assert gap["value"] == pytest.approx(0.5)
    assert gap["ci"][0] < 0.5 * (1 - 2 * (1 - 0.025 ** (1 / 3))) + 0.01, "which may be negative in other prompts"
    assert gap["ci"][1] <= 0.55


def test_sections_of_the_same_conversations_are_not_independent() -> None:
    """The same 100 conversations in both sections, with the same outcomes: as wide as one section, not narrower by root two."""
    names, right = [str(i % 100) for i in range(200)], np.array([float(i % 10 < 7) for i in range(100)] * 2)
    weights, parts = np.full(200, 1 / 200), ["a"] * 100 + ["b"] * 100
    low, high = figure_values(Arithmetic(lambda _: right, names, {"f": weights}, parts), right)["f"]["ci"]
    one = clustered_share(right[:100].tolist())[1]
    assert high - low == pytest.approx(one[1] - one[0], rel=0.05)


def test_length_rules_on_the_same_rows() -> None:
    items = [item("a", [1, 0], answers=["longer", "short"]), item("b", [1, 0], answers=["ab", "cd"])]
    arithmetic = by_pairs(items)
    got = [figure_values(arithmetic, arithmetic.outcomes(length_scores(items, sign)))["Overall"] for sign in (1, -1)]
    assert [entry["value"] for entry in got] == [0.5, 0], "equally long answers are a tie"
