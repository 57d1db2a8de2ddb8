"""A reward model on SmolLM2-135M-Instruct, asked in every way that there is: the largest difference and the accuracy of each.

python tests/benchmarks/parity_smollm2.py --model smol --data ../shared/data/pairs_hh_helpful.jsonl.gz --out runs/parity-smollm2

Trains a LoRA reward model for a few steps (`--steps`), exports it, and scores 40 other pairs. Expected are the adapter's logits
by plain PEFT and transformers. vLLM is asked too where its server is running on the exported folder (`--vllm URL`), or on the
adapter (`--vllm-lora URL`, the adapter under the name "reward"). What is in `--out` already is not made again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
import torch
from fastapi.testclient import TestClient
from transformers import pipeline

from rlhf import build_reward_model, load_reward_model, save_reward_model
from rlhf.data.rows import Pair, answer
from rlhf.data.sources import read_pairs
from rlhf.models.load import load_tokenizer, model_settings
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import encode_answers
from rlhf.objectives.pairwise import pair_loss
from rlhf.pipeline.model_commands import export_model
from rlhf.serve.models import ServedModel
from rlhf.serve.reward import Limits, serve_app
from tests.reward.test_parity import Saved, classes, one_by_one, opened, posted

Scores = Iterator[tuple[str, torch.Tensor]]


def short_pairs(source: str, most_characters: int, count: int) -> list[Pair]:
    """Return the first pairs of a file that are short; the first half is trained on, the second half scored."""
    rows, _ = read_pairs(source)
    texts = ["".join(turn["content"] for turn in [*row["prompt"], *row["chosen"], *row["rejected"]]) for row in rows]
    return [row for row, text in zip(rows, texts, strict=True) if len(text) < most_characters][:count]


def train(base: Path, pairs: list[Pair], steps: int, out: Path) -> None:
    """Train a LoRA reward model, four pairs a step, and save it as the pipeline does."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(base, conversational=True)
    model = build_reward_model(
        base, model_settings({"use_peft": True, "lora_r": 8}), pad_token_id=tokenizer.pad_token_id
    )
    reader = load_tokenizer(base, conversational=True)
    end_at_end_token(reader)
    optimizer = torch.optim.AdamW([x for x in model.parameters() if x.requires_grad], lr=5e-4)
    for step in range(steps):
        batch = [pairs[(step * 4 + i) % len(pairs)] for i in range(4)]
        prompts = [row["prompt"] for row in batch] * 2
        answers = [answer(row, side) for side in ("chosen", "rejected") for row in batch]
        rows, _ = encode_answers(reader, prompts, answers)
        scores = torch.cat([model(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
        loss = pair_loss(scores[:4], scores[4:]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {step + 1}: loss {loss.item():.3f}", flush=True)
    model.eval()
    samples = [(row["prompt"], answer(row, "chosen")) for row in pairs[:8]]
    save_reward_model(out / "lora", model, tokenizer, samples=samples)
    export_model(out / "lora", out / "exported")


@torch.no_grad()
def paths_of_others(folder: Path, saved: Saved) -> Scores:
    """Yield the scores of plain transformers and its pipeline."""
    model, tokenizer = opened(folder)
    yield "transformers, one at a time", one_by_one(model, tokenizer, saved.whole)
    texts = [tokenizer.apply_chat_template(x, tokenize=False) for x in saved.whole]
    classify = pipeline("text-classification", model=model, tokenizer=tokenizer)
    scores = classify(texts, function_to_apply="none", batch_size=8)
    yield "its pipeline", torch.tensor([x["score"] for x in scores])


def paths_of_this_package(folder: Path, saved: Saved) -> Scores:
    """Yield the scores of the package: loaded, `rlhf score`, the server's endpoints."""
    prompts, answers = [prompt for prompt, _ in saved.asked], [response for _, response in saved.asked]
    tokenizer, end = saved.tokenizer, saved.tokenizer.eos_token
    reward = load_reward_model(folder)
    yield "load_reward_model", reward.score(prompts, answers)
    lines = "".join(json.dumps({"messages": x}) + "\n" for x in saved.whole)
    command = [sys.executable, "-m", "rlhf", "score", str(folder)]
    printed = subprocess.run(command, input=lines, capture_output=True, text=True, check=True).stdout
    yield "rlhf score", torch.tensor([json.loads(line)["score"] for line in printed.splitlines()])
    # The policy's template ends an answer in the end token and a newline.
    whole = [tokenizer.apply_chat_template(x, tokenize=False) for x in saved.whole]
    asking = [tokenizer.apply_chat_template(x, tokenize=False, add_generation_prompt=True) for x in prompts]
    bodies: dict[str, dict[str, Any]] = {
        "prompts and responses": {"prompts": prompts, "responses": answers},
        "answers with their end token": {"prompts": prompts, "responses": [x + end for x in answers]},
        "rendered prompts and responses": {"prompts": asking, "responses": answers},
        "query, newline at its end": {"query": whole},
        "query, end token": {"query": [x.rstrip() for x in whole], "prompts": asking},
        "query, no end token": {"query": [x.rstrip().removesuffix(end) for x in whole]},
    }
    with TestClient(serve_app([ServedModel("reward", [reward])], limits=Limits(seconds=3600))) as client:
        for name, body in bodies.items():
            yield f"/get_reward, {name}", posted(client, "/get_reward", body)["rewards"]
        yield "/score", posted(client, "/score", {"messages": saved.whole})["scores"]
        yield "/classify", classes(posted(client, "/classify", {"input": whole}))


def paths_of_vllm(address: str, folder: Path, saved: Saved) -> Scores:
    """Yield the scores of a vLLM server, for texts and for messages."""
    tokenizer = opened(folder)[1]
    texts = [tokenizer.apply_chat_template(x, tokenize=False) for x in saved.whole]

    def ask(body: dict[str, Any]) -> torch.Tensor:
        reply = requests.post(f"{address}/classify", json={"model": "reward", **body}, timeout=600)
        reply.raise_for_status()
        return classes(reply.json())

    yield "vLLM /classify, texts", ask({"input": texts})
    yield "vLLM /classify, messages", torch.cat([ask({"messages": x}) for x in saved.whole])


def main() -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--most-characters", type=int, default=200)
    parser.add_argument("--vllm")
    parser.add_argument("--vllm-lora")
    arguments = parser.parse_args()
    pairs = short_pairs(arguments.data, arguments.most_characters, 2 * arguments.pairs)
    out = arguments.out
    if not (out / "exported").is_dir():
        train(arguments.model, pairs[: arguments.pairs], arguments.steps, out)
    scored = pairs[arguments.pairs :]
    asked: Any = [(row["prompt"], answer(row, side)) for side in ("chosen", "rejected") for row in scored]
    folders = {kind: out / kind for kind in ("lora", "exported")}
    saved = Saved(load_tokenizer(arguments.model, conversational=True), folders, asked)
    expected = one_by_one(*opened(folders["lora"]), saved.whole)
    rows = []
    print("| model | path | largest difference | accuracy | s |\n|---|---|---|---|---|")
    for kind, folder in folders.items():
        paths = [paths_of_others(folder, saved), paths_of_this_package(folder, saved)]
        address = arguments.vllm if kind == "exported" else arguments.vllm_lora
        paths += [paths_of_vllm(address, folder, saved)] if address else []
        for path in paths:
            start = time.monotonic()
            for name, scores in path:
                chosen, rejected = scores.view(2, -1)
                row = {
                    "model": kind,
                    "path": name,
                    "difference": (scores - expected).abs().max().item(),
                    "accuracy": (chosen > rejected).float().mean().item(),
                    "seconds": time.monotonic() - start,
                }
                print(
                    "| {model} | {path} | {difference:.1e} | {accuracy:.3f} | {seconds:.0f} |".format(**row), flush=True
                )
                rows.append(row)
                start = time.monotonic()
    facts = {"pairs": len(scored), "deviation": expected.std().item(), "paths": rows}
    (out / "parity.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
