"""The trainers of the stages: TRL's and ours, each keeping its latest micro-batches for the case that one of them fails."""

import math
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from datasets import Dataset, IterableDataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Trainer
from trl import SFTConfig, SFTTrainer

from rlhf.files import write_jsonl
from rlhf.models.generate import encode_demonstrations
from rlhf.models.packing import Packed, unpack
from rlhf.models.typed import is_typed
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward.attributes import AttributeRewardTrainer
from rlhf.reward.bottleneck import BottleneckRewardTrainer
from rlhf.reward.contrastive import ContrastiveRewardTrainer
from rlhf.reward.length import LengthRewardTrainer
from rlhf.reward.meta import MetaRewardTrainer
from rlhf.reward.rankings import RankingRewardTrainer
from rlhf.reward.text import TextRewardTrainer
from rlhf.reward.trainer import PairRewardTrainer

FAILED_BATCH = "failed_batch"


class KeepsBatches(Trainer):
    """Beside a trainer in a list of base classes: remember the micro-batches of the latest optimizer step."""

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        self.latest_batches: deque[dict[str, Any]] = deque(maxlen=self.args.gradient_accumulation_steps)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
        """Remember a micro-batch as it is before the trainer takes its columns apart, and learn from it."""
        self.latest_batches.append(dict(inputs))
        loss: Tensor = super().training_step(model, inputs, *rest, **named)
        return loss

    def latest_sizes(self) -> tuple[int, int] | None:
        """Return the rows and tokens a row of the latest micro-batch; None before the first."""
        batch = self.latest_batches[-1] if self.latest_batches else {}
        sizes = [(len(rows), rows.shape[1]) for rows in batch.values() if isinstance(rows, Tensor) and rows.dim() == 2]
        return max(sizes, key=math.prod, default=None)

    def save_batch(self, folder: Path, rows: Sequence[Mapping[str, object]]) -> Path:
        """Write the rows that an error names, or else the micro-batches of this step: as text, and their tensors.

        Returns:
            the file of the rows.
        """
        if not rows:
            batches = [{k: v for k, v in batch.items() if isinstance(v, Tensor)} for batch in self.latest_batches]
            tensors = {f"{i}.{k}": v.detach().cpu().contiguous() for i, b in enumerate(batches) for k, v in b.items()}
            save_file(tensors, folder / f"{FAILED_BATCH}.safetensors")
            texts = [ids for batch in batches for ids in _token_rows(batch)]
            rows = [{"text": self.processing_class.decode(ids, skip_special_tokens=True)} for ids in texts]
        file = folder / f"{FAILED_BATCH}.jsonl"
        write_jsonl(file, rows)
        return file


def _token_rows(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the texts of a micro-batch as ids, each by itself also where answers share a row."""
    if "segments" in batch:
        packed = Packed(*(batch[field.name].cpu() for field in fields(Packed)))
        ids, mask = unpack(packed, pad_token_id=0)
        return [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    return batch["input_ids"].tolist() if "input_ids" in batch else []


class StageSFTTrainer(KeepsBatches, SFTTrainer):
    """`trl.SFTTrainer` in a stage: demonstrations in which somebody typed a special token are encoded here, as words."""

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        *others: Any,
    ) -> Dataset | IterableDataset:
        if isinstance(dataset, Dataset) and {"prompt", "completion"} <= set(dataset.column_names):
            conversations = (row["prompt"] + row["completion"] for row in dataset)
            typed = sum(is_typed(processing_class, turns) for turns in conversations if isinstance(turns, list))
            if typed and args.assistant_only_loss:
                warnings.warn(
                    f"sft: {typed} of {len(dataset)} demonstrations hold typed special tokens, which assistant_only_loss can only "
                    "read as tokens; take them out, or leave assistant_only_loss out (the loss is on the answers anyway).",
                    stacklevel=2,
                )
            elif typed:
                dataset = dataset.map(encode_demonstrations, batched=True, fn_kwargs={"tokenizer": processing_class})
        return super()._prepare_dataset(dataset, processing_class, args, *others)


class StagePairRewardTrainer(KeepsBatches, PairRewardTrainer):
    """`PairRewardTrainer` in a stage, or for a member of a vote."""


class StageContrastiveRewardTrainer(KeepsBatches, ContrastiveRewardTrainer):
    """`ContrastiveRewardTrainer` in a stage."""


class StageTextRewardTrainer(KeepsBatches, TextRewardTrainer):
    """`TextRewardTrainer` in a stage."""


class StageLengthRewardTrainer(KeepsBatches, LengthRewardTrainer):
    """`LengthRewardTrainer` in a stage."""


class StageBottleneckRewardTrainer(KeepsBatches, BottleneckRewardTrainer):
    """`BottleneckRewardTrainer` in a stage."""


class StageMetaRewardTrainer(KeepsBatches, MetaRewardTrainer):
    """`MetaRewardTrainer` in a stage."""


class StageRankingRewardTrainer(KeepsBatches, RankingRewardTrainer):
    """`RankingRewardTrainer` in a stage."""


class StageAttributeRewardTrainer(KeepsBatches, AttributeRewardTrainer):
    """`AttributeRewardTrainer` in a stage."""


class StagePPOTrainer(KeepsBatches, PPOTrainer):
    """`PPOTrainer` in a stage."""
