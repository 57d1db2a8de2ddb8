"""Reward models of this package behind a real vLLM server: the scores are those of plain transformers, raw.

Skipped where there is no environment for vLLM; `make_vllm_environment.sh` makes one.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import requests
import torch
from typer.testing import CliRunner

from rlhf.cli import app as command
from tests.engines import vllm
from tests.reward.families import FAMILIES
from tests.reward.test_parity import Saved, base, classes, one_by_one, opened, save_family

pytestmark = pytest.mark.skipif(vllm.absent() is not None, reason=vllm.absent() or "")
__all__ = ["base"]

# float32 on both sides, other kernels; weights of deviation 0.2 make scores of about 1.
TOLERANCE = 1e-4
NAME = "reward"


class Server(NamedTuple):
    """A saved family, which of its folders is served, and where."""

    saved: Saved
    folder: Path
    address: str


def serve_exported(saved: Saved, base: Path) -> tuple[str, ...]:
    """Return the arguments for a merged model: nothing but its folder."""
    return (str(saved.folders["exported"]),)


def serve_adapter(saved: Saved, base: Path) -> tuple[str, ...]:
    """Return the arguments for an adapter on its base.

    The base's own configuration knows nothing of a score, so it is told: one label, and no activation (`problem_type`). A
    request that does not name the adapter is answered by the base with a head that was never written.
    """
    folder = saved.folders["lora"]
    config = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "problem_type": "regression"}
    arguments = [str(base), "--tokenizer", str(folder), "--convert", "classify", "--hf-overrides", json.dumps(config)]
    return (*arguments, "--enable-lora", "--lora-modules", f"{NAME}={folder}")


@pytest.fixture(scope="module", params=["ChatML, exported", "Llama 3, exported", "Zephyr, lora"])
def server(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A vLLM server in float32; its default is bfloat16 for a float32 checkpoint."""
    family, kind = request.param.split(", ")
    saved = save_family(FAMILIES[family], base, tmp_path_factory.mktemp("family"))
    arguments = serve_exported(saved, base) if kind == "exported" else serve_adapter(saved, base)
    name = NAME if kind == "exported" else "base"
    log = tmp_path_factory.mktemp("vllm") / "log"
    with vllm.served(*arguments, "--dtype", "float32", "--max-model-len", "1024", log=log, name=name) as address:
        yield Server(saved, saved.folders[kind], address)


def classified(address: str, body: dict[str, Any]) -> torch.Tensor:
    """Return the scores that `/classify` gives."""
    reply = requests.post(f"{address}/classify", json={"model": NAME, **body}, timeout=120)
    assert reply.status_code == 200, reply.text
    return classes(reply.json())


def test_vllm_gives_the_same_scores(server: Server) -> None:
    """Texts, token ids and messages, with and without vLLM's activation, `/classify` and `/pooling`."""
    model, tokenizer = opened(server.folder)
    whole = server.saved.whole
    expected = one_by_one(model, tokenizer, whole)
    assert expected.min() < 0 or expected.max() > 1, "no probabilities"
    texts = [tokenizer.apply_chat_template(x, tokenize=False) for x in whole]
    rows = [tokenizer.apply_chat_template(x, return_dict=True)["input_ids"] for x in whole]
    each = [classified(server.address, {"messages": x}) for x in whole]
    pooled = requests.post(f"{server.address}/pooling", json={"model": NAME, "input": texts}, timeout=120).json()
    scores = {
        "texts": classified(server.address, {"input": texts}),
        "texts, activation asked for": classified(server.address, {"input": texts, "use_activation": True}),
        "token ids": classified(server.address, {"input": rows}),
        "messages": torch.cat(each),
        "/pooling": torch.tensor([entry["data"][0] for entry in pooled["data"]]),
    }
    worst = {path: (x - expected).abs().max().item() for path, x in scores.items()}
    print({path: f"{difference:.1e}" for path, difference in worst.items()})
    assert max(worst.values()) < TOLERANCE, worst


def test_verify_holds(server: Server) -> None:
    """`rlhf verify URL --against MODEL` finds no fault in vLLM's server."""
    arguments = ["verify", server.address, "--against", str(server.folder), "--name", NAME, "--timeout", "300"]
    result = CliRunner().invoke(command, arguments)
    print(result.output)
    assert result.exit_code == 0, result.output
