"""How much of the gap between noisy and clean labels each correction closes, in the lab, on the same pairs and seeds.

python tests/benchmarks/denoise.py --json denoise.json --seeds 5,6,7,8,9
python tests/benchmarks/denoise.py --json quick.json --seeds 0 --variants bt,clean,posterior --quick

Every variant gets the same grid (learning rate x epochs), chosen by accuracy on noisy validation pairs that no variant
trains on, and is judged once, on clean test pairs: the lab's own, turned to the true order. `gap_closed` is
(variant - bt) / (clean - bt) of the accuracies; intervals are bootstraps over seeds and test pairs of the paired difference.
Seeds 0 to 4 are for choosing. Finished (seed, variant) pairs are kept beside FILE, so a killed run goes on.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import set_seed
from trl import RewardConfig

from rlhf import PairRewardTrainer
from rlhf.evaluation.pairs import judge_pairs
from rlhf.evaluation.statistics import auroc, expected_calibration_error
from rlhf.lab.world import gold
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.text import plain
from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.reward.model import RewardModel
from rlhf.reward.noise import corrected, turned_round
from rlhf.reward.trainer import PAIR_COLUMNS

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
TRAIN, VALIDATE, TEST = 6000, 600, 10_500
LEARNING_RATES, EPOCHS = (5e-4, 1.5e-3), (1, 2)
ENSEMBLE = 5
VOTED = ("flip", "adaptive_margin", "flip_margin", "soft_margin", "vote_soft", "drop", "posterior")
VARIANTS = ("bt", "clean", "smoothing", "ensemble", *VOTED)
DEFAULT = "posterior"
Rows = list[dict[str, Any]]


def world(folder: Path, seed: int, *, quick: bool) -> tuple[Path, Rows, Rows, Rows]:
    """SFT model, noisy training and validation pairs, clean test pairs of one seed."""
    out = folder / f"world-{seed}"
    scale = 10 if quick else 1
    sizes = [f"lab.pairs={(TRAIN + VALIDATE) // scale}", f"lab.test_pairs={TEST // scale}"]
    if quick:
        sizes += ["lab.demonstrations=2000", "sft.num_train_epochs=1"]
    command = [sys.executable, "-m", "rlhf", "sft", str(RECIPE), "--out", str(out), f"seed={seed}", *sizes]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    pairs, test = (read(out / "round-0/data/data" / f"{name}.jsonl") for name in ("pairs", "test_pairs"))
    count = len(pairs) - VALIDATE // scale
    right = [(row, d) for row, d in zip(test, true_differences(test), strict=True) if d != 0]
    clean = [row if d > 0 else turned_round(row) for row, d in right]
    return out / "round-0/sft/model", pairs[:count], pairs[count:], clean


def read(file: Path) -> Rows:
    return [json.loads(line) for line in file.read_text().splitlines()]


def true_differences(rows: Rows) -> list[float]:
    prompts = [plain(row["prompt"]) for row in rows]
    sides = [gold(prompts, [row[side][0]["content"] for row in rows]) for side in ("chosen", "rejected")]
    return [a - b for a, b in zip(*sides, strict=True)]


def scores(base: Path, rows: Rows, judged: Rows, *, learning_rate: float, epochs: int, seed: int) -> Any:
    """Train on some rows; reward differences on others."""
    set_seed(seed)
    tokenizer = load_tokenizer(base, conversational=True)
    model: Any = build_reward_model(base, pad_token_id=tokenizer.pad_token_id)
    names = ("prompt", "chosen", "rejected", *(name for name in PAIR_COLUMNS if name in rows[0]))
    args = RewardConfig(
        "unused",
        seed=seed,
        learning_rate=learning_rate,
        num_train_epochs=epochs,
        per_device_train_batch_size=32,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        logging_steps=10_000,
    )
    data = Dataset.from_list([{name: row[name] for name in names} for row in rows])
    trainer = PairRewardTrainer(model, args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    seen = judge_pairs(RewardModel(trainer.model, tokenizer, conversational=True), judged)
    return seen.scores_chosen - seen.scores_rejected


def training_rows(variant: str, rows: Rows, voted: Any) -> Rows:
    """The pairs as a variant sees them."""
    if variant == "clean":
        return [row if d >= 0 else turned_round(row) for row, d in zip(rows, true_differences(rows), strict=True)]
    if variant == "smoothing":  # at the known rate
        wrong = sum(d < 0 for d in true_differences(rows)) / len(rows)
        return [{**row, "confidence": 1 - wrong} for row in rows]
    if variant in VOTED:
        strength, noise = voted
        return corrected(rows, strength, variant, noise=noise)[0]
    return rows


def judged(folder: Path, seed: int, variant: str, quick: bool) -> dict[str, Any]:
    """One variant on one seed: the grid, the choice, and the test. Kept on disk."""
    file = folder / f"seed-{seed}-{variant}.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text())
        return result
    begin = time.monotonic()
    base, rows, validation, test = world(folder, seed, quick=quick)
    voted, extra = None, {}
    if variant in VOTED:
        keys = {"learning_rate": LEARNING_RATES[0], "per_device_train_batch_size": 32, "num_train_epochs": 1}
        shape: dict[str, Any] = {"members": 10, "folds": 5, "in_sample": False, "trunk": 2}
        voted = vote(base, rows, keys, folder / f"vote-{seed}", seed=seed, say=lambda _: None, **shape)
        wrong = [d < 0 for d in true_differences(rows)]
        extra = {"auroc_vote": auroc((-voted[0].mean).tolist(), wrong), "flip_rate": sum(wrong) / len(wrong)}
    data = training_rows(variant, rows, voted)
    grid = [(rate, epochs) for rate in LEARNING_RATES for epochs in EPOCHS][: 1 if quick else None]
    members = ENSEMBLE if variant == "ensemble" else 1
    best: tuple[float, Any, Any] | None = None
    for rate, epochs in grid:
        runs = [
            scores(base, data, validation + test, learning_rate=rate, epochs=epochs, seed=100 * seed + m)
            for m in range(members)
        ]
        differences = np.mean(runs, axis=0)
        accuracy = float((differences[: len(validation)] > 0).mean())
        if best is None or accuracy > best[0]:
            best = accuracy, differences[len(validation) :], (rate, epochs)
    assert best is not None
    right = (best[1] > 0).astype(float)
    sure = 1 / (1 + np.exp(-np.abs(best[1])))
    result = {
        "seed": seed,
        "variant": variant,
        "accuracy": float(right.mean()),
        "ece": expected_calibration_error(sure.tolist(), right.tolist()),
        "validation": best[0],
        "chosen": best[2],
        "right": np.packbits(right.astype(bool)).tolist(),
        "n": len(right),
        "seconds": time.monotonic() - begin,
        **extra,
    }
    file.write_text(json.dumps(result))
    return result


def summary(results: list[dict[str, Any]], variants: list[str], seeds: list[int]) -> dict[str, Any]:
    """Means over seeds, and the gap closed with intervals over seeds and test pairs."""
    table = {
        (r["seed"], r["variant"]): np.unpackbits(np.array(r["right"], np.uint8))[: r["n"]].astype(float)
        for r in results
    }
    rng = np.random.default_rng(0)
    draws: dict[str, list[float]] = {variant: [] for variant in variants}
    for _ in range(1000):
        drawn = []
        for seed in rng.choice(seeds, len(seeds)):
            pairs = rng.integers(0, len(table[seed, "bt"]), len(table[seed, "bt"]))
            drawn.append({variant: table[seed, variant][pairs].mean() for variant in variants})
        means = {variant: float(np.mean([d[variant] for d in drawn])) for variant in variants}
        for variant in variants:
            draws[variant].append((means[variant] - means["bt"]) / (means["clean"] - means["bt"]))
    found: dict[str, Any] = {"default": DEFAULT, "accuracy": {}, "gap_closed": {}, "gap_closed_ci": {}, "ece": {}}
    accuracy = {v: np.array([table[seed, v].mean() for seed in seeds]) for v in variants}
    for variant in variants:
        mine = [r for r in results if r["variant"] == variant]
        found["accuracy"][variant] = [
            float(accuracy[variant].mean()),
            float(accuracy[variant].min()),
            float(accuracy[variant].max()),
        ]
        gap = accuracy["clean"].mean() - accuracy["bt"].mean()
        found["gap_closed"][variant] = float((accuracy[variant].mean() - accuracy["bt"].mean()) / gap)
        found["gap_closed_ci"][variant] = np.percentile(draws[variant], [2.5, 97.5]).tolist()
        found["ece"][variant] = float(np.mean([r["ece"] for r in mine]))
    votes = [r["auroc_vote"] for r in results if "auroc_vote" in r]
    found["auroc_vote"] = float(np.mean(votes)) if votes else None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="5,6,7,8,9")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, one point of the grid")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    variants = list(dict.fromkeys(["bt", "clean", *arguments.variants.split(",")]))
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results = []
    for seed in seeds:
        for variant in variants:
            result = judged(folder, seed, variant, arguments.quick)
            results.append(result)
            print(
                f"seed {seed} {variant:16s} accuracy {result['accuracy']:.4f} ece {result['ece']:.3f} {result['seconds']:.0f} s",
                flush=True,
            )
    found = summary(results, variants, seeds)
    arguments.json.write_text(json.dumps(found, indent=1))
    print("| variant | accuracy | gap closed | 95 % | ECE |\n|---|---|---|---|---|")
    for variant in variants:
        low, high = found["gap_closed_ci"][variant]
        print(
            f"| {variant} | {found['accuracy'][variant][0]:.4f} | {found['gap_closed'][variant]:.2f} | {low:.2f} to {high:.2f} | "
            f"{found['ece'][variant]:.3f} |"
        )


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
