"""Requests that nobody would send, by the thousand, to both servers: none may answer 5xx, or keep the memory that it took.

    python -m tests.faults.fuzz reward --minutes 10 --out fuzz-reward.json      # or label

Hypothesis makes the requests; each goes over a socket of its own, as bytes. The memory of the process, server and client in
one, is compared between the end of the first tenth, when every cache is warm, and the end.
"""

import argparse
import gc
import json
import random
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote_from_bytes, urlencode, urlsplit

import psutil
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from rlhf.data.labelbook import LabelBook
from rlhf.data.labels import Question, question_id
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.models.scratch import build_base
from rlhf.reward.load import load_reward_model, save_reward_model
from rlhf.serve.label import COOKIE, annotator_tokens, label_app
from rlhf.serve.models import ServedModel
from rlhf.serve.reward import Limits, serve_app
from tests.serve.running import running
from tests.unit_scale import build_reward_model

SECONDS = 20.0  # that a reply may take
SECONDS_TO_LIE = 0.1  # that a body is waited for which is not as long as its header says
BATCH = 200  # requests between two looks at the clock
SURROGATE = "\ud83d"


class Request(NamedTuple):
    """As it is sent; the length of the body is put to the headers where they name none."""

    method: str
    target: bytes
    headers: list[tuple[str, bytes]]
    body: bytes

    def encoded(self) -> bytes:
        """The bytes of the request."""
        named = [(b"Host", b"127.0.0.1"), (b"Connection", b"close"), *((n.encode(), v) for n, v in self.headers)]
        if not any(name.lower() in (b"content-length", b"transfer-encoding") for name, _ in named):
            named.append((b"Content-Length", str(len(self.body)).encode()))
        lines = [b"%s %s HTTP/1.1" % (self.method.encode(), self.target), *(b"%s: %s" % pair for pair in named)]
        return b"\r\n".join(lines) + b"\r\n\r\n" + self.body


class Reply(NamedTuple):
    """Status and body; status 0 where the server said nothing."""

    status: int
    body: bytes


def send(port: int, request: Request) -> Reply:
    """Send a request over a socket of its own, and read the whole reply."""
    says_length = any(name in ("Content-Length", "Transfer-Encoding") for name, _ in request.headers)
    with socket.create_connection(("127.0.0.1", port), SECONDS) as connection:
        received = bytearray()
        try:
            connection.sendall(request.encoded())
            connection.settimeout(SECONDS_TO_LIE if says_length else SECONDS)
            while part := connection.recv(65_536):
                received += part
        except ConnectionError:  # the server had heard enough
            pass
        except TimeoutError:  # it waits for the rest of a body
            assert says_length, f"no reply: {request}"
    head, _, body = bytes(received).partition(b"\r\n\r\n")
    return Reply(int(head.split(b" ", 2)[1]) if head.startswith(b"HTTP/1.1 ") else 0, body)


@contextmanager
def listening_at(app: Any) -> Iterator[int]:
    """Serve an application in a thread, and give its port."""
    with running(app, log_level="critical") as url:
        port = urlsplit(url).port
        assert port is not None
        yield port


# ---- What is sent ----

WORDS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(
        ["yes", "", " ", "\0", SURROGATE, "a\u2028b", "<|end|>", "é" * 300, "red " * 500, "{{ 7*7 }}", "٣"]
    ),
)
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -1, 0, 2**63, float("nan"), float("inf"), -0.0, 1e308])
)
TURN = st.fixed_dictionaries(
    {},
    optional={
        "role": st.one_of(st.sampled_from(["user", "assistant", "system", "tool", "evil", ""]), NUMBERS, st.none()),
        "content": st.one_of(WORDS, NUMBERS, st.none(), st.lists(WORDS, max_size=2)),
        "tool_calls": st.one_of(st.none(), st.lists(st.dictionaries(WORDS, WORDS, max_size=2), max_size=2)),
        "name": WORDS,
    },
)
PROMPT = st.one_of(WORDS, st.lists(TURN, max_size=3))
ANYTHING = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, WORDS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(WORDS, inner, max_size=3)),
    max_leaves=8,
)


