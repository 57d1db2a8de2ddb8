"""Where rollouts meet the Trainer: its dataloader, and the end of a rollout as the only place to log, evaluate and save."""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import TYPE_CHECKING

from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from rlhf.errors import UserError
from rlhf.ppo.checks import require_reference
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.processes import shard_frozen_roles, whole_roles
from rlhf.ppo.rollout import MicroBatch, Rollout, shuffled_minibatches

if TYPE_CHECKING:
    from rlhf.ppo.trainer import PPOTrainer


class RolloutBatches:
    """The training dataloader: iterating it samples one rollout and yields `steps_per_rollout x accumulation` micro-batches.

    It yields nothing where a checkpoint is of a run that had ended before its time: the process died between the two.
    """

    def __init__(self, trainer: "PPOTrainer", dataset: Dataset):
        self.trainer, self.dataset = trainer, dataset
        self.batch_size = trainer.args.per_device_train_batch_size
        self.rollout_index = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the number of the next rollout, which the Trainer gives before each of its epochs."""
        self.rollout_index = epoch

    def __len__(self) -> int:
        args = self.trainer.args
        return int(args.steps_per_rollout * args.gradient_accumulation_steps)

    def __iter__(self) -> Iterator[MicroBatch]:
        if self.trainer.stopped is not None:
            return
        rollout = self.trainer.rollout(self.trainer.prompts_of(self.rollout_index))
        for step in steps_of(rollout, self.trainer.args, self.rollout_index):
            yield from step


def steps_of(rollout: Rollout, args: PPOConfig, rollout_index: int) -> Iterator[list[MicroBatch]]:
    """Yield the micro-batches of every optimizer step made with a rollout, reshuffled for every PPO epoch."""
    for epoch in range(args.num_ppo_epochs):
        for minibatch in shuffled_minibatches(
            len(rollout.input_ids), args.num_mini_batches, seed=args.seed, rollout=rollout_index, epoch=epoch
        ):
            yield [rollout.rows(index) for index in minibatch.split(args.per_device_train_batch_size)]


def update(trainer: "PPOTrainer", rollout: Rollout) -> dict[str, float]:
    """Make all optimizer steps of one rollout outside of the Trainer's own loop.

    Returns:
        the metrics of sampling and update, and `episodes`.

    Raises:
        UserError: the rollout can't be cut into equal minibatches.
    """
    if trainer.optimizer is None:
        trainer.create_optimizer()
        trainer.model_wrapped, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        shard_frozen_roles(trainer)
    if len(rollout.input_ids) % trainer.args.num_mini_batches:
        raise UserError(
            f"ppo: a rollout of {len(rollout.input_ids)} rows is no whole number of num_mini_batches="
            f"{trainer.args.num_mini_batches} minibatches; give `rollout` as many rows as `prompts_of` does."
        )
    index = trainer.state.global_step // trainer.args.steps_per_rollout
    for micro_batches in steps_of(rollout, trainer.args, index):
        tokens = trainer._get_num_items_in_batch(micro_batches, trainer.accelerator.device)
        for number, batch in enumerate(micro_batches, start=1):
            is_last = number == len(micro_batches)
            trainer.accelerator.gradient_state._set_sync_gradients(is_last)
            synchronisation = nullcontext() if is_last else trainer.accelerator.no_sync(trainer.model_wrapped)
            with synchronisation:
                trainer.training_step(trainer.model_wrapped, batch, tokens)
        trainer.metrics.count("grad_norm", trainer._clip_grad_norm(trainer.model_wrapped), 1)
        trainer.optimizer.step()
        trainer.model.zero_grad()
        trainer.state.global_step += 1
    return {**trainer.metrics.take(), "episodes": trainer.episodes}


class EndOfRollout(TrainerCallback):
    """Move what the Trainer wants to do after a step (log, evaluate, save) to the end of the rollout; look after frozen roles.

    In the middle of a rollout a checkpoint could not be resumed: the experience is not part of it.
    """

    def __init__(self, trainer: "PPOTrainer") -> None:
        self.trainer = trainer
        self.wanted = {"should_log": False, "should_evaluate": False, "should_save": False}

    def on_step_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Remember what the Trainer wants to do after this step, and postpone it."""
        for name in self.wanted:
            self.wanted[name] |= getattr(control, name)
            setattr(control, name, False)

    def on_epoch_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Do what was postponed, and stop where the trainer has a reason to."""
        for name, wanted in self.wanted.items():
            setattr(control, name, getattr(control, name) or wanted)
            self.wanted[name] = False
        if self.trainer.stopped is not None:
            control.should_save = control.should_training_stop = True

    def on_train_begin(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Shard what is not trained, as what is trained has just been."""
        shard_frozen_roles(self.trainer)

    def on_train_end(self, args: PPOConfig, state: TrainerState, control: TrainerControl, **_: object) -> None:
        """Require that the reference is still what it was."""
        with whole_roles(self.trainer):
            require_reference(self.trainer)
