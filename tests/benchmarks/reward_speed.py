"""Training throughput and memory of `rlhf.PairRewardTrainer` beside `trl.RewardTrainer`, on the same rows.

python tests/benchmarks/reward_speed.py --json speed.json --pairs ../shared/data/pairs_hh_helpful.jsonl.gz
python tests/benchmarks/reward_speed.py --json speed.json --quick

One causal model of 42M parameters with random weights (8 layers of 512; speed does not depend on the values), a BPE of 32k
trained on the pairs, batches of 16, full fine-tuning, AdamW. Sides alternate within one process; each repetition draws
other pairs and gives every side the same 48, already tokenised. Timed are all steps; a first, short training of both sides is
the warm-up. Our comparison of shared and plain scores, once a run, is not in it. A ratio is the median of the paired ratios of pairs per second, given with their smallest and
largest. Rows:

- `fp32`, `bf16` (autocast): TRL as it comes: rows in random order, one encoding per answer.
- `fp32_sorted`: TRL fed exactly our batches, so that only the shared prompt differs.
- `fp32_checkpointing`: gradient checkpointing on, on both sides.
- `k_wise`: rankings of 8 answers, against ourselves with the same 28 pairs each by itself.

Memory is the peak of a process of its own per side, less what it held after its imports. Finished repetitions are kept
beside FILE, so a killed run goes on.
"""

import argparse
import gc
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import TrainerCallback, set_seed
from trl import RewardConfig, RewardTrainer

from rlhf import PairRewardTrainer, build_reward_model
from rlhf.data.sources import read_pairs
from rlhf.lab import LabSettings, build_lab
from rlhf.models.load import load_tokenizer
from rlhf.models.packing import largest_difference, order_by_length, pack
from rlhf.models.scratch import build_base
from rlhf.models.text import encode_answers
from rlhf.pipeline.training import quiet_libraries

MODEL = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
BATCH, K = 16, 8
VARIANTS = {  # name: sides, each (trainer, options)
    "fp32": (("trl", {}), ("ours", {})),
    "bf16": (("trl", {"bf16": True}), ("ours", {"bf16": True})),
    "fp32_sorted": (("trl", {"sorted": True}), ("ours", {})),
    "fp32_checkpointing": (("trl", {"gradient_checkpointing": True}), ("ours", {"gradient_checkpointing": True})),
    "k_wise": (("ours", {"exploded": True}), ("ours", {})),
}
Rows = list[Any]


class Clock(TrainerCallback):
    """Seconds from the beginning of the first step to the end of the last."""

    def __init__(self) -> None:
        self.begin = self.end = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.begin = self.begin or time.monotonic()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.end = time.monotonic()


def peak_kib() -> int:
    """Largest resident size of this process since it began (`ru_maxrss` would begin at its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def canonical(file: Path | None) -> Rows:
    """The pairs of a file, or the lab's."""
    if file is not None:
        return read_pairs(str(file), split="train")[0]
    with tempfile.TemporaryDirectory() as folder:
        build_lab(Path(folder), LabSettings(demonstrations=100, pairs=2000, test_pairs=10))
        return read_pairs(f"{folder}/data/preferences.jsonl", split="train")[0]


def texts(rows: Rows) -> list[str]:
    return [turn["content"] for row in rows for name in ("prompt", "chosen", "rejected") for turn in row[name]]


def tokenized(tokenizer: Any, rows: Rows) -> Rows:
    sides = {
        f"{side}_ids": encode_answers(tokenizer, [r["prompt"] for r in rows], [r[side][0]["content"] for r in rows])[0]
        for side in ("chosen", "rejected")
    }
    fits = [c for c in zip(*sides.values(), strict=True) if max(map(len, c)) <= 1024]
    return [{"chosen_ids": chosen, "rejected_ids": rejected} for chosen, rejected in fits]


def rankings(tokenizer: Any, rows: Rows, sets: int, rng: random.Random) -> Rows:
    """The 28 pairs of prompts with 8 answers each: real prompts and real answers, not to each other."""
    found = []
    for number, row in enumerate(rng.sample(rows, sets)):
        answers = [other["chosen"][0]["content"] for other in rng.sample(rows, K)]
        ids, _ = encode_answers(tokenizer, [row["prompt"]] * K, answers)
        found += [{"chosen_ids": a, "rejected_ids": b, "group": str(number)} for a, b in combinations(ids, 2)]
    return found


