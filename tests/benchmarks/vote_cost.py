"""What a vote of ten members on a shared frozen trunk costs beside one reward model, and what it loses against ten of its own.

python tests/benchmarks/vote_cost.py --json vote_cost.json

A lab of 8 layers, crowd labels. Timed, one after the other in one process: one reward model on all pairs (its training),
the vote on the trunk (all of it: features, ten trainings, scoring), and the vote of ten independent models. All train one
epoch at the same rate in batches of 32, out of fold. AUROC is that of -strength for the labels that contradict the true
reward. `cost_ratio` is trunk vote over one reward model. Finished parts are kept beside FILE.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from worlds import Rows, fitted, is_wrong, reward_settings, world

from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.statistics import auroc

MEMBERS, FOLDS, TOP_LAYERS, LEARNING_RATE = 10, 5, 2, 5e-4


def measured(variant: str, base: Path, rows: Rows, folder: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """Seconds of one part, and what its votes know."""
    file = folder / f"{variant}-{seed}{'-quick' if quick else ''}.json"
    if not file.is_file():
        begin, found = time.monotonic(), {}
        if variant == "one":
            fitted(base, rows, learning_rate=LEARNING_RATE, epochs=1, seed=seed)
        else:
            members, folds = (4, 2) if quick else (MEMBERS, FOLDS)
            shape: dict[str, Any] = {"members": members, "folds": folds, "in_sample": False, "flip_rate": 0.0}
            shape["trunk"] = TOP_LAYERS if variant == "trunk" else None
            keys = reward_settings(LEARNING_RATE, 1)
            strength, *_ = vote(base, rows, keys, file.with_suffix(""), seed=seed, say=lambda _: None, **shape)
            found["auroc"] = auroc((-strength.mean).tolist(), is_wrong(rows))
        file.write_text(json.dumps({"seconds": time.monotonic() - begin, **found}))
    result: dict[str, Any] = json.loads(file.read_text())
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="5")
    parser.add_argument("--variants", default="one,trunk,independent")
    parser.add_argument("--quick", action="store_true", help="600 pairs, 4 members")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, list[dict[str, Any]]] = {}
    for seed in (int(s) for s in arguments.seeds.split(",")):
        sizes = {"num_hidden_layers": 8, "pairs": 600 if arguments.quick else 9000, "test_pairs": 50}
        base, rows, _ = world(folder / f"world-{seed}{'-quick' if arguments.quick else ''}", seed, **sizes)
        for variant in arguments.variants.split(","):
            found = measured(variant, base, rows, folder, seed, quick=arguments.quick)
            parts.setdefault(variant, []).append(found)
            print(f"seed {seed} {variant:12s} {json.dumps(found)}", flush=True)
    mean = {f"{name}_{key}": statistics.mean(r[key] for r in rs) for name, rs in parts.items() for key in rs[0]}
    result = {
        "cost_ratio": mean["trunk_seconds"] / mean["one_seconds"],
        "auroc_independent": mean.get("independent_auroc"),
        "auroc_trunk": mean["trunk_auroc"],
        "seconds": {name: mean[f"{name}_seconds"] for name in parts},
        "top_layers": TOP_LAYERS,
        "pairs": len(rows),
        "threads": torch.get_num_threads(),
    }
    arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
