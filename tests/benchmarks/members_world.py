"""What the members of the reward-model family are trained and judged on: a world, a policy of it, and labels of other forms.

Everything is drawn from one seed and kept on disk. All forms cost the crowd as many comparisons: a ranking of four answers counts
as its six pairs, and three people's labels of one pair as three. Ratings are extra, and no member has both.
"""

import json
import math
import random
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, set_seed
from worlds import RECIPE, Rows, decided, in_true_order

from rlhf.data.rows import assistant_turn, group_key, user_turn
from rlhf.files import read_jsonl, write_jsonl
from rlhf.lab.annotators import CROWD, Annotator
from rlhf.lab.build import RATED
from rlhf.lab.world import parse_request, true_reward, write_answer
from rlhf.models.generate import sample_texts
from rlhf.models.load import load_tokenizer
from rlhf.models.text import plain

SIZES = {"pairs": 2000, "test_pairs": 600, "demonstrations": 2000, "hidden_size": 64, "num_hidden_layers": 2}
QUICK = {"pairs": 180, "test_pairs": 60, "demonstrations": 200, "hidden_size": 32, "num_hidden_layers": 1}
EPISODES, META_PROMPTS, META_ANSWERS = 1536, 512, 5
RANKED = 4  # answers of a ranking, which makes six pairs
# The lab's reward models are small, so they learn at six times the quickstart's rate, in steps half as large.
REWARD = ("reward.learning_rate=3.0e-3", "reward.per_device_train_batch_size=16")


