"""Does a pretrained backbone change which objective helps with noisy labels? SmolLM2, in the world of instructions.

python tests/benchmarks/smollm2_noise.py --json smollm2_noise.json RUN RUN RUN --labels planted,crowd

Each RUN is a finished run of recipes/lab/instructions.yaml, all of other seeds. Training pairs are 400 of its own, drawn at
random: in true order but for a quarter turned round (`planted`), and as the world's crowd labels them (`crowd`; drawn anew,
so that a run of an older crowd serves too). Judged are
the 16 answers of SFT that its evaluation sampled to each held-out prompt, eight disjoint pairs a prompt, in true order.

Every model is two layers of its own above SmolLM2's frozen other 28, with a new head; all see the same pairs in 50 batches of
8 with the recipe's learning rate, nothing tuned. `drop` and `flip_margin` take the weakest tenth, smoothing the true rate. The
vote: five members, five folds, out of fold. `ensemble` is the mean of five models as `bt` is.

Intervals are bootstraps over runs and prompts of the paired differences. Finished parts are kept beside FILE.
"""

import argparse
import json
import random
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from transformers import set_seed
from trl import RewardConfig
from worlds import FLIP_RATE

from rlhf.data.rows import SIDES, Pair, answer, assistant_turn
from rlhf.files import read_jsonl
from rlhf.lab.annotators import label_pair
from rlhf.lab.instructions import gold
from rlhf.lab.worlds import INSTRUCTIONS
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import encode_answers, plain
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.strength import vote_strength
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.denoise import DenoiseConfig, denoised, flip_pair
from rlhf.reward.frozen_trunk import Features, Trunk
from rlhf.reward.noise import estimate_noise
from rlhf.reward.sides import side_texts
from rlhf.reward.vote import collect_votes, plan_vote

RECIPE = Path(__file__).parents[2] / "recipes" / "lab" / "instructions.yaml"
TRUNK, MEMBERS, MEMBER_FLIP_RATE, DRAWS = 2, 5, 0.2, 2000
PAIRS, BATCH = 400, 8
VARIANTS = ("bt", "smoothing", "flip_margin", "posterior", "drop", "ensemble")
LABELS = ("planted", "crowd")
Array = np.ndarray[Any, np.dtype[np.float64]]


def in_true_order(rows: Sequence[Pair]) -> list[Pair]:
    """The pairs whose true rewards differ, the better answer chosen."""
    prompts = [plain(row["prompt"]) for row in rows]
    chosen, rejected = (gold(prompts, [answer(row, side) for row in rows]) for side in SIDES)
    sides = zip(rows, chosen, rejected, strict=True)
    return [row if better > worse else flip_pair(row) for row, better, worse in sides if better != worse]