def trained(side: str, base: Path, rows: Rows, options: dict[str, Any]) -> float:
    """Train one fresh model on some rows; pairs per second."""
    options = dict(options)
    batch = K * (K - 1) // 2 if "group" in rows[0] else BATCH
    if options.pop("exploded", False):
        rows = [{name: value for name, value in row.items() if name != "group"} for row in rows]
    ordered = options.pop("sorted", False)
    if ordered:
        lengths = [max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows]
        order = order_by_length(lengths, batch, seed=0, epoch=0)
        rows = [rows[i] for i in order]
    set_seed(0)
    tokenizer = load_tokenizer(base, conversational=True)
    model = build_reward_model(base, pad_token_id=tokenizer.pad_token_id)
    args = RewardConfig(
        tempfile.mkdtemp(),
        **{"bf16": False, "gradient_checkpointing": False, **options},
        use_cpu=True,
        seed=0,
        num_train_epochs=1,
        learning_rate=1e-5,
        max_length=None,
        per_device_train_batch_size=batch,
        train_sampling_strategy="sequential" if ordered else "random",
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    clock = Clock()
    make: Any = PairRewardTrainer if side == "ours" else RewardTrainer
    trainer = make(
        model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, callbacks=[clock]
    )
    if side == "ours":
        trainer._compared = True  # once a run, not a step: a run of three steps would pay for it as for a thousand
    trainer.train()
    if side == "ours":
        assert trainer._shares, "the shared forward was turned off"
    assert len(trainer.train_dataset) == len(rows), "both sides keep the same rows"
    del trainer, model
    gc.collect()
    return len(rows) / (clock.end - clock.begin)


def peak_memory(side: str, base: Path, rows_file: Path) -> float:
    """MiB above what the imports took, in a process of its own."""
    command = [sys.executable, __file__, "--json", "unused", "--memory", side, str(base), str(rows_file)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def score_difference(base: Path, rows: Rows) -> float:
    """Largest difference between shared and plain scores, fp32."""
    tokenizer = load_tokenizer(base, conversational=True)
    set_seed(0)
    model: Any = build_reward_model(base, pad_token_id=tokenizer.pad_token_id)
    found = 0.0
    for start in range(0, len(rows), BATCH):
        groups = [[row["chosen_ids"], row["rejected_ids"]] for row in rows[start : start + BATCH]]
        packed = pack(groups, pad_token_id=tokenizer.pad_token_id)
        found = max(found, largest_difference(model, packed, pad_token_id=tokenizer.pad_token_id))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--pairs", type=Path, help="a preference file; the lab's pairs where absent")
    parser.add_argument("--seeds", default="0,1,2,3,4", help="one repetition each")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="a small model: whether it runs, not how fast")
    parser.add_argument("--memory", nargs=3, metavar=("SIDE", "BASE", "ROWS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    warnings.filterwarnings("ignore", message=".*num_train_epochs.*")
    if arguments.memory:
        side, base, file = arguments.memory
        before = peak_kib()
        trained(side, Path(base), json.loads(Path(file).read_text()), {})
        print((peak_kib() - before) / 1024)
        return
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    seeds, count = [int(seed) for seed in arguments.seeds.split(",")], 3 * BATCH

    # 1. Model and rows.
    source = canonical(arguments.pairs)
    base = folder / ("base-quick" if arguments.quick else "base")
    if not (base / "config.json").is_file():
        sizes = {**MODEL, "num_hidden_layers": 1} if arguments.quick else MODEL
        build_base(base, texts(source), architecture="llama", settings={**sizes, "vocab_size": 32_000}, seed=0)
    tokenizer = load_tokenizer(base, conversational=True)
    parameters = sum(p.numel() for p in build_reward_model(base, pad_token_id=tokenizer.pad_token_id).parameters())
    rows = tokenized(tokenizer, source)

    # 2. Throughput, sides alternating. Several variants share the plain fp32 run of ours.
    rates: dict[str, list[list[float]]] = {}
    for side in ("trl", "ours"):
        trained(side, base, sorted(rows, key=lambda row: len(row["chosen_ids"]))[:BATCH], {})
    for seed in seeds:
        done: dict[str, float] = {}
        for variant in arguments.variants.split(","):
            file = folder / f"{variant}-{seed}{'-quick' if arguments.quick else ''}.json"
            if not file.is_file():
                rng = random.Random(seed)
                chosen = rankings(tokenizer, source, 3, rng) if variant == "k_wise" else rng.sample(rows, count)
                pair = []
                for side, options in VARIANTS[variant]:
                    key = json.dumps([variant == "k_wise", side, options])
                    if key not in done:
                        done[key] = trained(side, base, chosen, options)
                    pair.append(done[key])
                file.write_text(json.dumps(pair))
            pair = json.loads(file.read_text())
            rates.setdefault(variant, []).append(pair)
            print(
                f"repetition {seed} {variant:18s} {pair[0]:7.2f} {pair[1]:7.2f} pairs/s  x{pair[1] / pair[0]:.2f}",
                flush=True,
            )

    # 3. Memory and equality.
    rng = random.Random(99)
    memory_rows = folder / "memory-rows.json"
    memory_rows.write_text(json.dumps(rng.sample(rows, count)))
    memory = {side: peak_memory(side, base, memory_rows) for side in ("trl", "ours")}
    found: dict[str, Any] = {
        "data": arguments.pairs.name if arguments.pairs else "lab",
        "parameters": parameters,
        "threads": torch.get_num_threads(),
        "memory_mib": memory,
        "memory_ratio": memory["ours"] / memory["trl"],
        "max_score_difference": score_difference(base, rng.sample(rows, min(len(rows), 8 * BATCH))),
    }
    for variant, pairs in rates.items():
        ratios = [ours / other for other, ours in pairs]
        found[f"ratio_{variant}"] = statistics.median(ratios)
        found[f"ratio_{variant}_range"] = [min(ratios), max(ratios)]
        found[f"pairs_per_second_{variant}"] = [statistics.median(side) for side in zip(*pairs, strict=True)]
    arguments.json.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
