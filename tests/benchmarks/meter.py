"""Does the meter of an audit foretell the accuracy that more labels and second looks bring? Predicted against measured, in the lab.

python tests/benchmarks/meter.py --json meter.json --seeds 3,4,5,6,7
python tests/benchmarks/meter.py --json quick.json --seeds 0 --quick
python tests/benchmarks/meter.py --json linear.json --seeds 10,11,12,13,14,15,16,17,18,19 --linear

The world, its pairs, flips and members are those of second_look.py, with two epochs. Of a seed's 2,000 pairs, of which a quarter
is flipped, 1,000 are the labels that there are. The meter sees these alone: five voters out of fold, and 15 more on an eighth,
a quarter and half of what these were trained on. It predicts the accuracy of one member trained on all 1,000 (`0`), on 500 and
1,000 more (`500`, `1000`), and on the 1,000 of which experts, wrong in 5 %, looked at the 100 in most doubt again (`look`).
Then such members are trained, one each, and measured on 4,000 clean test pairs.

`error` is predicted minus measured, in points of accuracy; `mean_error` the mean of its size; `coverage` the share of measured
accuracies inside the predicted 95 % intervals; `width` that of these. `error_of_gain` is of the gain over `0`. Finished parts
are kept beside FILE, so a killed run goes on.

`--linear` asks the same of linear models on planted features, which train in no time: every seed draws how many features there
are, how unequal, how much of the true difference they can't express, and whether 10 % or 25 % of 2,000 labels are wrong.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from second_look import EXPERT_ERROR, FOLDS, LEARNING_RATE, MEMBER_FLIP_RATE, MEMBERS, TEST, TRAIN, Scene, scene
from torch import Tensor
from transformers import set_seed
from trl import RewardConfig
from worlds import fitted_line, planted_line, reward_settings

from rlhf.models.text import plain
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.second_look import expected_change, log_odds_of_verdicts, posterior_of_observations
from rlhf.objectives.strength import vote_strength
from rlhf.pipeline.known import beliefs
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.meter import Measured, fit_meter, measure_parts, read_meter
from rlhf.reward.noise import estimate_noise
from rlhf.reward.vote import collect_votes, plan_vote

LABELS, EPOCHS = 1000, 2
MORE = (500, 1000)
LOOKED_AT = 100
WAYS = ("0", *map(str, MORE), "look")


def trained(here: Scene, pairs: list[int], judged: list[int], seed: int, sure: Tensor | None = None) -> Tensor:
    """Differences on some pairs of a member trained on others.

    Args:
        sure: P(label is right) of pairs that an expert looked at, not a number of the others; these have the flip likelihood.
    """
    set_seed(seed)
    member = here.trunk.member()
    settings = reward_settings(LEARNING_RATE, EPOCHS)
    args = RewardConfig("unused", **settings, seed=seed, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True)

    def objective(chosen: Tensor, rejected: Tensor, batch: list[int]) -> Tensor:
        loss = pair_loss(chosen, rejected, flip_rate=MEMBER_FLIP_RATE)
        if sure is None:
            return loss
        looked, right = ~sure[batch].isnan(), sure[batch].nan_to_num(0.5)
        return torch.where(looked, pair_loss(chosen, rejected, confidence=right), loss)

    member.train(here.features, pairs, args, objective=objective, label=f"seed {here.seed}")
    return member.differences(here.features, judged)


def kept(file: Path, make: Callable[[], Tensor]) -> Tensor:
    """A tensor from disk, or made now and kept there."""
    if not file.is_file():
        begin = time.monotonic()
        torch.save(make(), file)
        print(f"{file.stem}: {time.monotonic() - begin:.0f} s", flush=True)
    made: Tensor = torch.load(file)
    return made


def predictions(
    parts: Measured, clusters: list[Any], strength: Tensor, *, wrong: Tensor, seed: int, scale: float
) -> tuple[dict[str, list[float]], Tensor, float]:
    """What the meter predicts by way; P(label is right) of the pairs that the experts of `look` see; the estimated noise."""
    noise = estimate_noise(strength, clusters)
    right = beliefs(strength, noise, torch.zeros_like(strength))
    count = round(LOOKED_AT / scale)
    more = [n / LABELS for n in MORE]
    curves = fit_meter(parts, strength, clusters)
    meter = read_meter(curves, strength, clusters, verdicts=count, expert_error=EXPERT_ERROR, more=more)
    predicted = {"0": meter["accuracy"], "look": meter["second_look"]["accuracy"]}
    predicted |= {str(n): entry["accuracy"] for n, entry in zip(MORE, meter["more"], strict=True)}
    agrees = (torch.rand(len(wrong), generator=torch.Generator().manual_seed(seed)) >= EXPERT_ERROR) != wrong
    odds = log_odds_of_verdicts(agrees.int(), (~agrees).int(), error_rate=EXPERT_ERROR)
    after = posterior_of_observations(torch.zeros(len(wrong)), odds, flip_rate=max(noise.fitted, 0.01))
    looked = expected_change(right, error_rate=EXPERT_ERROR).topk(count).indices
    sure = torch.full((len(wrong),), torch.nan)
    sure[looked] = after[looked]
    return predicted, sure, meter["wrong"][0]


def loss_of(sure: Tensor | None = None) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss of a member; `sure` as `trained` takes it."""

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        flipped = pair_loss(chosen, rejected, flip_rate=MEMBER_FLIP_RATE)
        if sure is None:
            return flipped
        return torch.where(sure.isnan(), flipped, pair_loss(chosen, rejected, confidence=sure.nan_to_num(0.5)))

    return loss


