"""Are two checkouts the same program? Run the same recipes with both and compare every weight file by its sha256.

    python tests/benchmarks/same_bits.py BEFORE AFTER --work FOLDER [--runs quickstart rounds]

One thread, seed 0. A finished run is not repeated, so the same FOLDER serves while AFTER is worked on: delete
`FOLDER/after` to run that side again. Exits with 1 where a file differs or stands on one side only.
"""

import argparse
import hashlib
import os
import subprocess
import sys
from pathlib import Path

ROUNDS = """
name: same-bits
lab: {demonstrations: 400, pairs: 1000, test_pairs: 60, hidden_size: 64, num_hidden_layers: 2}
sft: {learning_rate: 3.0e-3, per_device_train_batch_size: 64, num_train_epochs: 2}
vote: {members: 2, folds: 2}
reward:
  {objective: posterior, extra: swav, meta: true, meta_pool: 32, meta_prompts: 4, members: 2, learning_rate: 2.0e-3,
   per_device_train_batch_size: 16, num_train_epochs: 2}
ppo:
  {total_episodes: 128, per_device_train_batch_size: 16, num_mini_batches: 2, num_ppo_epochs: 2, learning_rate: 3.0e-4,
   critic_learning_rate: 1.0e-3, kl_coef: 0.1, max_completion_length: 24}
rounds: {count: 2, labels: 60, prompts: 60, responses: 3}
evaluate: {prompts: 64}
"""
RUNS = {"quickstart": ["--until", "reward"], "rounds": []}


def weights(checkout: Path, run: str, work: Path) -> dict[str, str]:
    """Run a recipe with a checkout, and return the sha256 of every weight file by its place in the run."""
    out = work / run
    recipe = checkout / "recipes" / "quickstart.yaml"
    if run == "rounds":
        recipe = work / "rounds.yaml"
        recipe.parent.mkdir(parents=True, exist_ok=True)
        recipe.write_text(ROUNDS, encoding="utf-8")
    environment = os.environ | {
        "PYTHONPATH": str(checkout.resolve()),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-m", "rlhf", "run", str(recipe.resolve()), "--out", str(out.resolve()), *RUNS[run]]
    subprocess.run(command, check=True, cwd=checkout, env=environment, stdout=subprocess.DEVNULL)
    return {
        str(file.relative_to(out)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(out.rglob("*.safetensors"))
        if not file.relative_to(out).is_relative_to("best")  # a link to one of the others
    }


def main() -> None:
    """Print one row a file, and exit with 1 where the two sides are not the same."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--work", type=Path, required=True, help="where the runs of both sides lie")
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), default=list(RUNS))
    arguments = parser.parse_args()
    differences = 0
    for run in arguments.runs:
        before, after = (
            weights(checkout, run, arguments.work / side)
            for side, checkout in (("before", arguments.before), ("after", arguments.after))
        )
        for file in sorted(before.keys() | after.keys()):
            first, second = before.get(file, "-"), after.get(file, "-")
            differences += first != second
            print(f"{'same' if first == second else 'DIFFERS'}  {run}/{file}  {first[:16]}  {second[:16]}")
    print(f"{differences} files differ")
    sys.exit(differences > 0)


if __name__ == "__main__":
    main()
