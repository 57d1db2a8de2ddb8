"""What else is done with noisy labels, and how many clean ones they are worth: leaving out, EM, peer review, few clean labels.

python tests/benchmarks/denoise_trunk.py --json denoise_trunk.json --seeds 3,4,5,6,7
python tests/benchmarks/denoise_trunk.py --json linear.json --seeds 10,11,12,13,14,15,16,17,18,19 --linear
python tests/benchmarks/denoise_trunk.py --json quick.json --seeds 0 --quick

The scenes are those of `second_look.py`: 2,000 pairs a seed, a quarter of them flipped at random; voters and models are members
on the SFT model's frozen lowest layer; all ways see the same vote. `denoise.py` measures losses with whole models on 6,000 pairs.

`drop` leaves out the weakest tenth of the labels by the vote, `drop_rate` as many as are estimated to be wrong. `em` is a
second round of expectation maximisation: voters are trained again on the posterior labels, vote again, and noise and posteriors
are estimated anew. (One step of gradient for each E-step is the likelihood of flipped labels, a row of `denoise.py`.) `peer` is
co-teaching (arXiv:1804.06872, 2505.10597 without its curriculum): two models side by side, each learns in every batch from
the pairs of least loss under the other; the share kept falls over the first epoch to one minus the estimated noise.

`clean_1132` and `clean_1500` know as large a share of the true labels as 1,132 and 1,500 of 6,000, and nothing of the other
pairs; each is trained for 4, 8 and 16 epochs, and the best of the three on these seeds counts (`clean_equivalent`), so that it
is rather too good. `efficiency` is (posterior - bt) / (clean_1500 - bt), without an interval, as the divisor may be 0. Intervals
are bootstraps over seeds and test pairs of paired differences. Finished parts are kept beside FILE, in second_look.py's names,
so that either goes on with the other's.

`--linear` asks the same of linear models on the planted features of `second_look.py --linear`, but for
`peer` and for few clean labels, whose shares are those of a quarter of wrong labels.
"""

import argparse
import json
import os
import random
import time
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from denoise import paired, percentiles
from second_look import EPOCHS, FOLDS, LEARNING_RATE, MEMBER_FLIP_RATE, MEMBERS, TEST, TRAIN, Scene, scene, voted
from torch import Tensor
from transformers import get_scheduler, set_seed
from worlds import Rows, fitted_line, planted_line, reward_settings

from rlhf.data.rows import user_turn
from rlhf.models.packing import order_by_length
from rlhf.models.text import plain
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.strength import lowest_fraction, vote_strength
from rlhf.pipeline.known import beliefs
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.noise import estimate_noise
from rlhf.reward.vote import collect_votes, plan_vote
from rlhf.statistics import auroc

KNOWN = {1132: 1132 / 6000, 1500: 1500 / 6000}
EPOCHS_ON_CLEAN = (4, 8, 16)
CLEAN = {f"clean_{count}_{epochs}": (share, epochs) for count, share in KNOWN.items() for epochs in EPOCHS_ON_CLEAN}
WAYS = ("bt", "clean", "posterior", "drop", "drop_rate", "peer", *CLEAN, "em")


class Lines(NamedTuple):
    """What a way needs of a scene, where models are linear on planted features: 2,000 pairs, and test pairs behind them."""

    rows: Rows
    wrong: Tensor
    labelled: Tensor
    seed: int

    def trained(self, pairs: list[int], judged: list[int], seed: int, **columns: Tensor) -> Tensor:
        """As `Scene.trained`; training has no chance in it."""
        mine = {name: column[pairs].double() for name, column in columns.items()}
        line = fitted_line(self.labelled[pairs], partial(pair_loss, **mine))
        return (self.labelled[judged] @ line).float()


def lines(seed: int) -> Lines:
    """A seed's planted world."""
    right, wrong = planted_line(seed, TRAIN + TEST)
    wrong[TRAIN:] = False
    rows = [{"prompt": user_turn(str(i))} for i in range(TRAIN)]
    return Lines(rows, wrong[:TRAIN], torch.where(wrong[:, None], -right, right), seed)


