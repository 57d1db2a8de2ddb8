"""What every training stage shares: arguments from a recipe's keys, metrics on disk, checkpoint marks, progress."""

import json
import os
import shutil
import sys
import warnings
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig, RewardConfig, SFTConfig

from rlhf.data.read import ReadReport, read_rows
from rlhf.errors import TrainingError, UserError
from rlhf.files import write_text
from rlhf.models.load import encoder_type, model_settings
from rlhf.models.packing import Packed, unpack
from rlhf.pipeline import interrupt
from rlhf.pipeline.store import CHECKPOINTS, mark_checkpoint, newest_checkpoint
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.trainer import PPOTrainer
from rlhf.recipe.schema import Recipe, trl_keys
from rlhf.reward.meta import group_samples

Config = TypeVar("Config", bound=TrainingArguments)
SAVES_PER_STAGE = 5
FAILED_BATCH = "failed_batch"


def quiet_libraries() -> None:
    """Silence what a recipe's reader can't act on: loading bars of each checkpoint, deprecations inside libraries."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def split_settings(settings: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """TRL's flat keys of a stage, apart into those of the model and those of the trainer."""
    model_names = set(trl_keys()["model"])
    model = {name: value for name, value in settings.items() if name in model_names}
    trainer = {name: value for name, value in settings.items() if name not in model_names}
    return model_settings(model), trainer


def training_arguments(config_class: type[Config], settings: Mapping[str, Any], folder: Path, seed: int) -> Config:
    """The trainer's configuration: the recipe's keys over a few defaults of the pipeline.

    Checkpoints are written five times a stage; without an accelerator, training is in float32 on the CPU; a loss that
    is not finite is shown rather than smoothed over.
    """
    defaults: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 1 / SAVES_PER_STAGE,
        "save_total_limit": 2,
        "report_to": "none",
        "run_name": f"{folder.parent.parent.name}-{folder.name}",  # RUN-STAGE, for trackers
        "logging_nan_inf_filter": False,
        "disable_tqdm": not sys.stderr.isatty(),  # a log file is no place for a bar
    }
    if not torch.cuda.is_available():
        defaults |= {"use_cpu": True, "bf16": False, "gradient_checkpointing": False}
    return config_class(output_dir=str(folder / CHECKPOINTS), seed=seed, **{**defaults, **settings})


def check_arguments(recipe: Recipe, *, until: str | None = None) -> None:
    """Build every stage's configuration once, so that what TRL refuses is said before a folder is made.

    Raises:
        UserError: with TRL's own reason for every section it refuses; or a backbone that cannot generate.
    """
    quiet_libraries()
    problems = []
    if recipe.backbone.model is not None and until not in ("data", "vote", "reward"):
        problems += _cannot_generate(recipe.backbone.model, recipe.backbone.revision)
    if recipe.reward.needs_vote and recipe.vote.trunk is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("vote.trunk: a shared trunk is one process's; run `rlhf vote` without a launcher first.")
    problems += _reward_problems(recipe)
    trackers = get_available_reporting_integrations()
    stages: list[tuple[str, type[TrainingArguments], dict[str, Any]]] = [
        ("sft", SFTConfig, recipe.sft.trl_settings()),
        ("vote", RewardConfig, recipe.vote_settings()),
        ("reward", RewardConfig, recipe.reward.trl_settings()),
        ("ppo", PPOConfig, recipe.ppo.trl_settings()),
    ]
    for section, config_class, keys in stages:
        if section == "vote" and not recipe.reward.needs_vote:
            continue
        try:
            _, settings = split_settings(keys)
            args = training_arguments(config_class, settings, Path("nowhere"), recipe.seed)
            absent = sorted(set(args.report_to) - set(trackers) - {"none"})
            if absent:
                problems.append(
                    f"{section}.report_to: {', '.join(absent)} is not installed (pip install {' '.join(absent)})."
                )
        except (ValueError, TypeError, ImportError) as error:
            problems.append(f"{section}: {str(error).strip().splitlines()[0]}")
    if problems:
        raise UserError(problems)


