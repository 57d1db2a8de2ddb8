"""`BottleneckRewardTrainer`: InfoRM (arXiv:2402.09345), a reward read from a noisy code of the answer."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.models.heads import label_layer
from rlhf.objectives.bottleneck import kl_to_standard_normal, noisy_code
from rlhf.recipe.objectives import EXTRAS
from rlhf.reward.beside import BesideRewardTrainer
from rlhf.reward.merged import MergedHeadRewardTrainer
from rlhf.reward.trainer import Scored

CODE_SIZE = 128  # the paper's
# What the head gives a number for while it trains: μ and log σ² of every dimension of the code.
CODE_LABELS = tuple(f"{part}_{i}" for part in ("mean", "log_variance") for i in range(CODE_SIZE))


class BottleneckRewardTrainer(MergedHeadRewardTrainer, BesideRewardTrainer):
    """Any pair loss of `PairRewardTrainer` on w'z, z ~ N(μ, diag σ²), and β KL(N(μ, diag σ²) || N(0, I)) of both answers.

    μ and log σ² are linear in the state that a head reads, and w is linear too, as in the paper's public code. So the score at
    the mean, w'μ, is linear as well: held-out pairs are compared by it, and `merge_head` makes it the model's only label.
    The trained model is an ordinary reward model. `code` is kept aside for the alarm (`rlhf.reward.cloud`); variance stays behind.

    Args:
        extra_weight: β, for nats summed over the code. The paper's 0.1 is for the public code's mean over its dimensions.

    Attributes:
        code: [d, h] takes what the head reads to μ, up to a constant; None before `merge_head`.
    """

    code: Tensor | None = None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        extra_weight: float | None = None,
        **arguments: Any,
    ):
        super().__init__(model, args, labels=len(CODE_LABELS), **arguments)
        self.extra_weight = EXTRAS["bottleneck"].weight if extra_weight is None else extra_weight
        generator = torch.Generator().manual_seed(self.args.seed)
        start = torch.randn(CODE_SIZE, generator=generator) * (CODE_SIZE + 1) ** -0.5
        self.decoder = self.train_beside("decoder", start)
        with torch.no_grad():  # σ = 1 at the start, so first scores have about unit scale
            layer = label_layer(self.model, len(CODE_LABELS))
            layer.weight[CODE_SIZE:] = 0

    def merge_head(self) -> None:
        """Make of the trained head one of the score at the mean, and keep what made the mean of the code."""
        layer = label_layer(self.accelerator.unwrap_model(self.model), len(CODE_LABELS))
        self.code = layer.weight[:CODE_SIZE].detach().clone()
        super().merge_head()

    def label_weights(self) -> Tensor:
        """Return the weight of each label in the score: w for the means, 0 for the variances."""
        return torch.cat([self.decoder.detach(), torch.zeros_like(self.decoder)])

    def losses(self, scored: Scored, columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each pair, [b] nats: of noisy rewards with what their codes cost; of held-out pairs, at the mean."""
        if not self.model.training:
            return super().losses(replace(scored, rewards=self.scores_of(scored.rewards)), columns, inputs)
        mean, log_variance = scored.rewards.chunk(2, dim=1)
        noisy = noisy_code(mean, log_variance) @ self.decoder
        losses = super().losses(replace(scored, rewards=noisy), columns, inputs)
        nats = kl_to_standard_normal(mean, log_variance)
        self._metrics["train"]["code_nats"].append(nats.mean().item())
        return losses + columns.get("weight", 1.0) * self.extra_weight * nats[scored.pairs].sum(dim=1)
