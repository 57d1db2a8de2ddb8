"""What labels, votes and experts' verdicts say together: several labels of a pair, errors that labels and votes share, margins."""

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.second_look import log_odds_of_verdicts, shared_error
from rlhf.pipeline.looked import Looked, beliefs, other_labels, relabelled, weigh_verdicts
from rlhf.report.second_look import second_look_sentences
from rlhf.reward.noise import NoiseEstimate, estimate_noise

ERROR = 0.05


def pair(number: int, *, turned: bool = False, **columns: float) -> Pair:
    sides = [assistant_turn(f"yes {number}"), assistant_turn(f"no {number}")]
    chosen, rejected = reversed(sides) if turned else sides
    made: Any = {"prompt": user_turn(f"q {number}"), "chosen": chosen, "rejected": rejected, **columns}
    return made


def looked(agree: Tensor, contradict: Tensor, equal: Tensor | None = None, is_first: Tensor | None = None) -> Looked:
    equal = torch.zeros_like(agree) if equal is None else equal
    is_asked = agree + contradict + equal > 0
    first = torch.ones_like(is_asked) if is_first is None else is_first
    return Looked(agree, contradict, equal, is_asked, first, [], int(is_asked.sum()), 0, 1)


def planted(length: float, n: int = 600, asked: int = 300) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Votes, wrong labels and verdicts on random pairs, where those who label and the votes count length beside quality."""
    generator, rng = torch.Generator().manual_seed(1), random.Random(0)
    quality, taste = (2 * torch.randn(n, generator=generator) for _ in range(2))
    liked = quality + length * taste
    label = torch.where(torch.rand(n, generator=generator) < torch.sigmoid(2 * liked), 1.0, -1.0)
    vote = (liked + 0.7 * torch.randn(n, generator=generator)) * label
    wrong = label != torch.where(quality > 0, 1.0, -1.0)
    agree, contradict = torch.zeros(n), torch.zeros(n)
    for i in torch.randperm(n, generator=generator)[:asked].tolist():
        (contradict if bool(wrong[i]) == (rng.random() >= ERROR) else agree)[i] = 1
    return vote, wrong, agree, contradict


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0])
def test_votes_that_share_the_labels_error_overrule_no_expert(length: float) -> None:
    """49 of 300 asked pairs stayed wrong with a shared taste, where the experts alone leave 15; nothing said so."""
    vote, wrong, agree, contradict = planted(length)
    verdicts = log_odds_of_verdicts(agree, contradict, error_rate=ERROR)
    noise = estimate_noise(vote, range(len(vote)), verdicts)
    known = weigh_verdicts(
        [pair(i) for i in range(len(vote))], vote, noise, looked(agree, contradict), expert_error=ERROR
    )
    asked = verdicts != 0
    alone = beliefs(vote, noise, verdicts)

    def still_wrong(right: Tensor) -> int:
        return int(((right > 0.5) == wrong)[asked].sum())

    by_experts = int((wrong == (agree > 0))[asked].sum())
    assert still_wrong(known.after) <= by_experts + 2
    surprise = (contradict.sum().item() - known.foreseen[0]) / known.foreseen[1]
    if length == 0:
        assert known.shared < 0.1
        assert still_wrong(known.after) <= still_wrong(alone)
    else:
        assert known.shared > 0.1
        assert still_wrong(alone) > by_experts, "or this test shows nothing"
        assert surprise > 3
    torch.testing.assert_close(known.after[~asked], alone[~asked])  # of the others nothing more is known


def test_experts_who_cancel_leave_no_more_trust_in_the_vote_than_others() -> None:
    """One for and one against a label says nothing of it, but the pair was looked at as the others were."""
    vote, _, agree, contradict = planted(1.0)
    first = int((agree > 0).nonzero()[0])
    noise = estimate_noise(vote, range(len(vote)), log_odds_of_verdicts(agree, contradict, error_rate=ERROR))
    contradict[first] = 1
    rows = [pair(i) for i in range(len(vote))]
    known = weigh_verdicts(rows, vote, noise, looked(agree, contradict), expert_error=ERROR)
    by_label = beliefs(vote, noise, torch.zeros_like(vote))[first].item()
    expected = (1 - known.shared) * by_label + known.shared / 2
    assert known.shared > 0.1
    assert [known.before[first].item(), known.after[first].item()] == pytest.approx([expected, expected], rel=1e-5)


def test_the_share_of_common_errors_is_found() -> None:
    """On a planted share of the pairs label and vote say nothing; there half of the sure orders are wrong."""
    rng = np.random.default_rng(0)
    right = torch.tensor(rng.uniform(0.6, 0.999, 4000))
    for share in (0.0, 0.3, 1.0):
        truth = np.where(rng.random(4000) < share, 0.5, right.numpy())
        agrees = rng.random(4000) < truth * (1 - ERROR) + (1 - truth) * ERROR
        verdicts = torch.tensor(np.where(agrees, 1, -1) * math.log((1 - ERROR) / ERROR))
        assert shared_error(right, verdicts) == pytest.approx(share, abs=0.05)
    assert shared_error(right, torch.zeros(4000)) == 0


def test_all_labels_of_a_pair_count_whichever_answer_they_call_better() -> None:
    """Three labels of one pair, two of another: log-odds add, and both orders of a pair are believed alike."""
    rows = [pair(0), pair(0), pair(0, turned=True), pair(1), pair(1, turned=True), pair(2)]
    noise = NoiseEstimate(0.25, 0.25, 1.0, 0.2, 0.3, likeliest=0.25)
    one = math.log(3)
    others = other_labels(rows, noise)
    torch.testing.assert_close(others, torch.tensor([0.0, 0.0, -2 * one, -one, -one, 0.0]))
    strength = torch.tensor([0.4, 0.4, -0.4, 1.0, -1.0, 0.0])
    is_first = torch.tensor([True, False, False, True, False, True])
    none = torch.zeros(6)
    known = weigh_verdicts(rows, strength, noise, looked(none, none, is_first=is_first), expert_error=ERROR)
    odds = torch.logit(known.after)
    torch.testing.assert_close(
        odds, torch.tensor([0.4 + one, 0.4 + one, -0.4 - one, 1.0, -1.0, one]), rtol=1e-5, atol=1e-5
    )
    made, flipped = relabelled(rows, rows, known.after, looked(none, none), proved=True)
    assert flipped == 2
    assert [row["chosen"][0]["content"] for row in made] == ["yes 0"] * 3 + ["yes 1"] * 2 + ["yes 2"]


@pytest.mark.parametrize("column", ["margin", "rating_gap"])
def test_a_margin_follows_what_is_believed(column: str) -> None:
    """A tie was trained 3 nats apart, and a flipped pair towards the order that was given up."""
    rows = [pair(i, **{column: 3.0}) for i in range(3)]
    agree, contradict = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([1.0, 0.0, 0.0])
    equal = torch.tensor([0.0, 1.0, 0.0])
    right = torch.tensor([0.1, 0.5, 0.9])
    made, flipped = relabelled(rows, rows, right, looked(agree, contradict, equal), proved=False)
    assert flipped == 1
    assert [row[column] for row in made] == pytest.approx([0.8 * 3, 0.0, 0.8 * 3])
    assert [row["confidence"] for row in made] == pytest.approx([0.9, 0.5, 0.9])
    if column == "margin":
        grid = torch.linspace(-10, 10, 4001)
        for row, sign in zip(made, (1, 0, 1), strict=True):
            loss = pair_loss(
                grid,
                torch.zeros_like(grid),
                margin=torch.full_like(grid, row["margin"]),
                confidence=torch.full_like(grid, row["confidence"]),
            )
            best = grid[loss.argmin()].item()
            assert np.sign(round(best, 2)) == sign, "the loss is least on the side that is believed"


def test_more_contradictions_than_foreseen_are_said() -> None:
    facts = {
        "asked": 60, "answered": 60, "open": 0, "skipped": 0, "ties": 0, "agree": 40, "contradict": 20, "flipped": 20,
        "expert_error": 0.05, "noise_rate": {"mean": 0.2, "low": 0.1}, "wrong": {"file": 40, "before": 30, "after": 20},
        "worth": {"before": 10, "after": 20}, "next": {"pairs": 60, "worth": 10, "labels": None},
        "foreseen": {"contradict": 8.0, "deviation": 2.5}, "shared": 0.2,
    }  # fmt: skip
    said = [s for s in second_look_sentences(facts) if "foresaw" in s]
    assert len(said) == 1
    assert "foresaw 8 contradictions" in said[0]
    facts["foreseen"] = {"contradict": 17.0, "deviation": 2.5}
    assert not any("foresaw" in s for s in second_look_sentences(facts))
