"""Over-optimisation in the lab: true reward and proxy against √KL, for one reward model and for ensembles of three.

python tests/benchmarks/overopt.py --json overopt.json --seeds 5,6,7,8,9

Worlds are shift.py's (3,000 pairs as the crowd labelled them; `--worlds` takes its folder). Members differ in order and head.
PPO runs with the quickstart's settings but for `kl_coef`, each from the same seed with the same critic; best-of-n takes 64
answers to each of 128 held-out prompts. Curves of Gao et al. (arXiv:2210.10760), d = √KL:

    best of n:  R(d) = d (α - β d)          PPO:  R(d) = d (α - β log d)

fitted to the true reward above SFT's, by least squares for each seed. `lost` is the true reward at its peak (five rollouts'
mean) less that at the end: what over-optimisation took away. Intervals by t over seeds; differences are paired with `single`.
Finished runs are kept beside FILE.
"""

import argparse
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from scipy.optimize import least_squares
from shift import lived_in, read
from transformers import AutoModelForCausalLM, set_seed
from worlds import fitted, interval, ppo_curve

from rlhf import RewardModel, load_reward_model
from rlhf.evaluation.best_of_n import best_of_n_kl, best_of_n_values
from rlhf.lab.world import gold
from rlhf.models.generate import sample_texts
from rlhf.models.load import load_tokenizer
from rlhf.models.text import plain
from rlhf.objectives.ensemble import combined
from rlhf.pipeline.training import quiet_libraries

MEMBERS, ANSWERS, PROMPTS, SMOOTH = 3, 64, 128, 5
ENSEMBLES = {"single": None, "mean": "mean", "worst": "worst", "uncertainty": "uncertainty"}
KL_COEFFICIENTS = (0.001, 0.05)
SIZES = (1, 2, 4, 8, 16, 32, 64)


def members(world: Path, seed: int, work: Path) -> list[RewardModel]:
    """The world's own reward model, and others like it, each with its scale on answers of SFT; weights kept on disk."""
    found = [load_reward_model(world / "round-1/reward/model")]
    rows = read(world / "round-0/sft/samples.jsonl") * 4
    pairs = read(world / "round-0/data/data/pairs.jsonl")
    for number in range(1, MEMBERS):
        file = work / f"member-{seed}-{number}.safetensors"
        base = world / "round-0/sft/model"
        epochs = 0.001 if file.is_file() else 1.0
        reward = fitted(base, pairs, learning_rate=5e-4, epochs=epochs, seed=100 * seed + number)
        if file.is_file():
            reward.model.load_state_dict(load_file(file))
        else:
            save_file({name: value.contiguous() for name, value in reward.model.state_dict().items()}, file)
        reward.model.requires_grad_(False)
        scores = reward.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
        reward.mean, reward.std = scores.mean().item(), scores.std(correction=0).item()
        found.append(reward)
    return found


def best_of_n(world: Path, seed: int, sources: list[RewardModel]) -> dict[str, list[tuple[float, float, float]]]:
    """(KL, true reward, normalised proxy) at every n, for each way to combine the members."""
    base = world / "round-0/sft/model"
    tokenizer = load_tokenizer(base, conversational=True)
    policy: Any = AutoModelForCausalLM.from_pretrained(base).eval()
    prompts = [row["prompt"] for row in read(world / "round-0/data/data/test_prompts.jsonl")[:PROMPTS]]
    repeated = [prompt for prompt in prompts for _ in range(ANSWERS)]
    set_seed(seed)
    texts, ended = sample_texts(policy, tokenizer, repeated, batch_size=256, max_new_tokens=40)
    true = np.array(gold([plain(prompt) for prompt in repeated], texts)).reshape(PROMPTS, ANSWERS)
    columns = torch.stack([(s.score(repeated, texts, ended=ended) - s.mean) / s.std for s in sources])
    found = {}
    for name, how in ENSEMBLES.items():
        proxy = (columns[0] if how is None else combined(columns, how)).numpy().reshape(PROMPTS, ANSWERS)
        found[name] = [
            (
                best_of_n_kl(n),
                float(np.mean(best_of_n_values(list(proxy), list(true), n))),
                float(np.mean(best_of_n_values(list(proxy), list(proxy), n))),
            )
            for n in SIZES
        ]
    return found


