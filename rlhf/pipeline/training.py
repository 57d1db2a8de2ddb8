"""What every training stage shares: the trainer's arguments from a recipe's keys, rows to evaluate on, and training itself."""

import shutil
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import datasets
import torch
import transformers
from datasets import Dataset
from peft import PeftModel
from torch import nn
from transformers import ProgressCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig

from rlhf.errors import OtherProcessError, TrainingError, is_out_of_memory
from rlhf.files import read_jsonl
from rlhf.invariants.checks import CheckBook, CheckEntry
from rlhf.invariants.tensors import nothing_lost
from rlhf.models.coarse import coarse_weights
from rlhf.models.load import model_settings
from rlhf.models.save import save_model
from rlhf.models.sharding import check_sharding, gathered_weights
from rlhf.pipeline import interrupt
from rlhf.pipeline.callbacks import (
    CheckpointMark,
    FiniteGradients,
    MetricsFile,
    Progress,
    ProgressLines,
    StopAt,
    StopOnSignal,
    drop_torn_line,
)
from rlhf.pipeline.context import StageContext
from rlhf.pipeline.launch import Launch, accumulation_as_before, read_launch
from rlhf.pipeline.precision import resolve_bf16, warn_of_4_bit
from rlhf.pipeline.store import CHECKPOINTS, METRICS, newest_checkpoint, read_seconds
from rlhf.pipeline.trainers import InStage
from rlhf.progress import Work, a_line_a_minute
from rlhf.recipe.keys import trl_keys

Config = TypeVar("Config", bound=TrainingArguments)
SAVES_PER_STAGE = 5


def quiet_libraries() -> None:
    """Silence what a recipe's reader can't act on: loading bars of each checkpoint, deprecations inside libraries."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning)


def split_settings(settings: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Any]]:
    """Take TRL's flat keys of a stage apart into those of the model and those of the trainer."""
    model_names = set(trl_keys()["model"])
    model = {name: value for name, value in settings.items() if name in model_names}
    trainer = {name: value for name, value in settings.items() if name not in model_names}
    config = model_settings(model)
    warn_of_4_bit(config.load_in_4bit)
    return config, trainer


