"""How many labels are wrong, by the votes: bounds that hold the planted rate, and a posterior that finds the flips."""

import pytest
import torch

from rlhf.objectives.strength import VoteStrength, posterior_confidence
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.noise import estimate_noise, vote_grid
from rlhf.statistics import auroc
from tests.objectives.test_strength import rows


def simulated(count: int, epsilon: float, sharpness: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Votes that are calibrated at scale 1/2, and labels of which a share ε is wrong: (differences, is the label wrong?)."""
    generator = torch.Generator().manual_seed(seed)
    true = sharpness * torch.randn(count, generator=generator)  # logit of "first is better"
    first_is_better = torch.rand(count, generator=generator) < torch.sigmoid(true)
    wrong = torch.rand(count, generator=generator) < epsilon
    label_first = first_is_better ^ wrong
    return torch.where(label_first, 2 * true, -2 * true), wrong


@pytest.mark.parametrize("epsilon", [0.1, 0.25, 0.4])
@pytest.mark.parametrize("sharpness", [1.0, 3.0, 6.0])
def test_the_bounds_hold_the_noise_rate(epsilon: float, sharpness: float) -> None:
    """Votes of any sharpness; sharp ones also give the rate itself, blunt ones take their own errors for the labels'."""
    differences, wrong = simulated(6000, epsilon, sharpness)
    noise = estimate_noise(differences, range(6000))
    assert noise.low <= wrong.float().mean() <= noise.high
    assert noise.low <= noise.flip_rate <= noise.high + 1e-9
    if sharpness == 6.0:
        assert noise.flip_rate == pytest.approx(epsilon, abs=0.03)
        assert noise.low > epsilon - 0.05, "sharp votes prove most of it"


def test_votes_that_know_nothing_change_nothing() -> None:
    differences = torch.randn(2000, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="no more than chance"):
        noise = estimate_noise(differences, range(2000))
    assert (noise.flip_rate, noise.fitted, noise.scale, noise.low) == (0.0, 0.0, 0.0, 0.0)
    assert noise.high > 0.5
    votes = VoteStrength(torch.zeros(20), torch.ones(20), torch.ones(20), torch.full((20,), 2))
    made, _ = denoised(rows(20), DenoiseConfig("posterior"), votes, noise)
    assert "confidence" not in made[0]


def test_a_vote_that_is_sure_and_wrong_hides_nothing() -> None:
    """The mean vote is below 0 then, though 88 % of the labels agree, and nothing was said of any of them."""
    differences, _ = simulated(500, 0.1, sharpness=6.0)
    before = estimate_noise(differences, range(500))
    differences[0] = -differences.sum() - 100
    after = estimate_noise(differences, range(500))
    assert (differences > 0).double().mean() > 0.8
    assert differences.sum() < 0
    assert before.low > 0.05
    assert after.low == pytest.approx(before.low, abs=0.02)
    assert 0.05 < after.flip_rate < 0.2


@pytest.mark.parametrize(("wrong", "n"), [(1, 1000), (3, 3000), (0, 500)])
def test_nearly_clean_labels_are_not_called_worse_than_they_are(wrong: int, n: int) -> None:
    """The lower end was the first point of a grid of 0.5 %; it is between two points now, and never above the upper end."""
    differences = torch.full((n,), 8.0)
    differences[:wrong] *= -1
    noise = estimate_noise(differences, range(n))
    assert noise.low <= wrong / n
    assert noise.low <= noise.high
    assert noise.high >= 1 - 0.025 ** (1 / n), "the exact end where none is contradicted"


def test_the_lower_end_is_seldom_above_a_small_truth() -> None:
    """Of 0.1 % wrong labels at least 0.5 % were said to be wrong in 8 of 25 files; 2.5 % of the files is what 95 % promises."""
    lows = []
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        d = 4 * torch.randn(2000, generator=generator)
        first_is_better = torch.rand(2000, generator=generator) < torch.sigmoid(d)
        wrong = torch.rand(2000, generator=generator) < 0.001
        lows.append(estimate_noise(torch.where(first_is_better != wrong, d, -d), range(2000)).low)
    assert sum(low > 0.001 for low in lows) <= 1
    assert any(0 < low < 0.0005 for low in lows), "between the first two points of the grid"


def test_votes_that_may_be_chance_are_taken_for_it() -> None:
    """Right on 153 of 300 pairs: nothing that a coin would not do, so no label is called wrong."""
    differences = torch.cat([torch.linspace(0.01, 1, 153), -torch.linspace(0.01, 1, 147)])
    with pytest.warns(UserWarning, match="no more than chance"):
        noise = estimate_noise(differences, range(300))
    assert (noise.flip_rate, noise.fitted, noise.low) == (0.0, 0.0, 0.0)
    assert 0.5 < noise.high < 0.56


def test_repeated_prompts_prove_less() -> None:
    differences, _ = simulated(1000, 0.25, sharpness=3.0)
    once = estimate_noise(differences, range(1000))
    repeated = estimate_noise(differences.repeat_interleave(6), [i // 6 for i in range(6000)])
    as_if_independent = estimate_noise(differences.repeat_interleave(6), range(6000))
    assert repeated.low == pytest.approx(once.low)
    assert as_if_independent.low > once.low + 0.01


def test_verdicts_on_pairs_of_different_conversations_count_in_full() -> None:
    """A second look asks about one pair of each; the 35 others of its conversation take nothing from the verdict."""
    differences, _ = simulated(100, 0.1, sharpness=2.0)
    odds = torch.where(torch.arange(100) % 3 == 0, 3.0, 0.0)
    alone = vote_grid(differences, range(100), odds)
    judged = torch.zeros(100, 36)
    judged[:, 0] = odds
    among = vote_grid(differences.repeat_interleave(36), [i // 36 for i in range(3600)], judged.flatten())
    torch.testing.assert_close(among.verdicts, alone.verdicts)
    torch.testing.assert_close(among.labels, alone.labels)


def test_the_posterior_finds_planted_flips() -> None:
    differences, wrong = simulated(6000, 0.25, sharpness=3.0)
    noise = estimate_noise(differences, range(6000))
    assert noise.fitted == pytest.approx(0.25, abs=0.03)
    assert noise.scale == pytest.approx(0.5, rel=0.2), "what a vote is worth in this simulation"
    p = posterior_confidence(differences, flip_rate=0.25, scale=noise.scale)
    assert auroc((1 - p).tolist(), wrong.tolist()) > 0.85
    suspicious = p < 0.5
    assert wrong[suspicious].float().mean() > 0.5
    # Calibrated: among pairs with p near x the label is right x of the time.
    for low, high in ((0.3, 0.5), (0.5, 0.7), (0.7, 0.9)):
        here = (p >= low) & (p < high)
        assert (~wrong)[here].float().mean().item() == pytest.approx(p[here].mean().item(), abs=0.05)
