"""Does the audit name the taste that labels were given, and find more wrong labels with that taste taken out? In the lab.

python tests/benchmarks/what_do_labels_want.py --json wants.json --seeds 30,31,32,33,34

1. `recovered`: 6,000 pairs by the lab's writers, labelled by one person who sees the true reward and has one taste (length,
   flattery, refusal) or none. For each taste, is its trait's effect in standard errors larger on files labelled with it than
   on files labelled without: an AUROC over files, `--files` of each kind a seed.
2. `first_100`: 2,000 pairs labelled by somebody fond of length, 10 % of the labels then turned round at random. How many of
   these are among the 100 most suspicious, by the vote (five members, five folds, out of fold) and by the vote without what
   the labels want.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worlds import reward_settings, world

from rlhf.data.rows import Pair, assistant_turn, user_turn
from rlhf.data.traits import TRAITS
from rlhf.lab.annotators import Annotator
from rlhf.lab.world import DANGEROUS, HARMLESS, REFUSAL, all_prompts, write_answer
from rlhf.models.text import plain
from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.reward.denoise import flip_pair
from rlhf.reward.wants import find_wants, fit_effects, without_wants
from rlhf.statistics import auroc, clustered_mean, paired_difference

PAIRS, SHARPNESS, CARELESSNESS = 6000, 4.0, 0.10  # as many as the lab's own
# Of the annotators of the lab: what one usual length more, one phrase, one refusal are mistaken for, in units of true reward.
LENGTH_TASTE, FLATTERY_TASTE, REFUSAL_TASTE = 0.40, 0.35, 0.35
TRAIT = {"length": "length", "flattery": "flattery", "refusal": "evasion"}
AUDITED, FLIPPED, FIRST = 2000, 0.10, 100
FOND_OF_LENGTH = Annotator("fond of length", sharpness=6.0, length_bias=0.8, flattery_bias=0.0, carelessness=0.0)
PEOPLE = {
    "none": Annotator("plain", SHARPNESS, 0.0, 0.0, CARELESSNESS),
    "length": Annotator("length", SHARPNESS, LENGTH_TASTE, 0.0, CARELESSNESS),
    "flattery": Annotator("flattery", SHARPNESS, 0.0, FLATTERY_TASTE, CARELESSNESS),
    "refusal": Annotator("refusal", SHARPNESS, 0.0, 0.0, CARELESSNESS),
}


def labelled(taste: str, rng: random.Random) -> list[Pair]:
    """Pairs of the lab's writers, labelled by a person with this taste."""
    prompts, person = all_prompts([*HARMLESS, *DANGEROUS]), PEOPLE[taste]
    pairs: list[Pair] = []
    while len(pairs) < PAIRS:
        prompt = rng.choice(prompts)
        first, second = write_answer(prompt, rng), write_answer(prompt, rng)
        if first == second:
            continue
        liked = REFUSAL_TASTE * ((REFUSAL in first) - (REFUSAL in second)) if taste == "refusal" else 0.0
        difference = person.utility(prompt, first) - person.utility(prompt, second) + liked
        careful = 1 / (1 + np.exp(-person.sharpness * difference))
        prefers_first = rng.random() < (1 - person.carelessness) * careful + person.carelessness / 2
        chosen, rejected = (first, second) if prefers_first else (second, first)
        pairs.append(
            {"prompt": user_turn(prompt), "chosen": assistant_turn(chosen), "rejected": assistant_turn(rejected)}
        )
    return pairs


def effects_in_errors(pairs: list[Pair]) -> dict[str, float]:
    """The effect of each trait in standard errors; 0 where too few pairs differ in it."""
    wants = find_wants(pairs)
    tried = [k for k, want in enumerate(wants.traits.values()) if want["effect"] is not None]
    effects, errors = fit_effects(wants.differences[:, tried], [plain(row["prompt"]) for row in pairs])
    names = list(TRAITS)
    return {**dict.fromkeys(TRAITS, 0.0), **{names[k]: effects[i] / errors[i] for i, k in enumerate(tried)}}


def recovered(seeds: list[int], files: int) -> dict[str, Any]:
    """The AUROC of each taste, and how often the page names a taste that was given, and its trait where it was not."""
    found: dict[str, list[dict[str, float]]] = {taste: [] for taste in PEOPLE}
    for seed in seeds:
        for number in range(files):
            for taste in PEOPLE:
                found[taste].append(effects_in_errors(labelled(taste, random.Random(f"{seed} {number} {taste}"))))
    result: dict[str, Any] = {}
    for taste, trait in TRAIT.items():
        with_it = [row[trait] for row in found[taste]]
        without = [row[trait] for other, rows in found.items() if other != taste for row in rows]
        scores, is_with = [*with_it, *without], [True] * len(with_it) + [False] * len(without)
        result[taste] = {
            "auroc": auroc(scores, is_with),
            "with_it": float(np.mean(with_it)),
            "without": float(np.mean([row[trait] for row in found["none"]])),
            "files": len(with_it),
        }
    return result


def first_hundred(folder: Path, seed: int) -> dict[str, Any]:
    """How many planted flips are among the most suspicious labels of one seed, kept on disk."""
    file = folder / f"first-{seed}.json"
    if file.is_file():
        done: dict[str, Any] = json.loads(file.read_text())
        return done
    base, pairs, _ = world(folder / f"world-{seed}", seed, pairs=AUDITED, demonstrations=4000, test_pairs=50)
    rng = random.Random(seed)
    rows: list[Any] = []
    for row in pairs:
        prompt, sides = plain(row["prompt"]), [row[side][0]["content"] for side in ("chosen", "rejected")]
        rows.append(row if FOND_OF_LENGTH.prefers_first(prompt, sides[0], sides[1], rng) else flip_pair(row))
    flipped = [rng.random() < FLIPPED for _ in rows]
    rows = [flip_pair(row) if turned else row for row, turned in zip(rows, flipped, strict=True)]
    shape: dict[str, Any] = {"members": 5, "folds": 5, "in_sample": False, "trunk": None, "flip_rate": FLIPPED}
    strength, *_ = vote(base, rows, reward_settings(5e-4, 2), folder / f"vote-{seed}", seed=seed, say=print, **shape)
    wants = find_wants(rows)
    values = {"by_vote": strength.mean, "without_wants": without_wants(strength.mean, wants)}
    result: dict[str, Any] = {"pairs": len(rows), "flipped": sum(flipped), "wanted": wants.wanted}
    for name, value in values.items():
        first = torch.argsort(value, stable=True)[:FIRST].tolist()
        result[name] = sum(flipped[i] for i in first)
        result[f"auroc_{name}"] = auroc((-value).tolist(), flipped)
    file.write_text(json.dumps(result))
    print(seed, result, flush=True)
    return result


def main() -> None:
    """Run what is asked for and write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="30,31,32,33,34")
    parser.add_argument("--files", type=int, default=2)
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    folder = arguments.json.with_suffix(".parts")
    folder.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"seeds": seeds, "recovered": recovered(seeds, arguments.files)}
    print(json.dumps(result["recovered"], indent=1), flush=True)
    found = [first_hundred(folder, seed) for seed in seeds]
    both = [[float(row[name]) for row in found] for name in ("without_wants", "by_vote")]
    result["first_100"] = {
        "seeds": found,
        **{name: clustered_mean(values) for name, values in zip(("without_wants", "by_vote"), both, strict=True)},
        "difference": paired_difference(*both),
    }
    arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result["first_100"], indent=1))


if __name__ == "__main__":
    main()
