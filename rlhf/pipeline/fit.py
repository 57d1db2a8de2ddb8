"""One reward model of a run: the rows that its objective counts, the model, and the trainer that fits it."""

import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset
from transformers import set_seed
from trl import RewardConfig

from rlhf.data.read import ReadReport, read_rows
from rlhf.data.rows import CRITIQUES, SIDES, Messages, Pair, answer, asked
from rlhf.files import read_jsonl, write_text
from rlhf.invariants.checks import CheckBook
from rlhf.models.heads import language_head
from rlhf.models.load import find_source, load_tokenizer
from rlhf.models.save import load_weights
from rlhf.models.score import position_limit
from rlhf.models.text import last_turn
from rlhf.models.thoughts import lost_thoughts
from rlhf.pipeline.callbacks import drop_torn_line
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.ends import refuse_unreadable_turns
from rlhf.pipeline.sampling import SAMPLES
from rlhf.pipeline.store import CHECKPOINTS, METRICS, free_checkpoints, is_whole, mark_checkpoint
from rlhf.pipeline.trainers import (
    StageAttributeRewardTrainer,
    StageBottleneckRewardTrainer,
    StageContrastiveRewardTrainer,
    StageCritiqueRewardTrainer,
    StageGatedRewardTrainer,
    StageLengthRewardTrainer,
    StageMetaRewardTrainer,
    StagePairRewardTrainer,
    StageRankingRewardTrainer,
    StageTextRewardTrainer,
)
from rlhf.pipeline.training import (
    check_nothing_lost,
    checks_of,
    evaluation_rows,
    save_trained,
    split_settings,
    train,
    training_arguments,
)
from rlhf.pipeline.vote import STRENGTH
from rlhf.recipe.objectives import OBJECTIVES, resolve
from rlhf.report.records import MANIFEST, read_record, without_repeated_steps
from rlhf.reward.bottleneck import CODE_LABELS
from rlhf.reward.critiques import ENDED
from rlhf.reward.denoise import DenoiseConfig, attach_strength, denoised
from rlhf.reward.length import HEADS
from rlhf.reward.meta import group_samples
from rlhf.reward.noise import NoiseEstimate
from rlhf.reward.rankings import ranking_rows
from rlhf.reward.trainer import training_columns
from rlhf.reward.weights import prompt_balanced

StageTrainer = (
    StagePairRewardTrainer
    | StageContrastiveRewardTrainer
    | StageTextRewardTrainer
    | StageLengthRewardTrainer
    | StageBottleneckRewardTrainer
    | StageCritiqueRewardTrainer
    | StageMetaRewardTrainer
    | StageRankingRewardTrainer
    | StageAttributeRewardTrainer
    | StageGatedRewardTrainer
)
OF_TRAINING = "training.json"  # beside a kept model: what its training left out, and its checks
# The labels of heads of which one score is made when training is over; those of ratings are the recipe's attributes.
LABELS: Mapping[str | None, Sequence[str]] = {"length": HEADS, "bottleneck": CODE_LABELS}


class TrainingRows(NamedTuple):
    """What a reward model is trained on: pairs, or rated answers where the objective needs them; and how many were flipped."""

    rows: list[Any]
    flipped: int | None = None


def training_rows(context: StageContext) -> TrainingRows:
    """Return the pairs, corrected by the vote where there is one; or the rated answers, where the objective needs them."""
    if context.recipe.reward.needs_ratings:
        return TrainingRows(read_jsonl(context.ratings))
    pairs: list[Pair] = read_jsonl(context.pairs)
    strength, noise = None, None
    vote = context.find_parent("vote")
    if vote is not None:
        strength = attach_strength(pairs, read_jsonl(vote / STRENGTH))
        manifest = read_record(vote / MANIFEST)
        assert manifest is not None, "a parent is done"
        noise = NoiseEstimate.read(manifest["facts"]["noise"])
    return TrainingRows(*denoised(pairs, DenoiseConfig(**context.recipe.reward.denoise_config()), strength, noise))


