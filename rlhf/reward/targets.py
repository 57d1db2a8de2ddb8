"""What `rlhf verify` asks: a reward server of any of the usual kinds, or a folder in plain transformers and PEFT."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args
from urllib.parse import urlsplit

import requests
import torch
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.errors import UserError
from rlhf.models.load import find_source
from rlhf.models.open import ADAPTER_CONFIG, ADAPTER_WEIGHTS, adapter_weights, expand, one_sentence
from rlhf.reward.certify import Certificate, Golden, prompt_of
from rlhf.reward.plain_critiques import plain_critic
from rlhf.reward.verify import Answers

Kind = Literal["ours", "openrlhf", "vllm-classify", "vllm-pooling", "folder"]
KINDS: tuple[str, ...] = get_args(Kind)
ENDPOINTS = ("/score", "/get_reward", "/classify", "/pooling")
Body = dict[str, object]


class SeveralLabels(Exception):
    """A server answered more than one number for a text."""


@dataclass(frozen=True)
class Form:
    """One way to ask: the name of the form, the endpoint, what is sent, and how the scores are read from the reply.

    `single`: one text a request. `closes`: every text is closed on its way, so answers that were cut off are not asked about.
    `renders`: the target tokenises rendered text, so texts that the model does not read like that are not asked about.
    """

    name: str
    endpoint: str
    body: Callable[[Sequence[Golden]], Body]
    scores: Callable[[Any], list[float]]
    single: bool = False
    closes: bool = False
    renders: bool = True

    def asks(self, text: Golden) -> bool:
        """Tell whether a golden text is asked about in this form."""
        return (text["ended"] or not self.closes) and (text["as_rendered"] or not self.renders)


class Server:
    """A reward server over HTTP.

    Args:
        url: of the server, or of one of its endpoints.
        token: sent as a bearer token.
        timeout: seconds for each request.
    """

    def __init__(self, url: str, *, token: str | None = None, timeout: float = 60.0):
        parts = urlsplit(url)
        path = parts.path.rstrip("/")
        self.endpoint = next((x for x in ENDPOINTS if path.endswith(x)), None)
        self.root = f"{parts.scheme}://{parts.netloc}{path.removesuffix(self.endpoint or '')}"
        self.headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        self.timeout = timeout

    def send(self, method: str, path: str, body: Body | None = None) -> Any:
        """Send a request and return its reply as JSON.

        Raises:
            UserError: nobody answers, or not in time; a status that is no success; a reply that is no JSON.
        """
        response = self._request(method, path, body)
        if response.status_code in (401, 403):
            raise UserError(
                f"{self.root}{path}: the server wants a token or refuses this one (status {response.status_code}); give --token."
            )
        if not response.ok:
            raise UserError(f"{self.root}{path}: status {response.status_code}: {_first_line(response.text)}")
        try:
            return response.json()
        except ValueError as error:
            raise UserError(
                f"{self.root}{path}: the reply is no JSON ({response.headers.get('content-type', 'no type')}: "
                f"{_first_line(response.text)}); is this the address of a reward server?"
            ) from error

    def _request(self, method: str, path: str, body: Body | None) -> requests.Response:
        try:
            return requests.request(method, f"{self.root}{path}", json=body, headers=self.headers, timeout=self.timeout)
        except requests.Timeout as error:
            raise UserError(f"{self.root}{path}: no answer within {self.timeout:g} s; give --timeout.") from error
        except requests.ConnectionError as error:
            raise UserError(f"{self.root}: nobody listens there; start the server, or correct the address.") from error
        except requests.RequestException as error:
            raise UserError(f"{self.root}{path}: {type(error).__name__}: {error}") from error

    def paths(self) -> Mapping[str, Any]:
        """Return what the server's OpenAPI description says of its paths; nothing where it has none."""
        response = self._request("GET", "/openapi.json", None)
        try:
            paths = response.json()["paths"] if response.ok else {}
        except (ValueError, KeyError, TypeError):
            return {}
        return paths if isinstance(paths, dict) else {}

    def first_model(self) -> str | None:
        """Return the first model that a server with several says it has, or None."""
        response = self._request("GET", "/v1/models", None)
        try:
            return str(response.json()["data"][0]["id"]) if response.ok else None
        except (ValueError, KeyError, TypeError, IndexError):
            return None


def find_kind(server: Server, golden: Golden) -> Kind:
    """Tell of what kind a server is: by its description, or by which of the usual requests it answers.

    Raises:
        UserError: nobody answers, or none of the kinds is there.
    """
    paths = server.paths()
    if not paths:
        return _kind_by_trial(server, golden)
    if "/get_reward" in paths and server.endpoint != "/pooling":
        described = "requestBody" in paths["/get_reward"].get("post", {})
        return "ours" if described else "openrlhf"
    if "/classify" in paths and server.endpoint in (None, "/classify"):
        return "vllm-classify"
    if "/pooling" in paths and server.endpoint in (None, "/pooling"):
        return "vllm-pooling"
    raise UserError(_nothing_there(server, f"{', '.join(list(paths)[:6])} are"))


