"""One text, one score: every family of chat templates, every kind of saved model, every program that can be asked.

Expected are the logits of plain transformers: its own `apply_chat_template`, one conversation at a time. That side and
`paths_of_others` know nothing of this package but the folder that it saved.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from fastapi.testclient import TestClient
from peft import AutoPeftModelForSequenceClassification, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForCausalLM, pipeline
from typer.testing import CliRunner

from rlhf import load_reward_model, save_reward_model
from rlhf.cli import app as command
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.pipeline.model_commands import export_model
from rlhf.reward.model import RewardModel
from rlhf.serve.reward import reward_app
from tests.reward.families import FAMILIES, VOCABULARY, Family
from tests.unit_scale import build_reward_model

TOLERANCE = 1e-5
KINDS = ("full", "lora", "exported")
Turns = list[dict[str, str]]
Scores = Iterator[tuple[str, torch.Tensor]]

ONE: Turns = [{"role": "user", "content": "Which fruit is red?"}]
SEVERAL: Turns = [
    *ONE,
    {"role": "assistant", "content": "An apple."},
    {"role": "user", "content": "  And naïve 水果 🍎?\n"},
]
SYSTEM = {"role": "system", "content": "Answer in one word."}
ASKED: list[tuple[Turns, str]] = [
    (ONE, "A cherry."),
    (ONE, " One:\n\n- an apple\n"),  # blanks at both ends
    (SEVERAL, "草莓 🍓, s'il vous plaît"),
    (SEVERAL, ""),
    ([SYSTEM, *ONE], "Plum."),
    ([SYSTEM, *SEVERAL], "A pear, or two.\nOr three."),
]


class Saved(NamedTuple):
    """A family's tokenizer, as a policy has it, the folders of its reward models by kind, and what they are asked."""

    tokenizer: Any
    folders: dict[str, Path]
    asked: list[tuple[Turns, str]]

    @property
    def whole(self) -> list[Turns]:
        """What they are asked, as whole conversations."""
        return [[*prompt, {"role": "assistant", "content": answer}] for prompt, answer in self.asked]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny decoder whose vocabulary holds every family's; weights of deviation 0.2, so that scores differ."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes["head_dim"] = 32  # vLLM's kernels for CPUs have none for smaller heads
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, max_position_embeddings=1024, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request: Any, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Models of one family."""
    return save_family(FAMILIES[request.param], base, tmp_path_factory.mktemp("family"))


def save_family(family: Family, base: Path, root: Path) -> Saved:
    """Save models as the pipeline saves them, full, adapter, and merged by `rlhf export`, every trained weight moved."""
    family.build().save_pretrained(root / "policy")
    tokenizer = load_tokenizer(root / "policy", conversational=True)
    for kind in ("full", "lora"):
        torch.manual_seed(1)
        settings = model_settings({"use_peft": True, "lora_r": 4} if kind == "lora" else {})
        model = build_reward_model(base, settings, pad_token_id=tokenizer.pad_token_id)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.05 * torch.randn_like(parameter)
        save_reward_model(root / kind, model, tokenizer, samples=[(ONE, "yes " * (i + 1)) for i in range(8)])
    export_model(root / "lora", root / "exported")
    asked = [(prompt, answer) for prompt, answer in ASKED if family.system or SYSTEM not in prompt]
    return Saved(tokenizer, {kind: root / kind for kind in KINDS}, asked)


def opened(folder: Path) -> tuple[Any, Any]:
    """Open a folder with plain transformers, or plain PEFT."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if not (folder / "adapter_config.json").is_file():
        return AutoModelForSequenceClassification.from_pretrained(folder).eval(), tokenizer
    model = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer


@torch.no_grad()
def one_by_one(model: Any, tokenizer: Any, conversations: list[Turns]) -> torch.Tensor:
    """Return the logits of conversations that the tokenizer renders and encodes itself; nothing is padded."""
    batches = [tokenizer.apply_chat_template(x, return_tensors="pt", return_dict=True) for x in conversations]
    return torch.tensor([model(**batch).logits[0, 0].item() for batch in batches])


@torch.no_grad()
def paths_of_others(folder: Path, saved: Saved) -> Scores:
    """Yield the scores of programs that know nothing of this package."""
    model, tokenizer = opened(folder)
    batch = tokenizer.apply_chat_template(saved.whole, return_tensors="pt", return_dict=True, padding=True)
    yield "transformers, a batch", model(**batch).logits[:, 0]
    texts = [tokenizer.apply_chat_template(x, tokenize=False) for x in saved.whole]
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    yield "its pipeline", torch.tensor([x["score"] for x in classify(texts, function_to_apply="none")])
    if not (
        folder / "adapter_config.json"
    ).is_file():  # an adapter's base does not say that the score is no probability
        yield "its pipeline, as it is", torch.tensor([x["score"] for x in classify(texts, batch_size=3)])
        return
    base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    network = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    yield "PeftModel", one_by_one(PeftModel.from_pretrained(network, folder).eval(), tokenizer, saved.whole)


