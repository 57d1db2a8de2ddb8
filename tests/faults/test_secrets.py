"""Canaries: secrets that a run is given stand in no file that it writes and in no line that it prints, whatever verb."""

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf.addresses import hide_secrets, secret_problem, secrets_in, spell_out
from rlhf.data import http
from rlhf.data.labelbook import BOOK
from rlhf.recipe import load_recipe
from tests.faults.here import Outcome, rlhf

VARIABLES = {
    name: f"canary-{name.lower().replace('_', '-')}"
    for name in ("HF_TOKEN", "WANDB_API_KEY", "JUDGE_KEY", "RLHF_SERVE_TOKEN", "RLHF_TOKEN", "REWARD_PASSWORD", "REWARD_KEY")
}  # fmt: skip
IN_CLEAR = ("canary-in-clear-1", "canary%20in%20clear-2", "canary-in-clear-3", "canary-in-clear-4")
RECIPE = """
name: canaries
lab: {demonstrations: 100, pairs: 100, test_pairs: 50, hidden_size: 32, num_hidden_layers: 1}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 32, num_train_epochs: 1, save_strategy: "no"}
reward: {learning_rate: 1.0e-3, per_device_train_batch_size: 16, num_train_epochs: 1, save_strategy: "no"}
ppo: {total_episodes: 16, per_device_train_batch_size: 8, num_mini_batches: 1, num_ppo_epochs: 1, max_completion_length: 8}
evaluate: {prompts: 8}
rounds: {count: 2, labels_from: judge, judge_model: j, judge_key: JUDGE_KEY, prompts: 8, responses: 2, labels: 4}
"""


class Server(BaseHTTPRequestHandler):
    """A reward server and a judge; repeats what it was sent where it refuses."""

    paths: ClassVar[set[str]] = set()
    logins: ClassVar[set[str]] = set()
    refuses: ClassVar[bool] = False

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        login = self.headers.get("Authorization", "")
        self.paths.add(self.path)
        self.logins.add(login)
        self.send_response(400 if self.refuses else 200)
        self.end_headers()
        if self.refuses:
            reply: dict[str, Any] = {"detail": f"{self.path} {login}"}
        elif "messages" in body and "model" in body:
            reply = {"choices": [{"message": {"content": "[[A]]"}}]}
        else:
            reply = {"rewards": [float(len(text) % 7) for text in body["query"]]}
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[HTTPServer]:
    for name, value in VARIABLES.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    monkeypatch.setattr("uvicorn.Server.run", lambda *_, **__: None)
    monkeypatch.setattr("uvicorn.run", lambda *_, **__: None)
    Server.refuses = False
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()


