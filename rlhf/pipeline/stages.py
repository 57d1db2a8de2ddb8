"""One function a stage: read the parents' folders, do the work, write the own folder, return facts for the manifest."""

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from rlhf.data.prepare import DataSources, prepare_data
from rlhf.data.sources import Source, pair_digest
from rlhf.evaluation.pairs import ScoredPairs
from rlhf.evaluation.policies import evaluate_policies
from rlhf.files import read_jsonl, write_jsonl
from rlhf.lab.build import LabSettings, build_lab
from rlhf.models.generate import sample_texts
from rlhf.models.load import find_source, load_policy, load_tokenizer
from rlhf.models.save import save_model
from rlhf.models.scratch import build_base
from rlhf.models.text import plain
from rlhf.pipeline.context import STRENGTH, StageContext, base_model, gold_differences, held_out
from rlhf.pipeline.label import run_label
from rlhf.pipeline.reward import run_reward
from rlhf.pipeline.sampling import run_sample, run_select
from rlhf.pipeline.store import CHECKPOINTS
from rlhf.pipeline.training import quiet_libraries, split_settings, train, training_arguments
from rlhf.pipeline.vote import vote
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.trainer import PPOTrainer
from rlhf.recipe.schema import DATA_SOURCES
from rlhf.reward.ensemble import load_scorer_of, member_folders
from rlhf.statistics import auroc

SHOWN_SAMPLES, SFT_ANSWERS = 64, "sft_answers.jsonl"


def run_lab(context: StageContext) -> dict[str, Any]:
    """Generate the world: base model, demonstrations, labelled pairs, prompts."""
    assert context.recipe.lab is not None
    settings = LabSettings(**context.recipe.lab.model_dump(), seed=context.recipe.seed)
    return build_lab(context.folder, settings)


def run_data(context: StageContext) -> dict[str, Any]:
    """Read, check and split what the recipe names; what it does not name comes from the lab."""
    data = context.recipe.data
    named: dict[str, Any] = {
        name: [Source(**entry.model_dump()) for entry in data.sources(name)] for name in DATA_SOURCES
    }
    others: dict[str, Any] = data.model_dump(exclude=set(DATA_SOURCES))
    if "lab" in context.parents:
        made = context.parents["lab"] / "data"
        if data.prompts is None:
            named["test_prompts"] = [Source(str(made / "test_prompts.jsonl"))]
        for name in DATA_SOURCES:
            named[name] = named[name] or [Source(str(made / f"{name}.jsonl"))]
    facts = prepare_data(context.folder / "data", DataSources(**others, **named), seed=context.recipe.seed)
    for sentence in facts.pop("sentences"):
        context.say(sentence)
    return facts


def run_base(context: StageContext) -> dict[str, Any]:
    """A small model from nothing, its tokenizer trained on the demonstrations and the pairs."""
    settings = dict(context.recipe.backbone.from_scratch or {})
    texts = base_texts(context.data)
    build_base(
        context.folder / "model",
        texts,
        architecture=settings.pop("architecture"),
        settings=settings,
        seed=context.recipe.seed,
    )
    return {"texts": len(texts)}


def base_texts(data: Path) -> list[str]:
    """What the tokenizer of a model from nothing is trained on."""
    return [
        message["content"]
        for file in (data / "sft.jsonl", data / "pairs.jsonl")
        for row in (read_jsonl(file) if file.is_file() else [])
        for part in row.values()
        if isinstance(part, list)
        for message in part
    ]


