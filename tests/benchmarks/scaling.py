"""Time and memory of the reward trainer from 1,000 to 16,000 pairs, rows streamed from disk.

python tests/benchmarks/scaling.py --json scaling.json

The lab's model with random weights, one epoch in batches of 32, a process per size. `exponent` is the slope of log seconds
over log pairs (1 is linear), `memory_ratio` the largest peak over the smallest, each less what the imports took. Streamed
rows come in the file's order, so batches are not grouped by length. Finished sizes are kept beside FILE.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from scipy.stats import linregress
from transformers import set_seed
from trl import RewardConfig

from rlhf import PairRewardTrainer, build_reward_model
from rlhf.lab import LabSettings, build_lab
from rlhf.models.load import load_tokenizer
from rlhf.pipeline.training import quiet_libraries

SIZES = (1000, 2000, 4000, 8000, 16_000)


def peak_kib() -> int:
    """Largest resident size of this process since it began (`ru_maxrss` would begin at its parent's)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def trained(folder: Path, pairs: int) -> dict[str, float]:
    """Seconds of training on the first rows, and MiB above the imports."""
    before = peak_kib()
    set_seed(0)
    tokenizer = load_tokenizer(folder / "model", conversational=True)
    model = build_reward_model(folder / "model", pad_token_id=tokenizer.pad_token_id)
    rows = load_dataset("json", data_files=str(folder / "data/preferences.jsonl"), split="train", streaming=True)
    args = RewardConfig(
        str(folder / f"trainer-{pairs}"),
        max_steps=pairs // 32,
        learning_rate=5e-4,
        per_device_train_batch_size=32,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = PairRewardTrainer(
        model, args, train_dataset=rows.remove_columns("annotator").take(pairs), processing_class=tokenizer
    )
    begin = time.monotonic()
    trainer.train()
    assert trainer.state.global_step == pairs // 32
    peak = peak_kib()
    return {"seconds": time.monotonic() - begin, "memory_mib": (peak - before) / 1024}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0", help="of the lab; the first one counts")
    parser.add_argument("--variants", default=",".join(map(str, SIZES)), help="numbers of pairs")
    parser.add_argument("--quick", action="store_true", help="a quarter of the pairs")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.json.with_suffix("")
    if arguments.one:
        print(json.dumps(trained(folder, arguments.one)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    sizes = [int(size) // (4 if arguments.quick else 1) for size in arguments.variants.split(",")]
    if not (folder / "data/preferences.jsonl").is_file():
        seed = int(arguments.seeds.split(",")[0])
        build_lab(folder, LabSettings(demonstrations=8000, pairs=max(SIZES), test_pairs=10, seed=seed))
    found: dict[int, dict[str, Any]] = {}
    for size in sizes:
        file = folder / f"{size}.json"
        if not file.is_file():
            command = [sys.executable, __file__, "--json", str(arguments.json), "--one", str(size)]
            file.write_text(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
        found[size] = json.loads(file.read_text())
        print(f"{size:6d} pairs {found[size]['seconds']:7.1f} s {found[size]['memory_mib']:7.0f} MiB", flush=True)
    memory = [one["memory_mib"] for one in found.values()]
    fit = linregress([math.log(size) for size in sizes], [math.log(one["seconds"]) for one in found.values()])
    result = {
        "sizes": found,
        "exponent": float(fit.slope),
        "memory_ratio": max(memory) / min(memory),
        "threads": torch.get_num_threads(),
    }
    arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps({key: result[key] for key in ("exponent", "memory_ratio")}))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
