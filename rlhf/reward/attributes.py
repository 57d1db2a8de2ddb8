"""Trainers on ratings of single answers: a head of k attributes, of which a sum or a gate makes one score."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig

from rlhf.data.ratings import ratings_of
from rlhf.data.rows import SIDES, Pair, has_ended
from rlhf.errors import UserError
from rlhf.models.scalar_head import score_head
from rlhf.models.text import before_last_turn, encode_answers, last_turn
from rlhf.objectives.pairwise import bradley_terry
from rlhf.recipe.objectives import OBJECTIVES, Loss
from rlhf.reward.collator import PairCollator
from rlhf.reward.gated import Fitted, fit_gated, save_gated
from rlhf.reward.merged import MergedHeadRewardTrainer
from rlhf.reward.trainer import Scored


@dataclass
class AttributeCollator(PairCollator):
    """Rated answers as a batch; or held-out pairs, which have no ratings.

    Attributes:
        names: of the attributes, in the order of the head.
    """

    names: tuple[str, ...] = ()

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Pack or pad all answers; `ratings` [b, k], NaN where nobody rated, if the rows have them.

        `pairs` [b, 2] are the places of each row's first and last answer: of a rated answer twice its own.
        """
        groups = [row["answer_ids"] for row in examples]
        batch = self.answers(groups)
        if "attributes" in examples[0]:
            batch["ratings"] = torch.tensor([ratings_of(row["attributes"], self.names) for row in examples])
        counts = torch.tensor([len(group) for group in groups])
        last = counts.cumsum(dim=0) - 1
        return {**batch, "pairs": torch.stack([last - counts + 1, last], dim=1)}


