"""Tiny reward models of many families, and servers of them as a stranger would write those, in plain transformers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI, Request
from transformers import CONFIG_MAPPING, AutoModelForSequenceClassification, AutoTokenizer

from tests.conftest import PROMPTS, WORDS
from tests.serve.running import running

Rows = list[list[int]]


class Served:
    """A reward model, read and served plainly; the attributes are where faults are planted."""

    def __init__(self, folder: Path, *, attention: str = "eager"):
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype="auto", attn_implementation=attention
        ).eval()
        self.texts: Callable[[str], str] = lambda text: text
        self.conversation: Callable[[list[Any]], str] = lambda messages: self.tokenizer.apply_chat_template(
            messages, tokenize=False
        )
        self.ids: Callable[[list[int]], list[int]] = lambda ids: ids
        self.activation: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores
        self.order: Callable[[list[float]], list[float]] = lambda scores: scores
        self.batch: Callable[[Rows], torch.Tensor] = self.padded_right

    def padded_right(self, rows: Rows) -> torch.Tensor:
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt", padding_side="right")
        return self.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, 0].float()

    def padded_left_without_mask(self, rows: Rows) -> torch.Tensor:
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        backbone = getattr(self.model, self.model.base_model_prefix)
        return self.model.score(backbone(input_ids=ids).last_hidden_state)[:, -1, 0].float()

    @torch.no_grad()
    def scores(self, texts: list[str], *, activated: bool = True) -> list[float]:
        rows = [self.ids(self.tokenizer(text)["input_ids"]) for text in texts]
        scores = self.batch(rows)
        return self.order((self.activation(scores) if activated else scores).tolist())

    def app(self) -> FastAPI:
        """vLLM's `/classify` and `/pooling`, as far as verify asks."""
        app = FastAPI()

        async def scores_of(request: Request) -> list[float]:
            body = await request.json()
            asked = [self.conversation(body["messages"])] if "messages" in body else map(self.texts, body["input"])
            return self.scores(list(asked), activated=body.get("use_activation", True))

        @app.post("/classify")
        async def classify(request: Request) -> Any:
            scores = await scores_of(request)
            return {"data": [{"index": i, "label": "r", "probs": [x], "num_classes": 1} for i, x in enumerate(scores)]}

        @app.post("/pooling")
        async def pooling(request: Request) -> Any:
            scores = await scores_of(request)
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


SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {**SMALL, "num_key_value_heads": 2},
    "qwen2": {**SMALL, "num_key_value_heads": 2},
    "qwen3": {**SMALL, "num_key_value_heads": 2, "head_dim": 16},
    "mistral": {**SMALL, "num_key_value_heads": 2},
    "gemma": {**SMALL, "num_key_value_heads": 1, "head_dim": 16},
    "phi3": {**SMALL, "num_key_value_heads": 4},
    "gpt_neox": SMALL,
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4},
}


def make_reward_model(folder: Path, *, architecture: str, template: str | None, dtype: torch.dtype, seed: int) -> None:
    """A random reward model with a chat template (None: this package's), saved as this package saves one."""
    from rlhf.models.scratch import train_tokenizer
    from rlhf.reward.load import save_reward_model

    tokenizer = train_tokenizer([" ".join(WORDS)] * 5, vocab_size=320, model_max_length=256)
    tokenizer.bos_token = "<|system|>"
    tokenizer.chat_template = template or tokenizer.chat_template
    config = CONFIG_MAPPING[architecture](
        vocab_size=len(tokenizer),
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        initializer_range=0.15,
        num_labels=1,
        problem_type="regression",
        **SETTINGS[architecture],
    )
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32).to(dtype)
    torch.nn.init.normal_(model.score.weight, std=65**-0.5)
    samples = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
    save_reward_model(folder, model, tokenizer, samples=samples)


@contextmanager
def listening(apps: dict[str, FastAPI]) -> Iterator[str]:
    """One server with an application under each path; the value is its address."""
    whole = FastAPI()
    for name, app in apps.items():
        whole.mount(f"/{name}", app)
    with running(whole) as url:
        yield url
