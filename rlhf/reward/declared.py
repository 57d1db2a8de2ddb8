"""Declarations of `PairRewardTrainer`: an objective by name, the columns that it needs, nothing else."""

from typing import Any, ClassVar

import torch
from datasets import Dataset
from torch import Tensor

from rlhf.objectives.strength import VoteStrength
from rlhf.reward.denoise import DenoiseConfig, denoised
from rlhf.reward.noise import NoiseEstimate
from rlhf.reward.trainer import PairRewardTrainer, check_columns


class MarginRewardTrainer(PairRewardTrainer):
    """Bradley-Terry with a required `margin` column in nats (Llama 2, arXiv:2307.09288 eq. 2)."""

    columns = ("margin",)


class SoftLabelRewardTrainer(PairRewardTrainer):
    """Cross-entropy against a required `confidence` column, P(chosen is better)."""

    columns = ("confidence",)


class LabelSmoothingRewardTrainer(PairRewardTrainer):
    """Constant label smoothing: p = 1 - α on every pair (arXiv:2401.06080 eq. 5; α = 0.2 is inferred from its figures)."""

    uses = ("margin", "weight")
    smoothing: ClassVar[float] = 0.2

    def pair_objective(self, rewards_chosen: Tensor, rewards_rejected: Tensor, columns: dict[str, Tensor]) -> Tensor:
        """The general loss with one confidence for all pairs."""
        return super().pair_objective(
            rewards_chosen, rewards_rejected, {**columns, "confidence": torch.tensor(1 - self.smoothing)}
        )


class _VotedRewardTrainer(PairRewardTrainer):
    """Corrects the training pairs by their column `strength_mean` before training."""

    columns = ("strength_mean",)
    correction: ClassVar[DenoiseConfig]

    def __init__(self, model: Any, args: Any = None, *, train_dataset: Dataset, **arguments: Any):
        check_columns(train_dataset, self.columns)
        rows = train_dataset.to_list()
        mean = torch.tensor([float(row["strength_mean"]) for row in rows])
        votes = VoteStrength(mean, torch.zeros_like(mean), (mean > 0).to(mean), torch.ones_like(mean))
        made, _ = denoised(rows, self.correction, votes, NoiseEstimate(0.0, 0.0, 0.0, 0.0, 1.0))
        super().__init__(model, args, train_dataset=Dataset.from_list(made), **arguments)


class AdaptiveMarginRewardTrainer(_VotedRewardTrainer):
    """Mean strength of a vote (`strength_mean`, nats) as margin (arXiv:2401.06080 eq. 6)."""

    correction = DenoiseConfig("adaptive_margin")


class LabelFlipRewardTrainer(_VotedRewardTrainer):
    """The weakest tenth of the labels by `strength_mean` turned round (arXiv:2401.06080 section 2.4)."""

    correction = DenoiseConfig("flip")
