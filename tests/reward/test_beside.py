"""What a term trains beside the model: its steps are AdamW's with the model's learning rate, its gradient that of all processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import save_file

from rlhf.errors import UserError
from tests.reward.test_contrastive import make

TRAINING = {"num_train_epochs": 2, "lr_scheduler_type": "linear", "warmup_steps": 2, "learning_rate": 1e-2}


def prepared(base: Path, tokenizer: Any, pairs: Dataset, arguments: dict[str, Any], folder: Path) -> Any:
    return make(
        base, tokenizer, pairs, {**arguments, **TRAINING, "output_dir": str(folder)}, extra="swav", prototypes=6
    )


def test_its_steps_are_those_of_a_parameter_of_the_model(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """As AdamW makes them, written out, with learning rates that change from step to step."""
    trainer = prepared(base_folder, tokenizer, pairs, cpu_arguments, tmp_path)
    start, step, taken = trainer.prototypes.detach().clone(), trainer.step_beside, []

    def noted(learning_rate: float) -> None:
        taken.append((learning_rate, trainer.prototypes.grad.clone(), trainer.lr_scheduler.get_last_lr()[0]))
        step(learning_rate)
        assert trainer.prototypes.grad is None, "the next step begins at 0"

    trainer.step_beside = noted
    trainer.train()
    assert len({rate for rate, *_ in taken}) > 5
    expected, mean, square = start, torch.zeros_like(start), torch.zeros_like(start)
    for number, (rate, gradient, rate_of_model) in enumerate(taken, start=1):
        assert rate == rate_of_model
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        expected = expected - rate * (mean / (1 - 0.9**number)) / ((square / (1 - 0.999**number)).sqrt() + 1e-8)
    torch.testing.assert_close(trainer.prototypes.detach(), expected, atol=1e-5, rtol=1e-5)


def test_its_optimizer_is_of_the_model_s_kind(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    trainer = prepared(base_folder, tokenizer, pairs, {**cpu_arguments, "optim": "sgd"}, tmp_path)
    start = trainer.prototypes.detach().clone()
    trainer.prototypes.grad = torch.full_like(start, 2.0)
    trainer.step_beside(0.1)
    torch.testing.assert_close(trainer.prototypes.detach(), start - 0.2)


def test_its_gradient_is_the_mean_over_processes(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    trainer = prepared(base_folder, tokenizer, pairs, cpu_arguments, tmp_path)
    other = torch.randn_like(trainer.prototypes)

    def with_another_process(gradient: torch.Tensor, reduction: str) -> torch.Tensor:
        assert reduction == "mean"
        return (gradient + other) / 2

    trainer.accelerator.reduce = with_another_process
    (3.0 * trainer.prototypes).sum().backward()
    torch.testing.assert_close(trainer.prototypes.grad, (3.0 + other) / 2)


def test_a_checkpoint_has_its_optimizer_and_a_model_has_not(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    trainer = prepared(
        base_folder, tokenizer, pairs, {**cpu_arguments, "save_strategy": "steps", "save_steps": 4}, tmp_path
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    (state,) = torch.load(tmp_path / "checkpoint-4/prototypes.optimizer.pt", weights_only=True)["state"].values()
    assert state["step"] == 4
    assert sorted(file.name for file in (tmp_path / "model").glob("prototypes*")) == ["prototypes.safetensors"]


def test_a_checkpoint_of_an_earlier_version_is_a_sentence(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path
) -> None:
    """It had no file of this optimizer's state, and torch spoke of numbers of parameter groups."""
    trainer = prepared(base_folder, tokenizer, pairs, cpu_arguments, tmp_path)
    save_file({"prototypes": trainer.prototypes.detach()}, tmp_path / "prototypes.safetensors")
    with pytest.raises(UserError, match="an earlier version of this package wrote this checkpoint"):
        trainer.read_beside(str(tmp_path))


class Scaler:
    """float16's: it skips a step whose gradient is not finite, as torch's does."""

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"]]
        if all(bool(gradient.isfinite().all()) for gradient in gradients):
            optimizer.step()


@pytest.mark.parametrize("gradient", [1.0, float("inf")])
def test_in_float16_the_scaler_decides(
    base_folder: Path, tokenizer: Any, pairs: Dataset, cpu_arguments: dict[str, Any], tmp_path: Path, gradient: float
) -> None:
    trainer = prepared(base_folder, tokenizer, pairs, cpu_arguments, tmp_path)
    trainer.accelerator.scaler = Scaler()
    start = trainer.prototypes.detach().clone()
    trainer.prototypes.grad = torch.full_like(start, gradient)
    trainer.step_beside(0.1)
    moved = (trainer.prototypes.detach() - start).abs()
    assert trainer.prototypes.grad is None
    torch.testing.assert_close(moved, torch.full_like(moved, 0.1 if gradient == 1.0 else 0.0), atol=1e-4, rtol=0)
