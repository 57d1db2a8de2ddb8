"""Rewards from a causal model's verdicts, `verdicts:MODEL`: how much better an answer is than one of the reference."""

import warnings
from collections.abc import Sequence

from rlhf.data.rows import Messages, Prompt
from rlhf.errors import TrainingError
from rlhf.models.text import last_turn
from rlhf.models.verdicts import load_verdict_model
from rlhf.ppo.source_kinds import PREFIX

OPPONENT = "reference_answer"  # the column with the answers that a policy's are compared with


class VerdictReward:
    """A causal model as a reward function: log-odds that an answer is better than another one to the same prompt, nats.

    A verdict is about two answers. The other one is an answer of PPO's reference, sampled anew for every prompt of a rollout,
    so the reward of an answer y is one draw of

        r(x, y) = E_{y' ~ π_ref(·|x)} [ L(x, y, y') ],   L the log-odds of `rlhf.objectives.verdicts`

    L changes its sign when the answers are swapped, so a policy that is the reference has a mean reward of 0. Where the data
    has a column `reference_answer`, answers are compared with that instead. Two answers that do not fit in the model's context
    have no verdict: 0, said once.

    Args:
        name: "verdicts:MODEL", a folder or a hub id.

    Raises:
        UserError: no such model, or it gives no verdicts.
    """

    compares = True

    def __init__(self, name: str):
        self.verdicts = load_verdict_model(name.removeprefix(PREFIX))
        self.model = self.verdicts.model
        self.__name__ = name

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Messages],
        *,
        reference_answer: Sequence[str] | None = None,
        **_: object,
    ) -> list[float]:
        """Return the log-odds that each answer is better than the one of the reference.

        Raises:
            TrainingError: there are no answers to compare with.
        """
        if reference_answer is None:
            raise TrainingError(f"The reward {self.__name__} compares two answers; give it a column {OPPONENT!r}.")
        answers, was_said = [last_turn(completion) for completion in completions], self.verdicts.too_long > 0
        verdicts = self.verdicts.compare(prompts, answers, reference_answer)
        if self.verdicts.too_long and not was_said:
            warnings.warn(
                f"{self.__name__}: {self.verdicts.too_long} of {len(answers)} pairs of answers do not fit in its context with "
                "their prompt, and get a reward of 0; lower max_prompt_length, or take a model that reads more.",
                stacklevel=2,
            )
        log_odds: list[float] = verdicts.orders.log_odds.tolist()
        return log_odds
