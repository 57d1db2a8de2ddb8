"""Intervals, calibration and best-of-n against closed cases and simulation."""

import math

import numpy as np
import pytest

from rlhf.evaluation.best_of_n import best_of_n_kl, best_of_n_values, gap_closed
from rlhf.statistics import (
    best_temperature,
    brier_score,
    calibration_table,
    clustered_mean,
    clustered_share,
    expected_calibration_error,
    length_controlled_accuracy,
    pair_nll,
    paired_difference,
    win_rate,
)


@pytest.mark.parametrize("repeats", [1, 4])
def test_intervals_cover_the_truth_in_95_of_100_sets(repeats: int) -> None:
    """500 simulated sets of 150 prompts, coverage 95 % ± 3 %: three standard errors of a share over 500 sets.

    With repeats, a prompt has its own difficulty (a Beta of mean 0.7), so its four rows agree more than chance.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(500):
        difficulty = rng.beta(2.1, 0.9, size=150)
        values = (rng.random((150, repeats)) < difficulty[:, None]).astype(float).ravel()
        prompts = np.repeat(np.arange(150), repeats).tolist()
        _, (low, high) = clustered_share(values.tolist(), prompts)
        hits += low <= 0.7 <= high
    print(f"coverage with {repeats} rows a prompt: {hits / 500:.3f}")
    assert 0.92 <= hits / 500 <= 0.98


@pytest.mark.parametrize("count", [2, 3, 5, 8, 12, 20])
def test_intervals_of_few_clusters_cover_as_often(count: int) -> None:
    """Policies that are equal, 600 sets: a bootstrap's own percentiles covered 0 in 75 % of sets of three.

    Three standard errors of 95 % over 600 sets are 2.7 points. Of two clusters the factor is exact but for what 2,000 draws of
    three different means say.
    """
    rng = np.random.default_rng(count)
    sets = rng.normal(size=(600, count))
    intervals = [clustered_mean(values.tolist())[1] for values in sets]
    covered = np.mean([interval is not None and interval[0] <= 0 <= interval[1] for interval in intervals])
    print(f"{count}: {covered:.3f}")
    assert 0.923 <= covered <= 0.99


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("share", [0.5, 0.8, 0.95])
def test_intervals_of_few_shares_cover_and_stay_in_range(count: int, share: float) -> None:
    rng = np.random.default_rng(count)
    covered = 0
    for values in rng.random((400, count)) < share:
        _, (low, high) = clustered_share(values.astype(float).tolist())
        assert 0 <= low < high <= 1
        covered += low <= share <= high
    assert covered / 400 > 0.9


def test_one_conversation_says_nothing_of_others() -> None:
    assert clustered_mean([0.3] * 5, ["one"] * 5) == (pytest.approx(0.3), None)
    assert clustered_share([1.0, 1.0], ["one"] * 2) == (1.0, [0.025, 1.0])
    assert clustered_share([0.0, 0.0, 1.0], ["one"] * 3)[1] == [0.0, 1.0]
    assert paired_difference([0.1], [0.4])["difference_ci"] is None
    assert gap_closed([1.0, 1.0], [0.0, 0.0], [2.0, 2.0], ["one"] * 2) == (0.5, None)


def test_naive_intervals_would_not() -> None:
    """The mutant: the same repeated rows taken as independent cover far too rarely.

    Rows of a prompt correlate by 0.5, so eight of them have √4.5 of the error taken, and cover in 2 Φ(1.96 / √4.5) - 1 = 64 %;
    0.8 is three standard errors above over 80 sets.
    """
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(80):
        difficulty = rng.beta(0.7, 0.3, size=150)
        values = (rng.random((150, 8)) < difficulty[:, None]).astype(float).ravel()
        _, (low, high) = clustered_share(values.tolist())
        hits += low <= 0.7 <= high
    assert hits / 80 < 0.8


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


def test_many_clusters_are_drawn_in_parts() -> None:
    """5,200 clusters do not fit into one table of draws; the normal approximation is right there to a few percent."""
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


def test_win_rate_counts_ties_half() -> None:
    rate, (low, high) = win_rate([1, 0, 1, 1], [0, 1, 1, 0])
    assert rate == 0.625
    assert 0 <= low <= rate <= high <= 1


def test_the_interval_of_the_gap_closed_covers_the_truth_in_95_of_100_sets() -> None:
    """Prompts differ in difficulty by more than answers do. The mean of the largest of 16 normal answers is 1.76599.

    Measured over more sets: 94.1 % with 64 prompts (1,500 sets), 94.8 % with 256 (600 sets).
    """
    rng, prompts, shift, sets = np.random.default_rng(0), 128, 0.6, 250
    truth, covered, widths, apart = shift / 1.76599, 0, [], []
    for _ in range(sets):
        difficulty = rng.normal(0, 3, prompts)
        answers = difficulty[:, None] + rng.normal(size=(prompts, 16))
        policy = difficulty + shift + rng.normal(size=prompts)
        value, interval = gap_closed(policy.tolist(), answers[:, 0].tolist(), answers.max(axis=1).tolist())
        assert value is not None
        assert interval is not None
        assert interval[0] <= value <= interval[1]
        covered += interval[0] <= truth <= interval[1]
        widths.append(interval[1] - interval[0])
        shuffled = rng.permutation(policy).tolist()
        other = (
            gap_closed(shuffled, answers[:, 0].tolist(), answers.max(axis=1).tolist())[1] if len(apart) < 20 else None
        )
        apart += [other[1] - other[0]] if other else []
    assert covered / sets == pytest.approx(0.95, abs=0.041)  # three standard errors of 250 sets
    assert np.mean(apart) > 2 * np.mean(widths), "unpaired, the prompts' difficulty would be in it"


def test_no_gap_no_share_of_it() -> None:
    assert gap_closed([1.0, 2.0], [1.0, 1.0], [1.0, 1.0]) == (None, None)
    value, interval = gap_closed([1.0] + [0.0] * 9, [0.0] * 10, [2.0] + [0.0] * 9)  # one prompt has all of it
    assert (value, interval) == (0.5, None), "it says nothing of how far others would go"


def test_the_table_behind_the_calibration_error() -> None:
    stated, seen = [0.55, 0.58, 0.95], [1.0, 0.0, 1.0]
    table = calibration_table(stated, seen)
    assert [(row["n"], row["frequency"]) for row in table] == [(2, 0.5), (1, 1.0)]
    assert expected_calibration_error(stated, seen) == pytest.approx((2 * abs(0.5 - 0.565) + 0.05) / 3)


def test_brier_and_nll_in_closed_form() -> None:
    d = [math.log(3.0), -math.log(3.0)]  # P(chosen) = 3/4 and 1/4
    assert brier_score(d) == pytest.approx(((1 / 4) ** 2 + (3 / 4) ** 2) / 2)
    assert pair_nll(d) == pytest.approx(-(math.log(3 / 4) + math.log(1 / 4)) / 2)
    from sklearn.metrics import brier_score_loss, log_loss

    p = [3 / 4, 1 / 4]
    assert brier_score(d) == pytest.approx(brier_score_loss([1, 1], p))
    assert pair_nll(d) == pytest.approx(log_loss([1, 1], [[1 - x, x] for x in p], labels=[0, 1]))


def test_differences_that_are_alike_everywhere_prove_nothing_of_others() -> None:
    """(1 - u) d ± u · span, u = 1 - 0.025^(1/n): where a sign-flip test says p > 0.05, the interval holds 0."""
    for n in range(2, 12):
        interval = paired_difference([1.0] * n, [0.0] * n)["difference_ci"]
        assert interval is not None
        assert interval == pytest.approx([1 - 2 * (1 - 0.025 ** (1 / n)), 1.0])
        assert (interval[0] <= 0) == (2 ** (1 - n) > 0.05)
    assert paired_difference([1.0] * 9, [1.0] * 9, span=1.0)["difference_ci"] == pytest.approx(
        [-(1 - 0.025 ** (1 / 9)), 1 - 0.025 ** (1 / 9)]
    )
    assert paired_difference([1.0, 1.0], [1.0, 1.0], ["a", "a"])["difference_ci"] is None, "one conversation"
    low, high = paired_difference([1.0, 0.0, 1.0], [0.0, 0.0, 0.5])["difference_ci"] or (0, 0)
    assert low < 0.5 < high


def test_temperature_is_recovered() -> None:
    """Labels drawn from σ(d), scores reported three times too large: T must be 3."""
    rng = np.random.default_rng(0)
    d = rng.normal(0, 1.5, 40_000)
    d = np.where(rng.random(40_000) < 1 / (1 + np.exp(-d)), d, -d)  # the chosen side is the one that was drawn
    temperature = best_temperature((3 * d).tolist())
    assert temperature == pytest.approx(3.0, rel=0.03)
    assert pair_nll((3 * d).tolist(), temperature or 1) < pair_nll((3 * d).tolist())
    assert best_temperature([1.0, 2.0]) is None, "all right: the colder the better, without end"
    assert best_temperature([-1.0, -2.0, 0.5]) is None, "no better than chance"
    assert best_temperature([0.0, 0.0]) is None
    assert best_temperature([1.0, -0.999999]) == pytest.approx(1 / (2 * math.atanh(1e-6 / 2)), rel=0.05), (
        "no end of a range"
    )
    assert best_temperature([1.0, 0.0, 2.0]) is None, "no pair is wrong, so the colder the likelier, for ever"


def test_a_model_that_looks_at_length_alone_has_one_half() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.normal(20, 60, 500).round()
    right = (lengths > 0).astype(float)
    assert right.mean() > 0.6, "plain accuracy flatters it"
    value, interval = length_controlled_accuracy(right.tolist(), lengths.tolist())
    assert value == 0.5
    assert interval is not None
    low, high = interval
    assert 0.49 < low < 0.5 < high < 0.51, "of 500 pairs; a share of 1 is known no better than to 1 / n"
    assert length_controlled_accuracy([1.0, 1.0], [3.0, 4.0]) == (None, None)
    # By hand: longer 2 of 3 right, shorter 1 of 2; the pair of equal length does not count.
    value, _ = length_controlled_accuracy([1, 1, 0, 1, 0, 1], [5, 5, 5, -5, -5, 0])
    assert value == pytest.approx((2 / 3 + 1 / 2) / 2)


def test_best_of_n_values_equal_the_mean_over_all_subsets() -> None:
    """Unbiased: exactly the average over every subset of size n of the gold of its proxy-best member, ties shared."""
    from itertools import combinations

    rng = np.random.default_rng(0)
    proxy, gold = rng.integers(0, 4, size=(3, 6)).astype(float), rng.normal(size=(3, 6))
    for n in range(1, 7):
        expected = []
        for p, g in zip(proxy, gold, strict=True):
            picks = []
            for subset in combinations(range(6), n):
                best = max(p[i] for i in subset)
                shared = [g[j] for j in range(6) if p[j] == best]
                picks.append(np.mean(shared))
            expected.append(np.mean(picks))
        assert best_of_n_values(proxy, gold, n) == pytest.approx(expected)
    assert best_of_n_values(gold, gold, 6) == pytest.approx(gold.max(axis=1).tolist())
    assert best_of_n_values(proxy, gold, 1) == pytest.approx(gold.mean(axis=1).tolist())


def test_best_of_n_values_against_simulation() -> None:
    """On a known policy: answers of gold x ~ N(0,1), proxy = x + noise; the best of 4 fresh draws has the same mean."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4000, 16))
    proxy = x + rng.normal(size=x.shape)
    estimated = np.mean(best_of_n_values(proxy, x, 4))
    fresh = rng.normal(size=(400_000, 4))
    noisy = fresh + rng.normal(size=fresh.shape)
    simulated = fresh[np.arange(len(fresh)), noisy.argmax(axis=1)].mean()
    assert estimated == pytest.approx(simulated, abs=0.02)  # standard errors 0.008 and 0.001


