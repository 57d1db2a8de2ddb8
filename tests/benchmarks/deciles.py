"""One reward model per decile of preference strength, each judged on clean pairs, beside the paper's Figure 4.

python tests/benchmarks/deciles.py --json deciles.json --seeds 5,6,7,8,9

In the lab, with the crowd's own labels (noise sits at close pairs and in shared tastes) and with planted flips (a quarter of
true labels turned round at random). Strength is the mean of ten models, in-sample as in the paper or out of fold. Every
decile's 600 pairs train a fresh model from SFT with the same settings. Finished parts are kept beside FILE.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worlds import Rows, differences, fitted, in_true_order, interval, is_wrong, planted, reward_settings, world

from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote

VARIANTS = ("crowd_in_sample", "crowd_out_of_fold", "planted_in_sample", "planted_out_of_fold")
# arXiv:2401.06080 Figure 4, read off (±0.005): Llama-2-7B on HH-RLHF, accuracy on its validation labels.
PAPER = (0.327, 0.347, 0.446, 0.56, 0.653, 0.68, 0.68, 0.68, 0.68, 0.659)
LEARNING_RATE, EPOCHS, PAIRS, TEST = 5e-4, 2, 6000, 3000


def measured(variant: str, base: Path, crowd: Rows, test: Rows, folder: Path, seed: int, *, quick: bool) -> Any:
    """Accuracy on clean pairs, share of wrong labels and mean strength of each decile."""
    file = folder / f"{variant}-{seed}{'-quick' if quick else ''}.json"
    if file.is_file():
        return json.loads(file.read_text())
    rows = crowd if variant.startswith("crowd") else planted(crowd, seed)
    in_sample = variant.endswith("in_sample")
    shape: dict[str, Any] = {
        "members": 4 if quick else 10,
        "folds": 2 if quick else 5,
        "in_sample": in_sample,
        "flip_rate": 0.0,
    }
    where = file.with_suffix("")
    strength, *_ = vote(
        base, rows, reward_settings(LEARNING_RATE, 1), where, seed=seed, say=lambda _: None, trunk=None, **shape
    )
    wrong, found = np.array(is_wrong(rows)), []
    for index in np.array_split(np.argsort(strength.mean.numpy(), kind="stable"), 10):
        reward = fitted(base, [rows[i] for i in index], learning_rate=LEARNING_RATE, epochs=EPOCHS, seed=seed)
        accuracy = (differences(reward, test) > 0).float().mean().item()
        found.append([accuracy, float(wrong[index].mean()), float(strength.mean[index].mean())])
    file.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="5,6,7,8,9")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, four members, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    scale = 10 if arguments.quick else 1
    tables: dict[str, list[Any]] = {}
    for seed in seeds:
        out = folder / f"world-{seed}{'-quick' if arguments.quick else ''}"
        base, crowd, test = world(out, seed, pairs=14_000 // scale, test_pairs=11_500 // scale)  # denoise.py's worlds
        crowd, test = crowd[: PAIRS // scale], test[: TEST // scale]
        for variant in arguments.variants.split(","):
            found = measured(variant, base, crowd, in_true_order(test), folder, seed, quick=arguments.quick)
            tables.setdefault(variant, []).append(found)
            print(f"seed {seed} {variant:20s} " + " ".join(f"{row[0]:.3f}" for row in found), flush=True)
    result: dict[str, Any] = {"paper": PAPER}
    for variant, values in tables.items():
        array = np.array(values)  # [seeds, deciles, 3]
        mean = array.mean(axis=0)
        result[variant] = {
            "accuracy": [interval(column) for column in array[:, :, 0].T.tolist()],
            "wrong": mean[:, 1].tolist(),
            "strength": mean[:, 2].tolist(),
        }
        print(f"\n{variant}: decile, accuracy, share of wrong labels, mean strength, the paper")
        for decile in range(10):
            m, low, high = result[variant]["accuracy"][decile]
            print(
                f"| {10 * decile}-{10 * decile + 10} % | {m:.3f} [{low:.3f}, {high:.3f}] | {mean[decile, 1]:.2f} | "
                f"{mean[decile, 2]:.2f} | {PAPER[decile]:.3f} |"
            )
    arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
