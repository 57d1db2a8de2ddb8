"""What MetaRM's extra step costs: seconds and memory of `MetaRewardTrainer` beside the plain trainer on the same pairs.

python tests/benchmarks/meta_cost.py --json meta.json

A causal model of 20M parameters with random weights on the lab's texts, batches of 16 pairs, full fine-tuning, AdamW; a
repetition takes other pairs; sides alternate within one process.

- `overhead`: seconds of meta steps over the sum of plain steps on the same pairs and plain forward-backward passes on the
  same meta tokens (16 prompts with 5 answers each, as in the paper).
- `ratio_equal_tokens`: meta steps over plain steps where the meta set is the batch itself, so that both have as many tokens.
- `memory_ratio`: peak of a process of its own per side, above what it held after its imports, equal tokens.

Medians of paired ratios, with smallest and largest. Finished repetitions are kept beside FILE.
"""

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from reward_speed import Clock, canonical, peak_kib, texts
from transformers import set_seed
from trl import RewardConfig

from rlhf import MetaRewardTrainer, PairRewardTrainer, build_reward_model
from rlhf.lab.world import write_answer
from rlhf.models.load import load_tokenizer
from rlhf.models.scratch import build_base
from rlhf.models.text import plain
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.trainer import training_columns

MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6, "num_attention_heads": 8}
BATCH, STEPS, PROMPTS, K = 16, 8, 16, 5
Rows = list[dict[str, Any]]


def answered(rows: Rows, rng: random.Random) -> Rows:
    """Five different answers of the lab's writers to each prompt."""
    return [
        {
            "prompt": row["prompt"],
            "responses": [write_answer(plain(row["prompt"]), rng) for _ in range(K)],
            "ended": [True] * K,
        }
        for row in rows
    ]


def as_meta(rows: Rows) -> Rows:
    """The pairs themselves, without saying which answer is the better one."""
    sides = ("chosen", "rejected")
    return [
        {"prompt": row["prompt"], "responses": [row[s][0]["content"] for s in sides], "ended": [True, True]}
        for row in rows
    ]


def make(base: Path, rows: Rows, meta: Rows | None, steps: int) -> tuple[Any, Clock]:
    set_seed(0)
    tokenizer = load_tokenizer(base, conversational=True)
    model = build_reward_model(base, pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(
        tempfile.mkdtemp(), use_cpu=True, bf16=False, gradient_checkpointing=False, seed=0, max_steps=steps,
        learning_rate=1e-5, per_device_train_batch_size=BATCH, save_strategy="no", logging_strategy="no",
        report_to="none", disable_tqdm=True,
    )  # fmt: skip
    clock = Clock()
    data = Dataset.from_list(training_columns(rows))
    common: dict[str, Any] = {"train_dataset": data, "processing_class": tokenizer, "callbacks": [clock]}
    if meta is None:
        trainer: Any = PairRewardTrainer(model, args, **common)
    else:
        trainer = MetaRewardTrainer(model, args, meta_samples=meta, meta_prompts=PROMPTS, **common)
    trainer._compared = True  # once a run, not a step
    return trainer, clock


def seconds(base: Path, rows: Rows, meta: Rows | None) -> float:
    """Of eight steps, fetching of batches and ascents included: from the end of the first to the end of the last."""
    trainer, clock = make(base, rows, meta, STEPS + 1)
    ends: list[float] = []
    clock.on_step_end = lambda *_, **__: ends.append(time.monotonic())  # type: ignore[method-assign]
    trainer.train()
    return ends[-1] - ends[0]


def forward_backward(base: Path, rows: Rows, meta: Rows) -> float:
    """Of eight plain passes over the tokens of the meta set, as many prompts at a time as an ascent takes."""
    trainer, _ = make(base, rows, meta, 1)
    parameters = list(trainer.model.parameters())
    found = []
    for step in range(STEPS + 1):
        begin = time.monotonic()
        groups = random.Random(step).sample(trainer.meta_groups, PROMPTS)
        torch.autograd.grad(trainer._spread(groups), parameters, allow_unused=True)
        found.append(time.monotonic() - begin)
    return sum(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4", help="one repetition each")
    parser.add_argument("--quick", action="store_true", help="a small model: whether it runs, not how fast")
    parser.add_argument("--memory", nargs=3, metavar=("SIDE", "BASE", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    if arguments.memory:
        side, base, file = arguments.memory
        rows, before = json.loads(Path(file).read_text()), peak_kib()
        make(Path(base), rows, as_meta(rows) if side == "meta" else None, 4)[0].train()
        print((peak_kib() - before) / 1024)
        return
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Model and pairs.
    source = canonical(None)
    base = folder / ("base-quick" if arguments.quick else "base")
    if not (base / "config.json").is_file():
        sizes = {**MODEL, "num_hidden_layers": 1, "hidden_size": 64} if arguments.quick else MODEL
        build_base(base, texts(source), architecture="llama", settings={**sizes, "vocab_size": 900}, seed=0)
    tokenizer = load_tokenizer(base, conversational=True)
    parameters = sum(p.numel() for p in build_reward_model(base, pad_token_id=tokenizer.pad_token_id).parameters())

    # 2. Seconds.
    table = []
    seconds(base, source[:300], None)  # warm-up
    for seed in (int(seed) for seed in arguments.seeds.split(",")):
        file = folder / f"seconds-{seed}{'-quick' if arguments.quick else ''}.json"
        if not file.is_file():
            rng = random.Random(seed)
            rows = rng.sample(source, 300)
            meta = answered(rows, rng)
            file.write_text(
                json.dumps(
                    {
                        "plain": seconds(base, rows, None),
                        "meta": seconds(base, rows, meta),
                        "passes": forward_backward(base, rows, meta),
                        "equal": seconds(base, rows, as_meta(rows)),
                    }
                )
            )
        row = json.loads(file.read_text())
        table.append(row)
        print(f"repetition {seed} " + " ".join(f"{name} {value:.1f} s" for name, value in row.items()), flush=True)

    # 3. Memory.
    memory_rows = folder / "memory-rows.json"
    memory_rows.write_text(json.dumps(source[:64]))
    memory = {}
    for side in ("plain", "meta"):
        command = [sys.executable, __file__, "--json", "unused", "--memory", side, str(base), str(memory_rows)]
        memory[side] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])
    overhead = [row["meta"] / (row["plain"] + row["passes"]) for row in table]
    equal = [row["equal"] / row["plain"] for row in table]
    found = {
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "overhead": statistics.median(overhead),
        "overhead_range": [min(overhead), max(overhead)],
        "ratio_equal_tokens": statistics.median(equal),
        "ratio_equal_tokens_range": [min(equal), max(equal)],
        "memory_mib": memory,
        "memory_ratio": memory["meta"] / memory["plain"],
    }
    arguments.json.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
