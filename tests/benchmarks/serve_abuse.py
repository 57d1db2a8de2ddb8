"""Abuse of `rlhf serve`: a fuzz of its OpenAPI schema, bodies that are too large or no text, clients that leave.

python tests/benchmarks/serve_abuse.py runs/quickstart/round-1/reward/model --examples 100 --json abuse.json

The server is a process of its own, with a token. Every case must be answered by a status below 500 with a JSON body that
has `detail` and `request_id` (or by scores), the server must still score one text as before, and its memory must come back to
within 10 % of what it was after one pass over the same cases. The fuzz needs `schemathesis` (pip install schemathesis); without it the row says so.
"""

import argparse
import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

TOKEN = "a-token"
TOLERANCE = 1e-5
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
ONE = {"prompts": ["Name three fruits."], "responses": ["apple"]}


class Server:
    """A server in a process of its own."""

    def __init__(self, model: str):
        environment = {**os.environ, "RLHF_SERVE_TOKEN": TOKEN, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "rlhf", "serve", model, "--port", "0"]
        self.log = tempfile.NamedTemporaryFile("w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self.log, text=True, env=environment)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().split("/get_reward")[0]
        self.port = int(self.url.rpartition(":")[2])

    def post(self, path: str, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request("POST", path, body, HEADERS if headers is None else headers)
        reply = connection.getresponse()
        result = reply.status, json.loads(reply.read())
        connection.close()
        return result

    def leave(self, body: bytes, *, announced: int | None = None) -> tuple[int, dict[str, Any]]:
        """Send a request, or a part of one, and go away."""
        length = len(body) if announced is None else announced
        head = "".join(f"{name}: {value}\r\n" for name, value in HEADERS.items())
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            connection.sendall(
                f"POST /score HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {length}\r\n\r\n".encode() + body
            )
        return 499, {"detail": "", "request_id": ""}

    def memory(self) -> int:
        """Return the resident memory in bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return 1024 * int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


def is_close(scores: Sequence[float], expected: Sequence[float]) -> bool:
    """Tell whether scores are the expected ones; beside texts that a client left behind, a batch sums in another order."""
    return len(scores) == len(expected) and all(abs(a - b) < TOLERANCE for a, b in zip(scores, expected, strict=True))


def cases(server: Server) -> dict[str, Callable[[], tuple[int, dict[str, Any]]]]:
    """Return what is tried, by name."""
    text = json.dumps

    def score(body: object) -> Callable[[], tuple[int, dict[str, Any]]]:
        return lambda: server.post("/score", body if isinstance(body, bytes) else text(body).encode())

    many = {"prompts": ["apple pear"] * 5000, "responses": ["plum"] * 5000}
    return {
        "malformed JSON": score(b'{"prompts": ["x'),
        "bytes that are no text": score(b"\xff\xfe\x00"),
        "100,000 open brackets": score(b"[" * 100_000),
        "wrong types": score({"prompts": 7, "responses": {"a": []}}),
        "a lone surrogate": score(b'{"prompts": ["\\ud800"], "responses": ["x"]}'),
        "a message without content": score({"prompts": [[{"role": "user"}]], "responses": ["x"]}),
        "an unknown role": score({"prompts": [[{"role": "evil", "content": "x"}]], "responses": ["x"]}),
        "an empty conversation": score({"messages": [[]]}),
        "NaN": score(b'{"prompts": [NaN], "responses": [Infinity]}'),
        "a million texts": score({"prompts": ["x"] * 10**6, "responses": ["y"] * 10**6}),
        "50 MB of text": score({"prompts": ["x" * 50_000_000], "responses": ["y"]}),
        "30 MB of text": score({"prompts": ["x" * 30_000_000], "responses": ["y"]}),
        "no token": lambda: server.post("/score", text(ONE).encode(), {"Content-Type": "application/json"}),
        "a wrong token": lambda: server.post("/score", text(ONE).encode(), {**HEADERS, "Authorization": "Bearer no"}),
        "a wrong token and 50 MB": lambda: server.post("/score", b"x" * 50_000_000, {"Authorization": "Bearer no"}),
        "leaves while it sends": lambda: server.leave(b'{"prompts": ["x', announced=10_000_000),
        "leaves while it waits": lambda: server.leave(text(many).encode()),
    }


def fuzz(server: Server, examples: int) -> dict[str, Any]:
    """Run schemathesis over the OpenAPI schema: no reply of 500 or more, and every reply as the schema says."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {TOKEN}", "--max-examples", str(examples), "--seed", "1"),
        *(
            "--checks",
            "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance",
        ),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if "No module named" in done.stderr:
        return {"skipped": "schemathesis is not installed"}
    found = re.search(r"(\d+) generated", done.stdout)
    tail = "" if done.returncode == 0 else done.stdout[-4000:]
    return {"exit_code": done.returncode, "cases": int(found[1]) if found else None, "failures": tail}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--examples", type=int, default=100)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    server = Server(arguments.model)
    try:
        result = abuse(server, arguments.examples)
    finally:
        server.process.terminate()
    result["exit_code"] = server.process.wait(120)
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def abuse(server: Server, examples: int) -> dict[str, Any]:
    """Try everything twice: the first pass also fills what libraries keep, the second one shows whether memory grows."""
    one = json.dumps(ONE).encode()
    expected = server.post("/score", one)[1]["scores"]
    rows: dict[str, Any] = {}
    memory = {"start": server.memory()}
    for number in ("first pass", "second pass"):
        for name, case in cases(server).items():
            status, body = case()
            is_as_it_should = 400 <= status < 500 and set(body) == {"detail", "request_id"}
            is_up = is_close(server.post("/score", one)[1]["scores"], expected)
            rows[name] = {"status": status, "detail": body["detail"][:120], "ok": is_as_it_should and is_up}
        time.sleep(1)
        memory[number] = server.memory()

    # One request of 20,000 texts, and another client beside it.
    large_body = json.dumps({"prompts": ["apple pear"] * 20_000, "responses": ["plum"] * 20_000}).encode()
    large = threading.Thread(target=server.post, args=("/score", large_body))
    began = time.monotonic()
    large.start()
    time.sleep(1)
    waits = []
    while large.is_alive():
        asked = time.monotonic()
        server.post("/score", one)
        if large.is_alive():
            waits.append(time.monotonic() - asked)
        time.sleep(0.05)
    large.join()
    beside = {"seconds": time.monotonic() - began, "others": len(waits), "longest_ms": 1000 * max(waits, default=0)}
    memory["before the fuzz"] = server.memory()
    fuzzed = fuzz(server, examples)
    is_up = is_close(server.post("/score", one)[1]["scores"], expected)
    time.sleep(1)
    memory["after the fuzz"] = server.memory()
    log = Path(server.log.name).read_text()
    return {
        "cases": rows,
        "all_ok": all(row["ok"] for row in rows.values()),
        "beside_20000_texts": beside,
        "fuzz": fuzzed,
        "is_up": is_up,
        "memory_mb": {name: round(value / 2**20) for name, value in memory.items()},
        "memory_ratio": memory["second pass"] / memory["first pass"],
        "tracebacks_in_the_log": log.count("Traceback"),
        "texts_in_the_log": log.count("apple"),
    }


if __name__ == "__main__":
    main()
