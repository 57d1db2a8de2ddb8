"""Who labels badly, and what it is worth to know: ten annotators in the lab, three coins and one who likes length among them.

python tests/benchmarks/annotators.py --json annotators.json --seeds 1,2,3
python tests/benchmarks/annotators.py --json quick.json --seeds 0 --quick

Every seed has 2,000 pairs of its own; one SFT model serves all. Ten annotators give 200 labels each: six careful ones, three
coins, and one who takes the longer answer nine times in ten. Once there is one label a pair, and once a fifth of the labels
are second opinions on a pair that somebody else has labelled (`overlap`). All recipes see the same labels and the same vote:
five members, five folds, out of fold, two epochs, trained with the likelihood of labels of which a fifth is flipped.

`found`: who is flagged by `rlhf.reward.annotators` from 60 labels of each, and who is flagged in error: `alone`, where the
vote has these 600 labels and no more; `of_many`, where it has all 2,000. `gain` is the accuracy on clean test pairs of a
model trained on `posterior` labels with each annotator's own error rate, less that with one rate for all; intervals are
bootstraps over seeds and test pairs of the paired differences. Finished parts are kept beside FILE, so a killed run goes on.
"""

import argparse
import json
import os
import random
import time
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from worlds import Rows, differences, fitted, in_true_order, is_wrong, reward_settings, world

from rlhf.data.rows import told
from rlhf.lab.annotators import Annotator
from rlhf.models.text import plain
from rlhf.objectives.strength import VoteStrength
from rlhf.pipeline.training import quiet_libraries
from rlhf.pipeline.vote import vote
from rlhf.reward.annotators import posterior_by_annotator, report_rows
from rlhf.reward.denoise import DenoiseConfig, denoised, flip_pair
from rlhf.reward.noise import NoiseEstimate
from rlhf.statistics import auroc

CAREFUL = {"sharpness": 6.0, "length_bias": 0.10, "flattery_bias": 0.10, "carelessness": 0.05}
COIN = {"sharpness": 0.0, "length_bias": 0.0, "flattery_bias": 0.0, "carelessness": 1.0}
LENGTH = {"sharpness": 4.0, "length_bias": 6.0, "flattery_bias": 0.10, "carelessness": 0.10}
PEOPLE = (
    *(Annotator(f"careful-{i}", **CAREFUL) for i in range(6)),
    *(Annotator(f"coin-{i}", **COIN) for i in range(3)),
    Annotator("length", **LENGTH),
)
WANTED = {f"coin-{i}": "coin" for i in range(3)} | {"length": "more length"}
EACH, FEW, OVERLAP, TEST = 200, 60, 0.2, 5000
SIZES: dict[str, int | str] = {"pairs": 21_000, "test_pairs": 11_500, "demonstrations": 4000}
POINT: dict[str, Any] = {"learning_rate": 5e-4, "epochs": 2}
MEMBERS, FOLDS, MEMBER_FLIP_RATE = 5, 5, 0.2
VARIANTS = ("posterior", "posterior_by_annotator")
KINDS = ("single", "overlap")
DRAWS = 2000


