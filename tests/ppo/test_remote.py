"""A reward server that PPO asks: whole batches, second chances, and what stops a run before the update."""

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlhf import load_reward_model
from rlhf.data import http
from rlhf.errors import TrainingError
from rlhf.ppo.rewards import RewardSource
from tests.conftest import PROMPTS
from tests.ppo.test_options import TWO
from tests.ppo.test_ppo import make


class Server(BaseHTTPRequestHandler):
    failures: ClassVar[int] = 0
    short: ClassVar[bool] = False
    seen: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        type(self).seen.append(body)
        if type(self).failures > 0:
            type(self).failures -= 1
            self.send_response(503)
            self.end_headers()
            return
        rewards = [float(len(text)) for text in body["query"]][: 1 if self.short else None]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"rewards": rewards}).encode())

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    monkeypatch.setattr(http, "LONGEST_WAIT", 0.01)
    Server.failures, Server.short, Server.seen = 0, False, []
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/get_reward"
    server.shutdown()
    thread.join()


@pytest.mark.fault("reward server fails")
def test_a_reward_server_gets_whole_batches_and_second_chances(url: str) -> None:
    Server.failures = 2
    scores, _ = RewardSource(url)(PROMPTS[:2], TWO, {})
    query = [f"{prompt[0]['content']}\n{text}" for prompt, text in zip(PROMPTS[:2], TWO.texts, strict=True)]
    assert scores.tolist() == [float(len(text)) for text in query]
    assert [body["query"] for body in Server.seen] == [query] * 3, "the whole batch each time"
    assert Server.seen[0]["responses"] == TWO.texts
    assert Server.seen[0]["prompts"] == [prompt[0]["content"] for prompt in PROMPTS[:2]]
    assert Server.seen[0]["messages"] == PROMPTS[:2]
    assert Server.seen[0]["ended"] == TWO.ended.tolist()


@pytest.mark.fault("reward server fails")
def test_a_reward_server_that_is_down_or_counts_wrong_stops_before_the_update(
    url: str, base_folder: Path, reward_folder: Path, cpu_arguments: dict[str, Any]
) -> None:
    Server.short = True
    with pytest.raises(TrainingError, match="returned 1 rewards for 2 answers; nothing was updated"):
        RewardSource(url)(PROMPTS[:2], TWO, {})
    Server.short, Server.failures = False, 99
    trainer, _ = make(base_folder, [load_reward_model(reward_folder), url], cpu_arguments)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with pytest.raises(TrainingError, match=r"did not answer 5 times .*503.*goes on from the last checkpoint"):
        trainer.train()
    assert len(Server.seen) == 1 + 5
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())
