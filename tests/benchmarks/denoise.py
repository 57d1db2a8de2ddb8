"""How much of the gap between noisy and clean labels each correction closes, in the lab, on the same pairs and seeds.

python tests/benchmarks/denoise.py --json choose.json --seeds 0,1,2,3,4 --choose
python tests/benchmarks/denoise.py --json denoise.json --seeds 5,6,7,8,9
python tests/benchmarks/denoise.py --json quick.json --seeds 0 --variants bt,clean,posterior --quick

6,000 pairs in true order of which a quarter is turned round at random. All recipes see the same pairs and the same vote:
five members, five folds, out of fold, two epochs, trained with the likelihood of labels of which a fifth is flipped. With
`--choose`, every variant runs a grid (learning rate x epochs) and is scored on 6,000 noisy validation pairs that no variant
trains on, never on clean ones; what won over the choosing seeds stands in GRID_CHOICE and DEFAULT, and the judged seeds run
that once, on clean test pairs. DEFAULT is the first that also costs little where no label is wrong. `ensemble` is the mean
of five models as `bt` is, `no_noise_X` is X where no label is wrong.

`gap_closed` is (variant - bt) / (clean - bt) of accuracies over all seeds; intervals are bootstraps over seeds and test
pairs of the paired differences. `no_noise_cost` is `clean` (BT where no label is wrong) less `no_noise_` and the default.
`auroc_clean` is what a model trained on 6,000 *other* pairs with clean labels makes of the same labels. Finished (seed,
variant) pairs are kept beside FILE, so a killed run goes on.
"""

import argparse
import json
import os
import statistics
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worlds import FLIP_RATE, Rows, differences, fitted, in_true_order, is_wrong, planted, reward_settings, world

from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.statistics import auroc, expected_calibration_error

TRAIN, TEST = 6000, 10_000
GRID = ((5e-4, 1), (5e-4, 2), (1.5e-3, 1), (1.5e-3, 2))
GRID_CHOICE = (5e-4, 2)  # of every variant: the best of the four points for each of them
MEMBERS, FOLDS, MEMBER_FLIP_RATE = 5, 5, 0.2
DEFAULT = "posterior"
VOTED = ("flip", "adaptive_margin", "flip_margin", "soft_margin", "likelihood", "posterior")
VARIANTS = ("bt", "clean", "smoothing", "ensemble", *VOTED)
NO_NOISE, COST = "no_noise_", 0.005
DRAWS = 1000


