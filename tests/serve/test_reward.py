"""The reward server and PPO's client for it, over a real socket: the same numbers as the model itself."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
import uvicorn

from rlhf import load_reward_model
from rlhf.models.generate import Completions
from rlhf.ppo.remote import RemoteReward
from rlhf.ppo.rewards import RewardSource
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


SYSTEM: list[Any] = [
    [{"role": "system", "content": "please"}, {"role": "user", "content": "name"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "list"}],
    [{"role": "user", "content": "list"}],
]


def test_a_folder_and_its_server_are_one_reward(address: str, reward_folder: Path) -> None:
    """System turns, several turns, answers that were cut off: as a source of PPO, both ways."""
    ones, ended = torch.ones(3, 1, dtype=torch.long), torch.tensor([True, True, False])
    answers = Completions(ones, ones, ones, ones, ended, ["green apple"] * 3)
    folder, server = (
        RewardSource(source)(SYSTEM, answers, {})[0] for source in (str(reward_folder), f"{address}/get_reward")
    )
    torch.testing.assert_close(folder, server, atol=1e-6, rtol=0)
    assert folder.unique().numel() == 3


@pytest.mark.parametrize("tail", ["<end>", "", "<end><pad><pad>", "<end>\n"])
@pytest.mark.parametrize("with_prompts", [True, False])
def test_a_text_that_a_template_rendered_is_scored_as_it_is(
    address: str, reward_folder: Path, tail: str, with_prompts: bool
) -> None:
    """OpenRLHF with --apply_chat_template: no second template, and the end token once, whatever the query ends in."""
    reward = load_reward_model(reward_folder)
    expected = reward.score(SYSTEM, ANSWERS[:3]).tolist()
    tail = tail.replace("<end>", reward.tokenizer.eos_token).replace("<pad>", reward.tokenizer.pad_token)
    prompts = [
        reward.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True) for prompt in SYSTEM
    ]
    body: dict[str, Any] = {"query": [p + a + tail for p, a in zip(prompts, ANSWERS, strict=False)], "labels": [""] * 3}
    if with_prompts:
        body["prompts"] = prompts
    reply = requests.post(f"{address}/get_reward", json=body, timeout=10).json()
    assert reply["rewards"] == pytest.approx(expected, abs=1e-6)
    cut = requests.post(f"{address}/get_reward", json={**body, "ended": [False] * 3}, timeout=10).json()
    assert cut["rewards"] == pytest.approx(reward.score(SYSTEM, ANSWERS[:3], ended=[False] * 3).tolist(), abs=1e-6)


def test_a_text_that_is_too_long_is_said(address: str) -> None:
    remote = RemoteReward(f"{address}/get_reward")
    with pytest.warns(UserWarning, match="cut 1 of 2 texts: too long"):
        remote(["apple " * 400, "apple"], ["yes", "no"])
    body = {"prompts": ["apple " * 400, "apple"], "responses": ["yes", "no"]}
    assert requests.post(f"{address}/get_reward", json=body, timeout=10).json()["cut"] == 1


def test_requests_that_make_no_sense_get_a_sentence(address: str) -> None:
    for body, said in (
        ({"prompts": ["a", "b"], "responses": ["x"]}, "2 prompts and 1 answers"),
        ({"prompts": ["a"], "query": ["b x"]}, "query 0 does not begin with its prompt"),
        ({"prompts": ["a", "b"], "query": ["a x"]}, "2 prompts and 1 answers"),
        ({"prompts": ["a"], "responses": ["x"], "ended": [True, False]}, "1 answers and 2 values of `ended`"),
        ({"prompts": ["a"]}, "send `prompts` and `responses`, or `query`"),
        ({"responses": ["a"]}, "send `prompts` and `responses`, or `query`"),
    ):
        reply = requests.post(f"{address}/get_reward", json=body, timeout=10)
        assert reply.status_code == 422
        assert said in reply.json()["detail"]
    assert (
        requests.post(f"{address}/get_reward", json={"prompts": [], "responses": []}, timeout=10).json()["rewards"]
        == []
    )