def gao(rows: Any, *, is_ppo: bool) -> tuple[float, float]:
    """α and β of Gao et al.'s curve through the true reward above that at KL 0."""
    table = np.array(rows)
    start, keep = table[0, 1], table[:, 0] > 0.05
    d, reward = np.sqrt(table[keep, 0]), table[keep, 1] - start
    shape = np.log(d) if is_ppo else d
    fit = least_squares(lambda x: d * (x[0] - x[1] * shape) - reward, [0.5, 0.1])
    return float(fit.x[0]), float(fit.x[1])


def summary(rows: Any) -> dict[str, float]:
    """Peak and end of a PPO curve, smoothed."""
    table = np.array(rows)
    kernel = np.ones(SMOOTH) / SMOOTH
    reward = np.convolve(table[:, 1], kernel, mode="valid")
    alpha, beta = gao(rows, is_ppo=True)
    return {
        "gold_end": float(reward[-1]),
        "gold_peak": float(reward.max()),
        "lost": float(reward.max() - reward[-1]),
        "kl_end": float(table[-SMOOTH:, 0].mean()),
        "alpha": alpha,
        "beta": beta,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--worlds", type=Path, help="shift.py's folder; default: beside FILE")
    parser.add_argument("--seeds", default="5,6,7,8,9")
    parser.add_argument("--variants", default=",".join(ENSEMBLES))
    parser.add_argument("--quick", action="store_true", help="small worlds, short runs, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    warnings.filterwarnings("ignore", message="ppo, rollout")  # what is worried about here is what is measured
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    variants = arguments.variants.split(",")
    quick = "-quick" if arguments.quick else ""
    short = {"total_episodes": 1024} if arguments.quick else {}
    curves: dict[tuple[str, float], list[Any]] = {}
    sampled: dict[str, list[Any]] = {}
    for seed in seeds:
        world = lived_in((arguments.worlds or folder) / f"world-{seed}{quick}", seed, quick=arguments.quick)
        sources: list[RewardModel] | None = None
        for kl_coef in KL_COEFFICIENTS:
            for name in variants:
                file = folder / f"ppo-{name}-{kl_coef:g}-{seed}{quick}.json"
                if not file.is_file():
                    sources = sources or members(world, seed, folder)
                    settings = {"kl_coef": kl_coef, "reward_ensemble": ENSEMBLES[name]} | short
                    file.write_text(
                        json.dumps(ppo_curve(world, seed, sources if ENSEMBLES[name] else sources[0], **settings))
                    )
                curves.setdefault((name, kl_coef), []).append(json.loads(file.read_text()))
                found = summary(curves[name, kl_coef][-1])
                print(
                    f"seed {seed} {name} {kl_coef:g} " + " ".join(f"{k} {v:.3f}" for k, v in found.items()), flush=True
                )
        file = folder / f"best-of-n-{seed}{quick}.json"
        if not file.is_file():
            sources = sources or members(world, seed, folder)
            file.write_text(json.dumps(best_of_n(world, seed, sources)))
        for name, rows in json.loads(file.read_text()).items():
            sampled.setdefault(name, []).append(rows)

    result: dict[str, Any] = {"ppo": {}, "best_of_n": {}, "above_single": {}}
    for (name, kl_coef), runs in curves.items():
        table = [summary(rows) for rows in runs]
        result["ppo"][f"{name} {kl_coef:g}"] = {key: interval([row[key] for row in table]) for key in table[0]}
        single = [summary(rows) for rows in curves[variants[0], kl_coef]]
        result["above_single"][f"{name} {kl_coef:g}"] = {
            key: interval([a[key] - b[key] for a, b in zip(table, single, strict=True)]) for key in ("gold_end", "lost")
        }
    for name, runs in sampled.items():
        fits = [gao(rows, is_ppo=False) for rows in runs]
        result["best_of_n"][name] = {
            "gold": {n: interval([rows[i][1] for rows in runs]) for i, n in enumerate(SIZES)},
            "alpha": interval([fit[0] for fit in fits]),
            "beta": interval([fit[1] for fit in fits]),
        }
    arguments.json.write_text(json.dumps(result, indent=1))
    print(
        "| PPO against | KL coefficient | true reward at the end | at its peak | lost | √KL at the end |\n|---|---|---|---|---|---|"
    )
    for key, row in result["ppo"].items():
        name, kl_coef = key.split()
        cells = [f"{row[k][0]:.2f} [{row[k][1]:.2f}, {row[k][2]:.2f}]" for k in ("gold_end", "gold_peak", "lost")]
        print(f"| {name} | {kl_coef} | " + " | ".join(cells) + f" | {math.sqrt(max(0.0, row['kl_end'][0])):.1f} |")
    print(json.dumps(result["above_single"], indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
