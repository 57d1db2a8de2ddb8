"""What a judge is worth beside few labels of people: coverage and width of `rlhf verdict`'s intervals, by simulation.

python tests/benchmarks/few_labels.py --json few_labels.json

Of every judge 500 simulations: people find the first answer better in 60 % of the rows, 100 rows drawn at random have their
label. `width` is that of the interval over that of people alone, both for one look and both for any look. `covers_20` is how
often all of 20 looks, after every fifth label, hold the rate. The judges agree with people on a share of the rows: those that
are called binary say first or second and err at random; the graded one says how sure it is, and is calibrated.
"""

import argparse
import json
from pathlib import Path

import numpy as np

from rlhf.few_labels import human_rate, powered_rate, rate_at_any_look

LABELS, RATE, SIMULATIONS, COMPARED = 100, 0.6, 500, 50
# What the log-odds that the first answer is better are spread by, and centred on: 60 % wins, 80 % agreement.
SPREAD, CENTRE = 2.22, 0.71
LOOKS = range(5, LABELS + 1, 5)


def population(judge: str, rows: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """What people and the judge say of every row."""
    kind, _, agreement = judge.partition(" ")
    if kind == "graded":
        chance = 1 / (1 + np.exp(-(SPREAD * rng.standard_normal(rows) + CENTRE)))
        return (rng.random(rows) < chance).astype(float), chance
    wins = (rng.random(rows) < RATE).astype(float)
    return wins, np.where(rng.random(rows) < float(agreement), wins, 1 - wins)


def simulated(judge: str, rows: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    covers, covers_20, fixed_20, agrees, widths, widths_any_look = [], [], [], [], [], []
    for number in range(SIMULATIONS):
        wins, says = population(judge, rows, rng)
        agrees.append(((says > 0.5) == (wins > 0.5)).mean())
        known, of_known, alone = wins[:LABELS].tolist(), says[:LABELS].tolist(), says[LABELS:].tolist()
        rate, people = powered_rate(known, of_known, alone), human_rate(known)
        covers.append(rate.low <= RATE <= rate.high)
        widths.append([rate.high - rate.low, people.high - people.low])
        looks = [powered_rate(wins[:n].tolist(), says[:n].tolist(), says[n:].tolist()) for n in LOOKS]
        fixed_20.append(all(look.low <= RATE <= look.high for look in looks))
        intervals = rate_at_any_look(known, of_known, alone)
        covers_20.append(all(intervals[n - 1][0] <= wins.mean() <= intervals[n - 1][1] for n in LOOKS))
        if number < COMPARED:
            nobody = rate_at_any_look(known, [0.5] * LABELS, [0.5] * len(alone))
            widths_any_look.append([high - low for low, high in (intervals[-1], nobody[-1])])
    both, people_alone = np.mean(widths, axis=0)
    any_look, any_look_people = np.mean(widths_any_look, axis=0)
    return {
        "agreement": float(np.mean(agrees)),
        "covers": float(np.mean(covers)),
        "width": float(both / people_alone),
        "covers_20": float(np.mean(covers_20)),
        "width_any_look": float(any_look / any_look_people),
        "one_look_looked_at_20_times": float(np.mean(fixed_20)),
        "people": float(people_alone),
        "people_any_look": float(any_look_people),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    found = {}
    print(
        "| judge | rows | agreement | covers | width | covers, 20 looks | width, any look |\n|---|---|---|---|---|---|---|"
    )
    for judge in ("binary 0.8", "graded", "binary 0.85", "binary 0.9", "binary 0.5", "binary 0.2"):
        for rows in (2100, 20_100) if judge in ("binary 0.8", "graded") else (2100,):
            row = found[f"{judge}, {rows} rows"] = simulated(judge, rows)
            print(
                f"| {judge} | {rows} | {row['agreement']:.2f} | {row['covers']:.3f} | {row['width']:.2f} | {row['covers_20']:.3f} | "
                f"{row['width_any_look']:.2f} |",
                flush=True,
            )
    arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
