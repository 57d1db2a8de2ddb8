"""How much of the gap between noisy and clean labels a second look closes, in the lab: chosen pairs against random ones.

python tests/benchmarks/second_look.py --json second_look.json --seeds 3,4,5,6,7
python tests/benchmarks/second_look.py --json crowd.json --seeds 3,4,5,6,7 --crowd
python tests/benchmarks/second_look.py --json linear.json --seeds 10,11,12,13,14,15,16,17,18,19 --linear
python tests/benchmarks/second_look.py --json quick.json --seeds 0 --quick

Every seed has 2,000 pairs of its own, of which a quarter is flipped at random; one SFT model and 4,000 clean test pairs
serve all. Reward models are members on the SFT model's frozen lowest layer (two layers and a head of their own), for voters
and for what is compared. All ways see the same vote (five members, five folds, out of fold, trained with the likelihood of
labels of which a fifth is flipped) and the same expert, who is wrong in 5 % of the pairs, always in the same ones.

`bt` trains on the noisy labels, `clean` on true ones, `posterior` on what labels and vote say; `10` and `20` relabel so many
per cent of the pairs, chosen by `rlhf.objectives.second_look`, `10_random` and `20_random` as many at random; then voters vote
again with the verdicts, noise and posteriors are estimated again, and one model is trained on these.

`gap_closed` is (way - bt) / (clean - bt) of accuracies over all seeds, `above_random` the paired difference at the same
budget; intervals are bootstraps over seeds and test pairs. `found` is the share of the wrong labels that were looked at again,
`auroc` how well the vote orders wrong labels, `auroc_again` the vote that knows the verdicts, `auroc_after` the posterior after
them, on the pairs that nobody looked at. Finished parts are kept beside FILE, so a killed run goes on.

`--crowd` takes the labels of the lab's own annotators in place of random flips: wrong on close pairs, and by tastes that they share.
`--linear` asks the same of linear models on planted features, which train in no time: every seed draws how many features there
are, how unequal, how much they can't express, and whether 10 % or 25 % of 2,000 labels are wrong; voters' features are known.
With `--crowd` their labels are wrong on close pairs and by a shared taste for one direction.
"""

import argparse
import json
import os
import random
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from transformers import set_seed
from trl import RewardConfig
from worlds import Rows, fitted_line, in_true_order, is_wrong, planted, planted_line, reward_settings, world

from rlhf.data.rows import SIDES, assistant_turn, user_turn
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.text import encode_answers, plain
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.second_look import second_look
from rlhf.objectives.strength import vote_strength
from rlhf.pipeline.known import beliefs, weigh_verdicts, what_voters_learn
from rlhf.pipeline.looked import Looked
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.frozen_trunk import Features, Trunk
from rlhf.reward.model import RewardModel
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from rlhf.reward.vote import collect_votes, plan_vote
from rlhf.statistics import auroc

SEEDS, TRAIN, TEST = 8, 2000, 4000
SIZES = {"pairs": 19_000, "test_pairs": 4800, "demonstrations": 4000}
TOP_LAYERS, MEMBERS, FOLDS, MEMBER_FLIP_RATE = 2, 5, 5, 0.2
LEARNING_RATE, EPOCHS = 5e-4, 4
EXPERT_ERROR = 0.05
BUDGETS = {"10": 0.1, "20": 0.2}
RELABELLED = tuple(f"{budget}{kind}" for budget in BUDGETS for kind in ("", "_random"))
WAYS = ("bt", "clean", "posterior", *RELABELLED)
DRAWS = 2000


class Learners(Protocol):
    """Pairs of a seed, and what learns their labels."""

    @property
    def rows(self) -> Rows: ...

    @property
    def seed(self) -> int: ...

    def trained(self, pairs: list[int], judged: list[int], seed: int, **columns: Tensor) -> Tensor: ...


