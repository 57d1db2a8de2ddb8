"""A second vote: voters who know of each label how likely it is wrong, and never of one that they vote on."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.data.rows import SIDES, assistant_turn, user_turn
from rlhf.objectives.pairwise import pair_loss
from rlhf.pipeline.vote import VoteSetup, vote, vote_again
from rlhf.reward.vote import plan_vote
from rlhf.statistics import auroc
from tests.conftest import WORDS

SETTINGS = {"learning_rate": 3e-3, "per_device_train_batch_size": 8, "num_train_epochs": 2, "save_strategy": "no"}
SHAPE: dict[str, Any] = {"members": 2, "folds": 2, "seed": 0, "say": lambda _: None}


def pairs(n: int = 60) -> tuple[list[Any], list[bool]]:
    """Answers that say yes are better; two fifths of the labels say otherwise."""
    rows, wrong = [], []
    for i in range(n):
        texts = [f"yes {WORDS[i % 9]}", f"no {WORDS[(i + 4) % 9]}"]
        wrong.append(i % 5 < 2)
        sides = [assistant_turn(text) for text in (reversed(texts) if wrong[-1] else texts)]
        rows.append({"prompt": user_turn(f"{WORDS[i % 11]} {i}"), **dict(zip(SIDES, sides, strict=True))})
    return rows, wrong


@pytest.mark.parametrize("trunk", [None, 1], ids=["independent", "trunk"])
def test_one_rate_for_all_is_the_vote_with_that_rate(base_folder: Path, tmp_path: Path, trunk: int | None) -> None:
    rows, _ = pairs()
    known = {"flip_rate": 0.25, "in_sample": False}
    first = vote(base_folder, rows, SETTINGS, tmp_path / "a", trunk=trunk, **SHAPE, **known).strength.mean
    again = vote_again(base_folder, rows, SETTINGS, tmp_path / "b", wrong=[0.25] * 60, trunk=trunk, **SHAPE)
    torch.testing.assert_close(again, first, atol=1e-5, rtol=1e-5)


def test_what_is_known_of_a_pair_moves_the_votes_on_others_only(base_folder: Path, tmp_path: Path) -> None:
    """Verdicts on the pairs of one fold: votes on that fold keep every bit, so that they are independent of these verdicts."""
    rows, is_wrong = pairs()
    plan = plan_vote([row["prompt"] for row in rows], members=2, folds=2, in_sample=False, seed=0)
    told = torch.tensor(plan.folds) == 0
    wrong = [(0.98 if bad else 0.02) if fold == 0 else 0.4 for bad, fold in zip(is_wrong, plan.folds, strict=True)]
    before = vote_again(base_folder, rows, SETTINGS, tmp_path / "a", wrong=[0.4] * 60, trunk=1, **SHAPE)
    after = vote_again(base_folder, rows, SETTINGS, tmp_path / "b", wrong=wrong, trunk=1, **SHAPE)
    assert torch.equal(after[told], before[told])
    assert (after[~told] != before[~told]).all()
    others = [bad for bad, fold in zip(is_wrong, plan.folds, strict=True) if fold == 1]
    assert auroc((-after[~told]).tolist(), others) > auroc((-before[~told]).tolist(), others)


def test_margins_follow_what_is_known_of_the_label() -> None:
    rows = [{**row, "margin": 2.0} for row in pairs(3)[0]]
    setup = VoteSetup("x", rows, {}, 0.0, [0.0, 0.5, 0.9], print)
    assert [row["margin"] for row in setup.training_rows()] == pytest.approx([2.0, 0.0, 1.6])
    assert [row["flip_rate"] for row in setup.training_rows()] == [0.0, 0.5, 0.9]
    differences = torch.linspace(-3, 3, 7)
    wrong_label, right_label = (
        pair_loss(d, torch.zeros(7), margin=row["margin"], flip_rate=torch.tensor(row["flip_rate"]))
        for d, row in (
            (differences, setup.training_rows()[2]),
            (-differences, VoteSetup("x", rows[:1], {}, 0.0, [0.1], print).training_rows()[0]),
        )
    )
    torch.testing.assert_close(wrong_label, right_label)  # a label, wrong with 0.9: the other answer, wrong with 0.1
    doubted = VoteSetup("x", [{**rows[0], "confidence": 0.6}], {}, 0.0, [0.01], print).training_rows()[0]
    assert (doubted["confidence"], doubted["flip_rate"]) == (1.0, 0.01), "0.6 would be learnt whatever experts say"
    plain = VoteSetup("x", rows, {}, 0.2, None, print).training_rows()
    assert [row["margin"] for row in plain] == [2.0] * 3
    assert "flip_rate" not in plain[0]
