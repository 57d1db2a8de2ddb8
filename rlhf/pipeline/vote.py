"""The vote: members are trained one after the other, each kept when it is done, so that a killed vote goes on with the next."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed
from trl import RewardConfig

from rlhf.models.load import build_reward_model, load_tokenizer
from rlhf.models.text import plain
from rlhf.objectives.strength import VoteStrength, vote_strength
from rlhf.pipeline.training import split_settings, train, training_arguments
from rlhf.reward.model import RewardModel, position_limit
from rlhf.reward.noise import NoiseEstimate, estimate_noise
from rlhf.reward.trainer import PairRewardTrainer
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
    seed: int,
    say: Callable[[str], None],
) -> tuple[VoteStrength, NoiseEstimate]:
    """Train the members on canonical pairs and let them vote.

    Args:
        base: what every member starts from.
        settings: TRL's flat keys of a reward model.
        folder: for the members' work.

    Raises:
        UserError: the plan is impossible.
        TrainingError: a member diverged.
    """
    plan = plan_vote(rows, members=members, folds=folds, in_sample=in_sample, seed=seed)

    def member_differences(member: int, chosen: list[int]) -> Tensor:
        label = f"vote {member + 1}/{members}"
        return _differences(base, rows, chosen, settings, folder / f"member-{member}", label, seed, member, say)

    strength = vote_strength(collect_votes(plan, member_differences))
    return strength, estimate_noise(strength.mean, [plain(row["prompt"]) for row in rows])


def _differences(
    base: str | Path,
    rows: list[dict[str, Any]],
    chosen: list[int],
    settings: Mapping[str, Any],
    folder: Path,
    label: str,
    seed: int,
    member: int,
    say: Callable[[str], None],
) -> Tensor:
    """Reward differences [n] of one member on all pairs, trained on some of them; read from disk if it was done before."""
    file = folder / DIFFERENCES
    if file.is_file():
        return load_file(file)["differences"]
    folder.mkdir(parents=True, exist_ok=True)
    model_config, keys = split_settings(settings)
    keys.setdefault("num_train_epochs", 1)
    # Members differ in the order of their pairs and in the first weights of head and adapter.
    args = training_arguments(RewardConfig, keys, folder, seed * 1000 + member + 1)
    set_seed(args.seed)
    tokenizer = load_tokenizer(base, conversational=True)
    model = build_reward_model(base, model_config, pad_token_id=tokenizer.pad_token_id)
    if args.max_length is not None:
        args.max_length = min(args.max_length, position_limit(model, tokenizer))
    names = ("prompt", "chosen", "rejected")
    pairs = Dataset.from_list([{name: rows[i][name] for name in names} for i in chosen])
    trainer = PairRewardTrainer(model, args, train_dataset=pairs, processing_class=tokenizer)
    train(trainer, folder, label=label, say=say)
    reward = RewardModel(trainer.model.eval(), tokenizer, conversational=True)
    prompts = [row["prompt"] for row in rows]
    sides = [reward.score(prompts, [row[side][0]["content"] for row in rows]) for side in ("chosen", "rejected")]
    differences = sides[0] - sides[1]
    if trainer.is_world_process_zero() and torch.isfinite(differences).all():
        save_file({"differences": differences}, file.with_suffix(".tmp"))
        file.with_suffix(".tmp").replace(file)
    return differences
