"""Voting and corrections against the published row, closed forms and planted flips."""

import math
from typing import Any

import pytest
import torch

from rlhf.data.rows import label_digest
from rlhf.errors import TrainingError, UserError
from rlhf.objectives import strength
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.strength import (
    VoteStrength,
    flipped_strength,
    lowest_fraction,
    posterior_confidence,
    smoothing_confidence,
    vote_strength,
)
from rlhf.reward.denoise import DenoiseConfig, attach_strength, denoised, flip_pair
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from rlhf.reward.vote import collect_votes, plan_vote

# A row of fnlp/hh-rlhf-strength-cleaned as published: ten models' scores of both sides.
CHOSEN = [3.71875, 0.58984375, 3.390625, 0.006805419921875, -0.6953125, 1.0390625, 1.4140625, 0.8359375, 3.078125, 2.0]
REJECTED = [3.546875, 0.9921875, 2.125, -0.330078125, 1.171875, 1.2578125, 1.078125, 1.0546875, 3.546875, 2.265625]
NAN = float("nan")


def test_the_published_row() -> None:
    """-0.13311 and 0.75596 with 1/M (0.79685 would be 1/(M-1)); 4 of 10 prefer the chosen side."""
    votes = vote_strength(torch.tensor([CHOSEN]).T - torch.tensor([REJECTED]).T)
    assert votes.mean.item() == pytest.approx(-0.13311, abs=5e-6)
    assert votes.std.item() == pytest.approx(0.75596, abs=5e-6)
    assert votes.share.item() == pytest.approx(0.4)
    assert votes.votes.item() == 10


def test_strength_in_closed_form() -> None:
    one = vote_strength(torch.tensor([[2.0, -1.0]]))
    assert (one.mean.tolist(), one.std.tolist()) == ([2.0, -1.0], [0.0, 0.0]), "one model has no deviation"
    same = vote_strength(torch.tensor([[2.0], [2.0], [2.0]]))
    assert same.std.item() == 0
    torch.manual_seed(0)
    d = torch.randn(7, 5)
    swapped = vote_strength(-d)
    torch.testing.assert_close(swapped.mean, -vote_strength(d).mean)
    torch.testing.assert_close(swapped.std, vote_strength(d).std)
    torch.testing.assert_close(swapped.share, 1 - vote_strength(d).share)
    absent = vote_strength(torch.tensor([[1.0, NAN], [NAN, 4.0], [3.0, 0.0]]))
    assert absent.mean.tolist() == [2.0, 2.0]
    assert absent.std.tolist() == [1.0, 2.0]
    assert absent.share.tolist() == [1.0, 0.75], "a vote of exactly 0 counts half"
    assert absent.votes.tolist() == [2, 2]


def test_flips_are_exact_stable_and_an_involution() -> None:
    mu = torch.tensor([0.5, -1.0, 0.5, 0.5, -3.0, 0.2, 0.5, 0.5, 0.5, 0.5])
    assert lowest_fraction(mu, 0.29).nonzero().flatten().tolist() == [1, 4], "⌊2.9⌋ = 2"
    assert lowest_fraction(mu, 0.5).nonzero().flatten().tolist() == [0, 1, 2, 4, 5], "equal ones in order"
    flips = lowest_fraction(mu, 0.2)
    torch.testing.assert_close(flipped_strength(flipped_strength(mu, flips), flips), mu)
    assert (flipped_strength(mu, flips)[flips] > 0).all()


def test_smoothing_masks() -> None:
    mu = torch.arange(-5.0, 15.0)
    assert smoothing_confidence(mu, mask="negative").tolist() == [pytest.approx(0.8)] * 5 + [1.0] * 15
    assert smoothing_confidence(mu, mask="all").tolist() == [pytest.approx(0.8)] * 20
    both = smoothing_confidence(mu, mask="negative+strong")
    assert (both < 1).nonzero().flatten().tolist() == [0, 1, 2, 3, 4, 18, 19], "the strongest tenth of 20"


