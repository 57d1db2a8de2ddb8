"""The trainers of the stages: TRL's and ours, each keeping its latest micro-batches, and resuming what other processes saved."""

import math
import traceback
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import accelerate
import peft
import torch
import transformers
import trl
from datasets import Dataset, IterableDataset
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, set_seed
from trl import SFTConfig, SFTTrainer

from rlhf.data.rows import has_ended
from rlhf.errors import UserError
from rlhf.files import write_jsonl
from rlhf.models.demonstrations import encode_demonstrations
from rlhf.models.packing import Packed, unpack
from rlhf.models.save import load_weights
from rlhf.models.sharding import is_sharded_checkpoint, load_optimizer
from rlhf.models.typed import is_typed
from rlhf.pipeline.launch import read_launch
from rlhf.ppo.checkpoint import read_checkpoint
from rlhf.ppo.rollout import hash_seed
from rlhf.ppo.trainer import PPOTrainer
from rlhf.reward.attributes import AttributeRewardTrainer, GatedRewardTrainer
from rlhf.reward.beside import BesideRewardTrainer
from rlhf.reward.bottleneck import BottleneckRewardTrainer
from rlhf.reward.contrastive import ContrastiveRewardTrainer
from rlhf.reward.critiques import CritiqueRewardTrainer
from rlhf.reward.length import LengthRewardTrainer
from rlhf.reward.meta import MetaRewardTrainer
from rlhf.reward.rankings import RankingRewardTrainer
from rlhf.reward.text import TextRewardTrainer
from rlhf.reward.trainer import PairRewardTrainer

FAILED_BATCH = "failed_batch"
TEXT_COMPARED = 64  # tokens of a text whose loss TRL and the model both give
LOSS_WITHIN = {
    True: 1e-2,
    False: 0.2,
}  # nats a token that the two may differ by, where all weights are float32 and where not
CHECK_SETTINGS = [Path(str(library.__file__)).parent for library in (accelerate, peft, transformers, trl)]


class InStage(Trainer):
    """Beside a trainer in a list of base classes: what a stage needs of each.

    It remembers the micro-batches of the latest optimizer step. And it goes on from a checkpoint that another number of
    processes wrote, sharded or whole: the weights are then read before this trainer shards its model, the optimizer's
    state after.

    Raises:
        UserError: TRL, or a library below it, refuses the settings or has no package for them.
    """

    def __init__(self, *arguments: Any, **named: Any):
        try:
            super().__init__(*arguments, **named)
        except (ValueError, ImportError) as error:
            if not _is_raised_by_library(error):
                raise
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"the trainer refuses the stage's settings: {reason}") from error
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

    def read_weights(self, checkpoint: Path) -> None:
        """Read the weights of a checkpoint, as ordinary folders have them, into a model that is not sharded yet."""
        load_weights(self.model, checkpoint)

    def _is_of_other_layout(self, checkpoint: str | None) -> bool:
        return checkpoint is not None and is_sharded_checkpoint(Path(checkpoint)) != self.is_fsdp_enabled

    def _prepare_for_training(self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None) -> Any:
        if resume_from_checkpoint is not None and self._is_of_other_layout(resume_from_checkpoint):
            self.read_weights(Path(resume_from_checkpoint))
        return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._is_of_other_layout(resume_from_checkpoint):  # whose weights were read before
            if isinstance(self, BesideRewardTrainer):
                self.read_beside(resume_from_checkpoint)
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if isinstance(self.model, PreTrainedModel) and not self.is_fsdp_enabled:
            self.read_weights(Path(resume_from_checkpoint))  # the Trainer passes over names that it doesn't find

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or not self._is_of_other_layout(checkpoint):
            super()._load_optimizer_and_scheduler(checkpoint)
            return
        load_optimizer(self.model, self.optimizer, Path(checkpoint))
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        before = read_launch(Path(self.args.output_dir))
        if checkpoint is None or before is None or before.processes == self.args.world_size:
            super()._load_rng_state(checkpoint)
        else:  # a new one: the saved ones belong to other processes, and that of the beginning has been used
            set_seed(hash_seed(self.args.seed, self.args.process_index, self.state.global_step) & 0x7FFFFFFF)

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


def _is_raised_by_library(error: Exception) -> bool:
    """Tell whether an error comes from TRL or a library below it, which check settings, and not from this package."""
    frames = traceback.extract_tb(error.__traceback__)
    return any(Path(frames[-1].filename).is_relative_to(folder) for folder in CHECK_SETTINGS)


