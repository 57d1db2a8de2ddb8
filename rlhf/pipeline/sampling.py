"""The latest policy's answers, and which pairs of them are worth a label."""

import math
import random
from collections.abc import Iterable, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from rlhf.data.labels import Question, is_asked_in_this_order, question_id
from rlhf.data.rows import Messages, Pair, Prompt, prompt_key
from rlhf.errors import UserError
from rlhf.files import read_jsonl, write_jsonl
from rlhf.invariants.ends import prompts_too_long
from rlhf.lab.worlds import WORLDS
from rlhf.models.generate import encode_prompts, sample_texts
from rlhf.models.load import load_policy, load_tokenizer
from rlhf.models.prompt_length import context_length, longest_prompt
from rlhf.models.text import plain
from rlhf.objectives.selection import difference_std, expected_information, head_covariance, most_diverse
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.training import split_settings
from rlhf.ppo.config import PPOConfig
from rlhf.recipe.schema import Recipe
from rlhf.reward.ensemble import RewardEnsemble
from rlhf.reward.load import load_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.sides import side_features, side_scores

QUESTIONS, SAMPLES = "questions.jsonl", "samples.jsonl"


class SamplingSettings(TypedDict):
    """How answers are sampled outside PPO; the keywords of `sample_texts`, lengths in tokens."""

    batch_size: int
    max_new_tokens: int
    temperature: float
    max_prompt_length: int | None


class Candidate(NamedTuple):
    """Two different answers to one prompt, which might be asked about, and whether they came to their end."""

    prompt: Messages
    first: str
    second: str
    first_ended: bool = True
    second_ended: bool = True

    def swapped(self) -> "Candidate":
        """Return the same answers in the other order."""
        return Candidate(self.prompt, self.second, self.first, self.second_ended, self.first_ended)


def sampling_settings(recipe: Recipe, config: PreTrainedConfig) -> SamplingSettings:
    """Return how answers are sampled outside PPO: at `sampling.temperature`, as long as PPO's, two rollouts at once.

    Two, as no backward pass follows; `generation_batch_size` says otherwise. A run that ends before PPO need not name the
    length of an answer: where the default leaves no room for a prompt, an answer has half of the context.

    Args:
        config: of the model that answers.
    """
    settings = recipe.ppo.trl_settings()
    sizes = ("per_device_train_batch_size", "gradient_accumulation_steps", "num_mini_batches")
    two_rollouts = 2 * math.prod(settings.get(name, getattr(PPOConfig, name)) for name in sizes)
    context, default = context_length(config), PPOConfig.max_completion_length
    if context is not None and context <= default:
        default = context // 2
    return {
        "batch_size": settings.get("generation_batch_size") or two_rollouts,
        "max_new_tokens": settings.get("max_completion_length", default),
        "temperature": recipe.sampling.temperature,
        "max_prompt_length": settings.get("max_prompt_length", PPOConfig.max_prompt_length),
    }


def say_cut_prompts(
    context: StageContext,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    stage: str,
) -> int:
    """Say how many of the prompts that a stage samples answers to lose their beginning, and return their number.

    Args:
        model: what answers them.
        stage: its name, for the sentence.

    Raises:
        UserError: an answer leaves no room for a prompt.
    """
    settings = sampling_settings(context.recipe, model.config)
    limit = longest_prompt(
        model.config,
        max_new_tokens=settings["max_new_tokens"],
        max_prompt_length=settings["max_prompt_length"],
    )
    lengths = [len(ids) for ids in encode_prompts(tokenizer, prompts, max_prompt_length=None)]
    sentence = prompts_too_long(lengths, limit)
    if sentence is not None:
        context.say(f"{stage}: {sentence}")
    return 0 if limit is None else sum(length > limit for length in lengths)


def say_cut_texts(context: StageContext, reward: RewardModel | RewardEnsemble, *, stage: str) -> list[str]:
    """Say in which ways the texts that a stage scored were too long for the reward model, and return the sentences."""
    sentences = reward.cuts(f"{stage}: the reward model")
    for sentence in sentences:
        context.say(sentence)
    return sentences