def test_the_smoothed_loss_has_its_minimum_where_the_paper_has_it() -> None:
    """d* = logit(1 - α) + μ = 1.386 + μ, and the loss there is H(0.2) = 0.5004."""
    d = torch.linspace(-6, 10, 160_001, dtype=torch.float64)
    for mu in (0.0, 1.5, -2.0):
        loss = pair_loss(d, torch.zeros_like(d), margin=mu, confidence=0.8)
        assert d[loss.argmin()].item() == pytest.approx(math.log(4) + mu, abs=2e-4)
        assert loss.min().item() == pytest.approx(0.500402, abs=1e-6)


def test_the_posterior_is_bayes() -> None:
    epsilon, a = 0.3, 1.7
    d = torch.linspace(-4, 4, 9)
    truth = torch.sigmoid(a * d)
    by_hand = (1 - epsilon) * truth / ((1 - epsilon) * truth + epsilon * (1 - truth))
    torch.testing.assert_close(posterior_confidence(d, flip_rate=epsilon, scale=a), by_hand)
    assert posterior_confidence(torch.zeros(1), flip_rate=0.2).item() == pytest.approx(0.8), (
        "no vote: smoothing at the known rate"
    )
    torch.testing.assert_close(posterior_confidence(d, flip_rate=0.5, scale=a), truth), "a label that says nothing"


@pytest.mark.parametrize("rate", [0.0, 0.6])
def test_a_rate_that_no_posterior_has(rate: float) -> None:
    with pytest.raises(AssertionError, match="a flip rate in"):
        posterior_confidence(torch.zeros(1), flip_rate=rate)


def test_a_posterior_without_the_prior_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def without(strength: torch.Tensor, *, flip_rate: float, scale: float = 1.0) -> torch.Tensor:
        return torch.sigmoid(scale * strength)

    monkeypatch.setitem(globals(), "posterior_confidence", without)
    with pytest.raises(AssertionError):
        test_the_posterior_is_bayes()


def test_one_over_m_minus_one_would_be_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def sample(differences: torch.Tensor) -> VoteStrength:
        right = strength.vote_strength(differences)
        return right._replace(std=right.std * (right.votes / (right.votes - 1)).sqrt())

    monkeypatch.setitem(globals(), "vote_strength", sample)
    with pytest.raises(AssertionError):
        test_the_published_row()


# ---- Who trains on what ----


def rows(count: int, per_prompt: int = 1) -> list[dict[str, Any]]:
    def turn(role: str, text: str) -> list[dict[str, str]]:
        return [{"role": role, "content": text}]

    return [
        {"prompt": turn("user", f"p{i // per_prompt}"), "chosen": turn("assistant", f"y{i}"), "rejected": turn("assistant", f"n{i}")}
        for i in range(count)
    ]  # fmt: skip


def prompts(data: list[dict[str, Any]]) -> list[Any]:
    return [row["prompt"] for row in data]


def test_out_of_fold_nobody_votes_on_what_it_saw() -> None:
    data = rows(60, per_prompt=3)
    plan = plan_vote(prompts(data), members=10, folds=5, in_sample=False, seed=0)
    for member in range(10):
        seen = {data[i]["prompt"][0]["content"] for i in plan.trains_on(member)}
        voted = {data[i]["prompt"][0]["content"] for i in plan.votes_on(member)}
        assert not seen & voted, "not even on another pair of the same prompt"
        assert len(plan.trains_on(member)) == 48
    trained: list[int] = []

    def train(member: int, chosen: list[int], judged: list[int]) -> torch.Tensor:
        trained.append(len(chosen))
        return torch.full((len(judged),), float(member))

    votes = vote_strength(collect_votes(plan, train))
    assert trained == [48] * 10
    assert votes.votes.tolist() == [2] * 60, "M / folds votes for every pair"
    in_sample = plan_vote(prompts(data), members=3, folds=5, in_sample=True, seed=0)
    assert in_sample.trains_on(2) == in_sample.votes_on(2) == list(range(60))


@pytest.mark.parametrize(
    ("count", "members", "folds", "said"),
    [
        (100, 1, 2, "vote.members is 1"),
        (100, 3, 5, "3 members can't vote on 5 folds"),
        (8, 10, 5, "too few for 10 members"),
    ],
)
def test_impossible_votes_are_refused(count: int, members: int, folds: int, said: str) -> None:
    with pytest.raises(UserError, match=said):
        plan_vote(prompts(rows(count)), members=members, folds=folds, in_sample=False, seed=0)