def run_sft(context: StageContext) -> dict[str, Any]:
    """Supervised fine-tuning on the demonstrations; the loss is on the answers only."""
    # 1. Model and data. A model from nothing has nothing to adapt, so all of its weights are trained.
    base = base_model(context)
    model_config, settings = split_settings(context.settings("sft"))
    if not isinstance(base, str) and model_config.use_peft:
        context.say("sft: the base model has random weights, so all of them are trained, not an adapter.")
        model_config.use_peft = model_config.load_in_4bit = False
    set_seed(context.recipe.seed)  # an adapter's first weights are random
    tokenizer = load_tokenizer(base, conversational=True, revision=context.recipe.backbone.revision)
    model = load_policy(base, model_config)
    rows = Dataset.from_list(read_jsonl(context.data / "sft.jsonl"))

    # 2. Train.
    args = training_arguments(SFTConfig, settings, context.folder, context.recipe.seed)
    trainer = SFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    lengths = [len(ids) for ids in trainer.train_dataset["input_ids"]]
    dropped = len(rows) - len(lengths)
    if dropped:
        context.say(
            f"sft: {dropped} of {len(rows)} demonstrations were left out: their prompts alone fill max_length={args.max_length}."
        )
    cut = sum(args.max_length is not None and length >= args.max_length for length in lengths)
    if cut:
        context.say(
            f"sft: {cut} of {len(lengths)} demonstrations reach max_length={args.max_length} and may have been cut."
        )
    train(trainer, context.folder, label="sft", say=context.say)

    # 3. Save, and show what it says now.
    if context.is_main:
        save_model(trainer.model, tokenizer, context.folder / "model")
        show_samples(context, trainer.model, tokenizer)
    return {"demonstrations": len(lengths), "dropped": dropped, "cut": cut, "tokens": sum(lengths)}


def run_vote(context: StageContext) -> dict[str, Any]:
    """Preference strength of every training pair, and the share of wrong labels that the votes imply."""
    recipe = context.recipe
    rows = read_jsonl(context.pairs)
    shape = recipe.vote.shape()
    folder = context.folder / CHECKPOINTS
    strength, noise = vote(
        context.sft_model, rows, context.settings("vote"), folder, seed=recipe.seed, say=context.say, **shape
    )
    if not context.is_main:
        return {}
    names = ("strength_mean", "strength_std", "strength_share", "strength_votes")
    columns = zip(*(column.tolist() for column in strength), strict=True)
    votes = [
        {"pair": pair_digest(row), **dict(zip(names, v, strict=True))} for row, v in zip(rows, columns, strict=True)
    ]
    write_jsonl(context.folder / STRENGTH, votes)
    context.say(
        f"vote: {shape['members']} members; about {noise.flip_rate:.1%} [{noise.low:.1%}, {noise.high:.1%}] of the labels are "
        f"wrong; {(strength.mean < 0).float().mean():.1%} of the pairs have a strength below 0."
    )
    gold = gold_differences(ScoredPairs.unscored(rows), context.gold())
    found = None
    if gold is not None:
        wrong = [difference < 0 for difference in gold]
        found = auroc((-strength.mean).tolist(), wrong) if any(wrong) and not all(wrong) else None
    return {"pairs": len(rows), "noise": asdict(noise), "auroc_of_wrong_labels": found, **shape}


def run_ppo(context: StageContext) -> dict[str, Any]:
    """PPO from the SFT policy, or from that of the round before, against the reward model."""
    # 1. Where it starts, and what its KL is measured to: the policy at the start, or SFT.
    recipe = context.recipe
    model_config, settings = split_settings(context.settings("ppo"))
    args = training_arguments(PPOConfig, settings, context.folder, recipe.seed)
    set_seed(recipe.seed)
    sft = context.sft_model
    start = context.parents["policy"] / "model" if "policy" in context.parents else sft
    reference = sft if context.own.get("reference") == "sft" else start
    tokenizer = load_tokenizer(sft, conversational=True, revision=recipe.backbone.revision)
    gold = context.gold()
    members = [str(folder) for folder in member_folders(context.parents["reward"])]
    if len(members) > 1 and args.reward_ensemble is None:
        args.reward_ensemble = "mean"

    # 2. Train.
    trainer = PPOTrainer(
        load_policy(start, model_config),
        [*members, *recipe.ppo.extra_rewards],
        args,
        train_dataset=Dataset.from_list(read_jsonl(context.data / "prompts.jsonl")),
        processing_class=tokenizer,
        eval_dataset=held_out(context, context.data / "test_prompts.jsonl") if args.eval_strategy != "no" else None,
        monitor_funcs={"gold": gold} if gold is not None else None,
        ptx_dataset=Dataset.from_list(read_jsonl(context.data / "sft.jsonl")) if args.ptx_coef > 0 else None,
        adapter_was_trained=find_source(reference).adapter is not None and model_config.use_peft,
    )
    if reference != start:
        trainer.reference.load(Path(reference))
    train(trainer, context.folder, label="ppo", say=context.say)

    # 3. Save, and say what happened.
    if context.is_main:
        policy = trainer.accelerator.unwrap_model(trainer.model).policy
        save_model(policy, tokenizer, context.folder / "model")
        write_jsonl(context.folder / "samples.jsonl", [sample.as_row() for sample in trainer.latest_samples])
    if trainer.stopped is not None:
        context.say(trainer.stopped)
    rollouts = trainer.state.global_step // args.steps_per_rollout
    return {
        "episodes": trainer.episodes,
        "rollouts": rollouts,
        "stopped": trainer.stopped,
        "warnings": trainer.progress.health.sentences,
    }