@cache
def splits(folder: Path, seed: int, *, quick: bool) -> tuple[Path, Rows, Rows]:
    """The SFT model, which all seeds share, and pairs in true order: a seed's own to label, and to test on."""
    sizes: dict[str, int | str] = {"pairs": 7000, "test_pairs": 1200, "demonstrations": 2000} if quick else SIZES
    base, pairs, test = world(folder / f"world{'-quick' if quick else ''}", 0, **sizes)
    rows, each = in_true_order(pairs), EACH * len(PEOPLE)
    assert len(rows) >= (seed + 1) * each, f"no pairs are left for seed {seed}"
    return base, rows[seed * each : (seed + 1) * each], in_true_order(test)[: TEST // (10 if quick else 1)]


def labelled(rows: Rows, seed: int, *, overlap: bool) -> Rows:
    """One row a label. Every ten labels are by the ten annotators in an order drawn anew; with overlap, every fifth label is a
    second opinion on the pair of the label before, which is somebody else's.
    """
    rng = random.Random(seed)
    labels: Rows = []
    pairs = iter(rows)
    row = next(pairs)
    for turn in range(EACH):
        for place, person in enumerate(rng.sample(PEOPLE, len(PEOPLE))):
            is_second_opinion = overlap and place % round(1 / OVERLAP) == round(1 / OVERLAP) - 1
            if (turn, place) != (0, 0) and not is_second_opinion:
                row = next(pairs)
            is_right = person.prefers_first(plain(row["prompt"]), told(row, "chosen"), told(row, "rejected"), rng)
            labels.append({**(row if is_right else flip_pair(row)), "annotator": person.name})
    return labels


def voted(base: Path, labels: Rows, folder: Path, seed: int) -> tuple[VoteStrength, NoiseEstimate]:
    """The vote on some labels; members that were trained before are not trained again."""
    shape: dict[str, Any] = {"members": MEMBERS, "folds": FOLDS, "in_sample": False, "trunk": None}
    settings = reward_settings(5e-4, 2)
    found = vote(base, labels, settings, folder, seed=seed, say=lambda _: None, flip_rate=MEMBER_FLIP_RATE, **shape)
    return found.strength, found.noise


def flagged(labels: Rows, strength: torch.Tensor, noise: NoiseEstimate) -> dict[str, Any]:
    """Who is flagged, who of the four is missed, and what is said of the other six."""
    report = report_rows(labels, strength, noise)
    flags = {name: entry["flags"] for name, entry in report.items()}
    return {
        "flags": {name: kinds for name, kinds in flags.items() if kinds},
        "missed": [name for name, wanted in WANTED.items() if wanted not in flags[name]],
        "false_alarms": [name for name, kinds in flags.items() if name not in WANTED and kinds],
        "accuracy": {name: [entry["accuracy"], *(entry["accuracy_ci"] or [])] for name, entry in report.items()},
    }


def without_names(labels: Rows) -> Rows:
    """The same labels, each by a stranger: second opinions still count, but all have one error rate."""
    return [{**label, "annotator": f"stranger {number}"} for number, label in enumerate(labels)]


def measured(folder: Path, seed: int, kind: str, *, models: bool, quick: bool) -> dict[str, Any]:
    """One seed of one kind, kept on disk."""
    file = folder / f"{kind}-{seed}{'-models' if models else ''}{'-quick' if quick else ''}.json"
    if file.is_file():
        result: dict[str, Any] = json.loads(file.read_text())
        return result
    begin = time.monotonic()
    base, rows, test = splits(folder, seed, quick=quick)
    labels = labelled(rows, seed, overlap=kind == "overlap")
    few, work = labels[: FEW * len(PEOPLE)], folder / f"votes-{seed}-{kind}{'-quick' if quick else ''}"
    truth = is_wrong(labels)
    result = {
        "wrong": {
            p.name: np.mean([w for w, r in zip(truth, labels, strict=True) if r["annotator"] == p.name]) for p in PEOPLE
        }
    }

    # 1. Found by 60 labels each: with a vote on these labels alone, and with the vote on all.
    strength, noise = voted(base, few, work / "few", seed)
    result["alone"] = flagged(few, strength.mean, noise)
    if models:
        strength, noise = voted(base, labels, work / "all", seed)
        result["of_many"] = flagged(few, strength.mean[: len(few)], noise)
        result["all_labels"] = flagged(labels, strength.mean, noise)

        # 2. Posterior labels with one error rate for all, and with each annotator's own; what they say of wrong labels.
        for variant, data in (("posterior", without_names(labels)), ("posterior_by_annotator", labels)):
            posterior = posterior_by_annotator(data, strength.mean, noise)
            # One rate for all orders labels as the votes do.
            right = torch.sigmoid(noise.scale * strength.mean) if posterior is None else posterior.right
            pairs = denoised(data, DenoiseConfig("posterior"), strength, noise).rows
            scores = differences(fitted(base, pairs, seed=100 * seed, **POINT), test)
            result[variant] = {
                "pairs": len(pairs),
                "auroc_of_wrong_labels": auroc((1 - right).tolist(), truth),
                "accuracy": float((scores > 0).float().mean()),
                "right": np.packbits(scores.numpy() > 0).tolist(),
            }
        result["n"] = len(test)
    result["noise"] = [noise.low, noise.fitted, noise.high]
    result["seconds"] = time.monotonic() - begin
    file.write_text(json.dumps(result))
    shown = {name: result[name][key] for name, key in zip(VARIANTS, ["accuracy"] * 2, strict=True) if name in result}
    print(f"seed {seed} {kind}: alone {result['alone']['flags']} {shown} {result['seconds']:.0f} s", flush=True)
    return result


def gain(results: list[dict[str, Any]]) -> list[float]:
    """The mean difference in accuracy over seeds, and its bootstrap interval over seeds and test pairs."""
    right = [
        [np.unpackbits(np.array(r[v]["right"], np.uint8))[: r["n"]].astype(float) for v in VARIANTS] for r in results
    ]
    gaps = [by_annotator - pooled for pooled, by_annotator in right]
    rng, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        chosen = rng.integers(0, len(gaps), len(gaps))
        draws.append(np.mean([gaps[i][rng.integers(0, len(gaps[i]), len(gaps[i]))].mean() for i in chosen]))
    return [float(np.mean([gap.mean() for gap in gaps])), *np.percentile(draws, [2.5, 97.5]).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--found-only", action="store_true", help="only who is found by 60 labels each, alone")
    parser.add_argument(
        "--quick", action="store_true", help="a small SFT model, a tenth of the test pairs, the first seed"
    )
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    kinds = arguments.kinds.split(",")
    results: dict[str, list[dict[str, Any]]] = {
        kind: [measured(folder, seed, kind, models=not arguments.found_only, quick=arguments.quick) for seed in seeds]
        for kind in kinds
    }
    found: dict[str, Any] = {"seeds": seeds, "threads": torch.get_num_threads()}
    for kind, of_kind in results.items():
        found[kind] = {
            way: {
                "found": sum(len(WANTED) - len(r[way]["missed"]) for r in of_kind),
                "of": len(WANTED) * len(seeds),
                "false_alarms": sum(len(r[way]["false_alarms"]) for r in of_kind),
                "among": (len(PEOPLE) - len(WANTED)) * len(seeds),
            }
            for way in ("alone", "of_many", "all_labels")
            if way in of_kind[0]
        }
        if not arguments.found_only:
            found[kind] |= {
                "accuracy": {v: float(np.mean([r[v]["accuracy"] for r in of_kind])) for v in VARIANTS},
                "auroc_of_wrong_labels": {
                    v: float(np.mean([r[v]["auroc_of_wrong_labels"] for r in of_kind])) for v in VARIANTS
                },
                "gain": gain(of_kind),
            }
        found[kind]["wrong"] = {p.name: float(np.mean([r["wrong"][p.name] for r in of_kind])) for p in PEOPLE}
    arguments.json.write_text(json.dumps(found, indent=1))
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