def lived_in(out: Path, seed: int, *, quick: bool) -> Path:
    """A world with an SFT model, a reward model on the pairs, and the policy that a short PPO made of both."""
    if not (out / "round-1/ppo/manifest.json").is_file():
        sizes = [f"lab.{name}={value}" for name, value in (QUICK if quick else SIZES).items()]
        command = [sys.executable, "-m", "rlhf", "ppo", str(RECIPE), "--out", str(out), f"seed={seed}", *sizes, *REWARD]
        command += ["lab.critiques=true", f"ppo.total_episodes={128 if quick else EPISODES}"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return out


def prepared(world: Path, seed: int, out: Path, *, quick: bool) -> dict[str, Rows]:
    """Write the labels of every form as a stage `data` would, in `out/FORM/data`, and return the sets to judge by, in true order."""
    lab, file = world / "round-0/lab/data", out / "sets.json"
    if not file.is_file():
        data = world / "round-0/data/data"
        pairs, prompts = read_jsonl(data / "pairs.jsonl"), read_jsonl(data / "prompts.jsonl")
        rng = random.Random(f"{seed} members")
        forms = {
            "pairs": [{**row, "rating_gap": rating_gap(row, rng)} for row in pairs],
            "rankings": ranked_answers([plain(row["prompt"]) for row in prompts], len(pairs), rng),
            "thirds": [labelled_by_three(row, rng) for row in pairs[: len(pairs) // 3]],
        }
        for name, rows in forms.items():
            folder = out / name / "data"
            folder.mkdir(parents=True, exist_ok=True)
            write_jsonl(folder / "pairs.jsonl", rows)
            write_jsonl(folder / "prompts.jsonl", prompts)
            write_jsonl(folder / "test_pairs.jsonl", read_jsonl(data / "test_pairs.jsonl")[:20])
        write_jsonl(out / "pairs/data/ratings.jsonl", rated_answers(lab / RATED))
        count = META_PROMPTS // 10 if quick else META_PROMPTS
        meta = answers_of_policy(world, [row["prompt"] for row in prompts[:count]], META_ANSWERS, seed)
        write_jsonl(out / "meta.jsonl", meta)
        sets = {
            "held_out": read_jsonl(data / "test_pairs.jsonl"),
            "policy": pairs_of_policy(world, seed, quick=quick),
            "kinds": read_jsonl(lab / "shift_test.jsonl"),
        }
        file.write_text(json.dumps({name: in_true_order(decided(rows)) for name, rows in sets.items()}))
    found: dict[str, Rows] = json.loads(file.read_text())
    return found


def answers_of_policy(world: Path, prompts: list[Any], count: int, seed: int) -> Rows:
    """So many answers of the world's policy to each prompt."""
    folder = world / "round-1/ppo/model"
    policy: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    repeated = [prompt for prompt in prompts for _ in range(count)]
    set_seed(seed)
    tokenizer = load_tokenizer(folder, conversational=True)
    texts, ended = sample_texts(policy, tokenizer, repeated, batch_size=256, max_new_tokens=40)
    return [{"prompt": p, "completion": x, "ended": e} for p, x, e in zip(repeated, texts, ended, strict=True)]


def pairs_of_policy(world: Path, seed: int, *, quick: bool) -> Rows:
    """Two answers of the policy to every held-out prompt."""
    prompts = read_jsonl(world / "round-0/data/data/test_prompts.jsonl")[: 60 if quick else None]
    sampled = answers_of_policy(world, [row["prompt"] for row in prompts], 2, seed + 1)
    return [
        pair(a["prompt"], a["completion"], b["completion"]) for a, b in zip(sampled[::2], sampled[1::2], strict=True)
    ]


def pair(prompt: Any, chosen: str, rejected: str) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": assistant_turn(chosen), "rejected": assistant_turn(rejected)}


def rating_gap(row: dict[str, Any], rng: random.Random) -> float:
    """How much better whoever labelled a pair rates the chosen answer as a whole, each from 0 to 4; it may be below 0."""
    person = next(x for x in CROWD if x.name == row["annotator"])
    texts = [row[side][0]["content"] for side in ("chosen", "rejected")]
    ratings = [person.rating(min(1.0, max(0.0, true_reward(plain(row["prompt"]), x))), x, rng) for x in texts]
    return float(ratings[0] - ratings[1])


def rated_answers(file: Path) -> Rows:
    """Every rated answer by itself."""
    return [
        {"prompt": row["prompt"], "completion": assistant_turn(answer["content"]), "attributes": answer["attributes"]}
        for row in read_jsonl(file)
        for answer in row["responses"]
    ]


def ranked_answers(prompts: list[str], pairs: int, rng: random.Random) -> Rows:
    """Rankings of four answers, each by one of the crowd, as all pairs of a group; together as many pairs as asked for."""
    rows: Rows = []
    for prompt in rng.sample(prompts, pairs // math.comb(RANKED, 2)):
        answers: dict[str, None] = {}
        while len(answers) < RANKED:
            answers[write_answer(prompt, rng)] = None
        person, turn = rng.choice(CROWD), user_turn(prompt)
        extra = {"annotator": person.name, "group": group_key(turn)}
        extra["source"] = "harmless" if parse_request(prompt).is_dangerous else "helpful"
        rows += [pair(turn, a, b) | extra for a, b in combinations(ranking(person, prompt, list(answers), rng), 2)]
    return rows


def ranking(person: Annotator, prompt: str, answers: list[str], rng: random.Random) -> list[str]:
    """One person's order of some answers, the best first.

    Utility and Gumbel noise: every two answers stand in the order that this person's comparison would have, with the same
    probability. That is the model of Plackett and Luce itself, but for the careless, whose whole order is drawn at random.
    """
    if rng.random() < person.carelessness:
        return rng.sample(answers, len(answers))
    worth = {x: person.sharpness * person.utility(prompt, x) - math.log(rng.expovariate(1)) for x in answers}
    return sorted(answers, key=lambda x: -worth[x])


def labelled_by_three(row: dict[str, Any], rng: random.Random) -> dict[str, Any]:
    """The same pair as three of the crowd label it: in the order of most of them, with their share as confidence."""
    first, second = (row[side][0]["content"] for side in ("chosen", "rejected"))
    people = rng.sample(CROWD, 3)
    votes = sum(person.prefers_first(plain(row["prompt"]), first, second, rng) for person in people)
    better, worse = (first, second) if votes >= 2 else (second, first)
    return pair(row["prompt"], better, worse) | {"source": row["source"], "confidence": max(votes, 3 - votes) / 3}
