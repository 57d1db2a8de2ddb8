"""The meter: parts lie within each other, accuracies under wrong labels are found, and what it says follows from them."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.objectives.learning_curve import accuracy_after
from rlhf.report.meter import meter_sentences
from rlhf.reward.meter import (
    PARTS,
    RATES,
    SCALES,
    Measured,
    estimate_accuracies,
    fit_meter,
    fit_rates,
    measure_parts,
    price_verdicts,
    read_meter,
    too_few_labels,
)
from rlhf.reward.vote import collect_votes, plan_vote


def test_parts_lie_within_each_other_and_are_judged_on_other_prompts() -> None:
    prompts = [f"prompt {i // 2}" for i in range(400)]  # two pairs of each
    plan = plan_vote(prompts, members=6, folds=3, in_sample=False, seed=0)
    calls: dict[int, tuple[list[int], list[int]]] = {}

    def train(member: int, trained: list[int], judged: list[int]) -> Tensor:
        calls[member] = (trained, judged)
        return torch.full((len(judged),), float(len(trained)))

    votes = collect_votes(plan, train)
    measured = measure_parts(plan, prompts, votes, train)
    assert sorted(calls) == list(range(6 + 3 * len(PARTS)))
    assert not measured.differences.isnan().any(), "every pair is judged at every size"
    whole = np.mean([len(plan.trains_on(fold)) for fold in range(3)])
    assert measured.sizes == pytest.approx([*(share * whole for share in PARTS), whole], abs=1)
    for fold in range(3):
        parts = [set(calls[6 + row * 3 + fold][0]) for row in range(len(PARTS))]
        assert parts[0] < parts[1] < parts[2] < set(plan.trains_on(fold))
        for row, part in enumerate(parts):
            judged = calls[6 + row * 3 + fold][1]
            assert judged == plan.votes_on(fold)
            assert not {prompts[i] for i in part} & {prompts[i] for i in judged}
            assert (measured.differences[row, judged] == len(part)).all()


def planted(rate: float, spread: float, n: int = 4000, seed: int = 0) -> tuple[Tensor, float]:
    """Differences of a calibrated voter against labels of which a share is wrong, and how often it is really right."""
    rng = np.random.default_rng(seed)
    log_odds = rng.normal(0, spread, n)
    first_is_better = rng.random(n) < 1 / (1 + np.exp(-log_odds))
    right_sign = np.where(first_is_better, 1, -1) * np.where(rng.random(n) < rate, -1, 1)
    return torch.tensor(log_odds * right_sign), float(np.mean((log_odds > 0) == first_is_better))


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_accuracy_is_found_under_wrong_labels(rate: float) -> None:
    rows, truths = zip(*(planted(rate, spread) for spread in (0.7, 1.5, 4.0)), strict=True)
    accuracies, covariance = estimate_accuracies(3 * torch.stack(rows), list(range(4000)), rate)
    deviations = covariance.diagonal().sqrt()
    assert ((accuracies - torch.tensor(truths)).abs() < 3.5 * deviations + 0.005).all()
    # Counting agreements has a larger error: binomial, and divided by 1 - 2ε.
    agree = rate + (1 - 2 * rate) * np.array(truths)
    counted = np.sqrt(agree * (1 - agree) / 4000) / (1 - 2 * rate)
    assert (deviations.numpy() < counted).all()


def test_pairs_of_one_prompt_are_resampled_together() -> None:
    row, _ = planted(0.25, 1.5, n=1000)
    _, alone = estimate_accuracies(row[None], list(range(1000)), 0.25)
    _, copied = estimate_accuracies(row.repeat(4)[None], list(range(1000)) * 4, 0.25)
    assert copied.item() == pytest.approx(alone.item(), rel=0.35), "four copies of a pair are not four pairs"


def test_it_finds_a_planted_curve_and_its_sentences_follow() -> None:
    """Calibrated voters whose accuracies lie on a planted curve, a quarter of the labels wrong."""
    sizes, limit, half = [200.0, 400.0, 800.0, 1600.0], torch.tensor(0.9), torch.tensor(300.0)
    goal = accuracy_after(torch.tensor(sizes), limit, half)
    spreads = []
    for accuracy in goal.tolist():  # the spread of log-odds with which a calibrated voter is right that often
        grid = np.random.default_rng(1).normal(size=5000)
        candidates = np.linspace(0.05, 8, 80)
        right = [np.mean(1 / (1 + np.exp(-np.abs(s * grid)))) for s in candidates]
        spreads.append(candidates[np.argmin(np.abs(np.array(right) - accuracy))])
    differences = torch.stack([planted(0.25, s, n=4000, seed=i)[0] for i, s in enumerate(spreads)])
    curves = fit_meter(Measured(sizes, differences, 5), differences[-1], list(range(4000)))
    meter = read_meter(curves, torch.zeros(2000), range(2000), verdicts=100, expert_error=0.05)

    for entry, labels in ((meter["accuracy"], 2000.0), (meter["more"][1]["accuracy"], 4000.0)):
        mean, low, high = entry
        truth = accuracy_after(labels, limit, half).item()
        assert low < truth < high
        assert mean == pytest.approx(truth, abs=0.04)
    assert [entry["labels"] for entry in meter["more"]] == [1000, 2000, 6000]
    assert meter["worth"][0] == pytest.approx(500, rel=0.25), "(1 - 2ε)² of 2,000"
    assert meter["worth"][1] < 500 < meter["worth"][2]
    # Votes that say nothing: by hand, a verdict agrees with probability q, and leaves p (1 - e) / q or p e / (1 - q).
    q = 0.75 * 0.95 + 0.25 * 0.05
    after = [0.75 * 0.95 / q, 0.75 * 0.05 / (1 - q)]
    adds = 100 * (q * (2 * after[0] - 1) ** 2 + (1 - q) * (2 * after[1] - 1) ** 2 - 0.25)
    assert meter["second_look"]["labels"][0] == pytest.approx(adds / 0.25, rel=0.25)
    assert meter["wrong"][1] < 0.25 < meter["wrong"][2]
    assert meter["second_look"]["accuracy"][0] > meter["accuracy"][0]

    text = meter_sentences(meter)
    assert text[0].startswith("Meter: 2,000 labels, 2")
    assert "1,000 more, " in text[1]
    assert text[2].startswith("100 expert verdicts on the pairs in most doubt would do what ")


def test_the_share_of_wrong_labels_is_as_sure_as_the_votes_are() -> None:
    """Sure votes tell the rate to a few points; votes that are never sure leave every rate possible."""
    sure, unsure = (fit_rates(planted(0.25, spread)[0], list(range(4000))).log_likelihood for spread in (4.0, 0.3))
    assert abs(RATES[sure.argmax()].item() - 0.25) <= 0.025
    assert (sure > sure.max() - 1.92).sum() <= 5
    assert (unsure > unsure.max() - 1.92).sum() >= 12
    # By hand, at a rate of 0: Π σ(b d), integrated over log(b mean |d|) ~ N(0, 2²).
    row = torch.tensor([1.0, -1.0, 2.0], dtype=torch.float64)
    each = [
        torch.sigmoid(b * row / (4 / 3)).prod().item() * math.exp(-0.5 * (math.log(b) / 2) ** 2)
        for b in SCALES.tolist()
    ]
    found = fit_rates(row, ["a", "b", "c"])
    assert math.exp(found.log_likelihood[0].item()) == pytest.approx(sum(each) / len(each))
    typical = sum(weight * math.log(b * 3 / 4) for weight, b in zip(each, SCALES.tolist(), strict=True)) / sum(each)
    assert math.log(found.scales[0].item()) == pytest.approx(typical)


def test_few_labels_make_no_vote_infallible() -> None:
    """Thirty labels that a blunt voter agrees with may have any worth; the likeliest is the end of the grid."""
    row = torch.linspace(0.2, 1.0, 30)
    accuracies, _ = estimate_accuracies(row[None], list(range(30)), 0.0)
    blunt = 1 / (1 + np.exp(-SCALES.numpy()[:, None] * row.numpy() / row.mean().item()))
    weight = blunt.prod(axis=1) * np.exp(-0.5 * (np.log(SCALES.numpy()) / 2) ** 2)
    assert accuracies.item() == pytest.approx((weight * blunt.mean(axis=1)).sum() / weight.sum(), rel=1e-5)
    assert accuracies.item() < 0.995


def test_a_verdict_is_priced_by_the_information_of_labels_on_pairs_as_they_are() -> None:
    """Bits counted by numbers: log-likelihoods of all outcomes, differentiated at the difference that the vote believes."""
    spread, rate, error = 3.0, 0.25, 0.05
    strength, _ = planted(rate, spread)
    price = price_verdicts(strength, range(len(strength)), 200, expert_error=error)
    at = int((RATES - rate).abs().argmin())
    assert RATES[at].item() == pytest.approx(rate), "the planted rate is on the grid"

    def order(d: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-d))

    def of_label(d: np.ndarray) -> np.ndarray:
        return (1 - rate) * order(d) + rate * order(-d)

    def of_verdict(d: np.ndarray) -> np.ndarray:
        right = (1 - rate) * order(d) / of_label(d)
        return (1 - error) * right + error * (1 - right)

    def information(outcome: Callable[[np.ndarray], np.ndarray], d: np.ndarray) -> np.ndarray:
        step = 1e-4
        return sum(
            sign(outcome, d) * ((np.log(sign(outcome, d + step)) - np.log(sign(outcome, d - step))) / (2 * step)) ** 2
            for sign in (lambda f, x: f(x), lambda f, x: 1 - f(x))
        )

    d = strength.numpy()  # calibrated: b is 1
    verdicts = np.sort(information(of_verdict, d))[-200:].sum()
    assert price[at].item() == pytest.approx(verdicts / information(of_label, d).mean(), rel=0.1)
    small_signal = 4 * verdicts / (1 - 2 * rate) ** 2  # as if labels were on pairs whose order is open
    assert price[at].item() > 2 * small_signal
    assert price[0].item() == 0.0, "where no label is wrong, nobody need look"


def test_too_few_labels_is_a_sentence() -> None:
    assert too_few_labels(250, 5) is None
    assert too_few_labels(249, 5) == "249 labels are too few to say what more would bring; the meter needs 250."
    assert math.isclose(0.125 * 0.8 * 250, 25)


def test_alike_pairs_of_a_conversation_are_one_opinion() -> None:
    """Forty conversations of 25 alike pairs: the price of verdicts is that of forty votes, whatever there are of each."""
    generator = torch.Generator().manual_seed(0)
    one = 1.5 * torch.randn(40, generator=generator) + 0.7
    rows, conversations = one.repeat_interleave(25), [i // 25 for i in range(1000)]
    alone, alike = (
        price_verdicts(one, range(40), 2, expert_error=0.05),
        price_verdicts(rows, conversations, 50, expert_error=0.05),
    )
    torch.testing.assert_close(alike, 25 * alone, rtol=1e-4, atol=0)
    counted = price_verdicts(rows, range(1000), 50, expert_error=0.05)
    assert (counted[1:] / alike[1:] - 1).abs().max() > 0.5