def require_none(place: Path, outcomes: list[Outcome]) -> None:
    """No canary in any file below a folder, nor in what was printed."""
    canaries = [text.encode() for text in (*VARIABLES.values(), *IN_CLEAR, IN_CLEAR[1].replace("%20", " "))]
    files = {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
    printed = {f"output {i}": (x.stdout + x.stderr).encode() for i, x in enumerate(outcomes)}
    leaks = [
        f"{name}: {canary.decode()}"
        for name, text in {**files, **printed}.items()
        for canary in canaries
        if canary in text
    ]
    assert leaks == []


@pytest.mark.slow
@pytest.mark.fault("passwords in addresses", "secrets in the environment")
def test_no_canary_is_in_any_file_or_line_of_a_whole_run_with_every_verb(
    tmp_path: Path, server: HTTPServer, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "r.yaml").write_text(RECIPE, encoding="utf-8")
    host = f"127.0.0.1:{server.server_port}"
    overrides = [
        f"ppo.extra_rewards=['http://me:{IN_CLEAR[0]}@{host}/a?key={IN_CLEAR[1]}&model=m', "
        f"'http://me:${{REWARD_PASSWORD}}@{host}/b?token=${{REWARD_KEY}}']",
        f"rounds.judge_url=http://{IN_CLEAR[2]}@{host}/v1?api_key={IN_CLEAR[3]}",
    ]
    place = tmp_path / "place"
    place.mkdir()
    outcomes: dict[str, list[Outcome]] = {}

    def call(*arguments: str, code: int | None = 0, stdin: str = "") -> Outcome:
        outcome = rlhf(*arguments, cwd=place, capsys=capsys, stdin=stdin)
        assert code is None or outcome.code == code, outcome.stderr[-3000:]
        outcomes.setdefault(arguments[0], []).append(outcome)
        return outcome

    # 1. A run of two rounds, and what is asked of its recipe.
    recipe, reward, pairs = "../r.yaml", "x/round-1/reward/model", "../pairs.jsonl"
    rows = [{"prompt": f"List {i} fruits.", "chosen": "apple and pear", "rejected": "no"} for i in range(20)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    assert "http://me:***@" in call("check", recipe, *overrides, "--show").stdout
    call("plan", recipe, *overrides)
    for stage in ("sft", "vote", "reward", "ppo", "run"):
        call(stage, recipe, *overrides, "--out", "x", code=2 if stage == "vote" else 0)
    call("doctor", recipe, *overrides, code=None)

    # 2. What is done with its folder and its models.
    call("report", "x")
    call("lineage", "x")
    call("clean", "x", "--yes")
    call("data", pairs)
    call("score", reward, stdin=json.dumps({"prompt": "a", "response": "b"}) + "\n")
    call("evaluate", reward, pairs, "--out", "e.json")
    call("export", "x/round-1/ppo/model", "exported")
    call("certify", reward, "--out", "certificate.json")
    call("serve", reward, "--port", "0", "--token", VARIABLES["RLHF_SERVE_TOKEN"])
    call(
        "verify",
        f"http://me:{IN_CLEAR[0]}@{host}?key={IN_CLEAR[1]}",
        "--against",
        reward,
        "--json",
        "v.json",
        code=None,
    )
    call("audit", pairs, "--model", "x/round-0/sft/model", "--out", "audit", "--members", "2", code=None)
    call("blame", "x", "--feature", "length", "--out", "blamed")
    (place / "judged.jsonl").write_text("".join(f'{{"judge": 0.{i}, "label": 0.{9 - i}}}\n' for i in range(1, 9)))
    call("verdict", "judged.jsonl", "--out", "verdict.json")
    call("label", "x", "--status")

    # 3. What fails: a server that repeats what it was sent, one that is gone, a mistake in an override, a masked recipe.
    for name, stage in (("refuses", "round-1/ppo"), ("judges", "round-2/label"), ("gone", "round-1/ppo")):
        shutil.copytree(place / "x", place / name)
        shutil.rmtree(place / name / stage)
        (place / name / BOOK).unlink()
        Server.refuses = name != "gone"
        if name == "gone":
            server.shutdown()
            server.server_close()
        failed = call("run", recipe, *overrides, "--out", name, "--until", stage, code=1)
        assert ":***@" in failed.stderr or "//***@" in failed.stderr
    call("verify", f"http://me:{IN_CLEAR[0]}@{host}", "--against", reward, code=2)
    call("check", recipe, *overrides, overrides[0].replace("extra_rewards", "extra_reward"), code=2)
    assert "a secret was left out" in call("run", "x/recipe.yaml", "--out", "again", code=2).stderr

    # 4. They were used, and stand nowhere.
    assert {"/a?key=canary%20in%20clear-2&model=m", f"/b?token={VARIABLES['REWARD_KEY']}"} <= Server.paths
    assert f"Bearer {VARIABLES['JUDGE_KEY']}" in Server.logins
    from typer.main import get_command

    from rlhf.cli import app

    assert set(outcomes) == set(get_command(app).commands)  # type: ignore[attr-defined]
    require_none(place, [outcome for of_verb in outcomes.values() for outcome in of_verb])


@pytest.mark.fault("passwords in addresses")
@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("http://host/get_reward", "http://host/get_reward"),
        ("https://me:pw@host:1/a", "https://me:***@host:1/a"),
        ("https://token@host/a", "https://***@host/a"),
        ("http://me:p@w@host/a", "http://me:***@host/a"),
        ("http://host/a?model=a&key=b&api-key=c&Token=d#x", "http://host/a?model=a&key=***&api-key=***&Token=***#x"),
        ("http://me:${A}@host?key=${B}", "http://me:${A}@host?key=${B}"),
        ("http://me:${A}b@host", "http://me:***@host"),
    ],
)
def test_what_is_written_of_an_address(address: str, shown: str) -> None:
    assert hide_secrets(address) == shown
    assert hide_secrets(f"a {address}, 'b {address}'") == f"a {shown}, 'b {shown}'"
    assert hide_secrets(shown) == shown


@pytest.mark.fault("passwords in addresses")
def test_secrets_are_named_by_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    address = "http://me:${PASSWORD}@host/?key=${KEY}"
    monkeypatch.delenv("PASSWORD", raising=False)
    monkeypatch.setenv("KEY", "k")
    assert "the environment variable PASSWORD is empty" in str(secret_problem(address))
    monkeypatch.setenv("PASSWORD", "p")
    assert secret_problem(address) is None
    assert spell_out(address) == "http://me:p@host/?key=k"
    assert secrets_in(spell_out(address)) == ["p", "k"]
    # Of two recipes that differ in a password alone, the resolved ones are the same: it may be changed between two attempts.
    texts = []
    for password in ("one", "two"):
        (tmp_path / "r.yaml").write_text(
            f"name: x\nlab: {{}}\nppo: {{extra_rewards: ['http://me:{password}@host/']}}\n"
        )
        recipe = load_recipe(tmp_path / "r.yaml")
        assert recipe.ppo.extra_rewards == [f"http://me:{password}@host/"], "it is used as it stands"
        texts.append(recipe.resolved())
    assert texts[0] == texts[1]
