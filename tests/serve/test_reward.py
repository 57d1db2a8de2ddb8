"""The reward server and PPO's client for it, over a real socket: the same numbers as the model itself."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
import uvicorn

from rlhf import load_reward_model
from rlhf.ppo.remote import RemoteReward
from rlhf.serve.reward import reward_app
from tests.conftest import PROMPTS

ANSWERS = ["yes", "no no", "apple pear plum", "please"]


@pytest.fixture(scope="module")
def address(reward_folder: Path) -> Iterator[str]:
    app = reward_app(load_reward_model(reward_folder), "test")
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()


def test_scores_over_http_are_the_models_own(address: str, reward_folder: Path) -> None:
    expected = load_reward_model(reward_folder).score(PROMPTS[:4], ANSWERS).tolist()
    assert RemoteReward(f"{address}/get_reward")(PROMPTS[:4], ANSWERS) == pytest.approx(expected, abs=1e-6)
    texts = [prompt[0]["content"] for prompt in PROMPTS[:4]]
    query = [f"{prompt}{answer}" for prompt, answer in zip(texts, ANSWERS, strict=True)]
    reply = requests.post(f"{address}/get_reward", json={"query": query, "prompts": texts}, timeout=10).json()
    assert reply["rewards"] == pytest.approx(expected, abs=1e-6), "as OpenRLHF's clients ask"
    whole = requests.post(
        f"{address}/get_reward", json={"prompts": PROMPTS[:4], "responses": ANSWERS}, timeout=10
    ).json()
    assert whole["rewards"] == pytest.approx(expected, abs=1e-6), "conversations"
    assert requests.get(f"{address}/health", timeout=10).json()["model"] == "test"


def test_requests_that_make_no_sense_get_a_sentence(address: str) -> None:
    for body, said in (
        ({"prompts": ["a", "b"], "responses": ["x"]}, "2 prompts and 1 answers"),
        ({"prompts": ["a"], "query": ["b x"]}, "query 0 does not begin with its prompt"),
        ({"prompts": ["a", "b"], "query": ["a x"]}, "2 prompts and 1 answers"),
    ):
        reply = requests.post(f"{address}/get_reward", json=body, timeout=10)
        assert reply.status_code == 422
        assert said in reply.json()["detail"]
    assert (
        requests.post(f"{address}/get_reward", json={"prompts": [], "responses": []}, timeout=10).json()["rewards"]
        == []
    )
