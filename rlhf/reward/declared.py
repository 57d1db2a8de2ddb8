"""Declarations of `PairRewardTrainer`: an objective of the table by its name, and nothing else."""

from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.data.conversations import conversation_keys
from rlhf.errors import UserError
from rlhf.objectives.strength import STRENGTH_COLUMNS, VoteStrength
from rlhf.recipe.objectives import OBJECTIVES, Needs
from rlhf.reward.columns import check_columns
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.noise import NoiseEstimate, decided_rows, estimate_noise
from rlhf.reward.trainer import PairRewardTrainer, training_columns

NUMBERS = [field.name for field in fields(DenoiseConfig) if field.name != "objective"]


class DeclaredRewardTrainer(PairRewardTrainer):
    """`PairRewardTrainer` on the pairs that an objective makes of those it is given; a subclass names the objective.

    The numbers of `rlhf.reward.denoise.DenoiseConfig` (`smoothing`, `margin_scale`, …) are keyword arguments. Evaluation
    data is changed too where the objective needs nothing of it, and left as it is otherwise.

    Raises:
        UserError: a column that the objective needs is missing.
    """

    objective: str

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None = None,
        **arguments: Any,
    ):
        config = DenoiseConfig(self.objective, **{name: arguments.pop(name) for name in NUMBERS if name in arguments})
        objective = OBJECTIVES[self.objective]
        if train_dataset is not None:
            train_dataset = self.denoise(train_dataset, config)
        if eval_dataset is not None and objective.needs == Needs():
            if isinstance(eval_dataset, dict):
                eval_dataset = {name: self.denoise(dataset, config) for name, dataset in eval_dataset.items()}
            else:
                eval_dataset = self.denoise(eval_dataset, config)
        super().__init__(
            model, args, train_dataset=train_dataset, eval_dataset=eval_dataset, loss=objective.loss, **arguments
        )

    def denoise(self, dataset: Dataset | IterableDataset, config: DenoiseConfig) -> Dataset | IterableDataset:
        """Return the pairs as the objective trains on them."""
        needs, names = OBJECTIVES[config.objective].needs, dataset.column_names
        if needs.column is not None and names and not (needs.or_rating_gap and "rating_gap" in names):
            check_columns(dataset, (needs.column,))
            has_ties = needs.column == "margin" and "confidence" in names  # which have no margin
            if config == DenoiseConfig(config.objective) and not has_ties:
                return dataset
        size = {"batch_size": None} if isinstance(dataset, Dataset) else {}  # all at once: an error counts all rows
        return dataset.map(_denoise_batch, batched=True, fn_kwargs={"config": config}, **size)


def _denoise_batch(batch: dict[str, list[Any]], config: DenoiseConfig) -> dict[str, list[Any]]:
    rows: list[Any] = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
    pairs: list[Any] = denoised(rows, config).rows
    return {name: [pair[name] for pair in pairs] for name in pairs[0]}


class MarginRewardTrainer(DeclaredRewardTrainer):
    """Bradley-Terry with a required `margin` column in nats, or ratings to make it of (Llama 2, arXiv:2307.09288 eq. 2)."""

    objective = "margin"


class SoftLabelRewardTrainer(DeclaredRewardTrainer):
    """Cross-entropy against a required `confidence` column, P(chosen is better)."""

    objective = "soft"


class LabelSmoothingRewardTrainer(DeclaredRewardTrainer):
    """Constant label smoothing: p = 1 - α on all pairs but ties (arXiv:2401.06080 eq. 5; α = 0.2 is inferred from its figures)."""

    objective = "smoothing"


class VotedRewardTrainer(DeclaredRewardTrainer):
    """Denoises the training pairs by a vote on them, with any objective of the table that needs one.

    The dataset has the vote's columns `strength_mean` (nats), `strength_std`, `strength_share` and `strength_votes`, as
    `strength.jsonl` of a run's stage `vote` gives them, pair by pair (`rlhf.reward.denoise.attach_strength` finds them).

    Args:
        objective: its name in `rlhf.OBJECTIVES`.
        noise: what the votes prove about the labels; estimated from the votes, prompt by prompt, where it is not given.

    Raises:
        UserError: a column of the vote is missing; the objective needs no vote; the data is a stream.
    """

    objective = "posterior"

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        objective: str | None = None,
        noise: NoiseEstimate | None = None,
        **arguments: Any,
    ):
        voted = [name for name, row in OBJECTIVES.items() if row.needs.vote]
        if objective is not None and objective not in voted:
            raise UserError(f"reward: objective {objective!r} is none that needs a vote: {', '.join(voted)}.")
        self.objective = objective or self.objective
        self.noise = noise
        super().__init__(model, args, **arguments)

    def denoise(self, dataset: Dataset | IterableDataset, config: DenoiseConfig) -> Dataset:
        """Return the pairs as the objective trains on them."""
        if not isinstance(dataset, Dataset):
            raise UserError(
                "reward: a vote is on all pairs at once, so they can't be a stream; pass a datasets.Dataset."
            )
        prompts = () if self.noise is not None or "prompt" in dataset.column_names else ("prompt",)
        check_columns(dataset, (*STRENGTH_COLUMNS, *prompts))
        rows = dataset.to_list()
        strength = VoteStrength(*(torch.tensor([float(row[name]) for row in rows]) for name in STRENGTH_COLUMNS))
        if self.noise is None:
            decided = decided_rows(rows)
            clusters = conversation_keys([rows[i]["prompt"] for i in decided])
            self.noise = estimate_noise(strength.mean[decided], clusters)
        pairs = denoised(rows, config, strength, self.noise).rows
        return Dataset.from_list(training_columns(pairs, OBJECTIVES[config.objective].loss.columns))


class AdaptiveMarginRewardTrainer(VotedRewardTrainer):
    """Mean strength of a vote as margin (arXiv:2401.06080 eq. 6)."""

    objective = "adaptive_margin"


class LabelFlipRewardTrainer(VotedRewardTrainer):
    """The weakest tenth of the labels by a vote flipped (arXiv:2401.06080 section 2.4)."""

    objective = "flip"
