"""What verdicts add: the noise that they prove, what they leave of labels and votes, what voters learn from them."""

import math
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from rlhf.objectives.annotators import vote_worth
from rlhf.objectives.second_look import least_wrong
from rlhf.objectives.strength import VoteStrength, scale_prior
from rlhf.pipeline.known import (
    beliefs,
    believed_rate,
    gains,
    label_rates,
    other_labels,
    weigh_verdicts,
    what_voters_learn,
)
from rlhf.report.second_look import alarm
from rlhf.reward.annotators import posterior_by_annotator
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.noise import (
    RATES,
    SCALES,
    STEPS,
    NoiseEstimate,
    estimate_noise,
    foresee_contradictions,
    vote_grid,
)
from tests.pipeline.verdicts import ERROR, ODDS, agreeing, looked, pair


def test_a_verdict_more_or_less_does_not_turn_what_is_said() -> None:
    """80 labels that every vote agrees with, about half of 60 contradicted: 31 proved nothing and 33 "at least 40 %"."""
    strength, rows, lows = agreeing(80), [pair(i) for i in range(80)], []
    for contradicted in range(26, 38):
        views = looked(
            [0] * contradicted + [1] * (60 - contradicted) + [0] * 20, [1] * contradicted + [0] * (80 - contradicted)
        )
        known = weigh_verdicts(rows, strength, views, expert_error=ERROR)
        lows.append(known.low)
        torch.testing.assert_close(known.after[60:], known.before[60:], atol=0.02, rtol=0)  # nobody looked at these
        assert known.low <= contradicted / 80
        assert alarm(contradicted, gains(known, views)["foreseen"], ERROR)
    assert all(0 <= later - earlier <= 2 / 80 for earlier, later in pairwise(lows))
    assert lows[0] > 0.2


def test_what_was_known_before_is_what_was_said_before() -> None:
    """Worth and foreseen contradictions are those of labels and vote, whatever experts say."""
    strength, rows = agreeing(80), [pair(i) for i in range(80)]
    nobody = weigh_verdicts(rows, strength, looked([0] * 80, [0] * 80), expert_error=ERROR)
    views = looked([0] * 80, [1] * 30 + [0] * 50)
    known = weigh_verdicts(rows, strength, views, expert_error=ERROR)
    assert torch.equal(known.before, nobody.before)
    assert torch.equal(nobody.after, nobody.before)
    assert gains(known, views)["worth"]["before"] == gains(nobody, views)["worth"]["before"]
    noise = estimate_noise(strength, range(80))
    right = beliefs(strength, noise, torch.zeros(80))[:30].double()
    contradicts = right * ERROR + (1 - right) * (1 - ERROR)
    assert known.foreseen is not None
    assert known.foreseen[0] == pytest.approx(contradicts.sum().item(), rel=0.1), (
        "the mean over ε and b, of the nearest to it"
    )
    assert known.foreseen[0] < 3
    assert known.low == pytest.approx(least_wrong(30, 30, error_rate=ERROR) / 80)


@pytest.mark.parametrize("error", [0.05, 0.2])
def test_what_verdicts_prove_is_seldom_too_much(error: float) -> None:
    """Of 40 judged labels w are wrong; c is drawn exactly. The proved number is above w in at most 2.5 % of the draws."""
    proved = [least_wrong(c, 40, error_rate=error) for c in range(41)]
    assert proved[0] == 0
    assert proved == sorted(proved)
    assert all(p <= c for c, p in enumerate(proved))
    for wrong in range(41):
        both = np.convolve(
            binom.pmf(range(wrong + 1), wrong, 1 - error), binom.pmf(range(41 - wrong), 40 - wrong, error)
        )
        assert sum(both[c] for c in range(41) if proved[c] > wrong) <= 0.025 + 1e-12
    assert proved[20] == {0.05: 16, 0.2: 9}[error], "20 of 40"