def test_the_paired_test_is_mcnemars() -> None:
    from scipy.stats import binomtest

    first = [1.0] * 30 + [0.0] * 12 + [1.0] * 40
    second = [0.0] * 30 + [1.0] * 12 + [1.0] * 40
    result = paired_difference(first, second)
    assert result["difference"] == pytest.approx(18 / 82)
    assert result["p_value"] == pytest.approx(binomtest(30, 42).pvalue, abs=0.003)  # 20,000 draws at p = 0.008
    assert result["difference_ci"][0] > 0
    assert paired_difference(first, first)["p_value"] == 1.0


def test_the_paired_test_holds_its_level_where_prompts_repeat() -> None:
    """Two equal models, eight agreeing rows a prompt: 5 % of 200 sets are called different, and far more naively.

    Naively a difference has √8 of the error that it is taken to have, so 2 Φ(-1.96 / √8) = 49 % of sets are called different;
    0.3 is three standard errors below over 60 sets.
    """
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(40), 8).tolist()
    clustered = naive = 0
    for i in range(200):
        a, b = (np.repeat((rng.random(40) < 0.6).astype(float), 8).tolist() for _ in range(2))
        clustered += paired_difference(a, b, prompts)["p_value"] < 0.05
        naive += i < 60 and paired_difference(a, b)["p_value"] < 0.05
    assert clustered / 200 <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / 200)
    assert naive / 60 > 0.3


