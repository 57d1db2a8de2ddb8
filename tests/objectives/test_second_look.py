"""The second look: Bayes over several observations against a table of all cases in numpy, the choice against planted truth."""

import itertools
import math

import numpy as np
import pytest
import torch

from rlhf.objectives.second_look import (
    expected_change,
    log_odds_of_verdicts,
    posterior_of_observations,
    second_look,
    worth_in_sure_labels,
)
from rlhf.objectives.strength import posterior_confidence


def enumerated(prior: float, flip_rate: float, error_rate: float, verdicts: tuple[bool, ...]) -> float:
    """P(chosen is better | label, verdicts) as a ratio of joint probabilities, without a logarithm."""
    joint = []
    for chosen_is_better in (True, False):
        p = prior if chosen_is_better else 1 - prior
        p *= 1 - flip_rate if chosen_is_better else flip_rate
        for says_chosen in verdicts:
            p *= 1 - error_rate if says_chosen == chosen_is_better else error_rate
        joint.append(p)
    return joint[0] / sum(joint)


@pytest.mark.parametrize("error_rate", [0.05, 0.3, 0.5])
@pytest.mark.parametrize("flip_rate", [0.1, 0.25])
def test_posterior_is_the_ratio_of_joint_probabilities(flip_rate: float, error_rate: float) -> None:
    strengths, scale = [-2.0, 0.0, 0.7], 1.7
    for count in range(4):
        for verdicts in itertools.product([True, False], repeat=count):
            said = log_odds_of_verdicts(
                torch.tensor([sum(verdicts)] * 3), torch.tensor([count - sum(verdicts)] * 3), error_rate=error_rate
            )
            found = posterior_of_observations(torch.tensor(strengths), said, flip_rate=flip_rate, scale=scale)
            priors = 1 / (1 + np.exp(-scale * np.array(strengths)))
            expected = [enumerated(prior, flip_rate, error_rate, verdicts) for prior in priors]
            np.testing.assert_allclose(found.numpy(), expected, rtol=2e-5)  # float32


def test_special_cases_of_the_posterior() -> None:
    strength = torch.tensor([-1.0, 0.0, 2.0])
    none = log_odds_of_verdicts(torch.zeros(3), torch.zeros(3), error_rate=0.05)
    alone = posterior_of_observations(strength, none, flip_rate=0.25, scale=1.5)
    torch.testing.assert_close(alone, posterior_confidence(strength, flip_rate=0.25, scale=1.5))
    split = log_odds_of_verdicts(torch.full((3,), 2), torch.full((3,), 2), error_rate=0.05)
    torch.testing.assert_close(posterior_of_observations(strength, split, flip_rate=0.25, scale=1.5), alone)
    coin = log_odds_of_verdicts(torch.full((3,), 4), torch.zeros(3), error_rate=0.5)
    torch.testing.assert_close(coin, torch.zeros(3), msg="a coin's verdicts say nothing")
    with pytest.raises(AssertionError, match="error rate"):
        log_odds_of_verdicts(torch.ones(1), torch.ones(1), error_rate=0.0)
    with pytest.raises(AssertionError, match="flip rate"):
        posterior_of_observations(torch.ones(1), torch.ones(1), flip_rate=0.0)


@pytest.mark.parametrize("error_rate", [0.0, 0.05, 0.2, 0.5])
def test_expected_change_is_the_variance_over_both_verdicts(error_rate: float) -> None:
    for p in (0.03, 0.25, 0.5, 0.8, 0.99):
        variance, mean = 0.0, 0.0
        for says_chosen in (True, False):
            likelihood = [1 - error_rate if says_chosen == truth else error_rate for truth in (True, False)]
            evidence = p * likelihood[0] + (1 - p) * likelihood[1]
            posterior = p * likelihood[0] / evidence
            mean += evidence * posterior
            variance += evidence * (posterior - p) ** 2
        assert mean == pytest.approx(p), "no verdict is expected to move a belief one way"
        found = expected_change(torch.tensor([p], dtype=torch.float64), error_rate=error_rate).item()
        assert found == pytest.approx(variance, abs=1e-12)
        gain = sum(  # what the worth is expected to rise by
            e * ((2 * q - 1) ** 2 - (2 * p - 1) ** 2)
            for e, q in [
                (
                    p * (1 - error_rate) + (1 - p) * error_rate,
                    p * (1 - error_rate) / max(1e-300, p * (1 - error_rate) + (1 - p) * error_rate),
                ),
                (
                    p * error_rate + (1 - p) * (1 - error_rate),
                    p * error_rate / (p * error_rate + (1 - p) * (1 - error_rate)),
                ),
            ]
        )
        assert 4 * found == pytest.approx(gain, abs=1e-12)
    ends = expected_change(torch.tensor([0.0, 1.0]), error_rate=error_rate)
    assert ends.tolist() == [0.0, 0.0], "nothing is learnt of what is certain, and nothing is divided by 0"


