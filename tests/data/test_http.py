"""Posting: what is tried again, how often, after which pauses, and what is not."""

from collections.abc import Callable
from typing import Any

import pytest
import requests

from rlhf.data import http
from rlhf.data.http import NotJson, ServerBusy, post_json


class Reply(requests.Response):
    """A reply of the server."""

    def __init__(self, status: int, text: str = "{}", headers: dict[str, str] | None = None):
        super().__init__()
        self.status_code, self._content = status, text.encode()
        self.headers.update(headers or {})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[list[dict[str, Any]], list[float]]]:
    """Returns what a server that answers so, the last answer for ever, was sent, and the pauses between, which take no time."""

    def answers(*replies: Reply | Exception) -> tuple[list[dict[str, Any]], list[float]]:
        sent: list[dict[str, Any]] = []
        pauses: list[float] = []

        def post(url: str, **arguments: Any) -> Reply:
            sent.append({"url": url, **arguments})
            reply = replies[min(len(sent), len(replies)) - 1]
            if isinstance(reply, Exception):
                raise reply
            return reply

        monkeypatch.setattr(requests, "post", post)
        monkeypatch.setattr("tenacity.nap.time.sleep", pauses.append)
        return sent, pauses

    return answers


def test_what_is_sent_and_returned(server: Any) -> None:
    sent, pauses = server(Reply(200, '{"rewards": [1, 2.5]}'))
    assert post_json("http://x", {"a": 1}, timeout=7, headers={"b": "c"}) == {"rewards": [1, 2.5]}
    assert sent == [{"url": "http://x", "json": {"a": 1}, "headers": {"b": "c"}, "timeout": 7}]
    assert pauses == []


@pytest.mark.parametrize("status", [429, 500, 502, 503, 599])
def test_a_busy_server_is_asked_five_times_with_longer_and_longer_pauses(server: Any, status: int) -> None:
    sent, pauses = server(Reply(status))
    with pytest.raises(ServerBusy, match=str(status)):
        post_json("http://x", {}, timeout=1)
    assert len(sent) == 5
    assert pauses == [0.5, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("error", [requests.ConnectionError("away"), requests.Timeout("slow")])
def test_a_server_that_comes_back_is_heard(server: Any, error: Exception) -> None:
    sent, _ = server(error, error, Reply(200, "[3]"))
    assert post_json("http://x", {}, timeout=1) == [3]
    assert len(sent) == 3
    server(error)
    with pytest.raises(type(error)):
        post_json("http://x", {}, timeout=1)


@pytest.mark.parametrize("status", [400, 401, 404, 428, 430, 499])
def test_a_refusal_is_final(server: Any, status: int) -> None:
    sent, _ = server(Reply(status))
    with pytest.raises(requests.HTTPError):
        post_json("http://x", {}, timeout=1)
    assert len(sent) == 1


@pytest.mark.parametrize("text", ["<html>", "", "[" * 100_000])
def test_what_is_not_json_is_not_asked_for_again(server: Any, text: str) -> None:
    sent, _ = server(Reply(200, text))
    with pytest.raises(NotJson):
        post_json("http://x", {}, timeout=1)
    assert len(sent) == 1


@pytest.mark.parametrize(
    ("header", "pause"),
    [("3", 3.0), ("0", 0.5), ("30", 30.0), ("31", 30.0), ("86400", 30.0), ("-3", 0.5), ("²", 0.5), ("soon", 0.5)],
)
def test_a_server_may_ask_for_a_pause_of_half_a_minute_and_no_more(server: Any, header: str, pause: float) -> None:
    _, pauses = server(Reply(503, headers={"Retry-After": header}), Reply(200))
    post_json("http://x", {}, timeout=1)
    assert pauses == [pause]


def test_pauses_end_growing_at_half_a_minute(server: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "ATTEMPTS", 9)
    _, pauses = server(Reply(503))
    with pytest.raises(ServerBusy):
        post_json("http://x", {}, timeout=1)
    assert pauses == [0.5, 1, 2, 4, 8, 16, 30, 30]
