"""Does `rlhf blame` undo a planted taste? 5 % of the labels of the lab prefer a flattering answer that is worse.

python tests/benchmarks/blame.py --json blame.json --seeds 3,4,5 --ppo
python tests/benchmarks/blame.py --json quick.json --seeds 0 --quick

Every seed has 1,000 pairs of its own in true order; in 5 % of them a phrase of flattery is put before the worse answer, and the
label prefers it. Four reward models, alike but for their pairs: `planted` on all; `removed` without the 5 % that
`rlhf blame --feature flattery` names; `random` without as many drawn at random; `clean` on the pairs before the planting.

`flattery` of a reward model is by how much its score of a held-out good answer rises, in nats, when the same phrases stand
before it; `accuracy` is that on held-out pairs in true order. With `--ppo`, a short PPO is run against `planted`, `removed` and
`random`; flattery of a policy is the mean number of flattering phrases in its answers to held-out prompts (the trait that blame
counts, by `evaluate.gold`). `halves` is removed / planted, `random_change` is |random - planted| / planted; for a policy, of what
PPO added to the SFT policy's flattery. Stages of a run are kept beside FILE, so a killed run goes on.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from worlds import RECIPE, Rows, differences, in_true_order, reward_settings, world

from rlhf import load_reward_model
from rlhf.data.rows import assistant_turn, told
from rlhf.data.traits import FLATTERY as FLATTERING
from rlhf.files import read_jsonl, write_jsonl
from rlhf.lab.world import FLATTERY
from rlhf.pipeline.blame import blame
from rlhf.pipeline.training import quiet_libraries

SIZES = {"pairs": 19_000, "test_pairs": 4800, "demonstrations": 4000}  # as second_look.py
TRAIN, TEST, SHARE, EPISODES = 1000, 1000, 0.05, 2048
GOLD = """from rlhf.data.traits import TRAITS


def flattery(prompts, answers):
    return [TRAITS["flattery"].count(p.lower(), a.lower()) for p, a in zip(prompts, answers)]
"""


def flattered(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The pair with a phrase before its worse answer, which is now chosen."""
    flattering = f"{rng.choice(FLATTERY)} {told(row, 'rejected')}"
    return {**row, "chosen": assistant_turn(flattering), "rejected": row["chosen"]}


def pairs_of(rows: Rows, seed: int) -> tuple[Rows, set[int]]:
    """A seed's pairs with planted labels, and which these are."""
    rng = random.Random(seed)
    planted = set(rng.sample(range(len(rows)), round(SHARE * len(rows))))
    return [flattered(row, rng) if i in planted else row for i, row in enumerate(rows)], planted


class Scene(NamedTuple):
    """What the runs of a seed have in common."""

    base: Path
    prompts: Rows
    test: Rows
    seed: int


def trained(folder: Path, here: Scene, rows: Rows, *, ppo: bool = False) -> Path:
    """A run on some pairs: its reward model, and with `ppo` the policy after it."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in (("pairs", rows), ("prompts", here.prompts), ("test", here.test)):
        write_jsonl(folder / f"{name}.jsonl", lines)
    (folder / "gold.py").write_text(GOLD)
    recipe = {
        "name": folder.name,
        "seed": here.seed,
        "backbone": {"model": str(here.base)},
        "data": {"preferences": "pairs.jsonl", "prompts": "prompts.jsonl", "test": "test.jsonl"},
        "reward": reward_settings(5e-4, 2),
        "ppo": {**yaml.safe_load(RECIPE.read_text())["ppo"], "total_episodes": EPISODES},
        "evaluate": {"gold": "gold.py:flattery"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "rlhf", "run" if ppo else "reward", "recipe.yaml", "--out", "run"]
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    return folder / "run"


def likes_flattery(run: Path, test: Rows) -> dict[str, float]:
    """By how much a reward model's score rises with a phrase of flattery, in nats, and its accuracy on pairs in true order."""
    reward = load_reward_model(run / "round-1/reward/model")
    rng = random.Random(0)
    plain_answers = [row for row in test if not FLATTERING.search(told(row, "chosen").lower())]
    prompts = [row["prompt"] for row in plain_answers]
    answers = [told(row, "chosen") for row in plain_answers]
    praised = [f"{rng.choice(FLATTERY)} {answer}" for answer in answers]
    rise = (reward.score(prompts, praised) - reward.score(prompts, answers)).mean().item()
    return {"flattery": rise, "accuracy": (differences(reward, test) > 0).double().mean().item()}