def measured_linear(seed: int) -> dict[str, Any]:
    """As `measured`, of linear models on planted features."""
    n = 2 * LABELS
    right, wrong = planted_line(seed, 2 * n + TEST)
    labelled = torch.where(wrong[:, None], -right, right)

    clusters = list(map(str, range(n)))
    plan = plan_vote(clusters, members=MEMBERS, folds=FOLDS, in_sample=False, seed=seed)

    def vote(_: int, of: list[int], on: list[int]) -> Tensor:
        return (labelled[on] @ fitted_line(labelled[of], loss_of())).float()

    votes = collect_votes(plan, vote)
    parts, strength = measure_parts(plan, clusters, votes, vote), vote_strength(votes).mean
    predicted, sure, estimated = predictions(parts, clusters, strength, wrong=wrong[:n], seed=seed, scale=LABELS / n)
    ways = {way: fitted_line(labelled[: n + 2 * int(way)], loss_of()) for way in WAYS if way != "look"}
    ways["look"] = fitted_line(labelled[:n], loss_of(sure))
    came = {way: float((right[-TEST:] @ line > 0).double().mean()) for way, line in ways.items()}
    return {"predicted": predicted, "measured": came, "wrong": estimated}


def measured(folder: Path, seed: int, *, quick: bool) -> dict[str, Any]:
    """What the meter predicts of one seed, and what came: by way `predicted` [mean, low, high] and `measured`."""
    file = folder / f"{seed}{'-quick' if quick else ''}.json"
    if file.is_file():
        finished: dict[str, Any] = json.loads(file.read_text())
        return finished
    scale = 10 if quick else 1
    here = scene(folder, seed, quick=quick)
    order = random.Random(seed).sample(range(TRAIN // scale), TRAIN // scale)
    have, test = order[: LABELS // scale], list(range(len(here.rows), len(here.rows) + TEST // scale))

    # 1. The vote on the labels that there are, and the voters on parts of them.
    prompts = [here.rows[i]["prompt"] for i in have]
    clusters = [plain(prompt) for prompt in prompts]
    plan = plan_vote(prompts, members=MEMBERS, folds=FOLDS, in_sample=False, seed=seed)

    def vote(member: int, of: list[int], on: list[int]) -> Tensor:
        place = folder / f"{seed}-{'quick-' if quick else ''}voter-{member}.pt"
        return kept(place, lambda: trained(here, [have[i] for i in of], [have[i] for i in on], 1000 * seed + member))

    votes = collect_votes(plan, vote)
    parts = measure_parts(plan, prompts, votes, vote)
    strength = vote_strength(votes).mean

    # 2. What the meter predicts, and what came.
    predicted, sure_of_have, estimated = predictions(
        parts, clusters, strength, wrong=here.wrong[have], seed=seed, scale=scale
    )
    sure = torch.full((len(here.rows),), torch.nan)
    sure[have] = sure_of_have
    came = {}
    for way in WAYS:
        extra = 0 if way == "look" else int(way) // scale
        place = folder / f"{seed}-{'quick-' if quick else ''}way-{way}.pt"
        pairs, belief = order[: len(have) + extra], sure if way == "look" else None
        differences = kept(place, partial(trained, here, pairs, test, 100 * seed + 7, belief))
        came[way] = float((differences > 0).double().mean())
    result = {"predicted": predicted, "measured": came, "wrong": estimated}
    file.write_text(json.dumps(result))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="3,4,5,6,7", help="of 0 to 7; 0, 1 and 2 were developed on")
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, the first seed")
    parser.add_argument("--linear", action="store_true", help="linear models on planted features; developed on 0 and 1")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results = {
        seed: measured_linear(seed) if arguments.linear else measured(folder, seed, quick=arguments.quick)
        for seed in seeds
    }

    error = {way: [100 * (r["predicted"][way][0] - r["measured"][way]) for r in results.values()] for way in WAYS}
    gain = {way: [value - now for value, now in zip(error[way], error["0"], strict=True)] for way in WAYS if way != "0"}
    inside = {
        way: [r["predicted"][way][1] <= r["measured"][way] <= r["predicted"][way][2] for r in results.values()]
        for way in WAYS
    }
    found: dict[str, Any] = {
        "seeds": seeds,
        "labels": 2 * LABELS if arguments.linear else LABELS,
        "predicted": {way: [r["predicted"][way] for r in results.values()] for way in WAYS},
        "measured": {way: [r["measured"][way] for r in results.values()] for way in WAYS},
        "error": error,
        "mean_error": {way: float(np.mean(np.abs(error[way]))) for way in WAYS},
        "error_of_gain": {way: float(np.mean(np.abs(values))) for way, values in gain.items()},
        "coverage": float(np.mean([is_in for values in inside.values() for is_in in values])),
        "width": {
            way: float(np.mean([100 * (r["predicted"][way][2] - r["predicted"][way][1]) for r in results.values()]))
            for way in WAYS
        },
        "estimated_noise": [r["wrong"] for r in results.values()],
        "threads": torch.get_num_threads(),
    }
    arguments.json.write_text(json.dumps(found, indent=1))
    print("| after | measured | predicted | mean error, points | of the gain |\n|---|---|---|---|---|")
    for way in WAYS:
        came, said = np.mean(found["measured"][way]), np.mean(np.array(found["predicted"][way])[:, 0])
        of_gain = f"{found['error_of_gain'][way]:.1f}" if way != "0" else ""
        print(f"| {way} | {came:.3f} | {said:.3f} | {found['mean_error'][way]:.1f} | {of_gain} |")
    print({key: found[key] for key in ("error", "coverage", "width", "estimated_noise")})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