def test_a_verdict_never_pulls_the_other_way() -> None:
    """Doubt in votes that share an error with labels made an agreeing verdict lower a sure label, 0.999 to 0.998."""
    strength = torch.cat([agreeing(80), torch.tensor([40.0, -40.0])])
    rows = [pair(i) for i in range(82)]
    views = looked([1] * 20 + [0] * 60 + [1, 0], [0] * 20 + [1] * 20 + [0] * 40 + [0, 1])
    known = weigh_verdicts(rows, strength, views, expert_error=ERROR)
    right = beliefs(strength.double(), known.noise, torch.zeros(82))
    assert known.shared > 0.05
    assert (known.after[views.agree > 0] >= right[views.agree > 0].float()).all()
    assert (known.after[views.contradict > 0] <= right[views.contradict > 0].float()).all()


def test_voters_learn_labels_and_verdicts_by_bayes_and_each_once() -> None:
    """Four pairs, the first with two more labels of which one contradicts; one is confirmed, one contradicted twice, one equal."""
    rows: list[Any] = [pair(i) for i in range(4)]
    rows += [{**rows[0], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}, rows[0]]
    views = looked([0, 1, 0, 0, 0, 0], [0, 0, 2, 0, 0, 0], equal=[0, 0, 0, 1, 0, 0], repeats=2)
    noise = NoiseEstimate(0.3, 0.2, 1.0, 0.1, 0.4)
    label = math.log(0.8 / 0.2)
    odds = [label - label + label, label + ODDS, label - 2 * ODDS]
    expected = [*(1 / (1 + math.exp(value)) for value in odds), 0.5, 0.5, 0.5]
    rates = torch.full((6,), 0.2, dtype=torch.float64)
    assert what_voters_learn(rows, views, noise, rates, expert_error=ERROR) == pytest.approx(
        expected, rel=1e-5, abs=6e-7
    )
    assert other_labels(rows, noise, rates)[[0, 4]].tolist() == pytest.approx([0.0, -2 * label], abs=1e-5)
    assert believed_rate(noise) == 0.2


def test_each_label_errs_as_its_annotator_does() -> None:
    """One is wrong in 5 %, the other in 40 %. One rate for both made the log loss of pairs nobody looked at 0.31, of 0.23."""
    made = torch.Generator().manual_seed(0)
    bad = torch.arange(600) % 2 == 0
    rows: list[Any] = [pair(i) | {"annotator": "bad" if is_bad else "good"} for i, is_bad in enumerate(bad)]
    wrong = torch.rand(600, generator=made) < torch.where(bad, 0.4, 0.05)
    order = torch.where(wrong, -1.0, 1.0)
    strength = order * 1.2 + torch.randn(600, generator=made) * 1.2
    asked = torch.arange(600) < 30
    views = looked((asked & ~wrong).int().tolist(), (asked & wrong).int().tolist())
    known = weigh_verdicts(rows, strength, views, expert_error=ERROR)
    one_rate = weigh_verdicts([pair(i) for i in range(600)], strength, views, expert_error=ERROR)
    by_audit = posterior_by_annotator(rows, strength, estimate_noise(strength, range(600)))
    assert by_audit is not None

    def log_loss(right: Tensor) -> float:
        return -torch.where(wrong, 1 - right, right)[~asked].log().mean().item()

    assert log_loss(known.after) < log_loss(by_audit.right) + 0.015
    assert log_loss(one_rate.after) > log_loss(by_audit.right) + 0.04, "or this test shows nothing"
    for is_one in (bad, ~bad):
        assert known.rates[is_one].unique().item() == pytest.approx(wrong[is_one].float().mean().item(), abs=0.05)
    assert one_rate.rates.unique().item() == believed_rate(one_rate.noise)
    who = bad.long()
    assert known.noise.scale == pytest.approx(vote_worth(strength, who, 2))
    learnt = torch.tensor(what_voters_learn(rows, views, known.noise, known.rates, expert_error=ERROR))
    torch.testing.assert_close(learnt[~asked], known.rates[~asked], atol=1e-6, rtol=0, check_dtype=False)
    odds = torch.logit(1 - known.rates[0]) + (-ODDS if wrong[0] else ODDS)
    assert learnt[0] == pytest.approx(torch.sigmoid(-odds).item(), abs=1e-6)


