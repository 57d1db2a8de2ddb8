"""`MergedHeadRewardTrainer`: a head of several labels while it trains, of which one score is made when training is over."""

from abc import abstractmethod
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel
from trl import RewardConfig

from rlhf.errors import UserError
from rlhf.models.heads import combine_labels, one_label
from rlhf.objectives.attributes import weighted_score
from rlhf.reward.trainer import PairRewardTrainer


class MergedHeadRewardTrainer(PairRewardTrainer):
    """`PairRewardTrainer` on a model whose head has several labels (`build_reward_model(…, labels=…)`).

    The score of an answer is a weighted sum of its labels, so `merge_head` makes of the trained head one of a single score,
    exactly, and every program reads an ordinary reward model.

    Args:
        labels: how many the head must have.

    Raises:
        UserError: a head of another number of labels; FSDP.
    """

    is_merged = False

    def __init__(
        self, model: PreTrainedModel | PeftModel, args: RewardConfig | None = None, *, labels: int, **arguments: Any
    ):
        if model.config.num_labels != labels:
            raise UserError(
                f"reward: the head has {model.config.num_labels} labels where {labels} are trained; build it with {labels} labels."
            )
        with one_label(model):
            super().__init__(model, args, **arguments)
        if self.is_fsdp_enabled:
            raise UserError(
                "reward: FSDP shards the head, so its labels can't be made into one score; use data parallelism."
            )

    @abstractmethod
    def label_weights(self) -> Tensor:
        """Return the weight of each label in the score, [k]."""

    def by_label(self, predicted: Tensor) -> Tensor:
        """Return what the head says as [n, k], also where it has one label, [n]."""
        return predicted.reshape(len(predicted), -1)

    def scores_of(self, predicted: Tensor) -> Tensor:
        """Return the score of each answer, [n], of what the head says, before and after it was merged."""
        weights = torch.ones(1) if self.is_merged else self.label_weights()
        return weighted_score(self.by_label(predicted), weights.to(predicted))

    def merge_head(self) -> None:
        """Make the trained head of k labels into one of the score, in place; the model can be saved then."""
        combine_labels(self.accelerator.unwrap_model(self.model), self.label_weights())
        self.is_merged = True

    def _record(self, rewards_chosen: Tensor, rewards_rejected: Tensor, tokens: Tensor) -> None:
        super()._record(self.scores_of(rewards_chosen), self.scores_of(rewards_rejected), tokens)