def posterior_of_votes(here: Scene | Lines, strength: Tensor) -> tuple[Tensor, float]:
    """P(label is right) of every pair, [n], and the estimated share of wrong labels; 1 and 0 where votes say nothing."""
    noise = estimate_noise(strength, [plain(row["prompt"]) for row in here.rows])
    none = torch.zeros(len(here.rows))
    return (beliefs(strength, noise, none) if noise.scale > 0 else none + 1), noise.fitted


def voted_again(here: Scene | Lines, right: Tensor) -> Tensor:
    """The mean vote, [n] nats, of members that are trained on posterior labels of the other folds."""
    prompts = [row["prompt"] for row in here.rows]
    plan = plan_vote(prompts, members=MEMBERS, folds=FOLDS, in_sample=False, seed=here.seed)

    def train(member: int, trained: list[int], judged: list[int]) -> Tensor:
        return here.trained(trained, judged, here.seed * 1000 + 500 + member, confidence=right)

    return vote_strength(collect_votes(plan, train)).mean


def peers(here: Scene, flip_rate: float, judged: list[int]) -> Tensor:
    """Differences, on some pairs, of one of two members that choose each other's pairs."""
    n, size = len(here.rows), reward_settings(LEARNING_RATE, EPOCHS)["per_device_train_batch_size"]
    members = []
    for m in range(2):
        set_seed(100 * here.seed + m)
        members.append(here.trunk.member())
    an_epoch = -(-n // size)
    steps = EPOCHS * an_epoch
    optimizers = [torch.optim.AdamW(member.model.parameters(), lr=LEARNING_RATE) for member in members]
    schedules = [get_scheduler("cosine", optimizer, round(0.05 * steps), steps) for optimizer in optimizers]
    for step in range(steps):
        epoch, place = divmod(step, an_epoch)
        if place == 0:
            order = order_by_length(here.features.lengths[:n], size, seed=here.seed, epoch=epoch)
        batch = here.features.batch(order[place * size : (place + 1) * size])
        scores = [member.scores(batch) for member in members]
        losses = [pair_loss(s[0::2], s[1::2]) for s in scores]
        kept = round((1 - flip_rate * min(1, step / an_epoch)) * len(losses[0]))
        easiest = [loss.detach().argsort()[:kept] for loss in losses]
        for member, optimizer, schedule, loss, chosen in zip(
            members, optimizers, schedules, losses, reversed(easiest), strict=True
        ):
            loss[chosen].mean().backward()
            torch.nn.utils.clip_grad_norm_(member.model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    return members[0].differences(here.features, judged)


def with_few_clean(here: Scene | Lines, share: float, epochs: int, judged: list[int]) -> Tensor:
    """Differences, on some pairs, of a model that knows a share of the true labels and nothing else."""
    n = len(here.rows)
    known = random.Random(here.seed).sample(range(n), round(share * n))
    return here.trained(known * (epochs // EPOCHS), judged, 100 * here.seed, confidence=1.0 - here.wrong.float())


def trained_by(here: Scene | Lines, way: str, strength: Tensor, judged: list[int]) -> tuple[Tensor, dict[str, Any]]:
    """Differences on some pairs of a model that is trained in one of the ways, and what it found."""
    n = len(here.rows)
    everything, labels = list(range(n)), torch.ones(n)
    right, flip_rate = posterior_of_votes(here, strength)
    facts: dict[str, Any] = {"auroc": auroc((-strength).tolist(), here.wrong.tolist()), "estimated": flip_rate}
    if way in CLEAN:
        return with_few_clean(here, *CLEAN[way], judged), facts
    if way == "peer":
        assert isinstance(here, Scene), "lines have no batches"
        return peers(here, flip_rate, judged), facts
    if way.startswith("drop"):
        dropped = lowest_fraction(strength, 0.1 if way == "drop" else flip_rate)
        facts["wrong_among_dropped"] = float(here.wrong[dropped].float().mean())
        everything = [i for i in everything if not dropped[i]]
    if way == "em":
        again = voted_again(here, right)
        labels, facts["estimated"] = posterior_of_votes(here, again)
        facts["auroc"] = auroc((-again).tolist(), here.wrong.tolist())
        facts["auroc_posterior"] = auroc((1 - labels).tolist(), here.wrong.tolist())
    if way in ("clean", "posterior"):
        labels = right if way == "posterior" else 1.0 - here.wrong.float()
    return here.trained(everything, judged, 100 * here.seed, confidence=labels), facts


def measured(folder: Path, seed: int, ways: list[str], *, quick: bool, linear: bool) -> dict[str, Any]:
    """All ways on one seed, each kept on disk: which test pairs it gets right, and what it found."""
    ending = "-linear" if linear else "-quick" if quick else ""
    files = {way: folder / f"{seed}-{way}{ending}.json" for way in ways}
    if not all(file.is_file() for file in files.values()):
        here = lines(seed) if linear else scene(folder, seed, quick=quick)
        kept = folder / f"{seed}-vote{ending}.pt"
        if not kept.is_file():
            torch.save(voted(here, torch.full((len(here.rows),), MEMBER_FLIP_RATE)), kept)
        strength = torch.load(kept)
        n = len(here.rows)
        test = list(range(n, n + TEST // (10 if quick else 1)))
    for way, file in files.items():
        if file.is_file():
            continue
        begin = time.monotonic()
        scores, facts = trained_by(here, way, strength, test)
        facts |= {"n": len(test), "right": np.packbits((scores > 0).numpy()).tolist()}
        file.write_text(json.dumps(facts))
        accuracy = float((scores > 0).double().mean())
        print(f"seed {seed} {way:10s} accuracy {accuracy:.4f} {time.monotonic() - begin:.0f} s", flush=True)
    return {way: json.loads(file.read_text()) for way, file in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="3,4,5,6,7", help="of 0 to 7; 0, 1 and 2 were developed on")
    parser.add_argument("--ways", default=",".join(WAYS))
    parser.add_argument("--linear", action="store_true", help="linear models on planted features; developed on 0 to 9")
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    ways = list(dict.fromkeys(["bt", "clean", "posterior", *arguments.ways.split(",")]))
    if arguments.linear:
        ways = [way for way in ways if not way.startswith(("peer", "clean_"))]
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Every way on every seed.
    results = {
        (s, way): r
        for s in seeds
        for way, r in measured(folder, s, ways, quick=arguments.quick, linear=arguments.linear).items()
    }
    table = {key: np.unpackbits(np.array(r["right"], np.uint8))[: r["n"]].astype(float) for key, r in results.items()}

    # 2. Means, and intervals of paired differences.
    draws = paired(table, seeds)
    mean = {way: float(np.mean([table[seed, way].mean() for seed in seeds])) for way in ways}

    def share(means: dict[str, float], way: str, whole: str) -> float:
        return (means[way] - means["bt"]) / (means[whole] - means["bt"])

    found: dict[str, Any] = {
        "seeds": seeds,
        "accuracy": {way: [mean[way], *percentiles([d[way] for d in draws])] for way in ways},
        "gap_closed": {
            way: [share(mean, way, "clean"), *percentiles([share(d, way, "clean") for d in draws])] for way in ways
        },
        "above": {
            way: [mean["posterior"] - mean[way], *percentiles([d["posterior"] - d[way] for d in draws])]
            for way in ways
            if way not in ("posterior", "clean")
        },
        "clean_equivalent": {
            str(count): max((w for w in ways if w.startswith(f"clean_{count}_")), key=lambda w: mean[w], default=None)
            for count in KNOWN
        },
        "facts": {
            way: {name: value for name, value in results[seeds[0], way].items() if name not in ("right", "n")}
            for way in ways
        },
        "threads": torch.get_num_threads(),
    }
    best = found["clean_equivalent"]["1500"]
    found["efficiency"] = None if best is None else share(mean, "posterior", best)
    arguments.json.write_text(json.dumps(found, indent=1))

    # 3. The table.
    print("| way | accuracy | gap closed | 95 % | posterior is better by |\n|---|---|---|---|---|")
    for way in ways:
        value, low, high = found["gap_closed"][way]
        better = "{:.4f} [{:.4f}, {:.4f}]".format(*found["above"][way]) if way in found["above"] else ""
        print(f"| {way} | {mean[way]:.4f} | {value:.2f} | {low:.2f} to {high:.2f} | {better} |")
    print("efficiency", found["efficiency"], found["clean_equivalent"])


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
