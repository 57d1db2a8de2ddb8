"""Bayes' rule for a critic's claim, and what labels are worth after it, against counting and against people who are drawn."""

import math
import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from rlhf.lab.annotators import Annotator, Critic
from rlhf.lab.world import HARMLESS, KINDS, all_prompts, parse_request, true_reward
from rlhf.objectives.assistance import assisted_accuracy, assisted_probability

OWN = torch.tensor([0.5, 0.6, 0.75, 0.9, 0.99])


def check(probability: Callable[..., Tensor]) -> None:
    """Bayes' rule written with probabilities: P(first better, claim) / P(claim), for both claims and none."""
    for e in (0.1, 0.3, 0.5):
        for claim, likelihood in ((1.0, (1 - e, e)), (-1.0, (e, 1 - e)), (0.0, (1.0, 1.0))):
            expected = OWN * likelihood[0] / (OWN * likelihood[0] + (1 - OWN) * likelihood[1])
            found = probability(OWN, torch.full_like(OWN, claim), error_rate=e)
            torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_the_claim_is_weighed_by_bayes() -> None:
    check(assisted_probability)


def word_for_word(own: Tensor, claims: Tensor, *, error_rate: float) -> Tensor:
    """Whoever hears a critic says what it says."""
    return torch.where(claims == 0, own, torch.where(claims > 0, 1 - error_rate, error_rate))


def against_the_claim(own: Tensor, claims: Tensor, *, error_rate: float) -> Tensor:
    return assisted_probability(own, -claims, error_rate=error_rate)


def averaged(own: Tensor, claims: Tensor, *, error_rate: float) -> Tensor:
    """Probabilities added, where log-odds are meant."""
    return torch.where(claims == 0, own, (own + word_for_word(own, claims, error_rate=error_rate)) / 2)


@pytest.mark.parametrize("twin", [word_for_word, against_the_claim, averaged])
def test_other_ways_to_listen_are_noticed(twin: Callable[..., Tensor]) -> None:
    with pytest.raises(AssertionError):
        check(twin)


def test_a_coin_changes_nothing_and_trust_in_one_costs() -> None:
    torch.testing.assert_close(assisted_probability(OWN, torch.ones(5), error_rate=0.5), OWN)
    torch.testing.assert_close(assisted_accuracy(OWN, error_rate=0.5), OWN)
    trusted = assisted_accuracy(OWN, error_rate=0.5, believed=0.1)
    assert (trusted[1:] < OWN[1:] - 0.005).all(), "a coin that is believed makes whoever knows better worse"
    assert trusted[0].item() == pytest.approx(0.5), "and does nothing where nobody knew anything"


def test_rightly_weighed_a_critic_never_harms_and_helps_less_the_worse_it_is() -> None:
    own = torch.linspace(0.5, 0.999, 50)
    gains = [assisted_accuracy(own, error_rate=e) - own for e in (0.01, 0.1, 0.25, 0.4, 0.49)]
    assert all((gain >= -1e-6).all() for gain in gains)
    assert all((better >= worse - 1e-6).all() for better, worse in pairwise(gains))
    # r = 3/4 and e = 1/4: told the truth σ(log 3 + log 3) = 9/10 are right, misled σ(log 3 - log 3) = 1/2.
    assert assisted_accuracy(torch.tensor([0.75]), error_rate=0.25).item() == pytest.approx(0.75 * 0.9 + 0.25 * 0.5)


def test_an_evaluator_who_knows_nothing_says_what_the_critic_says_as_far_as_it_is_trusted() -> None:
    """Too hard for one: r = 1/2 becomes (1 - e)² + e², for the critic is right and believed, or wrong and not."""
    for e in (0.1, 0.3):
        assert assisted_accuracy(torch.tensor([0.5]), error_rate=e).item() == pytest.approx((1 - e) ** 2 + e**2)


@pytest.mark.parametrize(("critic", "believed"), [(0.1, None), (0.4, None), (0.5, 0.1)])
def test_people_of_the_lab_label_as_it_foretells(critic: float, believed: float | None) -> None:
    """4,000 labels of one person who hears a critic: the standard error is below 0.008."""
    prompt = next(x for x in all_prompts([next(iter(HARMLESS))]) if parse_request(x).number == 3)
    things = KINDS[parse_request(prompt).kind]
    better, worse = f"{things[0]}, {things[1]} and {things[2]}.", f"{things[0]} and {things[1]}."
    assert true_reward(prompt, better) > true_reward(prompt, worse)
    person = Annotator("one", sharpness=3.0, length_bias=0.0, flattery_bias=0.0, carelessness=0.1)
    own = torch.tensor([person.probability_of_preferring(prompt, better, worse)])
    rng, helper = random.Random(0), Critic(critic, believed)
    right = sum(person.prefers_first(prompt, better, worse, rng, critic=helper) for _ in range(2000))
    right += sum(not person.prefers_first(prompt, worse, better, rng, critic=helper) for _ in range(2000))
    expected = assisted_accuracy(own, error_rate=critic, believed=believed).item()
    assert right / 4000 == pytest.approx(expected, abs=4 * math.sqrt(0.25 / 4000))


def test_of_equal_answers_a_critic_says_nothing() -> None:
    prompt = all_prompts([next(iter(HARMLESS))])[0]
    assert Critic(0.1).claim(prompt, "", "", random.Random(0)) == 0