def test_a_member_that_diverges_stops_the_vote() -> None:
    plan = plan_vote(prompts(rows(20)), members=2, folds=2, in_sample=False, seed=0)
    with pytest.raises(TrainingError, match="member 1 diverged"):
        collect_votes(plan, lambda member, _, judged: torch.full((len(judged),), math.nan if member == 1 else 0.0))


# ---- What is done about noise ----


NOISE = NoiseEstimate(flip_rate=0.25, fitted=0.2, scale=1.0, low=0.15, high=0.3)


def test_corrections() -> None:
    data = rows(20)
    mean = torch.arange(20.0) - 4.0
    votes = VoteStrength(mean, torch.ones(20), torch.linspace(0, 1, 20), torch.full((20,), 2))

    made, flipped = denoised(data, DenoiseConfig("flip"), votes, NOISE)
    assert flipped == 2
    assert [row["chosen"] == data[i]["rejected"] for i, row in enumerate(made)] == [True] * 2 + [False] * 18
    assert "margin" not in made[0]

    made, flipped = denoised(data, DenoiseConfig("flip_margin"), votes, NOISE)
    assert [row["margin"] for row in made[:4]] == [4.0, 3.0, -2.0, -1.0], "a turned pair's margin turns with it"
    made, _ = denoised(data, DenoiseConfig("adaptive_margin"), votes, NOISE)
    assert [row["margin"] for row in made] == mean.tolist()
    made, _ = denoised(data, DenoiseConfig("soft_margin"), votes, NOISE)
    assert [row["confidence"] for row in made[:5]] == [pytest.approx(0.8)] * 4 + [1.0]
    made, _ = denoised(data, DenoiseConfig("vote_soft"), votes, NOISE)
    assert made[-1]["confidence"] == 1.0
    made, _ = denoised(data, DenoiseConfig("posterior"), votes, NOISE)
    assert made[4]["confidence"] == pytest.approx(0.8), "no vote either way: 1 - ε"
    made, flipped = denoised(data, DenoiseConfig("drop"), votes, NOISE)
    assert (len(made), flipped) == (18, None)
    made, _ = denoised(data, DenoiseConfig("weight"), votes, NOISE)
    assert made[4]["weight"] == pytest.approx(0.8)
    assert "confidence" not in made[4]
    made, _ = denoised(data, DenoiseConfig("vote_sigmoid"), votes, NOISE)
    assert made[5]["confidence"] == pytest.approx(1 / (1 + math.exp(-1)))


def test_numbers_of_a_correction() -> None:
    data = rows(20)
    mean = torch.arange(20.0) - 4.0
    votes = VoteStrength(mean, torch.ones(20), torch.linspace(0, 1, 20), torch.full((20,), 2))
    _, flipped = denoised(data, DenoiseConfig("flip", flip_by="sign"), votes, NOISE)
    assert flipped == 4
    made, _ = denoised(data, DenoiseConfig("adaptive_margin", margin_scale=0.5, margin_clip=3.0), votes, NOISE)
    assert [row["margin"] for row in made[:2]] == [-2.0, -1.5]
    assert made[-1]["margin"] == 3.0
    config = DenoiseConfig("soft_margin", smoothing=0.3, smoothing_mask="negative+strong")
    made, _ = denoised(data, config, votes, NOISE)
    assert [row["confidence"] < 1 for row in made] == [True] * 4 + [False] * 14 + [True] * 2
    made, flipped = denoised(data, DenoiseConfig("smoothing", smoothing=0.3))
    assert {row["confidence"] for row in made} == {0.7}
    assert flipped is None


def test_ratings_make_margins_and_weights() -> None:
    data = [{**row, "rating_gap": float(i)} for i, row in enumerate(rows(3))]
    made, _ = denoised(data, DenoiseConfig("margin", margin_scale=0.5))
    assert [row["margin"] for row in made] == [0.0, 0.5, 1.0]
    made, _ = denoised([{**data[2], "margin": 7.0}, data[2]], DenoiseConfig("margin", margin_scale=0.5))
    assert [row["margin"] for row in made] == [7.0, 1.0], "the file's own margin is in nats already"
    made, _ = denoised(data, DenoiseConfig("scaled"))
    assert [row["weight"] for row in made] == [0.0, 1.0, 2.0]
    for objective, said in (("margin", "'margin' and no ratings"), ("soft", "no 'confidence'")):
        with pytest.raises(UserError, match=said):
            denoised(rows(2), DenoiseConfig(objective))


