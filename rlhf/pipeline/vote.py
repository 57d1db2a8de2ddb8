"""The vote: members are trained one after the other, each kept when it is done, so that a killed vote goes on with the next."""

import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed
from trl import ModelConfig, RewardConfig

from rlhf.data.conversations import conversation_keys
from rlhf.data.rows import SIDES, Pair, answer, asked, has_ended, label_digest
from rlhf.files import read_jsonl, write_jsonl
from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.score import position_limit
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import encode_answers
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.strength import VoteStrength, vote_strength
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.ends import refuse_unreadable_turns
from rlhf.pipeline.precision import in_float32
from rlhf.pipeline.store import CHECKPOINTS, free_checkpoints, read_seconds, write_seconds
from rlhf.pipeline.trainers import StagePairRewardTrainer
from rlhf.pipeline.training import split_settings, train, training_arguments
from rlhf.pipeline.true_reward import gold_differences, load_true_reward
from rlhf.recipe.objectives import PAIR_COLUMNS, Loss
from rlhf.report.noise import taken_to_be_wrong, wrong_labels
from rlhf.reward.annotators import posterior_by_annotator
from rlhf.reward.frozen_trunk import Features, Trunk
from rlhf.reward.meter import Measured, measure_parts
from rlhf.reward.model import RewardModel
from rlhf.reward.noise import NoiseEstimate, decided_rows, estimate_noise
from rlhf.reward.sides import side_scores
from rlhf.reward.trainer import training_columns
from rlhf.reward.vote import Train, collect_votes, plan_vote
from rlhf.statistics import auroc

STRENGTH = "strength.jsonl"
DIFFERENCES = "differences.safetensors"
MEMBER_LOSS = Loss(columns={**PAIR_COLUMNS, "flip_rate": 0.0})
IN_SAMPLE = "They were trained on these labels and agree with them, so this says nothing of how many are wrong."


def run_vote(context: StageContext) -> dict[str, Any]:
    """Write the preference strength of every training pair, and the share of wrong labels that the votes imply."""
    recipe = context.recipe
    rows: list[Pair] = read_jsonl(context.pairs)
    shape = recipe.vote.shape()
    strength, noise, _ = vote(
        context.sft_model,
        rows,
        context.training_settings("vote"),
        context.folder / CHECKPOINTS,
        seed=recipe.seed,
        say=context.say,
        **shape,
    )
    if not context.is_main:
        return {}
    names = ("strength_mean", "strength_std", "strength_share", "strength_votes")
    columns = zip(*(column.tolist() for column in strength), strict=True)
    votes = [
        {"pair": label_digest(row), **dict(zip(names, v, strict=True))} for row, v in zip(rows, columns, strict=True)
    ]
    write_jsonl(context.folder / STRENGTH, votes)
    contradicted = (strength.mean < 0).float().mean()
    estimate = asdict(noise)
    sentences = IN_SAMPLE
    if not shape["in_sample"]:
        one_rate = posterior_by_annotator(rows, strength.mean, noise) is None
        taken = taken_to_be_wrong(estimate, recipe.reward.objective) if one_rate else []
        sentences = " ".join([*wrong_labels(estimate), *taken])
    context.say(f"vote: {shape['members']} members contradict {contradicted:.1%} of the labels. {sentences}")
    gold = gold_differences(rows, load_true_reward(recipe))
    area = None
    if gold is not None:
        wrong = [difference < 0 for difference in gold]
        area = auroc((-strength.mean).tolist(), wrong) if any(wrong) and not all(wrong) else None
    return {"pairs": len(rows), "noise": estimate, "auroc_of_wrong_labels": area, **shape}


@dataclass(frozen=True)
class VoteSetup:
    """What the members of a vote have in common.

    Attributes:
        base: what every member starts from.
        rows: the pairs, canonical; members are told by index which of them are theirs.
        settings: TRL's flat keys of a reward model.
        flip_rate: share of wrong labels in the members' likelihood; 0 is Bradley-Terry.
        wrong: [n] P(label is wrong) of each row, in place of `flip_rate`; None where nothing is known of single labels.
        say: tell the person at the terminal.
    """

    base: str | Path
    rows: Sequence[Pair]
    settings: Mapping[str, Any]
    flip_rate: float
    wrong: Sequence[float] | None
    say: Callable[[str], None]

    def training_rows(self) -> list[dict[str, Any]]:
        """Return the pairs with the columns that the members' loss reads.

        A margin m of a label that is wrong with probability ε becomes |1 - 2ε| m: it is that of the likelier order, by the loss.
        Where ε is known of single labels, their own `confidence` is not read: it would count doubt twice, and silence verdicts.
        """
        rows: list[dict[str, Any]] = training_columns(self.rows)
        if self.wrong is None:
            return rows
        rows = [{**row, "confidence": 1.0, "flip_rate": rate} for row, rate in zip(rows, self.wrong, strict=True)]
        return [
            row | {"margin": abs(1 - 2 * row["flip_rate"]) * row["margin"]} if "margin" in row else row for row in rows
        ]

    def arguments(self, folder: Path, seed: int) -> tuple[ModelConfig, RewardConfig]:
        """Return the model's settings and the trainer's, one epoch unless the keys say otherwise."""
        model_config, keys = split_settings(self.settings)
        keys.setdefault("num_train_epochs", 1)
        return model_config, training_arguments(RewardConfig, keys, folder, seed)


