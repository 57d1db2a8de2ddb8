"""Four rounds of RLHF in the lab at one budget of labels: what each part is worth, and how far the true reward itself would get.

python tests/benchmarks/rounds.py --json rounds.json --seeds 5,6,7,8,9

Every variant spends `4 x LABELS` labels and as many episodes of PPO, from the same SFT policy. Round 1 has the lab's offline
pairs; the others the policy's own answers. `best` has the labels of the true reward, `best_noisy` the same with a quarter of
them turned round, in every round (and the likelihood that knows of it); `no_denoise`, `meta`, `information` and `members`
change one thing of `best_noisy`. `second_look` has the same labels, but a tenth of all of them are experts' (wrong in 5 %) on
pairs that had a label. `crowd` has the lab's own annotators. `oracle` is `best` with PPO on the true reward itself.
`bt_once` has all labels at once, offline, and one round. Figures are of the last round that ran; a run that a rule
stopped keeps its last round.

Runs lie beside FILE, so a killed benchmark goes on, and a finished one only reads summaries.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from worlds import interval

ROOT = Path(__file__).parents[2]
LABELS, ROUNDS, EPISODES = 1500, 4, 3072
BASE = [
    f"lab.pairs={LABELS}",
    f"rounds.count={ROUNDS}",
    f"rounds.labels={LABELS}",
    "rounds.prompts=1000",
    "rounds.responses=4",
    f"ppo.total_episodes={EPISODES}",
    "lab.annotators=exact",
    "rounds.stop_when_worse=false",
]
BEST = [
    "rounds.start=previous",
    "rounds.reference=sft",
    "rounds.select=random",
    "reward.num_train_epochs=2",
    "ppo.kl_coef=0.08",
]
META = ["reward.meta=true"]
NOISY = ["lab.flip_rate=0.25"]
DENOISE = ["reward.flip_rate=0.2"]
# 200 labels of each of three rounds, a tenth of all 6,000.
LOOK = ["rounds.second_look=0.1333", "vote.members=5", "vote.folds=5", "vote.trunk=2", "vote.flip_rate=0.2"]
# How far a policy goes at one coefficient depends on its reward model.
AT_KL = ["ppo.kl_target=4", "ppo.kl_horizon=1000"]
VARIANTS: dict[str, list[str]] = {
    "best": BEST,
    "best_noisy": [*BEST, *NOISY, *DENOISE],
    "no_denoise": [*BEST, *NOISY],
    "meta": [*BEST, *NOISY, *DENOISE, *META],
    "information": [*BEST, *NOISY, *DENOISE, "rounds.select=information"],
    "members": [*BEST, *NOISY, *DENOISE, "reward.members=3"],
    "second_look": [*BEST, *NOISY, *LOOK],
    "crowd": [*BEST, *DENOISE, "lab.annotators=crowd"],
    "oracle": [*BEST, "ppo.extra_rewards=[rlhf/lab/world.py:gold]", "ppo.reward_weights=[0.0, 3.0]"],
    "bt_once": [
        "ppo.kl_coef=0.08",
        f"lab.pairs={LABELS * ROUNDS}",
        "rounds.count=1",
        f"ppo.total_episodes={EPISODES * ROUNDS}",
    ],
    "best_at_kl": [*BEST, *AT_KL],
    "best_noisy_at_kl": [*BEST, *NOISY, *DENOISE, *AT_KL],
    "second_look_at_kl": [*BEST, *NOISY, *LOOK, *AT_KL],
    # Only for choosing, on seed 0.
    "more_kl": [*BEST, "ppo.kl_coef=0.15"],
    "from_sft": [*BEST, "rounds.start=sft"],
    "moving": [*BEST, "rounds.reference=previous"],
    "diversity": [*BEST, *NOISY, *DENOISE, "rounds.select=diversity"],
}
REPORTED = ["best", "best_noisy", "no_denoise", "meta", "information", "oracle", "bt_once"]
# `best_noisy` has no MetaRM (seed 0) and takes pairs at random (nothing else was compared), so these names are one run.
SAME = {"no_meta": "best_noisy", "random": "best_noisy"}


def run(variant: str, seed: int, folder: Path, *, quick: bool) -> dict[str, Any]:
    """A run's summary; what the variants of one seed have in common before round 1 is made once."""
    out = folder / f"{variant}-{seed}"
    summary = out / "summary.json"
    if summary.is_file():  # its models are deleted, so that it can't be run again
        finished: dict[str, Any] = json.loads(summary.read_text())
        if finished["rounds"][-1]["policy"]["gold"] is not None:  # `--until lab` leaves a summary too
            return finished
    settings = [*BASE, *VARIANTS[variant], f"seed={seed}"]
    if quick:
        settings += [
            "ppo.total_episodes=256",
            "lab.pairs=200",
            "rounds.labels=60",
            "rounds.prompts=40",
            "rounds.count=2",
        ]
        settings += ["lab.demonstrations=600", "evaluate.prompts=32", "sft.num_train_epochs=1"]
    kept = {s.partition("=")[0]: s for s in settings}  # the last word on each key
    world = [s for s in sorted(kept.values()) if s.startswith("lab.")]
    same = folder / f"world-{'-'.join(s.partition('=')[2] for s in world)}-{seed}"
    command = [
        sys.executable,
        "-m",
        "rlhf",
        "run",
        str(ROOT / "recipes/quickstart.yaml"),
        "--out",
        str(out),
        *kept.values(),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    if (same / "sft").is_dir() and not (out / "round-0/sft").exists():
        subprocess.run([*command, "--until", "lab"], cwd=ROOT, env=environment, capture_output=True, check=True)
        shutil.copytree(same, out / "round-0", dirs_exist_ok=True)
    begin = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{variant} {seed}: {done.stdout[-500:]} {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(summary.read_text())
    if not same.exists():
        shutil.copytree(out / "round-0", same)
    for heavy in [*out.glob("round-*/reward/model"), *out.glob("round-*/reward/member-*")]:
        shutil.rmtree(heavy)
    gaps = " ".join(f"{entry['policy']['gold_gap_closed']:.2f}" for entry in found["rounds"])
    print(f"{variant} {seed}: gap closed by round {gaps} ({time.monotonic() - begin:.0f} s)", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="5,6,7,8,9")
    parser.add_argument("--variants", default=",".join(REPORTED))
    parser.add_argument(
        "--quick", action="store_true", help="two rounds of nothing much, the first seed: whether it runs"
    )
    arguments = parser.parse_args()
    folder = arguments.json.resolve().with_suffix("")  # runs are started in another folder
    if arguments.quick:
        folder = folder.with_name(folder.name + "-quick")
    folder.mkdir(parents=True, exist_ok=True)
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    variants = arguments.variants.split(",")
    found = {(v, s): run(v, s, folder, quick=arguments.quick) for s in seeds for v in variants}

    gap = {v: [found[v, s]["rounds"][-1]["policy"]["gold_gap_closed"] for s in seeds] for v in variants}
    result: dict[str, Any] = {
        "seeds": seeds,
        "labels": LABELS * ROUNDS,
        "gold_gap_closed": {v: interval(values) for v, values in gap.items()}
        | {name: interval(gap[v]) for name, v in SAME.items() if v in gap},
        "win_rate_vs_sft": {
            v: interval([found[v, s]["rounds"][-1]["policy"]["win_rate"] for s in seeds]) for v in variants
        },
        "by_round": {
            v: [
                [entry["policy"][key] for entry in found[v, s]["rounds"]]
                for s in seeds
                for key in ("gold_gap_closed", "kl")
            ]
            for v in variants
        },
        "falls": [
            {"variant": v, "seed": s, "round": entry["round"], **entry["change_in_gold"]}
            for (v, s), summary in found.items()
            for entry in summary["rounds"]
            if entry["change_in_gold"] is not None and entry["change_in_gold"]["difference_ci"][1] < 0
        ],
    }
    if {"best", "oracle"} <= set(variants):
        shares = [a / b for a, b in zip(gap["best"], gap["oracle"], strict=True)]
        result["best_of_oracle"] = interval(shares)
    for other in set(variants) - {"best_noisy"}:
        if "best_noisy" in variants:
            paired = [a - b for a, b in zip(gap[other], gap["best_noisy"], strict=True)]
            result.setdefault("minus_best_noisy", {})[other] = interval(paired)
    arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