def _reward_problems(recipe: Recipe) -> list[str]:
    """What the reward section's own keys can't do together, and samples that MetaRM can't climb on."""
    how, found = recipe.reward, []
    if how.experts is not None and not how.trl_settings().get("use_peft"):
        found.append("reward.experts: experts are LoRA adapters on one base; set reward.use_peft: true.")
    if how.experts is not None and how.members > 1:
        found.append("reward.members: experts are combined in their own way; leave members out, or experts.")
    if how.members > 1 and recipe.ppo.extra_rewards:
        found.append("reward.members: PPO combines an ensemble as a whole, so ppo.extra_rewards can't be added to it.")
    for key in ("reward_weights", "normalize_reward"):
        if how.members > 1 and recipe.ppo.trl_settings().get(key) not in (None, True):
            found.append(f"reward.members: members are compared on one scale and weigh the same; leave ppo.{key} out.")
    if how.expert_weights is not None and how.experts in (None, "gate"):
        found.append("reward.expert_weights: weights are for experts: weights or merged; a gate finds its own.")
    if how.meta_samples is not None and not how.meta:
        found.append("reward.meta_samples: nobody reads them without reward.meta: true.")
    elif how.meta_samples is not None:
        try:
            group_samples([row for _, row in read_rows(how.meta_samples, ReadReport(how.meta_samples))])
        except UserError as error:
            found += [f"reward.meta_samples: {how.meta_samples}: {problem}" for problem in error.problems]
    return found


def _cannot_generate(model: str, revision: str | None) -> list[str]:
    """Encoders make reward models, not policies."""
    try:
        kind = encoder_type(model, revision)
    except (OSError, ValueError) as error:
        return [f"backbone.model: {model}: {str(error).strip().splitlines()[0]}"]
    if kind is None:
        return []
    return [
        f"backbone.model: {model} is an encoder ({kind}), which cannot generate: a reward model can be made of it (`rlhf reward`, "
        "without data.sft), a policy cannot."
    ]


def train(trainer: Trainer, folder: Path, *, label: str, say: Callable[[str], None]) -> None:
    """Train to the end, from the newest whole checkpoint if an earlier attempt left one.

    Raises:
        TrainingError: a loss, gradient, reward or KL is not finite; nothing was updated, and the batch lies in the folder.
    """
    checkpoint, broken = newest_checkpoint(folder / CHECKPOINTS)
    if broken and trainer.is_world_process_zero():
        say(f"{label}: leaves out {', '.join(path.name for path in broken)}, whose writing was cut off")
        for path in broken:
            shutil.rmtree(path)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl", resumed=checkpoint is not None))
    trainer.add_callback(CheckpointMark())
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress(label))
    if checkpoint is not None:
        say(f"{label}: goes on from {checkpoint.name}")
    trainer.add_callback(StopOnSignal(trainer, at_epoch_end=isinstance(trainer, PPOTrainer)))
    guard = FiniteGradients(trainer, label)
    trainer.add_callback(guard)
    try:
        with interrupt.patience():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except TrainingError as error:
        if trainer.is_world_process_zero():
            raise TrainingError(f"{error} The batch: {guard.save_batch(folder, error.rows)}") from error
        raise