class Voted(NamedTuple):
    """What a vote says.

    Attributes:
        strength: of each pair, in the order of the rows.
        noise: how many labels are wrong; of votes in sample, which can't say it, 0 and a scale of 0.
        parts: what members trained on parts of the labels say, where that was asked for.
    """

    strength: VoteStrength
    noise: NoiseEstimate
    parts: Measured | None


def vote(
    base: str | Path,
    rows: Sequence[Pair],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    members: int,
    folds: int,
    in_sample: bool,
    trunk: int | None,
    flip_rate: float,
    seed: int,
    say: Callable[[str], None],
    on_parts: bool = False,
) -> Voted:
    """Train the members on canonical pairs and let them vote.

    Args:
        base: what every member starts from.
        settings: TRL's flat keys of a reward model.
        folder: for the members' work.
        flip_rate: share of wrong labels in the members' likelihood; 0 is Bradley-Terry.
        trunk: layers that each member has of its own above a shared frozen trunk; None for independent members.
        on_parts: also train members on parts of the labels, for the meter (`rlhf.reward.meter`).

    Raises:
        UserError: the plan is impossible.
        TrainingError: a member diverged.
    """
    prompts = [row["prompt"] for row in rows]
    plan = plan_vote(prompts, members=members, folds=folds, in_sample=in_sample, seed=seed)
    setup = VoteSetup(base, rows, settings if trunk is None else in_float32(settings), flip_rate, None, say)
    member_differences = _members(setup, folder, members=members, trunk=trunk, seed=seed)
    votes = collect_votes(plan, member_differences)
    parts = measure_parts(plan, prompts, votes, member_differences) if on_parts else None
    strength, decided = vote_strength(votes), decided_rows(rows)
    if in_sample:
        return Voted(strength, NoiseEstimate(0.0, 0.0, 0.0, 0.0, 0.5), parts)
    noise = estimate_noise(strength.mean[decided], conversation_keys([rows[i]["prompt"] for i in decided]))
    return Voted(strength, noise, parts)


def vote_again(
    base: str | Path,
    rows: Sequence[Pair],
    settings: Mapping[str, Any],
    folder: Path,
    *,
    wrong: Sequence[float],
    members: int,
    folds: int,
    trunk: int | None,
    seed: int,
    say: Callable[[str], None],
) -> Tensor:
    """Vote with members that learn from what is known of each label beside votes, and return the mean strengths, [n] nats.

    They have the likelihood of a label that is wrong with its own probability. Folds are those of `vote`, so that whatever is
    known of a pair, a member that votes on it has not learnt from it.

    Args:
        wrong: [n] P(label is wrong), without any vote; 1/2 teaches nothing.
        base, rows, settings, members, folds, trunk: as in `vote`.
        folder: another one than that of the first vote.

    Raises:
        TrainingError: a member diverged.
    """
    prompts = [row["prompt"] for row in rows]
    plan = plan_vote(prompts, members=members, folds=folds, in_sample=False, seed=seed)
    setup = VoteSetup(base, rows, settings if trunk is None else in_float32(settings), 0.0, wrong, say)
    return vote_strength(collect_votes(plan, _members(setup, folder, members=members, trunk=trunk, seed=seed))).mean