def run_evaluate(context: StageContext) -> dict[str, Any]:
    """The last policy against SFT and best-of-16 on held-out prompts, by proxy, by gold, and at which KL."""
    recipe = context.recipe
    set_seed(recipe.seed)
    model_config, _ = split_settings(context.settings("ppo"))
    rows = read_jsonl(context.data / "test_prompts.jsonl")[: recipe.evaluate.prompts]
    if len(rows) < recipe.evaluate.prompts:
        context.say(f"evaluate: only {len(rows)} held-out prompts, of {recipe.evaluate.prompts} asked for.")
    sft = context.sft_model
    reward = load_scorer_of(context.parents["reward"], device=context.device)
    known = context.parents["first_evaluation"] / SFT_ANSWERS if "first_evaluation" in context.parents else None
    facts, samples, sft_answers = evaluate_policies(
        policy=load_policy(context.parents["policy"] / "model", model_config, trainable=False)
        .to(context.device)
        .eval(),
        sft=load_policy(sft, model_config, trainable=False).to(context.device).eval(),
        tokenizer=load_tokenizer(sft, conversational=True, revision=recipe.backbone.revision),
        reward=reward,
        gold=context.gold(),
        prompts=[row["prompt"] for row in rows],
        sft_answers=None if known is None else [(row["completion"], row["ended"]) for row in read_jsonl(known)],
        **context.sampling,
    )
    write_jsonl(context.folder / "samples.jsonl", samples)
    if known is None:
        write_jsonl(context.folder / SFT_ANSWERS, [{"completion": text, "ended": ended} for text, ended in sft_answers])
    return facts


STAGES: dict[str, Callable[[StageContext], dict[str, Any]]] = {
    "lab": run_lab,
    "data": run_data,
    "base": run_base,
    "sft": run_sft,
    "vote": run_vote,
    "sample": run_sample,
    "select": run_select,
    "label": run_label,
    "reward": run_reward,
    "ppo": run_ppo,
    "evaluate": run_evaluate,
}


def show_samples(context: StageContext, model: Any, tokenizer: Any) -> None:
    """Write answers to held-out prompts beside the model."""
    set_seed(context.recipe.seed)
    model.eval()
    prompts = [row["prompt"] for row in read_jsonl(context.data / "test_prompts.jsonl")[:SHOWN_SAMPLES]]
    texts, ended = sample_texts(model, tokenizer, prompts, **context.sampling)
    gold = context.gold()
    values: Sequence[float | None] = (
        gold([plain(prompt) for prompt in prompts], texts) if gold else [None] * len(prompts)
    )
    rows = zip(prompts, texts, values, ended, strict=True)
    write_jsonl(
        context.folder / "samples.jsonl",
        [{"prompt": p, "completion": text, "gold": value, "ended": ended} for p, text, value, ended in rows],
    )


quiet_libraries()
