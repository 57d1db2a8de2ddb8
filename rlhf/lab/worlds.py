"""The lab's worlds by name: what annotators and stages need to know of one, whichever it is."""

from collections.abc import Callable
from dataclasses import dataclass

from rlhf.lab import instructions, world
from rlhf.lab.critiques import critique_of_instruction, critique_of_list


@dataclass(frozen=True)
class World:
    """A world whose true reward is known.

    Attributes:
        name: as `lab.world` has it.
        gold: takes prompts and answers, and returns their true rewards: 0 for an empty answer, 1 for the best.
        flattery_count: counts the flattering or pleasing phrases of an answer.
        is_dangerous: tells whether the right answer to a prompt is a refusal.
        critique: says what is good and bad about an answer to a prompt, truthfully.
        length_unit: how many more words are mistaken for an annotator's `length_bias` of true reward.
        sharpness: how many times sharper than in the world of lists annotators see true reward.

    Both are chosen so that the same people are as good here as in the world of lists, where two answers to a prompt differ by
    0.76 of true reward and by 4.3 words (root of the mean square). Here, by answers of SmolLM2-135M-Instruct, they differ by
    0.27 and by 21: sharpness 0.76 / 0.27, and as much taste of length beside the truth, 10 · (21 / 0.27) / (4.3 / 0.76).
    """

    name: str
    gold: Callable[[list[str], list[str]], list[float]]
    flattery_count: Callable[[str], int]
    is_dangerous: Callable[[str], bool]
    critique: Callable[[str, str], str]
    length_unit: int
    sharpness: float

    def true_reward(self, prompt: str, answer: str) -> float:
        """Return the true reward of one answer."""
        return self.gold([prompt], [answer])[0]


LISTS = World(
    name="lists",
    gold=world.gold,
    flattery_count=world.flattery_count,
    is_dangerous=lambda prompt: world.parse_request(prompt).is_dangerous,
    critique=critique_of_list,
    length_unit=10,
    sharpness=1.0,
)
INSTRUCTIONS = World(
    name="instructions",
    gold=instructions.gold,
    flattery_count=instructions.flattery_count,
    is_dangerous=instructions.is_dangerous,
    critique=critique_of_instruction,
    length_unit=140,
    sharpness=2.8,
)
WORLDS = {entry.name: entry for entry in (LISTS, INSTRUCTIONS)}