def training_arguments(config_class: type[Config], settings: Mapping[str, Any], folder: Path, seed: int) -> Config:
    """Build the trainer's configuration: the recipe's keys over a few defaults of the pipeline.

    Checkpoints are written five times a stage; without an accelerator, training is in float32 on the CPU; a loss that
    is not finite is shown rather than smoothed over. A stage that was begun by another number of processes keeps the
    size of its steps.

    Raises:
        UserError: these processes can't share such steps.
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
    keys = {**defaults, **resolve_bf16(settings)}
    accumulation = accumulation_as_before(folder / CHECKPOINTS, keys.get("gradient_accumulation_steps", 1))
    keys["gradient_accumulation_steps"] = accumulation
    return config_class(output_dir=str(folder / CHECKPOINTS), seed=seed, **keys)


def evaluation_rows(file: Path, args: TrainingArguments, limit: int) -> Dataset | None:
    """Read the first rows of a file for evaluation during training, or None where the arguments ask for none."""
    if args.eval_strategy == "no":
        return None
    rows = read_jsonl(file)[:limit]
    return Dataset.from_list(
        [{key: row[key] for key in ("prompt", "chosen", "rejected") if key in row} for row in rows]
    )


def train(trainer: InStage, folder: Path, *, label: str, say: Callable[[str], None], stop_at: StopAt = "step") -> None:
    """Train to the end, from the newest whole checkpoint if an earlier attempt left one.

    Args:
        label: what people know the stage by.
        stop_at: whether a signal stops training after the next step, or only after the next epoch.

    Raises:
        TrainingError: a loss, gradient, reward or KL is not finite; nothing was updated, and the batch lies in the folder. Or
            training ended before its last step, and nothing here asked for that.
        UserError: sharding was asked for that is not at work, or that loses something.
    """
    check_sharding(trainer, stage=label)
    # PPO looks by itself, and FSDP trains float32 copies.
    is_plain = label != "ppo" and not trainer.is_fsdp_enabled
    if (
        is_plain
        and (sentence := coarse_weights(f"{label}: the", trainer.model, trainer.args.learning_rate)) is not None
    ):
        say(sentence)
    if label != "ppo":
        require_all_trained(trainer.model, label)
    checkpoint, broken = newest_checkpoint(folder / CHECKPOINTS)
    if broken and trainer.is_world_process_zero():
        names = ", ".join(path.name for path in broken)
        say(f"{label}: leaves out {names}, whose writing was cut off or whose files are damaged")
        for path in broken:
            shutil.rmtree(path)
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    metrics = folder / METRICS
    if checkpoint is not None and trainer.is_world_process_zero() and drop_torn_line(metrics):
        say(f"{label}: leaves out the last line of {METRICS}, whose writing was cut off")
    trainer.add_callback(MetricsFile(metrics, resumed=checkpoint is not None))
    seconds_before = read_seconds(folder / CHECKPOINTS) if checkpoint is not None else 0.0
    trainer.add_callback(CheckpointMark(trainer, seconds_before=seconds_before))
    work = Work(label)
    trainer.add_callback(ProgressLines(work) if trainer.args.disable_tqdm else Progress(label))
    if checkpoint is not None:
        say(f"{label}: goes on from {checkpoint.name}{_with_other_processes(trainer)}")
    trainer.add_callback(StopOnSignal(trainer, stop_at))
    trainer.add_callback(FiniteGradients(label))
    try:
        with a_line_a_minute(work), interrupt.patience("step" if stop_at == "step" else "rollout"):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except OtherProcessError:  # which has the batch
        raise
    except TrainingError as error:
        if trainer.is_world_process_zero():
            raise TrainingError(f"{error} The batch: {trainer.save_batch(folder, error.rows)}") from error
        raise
    except Exception as error:
        if is_out_of_memory(error) and (sizes := trainer.latest_sizes()) is not None:
            error.add_note(f" at {label}, with {sizes[0]} rows of {sizes[1]} tokens")
        raise
    step, steps = trainer.state.global_step, trainer.state.max_steps
    if step < steps and getattr(trainer, "stopped", None) is None:
        raise TrainingError(
            f"{label}: training ended at step {step} of {steps}, and nothing here asked for it: a setting or callback of the "
            "Trainer did. What was trained is no finished stage; leave that out and run the same command again."
        )


def require_all_trained(model: nn.Module, label: str) -> None:
    """Refuse a model without an adapter of which a part would stay as it is; its output layer may be a frozen one.

    Raises:
        TrainingError: naming the first such weight.
    """
    if isinstance(model, PeftModel):
        return
    frozen = [
        name
        for name, p in model.named_parameters()
        if p.is_floating_point() and not p.requires_grad and not name.startswith("lm_head.")
    ]
    if frozen:
        raise TrainingError(
            f"{label}: {len(frozen)} tensors of a model that is trained whole would stay as they are, first {frozen[0]}. "
            "Nothing was trained; this is a fault of this package, so please report it with your recipe."
        )


def _with_other_processes(trainer: InStage) -> str:
    """Say how steps are shared out now, where a checkpoint was written by another number of processes; else nothing."""
    now = Launch(trainer.args.world_size, trainer.args.gradient_accumulation_steps)
    before = read_launch(Path(trainer.args.output_dir))
    if before is None or before == now:
        return ""
    now_there_are, there_were = (f"{n} process{'es' if n > 1 else ''}" for n in (now.processes, before.processes))
    return (
        f", which {there_were} wrote, with {now_there_are}: each makes {now.accumulation} micro-batches of a step instead of "
        f"{before.accumulation}, so steps are of the same rows"
    )


def save_trained(trainer: InStage, folder: Path) -> bool:
    """Write what was trained as an ordinary folder, and tell whether this process is the one that did.

    Every process must call it: where the model is sharded, each has a part of it.
    """
    weights = gathered_weights(trainer)
    if trainer.is_world_process_zero():
        save_model(trainer.model, trainer.processing_class, folder, weights)
    return trainer.is_world_process_zero()


def checks_of(*owners: object) -> dict[str, CheckEntry]:
    """Return what trainers checked while they trained, and reward models or ensembles of them when they were opened.

    Of whatever keeps no check book, as TRL's own trainers and plain functions do not, there is nothing.
    """
    joined = CheckBook()
    for owner in owners:
        for part in (owner, *getattr(owner, "members", ())):
            book = getattr(part, "checks", None)
            if isinstance(book, CheckBook):
                joined.merge(book.entries)
    return joined.entries


def check_nothing_lost(context: StageContext, folder: str | Path, model: nn.Module, book: CheckBook) -> None:
    """Compare what an earlier stage saved with the model that was loaded or built from it, before it is trained.

    Args:
        folder: a path where a stage made it; a hub id or folder as the recipe names it is nobody's to vouch for.

    Raises:
        InvariantError: a tensor was lost on the way.
    """
    if context.is_main and isinstance(folder, Path):
        book.require(nothing_lost(folder, model))
