"""What labels, votes and experts' verdicts say together: several labels of a pair, errors that labels and votes share, margins."""

import math
import random
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rlhf.data.labels import Verdict
from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.second_look import log_odds_of_verdicts, shared_error
from rlhf.pipeline.known import Known, beliefs, believed_rate, gains, other_labels, relabelled, weigh_verdicts
from rlhf.pipeline.looked import Looked, blind_questions, count_opinions
from rlhf.report.second_look import alarm, second_look_sentences
from rlhf.reward.noise import Foreseen, NoiseEstimate, estimate_noise

ERROR = 0.05


def pair(number: int, *, turned: bool = False, **columns: float) -> Pair:
    sides = [assistant_turn(f"yes {number}"), assistant_turn(f"no {number}")]
    chosen, rejected = reversed(sides) if turned else sides
    made: Any = {"prompt": user_turn(f"q {number}"), "chosen": chosen, "rejected": rejected, **columns}
    return made


def test_a_pair_has_the_same_first_answer_in_every_look_at_it() -> None:
    """The ids are the same in every folder, so a file of verdicts may be of another one: with another budget, seed or labels."""
    pairs = [pair(i, turned=i % 3 == 0) for i in range(30)]
    here = {q.id: q.first for q in blind_questions(pairs, range(30), 1, seed="a")}
    there = {q.id: q.first for q in blind_questions(pairs[::-1], range(12), 1, seed="b")}
    relabelled_since = {q.id: q.first for q in blind_questions([pair(i) for i in range(30)], range(30), 1, seed="a")}
    assert len(there) == 12
    assert here | there == here == relabelled_since
    assert 4 < sum(first.startswith("yes") for first in here.values()) < 26


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


def well_specified(rate: float, n: int = 900) -> tuple[Tensor, Tensor]:
    """Calibrated votes on labels of which a share is turned at random, and which these are."""
    rng = np.random.default_rng(0)
    order = rng.normal(0, 3, n)  # log-odds that the first answer is better
    wrong = rng.random(n) < rate
    first = (rng.random(n) < 1 / (1 + np.exp(-order))) != wrong
    return torch.tensor(np.where(first, order, -order), dtype=torch.float32), torch.tensor(wrong)


@pytest.mark.parametrize("length", [0.0, 0.5, 1.0])
def test_votes_that_share_the_labels_error_overrule_no_expert(length: float) -> None:
    """49 of 300 asked pairs stayed wrong with a shared taste, where the experts alone leave 15; nothing said so."""
    vote, wrong, agree, contradict = planted(length)
    verdicts = log_odds_of_verdicts(agree, contradict, error_rate=ERROR)
    known = weigh_verdicts([pair(i) for i in range(len(vote))], vote, looked(agree, contradict), expert_error=ERROR)
    assert known.noise == estimate_noise(vote, range(len(vote)), verdicts)
    asked = verdicts != 0
    alone = beliefs(vote, known.noise, verdicts)

    def still_wrong(right: Tensor) -> int:
        return int(((right > 0.5) == wrong)[asked].sum())

    by_experts = int((wrong == (agree > 0))[asked].sum())
    assert still_wrong(known.after) <= by_experts + 2
    assert known.foreseen is not None
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
    contradict[first] = 1
    rows = [pair(i) for i in range(len(vote))]
    known = weigh_verdicts(rows, vote, looked(agree, contradict), expert_error=ERROR)
    by_label = beliefs(vote, known.noise, torch.zeros_like(vote))[first].item()
    assert known.shared > 0.1
    assert known.after[first].item() == pytest.approx((1 - known.shared) * by_label + known.shared / 2, rel=1e-5)


def test_the_share_of_common_errors_is_found() -> None:
    """On a planted share of the pairs label and vote say nothing; there half of the sure orders are wrong."""
    rng = np.random.default_rng(0)
    right = torch.tensor(rng.uniform(0.6, 0.999, 4000))
    for share in (0.0, 0.3, 1.0):
        truth = np.where(rng.random(4000) < share, 0.5, right.numpy())
        agrees = rng.random(4000) < truth * (1 - ERROR) + (1 - truth) * ERROR
        verdicts = torch.tensor(np.where(agrees, 1, -1) * math.log((1 - ERROR) / ERROR))
        # At 1 the prior is 0, and 4,000 verdicts tell it from 0.9 by ten nats only.
        assert shared_error(right, verdicts) == pytest.approx(share, abs=0.05 if share < 1 else 0.12)
    assert shared_error(right, torch.zeros(4000)) == 0