def fit_reward_model(
    context: StageContext,
    rows: Sequence[Any],
    folder: Path,
    label: str,
    seed: int,
    book: CheckBook,
    *,
    start: Path | None = None,
) -> StageTrainer:
    """Train one reward model on some rows; head, order and dropout follow the seed, and what is checked goes into the book.

    Args:
        start: the folder of a model of the same shape, on whose weights it goes on; None: it starts from SFT, with a new head.
    """
    recipe, section, sft = context.recipe, context.recipe.reward, context.sft_model
    objective = OBJECTIVES[section.objective]
    loss = objective.loss
    model_config, settings = split_settings(context.training_settings("reward"))
    settings.setdefault("num_train_epochs", 1)
    args = training_arguments(RewardConfig, settings, folder, seed)
    set_seed(seed)

    # 1. Tokenizer, model and the rows as the objective counts them.
    tokenizer = load_tokenizer(sft, conversational=True, revision=recipe.backbone.revision)
    conversations, answers = _conversations(rows)
    refuse_unreadable_turns(tokenizer, conversations, source="reward: pairs")
    for sentence in lost_thoughts(tokenizer, conversations, answers):
        context.say(f"reward: {sentence}")
    labels = list(section.attribute_weights) if section.needs_ratings else LABELS.get(section.extra_kind)
    head = {} if labels is None else {"labels": labels}
    model = resolve(loss.head)(sft, model_config, pad_token_id=tokenizer.pad_token_id, **head)
    check_nothing_lost(context, sft, model, book)
    if args.max_length is not None:
        args.max_length = min(args.max_length, position_limit(model, tokenizer))

    # 2. The trainer.
    arguments: dict[str, Any] = {
        "train_dataset": Dataset.from_list(_elements(context, rows, label)),
        "eval_dataset": evaluation_rows(context.test_pairs, args, recipe.evaluate.prompts),
        "processing_class": tokenizer,
        "loss": loss,
    }
    trainer: StageTrainer
    if loss.elements == "rankings":
        trainer = StageRankingRewardTrainer(model, args, **arguments)
    elif objective.needs.pairs:
        arguments |= {"pairs": read_jsonl(context.pairs), "weights": section.attribute_weights}
        trainer = StageGatedRewardTrainer(model, args, **arguments)
    elif loss.elements == "ratings":
        trainer = StageAttributeRewardTrainer(model, args, weights=section.attribute_weights, **arguments)
    elif section.meta:
        arguments |= {"flip_rate": section.flip_rate, "meta_samples": _meta_samples(context, label)}
        trainer = StageMetaRewardTrainer(model, args, **section.ascent(), **section.contrast(), **arguments)
    else:
        arguments |= {"flip_rate": section.flip_rate}
        weight = {"extra_weight": section.extra_weight}
        match section.extra_kind:
            case None:
                trainer = StagePairRewardTrainer(model, args, **arguments)
            case "contrastive":
                trainer = StageContrastiveRewardTrainer(model, args, **section.contrast(), **arguments)
            case "text":
                texts = language_head(sft, model_config)
                trainer = StageTextRewardTrainer(model, args, language_head=texts, **weight, **arguments)
            case "length":
                trainer = StageLengthRewardTrainer(model, args, **weight, **arguments)
            case "critique":
                # An adapter is saved without an output layer, so whoever loads it finds that of its base.
                texts = language_head(find_source(sft).base if model_config.use_peft else sft, model_config)
                trainer = StageCritiqueRewardTrainer(model, args, language_head=texts, **weight, **arguments)
            case _:
                trainer = StageBottleneckRewardTrainer(model, args, **weight, **arguments)

    # 3. Training; of several labels one score is made.
    if start is not None:
        load_weights(trainer.model, start)
    train(trainer, folder, label=label, say=context.say)
    trainer.merge_head()
    if isinstance(trainer, StageGatedRewardTrainer) and trainer.fitted is not None and context.is_main:
        context.say(f"{label}: {trainer.fitted.sentence()}.")
    book.merge(checks_of(trainer))
    return trainer


def fit_and_keep(
    context: StageContext,
    rows: Sequence[Any],
    name: str,
    label: str,
    seed: int,
    book: CheckBook,
    *,
    tag: Mapping[str, str] | None = None,
) -> int:
    """Train one of several models of a stage and keep it among the checkpoints; a whole one that lies there is not trained again.

    Args:
        name: of its folder there; the model lies in `kept_model(context, name)`.
        tag: what its rows in the stage's metrics have beside; None: its metrics stay with it.

    Returns:
        how many pairs were too long.
    """
    kept = kept_model(context, name)
    folder, beside = kept.parent, kept.parent / "unfinished"
    if is_whole(kept):
        context.say(f"reward: {label} was trained before")
        file = kept / OF_TRAINING
        # None is there where an earlier version trained it, which is no reason to train it again.
        known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        book.merge(known.get("checks", {}))
        dropped: int = known.get("dropped_too_long", 0)
        return dropped
    folder.mkdir(parents=True, exist_ok=True)
    made = CheckBook()
    trainer = fit_reward_model(context, rows, folder, label, seed, made)
    book.merge(made.entries)
    if context.is_main:
        shutil.rmtree(beside, ignore_errors=True)
    if save_trained(trainer, beside):
        if tag is not None:
            _append_metrics(context.folder / METRICS, folder / METRICS, tag)
        facts = {"dropped_too_long": trainer.dropped_too_long, "checks": made.entries}
        write_text(beside / OF_TRAINING, json.dumps(facts))
        mark_checkpoint(beside)
        shutil.rmtree(kept, ignore_errors=True)
        beside.replace(kept)
        free_checkpoints(folder)
    return trainer.dropped_too_long


