"""The lab's worlds by name: what annotators and stages need to know of one, whichever it is."""

from collections.abc import Callable
from dataclasses import dataclass

from rlhf.lab import instructions, world


@dataclass(frozen=True)
class World:
    """A world whose true reward is known.

    Attributes:
        name: as `lab.world` has it.
        gold: takes prompts and answers, and returns their true rewards: 0 for an empty answer, 1 for the best.
        flattery_count: counts the flattering or pleasing phrases of an answer.
        is_dangerous: tells whether the right answer to a prompt is a refusal.
        usual_words: the length of a usual answer here; annotators who like length like it in proportion to this.
        sharpness: how many times sharper than in the world of lists annotators see true reward, where answers to one prompt lie
            nearer together.
    """

    name: str
    gold: Callable[[list[str], list[str]], list[float]]
    flattery_count: Callable[[str], int]
    is_dangerous: Callable[[str], bool]
    usual_words: int
    sharpness: float

    def true_reward(self, prompt: str, answer: str) -> float:
        """Return the true reward of one answer."""
        return self.gold([prompt], [answer])[0]


LISTS = World(
    name="lists",
    gold=world.gold,
    flattery_count=world.flattery_count,
    is_dangerous=lambda prompt: world.parse_request(prompt).is_dangerous,
    usual_words=10,
    sharpness=1.0,
)
INSTRUCTIONS = World(
    name="instructions",
    gold=instructions.gold,
    flattery_count=instructions.flattery_count,
    is_dangerous=instructions.is_dangerous,
    usual_words=25,
    sharpness=1.5,
)
WORLDS = {entry.name: entry for entry in (LISTS, INSTRUCTIONS)}
