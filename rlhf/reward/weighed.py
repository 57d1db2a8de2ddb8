"""Reward models whose parts are weighed by the prompt: prompts unlike all that a gate was fitted on are counted and said."""

import warnings
from typing import ClassVar

from torch import Tensor

from rlhf.reward.model import RewardModel


class WeighedByPrompt(RewardModel):
    """A reward model with a gate, which looks at the prompt alone.

    Attributes:
        unlike: what such a prompt is scored with, for the sentences.
        weighed: how many prompts the gate has weighed so far.
        unfamiliar: how many of these were unlike any that it was fitted on.
    """

    reads_prompt_apart = True
    counted = (*RewardModel.counted, "weighed", "unfamiliar")
    unlike: ClassVar[str]
    weighed = unfamiliar = 0
    _is_said = False

    def note_unfamiliar(self, is_unfamiliar: Tensor) -> None:
        """Count the prompts that the gate does not know, and warn of the first ones, which a server has no end to say it at.

        Args:
            is_unfamiliar: [n] bool, of prompts that were weighed.
        """
        self.weighed += len(is_unfamiliar)
        self.unfamiliar += int(is_unfamiliar.sum())
        if self.unfamiliar and self.is_counting and not self._is_said:
            self._is_said = True
            warnings.warn(
                f"{self.kind}: {self.unfamiliar} of the first {self.weighed} prompts are unlike any that the gate was fitted on; "
                f"they are scored with {self.unlike}. Further ones are counted.",
                stacklevel=4,
            )

    def cuts(self, name: str) -> list[str]:
        """Return a sentence for each way in which texts were too long, and one for prompts that the gate does not know."""
        sentences = super().cuts(name)
        if self.unfamiliar:
            sentences.append(
                f"{name}: {self.unfamiliar} of {self.weighed} prompts are unlike any that its gate was fitted on; they were scored "
                f"with {self.unlike}."
            )
        return sentences
