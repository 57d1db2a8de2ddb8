"""`BesideRewardTrainer`: a parameter that a term trains beside the model, and that belongs to the training, not to the model."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.errors import UserError
from rlhf.reward.trainer import PairRewardTrainer


class BesideRewardTrainer(PairRewardTrainer):
    """`PairRewardTrainer` that may train one parameter beside its model, kept in the checkpoints in a file of its own.

    Its optimizer is of the model's kind, without weight decay, and has the same learning rate in each step; the two are apart
    because FSDP2 takes no parameter that is none of the model's. Every process holds it whole.
    """

    beside: nn.Parameter | None = None
    beside_name = ""

    def train_beside(self, name: str, start: Tensor) -> nn.Parameter:
        """Return a parameter that begins at `start` and is trained from now on, its gradient averaged over processes.

        Args:
            name: of the tensor and of its file in a checkpoint.
        """
        self.beside, self.beside_name = nn.Parameter(start.to(self.args.device)), name
        self.beside.register_hook(lambda gradient: self.accelerator.reduce(gradient, reduction="mean"))
        optimizer, settings = self.get_optimizer_cls_and_kwargs(self.args)
        self.beside_optimizer = optimizer([{"params": [self.beside], "weight_decay": 0.0}], **settings)
        self.add_callback(_StepBeside(self))
        return self.beside

    def step_beside(self, learning_rate: float) -> None:
        """Take a step by the gradient that has come together; in float16 none where the gradient is not finite."""
        for group in self.beside_optimizer.param_groups:
            group["lr"] = learning_rate
        if self.accelerator.scaler is None:
            self.beside_optimizer.step()
        else:
            self.accelerator.scaler.step(self.beside_optimizer)
        self.beside_optimizer.zero_grad()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an ordinary model, and what lies beside it in a file of its own; in a checkpoint with its optimizer's state."""
        super().save_model(output_dir, _internal_call)
        if self.beside is not None and self.args.should_save:
            folder = output_dir or str(self.args.output_dir)
            save_file({self.beside_name: self.beside.detach().cpu().contiguous()}, self._file(folder))
            if _internal_call:
                torch.save(self.beside_optimizer.state_dict(), self._state_file(folder))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.read_beside(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.read_beside(str(self.state.best_model_checkpoint))

    def read_beside(self, checkpoint: str) -> None:
        """Read what lies beside the model, and its optimizer's state, from a checkpoint of any number of processes.

        Raises:
            UserError: an earlier version wrote it, with that state in the file of the model's optimizer.
        """
        if self.beside is None:
            return
        if not self._state_file(checkpoint).is_file():
            raise UserError(
                f"{checkpoint}: an earlier version of this package wrote this checkpoint, which lacks the optimizer of "
                f"{self.beside_name}; delete {Path(checkpoint).parent}, and the stage begins anew."
            )
        self.beside.data.copy_(load_file(self._file(checkpoint))[self.beside_name])
        state = torch.load(self._state_file(checkpoint), map_location=self.beside.device, weights_only=True)
        self.beside_optimizer.load_state_dict(state)

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"{self.beside_name}.safetensors"

    def _state_file(self, folder: str) -> Path:
        return Path(folder) / f"{self.beside_name}.optimizer.pt"  # as the Trainer writes that of its model


class _StepBeside(TrainerCallback):
    """Lets what lies beside the model take its step just before the model does, by the same learning rate."""

    def __init__(self, trainer: BesideRewardTrainer):
        self.trainer = trainer

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        optimizer: torch.optim.Optimizer,
        **_: object,
    ) -> None:
        self.trainer.step_beside(optimizer.param_groups[0]["lr"])
