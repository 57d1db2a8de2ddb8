"""What ArmoRM's gate and its debiasing are worth in the lab: the same ratings and pairs, the same network, one part taken away.

python tests/benchmarks/gated.py --out runs/gated --json gated.json

The crowd compares two answers to a prompt and rates five parts of each (`rlhf.lab.world.parts_of`), with its taste for length and
its noise. For each seed of head and order one network learns the ratings and is frozen; on it are fitted attributes and gate
(`gated`), the same without taking length off (`no debiasing`), and with one set of weights for all prompts (`one set`). Beside
them: the network's own heads with equal weights (`regression`), and a network trained on the pairs alone (`bt`). Everything is
judged by the true reward on held-out pairs, and on pairs about kinds of things that no annotator was asked about; `length` is Spearman's
correlation of scores with the answers' tokens. Differences to `gated` are paired by seed (t over seeds).
"""

import argparse
import copy
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from datasets import Dataset
from members import measured
from members_world import rated_answers
from transformers import set_seed
from trl import RewardConfig
from worlds import SMALL, SMALL_QUICK, Rows, decided, in_true_order, interval, reward_settings, world

from rlhf import AttributeRewardTrainer, PairRewardTrainer
from rlhf.lab.build import RATED
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.gated import GatedRewards, fit_gated
from rlhf.reward.model import RewardModel
from rlhf.reward.trainer import training_columns

SIGNS = dict.fromkeys(("things", "number", "refusal", "manner", "brevity"), 1.0)


def arguments(seed: int) -> RewardConfig:
    return RewardConfig(
        tempfile.mkdtemp(), **(reward_settings(3e-3, 2) | {"per_device_train_batch_size": 16}), seed=seed, use_cpu=True,
        bf16=False, gradient_checkpointing=False, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip


def variants(base: Path, pairs: Rows, rated: Rows, seed: int) -> dict[str, RewardModel]:
    """Every variant of one seed."""
    tokenizer = load_tokenizer(base, conversational=True)
    pad: Any = tokenizer.pad_token_id

    # 1. On pairs alone; on ratings.
    set_seed(seed)
    on_pairs: Any = build_reward_model(base, pad_token_id=pad)
    data = Dataset.from_list(training_columns(pairs))
    PairRewardTrainer(on_pairs, arguments(seed), train_dataset=data, processing_class=tokenizer).train()
    set_seed(seed)
    on_ratings: Any = build_reward_model(base, pad_token_id=pad, labels=list(SIGNS))
    data = Dataset.from_list(rated)
    trainer = AttributeRewardTrainer(
        on_ratings, arguments(seed), weights=SIGNS, train_dataset=data, processing_class=tokenizer
    )
    trainer.train()

    # 2. Fits on the frozen network.
    def gated() -> GatedRewards:
        network = copy.deepcopy(on_ratings).eval()
        fitted = fit_gated(network, tokenizer, rated, pairs, SIGNS)
        print(seed, fitted.sentence(), flush=True)
        return GatedRewards(network, tokenizer, fitted.attributes, conversational=True)

    models: dict[str, RewardModel] = {"gated": gated()}
    with patch("rlhf.reward.gated.length_multiple", lambda *_: 0.0):
        models["gated, no debiasing"] = gated()
    same = patch("rlhf.reward.gated.prompt_features", lambda _, prompts: torch.zeros(len(prompts), 1))
    with same:
        models["gated, one set of weights"] = gated()
        with patch("rlhf.reward.gated.length_multiple", lambda *_: 0.0):
            models["gated, neither"] = gated()
    trainer.merge_head()
    models["regression, equal weights"] = RewardModel(on_ratings.eval(), tokenizer, conversational=True)
    models["bt"] = RewardModel(on_pairs.eval(), tokenizer, conversational=True)
    return models


def figures(name: str, reward: RewardModel, sets: dict[str, Rows]) -> dict[str, float]:
    """What a variant is worth; one with the same weights for all prompts has to be asked with that patch on."""
    if "one set" in name or "neither" in name:
        with patch("rlhf.reward.gated.prompt_features", lambda _, prompts: torch.zeros(len(prompts), 1)):
            return measured(reward, sets, reward.tokenizer)
    return measured(reward, sets, reward.tokenizer)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gated"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, to see whether it runs")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    base, pairs, test = world(options.out / "world", 0, **(SMALL_QUICK if options.quick else SMALL))
    lab = options.out / "world/round-0/lab/data"
    rated = rated_answers(lab / RATED)
    kinds = decided([json.loads(line) for line in (lab / "shift_test.jsonl").read_text().splitlines()])
    sets = {"held_out": in_true_order(test), "kinds": in_true_order(kinds)}
    print({name: len(rows) for name, rows in sets.items()} | {"pairs": len(pairs), "rated": len(rated)}, flush=True)

    table: dict[str, list[dict[str, float]]] = {}
    for seed in map(int, options.seeds.split(",")):
        file = options.out / f"{seed}.json"
        if not file.is_file():
            models = variants(base, pairs, rated, seed)
            file.write_text(json.dumps({name: figures(name, reward, sets) for name, reward in models.items()}))
        for name, row in json.loads(file.read_text()).items():
            table.setdefault(name, []).append(row)

    options.json.write_text(json.dumps(table, indent=1))
    print("| | held out | other kinds | gated − it, held out | gated − it, other kinds | ECE | length |")
    for name, rows in table.items():
        mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
        gains = []
        for key in sets:
            m, low, high = interval([100 * (a[key] - b[key]) for a, b in zip(table["gated"], rows, strict=True)])
            gains.append("" if name == "gated" else f"{m:+.1f} [{low:+.1f}, {high:+.1f}]")
        print(
            f"| {name} | {mean['held_out']:.3f} | {mean['kinds']:.3f} | {gains[0]} | {gains[1]} | {mean['ece']:.3f} | "
            f"{mean['length']:+.2f} |"
        )
    print("true reward and length:", f"{table['bt'][0]['length_of_gold']:+.2f}")


if __name__ == "__main__":
    main()
