"""Some hundred labels leave open what a vote is worth. Nothing may become sure by taking the likeliest worth for the true one."""

import pytest
import torch
from torch import Tensor

from rlhf.objectives.annotators import PairLabels, fit_accuracy, pair_log_odds, vote_worth
from rlhf.objectives.strength import posterior_confidence
from rlhf.reward.noise import estimate_noise

FILES = 12


def planted(seed: int, accuracy: Tensor, unit: float) -> tuple[Tensor, Tensor]:
    """Return votes that agree with each label, [n], and whether it is right: votes are worth `unit` nats, and no more."""
    generator = torch.Generator().manual_seed(seed)
    nats = 1.2 * torch.randn(len(accuracy), generator=generator, dtype=torch.float64)
    agrees = torch.rand(len(accuracy), generator=generator, dtype=torch.float64) < torch.sigmoid(nats)
    right = torch.rand(len(accuracy), generator=generator, dtype=torch.float64) < accuracy
    return torch.where(agrees == right, nats, -nats) / unit, right


def surprise(probability: Tensor, right: Tensor) -> float:
    """Return the mean of -log P of what is so, in nats: what is taken for sure and is not costs most."""
    return -torch.where(right, probability, 1 - probability).log().mean().item()


@pytest.mark.parametrize(("labels", "rate"), [(150, 0.1), (150, 0.25), (600, 0.25)])
def test_posteriors_of_few_labels_are_not_surer_than_they_may_be(labels: int, rate: float) -> None:
    """With the likeliest worth they cost 1 to 2 nats a label, where knowing the rate alone costs 0.33 and 0.56."""
    said, exact, right = [], [], []
    for seed in range(FILES):
        votes, is_right = planted(seed, torch.full((labels,), 1 - rate), 1.0)
        noise = estimate_noise(votes, range(labels))
        if noise.scale == 0:
            continue  # no better than chance: every label is left as it is
        said.append(posterior_confidence(votes, flip_rate=max(noise.fitted, 0.01), scale=noise.scale))
        exact.append(posterior_confidence(votes, flip_rate=rate, scale=1.0))
        right.append(is_right)
    all_said, all_right = torch.cat(said).clamp(1e-9, 1 - 1e-9), torch.cat(right)
    loss, least = surprise(all_said, all_right), surprise(torch.cat(exact), all_right)
    assert loss < least + 0.08, "nats a label above knowing rate and worth"
    sure = all_said < 0.02
    assert (sure & all_right).float().mean().item() < 0.005, (
        "said to be wrong for sure, and right: 0.03 by the likeliest"
    )


@pytest.mark.parametrize("labels", [60, 150])
def test_people_of_whom_little_is_known_make_no_label_sure(labels: int) -> None:
    """Three annotators; with the likeliest worth every second label that was "right with 0.02" was right."""
    accuracy = torch.tensor([0.95, 0.9, 0.6]).repeat(labels)
    who = torch.arange(3).repeat(labels)
    said, right = [], []
    for seed in range(FILES):
        votes, is_right = planted(seed, accuracy, 1.0)
        worth = vote_worth(votes, who, 3)
        people = PairLabels(torch.arange(len(who)), who, torch.ones(len(who), dtype=torch.float64), worth * votes)
        said.append(torch.sigmoid(pair_log_odds(people, fit_accuracy(people, 3))))
        right.append(is_right)
    all_said, all_right = torch.cat(said).clamp(1e-9, 1 - 1e-9), torch.cat(right)
    assert surprise(all_said, all_right) < 0.4
    assert (all_said[all_said < 0.05].numel() == 0) or all_right[all_said < 0.05].float().mean().item() < 0.35


def test_many_labels_tell_what_a_vote_is_worth() -> None:
    """The prior is no more than a start: of 6,000 labels worth and rate come out as planted, whatever the unit."""
    votes, _ = planted(0, torch.full((6000,), 0.75), 1.0)
    for unit in (0.1, 1.0, 10.0):
        noise = estimate_noise(votes / unit, range(6000))
        assert noise.scale / unit == pytest.approx(1.0, rel=0.25)
        assert noise.fitted == pytest.approx(0.25, abs=0.03)
