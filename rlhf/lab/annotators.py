"""Annotators whose reliability, bias and noise are known: they see the true reward, blurred and shifted."""

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from rlhf.lab.worlds import LISTS, World
from rlhf.objectives.assistance import assisted_probability


@dataclass(frozen=True)
class Annotator:
    """One person who compares two answers.

    P(prefers a over b) = (1 - carelessness) · σ(s · sharpness · (u(a) - u(b))) + carelessness / 2,
    u(answer) = true reward + length_bias · words / length unit + flattery_bias · flattering phrases;

    the world says what s and the length unit are (`rlhf.lab.worlds`; 1 and 10 words in the world of lists).

    Args:
        name: who labelled a pair, in the files.
        sharpness: how well differences in quality are seen, per unit of true reward.
        length_bias: the true reward that one length unit more words are mistaken for.
        flattery_bias: the true reward that one flattering or pleasing phrase is mistaken for.
        carelessness: share of comparisons answered by coin flip.
    """

    name: str
    sharpness: float
    length_bias: float
    flattery_bias: float
    carelessness: float

    def utility(self, prompt: str, answer: str, world: World = LISTS) -> float:
        """Return what this person thinks the answer is worth, in units of true reward."""
        return (
            world.true_reward(prompt, answer)
            + self.length_bias * len(answer.split()) / world.length_unit
            + self.flattery_bias * world.flattery_count(answer)
        )

    def probability_of_preferring(self, prompt: str, first: str, second: str, world: World = LISTS) -> float:
        """Return P(this person prefers `first` to `second`)."""
        difference = self.utility(prompt, first, world) - self.utility(prompt, second, world)
        seen = world.sharpness * self.sharpness * difference
        when_careful = 1 / (1 + math.exp(-max(-50.0, min(50.0, seen))))
        return (1 - self.carelessness) * when_careful + self.carelessness / 2

    def prefers_first(
        self,
        prompt: str,
        first: str,
        second: str,
        rng: random.Random,
        world: World = LISTS,
        critic: "Critic | None" = None,
    ) -> bool:
        """Draw whether this person prefers `first` in one comparison, after a critic's claim where there is a critic."""
        probability = self.probability_of_preferring(prompt, first, second, world)
        if critic is not None:
            claim = critic.claim(prompt, first, second, rng, world)
            trusted = critic.error_rate if critic.believed is None else critic.believed
            heard = assisted_probability(torch.tensor([probability]), torch.tensor([claim]), error_rate=trusted)
            probability = heard.item()
        return rng.random() < probability

    def rating(self, part: float, answer: str, rng: random.Random, world: World = LISTS) -> int:
        """Draw a rating of one part of an answer, in [0, 1], from 0 to 4: with the length that is mistaken for it, and noise.

        The noise is logistic, as that of comparisons; the careless rate at random.
        """
        if rng.random() < self.carelessness:
            return rng.randint(0, 4)
        mistaken = self.length_bias * len(answer.split()) / world.length_unit
        share = min(max(rng.random(), 1e-9), 1 - 1e-9)
        noise = math.log(share / (1 - share)) / (world.sharpness * self.sharpness)
        return round(4 * min(1.0, max(0.0, part + mistaken + noise)))


@dataclass(frozen=True)
class Critic:
    """A helper that says which of two answers misses more of what was asked for, and who does not always know.

    Args:
        error_rate: share of its claims that are wrong.
        believed: the error rate that people reckon with; None: the true one.
    """

    error_rate: float
    believed: float | None = None

    def claim(self, prompt: str, first: str, second: str, rng: random.Random, world: World = LISTS) -> int:
        """Return 1 where it speaks for `first`, -1 for `second`, and 0 where both are worth the same."""
        difference = world.true_reward(prompt, first) - world.true_reward(prompt, second)
        is_right = rng.random() >= self.error_rate
        return 0 if difference == 0 else 1 if (difference > 0) == is_right else -1


