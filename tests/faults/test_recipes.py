"""Recipes and functions from anywhere: one sentence with its place, exit 2, nothing created, nothing that runs for ever."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pytest

from rlhf.data import http
from rlhf.data.functions import load_function
from rlhf.errors import TrainingError, UserError
from rlhf.ppo.remote import RemoteReward
from rlhf.recipe.document import read_document
from tests.faults.here import require_refusal, rlhf

LAB = "name: x\nlab: {}\nppo: {max_completion_length: 40}\n"
BOMB = "name: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n"
YAML: dict[str, tuple[bytes, str]] = {
    "merge keys": (b"name: x\nlab: {<<: {pairs: 100}}\n", "r.yaml:2: the key '<<' is merged or has a tag"),
    "a key with a tag": (b"name: x\nlab: {}\n!!python/name:os.system x: 1\n", "r.yaml:3"),
    "a python tag": (LAB.encode() + b"seed: !!python/object/apply:os.system ['touch ran']\n", "r.yaml:4"),
    "a bomb": (BOMB.encode(), "aliases"),
    "900 levels": (LAB.encode() + b"sft: " + b"[" * 900 + b"]" * 900 + b"\n", "deeper"),
    "20,000 levels": (LAB.encode() + b"sft: " + b"{a: " * 20_000 + b"\n", "deeper"),
    "a zero byte": (b"name: x\0\nlab: {}\n", "broken YAML"),
    "half a character": (b'name: x\nlab: {}\nseed: "\\ud83d"\n', "seed"),
    "no UTF-8": (b"name: \xff\xfe\n", "not UTF-8"),
    "a number of 5,000 digits": (LAB.encode() + b"seed: " + b"1" * 5000 + b"\n", "seed"),
    "a hexadecimal number of 500,000 digits": (LAB.encode() + b"seed: 0x" + b"f" * 500_000 + b"\n", "too many digits"),
    "a key of 1,000 digits": (LAB.encode() + b"0x" + b"f" * 1000 + b": 1\n", "is not a string"),
    "a number of base 60": (LAB.encode() + b"seed: 1:2:3:4\n", "seed"),
    "NaN in a mapping": (LAB.encode() + b"sft: {lr_scheduler_kwargs: {a: .nan}}\n", "not a finite number"),
    "a name of 300 letters": (b"name: " + b"x" * 300 + b"\nlab: {}\n", "at most 100"),
    "a name that leads up": (b"name: ..\nlab: {}\n", "name"),
    "a name that is a path": (b"name: a/b\nlab: {}\n", "name"),
    "nobody's home": (b"name: x\nlab: {}\nreward: {meta: true, meta_samples: ~nobodyhere/x}\n", "no such user"),
    "ten megabytes": (b"name: x\n#" + b"x" * 10_000_000, "is no recipe"),
    "a list": (b"- name\n", "mapping of sections"),
}  # fmt: skip
OVERRIDES = {
    "seed=" + "1" * 5000: "seed",
    "seed=0x" + "f" * 50_000: "too many digits",
    "seed=1:30": "seed",
    "sft.lr_scheduler_kwargs={a: .inf}": "not a finite number",
    "seed=!!python/name:os.system": "seed",
    "sft=" + "[" * 900: "override",
    "seed={<<: {a: 1}}": "merged",
    "reward.meta_samples=~nobodyhere/x": "no such user",
    "a": "looks like section.key=value",
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "r.yaml").write_text(LAB, encoding="utf-8")
    return tmp_path


@pytest.mark.fault("YAML that is none", "bombs and tags", "mistakes in a recipe")
@pytest.mark.parametrize("verb", ["run", "check", "plan"])
@pytest.mark.parametrize("name", YAML)
def test_yaml_that_is_no_recipe(place: Path, capsys: pytest.CaptureFixture[str], name: str, verb: str) -> None:
    content, sentence = YAML[name]
    (place / "r.yaml").write_bytes(content)
    outcome = rlhf(verb, "r.yaml", cwd=place, capsys=capsys)
    assert outcome.code == 2, outcome.stderr[-2000:]
    assert outcome.created == []
    assert sentence in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert len(outcome.stderr) < 2000, "what was written is not written again"


@pytest.mark.fault("YAML that is none")
@pytest.mark.parametrize("override", OVERRIDES, ids=lambda text: text[:40])
def test_overrides_that_are_none(place: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    outcome = rlhf("run", "r.yaml", override, cwd=place, capsys=capsys)
    require_refusal(outcome, says=OVERRIDES[override])
    assert len(outcome.stderr) < 2000


NO_FOLDER = ["a file", "below a file", "a dangling link", "a loop", "a long name"]


@pytest.mark.fault("folder in use")
@pytest.mark.parametrize(
    ("kind", "dry"),
    # A dry run writes nothing, so it does not find out that a place is read-only.
    [*((kind, dry) for dry in (False, True) for kind in NO_FOLDER), ("read-only", False)],
)
def test_a_place_where_no_folder_can_be(place: Path, capsys: pytest.CaptureFixture[str], kind: str, dry: bool) -> None:
    (place / "file").write_text("mine", encoding="utf-8")
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    out = {"a file": "file", "below a file": "file/x", "a dangling link": "dangling", "a loop": "loop"}.get(
        kind, "x" * 300
    )
    if kind == "read-only":
        out = "/proc/here"
    arguments = ["run", "r.yaml", "--out", out, *(["--dry-run"] if dry else [])]
    require_refusal(rlhf(*arguments, cwd=place, capsys=capsys), says="--out")
    assert (place / "file").read_text(encoding="utf-8") == "mine"


# ---- Functions ----

BODIES = {
    "raise KeyError('x')": "failed: KeyError",
    "return None": "something else (NoneType)",
    "return 'abc'": "something else (str)",
    "return '12'": "something else (str)",
    "return b'12'": "something else (bytes)",
    "return {1.0: 'a', 2.0: 'b'}": "something else (dict)",
    "return {1.0, 2.0}": "something else (set)",
    "return 1.0": "something else (float)",
    "return ['1.0', '2.0']": "texts",
    "return [[1.0], [2.0]]": "failed: TypeError",
    "return [1.0, None]": "failed: TypeError",
    "return [1.0]": "1 numbers",
    "return [1.0] * 3": "3 numbers",
    "return []": "0 numbers",
    "return [1j, 2j]": "failed: TypeError",
    "return [10**400, 1]": "failed: OverflowError",
    "return [float('nan'), 1.0]": "nan is the first that is unusable",
    "return [float('inf'), 1.0]": "inf is the first that is unusable",
    "return [1e308, 1.0]": "1e+308 is the first that is unusable",
    "return torch.ones(2, 1)": "failed: TypeError",
    "return torch.tensor(1.0)": "something else (Tensor)",
    "return torch.ones(3)": "3 numbers",
    "return numpy.array([1.0, numpy.nan])": "nan is the first that is unusable",
    "return torch.ones(2, device='meta')": "failed:",
    "return wait()": "something else (coroutine)",
    "return (x for x in ())": "0 numbers",
    "return p": "texts",
    "return f(p, c)": "failed: RecursionError",
    "time.sleep(60)": "was not done after",
    "while True: pass": "was not done after",
    "\n    while True:\n        try:\n            time.sleep(60)\n        except Exception: pass": "was not done after",
}
ACCEPTED = {
    "return [1, 2]": [1.0, 2.0],
    "return (1.5, True)": [1.5, 1.0],
    "return torch.tensor([1.0, 2.0], dtype=torch.bfloat16)": [1.0, 2.0],
    "return numpy.array([1, 2])": [1.0, 2.0],
    "return [torch.tensor(1.0), numpy.float32(2)]": [1.0, 2.0],
    "return (float(len(x)) for x in c)": [1.0, 2.0],
}
SOURCE = "import time\nimport numpy, torch\nasync def wait():\n    return [1.0, 2.0]\ndef f(p, c):\n    {body}\n"


def function(folder: Path, body: str, key: str) -> Any:
    (folder / "mine.py").write_text(SOURCE.format(body=body), encoding="utf-8")
    return load_function(f"{folder}/mine.py:f", key=key)


@pytest.mark.fault("functions that fail")
@pytest.mark.filterwarnings("ignore:coroutine")
@pytest.mark.parametrize("body", BODIES)
def test_a_function_without_sense_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    monkeypatch.setattr("rlhf.data.functions.SECONDS_A_CALL", 0.3)
    monkeypatch.setattr("rlhf.data.functions.SECONDS_AN_ANSWER", 0.1)
    with pytest.raises(UserError) as error:
        function(tmp_path, body, "evaluate.gold")(["a", "b"], ["c", "dd"])
    (problem,) = error.value.problems
    assert problem.startswith("evaluate.gold: ")
    assert "mine.py:f" in problem
    assert BODIES[body] in problem


@pytest.mark.fault("functions that fail")
@pytest.mark.parametrize("body", ACCEPTED)
def test_rows_of_numbers_of_any_kind_are_taken(tmp_path: Path, body: str) -> None:
    assert function(tmp_path, body, "evaluate.gold")(["a", "b"], ["c", "dd"]) == ACCEPTED[body]


FILES = {
    "raises": ("raise KeyError('x')", "can't be imported: KeyError"),
    "ends the process": ("import sys; sys.exit(0)", "raised SystemExit(0)"),
    "no Python": ("def f(:", "can't be imported: SyntaxError"),
    "a package that is not there": ("import nothing_like_this", "can't be imported: ModuleNotFoundError"),
    "no such function": ("x = 1", "has no function 'f'"),
    "no function": ("f = 1", "has no function 'f'"),
    "never ends": ("while True: pass", "was not done after"),
}  # fmt: skip


@pytest.mark.fault("functions that fail", "functions that end the process")
@pytest.mark.parametrize("key", ["evaluate.gold", "ppo.extra_rewards"])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("verb", [["check"], ["run"], ["run", "--dry-run"]], ids=" ".join)
def test_a_file_that_cannot_be_imported_is_refused_before_anything_is_made(
    place: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    key: str,
    verb: list[str],
) -> None:
    monkeypatch.setattr("rlhf.data.functions.SECONDS_TO_IMPORT", 0.3)
    source, sentence = FILES[name]
    (place / "mine.py").write_text(source + "\n", encoding="utf-8")
    value = "mine.py:f" if key == "evaluate.gold" else "[mine.py:f]"
    outcome = rlhf(*verb, "r.yaml", f"{key}={value}", cwd=place, capsys=capsys)
    require_refusal(outcome, says=sentence)
    assert outcome.sentences[0].startswith(f"{key}: ")


# ---- Reward servers ----


class Server(BaseHTTPRequestHandler):
    status: ClassVar[int] = 200
    body: ClassVar[bytes] = b""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(type(self).status)
        self.end_headers()
        self.wfile.write(type(self).body)

    def log_message(self, *_: Any) -> None:
        """Silent."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    server = HTTPServer(("127.0.0.1", 0), Server)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://me:PASSWORD@127.0.0.1:{server.server_port}/get_reward?key=KEY&model=a"
    server.shutdown()
    thread.join()


