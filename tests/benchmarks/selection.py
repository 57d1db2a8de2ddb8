"""Which pairs are worth a label: accuracy of the next reward model on the policy's own answers, at equal numbers of labels.

python tests/benchmarks/selection.py --json selection.json --seeds 5,6,7,8,9

The second round's situation in the lab, without PPO: a reward model of 1,500 offline pairs, four answers of SFT to each of
1,000 prompts, and every way of choosing which two answers are asked about, at two budgets. Labels are the true reward's, or
those with a quarter turned round (then training uses the likelihood that knows a fifth to be). A tie spends a label. Each
way's reward model, trained on all labels, is judged on other prompts: order of all pairs of four answers, and `picked`, the
share of the way from a random answer's true reward to that of the best of four that its favourite goes.

Intervals are by t over seeds of the differences from `random` at the same budget. Finished (seed, noise, way, budget) lie
beside FILE, so a killed run goes on.
"""

import argparse
import json
import os
import random
import time
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed
from worlds import Rows, fitted, interval, planted, world

from rlhf.data.labels import Question, Verdict, question_id, tally
from rlhf.lab.annotators import simulate_label
from rlhf.lab.world import gold
from rlhf.models.generate import sample_texts
from rlhf.models.load import load_tokenizer
from rlhf.models.text import plain
from rlhf.pipeline.sampling import Candidate, most_worth, one_of_each_prompt_first
from rlhf.pipeline.training import quiet_libraries
from rlhf.reward.model import RewardModel

OFFLINE, PROMPTS, RESPONSES = 1500, 1000, 4
BUDGETS = (500, 1500)
WAYS = ("random", "deviation", "information", "diversity")
NOISE = {"exact": (0.0, 0.0), "noisy": (0.25, 0.2)}  # share turned round, and what the likelihood is told
TRAINING: dict[str, Any] = {"learning_rate": 5e-4, "epochs": 2}


