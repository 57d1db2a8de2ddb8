"""Rewards from an HTTP server that speaks OpenRLHF's contract: POST {"query": [...], "prompts": [...]} → {"rewards": [...]}."""

from collections.abc import Sequence
from typing import Any

import requests
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

from rlhf.errors import TrainingError
from rlhf.models.text import Prompt, plain

ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 4, 0.5, 8.0


class RemoteReward:
    """A reward server as a reward function: a whole batch a request, a bounded number of tries, then an error.

    `query` holds prompt and answer in one text, `prompts` and `responses` (ours) each alone. The reply may be
    `{"rewards": [...]}` or, as older servers say, `{"scores": [...]}`.

    Args:
        url: of the endpoint, e.g. http://host:5000/get_reward.
        timeout: seconds for each try.
    """

    def __init__(self, url: str, *, timeout: float = 60.0):
        self.url, self.timeout = url, timeout
        self.__name__ = url

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **_: Any) -> list[float]:
        """One number an answer.

        Raises:
            TrainingError: nobody answers, the server refuses, or the reply is not one number an answer.
        """
        answers = [x if isinstance(x, str) else x[-1]["content"] for x in completions]
        readable = [plain(prompt) for prompt in prompts]
        body: dict[str, Any] = {
            "query": [f"{p}\n{a}" for p, a in zip(readable, answers, strict=True)],
            "prompts": readable,
        }
        body["responses"] = answers
        tries = Retrying(
            retry=retry_if_exception_type((requests.ConnectionError, requests.Timeout, _ServerBusy)),
            stop=stop_after_attempt(ATTEMPTS),
            wait=wait_exponential(FIRST_WAIT, max=LONGEST_WAIT),
            reraise=True,
        )
        try:
            reply = tries(self._post, body)
        except (requests.RequestException, _ServerBusy) as error:
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
        return [float("nan") if x is None else float(x) for x in rewards]

    def _post(self, body: dict[str, Any]) -> Any:
        response = requests.post(self.url, json=body, timeout=self.timeout)
        if response.status_code >= 500 or response.status_code == 429:
            raise _ServerBusy(f"status {response.status_code}")
        response.raise_for_status()
        return response.json()


class _ServerBusy(Exception):
    """A status that may be another one in a moment."""
