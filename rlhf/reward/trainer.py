"""`PairRewardTrainer`: TRL's `RewardTrainer` with a loss of the table of objectives.

Three steps of the parent are replaced (which columns survive, how rows become a batch, how the loss is computed) and
nothing else: TRL's own arguments pass through untouched.
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Sampler
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import RewardConfig, RewardTrainer

from rlhf.data.rows import TIE, has_ended
from rlhf.errors import TrainingError, UserError
from rlhf.invariants.checks import CheckBook
from rlhf.models.dropout import switch_off_dropout
from rlhf.models.four_bit import keep_gradients
from rlhf.models.packing import (
    LONG_ROW,
    GroupedByLength,
    Packed,
    largest_difference,
    obstacle,
    shared_scores,
    tolerance,
    unpack,
)
from rlhf.models.scalar_head import last_layers, make_exact, score_exactly, score_head
from rlhf.models.templates import end_at_end_token
from rlhf.models.text import before_last_turn, encode_answers, last_turn
from rlhf.recipe.objectives import PAIR_COLUMNS, PAIR_LOSS, Loss, resolve
from rlhf.reward.collator import PairCollator
from rlhf.reward.columns import check_columns, named_datasets, warn_of_weightless
from rlhf.reward.setup import check_head, check_task, tokenizer_of


def training_columns(
    rows: Sequence[Mapping[str, object]], columns: Mapping[str, float] = PAIR_COLUMNS
) -> list[dict[str, object]]:
    """Return canonical pairs with the columns that a loss reads, and `group`: those that any pair has.

    Answers that were called equal have no margin between them, whatever the file says.

    Args:
        columns: of the loss, each with the value that a pair without one gets.
    """
    neutral = {**columns, "group": None}
    used = [name for name in neutral if any(row.get(name) is not None for row in rows)]
    return [
        {name: row[name] for name in ("prompt", "chosen", "rejected") if name in row}
        | {name: neutral[name] if row.get(name) is None else row[name] for name in used}
        | ({"margin": 0.0} if "margin" in used and row.get("confidence") == TIE else {})
        for row in rows
    ]


@dataclass
class Scored:
    """A batch's answers with their scores.

    Attributes:
        rewards: [n] of every answer, float32.
        pairs: [b, 2] which answers are the chosen and the rejected one of each pair.
        tokens: how many were encoded.
        rows, ends: [n] where each score was read.
        views: how often each answer was encoded, under other dropout; then [views · n], and [views · b, 2].
        representations: [n, h] the input of the head, where a term reads it.
        states: [rows, t, h] that input at every token, where a term reads it.
    """

    rewards: Tensor
    pairs: Tensor
    tokens: Tensor
    rows: Tensor
    ends: Tensor
    views: int = 1
    representations: Tensor | None = None
    states: Tensor | None = None

    @classmethod
    def plain(cls, rewards: Tensor, attention_mask: Tensor, pairs: Tensor | None) -> "Scored":
        """Describe answers that were encoded each by itself; without `pairs`, chosen ones above rejected ones."""
        n = torch.arange(len(rewards), device=rewards.device)
        pairs = torch.stack(n.chunk(2), dim=1) if pairs is None else pairs
        positions = torch.arange(attention_mask.shape[1], device=rewards.device)
        return cls(rewards, pairs, attention_mask.sum(), n, (attention_mask * positions).argmax(dim=1))


class PairRewardTrainer(RewardTrainer):
    """Reward model on preference pairs with a loss of the table, by default the general pair loss (`pair_loss`).

    The columns that the loss reads (`margin`, `confidence` and `weight`) are used where the dataset has them; the
    declarations in `rlhf.reward.declared` require or set them. The loss is divided once, by the number of pairs over
    micro-batches and ranks, so 1x16, 4x4 and two ranks x 8 give the same gradient, a ragged last micro-batch included.

    Both answers of a pair share one encoding of their prompt, as do all answers of pairs with the same `group` (a
    ranking's) that meet in a batch; batches hold pairs of similar length, in an order drawn from (seed, epoch). On the
    first batch shared and plain scores are compared; where they differ, or where sharing would be wrong (encoders,
    sliding windows, other attention than sdpa), every answer is encoded by itself and a warning says so.
    `share_prompts=False` does that from the start, in TRL's own order.

    Args:
        loss: of an objective (`OBJECTIVES[name].loss`); the pairs are taken as its `apply` makes them.
        flip_rate: the share ε of labels that are wrong at random, for the likelihood of flipped labels.

    Takes what `trl.RewardTrainer` takes; without `args` it trains for one epoch, and it warns above one.
    `checks` is the record of what was checked while it trained.
    A dataset with `prompt`, `chosen` and `rejected` (strings, or conversations) is turned into ids by the same function
    that evaluation and PPO use.

    Raises:
        UserError: a column is missing or holds a value outside its range; every row is too long.
        TrainingError: the loss is not finite (before the optimizer has seen it).
    """

    loss_is_scaled_for_ga = True
    id_columns: tuple[str, ...] = ("chosen_ids", "rejected_ids")  # of a row that is tokenized
    collator_class = PairCollator
    _tag_names = ["trl", "rlhf", "reward-trainer"]

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: RewardConfig | None = None,
        *,
        loss: Loss = PAIR_LOSS,
        share_prompts: bool = True,
        flip_rate: float = 0.0,
        **arguments: Any,
    ):
        if not 0 <= flip_rate < 0.5:
            raise UserError(f"reward: flip_rate is {flip_rate}; a share of wrong labels lies in [0, 0.5).")
        if flip_rate and loss.elements != "pairs":
            raise UserError(
                f"reward: flip_rate is of pairs' labels, and this loss is of {loss.elements}; leave it out."
            )
        self.flip_rate = flip_rate
        self.loss, self.loss_function = loss, resolve(loss.function)
        for rows, dataset in named_datasets(**arguments):
            if dataset.column_names:
                check_columns(dataset, columns=loss.columns, rows=rows)
                if "weight" in loss.columns:
                    warn_of_weightless(dataset, rows)
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = RewardConfig(f"{name.split('/')[-1]}-Reward", num_train_epochs=1)
        if args.label_smoothing_factor:
            raise UserError(
                "reward: label_smoothing_factor is for labels of tokens; smooth labels of pairs with the objective `smoothing`."
            )
        if args.num_train_epochs > 1 and args.max_steps <= 0:
            warnings.warn(
                f"num_train_epochs={args.num_train_epochs}: reward models overfit after one epoch (arXiv:2203.02155, 2401.06080).",
                stacklevel=2,
            )
        self.dropped_too_long = self._evaluated_pairs = 0
        self.checks = CheckBook()
        check_task(arguments.get("peft_config"))
        arguments["processing_class"] = tokenizer_of(model, args, arguments.get("processing_class"))
        super().__init__(model, args, **arguments)
        keep_gradients(self.model)
        check_head(self.model)
        self.model.config.problem_type = "regression"  # other engines lay a sigmoid on a score otherwise
        if args.disable_dropout:
            switch_off_dropout(self.model)  # TRL's own switch reaches modules, not probabilities that layers hold
        head = score_head(self.model)
        if head is not None and head.weight.requires_grad and isinstance(self.model, PeftModel):
            make_exact(head)  # on a base of 16 bits PEFT leaves it in these, and on 4-bit weights TRL casts it to them
        for layer in last_layers(self.model):
            score_exactly(layer)
        collator = self.data_collator
        self._grouped = share_prompts and args.train_sampling_strategy == "random"
        reason = obstacle(self.model) if share_prompts else None
        if reason is not None and head is not None:
            warnings.warn(f"reward: answers don't share their prompt, so training is slower: {reason}.", stacklevel=2)
        self._shares = share_prompts and reason is None
        self._compared = False
        self.data_collator: PairCollator = self.collator_class(
            collator.pad_token_id,
            collator.pad_to_multiple_of,
            shared=self._shares,
            long_row=LONG_ROW * self.model.config.get_text_config().hidden_size,
            columns=tuple(loss.columns),
        )

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        end_at_end_token(processing_class)
        columns = dataset.column_names or list(next(iter(dataset)))  # a stream may not know its columns
        is_stream = not isinstance(dataset, Dataset)
        if "prompt" in columns and self.id_columns[0] not in columns:
            shown = {} if is_stream else {"desc": f"Tokenizing {dataset_name} dataset"}
            dataset = dataset.map(self.tokenize, batched=True, fn_kwargs={"tokenizer": processing_class}, **shown)
        before = None if is_stream else len(dataset)
        dataset = self.short_enough(dataset, processing_class, args, dataset_name)
        if before is not None:
            dropped, elements = before - len(dataset), self.loss.elements
            if dataset_name == "train":
                self.dropped_too_long = dropped
            if dropped == before:
                raise UserError(
                    f"reward: all {before} {elements} of the {dataset_name} set are longer than max_length={args.max_length} "
                    "tokens; raise max_length."
                )
            if dropped:
                warnings.warn(
                    f"{dropped} of {before} {elements} of the {dataset_name} set are longer than max_length={args.max_length} "
                    "tokens and were left out.",
                    stacklevel=2,
                )
        return dataset

    @staticmethod
    def tokenize(batch: Mapping[str, Sequence[Any]], tokenizer: PreTrainedTokenizerBase) -> dict[str, list[Any]]:
        """Return a batch of rows as token ids, under the names of `id_columns`."""
        rows = {}
        for side in ("chosen", "rejected"):
            prompts = map(before_last_turn, batch["prompt"], batch[side])
            texts, ended = [last_turn(text) for text in batch[side]], [has_ended(text) for text in batch[side]]
            rows[f"{side}_ids"], _ = encode_answers(tokenizer, list(prompts), texts, ended=ended)
        return rows

    def short_enough(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: RewardConfig,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        """Return the rows none of whose answers is longer than `max_length`; TRL encodes rows that have no ids yet."""
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns: list[str] | None = self._signature_columns or [
            *self.id_columns,
            "group",
            *self.loss.columns,
        ]

    def _get_train_sampler(self, train_dataset: Dataset | IterableDataset | None = None) -> Sampler[int] | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        if not self._grouped or not isinstance(dataset, Dataset):
            return super()._get_train_sampler(train_dataset)
        lengths = self.lengths(dataset)
        groups = dataset["group"] if "group" in dataset.column_names else None
        return GroupedByLength(
            lengths, self.args.train_batch_size, seed=self.args.seed, groups=groups, epoch=self.current_epoch
        )

    def current_epoch(self) -> int:
        """Return the number of the epoch that training is in, from 0; where one ends and the next begins, the next."""
        return int(self.state.epoch or 0)

    def lengths(self, dataset: Dataset) -> list[int]:
        """Return the tokens of each row's longest answer."""
        return [max(len(c), len(r)) for c, r in zip(dataset["chosen_ids"], dataset["rejected_ids"], strict=True)]

    def _get_num_items_in_batch(self, batch_samples: list[dict[str, Tensor]], device: torch.device) -> Tensor:
        counts = [len(batch["pairs"]) if "pairs" in batch else len(batch["input_ids"]) // 2 for batch in batch_samples]
        pairs = torch.tensor(sum(counts), device=device)
        return self.accelerator.gather(pairs).sum()

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, dict[str, Tensor]]:
        """Divide the summed pair losses by the global number of pairs (in evaluation: take their mean); add the extra term."""
        columns = {name: inputs.pop(name) for name in self.loss.columns if name in inputs}
        scored = self.scored(model, inputs)
        rewards_chosen, rewards_rejected = scored.rewards[scored.pairs].unbind(dim=1)
        outputs = {"logits": torch.cat([rewards_chosen, rewards_rejected])}

        losses = self.losses(scored, columns, inputs)
        # This batch's share of all pairs. DDP averages gradients over ranks where their sum is meant; evaluation has
        # no count and takes the mean.
        share: Tensor | float = 1.0
        if num_items_in_batch is not None:
            share = self.accelerator.num_processes * len(losses) / (scored.views * num_items_in_batch)
        loss = (losses.mean() + self.extra_term(scored)) * share
        if not torch.isfinite(loss):
            raise TrainingError(
                f"reward: the loss is {loss.item()} at step {self.state.global_step}; nothing was updated. "
                "Lower learning_rate, or look for extreme margins in the data."
            )
        self._record(rewards_chosen.detach(), rewards_rejected.detach(), scored.tokens)
        return (loss, outputs) if return_outputs else loss

    def losses(self, scored: "Scored", columns: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the loss of each of a batch's elements, [views · b] nats, reward centring included.

        Args:
            columns: [b] those that the loss reads.
            inputs: what else the collator made of the batch.
        """
        rewards_chosen, rewards_rejected = scored.rewards[scored.pairs].unbind(dim=1)
        columns = {name: column.repeat(scored.views) for name, column in columns.items()}
        numbers = {"flip_rate": self.flip_rate} if self.flip_rate > 0 else {}
        losses: Tensor = self.loss_function(rewards_chosen, rewards_rejected, **columns, **numbers)
        if self.args.center_rewards_coefficient is not None:
            centred = self.args.center_rewards_coefficient * (rewards_chosen + rewards_rejected) ** 2
            losses = losses + columns.get("weight", 1.0) * centred
        return losses

    def scored(self, model: nn.Module, inputs: dict[str, Tensor]) -> "Scored":
        """Score a batch's answers."""
        if "segments" in inputs:
            packed = Packed(*(inputs[field.name] for field in fields(Packed)))
            return self.score_packed(model, packed, inputs["pairs"])
        rewards = model(
            input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False
        ).logits.squeeze(-1)
        return Scored.plain(rewards.float(), inputs["attention_mask"], inputs.get("pairs"))

    def score_packed(self, model: nn.Module, packed: Packed, pairs: Tensor) -> "Scored":
        """Score packed answers, by the shared forward or, where it would be wrong, each by itself."""
        inner = self.accelerator.unwrap_model(model)
        if self._shares and not self._compared:
            self._compare(inner, packed)
        if self._shares:
            rewards, tokens = shared_scores(model, inner, packed), (packed.segments >= 0).sum()
            return Scored(rewards, pairs, tokens, packed.rows, packed.ends)
        ids, mask = unpack(packed, pad_token_id=self.data_collator.pad_token_id)
        rewards = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.squeeze(-1)
        return Scored.plain(rewards.float(), mask, pairs)

    def extra_term(self, scored: "Scored") -> Tensor | float:
        """Return what a subclass adds to the mean loss of a batch's pairs, nats."""
        return 0.0

    def merge_head(self) -> None:
        """Make the trained head one of a single score, where it is not; the model can be saved then."""

    def _compare(self, inner: nn.Module, packed: Packed) -> None:
        """Stop sharing if it changes the scores of this model on its first batch."""
        self._compared = True
        with self.accelerator.autocast():
            difference = largest_difference(inner, packed, pad_token_id=self.data_collator.pad_token_id)
        if not difference <= tolerance(inner, self.accelerator.mixed_precision):
            self._shares = self.data_collator.shared = False
            warnings.warn(
                f"reward: scores with a shared prompt differ from plain ones by {difference:.2g} on this model, so every answer "
                "is encoded by itself; training is slower.",
                stacklevel=2,
            )

    def _record(self, rewards_chosen: Tensor, rewards_rejected: Tensor, tokens: Tensor) -> None:
        """Enter a batch's means into TRL's lists, whose means are logged; in evaluation, the means over all pairs so far."""
        mode = "train" if self.model.training else "eval"
        gather = self.accelerator.gather_for_metrics
        chosen, rejected = gather(rewards_chosen), gather(rewards_rejected)
        if mode == "train":
            self._total_train_tokens += int(gather(tokens).sum())
        metrics = self._metrics[mode]
        metrics["num_tokens"] = [self._total_train_tokens]
        # In evaluation the last batch may be smaller, so one entry a name takes the place of one a batch.
        # TRL empties the lists at every log.
        before = self._evaluated_pairs if mode == "eval" and metrics["accuracy"] else 0
        self._evaluated_pairs = before + len(chosen)
        both = torch.cat([chosen, rejected])
        columns = {"accuracy": (chosen > rejected).float(), "margin": chosen - rejected, "mean_reward": both}
        for name, column in columns.items():
            mean = column.mean().item()
            if before:
                so_far = metrics[name].pop()
                mean = so_far + (mean - so_far) * len(chosen) / self._evaluated_pairs
            metrics[name].append(mean)