class Scene:
    """A seed's SFT model, offline pairs, candidates for a label and held-out answers."""

    def __init__(self, folder: Path, seed: int, *, quick: bool):
        scale = 10 if quick else 1
        sizes = {"pairs": OFFLINE // scale} | ({"demonstrations": 2000} if quick else {})
        self.base, self.offline, _ = world(folder / f"world-{seed}", seed, annotators="exact", **sizes)
        file = folder / f"world-{seed}/round-0/data/data/prompts.jsonl"
        prompts = [json.loads(line)["prompt"] for line in file.read_text().splitlines()]
        random.Random(seed).shuffle(prompts)
        asked, held = PROMPTS // scale, PROMPTS // 2 // scale
        assert len(prompts) >= asked + held
        set_seed(seed)
        policy = AutoModelForCausalLM.from_pretrained(self.base).eval()
        tokenizer = load_tokenizer(self.base, conversational=True)
        several = [prompt for prompt in prompts[: asked + held] for _ in range(RESPONSES)]
        texts, ended = sample_texts(policy, tokenizer, several, batch_size=64, max_new_tokens=40)
        cut = asked * RESPONSES
        places = [(prompts[i], range(RESPONSES * i, RESPONSES * (i + 1))) for i in range(asked)]
        answers = [(prompt, {texts[j]: ended[j] for j in reversed(four)}) for prompt, four in places]
        self.candidates = [
            Candidate(prompt, first, second, four[first], four[second])
            for prompt, four in answers
            for first, second in combinations(reversed(four), 2)
        ]
        random.Random(seed).shuffle(self.candidates)
        self.held = several[cut:], texts[cut:], ended[cut:]
        self.true = torch.tensor(gold([plain(p) for p in self.held[0]], self.held[1])).view(-1, RESPONSES)


@cache
def scene(folder: Path, seed: int, *, quick: bool) -> Scene:
    """Made when the first result of a seed is missing."""
    return Scene(folder, seed, quick=quick)


@cache
def first_model(folder: Path, seed: int, noise: str, *, quick: bool) -> tuple[RewardModel, Rows]:
    """The reward model before any choice, and the pairs it was trained on."""
    rate, told = NOISE[noise]
    here = scene(folder, seed, quick=quick)
    rows = planted(here.offline, seed, rate)
    return fitted(here.base, rows, seed=seed, flip_rate=told, **TRAINING), rows


def labelled(pairs: list[Candidate], rate: float, seed: int) -> tuple[Rows, int]:
    """What the lab says of these pairs, and how many of them are ties."""
    rng = random.Random(seed)
    questions = [
        Question(question_id(2, p, [a, b]), 2, p, a, b, first_ended=ends[0], second_ended=ends[1])
        for p, a, b, *ends in pairs
    ]
    verdicts = [
        Verdict(q.id, simulate_label(plain(q.prompt), q.first, q.second, rng, "exact", rate)[0], "exact")
        for q in questions
    ]
    found = tally(questions, verdicts)
    return found.rows, found.counts["tied"]


def judged(folder: Path, seed: int, noise: str, way: str, budget: int, *, quick: bool) -> dict[str, float]:
    """The reward model after `budget` labels chosen one way, kept on disk."""
    file = folder / f"{seed}-{noise}-{way}-{budget}.json"
    if file.is_file():
        result: dict[str, float] = json.loads(file.read_text())
        return result
    begin = time.monotonic()
    here, (rate, told) = scene(folder, seed, quick=quick), NOISE[noise]
    reward, before = first_model(folder, seed, noise, quick=quick)
    pairs, ties = here.candidates, 0
    if budget > 0:
        order = one_of_each_prompt_first(pairs)[:budget]  # candidates are in random order
        if way != "random":
            sides = ([(p.first, p.first_ended) for p in pairs], [(p.second, p.second_ended) for p in pairs])
            first, second = (
                reward.score([p.prompt for p in pairs], [x for x, _ in side], ended=[ended for _, ended in side])
                for side in sides
            )
            order = most_worth(way, reward, pairs, first - second, before, budget)[:budget]
        rows, ties = labelled([pairs[i] for i in order], rate, seed)
        reward = fitted(here.base, [*before, *rows], seed=seed, flip_rate=told, **TRAINING)
    prompts, texts, ended = here.held
    scores = reward.score(prompts, texts, ended=ended).view(-1, RESPONSES)
    true = here.true
    better = true[:, :, None] > true[:, None, :]
    right = (scores[:, :, None] > scores[:, None, :])[better].float().mean()
    favourite = true.gather(1, scores.argmax(dim=1, keepdim=True)).mean()
    picked = (favourite - true.mean()) / (true.max(dim=1).values.mean() - true.mean())
    result = {"accuracy": right.item(), "picked": picked.item(), "ties": ties, "seconds": time.monotonic() - begin}
    file.write_text(json.dumps(result))
    print(seed, noise, way, budget, {k: round(v, 3) for k, v in result.items()}, flush=True)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", default="5,6,7,8,9")
    parser.add_argument("--variants", default=",".join(NOISE))
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, the first seed")
    arguments = parser.parse_args()
    quiet_libraries()
    seeds = [int(seed) for seed in arguments.seeds.split(",")][: 1 if arguments.quick else None]
    folder = arguments.json.with_suffix("")
    if arguments.quick:
        folder = folder.with_name(folder.name + "-quick")
    folder.mkdir(parents=True, exist_ok=True)
    budgets = [b // (10 if arguments.quick else 1) for b in BUDGETS]
    result: dict[str, Any] = {"seeds": seeds}
    for noise in arguments.variants.split(","):
        curves = [("random", 0), *((way, budget) for budget in budgets for way in WAYS)]
        found = {(s, *c): judged(folder, s, noise, *c, quick=arguments.quick) for s in seeds for c in curves}
        for way, budget in curves:
            values = [found[s, way, budget] for s in seeds]
            plainly = [found[s, "random", budget] for s in seeds]
            result[f"{noise} {way} {budget}"] = {
                key: interval([v[key] for v in values]) for key in ("accuracy", "picked", "ties")
            } | {
                f"{key}_above_random": interval([v[key] - r[key] for v, r in zip(values, plainly, strict=True)])
                for key in ("accuracy", "picked")
            }
    arguments.json.write_text(json.dumps(result, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main()