class AttributeRewardTrainer(MergedHeadRewardTrainer):
    """Reward model on ratings of single answers (HelpSteer2, arXiv:2406.08673): no pairs are needed.

    The model's head has a label for each attribute (`build_reward_model(…, labels=list(weights))`). It learns each answer's
    ratings minus their means over the training set: a decoder's head has no constant of its own, and no comparison sees one.
    An answer is one element, counted once in the global division, in however many attributes it was rated.
    `merge_head`, to be called when training is over, makes of the k labels the one weighted score.

    The dataset has `prompt`, `completion` (a text or one message) and `attributes`, numbers by name; a missing one is masked.
    Held-out data are pairs (`chosen`, `rejected`), on which the weighted scores are compared: their loss is Bradley-Terry's.

    Args:
        weights: of each attribute in the score; a fault has a negative one.

    Attributes:
        centres: [k] the mean rating of each attribute in the training set.

    Raises:
        UserError: an attribute that no row has; a head of another number of labels; a stream; FSDP; reward centring.
    """

    id_columns = ("answer_ids",)
    collator_class = AttributeCollator

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        weights: Mapping[str, float],
        loss: Loss | None = None,
        **arguments: Any,
    ):
        dataset, labels = arguments.get("train_dataset"), model.config.num_labels
        if labels != len(weights):
            raise UserError(
                f"reward: the head has {labels} labels for {len(weights)} attributes; build it with labels=list(weights)."
            )
        if not isinstance(dataset, Dataset):
            raise UserError(
                "reward: the mean of each attribute is of all ratings, so they can't be a stream; pass a Dataset."
            )
        if args is not None and args.center_rewards_coefficient is not None:
            raise UserError("reward.center_rewards_coefficient: ratings say where the scores lie; leave it out.")
        self.names, self.weights = list(weights), torch.tensor(list(weights.values()))
        self.centres = mean_ratings(dataset, self.names)
        super().__init__(model, args, labels=labels, loss=loss or OBJECTIVES["regression"].loss, **arguments)
        self.data_collator.names = tuple(self.names)

    @staticmethod
    def tokenize(batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
        """Return the token ids of each row's answer, or those of a held-out pair's two answers."""
        encoded = []
        for side in ("completion",) if "completion" in batch else SIDES:
            prompts = map(before_last_turn, batch["prompt"], batch[side])
            texts, ended = [last_turn(text) for text in batch[side]], [has_ended(text) for text in batch[side]]
            encoded.append(encode_answers(tokenizer, list(prompts), texts, ended=ended)[0])
        return {"answer_ids": [list(answers) for answers in zip(*encoded, strict=True)]}

    def short_enough(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Return the rows none of whose answers is longer than `max_length`."""
        most = args.max_length
        return dataset if most is None else dataset.filter(lambda row: max(map(len, row["answer_ids"])) <= most)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = self._signature_columns or [*self.id_columns, "attributes"]

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return the tokens of each row's longest answer."""
        return [max(map(len, answers)) for answers in dataset["answer_ids"]]

    def losses(self, scored: Scored, columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each rated answer, [b] squared units of the ratings; of held-out pairs Bradley-Terry's, nats."""
        if "ratings" not in inputs:
            chosen, rejected = self.scores_of(scored.rewards)[scored.pairs].unbind(dim=1)
            return bradley_terry(chosen, rejected)
        predicted = self.by_label(scored.rewards[scored.pairs[:, 0]])
        losses: Tensor = self.loss_function(predicted, inputs["ratings"] - self.centres.to(predicted.device))
        return losses

    def label_weights(self) -> Tensor:
        """Return the weight of each attribute in the score, [k]."""
        return self.weights

    def _record(self, rewards_chosen: Tensor, rewards_rejected: Tensor, tokens: Tensor) -> None:
        super()._record(rewards_chosen, rewards_rejected, tokens)
        if self.model.training:  # single answers are compared with nothing
            for name in ("accuracy", "margin"):
                self._metrics["train"].pop(name)


class GatedRewardTrainer(AttributeRewardTrainer):
    """`AttributeRewardTrainer`, and then ArmoRM (arXiv:2406.12845): a gate that reads the prompt weighs the attributes.

    When training is over the backbone is frozen, and `merge_head` fits anew on what it says of the answers: every attribute by
    ridge regression, freed of length, and the gate. With `learning_rate=0` the backbone stays as it was given, as in the paper.
    Of the weights only the signs count. `save_model` writes the gate beside the network.

    Args:
        pairs: canonical pairs that the gate is fitted to.

    Attributes:
        fitted: what was found, once training is over.

    Raises:
        UserError: as `AttributeRewardTrainer`; an encoder; no pairs; a weight of 0.
    """

    fitted: Fitted | None = None

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        weights: Mapping[str, float],
        pairs: Sequence[Pair],
        **arguments: Any,
    ):
        if score_head(model) is None:
            raise UserError("reward: a gate reads the states of a decoder; for an encoder take objective: regression.")
        if not pairs:
            raise UserError(
                "reward: a gate is fitted to pairs, and there are none; add some, or take objective: regression."
            )
        if nothing := [name for name, weight in weights.items() if weight == 0]:
            raise UserError(
                f"reward.attributes: {', '.join(nothing)} has weight 0; a gate needs its sign, or leave it out."
            )
        super().__init__(model, args, weights=weights, **arguments)
        self.pairs, self.rated = pairs, list(arguments["train_dataset"])

    def merge_head(self) -> None:
        """Fit attributes and gate on the frozen network; its head holds the attributes as the gate weighs them."""
        signs = dict(zip(self.names, self.weights.tolist(), strict=True))
        network = self.accelerator.unwrap_model(self.model)
        self.fitted = fit_gated(network, self.processing_class, self.rated, self.pairs, signs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an ordinary checkpoint, and beside it the gate once it is fitted."""
        super().save_model(output_dir, _internal_call)
        if self.fitted is not None and self.args.should_save:
            save_gated(Path(output_dir or str(self.args.output_dir)), self.fitted)


def mean_ratings(dataset: Dataset, names: Sequence[str]) -> Tensor:
    """Return the mean rating of each attribute, [k].

    Raises:
        UserError: an attribute that no row has.
    """
    ratings = torch.tensor([ratings_of(row, names) for row in dataset["attributes"]])
    missing = [name for name, column in zip(names, ratings.isnan().all(dim=0).tolist(), strict=True) if column]
    if missing:
        raise UserError(f"reward: nobody rated {', '.join(missing)}; take it out of the weights, or correct its name.")
    return ratings.nanmean(dim=0)
