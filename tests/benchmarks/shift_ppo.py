"""PPO against the plain reward model and against the method that `shift.py` chose: true reward at equal KL.

python tests/benchmarks/shift_ppo.py --json shift_ppo.json --worlds shift --method experts_gate --seeds 5,6,7,8,9

`--worlds` is the folder beside shift.py's JSON. Both runs have the quickstart's settings, the same seed and the same critic
(a copy of the plain reward model), so that only the reward differs. Training curves of true reward over KL are smoothed over
five rollouts and interpolated at the KLs that both reached; the difference is their mean, its interval by t over seeds.
Finished runs are kept beside FILE.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from shift import METHODS, experts, prepared, read, trained
from worlds import interval, ppo_curve

from rlhf import load_reward_model
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.model import RewardModel

SMOOTH, POINTS = 5, 20


def reward_model(method: str, world: Path, seed: int, work: Path) -> RewardModel:
    """What a method trains on this world; its scale on answers of the SFT policy, as the plain one's."""
    if method == "plain":
        return load_reward_model(world / "round-1/reward/model")
    sets, base = prepared(world, seed), world / "round-0/sft/model"
    name, _, combination = method.rpartition("_")
    if METHODS.get(name, {}).get("experts"):
        how = {key: value for key, value in METHODS[name].items() if key != "experts"}
        reward = experts(base, sets, seed, work, **how)[combination]
    else:
        trainer = trained(base, sets["train"], seed, sets, **METHODS[method])
        reward = RewardModel(trainer.model.eval(), trainer.processing_class, conversational=True)
    rows = read(world / "round-0/sft/samples.jsonl") * 4
    scores = reward.score([row["prompt"] for row in rows], [row["completion"] for row in rows])
    reward.mean, reward.std = scores.mean().item(), scores.std(correction=0).item()
    return reward


def at_equal_kl(one: Any, other: Any) -> dict[str, float]:
    """Mean difference in true reward, other minus one, over the KLs that both reached; and both ends."""
    smoothed = []
    for rows in (one, other):
        table = np.array(rows)
        kernel = np.ones(SMOOTH) / SMOOTH
        kl, reward = (np.convolve(table[:, i], kernel, mode="valid") for i in range(2))
        order = np.argsort(kl)
        smoothed.append((kl[order], reward[order]))
    low, high = max(k[0] for k, _ in smoothed), min(k[-1] for k, _ in smoothed)
    grid = np.linspace(low, high, POINTS)
    values = [np.interp(grid, kl, reward) for kl, reward in smoothed]
    return {
        "difference": float((values[1] - values[0]).mean()),
        "at_the_highest": float(values[1][-1] - values[0][-1]),
        "highest_common_kl": float(high),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--worlds", type=Path, required=True)
    parser.add_argument("--method", required=True)
    parser.add_argument("--seeds", default="5,6,7,8,9")
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    table = []
    for seed in (int(seed) for seed in arguments.seeds.split(",")):
        curves = {}
        for method in ("plain", arguments.method):
            file = folder / f"{method}-{seed}.json"
            if not file.is_file():
                world = arguments.worlds / f"world-{seed}"
                with tempfile.TemporaryDirectory() as work:
                    reward = reward_model(method, world, seed, Path(work))
                    file.write_text(json.dumps(ppo_curve(world, seed, reward)))
            curves[method] = json.loads(file.read_text())
        row = at_equal_kl(curves["plain"], curves[arguments.method])
        for method, rows in curves.items():
            row |= {f"gold_{method}": float(np.mean([r[1] for r in rows[-SMOOTH:]]))}
            row |= {f"kl_{method}": float(np.mean([r[0] for r in rows[-SMOOTH:]]))}
        table.append(row)
        print(f"seed {seed} " + " ".join(f"{name} {value:.3f}" for name, value in row.items()), flush=True)
    found = {"method": arguments.method, "seeds": table} | {
        name: interval([row[name] for row in table]) for name in table[0]
    }
    arguments.json.write_text(json.dumps(found, indent=1))
    print(json.dumps({name: value for name, value in found.items() if name != "seeds"}, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
