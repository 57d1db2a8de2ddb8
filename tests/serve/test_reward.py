"""The reward server and PPO's client for it, over a real socket: the same numbers as the model itself."""

import signal
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import requests
import torch

from rlhf import load_reward_model
from rlhf.errors import TrainingError, UserError
from rlhf.models.generate import Completions
from rlhf.ppo.remote import RemoteReward
from rlhf.ppo.rewards import RewardSource
from rlhf.serve.models import ServedModel
from rlhf.serve.reward import Limits, serve_app
from rlhf.serve.run import read_token, serve_models
from tests.command import Process, wait_for
from tests.conftest import PROMPTS
from tests.serve.running import running

ANSWERS = ["yes", "no no", "apple pear plum", "please"]


@pytest.fixture(scope="module")
def address(reward_folder: Path) -> Iterator[str]:
    models = [ServedModel(name, [load_reward_model(reward_folder)]) for name in ("test", "other")]
    models[1].members[0].model.score.weight.data *= -1
    with running(serve_app(models, limits=Limits(body_bytes=2**20))) as url:
        yield url


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


@pytest.mark.fault("requests without sense", "garbage and load")
def test_requests_that_make_no_sense_get_a_sentence(address: str) -> None:
    for body, said in (
        ({"prompts": ["a", "b"], "responses": ["x"]}, "2 prompts and 1 answers"),
        ({"prompts": ["a"], "query": ["b x"]}, "query 0 does not begin with its prompt"),
        ({"prompts": ["a", "b"], "query": ["a x"]}, "2 prompts and 1 answers"),
        ({"prompts": ["a"], "responses": ["x"], "ended": [True, False]}, "1 answers and 2 values of `ended`"),
        ({"prompts": ["a"]}, "send `prompts` and `responses`, or `query`"),
        ({"responses": ["a"]}, "send `prompts` and `responses`, or `query`"),
        (
            {"prompts": ["a"], "responses": ["x"], "is_ended": [False]},
            "unknown field `is_ended`; did you mean `ended`?",
        ),
    ):
        reply = requests.post(f"{address}/get_reward", json=body, timeout=10)
        assert reply.status_code == 422
        assert said in reply.json()["detail"]
    assert (
        requests.post(f"{address}/get_reward", json={"prompts": [], "responses": []}, timeout=10).json()["rewards"]
        == []
    )


def ask(url: str, body: Any, **options: Any) -> requests.Response:
    return requests.post(url, json=body, timeout=20, **options)


@pytest.mark.fault("one score everywhere")
def test_every_endpoint_gives_the_models_own_score(address: str, reward_folder: Path) -> None:
    reward = load_reward_model(reward_folder)
    expected = reward.score([PROMPTS[0]] * 4, ANSWERS)
    whole = [[*PROMPTS[0], {"role": "assistant", "content": answer}] for answer in ANSWERS]
    rendered = [reward.tokenizer.apply_chat_template(turns, tokenize=False) for turns in whole]
    ids = [reward.tokenizer(text, add_special_tokens=False)["input_ids"] for text in rendered]

    pairs = ask(f"{address}/score", {"prompts": [PROMPTS[0]] * 4, "responses": ANSWERS}).json()
    assert pairs["scores"] == pytest.approx(expected.tolist(), abs=1e-6)
    assert (pairs["model"], pairs["cut"], pairs["tokens"]) == ("test", 0, sum(map(len, ids)))
    conversations = ask(f"{address}/score", {"messages": whole}).json()
    assert conversations["scores"] == pytest.approx(expected.tolist(), abs=1e-6)
    ranking = ask(f"{address}/rank", {"prompt": PROMPTS[0], "responses": ANSWERS}).json()
    assert ranking["order"] == np.argsort(-expected.numpy(), kind="stable").tolist()
    assert ranking["scores"] == pytest.approx(expected.tolist(), abs=1e-6)
    for form in (rendered, ids):
        reply = ask(f"{address}/classify", {"model": "test", "input": form, "user": "x"}).json()
        assert [entry["probs"] for entry in reply["data"]] == [[pytest.approx(x, abs=1e-6)] for x in expected.tolist()]
    chat = ask(f"{address}/classify", {"messages": whole[0]}).json()
    assert chat["data"] == [
        {"index": 0, "label": "reward", "probs": [pytest.approx(expected[0].item(), abs=1e-6)], "num_classes": 1}
    ]
    assert chat["object"] == "list"
    assert chat["id"].startswith("classify-")
    assert set(chat) == {"id", "object", "created", "model", "data", "usage"}, "vLLM's ClassificationResponse"
    assert chat["usage"] == {
        "prompt_tokens": len(ids[0]),
        "total_tokens": len(ids[0]),
        "completion_tokens": 0,
        "prompt_tokens_details": None,
    }