def test_a_share_is_never_a_point() -> None:
    """Not where all have one value between 0 and 1 either: three ties are not a win rate of exactly one half."""
    value, (low, high) = clustered_share([0.5] * 3)
    assert (value, low < 0.1, high > 0.9) == (0.5, True, True)
    assert clustered_share([1, 0, 1, 0], ["a", "a", "b", "b"])[1] == pytest.approx(beta_interval(1, 2))
    assert clustered_share([0.0] * 9)[1] == pytest.approx([0.0, 1 - 0.025 ** (1 / 9)])


def beta_interval(wins: float, count: int) -> list[float]:
    from scipy.stats import beta

    return [float(beta.ppf(0.025, wins, count - wins + 1)), float(beta.ppf(0.975, wins + 1, count - wins))]


@pytest.mark.parametrize("rare", [1, 2, 3, 5, 10])
def test_length_control_knows_how_few_the_rarer_kind_has(rare: int) -> None:
    """200 pairs whose chosen answer is longer, a few whose is shorter: coverage was 0, 0.5, 0.7, 0.88 and 0.92."""
    rng, covered = np.random.default_rng(rare), []
    for _ in range(100):
        lengths = [5.0] * 200 + [-5.0] * rare
        right = [float(rng.random() < (0.8 if length > 0 else 0.6)) for length in lengths]
        _, interval = length_controlled_accuracy(right, lengths)
        assert interval is not None
        covered.append(interval[0] <= 0.7 <= interval[1])
    assert np.mean(covered) >= 0.9