def paths_of_this_package(folder: Path, saved: Saved, reward: RewardModel) -> Scores:
    """Yield the scores of this package: loaded, on the command line, over HTTP.

    An answer may carry its end token, and a prompt may be what the policy's tokenizer has rendered.
    """
    prompts, answers = [prompt for prompt, _ in saved.asked], [answer for _, answer in saved.asked]
    tokenizer, end, begin = saved.tokenizer, saved.tokenizer.eos_token, saved.tokenizer.bos_token or "\0"
    asking = [tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in prompts]
    forms: dict[str, tuple[list[Any], list[str]]] = {
        "messages": (prompts, answers),
        "end tokens": (prompts, [answer + end for answer in answers]),
        "rendered": (asking, answers),
        "rendered, stripped, end tokens": ([x.rstrip() for x in asking], [answer + end + "\n" for answer in answers]),
        "rendered, no begin token": ([x.removeprefix(begin) for x in asking], answers),
    }
    for name, (asked, answered) in forms.items():
        yield f"load_reward_model, {name}", reward.score(asked, answered)
    rows: dict[str, list[dict[str, Any]]] = {"whole": [{"messages": x} for x in saved.whole]}
    rows |= {name: [{"prompt": p, "response": a} for p, a in zip(*form, strict=True)] for name, form in forms.items()}
    lines = "".join(json.dumps(row) + "\n" for form in rows.values() for row in form)
    output = CliRunner().invoke(command, ["score", str(folder)], input=lines).stdout
    scores = torch.tensor([json.loads(line)["score"] for line in output.splitlines()]).view(len(rows), -1)
    yield from zip((f"rlhf score, {name}" for name in rows), scores, strict=True)
    with TestClient(reward_app(reward, "test")) as client:
        for name, (asked, answered) in forms.items():
            body = {"prompts": asked, "responses": answered}
            yield f"/get_reward, {name}", posted(client, "/get_reward", body)["rewards"]
            yield f"/score, {name}", posted(client, "/score", body)["scores"]
        yield "/score, whole", posted(client, "/score", {"messages": saved.whole})["scores"]
        for name, reader in {"its own template": reward.tokenizer, "the policy's template": tokenizer}.items():
            texts = [reader.apply_chat_template(x, tokenize=False) for x in saved.whole]
            yield f"/classify, {name}", classes(posted(client, "/classify", {"input": texts}))
        each = [classes(posted(client, "/classify", {"messages": x})) for x in saved.whole]
        yield "/classify, messages", torch.cat(each)
        yield from queries(client, saved, asking)


def posted(client: TestClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """Return a server's answer, its lists of numbers as tensors."""
    reply = client.post(path, json=body)
    assert reply.status_code == 200, reply.text
    return {k: torch.tensor(v) if k in ("rewards", "scores") else v for k, v in reply.json().items()}


def classes(reply: dict[str, Any]) -> torch.Tensor:
    """Return the scores in a reply as vLLM's clients read them."""
    return torch.tensor([entry["probs"][0] for entry in sorted(reply["data"], key=lambda entry: entry["index"])])


def queries(client: TestClient, saved: Saved, asking: list[str]) -> Scores:
    """Yield the scores of `/get_reward` for OpenRLHF's `query`: what the policy's tokenizer reads and has written, as text."""
    tokenizer, end, begin = saved.tokenizer, saved.tokenizer.eos_token, saved.tokenizer.bos_token or ""
    whole = [tokenizer.apply_chat_template(x, tokenize=False) for x in saved.whole]
    close = whole[0].rpartition(saved.asked[0][1])[2]
    bare = [text.removesuffix(close) for text in whole]
    tails = {
        "no end": "",
        "its close": close,
        "close, stripped": close.strip(),
        "end token": end,
        "end twice": end + end,
    }
    tails |= {f"{name}, newline": tail + "\n" for name, tail in tails.items() if tail}
    forms = {name: [text + tail for text in bare] for name, tail in tails.items()}
    forms["padded"] = [tokenizer.pad_token * 2 + text + end + tokenizer.pad_token for text in bare]
    forms["no begin token"] = [text.removeprefix(begin) for text in whole]
    forms["two begin tokens"] = [begin + text for text in whole]
    body: dict[str, Any] = {"query": [text for form in forms.values() for text in form]}
    for name in ("query", "query and prompts"):
        scores = posted(client, "/get_reward", body)["rewards"].view(len(forms), -1)
        yield from zip((f"{name}: {form}" for form in forms), scores, strict=True)
        # Begin tokens and padding stand before the prompt too.
        starts = {"padded": tokenizer.pad_token * 2 + "@", "two begin tokens": begin + "@"}
        body["prompts"] = [
            x.removeprefix(begin) if form == "no begin token" else starts.get(form, "@").replace("@", x)
            for form in forms
            for x in asking
        ]


@pytest.mark.fault("one score everywhere")
@pytest.mark.parametrize("kind", KINDS)
def test_one_text_has_one_score(saved: Saved, kind: str) -> None:
    """float32: every path within 1e-5 of plain transformers."""
    folder = saved.folders[kind]
    expected = one_by_one(*opened(folder), saved.whole)
    paths = [*paths_of_others(folder, saved), *paths_of_this_package(folder, saved, load_reward_model(folder))]
    worst = {name: (scores - expected).abs().max().item() for name, scores in paths}
    for name, difference in worst.items():
        print(f"parity {kind:8s} {name:50s} {difference:.1e}")
    assert {name: x for name, x in worst.items() if not x <= TOLERANCE} == {}
    assert expected.std() > 0.1, "texts have other scores by far more"