def test_all_labels_of_a_pair_count_whichever_answer_they_call_better() -> None:
    """Three labels of one pair, two of another: log-odds add, and both orders of a pair are believed alike."""
    rows = [pair(0), pair(0), pair(0, turned=True), pair(1), pair(1, turned=True), pair(2)]
    noise = NoiseEstimate(0.25, 0.25, 1.0, 0.2, 0.3)
    one = math.log(3)
    others = other_labels(rows, noise, torch.full((6,), 0.25, dtype=torch.float64))
    torch.testing.assert_close(others, torch.tensor([0.0, 0.0, -2 * one, -one, -one, 0.0], dtype=torch.float64))
    strength = torch.tensor([0.4, 0.4, -0.4, 1.0, -1.0, 0.0], dtype=torch.float64)
    right = beliefs(strength, noise, others)
    torch.testing.assert_close(
        torch.logit(right), torch.tensor([0.4 + one, 0.4 + one, -0.4 - one, 1.0, -1.0, one], dtype=torch.float64)
    )


def test_a_pair_is_trained_on_once_however_many_labels_it_has() -> None:
    """Each of three labels carried what all three say: 2.6 sure labels' worth, where the pair is worth 0.86."""
    tie = pair(1, turned=True, confidence=0.5)
    alone = pair(3, confidence=0.5)
    rows = [pair(0), pair(0), pair(0, turned=True), tie, pair(1), pair(2), alone]
    labelled = [row for row in rows if row is not tie and row is not alone]
    right = torch.tensor([0.9, 0.9, 0.1, 0.3, 0.8])
    made = relabelled(rows, labelled, right)
    assert [row["chosen"][0]["content"] for row in made.pairs] == ["yes 0", "no 1", "yes 2", "yes 3"]
    assert [row["confidence"] for row in made.pairs] == pytest.approx([0.9, 0.7, 0.8, 0.5])
    assert (made.flipped, made.joined) == (1, 3)


def test_a_pair_has_one_name_for_labels_questions_and_verdicts() -> None:
    """Two people's files wrote one prompt in two ways: the verdict reached one row, and the pair was asked about again."""
    rows = [pair(0), pair(0, turned=True), pair(1)]
    rows[1]["prompt"] = user_turn("  Q 0 ")
    questions = blind_questions(rows, [0], 1, seed="s")
    label = "first" if questions[0].first == "no 0" else "second"
    verdicts = [Verdict(questions[0].id, label, name) for name in ("ann", "bob")]
    found = count_opinions(rows, questions, verdicts)
    assert found.agree.tolist() == [0, 2, 0]
    assert found.contradict.tolist() == [2, 0, 0]
    assert found.is_first.tolist() == [True, False, True]
    assert found.is_open.tolist() == [False, False, True]
    asked_twice = [*questions, *blind_questions(rows, [1], 2, seed="t")]
    second = Verdict(asked_twice[1].id, "first" if asked_twice[1].first == "yes 0" else "second", "cat")
    assert count_opinions(rows, asked_twice, [*verdicts, second]).agree.tolist() == [1, 2, 0]


def test_pairs_that_experts_call_equal_are_no_wrong_labels() -> None:
    """It said that 14 % are estimated to be wrong and at least 20 % proved: ties counted on one side only."""
    vote, wrong = well_specified(0.2)
    rng = np.random.default_rng(1)
    right = torch.tensor(rng.random(len(vote)) >= ERROR) != wrong
    asked = torch.tensor(rng.random(len(vote)) < 0.5)
    tied = asked & torch.tensor(rng.random(len(vote)) < 0.5)
    agree, contradict = ((asked & ~tied & which).float() for which in (right, ~right))
    views = looked(agree, contradict, tied.float())
    known = weigh_verdicts([pair(i) for i in range(len(vote))], vote, views, expert_error=ERROR)
    odds = log_odds_of_verdicts(agree, contradict, error_rate=ERROR)[~tied]
    assert known.noise == estimate_noise(vote[~tied], range(int((~tied).sum())), odds)
    expected = gains(known, views)["wrong"]
    assert known.noise.low < expected["file"] / int((~tied).sum())
    flipped = known.before < 0.5
    for key, is_wrong in (("file", wrong), ("before", wrong != flipped), ("after", wrong != (known.after < 0.5))):
        count = int((is_wrong & ~tied).sum())
        assert abs(expected[key] - count) < 3 * count**0.5, "as many as are wrong, within three deviations"
    alone = looked(*torch.zeros(2, 1), torch.ones(1))
    assert weigh_verdicts([pair(0)], torch.tensor([1.0]), alone, expert_error=ERROR).after == 0.5


