"""Rewards from an HTTP server that speaks OpenRLHF's contract: POST {"query": [...], "prompts": [...]} → {"rewards": [...]}."""

import warnings
from collections.abc import Sequence

import requests

from rlhf.data.http import ATTEMPTS, post_json
from rlhf.data.rows import Messages, Prompt
from rlhf.errors import TrainingError
from rlhf.models.text import last_turn, plain


class RemoteReward:
    """A reward server as a reward function: a whole batch a request, a bounded number of tries, then an error.

    `query` holds prompt and answer in one text, for servers that read nothing else; `prompts` (strings, or whole
    conversations), `responses` and `ended` (ours) each alone. The reply may be `{"rewards": [...]}` or, as older servers say,
    `{"scores": [...]}`; a server that had to cut texts says how many under `cut`, which is told once.

    Args:
        url: of the endpoint, e.g. http://host:5000/get_reward.
        timeout: seconds for each try.
    """

    def __init__(self, url: str, *, timeout: float = 60.0):
        self.url, self.timeout = url, timeout
        self.__name__ = url
        self.cut = 0

    def __call__(
        self,
        prompts: Sequence[Prompt],
        completions: Sequence[str | Messages],
        *,
        ended: Sequence[bool] | None = None,
        **_: object,
    ) -> list[float]:
        """Ask for the rewards of answers: one number each.

        Args:
            ended: whether each answer came to its end; None if all did.

        Raises:
            TrainingError: nobody answers, the server refuses, or the reply is not one number an answer.
        """
        answers = [last_turn(completion) for completion in completions]
        readable = [plain(prompt) for prompt in prompts]
        body: dict[str, object] = {
            "query": [f"{prompt}\n{answer}" for prompt, answer in zip(readable, answers, strict=True)],
            "prompts": list(prompts),
            "responses": answers,
            "ended": [True] * len(answers) if ended is None else list(ended),
        }
        try:
            reply = post_json(self.url, body, timeout=self.timeout)
        except requests.RequestException as error:
            raise TrainingError(
                f"The reward server {self.url} did not answer {ATTEMPTS} times ({type(error).__name__}: {error}); nothing was "
                "updated. Start it, and the same command goes on from the last checkpoint."
            ) from error
        rewards = reply.get("rewards", reply.get("scores")) if isinstance(reply, dict) else None
        if not isinstance(rewards, list) or len(rewards) != len(answers):
            raise TrainingError(
                f"The reward server {self.url} returned {len(rewards) if isinstance(rewards, list) else 'no'} rewards for "
                f"{len(answers)} answers; nothing was updated."
            )
        cut = reply.get("cut", 0)
        if isinstance(cut, int) and cut > 0 and not self.cut:
            warnings.warn(f"The reward server {self.url} cut {cut} of {len(answers)} texts: too long.", stacklevel=2)
        self.cut += cut if isinstance(cut, int) else 0
        return [float("nan") if x is None else float(x) for x in rewards]