def _members(setup: VoteSetup, folder: Path, *, members: int, trunk: int | None, seed: int) -> Train:
    """Return the function that trains a member on some pairs and lets it judge others, or reads what it said before."""
    shared = None if trunk is None else _shared_trunk(setup, folder, trunk)

    def member_differences(member: int, trained: list[int], judged: list[int]) -> Tensor:
        label = f"vote {member + 1}/{members}" if member < members else f"meter {member - members + 1}"
        place = folder / f"member-{member}"
        file = place / DIFFERENCES
        kept = _kept_differences(file)
        if kept is not None:
            return kept
        place.mkdir(parents=True, exist_ok=True)
        begin = time.monotonic() - read_seconds(place / CHECKPOINTS)
        # Members differ in the order of their pairs and in the first weights of head and adapter.
        member_seed = seed * 1000 + member + 1
        if shared is None:
            differences = _independent(setup, trained, judged, place, label=label, seed=member_seed)
        else:
            differences = _on_trunk(setup, shared, trained, judged, place, label=label, seed=member_seed)
        if int(os.environ.get("RANK", "0")) == 0 and torch.isfinite(differences).all():
            save_file({"differences": differences}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
            (place / CHECKPOINTS).mkdir(exist_ok=True)
            write_seconds(place / CHECKPOINTS, time.monotonic() - begin)
            free_checkpoints(place)
        return differences

    return member_differences


def _kept_differences(file: Path) -> Tensor | None:
    """Return the votes of a member that was trained before; None where there are none, or the file is damaged."""
    try:
        return load_file(file)["differences"]
    except (OSError, SafetensorError, KeyError):
        return None


class SharedTrunk(NamedTuple):
    """What members on a shared trunk have in common.

    Attributes:
        trunk: the lower layers, frozen.
        features: their output on both answers of every pair.
        columns: of the pair loss, a value for every pair.
    """

    trunk: Trunk
    features: Features
    columns: dict[str, Tensor]


def _shared_trunk(setup: VoteSetup, folder: Path, top_layers: int) -> SharedTrunk:
    """Build the trunk and its output, checked against the whole model."""
    folder.mkdir(parents=True, exist_ok=True)
    _, args = setup.arguments(folder, 0)
    set_seed(0)
    revision = setup.settings.get("model_revision")
    tokenizer = load_tokenizer(setup.base, conversational=True, revision=revision)
    refuse_unreadable_turns(tokenizer, [asked(row, side) for row in setup.rows for side in SIDES], source="vote: pairs")
    end_at_end_token(tokenizer)
    assert isinstance(tokenizer.pad_token_id, int)
    model_config, _ = split_settings({"model_revision": revision or "main"})
    model = build_reward_model(setup.base, model_config, pad_token_id=tokenizer.pad_token_id)
    trunk = Trunk(model.to(args.device), top_layers=top_layers)
    longest = min(args.max_length or position_limit(model, tokenizer), position_limit(model, tokenizer))
    (chosen, cut_chosen), (rejected, cut_rejected) = (
        encode_answers(
            tokenizer,
            [asked(row, side) for row in setup.rows],
            [answer(row, side) for row in setup.rows],
            ended=[has_ended(row[side]) for row in setup.rows],
            max_length=longest,
        )
        for side in SIDES
    )
    _say_cut(setup, cut_chosen + cut_rejected, longest)
    features = trunk.features(list(zip(chosen, rejected, strict=True)), folder, pad_token_id=tokenizer.pad_token_id)
    trunk.check(features)
    rows = setup.training_rows()
    columns = {name: torch.tensor([row[name] for row in rows]) for name in MEMBER_LOSS.columns if name in rows[0]}
    return SharedTrunk(trunk, features, columns)


def _say_cut(setup: VoteSetup, cut: int, longest: int) -> None:
    """Say how many answers are longer than what voters read: they are learnt from and voted on by what is left."""
    if cut:
        setup.say(
            f"vote: {cut} of {2 * len(setup.rows)} answers, with their prompts, are longer than the {longest} tokens that voters "
            "read: of these only the end is read, so votes on their pairs say less. Take a model that reads more, or raise "
            "reward.max_length."
        )


def _on_trunk(
    setup: VoteSetup,
    shared: SharedTrunk,
    trained: list[int],
    judged: list[int],
    folder: Path,
    *,
    label: str,
    seed: int,
) -> Tensor:
    """Train a member on the shared trunk on some pairs, and return its reward differences on others."""

    def objective(rewards_chosen: Tensor, rewards_rejected: Tensor, pairs: list[int]) -> Tensor:
        columns = {name: column[pairs].to(rewards_chosen.device) for name, column in shared.columns.items()}
        numbers: dict[str, Any] = {"flip_rate": setup.flip_rate}
        return pair_loss(rewards_chosen, rewards_rejected, **(numbers | columns))

    _, args = setup.arguments(folder, seed)
    set_seed(seed)
    member = shared.trunk.member()
    member.train(shared.features, trained, args, objective=objective, label=label)
    return member.differences(shared.features, judged)


def _independent(
    setup: VoteSetup, trained: list[int], judged: list[int], folder: Path, *, label: str, seed: int
) -> Tensor:
    """Train a reward model of its own on some pairs, and return its reward differences on others."""
    model_config, args = setup.arguments(folder, seed)
    set_seed(seed)
    tokenizer = load_tokenizer(setup.base, conversational=True, revision=setup.settings.get("model_revision"))
    refuse_unreadable_turns(tokenizer, [asked(row, side) for row in setup.rows for side in SIDES], source="vote: pairs")
    model = build_reward_model(setup.base, model_config, pad_token_id=tokenizer.pad_token_id)
    if args.max_length is not None:
        args.max_length = min(args.max_length, position_limit(model, tokenizer))
    training_rows = setup.training_rows()
    trainer = StagePairRewardTrainer(
        model,
        args,
        train_dataset=Dataset.from_list([training_rows[i] for i in trained]),
        processing_class=tokenizer,
        loss=MEMBER_LOSS,
        flip_rate=setup.flip_rate,
    )
    train(trainer, folder, label=label, say=setup.say)
    reward = RewardModel(trainer.model.eval(), tokenizer, conversational=True)
    rows = [setup.rows[i] for i in judged]
    return side_scores(reward, rows, "chosen") - side_scores(reward, rows, "rejected")