def _token_rows(batch: Mapping[str, Tensor]) -> list[list[int]]:
    """Return the texts of a micro-batch as ids, each by itself also where answers share a row."""
    if "segments" in batch:
        packed = Packed(*(batch[field.name].cpu() for field in fields(Packed)))
        ids, mask = unpack(packed, pad_token_id=0)
        return [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    return batch["input_ids"].tolist() if "input_ids" in batch else []


def _has_conversations(dataset: Dataset) -> bool:
    """Tell whether a dataset's rows are prompts and answers as conversations, not yet encoded."""
    return {"prompt", "completion"} <= set(dataset.column_names) and isinstance(dataset[0]["prompt"], list)


class StageSFTTrainer(InStage, SFTTrainer):
    """`trl.SFTTrainer` in a stage.

    Conversations are encoded here: behind the very ids that sampling begins with, typed special tokens as words, and an answer
    that was cut off without an end. With `assistant_only_loss`, whose mask the template gives, TRL encodes them.

    Raises:
        UserError: TRL's loss, which applies the output layer to the decoder's states, is of other logits than the model's own.
    """

    def __init__(self, *arguments: Any, **named: Any):
        super().__init__(*arguments, **named)
        if self.accelerator.is_main_process:  # others may not have their weights yet
            with torch.no_grad():
                self._check_loss()

    def _check_loss(self) -> None:
        """Compare TRL's loss of a text, without materialised logits, with the model's own."""
        rows = self.train_dataset
        if not isinstance(rows, Dataset) or "input_ids" not in rows.column_names or len(rows) == 0:
            return
        ids = rows[0]["input_ids"][:TEXT_COMPARED]
        if len(ids) < 2:
            return
        text, was_training = torch.tensor([ids], device=self.model.device), self.model.training
        self.model.eval()
        loss_trained, loss_saved = (
            self.model(input_ids=text, labels=text, use_cache=False, **more).loss.item()
            for more in ({"fused_lm_head": True}, {})
        )
        self.model.train(was_training)
        is_exact = all(p.dtype == torch.float32 for p in self.model.parameters() if p.is_floating_point())
        if not abs(loss_trained - loss_saved) <= LOSS_WITHIN[is_exact]:
            kind = self.model.config.model_type
            raise UserError(
                f"sft: this architecture ({kind}) does more to the decoder's states than its output layer, so TRL's loss, which "
                f"applies that layer alone, would train another model than the one that is saved: {loss_trained:.2f} nats a token "
                f"where the model itself has {loss_saved:.2f}. Leave data.sft out, or take a backbone that has learnt to answer."
            )

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase,
        args: SFTConfig,
        *others: Any,
    ) -> Dataset | IterableDataset:
        if isinstance(dataset, Dataset) and _has_conversations(dataset):
            typed = sum(is_typed(processing_class, row["prompt"] + row["completion"]) for row in dataset)
            if typed and args.assistant_only_loss:
                warnings.warn(
                    f"sft: {typed} of {len(dataset)} demonstrations hold typed special tokens, which assistant_only_loss can only "
                    "read as tokens; take them out, or leave assistant_only_loss out (the loss is on the answers anyway).",
                    stacklevel=2,
                )
            cut = sum(not has_ended(row["completion"]) for row in dataset)
            if cut and args.assistant_only_loss:
                warnings.warn(
                    f"sft: {cut} of {len(dataset)} demonstrations were cut off, behind which assistant_only_loss trains an end; "
                    "leave assistant_only_loss out (the loss is on the answers anyway).",
                    stacklevel=2,
                )
            if not args.assistant_only_loss:
                options = {"batched": True, "num_proc": args.dataset_num_proc}
                dataset = dataset.map(encode_demonstrations, fn_kwargs={"tokenizer": processing_class}, **options)
        return super()._prepare_dataset(dataset, processing_class, args, *others)


class StagePairRewardTrainer(InStage, PairRewardTrainer):
    """`PairRewardTrainer` in a stage, or for a member of a vote."""


class StageContrastiveRewardTrainer(InStage, ContrastiveRewardTrainer):
    """`ContrastiveRewardTrainer` in a stage."""


class StageTextRewardTrainer(InStage, TextRewardTrainer):
    """`TextRewardTrainer` in a stage."""


class StageLengthRewardTrainer(InStage, LengthRewardTrainer):
    """`LengthRewardTrainer` in a stage."""


class StageBottleneckRewardTrainer(InStage, BottleneckRewardTrainer):
    """`BottleneckRewardTrainer` in a stage."""


class StageCritiqueRewardTrainer(InStage, CritiqueRewardTrainer):
    """`CritiqueRewardTrainer` in a stage."""


class StageMetaRewardTrainer(InStage, MetaRewardTrainer):
    """`MetaRewardTrainer` in a stage."""


class StageRankingRewardTrainer(InStage, RankingRewardTrainer):
    """`RankingRewardTrainer` in a stage."""


class StageAttributeRewardTrainer(InStage, AttributeRewardTrainer):
    """`AttributeRewardTrainer` in a stage."""


class StageGatedRewardTrainer(InStage, GatedRewardTrainer):
    """`GatedRewardTrainer` in a stage."""


class StagePPOTrainer(InStage, PPOTrainer):
    """`PPOTrainer` in a stage."""

    def read_weights(self, checkpoint: Path) -> None:
        """Read policy, critic and PPO's memory."""
        read_checkpoint(self, checkpoint, self.model)