def rewards(values: object) -> bytes:
    return json.dumps({"rewards": values}).encode()


REPLIES: dict[str, tuple[int, bytes, str]] = {
    "401": (401, b"who?", "wants another token (status 401: who?)"),
    "404": (404, b"PASSWORD KEY", "refuses these answers (status 404: *** ***)"),
    "HTML": (200, b"<html>me:PASSWORD</html>", "something that is not JSON"),
    "text": (200, rewards("ab"), "no rewards for 2 answers"),
    "texts": (200, rewards(["1.5", "2"]), "'1.5' as a reward, which is no number"),
    "truth values": (200, rewards([True, False]), "True as a reward, which is no number"),
    "nested lists": (200, rewards([[1.0], [2.0]]), "[1.0] as a reward, which is no number"),
    "10^400": (200, b'{"rewards": [1' + b"0" * 400 + b", 1]}", "as a reward, which is no number"),
    "10^5000": (200, b'{"rewards": [1' + b"0" * 5000 + b", 1]}", "something that is not JSON"),
    "infinite": (200, b'{"rewards": [Infinity, 1]}', "inf as a reward, which is no number"),
    "deep": (200, b"[" * 100_000, "something that is not JSON"),
    "a list": (200, b"[1, 2]", "no rewards for 2 answers"),
    "too few": (200, rewards([1.0]), "1 rewards for 2 answers"),
    "500": (500, b"KEY", "did not answer 5 times (status 500: ***)"),
}  # fmt: skip


