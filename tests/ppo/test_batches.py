"""What a rollout's batches ask of the Trainer: nothing that it did not want itself, and the first rollout before any other."""

from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState

from rlhf.ppo.batches import EndOfRollout, RolloutBatches

WISHES = ("should_log", "should_evaluate", "should_save")


@pytest.mark.parametrize("wanted", WISHES)
def test_the_end_of_a_rollout_does_what_was_wanted_in_it_and_nothing_else(wanted: str) -> None:
    trainer: Any = SimpleNamespace(stopped=None)
    args: Any = SimpleNamespace()
    callback, state = EndOfRollout(trainer), TrainerState()
    done = []
    for step_wants in ({}, {wanted: True}, {}):  # three rollouts of two steps
        control = TrainerControl(**step_wants)
        callback.on_step_end(args, state, control)
        assert not any(getattr(control, name) for name in WISHES), "in the middle of a rollout nothing is done"
        callback.on_step_end(args, state, TrainerControl())
        callback.on_epoch_end(args, state, control)
        done.append({name for name in WISHES if getattr(control, name)})
    assert done == [set(), {wanted}, set()]


def test_the_first_batches_are_those_of_the_first_rollout() -> None:
    asked: list[int] = []

    def prompts_of(index: int) -> Any:
        asked.append(index)
        raise StopIteration

    args = SimpleNamespace(per_device_train_batch_size=1)
    trainer: Any = SimpleNamespace(args=args, rollout=list, prompts_of=prompts_of, stopped=None)
    nothing: Any = []
    batches = RolloutBatches(trainer, nothing)
    for epoch in (None, 3):
        if epoch is not None:
            batches.set_epoch(epoch)
        with pytest.raises(RuntimeError):  # a generator's own end of iteration
            next(iter(batches))
    assert asked == [0, 3]