def judged_pairs(run: Path) -> list[Pair]:
    """Pairs of SFT's answers to each held-out prompt, the first with the second, the third with the fourth, and so on."""
    sampled = read_jsonl(run / "round-1/evaluate/sft_answers.jsonl")
    answers = [assistant_turn(row["completion"], ended=row["ended"]) for row in sampled]
    prompts = read_jsonl(run / "round-0/data/data/test_prompts.jsonl")
    each = 16
    rows: list[Pair] = []
    for start in range(0, len(answers), 2):
        chosen, rejected = answers[start : start + 2]
        rows.append({"prompt": prompts[start // each]["prompt"], "chosen": chosen, "rejected": rejected})
    return in_true_order(rows)


def crowd_errs(row: Pair, rng: random.Random) -> bool:
    """Whether one annotator of the crowd, drawn at random, prefers the answer that is truly worse."""
    chosen = answer(row, "chosen")
    return label_pair(plain(row["prompt"]), chosen, answer(row, "rejected"), rng, INSTRUCTIONS).chosen != chosen


class World:
    """A run's training and judged pairs, both in true order, read once by the frozen layers."""

    def __init__(self, run: Path, work: Path):
        self.seed = yaml.safe_load((run / "recipe.yaml").read_text())["seed"]
        base = run / "round-0/base/model"
        base = base if base.is_dir() else Path(yaml.safe_load((run / "recipe.yaml").read_text())["backbone"]["model"])
        rng = np.random.default_rng(self.seed)
        ordered = in_true_order(read_jsonl(run / "round-0/data/data/pairs.jsonl"))
        self.train = [ordered[i] for i in rng.permutation(len(ordered))[:PAIRS]]
        self.test = judged_pairs(run)
        self.planted_flips = (rng.random(len(self.train)) < FLIP_RATE).tolist()
        self.crowd_flips = [crowd_errs(row, random.Random(f"{self.seed}/{i}")) for i, row in enumerate(self.train)]
        tokenizer = load_tokenizer(base, conversational=True)
        end_at_end_token(tokenizer)
        model = build_reward_model(base, pad_token_id=tokenizer.pad_token_id)
        self.trunk = Trunk(model, top_layers=TRUNK)
        rows = [*self.train, *self.test]
        sides = (side_texts(rows, side) for side in SIDES)
        chosen, rejected = (
            encode_answers(tokenizer, prompts, texts, ended=ended)[0] for prompts, texts, ended in sides
        )
        pairs = list(zip(chosen, rejected, strict=True))
        self.features: Features = self.trunk.features(pairs, work, pad_token_id=tokenizer.pad_token_id)
        self.trunk.check(self.features)

    def fitted(self, rows: Sequence[dict[str, Any]], seed: int, on: Sequence[int], flip_rate: float = 0.0) -> Array:
        """Differences, in true order, on some pairs of a model trained on rows: `index`, `flipped` and columns of the loss."""
        sign = torch.ones(len(self.train))
        columns = {name: torch.ones(len(self.train)) for name in ("confidence", "weight")}
        columns["margin"] = torch.zeros(len(self.train))
        for row in rows:
            sign[row["index"]] = -1.0 if row["flipped"] else 1.0
            for name, column in columns.items():
                column[row["index"]] = column[row["index"]] if row.get(name) is None else row[name]

        def objective(chosen: torch.Tensor, rejected: torch.Tensor, pairs: list[int]) -> torch.Tensor:
            labelled = sign[pairs] * (chosen - rejected)
            values = {name: column[pairs] for name, column in columns.items()}
            return pair_loss(labelled, torch.zeros_like(labelled), flip_rate=flip_rate, **values)

        settings = yaml.safe_load(RECIPE.read_text())["reward"]
        kept = ("learning_rate", "lr_scheduler_type", "warmup_steps", "num_train_epochs")
        chosen = {name: settings[name] for name in kept} | {"per_device_train_batch_size": BATCH}
        args = RewardConfig("unused", **chosen, seed=seed, report_to="none", bf16=False, use_cpu=True)
        set_seed(seed)
        member = self.trunk.member()
        member.train(self.features, [row["index"] for row in rows], args, objective=objective, label=f"model {seed}")
        return member.differences(self.features, on).double().numpy()

    def labelled(self, flips: Sequence[bool]) -> list[dict[str, Any]]:
        """The training pairs with labels of which some are wrong."""
        return [
            {**(flip_pair(row) if wrong else row), "index": i, "flipped": wrong}
            for i, (row, wrong) in enumerate(zip(self.train, flips, strict=True))
        ]

    def results(self, flips: Sequence[bool], keep: Path) -> dict[str, Any]:
        """What every variant says of the judged pairs, [n] each, kept on disk; and what the vote said of the labels."""
        rows: list[Any] = self.labelled(flips)
        test = range(len(self.train), len(self.train) + len(self.test))
        first = 1000 * self.seed
        plan = plan_vote(
            [row["prompt"] for row in rows], members=MEMBERS, folds=MEMBERS, in_sample=False, seed=self.seed
        )

        def member(number: int, trained: list[int], voted: list[int]) -> torch.Tensor:
            signs = np.array([-1.0 if rows[i]["flipped"] else 1.0 for i in voted])
            found = self.fitted([rows[i] for i in trained], first + 100 + number, voted, flip_rate=MEMBER_FLIP_RATE)
            return torch.from_numpy(signs * found).float()

        strength = vote_strength(collect_votes(plan, member))
        noise = estimate_noise(strength.mean, [plain(row["prompt"]) for row in rows])
        said: dict[str, Any] = {"noise": [noise.low, noise.fitted, noise.high], "wrong": float(np.mean(flips))}
        members = [self.fitted(rows, first + m, test) for m in range(MEMBERS)]
        said |= {"bt": members[0], "ensemble": np.mean(members, axis=0)}
        for name in ("smoothing", "flip_margin", "posterior", "drop"):
            config = DenoiseConfig(name, smoothing=max(0.01, said["wrong"]))
            changed: Any = denoised(rows, config, strength, noise).rows
            for row in changed:
                row["flipped"] = answer(row, "chosen") != answer(self.train[row["index"]], "chosen")
            said[name] = self.fitted(changed, first, test)
        keep.write_text(json.dumps({k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in said.items()}))
        return said


def measured(run: Path, folder: Path, labels: Sequence[str]) -> dict[str, Any]:
    """One run, kept on disk: `clean` and each of the labels, and which prompt each judged pair has."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: folder / f"{name}.json" for name in ("clean", *labels)}
    if not all(file.is_file() for file in files.values()):
        with tempfile.TemporaryDirectory() as work:
            begin, world = time.monotonic(), World(run, Path(work))
            test = range(len(world.train), len(world.train) + len(world.test))
            if not files["clean"].is_file():
                rows = world.labelled([False] * len(world.train))
                found = world.fitted(rows, 1000 * world.seed, test).tolist()
                prompts = [plain(row["prompt"]) for row in world.test]
                files["clean"].write_text(json.dumps({"clean": found, "prompts": prompts}))
            flips = {"planted": world.planted_flips, "crowd": world.crowd_flips}
            for name in labels:
                if not files[name].is_file():
                    world.results(flips[name], files[name])
            print(
                f"{run}: {len(world.train)} pairs, {len(world.test)} judged, {time.monotonic() - begin:.0f} s",
                flush=True,
            )
    return {name: json.loads(file.read_text()) for name, file in files.items()}


def interval(values: dict[str, list[Array]], clusters: list[list[str]], first: str, second: str) -> list[float]:
    """Mean over runs of the accuracy of one less that of another, with the bootstrap's middle 95 %."""
    rng, draws = np.random.default_rng(0), []
    gaps = []
    for one, other, prompts in zip(values[first], values[second], clusters, strict=True):
        gap, names = (one > 0).astype(float) - (other > 0), np.unique(prompts, return_inverse=True)[1]
        gaps.append((np.bincount(names, gap), np.bincount(names)))
    for _ in range(DRAWS):
        means = []
        for i in rng.integers(0, len(gaps), len(gaps)):
            drawn = rng.integers(0, len(gaps[i][0]), len(gaps[i][0]))
            means.append(gaps[i][0][drawn].sum() / gaps[i][1][drawn].sum())
        draws.append(float(np.mean(means)))
    mean = float(np.mean([total.sum() / count.sum() for total, count in gaps]))
    return [mean, *np.percentile(draws, [2.5, 97.5]).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--labels", default=",".join(LABELS))
    arguments = parser.parse_args()
    quiet_libraries()
    folder = arguments.json.with_suffix("")
    labels = arguments.labels.split(",")
    found = [measured(run, folder / run.name, labels) for run in arguments.runs]
    clusters = [result["clean"]["prompts"] for result in found]
    clean = [np.array(result["clean"]["clean"]) for result in found]
    table: dict[str, Any] = {"clean": float(np.mean([(x > 0).mean() for x in clean]))}
    print("| labels | objective | accuracy | above `bt` |\n|---|---|---|---|")
    for name in labels:
        values = {v: [np.array(result[name][v]) for result in found] for v in VARIANTS} | {"clean": clean}
        table[name] = {"noise": [result[name]["noise"] for result in found], "wrong": [r[name]["wrong"] for r in found]}
        for variant, rows in values.items():
            mean, gap = float(np.mean([(x > 0).mean() for x in rows])), interval(values, clusters, variant, "bt")
            table[name][variant] = {"accuracy": mean, "above_bt": gap}
            above = "" if variant == "bt" else f"{100 * gap[0]:+.1f} [{100 * gap[1]:+.1f}, {100 * gap[2]:+.1f}]"
            print(f"| {name} | {variant} | {mean:.3f} | {above} |")
    arguments.json.write_text(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