def test_what_several_experts_say_of_a_pair_is_foreseen_as_one() -> None:
    """Three experts who err in a quarter contradict less together than each alone: 48 were foreseen where 33 came."""
    vote, wrong = well_specified(0.05)
    says_right = torch.tensor(np.random.default_rng(2).random((len(vote), 3)) >= 0.25) != wrong[:, None]
    agree = says_right.sum(dim=1).float()
    known = weigh_verdicts([pair(i) for i in range(len(vote))], vote, looked(agree, 3 - agree), expert_error=0.25)
    assert known.foreseen is not None
    assert abs(int((agree < 1.5).sum()) - known.foreseen[0]) < 2.5 * known.foreseen[1]


def test_pairs_are_weighed_by_no_more_wrong_labels_than_there_can_be() -> None:
    """Of 2,000 labels that all votes agree with at most 0.2 % are wrong; 0.6 % were expected."""
    rows = [pair(i) for i in range(2000)]
    agree = (torch.arange(2000) < 20).float()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known = weigh_verdicts(rows, torch.full((2000,), 2.0), looked(agree, 0 * agree), expert_error=ERROR)
    assert believed_rate(known.noise) == pytest.approx(1 - 0.025 ** (1 / 2000))
    assert gains(known, looked(agree, 0 * agree))["wrong"]["file"] < 4
    few = NoiseEstimate(flip_rate=0.0, fitted=0.001, scale=1.0, low=0.0, high=0.1)
    assert [believed_rate(few), believed_rate(replace(few, fitted=0.6))] == [0.01, 0.5]


def test_a_few_verdicts_do_not_decide_that_labels_and_votes_share_an_error() -> None:
    """One contradiction of a sure label made the label worth nothing. Closed forms of Beta(1, 10)."""
    sure, e = torch.tensor([1 - 1e-9]), ERROR
    odds = torch.tensor([-math.log((1 - e) / e)])
    first, second = 1 / 11, 2 / (11 * 12)  # E h, E h²
    a, b = e, (1 - 2 * e) / 2  # P(contradicted) = e + h (1 - 2e) / 2
    expected = (a * first + b * second) / (a + b * first)
    assert shared_error(sure, odds) == pytest.approx(expected, abs=2e-3)
    assert alarm(1, {"contradict": 0.05, "chance": 0.0001}, 0.05) == []
    assert len(alarm(3, {"contradict": 0.05, "chance": 0.0001}, 0.05)) == 1
    assert alarm(3, {"contradict": 0.05, "chance": 0.01}, 0.05) == []


@pytest.mark.parametrize("column", ["margin", "rating_gap"])
def test_a_margin_follows_what_is_believed(column: str) -> None:
    """A tie was trained 3 nats apart, and a flipped pair towards the order that was given up."""
    rows = [pair(i, **{column: 3.0}) for i in range(3)]
    right = torch.tensor([0.1, 0.5, 0.9])
    result = relabelled(rows, rows, right)
    made = result.pairs
    assert (result.flipped, result.joined) == (1, 0)
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
        "asked": 60, "answered": 60, "open": 0, "skipped": 0, "ties": 0, "agree": 40, "contradict": 20, "flipped": 20, "joined": 0,
        "expert_error": 0.05, "noise_rate": {"mean": 0.2, "low": 0.1}, "wrong": {"file": 40, "before": 30, "after": 20},
        "worth": {"before": 10, "after": 20}, "next": {"pairs": 60, "worth": 10, "labels": None},
        "foreseen": {"contradict": 8.0, "deviation": 2.5, "chance": 1e-4}, "shared": 0.2,
    }  # fmt: skip
    said = [s for s in second_look_sentences(facts) if "foresaw" in s]
    assert len(said) == 1
    assert "foresaw 8 contradictions" in said[0]
    facts["foreseen"] = {"contradict": 17.0, "deviation": 2.5, "chance": 0.12}
    assert not any("foresaw" in s for s in second_look_sentences(facts))
    for second, said in (("used", False), ("not used", True), (None, False)):
        facts |= {"second_vote": second, "voted_again": second == "used"}
        assert any("second one, which is not used" in s for s in second_look_sentences(facts)) == said


def test_what_would_be_wrong_without_the_verdicts_is_judged_with_them() -> None:
    """A label that votes would flip and experts confirm: "1 as the file has them, 10 if each is flipped" mixed two knowledges."""
    views = looked(torch.tensor([2.0, 0, 0]), torch.zeros(3), torch.tensor([0.0, 0, 1]))
    noise = NoiseEstimate(0.25, 0.25, 1.0, 0.2, 0.3)
    before, after = torch.tensor([0.4, 0.9, 0.2]), torch.tensor([0.95, 0.9, 0.5])
    known = Known(noise, torch.zeros(3), torch.full((3,), 0.25), 0.05, before, after, 0.0, Foreseen(0.0, 0.0, 1.0))
    expected = gains(known, views)["wrong"]
    assert [expected[key] for key in ("file", "before", "after")] == pytest.approx([0.05 + 0.1, 0.95 + 0.1, 0.05 + 0.1])