@pytest.mark.fault("servers without sense", "reward server fails", "passwords in addresses")
@pytest.mark.parametrize("name", REPLIES)
def test_a_server_without_sense_is_one_sentence(address: str, name: str) -> None:
    Server.status, Server.body, sentence = REPLIES[name]
    with pytest.raises(TrainingError) as error:
        RemoteReward(address)(["a", "b"], ["c", "d"])
    assert sentence in str(error.value)
    assert "nothing was updated" in str(error.value)
    assert "PASSWORD" not in str(error.value)
    assert "KEY" not in str(error.value)
    assert error.value.__cause__ is None, "which would name the address in a traceback"


@pytest.mark.fault("servers without sense", "passwords in addresses")
def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "FIRST_WAIT", 0.0)
    with pytest.raises(TrainingError, match="did not answer 5 times") as error:
        RemoteReward("http://me:PASSWORD@127.0.0.1:9/get_reward?key=KEY")(["a"], ["b"])
    assert "PASSWORD" not in str(error.value)
    assert "KEY" not in str(error.value)


def test_what_never_ends_is_no_recipe(tmp_path: Path) -> None:
    """A pipe that nobody writes to would be waited for; one that a shell has opened is read."""
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="is a pipe, and nobody may ever write to it"):
        read_document(tmp_path / "pipe.yaml")
    with pytest.raises(UserError, match="more than 1000000 bytes is no recipe"):
        read_document(Path("/dev/zero"))
    read_end, write_end = os.pipe()
    os.write(write_end, b"name: x")
    os.close(write_end)
    assert read_document(Path(f"/dev/fd/{read_end}")).values == {"name": "x"}
    os.close(read_end)
