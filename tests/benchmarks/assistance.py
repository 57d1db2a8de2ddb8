"""What a critic beside the evaluators is worth (recursive assistance, arXiv:1811.07871): labels, and models trained on them.

python tests/benchmarks/assistance.py --out runs/assistance --json assistance.json

The crowd of the lab of lists labels the same pairs again and again: alone, and hearing a critic that says which answer misses more
and is wrong at a known rate (`rlhf.lab.annotators.Critic`, weighed by Bayes' rule as `rlhf/objectives/assistance.py` does). Two
critics are trusted above their worth. `all`: the share of right labels, over pairs whose true rewards differ. `too hard`: over the
fifth of the pairs where the crowd alone is nearest to guessing. `foretold` is the closed form's `all`. `model`: accuracy by the true
reward of a reward model trained on these labels, on held-out pairs. Each seed draws labels, head and order anew; differences to no
critic are paired by seed (t over seeds). Finished trainings are kept in OUT.
"""

import argparse
import json
import random
import statistics
from pathlib import Path
from typing import Any

import torch
from worlds import SMALL, SMALL_QUICK, Rows, decided, differences, fitted, in_true_order, interval, world

from rlhf.data.rows import answer
from rlhf.lab.annotators import CROWD, Critic
from rlhf.lab.build import LabSettings, build_lab
from rlhf.models.text import plain
from rlhf.objectives.assistance import assisted_accuracy
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.denoise import flip_pair

CRITICS: dict[str, Critic | None] = {
    "none": None,
    "wrong in 10 %": Critic(0.10),
    "wrong in 25 %, as often as the crowd": Critic(0.25),
    "wrong in 40 %, more often than the crowd": Critic(0.40),
    "a coin, known as one": Critic(0.50),
    "a coin, taken for wrong in 10 %": Critic(0.50, believed=0.10),
    "wrong in 40 %, taken for wrong in 10 %": Critic(0.40, believed=0.10),
}
HARD = 0.2


def unmade(out: Path, sizes: dict[str, Any]) -> tuple[Path, Rows, Rows]:
    """The world's pairs without an SFT model: of the lab stage alone."""
    build_lab(out / "lab", LabSettings(**sizes))
    files = [out / "lab/data" / f"{name}.jsonl" for name in ("preferences", "test")]
    pairs, test = (decided([json.loads(line) for line in file.read_text().splitlines()]) for file in files)
    return out / "lab/model", pairs, test


def right_alone(rows: Rows) -> torch.Tensor:
    """P(right) of a random member of the crowd without a critic, for pairs in true order, [n, people]."""
    texts = [(plain(row["prompt"]), answer(row, "chosen"), answer(row, "rejected")) for row in rows]
    return torch.tensor([[person.probability_of_preferring(*text) for person in CROWD] for text in texts])


def labelled(rows: Rows, critic: Critic | None, seed: int) -> list[bool]:
    """Whether each pair, in true order, is labelled rightly; who labels it and how they feel is the same for every critic."""
    right = []
    for i, row in enumerate(rows):
        rng = random.Random(f"{seed} {i}")
        person = rng.choice(CROWD)
        texts = (plain(row["prompt"]), answer(row, "chosen"), answer(row, "rejected"))
        right.append(person.prefers_first(*texts, rng, critic=critic))
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/assistance"))
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--labels", action="store_true", help="no model is trained, and its columns mean nothing")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, to see whether it runs")
    options = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    sizes = SMALL_QUICK if options.quick else SMALL
    base, pairs, test = unmade(options.out, sizes) if options.labels else world(options.out / "world", 0, **sizes)
    rows, test = in_true_order(pairs), in_true_order(test)
    alone = right_alone(rows)
    is_hard = torch.zeros(len(rows), dtype=torch.bool)
    is_hard[(alone.mean(dim=1) - 0.5).abs().argsort()[: round(HARD * len(rows))]] = True
    print({"pairs": len(rows), "too hard": int(is_hard.sum()), "held out": len(test)}, flush=True)

    table: dict[str, list[dict[str, float]]] = {}
    for seed in map(int, options.seeds.split(",")):
        for number, (name, critic) in enumerate(CRITICS.items()):
            file = options.out / f"{'labels' if options.labels else number}-{seed}.json"
            if options.labels or not file.is_file():
                labels = torch.tensor(labelled(rows, critic, seed))
                named = [row if label else flip_pair(row) for row, label in zip(rows, labels.tolist(), strict=True)]
                right = 0.0
                if not options.labels:
                    reward = fitted(base, named, learning_rate=3e-3, epochs=1, seed=seed, batch_size=16)
                    right = (differences(reward, test) > 0).double().mean().item()
                file.write_text(json.dumps(figures(labels, is_hard, right)))
                print(seed, name, file.read_text(), flush=True)
            table.setdefault(name, []).append(json.loads(file.read_text()))

    options.json.write_text(json.dumps(table, indent=1))
    print("| critic | all | foretold | too hard | model | all − none | too hard − none | model − none |")
    for name, critic in CRITICS.items():
        means = {key: statistics.fmean(row[key] for row in table[name]) for key in ("all", "hard", "model")}
        foretold = (
            alone
            if critic is None
            else assisted_accuracy(alone, error_rate=critic.error_rate, believed=critic.believed)
        )
        gains = []
        for key in ("all", "hard", "model"):
            paired = [100 * (a[key] - b[key]) for a, b in zip(table[name], table["none"], strict=True)]
            m, low, high = interval(paired)
            gains.append("" if critic is None else f"{m:+.1f} [{low:+.1f}, {high:+.1f}]")
        print(
            f"| {name} | {means['all']:.3f} | {foretold.mean():.3f} | {means['hard']:.3f} | {means['model']:.3f} | "
            + " | ".join(gains) + " |"
        )  # fmt: skip


def figures(labels: torch.Tensor, is_hard: torch.Tensor, model: float) -> dict[str, float]:
    """What is kept of one training."""
    return {
        "all": labels.double().mean().item(),
        "hard": labels[is_hard].double().mean().item(),
        "model": model,
    }


if __name__ == "__main__":
    main()
