"""The present policy's answers, and which pairs of them are worth a label."""

import random
from itertools import combinations
from typing import Any

import torch
from torch import Tensor
from transformers import set_seed

from rlhf.data.labels import Question, question_id
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from rlhf.models.generate import sample_texts
from rlhf.models.load import load_policy, load_tokenizer
from rlhf.objectives.selection import difference_std, expected_information, head_covariance, most_diverse
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.training import split_settings
from rlhf.reward.load import load_reward_model
from rlhf.reward.model import RewardModel

QUESTIONS, SAMPLES = "questions.jsonl", "samples.jsonl"


def run_sample(context: StageContext) -> dict[str, Any]:
    """Several answers of the present policy to each of some training prompts, another share of them every round. No labels."""
    # 1. The policy so far: the round before's, or SFT's.
    recipe = context.recipe
    model_config, _ = split_settings(context.settings("ppo"))
    set_seed(recipe.seed + context.round)
    present = context.parents["policy"] / "model" if "policy" in context.parents else context.sft_model
    tokenizer = load_tokenizer(present, conversational=True, revision=recipe.backbone.revision)
    policy = load_policy(present, model_config, trainable=False).to(context.device).eval()

    # 2. Its answers. Prompts are taken in one shuffled order, round after round, and begin anew at its end.
    rows = read_jsonl(context.data / "prompts.jsonl")
    random.Random(recipe.seed).shuffle(rows)
    count, responses = int(context.own["prompts"]), int(context.own["responses"])
    first = (context.round - 1) * count
    some = [rows[i % len(rows)] for i in range(first, first + min(count, len(rows)))]
    prompts = [row["prompt"] for row in some for _ in range(responses)]
    texts, ended = sample_texts(policy, tokenizer, prompts, **context.sampling)
    found = zip(prompts, texts, ended, strict=True)
    write_jsonl(context.folder / SAMPLES, [{"prompt": p, "completion": t, "ended": e} for p, t, e in found])
    return {"prompts": len(some), "samples": len(texts), "share_without_eos": 1 - sum(ended) / len(ended)}


def run_select(context: StageContext) -> dict[str, Any]:
    """Which pairs of answers to one prompt are asked about this round."""
    # 1. Every two different answers to one prompt.
    rows = read_jsonl(context.parents["sample"] / SAMPLES)
    answers: dict[str, dict[str, Any]] = {}
    for row in rows:
        entry = answers.setdefault(repr(row["prompt"]), {"prompt": row["prompt"], "texts": {}})
        entry["texts"][row["completion"]] = row["ended"]
    pairs = [
        (entry["prompt"], first, second)
        for entry in answers.values()
        for first, second in combinations(entry["texts"], 2)
        if first.strip() or second.strip()
    ]
    single = sum(len(entry["texts"]) == 1 for entry in answers.values())
    if not pairs:
        raise UserError(
            f"{context.folder}: the policy gives one and the same answer to each of {len(answers)} prompts, so there is nothing to "
            "compare; raise ppo.kl_coef, or rounds.responses."
        )
    rng = random.Random(recipe_seed := context.recipe.seed * 1000 + context.round)
    rng.shuffle(pairs)

    # 2. Those that say most, by the reward model so far.
    how = context.recipe.rounds
    differences: list[float | None] = [None] * len(pairs)
    order = one_of_each_prompt_first(pairs)
    if "reward" in context.parents:
        reward = load_reward_model(context.parents["reward"] / "model", device=context.device)
        first, second = (reward.score([p[0] for p in pairs], [p[side] for p in pairs]) for side in (1, 2))
        differences = (first - second).tolist()
        if how.select != "random":
            order = most_worth(how.select, reward, pairs, first - second, read_jsonl(context.pairs), how.labels)
    elif how.select != "random":
        context.say(f"select: no reward model yet, so pairs are taken at random and not by {how.select}.")
    chosen = order[: how.labels]
    if len(chosen) < how.labels:
        context.say(f"select: {len(pairs)} different pairs for {how.labels} labels; all of them are asked.")

    # 3. As questions, in a random order that says nothing about what was found.
    questions = []
    for i in rng.sample(chosen, len(chosen)):
        prompt, one, other = pairs[i]
        difference = differences[i]
        if rng.random() < 0.5:
            one, other, difference = other, one, None if difference is None else -difference
        source = lab_source(prompt) if how.labels_from == "lab" else None
        name = question_id(context.round, prompt, [one, other])
        questions.append(Question(name, context.round, prompt, one, other, source, difference))
    write_jsonl(context.folder / QUESTIONS, [question.as_row() for question in questions])
    return {
        "candidates": len(pairs),
        "questions": len(questions),
        "prompts_with_one_answer": single,
        "select": how.select,
        "seed": recipe_seed,
    }


def lab_source(prompt: list[dict[str, str]]) -> str:
    """What the lab calls the source of a pair: of requests to refuse, or of the others."""
    from rlhf.lab.world import parse_request

    return "harmless" if parse_request(prompt[-1]["content"]).is_dangerous else "helpful"


def one_of_each_prompt_first(pairs: list[tuple[Any, str, str]]) -> list[int]:
    """Indices such that no prompt comes twice before every other came once."""
    seen: dict[str, int] = {}
    ranks = []
    for prompt, _, _ in pairs:
        key = repr(prompt)
        ranks.append(seen.get(key, 0))
        seen[key] = ranks[-1] + 1
    return sorted(range(len(pairs)), key=ranks.__getitem__)


def most_worth(
    how: str,
    reward: RewardModel,
    pairs: list[tuple[Any, str, str]],
    means: Tensor,
    labelled: list[dict[str, Any]],
    count: int,
) -> list[int]:
    """Indices of the pairs by what their label should teach the reward head, the most first.

    Args:
        how: `deviation`, `information` or `diversity` (`rlhf.objectives.selection`).
        pairs: prompt and two answers each, with `means`, [n], what the reward model scores the first above the second.
        labelled: canonical pairs that it was trained on.
        count: how many are wanted; `diversity` ranks no more.
    """
    before = [
        reward.features([row["prompt"] for row in labelled], [row[side][0]["content"] for row in labelled])
        for side in ("chosen", "rejected")
    ]
    scored = [
        reward.score([r["prompt"] for r in labelled], [r[s][0]["content"] for r in labelled])
        for s in ("chosen", "rejected")
    ]
    features, other = (reward.features([p[0] for p in pairs], [p[side] for p in pairs]) for side in (1, 2))
    differences = features - other
    covariance = head_covariance(before[0] - before[1], scored[0] - scored[1])
    if how == "diversity":
        return most_diverse(differences, means, covariance, count)
    std = difference_std(differences, covariance)
    worth = std if how == "deviation" else expected_information(means, std)
    order: list[int] = torch.argsort(worth, descending=True, stable=True).tolist()
    return order
