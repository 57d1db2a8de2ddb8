"""What every training stage shares: arguments from a recipe's keys, metrics on disk, checkpoint marks, progress."""

import json
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from transformers import (
    AutoConfig,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig, RewardConfig, SFTConfig

from rlhf.errors import TrainingError, UserError
from rlhf.models.load import find_source, model_settings
from rlhf.pipeline import interrupt
from rlhf.pipeline.store import CHECKPOINTS, mark_checkpoint, newest_checkpoint
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.trainer import PPOTrainer
from rlhf.recipe.schema import Recipe, trl_keys

Config = TypeVar("Config", bound=TrainingArguments)
SAVES_PER_STAGE = 5


def quiet_libraries() -> None:
    """Silence what a recipe's reader can't act on: loading bars of each checkpoint, deprecations inside libraries."""
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
    problems = []
    if recipe.backbone.model is not None and until not in ("data", "reward"):
        problems += _cannot_generate(recipe.backbone.model, recipe.backbone.revision)
    for section, config_class in (("sft", SFTConfig), ("reward", RewardConfig), ("ppo", PPOConfig)):
        try:
            _, settings = split_settings(getattr(recipe, section).trl_settings())
            training_arguments(config_class, settings, Path("nowhere"), recipe.seed)
        except (ValueError, TypeError, ImportError) as error:
            problems.append(f"{section}: {str(error).strip().splitlines()[0]}")
    if problems:
        raise UserError(problems)


def _cannot_generate(model: str, revision: str | None) -> list[str]:
    """Encoders make reward models, not policies."""
    try:
        config = AutoConfig.from_pretrained(find_source(model).base, revision=revision)
    except (OSError, ValueError) as error:
        return [f"backbone.model: {model}: {str(error).strip().splitlines()[0]}"]
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return []
    return [
        f"backbone.model: {model} is an encoder ({config.model_type}), which cannot generate: a reward model can be made of it "
        "(`rlhf reward`, without data.sft), a policy cannot."
    ]


def train(trainer: Trainer, folder: Path, *, label: str, say: Callable[[str], None]) -> None:
    """Train to the end, from the newest whole checkpoint if an earlier attempt left one."""
    checkpoint = newest_checkpoint(folder / CHECKPOINTS)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    trainer.add_callback(MetricsFile(folder / "metrics.jsonl", resumed=checkpoint is not None))
    trainer.add_callback(CheckpointMark())
    if not trainer.args.disable_tqdm:
        trainer.add_callback(Progress(label))
    if checkpoint is not None:
        say(f"{label}: goes on from {checkpoint.name}")
    trainer.add_callback(StopOnSignal(trainer, at_epoch_end=isinstance(trainer, PPOTrainer)))
    with interrupt.patience():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)


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
        bad = [name for name in ("loss", "grad_norm") if name in row and not _is_finite(row[name])]
        if bad:
            raise TrainingError(f"{bad[0]} is {row[bad[0]]} at step {state.global_step}; lower learning_rate.")
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


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and value == value and abs(value) != float("inf")