@cache
def splits(folder: Path, seed: int, *, quick: bool) -> tuple[Path, dict[str, Rows]]:
    """The SFT model of a seed, and its pairs: noisy to train and validate, clean to test, and others."""
    scale = 10 if quick else 1
    sizes = {"pairs": 14_000 // scale, "test_pairs": 11_500 // scale}
    if quick:
        sizes["demonstrations"] = 2000
    base, pairs, test = world(folder / f"world-{seed}{'-quick' if quick else ''}", seed, **sizes)
    train = TRAIN // scale
    rows = in_true_order(pairs)
    found = {
        "clean": rows[:train],
        "noisy": planted(rows[:train], seed),
        "other": rows[train : 2 * train],
        "validate": planted(rows[train : 2 * train], seed + 1000),
        "test": in_true_order(test)[: TEST // scale],
    }
    assert len(found["other"]) == train, "not enough pairs of different true reward"
    assert len(found["test"]) == TEST // scale
    return base, found


def training_rows(
    variant: str, base: Path, rows: dict[str, Rows], folder: Path, seed: int
) -> tuple[Rows, dict[str, Any]]:
    """The pairs as a variant sees them, the trainer's options, and what the votes knew."""
    if variant == "clean":
        return rows["clean"], {}
    without = variant.startswith(NO_NOISE)
    noisy = rows["clean"] if without else rows["noisy"]
    wrong = is_wrong(noisy)
    if variant == "smoothing":  # at the known rate
        return denoised(noisy, DenoiseConfig("smoothing", smoothing=sum(wrong) / len(wrong)))[0], {}
    if variant in ("bt", "ensemble"):
        return noisy, {}
    where = folder / f"vote-{seed}-{'clean' if without else 'noisy'}"
    shape: dict[str, Any] = {"members": MEMBERS, "folds": FOLDS, "in_sample": False, "trunk": None}
    strength, noise, _ = vote(
        base, noisy, reward_settings(5e-4, 2), where, seed=seed, say=lambda _: None, flip_rate=MEMBER_FLIP_RATE, **shape
    )
    facts = {"estimated": [noise.low, noise.fitted, noise.high], "flip_rate": noise.fitted}
    if any(wrong):
        facts["auroc_vote"] = auroc((-strength.mean).tolist(), wrong)
    objective = variant.removeprefix(NO_NOISE)
    if objective == "likelihood":
        return noisy, facts
    return denoised(noisy, DenoiseConfig(objective), strength, noise)[0], facts


def judged(
    folder: Path, seed: int, variant: str, point: tuple[float, int], *, quick: bool, on: str = "test"
) -> dict[str, Any]:
    """One variant at one point of the grid on one seed, kept on disk; on clean test pairs or noisy validation pairs."""
    name = f"{on}-{seed}-{variant}-{point[0]:g}-{point[1]}{'-quick' if quick else ''}"
    file = folder / f"{name}.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text())
        return result
    begin = time.monotonic()
    base, rows = splits(folder, seed, quick=quick)
    keys: dict[str, Any] = {"learning_rate": point[0], "epochs": point[1]}
    if variant == "auroc_clean":
        reward = fitted(base, rows["other"], seed=seed, **keys)
        facts = {"auroc": auroc((-differences(reward, rows["noisy"])).tolist(), is_wrong(rows["noisy"]))}
        file.write_text(json.dumps(facts))
        return facts
    data, facts = training_rows(variant, base, rows, folder / f"votes{'-quick' if quick else ''}", seed)
    if variant.removeprefix(NO_NOISE) == "likelihood":
        keys["flip_rate"] = facts["flip_rate"]
    members = MEMBERS if variant == "ensemble" else 1
    runs = []
    for m in range(members):
        # The ensemble's first member is `bt` itself.
        kept = folder / f"{name.replace('-ensemble-', '-bt-')}.npy"
        if variant == "ensemble" and m == 0 and kept.is_file():
            runs.append(np.load(kept))
        else:
            runs.append(differences(fitted(base, data, seed=100 * seed + m, **keys), rows[on]).numpy())
        if variant == "bt":
            np.save(kept, runs[0])
    found = np.mean(runs, axis=0)
    right = found > 0
    result = {
        "accuracy": float(right.mean()),
        "ece": expected_calibration_error((1 / (1 + np.exp(-np.abs(found)))).tolist(), right.astype(float).tolist()),
        "right": np.packbits(right).tolist(),
        "n": len(right),
        "seconds": time.monotonic() - begin,
        **facts,
    }
    file.write_text(json.dumps(result))
    print(
        f"seed {seed} {variant:16s} on {on} {point[0]:g} x {point[1]} accuracy {result['accuracy']:.4f} ece {result['ece']:.3f} "
        f"{result['seconds']:.0f} s",
        flush=True,
    )
    return result


def choose(folder: Path, seeds: list[int], variants: list[str], *, quick: bool) -> dict[str, Any]:
    """The point of the grid with the best noisy validation accuracy over the seeds, for each variant, and the default.

    The default is the best of those that cost at most COST where no label is wrong, also by noisy validation: there a
    difference of accuracies is the true one times 1 - 2 FLIP_RATE.
    """
    won, best = {}, {}
    for variant in (v for v in variants if v != "ensemble"):  # which is as `bt`
        scores = {
            point: statistics.mean(
                judged(folder, seed, variant, point, quick=quick, on="validate")["accuracy"] for seed in seeds
            )
            for point in GRID
        }
        won[variant] = max(scores, key=lambda point: scores[point])
        best[variant] = scores[won[variant]]
        print(variant, won[variant], {f"{p[0]:g} x {p[1]}": round(s, 4) for p, s in scores.items()}, flush=True)
    costs: dict[str, float] = {}
    for variant in sorted((v for v in variants if v in VOTED), key=lambda v: best[v], reverse=True):
        unharmed = [
            judged(folder, seed, NO_NOISE + variant, won[variant], quick=quick, on="validate")["accuracy"]
            for seed in seeds
        ]
        costs[variant] = (best["clean"] - statistics.mean(unharmed)) / (1 - 2 * FLIP_RATE)
        print(f"{variant} where no label is wrong: {costs[variant]:.4f} less than Bradley-Terry", flush=True)
        if costs[variant] <= COST:
            return {"points": won, "costs": costs, "default": variant}
    return {"points": won, "costs": costs, "default": None}


def paired(table: dict[tuple[int, str], Any], seeds: list[int]) -> list[dict[str, float]]:
    """Bootstrap means of every variant over seeds and test pairs, the same draws for all."""
    rng, draws = np.random.default_rng(0), []
    variants = sorted({variant for _, variant in table})
    for _ in range(DRAWS):
        means: dict[str, list[float]] = {variant: [] for variant in variants}
        for seed in rng.choice(seeds, len(seeds)):
            n = len(table[seed, "bt"])
            index = rng.integers(0, n, n)
            for variant in variants:
                means[variant].append(table[seed, variant][index].mean())
        draws.append({variant: float(np.mean(values)) for variant, values in means.items()})
    return draws


def percentiles(values: list[float]) -> list[float]:
    """The middle 95 % of bootstrap draws."""
    return np.percentile(values, [2.5, 97.5]).tolist()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="5,6,7,8,9")
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument(
        "--choose", action="store_true", help="run the whole grid and say which point each variant takes"
    )
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    variants = list(dict.fromkeys(["bt", "clean", *arguments.variants.split(",")]))
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.choose:
        arguments.json.write_text(json.dumps(choose(folder, seeds, variants, quick=arguments.quick), indent=1))
        return

    # 1. Every variant on every seed, and beside them what has no noise.
    unharmed = NO_NOISE + DEFAULT
    extra = [] if arguments.quick or DEFAULT not in variants or unharmed in variants else [unharmed]
    results: dict[tuple[int, str], dict[str, Any]] = {}
    clean = []
    for seed in seeds:
        for variant in [*variants, *extra]:
            results[seed, variant] = judged(folder, seed, variant, GRID_CHOICE, quick=arguments.quick)
        clean.append(judged(folder, seed, "auroc_clean", GRID_CHOICE, quick=arguments.quick)["auroc"])
    table = {key: np.unpackbits(np.array(r["right"], np.uint8))[: r["n"]].astype(float) for key, r in results.items()}

    # 2. Means, and intervals of paired differences.
    draws = paired(table, seeds)
    mean = {v: float(np.mean([table[seed, v].mean() for seed in seeds])) for v in [*variants, *extra]}
    gap = mean["clean"] - mean["bt"]
    votes = [r for (_, v), r in results.items() if v == DEFAULT]
    found: dict[str, Any] = {
        "default": DEFAULT,
        "accuracy": {v: [mean[v], *percentiles([d[v] for d in draws])] for v in variants},
        "gap_closed": {v: (mean[v] - mean["bt"]) / gap for v in variants},
        "gap_closed_ci": {v: percentiles([(d[v] - d["bt"]) / (d["clean"] - d["bt"]) for d in draws]) for v in variants},
        "above": {
            v: [mean[DEFAULT] - mean[v], *percentiles([d[DEFAULT] - d[v] for d in draws])]
            for v in variants
            if DEFAULT in variants and v not in (DEFAULT, "clean") and not v.startswith(NO_NOISE)
        },
        "ece": {v: statistics.mean(results[seed, v]["ece"] for seed in seeds) for v in variants},
        "auroc_vote": statistics.mean(r["auroc_vote"] for r in votes) if votes else None,
        "auroc_clean": statistics.mean(clean),
        "estimated_noise": [r["estimated"] for r in votes],
        "threads": torch.get_num_threads(),
    }
    if unharmed in mean:
        found["no_noise_cost"] = mean["clean"] - mean[unharmed]
        found["no_noise_cost_ci"] = percentiles([d["clean"] - d[unharmed] for d in draws])
    arguments.json.write_text(json.dumps(found, indent=1))

    # 3. The table.
    print("| variant | accuracy | gap closed | 95 % | ECE |\n|---|---|---|---|---|")
    for v in variants:
        low, high = found["gap_closed_ci"][v]
        print(
            f"| {v} | {mean[v]:.4f} | {found['gap_closed'][v]:.2f} | {low:.2f} to {high:.2f} | {found['ece'][v]:.3f} |"
        )
    print({key: found.get(key) for key in ("auroc_vote", "auroc_clean", "no_noise_cost", "no_noise_cost_ci", "above")})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
