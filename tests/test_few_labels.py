"""Rates from few labels and many verdicts of a judge: closed forms, coverage, and what the judge is worth."""

from itertools import pairwise

import numpy as np
import pytest

from rlhf.few_labels import Prompts, human_rate, powered_rate, rate_at_any_look

ROWS, LABELS = 2100, 100
RATE = 0.6


def population(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What people and judge say of every row; people find the first answer better in 60 % of the rows."""
    if kind == "graded":  # says how sure it is, and agrees on 0.80 of the rows
        chance = 1 / (1 + np.exp(-(2.22 * rng.standard_normal(ROWS) + 0.71)))
        return (rng.random(ROWS) < chance).astype(float), chance
    wins = (rng.random(ROWS) < RATE).astype(float)
    agrees = {"right": 1.0, "binary": 0.8, "binary, 0.85": 0.85, "knows nothing": 0.5, "turned round": 0.2}[kind]
    return wins, np.where(rng.random(ROWS) < agrees, wins, 1 - wins)


def test_the_formula_by_hand() -> None:
    """PPI++ for a mean, eq. 2 and the tuned weight, in plain numpy, with two labels more that contradict the judge."""
    rng = np.random.default_rng(0)
    wins, judge = population("graded", rng)
    y, f, alone = wins[:30], judge[:30], judge[30:200]
    weight = ((y - y.mean()) * (f - f.mean())).sum() / 29 / ((1 + 30 / 170) * judge[:200].var(ddof=1))
    mean = weight * alone.mean() + (y - weight * f).mean()
    rest, everything = y - weight * f, judge[:200]
    above, below = (
        everything[is_side].mean() for is_side in (everything >= everything.mean(), everything < everything.mean())
    )
    squares = ((rest - rest.mean()) ** 2).sum()
    squares += weight * (-weight * above - rest.mean()) ** 2 + weight * (1 - weight * below - rest.mean()) ** 2
    variance = weight**2 * everything.var(ddof=1) / 170 + squares / (29 + 2 * weight) / 30
    rate = powered_rate(y.tolist(), f.tolist(), alone.tolist())
    assert rate.judge_weight == pytest.approx(weight)
    assert rate.mean == pytest.approx(mean)
    assert (rate.high - rate.low) / 2 == pytest.approx(2.0484 * variance**0.5, rel=1e-4), "t of 28 degrees: 2.0484"


def test_limits() -> None:
    """A judge that says the same of everything changes nothing; one that is right makes labels of its verdicts."""
    y = [1.0, 0.0, 1.0, 1.0, 0.0, 1.0]
    same = powered_rate(y, [0.7] * 6, [0.7] * 100)
    assert (same.mean, same.judge_weight) == (pytest.approx(human_rate(y).mean), 0.0)
    right = powered_rate(y, y, [1.0] * 70 + [0.0] * 30)
    assert right.judge_weight > 0.9
    assert right.mean == pytest.approx(0.7, abs=0.01)
    turned_round = powered_rate(y, [1 - value for value in y], [0.3] * 50 + [0.6] * 50)
    assert turned_round.judge_weight == 0, "a judge that says the opposite is not believed the other way round"
    assert powered_rate(y, [0.2, 0.4] * 3, []).mean == pytest.approx(human_rate(y).mean), "nobody left to speak for"


def simulations(kind: str, count: int) -> dict[str, float]:
    rng = np.random.default_rng(1)
    covered, wide, wide_people = [], [], []
    for _ in range(count):
        wins, judge = population(kind, rng)
        rate = powered_rate(wins[:LABELS], judge[:LABELS], judge[LABELS:])
        covered.append(rate.low <= RATE <= rate.high)
        wide.append(rate.high - rate.low)
        people = human_rate(wins[:LABELS])
        wide_people.append(people.high - people.low)
    return {"coverage": float(np.mean(covered)), "width": float(np.sum(wide) / np.sum(wide_people))}


@pytest.mark.parametrize("kind", ["right", "graded", "binary", "knows nothing", "turned round"])
def test_one_look_covers_whatever_the_judge_is(kind: str) -> None:
    """500 simulations: at least 0.93, and 0.95 within three standard errors, 0.01 each.

    Of a judge that is right the interval is wider than it need be: a hundred labels cannot show that it never errs.
    """
    assert 0.93 <= simulations(kind, 500)["coverage"] <= (1.0 if kind == "right" else 0.98)


@pytest.mark.parametrize(
    ("labels", "rows", "rate", "wins_missed", "losses_called_wins"),
    [
        (10, 10_000, 0.6, 0.0, 0.1),
        (20, 10_000, 0.6, 0.0, 0.1),
        (30, 2_000, 0.5, 0.0, 0.05),
        (100, 10_000, 0.6, 0.0, 0.1),
        (100, 2_000, 0.5, 0.03, 0.0),
        (20, 500, 0.8, 0.1, 0.1),
        (50, 500, 0.9, 0.05, 0.05),
    ],
)
def test_a_judge_that_seldom_errs_is_not_believed_outright(
    labels: int, rows: int, rate: float, wins_missed: float, losses_called_wins: float
) -> None:
    """By chance few labels contradict it, or none; without two that do, 0.33 to 0.92 of the intervals held the truth."""
    rng = np.random.default_rng(3)
    covered = []
    for _ in range(500):
        wins = rng.random(labels + rows) < rate
        judge = np.where(wins, rng.random(len(wins)) >= wins_missed, rng.random(len(wins)) < losses_called_wins)
        y, f = wins[:labels].astype(float), judge.astype(float)
        if 0 < y.mean() < 1:  # else no interval is shown
            found = powered_rate(y.tolist(), f[:labels].tolist(), f[labels:].tolist())
            covered.append(found.low <= rate <= found.high)
    assert np.mean(covered) >= 0.91, "0.93 or more, within two standard errors of 500 draws"


def test_rows_of_one_prompt_are_no_draws_of_their_own() -> None:
    """60 prompts of 8 rows, of which a prompt's own rate is drawn; 200 rows are labelled at random: without prompts 0.72."""
    rng = np.random.default_rng(4)
    covered, covered_blind, covered_people = [], [], []
    for _ in range(300):
        names = np.repeat(np.arange(60), 8)
        wins = rng.random(480) < np.repeat(rng.beta(0.5, 0.5, 60), 8)  # half of them, over all prompts there may be
        judge = np.where(rng.random(480) < 0.85, wins, ~wins).astype(float)
        order = rng.permutation(480)
        (known, y), rest = (names[order[:200]].tolist(), wins[order[:200]].astype(float).tolist()), order[200:]
        f, alone = judge[order[:200]].tolist(), judge[rest].tolist()
        prompts = Prompts(known, names[rest].tolist())
        together, blind, people = powered_rate(y, f, alone, prompts), powered_rate(y, f, alone), human_rate(y, prompts)
        covered.append(together.low <= 0.5 <= together.high)
        covered_blind.append(blind.low <= 0.5 <= blind.high)
        covered_people.append(people.low <= 0.5 <= people.high)
    assert np.mean(covered) >= 0.92, "0.95 within three standard errors, 0.0126 each, less the 60 prompts' own lack"
    assert np.mean(covered_people) >= 0.92
    assert np.mean(covered_blind) <= 0.85
    each = Prompts(list(range(200)), list(range(200, 480)))
    assert powered_rate(y, f, alone, each) == blind, "a prompt for each row is none at all"
    assert human_rate(y, each) == human_rate(y)
    few = powered_rate(y, f, alone, Prompts([i % 2 for i in range(200)], [i % 2 for i in range(280)]))
    assert (few.low, few.high) == (0.0, 1.0), "two prompts say nothing of others"


def test_a_prompt_with_most_labels_is_worth_no_more_than_others() -> None:
    """20 labels of one prompt and one of each of nine others: counted as ten prompts 0.67 and 0.54; as (Σ n)² / Σ n² = 2.1, all."""
    rng, names = np.random.default_rng(5), np.repeat(np.arange(10), [20] + [1] * 9)
    covered, covered_people = [], []
    for _ in range(300):
        rates = rng.beta(0.5, 0.5, 10)
        wins = (rng.random(len(names)) < rates[names]).astype(float)
        judge = np.where(rng.random(len(names)) < 0.9, wins, 1 - wins)
        prompts = Prompts(names.tolist(), [])
        together = powered_rate(wins.tolist(), judge.tolist(), [], prompts)
        people = human_rate(wins.tolist(), prompts)
        covered.append(together.low <= 0.5 <= together.high)
        covered_people.append(people.low <= 0.5 <= people.high)
    assert np.mean(covered) >= 0.95
    assert np.mean(covered_people) >= 0.95
    equal = Prompts([i % 7 for i in range(70)], [])
    labels = [float(i % 3 == 0) for i in range(70)]
    assert human_rate(labels, equal) == human_rate(labels, Prompts([(i % 7,) for i in range(70)], []))


def test_all_rows_labelled_leave_the_rate_that_they_have() -> None:
    """No step of the grid is wider than what the last labels leave open; 3,500 rows once had 11 of 40 without any rate."""
    for seed in range(3):
        wins = (np.random.default_rng(seed).random(3500) < 0.6).astype(float)
        low, high = rate_at_any_look(wins.tolist(), [0.5] * 3500, [])[-1]
        assert low - 1e-9 <= wins.mean() <= high + 1e-9
        assert high - low <= 2 / 3500


def test_of_many_rows_the_rate_between_two_candidates_is_held() -> None:
    """5,001 rows, all labelled: half of such runs missed the rate of these rows, and ended at a point beside it."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        labels = rng.choice([0.0, 0.5, 1.0], 5001, p=[0.2, 0.1, 0.7])
        judge = np.clip(labels + rng.normal(0, 0.2, 5001), 0, 1)
        low, high = rate_at_any_look(labels.tolist(), judge.tolist(), [])[-1]
        assert low <= labels.mean() <= high
        assert 0 < high - low < 0.003


def test_a_rate_is_a_rate() -> None:
    """The judge's wins of the rest stand on top of labels that it called losses: 1.11, cut to 1."""
    rate = powered_rate([1.0] * 8 + [0.0] * 2, [0.7] * 8 + [0.1] * 2, [1.0] * 1000)
    assert rate.mean == rate.high == 1.0


def test_width_at_a_hundred_labels() -> None:
    """A judge of two verdicts that agrees on 0.8 leaves sqrt(1 - 0.6²) = 0.8 of the width, which no method can better; one that
    says how sure it is, and agrees as often, leaves less. All of them a little more: 2,000 verdicts err too, and two labels that
    contradict the judge are added.
    """
    assert simulations("binary", 200)["width"] == pytest.approx(0.82, abs=0.02)
    assert simulations("graded", 200)["width"] == pytest.approx(0.79, abs=0.02)
    assert simulations("binary, 0.85", 200)["width"] == pytest.approx(0.75, abs=0.02)
    assert simulations("right", 200)["width"] <= 0.37
    assert simulations("knows nothing", 200)["width"] <= 1.02


# ---- Any number of looks ----


@pytest.mark.parametrize("kind", ["graded", "binary", "turned round"])
def test_looking_twenty_times_covers(kind: str) -> None:
    """Every fifth label, 20 times, and after every label between: one miss anywhere counts. 500 simulations of all kinds."""
    rng = np.random.default_rng(2)
    missed, missed_by_fixed = 0, 0
    for _ in range(170):
        wins, judge = population(kind, rng)
        intervals = rate_at_any_look(wins[:LABELS], judge[:LABELS], judge[LABELS:])
        missed += any(not low <= wins.mean() <= high for low, high in intervals)
        looks = [powered_rate(wins[:n], judge[:n], judge[n:]) for n in range(5, LABELS + 1, 5)]
        missed_by_fixed += any(not rate.low <= RATE <= rate.high for rate in looks)
    assert missed / 170 <= 0.07, "coverage of 0.93 or more, however often one looks"
    assert missed_by_fixed / 170 > 0.12, "what an interval for one look is worth when it is looked at 20 times"


def test_intervals_are_nested_and_end_at_the_rate_itself() -> None:
    """When people have labelled every row there is nothing left to infer."""
    rng = np.random.default_rng(3)
    wins = (rng.random(60) < 0.7).astype(float)
    judge = np.where(rng.random(60) < 0.8, wins, 1 - wins)
    intervals = rate_at_any_look(wins, judge, [])
    for (low, high), (low_next, high_next) in pairwise(intervals):
        assert low <= low_next <= high_next <= high
    assert intervals[-1] == (pytest.approx(wins.mean(), abs=0.02), pytest.approx(wins.mean(), abs=0.02))


def test_a_judge_makes_the_interval_of_any_look_narrower() -> None:
    rng = np.random.default_rng(4)
    widths = {"judge": [], "nobody": []}
    for _ in range(20):
        wins, judge = population("graded", rng)
        for name, said in (("judge", judge), ("nobody", np.full(ROWS, 0.5))):
            low, high = rate_at_any_look(wins[:LABELS], said[:LABELS], said[LABELS:])[-1]
            widths[name].append(high - low)
    assert np.mean(widths["judge"]) < 0.9 * np.mean(widths["nobody"])


def test_the_judges_weight_is_known_before_the_label() -> None:
    """Three labels are the fewest that a weight is made of, so it moves the fourth bet and none before; a low confidence excludes
    something at once."""
    wins, judge, alone = [1.0, 0.0, 1.0, 1.0], [1.0, 0.0, 1.0, 0.0], [0.5] * 40
    with_judge = rate_at_any_look(wins, judge, alone, confidence=0.1)
    nobody = rate_at_any_look(wins, [0.5] * 4, alone, confidence=0.1)
    assert with_judge[:3] == nobody[:3]
    assert nobody[2] != (0.0, 1.0)
    assert with_judge[3] != nobody[3]


def test_sure_capital_by_hand() -> None:
    """The first stake on the first label, for one candidate, without a judge: 1 ± η (y - θ), η = sqrt(2 log 40 / (log 2 / 4))."""
    stake = (2 * np.log(40) / (0.25 * np.log(2))) ** 0.5
    low, high = rate_at_any_look([1.0], [0.5], [0.5] * 10**6, confidence=0.95)[0]
    assert stake > 0.5, "so the bet is capped at half of what can be lost, and one label excludes nothing"
    assert (low, high) == (0.0, 1.0)