def test_wishes_that_would_change_a_score_are_refused(address: str) -> None:
    """What OpenRLHF's clients send beside their queries is none."""
    for wish in ({"chat_template_kwargs": {"enable_thinking": False}}, {"softmax": True}, {"normalize": True}):
        reply = ask(f"{address}/classify", {"input": "x", **wish})
        assert (reply.status_code, next(iter(wish)) in reply.text) == (422, True)
    reply = ask(f"{address}/classify", {"input": "x", "activations": True})
    assert (reply.status_code, "did you mean `activation`?" in reply.text) == (422, True)
    assert ask(f"{address}/classify", {"input": "x", "add_special_tokens": False, "priority": 0}).status_code == 200
    body = {"prompts": ["a"], "query": ["a x"], "labels": ["b"], "images": [None]}
    assert ask(f"{address}/get_reward", body).status_code == 200


def test_a_request_names_its_model(address: str) -> None:
    body = {"prompts": ["a"], "responses": ["b"]}
    (first,), (second,) = (ask(f"{address}/score?model={name}", body).json()["scores"] for name in ("test", "other"))
    assert second == pytest.approx(-first, abs=1e-6), "its head was negated"
    assert ask(f"{address}/score", {**body, "model": "other"}).json()["scores"] == [second]
    assert ask(f"{address}/score?model=test", {**body, "model": "other"}).status_code == 422
    unknown = ask(f"{address}/score?model=third", body)
    assert (unknown.status_code, unknown.json()["detail"]) == (404, "no such model here; there is test, other.")
    assert [entry["id"] for entry in requests.get(f"{address}/models", timeout=10).json()["data"]] == ["test", "other"]


CHAT = {"role": "user", "content": "a"}
BAD: list[tuple[str, str]] = [
    ('{"prompts": ["\\ud800"], "responses": ["x"]}', "unable to parse raw data as a unicode string"),
    ('{"prompts": [[{"role": "user"}]], "responses": ["x"]}', "content: Field required"),
    ('{"prompts": [[{"role": "evil", "content": "x"}]], "responses": ["x"]}', "'system', 'user' or 'assistant'"),
    ('{"prompts": [[]], "responses": ["x"]}', "at least 1 item"),
    ('{"messages": [[{"role": "user", "content": "x"}]]}', "must end with an assistant's answer"),
    ('{"prompts": [NaN], "responses": ["x"]}', "should be a valid list"),
    ('{"prompts": ["x"], "responses": [Infinity]}', "should be a valid string"),
    ('{"prompts": ["x"], "respones": ["x"]}', "Extra inputs are not permitted"),
    ('{"prompts": ["x"], "responses": ["x"], "ended": ["yes"]}', "valid boolean"),
    ('{"prompts": "x', "not valid JSON"),
    ("[1, 2]", "send a JSON object"),
    (f'{{"prompts": ["{"x" * 200_001}"], "responses": ["x"]}}', "at most 200000 characters"),
    (f'{{"responses": ["x"], "prompts": [{"1," * 40_000}1]}}', "at most 32768 items"),
]


@pytest.mark.fault("requests without sense", "NaN in a body")
@pytest.mark.parametrize(("body", "sentence"), BAD, ids=[sentence for _, sentence in BAD])
def test_bad_content_gets_a_sentence(address: str, body: str, sentence: str) -> None:
    headers = {"Content-Type": "application/json", "X-Request-ID": "mine-1"}
    reply = requests.post(f"{address}/score", data=body.encode(), headers=headers, timeout=20)
    assert reply.status_code == 422
    assert sentence in reply.json()["detail"] or sentence == "should be a valid list"
    assert len(reply.content) < 1000, "what was sent is not sent back"
    assert reply.json()["request_id"] == reply.headers["X-Request-ID"] == "mine-1"


@pytest.mark.fault("requests without sense")
def test_bodies_that_are_no_text_or_too_large(address: str) -> None:
    headers = {"Content-Type": "application/json"}
    for body in (b"\xff\xfe{", b"[" * 100_000):
        assert requests.post(f"{address}/score", data=body, headers=headers, timeout=20).status_code == 400
    for large in (b"x" * 3_000_000, iter([b"x" * 100_000] * 30)):  # with its length in the header, and without
        reply = requests.post(f"{address}/score", data=large, headers=headers, timeout=20)
        assert reply.status_code == 413
        assert "more than 1048576 bytes" in reply.json()["detail"]
    assert requests.get(f"{address}/health", timeout=10).json()["status"] == "ok"


