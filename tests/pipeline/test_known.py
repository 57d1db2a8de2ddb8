"""What verdicts add: the noise that they prove, what they leave of labels and votes, what voters learn from them."""

import math
import random
import warnings
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import binom
from torch import Tensor

from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.objectives.second_look import least_wrong
from rlhf.objectives.strength import VoteStrength
from rlhf.pipeline.known import beliefs, believed_rate, gains, other_labels, weigh_verdicts, what_voters_learn
from rlhf.pipeline.looked import Looked
from rlhf.report.second_look import alarm
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.noise import NoiseEstimate, estimate_noise

ERROR = 0.05
ODDS = math.log((1 - ERROR) / ERROR)


def pair(number: int, answer: str = "yes") -> Pair:
    sides = {side: assistant_turn(f"{text} {number}") for side, text in (("yes", answer), ("no", "no"))}
    made: Any = {"prompt": user_turn(f"q {number}"), "chosen": sides["yes"], "rejected": sides["no"]}
    return made


def looked(agree: list[int], contradict: list[int], *, equal: list[int] | None = None, repeats: int = 0) -> Looked:
    """Verdicts on rows, of which the last are further labels of the first pairs."""
    n = len(agree)
    counts = [torch.tensor(column, dtype=torch.float) for column in (agree, contradict, equal or [0] * n)]
    is_first = torch.arange(n) < n - repeats
    is_asked = torch.stack(counts).sum(dim=0) > 0
    return Looked(*counts, is_asked, is_first, [], int((is_asked & is_first).sum()), 0, 1)


def agreeing(n: int, seed: int = 0) -> Tensor:
    """Votes that agree with every label."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) * 3 + 0.2


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
    assert known.foreseen[0] == pytest.approx(contradicts.sum().item(), rel=1e-5)
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
    assert what_voters_learn(rows, views, noise, expert_error=ERROR) == pytest.approx(expected, rel=1e-5)
    assert other_labels(rows, noise)[[0, 4]].tolist() == pytest.approx([0.0, -2 * label], abs=1e-5)
    assert believed_rate(noise) == 0.2


def test_a_second_vote_takes_the_place_of_the_first_in_what_is_known_after() -> None:
    rng = random.Random(0)
    rows = [pair(i) for i in range(300)]
    wrong = torch.tensor([rng.random() < 0.25 for _ in rows])
    vote = torch.where(wrong, -1.0, 1.0) * torch.tensor([abs(rng.gauss(1, 1)) for _ in rows])
    better = torch.where(wrong, -1.0, 1.0) * torch.tensor([abs(rng.gauss(3, 1)) for _ in rows])
    views = looked(
        [int(i < 30 and not wrong[i]) for i in range(300)], [int(i < 30 and bool(wrong[i])) for i in range(300)]
    )
    once = weigh_verdicts(rows, vote, views, expert_error=ERROR)
    twice = weigh_verdicts(rows, vote, views, expert_error=ERROR, again=better)
    assert torch.equal(once.before, twice.before)
    assert once.foreseen == twice.foreseen
    odds = torch.where(views.agree > 0, ODDS, torch.where(views.contradict > 0, -ODDS, 0.0))
    assert twice.noise == estimate_noise(better, range(300), odds)
    assert ((twice.after < 0.5) == wrong).float().mean() > ((once.after < 0.5) == wrong).float().mean()


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