class FiniteGradients(TrainerCallback):
    """Stop before an update with a gradient that is not finite, and keep the batch that it came from.

    After the reduction over processes all of them see the same gradient, so all of them stop.
    """

    def __init__(self, trainer: Trainer, label: str):
        self.label, self.tokenizer = label, trainer.processing_class
        self.batches: deque[dict[str, Any]] = deque(maxlen=trainer.args.gradient_accumulation_steps)
        training_step: Any = trainer.training_step

        def remembering(model: Any, inputs: dict[str, Any], *rest: Any, **named: Any) -> Any:
            self.batches.append(dict(inputs))
            return training_step(model, inputs, *rest, **named)

        trainer.training_step = remembering

    def on_pre_optimizer_step(
        self, args: Any, state: TrainerState, control: TrainerControl, model: Any = None, **_: Any
    ) -> None:
        """After clipping, before the update."""
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        if not torch.isfinite(norm):
            raise TrainingError(
                f"{self.label}: the gradient is not finite at step {state.global_step + 1}; nothing was updated. Lower "
                "learning_rate, or look for extreme values in the data."
            )

    def save_batch(self, folder: Path, rows: Sequence[dict[str, Any]]) -> Path:
        """Write the rows that an error names, or else the micro-batches of this step: as text, and their tensors."""
        if not rows:
            batches = [{k: v for k, v in batch.items() if isinstance(v, torch.Tensor)} for batch in self.batches]
            tensors = {f"{i}.{k}": v.detach().cpu().contiguous() for i, b in enumerate(batches) for k, v in b.items()}
            save_file(tensors, folder / f"{FAILED_BATCH}.safetensors")
            texts = [ids for batch in batches for ids in _token_rows(batch)]
            rows = [{"text": self.tokenizer.decode(ids, skip_special_tokens=True)} for ids in texts]
        file = folder / f"{FAILED_BATCH}.jsonl"
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        return file


def _token_rows(batch: dict[str, torch.Tensor]) -> list[list[int]]:
    """The texts of a micro-batch, each by itself also where answers share a row."""
    if "segments" in batch:
        packed = Packed(*(batch[field.name].cpu() for field in fields(Packed)))
        ids, mask = unpack(packed, pad_token_id=0)
        return [row[seen.bool()].tolist() for row, seen in zip(ids, mask, strict=True)]
    return batch["input_ids"].tolist() if "input_ids" in batch else []


class MetricsFile(TrainerCallback):
    """Append a row to `metrics.jsonl` at every log; a resumed stage says from which step."""

    def __init__(self, path: Path, *, resumed: bool):
        self.path, self.resumed = path, resumed

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark where a resumed stage goes on."""
        if not state.is_world_process_zero:
            return
        if self.resumed:
            self._append({"resumed_from": state.global_step})
        else:
            self.path.unlink(missing_ok=True)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """One row; numbers only. The trainer's closing summary is no step and goes to the manifest."""
        if logs is None or "train_runtime" in logs or not state.is_world_process_zero:
            return
        row = {name: value for name, value in logs.items() if name != "total_flos"}
        self._append({"step": state.global_step, **row})

    def _append(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


class StopOnSignal(TrainerCallback):
    """After SIGTERM or Ctrl-C: a checkpoint, then the end. All processes agree on the step.

    Args:
        at_epoch_end: for PPO, whose checkpoints fall between rollouts, which are the Trainer's epochs.
    """

    def __init__(self, trainer: Trainer, *, at_epoch_end: bool):
        self.accelerator, self.at_epoch_end = trainer.accelerator, at_epoch_end

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop between two steps."""
        if not self.at_epoch_end:
            self._stop_if_asked(control)

    def on_epoch_end(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop between two rollouts."""
        if self.at_epoch_end:
            self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> None:
        asked = torch.tensor(float(interrupt.requested()), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(asked, reduction="sum")
        if asked.item() > 0:
            control.should_save = control.should_training_stop = True


class CheckpointMark(TrainerCallback):
    """Declare a checkpoint whole after the Trainer has written all of it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write the mark last."""
        if state.is_world_process_zero:
            mark_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")


class Progress(ProgressCallback):
    """The Trainer's bar with the latest numbers beside it, instead of a line for every log."""

    SHOWN = ("loss", "accuracy", "reward_proxy", "reward_gold", "kl")

    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_log(
        self, args: Any, state: TrainerState, control: TrainerControl, logs: dict[str, Any] | None = None, **_: Any
    ) -> None:
        """Show the numbers that people watch."""
        if self.training_bar is not None and logs:
            shown = {name: f"{logs[name]:.3g}" for name in self.SHOWN if isinstance(logs.get(name), int | float)}
            self.training_bar.set_postfix(shown)