@pytest.mark.parametrize("rates", [(0.05, 0.4), (0.02, 0.2, 0.5), (0.3, 0.3, 0.1, 0.1, 0.02, 0.02)])
def test_a_look_at_a_few_is_no_worse_than_none_where_annotators_differ(rates: tuple[float, ...]) -> None:
    """With one rate for all, votes were taken to be blunt: on 20 of 36 such files 30 verdicts made labels worse, by up to 0.126.

    Means of the log loss over five files of pairs nobody looked at; rates of six annotators of 50 labels move it by 0.002.
    """
    excess = []
    for seed in range(5):
        made = torch.Generator().manual_seed(seed)
        who = torch.arange(300) % len(rates)
        rows: list[Any] = [pair(i) | {"annotator": f"a{name}"} for i, name in enumerate(who.tolist())]
        wrong = torch.rand(300, generator=made) < torch.tensor(rates)[who]
        strength = torch.where(wrong, -1.2, 1.2) + 1.2 * torch.randn(300, generator=made)
        asked = torch.arange(300) < 30
        agrees = (torch.rand(300, generator=made) >= ERROR) != wrong
        views = looked((asked & agrees).int().tolist(), (asked & ~agrees).int().tolist())
        known = weigh_verdicts(rows, strength, views, expert_error=ERROR)
        audit = posterior_by_annotator(rows, strength, estimate_noise(strength, range(300)))
        assert audit is not None
        loss = [-torch.where(wrong, 1 - p, p)[~asked].log().mean().item() for p in (known.after, audit.right)]
        excess.append(loss[0] - loss[1])
    assert np.mean(excess) < 0.005
    assert max(excess) < 0.03


def test_verdicts_tell_who_errs_and_ties_do_not() -> None:
    """Votes say nothing: half of one annotator's labels are contradicted, none of the other's. Then those are called equal."""
    rows: list[Any] = [pair(i) | {"annotator": "ann" if i < 60 else "bob"} for i in range(120)]
    noise, none = NoiseEstimate(0.2, 0.2, 1.0, 0.1, 0.4), torch.zeros(120)
    contradicted = torch.arange(120) < 30
    verdicts = torch.where(contradicted, -ODDS, ODDS)
    ann, bob = label_rates(rows, none, noise, verdicts, none.bool())[[0, -1]]
    assert ann == pytest.approx(0.45, abs=0.08), "a half, drawn towards the quarter of all"
    assert bob < 0.1
    votes = torch.where(contradicted, -5.0, 0.0)
    ann, bob = label_rates(rows, votes, noise, verdicts * ~contradicted, contradicted)[[0, -1]]
    assert ann < 0.1


def test_where_nothing_is_known_of_annotators_they_err_as_all_labels_do() -> None:
    """Votes that say nothing and no verdict: names alone made a quarter of the labels wrong, where 1 % is believed without."""
    rows: list[Any] = [pair(i) | {"annotator": "ann" if i < 60 else "bob"} for i in range(120)]
    none, nothing = torch.zeros(120), NoiseEstimate(0.0, 0.0, 0.0, 0.0, 0.6)
    rates = label_rates(rows, none, nothing, none, none.bool())
    assert rates.tolist() == [believed_rate(nothing)] * 120


def test_no_label_is_learnt_to_be_surely_wrong_or_right() -> None:
    """Rounded to 0, a rate took the bound from the loss."""
    views = looked([9, 0], [0, 9])
    rates = torch.full((2,), 0.01, dtype=torch.float64)
    noise = NoiseEstimate(0.01, 0.01, 1.0, 0.0, 0.1)
    right, wrong = what_voters_learn([pair(0), pair(1)], views, noise, rates, expert_error=ERROR)
    assert 0 < right <= 1e-6
    assert 1 - 1e-6 <= wrong < 1


def test_several_labels_of_a_pair_count_by_who_gave_them() -> None:
    """A good annotator's word outweighs a bad one's, whichever row holds it; a rate beyond one half turns a label round."""
    rows: list[Any] = [pair(0), pair(0), pair(1)]
    rows[1] = {**rows[1], "chosen": rows[0]["rejected"], "rejected": rows[0]["chosen"]}
    noise = NoiseEstimate(0.2, 0.2, 1.0, 0.1, 0.4)
    rates = torch.tensor([0.1, 0.4, 0.7], dtype=torch.float64)
    usual = math.log(0.8 / 0.2)
    expected = [math.log(9) - math.log(1.5), math.log(1.5) - math.log(9), math.log(0.3 / 0.7)]
    assert (other_labels(rows, noise, rates) + usual).tolist() == pytest.approx(expected)