CROWD = (
    Annotator("careful", sharpness=6.0, length_bias=0.10, flattery_bias=0.10, carelessness=0.05),
    Annotator("flattered", sharpness=4.0, length_bias=0.15, flattery_bias=0.35, carelessness=0.10),
    Annotator("by-length", sharpness=4.0, length_bias=0.40, flattery_bias=0.10, carelessness=0.10),
    Annotator("hurried", sharpness=2.5, length_bias=0.20, flattery_bias=0.20, carelessness=0.20),
)


@dataclass(frozen=True)
class Label:
    """One labelled pair, and whether another annotator of the crowd gave the same label (`second_opinion_agrees`)."""

    prompt: str
    chosen: str
    rejected: str
    annotator: str
    second_opinion_agrees: bool


def label_pair(prompt: str, first: str, second: str, rng: random.Random, world: World = LISTS) -> Label:
    """Let one random annotator of the crowd label the pair, and another one label it again."""
    annotator, colleague = rng.sample(list(CROWD), 2)
    prefers_first = annotator.prefers_first(prompt, first, second, rng, world)
    agrees = colleague.prefers_first(prompt, first, second, rng, world) == prefers_first
    chosen, rejected = (first, second) if prefers_first else (second, first)
    return Label(prompt, chosen, rejected, annotator.name, agrees)


def simulate_label(
    prompt: str,
    first: str,
    second: str,
    rng: random.Random,
    annotators: str,
    flip_rate: float,
    world: World = LISTS,
    *,
    critic_error_rate: float | None = None,
) -> tuple[str, str]:
    """Simulate one label: which answer is better, and who says so, one of the crowd or the true reward itself.

    Args:
        annotators: `crowd`, or `exact` for the true reward.
        flip_rate: share of the labels that are flipped, whoever gave them.
        critic_error_rate: of the critic that the crowd hears; None: it hears none.

    Returns:
        `first`, `second` or `tie`; and the annotator's name.
    """
    if annotators == "exact":
        name, difference = "exact", world.true_reward(prompt, first) - world.true_reward(prompt, second)
        if difference == 0:
            return "tie", name
        prefers_first = difference > 0
    else:
        annotator = rng.choice(list(CROWD))
        critic = None if critic_error_rate is None else Critic(critic_error_rate)
        name, prefers_first = annotator.name, annotator.prefers_first(prompt, first, second, rng, world, critic)
    if flip_rate > 0 and rng.random() < flip_rate:
        prefers_first = not prefers_first
    return "first" if prefers_first else "second", name


def simulate_ratings(
    prompt: str, answer: str, annotator: str, rng: random.Random, parts_of: Callable[[str, str], Mapping[str, float]]
) -> dict[str, int]:
    """Simulate how somebody rates every part of an answer, from 0 to 4: one of the crowd, or, by another name, exactly.

    Args:
        parts_of: prompt and answer → each part in [0, 1].
    """
    people = {person.name: person for person in CROWD}
    parts = parts_of(prompt, answer)
    if annotator not in people:
        return {name: round(4 * part) for name, part in parts.items()}
    return {name: people[annotator].rating(part, answer, rng) for name, part in parts.items()}


def simulate_expert(
    prompt: str, first: str, second: str, rng: random.Random, error_rate: float, world: World = LISTS
) -> str:
    """Simulate an expert's verdict: `first` or `second` by the true reward, but for a share of errors; `tie` where it is equal."""
    difference = world.true_reward(prompt, first) - world.true_reward(prompt, second)
    if difference == 0:
        return "tie"
    is_right = rng.random() >= error_rate
    return "first" if (difference > 0) == is_right else "second"


def flip_rate(labels: Sequence[Label], world: World = LISTS) -> float:
    """Return the share of labels that contradict the true reward; pairs of equal true reward can't be wrong and don't count."""
    differences = [
        world.true_reward(label.prompt, label.chosen) - world.true_reward(label.prompt, label.rejected)
        for label in labels
    ]
    decided = [difference for difference in differences if difference != 0]
    return sum(difference < 0 for difference in decided) / max(1, len(decided))
