"""What the pipeline adds to a trainer: it stops before a bad update or after a signal, writes metrics, marks checkpoints."""

import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import nn
from transformers import (
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from rlhf.errors import TrainingError
from rlhf.models.sharding import whole
from rlhf.pipeline import interrupt
from rlhf.pipeline.launch import Launch, write_launch
from rlhf.pipeline.store import checkpoints_of, mark_checkpoint, write_seconds
from rlhf.progress import Work

StopAt = Literal["step", "epoch"]


class FiniteGradients(TrainerCallback):
    """Stop before an update with a gradient that is not finite.

    After the reduction over processes all of them see the same gradient, so all of them stop.
    """

    def __init__(self, label: str):
        self.label = label

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: nn.Module, **_: object
    ) -> None:
        """Raise after clipping and before the update.

        Raises:
            TrainingError: the gradient is not finite.
        """
        if args.fp16:  # its scaler looks for the largest scale that overflows seldom, and passes over those steps
            return
        norm = whole(torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        if not torch.isfinite(norm):
            raise TrainingError(
                f"{self.label}: the gradient is not finite at step {state.global_step + 1}; nothing was updated. Lower "
                "learning_rate, or look for extreme values in the data."
            )


class MetricsFile(TrainerCallback):
    """Append a row to `metrics.jsonl` at every log; a resumed stage says from which step."""

    def __init__(self, path: Path, *, resumed: bool):
        self.path, self.resumed = path, resumed

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Mark where a resumed stage goes on."""
        if not state.is_world_process_zero:
            return
        if self.resumed:
            self._append({"resumed_from": state.global_step})
        else:
            self.path.unlink(missing_ok=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        """Append one row of numbers. The trainer's closing summary is no step and goes to the manifest."""
        if logs is None or "train_runtime" in logs or not state.is_world_process_zero:
            return
        row = {name: value for name, value in logs.items() if name != "total_flos"}
        if "reward_proxy" in row:
            row.setdefault("reward_gold", None)  # nobody knows a true reward
        self._append({"step": state.global_step, **row})

    def _append(self, row: Mapping[str, object]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def drop_torn_line(path: Path) -> bool:
    """Cut off a last line of a file of JSON lines whose writing was cut off, and return whether there was one."""
    if not path.is_file():
        return False
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    last = whole[whole.rfind(b"\n", 0, -1) + 1 :]
    try:
        json.loads(last or b"0")
    except ValueError:  # a line of zeros, which a disk that lost power leaves
        whole = whole[: -len(last)]
    if whole != content:
        path.write_bytes(whole)
    return whole != content


class StopOnSignal(TrainerCallback):
    """After SIGTERM or Ctrl-C: a checkpoint, then the end. All processes agree on the step.

    Args:
        stop_at: after which event; "epoch" for PPO, whose checkpoints fall between rollouts, which are the Trainer's epochs.
    """

    def __init__(self, trainer: Trainer, stop_at: StopAt):
        self.accelerator, self.stop_at = trainer.accelerator, stop_at

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop between two steps."""
        if self.stop_at == "step":
            self._stop_if_asked(control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Stop between two epochs."""
        if self.stop_at == "epoch":
            self._stop_if_asked(control)

    def _stop_if_asked(self, control: TrainerControl) -> None:
        asked = torch.tensor(float(interrupt.requested()), device=self.accelerator.device)
        if self.accelerator.num_processes > 1:
            asked = self.accelerator.reduce(asked, reduction="sum")
        if asked.item() > 0:
            interrupt.request()  # one that trains on would wait for the others in what follows
            control.should_save = control.should_training_stop = True


class CheckpointMark(TrainerCallback):
    """Declare a checkpoint whole after the Trainer has written all of it, on every process; note time and launch beside it.

    Only then older ones go, by their numbers: the Trainer would delete them while the new one is not marked yet, and by times of
    files, of which the newest may be the lowest where a clock was set back.

    Args:
        seconds_before: that earlier attempts worked on the checkpoint from which training goes on.
    """

    def __init__(self, trainer: Trainer, *, seconds_before: float):
        self.accelerator = trainer.accelerator
        self.begin = time.monotonic() - seconds_before
        self.kept, trainer.args.save_total_limit = trainer.args.save_total_limit, None

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Write the mark last."""
        self.accelerator.wait_for_everyone()  # each process writes its random state, and the mark holds its digest
        if state.is_world_process_zero:
            write_seconds(Path(args.output_dir), time.monotonic() - self.begin)
            write_launch(Path(args.output_dir), Launch(args.world_size, args.gradient_accumulation_steps))
            mark_checkpoint(Path(args.output_dir) / f"checkpoint-{state.global_step}")
            for older in checkpoints_of(Path(args.output_dir))[self.kept :] if self.kept else ():
                if str(older) != state.best_model_checkpoint:
                    shutil.rmtree(older)


def _watched(logs: Mapping[str, object] | None) -> dict[str, float]:
    """Return the numbers of a log that people watch."""
    values = {name: (logs or {}).get(name) for name in ("loss", "accuracy", "reward_proxy", "reward_gold", "kl")}
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}


class ProgressLines(TrainerCallback):
    """Keep count of the steps and the latest numbers, for a log that is told of them once a minute."""

    def __init__(self, work: Work):
        self.work = work

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        """Count from where training begins, or goes on."""
        self.work.unit, self.work.total = "steps", state.max_steps
        self.work.done = self.work.done_before = state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Count a step."""
        self.work.done = state.global_step

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        """Take the latest numbers over; the closing summary has none of them."""
        self.work.figures = _watched(logs) or self.work.figures


class Progress(ProgressCallback):
    """The Trainer's bar with the latest numbers beside it, instead of a line for every log."""

    def __init__(self, label: str):
        super().__init__()
        self.label = label

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        """Name the bar."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None:
            self.training_bar.set_description(self.label)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: Mapping[str, object] | None = None,
        **_: object,
    ) -> None:
        """Show the numbers that people watch."""
        if self.training_bar is not None and logs:
            self.training_bar.set_postfix({name: f"{value:.3g}" for name, value in _watched(logs).items()})
