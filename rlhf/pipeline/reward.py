"""The reward stage: a reward model, an ensemble, or experts, on the pairs as the vote corrected them."""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import set_seed
from trl import ModelConfig

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import SIDES, TIE, Pair, Prompt, Rated, answer, asked, completion, has_ended
from rlhf.evaluation.pairs import pair_report, score_answers, score_pairs
from rlhf.files import read_jsonl, write_jsonl
from rlhf.invariants.checks import CheckBook
from rlhf.models.generate import sample_texts
from rlhf.models.load import encoder_type, find_source, load_policy, load_tokenizer
from rlhf.models.scalar_head import score_head
from rlhf.models.score import Scorer
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.critiques import critique_form, own_critiques
from rlhf.pipeline.first import first_on_ratings
from rlhf.pipeline.fit import OF_TRAINING, fit_and_keep, fit_reward_model, kept_model, trained_on, training_rows
from rlhf.pipeline.sampling import sampling_settings, say_cut_prompts, say_cut_texts
from rlhf.pipeline.store import MARK
from rlhf.pipeline.training import checks_of, save_trained, split_settings
from rlhf.pipeline.true_reward import gold_differences, load_true_reward
from rlhf.reward.attributes import GatedRewardTrainer
from rlhf.reward.bottleneck import BottleneckRewardTrainer
from rlhf.reward.cloud import latent_cloud, save_cloud
from rlhf.reward.ensemble import RewardEnsemble, member_name
from rlhf.reward.experts import EXPERTS, merge_experts, open_experts, save_experts
from rlhf.reward.gate import fit_gate, label_columns
from rlhf.reward.gated import save_gated
from rlhf.reward.load import calibrate_reward_model
from rlhf.reward.model import RewardModel
from rlhf.reward.sides import side_texts
from rlhf.reward.sources import by_source
from rlhf.statistics import win_rate

CALIBRATION_SAMPLES = 256
SEEDS_APART = 1000  # between the members of an ensemble


class Samples(NamedTuple):
    """Answers that set the scale of a reward model's scores.

    Attributes:
        answers: each prompt with its answer.
        ended: whether each answer came to its end.
        prompts_cut: how many prompts had lost their beginning where the answers were sampled.
    """

    answers: list[tuple[Prompt, str]]
    ended: list[bool]
    prompts_cut: int = 0


