"""Reward servers as a stranger would write them, in plain transformers: healthy ones, and ones with a fault planted."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI, Request
from transformers import AutoModelForSequenceClassification, AutoTokenizer

Rows = list[list[int]]


class Served:
    """A reward model, read and served plainly; the attributes are where faults are planted."""

    def __init__(self, folder: Path):
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
        self.texts: Callable[[str], str] = lambda text: text
        self.conversation: Callable[[list[Any]], str] = lambda messages: self.tokenizer.apply_chat_template(
            messages, tokenize=False
        )
        self.ids: Callable[[list[int]], list[int]] = lambda ids: ids
        self.activation: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores
        self.order: Callable[[list[float]], list[float]] = lambda scores: scores
        self.batch: Callable[[Rows], torch.Tensor] = self.padded_right

    def padded_right(self, rows: Rows) -> torch.Tensor:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        states = self.model.model(input_ids=ids, attention_mask=mask).last_hidden_state
        return self.model.score(states)[torch.arange(len(rows)), mask.sum(1) - 1, 0].float()

    def padded_left_without_mask(self, rows: Rows) -> torch.Tensor:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        return self.model.score(self.model.model(input_ids=ids).last_hidden_state)[:, -1, 0].float()

    @torch.no_grad()
    def scores(self, texts: list[str]) -> list[float]:
        rows = [self.ids(self.tokenizer(text)["input_ids"]) for text in texts]
        return self.order(self.activation(self.batch(rows)).tolist())

    def app(self) -> FastAPI:
        """vLLM's `/classify` and `/pooling` and OpenRLHF's `/get_reward`; `app.docs` says which it describes."""
        app = FastAPI()

        async def texts_of(request: Request) -> list[str]:
            body = await request.json()
            if "messages" in body:
                return [self.conversation(body["messages"])]
            return [self.texts(text) for text in body["input"]]

        @app.post("/classify")
        async def classify(request: Request) -> Any:
            scores = self.scores(await texts_of(request))
            return {"data": [{"index": i, "label": "r", "probs": [x], "num_classes": 1} for i, x in enumerate(scores)]}

        @app.post("/pooling")
        async def pooling(request: Request) -> Any:
            scores = self.scores(await texts_of(request))
            return {"data": [{"index": i, "object": "pooling", "data": [x]} for i, x in enumerate(scores)]}

        return app

    def openrlhf(self) -> FastAPI:
        """The contract of OpenRLHF's serve_rm: strips the end token, and puts one there."""
        app = FastAPI()

        @app.post("/get_reward")
        async def get_reward(request: Request) -> Any:
            end = self.tokenizer.eos_token
            queries = [text.removesuffix(end) + end for text in (await request.json())["query"]]
            return {"rewards": self.scores(queries)}

        return app


@contextmanager
def listening(apps: dict[str, FastAPI]) -> Iterator[str]:
    """One server with an application under each path; the value is its address."""
    whole = FastAPI()
    for name, app in apps.items():
        whole.mount(f"/{name}", app)
    server = uvicorn.Server(uvicorn.Config(whole, host="127.0.0.1", port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