def test_honest_experts_raise_no_alarm() -> None:
    """Votes that are what they seem, errors at random, experts as stated: 4 of 25 such worlds of 200 labels raised it.

    Its chance is 1 in 740, so of 24 worlds none; z is about standard normal, and its mean over them within three fifths. Asked
    for their doubt, 40 of 40 contradicted are no surprise in most of these worlds; asked at random, they are in all.
    """
    surprises, can_surprise = [], 0
    for seed in range(24):
        made = torch.Generator().manual_seed(seed)
        share = (0.2, 0.35)[seed % 2]
        order = torch.randn(200, generator=made) * 2
        is_better = torch.rand(200, generator=made) < torch.sigmoid(order)
        wrong = torch.rand(200, generator=made) < share
        vote = torch.where(is_better != wrong, order, -order)
        noise = estimate_noise(vote, range(200))
        doubt = (beliefs(vote, noise, torch.zeros(200)) - 0.5).abs()
        asked = torch.zeros(200, dtype=torch.bool)
        asked[doubt.argsort()[:40]] = True
        agrees = (torch.rand(200, generator=made) >= ERROR) != wrong
        views = looked((asked & agrees).int().tolist(), (asked & ~agrees).int().tolist())
        known = weigh_verdicts([pair(i) for i in range(200)], vote, views, expert_error=ERROR)
        if known.foreseen is None:
            continue
        contradicted = int(views.contradict.sum())
        assert alarm(contradicted, gains(known, views)["foreseen"], ERROR) == []
        surprises.append((contradicted - known.foreseen.contradict) / known.foreseen.deviation)

        asked = torch.rand(200, generator=made).argsort() < 40
        views = looked((asked & agrees).int().tolist(), (asked & ~agrees).int().tolist())
        known = weigh_verdicts([pair(i) for i in range(200)], vote, views, expert_error=ERROR)
        assert alarm(int(views.contradict.sum()), gains(known, views)["foreseen"], ERROR) == []
        views = looked([0] * 200, asked.int().tolist())
        known = weigh_verdicts([pair(i) for i in range(200)], vote, views, expert_error=ERROR)
        can_surprise += len(alarm(40, gains(known, views)["foreseen"], ERROR))
    assert len(surprises) >= 18
    assert can_surprise == len(surprises)
    assert abs(np.mean(surprises)) < 0.6
    assert 0.4 < np.std(surprises) < 1.5


def test_what_is_foreseen_is_the_mean_over_what_labels_leave_likely() -> None:
    """By a sum over a grid in numpy; of very many labels, it is what the nearest ε and b foresee."""
    made = torch.Generator().manual_seed(1)
    strength = torch.randn(60, generator=made) + 1
    others, sure = torch.zeros(60), torch.zeros(60)
    sure[:20], others[5:15] = 0.9, 1.0
    grid = vote_grid(strength, range(60), torch.zeros(60))
    mean, deviation, _ = foresee_contradictions(strength, others, sure, 0, grid)
    came = [0, 3, 6, 8, 9, 10]
    chances = [foresee_contradictions(strength, others, sure, c, grid).chance for c in came]
    values = strength.double().numpy()
    scales = np.logspace(-1.5, 2, SCALES) / np.abs(values).mean()
    prior = scale_prior(torch.tensor(scales), strength.double()).numpy()
    rates, steps = RATES.numpy(), STEPS.numpy()
    weight, count, within, at_least = [], [], [], []
    for scale, before in zip(scales, prior, strict=True):
        agree = 1 / (1 + np.exp(-scale * values))
        for rate, step in zip(rates, steps, strict=True):
            weight.append(np.log((1 - rate) * agree + rate * (1 - agree)).sum() + before + math.log(step))
            odds = (agree / (1 - agree).clip(1e-300) * np.exp(others.numpy()))[:20]
            right = (1 - rate) * odds / ((1 - rate) * odds + rate)
            says = 0.1 * right + 0.9 * (1 - right)
            count.append(says.sum())
            within.append((says * (1 - says)).sum())
            exact = np.ones(1)
            for chance in says:
                exact = np.convolve(exact, [1 - chance, chance])
            at_least.append([exact[c:].sum() for c in came])
    share = np.exp(np.array(weight) - max(weight))
    share /= share.sum()
    assert mean == pytest.approx(share @ np.array(count), rel=1e-3)
    variance = share @ np.array(within) + share @ np.square(count) - (share @ np.array(count)) ** 2
    assert deviation == pytest.approx(variance**0.5, rel=1e-3)
    assert variance > 1.2 * (share @ np.array(within)), "what is not known of the noise counts"
    exactly = (share @ np.array(at_least)).tolist()
    assert min(exactly) < 1 / 740
    assert chances == pytest.approx(exactly, rel=0.15, abs=1e-4), "an approximation, of the order 1 / variance"