def test_dropping_everything_is_refused() -> None:
    votes = VoteStrength(-torch.ones(20), torch.ones(20), torch.zeros(20), torch.full((20,), 2))
    with pytest.raises(UserError, match="drops all 20 pairs"):
        denoised(rows(20), DenoiseConfig("drop", flip_by="sign"), votes, NOISE)


def test_blunt_votes_correct_little() -> None:
    """Votes that are right 56 % of the time: nothing is proved, and of 600 labels at most one in fifty is turned."""
    generator = torch.Generator().manual_seed(0)
    differences = 0.3 * torch.randn(600, generator=generator) + 0.045
    noise = estimate_noise(differences, range(600))
    assert noise.low == 0.0
    assert noise.fitted < 0.2 < 0.3 < noise.flip_rate, "what confident learning would have made of it"
    votes = VoteStrength(differences, torch.ones(600), torch.ones(600), torch.full((600,), 2))
    made, _ = denoised(rows(600), DenoiseConfig("posterior"), votes, noise)
    believed = [row["confidence"] for row in made]
    assert sum(p < 0.5 for p in believed) <= 12
    assert sum(p < 0.2 for p in believed) == 0
    assert denoised(rows(600), DenoiseConfig("vote_sigmoid"), votes, noise)[0] == rows(600)


def test_a_label_turned_twice_is_itself() -> None:
    (row,) = rows(1)
    own = {**row, "margin": 0.5, "confidence": 0.9}
    assert flip_pair(own) == {"prompt": row["prompt"], "chosen": row["rejected"], "rejected": row["chosen"], "margin": -0.5, "confidence": pytest.approx(0.1)}  # fmt: skip
    assert flip_pair(flip_pair(own)) == {**own, "confidence": pytest.approx(0.9)}


@pytest.mark.parametrize("objective", ["flip", "flip_margin"])
def test_a_label_that_votes_contradict_is_turned_as_sure_as_it_was(objective: str) -> None:
    """A label of confidence 0.9 and its flip pull the scores in opposite directions, equally far."""
    data = [{**row, "confidence": p} for row, p in zip(rows(3), (0.9, 0.9, 0.5), strict=True)]
    votes = VoteStrength(torch.tensor([-2.0, 2.0, -2.0]), torch.ones(3), torch.ones(3), torch.full((3,), 2))
    config = DenoiseConfig(objective, flip_by="sign")
    made, flipped = denoised(data, config, votes, NOISE)
    assert flipped == 1
    assert [row["confidence"] for row in made] == [0.9, 0.9, 0.5]
    assert [row["chosen"] for row in made] == [data[0]["rejected"], data[1]["chosen"], data[2]["chosen"]]
    difference = torch.zeros(1, requires_grad=True)
    pulls = []
    for row, sign in ((data[0], 1), (made[0], -1)):  # the difference is that of the file's order
        loss = pair_loss(sign * difference, torch.zeros(1), confidence=row["confidence"])
        pulls.append(torch.autograd.grad(loss.sum(), difference)[0].item())
    assert pulls[0] == pytest.approx(-pulls[1])
    assert pulls[0] < 0


def test_votes_of_other_data_are_refused() -> None:
    data = rows(3)
    names = ("strength_mean", "strength_std", "strength_share", "strength_votes")
    votes = [{"pair": label_digest(row), **dict.fromkeys(names, float(i))} for i, row in enumerate(data)]
    assert attach_strength(data[::-1], votes).mean.tolist() == [2.0, 1.0, 0.0], "by pair, not by place"
    other = [*data, {**data[0], "chosen": data[0]["rejected"], "rejected": data[0]["chosen"]}]
    both = [*votes, {"pair": label_digest(other[3]), **dict.fromkeys(names, -1.0)}]
    assert attach_strength(other, both).mean.tolist() == [0.0, 1.0, 2.0, -1.0], "two people who disagree on one pair"
    with pytest.raises(UserError, match="1 of 4 pairs have no vote"):
        attach_strength(rows(4), votes)
