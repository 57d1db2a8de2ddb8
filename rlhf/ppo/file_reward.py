"""Rewards from a function of texts in a person's own file, `FILE.py:function`."""

from collections.abc import Sequence

from rlhf.data.functions import load_function
from rlhf.data.rows import Messages, Prompt
from rlhf.models.text import last_turn, plain


class FileReward:
    """A function of prompts and answers as texts, called as TRL calls its reward functions.

    Args:
        name: "FILE.py:function"; the function returns one finite number for each answer.

    Raises:
        UserError: no such file or function; later, from a call, a wrong number or kind of values.
    """

    def __init__(self, name: str):
        self.function = load_function(name, key="ppo.extra_rewards")
        self.__name__ = name

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[str | Messages], **_: object) -> list[float]:
        """Return one number an answer."""
        return self.function([plain(prompt) for prompt in prompts], [last_turn(answer) for answer in completions])
