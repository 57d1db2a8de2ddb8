"""Rewards from an HTTP server that speaks OpenRLHF's contract: POST {"query": [...], "prompts": [...]} → {"rewards": [...]}."""

import math
import os
import warnings
from collections.abc import Sequence
from typing import cast

import requests

from rlhf.addresses import hide_secrets, secret_problem, secrets_in, spell_out
from rlhf.data.http import ATTEMPTS, NotJson, post_json
from rlhf.data.rows import Message, Messages, Prompt
from rlhf.errors import TrainingError, UserError
from rlhf.models.text import last_turn, plain

# The environment variable with the token of a server that demands one; `rlhf serve` reads the same.
TOKEN = "RLHF_SERVE_TOKEN"
SHOWN = 300  # characters of what a server says
LARGEST = 3e38  # float32, in which rewards are counted


class RemoteReward:
    """A reward server as a reward function: a whole batch a request, a bounded number of tries, then an error.

    `query` holds prompt and answer in one text and `prompts` the prompts as texts, for servers that read nothing else;
    `messages` (the prompts as they are, conversations whole), `responses` and `ended` are ours. The reply may be
    `{"rewards": [...]}` or, as older servers say, `{"scores": [...]}`; a server that had to cut texts says how many under
    `cut`, which is told once. A server that is busy (429, 503) is asked again after the time that it names. The token in the
    environment variable RLHF_SERVE_TOKEN is sent, if there is one.

    Args:
        url: of the endpoint, e.g. http://host:5000/get_reward; secrets in it are best named by environment variables,
            http://me:${PASSWORD}@host/get_reward?key=${KEY}, and stand in no message.
        timeout: seconds for each try.

    Raises:
        UserError: an environment variable that the address names is empty.
    """

    def __init__(self, url: str, *, timeout: float = 60.0):
        if (problem := secret_problem(url)) is not None:
            raise UserError(problem)
        self.timeout = timeout
        self._address = spell_out(url)
        self.url = self.__name__ = hide_secrets(url)
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
            "prompts": readable,
            "messages": [_sendable(prompt) for prompt in prompts],
            "responses": answers,
            "ended": [True] * len(answers) if ended is None else list(ended),
        }
        try:
            reply = post_json(self._address, body, timeout=self.timeout, headers=_headers())
        except requests.RequestException as error:
            secrets = [*secrets_in(self._address), *filter(None, [os.environ.get(TOKEN)])]
            failure = hide_secrets(_failure(error), secrets)
            # The error's own text names the address.
            raise TrainingError(f"The reward server {self.url} {failure}; nothing was updated.") from None
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
        return [self._number(value) for value in rewards]

    def _number(self, value: object) -> float:
        """Return a reward; NaN for null, which is a number that JSON has no word for."""
        if value is None:
            return math.nan
        if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > LARGEST:
            raise TrainingError(
                f"The reward server {self.url} returned {repr(value)[:SHOWN]} as a reward, which is no number that can be trained "
                "on; nothing was updated."
            )
        return float(value)


def _sendable(prompt: Prompt) -> Prompt:
    """Return a prompt without the empty fields that a table gives all of its messages."""
    if isinstance(prompt, str):
        return prompt
    return [cast(Message, {name: value for name, value in turn.items() if value is not None}) for turn in prompt]


def _headers() -> dict[str, str] | None:
    token = os.environ.get(TOKEN)
    return {"Authorization": f"Bearer {token}"} if token else None


def _failure(error: requests.RequestException) -> str:
    """Say what went wrong with a request, and what to do: the end of a sentence whose subject is the server."""
    if isinstance(error, NotJson):
        return "answered with something that is not JSON; give the address of its /get_reward"
    response = error.response
    if response is None and not isinstance(error, requests.ConnectionError | requests.Timeout):
        return f"can't be asked ({type(error).__name__}: {error}); correct its address"
    if response is None:
        return (
            f"did not answer {ATTEMPTS} times ({type(error).__name__}: {error}). Start it, and the same command goes on from the "
            "last checkpoint"
        )
    try:
        detail = str(response.json()["detail"])
    except (ValueError, KeyError, TypeError):
        detail = response.text
    reason = f"status {response.status_code}: {detail[:SHOWN].strip().rstrip('.')}"
    if response.status_code in (401, 403):
        return f"wants another token ({reason}); set the environment variable {TOKEN}"
    if response.status_code == 429 or response.status_code >= 500:
        return f"did not answer {ATTEMPTS} times ({reason}). The same command goes on from the last checkpoint"
    return f"refuses these answers ({reason})"