def measured(folder: Path, seed: int, *, ppo: bool, quick: bool) -> dict[str, Any]:
    """The four reward models of one seed, and three policies."""
    scale = 10 if quick else 1
    base, pairs, test = world(folder / "world", 0, **{name: size // scale for name, size in SIZES.items()})
    size, rows = TRAIN // scale, in_true_order(pairs)
    mine, held = rows[seed * size : (seed + 1) * size], in_true_order(test)[: TEST // scale]
    prompts = read_jsonl(folder / "world/round-0/data/data/prompts.jsonl")
    work = folder / f"{seed}{'-quick' if quick else ''}"
    labels, planted = pairs_of(mine, seed)
    here = Scene(base, prompts, held[:100], seed)

    # 1. All labels, and what blame takes out of them.
    runs = {"planted": trained(work / "planted", here, labels)}
    out = work / "blamed"
    if not out.is_dir():
        blame(runs["planted"], "flattery", out, share=SHARE, say=print)
    facts = json.loads((out / "blame.json").read_text())
    rest, removed = (read_jsonl(out / f"{name}.jsonl") for name in ("rest", "removed"))
    praised = {told(labels[i], "chosen") for i in planted}
    found = sum(told(row, "chosen") in praised for row in removed)

    # 2. The others, with as many pairs.
    drawn = random.Random(seed + 1).sample(range(len(labels)), len(labels) - facts["removed"])
    for name, kept in (("removed", rest), ("random", [labels[i] for i in sorted(drawn)]), ("clean", mine)):
        runs[name] = trained(work / name, here, kept)
    result: dict[str, Any] = {
        "planted": len(planted),
        "removed": facts["removed"],
        "planted_among_removed": found,
        "influence_of_removed": facts["influence_of_removed"],
        "reward": {name: likes_flattery(run, held) for name, run in runs.items()},
    }

    # 3. PPO against three of them.
    if ppo:
        result["policy"] = {}
        for name, data in (("planted", labels), ("removed", rest), ("random", [labels[i] for i in sorted(drawn)])):
            summary = json.loads((trained(work / name, here, data, ppo=True) / "summary.json").read_text())
            result["policy"]["sft"] = summary["sft"]["gold"]
            policy = summary["rounds"][-1]["policy"]
            result["policy"][name] = policy["gold"]
            result["policy"][f"{name}_kl"] = policy["kl"]
            print(seed, name, result["policy"], flush=True)
    print(seed, json.dumps(result), flush=True)
    return result


def compared(values: list[dict[str, float]]) -> dict[str, float]:
    """Means over seeds, and what removing did to the flattery that was planted, relative to it."""
    mean = {name: statistics.fmean(of_seed[name] for of_seed in values) for name in values[0]}
    added = {name: mean[name] - mean.get("sft", 0.0) for name in ("planted", "removed", "random")}
    return {
        **mean,
        "halves": added["removed"] / added["planted"],
        "random_change": abs(added["random"] - added["planted"]) / abs(added["planted"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="3,4,5", help="of 0 to 15")
    parser.add_argument("--ppo", action="store_true", help="also a short PPO against three of the reward models")
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results = [measured(folder, seed, ppo=arguments.ppo, quick=arguments.quick) for seed in seeds]
    found: dict[str, Any] = {
        "seeds": dict(zip(seeds, results, strict=True)),
        "reward": compared([{name: of["flattery"] for name, of in r["reward"].items()} for r in results]),
        "accuracy": {n: statistics.fmean(r["reward"][n]["accuracy"] for r in results) for n in results[0]["reward"]},
    }
    if arguments.ppo:
        found["policy"] = compared([r["policy"] for r in results])
    arguments.json.write_text(json.dumps(found, indent=1))
    print(json.dumps({name: found[name] for name in found if name != "seeds"}, indent=1))


if __name__ == "__main__":
    main()