@pytest.mark.fault("requests without sense")
def test_a_token_is_demanded(reward_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    app = serve_app([ServedModel("test", [load_reward_model(reward_folder)])], token="secret")
    with running(app) as url:
        remote = RemoteReward(f"{url}/get_reward")
        monkeypatch.delenv("RLHF_SERVE_TOKEN", raising=False)
        with pytest.raises(TrainingError, match=r"wants another token .*401.* set the environment variable RLHF_SERVE"):
            remote(["a"], ["b"])
        monkeypatch.setenv("RLHF_SERVE_TOKEN", "secret")
        assert len(remote(["a"], ["b"])) == 1
        for header in ("Bearer wrong", "Basic secret", "Bearer sécret", ""):
            refused = requests.get(f"{url}/models", headers={"Authorization": header.encode()}, timeout=10)
            assert refused.status_code == 401
            assert "token" in refused.json()["detail"]
        assert requests.get(f"{url}/health", timeout=10).json()["model"] is None, "it works; of what is not said"
        trusted = requests.get(f"{url}/health", headers={"Authorization": "Bearer secret"}, timeout=10).json()
        assert trusted["model"] == "test"


def test_ppo_says_why_a_server_refuses(address: str) -> None:
    with pytest.raises(TrainingError, match=r"refuses these answers .*422.*'system', 'user' or 'assistant'"):
        RemoteReward(f"{address}/get_reward")([[{"role": "evil", "content": "a"}]], ["b"])


@pytest.mark.fault("requests without sense", "slow bodies")
def test_clients_that_leave_and_requests_that_take_too_long(reward_folder: Path) -> None:
    served = ServedModel("test", [load_reward_model(reward_folder)])
    may_go, original = threading.Event(), served.score
    served.score = lambda *arguments: (may_go.wait(20), original(*arguments))[1]  # type: ignore[method-assign]
    with running(serve_app([served], limits=Limits(seconds=0.3, waiting_texts=4))) as url:
        late = ask(f"{url}/score", {"prompts": ["a"], "responses": ["b"]})
        assert (late.status_code, late.headers["Retry-After"]) == (504, "5")
        host, _, port = url.removeprefix("http://").partition(":")
        body = b'{"prompts": ["a", "b", "c"], "responses": ["d", "e", "f"]}'
        head = (
            f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        with socket.create_connection((host, int(port))) as connection:
            connection.sendall(head.encode() + body)
            wait_for(lambda: 'queue_texts{model="test"} 3.0' in requests.get(f"{url}/metrics", timeout=10).text)
            busy = ask(f"{url}/score", {"prompts": ["a"] * 2, "responses": ["b"] * 2})
            assert (busy.status_code, busy.headers["Retry-After"]) == (429, "1")
        wait_for(lambda: 'queue_texts{model="test"} 0.0' in requests.get(f"{url}/metrics", timeout=10).text)
        may_go.set()
        assert ask(f"{url}/score", {"prompts": ["a"], "responses": ["b"]}).status_code == 200
        metrics = requests.get(f"{url}/metrics", timeout=10).text
        for line in (
            'rlhf_requests_total{endpoint="/score",status="504"} 1.0',
            'rlhf_requests_total{endpoint="/score",status="429"} 1.0',
            'rlhf_requests_total{endpoint="/score",status="499"} 1.0',
            'rlhf_errors_total{reason="429"} 1.0',
            'rlhf_queue_texts{model="test"} 0.0',
        ):
            assert line in metrics


@pytest.mark.fault("signals", "garbage and load")
def test_the_command_answers_what_it_has_taken_on_and_ends(reward_folder: Path, tmp_path: Path) -> None:
    process = Process(("serve", f"small={reward_folder}", "--port", "0"), tmp_path)
    output = Path(process._streams[0].name)
    wait_for(lambda: "\n" in output.read_text(), process)
    url = output.read_text().split("/get_reward")[0]
    count, replies = 3000, []
    body = {"prompts": ["apple pear"] * count, "responses": ["plum"] * count}
    asking = threading.Thread(target=lambda: replies.append(ask(f"{url}/score", body)))
    asking.start()
    wait_for(lambda: " 0.0" not in _queue(url), process, seconds=20)
    process.send_signal(signal.SIGTERM)
    result = process.wait()
    asking.join()
    assert (result.returncode, len(replies[0].json()["scores"])) == (143, count)
    assert "SIGTERM: the server has stopped; requests that it had taken on were answered first." in result.stderr
    assert "apple" not in result.stdout + result.stderr
    assert "checkpoint" not in result.stderr


def _queue(url: str) -> str:
    lines = requests.get(f"{url}/metrics", timeout=10).text.splitlines()
    return next(line for line in lines if line.startswith("rlhf_queue_texts{"))


@pytest.mark.parametrize(
    ("content", "says"), [(None, "No such file"), (b" \n", "empty, so everybody"), (b"\xff", "can't be read")]
)
def test_a_token_in_a_file(tmp_path: Path, content: bytes | None, says: str) -> None:
    file = tmp_path / "token"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(UserError, match=says):
        read_token(file)
    file.write_bytes(b" secret\n")
    assert read_token(file) == "secret"


def test_what_is_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    def serve(host: str, port: int, *names: str) -> None:
        serve_models(names or ("nothing",), host=host, port=port, token=None, limits=Limits(), say=print)

    with pytest.raises(UserError, match="a token is needed; set RLHF_SERVE_TOKEN"):
        serve("0.0.0.0", 0)
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="in use; choose others"):
        serve("127.0.0.1", taken.getsockname()[1])
    with pytest.raises(UserError, match="several models are called a; give them names"):
        serve("127.0.0.1", 0, "a", "a=b")
