"""Which of two votes is used once there are verdicts: the second, unless the first surely foretells these better."""

import math
import random

import pytest
import torch
from torch import Tensor

from rlhf.pipeline.known import weigh_verdicts
from rlhf.report.second_look import unused_vote
from rlhf.reward.noise import estimate_noise, evidence, vote_grid
from tests.pipeline.verdicts import ERROR, ODDS, looked, pair


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


@pytest.mark.parametrize(("n", "share"), [(60, 0.4), (400, 0.47), (1000, 0.55)])
def test_a_second_vote_may_contradict_half_of_the_labels(n: int, share: float) -> None:
    """The first vote shares most errors of the labels; the second learnt better, and was taken to say nothing: 0.55 right, of 0.97."""
    made = torch.Generator().manual_seed(0)
    rows, wrong = [pair(i) for i in range(n)], torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=made)[: round(share * n)]] = True
    sees = torch.rand(n, generator=made) < 0.3
    first = torch.where(wrong & sees, -1.0, 1.0) * (1.5 + torch.randn(n, generator=made))
    again = torch.where(wrong, -1.0, 1.0) * (2 + torch.randn(n, generator=made))
    asked = torch.rand(n, generator=made) < 1 / 3
    views = looked((asked & ~wrong).int().tolist(), (asked & wrong).int().tolist())
    known = weigh_verdicts(rows, first, views, expert_error=ERROR, again=again)
    assert known.noise.high >= 0.5, "or this test shows nothing"
    assert known.strength is again

    def right_of_others(after: Tensor) -> float:
        return ((after > 0.5) != wrong)[~asked].float().mean().item()

    assert right_of_others(known.after) >= right_of_others(again.sigmoid()) - 0.02 > 0.9
    assert right_of_others(weigh_verdicts(rows, first, views, expert_error=ERROR).after) < 0.8


SECOND = {
    "noise": lambda order, luck: 1.5 * luck,
    "little noise": lambda order, luck: 0.01 * luck,
    "minus the truth": lambda order, luck: luck - 1.5 * order,
    "all equal": lambda order, luck: torch.full_like(order, 0.3),
    "nothing": lambda order, luck: torch.zeros_like(order),
    "blunter": lambda order, luck: 0.5 * order + luck,
    "better": lambda order, luck: 2 * order + luck,
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("kind", SECOND)
def test_the_vote_is_used_that_foretells_the_verdicts_better(kind: str, seed: int) -> None:
    """A second vote of noise replaced a good first one: of pairs nobody looked at 0.67 were on the right side, of 0.94."""
    made = torch.Generator().manual_seed(seed)
    wrong = torch.rand(400, generator=made) < 0.3
    order = torch.where(wrong, -1.0, 1.0)
    first = order * 1.5 + torch.randn(400, generator=made)
    asked = torch.rand(400, generator=made) < 0.25
    agrees = (torch.rand(400, generator=made) >= ERROR) != wrong
    views = looked((asked & agrees).int().tolist(), (asked & ~agrees).int().tolist())
    again = SECOND[kind](order, torch.randn(400, generator=made))
    rows = [pair(i) for i in range(400)]
    known = weigh_verdicts(rows, first, views, expert_error=ERROR, again=again)
    assert (known.strength is again) == (kind == "better")
    if known.strength is first:
        assert torch.equal(known.after, weigh_verdicts(rows, first, views, expert_error=ERROR).after)
    assert ((known.after > 0.5) != wrong)[~asked].float().mean() > 0.9
    assert unused_vote(is_used=False) != unused_vote(is_used=True) == []


@pytest.mark.parametrize(("n", "share"), [(60, 0.38), (400, 0.46), (400, 0.55)])
def test_a_first_vote_that_verdicts_bear_out_is_used_though_it_contradicts_half_of_the_labels(
    n: int, share: float
) -> None:
    """It was thrown away, and nobody voted again: 0.51 of 400 labels were right in the end, by the vote's sign 0.98."""
    made = torch.Generator().manual_seed(0)
    wrong = torch.zeros(n, dtype=torch.bool)
    wrong[torch.randperm(n, generator=made)[: round(share * n)]] = True
    vote = torch.where(wrong, -1.0, 1.0) * (1.8 + torch.randn(n, generator=made))
    asked = torch.rand(n, generator=made) < 1 / 3
    agrees = (torch.rand(n, generator=made) >= ERROR) != wrong
    views = looked((asked & agrees).int().tolist(), (asked & ~agrees).int().tolist())
    known = weigh_verdicts([pair(i) for i in range(n)], vote, views, expert_error=ERROR)
    assert known.foreseen is None, "before the verdicts nothing speaks for the vote"
    assert known.says_something, "or voters would not vote again"
    assert ((known.after > 0.5) != wrong)[~asked].float().mean() > 0.95
    backwards = weigh_verdicts([pair(i) for i in range(n)], -vote, views, expert_error=ERROR)
    assert backwards.noise.scale == 0 or ((backwards.after > 0.5) != wrong)[~asked].float().mean() > 0.4


@pytest.mark.parametrize("spread", [0.0, 2.0])
def test_verdicts_of_experts_who_guess_are_foretold_by_every_vote_alike(spread: float) -> None:
    """An error rate of 1/2: each verdict has half the chance, whatever is believed, as far as all priors sum to 1."""
    vote = spread * torch.randn(50, generator=torch.Generator().manual_seed(0))
    odds = torch.full((50,), 1e-12, dtype=torch.float64)
    odds[30:] = 0
    assert evidence(vote_grid(vote, range(50), odds)) == pytest.approx(30 * math.log(0.5), abs=1e-6)
