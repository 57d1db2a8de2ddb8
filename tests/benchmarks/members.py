"""What the members of the reward-model family are worth in the lab: the same pairs, the same start, another loss or term.

python tests/benchmarks/members.py --out runs/members --json members.json

Every member trains on the same 800 pairs as the crowd labelled them, from the same SFT model (one world; two layers of 32), one
epoch in batches of 16; three seeds of head, order and noise. It is judged by the true reward on
held-out pairs of the same writers (`held_out`), and on pairs about kinds of things that no annotator saw (`kinds`). `ece`: σ|d| of
the held-out pairs against how often it is right. `length`: Spearman's correlation of scores with the answers' tokens over all
held-out answers; that of the true reward is printed too. Seconds of a training, and milliseconds of a score. Differences to
`bt` are paired by seed (t over seeds). Finished parts are kept in OUT.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from scipy.stats import spearmanr
from transformers import set_seed
from trl import RewardConfig
from worlds import Rows, decided, differences, in_true_order, interval, reward_settings, world

from rlhf import (
    BottleneckRewardTrainer,
    ContrastiveRewardTrainer,
    LabelSmoothingRewardTrainer,
    LengthRewardTrainer,
    PairRewardTrainer,
    TextRewardTrainer,
)
from rlhf.lab.world import gold
from rlhf.models.heads import language_head
from rlhf.models.load import build_reward_model, load_tokenizer, model_settings
from rlhf.models.text import plain
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.bottleneck import CODE_LABELS
from rlhf.reward.length import HEADS
from rlhf.reward.model import RewardModel
from rlhf.reward.trainer import training_columns
from rlhf.statistics import expected_calibration_error

SIZES = {"pairs": 800, "test_pairs": 400, "demonstrations": 600, "hidden_size": 32, "num_hidden_layers": 2}
QUICK = {"pairs": 150, "test_pairs": 60, "demonstrations": 200, "hidden_size": 32, "num_hidden_layers": 1}
MEMBERS: dict[str, dict[str, Any]] = {
    "bt": {},
    "smoothing": {"cls": LabelSmoothingRewardTrainer},
    "likelihood": {"flip_rate": 0.2},
    "centred": {"trl": {"center_rewards_coefficient": 0.01}},
    "simcse": {"cls": ContrastiveRewardTrainer, "extra": "simcse"},
    "text": {"cls": TextRewardTrainer},
    "text (α = 0.1)": {"cls": TextRewardTrainer, "extra_weight": 0.1},
    "length": {"cls": LengthRewardTrainer},
    "bottleneck": {"cls": BottleneckRewardTrainer},
    "bottleneck (β = 0.1)": {"cls": BottleneckRewardTrainer, "extra_weight": 0.1},
}
LABELS: dict[Any, Any] = {LengthRewardTrainer: HEADS, BottleneckRewardTrainer: CODE_LABELS}


def trained(base: Path, rows: Rows, seed: int, **how: Any) -> tuple[RewardModel, float]:
    """One member, run to its end, and the seconds of it."""
    cls, trl = how.pop("cls", PairRewardTrainer), how.pop("trl", {})
    set_seed(seed)
    tokenizer = load_tokenizer(base, conversational=True)
    labels = {"labels": LABELS[cls]} if cls in LABELS else {}
    model: Any = build_reward_model(base, pad_token_id=tokenizer.pad_token_id, **labels)
    if cls is TextRewardTrainer:
        how["language_head"] = language_head(base, model_settings({}))
    args = RewardConfig(
        tempfile.mkdtemp(), **(reward_settings(3e-3, 1) | {"per_device_train_batch_size": 16}), **trl, seed=seed, use_cpu=True, bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    trainer = cls(
        model, args, train_dataset=Dataset.from_list(training_columns(rows)), processing_class=tokenizer, **how
    )
    begin = time.process_time()
    trainer.train()
    seconds = time.process_time() - begin
    trainer.merge_head()
    return RewardModel(trainer.model.eval(), tokenizer, conversational=True), seconds


def measured(reward: RewardModel, sets: dict[str, Rows]) -> dict[str, float]:
    """Accuracy by the true reward, calibration, and how far scores follow length; milliseconds of a score."""
    found: dict[str, float] = {}
    for name, rows in sets.items():
        found[name] = (differences(reward, rows) > 0).double().mean().item()
    d = differences(reward, sets["held_out"])
    found["ece"] = expected_calibration_error(d.abs().sigmoid().tolist(), (d > 0).double().tolist())
    prompts, answers = answers_of(sets["held_out"])
    begin = time.process_time()
    scores = reward.score(prompts, answers)
    found["milliseconds"] = 1000 * (time.process_time() - begin) / len(answers)
    tokens = [len(ids) for ids in reward.tokenizer(answers, add_special_tokens=False)["input_ids"]]
    found["length"] = float(spearmanr(scores, tokens).statistic)
    found["length_of_gold"] = float(spearmanr(gold([plain(p) for p in prompts], answers), tokens).statistic)
    return found


def answers_of(rows: Rows) -> tuple[list[Any], list[str]]:
    """All answers of some pairs, with their prompts."""
    sides = ("chosen", "rejected")
    return [row["prompt"] for _ in sides for row in rows], [row[side][0]["content"] for side in sides for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/members"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--members", default=",".join(MEMBERS))
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, to see whether it runs")
    arguments = parser.parse_args()
    chosen = {name: MEMBERS[name] for name in arguments.members.split(",")}
    quiet_libraries()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    base, pairs, test = world(arguments.out / "world", 0, **(QUICK if arguments.quick else SIZES))
    shifted = (arguments.out / "world/round-0/lab/data/shift_test.jsonl").read_text().splitlines()
    kinds = decided([json.loads(line) for line in shifted])
    sets = {"held_out": in_true_order(test), "kinds": in_true_order(kinds)}
    print({name: len(rows) for name, rows in sets.items()} | {"train": len(pairs)})

    table: dict[str, list[dict[str, float]]] = {}
    for seed in map(int, arguments.seeds.split(",")):
        for name, how in chosen.items():
            file = arguments.out / f"{name}-{seed}.json"
            if not file.is_file():
                reward, seconds = trained(base, pairs, seed, **dict(how))
                file.write_text(json.dumps({"seconds": seconds, **measured(reward, sets)}))
                print(seed, name, file.read_text(), flush=True)
            table.setdefault(name, []).append(json.loads(file.read_text()))

    arguments.json.write_text(json.dumps(table, indent=1))
    print(
        "| member | held out | kinds | held out − `bt` | kinds − `bt` | ECE | length | s | ms |\n|---|---|---|---|---|---|---|---|---|"
    )
    for name, rows in table.items():
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        gains = []
        for key in sets:
            m, low, high = interval(
                [100 * (row[key] - plain_row[key]) for row, plain_row in zip(rows, table["bt"], strict=True)]
            )
            gains.append("" if name == "bt" else f"{m:+.1f} [{low:+.1f}, {high:+.1f}]")
        print(
            f"| {name} | {mean['held_out']:.3f} | {mean['kinds']:.3f} | {gains[0]} | {gains[1]} | {mean['ece']:.3f} | "
            f"{mean['length']:+.2f} | {mean['seconds']:.0f} | {mean['milliseconds']:.1f} |"
        )
    print("true reward and length:", f"{table['bt'][0]['length_of_gold']:+.2f}")


if __name__ == "__main__":
    main()