def mostly(usual: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """What is expected, and now and then anything else."""
    return st.one_of(usual, usual, usual, ANYTHING)


BODY = st.fixed_dictionaries(
    {},
    optional={
        "prompts": mostly(st.lists(PROMPT, max_size=4)),
        "prompt": mostly(PROMPT),
        "responses": mostly(st.lists(WORDS, max_size=4)),
        "messages": mostly(st.lists(st.lists(TURN, max_size=3), max_size=3)),
        "query": mostly(st.lists(WORDS, max_size=4)),
        "input": mostly(st.one_of(WORDS, st.lists(WORDS, max_size=4))),
        "ended": mostly(st.lists(st.booleans(), max_size=4)),
        "model": mostly(st.sampled_from(["test", "other", "", "/etc/passwd"])),
        "labels": ANYTHING,
    },
)


@st.composite
def right_body(draw: st.DrawFn) -> dict[str, Any]:
    """A body without fault, of each kind, so that not all of them end at the door."""
    count = draw(st.integers(1, 4))
    prompts = draw(st.lists(st.text(min_size=1, max_size=20), min_size=count, max_size=count))
    responses = draw(st.lists(st.text(max_size=20), min_size=count, max_size=count))
    forms: list[dict[str, Any]] = [
        {"prompts": prompts, "responses": responses},
        {"prompt": prompts[0], "responses": responses},
        {"query": [a + b for a, b in zip(prompts, responses, strict=True)], "prompts": prompts},
        {"input": responses},
    ]
    return draw(st.sampled_from(forms))


def json_bytes(value: Any) -> bytes:
    """A value as JSON, NaN and lone surrogates as escapes, as Python's clients write them."""
    return json.dumps(value).encode()


RAW = st.one_of(
    st.binary(max_size=60),
    st.sampled_from([b"", b"{", b"[" * 5000, b'{"prompts":' * 500, b"\xff\xfe", b'"\\ud800"', b"9" * 5000]),
)
HEADERS = st.lists(
    st.one_of(
        st.tuples(st.just("Content-Type"), st.sampled_from([b"application/json", b"text/plain", b"", b"a/b; charset=\xff", b"multipart/form-data"])),
        st.tuples(st.just("Authorization"), st.sampled_from([b"Bearer secret", b"Bearer \xe9", b"Basic x", b"", b"Bearer " + b"a" * 9000])),
        st.tuples(st.just("X-Request-ID"), st.sampled_from([b"a", b"\xff", b"a" * 500, b"a b"])),
        st.tuples(st.just("Content-Length"), st.sampled_from([b"-1", b"1e3", b"99999999999999999999", b"7", b"\xb2", b""])),
        st.tuples(st.just("Transfer-Encoding"), st.sampled_from([b"chunked", b"gzip"])),
        st.tuples(st.just("Origin"), st.sampled_from([b"null", b"http://evil", b"\xff", b"http://[::1"])),
        st.tuples(st.just("Sec-Fetch-Site"), st.sampled_from([b"cross-site", b"same-origin", b"\xff"])),
        st.tuples(st.just("Accept"), st.sampled_from([b"text/html", b"\xff", b"*/*"])),
        st.tuples(st.just("Host"), st.sampled_from([b"evil", b"", b"\xff", b"[::1"])),
    ),
    max_size=3,
)  # fmt: skip
METHODS = st.sampled_from(["POST", "POST", "POST", "GET", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE"])
ODD_TARGETS = [
    b"//",
    b"/../../etc/passwd",
    b"/%00",
    b"/%ff",
    b"/score/",
    b"/static/x",
    b"*",
    b"http://evil/score",
    b"/\xff",
    b"/score?" + b"a=b&" * 900,
]


@st.composite
def reward_requests(draw: st.DrawFn) -> Request:
    """To the reward server."""
    paths = [b"/score", b"/rank", b"/get_reward", b"/classify", b"/score", b"/rank", b"/health", b"/models", b"/metrics", b"/openapi.json", b"/docs"]  # fmt: skip
    target = draw(st.one_of(st.sampled_from(paths), st.sampled_from(paths), st.sampled_from(ODD_TARGETS)))
    body = draw(st.one_of(right_body().map(json_bytes), BODY.map(json_bytes), ANYTHING.map(json_bytes), RAW))
    usual = [("Content-Type", b"application/json"), ("Authorization", b"Bearer secret")]
    return Request(draw(METHODS), target, usual if draw(st.integers(0, 3)) else draw(HEADERS), body)


@st.composite
def label_requests(draw: st.DrawFn, *, tokens: list[str], ids: list[str]) -> Request:
    """To the labelling page: links, cookies and forms of its people, whole and broken."""
    if not draw(st.integers(0, 3)):  # without fault
        mine = draw(st.sampled_from(tokens))
        cookie = ("Cookie", f"{COOKIE}={mine}".encode())
        form = {"id": draw(st.sampled_from(ids)), "choice": "left", "left_side": "first", "token": mine}
        method = draw(st.sampled_from(["GET", "POST"]))
        return Request(method, b"/", [cookie], urlencode(form).encode() if method == "POST" else b"")
    token = st.one_of(st.sampled_from(tokens), WORDS)
    fields = {
        "id": st.one_of(st.sampled_from(ids), WORDS),
        "choice": st.one_of(st.sampled_from(["left", "right", "tie", "skip", "undo"]), WORDS),
        "left_side": st.one_of(st.sampled_from(["first", "second"]), WORDS),
        "token": token,
        "shown": st.one_of(st.sampled_from(["1700000000.1", "nan", "-1", "1e400", "inf", "٣"]), WORDS),
    }
    form = draw(st.fixed_dictionaries({}, optional=fields) if draw(st.booleans()) else st.fixed_dictionaries(fields))
    encoded = urlencode({name: value.encode("utf-8", "surrogatepass") for name, value in form.items()}).encode()
    link = quote_from_bytes(draw(token).encode("utf-8", "surrogatepass"))
    usual = [b"/", b"/", b"/", f"/?token={link}".encode(), f"/?person={link}".encode()]
    headers = draw(HEADERS) if not draw(st.integers(0, 3)) else []
    if draw(st.booleans()):
        value = draw(token).encode("utf-8", "surrogatepass").replace(b"\r", b"").replace(b"\n", b"")
        headers = [*headers, ("Cookie", COOKIE.encode() + b"=" + value)]
    if draw(st.booleans()):
        headers = [("Content-Type", b"application/x-www-form-urlencoded"), *headers]
    target = draw(st.one_of(st.sampled_from(usual), st.sampled_from(usual), st.sampled_from(ODD_TARGETS)))
    return Request(draw(METHODS), target, headers, encoded if draw(st.integers(0, 3)) else draw(RAW))


# ---- The servers ----


def tiny_reward_model(folder: Path) -> Path:
    """A reward model of one layer, untrained."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    build_base(
        folder / "base", ["red blue yes no"] * 5, architecture="llama", settings={**sizes, "vocab_size": 300}, seed=0
    )
    tokenizer = load_tokenizer(folder / "base", conversational=True)
    model = build_reward_model(folder / "base", model_settings({}), pad_token_id=tokenizer.pad_token_id)
    save_reward_model(folder / "reward", model, tokenizer, samples=[("a", "b")])
    return folder / "reward"


def reward_server(model: Path) -> Any:
    """The reward server with one model under two names; small limits, so that they are met."""
    models = [ServedModel(name, [load_reward_model(model)]) for name in ("test", "other")]
    return serve_app(models, token="secret", limits=Limits(body_bytes=2**16, seconds=5))


def label_page(folder: Path) -> tuple[Any, LabelBook, list[str], list[str]]:
    """The labelling page of a round with a hundred questions; with its book, the tokens and the ids."""
    prompt = [{"role": "user", "content": "Which?"}]
    questions = [Question(question_id(1, prompt, [f"a{i}", "b"]), 1, prompt, f"a{i}", "b") for i in range(100)]
    book = LabelBook(folder / "labels.sqlite")
    book.ask(questions)
    tokens = annotator_tokens(book.path, ["ann", "bob"])
    return label_app(book, 1, tokens, wanted=2, title="fuzz"), book, list(tokens.values()), [q.id for q in questions]


def require_sense(reply: Reply, request: Request, *, is_json: bool) -> None:
    """No 5xx; and where the reward server refuses, a sentence in JSON."""
    assert reply.status < 500, (request, reply)
    if (
        is_json
        and reply.status in (400, 401, 404, 405, 413, 422)
        and request.method != "HEAD"
        and reply.body.startswith(b"{")
    ):
        assert json.loads(reply.body)["detail"], (request, reply)


def memory() -> int:
    """Bytes that this process holds, after what can be collected is."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def fuzz(port: int, requests: st.SearchStrategy[Request], *, minutes: float, is_json: bool) -> dict[str, Any]:
    """Send requests until the time is up; stop at the first that is answered without sense."""
    statuses: Counter[int] = Counter()
    begin, end = time.monotonic(), time.monotonic() + 60 * minutes
    warm: int | None = None
    turn = 0

    def once(request: Request) -> None:
        reply = send(port, request)
        statuses[reply.status] += 1
        require_sense(reply, request, is_json=is_json)

    while time.monotonic() < end:
        batch = settings(
            max_examples=BATCH,
            database=None,
            deadline=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        seed(turn)(batch(given(requests)(once)))()
        turn += 1
        if warm is None and time.monotonic() - begin > 6 * minutes:
            warm = memory()
    after = memory()
    return {
        "minutes": round((time.monotonic() - begin) / 60, 2),
        "requests": statuses.total(),
        "statuses": dict(sorted(statuses.items())),
        "memory_warm_mb": round((warm or after) / 1e6, 1),
        "memory_after_mb": round(after / 1e6, 1),
        "growth": round(after / (warm or after) - 1, 4),
    }


def main() -> None:
    """Fuzz one server, print and write the figures, and exit with 1 where memory grew by more than a tenth."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("server", choices=["reward", "label"])
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.server == "reward":
            app, requests = reward_server(tiny_reward_model(Path(folder))), reward_requests()
        else:
            app, _, tokens, ids = label_page(Path(folder))
            requests = label_requests(tokens=tokens, ids=ids)
        with listening_at(app) as port:
            found = fuzz(port, requests, minutes=arguments.minutes, is_json=arguments.server == "reward")
    arguments.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))
    if found["growth"] > 0.1:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