def run_reward(context: StageContext) -> dict[str, Any]:
    """Train a reward model on the pairs, set its scale on SFT samples, and measure its accuracy on held-out pairs."""
    recipe, out = context.recipe, context.folder / "model"
    model_config, _ = split_settings(context.trl_settings("reward"))

    # 1. The pairs, corrected by the vote where there is one, or rated answers; then one model, one expert for each source of
    #    pairs, or members of an ensemble, which differ in head and order.
    rows, flipped = training_rows(context)
    form = critique_form(recipe)
    domains = by_source(rows, recipe.reward.expert_weights) if recipe.reward.experts is not None else None
    members = [context.folder / member_name(number) for number in range(recipe.reward.members)]
    facts: dict[str, Any]
    code: Tensor | None = None
    book = CheckBook()
    if domains is not None:
        experts = [out / f"expert-{number}" for number in range(len(domains))]
        dropped = sum(_fit_each(context, domains, experts, "expert", book))
        facts = {"dropped_too_long": dropped, "experts": list(domains), "pairs": len(rows) - dropped}
    elif len(members) > 1:
        same = {str(number): rows for number in range(len(members))}
        dropped = max(_fit_each(context, same, members, "member", book))
        kind = "ratings" if recipe.reward.needs_ratings else "pairs"
        facts = {"dropped_too_long": dropped, "members": len(members), kind: len(rows) - dropped}
    else:
        critiques = own_critiques(context, rows, book) if form is not None else None
        rows, start = (rows, None) if critiques is None else (critiques.rows, critiques.start)
        first = first_on_ratings(context, book) if recipe.reward.ratings_first else None
        start = start if first is None else first.start
        trainer = fit_reward_model(context, rows, context.folder, "reward", recipe.seed, book, start=start)
        facts = {"dropped_too_long": trainer.dropped_too_long, **trained_on(trainer)}
        facts |= {} if critiques is None else {"critiques": critiques.counts}
        facts |= {} if first is None else {"ratings": first.ratings}
        is_saved = save_trained(trainer, out)
        if isinstance(trainer, GatedRewardTrainer) and trainer.fitted is not None and is_saved:
            save_gated(out, trainer.fitted)
            facts["gate"] = trainer.fitted.facts()
        code = trainer.code if isinstance(trainer, BottleneckRewardTrainer) else None
        del trainer
    if not context.is_main:
        return {}

    # 2. Its scale: mean and deviation of the scores of the model as saved, on answers of the SFT policy.
    samples = _calibration_samples(context, model_config)
    if domains is not None:
        _combine(context, domains, samples, out)
    card = {"objective": recipe.reward.objective, "load_in_4bit": model_config.load_in_4bit}
    card |= {} if form is None else {"critiques": form}
    models = [
        calibrate_reward_model(folder, samples=samples.answers, ended=samples.ended, facts=card, device=context.device)
        for folder in members
    ]
    reward = models[0] if len(models) == 1 else RewardEnsemble(models)
    if code is not None and score_head(models[0].model) is not None:
        _remember_cloud(models[0], code, samples, out)
    book.merge(checks_of(*models))

    # 3. Held-out pairs.
    scored = score_pairs(reward, read_jsonl(context.test_pairs), label="reward: held-out pairs")
    report = pair_report(scored, gold_differences=gold_differences(scored.rows, load_true_reward(recipe)))
    write_jsonl(context.folder / "samples.jsonl", scored.samples())
    context.say(
        f"reward: accuracy {report['accuracy']:.3f} [{report['accuracy_ci'][0]:.3f}, {report['accuracy_ci'][1]:.3f}] on "
        f"{report['n']} held-out pairs; 'longer wins' has {report['length_baseline']:.3f}."
    )
    facts |= {"prompts_cut": samples.prompts_cut}
    facts |= {"flipped": flipped, "mean": models[0].mean, "std": models[0].std, **report, "checks": book.entries}

    # 4. What it says of the policy of the round before, which was made against another reward model; what it read cut.
    hindsight = _hindsight(context, reward)
    return {**facts, "hindsight": hindsight, "reward_cuts": say_cut_texts(context, reward, stage="reward")}


def _remember_cloud(reward: RewardModel, code: Tensor, samples: Samples, out: Path) -> None:
    """Keep where the codes of the SFT policy's answers lie, so that PPO can tell when its own leave them."""
    prompts, texts = zip(*samples.answers, strict=True)
    save_cloud(out, latent_cloud(code, reward.features(prompts, texts, ended=samples.ended)))


def _hindsight(context: StageContext, reward: Scorer) -> dict[str, Any] | None:
    """Measure how often the last policy's answer beats that of the policy before (SFT's, in round 2), by a reward model that has
    since seen labels of such answers and that neither was optimised against. None in the first round."""
    latest, older = context.find_parent("latest_evaluation"), context.find_parent("older_evaluation")
    if latest is None:
        return None
    last = read_jsonl(latest / "samples.jsonl")
    asked = [row["prompt"] for row in read_jsonl(context.data / "test_prompts.jsonl")]
    asked = asked[: context.recipe.evaluate.prompts]
    prompts = [asked[row % len(asked)] for row in range(len(last))]  # `evaluate.answers` to each
    sides = [(last, "policy"), (last, "sft") if older is None else (read_jsonl(older / "samples.jsonl"), "policy")]
    texts = [(prompt, row[who]) for rows, who in sides for prompt, row in zip(prompts, rows, strict=True)]
    ended = [row[f"ended_{who}"] for rows, who in sides for row in rows]
    scores = score_answers(
        reward, texts, ended=ended, label="reward: hindsight"
    ).tolist()  # of equal answers equal ones
    rate, interval = win_rate(scores[: len(last)], scores[len(last) :], conversation_keys(prompts))
    return {"round": context.round - 1, "win_rate": rate, "win_rate_ci": interval}


def _fit_each(
    context: StageContext, parts: Mapping[str, list[Pair]], places: Sequence[Path], kind: str, book: CheckBook
) -> list[int]:
    """Train experts or members one after the other, each kept when it is done; then put them in their places.

    Args:
        book: what was checked on the way is entered here.

    Returns:
        how many pairs were too long for each.
    """
    dropped = []
    for number, (name, rows) in enumerate(parts.items()):
        seed = context.recipe.seed + (SEEDS_APART * number if kind == "member" else 0)
        dropped.append(fit_and_keep(context, rows, f"{kind}-{number}", f"{kind} {name}", seed, book, tag={kind: name}))
    if context.is_main:
        for number, place in enumerate(places):
            shutil.copytree(
                kept_model(context, f"{kind}-{number}"), place, ignore=shutil.ignore_patterns(MARK, OF_TRAINING)
            )
    return dropped