def kept_model(context: StageContext, name: str) -> Path:
    """Return where `fit_and_keep` keeps a model."""
    return context.folder / CHECKPOINTS / name / "model"


def _append_metrics(metrics: Path, of_one: Path, tag: Mapping[str, str]) -> None:
    """Append the metrics of one of several models to those of the stage, its steps counted on from the last one there."""
    if not of_one.is_file():  # training may end before it logs
        return
    drop_torn_line(metrics)
    earlier = read_jsonl(metrics) if metrics.is_file() else []
    before = earlier[-1]["step"] if earlier else 0
    rows = [row for row in without_repeated_steps(read_jsonl(of_one)) if "step" in row]
    with metrics.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**row, "step": row["step"] + before, **tag}) + "\n" for row in rows)


def trained_on(trainer: StageTrainer) -> dict[str, int]:
    """Return how many rows a model was trained on; of rankings, also how many pairs they hold."""
    dataset, elements = trainer.train_dataset, str(trainer.loss.elements)
    pairs = {"pairs": sum(map(len, dataset["beats"]))} if elements == "rankings" else {}
    return {elements: len(dataset), **pairs}


def _conversations(rows: Sequence[Any]) -> tuple[list[Messages], list[str]]:
    """Return the conversations that are answered, and the answers: one for each side of a pair, or a rated answer."""
    both = [
        [(asked(row, side), answer(row, side)) for side in SIDES]
        if "chosen" in row
        else [(row["prompt"], last_turn(row["completion"]))]
        for row in rows
    ]
    pairs = [pair for of_row in both for pair in of_row]
    return [conversation for conversation, _ in pairs], [text for _, text in pairs]


def _elements(context: StageContext, rows: Sequence[Any], label: str) -> list[Any]:
    """Return rows as the objective counts them: pairs, rankings or rated answers; say how many answers the rankings have."""
    section = context.recipe.reward
    loss = OBJECTIVES[section.objective].loss
    if loss.elements == "ratings":
        return [{name: row[name] for name in ("prompt", "completion", "attributes")} for row in rows]
    if loss.elements == "pairs":
        pairs = training_columns(prompt_balanced(rows) if section.group_weight == "prompt" else rows, loss.columns)
        written = (*CRITIQUES, *ENDED) if section.extra_kind == "critique" else ()
        return [
            {**pair, **{name: row[name] for name in written if name in row}}
            for pair, row in zip(pairs, rows, strict=True)
        ]
    rankings = ranking_rows(rows, objective=section.objective)
    counts = Counter(len(ranking["responses"]) for ranking in rankings)
    if context.is_main:
        sizes = ", ".join(f"{count} of {answers}" for answers, count in sorted(counts.items()))
        context.say(f"{label}: {len(rows)} pairs make {len(rankings)} rankings, by their answers: {sizes}.")
        if set(counts) == {2}:
            context.say(f"{label}: a ranking of two answers is a pair, so this is Bradley-Terry.")
    return rankings


def _meta_samples(context: StageContext, label: str) -> list[Any]:
    """Return the answers that MetaRM ascends on, by prompt; say which prompts were left out."""
    samples, dropped = group_samples(_meta_rows(context))
    if dropped and context.is_main:
        left_out = ", ".join(f"{count} with {reason}" for reason, count in dropped.items())
        context.say(f"{label}: left out of {len(samples) + sum(dropped.values())} meta prompts: {left_out}.")
    return samples


def _meta_rows(context: StageContext) -> Sequence[Mapping[str, object]]:
    """Read answers of the latest policy: sampled by this run, or those of an earlier one that the recipe names."""
    file = context.recipe.reward.meta_samples
    if file is not None:
        return [row for _, row in read_rows(file, ReadReport(file))]
    rows: list[dict[str, object]] = read_jsonl(context.parent("sample") / SAMPLES)
    return rows
