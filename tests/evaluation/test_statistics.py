"""Intervals, calibration and best-of-n against closed cases and simulation."""

import math

import numpy as np
import pytest

from rlhf.evaluation.statistics import best_of_n_kl, clustered_mean, expected_calibration_error, pair_report, win_rate


def test_intervals_cover_the_truth() -> None:
    """95 % of 300 simulated sets, within 3.3 standard errors (1.3 points each) of the nominal rate."""
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(300):
        values = rng.random(150) < 0.7
        _, (low, high) = clustered_mean(values.astype(float).tolist())
        hits += low <= 0.7 <= high
    assert 0.908 <= hits / 300 <= 0.992


def test_clustered_interval_is_wider_where_prompts_repeat() -> None:
    rng = np.random.default_rng(0)
    per_prompt = (rng.random(60) < 0.6).astype(float)
    values = np.repeat(per_prompt, 8).tolist()  # eight rows that all say the same
    prompts = np.repeat(np.arange(60), 8).tolist()
    _, naive = clustered_mean(values)
    mean, clustered = clustered_mean(values, prompts)
    assert mean == pytest.approx(per_prompt.mean())
    ratio = (clustered[1] - clustered[0]) / (naive[1] - naive[0])
    assert ratio == pytest.approx(math.sqrt(8), rel=0.1)


def test_many_clusters_take_the_other_path_to_the_same_interval() -> None:
    values = (np.random.default_rng(1).random(5200) < 0.5).astype(float)
    _, (low, high) = clustered_mean(values.tolist())
    expected = 1.96 * values.std() / math.sqrt(len(values))
    assert (high - low) / 2 == pytest.approx(expected, rel=0.08)


def test_best_of_n_kl_against_simulation() -> None:
    """The best of n uniform samples has density n x^(n-1); KL = E[log n x^(n-1)]."""
    x = np.random.default_rng(0).random((200_000, 16)).max(axis=1)
    assert best_of_n_kl(16) == pytest.approx(float(np.mean(np.log(16) + 15 * np.log(x))), abs=0.01)
    assert best_of_n_kl(1) == 0


def test_calibration_of_a_calibrated_and_an_overconfident_model() -> None:
    rng = np.random.default_rng(0)
    p = rng.uniform(0.5, 1, 20_000)
    outcome = (rng.random(20_000) < p).astype(float)
    assert expected_calibration_error(p.tolist(), outcome.tolist()) < 0.02
    assert expected_calibration_error([0.99] * 100, [1.0, 0.0] * 50) == pytest.approx(0.49)


def test_pair_report() -> None:
    report = pair_report(
        [2.0, 0.0, 1.0, 1.0],
        [1.0, 1.0, 1.0, 0.0],
        prompts=["a", "b", "c", "d"],
        lengths_chosen=[5, 5, 5, 5],
        lengths_rejected=[4, 6, 5, 9],
        gold_differences=[1.0, -1.0, 0.5, 0.0],
    )
    assert report["accuracy"] == 0.5, "a tie is wrong"
    assert report["ties"] == 1
    assert report["length_baseline"] == (1 + 0 + 0.5 + 0) / 4
    assert report["accuracy_true"] == pytest.approx(2 / 3), (
        "right where the label is wrong; equal true rewards don't count"
    )


def test_win_rate_counts_ties_half() -> None:
    rate, (low, high) = win_rate([1, 0, 1, 1], [0, 1, 1, 0])
    assert rate == 0.625
    assert 0 <= low <= rate <= high <= 1
