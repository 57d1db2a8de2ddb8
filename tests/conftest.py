"""Tiny models made on the spot; no network, no GPU, one thread a process so that sums come out the same every time."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ.setdefault("OMP_NUM_THREADS", "1")

from pathlib import Path
from typing import Any

import pytest
import torch

WORDS = [
    "red",
    "blue",
    "green",
    "apple",
    "pear",
    "plum",
    "dog",
    "cat",
    "yes",
    "no",
    "please",
    "list",
    "name",
    "three",
    "two",
]
PROMPTS = [
    [{"role": "user", "content": f"{a} {b} {c}"}] for a in ("list", "name") for b in WORDS[:6] for c in WORDS[6:9]
]


def pytest_collection_finish() -> None:
    """Let the garbage collector pass over the libraries: trainers call it often, and each look through all takes a third of a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _figures_are_drawn_only_where_asked() -> None:
    from tests.undrawn import draw_only_where_asked

    draw_only_where_asked()


@pytest.fixture
def timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For plans whose seconds nobody reads: what is timed is timed once."""
    from rlhf.cost import slices

    monkeypatch.setattr(slices, "LEAST", 1)
    monkeypatch.setattr(slices, "ENOUGH", 0.0)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """For tests that look at figures."""
    from tests.undrawn import DRAW

    monkeypatch.setenv(DRAW, "1")


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Llama with byte-level BPE, chat template, distinct pad and end."""
    from rlhf.models.scratch import build_base

    folder = tmp_path_factory.mktemp("base")
    settings: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
        "vocab_size": 300,
        "initializer_range": 0.2,
    }
    build_base(folder, [" ".join(WORDS)] * 5, architecture="llama", settings=settings, seed=0)
    return folder


@pytest.fixture(scope="session")
def verdict_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A one-layer Llama with room for two answers in a question about them."""
    from rlhf.models.scratch import build_base

    folder = tmp_path_factory.mktemp("verdicts")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    settings = {**sizes, "max_position_embeddings": 1024, "vocab_size": 300, "initializer_range": 0.5}
    build_base(folder, [" ".join(WORDS)] * 5, architecture="llama", settings=settings, seed=1)
    return folder


@pytest.fixture(scope="session")
def tokenizer(base_folder: Path) -> Any:
    from rlhf.models.load import load_tokenizer

    return load_tokenizer(base_folder, conversational=True)


@pytest.fixture(scope="session")
def pairs() -> Any:
    """Forty conversational pairs whose chosen answer says yes."""
    from datasets import Dataset

    rows = [
        {
            "prompt": prompt,
            "chosen": [{"role": "assistant", "content": f"yes {WORDS[i % 9]}"}],
            "rejected": [{"role": "assistant", "content": f"no {WORDS[i % 7]}"}],
        }
        for i, prompt in enumerate(PROMPTS[:36] + PROMPTS[:4])
    ]
    return Dataset.from_list(rows)


@pytest.fixture(scope="session")
def reward_folder(base_folder: Path, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained reward model on the base, saved as the pipeline saves one."""
    from rlhf.models.load import model_settings
    from rlhf.reward.load import save_reward_model
    from tests.unit_scale import build_reward_model

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("reward")
    model = build_reward_model(base_folder, model_settings({}), pad_token_id=tokenizer.pad_token_id)
    samples = [(prompt, f"yes {word}") for prompt, word in zip(PROMPTS, WORDS, strict=False)]
    save_reward_model(folder, model, tokenizer, samples=samples)
    return folder


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with a word-level vocabulary, as such models lie on the hub: no chat template, no end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("encoder")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: i for i, word in enumerate([*special, "Human", "Assistant", ":", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    PreTrainedTokenizerFast(tokenizer_object=inner, model_max_length=32, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    config.max_position_embeddings = 32
    BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture
def cpu_arguments(tmp_path: Path) -> dict[str, Any]:
    """Arguments that every trainer in a test shares."""
    return {
        "output_dir": str(tmp_path / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "save_strategy": "no",
        "seed": 0,
    }