def run_sample(context: StageContext) -> dict[str, Any]:
    """Sample several answers of the latest policy to each of some training prompts, other prompts every round. No labels."""
    # 1. The policy so far: the round before's, or SFT's.
    recipe = context.recipe
    model_config, _ = split_settings(context.trl_settings("ppo"))
    set_seed(recipe.seed + context.round)
    policy_before = context.find_parent("policy")
    latest = context.sft_model if policy_before is None else policy_before / "model"
    tokenizer = load_tokenizer(latest, conversational=True, revision=recipe.backbone.revision)
    policy = load_policy(latest, model_config, trainable=False).to(context.device).eval()

    # 2. Its answers. Prompts are taken in one shuffled order, round after round, and begin anew at its end.
    rows = read_jsonl(context.data / "prompts.jsonl")
    random.Random(recipe.seed).shuffle(rows)
    count, responses = int(context.settings["prompts"]), int(context.settings["responses"])
    first = (context.round - 1) * count
    drawn = [rows[i % len(rows)] for i in range(first, first + min(count, len(rows)))]
    cut = say_cut_prompts(context, policy, tokenizer, [row["prompt"] for row in drawn], stage="sample")
    prompts = [row["prompt"] for row in drawn for _ in range(responses)]
    texts, ended = sample_texts(
        policy,
        tokenizer,
        prompts,
        **sampling_settings(recipe, policy.config),
        engine=recipe.sampling.engine,
        label="sample: answers",
    )
    samples = zip(prompts, texts, ended, strict=True)
    write_jsonl(context.folder / SAMPLES, [{"prompt": p, "completion": t, "ended": e} for p, t, e in samples])
    return {
        "prompts": len(drawn),
        "prompts_cut": cut,
        "samples": len(texts),
        "share_without_eos": 1 - sum(ended) / len(ended),
    }


def run_select(context: StageContext) -> dict[str, Any]:
    """Select the pairs of answers to one prompt that are asked about in this round, and write them as questions.

    Raises:
        UserError: there is no pair of different answers.
    """
    # 1. Every two different answers to one prompt.
    candidates, asked_about, single = _candidates(context.parent("sample") / SAMPLES)
    if not candidates:
        raise UserError(
            f"{context.folder}: the policy gives one and the same answer to each of {asked_about} prompts, so there is nothing to "
            "compare; raise ppo.kl_coef, or rounds.responses."
        )
    seed = context.recipe.seed * 1000 + context.round
    rng = random.Random(seed)
    rng.shuffle(candidates)

    # 2. Those that say most, by the reward model so far.
    recipe, reward_before = context.recipe, context.find_parent("reward")
    rounds, count = recipe.rounds, int(context.settings["labels"])
    differences: list[float | None] = [None] * len(candidates)
    cuts: list[str] = []
    order = one_of_each_prompt_first(candidates)
    if reward_before is not None:
        reward = load_reward_model(reward_before / "model", device=context.device)
        prompts, firsts, seconds, firsts_ended, seconds_ended = zip(*candidates, strict=True)
        rewards_first = reward.score(prompts, firsts, ended=firsts_ended)
        rewards_second = reward.score(prompts, seconds, ended=seconds_ended)
        means = rewards_first - rewards_second
        differences = means.tolist()
        if rounds.select != "random":
            labelled: list[Pair] = read_jsonl(context.pairs)
            order = most_worth(rounds.select, reward, candidates, means, labelled, count)
        cuts = say_cut_texts(context, reward, stage="select")
    elif rounds.select != "random":
        context.say(f"select: no reward model yet, so pairs are taken at random and not by {rounds.select}.")
    selected = order[:count]
    if len(selected) < count:
        context.say(f"select: {len(candidates)} different pairs for {count} labels; all of them are asked.")

    # 3. As questions, in a random order that says nothing about why a pair was selected.
    questions = []
    for i in rng.sample(selected, len(selected)):
        candidate, difference = candidates[i], differences[i]
        name = question_id(context.round, candidate.prompt, [candidate.first, candidate.second])
        if not is_asked_in_this_order(name, candidate.first, candidate.second):
            candidate, difference = candidate.swapped(), None if difference is None else -difference
        source = lab_source(recipe, candidate.prompt) if rounds.labels_from == "lab" else None
        prompt, first, second, first_ended, second_ended = candidate
        ends = [None if ended else False for ended in (first_ended, second_ended)]  # only a cut is noted
        questions.append(Question(name, context.round, prompt, first, second, source, difference, *ends))
    write_jsonl(context.folder / QUESTIONS, [question.as_row() for question in questions])
    return {
        "candidates": len(candidates),
        "questions": len(questions),
        "prompts_with_one_answer": single,
        "reward_cuts": cuts,
        "select": rounds.select,
        "seed": seed,
    }