def test_worth_is_the_information_that_a_noisy_channel_passes() -> None:
    """Fisher information about d at d = 0 of a label flipped with probability ε, by numbers: ((1 - 2ε)/4)² / (1/4)."""
    for p in (0.5, 0.6, 0.75, 1.0):
        step = 1e-4
        q = [p / (1 + math.exp(-d)) + (1 - p) / (1 + math.exp(d)) for d in (-step, 0.0, step)]
        slope = (q[2] - q[0]) / (2 * step)
        information = slope**2 / (q[1] * (1 - q[1]))
        assert worth_in_sure_labels(torch.tensor([p])).item() == pytest.approx(information / 0.25, abs=1e-6)


def planted(n: int = 400) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features in two blocks: the first half of the pairs along 8 directions, the others along 8 more."""
    generator = torch.Generator().manual_seed(0)
    features = torch.zeros(n, 16)
    features[: n // 2, :8] = torch.randn(n // 2, 8, generator=generator)
    features[n // 2 :, 8:] = torch.randn(n // 2, 8, generator=generator)
    return features, torch.zeros(n), torch.full((n,), 0.95)


def test_the_choice_finds_planted_doubt() -> None:
    """40 labels of 400 are doubtful (p = 0.4 to 0.6), 40 surely wrong: a second look takes the doubtful."""
    features, differences, right = planted()
    doubtful = torch.arange(3, 400, 10)
    right[doubtful] = torch.linspace(0.4, 0.6, 40)
    right[torch.arange(5, 400, 10)] = 0.001
    chosen = second_look(features, differences, right, 40, error_rate=0.05)
    assert len(set(chosen)) == 40
    assert len(set(chosen) & set(doubtful.tolist())) >= 36


def test_the_choice_takes_what_teaches_most_of_equal_doubt() -> None:
    """In one half of the directions all other labels are sure, in the other they are coins: there a verdict teaches more."""
    features, differences, right = planted()
    right[:200], right[200:] = 0.999, 0.5
    right[:40] = 0.5
    chosen = second_look(features, differences, right, 30, error_rate=0.05)
    assert sum(i >= 200 for i in chosen) >= 28


def test_the_choice_is_the_largest_gain_in_information() -> None:
    """By numbers: the verdict's Fisher information about d, differentiated, times x' Σ x with Σ inverted in numpy."""
    rng, error, rate = np.random.default_rng(0), 0.05, 0.2
    features, differences = rng.normal(size=(60, 4)), rng.normal(size=60) * 2
    features /= np.sqrt((features**2).sum(axis=1).mean())

    def agrees(d: np.ndarray) -> np.ndarray:
        right = (1 - rate) / (1 - rate + rate * np.exp(-d))
        return (1 - error) * right + error * (1 - right)

    right = (1 - rate) / (1 - rate + rate * np.exp(-differences))
    slope = (agrees(differences + 1e-5) - agrees(differences - 1e-5)) / 2e-5
    information = slope**2 / (agrees(differences) * (1 - agrees(differences)))
    known = (2 * right - 1) ** 2 * np.exp(-differences) / (1 + np.exp(-differences)) ** 2
    precision = np.eye(4) + (features * known[:, None]).T @ features
    expected = []
    for _ in range(6):  # one after the other, each as if it were known
        gain = information * np.einsum("ij,jk,ik->i", features, np.linalg.inv(precision), features)
        gain[expected] = -1
        best = int(gain.argmax())
        expected.append(best)
        precision += information[best] * np.outer(features[best], features[best])
    found = second_look(torch.tensor(features), torch.tensor(differences), torch.tensor(right), 6, error_rate=error)
    assert found == expected


def test_the_choice_is_diverse_and_keeps_to_open_pairs() -> None:
    features = torch.eye(5).repeat_interleave(20, dim=0) * 3
    right = torch.full((100,), 0.5)
    chosen = second_look(features, torch.zeros(100), right, 5, error_rate=0.05)
    assert sorted(i // 20 for i in chosen) == [0, 1, 2, 3, 4], "one of each kind before a second of any"
    is_open = torch.zeros(100, dtype=torch.bool)
    is_open[[7, 30, 31]] = True
    chosen = second_look(features, torch.zeros(100), right, 5, error_rate=0.05, is_open=is_open)
    assert sorted(chosen) == [7, 30, 31], "no more than are open"
    assert chosen[0] // 20 != chosen[1] // 20
    for scale in (1e-3, 1e3):  # the unit of the features does not matter
        assert second_look(features * scale, torch.zeros(100), right, 5, error_rate=0.05) == second_look(
            features, torch.zeros(100), right, 5, error_rate=0.05
        )