def _combine(context: StageContext, domains: Mapping[str, list[Pair]], samples: Samples, out: Path) -> None:
    """Put the experts on one scale, and find the weights or the gate that combine them."""
    section, count = context.recipe.reward, len(domains)
    by_name = section.expert_weights
    weights = [1 / count] * count if by_name is None else [by_name[name] for name in domains]

    # 1. Each expert's scale on SFT samples.
    tokenizer = load_tokenizer(out / "expert-0", conversational=True)
    tokenizer.save_pretrained(out)
    save_experts(out, list(domains), torch.tensor([[0.0, 1.0]] * count), weights=weights, gate=None)
    in_4_bit = split_settings(context.trl_settings("reward"))[0].load_in_4bit
    experts = open_experts(out, tokenizer, conversational=True, load_in_4bit=in_4_bit)
    if not in_4_bit:
        experts.model.to(context.device)
    prompts, texts = [p for p, _ in samples.answers], [text for _, text in samples.answers]
    raw = experts.score_each(prompts, texts, ended=samples.ended)
    scales = torch.stack([raw.mean(dim=0), raw.std(dim=0, correction=0).clamp(min=1e-6)], dim=1)

    # 2. One adapter, fixed weights, or a gate fitted on all pairs without saying which domain they are from.
    if section.experts == "merged":
        scaled = [weight / std for weight, std in zip(weights, scales[:, 1].tolist(), strict=True)]
        del experts
        start = find_source(context.sft_model).adapter  # what each expert's adapter began as
        merge_experts(
            [out / f"expert-{number}" for number in range(count)],
            weights,
            scaled,
            out,
            start=None if start is None else Path(start),
        )
        (out / EXPERTS).unlink()
        return
    gate = None
    if section.experts == "gate":
        rows = [row for domain in domains.values() for row in domain if row.get("confidence") != TIE]
        sides = (side_texts(rows, side) for side in SIDES)
        chosen, rejected = (experts.score_each(prompts, texts, ended=ended) for prompts, texts, ended in sides)
        features = experts.prompt_features([row["prompt"] for row in rows])
        confidence, weight = label_columns(rows)
        gate, _ = fit_gate(features, (chosen - rejected) / scales[:, 1], confidence=confidence, weight=weight)
    save_experts(out, list(domains), scales, weights=None if gate else weights, gate=gate)


def _calibration_samples(context: StageContext, model_config: ModelConfig) -> Samples:
    """Sample answers of the SFT policy. An encoder has no policy beside it; there it is the answers that it was trained on."""
    set_seed(context.recipe.seed)
    sft = context.sft_model
    if encoder_type(sft, context.recipe.backbone.revision) is None:
        policy = load_policy(sft, model_config, trainable=False).to(context.device).eval()
        tokenizer = load_tokenizer(sft, conversational=True, revision=context.recipe.backbone.revision)
        prompts = [row["prompt"] for row in read_jsonl(context.data / "prompts.jsonl")[:CALIBRATION_SAMPLES]]
        cut = say_cut_prompts(context, policy, tokenizer, prompts, stage="reward, answers for the scale")
        settings = sampling_settings(context.recipe, policy.config)
        texts, ended = sample_texts(policy, tokenizer, prompts, **settings, label="reward: answers for the scale")
        return Samples(list(zip(prompts, texts, strict=True)), ended, cut)
    answers: list[tuple[Prompt, str]]
    if context.recipe.reward.needs_ratings:
        rated: list[Rated] = read_jsonl(context.ratings)[:CALIBRATION_SAMPLES]
        answers = [(row["prompt"], completion(row)) for row in rated]
        ended = [has_ended(row["completion"]) for row in rated]
    else:
        pairs: list[Pair] = read_jsonl(context.pairs)[: CALIBRATION_SAMPLES // 2]
        answers = [(asked(row, side), answer(row, side)) for row in pairs for side in SIDES]
        ended = [has_ended(row[side]) for row in pairs for side in SIDES]
    return Samples(answers, ended)