def _kind_by_trial(server: Server, golden: Golden) -> Kind:
    """Tell the kind of a server that does not describe itself."""
    trials: tuple[tuple[Kind, str, Body], ...] = (
        ("openrlhf", "/get_reward", {"query": [golden["text"]]}),
        ("vllm-classify", "/classify", {"input": [golden["text"]]}),
        ("vllm-pooling", "/pooling", {"input": [golden["text"]]}),
    )
    problems = []
    for kind, path, body in trials:
        if server.endpoint in (None, path):
            try:
                server.send("POST", path, body)
            except UserError as error:
                problems.append(str(error))
            else:
                return kind
    telling = [problem for problem in problems if "status 404" not in problem]
    raise UserError(telling[0] if telling else _nothing_there(server, "nothing else either, as far as it says"))


def _nothing_there(server: Server, others: str) -> str:
    """Return the sentence for a server without any endpoint that is known here."""
    return (
        f"{server.root}: none of {', '.join(ENDPOINTS)} of a reward server is there ({others}); correct the address, or say "
        "what it is (--kind)."
    )


def server_forms(
    kind: Kind, server: Server, *, conversational: bool, model: str | None, raw: bool = False
) -> list[Form]:
    """Return the forms in which a server of a kind is asked.

    Args:
        conversational: whether the reward model reads conversations.
        model: its name there, which servers with several want.
        raw: whether vLLM is asked to put no activation on the scores.
    """
    named: Body = {} if model is None else {"model": model}
    if raw:
        named["use_activation"] = False

    def prompts_and_answers(texts: Sequence[Golden]) -> Body:
        return {
            **named,
            "prompts": [prompt_of(text, conversational=conversational) for text in texts],
            "responses": [text["messages"][-1]["content"] for text in texts],
            "ended": [text["ended"] for text in texts],
        }

    def queries(texts: Sequence[Golden]) -> Body:
        return {"query": [text["text"] for text in texts]}

    def queries_and_ends(texts: Sequence[Golden]) -> Body:
        return {**named, **queries(texts), "ended": [text["ended"] for text in texts]}

    def rendered(texts: Sequence[Golden]) -> Body:
        return {**named, "input": [text["text"] for text in texts]}

    def conversation(texts: Sequence[Golden]) -> Body:
        return {**named, "messages": texts[0]["messages"]}

    if kind == "openrlhf":
        return [Form("/get_reward with query", "/get_reward", queries, _rewards, closes=True)]
    if kind in ("vllm-classify", "vllm-pooling"):
        path, read = ("/classify", _classes) if kind == "vllm-classify" else ("/pooling", _pooled)
        forms = [Form(f"{path} with input", path, rendered, read)]
        if conversational:
            forms.append(Form(f"{path} with messages", path, conversation, read, single=True, closes=True))
        return forms
    paths = server.paths()
    forms = [
        Form("/score", "/score", prompts_and_answers, _rewards, renders=False),
        Form("/get_reward with responses", "/get_reward", prompts_and_answers, _rewards, renders=False),
        Form("/get_reward with query", "/get_reward", queries_and_ends, _rewards),
        Form("/classify with input", "/classify", rendered, _classes, closes=True),
    ]
    if conversational:
        name = "/classify with messages"
        forms.append(Form(name, "/classify", conversation, _classes, single=True, closes=True, renders=False))
    return [
        form
        for form in forms
        if (form.endpoint in paths or (not paths and form.endpoint == "/get_reward"))
        and server.endpoint in (None, form.endpoint)
    ]


def ask_server(server: Server, form: Form, golden: Sequence[Golden]) -> Answers:
    """Ask a server for the scores of the golden texts in one form, each alone and all together.

    Raises:
        UserError: as `Server.send`; another number of answers than of texts, or something that is no number.
        SeveralLabels: more than one number for a text.
    """
    rows = [i for i, text in enumerate(golden) if form.asks(text)]
    texts = [golden[i] for i in rows]
    alone = [_ask(server, form, [text])[0] for text in texts]
    return Answers(form.name, rows, alone, None if form.single else _ask(server, form, texts))


def _ask(server: Server, form: Form, texts: Sequence[Golden]) -> list[float]:
    reply = server.send("POST", form.endpoint, form.body(texts))
    try:
        scores = form.scores(reply)
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise UserError(
            f"{server.root}{form.endpoint}: the reply is not that of {form.name}: {_first_line(json.dumps(reply))}; say what "
            "kind of server it is (--kind)."
        ) from error
    if len(scores) != len(texts):
        raise UserError(f"{server.root}{form.endpoint}: {len(scores)} answers to {len(texts)} texts ({form.name}).")
    return scores


