"""One way to ask a server that may be busy: a bounded number of tries, then an error."""

from collections.abc import Mapping
from typing import Any

import requests
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential

ATTEMPTS, FIRST_WAIT, LONGEST_WAIT = 5, 0.5, 30.0


class ServerBusy(requests.RequestException):
    """A status that may be another one in a moment."""


def post_json(url: str, body: Mapping[str, Any], *, timeout: float, headers: Mapping[str, str] | None = None) -> Any:
    """The reply to a POST, both as JSON; tried again where the server was away, slow or busy (429, 5xx).

    Args:
        timeout: seconds for each try.

    Raises:
        requests.RequestException: no reply after all tries, or the server refuses.
    """
    tries = Retrying(
        retry=retry_if_exception_type((requests.ConnectionError, requests.Timeout, ServerBusy)),
        stop=stop_after_attempt(ATTEMPTS),
        wait=wait_exponential(FIRST_WAIT, max=LONGEST_WAIT),
        reraise=True,
    )

    def post() -> Any:
        response = requests.post(url, json=body, headers=headers, timeout=timeout)
        if response.status_code >= 500 or response.status_code == 429:
            raise ServerBusy(f"status {response.status_code}")
        response.raise_for_status()
        return response.json()

    return tries(post)
