"""Requests to a server that may be busy: a bounded number of tries, then an error."""

from collections.abc import Mapping
from typing import Any

import requests
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 0.5, 30.0


class NotJson(requests.RequestException):
    """The server answered with something that is not JSON, or is too deep, or holds a number of too many digits."""


class ServerBusy(requests.RequestException):
    """The server answered with a status that may be another one in a moment (429, 5xx).

    `pause` is for how many seconds it asks to be left alone (its header Retry-After), 0 if it says nothing.
    """

    def __init__(self, response: requests.Response):
        pause = response.headers.get("Retry-After", "")
        self.pause = float(pause) if pause.isascii() and pause.isdecimal() else 0.0
        super().__init__(f"status {response.status_code}", response=response)


def post_json(url: str, body: Mapping[str, object], *, timeout: float, headers: Mapping[str, str] | None = None) -> Any:
    """Send a POST and return its reply, both as JSON; try again where the server was away, slow or busy (429, 5xx).

    Args:
        timeout: seconds for each try.

    Raises:
        requests.RequestException: no reply after all tries, the server refuses, or its reply is not JSON (`NotJson`).
    """
    tries = Retrying(
        retry=retry_if_exception_type((requests.ConnectionError, requests.Timeout, ServerBusy)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=_pause,
        reraise=True,
    )

    def post() -> Any:
        response = requests.post(url, json=body, headers=headers, timeout=timeout)
        if response.status_code >= 500 or response.status_code == 429:
            raise ServerBusy(response)
        response.raise_for_status()
        try:
            return response.json()
        except (ValueError, RecursionError) as error:
            raise NotJson(type(error).__name__, response=response) from error

    return tries(post)


def _pause(state: RetryCallState) -> float:
    """Return the seconds before the next try: more each time, or as many as the server asks for, at most `LONGEST_WAIT`."""
    error = state.outcome.exception() if state.outcome is not None else None
    asked = error.pause if isinstance(error, ServerBusy) else 0.0
    return min(max(wait_exponential(FIRST_WAIT)(state), asked), LONGEST_WAIT)