@cache
def splits(folder: Path, *, quick: bool) -> tuple[Path, Rows, Rows]:
    """The SFT model, pairs as the crowd labelled them, all seeds' to train on, and pairs in true order to test on."""
    scale = 10 if quick else 1
    base, pairs, test = world(folder, 0, **{name: size // scale for name, size in SIZES.items()})
    assert len(pairs) >= SEEDS * TRAIN // scale, "not enough pairs of different true reward"
    assert len(test) >= TEST // scale
    return base, pairs, in_true_order(test)[: TEST // scale]


class Scene(NamedTuple):
    """One seed's noisy pairs [n], with the test pairs behind them at the trunk's end."""

    base: Path
    rows: Rows
    wrong: Tensor
    trunk: Trunk
    features: Features
    seed: int

    def trained(self, pairs: list[int], judged: list[int], seed: int, **columns: Tensor) -> Tensor:
        """Differences on some pairs of a member trained on others, with columns [n] of the pair loss."""
        set_seed(seed)
        member = self.trunk.member()
        settings = reward_settings(LEARNING_RATE, EPOCHS)
        args = RewardConfig(
            "unused", **settings, seed=seed, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True
        )
        member.train(
            self.features,
            pairs,
            args,
            objective=lambda chosen, rejected, batch: pair_loss(
                chosen, rejected, **{name: column[batch] for name, column in columns.items()}
            ),
            label=f"seed {self.seed}",
        )
        return member.differences(self.features, judged)


def scene(folder: Path, seed: int, *, quick: bool, crowd: bool = False) -> Scene:
    """The pairs of a seed, a quarter of them flipped, or as the crowd labelled them, run through the trunk."""
    base, pairs, test = splits(folder / "world", quick=quick)
    assert seed < SEEDS, f"no pairs are left for seed {seed}"
    size = TRAIN // (10 if quick else 1)
    mine = pairs[seed * size : (seed + 1) * size]
    rows = [
        {name: value for name, value in row.items() if name not in ("annotator", "source")}
        for row in (mine if crowd else planted(mine, seed))
    ]
    tokenizer: Any = load_tokenizer(base, conversational=True)
    set_seed(0)
    trunk = Trunk(build_reward_model(base, pad_token_id=tokenizer.pad_token_id), top_layers=TOP_LAYERS)
    prompts = [row["prompt"] for row in [*rows, *test]]
    chosen, rejected = (
        encode_answers(tokenizer, prompts, [row[side][0]["content"] for row in [*rows, *test]], max_length=512)[0]
        for side in ("chosen", "rejected")
    )
    work = folder / f"trunk-{seed}{'-crowd' if crowd else ''}"
    work.mkdir(parents=True, exist_ok=True)
    features = trunk.features(list(zip(chosen, rejected, strict=True)), work, pad_token_id=tokenizer.pad_token_id)
    return Scene(base, rows, torch.tensor(is_wrong(rows)), trunk, features, seed)


def voted(here: Learners, wrong: Tensor) -> Tensor:
    """What members that were not trained on a pair say of it, [n] nats; each label is wrong with its own probability."""
    prompts = [row["prompt"] for row in here.rows]
    plan = plan_vote(prompts, members=MEMBERS, folds=FOLDS, in_sample=False, seed=here.seed)

    def train(member: int, trained: list[int], judged: list[int]) -> Tensor:
        return here.trained(trained, judged, here.seed * 1000 + member + 1, flip_rate=wrong)

    return vote_strength(collect_votes(plan, train)).mean


def head_features(here: Scene) -> Tensor:
    """What the reward head of the SFT model reads of each pair, chosen minus rejected, [n, h]."""
    tokenizer: Any = load_tokenizer(here.base, conversational=True)
    set_seed(0)
    reward = RewardModel(build_reward_model(here.base, pad_token_id=tokenizer.pad_token_id).eval(), tokenizer)
    prompts = [row["prompt"] for row in here.rows]
    sides = [reward.features(prompts, [row[s][0]["content"] for row in here.rows]) for s in ("chosen", "rejected")]
    return sides[0] - sides[1]


class Voted(NamedTuple):
    """What is known of the pairs before anybody looks again, and what is true.

    Attributes:
        strength: [n] of the vote, nats.
        rows: [n] the pairs.
        noise: as the vote estimates it.
        wrong: [n] which labels are.
        features: gives [n, h], what the choice reads.
        again: gives [n] the strength of a vote that knows how likely each label is wrong, [n].
        seed: of experts and random choices.
    """

    strength: Tensor
    rows: Rows
    noise: NoiseEstimate
    wrong: Tensor
    features: Callable[[], Tensor]
    again: Callable[[Tensor], Tensor]
    seed: int


def looked_at(here: Voted, way: str, right: Tensor) -> list[int]:
    """Which pairs a way looks at again."""
    budget, _, kind = way.partition("_")
    count = round(BUDGETS[budget] * len(right))
    if kind == "random":
        return random.Random(here.seed).sample(range(len(right)), count)
    return second_look(here.features(), here.noise.scale * here.strength, right, count, error_rate=EXPERT_ERROR)


def believed(here: Voted, way: str) -> tuple[Tensor, dict[str, Any]]:
    """P(chosen is better) of every pair as a way trains on it, and what it found."""
    n, wrong, strength, noise = len(here.wrong), here.wrong, here.strength, here.noise
    right = beliefs(strength, noise, torch.zeros(n))
    if way not in RELABELLED:
        posterior = right if noise.scale > 0 else torch.ones(n)
        return {"bt": torch.ones(n), "clean": 1.0 - wrong.float(), "posterior": posterior}[way], {}
    # An expert's error belongs to the pair, whoever asks.
    agrees = (torch.rand(n, generator=torch.Generator().manual_seed(here.seed)) >= EXPERT_ERROR) != wrong
    seen = torch.zeros(n, dtype=torch.bool)
    seen[looked_at(here, way, right)] = True
    agree, contradict, each = (seen & agrees).float(), (seen & ~agrees).float(), torch.ones(n, dtype=torch.bool)
    looked = Looked(agree, contradict, torch.zeros(n), seen, each, [], int(seen.sum()), 0, 1)
    weighed = partial(weigh_verdicts, here.rows, strength, looked, expert_error=EXPERT_ERROR)
    once = weighed()
    learnt = torch.tensor(what_voters_learn(here.rows, looked, once.noise, once.rates, expert_error=EXPERT_ERROR))
    again = here.again(learnt)
    known = weighed(again=again)
    belief = known.after
    facts = {
        "found": float((seen & wrong).sum() / wrong.sum()),
        "fitted": [known.noise.low, known.noise.fitted, known.noise.scale],
        "auroc_again": auroc((-again[~seen]).tolist(), wrong[~seen].tolist()),
        "shared": known.shared,
        "contradicted": [int(contradict.sum()), *(known.foreseen or ())],
        "auroc_after": auroc((1 - belief[~seen]).tolist(), wrong[~seen].tolist()),
    }
    return belief, facts


def measured(folder: Path, seed: int, *, quick: bool, crowd: bool) -> dict[str, Any]:
    """All ways on one seed, each kept on disk: which test pairs it gets right, and what it found."""
    ending = f"{'-crowd' if crowd else ''}{'-quick' if quick else ''}"
    files = {way: folder / f"{seed}-{way}{ending}.json" for way in WAYS}
    if not all(file.is_file() for file in files.values()):
        here = scene(folder, seed, quick=quick, crowd=crowd)
        n = len(here.rows)
        kept = folder / f"{seed}-vote{ending}.pt"
        if not kept.is_file():
            torch.save(voted(here, torch.full((n,), MEMBER_FLIP_RATE)), kept)
        strength, clusters = torch.load(kept), [plain(row["prompt"]) for row in here.rows]
        noise = estimate_noise(strength, clusters)
        known = Voted(strength, here.rows, noise, here.wrong, partial(head_features, here), partial(voted, here), seed)
        area = auroc((-strength).tolist(), here.wrong.tolist())
        test = list(range(n, n + TEST // (10 if quick else 1)))
    for way, file in files.items():
        if file.is_file():
            continue
        begin = time.monotonic()
        belief, facts = believed(known, way)
        right = here.trained(list(range(n)), test, 100 * seed, confidence=belief) > 0
        facts |= {
            "auroc": area,
            "wrong": float(here.wrong.float().mean()),
            "n": len(test),
            "right": np.packbits(right.numpy()).tolist(),
        }
        file.write_text(json.dumps(facts))
        accuracy = float(right.double().mean())
        print(
            f"seed {seed} {way:10s} accuracy {accuracy:.4f} {facts.get('found', '')} {time.monotonic() - begin:.0f} s",
            flush=True,
        )
    return {way: json.loads(file.read_text()) for way, file in files.items()}


def measured_linear(seed: int, *, crowd: bool) -> dict[str, Any]:
    """As `measured`, of linear models on planted features."""
    right, wrong = planted_line(seed, TRAIN + TEST, crowd=crowd)
    labelled, test = torch.where(wrong[:TRAIN, None], -right[:TRAIN], right[:TRAIN]), right[TRAIN:]
    clusters = list(map(str, range(TRAIN)))
    plan = plan_vote(clusters, members=MEMBERS, folds=FOLDS, in_sample=False, seed=seed)

    def votes(flip_rate: Tensor) -> Tensor:
        def vote(_: int, of: list[int], on: list[int]) -> Tensor:
            return (labelled[on] @ fitted_line(labelled[of], partial(pair_loss, flip_rate=flip_rate[of]))).float()

        return vote_strength(collect_votes(plan, vote)).mean

    strength = votes(torch.full((TRAIN,), MEMBER_FLIP_RATE, dtype=torch.float64))
    noise = estimate_noise(strength, clusters)
    apart: Any = [{"prompt": user_turn(str(i)), **dict.fromkeys(SIDES, assistant_turn("a"))} for i in range(TRAIN)]
    known = Voted(strength, apart, noise, wrong[:TRAIN], lambda: labelled.float(), votes, seed)
    result = {}
    for way in WAYS:
        belief, facts = believed(known, way)
        is_right = test @ fitted_line(labelled, partial(pair_loss, confidence=belief.double())) > 0
        facts |= {
            "auroc": auroc((-strength).tolist(), known.wrong.tolist()),
            "wrong": float(known.wrong.double().mean()),
        }
        result[way] = facts | {"n": TEST, "right": np.packbits(is_right.numpy()).tolist()}
    return result


def _right(result: dict[str, Any], way: str) -> np.ndarray:
    """Which test pairs a way orders as the true reward does, [n] 0 or 1."""
    return np.unpackbits(np.array(result[way]["right"], np.uint8))[: result[way]["n"]].astype(float)


def paired(results: dict[int, dict[str, Any]]) -> list[dict[str, float]]:
    """Bootstrap means of every way over seeds and test pairs, the same draws for all."""
    table = {seed: np.stack([_right(result, way) for way in WAYS]) for seed, result in results.items()}
    rng, draws = np.random.default_rng(0), []
    for _ in range(DRAWS):
        means = []
        for seed in rng.choice(list(table), len(table)):
            n = table[seed].shape[1]
            means.append(table[seed][:, rng.integers(0, n, n)].mean(axis=1))
        draws.append(dict(zip(WAYS, np.mean(means, axis=0).tolist(), strict=True)))
    return draws


def with_interval(value: float, draws: list[float]) -> list[float]:
    """A figure and the middle 95 % of its bootstrap draws."""
    return [value, *np.percentile(draws, [2.5, 97.5]).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="3,4,5,6,7", help="of 0 to 7; 0, 1 and 2 were developed on")
    parser.add_argument("--crowd", action="store_true", help="the labels of the lab's annotators")
    parser.add_argument("--linear", action="store_true", help="linear models on planted features; developed on 0 to 9")
    parser.add_argument("--quick", action="store_true", help="a tenth of the pairs, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    folder = arguments.json.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)

    # 1. Every way on every seed.
    results = {
        seed: measured_linear(seed, crowd=arguments.crowd)
        if arguments.linear
        else measured(folder, seed, quick=arguments.quick, crowd=arguments.crowd)
        for seed in seeds
    }

    # 2. Means, and intervals of paired differences.
    draws = paired(results)
    mean = {way: float(np.mean([_right(result, way).mean() for result in results.values()])) for way in WAYS}

    def gap_closed(means: dict[str, float], way: str) -> float:
        return (means[way] - means["bt"]) / (means["clean"] - means["bt"])

    ways = ("posterior", *RELABELLED)
    found: dict[str, Any] = {
        "seeds": seeds,
        "accuracy": {way: with_interval(mean[way], [d[way] for d in draws]) for way in WAYS},
        "gap_closed": {way: with_interval(gap_closed(mean, way), [gap_closed(d, way) for d in draws]) for way in ways},
        "above_random": {
            b: with_interval(mean[b] - mean[f"{b}_random"], [d[b] - d[f"{b}_random"] for d in draws]) for b in BUDGETS
        },
        "found": {way: float(np.mean([r[way]["found"] for r in results.values()])) for way in RELABELLED},
        "auroc": float(np.mean([r["bt"]["auroc"] for r in results.values()])),
        "auroc_again": {way: float(np.mean([r[way]["auroc_again"] for r in results.values()])) for way in RELABELLED},
        "auroc_after": {way: float(np.mean([r[way]["auroc_after"] for r in results.values()])) for way in RELABELLED},
        "estimated_noise": {way: [r[way]["fitted"] for r in results.values()] for way in RELABELLED},
        "wrong": float(np.mean([r["10"]["wrong"] for r in results.values()])),
        "threads": torch.get_num_threads(),
    }
    arguments.json.write_text(json.dumps(found, indent=1))

    # 3. The table.
    print("| way | accuracy | gap closed | 95 % | wrong labels found |\n|---|---|---|---|---|")
    for way in ways:
        value, low, high = found["gap_closed"][way]
        share = f"{found['found'][way]:.2f}" if way in RELABELLED else ""
        print(f"| {way} | {mean[way]:.4f} | {value:.2f} | {low:.2f} to {high:.2f} | {share} |")
    print({key: found[key] for key in ("accuracy", "above_random", "auroc", "auroc_again", "auroc_after")})


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
