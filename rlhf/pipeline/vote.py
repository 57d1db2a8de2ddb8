"""The vote: members are trained one after the other, each kept when it is done, so that a killed vote goes on with the next."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed
from trl import ModelConfig, RewardConfig

from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.text import encode_answers, plain
from rlhf.objectives.pairwise import pair_loss
from rlhf.objectives.strength import VoteStrength, vote_strength
from rlhf.pipeline.training import split_settings, train, training_arguments
from rlhf.recipe.objectives import PAIR_COLUMNS
from rlhf.reward.frozen_trunk import Features, Trunk
from rlhf.reward.model import RewardModel, position_limit
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from rlhf.reward.trainer import PairRewardTrainer, training_columns
from rlhf.reward.vote import collect_votes, plan_vote

DIFFERENCES = "differences.safetensors"


def vote(
    base: str | Path,
    rows: list[dict[str, Any]],
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
) -> tuple[VoteStrength, NoiseEstimate]:
    """Train the members on canonical pairs and let them vote.

    Args:
        base: what every member starts from.
        settings: TRL's flat keys of a reward model.
        folder: for the members' work.
        flip_rate: share of wrong labels in the members' likelihood; 0 is Bradley-Terry.
        trunk: layers that each member has of its own above a shared frozen trunk; None for independent members.

    Raises:
        UserError: the plan is impossible.
        TrainingError: a member diverged.
    """
    prompts = [row["prompt"] for row in rows]
    plan = plan_vote(prompts, members=members, folds=folds, in_sample=in_sample, seed=seed)

    shared = None if trunk is None else _shared_trunk(base, rows, settings, folder, trunk)
    trained = training_columns(rows)
    columns = {name: torch.tensor([row[name] for row in trained]) for name in PAIR_COLUMNS if name in trained[0]}

    def objective(rewards_chosen: Tensor, rewards_rejected: Tensor, pairs: list[int]) -> Tensor:
        of_these = {name: column[pairs].to(rewards_chosen.device) for name, column in columns.items()}
        return pair_loss(rewards_chosen, rewards_rejected, flip_rate=flip_rate, **of_these)

    def member_differences(member: int, chosen: list[int], judged: list[int]) -> Tensor:
        where, label = folder / f"member-{member}", f"vote {member + 1}/{members}"
        file = where / DIFFERENCES
        if file.is_file():
            return load_file(file)["differences"]
        where.mkdir(parents=True, exist_ok=True)
        # Members differ in the order of their pairs and in the first weights of head and adapter.
        member_seed = seed * 1000 + member + 1
        if shared is None:
            found = _independent(base, rows, chosen, judged, settings, flip_rate, where, label, member_seed, say)
        else:
            args = _arguments(settings, where, member_seed)[1]
            set_seed(member_seed)
            own = shared[0].member()
            own.train(shared[1], chosen, args, objective=objective, label=label)
            found = own.differences(shared[1], judged)
        if int(os.environ.get("RANK", "0")) == 0 and torch.isfinite(found).all():
            save_file({"differences": found}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)
        return found

    strength = vote_strength(collect_votes(plan, member_differences))
    return strength, estimate_noise(strength.mean, [plain(row["prompt"]) for row in rows])


def _arguments(settings: Mapping[str, Any], folder: Path, seed: int) -> tuple[ModelConfig, RewardConfig]:
    model_config, keys = split_settings(settings)
    keys.setdefault("num_train_epochs", 1)
    return model_config, training_arguments(RewardConfig, keys, folder, seed)


def _shared_trunk(
    base: str | Path, rows: list[dict[str, Any]], settings: Mapping[str, Any], folder: Path, top_layers: int
) -> tuple[Trunk, Features]:
    """The trunk and its output on both answers of every pair, checked against the whole model."""
    folder.mkdir(parents=True, exist_ok=True)
    _, args = _arguments(settings, folder, 0)
    set_seed(0)
    tokenizer = load_tokenizer(base, conversational=True, revision=settings.get("model_revision"))
    assert isinstance(tokenizer.pad_token_id, int)
    model_config, _ = _arguments({"model_revision": settings.get("model_revision", "main")}, folder, 0)
    model = build_reward_model(base, model_config, pad_token_id=tokenizer.pad_token_id)
    shared = Trunk(model.to(args.device), top_layers=top_layers)
    longest = min(args.max_length or position_limit(model, tokenizer), position_limit(model, tokenizer))
    prompts = [row["prompt"] for row in rows]
    answers = ([row[side][0]["content"] for row in rows] for side in ("chosen", "rejected"))
    sides = [encode_answers(tokenizer, prompts, texts, max_length=longest)[0] for texts in answers]
    features = shared.features(list(zip(*sides, strict=True)), folder, pad_token_id=tokenizer.pad_token_id)
    shared.check(features)
    return shared, features


def _independent(
    base: str | Path,
    rows: list[dict[str, Any]],
    chosen: list[int],
    judged: list[int],
    settings: Mapping[str, Any],
    flip_rate: float,
    folder: Path,
    label: str,
    seed: int,
    say: Callable[[str], None],
) -> Tensor:
    """Reward differences on some pairs of a reward model of its own that was trained on others."""
    model_config, args = _arguments(settings, folder, seed)
    set_seed(seed)
    tokenizer = load_tokenizer(base, conversational=True, revision=settings.get("model_revision"))
    model = build_reward_model(base, model_config, pad_token_id=tokenizer.pad_token_id)
    if args.max_length is not None:
        args.max_length = min(args.max_length, position_limit(model, tokenizer))
    pairs = Dataset.from_list(training_columns([rows[i] for i in chosen]))
    trainer = PairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer, flip_rate=flip_rate)
    train(trainer, folder, label=label, say=say)
    reward = RewardModel(trainer.model.eval(), tokenizer, conversational=True)
    prompts = [rows[i]["prompt"] for i in judged]
    sides = [reward.score(prompts, [rows[i][side][0]["content"] for i in judged]) for side in ("chosen", "rejected")]
    return sides[0] - sides[1]
