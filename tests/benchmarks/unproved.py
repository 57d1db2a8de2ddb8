"""What `posterior` makes of labels where the votes prove none of them wrong, against leaving such labels as they are.

python tests/benchmarks/unproved.py --json unproved.json

Linear models on the planted features of `worlds.planted_line`, of which training has no luck: so many labels, so many of them
turned at random, five voters out of fold. `posterior` weighs every label by what the votes leave likely; `if_proved` does so only
where the votes prove wrong labels (`low` above 0) and else is `bt`, as it was until November 2026. `crowd` labels are wrong on
close pairs and by a shared taste. Intervals are bootstraps over seeds of paired differences on 4,000 test pairs a seed, in points.
"""

import argparse
import json
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from worlds import fitted_line, planted_line

from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.strength import vote_strength
from rlhf.pipeline.known import beliefs
from rlhf.reward.noise import estimate_noise
from rlhf.reward.vote import collect_votes, plan_vote

TEST, MEMBERS, FOLDS, MEMBER_FLIP_RATE, DRAWS = 4000, 5, 5, 0.2, 2000
LABELS = (80, 300, 2000)
WRONG = ("0", "0.03", "0.1", "0.25", "crowd")


def measured(seed: int, labels: int, wrong_by: str) -> dict[str, float]:
    """Test accuracy of every way, the estimated share of wrong labels, and whether any is proved."""
    right, by_crowd = planted_line(seed, labels + TEST, crowd=wrong_by == "crowd")
    drawn = torch.tensor(np.random.default_rng([seed, labels]).random(labels))
    wrong = by_crowd[:labels] if wrong_by == "crowd" else drawn < float(wrong_by)
    labelled, test = torch.where(wrong[:, None], -right[:labels], right[:labels]), right[labels:]
    clusters = list(map(str, range(labels)))
    plan = plan_vote(clusters, members=MEMBERS, folds=FOLDS, in_sample=False, seed=seed)

    def vote(_: int, of: list[int], on: list[int]) -> Tensor:
        return (labelled[on] @ fitted_line(labelled[of], partial(pair_loss, flip_rate=MEMBER_FLIP_RATE))).float()

    def accuracy(confidence: Tensor) -> float:
        line = fitted_line(labelled, partial(pair_loss, confidence=confidence.double()))
        return float((test @ line > 0).double().mean())

    strength = vote_strength(collect_votes(plan, vote)).mean
    noise = estimate_noise(strength, clusters)
    sure = torch.ones(labels)
    found = {"bt": accuracy(sure), "clean": accuracy(1 - wrong.float()), "estimated": noise.fitted}
    found["posterior"] = accuracy(beliefs(strength, noise, torch.zeros(labels))) if noise.scale > 0 else found["bt"]
    found["if_proved"] = found["posterior"] if noise.low > 0 else found["bt"]
    return found | {"proved": float(noise.low > 0)}


def difference(rows: list[dict[str, float]], one: str, other: str) -> list[float]:
    """A mean paired difference in points, and the middle 95 % of its bootstrap draws over seeds."""
    values = 100 * np.array([row[one] - row[other] for row in rows])
    draws = values[np.random.default_rng(0).integers(0, len(values), (DRAWS, len(values)))].mean(axis=1)
    return [float(values.mean()), *np.percentile(draws, [2.5, 97.5]).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default=",".join(map(str, range(200, 220))), help="100 to 124 were developed on")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    found = {}
    print("| labels | wrong | `bt` | `clean` | `posterior` − `bt` | `posterior` − `if_proved` | proved on |")
    print("|---|---|---|---|---|---|---|")
    for labels in LABELS:
        for wrong_by in WRONG:
            rows = [measured(seed, labels, wrong_by) for seed in seeds]
            gain, more = difference(rows, "posterior", "bt"), difference(rows, "posterior", "if_proved")
            found[f"{labels} {wrong_by}"] = {"rows": rows, "gain": gain, "more": more}
            arguments.json.write_text(json.dumps({"seeds": seeds, "found": found}, indent=1))
            means = [np.mean([row[way] for row in rows]) for way in ("bt", "clean")]
            shown = ["{:+.1f} [{:+.1f}, {:+.1f}]".format(*each) for each in (gain, more)]
            proved = int(sum(row["proved"] for row in rows))
            print(
                f"| {labels} | {wrong_by} | {means[0]:.3f} | {means[1]:.3f} | {shown[0]} | {shown[1]} | {proved} of {len(seeds)} |",
                flush=True,
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