def _number(value: Any) -> float:
    """Return a score: a number, or null where the server had one that JSON can't write."""
    if isinstance(value, list):
        if len(value) != 1:
            raise SeveralLabels
        return _number(value[0])
    if value is None:
        return float("nan")
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(value)
    return float(value)


def _rewards(reply: Any) -> list[float]:
    """Read the replies of `/score` and `/get_reward`."""
    values = reply["rewards"] if "rewards" in reply else reply["scores"]
    if not isinstance(values, list):
        raise ValueError(values)
    return [_number(value) for value in values]


def _classes(reply: Any) -> list[float]:
    """Read vLLM's reply to `/classify`."""
    return [_number(entry["probs"]) for entry in _entries(reply)]


def _pooled(reply: Any) -> list[float]:
    """Read vLLM's reply to `/pooling`: a number for each text, or one for each of its tokens, of which the last counts."""
    values = [entry["data"] for entry in _entries(reply)]
    return [_number(value[-1] if isinstance(value, list) and isinstance(value[0], list) else value) for value in values]


def _entries(reply: Any) -> list[Any]:
    """Return the entries of vLLM's reply, in the order in which they stand; `index` must say the same."""
    entries = reply["data"]
    if [entry["index"] for entry in entries] != list(range(len(entries))):
        entries = sorted(entries, key=lambda entry: entry["index"])
    return list(entries)


def ask_folder(folder: str, certificate: Certificate) -> Iterator[Answers]:
    """Yield the scores of a checkpoint or adapter in plain transformers and PEFT, as a stranger would read it.

    Conversations go through the tokenizer's own `apply_chat_template`; certified texts through the tokenizer, which adds
    special tokens as it does for any text.

    Raises:
        UserError: it can't be opened, or has no trained head.
        SeveralLabels: the head has more than one label.
    """
    golden = certificate["golden"]
    with one_sentence(folder):
        tokenizer: Any = AutoTokenizer.from_pretrained(expand(folder), trust_remote_code=False, mistral_format=False)
        model = _plain_model(folder)
        if model.config.get_text_config().pad_token_id is None:
            model.config.get_text_config().pad_token_id = tokenizer.pad_token_id
        form = certificate.get("critiques")
        critic = None if form is None else plain_critic(folder, tokenizer, form)

    def scores(rows: Sequence[Sequence[int]]) -> list[float]:
        batch = tokenizer.pad({"input_ids": [list(row) for row in rows]}, return_tensors="pt")
        with torch.no_grad():
            logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        if logits.shape[-1] != 1:
            raise SeveralLabels
        return [float(x) for x in logits[:, 0].float()]

    def answers(form: str, asked: Sequence[int], rows: Sequence[Sequence[int]]) -> Answers:
        rows = rows if critic is None else [critic(row) for row in rows]
        together = scores(rows) if tokenizer.pad_token_id is not None else None
        return Answers(
            form, asked, [scores([row])[0] if together is not None else _unpadded(row) for row in rows], together
        )

    def _unpadded(row: Sequence[int]) -> float:
        with torch.no_grad():
            return float(model(input_ids=torch.tensor([list(row)])).logits[0, 0])

    ended = [i for i, text in enumerate(golden) if text["ended"] and text["as_rendered"]]
    if certificate["conversational"]:
        if not tokenizer.chat_template:
            raise UserError(
                f"{folder}: the tokenizer has no chat template, so nobody can render conversations as the model reads them."
            )
        with one_sentence(folder):
            rows = [tokenizer.apply_chat_template(golden[i]["messages"], return_dict=True)["input_ids"] for i in ended]
        yield answers("transformers, apply_chat_template", ended, rows)
    everything = [i for i, text in enumerate(golden) if text["as_rendered"]]
    yield answers("transformers, text", everything, [tokenizer(golden[i]["text"])["input_ids"] for i in everything])


def _plain_model(folder: str) -> Any:
    """Open a checkpoint, or an adapter on its base, without any help of this package's loaders.

    Raises:
        UserError: no trained head.
    """
    path = Path(expand(folder))
    arguments: dict[str, Any] = {"dtype": "auto", "use_safetensors": True}
    is_adapter = (path / ADAPTER_CONFIG).is_file()
    base = find_source(path).base
    if is_adapter:
        arguments["num_labels"] = 1
    model, report = AutoModelForSequenceClassification.from_pretrained(
        base, output_loading_info=True, trust_remote_code=False, **arguments
    )
    missing = set(report["missing_keys"])
    if is_adapter and (path / ADAPTER_WEIGHTS).is_file():
        missing -= {name.removeprefix("base_model.model.") for name in adapter_weights(path)}
        model = PeftModel.from_pretrained(model, str(path))
    if missing:
        raise UserError(
            f"{folder}: no trained head ({', '.join(sorted(missing)[:3])} are not there), so its scores would be random."
        )
    return model.eval()


def _first_line(text: str) -> str:
    """Return the beginning of a reply, for a sentence."""
    line = " ".join(text.split())
    return line[:120] + ("…" if len(line) > 120 else "")
