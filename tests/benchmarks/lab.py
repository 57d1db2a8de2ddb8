"""The quickstart over several seeds: what PPO gains, at which KL, and what goes wrong without KL.

python tests/benchmarks/lab.py --seeds 10,11,12,13,14 --json lab.json
python tests/benchmarks/lab.py --seeds 10 --over --json over.json

Every run is an ordinary `rlhf run`: a killed benchmark goes on where it stopped, and finished runs are not repeated.
`--over` is the same recipe with `ppo.kl_coef=0.001` and three times the episodes, by thirds of training.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

RECIPE = Path(__file__).parents[2] / "recipes" / "quickstart.yaml"
EPISODES = 6144


def run(out: Path, seed: int, *overrides: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "rlhf", "run", str(RECIPE), "--out", str(out), f"seed={seed}", *overrides]
    subprocess.run(command, check=True)
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def row(seed: int, summary: dict[str, Any]) -> dict[str, Any]:
    last = summary["rounds"][-1]
    return {
        "seed": seed,
        "gold_gap_closed": summary["gold_gap_closed"],
        "kl": last["policy"]["kl"],
        "gold_sft": summary["sft"]["gold"],
        "gold_policy": last["policy"]["gold"],
        "gold_best_of_16": summary["best_of_16"]["by_gold"]["gold"],
        "accuracy_true": last["reward"]["accuracy_true"],
        "flip_rate": summary["lab"]["flip_rate"],
        "seconds": sum(summary["seconds"].values()),
    }


def thirds(metrics: Path) -> dict[str, list[float]]:
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    rows = [x for x in rows if "episodes" in x]
    size = len(rows) // 3
    parts = [rows[:size], rows[size : 2 * size], rows[2 * size :]]
    return {
        key: [statistics.mean(x[key] for x in part) for part in parts] for key in ("reward_proxy", "reward_gold", "kl")
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + "---|" * len(rows[0])]
    for entry in rows:
        cells = [f"{value:.3f}" if isinstance(value, float) else str(value) for value in entry.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="10,11,12,13,14")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-lab"))
    parser.add_argument("--over", action="store_true")
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    if arguments.over:
        overrides = ("ppo.kl_coef=0.001", f"ppo.total_episodes={3 * EPISODES}")
        result: dict[str, Any] = {"seeds": {}}
        for seed in seeds:
            folder = arguments.out / f"over-{seed}"
            run(folder, seed, *overrides)
            result["seeds"][seed] = thirds(folder / "round-1" / "ppo" / "metrics.jsonl")
            print(seed, json.dumps(result["seeds"][seed]))
    else:
        rows = [row(seed, run(arguments.out / f"seed-{seed}", seed)) for seed in seeds]
        gaps = [entry["gold_gap_closed"] for entry in rows]
        result = {
            "rows": rows,
            "gold_gap_closed": {"mean": statistics.mean(gaps), "min": min(gaps), "max": max(gaps)},
        }
        print(table(rows))
        print(json.dumps(result["gold_gap_closed"]))
    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
