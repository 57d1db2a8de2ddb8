"""`BesideRewardTrainer`: a parameter that a term trains beside the model, and that belongs to the training, not to the model."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rlhf.reward.trainer import PairRewardTrainer


class BesideRewardTrainer(PairRewardTrainer):
    """`PairRewardTrainer` that may train one parameter beside its model, kept in the checkpoints in a file of its own."""

    beside: nn.Parameter | None = None
    beside_name = ""

    def train_beside(self, name: str, start: Tensor) -> nn.Parameter:
        """Return a parameter that begins at `start` and is trained from now on, its gradient averaged over processes.

        Args:
            name: of the tensor and of its file in a checkpoint.
        """
        self.beside, self.beside_name = nn.Parameter(start.to(self.args.device)), name
        self.beside.register_hook(lambda gradient: self.accelerator.reduce(gradient, reduction="mean"))
        self.add_callback(_ZeroGradient(self.beside))
        return self.beside

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the Trainer's optimizer, which shall train what lies beside the model too."""
        before = self.optimizer
        optimizer = super().create_optimizer(model)
        if self.beside is not None and before is None:
            optimizer.add_param_group({"params": [self.beside], "weight_decay": 0.0})
        return optimizer

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write an ordinary checkpoint, and what lies beside the model in a file of its own."""
        super().save_model(output_dir, _internal_call)
        if self.beside is not None and self.args.should_save:
            tensors = {self.beside_name: self.beside.detach().cpu().contiguous()}
            save_file(tensors, self._file(output_dir or str(self.args.output_dir)))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.read_beside(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self.read_beside(str(self.state.best_model_checkpoint))

    def read_beside(self, checkpoint: str) -> None:
        """Read what lies beside the model from a checkpoint of either layout."""
        if self.beside is not None:
            self.beside.data.copy_(load_file(self._file(checkpoint))[self.beside_name])

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"{self.beside_name}.safetensors"


class _ZeroGradient(TrainerCallback):
    """Sets a parameter's gradient to 0, as the Trainer does for those of its model."""

    def __init__(self, parameter: nn.Parameter):
        self.parameter = parameter

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.parameter.grad = None