def test_where_votes_say_nothing_nothing_was_foreseen() -> None:
    """30 % of 200 labels wrong, votes at chance: `worth before 192, after 53`, and a false alarm of 3.5 foreseen contradictions."""
    made = torch.Generator().manual_seed(0)
    wrong, strength = torch.rand(200, generator=made) < 0.3, torch.randn(200, generator=made)
    views = looked(
        [int(i < 60 and not bad) for i, bad in enumerate(wrong)], [int(i < 60 and bad) for i, bad in enumerate(wrong)]
    )
    known = weigh_verdicts([pair(i) for i in range(200)], strength, views, expert_error=ERROR)
    assert known.foreseen is None
    assert known.noise.scale == 0, "the verdicts do not bear it out either"
    assert not known.says_something
    changed = gains(known, views)
    assert changed["worth"]["before"] is None
    assert alarm(int(views.contradict.sum()), changed["foreseen"], ERROR) == []


@pytest.mark.parametrize(("error", "contradicted", "asked"), [(0.3, 14, 20), (0.2, 20, 20), (0.05, 60, 60)])
def test_no_fewer_labels_are_estimated_to_be_wrong_than_are_proved(error: float, contradicted: int, asked: int) -> None:
    """`5.2% of the labels are estimated to be wrong as they stand in the file; at least 10% are proved`."""
    agree = [0] * contradicted + [1] * (asked - contradicted) + [0] * (60 - asked)
    views = looked(agree, [1] * contradicted + [0] * (60 - contradicted))
    known = weigh_verdicts([pair(i) for i in range(60)], agreeing(60), views, expert_error=error)
    assert known.low > 0
    changed = gains(known, views)["wrong"]
    assert changed["file"] >= 60 * known.low - 1e-4
    assert changed["file"] == pytest.approx((1 - known.after).sum().item()), "what is said is what is trained on"
    assert changed["before"] == pytest.approx(changed["file"]), "votes that agree with all labels flip none"

    # The same pairs once more, the other answer chosen, are as likely wrong as these are right.
    rows = [pair(i) for i in range(60)]
    rows += [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows[:5]]
    strength = torch.cat([agreeing(60), -agreeing(60)[:5]])
    disagree = [1] * contradicted + [0] * (60 - contradicted)
    views = looked([*agree, *disagree[:5]], [*disagree, *agree[:5]], repeats=5)
    twice = weigh_verdicts(rows, strength, views, expert_error=error)
    torch.testing.assert_close(twice.after[60:], 1 - twice.after[:5])
    assert (1 - twice.after[:60]).sum() >= 60 * known.low - 1e-4


def test_votes_that_say_nothing_claim_no_share_of_wrong_labels() -> None:
    """`every label is left as it is` was printed in rounds in which experts turned labels."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        estimate_noise(torch.tensor([1.0, -1.0] * 40), range(80))
    assert [str(warning.message) for warning in caught] == [
        "vote: the votes agree with the labels no more than chance, so they say nothing about them. Use a larger base model, more "
        "pairs, or another learning rate."
    ]


def test_a_vote_of_before_whose_noise_was_not_proved_leaves_labels_as_they_are() -> None:
    """A run that waited between vote and reward ended with `AssertionError: a flip rate in (0, 0.5]`."""
    old = NoiseEstimate.read(
        {"flip_rate": 0.2, "fitted": 0.0, "scale": 1.2, "low": 0.0, "high": 0.3, "likeliest": 0.17}
    )
    rows = [pair(i) for i in range(6)]
    strength = VoteStrength(*torch.ones(3, 6), torch.full((6,), 2))
    assert denoised(rows, DenoiseConfig("posterior"), strength, old)[0] == rows
