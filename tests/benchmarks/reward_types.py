"""Reward types in the lab: true reward against KL for each type of reward of PPO.

rlhf run recipes/quickstart.yaml --out RUN --until reward
python tests/benchmarks/reward_types.py RUN --json reward_types.json --seeds 0,1,2

Each run starts from RUN's SFT model with the quickstart's settings but for what `TYPES` names and `--episodes`; its seed draws
prompts and samples. The critic always starts as RUN's reward model. Beside each log's KL, true reward and raw score stand the
self-certainty and the variety of the answers. Means of the last fifth of the rollouts; intervals by t over seeds. Finished runs
are kept beside FILE.
"""

import argparse
import json
import os
import warnings
from pathlib import Path
from typing import Any

from worlds import interval, ppo_log

from rlhf import load_reward_model
from rlhf.pipeline.training import quiet_libraries

ALONE = {"reward_weights": [0.0]}  # the reward model is asked and does not count
TYPES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "shaped": {"shaping_coef": 1.0},
    "contrastive": {"baseline_samples": 1},
    "novelty": {"novelty_coef": 0.1},
    "adversarial": {**ALONE, "adversarial_coef": 0.3},
    "self-certainty, no KL": {**ALONE, "self_certainty_coef": 1.0, "kl_coef": 0.0},
    "self-certainty, KL": {**ALONE, "self_certainty_coef": 1.0},
}
SHOWN = ("kl", "reward_gold", "reward_proxy", "entropy", "distinct_2", "length", "explained_variance", "self_certainty")


def last_fifth(rows: list[dict[str, float]], name: str) -> float | None:
    """Mean of a metric over the last fifth of a run's rollouts."""
    values = [row[name] for row in rows[-max(1, len(rows) // 5) :] if name in row]
    return sum(values) / len(values) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--types", default="all", help="names, separated by semicolons")
    parser.add_argument("--episodes", type=int, default=3072)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    quiet_libraries()
    names = list(TYPES) if options.types == "all" else options.types.split(";")

    # 1. Every run once.
    curves: dict[str, dict[str, list[dict[str, float]]]] = {}
    if options.json.is_file():
        curves = json.loads(options.json.read_text())["curves"]
    for seed in options.seeds.split(","):
        for name in names:
            if seed in curves.get(name, {}):
                continue
            reward = load_reward_model(options.run / "round-1/reward/model")
            rows = ppo_log(options.run, int(seed), [reward], **TYPES[name], total_episodes=options.episodes)
            curves.setdefault(name, {})[seed] = [{key: row[key] for key in SHOWN if key in row} for row in rows]
            write(options.json, curves)

    # 2. The table.
    write(options.json, curves)
    for name, row in json.loads(options.json.read_text())["table"].items():
        print(name, {key: [None if x is None else round(x, 3) for x in value] for key, value in row.items()})


def write(file: Path, curves: dict[str, dict[str, list[dict[str, float]]]]) -> None:
    """Write all curves, and the means of their ends over seeds, at once."""
    table: dict[str, dict[str, list[float]]] = {}
    for name, seeds in curves.items():
        ends = {key: [last_fifth(rows, key) for rows in seeds.values()] for key in SHOWN}
        table[name] = {
            key: interval([x for x in values if x is not None]) for key, values in ends.items() if None not in values
        }
    part = file.with_suffix(".part")
    part.write_text(json.dumps({"table": table, "curves": curves}, indent=1))
    os.replace(part, file)


if __name__ == "__main__":
    main()