def _candidates(samples: Path) -> tuple[list[Candidate], int, int]:
    """Read every two different answers to one prompt, of which one at least is not empty.

    Returns:
        the pairs, the number of prompts, and the number of prompts with a single different answer.
    """
    prompts: dict[str, Messages] = {}
    answers: dict[str, dict[str, bool]] = {}  # each text once, in the order of the file, and whether it ended
    for row in read_jsonl(samples):
        key = prompt_key(row["prompt"])
        prompts.setdefault(key, row["prompt"])
        answers.setdefault(key, {}).setdefault(row["completion"], row["ended"])
    candidates = [
        Candidate(prompts[key], first, second, texts[first], texts[second])
        for key, texts in answers.items()
        for first, second in combinations(texts, 2)
        if first.strip() or second.strip()
    ]
    return candidates, len(prompts), sum(len(texts) == 1 for texts in answers.values())


def lab_source(recipe: Recipe, prompt: Messages) -> str:
    """Return what the lab calls the source of a pair: harmless for requests to refuse, helpful for the others."""
    assert recipe.lab is not None, "the recipe's check wants a lab"
    return "harmless" if WORLDS[recipe.lab.world].is_dangerous(plain(prompt)) else "helpful"


def one_of_each_prompt_first(candidates: Iterable[Candidate]) -> list[int]:
    """Return indices such that no prompt comes twice before every other came once."""
    seen: dict[str, int] = {}
    ranks = []
    for candidate in candidates:
        key = prompt_key(candidate.prompt)
        ranks.append(seen.get(key, 0))
        seen[key] = ranks[-1] + 1
    return sorted(range(len(ranks)), key=ranks.__getitem__)


def most_worth(
    criterion: str,
    reward: RewardModel,
    candidates: Sequence[Candidate],
    means: Tensor,
    labelled: Sequence[Pair],
    count: int,
) -> list[int]:
    """Return indices of the candidates by what their label should teach the reward head, the most first.

    Args:
        criterion: `deviation`, `information` or `diversity` (`rlhf.objectives.selection`).
        candidates: pairs of answers, with `means`, [n], what the reward model scores the first above the second.
        labelled: canonical pairs that it was trained on.
        count: how many are wanted; `diversity` ranks no more.
    """
    # 1. What the labels so far say about the head.
    covariance = head_covariance(
        side_features(reward, labelled, "chosen") - side_features(reward, labelled, "rejected"),
        side_scores(reward, labelled, "chosen") - side_scores(reward, labelled, "rejected"),
    )

    # 2. What each candidate would add.
    prompts, firsts, seconds, firsts_ended, seconds_ended = zip(*candidates, strict=True)
    first = reward.features(prompts, firsts, ended=firsts_ended)
    second = reward.features(prompts, seconds, ended=seconds_ended)
    differences = first - second
    if criterion == "diversity":
        return most_diverse(differences, means, covariance, count)
    std = difference_std(differences, covariance)
    worth = std if criterion == "deviation" else expected_information(means, std)
    order: list[int] = torch.argsort(worth, descending=True, stable=True).tolist()
    return order
